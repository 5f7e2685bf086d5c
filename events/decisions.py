"""Decisions: the history of every run. One record says what came in and what follows from it."""

from collections.abc import Mapping
from dataclasses import field

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import RequestPlace
from events.failure import Failure
from events.frozen import frozen
from events.results import Input


@frozen
class UnreadableInput:
    """Stands for an input that could not be read or kept; its bytes are in the dead letters. `size` in bytes."""

    size: int
    blake2b: str
    problem: str


@frozen
class RetryScheduled:
    """An attempt failed; attempt number `attempt` starts when the timer fires at `due` (milliseconds since the epoch)."""

    step: str
    attempt: int
    failure: Failure
    due: int


@frozen
class TimerSet:
    """A step waits until `due` (milliseconds since the epoch). Step "": the run's time limit."""

    step: str
    due: int


@frozen
class SignalAwaited:
    """A step waits for a signal, until `due` if there is a limit."""

    step: str
    signal: str
    correlation: str | None
    due: int | None


@frozen
class SignalKept:
    """No step waits for the decision's signal yet: it is kept for one that will."""

    signal_id: str


@frozen
class SignalTaken:
    """A step takes a signal; its output is the signal's payload."""

    step: str
    signal_id: str


@frozen
class ApprovalRequested:
    """A person must approve `value` (JSON). `by`: who may, empty: anybody; `editable`: they may change it."""

    step: str
    message: str
    value: str
    by: tuple[str, ...]
    editable: bool
    due: int | None


@frozen
class ChildRunRequested:
    """Another run is started, named by this effect's id; `digest` None: the newest version. `detached`: nobody waits for it."""

    step: str
    attempt: int
    workflow: str
    digest: str | None
    input: str
    detached: bool
    due: int | None


@frozen
class BlockEntered:
    """A step with steps of its own begins."""

    step: str


@frozen
class MapStarted:
    """A step begins for each of its `items` (JSON). `shared`: arguments that are the same for all of them (JSON), if any."""

    step: str
    total: int
    items: str
    shared: str | None


@frozen
class LoopAdvanced:
    """A loop goes into its iteration number `index`, from 0."""

    step: str
    index: int


@frozen
class StepHeld:
    """A step could start its attempt, but is held: the run is paused, or stops before this step."""

    step: str
    attempt: int
    reason: str


@frozen
class StepCopied:
    """A step has the result that it had in the run that this one was forked from; nothing was called."""

    step: str


@frozen
class StepCompleted:
    """A step has its output (JSON); None: the output of the decision's input, or of the step `source`."""

    step: str
    output: str | None = None
    source: str | None = None


@frozen
class OutputChanged:
    """Somebody replaced a step's output by that of the decision's input."""

    step: str


@frozen
class UndoPlanned:
    """Should the run fail or be cancelled, `compensation` undoes this step, with these arguments (JSON)."""

    step: str
    compensation: str
    arguments: str


@frozen
class CallCancelled:
    """Nobody waits for a call any more."""

    step: str
    call_id: str
    reason: str


@frozen
class ChildRunCancelled:
    """Nobody waits for a child run any more: it is cancelled."""

    step: str
    run_id: str
    reason: str


@frozen
class StepCancelled:
    """A step that waited, or had begun, goes no further."""

    step: str
    reason: str


@frozen
class StepSkipped:
    """A step's condition was not met."""

    step: str
    reason: str


@frozen
class StepFailed:
    """A step failed for good; `tolerated`: the run goes on without it."""

    step: str
    failure: Failure
    tolerated: bool


@frozen
class RunCompleted:
    """The run is over and has its output (JSON)."""

    output: str


@frozen
class RunFailed:
    """The run is over without output; `step` None: the run itself could not go on.

    `not_undone`: steps whose compensation failed, was cancelled or never began.
    """

    step: str | None
    failure: Failure
    not_undone: tuple[str, ...] = ()


@frozen
class RunCancelled:
    """The run is over because somebody said so. `not_undone` as in RunFailed."""

    by: str
    reason: str
    not_undone: tuple[str, ...] = ()


@frozen
class RunClosing:
    """The run goes no further: compensations and clean-up steps follow, then its end.

    `outcome`: what that will be: `completed` (with `output`), `failed` (with `failure` and its step) or `cancelled`.
    """

    outcome: str
    output: str | None = None
    step: str | None = None
    failure: Failure | None = None
    by: str = ""
    reason: str = ""


@frozen
class RunPaused:
    """Nothing more is started."""


@frozen
class RunResumed:
    """What was held is started. `single`: and what comes next is held again."""

    single: bool


@frozen
class BreakpointSet:
    """The run stops before this step."""

    step: str


@frozen
class BreakpointCleared:
    """The run stops before this step no more."""

    step: str


@frozen
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
    | TimerSet
    | SignalAwaited
    | SignalKept
    | SignalTaken
    | ApprovalRequested
    | ChildRunRequested
    | BlockEntered
    | MapStarted
    | LoopAdvanced
    | StepHeld
    | StepCopied
    | OutputChanged
    | UndoPlanned
    | CallCancelled
    | ChildRunCancelled
    | StepCancelled
    | RunCancelled
    | RunClosing
    | RunPaused
    | RunResumed
    | BreakpointSet
    | BreakpointCleared
)


@frozen
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
    said: RequestPlace | None = None


@frozen
class FinishedRun:
    """Index entry of a run that is over. Topic `finished`, key `run_id`, the decision's partition."""

    decisions_topic_id: bytes
    first_offset: int


@frozen
class FinishedRuns:
    """A part of that index, packed: 24 bytes a run, sorted (its id's 16 bytes, the offset in 8). Key `packed/<end>/<part>`.

    Its parts together hold all that stands in the partition before the offset `end`.
    """

    decisions_topic_id: bytes
    runs: bytes


@frozen
class SchemaPublished:
    """A schema that processes of this installation write, so that older code knows its records from garbage. Topic `schemas`."""

    id: int
    name: str
    schema: str


@frozen
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


@frozen
class DeadLetterSettled:
    """What somebody did about a dead letter: `action` is `redriven` or `discarded`. Topic `deadletter`.

    `topic`, `partition`, `offset`: where the message was; `to_…`: where it stands again; `at`: milliseconds since the epoch.
    """

    topic: str
    partition: int
    offset: int
    action: str
    at: int
    by: str
    reason: str
    to_partition: int | None = None
    to_offset: int | None = None
