"""Finds the mistakes that a definition which compiles still has: before a run does.

What a step's expressions and prompts see has a shape (see shapes.py): the input and the answers of models have those of their
schemas, a transform's output has that of its value. What can't work with these shapes is a finding; what is open or unknown never
is. Only files are checked: a definition that is registered stays valid, whatever is found here tomorrow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from events.frozen import frozen
from streams.workflow import check_templates, shapes
from streams.workflow.check_expressions import infer
from streams.workflow.expressions import VARIABLES, DefinitionError, EvaluationError, Expression, Json, Scope
from streams.workflow.shapes import ANY, BOOL, INT, NULL, NUMBER, TEXT, Shape, either
from streams.workflow.spec import ChildRun, Compensation, Step, Tool, WorkflowSpec, validator

Place = tuple[str | int, ...]
SETTLED: Final = ("completed", "skipped", "failed", "cancelled")
"""What the status of a step can be for those that need it."""
OUTCOMES: Final = ("completed", "failed", "cancelled")
"""How a run can end, as its clean-up steps see it."""
_ERROR: Final = either([NULL, shapes.record(kind=TEXT, message=TEXT)])
_FAILURES: Final = shapes.listing(shapes.record(index=INT, kind=TEXT, message=TEXT))
_MAYBE_TEXT: Final = either([TEXT, NULL])


@frozen
class ToolSchema:
    """What a tool takes and gives: JSON Schemas."""

    arguments: Mapping[str, Any]
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A mistake. `place`: by names, as in `("steps", "agent", "steps", "think", "llm", "prompt")`."""

    place: Place
    message: str


def check(spec: WorkflowSpec, tools: Mapping[str, ToolSchema] | None = None) -> list[Finding]:
    """Return the mistakes in a definition; without `tools`, nothing is said about tools."""
    return _Check(spec, tools).findings()


@frozen
class _Seen:
    """What expressions at a place see."""

    variables: Mapping[str, Shape]
    steps: Mapping[str, Shape]

    def all(self) -> dict[str, Shape]:
        return {**self.variables, "steps": shapes.mapping(self.steps)}

    def more(self, **variables: Shape) -> "_Seen":
        return _Seen({**self.variables, **variables}, self.steps)


