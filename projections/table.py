"""One table of a read model: its columns, and rows on their way in and out through Arrow.

Times are `TIMESTAMP_MS` in UTC and milliseconds since the epoch in Python.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from duckdb import DuckDBPyConnection

Connection = DuckDBPyConnection

_TIME: Final = pa.timestamp("ms")
_ARROW: Final[dict[str, pa.DataType]] = {
    "VARCHAR": pa.string(),
    "BIGINT": pa.int64(),
    "INTEGER": pa.int32(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "BLOB": pa.binary(),
    "TIMESTAMP_MS": _TIME,
    "VARCHAR[]": pa.list_(pa.string()),
    "MAP(VARCHAR, VARCHAR)": pa.map_(pa.string(), pa.string()),
}
_LATEST_MS: Final = 253_402_300_799_000
"""The last second of the year 9999."""
_FEW: Final = 100
"""Up to so many keys are looked up in the index (25 µs each); for more, one join is quicker (6 ms over 300,000 rows)."""


class Row(Protocol):
    """A mutable row: an attribute for each column."""


class Stored(Row, Protocol):
    """A row that knows whether the table holds it."""

    stored: bool
    offset: int


@dataclass(frozen=True, slots=True)
class Table:
    """A table. `columns`: name to SQL type; `once`: columns that are written when they are known and never changed after that.

    A row that is loaded back has None for a `once` column, and None never replaces what is there: so large payloads need not be
    held in memory between the batch that brings them and the last one of their run.

    `indexed`: an index keeps the key unique and finds it. The large tables have none: it would take two thirds of the file and a
    tenth of a rebuild, and their rows are found by the partition and the offset of the decision that brought them.
    """

    name: str
    columns: dict[str, str]
    key: tuple[str, ...] = ()
    once: frozenset[str] = frozenset()
    indexed: bool = True

    @property
    def ddl(self) -> str:
        """The statement that makes the table."""
        lines = [f'"{column}" {kind}' for column, kind in self.columns.items()]
        if self.key and self.indexed:
            lines.append(f"PRIMARY KEY ({_quoted(self.key)})")
        return f'CREATE TABLE "{self.name}" ({", ".join(lines)})'

    def arrow(self, rows: Iterable[Row]) -> pa.Table:
        """Return rows as an Arrow table."""
        by_column = zip(*map(attrgetter(*self.columns), rows), strict=True)
        kinds = self.columns.items()
        return pa.table({column: _array(values, kind) for (column, kind), values in zip(kinds, by_column, strict=True)})

    def insert(self, db: Connection, rows: Sequence[Row]) -> None:
        """Append rows; of rows with a key that is there already, the first stays."""
        if rows:
            verb = "INSERT OR IGNORE" if self.key and self.indexed else "INSERT"
            _take(db, self.arrow(rows), f'{verb} INTO "{self.name}" SELECT * FROM incoming')  # noqa: S608 - our own names

    def upsert(self, db: Connection, rows: Sequence[Row]) -> None:
        """Insert rows, or replace those with the same keys."""
        if rows:
            _take(db, self.arrow(rows), self._upsert)

    def write(self, db: Connection, rows: Sequence[Stored]) -> None:
        """Insert new rows and change stored ones, without an index; from now on all are stored."""
        self.insert(db, [row for row in rows if not row.stored])
        if changed := [row for row in rows if row.stored]:
            offsets = [row.offset for row in changed]
            _take(db, self.arrow(changed), f"{self._update} BETWEEN {min(offsets)} AND {max(offsets)}")
        for row in rows:
            row.stored = True

    @property
    def _update(self) -> str:
        """The statement that changes rows, up to the offsets where these are: all row groups but theirs are skipped."""
        place = ("partition", "offset", *self.key)
        changes = ", ".join(
            f'"{column}" = '
            + (f'coalesce(incoming."{column}", own."{column}")' if column in self.once else f'incoming."{column}"')
            for column in self.columns
            if column not in place
        )
        same = " AND ".join(f'own."{column}" = incoming."{column}"' for column in place)
        return f'UPDATE "{self.name}" AS own SET {changes} FROM incoming WHERE {same} AND own."offset"'  # noqa: S608 - our own names

    @property
    def _upsert(self) -> str:
        changes = ", ".join(
            f'"{column}" = '
            + (f'coalesce(excluded."{column}", "{self.name}"."{column}")' if column in self.once else f'excluded."{column}"')
            for column, kind in self.columns.items()
            # A nested column can't be changed in place, and would turn the whole update into a delete and an insert.
            if column not in self.key and not (column in self.once and kind.startswith("MAP"))
        )
        conflict = f"ON CONFLICT ({_quoted(self.key)}) DO UPDATE SET {changes}"
        return f'INSERT INTO "{self.name}" SELECT * FROM incoming {conflict}'  # noqa: S608 - our own names

    def load(self, db: Connection, where: str = "", parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return rows as dictionaries, without the `once` columns (None), ordered by key."""
        columns = ", ".join(self._selected(column, kind) for column, kind in self.columns.items())
        order = f" ORDER BY {_quoted(self.key)}" if self.key else ""
        return rows(db, f'SELECT {columns} FROM "{self.name}" {where}{order}', parameters)  # noqa: S608 - our own names

    def load_keys(self, db: Connection, keys: Sequence[str | tuple[str, ...]], since: int | None = None) -> list[dict[str, Any]]:
        """Return the rows with these keys; of a table with one key column, the key is its value. `since`: none lies before it."""
        if not keys:
            return []
        if len(self.key) == 1 and len(keys) <= _FEW:
            return self.load(db, f'WHERE "{self.key[0]}" IN ({", ".join("?" * len(keys))})', keys)
        columns = zip(*((key,) if isinstance(key, str) else key for key in keys), strict=True)
        db.register(
            "wanted", pa.table({name: pa.array(column, pa.string()) for name, column in zip(self.key, columns, strict=True)})
        )
        try:
            where = "" if since is None else f' WHERE "offset" >= {since}'
            return self.load(db, f"SEMI JOIN wanted USING ({_quoted(self.key)}){where}")
        finally:
            db.unregister("wanted")

    def _selected(self, column: str, kind: str) -> str:
        if column in self.once:
            return f'NULL AS "{column}"'
        return f'epoch_ms("{column}") AS "{column}"' if kind == "TIMESTAMP_MS" else f'"{column}"'


def rows(db: Connection, query: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
    """Return a query's rows as dictionaries."""
    answer = db.execute(query, dict(parameters) if isinstance(parameters, Mapping) else list(parameters))
    names = [column[0] for column in answer.description or ()]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def _array(values: Sequence[Any], kind: str) -> pa.Array:
    arrow = _ARROW[kind]
    if arrow is _TIME:
        times = pa.array(values, pa.int64())
        # A due time may be as far off as a provider's `retry-after` says; what Python's datetime can't hold can't be shown.
        return pc.min_element_wise(pc.max_element_wise(times, 0, skip_nulls=False), _LATEST_MS, skip_nulls=False).cast(_TIME)
    return pa.array(values, arrow)


def _take(db: Connection, batch: pa.Table, statement: str) -> None:
    db.register("incoming", batch)
    try:
        db.execute(statement)
    finally:
        db.unregister("incoming")


def _quoted(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)
