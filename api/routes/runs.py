"""Runs, their steps, calls, approvals, signals and decisions, and what became of a request."""

from datetime import UTC
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Path, Query

from api import models
from api.access import AuditorsOnly
from api.labels import Labels, pairs
from api.problems import ProblemError
from api.times import Since, Until, ms_of
from api.views import MOST, TheProjector, TheView, TheViewBesideTheLog, View, cursor, from_cursor
from events import ids
from events.as_json import as_json
from projections import approvals, calls, deadletters, decisions, runs, signals, specs, step_pages
from projections.extent import Extent, extents
from projections.log import decision_at

router = APIRouter(tags=["runs"])

Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries of a page.")]
After = Annotated[int, Query(ge=0, le=MOST, description="Only those behind this number: `next` of the page before.")]
RunId = Annotated[
    str,
    Path(description="A run's id, or the beginning of it if that is the only one, or its request's id.", examples=["8f6a3a7e"]),
]
Seq = Annotated[int, Path(ge=1, le=MOST, description="Number of the decision within its run: 1, 2, 3 …", examples=[1])]
_SHOWN = 5
"""How many runs an ambiguous prefix names."""
_STEPS, _CALLS, _MOST = 500, 1000, 100
"""How many steps, calls and other things a run is shown with."""
_WAITS: dict[str, models.WaitKind] = {"awaiting_approval": "approval", "awaiting_signal": "signal", "sleeping": "sleep"}


@router.get("/runs")
def list_runs(  # noqa: PLR0913, PLR0917 - what can be asked for
    view: TheView,
    workflow: Annotated[str | None, Query(description="Only runs of this workflow.")] = None,
    status: Annotated[
        models.RunStatus | Literal["open", "waiting"] | None,
        Query(description="`open`: not over; `waiting`: for an approval, a signal, a time or at a breakpoint."),
    ] = None,
    parent: Annotated[str | None, Query(description="Only child runs of the run with this id.")] = None,
    origin: Annotated[str | None, Query(description="Only forks of the run with this id.")] = None,
    label: Labels = None,
    request_id: Annotated[str | None, Query(description="Only the run of the request with this id.")] = None,
    text: Annotated[str | None, Query(description="Only runs whose id, or whose request's id, contains this.")] = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 50,
    cursor_: Annotated[str | None, Query(alias="cursor", description="`next` of the page before.")] = None,
) -> models.RunPage:
    """List runs, newest first. `since` and `until` are about their start."""
    after = from_cursor(cursor_, int, str) if cursor_ else None
    wanted = runs.Filter(
        workflow,
        status,
        request_id,
        pairs(label),
        (after[0], after[1]) if after else None,
        parent,
        origin,
        text,
        ms_of(since),
        ms_of(until),
    )
    found = runs.newest(view.db, wanted, limit + 1)
    page = found[:limit]
    more = (
        cursor(round(page[-1]["started"].replace(tzinfo=UTC).timestamp() * 1000), page[-1]["run_id"]) if found[limit:] else None
    )
    return models.RunPage(runs=[models.RunSummary(**row) for row in page], next=more)


@router.get("/runs/{run_id}")
def show_run(view: TheView, run_id: RunId) -> models.Run:
    """Show a run with its steps and calls; a unique beginning of its id is enough."""
    row = the_run(view, run_id)
    extent = Extent.of(row)
    found, known = step_pages.of_run(view.db, extent, _STEPS)
    decided = {each["step"]: models.Step(**each) for each in found}
    rest = [models.Step(step=name, status="pending") for name in specs.steps_of(view.db, row["digest"]) if name not in decided]
    return models.Run(
        **row,
        steps=[*decided.values(), *rest],
        steps_known=known,
        waits_for=_waits(view, extent),
        children=[models.RunSummary(**each) for each in runs.newest(view.db, runs.Filter(parent=extent.run), _MOST)],
        calls_made=[models.Call(**each) for each in calls.of_run(view.db, extent, _CALLS)],
    )


def _waits(view: View, extent: Extent) -> list[models.Wait]:
    """Return what a run waits for, with what is asked where a person must answer."""
    waiting = step_pages.waiting(view.db, extent, _MOST)
    asked = {each["step"]: each for each in approvals.of_run(view.db, extent, waiting=True)} if waiting else {}
    found = []
    for step in waiting:
        kind = _WAITS.get(step["status"]) or ("breakpoint" if step["reason"] == "breakpoint" else "pause")
        asks = {name: asked[step["step"]][name] for name in ("message", "may_answer")} if step["step"] in asked else {}
        found.append(models.Wait(**{**step, **asks, "kind": kind, "since": step["started"]}))
    return found


@router.get("/runs/{run_id}/steps")
def list_steps(
    view: TheView,
    run_id: RunId,
    below: Annotated[str | None, Query(description="Only this step and all within it: `many`, `many[3]`.")] = None,
    status: Annotated[models.StepStatus | None, Query(description="Only steps that stand like that.")] = None,
    limit: Limit = 200,
    cursor_: Annotated[str | None, Query(alias="cursor", description="`next` of the page before.")] = None,
) -> models.StepPage:
    """List a run's steps, items and iterations in the order in which they began."""
    extent = resolve(view, run_id)
    after = from_cursor(cursor_, int, int) if cursor_ else None
    found = step_pages.page(view.db, extent, step_pages.Part(below, status, (after[0], after[1]) if after else None), limit + 1)
    more = cursor(found[limit - 1]["offset"], found[limit - 1]["position"]) if found[limit:] else None
    return models.StepPage(run_id=extent.run, steps=[models.Step(**row) for row in found[:limit]], next=more)


