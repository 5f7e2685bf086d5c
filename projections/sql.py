"""Questions in SQL: one SELECT about the views, which changes nothing, reaches no file and no network, and ends in time.

The views are held by a process that others need, so there are several fences, each for what the others let through:

1. DuckDB's own parser tells what a statement is: only one SELECT passes, of our tables, with known table functions (`check`).
2. Its transaction can only read.
3. The database can reach nothing outside of its file, and its settings are locked (`database.open_views`).
4. Time, rows, bytes, and the memory that the process may take more: what DuckDB counts as memory leaves out single large values.

An answer is written to a temporary file before it is given out: who reads it slowly holds no transaction.
"""

import contextlib
import json
import math
import re
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Final, Literal

import duckdb

from projections.database import told
from projections.table import Connection

SECONDS: Final = 30.0
"""How long a question may take."""
MOST_ROWS: Final = 1_000_000
_MOST_BYTES: Final = 512 * 1024 * 1024
_MOST_MEMORY: Final = 1024 * 1024 * 1024
"""How much more memory the process may take while a question is answered."""
_MOST_TEXT: Final = 100_000
_MOST_COLUMNS: Final = 200
_MOST_NAME: Final = 100
_IN_MEMORY: Final = 4 * 1024 * 1024
_FETCH: Final = 1000
_WAIT_S: Final = 10.0
"""How long a question waits for the one before it."""

TABLE_FUNCTIONS: Final = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})
"""All others read files or the system, or take addresses in memory."""
_SCHEMAS: Final = frozenset({"", "main", "information_schema"})
_SHOWN: Final = frozenset({"", '"tables"', "tables", "__show_tables_expanded"})
"""What DESCRIBE, SUMMARIZE (of a question: "") and SHOW may be about."""
_SYSTEM: Final = ("duckdb_", "pragma_", "pg_")
"""How tables begin that tell of DuckDB and the machine."""
REFUSED_FUNCTIONS: Final = frozenset(
    {
        # tell of the process, or change what the next one sees
        *("current_setting", "getvariable", "current_query", "write_log", "sleep_ms", "nextval", "setval", "currval", "setseed"),
        # take any bytes for what DuckDB has in memory
        *("finalize", "combine", "to_aggregate_state", "index_key", "create_sort_key", "vector_type", "invoke", "remap_struct"),
        *("variant_bytes_to_variant", "variant_to_parquet_variant", "parse_duckdb_log_message", "stats"),
        *("json_serialize_plan", "json_deserialize_sql"),
        # can't be interrupted, and take the square of what they are given
        *("levenshtein", "editdist3", "damerau_levenshtein", "jaro_similarity", "jaro_winkler_similarity", "jaccard"),
    }
)

_DAMAGE: Final = re.compile("checksum|corrupt", re.IGNORECASE)

Kind = Literal["refused", "wrong", "too-much", "busy"]
_HINTS: Final[dict[Kind, str]] = {
    "refused": "Write one SELECT (or DESCRIBE, SUMMARIZE, SHOW TABLES) about the tables that `foldflow sql --tables` lists.",
    "wrong": "`foldflow sql --tables` lists the tables and their columns; the dialect is DuckDB's.",
    "too-much": "Ask for less: filter by time or run, aggregate, choose columns, add LIMIT.",
    "busy": "Questions are answered one at a time: try again in a few seconds.",
}


class QueryError(Exception):
    """A question that isn't answered. `kind`: why, for programs; the text and `hint`: for people."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind: Kind = kind
        self.hint = _HINTS[kind]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `columns`: name and SQL type; `complete`: there are no more rows than these; `lines`: a JSON object a row."""

    columns: list[tuple[str, str]]
    rows: int
    complete: bool
    lines: IO[bytes]


_one_at_a_time: Final = threading.Lock()


def answer(db: Connection, query: str, most_rows: int, *, seconds: float = SECONDS) -> Answer:
    """Answer a question, with up to so many rows. `db`: in a transaction that can only read, for this question alone.

    Raises QueryError, and DuckDB's errors where the file is at fault.
    """
    if not _one_at_a_time.acquire(timeout=_WAIT_S):
        raise QueryError("busy", "Another question is being answered")
    spool = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - who asked closes it
    try:
        with _bounded_memory(), _bounded_time(db, seconds) as expired:
            try:
                check(db, query)
                db.execute(query)
                columns = _columns(db)
                count, complete = _write(db, [name for name, _ in columns], most_rows, spool)
            except (duckdb.Error, MemoryError) as error:
                if (problem := _problem(error, seconds, expired=expired())) is None:
                    raise
                raise problem from error
    except BaseException:
        spool.close()
        raise
    finally:
        _one_at_a_time.release()
    spool.seek(0)
    return Answer(columns, count, complete, spool)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Connection]:
    """Open a file of views that no process holds, to ask it. Raises ViewsError and FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(path)
    with told(path):
        db = duckdb.connect(
            str(path),
            read_only=True,
            config={
                "memory_limit": "1GB",
                "threads": 2,
                "enable_external_access": False,
                "lock_configuration": True,
                "python_enable_replacements": False,
                "python_scan_all_frames": False,
            },
        )
        try:
            db.execute("BEGIN TRANSACTION READ ONLY")
            yield db
        finally:
            db.close()


# --- What may be asked ---


def check(db: Connection, query: str) -> None:
    """Raise QueryError unless the text is one SELECT that is allowed."""
    if len(query) > _MOST_TEXT:
        raise QueryError("refused", f"The query has {len(query):,} characters; at most {_MOST_TEXT:,} are read")
    found = db.execute("SELECT json_serialize_sql(?)", [query]).fetchone()
    parsed = json.loads(found[0]) if found else {}
    if parsed.get("error"):
        if parsed.get("error_type") == "parser":
            raise QueryError("wrong", str(parsed["error_message"]))
        raise QueryError("refused", "Only SELECT is answered: nothing can be changed, set, loaded or written here")
    if (count := len(parsed["statements"])) != 1:
        raise QueryError("refused", f"One statement is answered at a time; these are {count}")
    for node in _nodes(parsed["statements"]):
        if (problem := _forbidden(node)) is not None:
            raise QueryError("refused", problem)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects of a tree. Not by recursion: a query may be deep."""
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)


