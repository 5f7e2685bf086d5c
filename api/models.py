"""What the API answers. Times are UTC, payloads JSON values, money US dollars."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from projections.as_json import payload, readable


def _utc(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


Time = Annotated[datetime, BeforeValidator(_utc)]
Payload = Annotated[Any, BeforeValidator(lambda value: payload(value) if isinstance(value, str) else value)]
Readable = Annotated[str | None, BeforeValidator(lambda value: readable(value) if isinstance(value, bytes) else value)]


Status = Literal["ok", "starting", "degraded", "failed"]


class Answer(BaseModel):
    """Columns that an answer doesn't show are passed over."""

    model_config = ConfigDict(extra="ignore")


class Problem(BaseModel):
    """What is wrong (RFC 9457), and what to do about it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    hint: str
    instance: str | None = None


class RunSummary(Answer):
    """One run. `problem`: its chain is broken, and it was set aside where it broke."""

    run_id: str
    workflow: str
    digest: str
    status: Literal["open", "completed", "failed"]
    request_id: str | None
    labels: dict[str, str] | None
    failure_kind: str | None
    failure_message: str | None
    failure_step: str | None
    started: Time
    updated: Time
    ended: Time | None
    seq: int
    steps_settled: int
    steps_total: int | None
    calls: int
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
    """One step of a run. `due`: when its attempt runs out of time, or starts; `pending`: nothing was decided about it yet."""

    step: str
    status: Literal["pending", "running", "waiting", "completed", "skipped", "failed", "abandoned"]
    attempt: int = 0
    kind: Literal["llm", "tool", "transform"] | None = None
    model: str | None = None
    tool: str | None = None
    started: Time | None = None
    due: Time | None = None
    ended: Time | None = None
    output: Payload = None
    failure_kind: str | None = None
    failure_message: str | None = None
    tolerated: bool = False
    skipped_reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


class Call(Answer):
    """One LLM or tool call. `late`: its answer came after the attempt was given up, and is paid all the same."""

    call_id: str
    step: str
    attempt: int | None
    kind: Literal["llm", "tool"]
    outcome: Literal["pending", "completed", "failed", "timed_out", "abandoned", "stray"]
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
    failure_message: str | None


class Run(RunSummary):
    """One run with all that is known of it. `head`: the hash of its last decision."""

    head: str
    input: Payload
    output: Payload
    steps: list[Step]
    calls_made: list[Call]


class Decision(Answer):
    """Where a decision stands in the log, and what kind it is. `ignored`: why its input changed nothing."""

    seq: int
    partition: int
    offset: int
    decided: Time
    input_offset: int
    input: str
    step: str | None
    effects: list[str]
    ignored: str | None
    hash: str
    size: int


class DecisionPage(Answer):
    """Decisions of a run, in order. `next`: the number to go on after, if there are more."""

    run_id: str
    decisions: list[Decision]
    next: int | None = None


class FullDecision(Decision):
    """A decision as it stands in Kafka."""

    run_id: str
    record: dict[str, Any]


class DeadLetterSummary(Answer):
    """A message that couldn't be processed. `size`: of its value, in bytes."""

    topic: str
    partition: int
    offset: int
    received: Time
    reason: str
    detail: str
    request_id: str | None
    run_id: str | None
    size: int | None


class DeadLetter(DeadLetterSummary):
    """A dead letter with its bytes: as text where they are text, else hexadecimal behind `0x`."""

    key: Readable
    value: Readable


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


class Health(Answer):
    """How things stand. `starting`: the views have not yet reached the end that the log had at the start."""

    status: Status
    kafka: str
    kafka_reachable: bool
    failure: str | None
    lag: int
    partitions: list[PartitionHealth]
    ignored: list[Ignored]
    breaks: list[Break]
