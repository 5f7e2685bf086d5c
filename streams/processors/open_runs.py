"""The open runs of one partition: in memory or on the shelf, with their timers, and where reading must begin for them.

A run that waits for long goes out of memory (rule 11): a snapshot of it is written, and once that is acknowledged the run is on
the shelf, holds the mark no longer, and comes back with its next input or shortly before its next timer. Every snapshot was made
of settled decisions, so it stays true whoever wrote it; each has a key of its own, so that no late writer can replace a later
one, and is deleted only after a later one, or the index entry of its run, is acknowledged.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import structlog

from events import codec, topics
from events.decisions import Decision, InputIgnored, TimerSet
from events.frozen import frozen
from events.results import InboxMessage, TimerFired
from events.snapshots import RunSnapshot
from streams.envelope import Outgoing, cloud_event, envelope
from streams.processors.consequences import SOURCE
from streams.processors.finished import FinishedIndex, Place
from streams.processors.shelf import Shelf
from streams.workflow.chain import Head
from streams.workflow.payloads import Memory, Payloads
from streams.workflow.snapshot import keep, next_due, restore
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunState

log = structlog.get_logger()

MAX_DECISION_BYTES: Final = topics.MAX_VALUE_BYTES - 64 * 1024
_KEEP_AT_ONCE: Final = 500
_KEEP_PART: Final = 8
"""How many runs go on or off the shelf in one round at most: others have their inputs waiting. But of many that are in memory an
eighth, so that a flood of runs that wait doesn't fill it."""
_LONG_HOLD: Final = 50_000
"""How many decisions a busy run may hold the mark back before it has a snapshot."""
_AHEAD_MS: Final = 2_000
"""How long before its timer a run comes back into memory."""
_FIRE_ANYWAY_MS: Final = 60_000
"""After how long a new owner fires timers though it has not read all inputs of former ones: at the end may be no record."""
_NEVER: Final = 1 << 62
DUE: Final = "foldflow_due"
"""Header of a snapshot: when the run's next timer is due."""

Specs = Callable[[str], WorkflowSpec | None]
Newer = Callable[..., bool]


def nobody_is_newer(schema_id: int, *kinds: type) -> bool:
    """Say that newer code writes nothing here: where there is one version of the code."""
    del schema_id, kinds
    return False


class SnapshotDamagedError(Exception):
    """A run can't be restored from its snapshot. Take over again without it, from the first decision on: those hold all of it."""

    def __init__(self, run_id: str, problem: str) -> None:
        super().__init__(f"snapshot {problem}")
        self.run_id = run_id


@frozen
class Commit:
    """What may be committed: the next input's offset, and where reading decisions and their index may start (rule 8)."""

    position: int
    mark: int
    index: int = 0


@dataclass(slots=True)
class Run:
    """An open run in memory."""

    state: RunState
    spec: WorkflowSpec | None
    first: int | None  # offset of its first decision, None until that is settled
    hold: int | None  # offset where reading must begin to see what is not in a snapshot, None until that is settled
    touched: int = 0  # when its last input came, milliseconds since the epoch
    kept: int | None = None  # number of the decision of which there is a snapshot


