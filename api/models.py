"""What the API answers. Times are UTC, payloads JSON values, money US dollars."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from api.access import payloads_shown
from events.as_json import payload, readable


def _utc(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _payload(value: Any) -> Any:
    if value is not None and not payloads_shown.get():
        return WITHHELD
    return payload(value) if isinstance(value, str) else value


def withheld(text: Any) -> Any:
    """Return what the caller is told of a text that only auditors see; where there is none, everybody is told so."""
    return WITHHELD_TEXT if text and not payloads_shown.get() else text


WITHHELD = {"withheld": "only tokens of the role auditor see this"}
"""What others see in a payload's place."""
WITHHELD_TEXT = "withheld: only tokens of the role auditor see this"
"""What others see in the place of a text that may quote payloads."""
_AUDITORS: Final = f"Only auditors see it; others `{WITHHELD_TEXT}`."
Time = Annotated[datetime, BeforeValidator(_utc)]
Payload = Annotated[Any, BeforeValidator(_payload), Field(description=f"Only auditors see it; others `{json.dumps(WITHHELD)}`.")]
"""JSON that a workflow works with; only auditors see it."""
Text = Annotated[str, BeforeValidator(withheld), Field(description=_AUDITORS)]
MaybeText = Annotated[str | None, BeforeValidator(withheld), Field(description=_AUDITORS)]
"""Text that is made of payloads, or may quote them; only auditors see it."""
Readable = Annotated[str | None, BeforeValidator(lambda value: readable(value) if isinstance(value, bytes) else value)]


Status = Literal["ok", "starting", "rebuilding", "degraded", "failed"]


class Answer(BaseModel):
    """Columns that an answer doesn't show are passed over."""

    model_config = ConfigDict(extra="ignore")


RunStatus = Literal["running", "paused", "closing", "completed", "failed", "cancelled"]
StepStatus = Literal[
    "pending",
    "running",
    "waiting",
    "sleeping",
    "awaiting_signal",
    "awaiting_approval",
    "entered",
    "held",
    "completed",
    "skipped",
    "failed",
    "cancelled",
    "abandoned",
]
WaitKind = Literal["approval", "signal", "sleep", "breakpoint", "pause"]


class RunSummary(Answer):
    """One run. `problem`: its chain is broken, and it was set aside where it broke."""

    run_id: str
    workflow: str
    digest: str
    status: RunStatus = Field(description="`closing`: what was done is undone and cleaned up, then the run ends.")
    waiting: dict[str, int] = Field(
        description="What its steps wait for besides calls, and how many of them.", examples=[{"approval": 1, "sleep": 2}]
    )
    request_id: str | None
    labels: dict[str, str] | None
    outcome: Literal["completed", "failed", "cancelled"] | None = Field(description="How a run that is closing will end.")
    failure_kind: str | None
    failure_message: MaybeText
    failure_step: str | None
    cancelled_by: str | None
    not_undone: list[str] = Field(description="Steps that were done and are not undone: that failed, or was not to be done.")
    breakpoints: list[str] = Field(description="Steps before which the run stops.")
    parent_run_id: str | None = Field(description="The run whose step `parent_step` started this one.")
    parent_step: str | None
    origin_run_id: str | None = Field(description="The run that this one was forked from, behind its decision `origin_seq`.")
    origin_seq: int | None
    started: Time
    updated: Time
    due: Time | None = Field(description="Its time limit.")
    ended: Time | None
    seq: int
    steps_settled: int = Field(description="How many of the workflow's own `steps_total` steps are settled.")
    steps_total: int | None
    calls: int
    child_runs: int
    retries: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    unpriced_calls: int = Field(description="LLM answers whose price is unknown; `cost_usd` lacks them.")
    partition: int
    first_offset: int
    last_offset: int
    problem: str | None


class RunPage(Answer):
    """Runs, newest first. `next`: the cursor of the next page, if there is one."""

    runs: list[RunSummary]
    next: str | None = None


