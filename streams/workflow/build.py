"""Workflows written in Python: a builder that returns the same `WorkflowSpec`, with the same digest, as YAML does.

    flow = Workflow("greeting", input={"type": "object"})
    names = flow.tool("names", "parse_names", {"text": flow.input.text})
    hello = flow.llm("hello", prompt=f"Greet {{{{ {ITEM.first} }}}} politely.", for_each=Each(names.output, concurrency=5))
    with flow.steps("polish", repeat=Until(LAST.good, at_most=3)) as polish:
        better = polish.llm("better", prompt=f"Improve: {{{{ {LAST} or {hello.output} }}}}")
        polish.tool("judge", "judge_text", {"text": better.output})
    spec = flow.build(output={"text": polish.output, "asked": f"={hello.status} == 'completed'"})

The builder runs once, where it is called; nothing of it runs again while a workflow does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypedDict, Unpack

from streams.workflow.expressions import VARIABLES, DefinitionError, Expression, Json, Value, to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.templates import Template

Time = int | str
"""Milliseconds, or a text such as `90s`."""
_NOTHING: Final = frozenset[str]()


class Ref:
    """A part of what a step sees: `steps.fetch.output.rows`. Attributes and items give the parts of it.

    As a value it is a CEL expression; in an f-string it is its source, for longer expressions, conditions and templates.
    """

    __slots__ = ("_source",)
    __iter__ = None  # else `for` would go on for ever: nobody knows the length yet

    def __init__(self, source: str) -> None:
        self._source = source

    def __getattr__(self, name: str) -> "Ref":
        if name.startswith("_"):  # Python's own questions, such as copy's; a key of this kind is an item
            raise AttributeError(name)
        return Ref(f"{self._source}.{name}")

    def __getitem__(self, key: str | int) -> "Ref":
        return Ref(f"{self._source}[{to_json(key)}]")

    def __str__(self) -> str:
        return self._source

    def __bool__(self) -> bool:
        raise DefinitionError(f"`{self}` has no value yet; write the condition in CEL: when=f'{{{self}}} == …'")


ITEM: Final = Ref("item")
"""The item of a step that is done for each of a list, if `Each` gives it no other name."""
INDEX: Final = Ref("index")
"""The number of the item or of the iteration, from 0."""
LAST: Final = Ref("last")
"""The output of the iteration before, null in the first one; in `Until`, the newest."""
OUTPUT: Final = Ref("output")
"""What a compensation sees of the step that it undoes."""


@dataclass(frozen=True)
class Each:
    """Does a step for each item of a list; see `spec.ForEach`. `item` is what the step sees of it."""

    items: Any
    name: str = "item"
    concurrency: int = 100
    tolerate: int | Literal["all"] = 0

    @property
    def item(self) -> Ref:
        """The item."""
        return Ref(self.name)


@dataclass(frozen=True)
class Until:
    """Does a step again until a condition over `LAST` holds; see `spec.Repeat`."""

    condition: str | Ref
    at_most: int
    otherwise: Literal["fail", "last"] = "fail"


class StepRef:
    """A step of a builder's workflow: what later ones can use of it."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.output: Final = Ref(f"steps.{name}.output")
        self.status: Final = Ref(f"steps.{name}.status")
        self.error: Final = Ref(f"steps.{name}.error")
        self.failures: Final = Ref(f"steps.{name}.failures")


class Undo:
    """A compensation, for the option `compensation` of the steps that it undoes."""

    def __init__(self, name: str) -> None:
        self.name: Final = name


class StepOptions(TypedDict, total=False):
    """What every step may say; see `spec.Step`. `needs` is only for steps that no expression names."""

    needs: Sequence[StepRef]
    when: str | Ref
    for_each: Each | Ref | Sequence[Any]
    repeat: Until
    on_failure: Literal["fail", "continue"]
    time_limit: Time
    compensation: Undo


class RetryOptions(StepOptions, total=False):
    """What a step may say that can have several attempts."""

    retry: Mapping[str, Any]


class CallOptions(RetryOptions, total=False):
    """What a step may say that calls a model or a tool."""

    timeout: Time


class LlmOptions(CallOptions, total=False):
    """What a step that asks a model may say besides its prompt; see `spec.Llm`."""

    system: str
    schema: Mapping[str, Json]
    model: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]


