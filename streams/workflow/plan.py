"""A compiled definition: what `decide` works with.

Steps stand in frames: the workflow's own steps are one, the steps of a step are another, one level further in. A step that is
under way has a *path*: its name, behind those of the steps around it, with the numbers of items and iterations:

    report                    a step of the workflow
    check[3]                  item (or iteration) 3 of the step `check`
    check[3].ask              the step `ask` of that item's own steps
    undo(check[3])            what undoes it
    finally.tidy              a clean-up step

What an expression may name is settled here, once: the steps that its own step needs, and those that the steps around it need.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal, TypeVar

from streams.workflow.expressions import VARIABLES, DefinitionError, Expression, Value, to_json
from streams.workflow.spec import Compensation, Step, WorkflowSpec, check_schema
from streams.workflow.state import undone
from streams.workflow.templates import Template

FINALLY: Final = "finally"
MAX_LEVELS: Final = 8
"""How deep steps may stand in steps."""
_SEGMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\[([0-9]{1,7})\])?")
Part = Expression | Value | Template
Compiled = TypeVar("Compiled")


class StepPlan:
    """A compiled step.

    `level`: how many steps it stands in. `refs`: the level of each step that its expressions name. `bindings`: for each variable
    of a loop that it sees, what it is and the level of that loop.
    """

    __slots__ = (
        *("bindings", "compensation", "correlation", "frame", "index", "items", "kind", "level", "message", "name", "needs"),
        *("own", "parameters", "prompt", "refs", "schema", "shared", "step", "system", "until", "value", "when"),
    )

    def __init__(self, index: int, step: Step | Compensation, kind: str, level: int) -> None:
        self.index, self.step, self.kind, self.level, self.name = index, step, kind, level, step.name
        self.needs: tuple[str, ...] = ()
        self.refs: dict[str, int] = {}
        self.bindings: dict[str, tuple[Literal["item", "index", "last"], int]] = {}
        self.when: Expression | None = None
        self.parameters = ""  # of a call to a model, as JSON, and the schema of its answer
        self.schema: str | None = None
        self.prompt: Template | None = None
        self.system: Template | None = None
        self.message: Template | None = None
        self.value: Value | None = None
        """What its kind computes: arguments, input, output, what is shown, a time; or what holds when a signal never came."""
        self.correlation: Value | None = None
        self.items: Value | None = None
        self.until: Expression | None = None
        self.shared: dict[str, Value] = {}
        """Arguments that are the same for all items; `own`: the others."""
        self.own: dict[str, Value] = {}
        self.frame: Frame | None = None
        self.compensation: StepPlan | None = None


class Frame:
    """Steps that stand together: the workflow's, or those of a step. `result`: what their output is computed by."""

    __slots__ = ("dependents", "order", "result", "roots", "steps")

    def __init__(self, steps: dict[str, StepPlan], result: StepPlan) -> None:
        self.steps, self.result = steps, result
        self.order = tuple(steps)
        self.roots = tuple(name for name, plan in steps.items() if not plan.needs)
        dependents: dict[str, list[str]] = {}
        for plan in steps.values():
            for need in plan.needs:
                dependents.setdefault(need, []).append(plan.name)
        self.dependents = {name: tuple(names) for name, names in dependents.items()}


class Place:
    """A step under way. `around`: the step that it is one of the steps of; `index`: of which item or iteration, if of one."""

    __slots__ = ("around", "index", "path", "plan")

    def __init__(self, path: str, plan: StepPlan, around: "Place | None" = None, index: int | None = None) -> None:
        self.path, self.plan, self.around, self.index = path, plan, around, index

    def item(self, index: int) -> "Place":
        """Return one item or iteration of this step."""
        return Place(f"{self.path}[{index}]", self.plan, self.around, index)

    def inner(self, name: str) -> "Place":
        """Return one of this step's own steps."""
        assert self.plan.frame is not None
        return Place(f"{self.path}.{name}", self.plan.frame.steps[name], self)

    def owner(self) -> "Place | None":
        """Return the step that this is an item or one of the steps of; None: it stands in the workflow itself."""
        if self.index is not None:
            return Place(self.path[: self.path.rindex("[")], self.plan, self.around)
        return self.around

    def at(self, level: int) -> "Place":
        """Return this place, or the one around it that stands at a level."""
        place = self
        while place.plan.level > level:
            assert place.around is not None
            place = place.around
        return place

    def path_of(self, name: str, level: int) -> str:
        """Return the path of a step that stands at a level of what is around this place."""
        around = self.at(level).around if level else None
        return f"{around.path}.{name}" if around else name

    @property
    def repeats(self) -> bool:
        """Whether this is the whole of a step that is done more than once."""
        step = self.plan.step
        return self.index is None and isinstance(step, Step) and (step.for_each is not None or step.repeat is not None)