class _Check:
    """Goes through one definition, in the order of its steps."""

    def __init__(self, spec: WorkflowSpec, tools: Mapping[str, ToolSchema] | None) -> None:
        self._spec, self._tools = spec, tools
        self._found: dict[Finding, None] = {}
        self._muted = 0
        self._compensations = {each.name: each for each in spec.compensations}

    def findings(self) -> list[Finding]:
        """Return all of them."""
        start = _Seen({"input": shapes.of_schema(self._spec.input)}, {})
        seen, _ = self._frame(self._spec.steps, ("steps",), start)
        if self._spec.output is not None:
            self._value(self._spec.output, ("output",), seen)
        if self._spec.final:
            # A run can end at any time: its steps may be anywhere, so their status is open here.
            anywhere = {name: _step(either([_output(step), NULL]), TEXT) for name, step in seen.steps.items()}
            error = either([NULL, shapes.record(kind=TEXT, message=TEXT, step=_MAYBE_TEXT)])
            after = _Seen({**start.variables, "outcome": shapes.one_of(OUTCOMES), "error": error}, anywhere)
            self._frame(self._spec.final, ("finally",), after)
        return list(self._found)

    def _frame(self, steps: tuple[Step, ...], place: Place, seen: _Seen) -> tuple[_Seen, list[Shape]]:
        """Go through steps that stand together; return what is seen behind them, and their outputs."""
        outputs: list[Shape] = []
        for step in steps:
            output = self._step(step, (*place, step.name), seen)
            outputs.append(output)
            seen = _Seen(seen.variables, {**seen.steps, step.name: _step(either([output, NULL]), shapes.one_of(SETTLED))})
        return seen, outputs

    def _step(self, step: Step, place: Place, seen: _Seen) -> Shape:
        """Go through a step and return the shape of its output."""
        if step.when is not None:
            self._condition(step.when, (*place, "when"), seen, "the step never runs")
        if step.for_each is not None:
            where = (*place, "for_each", "items")
            items = self._value(step.for_each.items, where, seen)
            if items.kinds and "list" not in items.kinds:
                self._say(where, f"the items are {items}, not a list")
            item = items.item() if "list" in items.kinds else ANY
            one = self._once(step, place, seen.more(**{step.for_each.name: item, "index": INT}))
            # When items may fail, null stands for their output.
            whole = shapes.listing(either([one, NULL]))
        elif step.repeat is not None:
            self._muted += 1
            guess = self._once(step, place, seen.more(last=ANY, index=INT))
            self._muted -= 1
            one = whole = self._once(step, place, seen.more(last=either([guess, NULL]), index=INT))
            after = seen.more(last=either([one, NULL]), index=INT)
            self._condition(step.repeat.until, (*place, "repeat", "until"), after, "it never ends before `at_most`")
        else:
            one = whole = self._once(step, place, seen)
        if step.compensation is not None:
            self._compensation(self._compensations[step.compensation], step, seen.more(output=either([one, whole])))
        return whole

    def _once(self, step: Step, place: Place, seen: _Seen) -> Shape:
        """Go through what a step does and return the shape of its output."""
        if step.llm is not None:
            for key, template in (("prompt", step.llm.prompt), ("system", step.llm.system)):
                self._template(template or "", (*place, "llm", key), seen)
            return shapes.of_schema(step.llm.answer) if step.llm.answer is not None else TEXT
        if step.tool is not None:
            return self._tool(step.tool, (*place, "tool"), seen)
        if step.run is not None:
            self._value(step.run.input, (*place, "run", "input"), seen)
            return ANY
        if step.wait_for is not None:
            if step.wait_for.correlation is not None:
                self._value(step.wait_for.correlation, (*place, "wait_for", "correlation"), seen)
            self._value(step.wait_for.otherwise, (*place, "wait_for", "otherwise"), seen)
            return ANY
        if step.approval is not None:
            self._template(step.approval.message, (*place, "approval", "message"), seen)
            shown = self._value(step.approval.show, (*place, "approval", "show"), seen)
            value = ANY if step.approval.editable else shown
            return shapes.record(approved=BOOL, by=_MAYBE_TEXT, reason=_MAYBE_TEXT, edited=BOOL, value=value)
        if step.sleep is not None or step.sleep_until is not None:
            kind = step.kind
            time = self._value(getattr(step, kind), (*place, kind), seen)
            if time.kinds and not time.kinds & (NUMBER.kinds | {"text"}):
                self._say((*place, kind), f"the time is {time}, not a text or a number")
            return ANY
        if step.switch is not None:
            outputs = [self._step(case, (*place, "switch", case.name), seen) for case in step.switch]
            return either([*outputs, NULL])
        if step.steps is not None:
            inner, outputs = self._frame(step.steps, (*place, "steps"), seen)
            return self._value(step.output, (*place, "output"), inner) if step.output is not None else either([outputs[-1], NULL])
        return self._value(step.transform, (*place, "transform"), seen)

    def _compensation(self, undo: Compensation, step: Step, seen: _Seen) -> None:
        place = ("compensations", undo.name)
        if step.for_each is not None:
            seen = seen.more(**{step.for_each.name: ANY, "index": INT})
        if step.repeat is not None:
            seen = seen.more(last=ANY, index=INT)
        if undo.tool is not None:
            self._tool(undo.tool, (*place, "tool"), seen)
        elif isinstance(undo.run, ChildRun):
            self._value(undo.run.input, (*place, "run", "input"), seen)

    def _tool(self, tool: Tool, place: Place, seen: _Seen) -> Shape:
        where = (*place, "arguments")
        given = self._value(tool.arguments, where, seen)
        if self._tools is None:
            return ANY
        schema = self._tools.get(tool.name)
        if schema is None:
            self._say((*place, "name"), f"there is no tool `{tool.name}`{shapes.nearest(tool.name, self._tools)}")
            return ANY
        wanted = shapes.of_schema(schema.arguments)
        for key in sorted(wanted.required - set(given.properties)):
            self._say(where if tool.arguments else place, f"`{tool.name}` needs the argument `{key}`")
        for key, each in given.properties.items():
            held = wanted.member(key)
            if held is None:
                self._say((*where, key), f"`{tool.name}` takes no argument `{key}`{shapes.nearest(key, wanted.properties)}")
            elif not self._constant(tool.arguments[key], key, schema, (*where, key)):
                for at, message in shapes.misfits(each(), held):
                    self._say((*where, key, *at), message)
        return shapes.of_schema(schema.result)

    def _constant(self, value: Json, key: str, schema: ToolSchema, place: Place) -> bool:
        """Judge an argument without expressions, which its schema says all about; False if it has expressions."""
        if not _is_constant(value):
            return False
        part = {**schema.arguments, "required": [], "properties": {key: schema.arguments.get("properties", {}).get(key, {})}}
        for error in validator(part).iter_errors({key: _literal(value)}):
            self._say((*place, *list(error.absolute_path)[1:]), error.message[:200])
        return True

    def _value(self, value: Json, place: Place, seen: _Seen) -> Shape:
        """Return the shape of a value with expressions in it."""
        match value:
            case str() if value.startswith("=") and not value.startswith("=="):
                shape = self._expression(value[1:].strip(), place, seen)
                if shape.kinds == {"other"}:
                    self._say(place, f"`{value[1:].strip()}` gives what JSON can't say; write it as text: string(…)")
                return ANY if "other" in shape.kinds else shape
            case str():
                return shapes.text(_literal(value))
            case dict():
                return shapes.mapping({key: self._value(each, (*place, key), seen) for key, each in value.items()})
            case list() | tuple():
                found = [self._value(each, (*place, index), seen) for index, each in enumerate(value)]
                return shapes.listing(either(found) if found else shapes.NOTHING)
            case _:
                return shapes.of_value(value)

    def _condition(self, source: str, place: Place, seen: _Seen, so: str) -> None:
        shape = self._expression(source, place, seen)
        if shape.kinds and "bool" not in shape.kinds:
            self._say(place, f"`{source}` is {shape}, not true or false")
        elif _never(source):
            self._say(place, f"`{source}` is never true: {so}")

    def _expression(self, source: str, place: Place, seen: _Seen) -> Shape:
        return infer(source, seen.all(), lambda message: self._say(place, message))

    def _template(self, source: str, place: Place, seen: _Seen) -> None:
        check_templates.check(source, seen.all(), lambda message: self._say(place, message))

    def _say(self, place: Place, message: str) -> None:
        if not self._muted:
            self._found[Finding(place, message)] = None


def _step(output: Shape, status: Shape) -> Shape:
    """Return a step as expressions see it."""
    return shapes.record(status=status, output=output, error=_ERROR, failures=_FAILURES)


def _output(step: Shape) -> Shape:
    return step.member("output") or ANY


def _never(source: str) -> bool:
    """Return whether a condition that depends on nothing doesn't hold."""
    try:
        expression = Expression(source, VARIABLES)
        return not expression.names and expression.evaluate(Scope({})) is False
    except (DefinitionError, EvaluationError):
        return False


def _is_constant(value: Json) -> bool:
    match value:
        case str():
            return not value.startswith("=") or value.startswith("==")
        case dict():
            return all(_is_constant(each) for each in value.values())
        case list() | tuple():
            return all(_is_constant(each) for each in value)
        case _:
            return True


def _literal(value: Json) -> Json:
    """Return a constant as it is meant: `==x` is `=x`."""
    match value:
        case str():
            return value[1:] if value.startswith("==") else value
        case dict():
            return {key: _literal(each) for key, each in value.items()}
        case list() | tuple():
            return [_literal(each) for each in value]
        case _:
            return value
