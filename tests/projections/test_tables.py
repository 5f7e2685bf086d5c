"""Each table and column that can be asked in SQL is described, and the page that says so is current."""

from pathlib import Path

from projections import table_docs
from projections.database import open_views
from projections.table import rows

_PAGE = Path(__file__).parents[2] / "docs" / "tables.md"


def test_every_table_and_column_is_described(tmp_path: Path) -> None:
    """Given the tables and views of a new file; then each has a text, so has each column, and no text is about another."""
    db, _ = open_views(tmp_path / "views.duckdb", {})
    there: dict[str, set[str]] = {}
    for row in rows(db, "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'main'"):
        there.setdefault(row["table_name"], set()).add(row["column_name"])
    db.close()
    assert set(table_docs.TABLES) == set(there)
    for name, (says, texts) in table_docs.TABLES.items():
        assert says, name
        assert there[name] <= set(texts) | set(table_docs.ANYWHERE), name
        assert set(texts) <= there[name], name
        assert all(texts.values()), name


def test_the_page_of_tables_is_what_is_printed() -> None:
    """Given docs/tables.md; then it is what `foldflow sql --tables` prints now."""
    assert _PAGE.read_text("utf-8") == table_docs.markdown(), "foldflow sql --tables > docs/tables.md"
