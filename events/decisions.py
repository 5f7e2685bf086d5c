"""Decisions: the history of every run. One record says what came in and what follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from events.calls import LlmCallRequested, ToolCallRequested
from events.failure import Failure
from events.results import Input


@dataclass(frozen=True, slots=True)
class UnreadableInput:
    """Stands for an input that could not be read or kept; its bytes are in the dead letters. `size` in bytes."""

    size: int
    blake2b: str
    problem: str


@dataclass(frozen=True, slots=True)
class RetryScheduled:
    """An attempt failed; attempt number `attempt` starts when the timer fires at `due` (milliseconds since the epoch)."""

    step: str
    attempt: int
    failure: Failure
    due: int


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """A step has its output (JSON); None: the output of the decision's input."""

    step: str
    output: str | None = None


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """A step's condition was not met."""

    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A step failed for good; `tolerated`: the run goes on without it."""

    step: str
    failure: Failure
    tolerated: bool


@dataclass(frozen=True, slots=True)
class RunCompleted:
    """The run is over and has its output (JSON)."""

    output: str


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run is over without output; `step` None: the run itself could not go on."""

    step: str | None
    failure: Failure


@dataclass(frozen=True, slots=True)
class InputIgnored:
    """The input changed nothing; why."""

    reason: str


Effect = (
    LlmCallRequested
    | ToolCallRequested
    | RetryScheduled
    | StepCompleted
    | StepSkipped
    | StepFailed
    | RunCompleted
    | RunFailed
    | InputIgnored
)


@dataclass(frozen=True, slots=True)
class Decision:
    """Topic `decisions`, key `run_id`, the inbox's partition. `at` is the input's time, milliseconds since the epoch."""

    run_id: str
    seq: int
    prev: bytes
    input_topic_id: bytes
    input_offset: int
    at: int
    input: Input | UnreadableInput
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Index entry of a run that is over. Topic `finished`, key `run_id`, the decision's partition."""

    decisions_topic_id: bytes
    first_offset: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that can't be processed, with its original bytes. Topic `deadletter`."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    reason: str
    detail: str
    request_id: str | None = None
    run_id: str | None = None
    key: bytes | None = None
    value: bytes | None = None
    headers: Mapping[str, bytes | None] = field(default_factory=dict)
