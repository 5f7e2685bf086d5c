"""The shared filter: which records of a decisions partition count. Every reader goes through it, so every reader sees the same.

A record counts if and only if it extends its run's hash chain as accepted so far. The first in the log wins; whatever else was
written on top of the same head has lost for ever, and so has what was written on top of a loser. A run that stands in the index
of finished runs, and whose first decision lies before where reading began, is passed over. All of that happens to honest writers.
What can't happen to them is a record that extends nothing that was ever there: then a byte was changed or a record is missing.
That run is set aside, the rest goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from events.decisions import Decision, RunCancelled, RunCompleted, RunFailed
from events.frozen import frozen
from events.ids import FIRST_PREV


class Verdict(Enum):
    """What the filter says about a record."""

    ACCEPTED = "accepted"
    OVERTAKEN = "overtaken"
    FINISHED_BEFORE = "finished_before"
    SET_ASIDE = "set_aside"
    BROKEN = "broken"


@frozen
class Head:
    """Where a run's chain is. `first`: offset of its first decision, None while unknown; `over`: no decision can follow.

    `partial`: it was taken from a snapshot, so what was written on top of former decisions and lost is not known.
    """

    hash: bytes = FIRST_PREV
    seq: int = 0
    first: int | None = None
    over: bool = False
    partial: bool = False


NEW = Head()


class Finished(Protocol):
    """Runs known to be over, with the offset of their first decision; a dict will do."""

    def get(self, run_id: str, /) -> int | None:
        """Return the offset, None for a run of which nothing is known."""


_ENDS: Final = frozenset({RunCompleted, RunFailed, RunCancelled})


def ends_run(decision: Decision) -> bool:
    """Whether a decision is its run's last one."""
    return not _ENDS.isdisjoint(map(type, decision.effects))


@dataclass(slots=True)
class Chain:
    """The filter's memory of one partition. `finished`: runs known to be over: the index.

    `restored` gives the heads of runs whose decisions so far need not be read, since there is a snapshot of them.
    """

    finished: Finished = field(default_factory=dict[str, int])
    heads: dict[str, Head] = field(default_factory=dict)
    restored: Callable[[str], Head | None] = field(default=lambda _: None)
    losers: dict[str, set[bytes]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    ignored: int = 0

    def judge(self, offset: int, decision: Decision, decision_hash: bytes) -> Verdict:
        """Say whether the record at an offset counts, and remember it if it does."""
        run = decision.run_id
        head = self.heads.get(run)
        if head is None:
            first = self.finished.get(run)
            if first is not None and first < offset:  # its beginning was not read, or is forgotten: it is over
                return self._ignore(Verdict.FINISHED_BEFORE)
            head = self.restored(run) or NEW
        if run in self.broken:
            return self._ignore(Verdict.SET_ASIDE)
        if decision.prev == head.hash and decision.seq == head.seq + 1 and not head.over:
            first = offset if head.first is None and head.seq == 0 else head.first
            over = ends_run(decision)
            self.heads[run] = Head(decision_hash, decision.seq, first, over, head.partial)
            if over:
                self.losers.pop(run, None)
            return Verdict.ACCEPTED
        losers = self.losers.get(run, ())
        if decision.seq > head.seq and decision.prev not in losers and not head.over and not head.partial:
            self.broken[run] = (
                f"offset {offset}: decision {decision.seq} of run {run} extends nothing that is in the log "
                f"(the chain stands at {head.seq}): a record was changed or is missing"
            )
            return self._ignore(Verdict.BROKEN)
        if not head.over:
            self.losers.setdefault(run, set()).add(decision_hash)
        return self._ignore(Verdict.OVERTAKEN)

    def _ignore(self, verdict: Verdict) -> Verdict:
        self.ignored += 1
        return verdict
