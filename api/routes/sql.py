"""Questions in SQL about the views."""

import json
from collections.abc import Iterator
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from api.models_sql import COLUMNS, COMPLETE, HEADERS, ROW, ROWS, STATUS
from api.problems import ProblemError
from api.views import TheProjector, freshness
from projections.sql import MOST_ROWS, Answer, QueryError, answer

router = APIRouter(tags=["sql"])

_MEDIA_TYPE: Final = "application/x-ndjson"
_PIECE: Final = 64 * 1024


@router.get(
    "/sql",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The rows, a JSON object a line.",
            "headers": HEADERS,
            "content": {_MEDIA_TYPE: {"schema": {"type": "string"}, "example": json.dumps(ROW)}},
        }
    },
)
def ask_sql(
    request: Request,
    projector: TheProjector,
    query: Annotated[
        str,
        Query(
            description="One SELECT (or DESCRIBE, SUMMARIZE, SHOW TABLES) in DuckDB's dialect.",
            examples=["SELECT workflow, count(*) AS runs, sum(cost_usd) AS usd FROM runs GROUP BY ALL"],
        ),
    ],
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS, description="Most rows that are given out.")] = 10_000,
) -> StreamingResponse:
    """Answer a question in SQL about the views. The rows come as JSON objects, one a line (NDJSON).

    Times are UTC, bytes hexadecimal. `docs/tables.md` (`foldflow sql --tables`) says what there is. It takes 30 s at most.
    """
    # Not the snapshot of other routes, which ends when all is sent: nobody may hold one for as long as it takes to read this.
    with projector.views.snapshot() as (db, positions):
        request.state.freshness = freshness(projector, positions)
        try:
            found = answer(db, query, limit)
        except QueryError as error:
            status, title = STATUS[error.kind]
            headers = {"Retry-After": "5"} if error.kind == "busy" else None
            raise ProblemError(status, f"sql-{error.kind}", title, str(error), error.hint, headers=headers) from error
    headers = {
        COLUMNS: json.dumps(found.columns, separators=(",", ":")),
        ROWS: str(found.rows),
        COMPLETE: json.dumps(found.complete),
        "Cache-Control": "no-store",
    }
    return StreamingResponse(_pieces(found), headers=headers, media_type=_MEDIA_TYPE)


def _pieces(found: Answer) -> Iterator[bytes]:
    with found.lines as lines:
        while piece := lines.read(_PIECE):
            yield piece
