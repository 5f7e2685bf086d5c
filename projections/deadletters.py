"""The read model `deadletters`: messages that couldn't be processed, with their original bytes and the reason.

What was done about them is a table of its own (`settlements`): the last one says how a letter stands, all are its history.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from events import ids
from events.decisions import DeadLetter, DeadLetterSettled
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


ACTIONS: Final = ("redriven", "discarded")
"""What can be done about a dead letter."""


@dataclass(slots=True)
class SettlementRow:
    """What was done about a letter. `log_…`: where that stands on the topic; `at`: milliseconds since the epoch."""

    log_partition: int
    log_offset: int
    topic: str
    partition: int
    offset: int
    action: str
    at: int
    by: str
    reason: str
    to_partition: int | None
    to_offset: int | None


SETTLEMENTS: Final = Table(
    "settlements",
    {
        "log_partition": "INTEGER",
        "log_offset": "BIGINT",
        "topic": "VARCHAR",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "action": "VARCHAR",
        "at": "TIMESTAMP_MS",
        "by": "VARCHAR",
        "reason": "VARCHAR",
        "to_partition": "INTEGER",
        "to_offset": "BIGINT",
    },
    key=("log_partition", "log_offset"),
)


@dataclass(slots=True)
class DeadLetters:
    """Dead letters, and what was done about them, on their way to the tables."""

    _new: dict[tuple[str, int, int], DeadLetterRow] = field(default_factory=dict)
    _settled: list[SettlementRow] = field(default_factory=list)

    def load(self, db: Connection) -> None:
        """Forget what was not written: the tables are only appended to."""
        del db
        self._new.clear()
        self._settled.clear()

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

    def settle(self, settled: DeadLetterSettled, partition: int, offset: int) -> bool:
        """Take what was done about a letter, and where that stands; False: it doesn't count, as nobody can do that."""
        if settled.action not in ACTIONS:  # anybody may write to the topic
            return False
        row = SettlementRow(
            partition,
            offset,
            settled.topic,
            settled.partition,
            settled.offset,
            settled.action,
            settled.at,
            settled.by,
            settled.reason,
            settled.to_partition,
            settled.to_offset,
        )
        self._settled.append(row)
        return True

    def write(self, db: Connection) -> None:
        """Write what came since the last time."""
        TABLE.insert(db, list(self._new.values()))
        SETTLEMENTS.insert(db, self._settled)
        self._new.clear()
        self._settled.clear()


# --- Queries ---

_LISTED: Final = """
    l.topic, l."partition", l."offset", l.received, l.reason, l.detail, l.request_id, l.run_id, octet_length(l.value) AS size,
    coalesce(s.action, 'open') AS status, s."at" AS settled_at, s."by" AS settled_by, s.reason AS settled_reason
"""
_LETTERS: Final = """
    deadletters l LEFT JOIN (
        SELECT * FROM settlements
        QUALIFY row_number() OVER (PARTITION BY topic, "partition", "offset" ORDER BY log_partition, log_offset DESC) = 1
    ) s ON l.topic = s.topic AND l."partition" = s."partition" AND l."offset" = s."offset"
"""

After = tuple[int, str, int, int]
"""When it was received (milliseconds) and where: topic, partition, offset."""


def newest(
    db: Connection,
    limit: int,
    *,
    reason: str | None = None,
    status: str | None = None,
    text: str | None = None,
    in_detail: bool = True,
    period: tuple[int | None, int | None] = (None, None),
    after: After | None = None,
) -> list[dict[str, Any]]:
    """Return dead letters without their bytes, newest first, behind `after`. `status`: open, redriven or discarded.

    `text`: contained in its run's or request's id or (`in_detail`) its detail, upper or lower case; `period`: received from … to
    before …, in milliseconds.
    """
    conditions, parameters = ["true"], list[Any]()
    if reason is not None:
        conditions.append("l.reason = ?")
        parameters.append(reason)
    if status is not None:
        conditions.append("coalesce(s.action, 'open') = ?")
        parameters.append(status)
    if text is not None:
        searched = "l.run_id, l.request_id" + ", l.detail" * in_detail
        conditions.append(f"contains(lower(concat_ws(chr(10), {searched})), lower(?))")
        parameters.append(text)
    for moment, comparison in zip(period, (">=", "<"), strict=True):
        if moment is not None:
            conditions.append(f"l.received {comparison} make_timestamp_ms(?)::TIMESTAMP_MS")
            parameters.append(moment)
    if after is not None:
        conditions.append('(l.received, l.topic, l."partition", l."offset") < (make_timestamp_ms(?)::TIMESTAMP_MS, ?, ?, ?)')
        parameters += after
    query = f"""
        SELECT {_LISTED} FROM {_LETTERS} WHERE {" AND ".join(conditions)}
        ORDER BY l.received DESC, l.topic DESC, l."partition" DESC, l."offset" DESC LIMIT ?
    """  # noqa: S608 - no values in it
    return rows(db, query, [*parameters, limit])


def one(db: Connection, topic: str, partition: int, offset: int) -> dict[str, Any] | None:
    """Return a dead letter with its original bytes and its `history`, by where the message was."""
    place = [topic, partition, offset]
    where = 'WHERE l.topic = ? AND l."partition" = ? AND l."offset" = ?'
    found = rows(db, f"SELECT {_LISTED}, l.key, l.value FROM {_LETTERS} {where}", place)  # noqa: S608 - our own names
    if not found:
        return None
    done = rows(
        db,
        'SELECT action, "at", "by", reason, to_partition, to_offset FROM settlements '
        'WHERE topic = ? AND "partition" = ? AND "offset" = ? ORDER BY log_partition, log_offset',
        place,
    )
    return found[0] | {"history": done}


def about(db: Connection, request_id: str, run_id: str) -> list[dict[str, Any]]:
    """Return the dead letters of a request or of its run, without their bytes, oldest first."""
    where = 'WHERE l.request_id = ? OR l.run_id = ? ORDER BY l.received, l.topic, l."partition", l."offset"'
    return rows(db, f"SELECT {_LISTED} FROM {_LETTERS} {where}", [request_id, run_id])  # noqa: S608 - our own names


def request_of(db: Connection, name: str) -> str | None:
    """Return the id of a request with dead letters, which is `name`, or whose run would have `name` as its id."""
    query = "SELECT DISTINCT request_id FROM deadletters WHERE request_id = $name OR run_id = $name ORDER BY request_id <> $name"
    found = [row["request_id"] for row in rows(db, query, {"name": name}) if row["request_id"]]
    # A letter says of both what was in its message: only those that belong together count.
    return next((each for each in found if name in {each, ids.run_id(each)}), None)
