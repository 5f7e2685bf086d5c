"""Where something comes from, what became of it, and a picture of a run."""

from dataclasses import asdict
from typing import Annotated, Final

from fastapi import APIRouter, Query, Response

from api.access import payloads_shown
from api.models_lineage import Lineage, LineageEdge, LineageNode
from api.problems import ProblemError
from api.routes.runs import RunId, resolve, the_run
from api.views import TheView
from projections.lineage import MOST_DEPTH, About, Asked, Direction, UnknownNodeError, lineage, node_of
from projections.picture import picture

router = APIRouter(tags=["lineage"])

_SVG: Final = "image/svg+xml"


@router.get("/runs/{run_id}/lineage")
def show_lineage(
    view: TheView,
    run_id: RunId,
    node: Annotated[
        str | None,
        Query(
            description="Where to begin: a node's id, or what comes behind the run in it (`input`, `output`, `step/PATH`, "
            "`decision/SEQ`). Without it, all of the run.",
            examples=["step/report"],
        ),
    ] = None,
    direction: Annotated[Direction, Query(description="`up`: what it comes from; `down`: what became of it.")] = "both",
    about: Annotated[
        About, Query(description="`data`: which value went where; `control`: which event led to which; or `all`.")
    ] = "data",
    depth: Annotated[int, Query(ge=1, le=MOST_DEPTH, description="How many edges away at most.")] = MOST_DEPTH,
) -> Lineage:
    """Show where something comes from and what became of it, in this run and across child runs and forks.

    Data lineage is read off the workflow's expressions, not guessed from values. Items of a long list are one node, `PATH[]`.
    Only auditors are told of the files that outputs name.
    """
    identity = resolve(view, run_id).run
    start = None if node is None else node_of(identity, node)
    try:
        found = lineage(view.db, Asked(identity, start, direction, about, depth, files=payloads_shown.get()))
    except UnknownNodeError as error:
        hint = f"`foldflow show` lists a run's steps, GET /runs/{identity}/lineage?about={about} all nodes.{view.catching_up}"
        raise ProblemError(404, "unknown-node", "There is no such node", str(error), hint) from error
    return Lineage(
        run_id=identity,
        node=start,
        truncated=found.truncated,
        nodes=[LineageNode(**asdict(each)) for each in found.nodes.values()],
        edges=[LineageEdge(**asdict(each)) for each in found.edges],
    )


@router.get(
    "/runs/{run_id}/lineage.svg",
    response_class=Response,
    responses={
        200: {
            "description": "The picture.",
            "content": {_SVG: {"schema": {"type": "string"}, "example": '<svg xmlns="http://www.w3.org/2000/svg">…</svg>'}},
        }
    },
)
def show_picture(view: TheView, run_id: RunId) -> Response:
    """Draw a picture of a run: what was asked, what each step did with what, and what came of it.

    Values are only told to auditors.
    """
    row = the_run(view, run_id)
    return Response(picture(view.db, row, payloads=payloads_shown.get()), media_type=_SVG)