class Plan:
    """A compiled definition. Raises DefinitionError, naming the step and the nearest right name."""

    __slots__ = ("final", "output", "root", "time_limit")

    def __init__(self, spec: WorkflowSpec) -> None:
        compensations = {each.name: each for each in spec.compensations}
        if len(compensations) != len(spec.compensations):
            raise DefinitionError("compensations: there are two of the same name")
        self.time_limit = spec.time_limit
        self.root = _Compiler("steps", compensations).frame(spec.steps)
        output = spec.output if spec.output is not None else f"=steps.{spec.steps[-1].name}.output"
        self.output = _compile("output", lambda: Value(output))
        for name in sorted((self.output.steps | self.output.whole) - set(self.root.steps)):
            raise DefinitionError(f"output: {_missing(name, self.root.steps)}")
        self.root.result.refs = dict.fromkeys(self.root.steps, 0)
        if FINALLY in self.root.steps:
            raise DefinitionError(f"steps.{FINALLY}: `{FINALLY}` is the name of the clean-up steps")
        self.final: StepPlan | None = None
        if spec.final:
            self.final = StepPlan(-1, Step(name=FINALLY, steps=spec.final), "steps", 0)
            outer = ((self.root.steps, frozenset(self.root.steps)),)
            names = (*VARIABLES, "outcome", "error")
            self.final.frame = _Compiler(FINALLY, compensations, outer, names).frame(spec.final)

    def place(self, path: str) -> Place | None:
        """Return the place that a path names; None if there is no such step."""
        plan = self.root.steps.get(path)
        if plan is not None:
            return Place(path, plan)
        if (step := undone(path)) is not None and "(" not in step:
            done = self.place(step)
            undo = done.plan.compensation if done else None
            return Place(path, undo) if undo else None
        return self._walk(path)

    def _walk(self, path: str) -> Place | None:
        place: Place | None = None
        for segment in path.split("."):
            match = _SEGMENT.fullmatch(segment)
            if match is None:
                return None
            name, number = match.groups()
            if place is not None:
                if place.plan.frame is None or name not in place.plan.frame.steps or place.repeats:
                    return None
                place = place.inner(name)
            elif name == FINALLY and self.final is not None:
                place = Place(name, self.final)
            elif name in self.root.steps:
                place = Place(name, self.root.steps[name])
            else:
                return None
            if number is not None:
                if not place.repeats:
                    return None
                place = place.item(int(number))
        return place


Visible = tuple[dict[str, StepPlan], frozenset[str]]
"""The steps of a frame so far, and those of them that an expression may name."""


