"""The read model `steps`: where each step of each run is, by path. A step that nothing was decided about yet has no row.

Items and iterations, and the steps within them, have rows of their own, also when the run has long forgotten them. Only those
that are not settled are in memory: what a decision costs here does not depend on how long its run is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ChangeOutput, StartRun
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    ChildRunRequested,
    LoopAdvanced,
    MapStarted,
    OutputChanged,
    RetryScheduled,
    SignalAwaited,
    SignalTaken,
    StepCancelled,
    StepCompleted,
    StepCopied,
    StepFailed,
    StepHeld,
    StepSkipped,
    TimerSet,
    UndoPlanned,
)
from events.failure import Failure
from events.ids import effect_id
from events.ids import run_id as run_id_of
from events.results import ChildRunCompleted, LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from projections.entry import PICO, Entry, Moved, Spent
from projections.runs import Runs
from projections.table import Connection, Table, rows
from streams.workflow.plan import FINALLY
from streams.workflow.state import SETTLED, Copied, StepStatus, copied_results, owner_path

ABANDONED: Final = "abandoned"
"""Status of a step that was not settled when its run ended."""
_SETTLED: Final = frozenset(status.value for status in SETTLED)
WAITS: Final = {
    StepStatus.AWAITING_APPROVAL.value: "approval",
    StepStatus.AWAITING_SIGNAL.value: "signal",
    StepStatus.SLEEPING.value: "sleep",
}
"""What a step of this status waits for."""
BREAKPOINT: Final = "breakpoint"
_LATE: Final = (LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed, ChangeOutput)
"""Inputs that may be about a step that is settled."""


@dataclass(slots=True)
class StepRow:
    """One step. `partition` and `offset` are those of the decision that first was about it, `position` its effect's number there.

    Tokens and cost are sums over its attempts. `due`: when its attempt runs out of time or starts, or its wait is over.
    `reason`: why it was skipped, is held or was cancelled. `copied`: it has the result of the run that this one was forked from.
    `source`: the step whose output is its own. `compensation`: what undoes it, if need be. Of a step that waits for a signal:
    `signal` and `correlation`; of one that starts a run: `workflow`, `child_run_id`, and `detached` if it doesn't wait for it.
    Of a step with steps, items or iterations: how many have `begun`, are `done` (settled), and `failed` (or were cancelled) of
    these; of a step with items how many there are in `total`.
    """

    run_id: str
    step: str
    position: int
    partition: int
    offset: int
    status: str = ""
    attempt: int = 0
    kind: str | None = None
    model: str | None = None
    tool: str | None = None
    workflow: str | None = None
    child_run_id: str | None = None
    detached: bool = False
    signal: str | None = None
    correlation: str | None = None
    started: int | None = None
    due: int | None = None
    ended: int | None = None
    output: str | None = None
    source: str | None = None
    failure_kind: str | None = None
    failure_message: str | None = None
    tolerated: bool = False
    reason: str | None = None
    copied: bool = False
    changed: bool = False
    compensation: str | None = None
    total: int | None = None
    begun: int = 0
    done: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    stored: bool = False


TABLE: Final = Table(
    "steps",
    {
        "run_id": "VARCHAR",
        "step": "VARCHAR",
        "position": "BIGINT",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "status": "VARCHAR",
        "attempt": "BIGINT",
        "kind": "VARCHAR",
        "model": "VARCHAR",
        "tool": "VARCHAR",
        "workflow": "VARCHAR",
        "child_run_id": "VARCHAR",
        "detached": "BOOLEAN",
        "signal": "VARCHAR",
        "correlation": "VARCHAR",
        "started": "TIMESTAMP_MS",
        "due": "TIMESTAMP_MS",
        "ended": "TIMESTAMP_MS",
        "output": "VARCHAR",
        "source": "VARCHAR",
        "failure_kind": "VARCHAR",
        "failure_message": "VARCHAR",
        "tolerated": "BOOLEAN",
        "reason": "VARCHAR",
        "copied": "BOOLEAN",
        "changed": "BOOLEAN",
        "compensation": "VARCHAR",
        "total": "BIGINT",
        "begun": "BIGINT",
        "done": "BIGINT",
        "failed": "BIGINT",
        "input_tokens": "BIGINT",
        "output_tokens": "BIGINT",
        "cost_usd": "DOUBLE",
    },
    key=("run_id", "step"),
    once=frozenset({"output"}),
    indexed=False,
)


@dataclass(slots=True)
class Steps:
    """The steps of open runs that are not settled, in memory, without the outputs that were written.

    Without a database (`write` is never called) all steps stay.
    """

    open: dict[str, dict[str, StepRow]] = field(default_factory=dict)
    _copied: dict[str, dict[str, Copied]] = field(default_factory=dict)
    _changed: dict[tuple[str, str], StepRow] = field(default_factory=dict)
    _fetched: set[tuple[str, str]] = field(default_factory=set)

    def load(self, db: Connection) -> None:
        """Load the steps of open runs back."""
        for held in (self.open, self._copied, self._changed, self._fetched):
            held.clear()
        unsettled = "status NOT IN (SELECT unnest(?)) AND run_id IN (SELECT run_id FROM runs WHERE ended IS NULL)"
        for row in TABLE.load(db, f"WHERE {unsettled}", [sorted(_SETTLED)]):
            self.open.setdefault(row["run_id"], {})[row["step"]] = StepRow(**row, stored=True)
        for row in rows(db, "SELECT run_id, copied FROM runs WHERE ended IS NULL AND copied IS NOT NULL"):
            self._copied[row["run_id"]] = copied_results(row["copied"])

    def fetch(self, db: Connection, entries: Iterable[Entry], runs: Runs) -> None:
        """Get the settled steps back that these decisions may still change: late answers cost, outputs can be replaced."""
        keys, begun = [], set[str]()
        for entry in entries:
            decision, cause = entry.decision, entry.decision.input
            if decision.seq == 1:
                begun.add(decision.run_id)
            elif isinstance(cause, _LATE) and decision.run_id not in begun:
                held = self.open.get(decision.run_id)
                if held is None or cause.step not in held:
                    keys.append((decision.run_id, cause.step))
        for row in TABLE.load_keys(db, keys, runs.first_offset(run_id for run_id, _ in keys)):
            self.open.setdefault(row["run_id"], {})[row["step"]] = StepRow(**row, stored=True)
            self._fetched.add((row["run_id"], row["step"]))

    def apply(self, entry: Entry, spent: Spent | None) -> Moved:
        """Take an accepted decision; return what it did to the run's steps."""
        decision = entry.decision
        run_id = decision.run_id
        held = self.open.setdefault(run_id, {})
        if isinstance(decision.input, StartRun) and decision.input.copied and decision.seq == 1:
            self._copied[run_id] = copied_results(decision.input.copied)
        taking = _Taking(entry, held, self._changed, self._copied.get(run_id, {}))
        for index, effect in enumerate(decision.effects):
            take = _EFFECTS.get(type(effect))
            if take is not None:
                taking.index = index
                take(taking, effect)
        if spent is not None and spent.step in held:
            row = taking.row(spent.step)
            row.input_tokens += spent.input_tokens
            row.output_tokens += spent.output_tokens
            row.cost_usd = round(row.cost_usd + (spent.cost_usd or 0.0), PICO)
            if isinstance(decision.input, LlmCallCompleted):
                row.model = decision.input.model
        if entry.ends:
            for name, row in held.items():
                if row.status not in _SETTLED:
                    row.status, row.ended, row.due = ABANDONED, decision.at, None
                    self._changed[run_id, name] = row
            del self.open[run_id]
            self._copied.pop(run_id, None)
        return taking.moved

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time, and forget what is settled."""
        TABLE.write(db, list(self._changed.values()))
        for row in self._changed.values():
            row.output = None  # it is in the database now
        for run_id, step in (*self._changed, *self._fetched):
            held = self.open.get(run_id)
            if held is not None and step in held and held[step].status in _SETTLED:
                del held[step]
        self._changed.clear()
        self._fetched.clear()


class _Taking:
    """A decision that is being taken: its run's steps, and what it did to them so far."""

    __slots__ = ("_changed", "_copied", "_entry", "_held", "index", "moved")

    def __init__(
        self, entry: Entry, held: dict[str, StepRow], changed: dict[tuple[str, str], StepRow], copied: dict[str, Copied]
    ) -> None:
        self._entry, self._held, self._changed, self._copied = entry, held, changed, copied
        self.index, self.moved = 0, Moved()

    def row(self, path: str) -> StepRow:
        """Return a step's row, a new one if need be, and note that it changes."""
        entry = self._entry
        row = self._held.get(path)
        if row is None:
            run_id = entry.decision.run_id
            row = self._held[path] = StepRow(run_id, path, self.index, entry.partition, entry.offset)
            if (around := self.owner(path)) is not None:
                around.begun += 1
        self._changed[row.run_id, path] = row
        return row

    def owner(self, path: str) -> StepRow | None:
        """Return the step that this is an item or one of the steps of, and note that it changes."""
        owner = owner_path(path) if path else None
        row = self._held.get(owner) if owner is not None else None
        if row is not None:
            self._changed[row.run_id, row.step] = row
        return row

    def goes(self, path: str, status: StepStatus, kind: str | None = None, due: int | None = None, reason: str = "") -> StepRow:
        """Let a step that isn't settled be in another status."""
        row = self.row(path)
        self._move(row, status, reason)
        row.due, row.kind = due, kind or row.kind
        row.started = self._entry.decision.at if row.started is None else row.started
        return row

    def settles(self, path: str, status: StepStatus, output: str | None = None, failure: Failure | None = None) -> StepRow:
        """Let a step be settled; if it was already, only its output changes."""
        row = self.row(path)
        again = row.status in _SETTLED
        self._move(row, status, "")
        row.ended, row.due, row.output = self._entry.decision.at, None, output
        row.failure_kind, row.failure_message = (str(failure.kind), failure.message) if failure else (None, None)
        if again:
            return row
        if (around := self.owner(path)) is not None:
            around.done += 1
            around.failed += status in (StepStatus.FAILED, StepStatus.CANCELLED)
        elif path != FINALLY and owner_path(path) is None and path[-1] != ")":
            self.moved.settled += 1
        return row

    def _move(self, row: StepRow, status: StepStatus, reason: str) -> None:
        waits = self.moved.waits
        if (kind := _waits(row)) is not None:
            waits[kind] = waits.get(kind, 0) - 1
        row.status, row.reason = status.value, reason or None
        if (kind := _waits(row)) is not None:
            waits[kind] = waits.get(kind, 0) + 1

    # --- Effects ---

    def llm(self, effect: LlmCallRequested) -> None:
        row = self.goes(effect.step, StepStatus.RUNNING, "llm", effect.deadline)
        row.attempt, row.model = effect.attempt, effect.model

    def tool(self, effect: ToolCallRequested) -> None:
        row = self.goes(effect.step, StepStatus.RUNNING, "tool", effect.deadline)
        row.attempt, row.tool = effect.attempt, effect.tool

    def child(self, effect: ChildRunRequested) -> None:
        row = self.goes(effect.step, StepStatus.RUNNING, "run", effect.due)
        row.attempt, row.workflow, row.detached = effect.attempt, effect.workflow, effect.detached
        row.child_run_id = run_id_of(effect_id(self._entry.hash, self.index))
        if effect.detached:
            self.settles(effect.step, StepStatus.COMPLETED, "null")

    def retry(self, effect: RetryScheduled) -> None:
        row = self.goes(effect.step, StepStatus.WAITING, None, effect.due)
        row.attempt, row.failure_kind, row.failure_message = effect.attempt, str(effect.failure.kind), effect.failure.message

    def timer(self, effect: TimerSet) -> None:
        if not effect.step:
            return  # the run's own time limit
        row = self._held.get(effect.step)
        if row is not None and row.status == StepStatus.ENTERED.value:
            self.row(effect.step).due = effect.due
        else:
            self.goes(effect.step, StepStatus.SLEEPING, "sleep", effect.due)

    def awaited(self, effect: SignalAwaited) -> None:
        row = self.goes(effect.step, StepStatus.AWAITING_SIGNAL, "wait_for", effect.due)
        row.signal, row.correlation = effect.signal, effect.correlation

    def taken(self, effect: SignalTaken) -> None:
        self.settles(effect.step, StepStatus.COMPLETED).kind = "wait_for"  # the output is the signal's payload: see `signals`

    def approval(self, effect: ApprovalRequested) -> None:
        self.goes(effect.step, StepStatus.AWAITING_APPROVAL, "approval", effect.due)

    def block(self, effect: BlockEntered) -> None:
        self.goes(effect.step, StepStatus.ENTERED, "steps")

    def items(self, effect: MapStarted) -> None:
        self.goes(effect.step, StepStatus.ENTERED, "for_each").total = effect.total

    def loop(self, effect: LoopAdvanced) -> None:
        if effect.index == 0:
            self.goes(effect.step, StepStatus.ENTERED, "repeat")

    def held(self, effect: StepHeld) -> None:
        self.goes(effect.step, StepStatus.HELD, None, None, effect.reason).attempt = effect.attempt

    def copied(self, effect: StepCopied) -> None:
        status, output, failure = self._copied.get(effect.step, (StepStatus.COMPLETED, None, None))
        self.settles(effect.step, status, output, failure).copied = True

    def completed(self, effect: StepCompleted) -> None:
        cause = self._entry.decision.input
        output = effect.output
        if (
            output is None
            and effect.source is None
            and isinstance(cause, LlmCallCompleted | ToolCallCompleted | ChildRunCompleted)
        ):
            output = cause.output
        row = self.settles(effect.step, StepStatus.COMPLETED, output)
        row.source, row.kind = effect.source, row.kind or "transform"

    def skipped(self, effect: StepSkipped) -> None:
        self.settles(effect.step, StepStatus.SKIPPED).reason = effect.reason

    def failed(self, effect: StepFailed) -> None:
        self.settles(effect.step, StepStatus.FAILED, None, effect.failure).tolerated = effect.tolerated

    def cancelled(self, effect: StepCancelled) -> None:
        self.settles(effect.step, StepStatus.CANCELLED).reason = effect.reason

    def changed(self, effect: OutputChanged) -> None:
        cause = self._entry.decision.input
        output = cause.output if isinstance(cause, ChangeOutput) else None
        row = self.settles(effect.step, StepStatus.COMPLETED, output)
        row.source, row.changed, row.tolerated = None, True, False

    def undo(self, effect: UndoPlanned) -> None:
        self.row(effect.step).compensation = effect.compensation


_EFFECTS: Final[dict[type[Any], Callable[[_Taking, Any], None]]] = {
    LlmCallRequested: _Taking.llm,
    ToolCallRequested: _Taking.tool,
    ChildRunRequested: _Taking.child,
    RetryScheduled: _Taking.retry,
    TimerSet: _Taking.timer,
    SignalAwaited: _Taking.awaited,
    SignalTaken: _Taking.taken,
    ApprovalRequested: _Taking.approval,
    BlockEntered: _Taking.block,
    MapStarted: _Taking.items,
    LoopAdvanced: _Taking.loop,
    StepHeld: _Taking.held,
    StepCopied: _Taking.copied,
    StepCompleted: _Taking.completed,
    StepSkipped: _Taking.skipped,
    StepFailed: _Taking.failed,
    StepCancelled: _Taking.cancelled,
    OutputChanged: _Taking.changed,
    UndoPlanned: _Taking.undo,
}
"""What each effect does to steps; the others, and those of later versions, do nothing."""


def _waits(row: StepRow) -> str | None:
    """Return what a step waits for besides calls, if for anything."""
    if row.status == StepStatus.HELD.value:
        return BREAKPOINT if row.reason == BREAKPOINT else None
    return WAITS.get(row.status)