@dataclass(slots=True)
class OpenRuns:
    """What a tenure is made with, and the runs that it holds.

    `distrusted`: runs whose snapshots are to be passed over. `newer`: whether newer code writes such records in a schema.
    """

    place: Place
    specs: Specs
    base: Commit
    payloads: Payloads = field(default_factory=Memory)
    shelf: Shelf = field(default_factory=Shelf)
    idle_ms: int = 30_000
    distrusted: frozenset[str] = frozenset()
    newer: Newer = nobody_is_newer
    runs: dict[str, Run] = field(default_factory=dict)
    finished: FinishedIndex = field(init=False)

    position: int = field(init=False)
    end: int = field(init=False)
    _holds: list[tuple[int, str]] = field(default_factory=list)
    _timers: list[tuple[int, str, str, str]] = field(default_factory=list)
    _timers_bound: int = 1024
    _fires_from: int = 0
    _fires_anyway: int | None = None
    # Snapshots that are being written, and those that are of no use any more:
    _keeping: list[tuple[str, int, bytes, bool]] = field(default_factory=list)
    _obsolete: list[str] = field(default_factory=list)
    _superseded: list[str] = field(default_factory=list)

    # --- Runs that wait for long (rule 11) ---

    def _restored(self, run_id: str) -> Head | None:
        """Return the head of a run that is on the shelf, or was, while the log is read."""
        run = self.runs.get(run_id) or self._unshelved(run_id, self.base.mark)
        return Head(run.state.head, run.state.seq, run.first, partial=True) if run else None

    def _unshelved(self, run_id: str, hold: int) -> Run | None:
        """Bring a run back into memory. `hold`: where reading would have to begin to see what is not in its snapshot.

        Raises SnapshotDamagedError.
        """
        found = self.shelf.take(run_id)
        if found is None:
            return None
        seq, value = found
        try:
            kept = codec.decode(value, RunSnapshot)
            state = restore(kept)
        except Exception as error:  # whatever a damaged or forged one makes the restoring raise
            raise SnapshotDamagedError(run_id, f"{run_id}/{seq}: {type(error).__name__}: {error}") from error
        if (kept.run_id, kept.seq) != (run_id, seq):
            raise SnapshotDamagedError(run_id, f"{run_id}/{seq}: it is that of {kept.run_id}/{kept.seq}")
        if kept.decisions_topic_id != self.place.decisions_id or run_id in self.finished:
            self._superseded.append(f"{run_id}/{seq}")  # its deletion was lost with a former owner
            return None
        run = self.runs[run_id] = Run(state, None, kept.first_offset, hold, kept=seq)
        heapq.heappush(self._holds, (hold, run_id))
        self._set_all_timers(run_id, run.state)
        return run

    def keep_idle(self, now: int) -> list[Outgoing]:
        """Return the snapshots that must be acknowledged before the next commit, which then puts their runs on the shelf.

        Call it when everything is settled and what follows is acknowledged: who takes over looks at those decisions no more. A
        run that is busy for long has a snapshot too, so that it doesn't hold the mark.
        """
        records = [Outgoing(topics.SNAPSHOTS, key.encode(), None, [], self.place.partition) for key in self._superseded]
        self._superseded.clear()
        most = max(_KEEP_AT_ONCE, len(self.runs) // _KEEP_PART)
        for run_id, run in self.runs.items():
            if run.touched == _NEVER:
                continue
            if run.touched + self.idle_ms > now or len(self._keeping) >= most:
                break  # the least busy ones come first
            if 0 < next_due(run.state) <= now:
                run.touched = _NEVER  # its timer has fired: that input comes, and must not be made again with each return
                continue
            records += self._kept(run_id, run, shelve=True)
        oldest = self.runs.get(self._holds[0][1]) if self._holds else None
        if oldest is not None and oldest.hold is not None and self.end - oldest.hold > _LONG_HOLD:
            run_id = self._holds[0][1]
            if all(run_id != kept for kept, *_ in self._keeping):  # it may go on the shelf just now
                records += self._kept(run_id, oldest, shelve=False)
        return records

    def _kept(self, run_id: str, run: Run, *, shelve: bool) -> list[Outgoing]:
        """Return a run's snapshot; none for one that has decided inputs ahead of the position, or is too large."""
        state = run.state
        ahead = state.last_topic_id == self.place.inbox_id and state.last_offset >= self.position
        if run.first is None or ahead:
            return []
        snapshot = keep(run_id, state, self.place.decisions_id, run.first)
        value = codec.encode(snapshot)
        if len(value) > MAX_DECISION_BYTES:
            log.warning("tenure.too_large_to_keep", run_id=run_id, bytes=len(value))
            run.touched = _NEVER
            return []
        self._keeping.append((run_id, snapshot.due, value, shelve))
        if run.kept == state.seq:  # it was brought back, and nothing happened
            return []
        identity = f"{run_id}/{state.seq}"
        headers = [*cloud_event("RunSnapshot", SOURCE, identity), (DUE, str(snapshot.due).encode())]
        return [Outgoing(topics.SNAPSHOTS, identity.encode(), value, headers, self.place.partition)]

    def _shelve(self) -> None:
        """Put the runs whose snapshots are acknowledged on the shelf, where they were meant to go there."""
        for run_id, due, value, shelve in self._keeping:
            run = self.runs[run_id]
            if run.kept != run.state.seq:
                self._supersede(run_id, run)
                run.kept = run.state.seq
            run.hold = self.end
            if shelve:
                self.shelf.put(run_id, run.state.seq, due, value)
                del self.runs[run_id]
            else:
                heapq.heappush(self._holds, (run.hold, run_id))
        self._keeping.clear()

    def _supersede(self, run_id: str, run: Run) -> None:
        """Delete a run's snapshot after the next commit: by then a later one, or the index entry, is acknowledged."""
        if run.kept is not None:
            self._obsolete.append(f"{run_id}/{run.kept}")

    # --- Timers: inputs that the owner writes itself ---

    def _set_all_timers(self, run_id: str, state: RunState) -> None:
        if state.limit is not None:
            self._push_timer(state.limit[1], run_id, "", state.limit[0])
        for path, step in state.steps.items():
            if step.due and not step.settled:
                self._push_timer(step.due, run_id, path, step.awaits)

    def _set_timers(self, run_id: str, state: RunState, decision: Decision) -> None:
        """Set the timers of a decision's effects; what is settled again by later ones has none."""
        for effect in decision.effects:
            path: str | None = getattr(effect, "step", None)
            if path:
                step = state.steps.get(path)
                if step is not None and step.due and not step.settled:
                    self._push_timer(step.due, run_id, path, step.awaits)
            elif isinstance(effect, TimerSet) and state.limit is not None:
                self._push_timer(state.limit[1], run_id, "", state.limit[0])
            elif isinstance(effect, InputIgnored) and effect.reason == "early" and isinstance(decision.input, TimerFired):
                # This clock is ahead of the broker's by so much: the timer has to wait that much longer.
                fired = decision.input
                step = state.steps.get(fired.step)
                due = step.due if step else state.limit[1] if state.limit else decision.at
                self._push_timer(due + (due - decision.at), run_id, fired.step, fired.timer_id)

    def _push_timer(self, due: int, run_id: str, path: str, timer_id: str) -> None:
        heapq.heappush(self._timers, (due, run_id, path, timer_id))
        if len(self._timers) > self._timers_bound:  # most time limits are never reached: drop those of settled attempts
            self._timers = [timer for timer in self._timers if self._pending(timer)]
            heapq.heapify(self._timers)
            self._timers_bound = max(1024, 2 * len(self._timers))

    def _pending(self, timer: tuple[int, str, str, str]) -> bool:
        _, run_id, path, timer_id = timer
        run = self.runs.get(run_id)
        if run is None:
            return False
        if not path:
            return run.state.limit is not None and run.state.limit[0] == timer_id
        step = run.state.steps.get(path)
        return step is not None and step.awaits == timer_id and not step.settled

    def next_timer(self) -> int | None:
        """Return when a timer may be due next, milliseconds since the epoch."""
        if self.position < self._fires_from:
            return None
        shelved = self.shelf.next_due()
        times = [] if shelved is None else [shelved - _AHEAD_MS]
        if self._timers:
            times.append(self._timers[0][0])
        return min(times, default=None)

    def due(self, now: int) -> Iterator[Outgoing]:
        """Yield the inputs of all timers that are due at `now` (milliseconds since the epoch).

        A new owner has none before it has read the inputs that are there, within limits: a former owner may have fired them.
        """
        if self.position < self._fires_from:
            self._fires_anyway = self._fires_anyway or now + _FIRE_ANYWAY_MS
            if now < self._fires_anyway:
                return
            self._fires_from = self.position
        for run_id in self.shelf.due(now + _AHEAD_MS + 1, _KEEP_AT_ONCE):
            if run := self._unshelved(run_id, self.end):
                run.touched = now
        last = None
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            # A run that left memory and came back has set its timers again: equal ones come one after the other.
            if timer != last and self._pending(timer):
                last = timer
                due, run_id, step, timer_id = timer
                message = InboxMessage(run_id, TimerFired(timer_id, step))
                yield envelope(topics.INBOX, run_id, message, source=SOURCE, identity=timer_id, run_id=run_id, at_ms=due)


__all__ = ["DUE", "MAX_DECISION_BYTES", "Commit", "OpenRuns", "Place", "Run", "SnapshotDamagedError", "Specs"]
