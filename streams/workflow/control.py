"""What people and other systems say to a run that exists: signals, approvals, cancelling, pausing, setting an output.

Each is a command that can come at any time, twice, or too late; one that changes nothing is ignored with the reason.
"""

import re
from collections.abc import Callable
from typing import Any, Final

from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    SignalReceived,
)
from events.decisions import (
    ApprovalRequested,
    BreakpointCleared,
    BreakpointSet,
    OutputChanged,
    RunClosing,
    RunPaused,
    RunResumed,
    SignalKept,
    SignalTaken,
)
from events.failure import Failure, FailureKind
from streams.workflow.advance import Advance
from streams.workflow.expressions import to_json
from streams.workflow.making import unusable
from streams.workflow.plan import Place
from streams.workflow.spec import Step
from streams.workflow.state import StepState, StepStatus, unnumbered

MOST_SIGNALS: Final = 1000
MOST_SIGNALS_BYTES: Final = 4 * 1024 * 1024
"""How many signals a run keeps that no step has taken, and how large they are together."""
MOST_REASON: Final = 200
"""How much of a reason is said again for each part of a step."""
MOST_PATH: Final = 1000
"""The longest name of a step that is looked for."""


def _signal(advance: Advance, cause: SignalReceived) -> None:
    state = advance.state
    if cause.signal_id in state.seen or any(kept.signal_id == cause.signal_id for kept in state.signals):
        advance.ignore("duplicate")
        return
    if unusable(cause.payload):
        advance.ignore("not_json_or_too_large")
        return
    waiting = state.listening.get((cause.name, cause.correlation)) or state.listening.get((cause.name, None))
    place = advance.plan.place(waiting[0]) if waiting else None
    if place is not None:
        taken = SignalTaken(place.path, cause.signal_id)
        advance.guarded(place, lambda: advance.complete(place, text=cause.payload, by=taken))
        advance.after(advance.outermost(place))
    elif state.closing is not None:
        advance.ignore("closing")
    elif (
        len(state.signals) >= MOST_SIGNALS
        or sum(len(each.payload) for each in state.signals) + len(cause.payload) > MOST_SIGNALS_BYTES
    ):
        advance.ignore("too_many_signals")
    else:
        advance.add(SignalKept(cause.signal_id))


def _approve(advance: Advance, cause: ApprovalAnswered) -> None:
    step = advance.step(cause.step)
    place = advance.plan.place(cause.step) if step is not None else None
    if step is None or place is None or step.status is not StepStatus.AWAITING_APPROVAL:
        advance.ignore("late" if step is not None and step.settled else "nothing_to_approve")
        return
    asked = step.asked
    assert isinstance(asked, ApprovalRequested)
    if asked.by and cause.by not in asked.by:
        advance.ignore("not_allowed")
    elif cause.value is not None and not asked.editable:
        advance.ignore("not_editable")
    elif cause.value is not None and unusable(cause.value):
        advance.ignore("not_json_or_too_large")
    else:
        answer(advance, place, step, approved=cause.approved, by=cause.by, reason=cause.reason, value=cause.value)


def answer(advance: Advance, place: Place, step: StepState, *, approved: bool, by: str, reason: str, value: str | None) -> None:
    """Settle an approval by an answer, or by the end of its time."""
    approval = place.plan.step.approval if isinstance(place.plan.step, Step) else None
    assert approval is not None
    assert isinstance(step.asked, ApprovalRequested)
    if not approved and approval.on_reject == "fail":
        who = f"by {by}" if by else "by nobody's answer in time"
        failure = Failure(FailureKind.NOT_APPROVED, f"rejected {who}{': ' if reason else ''}{reason}")
        advance.after(advance.fail(place, failure))
        return
    shown = value if value is not None else step.asked.value
    output = (
        f'{{"approved":{to_json(approved)},"by":{to_json(by)},"edited":{to_json(value is not None)},'
        f'"reason":{to_json(reason)},"value":{shown}}}'
    )
    advance.guarded(place, lambda: advance.complete(place, advance.inlined(output)))
    advance.after(advance.outermost(place))


def _cancel_run(advance: Advance, cause: CancelRun) -> None:
    if advance.state.closing is not None and not cause.force:
        advance.ignore("closing")
        return
    advance.close(RunClosing("cancelled", by=cause.by, reason=cause.reason), force=cause.force)


def _cancel_step(advance: Advance, cause: CancelStep) -> None:
    found = _under_way(advance, cause.step)
    if found is None:
        return
    place, step = found
    why = cause.reason[:MOST_REASON]
    advance.cancel_parts(place, why)
    advance.cancel_call(place.path, step, why)
    by = f" by {cause.by}" if cause.by else ""
    advance.after(
        advance.fail(place, Failure(FailureKind.CANCELLED, f"cancelled{by}{': ' if cause.reason else ''}{cause.reason}"))
    )


