"""Workflow definitions: what a `WorkflowSpec` may say, and the digest that identifies a version.

A definition is data. Its canonical form leaves out what has its default value, so a default written out, another order of keys or
another spelling of a duration is the same version; and a new setting with a default changes no digest. A default may therefore
never change. The order of steps counts: it is the order in which steps that are ready at once are requested.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from streams.workflow.expressions import DefinitionError, Expression, Json, Template, Value, clean_text, from_json, to_json

_UNITS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|s|m|h|d)")
_LONGEST_MS: Final = 3650 * 86_400_000
"""Ten years: what is added to a time stays a time."""
NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"


def milliseconds(value: Any) -> Any:
    """Return a duration such as `500ms`, `60s`, `1.5m`, `2h` or `3d` in milliseconds; whole milliseconds pass."""
    if isinstance(value, bool):
        raise ValueError("a duration is written 500ms, 60s, 5m, 2h or 3d")  # noqa: TRY004 - pydantic reports ValueErrors
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if not match:
            raise ValueError(f"`{value}` is no duration; write 500ms, 60s, 5m, 2h or 3d")
        return round(float(match[1]) * _UNITS[match[2]])
    return value


Duration = Annotated[
    int, BeforeValidator(milliseconds), Field(gt=0, le=_LONGEST_MS), PlainSerializer(lambda ms: f"{ms}ms", return_type=str)
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Retry(_Part):
    """Which attempts a step has; a failure kind that can't be helped by trying again is never retried."""

    attempts: Annotated[int, Field(ge=1, le=100)] = Field(3, description="How often it is tried altogether.")
    initial: Duration = Field(1000, description="Wait before the second attempt.")
    factor: Annotated[float, Field(ge=1, le=10)] = Field(2.0, description="By what the wait grows from attempt to attempt.")
    maximum: Duration = Field(60_000, description="Longest wait.")


class Llm(_Part):
    """Asks a model."""

    prompt: str = Field(description="What the model is asked: a Jinja2 template over `input` and `steps`.")
    system: str | None = Field(None, description="System message: a Jinja2 template.")
    answer: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="JSON Schema that the answer must fit; the output is then the parsed answer, else its text.",
    )
    model: str | None = Field(None, description="Model in LiteLLM's spelling; without one the worker's default.")
    max_tokens: Annotated[int, Field(ge=1)] = Field(512, description="Longest answer in tokens.")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Nucleus sampling.")
    seed: int | None = Field(None, description="Seed, for providers that take one.")
    stop: tuple[str, ...] = Field((), description="Texts that end the answer.")


class Tool(_Part):
    """Calls a tool."""

    name: str = Field(description="Name of a registered tool.")
    arguments: dict[str, Any] = Field({}, description="Its arguments; a string that starts with `=` is a CEL expression.")


class Step(_Part):
    """A node of the workflow: one of `llm`, `tool` and `transform`."""

    name: Annotated[str, Field(pattern=NAME)] = Field(description="Name, unique in the workflow; in YAML the key.")
    needs: tuple[str, ...] = Field(
        (), description="Earlier steps that must be settled (completed, skipped or failed and tolerated) before."
    )
    when: str | None = Field(None, description="CEL condition; the step is skipped when it isn't met.")
    llm: Llm | None = Field(None, description="Ask a model.")
    tool: Tool | None = Field(None, description="Call a tool.")
    transform: Any = Field(None, description="A value with CEL expressions in it: the output, without any call.")
    on_failure: Literal["fail", "continue"] = Field(
        "fail", description="Whether the run fails with this step or goes on without it."
    )
    retry: Retry = Field(Retry(), description="Which attempts it has.")
    timeout: Duration = Field(60_000, description="Time limit of one attempt.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in ("llm", "tool", "transform") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a step is one of llm, tool and transform; this one has {' and '.join(given) or 'none of them'}")
        return self


class WorkflowSpec(_Part):
    """A definition: steps and how they depend on each other."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")] = Field(description="Name of the workflow.")
    description: str = Field("", description="What it is for.")
    input: dict[str, Any] = Field({}, description="JSON Schema of a run's input; defaults of its properties are filled in.")
    steps: Annotated[tuple[Step, ...], Field(min_length=1)] = Field(description="Steps, in an order in which they could run.")
    output: Any = Field(None, description="Output of the run: a value with CEL expressions; without one the last step's output.")

    @model_validator(mode="before")
    @classmethod
    def _steps_by_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(steps := data.get("steps"), Mapping):
            for name, body in steps.items():
                if isinstance(body, Mapping) and body.get("name", name) != name:
                    raise ValueError(f"steps.{name}: a step's name is its key, but this one is named `{body['name']}` inside")
            named = [{"name": name, **body} if isinstance(body, Mapping) else body for name, body in steps.items()]
            return {**data, "steps": named}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_values(self.model_dump(by_alias=True))
        check_schema(self.input, "input")
        _ = self.plan
        return self

    @cached_property
    def plan(self) -> "Plan":
        """The compiled definition."""
        return Plan(self)

    @cached_property
    def canonical(self) -> str:
        """The canonical form: JSON."""
        return to_json(self.model_dump(mode="json", by_alias=True, exclude_defaults=True))

    @cached_property
    def digest(self) -> str:
        """The version: BLAKE2b-256 of the canonical form, hexadecimal."""
        return digest(self.canonical)

    @cached_property
    def _input_validator(self) -> jsonschema.Draft202012Validator:
        return validator(self.input)

    def check_input(self, text: str) -> tuple[str, list[str]]:
        """Return a run's input as canonical JSON with defaults filled in, and what is wrong with it.

        Raises EvaluationError when it is not JSON.
        """
        value = from_json(text)
        if isinstance(value, dict):
            defaults = {
                key: each["default"]
                for key, each in self.input.get("properties", {}).items()
                if isinstance(each, dict) and "default" in each and key not in value
            }
            value |= defaults
        errors = sorted(self._input_validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
        problems = [f"{'.'.join(['input', *map(str, error.absolute_path)])}: {error.message[:300]}" for error in errors]
        return to_json(value), problems


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """Return a validator that never fetches what a schema refers to."""
    return jsonschema.Draft202012Validator(schema, registry=referencing.Registry())


def check_schema(schema: dict[str, Any], where: str) -> None:
    """Refuse what is no JSON Schema or refers to something outside itself. Raises DefinitionError."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise DefinitionError(f"{where}: no JSON Schema: {error.message}") from error
    resource = referencing.jsonschema.DRAFT202012.create_resource(schema)
    resolver = referencing.Registry().with_resource("", resource).resolver()
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable as error:
            raise DefinitionError(f"{where}: `$ref: {reference}` is not in this schema") from error


