"""The DuckDB file: made, opened, and thrown away when it is not (or no longer) the view of these topics.

All that is in it comes from Kafka, so a file that is damaged, of another version of this code or of other topics is put aside and
built anew from offset 0. DuckDB checks each block that it reads against a checksum, so damage shows as an error, never as other
rows; what it has in memory it doesn't read again, which is why the file itself is looked at as well (`Seal`).
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import structlog

from projections import approvals, calls, deadletters, decisions, ledger, runs, signals, specs, steps, workers
from projections.derived import VIEWS
from projections.table import Connection, rows

log = structlog.get_logger()

VERSION: Final = 5
"""Raise it whenever a table or what is written to it changes."""
TABLES: Final = (
    runs.TABLE,
    steps.TABLE,
    calls.TABLE,
    approvals.TABLE,
    signals.TABLE,
    decisions.TABLE,
    deadletters.TABLE,
    deadletters.SETTLEMENTS,
    specs.TABLE,
    workers.TABLE,
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

_CONFIG: Final[dict[str, str | bool | int | float | list[str]]] = {
    "memory_limit": "1GB",
    "threads": 2,
    "python_enable_replacements": False,  # else the name of a table that is missing means a variable of that name
    "python_scan_all_frames": False,
    # Anybody's SELECT is answered from this database (`sql`): it reaches nothing but its own file, and nothing can change that.
    "enable_external_access": False,
    "lock_configuration": True,
    "max_temp_directory_size": "4GB",
}

_PART: Final = _CONFIG | {"checkpoint_threshold": "256MB"}
"""Of a file that is made at one go: to put it in order after each 16 MB of changes takes a tenth of the time.

Where there is no room for so many changes, that is done before (`Views.tidy`)."""

Positions = dict[tuple[str, int], int]
"""The next offset of each topic (our name) and partition."""


class ViewsError(Exception):
    """The views can't be asked, or can't be written, for now. The text says why, and what goes on by itself."""


class ViewsInUseError(ViewsError):
    """Another process holds the file: only one api can work on one data folder."""


class ViewsRefusedError(ViewsError):
    """The system refuses to write (no room, no right): once that is over, the same file serves again."""


class NoRoomError(ViewsRefusedError):
    """The disk is full, as DuckDB found out: what it holds in memory may be wrong from then on, what is in the file is right."""


class LittleRoomError(ViewsRefusedError):
    """The disk is nearly full, and nothing was tried: what is there can be asked."""


class ViewsDamagedError(ViewsError):
    """The file is not what was written to it: it has to be built anew."""


class StaleViewsError(Exception):
    """The file is not the view of these topics."""


ROOM_BYTES: Final = 32 << 20
"""What most transactions need, besides what all changes since the file was last put in order take."""
_IN_USE: Final = "Could not set lock"
_NO_ROOM: Final = re.compile("No space left on device|Disk quota exceeded|File too large")
_NO_RIGHT: Final = re.compile(
    "Read-only file system|Permission denied|Operation not permitted|Too many open files|Cannot allocate memory"
)
"""DuckDB tells the system's errors by their texts only."""
_DAMAGE: Final = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)


def trouble(error: Exception, path: Path) -> ViewsError | None:
    """Return what an error of DuckDB or the system says about the file; None: nothing, it is a fault of ours."""
    text = str(error).split("\n", 1)[0][:500]
    if _IN_USE in text:
        return ViewsInUseError(
            f"{path} is held by another process; only one `foldflow api` can work on one FOLDFLOW_DATA_DIR. "
            f"Waiting until it is free ({text})"
        )
    if _NO_ROOM.search(text):
        return NoRoomError(f"there is no room for {path}: make some, it goes on by itself then ({text})")
    if _NO_RIGHT.search(text):
        return ViewsRefusedError(f"{path} can't be written: allow it, it goes on by itself then ({text})")
    if isinstance(error, duckdb.InterruptException):
        return ViewsError("the views are being closed")
    if isinstance(error, duckdb.OutOfMemoryException):
        return ViewsRefusedError(f"there is no memory for {path}: it goes on by itself once there is ({text})")
    if isinstance(error, OSError):
        return ViewsRefusedError(f"{path} can't be used: check FOLDFLOW_DATA_DIR, it goes on by itself then ({text})")
    # What is wrong in a block has no class of its own.
    if isinstance(error, _DAMAGE) or type(error) is duckdb.Error:
        return ViewsDamagedError(f"{path} is damaged ({text})")
    return None


