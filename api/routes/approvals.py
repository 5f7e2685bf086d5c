"""What waits for people, and what they answered."""

from typing import Annotated

from fastapi import APIRouter, Query

from api import models
from api.times import Since, Until, ms_of
from api.views import TheView, cursor, from_cursor
from projections import approvals

router = APIRouter(tags=["approvals"])


@router.get("/approvals")
def list_approvals(
    view: TheView,
    waiting: Annotated[bool | None, Query(description="`true`: only those that wait; `false`: only the others.")] = None,
    by: Annotated[str | None, Query(description="Only those that this person may answer.")] = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most entries of a page.")] = 50,
    cursor_: Annotated[str | None, Query(alias="cursor", description="`next` of the page before.")] = None,
) -> models.ApprovalPage:
    """List approvals of all runs, newest first. `since` and `until` are about when they were requested."""
    after = from_cursor(cursor_, int, str, str) if cursor_ else None
    wanted = approvals.Filter(waiting, by, (after[0], after[1], after[2]) if after else None, ms_of(since), ms_of(until))
    found = approvals.newest(view.db, wanted, limit + 1)
    page = [models.ListedApproval(**row) for row in found[:limit]]
    more = None
    if found[limit:]:
        last = page[-1]
        more = cursor(round(last.requested.timestamp() * 1000), last.run_id, last.step)
    return models.ApprovalPage(approvals=page, next=more)