@router.get("/runs/{run_id}/approvals")
def list_run_approvals(view: TheView, run_id: RunId) -> models.RunApprovals:
    """List what a run asked people, in order, and what they answered."""
    extent = resolve(view, run_id)
    found = approvals.of_run(view.db, extent)
    return models.RunApprovals(run_id=extent.run, approvals=[models.Approval(**row) for row in found])


@router.get("/runs/{run_id}/signals")
def list_signals(view: TheView, run_id: RunId, after: After = 0, limit: Limit = 200) -> models.SignalPage:
    """List the signals that a run took notice of, in order, and which steps took them."""
    extent = resolve(view, run_id)
    found = signals.of_run(view.db, extent, after, limit + 1)
    page = [models.Signal(**row) for row in found[:limit]]
    return models.SignalPage(run_id=extent.run, signals=page, next=page[-1].seq if found[limit:] else None)


@router.get("/runs/{run_id}/decisions")
def list_decisions(view: TheView, run_id: RunId, after: After = 0, limit: Limit = 200) -> models.DecisionPage:
    """List a run's decisions in order: where each stands in the log, and what kind it is."""
    extent = resolve(view, run_id)
    found = decisions.of_run(view.db, extent, after, limit + 1)
    page = [models.Decision(**row) for row in found[:limit]]
    return models.DecisionPage(run_id=extent.run, decisions=page, next=page[-1].seq if found[limit:] else None)


@router.get("/runs/{run_id}/decisions/{seq}", dependencies=[AuditorsOnly])
def show_decision(view: TheViewBesideTheLog, projector: TheProjector, run_id: RunId, seq: Seq) -> models.FullDecision:
    """Show a decision in full, as it stands in Kafka now; its hash is checked against the one that was accepted. For auditors."""
    extent = resolve(view, run_id)
    found = decisions.of_run(view.db, extent, seq - 1, 1)
    if not found or found[0]["seq"] != seq:
        row = runs.one(view.db, extent.run)
        last = row["seq"] if row else 0
        hint = f"Its decisions are numbered 1 to {last}.{view.catching_up}"
        raise ProblemError(404, "unknown-decision", "There is no such decision", f"run {extent.run}, decision {seq}", hint)
    row = found[0]
    decision = decision_at(projector.settings, row["partition"], row["offset"], bytes.fromhex(row["hash"]))
    return models.FullDecision(**row, run_id=extent.run, record=as_json(decision))


@router.get("/requests/{request_id:path}")
def show_request(
    view: TheView,
    request_id: Annotated[
        str,
        Path(
            description="The request's id, as it was sent; of one that was refused, its run's id will do.", examples=["order-17"]
        ),
    ],
) -> models.Request:
    """Say what became of a request: its run, or why it was refused."""
    request_id = deadletters.request_of(view.db, request_id) or request_id
    run_id = ids.run_id(request_id)
    row = runs.one(view.db, run_id)
    letters = [models.DeadLetterSummary(**each) for each in deadletters.about(view.db, request_id, run_id)]
    if row is None and not letters:
        raise ProblemError(
            404,
            "unknown-request",
            "Nothing is known of this request",
            f"request {request_id}: neither a run nor a dead letter",
            "Check the spelling; if it was just sent, it waits for intake and orchestrator: are they running (`foldflow status`)?"
            + view.catching_up,
            run_id=run_id,
        )
    return models.Request(
        request_id=request_id,
        run_id=run_id,
        status="accepted" if row else "refused",
        run=models.RunSummary(**row) if row else None,
        deadletters=letters,
    )


def the_run(view: View, prefix: str) -> dict[str, Any]:
    """Return the row of the run that is named so."""
    row = runs.one(view.db, resolve(view, prefix).run)
    assert row is not None  # the view doesn't change in between
    return row


def resolve(view: View, prefix: str) -> Extent:
    """Return where the run is that a beginning of its id names, or else its request's id."""
    found = extents(view.db, prefix, _SHOWN + 1) if prefix else []
    found = found or extents(view.db, ids.run_id(prefix), 1)
    if len(found) == 1:
        return found[0]
    if not found:
        raise _unknown(view, prefix)
    more = " and more" if len(found) > _SHOWN else ""
    names = [each.run for each in found[:_SHOWN]]
    hint = "Give more digits of the id."
    detail = f"{prefix}: {', '.join(names)}{more}"
    raise ProblemError(409, "ambiguous-run", "Several runs start with this", detail, hint, runs=names)


def _unknown(view: View, name: str) -> ProblemError:
    title = "There is no such run"
    if request_id := deadletters.request_of(view.db, name):
        detail = f"request {request_id} has none: see its dead letters"
        hint = f"GET /requests/{quote(request_id, safe='')} says why.{view.catching_up}"
        return ProblemError(404, "unknown-run", title, detail, hint, request_id=request_id)
    detail = f"no run's id starts with {name}, and no request of that id has one"
    hint = f"GET /runs lists all runs. A request's run, or why there is none: GET /requests/{{request_id}}.{view.catching_up}"
    return ProblemError(404, "unknown-run", title, detail, hint)
