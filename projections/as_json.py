"""Events as JSON values for people: with their type's name, payloads as what they say, bytes as text or hexadecimal."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

_PAYLOADS: Final = frozenset(
    {
        *("input", "output", "arguments", "messages", "parameters", "schema", "spec"),
        *("payload", "value", "items", "shared", "copied"),
    }
)
"""Fields that hold JSON where they hold text."""


def as_json(event: Any) -> dict[str, Any]:
    """Return an event (a dataclass of `events`) as a JSON object with its type's name under `type`."""
    found: dict[str, Any] = {"type": type(event).__name__}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        found[field.name] = payload(value) if field.name in _PAYLOADS and isinstance(value, str) else _value(value)
    return found


def payload(text: str | None) -> Any:
    """Return what a JSON text says; what is no JSON, or too deep to be read, stays text: anybody may have written it."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def readable(value: bytes | None) -> str | None:
    """Return bytes as text if they are printable UTF-8, else as hexadecimal with `0x` in front."""
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return f"0x{value.hex()}"
    printable = all(each.isprintable() or each in "\n\r\t" for each in text)
    return text if printable else f"0x{value.hex()}"


def _value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_json(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_value(each) for each in value]
    if isinstance(value, Mapping):
        return {key: readable(each) if isinstance(each, bytes) else _value(each) for key, each in value.items()}
    return value
