"""`decide`: what follows from one input of a run. Pure: the same spec, state, input and time give the same effects, always.

It takes the input, then goes on until nothing more is ready (there is no separate scheduler). An input that changes nothing gives
InputIgnored with the reason, never no effect at all: whether there is a decision must not depend on what this code understands.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from events.commands import RequestPlace, StartRun
from events.decisions import Effect, InputIgnored, RunClosing, RunFailed, TimerSet, UnreadableInput
from events.failure import Failure, FailureKind
from events.results import (
    ChildRunCompleted,
    ChildRunFailed,
    Input,
    LlmCallCompleted,
    LlmCallFailed,
    TimerFired,
    ToolCallCompleted,
    ToolCallFailed,
)
from streams.workflow.advance import LONGEST_WAIT_MS, Advance
from streams.workflow.control import CONTROL, answer
from streams.workflow.making import MAX_PAYLOAD_BYTES, too_large, unusable
from streams.workflow.payloads import Memory, Payloads, utf8_size
from streams.workflow.plan import Place
from streams.workflow.spec import Step, WorkflowSpec
from streams.workflow.state import RunState, RunStatus, StepState, StepStatus

MAX_EFFECTS_BYTES: Final = 4 * 1024 * 1024
"""Largest sum of what one decision's effects hold, so that every decision can be delivered (records hold 8 MB)."""
_EFFECT_BYTES: Final = 200
"""About what an effect takes besides its JSON."""

MAX_MESSAGE_CHARS: Final = 10_000
"""How much is kept of what a failed call says: it is said again for each step around it."""
Completed = LlmCallCompleted | ToolCallCompleted | ChildRunCompleted
Failed = LlmCallFailed | ToolCallFailed | ChildRunFailed


def decide(
    spec: WorkflowSpec | None,
    state: RunState,
    cause: Input | UnreadableInput,
    at: int,
    payloads: Payloads | None = None,
    said: RequestPlace | None = None,
) -> tuple[Effect, ...]:
    """Return what follows from an input at the broker's time `at` (milliseconds since the epoch).

    `spec` is the run's version of its workflow, None if nobody knows it; `payloads` is what keeps the large ones; `said` is where
    the input was said, if it is a command: intake may say again what it has said before, even after later ones.
    Raises PayloadMissingError when an expression looks into one that can't be had (yet).
    """
    if isinstance(cause, UnreadableInput):
        return (InputIgnored("unreadable"),)
    if said is not None and said.offset <= state.heard.get((said.topic_id, said.partition), -1):
        return (InputIgnored("duplicate"),)
    if isinstance(cause, StartRun):
        if state.status is not RunStatus.NEW:
            return (InputIgnored("already_started"),)
        if (size := utf8_size(cause.input)) > MAX_PAYLOAD_BYTES:
            return (RunFailed(None, too_large("the run's input", size)),)
    if spec is None:
        digest = cause.digest if isinstance(cause, StartRun) else state.digest
        return (RunFailed(None, Failure(FailureKind.UNKNOWN_WORKFLOW, f"no workflow is registered with digest {digest}")),)
    advance = Advance(spec.plan, state, cause, at, Memory() if payloads is None else payloads)
    _INPUTS[type(cause)](advance, cause)
    size = advance.bytes + _EFFECT_BYTES * len(advance.found)
    if size <= MAX_EFFECTS_BYTES:
        return tuple(advance.found)
    failure = too_large("what follows from this input", size)
    # Instead the run ends as others do, so that no call, child or undone step stays behind, unless that is too much as well.
    ending = Advance(spec.plan, state, cause, at, advance.payloads)
    ending.close(RunClosing("failed", failure=failure), force=state.closing is not None)
    fits = ending.bytes + _EFFECT_BYTES * len(ending.found) <= MAX_EFFECTS_BYTES
    return tuple(ending.found) if fits else (RunFailed(None, failure),)


def _start(advance: Advance, cause: StartRun) -> None:
    del cause
    if advance.plan.time_limit is not None:
        advance.add(TimerSet("", advance.at + advance.plan.time_limit))
    advance.advance(None, advance.plan.root, advance.plan.root.roots)


# --- Answers to calls, and timers ---


def _awaited(advance: Advance, path: str, identity: str, *, timer: bool = False) -> tuple[Place, StepState] | None:
    """Return the step that waits for this call or timer; if none does, record why the input is ignored."""
    step = advance.step(path)
    place = advance.plan.place(path) if step is not None else None
    if step is not None and step.awaits == identity:
        if place is not None and not step.settled and (timer or step.status is StepStatus.RUNNING):
            return place, step
        advance.ignore("late" if timer or step.status is not StepStatus.COMPLETED else "duplicate")
    elif step is not None and identity in step.past:
        advance.ignore("late")
    else:
        advance.ignore("unknown_timer" if timer else "unknown_call")
    return None


def _completed(advance: Advance, cause: Completed) -> None:
    """Take the answer to a call, unless it is too large or no JSON."""
    found = _awaited(advance, cause.step, cause.call_id)
    if found is None:
        return
    place, _ = found
    failure = unusable(cause.output)
    if failure is not None:
        advance.after(advance.failed(place, failure))
        return
    advance.guarded(place, lambda: advance.complete(place, text=cause.output))
    advance.after(advance.outermost(place))


def _failed(advance: Advance, cause: Failed) -> None:
    found = _awaited(advance, cause.step, cause.call_id)
    if found is not None:
        failure = replace(cause.failure, message=cause.failure.message[:MAX_MESSAGE_CHARS])
        advance.after(advance.failed(found[0], failure))