class _Compiler:
    """Compiles the steps of one frame. `outer`: what may be named of the frames around it, `names`: the variables there are."""

    def __init__(
        self,
        where: str,
        compensations: dict[str, Compensation],
        outer: tuple[Visible, ...] = (),
        names: tuple[str, ...] = VARIABLES,
        bindings: dict[str, tuple[Literal["item", "index", "last"], int]] | None = None,
    ) -> None:
        self.where, self.compensations, self.outer, self.names, self.bindings = where, compensations, outer, names, bindings or {}
        self.level = len(outer)
        self.all: dict[str, tuple[str, ...]] = {}  # what each step needs
        self.steps: dict[str, StepPlan] = {}
        self.reach: list[int] = []  # for each step, the steps that it needs, directly or not: one bit each

    def frame(self, steps: Sequence[Step], *, cases: bool = False, output: object = None) -> Frame:
        """Return the compiled frame. `cases`: its steps are those of a switch."""
        if self.level > MAX_LEVELS:
            raise DefinitionError(f"{self.where}: steps stand in steps more than {MAX_LEVELS} deep")
        self.all = {step.name: step.needs for step in steps}
        for index, step in enumerate(steps):
            self.add(index, step)
            if cases and step.needs:
                raise DefinitionError(f"{self.where}.{step.name}.needs: the cases of a switch can't need each other")
            if cases and step.when is None and index < len(steps) - 1:
                after = steps[index + 1].name
                raise DefinitionError(f"{self.where}.{after}: never reached: `{step.name}` before it has no `when`")
        written = output if output is not None else f"=steps.{steps[-1].name}.output"
        value = _compile(self.where, lambda: Value(written, self.names))
        result = StepPlan(len(steps), steps[-1], "", self.level)
        result.bindings, result.value = self.bindings, value
        if not cases:
            self._resolve(result, [value], frozenset(self.steps), self.where)
        return Frame(self.steps, result)

    def add(self, index: int, step: Step) -> None:
        """Compile a step."""
        where = f"{self.where}.{step.name}"
        if step.name in self.steps:
            raise DefinitionError(f"{where}: there are two steps of this name")
        if any(step.name in frame for frame, _ in self.outer):
            raise DefinitionError(f"{where}: a step around it sees another step of this name; give it one of its own")
        reach = 0
        for need in step.needs:
            if need not in self.steps:
                circle = _circle(step.name, need, self.all)
                raise DefinitionError(f"{where}.needs: {circle or _missing(need, self.all)}")
            place = self.steps[need].index
            reach |= self.reach[place] | 1 << place
        self.reach.append(reach)
        visible = frozenset(name for name, plan in self.steps.items() if reach >> plan.index & 1)
        plan = StepPlan(index, step, step.kind, self.level)
        plan.needs = step.needs
        outside, inside = self.names, self.names
        plan.bindings = dict(self.bindings)
        if step.for_each:
            plan.bindings |= {step.for_each.name: ("item", self.level), "index": ("index", self.level)}
        if step.repeat:
            plan.bindings |= {"last": ("last", self.level), "index": ("index", self.level)}
        inside = tuple(dict.fromkeys((*outside, *plan.bindings)))
        parts = _compile(where, lambda: _parts(plan, step, outside, inside))
        if step.llm and step.llm.answer is not None:
            check_schema(step.llm.answer, f"{where}.llm.schema")
            plan.schema = to_json(step.llm.answer)
        self._resolve(plan, parts, visible, where)
        self.steps[step.name] = plan
        if step.steps is not None or step.switch is not None:
            outer = (*self.outer, (self.steps, visible))
            key, own = ("steps", step.steps) if step.steps is not None else ("switch", step.switch)
            inner = _Compiler(f"{where}.{key}", self.compensations, outer, inside, plan.bindings)
            plan.frame = inner.frame(own or (), cases=key == "switch", output=step.output)
        if step.compensation is not None:
            plan.compensation = self._compensation(plan, step.compensation, where, inside, visible)

    def _compensation(self, plan: StepPlan, name: str, where: str, names: tuple[str, ...], visible: frozenset[str]) -> StepPlan:
        if where.startswith(FINALLY):
            raise DefinitionError(f"{where}.compensation: a clean-up step can't be undone; nothing comes after it")
        if name not in self.compensations:
            raise DefinitionError(f"{where}.compensation: {_missing(name, self.compensations, 'compensation')}")
        undo = self.compensations[name]
        result = StepPlan(plan.index, undo, "tool" if undo.tool else "run", self.level)
        result.bindings = plan.bindings
        given = undo.tool.arguments if undo.tool else undo.run.input if undo.run else None
        value = _compile(f"compensations.{name}", lambda: Value(given, (*names, "output")))
        result.value = value
        self._resolve(result, [value], visible, f"compensations.{name}")
        return result

    def _resolve(self, plan: StepPlan, parts: Iterable[Part], visible: frozenset[str], where: str) -> None:
        """Find the steps that expressions name: among those that are needed here, then further out."""
        levels = (*self.outer, (self.steps, visible))
        for name in sorted(frozenset().union(*(part.steps | part.whole for part in parts))):
            for level in range(self.level, -1, -1):
                steps, seen = levels[level]
                if name in seen:
                    plan.refs[name] = level
                    break
                if name in steps:
                    whose = "" if level == self.level else "the step around it "
                    message = f"names steps.{name} but {whose}doesn't need it; add it to {'its' if whose else ''} `needs`"
                    raise DefinitionError(f"{where}: {message.replace('  ', ' ')}")
            else:
                known = [*self.all, *(each for steps, _ in self.outer for each in steps)]
                raise DefinitionError(f"{where}: {_missing(name, known)}")