def _references(schema: Json) -> Iterator[str]:
    """Yield every reference in a schema."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _check_values(value: Any) -> None:
    """Refuse what no decision could say: lone surrogates, and numbers that are none. Raises DefinitionError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DefinitionError(f"{value} is no JSON number")
    if isinstance(value, str):
        if not value.isascii() and clean_text(value) != value:
            raise DefinitionError(f"`{clean_text(value)[:100]}` is not valid Unicode")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_values(key)
            _check_values(each)
    elif isinstance(value, list | tuple):
        for each in value:
            _check_values(each)


def digest(canonical: str) -> str:
    """Return the digest of a canonical form, hexadecimal."""
    return hashlib.blake2b(canonical.encode(), digest_size=32).hexdigest()


def from_canonical(canonical: str) -> WorkflowSpec:
    """Return the definition of a canonical form (a value of the topic `specs`)."""
    return WorkflowSpec.model_validate(from_json(canonical))


class StepPlan:
    """A compiled step: its place, condition, what it computes, and the steps that its expressions name."""

    __slots__ = ("index", "name", "needs", "prompt", "refs", "step", "system", "value", "when")

    def __init__(self, index: int, step: Step) -> None:
        self.index, self.step, self.name, self.needs = index, step, step.name, step.needs
        self.when = Expression(step.when) if step.when is not None else None
        self.prompt = Template(step.llm.prompt) if step.llm else None
        self.system = Template(step.llm.system) if step.llm and step.llm.system else None
        self.value = Value(step.tool.arguments if step.tool else step.transform)
        parts = (self.when, self.prompt, self.system, self.value)
        self.refs: frozenset[str] = frozenset().union(*(part.steps for part in parts if part))


class Plan:
    """A compiled definition. Raises DefinitionError, naming the step and the nearest right name."""

    __slots__ = ("dependents", "order", "output", "roots", "steps")

    def __init__(self, spec: WorkflowSpec) -> None:
        self.steps: dict[str, StepPlan] = {}
        dependents: dict[str, list[str]] = {}
        for index, step in enumerate(spec.steps):
            if step.name in self.steps:
                raise DefinitionError(f"steps.{step.name}: there are two steps of this name")
            try:
                plan = StepPlan(index, step)
            except DefinitionError as error:
                raise DefinitionError(f"steps.{step.name}: {error}") from error
            if step.llm and step.llm.answer is not None:
                check_schema(step.llm.answer, f"steps.{step.name}.llm.schema")
            for need in step.needs:
                if need not in self.steps:
                    raise DefinitionError(f"steps.{step.name}.needs: {self._missing(need, spec)}")
                dependents.setdefault(need, []).append(step.name)
            self._check_refs(plan, spec)
            self.steps[step.name] = plan
        self.dependents = {name: tuple(names) for name, names in dependents.items()}
        self.order = tuple(self.steps)
        self.roots = tuple(name for name, plan in self.steps.items() if not plan.needs)
        last = f"=steps.{spec.steps[-1].name}.output"
        self.output = Value(spec.output if spec.output is not None else last)
        for name in sorted(self.output.steps - set(self.steps)):
            raise DefinitionError(f"output: {self._missing(name, spec)}")

    def _missing(self, name: str, spec: WorkflowSpec) -> str:
        if any(step.name == name for step in spec.steps):
            return f"`{name}` stands further down; a step can only need earlier ones"
        near = difflib.get_close_matches(name, [step.name for step in spec.steps], 1)
        return f"there is no step `{name}`" + (f"; did you mean `{near[0]}`?" if near else "")

    def _check_refs(self, plan: StepPlan, spec: WorkflowSpec) -> None:
        """Refuse expressions that name a step which need not be settled before: it must be among the needs, or theirs."""
        open_refs = set(plan.refs)
        seen: set[str] = set()
        queue = list(plan.needs)
        while open_refs and queue:
            name = queue.pop()
            if name not in seen:
                seen.add(name)
                open_refs.discard(name)
                queue.extend(self.steps[name].needs)
        for name in sorted(open_refs):
            if name in self.steps:
                raise DefinitionError(f"steps.{plan.name}: names steps.{name} but doesn't need it; add it to `needs`")
            raise DefinitionError(f"steps.{plan.name}: {self._missing(name, spec)}")


__all__ = ["Json", "Llm", "Plan", "Retry", "Step", "StepPlan", "Tool", "WorkflowSpec", "digest", "from_canonical", "milliseconds"]
