"""What runs cost."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.labels import Labels, pairs
from api.models_cost import By, Cost, Groups, RunCosts
from api.routes.runs import RunId, resolve
from api.times import Since, Until, ms_of
from api.views import TheView
from projections import cost

router = APIRouter(tags=["cost"])

Limit = Annotated[int, Query(ge=1, le=1000, description="Most groups that are told one by one.")]


@router.get("/cost")
def show_cost(
    view: TheView,
    by: Annotated[By, Query(description="What the calls of a group have in common.")] = "workflow",
    since: Since = None,
    until: Until = None,
    workflow: Annotated[str | None, Query(description="Only calls that runs of this workflow made themselves.")] = None,
    label: Labels = None,
    limit: Limit = 100,
) -> Groups:
    """Say what calls cost, by what they are for. A time range is about when calls ended; days are those of UTC.

    With `label`, runs that labelled runs have started are counted with them.
    """
    wanted = cost.Filter(ms_of(since), ms_of(until), workflow, pairs(label))
    found = cost.costs(view.db, wanted, by, limit)
    return Groups(by=by, total=Cost(**found.total), groups=found.groups, rest=found.rest, left_out=found.left_out)


@router.get("/runs/{run_id}/cost")
def show_run_cost(
    view: TheView,
    run_id: RunId,
    by: Annotated[By, Query(description="What the calls of a group have in common.")] = "step",
    since: Since = None,
    until: Until = None,
    limit: Limit = 100,
) -> RunCosts:
    """Say what a run cost, with the runs that it started; a unique beginning of its id is enough."""
    identity = resolve(view, run_id).run
    wanted = cost.Filter(ms_of(since), ms_of(until), runs=cost.family(view.db, identity))
    found = cost.costs(view.db, wanted, by, limit)
    own, children = cost.in_family(view.db, wanted, found.total)
    return RunCosts(
        run_id=identity,
        by=by,
        total=found.total,
        groups=found.groups,
        rest=found.rest,
        left_out=found.left_out,
        own=own,
        children=children,
    )
