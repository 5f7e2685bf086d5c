"""Workflows written in Python: a builder that returns the same `WorkflowSpec`, with the same digest, as YAML does.

    flow = Workflow("greeting", input={"type": "object"})
    names = flow.tool("names", "parse_names", {"text": flow.input.text})
    hello = flow.llm("hello", prompt=f"Greet {{{{ {names.output[0].first} }}}} politely.", on_failure="continue")
    spec = flow.build(output={"text": hello.output, "asked": f"={hello.status} == 'completed'"})

The builder runs once, where it is called; nothing of it runs again while a workflow does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypedDict, Unpack

from streams.workflow.expressions import DefinitionError, Expression, Json, Template, Value, to_json
from streams.workflow.spec import WorkflowSpec


class Ref:
    """A part of the input or of a step: `steps.fetch.output.rows`. Attributes and items give the parts of it.

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


class StepRef:
    """A step of a builder's workflow: `output`, `status` and `error` of it can be used by later ones."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.output: Final = Ref(f"steps.{name}.output")
        self.status: Final = Ref(f"steps.{name}.status")
        self.error: Final = Ref(f"steps.{name}.error")


class StepOptions(TypedDict, total=False):
    """What every step may say; see `spec.Step`. `needs` is only for steps that no expression names."""

    needs: Sequence[StepRef]
    when: str | Ref
    on_failure: Literal["fail", "continue"]
    retry: Mapping[str, int | float | str]
    timeout: int | str


class LlmOptions(StepOptions, total=False):
    """What a step that asks a model may say besides its prompt; see `spec.Llm`."""

    system: str
    schema: Mapping[str, Json]
    model: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]


class Workflow:
    """A workflow in the making. `input` is also what its steps see of a run's input."""

    def __init__(self, name: str, *, description: str = "", input: Mapping[str, Json] | None = None) -> None:  # noqa: A002 - as in YAML
        self.input: Final = Ref("input")
        self._head = {"name": name, "description": description, "input": dict(input or {})}
        self._steps: dict[str, dict[str, Any]] = {}
        self._reach: dict[str, frozenset[str]] = {}  # what a step needs, directly or not

    def llm(self, name: str, *, prompt: str, **options: Unpack[LlmOptions]) -> StepRef:
        """Add a step that asks a model. Raises DefinitionError."""
        common = {key: value for key, value in options.items() if key in StepOptions.__optional_keys__}
        llm = {"prompt": prompt} | {key: value for key, value in options.items() if key not in common}
        named = (Template(prompt).steps, Template(options["system"]).steps if options.get("system") else frozenset[str]())
        return self._add(name, "llm", llm, frozenset().union(*named), common)

    def tool(self, name: str, tool: str, arguments: Mapping[str, Any] | None = None, **options: Unpack[StepOptions]) -> StepRef:
        """Add a step that calls a tool. Raises DefinitionError."""
        plain = _plain(arguments or {})
        return self._add(name, "tool", {"name": tool, "arguments": plain}, Value(plain).steps, dict(options))

    def transform(self, name: str, value: Any, **options: Unpack[StepOptions]) -> StepRef:
        """Add a step that computes a value without any call. Raises DefinitionError."""
        plain = _plain(value)
        return self._add(name, "transform", plain, Value(plain).steps, dict(options))

    def build(self, *, output: Any = None) -> WorkflowSpec:
        """Return the definition; without `output` a run's output is that of the last step. Raises pydantic.ValidationError."""
        return WorkflowSpec.model_validate({**self._head, "steps": self._steps, "output": _plain(output)})

    def _add(self, name: str, kind: str, body: Any, named: frozenset[str], options: dict[str, Any]) -> StepRef:
        if name in self._steps:
            raise DefinitionError(f"steps.{name}: there is a step of this name already")
        if "when" in options:
            options["when"] = str(options["when"])
            named |= Expression(options["when"]).steps
        needs = [need.name for need in options.pop("needs", ())]
        reached = self._behind(needs)
        # In the order of the steps, so that the same program always gives the same digest.
        needs += [step for step in self._steps if step in named - reached]
        self._steps[name] = {kind: body, "needs": needs, **options}
        self._reach[name] = self._behind(needs)
        return StepRef(name)

    def _behind(self, names: Sequence[str]) -> frozenset[str]:
        """Return these steps and all that they need."""
        return frozenset(names).union(*(self._reach.get(name, frozenset()) for name in names))


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