class Step(Answer):
    """One step of a run, by path: `check[3].ask` is the step `ask` of item or iteration 3 of `check`.

    `undo(charge)` undoes `charge`, `finally.tidy` is a clean-up step. `pending`: nothing was decided about it yet.
    """

    step: str = Field(examples=["check[3].ask"])
    status: StepStatus
    attempt: int = 0
    kind: str | None = Field(None, description="What it does, as in the definition: `llm`, `tool`, `approval`, `for_each` …")
    model: str | None = None
    tool: str | None = None
    workflow: str | None = Field(None, description="Of which the run `child_run_id` is.")
    child_run_id: str | None = None
    detached: bool = False
    signal: str | None = None
    correlation: MaybeText = None
    started: Time | None = None
    due: Time | None = Field(None, description="When its attempt runs out of time or starts, or its wait is over.")
    ended: Time | None = None
    output: Payload = None
    source: str | None = Field(None, description="The step whose output is this one's.")
    failure_kind: str | None = None
    failure_message: MaybeText = None
    tolerated: bool = False
    reason: str | None = Field(None, description="Why it was skipped, is held or was cancelled.")
    copied: bool = Field(False, description="It has the result that it had in the run that this one was forked from.")
    changed: bool = Field(False, description="Somebody has set its output.")
    compensation: str | None = Field(None, description="What undoes it, if the run fails or is cancelled.")
    total: int | None = Field(None, description="How many items it has.")
    begun: int = Field(0, description="How many of its items, iterations or steps have begun.")
    done: int = Field(0, description="How many of those are settled.")
    failed: int = Field(0, description="How many of those have failed or were cancelled.")
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


class StepPage(Answer):
    """Steps of a run, in the order in which they began. `next`: the cursor of the next page, if there is one."""

    run_id: str
    steps: list[Step]
    next: str | None = None


class Approval(Answer):
    """What a person was asked, and what came of it. `answer`: what they made of the value, if they changed it."""

    run_id: str
    step: str
    status: Literal["waiting", "approved", "rejected", "expired", "replaced", "cancelled"] = Field(
        description="`expired`: nobody answered in time; `replaced`: somebody set the step's output instead."
    )
    message: Text = Field(examples=["Send this mail to 3 customers?"])
    value: Payload = Field(description="What is to be approved; only auditors see it.")
    may_answer: list[str] = Field(description="Who may answer; empty: anybody.", examples=[["ann", "bob"]])
    editable: bool = Field(description="Whether they may change the value.")
    requested: Time
    due: Time | None
    answered: Time | None
    answered_by: str | None = Field(description='"" when its time was over and the workflow says what then.')
    reason: MaybeText
    edited: bool
    answer: Payload = None


class ListedApproval(Approval):
    """An approval of any run."""

    workflow: str


class ApprovalPage(Answer):
    """Approvals of all runs, newest first. `next`: the cursor of the next page, if there is one."""

    approvals: list[ListedApproval]
    next: str | None = None


class RunApprovals(Answer):
    """Approvals of one run, in the order in which they were asked for."""

    run_id: str
    approvals: list[Approval]


class Signal(Answer):
    """A signal that a run took notice of. `kept`: no step has waited for it yet; `unused`: none did before the end."""

    seq: int
    signal_id: str
    name: str = Field(examples=["payment"])
    correlation: MaybeText
    payload: Payload
    sent_by: str
    received: Time
    status: Literal["kept", "taken", "unused"]
    step: str | None
    taken: Time | None


class SignalPage(Answer):
    """Signals of a run, in order. `next`: the number to go on after, if there are more."""

    run_id: str
    signals: list[Signal]
    next: int | None = None


class Wait(Answer):
    """What a step waits for besides a call. `due`: until when at most; `since`: from when on."""

    kind: WaitKind
    step: str
    since: Time | None
    due: Time | None
    message: MaybeText = None
    may_answer: list[str] = []
    signal: str | None = None
    correlation: MaybeText = None


class Call(Answer):
    """One LLM or tool call. `late`: its answer came after the attempt was given up, and is paid all the same."""

    call_id: str
    step: str
    attempt: int | None
    kind: Literal["llm", "tool"]
    outcome: Literal["pending", "completed", "failed", "timed_out", "cancelled", "abandoned", "stray"]
    late: bool
    model: str | None
    provider: str | None
    tool: str | None
    tool_version: str | None
    requested: Time | None
    deadline: Time | None
    ended: Time | None
    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    latency_ms: int | None
    finish_reason: str | None
    failure_kind: str | None
    failure_message: MaybeText


