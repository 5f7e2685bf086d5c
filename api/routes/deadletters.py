"""Dead letters."""

from datetime import UTC
from typing import Annotated

from fastapi import APIRouter, Query

from api import models
from api.problems import ProblemError
from api.views import TheView, cursor, from_cursor
from projections import deadletters

router = APIRouter(tags=["dead letters"])


@router.get("/deadletters")
def list_deadletters(
    view: TheView,
    reason: Annotated[str | None, Query(description="Only those with this reason.")] = None,
    status: Annotated[models.LetterStatus | None, Query(description="Only those that stand like that.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor_: Annotated[str | None, Query(alias="cursor", description="`next` of the page before.")] = None,
) -> models.DeadLetterPage:
    """List messages that couldn't be processed, newest first, without their bytes."""
    after = from_cursor(cursor_, int, str, int, int) if cursor_ else None
    place = (after[0], after[1], after[2], after[3]) if after else None
    found = deadletters.newest(view.db, limit + 1, reason=reason, status=status, after=place)
    page = [models.DeadLetterSummary(**row) for row in found[:limit]]
    more = None
    if found[limit:]:
        last = page[-1]
        more = cursor(round(last.received.astimezone(UTC).timestamp() * 1000), last.topic, last.partition, last.offset)
    return models.DeadLetterPage(deadletters=page, next=more)


@router.get("/deadletters/{topic}/{partition}/{offset}")
def show_deadletter(view: TheView, topic: str, partition: int, offset: int) -> models.DeadLetter:
    """Show a message that couldn't be processed, by where it was, with its original bytes."""
    row = deadletters.one(view.db, topic, partition, offset)
    if row is None:
        hint = f"GET /deadletters lists them; the topic's name is the full one, with its prefix.{view.catching_up}"
        raise ProblemError(404, "unknown-deadletter", "There is no such dead letter", f"{topic}/{partition}/{offset}", hint)
    return models.DeadLetter(**row)
