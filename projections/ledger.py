"""The shared filter with a memory that survives restarts: which records of `decisions` count, what was passed over, and why.

Heads of runs stand in `runs`; here are the tables of what else the filter must remember (`losers`, `breaks`) and of what it
passed over (`ignored`). Passed over are also records that can't be decoded, and decisions in a partition where their run doesn't
belong.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

from events import codec
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from events.topics import partition_for
from projections.entry import Entry
from projections.runs import Runs
from projections.table import Connection, Table, rows
from streams.workflow.chain import Chain, Verdict

NOT_DECODABLE: Final = "not_decodable"
MISPLACED: Final = "misplaced"


class Record(NamedTuple):
    """A record as the projector reads it; `key`: where it says something."""

    partition: int
    offset: int
    value: bytes | None
    key: bytes | None = None


@dataclass(slots=True)
class IgnoredRow:
    """A record that doesn't count, and why: a `Verdict`, `not_decodable` or `misplaced`."""

    topic: str
    partition: int
    offset: int
    verdict: str
    run_id: str | None = None
    seq: int | None = None
    detail: str | None = None


@dataclass(slots=True)
class LoserRow:
    """A decision of an open run that was overtaken: what was written on top of it has lost as well."""

    partition: int
    run_id: str
    hash: bytes


@dataclass(slots=True)
class BreakRow:
    """A run whose chain is broken, as no honest writer can do it: the run is set aside from there on."""

    run_id: str
    partition: int
    offset: int
    problem: str


IGNORED: Final = Table(
    "ignored",
    {
        "topic": "VARCHAR",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "verdict": "VARCHAR",
        "run_id": "VARCHAR",
        "seq": "BIGINT",
        "detail": "VARCHAR",
    },
)
LOSERS: Final = Table("losers", {"partition": "INTEGER", "run_id": "VARCHAR", "hash": "BLOB"})
BREAKS: Final = Table(
    "breaks", {"run_id": "VARCHAR", "partition": "INTEGER", "offset": "BIGINT", "problem": "VARCHAR"}, key=("run_id",)
)


@dataclass(slots=True)
class Ledger:
    """One chain for each partition. `partitions`: how many `decisions` has."""

    partitions: int
    _chains: dict[int, Chain] = field(default_factory=dict)
    _ignored: list[IgnoredRow] = field(default_factory=list)
    _losers: list[LoserRow] = field(default_factory=list)
    _breaks: list[BreakRow] = field(default_factory=list)
    _over: set[str] = field(default_factory=set)
    _stored: set[str] = field(default_factory=set)
    """Runs whose losers stand in the database."""

    def load(self, db: Connection) -> None:
        """Forget what was not written, and load the rest back."""
        for pending in (self._ignored, self._losers, self._breaks, self._over):
            pending.clear()
        self._chains = {partition: Chain() for partition in range(self.partitions)}
        self._stored.clear()
        for loser in LOSERS.load(db):
            self._stored.add(loser["run_id"])
            self._chains[loser["partition"]].losers.setdefault(loser["run_id"], set()).add(loser["hash"])
        for broken in BREAKS.load(db):
            self._chains[broken["partition"]].broken[broken["run_id"]] = broken["problem"]

    def judge(self, db: Connection, records: list[Record], runs: Runs) -> list[Entry]:
        """Return the decisions that count, in order; note the others. `runs` tells the heads of what was accepted before."""
        decoded = [entry for record in records if (entry := self._decode(record)) is not None]
        heads = runs.heads(db, (entry.decision.run_id for entry in decoded))
        accepted = []
        for entry in decoded:
            decision, chain = entry.decision, self._chains[entry.partition]
            run_id = decision.run_id
            if run_id not in chain.heads and run_id in heads:
                chain.heads[run_id] = heads[run_id]
            before = len(chain.losers.get(run_id, ()))
            verdict = chain.judge(entry.offset, decision, entry.hash)
            if run_id in chain.heads and chain.heads[run_id].over:
                self._over.add(run_id)
            if verdict is Verdict.ACCEPTED:
                accepted.append(entry)
                continue
            self.ignore("decisions", entry.partition, entry.offset, verdict.value, decision)
            if len(chain.losers.get(run_id, ())) > before:
                self._losers.append(LoserRow(entry.partition, run_id, entry.hash))
            if verdict is Verdict.BROKEN:
                self._breaks.append(BreakRow(run_id, entry.partition, entry.offset, chain.broken[run_id]))
        for chain in self._chains.values():
            chain.heads.clear()  # the next batch takes them from `runs`: one memory of them is enough
        return accepted

    def _decode(self, record: Record) -> Entry | None:
        try:
            decision = codec.decode(record.value, Decision)
        except NotDecodableError as error:
            self.ignore("decisions", record.partition, record.offset, NOT_DECODABLE, detail=str(error))
            return None
        if _home(decision.run_id, self.partitions) != record.partition:
            self.ignore("decisions", record.partition, record.offset, MISPLACED, decision)
            return None
        body = codec.unframed(record.value or b"")
        return Entry(record.partition, record.offset, decision, chain_hash(body), len(body))

    def ignore(
        self,
        topic: str,
        partition: int,
        offset: int,
        verdict: str,
        decision: Decision | None = None,
        *,
        detail: str | None = None,
    ) -> None:
        """Note a record that doesn't count."""
        run_id, seq = (decision.run_id, decision.seq) if decision else (None, None)
        self._ignored.append(IgnoredRow(topic, partition, offset, verdict, run_id, seq, detail))

    def write(self, db: Connection) -> None:
        """Write what came since the last time."""
        if self._over:
            # Nothing can follow a run that is over: what stood beside its chain need not be remembered.
            self._losers = [loser for loser in self._losers if loser.run_id not in self._over]
            if settled := self._stored & self._over:
                db.execute("DELETE FROM losers WHERE run_id IN (SELECT unnest(?))", [sorted(settled)])
                self._stored -= settled
        self._stored.update(loser.run_id for loser in self._losers)
        IGNORED.insert(db, self._ignored)
        LOSERS.insert(db, self._losers)
        BREAKS.insert(db, self._breaks)
        for pending in (self._ignored, self._losers, self._breaks, self._over):
            pending.clear()


@lru_cache(maxsize=65_536)
def _home(run_id: str, partitions: int) -> int:
    """Return the partition where a run belongs: asked for each of its decisions, which mostly come soon after each other."""
    return partition_for(run_id.encode(), partitions)


# --- Queries ---


def breaks(db: Connection) -> list[dict[str, Any]]:
    """Return the runs that were set aside."""
    return rows(db, 'SELECT run_id, "partition", "offset", problem FROM breaks ORDER BY "partition", "offset"')


def ignored(db: Connection) -> list[dict[str, Any]]:
    """Return how many records of each partition were passed over, by verdict."""
    return rows(db, 'SELECT topic, "partition", verdict, count(*) AS records FROM ignored GROUP BY ALL ORDER BY ALL')