def _under_way(advance: Advance, path: str) -> tuple[Place, StepState] | None:
    """Return a step that is not settled; if it is, or never began, record why the input is ignored."""
    place, step = _place(advance, path), advance.step(path)
    if place is None:
        advance.ignore("unknown_step")
    elif step is None:
        advance.ignore("not_started")
    elif step.settled:
        advance.ignore("late")
    else:
        return place, step
    return None


def _place(advance: Advance, path: str) -> Place | None:
    return advance.plan.place(path) if len(path) <= MOST_PATH else None


def _pause_run(advance: Advance, cause: PauseRun) -> None:
    del cause
    if advance.state.closing is not None:
        advance.ignore("closing")
    elif advance.state.paused:
        advance.ignore("already_paused")
    else:
        advance.add(RunPaused())


def _pause_step(advance: Advance, cause: PauseStep) -> None:
    if advance.state.closing is not None:
        advance.ignore("closing")
    elif _place(advance, cause.step) is None and not _inside(advance, cause.step):
        advance.ignore("unknown_step")
    elif cause.step in advance.state.stops:
        advance.ignore("already_paused")
    else:
        advance.add(BreakpointSet(cause.step))


def _inside(advance: Advance, path: str) -> bool:
    """Whether there is such a step in the items or iterations of steps: `many.ask` means `many[3].ask` too."""
    first, *names = path.split(".")
    plan = advance.plan.root.steps.get(first)
    for name in names:
        plan = plan.frame.steps.get(name) if plan is not None and plan.frame is not None else None
    return plan is not None


def _resume_run(advance: Advance, cause: ResumeRun) -> None:
    if not advance.state.paused and not advance.state.held:
        advance.ignore("not_paused")
        return
    held = sorted(advance.state.held, key=_natural)
    if advance.state.paused and cause.single and not held:
        advance.ignore("nothing_held")
        return
    advance.add(RunResumed(cause.single))
    for path in held:
        _release(advance, path)


def _resume_step(advance: Advance, cause: ResumeStep) -> None:
    held = [path for path in sorted(advance.state.held, key=_natural) if _is(path, cause.step)]
    stops = cause.step in advance.state.stops
    if not held and not stops:
        advance.ignore("not_paused")
    if stops:
        advance.add(BreakpointCleared(cause.step))
    for path in held:
        _release(advance, path)


def _is(path: str, name: str) -> bool:
    """Whether a step has this path, or this one without numbers, as breakpoints have."""
    return path == name or (path[-1] != "]" and unnumbered(path) == name)


def _release(advance: Advance, path: str) -> None:
    """Start a step that was held."""
    step, place = advance.step(path), advance.plan.place(path)
    if step is None or place is None or step.status is not StepStatus.HELD:
        return  # what it is part of has ended meanwhile
    limit = advance.limit(place)
    if limit is not None and advance.at >= limit:
        advance.fail(place, Failure(FailureKind.TIMEOUT, f"the step did not end within {limit - step.began} ms"))
    elif step.attempt:
        advance.attempt(place, step.attempt, released=True)
    else:
        advance.enter(place, released=True)
    advance.after(advance.outermost(place))


_DIGITS: Final = re.compile(r"(\d+)")


def _natural(path: str) -> list[Any]:
    """Return a key that sorts item 10 behind item 9."""
    return [int(part) if part.isdigit() else part for part in _DIGITS.split(path)]


def _change_output(advance: Advance, cause: ChangeOutput) -> None:
    place, step = _place(advance, cause.step), advance.step(cause.step)
    if advance.state.closing is not None:
        advance.ignore("closing")
    elif place is None:
        advance.ignore("unknown_step")
    elif step is None:
        advance.ignore("not_started")
    elif unusable(cause.output):
        advance.ignore("not_json_or_too_large")
    elif step.status is StepStatus.COMPLETED and step.output == cause.output:
        advance.ignore("unchanged")
    else:
        if not step.settled:
            advance.cancel_parts(place, "its output was set")
            advance.cancel_call(place.path, step, "its output was set")
        advance.add(OutputChanged(cause.step))
        if not step.settled:
            advance.after(place)


CONTROL: Final[dict[type[Any], Callable[[Advance, Any], None]]] = {
    SignalReceived: _signal,
    ApprovalAnswered: _approve,
    CancelRun: _cancel_run,
    CancelStep: _cancel_step,
    PauseRun: _pause_run,
    PauseStep: _pause_step,
    ResumeRun: _resume_run,
    ResumeStep: _resume_step,
    ChangeOutput: _change_output,
}

__all__ = ["CONTROL", "answer"]
