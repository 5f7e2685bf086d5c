"""What `GET /sql` answers with besides its rows."""

from typing import Final

from projections.sql import Kind

STATUS: Final[dict[Kind, tuple[int, str]]] = {
    "refused": (422, "This question is not answered"),
    "wrong": (400, "The question has a mistake"),
    "too-much": (422, "The question takes too much"),
    "busy": (503, "Another question is being answered"),
}
"""HTTP status and title of what is not answered, by its kind."""
COLUMNS, ROWS, COMPLETE = "Foldflow-Columns", "Foldflow-Rows", "Foldflow-Complete"
"""Headers of an answer."""
ROW: Final = {"run_id": "8f6a3a7e-0d5c-5b43-9f0e-5a3f1b7c2d10", "status": "completed", "cost_usd": 0.0042}
"""A row, as in the examples."""
HEADERS: Final = {
    COLUMNS: {
        "description": "Names and SQL types of the columns, in order, as JSON: `[[name, type], …]`.",
        "schema": {"type": "string"},
    },
    ROWS: {"description": "How many rows follow.", "schema": {"type": "integer"}},
    COMPLETE: {"description": "`false`: there are more rows than `limit`.", "schema": {"type": "boolean"}},
}
