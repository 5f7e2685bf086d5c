"""The read model `decisions`: the index of the log. What a decision says in full is read from Kafka, where it stands.

A decision takes 100 bytes here and 1 to 2 KB in Kafka (payloads up to 8 MB), and Kafka keeps it for ever anyway; a second
copy would only be one more thing that could differ.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from events.decisions import InputIgnored
from projections.entry import Entry
from projections.extent import Extent, in_extent
from projections.table import Connection, Table, rows


@dataclass(slots=True)
class DecisionRow:
    """One accepted decision. `decided`: the broker's time of its input, milliseconds since the epoch; `size`: bytes of Avro.

    `step`: the one that the input is about, if it is about one; `by`: who said so, if it is a command; `cause`: id of the effect
    that it answers (a call, a child run, a timer), which derives from the hash of the decision that asked for it.
    """

    partition: int
    offset: int
    run_id: str
    seq: int
    decided: int
    input_offset: int
    input: str
    step: str | None
    by: str | None
    cause: str | None
    effects: list[str]
    ignored: str | None
    hash: bytes
    size: int


TABLE: Final = Table(
    "decisions",
    {
        "partition": "INTEGER",
        "offset": "BIGINT",
        "run_id": "VARCHAR",
        "seq": "BIGINT",
        "decided": "TIMESTAMP_MS",
        "input_offset": "BIGINT",
        "input": "VARCHAR",
        "step": "VARCHAR",
        "by": "VARCHAR",
        "cause": "VARCHAR",
        "effects": "VARCHAR[]",
        "ignored": "VARCHAR",
        "hash": "BLOB",
        "size": "BIGINT",
    },
)


@dataclass(slots=True)
class Decisions:
    """Accepted decisions on their way to the table."""

    _new: list[DecisionRow] = field(default_factory=list)

    def load(self, db: Connection) -> None:
        """Forget what was not written: the table is only appended to."""
        del db
        self._new.clear()

    def apply(self, entry: Entry) -> None:
        """Take an accepted decision."""
        decision = entry.decision
        step, by, call, timer = (getattr(decision.input, name, None) for name in ("step", "by", "call_id", "timer_id"))
        ignored = next((effect.reason for effect in decision.effects if isinstance(effect, InputIgnored)), None)
        self._new.append(
            DecisionRow(
                entry.partition,
                entry.offset,
                decision.run_id,
                decision.seq,
                decision.at,
                decision.input_offset,
                type(decision.input).__name__,
                step or None,
                by or None,
                call or timer,
                [type(effect).__name__ for effect in decision.effects],
                ignored,
                entry.hash,
                entry.size,
            )
        )

    def write(self, db: Connection) -> None:
        """Write what came since the last time."""
        TABLE.insert(db, self._new)
        self._new.clear()


def of_run(db: Connection, extent: Extent, after: int, limit: int) -> list[dict[str, Any]]:
    """Return a run's decisions behind number `after`, in order."""
    query = f"""
        SELECT "partition", "offset", seq, decided, input_offset, input, step, "by", effects, ignored,
               lower(hex(hash)) AS hash, size
        FROM decisions WHERE {in_extent("decisions")} AND seq > $after ORDER BY seq LIMIT $limit
    """  # noqa: S608 - our own text
    return rows(db, query, extent.given(after=after, limit=limit))