def _timer(advance: Advance, cause: TimerFired) -> None:
    """Give up what took too long, or start what waited for its time."""
    if not cause.step:
        _run_limit(advance, cause)
        return
    found = _awaited(advance, cause.step, cause.timer_id, timer=True)
    if found is None:
        return
    place, step = found
    if not step.due:  # it waits without a limit: nobody set this timer
        advance.ignore("unknown_timer")
        return
    if advance.at < step.due:  # the owner's clock is ahead of the broker's
        advance.ignore("early")
        return
    limit = advance.limit(place)
    if limit is not None and advance.at >= limit and not _own_time(place, step, limit):
        _over_limit(advance, place, step)
        return
    _TIMERS[step.status](advance, place, step)


def _run_limit(advance: Advance, cause: TimerFired) -> None:
    limit = advance.state.limit
    if limit is None or limit[0] != cause.timer_id:
        advance.ignore("unknown_timer")
    elif advance.at < limit[1]:
        advance.ignore("early")
    elif advance.state.closing is not None:
        advance.ignore("late")
    else:
        message = f"the run did not end within {advance.plan.time_limit} ms"
        advance.close(RunClosing("failed", failure=Failure(FailureKind.TIMEOUT, message)))


def _own_time(place: Place, step: StepState, limit: int) -> bool:
    """Whether a wait's own time is over, not the step's time limit: the shorter one counts, however late its timer fires."""
    spec = place.plan.step
    if step.status is StepStatus.SLEEPING:
        return step.due < limit
    if not isinstance(spec, Step) or step.status not in (StepStatus.AWAITING_SIGNAL, StepStatus.AWAITING_APPROVAL):
        return False
    wait = spec.wait_for.timeout if spec.wait_for else spec.approval.deadline if spec.approval else None
    return wait is not None and step.began + wait <= limit


def _over_limit(advance: Advance, place: Place, step: StepState) -> None:
    spec = place.plan.step
    assert isinstance(spec, Step)
    advance.cancel_parts(place, "time limit")
    advance.cancel_call(place.path, step, "time limit")
    advance.after(advance.fail(place, Failure(FailureKind.TIMEOUT, f"the step did not end within {spec.time_limit} ms")))


def _attempt_over(advance: Advance, place: Place, step: StepState) -> None:
    if step.asked is not None:
        advance.cancel_call(place.path, step, "time limit")
    timeout = place.plan.step.timeout
    advance.after(advance.failed(place, Failure(FailureKind.TIMEOUT, f"no answer within {timeout} ms")))


def _retry(advance: Advance, place: Place, step: StepState) -> None:
    advance.attempt(place, step.attempt)
    advance.after(advance.outermost(place))


def _slept(advance: Advance, place: Place, step: StepState) -> None:
    del step
    advance.guarded(place, lambda: advance.complete(place, "null"))
    advance.after(advance.outermost(place))


def _part_over(advance: Advance, place: Place, step: StepState) -> None:
    """Go on with a loop that left off because one decision held enough."""
    advance.next_part(place)
    now = advance.step(place.path)
    if now is not None and not now.settled and now.awaits == step.awaits:
        advance.set_limit(place)
    advance.after(advance.outermost(place))
    if not advance.found:  # the timer fired twice
        advance.ignore("late")


def _signal_over(advance: Advance, place: Place, step: StepState) -> None:
    del step
    if place.plan.value is None:
        wait = place.plan.step.wait_for if isinstance(place.plan.step, Step) else None
        assert wait is not None
        message = f"no signal `{wait.signal}` within {wait.timeout} ms"
        advance.after(advance.fail(place, Failure(FailureKind.TIMEOUT, message)))
        return
    value = place.plan.value
    advance.guarded(place, lambda: advance.complete(place, advance.evaluate(place, value)))
    advance.after(advance.outermost(place))


def _approval_over(advance: Advance, place: Place, step: StepState) -> None:
    approval = place.plan.step.approval if isinstance(place.plan.step, Step) else None
    assert approval is not None
    if approval.otherwise == "fail":
        message = f"nobody approved within {approval.deadline} ms"
        advance.after(advance.fail(place, Failure(FailureKind.TIMEOUT, message)))
    else:
        answer(advance, place, step, approved=approval.otherwise == "approve", by="", reason="deadline", value=None)


_TIMERS: Final[dict[StepStatus, Callable[[Advance, Place, StepState], None]]] = {
    StepStatus.RUNNING: _attempt_over,
    StepStatus.WAITING: _retry,
    StepStatus.SLEEPING: _slept,
    StepStatus.ENTERED: _part_over,
    StepStatus.AWAITING_SIGNAL: _signal_over,
    StepStatus.AWAITING_APPROVAL: _approval_over,
}


_INPUTS: Final[dict[type[Any], Callable[[Advance, Any], None]]] = {
    StartRun: _start,
    LlmCallCompleted: _completed,
    ToolCallCompleted: _completed,
    ChildRunCompleted: _completed,
    LlmCallFailed: _failed,
    ToolCallFailed: _failed,
    ChildRunFailed: _failed,
    TimerFired: _timer,
    **CONTROL,
}


__all__ = ["LONGEST_WAIT_MS", "MAX_EFFECTS_BYTES", "MAX_PAYLOAD_BYTES", "decide", "utf8_size"]
