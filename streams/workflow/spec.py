"""Workflow definitions: what a `WorkflowSpec` may say, and the digest that identifies a version.

A definition is data. Its canonical form leaves out what has its default value, so a default written out, another order of keys or
another spelling of a duration is the same version; and a new setting with a default changes no digest. A default may therefore
never change. The order of steps counts: it is the order in which steps that are ready at once are requested.

The descriptions of the fields below are the workflow reference: it is generated from them.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
from pydantic import BaseModel, ConfigDict, Field, model_validator

from events.failure import FailureKind
from streams.workflow.expressions import DefinitionError, Json, clean_text, from_json, to_json
from streams.workflow.times import ComputedDuration, Duration, instant

if TYPE_CHECKING:
    from streams.workflow.plan import Plan

NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
KINDS: Final = ("llm", "tool", "transform", "run", "wait_for", "approval", "sleep", "sleep_until", "switch", "steps")
"""What a step can do: each of its fields of these names is one."""
StepName = Annotated[str, Field(pattern=NAME)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Retry(_Part):
    """Which attempts a step has, and how long it waits between them."""

    attempts: Annotated[int, Field(ge=1, le=100)] = Field(3, description="How often it is tried altogether.")
    initial: Duration = Field(1000, description="Wait before the second attempt.")
    factor: Annotated[float, Field(ge=1, le=10)] = Field(2.0, description="By what the wait grows from attempt to attempt.")
    maximum: Duration = Field(60_000, description="Longest wait; one that the failure itself asks for wins.")
    kinds: tuple[FailureKind, ...] | None = Field(
        None, description="Kinds of failures after which it is tried again; without them those that another attempt can help."
    )
    within: Duration | None = Field(None, description="No attempt starts later than this after the first one.")


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


class ChildRun(_Part):
    """Starts another run, of another workflow or of this one, and waits for its output."""

    workflow: str = Field(description="Name of the workflow.")
    version: str | None = Field(None, description="Its digest; without one, the newest version when the run starts.")
    input: Any = Field({}, description="Input of the run: a value with CEL expressions.")
    detached: bool = Field(
        False, description="Whether to go on at once, without its output; a detached run isn't cancelled with this one."
    )


class WaitFor(_Part):
    """Waits for a signal; its payload is the output. A signal that came before its step was kept for it."""

    signal: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="Name of the signal.")
    correlation: str | None = Field(
        None,
        description="Only a signal with this correlation is taken, a text or `=` and a CEL expression; without it any is.",
    )
    timeout: Duration | None = Field(None, description="How long to wait; without it, for ever.")
    otherwise: Any = Field(
        None, description="Output when that time is over, a value with CEL expressions (`=null` for none); else the step fails."
    )


class Approval(_Part):
    """Asks a person. The output says `approved`, `by`, `reason`, `edited` and the `value` as it was approved."""

    message: str = Field(description="What the person is asked: a Jinja2 template.")
    show: Any = Field(None, description="What is to be approved: a value with CEL expressions.")
    by: tuple[str, ...] = Field((), description="Who may answer; without names, anybody who can write to the topic.")
    editable: bool = Field(False, description="Whether they may change the value.")
    deadline: Duration | None = Field(None, description="How long to wait; without it, for ever.")
    otherwise: Literal["fail", "approve", "reject"] = Field("fail", description="What happens when that time is over.")
    on_reject: Literal["fail", "continue"] = Field(
        "fail", description="Whether the step fails when it is rejected, or has the output `approved: false`."
    )


class ForEach(_Part):
    """Runs the step once for each item, many at a time; the output has the items' outputs in the items' order."""

    items: Any = Field(description="The items: `=` and a CEL expression that gives a list, or a list.")
    name: StepName = Field("item", alias="as", description="What the step calls its item; `index` is its number, from 0.")
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = Field(100, description="How many items are under way at most.")
    tolerate: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0, description="How many items may fail; their output is null, and `failures` of the step lists why."
    )


class Repeat(_Part):
    """Runs the step again and again; it sees `last`, the output of the time before (null at first), and `index`, from 0."""

    until: str = Field(description="CEL condition for the end, looked at after each time; `last` is the new output.")
    at_most: Annotated[int, Field(ge=1, le=1_000_000)] = Field(description="How often at most.")
    otherwise: Literal["fail", "last"] = Field(
        "fail", description="What happens when the condition never held: the step fails, or has its last output."
    )


class Step(_Part):
    """A node of the workflow. It does one thing; `for_each` and `repeat` let it do that more than once."""

    name: StepName = Field(description="Name; in YAML the key. Steps that can see each other have different ones.")
    needs: tuple[str, ...] = Field(
        (), description="Earlier steps that must be settled (completed, skipped or failed and tolerated) before."
    )
    when: str | None = Field(None, description="CEL condition; the step is skipped when it isn't met.")
    llm: Llm | None = Field(None, description="Ask a model.")
    tool: Tool | None = Field(None, description="Call a tool.")
    transform: Any = Field(None, description="A value with CEL expressions in it: the output, without any call.")
    run: ChildRun | None = Field(None, description="Start another run.")
    wait_for: WaitFor | None = Field(None, description="Wait for a signal.")
    approval: Approval | None = Field(None, description="Ask a person.")
    sleep: ComputedDuration | None = Field(None, description="Wait: `3d`, or `=` and a CEL expression that gives such a text.")
    sleep_until: str | None = Field(
        None, description="Wait until then: `2026-12-24T18:00:00+01:00`, or `=` and a CEL expression that gives such a text."
    )
    switch: tuple["Step", ...] | None = Field(
        None, description="Steps of which the first whose `when` holds is taken, one without `when` always; its output is theirs."
    )
    steps: tuple["Step", ...] | None = Field(None, description="Steps of its own; the output is the last one's, or `output`.")
    output: Any = Field(None, description="Output of a step with steps of its own: a value with CEL expressions over them.")
    for_each: ForEach | None = Field(None, description="Do it for each item of a list.")
    repeat: Repeat | None = Field(None, description="Do it again until a condition holds.")
    on_failure: Literal["fail", "continue"] = Field(
        "fail", description="Whether the run fails with this step or goes on without it."
    )
    retry: Retry = Field(Retry(), description="Which attempts its calls have.")
    timeout: Duration = Field(60_000, description="Time limit of one attempt of a call.")
    time_limit: Duration | None = Field(None, description="Time limit of the whole step, with all attempts and waits.")
    compensation: str | None = Field(
        None, description="What undoes this step when the run fails or is cancelled: a name from `compensations`."
    )

    @model_validator(mode="before")
    @classmethod
    def _inner_by_name(cls, data: Any) -> Any:
        return by_name(by_name(data, "steps"), "switch")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a step is one of {', '.join(KINDS)}; this one has {' and '.join(given) or 'none of them'}")
        if self.for_each and self.repeat:
            raise ValueError("a step has either for_each or repeat; put one of them into a step with steps of its own")
        if self.output is not None and self.steps is None:
            raise ValueError("`output` is for a step with steps of its own; what it does gives this one's")
        for kind in ("steps", "switch"):
            if getattr(self, kind) == ():
                raise ValueError(f"`{kind}` is empty")
        if self.sleep_until is not None and not self.sleep_until.startswith("="):
            instant(self.sleep_until)
        if "timeout" in self.model_fields_set and not (self.llm or self.tool):
            raise ValueError("`timeout` is for one attempt of a call to a model or a tool; use `time_limit`")
        return self

    @property
    def kind(self) -> str:
        """What it does."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


