"""A run read again from its log: its state at any decision, and whether it is what was decided."""

from collections import deque
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query

from api.models_replay import Change, RunState, Verification, VerificationFinding
from api.problems import ProblemError
from api.routes.runs import RunId, the_run
from api.views import TheProjector, TheViewBesideTheLog
from projections import decisions
from projections.extent import Extent
from projections.replay import FitsNoStateError, changes, moment, moments, state_json
from projections.replay_sources import KafkaLog, Span
from projections.verify import verified

router = APIRouter(tags=["runs"])


@router.get("/runs/{run_id}/state")
def show_state(
    view: TheViewBesideTheLog,
    projector: TheProjector,
    run_id: RunId,
    seq: Annotated[int | None, Query(ge=1, le=2**53, description="Number of the decision; without it the last one.")] = None,
) -> RunState:
    """Show a run as one of its decisions left it, and what that decision changed; folded from the topic now."""
    row = the_run(view, run_id)
    identity = row["run_id"]
    number = row["seq"] if seq is None else seq
    found = decisions.of_run(view.db, Extent.of(row), number - 1, 1)
    if not found or found[0]["seq"] != number:
        hint = f"Its decisions are numbered 1 to {row['seq']}.{view.catching_up}"
        raise ProblemError(404, "unknown-decision", "There is no such decision", f"run {identity}, decision {number}", hint)
    partition = row["partition"]
    source = KafkaLog.open(projector.settings, partition)
    wanted = {partition: Span(row["first_offset"], found[0]["offset"] + 1)}
    try:
        found_last = deque(moments(source, identity, wanted), maxlen=1)
    except FitsNoStateError as error:
        hint = f"GET /runs/{identity}/verification says what is wrong."
        raise ProblemError(409, "broken-run", "The run can't be folded", str(error), hint) from error
    if not found_last or found_last[0].decision.seq != number:
        hint = f"GET /runs/{identity}/verification says what is wrong."
        raise ProblemError(409, "broken-run", "The topic doesn't hold what was read before", f"run {identity}", hint)
    last = found_last[0]
    changed = [Change(what=each.what, before=each.before, after=each.after) for each in changes(last.before, last.after)]
    place = {"run_id": identity, "seq": number, "at": moment(last.decision.at), "partition": partition, "offset": last.offset}
    return RunState.model_validate({**place, "hash": last.hash.hex(), "state": state_json(last.after), "changes": changed})


@router.get("/runs/{run_id}/verification")
def show_verification(view: TheViewBesideTheLog, projector: TheProjector, run_id: RunId) -> Verification:
    """Check a run now, from the topic: its hash chain, and each decision decided again from its input, byte for byte."""
    row = the_run(view, run_id)
    identity = row["run_id"]
    # What is over can't go on; of what isn't, or is set aside, whatever stands on the topic by now belongs to the check.
    whole = row["ended"] is not None and not row["problem"]
    end = row["last_offset"] + 1 if whole else None
    result = verified(projector.settings, identity, row["partition"], row["first_offset"], end)
    return Verification(
        run_id=identity,
        whole=result.whole,
        complete=not result.unchecked,
        decisions=result.decisions,
        decided_again=result.again,
        passed_over=dict(result.ignored),
        lacking=result.lacking,
        findings=[VerificationFinding(**asdict(each)) for each in result.findings],
    )
