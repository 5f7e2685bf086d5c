"""The read model `signals`: what runs were told, and which step took it. Signals that a run ignored stand in `decisions` only."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from events.commands import SignalReceived
from events.decisions import RunClosing, SignalKept, SignalTaken
from projections.entry import Entry
from projections.extent import Extent, in_extent
from projections.table import Connection, Table, rows


class Status(StrEnum):
    """What became of a signal."""

    KEPT = "kept"
    """No step has waited for it yet."""
    TAKEN = "taken"
    UNUSED = "unused"
    """No step waited for it before the run came to its end."""


@dataclass(slots=True)
class SignalRow:
    """One signal. `seq`: number of the decision that received it; `payload` is JSON; `step` took it at the time `taken`."""

    run_id: str
    seq: int
    partition: int
    offset: int
    signal_id: str
    name: str
    correlation: str | None
    payload: str | None
    sent_by: str
    received: int
    status: str = Status.KEPT
    step: str | None = None
    taken: int | None = None


TABLE: Final = Table(
    "signals",
    {
        "run_id": "VARCHAR",
        "seq": "BIGINT",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "signal_id": "VARCHAR",
        "name": "VARCHAR",
        "correlation": "VARCHAR",
        "payload": "VARCHAR",
        "sent_by": "VARCHAR",
        "received": "TIMESTAMP_MS",
        "status": "VARCHAR",
        "step": "VARCHAR",
        "taken": "TIMESTAMP_MS",
    },
    key=("run_id", "seq"),
    once=frozenset({"payload"}),
)


@dataclass(slots=True)
class Signals:
    """The signals that open runs keep, in memory, by run, in the order in which they came, without the payloads."""

    open: dict[str, list[SignalRow]] = field(default_factory=dict)
    _changed: dict[tuple[str, int], SignalRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Load what is kept back."""
        self.open.clear()
        self._changed.clear()
        for row in TABLE.load(db, "WHERE status = 'kept'"):
            self.open.setdefault(row["run_id"], []).append(SignalRow(**row))

    def apply(self, entry: Entry) -> None:
        """Take an accepted decision."""
        decision, cause = entry.decision, entry.decision.input
        new: SignalRow | None = None
        if isinstance(cause, SignalReceived):
            new = SignalRow(
                *(decision.run_id, decision.seq, entry.partition, entry.offset, cause.signal_id, cause.name),
                *(cause.correlation, cause.payload, cause.by, decision.at),
            )
        for effect in decision.effects:
            match effect:
                case SignalKept() if new is not None:
                    self.open.setdefault(decision.run_id, []).append(new)
                    self._changed[new.run_id, new.seq] = new
                case SignalTaken():
                    self._taken(entry, effect, new)
                case RunClosing():
                    self._unused(decision.run_id)
                case _:
                    pass
        if entry.ends:
            self._unused(decision.run_id)

    def _taken(self, entry: Entry, effect: SignalTaken, new: SignalRow | None) -> None:
        decision = entry.decision
        kept = self.open.get(decision.run_id, [])
        row = next((each for each in kept if each.signal_id == effect.signal_id), None)
        if row is not None:
            kept.remove(row)
            if not kept:
                del self.open[decision.run_id]
        elif new is not None and new.signal_id == effect.signal_id:
            row = new
        else:
            return
        row.status, row.step, row.taken = Status.TAKEN, effect.step, decision.at
        self._changed[row.run_id, row.seq] = row

    def _unused(self, run_id: str) -> None:
        for row in self.open.pop(run_id, ()):
            row.status = Status.UNUSED
            self._changed[row.run_id, row.seq] = row

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time."""
        TABLE.upsert(db, list(self._changed.values()))
        for row in self._changed.values():
            row.payload = None  # it is in the database now
        self._changed.clear()


def of_run(db: Connection, extent: Extent, after: int, limit: int) -> list[dict[str, Any]]:
    """Return the signals that a run took notice of behind decision number `after`, in the order in which they came."""
    query = f"SELECT * FROM signals WHERE {in_extent('signals')} AND seq > $after ORDER BY seq LIMIT $limit"  # noqa: S608 - our own text
    return rows(db, query, extent.given(after=after, limit=limit))
