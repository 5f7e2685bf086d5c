"""What each kind of step does when it begins, and how a call is requested. Expressions that fail raise EvaluationError."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from events.calls import LlmCallRequested, ToolCallRequested
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    ChildRunRequested,
    SignalAwaited,
    SignalTaken,
    StepSkipped,
    TimerSet,
    UndoPlanned,
)
from streams.workflow.expressions import EvaluationError, from_json, to_json
from streams.workflow.plan import Place
from streams.workflow.spec import Step
from streams.workflow.state import undone
from streams.workflow.times import LONGEST_MS, instant, milliseconds

if TYPE_CHECKING:
    from streams.workflow.advance import Advance

Call = LlmCallRequested | ToolCallRequested | ChildRunRequested


def call(advance: "Advance", place: Place, number: int) -> Call:
    """Return the request for attempt `number` of a step's call. Raises EvaluationError, PayloadError."""
    step, path = place.plan.step, place.path
    limit = advance.limit(place)
    deadline = advance.at + step.timeout if limit is None else min(advance.at + step.timeout, limit)
    if isinstance(step, Step) and step.llm is not None:
        return _llm_call(advance, place, step, number, deadline)
    if step.tool is not None:
        return ToolCallRequested(path, number, step.tool.name, _arguments(advance, place), deadline)
    assert step.run is not None
    run = step.run
    detached = run.detached and isinstance(step, Step)
    if not isinstance(step, Step):  # a run that undoes something has the time of a call
        limit = deadline
    return ChildRunRequested(path, number, run.workflow, run.version, _arguments(advance, place), detached, limit)


def _arguments(advance: "Advance", place: Place) -> str:
    """Return the arguments of a call as JSON."""
    before = advance.step(place.path)
    if undone(place.path) is not None:
        if before is not None and before.shared is not None:
            return before.shared
        assert advance.state.undo is not None
        planned: UndoPlanned = advance.state.undo[0]
        return planned.arguments
    assert place.plan.value is not None
    owner = advance.step(place.path[: place.path.rindex("[")]) if place.index is not None else None
    if owner is None or owner.shared is None:
        return advance.evaluate(place, place.plan.value)
    own = {key: advance.evaluate(place, part) for key, part in place.plan.own.items()}
    return advance.inlined(joined(owner.shared, own))


def joined(shared: str, own: dict[str, str]) -> str:
    """Return a JSON object with further items, whose values are JSON; the keys in order."""
    items = {key: to_json(value) for key, value in from_json(shared).items()} | own
    return "{" + ",".join(f"{to_json(key)}:{items[key]}" for key in sorted(items)) + "}"


def _llm_call(advance: "Advance", place: Place, step: Step, number: int, deadline: int) -> LlmCallRequested:
    plan, llm = place.plan, step.llm
    assert llm is not None
    assert plan.prompt is not None
    messages = [{"role": "system", "content": advance.render(place, plan.system)}] if plan.system else []
    messages.append({"role": "user", "content": advance.render(place, plan.prompt)})
    text = advance.inlined(to_json(messages))
    advance.bytes += len(plan.schema or "")
    return LlmCallRequested(place.path, number, llm.model, text, plan.parameters, plan.schema, deadline)


def _call(advance: "Advance", place: Place, step: Step) -> None:
    del step
    advance.attempt(place, 1)


def _transform(advance: "Advance", place: Place, step: Step) -> None:
    del step
    assert place.plan.value is not None
    advance.complete(place, advance.evaluate(place, place.plan.value))


def _sleep(advance: "Advance", place: Place, step: Step) -> None:
    assert place.plan.value is not None
    value = from_json(advance.evaluate(place, place.plan.value))
    try:
        if step.sleep is not None:
            wait = milliseconds(value)
            if not isinstance(wait, int | float) or not 0 <= wait <= LONGEST_MS:
                raise ValueError(f"{to_json(value)[:100]} is no time to wait; write 500ms, 60s, 5m, 2h or 3d")  # noqa: TRY301
            due = advance.at + round(wait)
        else:
            due = value if isinstance(value, int) and not isinstance(value, bool) else instant(str(value))
            due = max(due, advance.at)
            if due - advance.at > LONGEST_MS:
                raise ValueError(f"{value} is more than ten years away")  # noqa: TRY301
    except ValueError as error:
        raise EvaluationError(f"{place.plan.kind}: {error}") from error
    limit = advance.limit(place)
    advance.add(TimerSet(place.path, due if limit is None else min(due, limit)))


def _wait_for(advance: "Advance", place: Place, step: Step) -> None:
    wait = step.wait_for
    assert wait is not None
    correlation = None
    if place.plan.correlation is not None:
        value = from_json(advance.evaluate(place, place.plan.correlation))
        correlation = value if isinstance(value, str) else to_json(value)
    for kept in advance.state.signals:
        if kept.name == wait.signal and correlation in (None, kept.correlation):
            advance.complete(place, text=kept.payload, by=SignalTaken(place.path, kept.signal_id))
            return
    advance.add(SignalAwaited(place.path, wait.signal, correlation, _due(advance, place, wait.timeout)))


def _approval(advance: "Advance", place: Place, step: Step) -> None:
    approval = step.approval
    assert approval is not None
    assert place.plan.message is not None
    shown = advance.evaluate(place, place.plan.value) if place.plan.value is not None else "null"
    message = advance.render(place, place.plan.message)[:10_000]
    due = _due(advance, place, approval.deadline)
    advance.add(ApprovalRequested(place.path, message, shown, approval.by, approval.editable, due))


def _steps(advance: "Advance", place: Place, step: Step) -> None:
    del step
    frame = place.plan.frame
    assert frame is not None
    advance.add(BlockEntered(place.path))
    advance.set_limit(place)
    advance.advance(place, frame, frame.roots)


def _switch(advance: "Advance", place: Place, step: Step) -> None:
    """Enter the first case whose condition holds; the others are skipped, each with the reason."""
    del step
    frame = place.plan.frame
    assert frame is not None
    advance.add(BlockEntered(place.path))
    advance.set_limit(place)
    taken: Place | None = None
    for name in frame.order:
        case = place.inner(name)
        if taken is not None:
            advance.add(StepSkipped(case.path, f"`{taken.plan.name}` was taken"))
        elif case.plan.when is None or advance.holds(case, case.plan.when):
            taken = case
        else:
            advance.add(StepSkipped(case.path, case.plan.when.source))
    if taken is None:
        advance.complete(place, "null")
        return
    advance.enter(taken)
    if advance.settled(taken.path) and not advance.settled(place.path):
        advance.complete(place, source=taken.path)


def _due(advance: "Advance", place: Place, wait: int | None) -> int | None:
    limit = advance.limit(place)
    if wait is None:
        return limit
    return advance.at + wait if limit is None else min(advance.at + wait, limit)


KINDS: Final[dict[str, Callable[["Advance", Place, Step], None]]] = {
    "llm": _call,
    "tool": _call,
    "run": _call,
    "transform": _transform,
    "sleep": _sleep,
    "sleep_until": _sleep,
    "wait_for": _wait_for,
    "approval": _approval,
    "steps": _steps,
    "switch": _switch,
}


__all__ = ["KINDS", "call", "joined"]
