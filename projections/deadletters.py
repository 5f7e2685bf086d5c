"""The read model `deadletters`: messages that couldn't be processed, with their original bytes and the reason."""

from dataclasses import dataclass, field
from typing import Any, Final

from events.decisions import DeadLetter
from projections.table import Connection, Table, rows


@dataclass(slots=True)
class DeadLetterRow:
    """One message, by where it was; a repetition of its dead letter changes nothing. `received`: milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    received: int
    reason: str
    detail: str
    request_id: str | None
    run_id: str | None
    key: bytes | None
    value: bytes | None


TABLE: Final = Table(
    "deadletters",
    {
        "topic": "VARCHAR",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "received": "TIMESTAMP_MS",
        "reason": "VARCHAR",
        "detail": "VARCHAR",
        "request_id": "VARCHAR",
        "run_id": "VARCHAR",
        "key": "BLOB",
        "value": "BLOB",
    },
    key=("topic", "partition", "offset"),
)


@dataclass(slots=True)
class DeadLetters:
    """Dead letters on their way to the table."""

    _new: dict[tuple[str, int, int], DeadLetterRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Forget what was not written: the table is only appended to."""
        del db
        self._new.clear()

    def apply(self, letter: DeadLetter) -> None:
        """Take a dead letter."""
        row = DeadLetterRow(
            letter.topic,
            letter.partition,
            letter.offset,
            letter.timestamp,
            letter.reason,
            letter.detail,
            letter.request_id,
            letter.run_id,
            letter.key,
            letter.value,
        )
        self._new.setdefault((letter.topic, letter.partition, letter.offset), row)

    def write(self, db: Connection) -> None:
        """Write what came since the last time."""
        TABLE.insert(db, list(self._new.values()))
        self._new.clear()


# --- Queries ---

_LISTED: Final = 'topic, "partition", "offset", received, reason, detail, request_id, run_id, octet_length(value) AS size'

After = tuple[int, str, int, int]
"""When it was received (milliseconds) and where: topic, partition, offset."""


def newest(db: Connection, limit: int, *, reason: str | None = None, after: After | None = None) -> list[dict[str, Any]]:
    """Return dead letters without their bytes, newest first, behind `after`."""
    conditions, parameters = ["true"], list[Any]()
    if reason is not None:
        conditions.append("reason = ?")
        parameters.append(reason)
    if after is not None:
        conditions.append('(received, topic, "partition", "offset") < (make_timestamp_ms(?)::TIMESTAMP_MS, ?, ?, ?)')
        parameters += after
    query = f"""
        SELECT {_LISTED} FROM deadletters WHERE {" AND ".join(conditions)}
        ORDER BY received DESC, topic DESC, "partition" DESC, "offset" DESC LIMIT ?
    """  # noqa: S608 - no values in it
    return rows(db, query, [*parameters, limit])


def one(db: Connection, topic: str, partition: int, offset: int) -> dict[str, Any] | None:
    """Return a dead letter with its original bytes, by where the message was."""
    where = 'WHERE topic = ? AND "partition" = ? AND "offset" = ?'
    found = rows(db, f"SELECT {_LISTED}, key, value FROM deadletters {where}", [topic, partition, offset])  # noqa: S608 - our own names
    return found[0] if found else None


def about(db: Connection, request_id: str, run_id: str) -> list[dict[str, Any]]:
    """Return the dead letters of a request or of its run, without their bytes, oldest first."""
    where = 'WHERE request_id = ? OR run_id = ? ORDER BY received, topic, "partition", "offset"'
    return rows(db, f"SELECT {_LISTED} FROM deadletters {where}", [request_id, run_id])  # noqa: S608 - our own names
