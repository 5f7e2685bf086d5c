"""What is wrong with the settings, in lines for whoever set them."""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from streams.settings import FILE, PREFIX, Environment, Settings, SettingsFileError

_SECRET: Final = frozenset({"kafka", "schema_registry", "api_token"})
"""Settings whose values are never shown: they may hold passwords."""
_SHOWN: Final = 200
_LIMITS: Final = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}


def mistakes(error: ValueError) -> list[str]:
    """Return a line for each wrong setting; none if `error` is about something else."""
    if isinstance(error, SettingsFileError):
        return [str(error)]
    if not isinstance(error, ValidationError) or error.title != Settings.__name__:
        return []
    variables = Environment(Settings)()
    return [_mistake(each["loc"], each["input"], variables) for each in error.errors(include_url=False, include_context=False)]


def strangers(variables: Iterable[str]) -> list[str]:
    """Return a line for each variable that looks like a setting and is none, without its value."""
    lines = []
    for variable in sorted(variables):
        name = _name(variable)
        if variable.upper().startswith(PREFIX) and name not in Settings.model_fields:
            near = _near(name)
            lines.append(f"{variable} is no setting" + (f"; did you mean {PREFIX}{near.upper()}?" if near else ""))
    return lines


def _mistake(place: tuple[int | str, ...], value: Any, variables: Mapping[str, Any]) -> str:
    """Say what is wrong at a place: the setting's name, and where in its value."""
    name, *inside = place
    assert isinstance(name, str)
    if name not in Settings.model_fields:
        near = _near(_name(name))
        return f"{FILE}: {name} is no setting" + (f"; did you mean {near}?" if near else "")
    in_file = name not in variables
    where = f"{FILE}: {name}" if in_file else f"{PREFIX}{name.upper()}"
    where += "".join(f"[{json.dumps(part)}]" for part in inside)
    if name in _SECRET:
        is_what = "is wrong" if in_file or inside else _no_json(value)
    else:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        is_what = f"is {shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}…'}"
    return f"{where} {is_what}; it must be {_allowed(_schema(name, inside=bool(inside)), in_file=in_file)}"


def _no_json(value: Any) -> str:
    """Say why a text is no JSON, without repeating it."""
    try:
        if isinstance(value, str):
            json.loads(value)
    except json.JSONDecodeError as error:
        return f"is no JSON ({error.msg}, at character {error.pos + 1})"
    return "is wrong"


def _schema(name: str, *, inside: bool) -> Mapping[str, Any]:
    """Return the JSON Schema of a setting, or of what is inside its value."""
    schema = Settings.model_json_schema()["properties"][name]
    if inside:
        schema = schema.get("items") or schema["additionalProperties"]
    return next(iter(schema.get("anyOf", [schema])))  # the other one is that it isn't set


def _allowed(schema: Mapping[str, Any], *, in_file: bool) -> str:
    """Say what a value of a setting may be."""
    match schema:
        case {"enum": [*others, last]}:
            return f"{', '.join(others)} or {last}"
        case {"type": "integer" | "number" as kind}:
            limits = " and ".join(f"{words} {schema[limit]}" for limit, words in _LIMITS.items() if limit in schema)
            return f"{'a whole number' if kind == 'integer' else 'a number'}, {limits}"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "object"}:
            return "a table of texts" if in_file else 'a JSON object of texts, such as {"name": "value"}'
        case {"type": "array"}:
            return "a path or a list of paths" if in_file else f"paths with {os.pathsep} between them, or a JSON list of paths"
        case {"format": "path"}:
            return "a path"
        case {"pattern": pattern}:
            return f"a text that matches {pattern}"
    return "a text"


def _name(given: str) -> str:
    """Return the name of the setting that is meant by a variable, or by a key that is spelled like one."""
    return given.upper().removeprefix(PREFIX).lower()


def _near(name: str) -> str | None:
    """Return the setting whose name is nearest, if one is near."""
    return next(iter(difflib.get_close_matches(name, Settings.model_fields, 1)), None)