def _parts(plan: StepPlan, step: Step, outside: tuple[str, ...], inside: tuple[str, ...]) -> list[Part]:
    """Compile what a step computes. `outside`: variables of the step as a whole; `inside`: those of an item or iteration too."""
    if step.when is not None:
        plan.when = Expression(step.when, outside)
    if step.for_each:
        plan.items = Value(step.for_each.items, outside)
    if step.repeat:
        plan.until = Expression(step.repeat.until, inside)
    if step.llm:
        plan.prompt = Template(step.llm.prompt, inside)
        plan.system = Template(step.llm.system, inside) if step.llm.system else None
        parameters = step.llm.model_dump(include={"max_tokens", "temperature", "top_p", "seed", "stop"}, exclude_none=True)
        if not step.llm.stop:
            parameters.pop("stop")
        plan.parameters = to_json(parameters)
    if step.approval:
        plan.message = Template(step.approval.message, inside)
    if step.wait_for and step.wait_for.correlation is not None:
        plan.correlation = Value(step.wait_for.correlation, inside)
    written = _computed(step)
    if written is not None:
        plan.value = Value(written, inside)
        if step.for_each and isinstance(written, dict) and plan.kind in ("tool", "run"):
            mine = {step.for_each.name, "index"}
            parts = plan.value.parts()
            plan.shared = {key: part for key, part in parts.items() if not part.names & mine}
            plan.own = {key: part for key, part in parts.items() if part.names & mine}
    found = (plan.when, plan.items, plan.until, plan.prompt, plan.system, plan.message, plan.correlation, plan.value)
    return [part for part in found if part is not None]


def _computed(step: Step) -> object:
    """Return what a step's kind computes, as it is written; None if nothing."""
    match step.kind:
        case "tool":
            return step.tool.arguments if step.tool else None
        case "run":
            return step.run.input if step.run else None
        case "transform":
            return step.transform
        case "wait_for":
            return step.wait_for.otherwise if step.wait_for else None
        case "approval":
            return step.approval.show if step.approval else None
        case "sleep":
            return step.sleep
        case "sleep_until":
            return step.sleep_until
        case _:
            return None


def _compile(where: str, make: Callable[[], Compiled]) -> Compiled:
    """Return what is made, or say where the mistake is. Raises DefinitionError."""
    try:
        return make()
    except DefinitionError as error:
        raise DefinitionError(f"{where}: {error}") from error


def _circle(name: str, need: str, needs: Mapping[str, tuple[str, ...]]) -> str:
    """Return what to say about steps that need each other; empty if what a step needs doesn't need it in turn."""
    if name == need:
        return "a step can't need itself"
    ways: dict[str, tuple[str, ...]] = {need: (name, need)}
    open_ = [need]
    for step in open_:
        for each in needs.get(step, ()):
            if each == name:
                return f"these steps need each other: {' → '.join((*ways[step], name))}"
            if each not in ways:
                ways[each] = (*ways[step], each)
                open_.append(each)
    return ""


def _missing(name: str, known: Iterable[str], what: str = "step") -> str:
    """Return what to say about a name that isn't there."""
    known = list(known)
    if name in known:
        return f"`{name}` stands further down; a step can only need earlier ones"
    near = difflib.get_close_matches(name, known, 1)
    return f"there is no {what} `{name}`" + (f"; did you mean `{near[0]}`?" if near else "")


__all__ = ["FINALLY", "Frame", "Place", "Plan", "StepPlan"]