class Compensation(_Part):
    """Undoes what a step did. Its arguments are computed when the step completes, from what that sees and its `output`."""

    name: StepName = Field(description="Name; in YAML the key.")
    tool: Tool | None = Field(None, description="Call a tool.")
    run: ChildRun | None = Field(None, description="Start another run.")
    retry: Retry = Field(Retry(), description="Which attempts it has.")
    timeout: Duration = Field(60_000, description="Time limit of one attempt.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.tool is None) == (self.run is None):
            raise ValueError("a compensation is one of tool and run")
        return self


class WorkflowSpec(_Part):
    """A definition: steps and how they depend on each other."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")] = Field(description="Name of the workflow.")
    description: str = Field("", description="What it is for.")
    input: dict[str, Any] = Field({}, description="JSON Schema of a run's input; defaults of its properties are filled in.")
    steps: Annotated[tuple[Step, ...], Field(min_length=1)] = Field(description="Steps, in an order in which they could run.")
    output: Any = Field(None, description="Output of the run: a value with CEL expressions; without one the last step's output.")
    compensations: tuple[Compensation, ...] = Field((), description="What undoes steps, by name.")
    final: tuple[Step, ...] = Field(
        (),
        alias="finally",
        description="Clean-up steps: they run at the end of every run, however it ends, and see its `outcome` and `error`.",
    )
    time_limit: Duration | None = Field(None, description="Time limit of the whole run.")

    @model_validator(mode="before")
    @classmethod
    def _parts_by_name(cls, data: Any) -> Any:
        for key in ("steps", "compensations", "finally"):
            data = by_name(data, key)
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
        from streams.workflow.plan import Plan  # noqa: PLC0415 - a plan knows what a definition says, and is kept with it

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


def by_name(data: Any, key: str) -> Any:
    """Return a mapping in which the parts below `key`, given by name, are a list of parts that have their names inside."""
    if not (isinstance(data, Mapping) and isinstance(parts := data.get(key), Mapping)):
        return data
    for name, body in parts.items():
        if isinstance(body, Mapping) and body.get("name", name) != name:
            raise ValueError(f"{key}.{name}: its name is its key, but this one is named `{body['name']}` inside")
    return {**data, key: [{"name": name, **body} if isinstance(body, Mapping) else body for name, body in parts.items()]}


__all__ = [
    "KINDS",
    "Approval",
    "ChildRun",
    "Compensation",
    "ForEach",
    "Json",
    "Llm",
    "Repeat",
    "Retry",
    "Step",
    "Tool",
    "WaitFor",
    "WorkflowSpec",
    "digest",
    "from_canonical",
]
