"""The rule about the views: what a projector made while things broke is what one rebuild makes of the topics, row by row.

The only part that uses Foldflow's code: the projector, to build the other side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb

from checking.ledger import Ledger
from checking.records import CannotReadError

Finding = tuple[str, str]
_PATIENCE_S: Final = 600.0
_SHOWN: Final = 3
_FORGETS: Final = "workers"
"""The topic, and the view, of what processes say of themselves: it keeps a day and the last word, so a rebuild knows less."""


@dataclass(frozen=True, slots=True)
class Views:
    """Two DuckDB files: the one that is checked, and the one that was just built."""

    given: Path
    rebuilt: Path


def rebuild(servers: str, prefix: str, given: Path, folder: Path) -> Views:
    """Build the views anew in a folder. Raises CannotReadError, also when another process holds the given ones."""
    if not given.exists():
        raise CannotReadError(f"{given}: there is no such file")
    with _opened(given):
        pass
    from projections.projector import Projector  # noqa: PLC0415 - the checker knows Foldflow's code here only
    from streams.settings import Settings  # noqa: PLC0415 - the same

    settings = Settings(bootstrap_servers=servers, topic_prefix=prefix, data_dir=folder)
    projector = Projector(settings, folder / "rebuilt.duckdb", rebuild=True)
    projector.start()
    try:
        if not projector.caught_up.wait(_PATIENCE_S):
            raise CannotReadError(f"the views could not be rebuilt within {_PATIENCE_S:.0f} s: {projector.failure or 'no error'}")
    finally:
        projector.stop()
    return Views(given, projector.path)


def _opened(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a file to read it. Raises CannotReadError."""
    db = duckdb.connect()
    try:
        db.execute(f"ATTACH '{path}' AS given (READ_ONLY)")
    except duckdb.Error as error:
        db.close()
        held = "it is held by another process: stop `foldflow api` first" if "lock" in str(error) else "it can't be opened"
        raise CannotReadError(f"{path}: {held} ({error})") from error
    return db


def projections_equal_rebuild(ledger: Ledger) -> Iterator[Finding]:
    """Find rows that a rebuild doesn't have, or that only a rebuild has."""
    views: Views | None = ledger.views
    if views is None:
        return
    with _opened(views.given) as db:
        db.execute(f"ATTACH '{views.rebuilt}' AS rebuilt (READ_ONLY)")
        tables = {name: _tables(db, name) for name in ("given", "rebuilt")}
        for table in sorted(tables["given"] ^ tables["rebuilt"]):
            yield f"views, table {table}", "only one of the two has it"
        for table in sorted((tables["given"] & tables["rebuilt"]) - {_FORGETS}):
            some = f"WHERE topic <> '{_FORGETS}'" if table == "positions" else ""
            for one, other, what in (("given", "rebuilt", "not in a rebuild"), ("rebuilt", "given", "only in a rebuild")):
                found = db.execute(f'FROM {one}."{table}" {some} EXCEPT ALL FROM {other}."{table}" {some}')
                rows = found.fetchmany(_SHOWN)
                if rows:
                    names = [column[0] for column in found.description or ()]
                    shown = [{name: str(value)[:200] for name, value in zip(names, row, strict=True)} for row in rows]
                    yield f"views, table {table}", f"{what}: {'; '.join(map(str, shown))}"


def _tables(db: duckdb.DuckDBPyConnection, catalog: str) -> set[str]:
    query = "SELECT table_name FROM information_schema.tables WHERE table_catalog = ? AND table_type = 'BASE TABLE'"
    found = db.execute(query, [catalog])
    return {row[0] for row in found.fetchall()}
