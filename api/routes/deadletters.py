"""Dead letters."""

from datetime import UTC
from typing import Annotated

from fastapi import APIRouter, Path, Query

from api import models
from api.access import AuditorsOnly, payloads_shown
from api.problems import ProblemError
from api.times import Since, Until, ms_of
from api.views import MOST, TheView, cursor, from_cursor
from projections import deadletters

router = APIRouter(tags=["dead letters"])


@router.get("/deadletters")
def list_deadletters(
    view: TheView,
    reason: Annotated[str | None, Query(description="Only those with this reason.")] = None,
    status: Annotated[models.LetterStatus | None, Query(description="Only those that stand like that.")] = None,
    text: Annotated[
        str | None, Query(description="Only those whose run's or request's id contains this, or for auditors their detail.")
    ] = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most entries of a page.")] = 50,
    cursor_: Annotated[str | None, Query(alias="cursor", description="`next` of the page before.")] = None,
) -> models.DeadLetterPage:
    """List messages that couldn't be processed, newest first, without their bytes."""
    after = from_cursor(cursor_, int, str, int, int) if cursor_ else None
    place = (after[0], after[1], after[2], after[3]) if after else None
    period = ms_of(since), ms_of(until)
    found = deadletters.newest(
        view.db,
        limit + 1,
        reason=reason,
        status=status,
        text=text,
        in_detail=payloads_shown.get(),  # a search would tell what is withheld
        period=period,
        after=place,
    )
    page = [models.DeadLetterSummary(**row) for row in found[:limit]]
    more = None
    if found[limit:]:
        last = page[-1]
        more = cursor(round(last.received.astimezone(UTC).timestamp() * 1000), last.topic, last.partition, last.offset)
    return models.DeadLetterPage(deadletters=page, next=more)


@router.get("/deadletters/{topic}/{partition}/{offset}", dependencies=[AuditorsOnly])
def show_deadletter(
    view: TheView,
    topic: Annotated[str, Path(description="The topic where it was, with its prefix.", examples=["foldflow.requests"])],
    partition: Annotated[int, Path(ge=0, le=2**31 - 1, examples=[0])],
    offset: Annotated[int, Path(ge=0, le=MOST, examples=[17])],
) -> models.DeadLetter:
    """Show a message that couldn't be processed, by where it was, with its original bytes. For auditors."""
    row = deadletters.one(view.db, topic, partition, offset)
    if row is None:
        hint = f"GET /deadletters lists them; the topic's name is the full one, with its prefix.{view.catching_up}"
        raise ProblemError(404, "unknown-deadletter", "There is no such dead letter", f"{topic}/{partition}/{offset}", hint)
    return models.DeadLetter(**row)
