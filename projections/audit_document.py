"""The audit report of one run as data: what its JSON says, and what its page is made from.

Times are UTC, durations milliseconds, money US dollars. Texts that are too long are cut, lists shortened in the middle; each says
how much it leaves out. `VERSION` grows when a reader of the JSON would have to change.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Generic, Literal, TypeVar

VERSION: Final = 1
Verdict = Literal["intact", "damaged", "partly"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Content:
    """What was given, said or came out. `kind`: whether `text` is JSON; `characters`: of the whole, of which `left_out` are cut.

    A value above 256 KB stands on Kafka as `{"$payload": digest, "bytes": size}`: it is kept elsewhere under that digest.
    """

    text: str
    kind: Literal["text", "json"]
    characters: int
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """A list of which there may be more: `total` entries, and in words which of them are left out."""

    entries: list[T]
    total: int
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands on Kafka."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Relative:
    """Another run: the one whose step `step` started this one, one that a step started, or where it was forked (`seq`)."""

    run_id: str
    workflow: str = ""
    status: str = ""
    step: str | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class AuditedRun:
    """The run. `digest` identifies the version of the workflow, `definition` is what it says.

    `requested_at`: where the request stood, None: that is not recorded; `ledger`: the places of its first and its last decision,
    `seq` how many decisions there are. `not_undone`: steps that were to be undone and are not.
    """

    run_id: str
    request_id: str | None
    labels: dict[str, str]
    workflow: str
    description: str
    digest: str
    definition: Content | None
    status: str
    started: datetime
    ended: datetime | None
    took_ms: float | None
    asked: Content
    answer: Content | None
    failure_kind: str | None
    failure_message: str | None
    failure_step: str | None
    cancelled_by: str | None
    not_undone: list[str]
    seq: int
    requested_at: Place | None
    received_at: Place | None
    ledger: tuple[Place, Place]
    parent: Relative | None
    origin: Relative | None
    children: Listed[Relative]
    forks: Listed[Relative]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a step. `late`: its worker reported back, with an answer or a failure, when that no longer counted.

    `queued_ms`: between the request and the worker's beginning; `worked_ms`: what the worker measured.
    """

    number: int | None
    outcome: str
    late: bool
    requested: datetime | None
    ended: datetime | None
    worked_ms: int | None
    queued_ms: float | None
    failure_kind: str | None
    failure_message: str | None


@dataclass(frozen=True, slots=True)
class AuditedStep:
    """One step, by path: `check[3].ask` is the step `ask` within item 3 of `check`. `did`: what it was for, in words.

    `what`: its model, tool or workflow; `remarks`: what is special about it, in words.
    """

    path: str
    status: str
    did: str
    what: str | None
    started: datetime | None
    ended: datetime | None
    took_ms: float | None
    attempts: list[Attempt]
    attempts_left_out: int
    remarks: list[str]
    output: Content | None
    input_tokens: int
    output_tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class AuditedApproval:
    """What a person was asked. `shown`: the value to be approved; `answered_by` empty: nobody, its time was over.

    `answer`: what the person made of the value, if they changed it; `waited_ms` until the answer.
    """

    step: str
    status: str
    requested: datetime
    message: str
    shown: Content | None
    may_answer: list[str]
    editable: bool
    due: datetime | None
    answered: datetime | None
    waited_ms: float | None
    answered_by: str | None
    words: str | None
    answer: Content | None


@dataclass(frozen=True, slots=True)
class Word:
    """Something that was said to the run by a person or another system. `did`: what, in words; `words`: the reason they gave.

    `ignored`: why it changed nothing, None: it counted. `seq`: the decision that took notice of it.
    """

    seq: int
    at: datetime
    kind: str
    did: str
    by: str
    words: str
    content: Content | None
    ignored: str | None
    said_at: Place | None