class Block:
    """Steps that stand together, in the making: those of a workflow, of a step, of a switch."""

    def __init__(self, flow: "Workflow", variables: Sequence[str]) -> None:
        self._flow, self._variables = flow, tuple(dict.fromkeys(variables))
        self._steps: dict[str, dict[str, Any]] = {}
        self._reach: dict[str, frozenset[str]] = {}  # what a step needs, directly or not
        self._outside = _NOTHING  # steps around these that they name

    def llm(self, name: str, *, prompt: str, **options: Unpack[LlmOptions]) -> StepRef:
        """Add a step that asks a model. Raises DefinitionError."""
        common = {key: value for key, value in options.items() if key in CallOptions.__optional_keys__}
        llm = {"prompt": prompt} | {key: value for key, value in options.items() if key not in common}
        return self._add(name, "llm", llm, common, templates=(prompt, options.get("system", "")))

    def tool(self, name: str, tool: str, arguments: Mapping[str, Any] | None = None, **options: Unpack[CallOptions]) -> StepRef:
        """Add a step that calls a tool. Raises DefinitionError."""
        return self._add(name, "tool", {"name": tool, "arguments": arguments or {}}, options, values=(arguments,))

    def transform(self, name: str, value: Any, **options: Unpack[StepOptions]) -> StepRef:
        """Add a step that computes a value without any call. Raises DefinitionError."""
        return self._add(name, "transform", value, options, values=(value,))

    def run(
        self,
        name: str,
        workflow: str,
        input: Any = None,  # noqa: A002 - as in YAML
        *,
        version: str | None = None,
        detached: bool = False,
        **options: Unpack[RetryOptions],
    ) -> StepRef:
        """Add a step that starts another run. Raises DefinitionError."""
        given = {} if input is None else input
        body = {"workflow": workflow, "version": version, "input": given, "detached": detached}
        return self._add(name, "run", body, options, values=(given,))

    def wait_for(
        self,
        name: str,
        signal: str,
        *,
        correlation: str | Ref | None = None,
        timeout: Time | None = None,
        otherwise: Any = None,
        **options: Unpack[StepOptions],
    ) -> StepRef:
        """Add a step that waits for a signal; `timeout`: how long. Raises DefinitionError."""
        body = {"signal": signal, "correlation": correlation, "timeout": timeout, "otherwise": otherwise}
        return self._add(name, "wait_for", body, options, values=(correlation, otherwise))

    def approval(
        self,
        name: str,
        message: str,
        *,
        show: Any = None,
        by: Sequence[str] = (),
        editable: bool = False,
        deadline: Time | None = None,
        otherwise: Literal["fail", "approve", "reject"] = "fail",
        on_reject: Literal["fail", "continue"] = "fail",
        **options: Unpack[StepOptions],
    ) -> StepRef:
        """Add a step that asks a person. Raises DefinitionError."""
        body = {"message": message, "show": show, "by": by, "editable": editable, "deadline": deadline}
        body |= {"otherwise": otherwise, "on_reject": on_reject}
        return self._add(name, "approval", body, options, values=(show,), templates=(message,))

    def sleep(self, name: str, duration: Time | Ref, **options: Unpack[StepOptions]) -> StepRef:
        """Add a step that waits: `3d`, or an expression that gives such a text. Raises DefinitionError."""
        return self._add(name, "sleep", duration, options, values=(duration,))

    def sleep_until(self, name: str, time: str | Ref, **options: Unpack[StepOptions]) -> StepRef:
        """Add a step that waits until then: `2026-12-24T18:00:00+01:00`, or an expression. Raises DefinitionError."""
        return self._add(name, "sleep_until", time, options, values=(time,))

    def steps(self, name: str, **options: Unpack[StepOptions]) -> "StepBlock":
        """Add a step with steps of its own, which are added to what `with` gives."""
        return StepBlock(self, name, "steps", options)

    def switch(self, name: str, **options: Unpack[StepOptions]) -> "StepBlock":
        """Add a step of which one case is taken; the cases are added, with `when`, to what `with` gives."""
        return StepBlock(self, name, "switch", options)

    def _inside(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the variables that a step with these options sees."""
        each, repeat = options.get("for_each"), options.get("repeat")
        loop = (_each(each).name, "index") if each is not None else ("last", "index") if repeat is not None else ()
        return (*self._variables, *loop)

    def _add(
        self,
        name: str,
        kind: str,
        body: Any,
        given: Mapping[str, Any],
        *,
        values: Sequence[Any] = (),
        templates: Sequence[str] = (),
        named: frozenset[str] = _NOTHING,
    ) -> StepRef:
        """Add a step. `values`, `templates`: what it computes; `named`: steps that it names besides."""
        if name in self._steps:
            raise DefinitionError(f"steps.{name}: there is a step of this name already")
        inside, options = self._inside(given), dict(given)
        needs = [need.name for need in options.pop("needs", ())]
        named = named.union(*(_named(value, inside) for value in values))
        named = named.union(*(Template(template, inside).steps for template in templates if template))
        if "when" in options:
            options["when"] = str(options["when"])
            named |= Expression(options["when"], self._variables).steps
        if "for_each" in options:
            each = _each(options["for_each"])
            named |= _named(each.items, self._variables)
            options["for_each"] = {
                "items": each.items,
                "as": each.name,
                "concurrency": each.concurrency,
                "tolerate": each.tolerate,
            }
        if "repeat" in options:
            until = options["repeat"]
            named |= Expression(str(until.condition), inside).steps
            options["repeat"] = {"until": str(until.condition), "at_most": until.at_most, "otherwise": until.otherwise}
        if "compensation" in options:
            options["compensation"] = options["compensation"].name
            named |= _named(self._flow.undone_by(options["compensation"]), (*inside, "output"))
        reached = self._behind(needs)
        # In the order of the steps, so that the same program always gives the same digest.
        needs += [step for step in self._steps if step in named - reached]
        self._outside |= named - set(self._steps)
        self._steps[name] = _plain({kind: body, "needs": needs, **options})
        self._reach[name] = self._behind(needs)
        return StepRef(name)

    def _behind(self, names: Sequence[str]) -> frozenset[str]:
        """Return these steps and all that they need."""
        return frozenset(names).union(*(self._reach.get(name, frozenset()) for name in names))


class StepBlock(Block, StepRef):
    """A step with steps of its own, or a switch; its steps are added between the beginning and the end of a `with`."""

    def __init__(self, around: Block, name: str, kind: Literal["steps", "switch"], options: Mapping[str, Any]) -> None:
        Block.__init__(self, around._flow, around._inside(options))  # noqa: SLF001 - blocks make one workflow together
        StepRef.__init__(self, name)
        self._around, self._kind, self._options, self._result = around, kind, options, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            return
        named = self._outside | (_named(self._result, self._variables) - set(self._steps))
        options = dict(self._options) | ({} if self._result is None else {"output": self._result})
        self._around._add(self.name, self._kind, self._steps, options, named=named)  # noqa: SLF001

    def returns(self, value: Any) -> None:
        """Say what the step's output is; otherwise it is that of its last step."""
        self._result = value


class CleanUp(Block):
    """The steps at the end of every run; they see how it ended."""

    def __init__(self, flow: "Workflow") -> None:
        super().__init__(flow, (*VARIABLES, "outcome", "error"))
        self.outcome: Final = Ref("outcome")
        self.error: Final = Ref("error")


class Workflow(Block):
    """A workflow in the making. `input` is also what its steps see of a run's input; `final` has its clean-up steps."""

    def __init__(
        self,
        name: str,
        *,
        description: str = "",
        input: Mapping[str, Json] | None = None,  # noqa: A002 - as in YAML
        time_limit: Time | None = None,
    ) -> None:
        super().__init__(self, VARIABLES)
        self.input: Final = Ref("input")
        self.final: Final = CleanUp(self)
        self._head = {"name": name, "description": description, "input": dict(input or {}), "time_limit": time_limit}
        self._compensations: dict[str, dict[str, Any]] = {}

    def undo_with_tool(
        self, name: str, tool: str, arguments: Mapping[str, Any] | None = None, **options: Unpack["UndoOptions"]
    ) -> Undo:
        """Add a compensation that calls a tool; its arguments see what the step sees that it undoes, and `OUTPUT`."""
        return self._undo(name, {"tool": {"name": tool, "arguments": arguments or {}}, **options})

    def undo_with_run(
        self,
        name: str,
        workflow: str,
        input: Any = None,  # noqa: A002 - as in YAML
        *,
        version: str | None = None,
        **options: Unpack["UndoOptions"],
    ) -> Undo:
        """Add a compensation that starts a run."""
        body = {"workflow": workflow, "version": version, "input": {} if input is None else input}
        return self._undo(name, {"run": body, **options})

    def undone_by(self, compensation: str) -> Any:
        """Return what a compensation computes. Raises DefinitionError."""
        undo = self._compensations.get(compensation)
        if undo is None:
            raise DefinitionError(f"compensations.{compensation}: it belongs to another workflow")
        return undo["tool"]["arguments"] if "tool" in undo else undo["run"]["input"]

    def build(self, *, output: Any = None) -> WorkflowSpec:
        """Return the definition; without `output` a run's output is that of the last step. Raises pydantic.ValidationError."""
        parts = {"steps": self._steps, "compensations": self._compensations, "finally": self.final._steps}  # noqa: SLF001
        return WorkflowSpec.model_validate({**self._head, **parts, "output": _plain(output)})

    def _undo(self, name: str, body: dict[str, Any]) -> Undo:
        if name in self._compensations:
            raise DefinitionError(f"compensations.{name}: there is a compensation of this name already")
        self._compensations[name] = _plain(body)
        return Undo(name)


class UndoOptions(TypedDict, total=False):
    """What a compensation may say; see `spec.Compensation`."""

    retry: Mapping[str, Any]
    timeout: Time


def _each(given: "Each | Ref | Sequence[Any]") -> Each:
    return given if isinstance(given, Each) else Each(given)


def _named(value: Any, variables: Sequence[str]) -> frozenset[str]:
    """Return the steps that a value names. Raises DefinitionError."""
    compiled = Value(_plain(value), variables)
    return compiled.steps | compiled.whole


def _plain(value: Any) -> Json:
    """Return a value with references written as expressions. Raises DefinitionError for a step where its output is meant."""
    match value:
        case Ref():
            return f"={value}"
        case StepRef():
            raise DefinitionError(f"`{value.name}` is a step; did you mean its `output`?")
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case _:
            return value
