"""Forks: a new run that begins with results of another one, so that only what is changed, and what depends on it, runs again."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from events.commands import Origin, WorkflowRequest
from streams.workflow.expressions import DefinitionError, from_json, to_json
from streams.workflow.plan import FINALLY, Frame, Place, Plan
from streams.workflow.spec import Step, WorkflowSpec
from streams.workflow.state import RunState, StepState, StepStatus, owner_path, undone

_KEPT = (StepStatus.COMPLETED, StepStatus.SKIPPED, StepStatus.FAILED)


class UndoneError(ValueError):
    """Results can't be copied, for what they tell of was undone. `steps`: those that the fork must do again or be told."""

    def __init__(self, run_id: str, steps: Collection[str]) -> None:
        """Make one that names the steps."""
        self.steps = tuple(steps)
        names, were = ", ".join(f"`{each}`" for each in steps), "was" if len(steps) == 1 else "were"
        super().__init__(f"{names} {were} undone in run {run_id}, at least in part, so the results can't be copied")


def fork(
    run_id: str,
    state: RunState,
    spec: WorkflowSpec,
    *,
    now: RunState | None = None,
    rerun: Collection[str] = (),
    outputs: Mapping[str, str] | None = None,
    input_text: str | None = None,
    request_id: str | None = None,
) -> WorkflowRequest:
    """Return the request for a run that goes on from another one's state, by the version `spec` of its workflow.

    `rerun`: steps that run again, with all that need them; `outputs`: results (JSON) to have instead of theirs, by step.
    Steps that `spec` doesn't have are left out. Raises DefinitionError for a step in `rerun` or `outputs` that it doesn't have.

    `now`: the run's last state, if `state` is an earlier one. What was undone since, is undone: to begin at an earlier decision
    doesn't make the world earlier. Raises UndoneError for a step that would be copied though the run has undone it, has begun to,
    or is about to, unless it is in `rerun` or `outputs`. Nobody checks that again: who writes requests with `copied` without
    this function must leave out such steps, and mind that the fork undoes nothing of what it copies.
    """
    plan = spec.plan
    for path in (*rerun, *(outputs or {})):
        if plan.place(path) is None:
            raise DefinitionError(f"there is no step `{path}` in {spec.name} {spec.digest[:12]}")
    again = {path for each in rerun for path in _behind(plan, each)}
    # What runs again, or is told, does so with all its parts; what a step is part of goes on with its other parts.
    whole = {path for each in rerun for path in _behind(plan, each) if path not in _around(each)} | {*(outputs or ())}
    copied: dict[str, Any] = {}
    for path, step in state.steps.items():
        place = plan.place(path)
        if place is None or path in again or path in whole or not whole.isdisjoint(_around(path)):
            continue
        if _worth_keeping(path, step, place):
            error = {"kind": str(step.failure.kind), "message": step.failure.message} if step.failure else None
            copied[path] = {"status": step.status.value, "output": step.output, "error": error}
    if gone := _gone(copied, now or state):
        raise UndoneError(run_id, gone)
    for path, output in (outputs or {}).items():
        copied[path] = {"status": StepStatus.COMPLETED.value, "output": to_json(from_json(output)), "error": None}
    origin = Origin(run_id, state.seq, state.head.hex())
    text = input_text if input_text is not None else state.input
    return WorkflowRequest(spec.name, text, request_id, spec.digest, origin=origin, copied=to_json(copied))


def _worth_keeping(path: str, step: StepState, place: Place) -> bool:
    """Whether a step's result goes into the fork: it has one, and its run went on with it."""
    if step.status not in _KEPT or path == FINALLY or path.startswith(f"{FINALLY}.") or undone(path) is not None:
        return False
    if step.status is not StepStatus.FAILED:
        return True
    definition = place.plan.step
    return isinstance(definition, Step) and (definition.on_failure == "continue" or place.index is not None)


def _gone(copied: Collection[str], now: RunState) -> list[str]:
    """Return those of the copied steps that a run has undone, or a part of them, or what they are part of."""
    gone = {step for path, each in now.steps.items() if (step := undone(path)) is not None and each.attempt}
    planned = now.undo if now.closing is not None and now.closing.outcome != "completed" and not now.over else None
    while planned is not None:
        gone.add(planned[0].step)
        planned = planned[1]
    parts = {path for each in gone for path in _around(each)}
    return sorted(path for path in copied if path in gone or path in parts or not gone.isdisjoint(_around(path)))


def _around(path: str) -> set[str]:
    """Return the steps that a step is part of."""
    found = set[str]()
    owner = owner_path(path)
    while owner is not None:
        found.add(owner)
        owner = owner_path(owner)
    return found


def _behind(plan: Plan, path: str) -> Iterable[str]:
    """Return a step and all that need it, directly or not, where they stand; and what they are part of."""
    place = plan.place(path)
    while place is not None:
        frame = _frame(plan, place)
        prefix = f"{place.around.path}." if place.around else ""
        yield place.path
        queue, seen = [place.plan.name], set[str]()
        while queue:
            for name in frame.dependents.get(queue.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    queue.append(name)
                    yield prefix + name
        place = place.owner()


def _frame(plan: Plan, place: Place) -> Frame:
    around = place.around
    return around.plan.frame if around is not None and around.plan.frame is not None else plan.root


def with_changes(spec: WorkflowSpec, prompts: Mapping[str, str], models: Mapping[str, str]) -> WorkflowSpec:
    """Return a version of a workflow in which some steps ask a model something else, or another one.

    Raises DefinitionError for a step that asks no model, and pydantic.ValidationError for a prompt that is none.
    """
    data = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for path, key, value in [*((p, "prompt", v) for p, v in prompts.items()), *((p, "model", v) for p, v in models.items())]:
        step = _written(data["steps"], path)
        if step is None or "llm" not in step:
            raise DefinitionError(f"`{path}` is no step of {spec.name} that asks a model")
        step["llm"][key] = value
    return WorkflowSpec.model_validate(data)


def _written(steps: list[dict[str, Any]], path: str) -> dict[str, Any] | None:
    """Return the definition of a step, named by its path without numbers."""
    name, _, rest = path.partition(".")
    for step in steps:
        if step["name"] == name:
            return _written(step.get("steps") or step.get("switch") or [], rest) if rest else step
    return None


__all__ = ["UndoneError", "fork", "with_changes"]