@dataclass(frozen=True, slots=True)
class Message:
    """A part of a prompt; `role` as models name it: `system`, `user`, `assistant`."""

    role: str
    content: Content


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call to a language model. `asked`: the model that was asked for (None: the default), `model`: the one that answered.

    `parameters`: temperature and the like; `schema`: what the answer had to look like. Cached tokens are part of `input_tokens`,
    reasoning of `output_tokens`. `cost_usd` None: the price is not known; `prices`: the price list that it is by.
    """

    call_id: str
    step: str
    attempt: int | None
    outcome: str
    late: bool
    asked: str | None
    model: str | None
    provider: str | None
    requested: datetime | None
    ended: datetime | None
    latency_ms: int | None
    parameters: Content | None
    schema: Content | None
    prompt: list[Message]
    answer: Content | None
    finish_reason: str | None
    input_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    prices: str | None
    failure_kind: str | None
    failure_message: str | None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call to a tool. `version`: the tool's, None: nothing ran. `cost_usd`: what it said that took, `paid_for`: for what."""

    call_id: str
    step: str
    attempt: int | None
    outcome: str
    late: bool
    tool: str | None
    version: str | None
    requested: datetime | None
    ended: datetime | None
    latency_ms: int | None
    arguments: Content | None
    output: Content | None
    cost_usd: float | None
    paid_for: str | None
    failure_kind: str | None
    failure_message: str | None


@dataclass(frozen=True, slots=True)
class File:
    """A file or address that tools have read or written, by which steps. `recorded_sha256`: the sum that was recorded then.

    `size`, `sha256`: of the file as it is now; only files of the run's own folder are looked at, None: it was not, or is gone.
    """

    path: str
    read_by: list[str]
    written_by: list[str]
    recorded_sha256: str | None
    size: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Flow:
    """A value went from one thing to another: which part of the source into which part of the target. `kind`: see lineage."""

    source: str
    of: str
    target: str
    into: str
    kind: str


@dataclass(frozen=True, slots=True)
class Spent:
    """What some calls used and cost. `wasted_usd`: part of it for calls that failed or whose answer nobody used.

    `unpriced_calls`: answers of models whose price is unknown, which the cost lacks; `unmetered_calls`: calls given up before an
    answer told what they used.
    """

    name: str
    calls: int
    input_tokens: int
    cache_read_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_usd: float
    wasted_usd: float
    unpriced_calls: int
    unmetered_calls: int


@dataclass(frozen=True, slots=True)
class AuditedCost:
    """What the run cost, and the runs that its steps started: `total` is the sum of `own` and `children`, and of each list."""

    total: Spent
    own: Spent
    children: Spent
    by_step: list[Spent]
    by_model: list[Spent]
    by_prices: list[Spent]


@dataclass(frozen=True, slots=True)
class IntegrityProblem:
    """Something that no honest writer can cause. `kind`: see `foldflow verify`; `field`: what differs first, and how."""

    kind: str
    problem: str
    cause: str
    place: Place
    seq: int | None
    field: str | None
    recorded: str | None
    again: str | None


@dataclass(frozen=True, slots=True)
class Integrity:
    """What came of checking the record. `partly`: nothing wrong was found, but not everything could be checked (`unchecked`).

    `head`: the hash of the last decision, which stands for all of them; `again`: how many decisions were decided again and came
    out the same to the byte; `passed_over`: records that don't count by the protocol (repetitions, decisions that lost), by kind.
    `verify`: commands by which anybody can check it.
    """

    verdict: Verdict
    checked: datetime
    took_ms: float
    source: str
    decisions: int
    again: int
    stand_ins: int
    head: str
    passed_over: dict[str, int]
    unchecked: list[str]
    problems: list[IntegrityProblem]
    problems_left_out: int
    verify: list[str]


@dataclass(frozen=True, slots=True)
class Report:
    """The audit report of one run. `summary`: all of it in a few sentences; `statuses`: how many steps are how."""

    made: datetime
    foldflow: str
    summary: list[str]
    run: AuditedRun
    steps: Listed[AuditedStep]
    statuses: dict[str, int]
    approvals: Listed[AuditedApproval]
    words: Listed[Word]
    model_calls: Listed[ModelCall]
    tool_calls: Listed[ToolCall]
    files: Listed[File]
    payloads: list[str]
    flows: Listed[Flow]
    cost: AuditedCost
    integrity: Integrity
    version: int = field(default=VERSION)