@contextlib.contextmanager
def told(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn DuckDB's errors about this file, and `others`, into ViewsError."""
    watched: tuple[type[Exception], ...] = (duckdb.Error, *others)
    try:
        yield
    except watched as error:
        if (found := trouble(error, path)) is None:
            raise
        raise found from error


@dataclass(frozen=True, slots=True)
class Seal:
    """How the file looked after our last write. DuckDB writes to it within the writer's own calls only."""

    place: tuple[int, int]
    size: int
    written_ns: int

    @classmethod
    def of(cls, path: Path) -> "Seal":
        """Return how the file looks now. Raises ViewsDamagedError when there is none."""
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise ViewsDamagedError(f"{path} was deleted") from error
        return cls((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Raise ViewsDamagedError when somebody else has deleted, replaced or written to the file."""
        now = Seal.of(path)
        if now != self:
            how = "replaced" if now.place != self.place else "cut off" if now.size < self.size else "written to"
            raise ViewsDamagedError(f"{path} was {how} by somebody else")


def open_views(
    path: Path, topic_ids: Mapping[str, bytes], *, rebuild: StaleViewsError | ViewsDamagedError | None = None, part: bool = False
) -> tuple[Connection, str | None]:
    """Open the views, made anew if need be; return them, and why that was. `topic_ids`: of their topics, by our names.

    `rebuild`: why they are not to be used as they are; `part`: they are to be merged with others. Raises ViewsInUseError and
    ViewsRefusedError.
    """
    reason = None if rebuild is None else str(rebuild)
    with told(path, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                if rebuild is not None:
                    raise rebuild
                return _existing(path, topic_ids), None
            except (StaleViewsError, ViewsDamagedError) as error:
                reason = str(error)
                aside = put_aside(path, damaged=isinstance(error, ViewsDamagedError))
                log.warning("views.put_aside", path=str(path), reason=reason, aside=str(aside))
        path.with_name(path.name + ".wal").unlink(missing_ok=True)  # of a file that is gone: not for the new one
        if reason is not None:
            log.warning("views.rebuilt", path=str(path), reason=reason)
        return _made(path, _PART if part else _CONFIG), reason


def _made(path: Path, config: dict[str, str | bool | int | float | list[str]]) -> Connection:
    try:
        db = duckdb.connect(str(path), config=config)
        try:
            db.begin()
            for statement in (*_OWN, *(table.ddl for table in TABLES)):
                db.execute(statement)
            for name, query in VIEWS.items():
                db.execute(f'CREATE VIEW "{name}" AS {query}')
            db.execute("INSERT INTO about VALUES (?)", [VERSION])
            db.commit()
        except BaseException:
            db.close()
            raise
    except duckdb.Error as error:
        if isinstance(trouble(error, path), ViewsRefusedError):
            path.unlink(missing_ok=True)  # half a file would be a damaged one the next time
        raise
    return db


def _existing(path: Path, topic_ids: Mapping[str, bytes]) -> Connection:
    """Open a file. Raises StaleViewsError, ViewsDamagedError, ViewsInUseError and ViewsRefusedError."""
    try:
        db = duckdb.connect(str(path), config=_CONFIG)
    except duckdb.Error as error:
        raise trouble(error, path) or ViewsDamagedError(f"{path} can't be opened: {error}") from error
    try:
        version = rows(db, "SELECT version FROM about")[0]["version"]
        stored = {row["topic"]: row["topic_id"] for row in rows(db, "SELECT DISTINCT topic, topic_id FROM positions")}
        for table in TABLES:
            db.execute(f'SELECT count(*) FROM "{table.name}"')  # noqa: S608 - our own names
    except (duckdb.Error, LookupError) as error:
        db.close()
        raise trouble(error, path) or ViewsDamagedError(f"{path} can't be read: {error}") from error
    other = [topic for topic, identity in stored.items() if topic_ids.get(topic) != identity]
    if version != VERSION or other:
        db.close()
        raise StaleViewsError(
            f"it has version {version} (this code: {VERSION})" if version != VERSION else f"{other} were made anew"
        )
    return db


def put_aside(path: Path, *, damaged: bool) -> Path:
    """Move a file out of the way, with its log of changes, and return its new name; of several of a kind the last is kept."""
    aside = path.with_name(path.name + ".old")
    if damaged:
        for earlier in _damaged(path):
            earlier.unlink(missing_ok=True)
        aside = path.with_name(f"{path.stem}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}{path.suffix}")
    for ending in ("", ".wal"):
        each = path.with_name(path.name + ending)
        if each.exists():
            each.replace(aside.with_name(aside.name + ending))
    return aside


def _damaged(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.damaged-*"))


def check_room(path: Path) -> None:
    """Raise LittleRoomError when the disk is too full for the next transaction, and ViewsRefusedError when nobody can tell.

    DuckDB 2.0 must not find out by itself: of 30 times once it had rows wrong afterwards ("Corrupted LIST column"), once it ended
    the process.
    """
    with told(path, OSError):
        free = shutil.disk_usage(path.parent).free
        changes = path.with_name(path.name + ".wal")
        needed = ROOM_BYTES + (changes.stat().st_size if changes.exists() else 0)
    if free < needed:
        raise LittleRoomError(
            f"there is no room for {path}: make some, it goes on by itself then (less than {needed / 1e6:.0f} MB are free)"
        )


def make_room(path: Path) -> None:
    """Give up the files that were put aside, where the system lets us: all that is in them is in Kafka."""
    for each in (*_damaged(path), *(path.with_name(path.name + ending) for ending in (".old", ".old.wal"))):
        with contextlib.suppress(OSError):
            each.unlink()
            log.warning("views.deleted", path=str(each), reason="there is no room for the views")


def merge(path: Path, parts: Sequence[Path]) -> None:
    """Put the rows of several files, and their positions, into the first one, and that in the place of the empty one at `path`.

    All are closed. Not by a connection that answers questions: those can't open other files. Raises ViewsError.
    """
    first, *others = parts
    if not first.exists():
        raise ViewsError(f"{first} was deleted by somebody else: it begins anew")
    # The empty one is held meanwhile, so that nobody else begins to fill it; what it may have in a log of its own goes into it.
    with told(path, OSError), contextlib.closing(duckdb.connect(str(path), config=_CONFIG)) as held:
        held.execute("CHECKPOINT")
        with contextlib.closing(duckdb.connect(str(first), config={"memory_limit": "1GB"})) as db:
            db.execute("SET enable_progress_bar = false")
            for number, part in enumerate(others):
                quoted = str(part).replace("'", "''")
                db.execute(f"ATTACH '{quoted}' AS part{number} (READ_ONLY)")
            db.begin()
            for name in (*(table.name for table in TABLES), "positions"):
                for number in range(len(others)):
                    db.execute(f'INSERT INTO "{name}" SELECT * FROM part{number}."{name}"')  # noqa: S608 - our own names
            db.commit()
            db.execute("CHECKPOINT")  # all of it in the file itself: that alone is moved
        shutil.copymode(path, first)
        first.replace(path)


def read_positions(db: Connection) -> Positions:
    """Return where reading goes on."""
    found = rows(db, 'SELECT topic, "partition", "position" FROM positions ORDER BY ALL')
    return {(row["topic"], row["partition"]): row["position"] for row in found}


def write_positions(db: Connection, positions: Positions, topic_ids: Mapping[str, bytes]) -> None:
    """Store where reading goes on, within the transaction that stores what was read."""
    values = [(topic, topic_ids[topic], partition, position) for (topic, partition), position in positions.items()]
    if values:
        db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", values)
