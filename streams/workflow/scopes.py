"""What the expressions of a step see: the run's input, other steps, the variables of loops around it."""

from functools import lru_cache
from typing import Any, Final

from events.failure import Failure
from streams.workflow.expressions import EvaluationError, Expression, Json, Scope, Value
from streams.workflow.payloads import Payloads, resolve
from streams.workflow.plan import Place
from streams.workflow.state import StepState
from streams.workflow.templates import Template

_PENDING: Final[dict[str, Json]] = {"status": "pending", "output": None, "error": None, "failures": []}


def scope(draft: Any, place: Place, part: Expression | Value | Template, payloads: Payloads, extra: dict[str, Json]) -> Scope:
    """Return what a part of a step's definition sees; no more than it uses, so that nothing is read in vain.

    `draft` is the state so far; `extra` are variables that only this part has, or that have another value for it.
    """
    refs, steps = place.plan.refs, draft.steps
    variables: dict[str, Json] = {}
    for name in part.names:
        if name in extra:
            variables[name] = extra[name]
        elif name == "input":
            variables[name] = resolve(draft.input, payloads)
        elif name == "steps":
            seen = ((step, steps.get(place.path_of(step, refs[step]))) for step in part.steps)
            variables[name] = {step: _view(state, payloads) for step, state in seen}
        elif name in place.plan.bindings:
            variables[name] = _binding(draft, place, name, payloads)
        else:
            variables[name] = _ending(draft, name)
    texts = {}
    for step in part.whole:
        state = steps.get(place.path_of(step, refs[step]))
        texts[step] = (state.output if state is not None else None) or "null"
    return Scope(variables, texts)


def _ending(draft: Any, name: str) -> Json:
    """Return what clean-up steps see of how the run ends: `outcome` or `error`."""
    closing = draft.closing
    if name == "outcome":
        return closing.outcome if closing else None
    return _error(closing.failure if closing else None)


def _error(failure: Failure | None) -> Json:
    return {"kind": str(failure.kind), "message": failure.message} if failure else None


def _binding(draft: Any, place: Place, name: str, payloads: Payloads) -> Json:
    """Return the value of a loop's variable."""
    what, level = place.plan.bindings[name]
    around = place.at(level)
    assert around.index is not None
    if what == "index":
        return around.index
    owner = around.owner()
    assert owner is not None
    loop: StepState = draft.steps[owner.path]
    if what == "last":
        return resolve(loop.output, payloads) if loop.output is not None else None
    return listed(loop.items or "[]", payloads)[around.index]


@lru_cache(maxsize=64)
def listed(items: str, payloads: Payloads) -> list[Json]:
    """Return a step's items. Kept for a while: each item of a long list would read the whole list. Raises EvaluationError."""
    value = resolve(items, payloads)
    if not isinstance(value, list):
        raise EvaluationError(f"for_each: the items are no list but a {type(value).__name__}")
    return value


def _view(step: StepState | None, payloads: Payloads) -> Json:
    """Return a step as expressions see it."""
    if step is None:
        return _PENDING
    output = resolve(step.output, payloads) if step.output is not None else None
    failures = [{"index": index, "kind": str(each.kind), "message": each.message} for index, each in step.failures]
    return {"status": step.status.value, "output": output, "error": _error(step.failure), "failures": failures}


__all__ = ["listed", "scope"]