class Run(RunSummary):
    """One run with all that is known of it. `head`: the hash of its last decision."""

    head: str
    origin_head: str | None = Field(description="The hash of the decision that this run was forked behind.")
    input: Payload
    output: Payload
    steps: list[Step] = Field(
        description="All steps; of a run with very many, those in items and iterations only as far as they are under way or went "
        "wrong. GET /runs/{run_id}/steps has all."
    )
    steps_known: int = Field(description="How many steps, items and iterations something was decided about.")
    waits_for: list[Wait] = Field(description="What its steps wait for besides calls, the first 100 of them.")
    children: list[RunSummary] = Field(description="Runs that its steps have started, the newest 100 of them.")
    calls_made: list[Call] = Field(description="Its calls; of a run with very many, the last ones.")


class Decision(Answer):
    """Where a decision stands in the log, and what kind it is. `ignored`: why its input changed nothing; `by`: who said it."""

    seq: int
    partition: int
    offset: int
    decided: Time
    input_offset: int
    input: str
    step: str | None
    by: str | None
    effects: list[str]
    ignored: str | None
    hash: str
    size: int


class DecisionPage(Answer):
    """Decisions of a run, in order. `next`: the number to go on after, if there are more."""

    run_id: str
    decisions: list[Decision]
    next: int | None = None


class StreamedDecision(Decision):
    """A decision in a live stream, with its run's workflow and labels."""

    run_id: str
    workflow: str
    labels: dict[str, str]


class FullDecision(Decision):
    """A decision as it stands in Kafka."""

    run_id: str
    record: dict[str, Any]


LetterStatus = Literal["open", "redriven", "discarded"]


class DeadLetterSummary(Answer):
    """A message that couldn't be processed. `size`: of its value, in bytes; `settled_…`: what was done about it last."""

    topic: str
    partition: int
    offset: int
    received: Time
    reason: str
    detail: Text
    request_id: str | None
    run_id: str | None
    size: int | None
    status: LetterStatus
    settled_at: Time | None
    settled_by: str | None
    settled_reason: str | None


class Settlement(Answer):
    """What somebody did about a dead letter; `to_…`: where its message stands now, if it was redriven."""

    action: Literal["redriven", "discarded"]
    at: Time
    by: str
    reason: str
    to_partition: int | None
    to_offset: int | None


class DeadLetter(DeadLetterSummary):
    """A dead letter with its bytes (as text where they are text, else hexadecimal behind `0x`) and all that was done about it."""

    key: Readable
    value: Readable
    history: list[Settlement]


class DeadLetterPage(Answer):
    """Dead letters, newest first. `next`: the cursor of the next page, if there is one."""

    deadletters: list[DeadLetterSummary]
    next: str | None = None


class Request(Answer):
    """What became of a request: its run, or why it was refused."""

    request_id: str
    run_id: str
    status: Literal["accepted", "refused"]
    run: RunSummary | None
    deadletters: list[DeadLetterSummary]


class PartitionHealth(Answer):
    """How far the views have read a partition: its next offset, and the records behind that."""

    topic: str
    partition: int
    position: int
    lag: int


class Ignored(Answer):
    """How many records of a partition don't count, by verdict."""

    topic: str
    partition: int
    verdict: str
    records: int


class Break(Answer):
    """A run whose chain is broken, as no honest writer can do it."""

    run_id: str
    partition: int
    offset: int
    problem: str


class Rebuild(Answer):
    """Views that are made anew from Kafka: why, and how many records (`position`) are read of those that must be (`end`)."""

    reason: str
    position: int
    end: int


class Health(Answer):
    """How things stand. `starting`: the views have not yet reached the end that the log had at the start.

    `rebuilding`: they are made anew, because they were damaged or the topics are others; until then questions get 503.
    `degraded`: something is wrong, and questions are answered: `problem`, `breaks`, or Kafka doesn't answer.
    """

    status: Status
    kafka: str
    kafka_reachable: bool
    failure: str | None = Field(description="Why the process ends.")
    problem: str | None = Field(description="What hinders the views, and is tried again until it works.")
    rebuild: Rebuild | None
    lag: int
    partitions: list[PartitionHealth]
    ignored: list[Ignored]
    breaks: list[Break]
