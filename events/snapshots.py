"""Snapshots: the state of a run that waits for long, so that it need not stay in memory. What they say, `decisions` says too."""

from events.commands import Parent, RequestPlace, SignalReceived
from events.decisions import ApprovalRequested, ChildRunRequested, RunClosing, SignalAwaited, UndoPlanned
from events.failure import Failure
from events.frozen import frozen


@frozen
class ItemFailure:
    """Why an item of a step failed."""

    index: int
    failure: Failure


@frozen
class StepSnapshot:
    """One step; the fields as in the state of a step. Outputs, items and shared arguments are JSON."""

    step: str
    status: str
    attempt: int
    awaits: str
    due: int
    output: str | None
    failure: Failure | None
    past: tuple[str, ...]
    began: int
    asked: SignalAwaited | ApprovalRequested | ChildRunRequested | None
    inner: tuple[str, ...]
    next: int
    done: int
    failed: int
    total: int
    items: str | None
    shared: str | None
    failures: tuple[ItemFailure, ...]


@frozen
class Listening:
    """Steps that wait for the same signal, the first one first."""

    signal: str
    correlation: str | None
    steps: tuple[str, ...]


@frozen
class RunSnapshot:
    """A run as its decision number `seq` left it. Topic `snapshots`, key `run_id/seq`, the decision's partition.

    `undo`: the latest first. `due`: when the run's next timer is, milliseconds since the epoch, 0: it has none.
    """

    run_id: str
    decisions_topic_id: bytes
    first_offset: int
    seq: int
    head: bytes
    last_topic_id: bytes
    last_offset: int
    due: int
    workflow: str
    digest: str
    input: str
    settled: int
    parent: Parent | None
    limit_id: str | None
    limit_due: int
    paused: bool
    stops: tuple[str, ...]
    copied: str | None
    signals: tuple[SignalReceived, ...]
    seen: tuple[str, ...]
    listening: tuple[Listening, ...]
    undo: tuple[UndoPlanned, ...]
    closing: RunClosing | None
    not_undone: tuple[str, ...]
    steps: tuple[StepSnapshot, ...]
    heard: tuple[RequestPlace, ...] = ()