def _forbidden(node: dict[str, Any]) -> str | None:
    """Return what is wrong with a part of a query."""
    match node.get("type"):
        case "TABLE_FUNCTION":
            name = str(node.get("function", {}).get("function_name", "?")).lower()
            if name not in TABLE_FUNCTIONS:
                return f"The table function {name} is not allowed; these are: {', '.join(sorted(TABLE_FUNCTIONS))}"
        case "BASE_TABLE":
            path = [str(each).lower() for each in node.get("qualified_name", {}).get("path", [])]
            name, schema = str(node.get("table_name", "")).lower(), str(node.get("schema_name", "")).lower()
            if name.startswith(_SYSTEM) or schema not in _SCHEMAS or len(path) > 2 or node.get("catalog_name"):  # noqa: PLR2004
                return f"{'.'.join(path) or name} tells of the database itself, not of runs"
        case "SHOW_REF":
            if node.get("table_name") not in _SHOWN:
                return "SHOW is about TABLES only"
        case "FUNCTION" | "WINDOW_AGGREGATE":
            name = str(node.get("function_name", "")).lower()
            if name in REFUSED_FUNCTIONS or name.startswith("__internal"):
                return f"The function {name} is not allowed here"
    return None


# --- Limits ---


@contextlib.contextmanager
def _bounded_time(db: Connection, seconds: float) -> Iterator[Callable[[], bool]]:
    """Interrupt what the connection does when the time is up; gives whether it was."""
    up = threading.Event()

    def end() -> None:
        up.set()
        db.interrupt()

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield up.is_set
    finally:
        timer.cancel()


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let the system refuse the process more than so much further memory, so that a query fails and not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if (used := _data_bytes()) is not None:
        wanted = used + _MOST_MEMORY
        lowest = min((each for each in (wanted, soft, hard) if each != resource.RLIM_INFINITY), default=wanted)
        resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int | None:
    """Return how much private memory the process has mapped; None where the system doesn't tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[5])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def _problem(error: Exception, seconds: float, *, expired: bool) -> QueryError | None:
    """Return what an error says to who asked; None: it is no fault of the question."""
    text = str(error).split("\n\nLINE", 1)[0].strip()
    match error:
        case duckdb.InterruptException() if expired:
            return QueryError("too-much", f"It takes longer than {seconds:g} s")
        case duckdb.OutOfMemoryException() | MemoryError():
            return QueryError("too-much", "It takes more memory than there is for it")
        case duckdb.PermissionException() | duckdb.TransactionException():
            return QueryError("refused", text)
        case duckdb.InterruptException() | duckdb.IOException() | duckdb.FatalException() | duckdb.InternalException():
            return None
    # What is wrong in a block of the file has no class of its own.
    return None if type(error) is duckdb.Error and _DAMAGE.search(text) else QueryError("wrong", text)


# --- Rows ---


def _columns(db: Connection) -> list[tuple[str, str]]:
    """Return names and types; of columns with one name the later ones get a number."""
    described = db.description or []
    if len(described) > _MOST_COLUMNS:
        raise QueryError("too-much", f"The answer has {len(described):,} columns; at most {_MOST_COLUMNS} are given out")
    found: dict[str, str] = {}
    for name, kind, *_ in described:
        unique, number = str(name)[:_MOST_NAME], 1
        while unique in found:
            number += 1
            unique = f"{str(name)[:_MOST_NAME]}_{number}"
        found[unique] = str(kind)[:_MOST_NAME]
    return list(found.items())


def _write(db: Connection, names: Sequence[str], most_rows: int, spool: IO[bytes]) -> tuple[int, bool]:
    """Write the rows as JSON objects, one a line; return how many, and whether these are all."""
    count = size = 0
    while batch := db.fetchmany(min(_FETCH, most_rows + 1 - count)):
        for row in batch[: most_rows - count]:
            fields = dict(zip(names, map(plain, row), strict=True))
            line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"  # ASCII: no other line ends than ours
            size += len(line)
            if size > _MOST_BYTES:
                raise QueryError("too-much", f"The answer is larger than {_MOST_BYTES // 1024 // 1024} MB")
            spool.write(line)
        count += len(batch)
        if count > most_rows:
            return most_rows, False
    return count, True


def plain(value: Any) -> Any:
    """Return a value of DuckDB's as JSON has it: times in UTC, bytes as hexadecimal, what JSON has no word for as text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case datetime():
            utc = value.astimezone(UTC) if value.tzinfo is not None else value
            return utc.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
        case date():
            return value.isoformat()
        case Decimal():
            return float(value)
        case bytes():
            return value.hex()
        case dict():
            return {str(plain(key)): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case _:
            return str(value)
