"""Where a run's rows are found: by where in the log it lies. DuckDB skips what lies elsewhere, so large tables need no index."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from projections.table import Connection, rows


class Extent(NamedTuple):
    """Where a run's decisions lie. `first`, `last`: offsets of the first and of the last one."""

    run: str
    partition: int
    first: int
    last: int

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Extent":
        """Return a run's extent. `run`: its row of `runs`."""
        return cls(run["run_id"], run["partition"], run["first_offset"], run["last_offset"])

    def given(self, **more: Any) -> dict[str, Any]:
        """Return the parameters of `in_extent`, and more."""
        return {**self._asdict(), **more}


def in_extent(table: str) -> str:
    """Return the condition that a row of this table belongs to the run whose extent is given.

    A join with `runs` would say the same, and take DuckDB half as long again: what to skip it would learn while it runs.
    """
    return f'{table}.run_id = $run AND {table}."partition" = $partition AND {table}."offset" BETWEEN $first AND $last'


def extents(db: Connection, prefix: str, limit: int) -> list[Extent]:
    """Return where the run with this id is; if there is none, the runs whose ids start so, at most `limit`."""
    query = 'SELECT run_id, "partition", first_offset, last_offset FROM runs'
    found = rows(db, f"{query} WHERE run_id = $1", [prefix])  # an index finds it
    if not found:
        found = rows(db, f"{query} WHERE starts_with(run_id, $1) ORDER BY run_id LIMIT $2", [prefix, limit])
    return [Extent.of(row) for row in found]
