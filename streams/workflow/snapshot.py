"""A run's state as a snapshot, and back. What comes back is equal to what was kept, so it decides the same."""

from typing import Any

from immutables import Map

from events.commands import RequestPlace
from events.decisions import UndoPlanned
from events.failure import Failure
from events.snapshots import ItemFailure, Listening, RunSnapshot, StepSnapshot
from streams.workflow.expressions import to_json
from streams.workflow.state import RunState, RunStatus, StepState, StepStatus, Undo, copied_results


def keep(run_id: str, state: RunState, decisions_topic_id: bytes, first_offset: int) -> RunSnapshot:
    """Return the snapshot of an open run whose decisions are all settled."""
    limit_id, limit_due = state.limit or (None, 0)
    return RunSnapshot(
        run_id,
        decisions_topic_id,
        first_offset,
        state.seq,
        state.head,
        state.last_topic_id,
        state.last_offset,
        next_due(state),
        state.workflow,
        state.digest,
        state.input,
        state.settled,
        state.parent,
        limit_id,
        limit_due,
        state.paused,
        tuple(sorted(state.stops)),
        None if state.copied is None else _copied(state.copied),
        state.signals,
        state.seen,
        tuple(Listening(*key, paths) for key, paths in sorted(state.listening.items(), key=lambda item: repr(item[0]))),
        tuple(_undo(state.undo)),
        state.closing,
        state.not_undone,
        tuple(_step(path, step) for path, step in sorted(state.steps.items(), key=lambda item: item[0])),
        tuple(RequestPlace(*place, offset) for place, offset in sorted(state.heard.items())),
    )


def restore(kept: RunSnapshot) -> RunState:
    """Return the state that a snapshot was made of."""
    steps = {each.step: _restored(each) for each in kept.steps}
    undo: Undo = None
    for planned in reversed(kept.undo):
        undo = planned, undo
    return RunState(
        status=RunStatus.OPEN,
        workflow=kept.workflow,
        digest=kept.digest,
        input=kept.input,
        steps=Map(steps),
        settled=kept.settled,
        seq=kept.seq,
        head=kept.head,
        last_topic_id=kept.last_topic_id,
        last_offset=kept.last_offset,
        parent=kept.parent,
        limit=(kept.limit_id, kept.limit_due) if kept.limit_id is not None else None,
        paused=kept.paused,
        stops=frozenset(kept.stops),
        held=Map({path: None for path, step in steps.items() if step.status is StepStatus.HELD}),
        listening=Map({(each.signal, each.correlation): each.steps for each in kept.listening}),
        signals=kept.signals,
        seen=kept.seen,
        copied=copied_results(kept.copied) if kept.copied is not None else None,
        undo=undo,
        closing=kept.closing,
        not_undone=kept.not_undone,
        heard=Map({(each.topic_id, each.partition): each.offset for each in kept.heard}),
    )


def next_due(state: RunState) -> int:
    """Return when the run's next timer is, milliseconds since the epoch; 0: it has none."""
    times = [step.due for step in state.steps.values() if step.due and not step.settled]
    if state.limit is not None:
        times.append(state.limit[1])
    return min(times, default=0)


def _undo(undo: Undo) -> Any:
    while undo is not None:
        planned: UndoPlanned = undo[0]
        yield planned
        undo = undo[1]


def _copied(copied: Any) -> str:
    def error(failure: Failure | None) -> Any:
        return {"kind": str(failure.kind), "message": failure.message} if failure else None

    results = {
        path: {"status": status.value, "output": output, "error": error(e)} for path, (status, output, e) in copied.items()
    }
    return to_json(results)


def _step(path: str, step: StepState) -> StepSnapshot:
    return StepSnapshot(
        path,
        step.status.value,
        step.attempt,
        step.awaits,
        step.due,
        step.output,
        step.failure,
        step.past,
        step.began,
        step.asked,
        step.inner,
        step.next,
        step.done,
        step.failed,
        step.total,
        step.items,
        step.shared,
        tuple(ItemFailure(index, failure) for index, failure in step.failures),
    )


def _restored(kept: StepSnapshot) -> StepState:
    return StepState(
        StepStatus(kept.status),
        kept.attempt,
        kept.awaits,
        kept.due,
        kept.output,
        kept.failure,
        kept.past,
        kept.began,
        kept.asked,
        kept.inner,
        kept.next,
        kept.done,
        kept.failed,
        kept.total,
        kept.items,
        kept.shared,
        tuple((each.index, each.failure) for each in kept.failures),
    )


__all__ = ["keep", "next_due", "restore"]
