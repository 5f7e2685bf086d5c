"""`foldflow reference`: all that a workflow definition may say, as Markdown, from the models themselves."""

import types
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_WORDS: Final = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}


def reference() -> None:
    """Print the reference of workflow definitions as Markdown.

    For example:

        foldflow reference > workflow-reference.md
    """
    print(markdown(), end="")


def markdown() -> str:
    """Return the reference."""
    from streams.workflow import spec  # noqa: PLC0415 - pydantic and jsonschema, for this command only

    models: tuple[type[BaseModel], ...] = (
        *(spec.WorkflowSpec, spec.Step, spec.Tool, spec.Llm, spec.ChildRun, spec.WaitFor, spec.Approval),
        *(spec.ForEach, spec.Repeat, spec.Retry, spec.Compensation),
    )
    head = [
        "# Workflow reference",
        "",
        "Made from the models by `foldflow reference`; a test holds this file against them. [How to use it](workflows.md).",
        "",
        "A duration is written `500ms`, `60s`, `1.5m`, `2h` or `3d`. A *value* is any JSON value; a string in it that starts",
        "with `=` is a CEL expression, `==` begins a text with `=`. A *template* is Jinja2. Both see `input`, and the steps that",
        "are needed as `steps.NAME`: `status`, `output`, `error` and `failures`.",
    ]
    return "\n".join([*head, *(line for model in models for line in _section(model))]) + "\n"


def _section(model: "type[BaseModel]") -> list[str]:
    title = {"WorkflowSpec": "A workflow", "Step": "A step"}.get(model.__name__, _key(model.__name__))
    doc = " ".join((model.__doc__ or "").split())
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    return ["", f"## {title}", "", doc, "", "| key | is | default | means |", "|---|---|---|---|", *rows]


def _key(name: str) -> str:
    """Return a model's name as the keys write it."""
    words = {"ChildRun": "run", "Compensation": "A compensation"}
    return words.get(name, "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_"))


def _row(name: str, field: "FieldInfo") -> str:
    kind = _type(field.annotation, field.metadata)
    default = "required" if field.is_required() else _default(field.default, duration=kind == "duration")
    return f"| `{field.alias or name}` | {kind} | {default} | {field.description} |"


def _default(value: Any, *, duration: bool) -> str:
    from pydantic import BaseModel  # noqa: PLC0415

    if isinstance(value, BaseModel):
        return "its defaults"
    if value in (None, (), {}, ""):
        return "-"
    if duration:
        return f"`{value // 1000}s`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Return a type in words."""
    readers = {each.func.__name__ for each in metadata if hasattr(each, "func")}
    if "_duration_or_expression" in readers:
        return "duration, or an expression"
    if "milliseconds" in readers:
        return "duration"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each, metadata) for each in arguments if each is not types.NoneType)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0], [])}s"
    if origin is dict:
        return "mapping"
    name = getattr(annotation, "__name__", str(annotation))
    if annotation in _WORDS:
        return _WORDS[annotation] + _bounds(metadata)
    if name in ("Step", "Compensation"):
        return f"[{name.lower()}](#a-{name.lower()})"
    return "kind of failure" if name == "FailureKind" else f"[{_key(name)}](#{_key(name)})"


def _bounds(metadata: list[Any]) -> str:
    """Return a number's bounds in words."""
    bounds = {key: value for each in metadata for key in ("ge", "gt", "le") if (value := getattr(each, key, None)) is not None}
    low = f" from {bounds['ge']:,}" if "ge" in bounds else f" above {bounds['gt']:,}" if "gt" in bounds else ""
    high = f" to {bounds['le']:,}" if "le" in bounds else ""
    return low + high


__all__ = ["markdown", "reference"]
