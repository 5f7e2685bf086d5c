"""The DuckDB file: made, opened, and thrown away when it is not (or no longer) the view of these topics.

All that is in it comes from Kafka, so a file that is damaged, of another version of this code or of other topics is put aside and
built anew from offset 0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import duckdb
import structlog

from projections import approvals, calls, deadletters, decisions, ledger, runs, signals, specs, steps
from projections.table import Connection, rows

log = structlog.get_logger()

VERSION: Final = 2
"""Raise it whenever a table or what is written to it changes."""
TABLES: Final = (
    runs.TABLE,
    steps.TABLE,
    calls.TABLE,
    approvals.TABLE,
    signals.TABLE,
    decisions.TABLE,
    deadletters.TABLE,
    specs.TABLE,
    ledger.IGNORED,
    ledger.LOSERS,
    ledger.BREAKS,
)
_OWN: Final = (
    "CREATE TABLE about (version INTEGER)",
    """CREATE TABLE positions (
        topic VARCHAR, topic_id BLOB, "partition" INTEGER, "position" BIGINT, PRIMARY KEY (topic, "partition")
    )""",
)

Positions = dict[tuple[str, int], int]
"""The next offset of each topic (our name) and partition."""


class ViewsInUseError(Exception):
    """Another process holds the file: only one api can work on one data folder."""


class StaleViewsError(Exception):
    """The file is not the view of these topics."""


def open_views(path: Path, topic_ids: Mapping[str, bytes], *, rebuild: bool = False) -> Connection:
    """Open the views, made anew if need be. `topic_ids`: of the topics they are made from, by our names.

    Raises ViewsInUseError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not rebuild:
        try:
            return _existing(path, topic_ids)
        except StaleViewsError as error:
            log.warning("views.rebuilt", path=str(path), reason=str(error))
    _put_aside(path)
    db = _connect(path)
    db.begin()
    for statement in (*_OWN, *(table.ddl for table in TABLES)):
        db.execute(statement)
    db.execute("INSERT INTO about VALUES (?)", [VERSION])
    db.commit()
    return db


def _connect(path: Path) -> Connection:
    try:
        return duckdb.connect(str(path), config={"memory_limit": "1GB", "threads": 2})
    except duckdb.IOException as error:
        if "lock" in str(error):
            raise ViewsInUseError(
                f"{path} is held by another process; only one `foldflow api` can work on one FOLDFLOW_DATA_DIR ({error})"
            ) from error
        raise


def _existing(path: Path, topic_ids: Mapping[str, bytes]) -> Connection:
    try:
        db = _connect(path)
    except duckdb.Error as error:
        raise StaleViewsError(f"it can't be opened: {error}") from error
    try:
        version = rows(db, "SELECT version FROM about")[0]["version"]
        stored = {row["topic"]: row["topic_id"] for row in rows(db, "SELECT DISTINCT topic, topic_id FROM positions")}
        for table in TABLES:
            db.execute(f'SELECT count(*) FROM "{table.name}"')  # noqa: S608 - our own names
    except (duckdb.Error, LookupError) as error:
        db.close()
        raise StaleViewsError(f"it can't be read: {error}") from error
    other = [topic for topic, identity in stored.items() if topic_ids.get(topic) != identity]
    if version != VERSION or other:
        db.close()
        raise StaleViewsError(
            f"it has version {version} (this code: {VERSION})" if version != VERSION else f"{other} were made anew"
        )
    return db


def _put_aside(path: Path) -> None:
    """Move a file out of the way, with its log of changes; of several the last is kept."""
    for each in (path, path.with_name(path.name + ".wal")):
        if each.exists():
            each.replace(each.with_name(each.name + ".old"))


def read_positions(db: Connection) -> Positions:
    """Return where reading goes on."""
    found = rows(db, 'SELECT topic, "partition", "position" FROM positions ORDER BY ALL')
    return {(row["topic"], row["partition"]): row["position"] for row in found}


def write_positions(db: Connection, positions: Positions, topic_ids: Mapping[str, bytes]) -> None:
    """Store where reading goes on, within the transaction that stores what was read."""
    values = [(topic, topic_ids[topic], partition, position) for (topic, partition), position in positions.items()]
    if values:
        db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", values)
