"""Events as JSON values for people: with their type's name, payloads as what they say, bytes as text or hexadecimal."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

_PAYLOADS: Final = frozenset(
    {
        *("input", "output", "arguments", "messages", "parameters", "schema", "spec"),
        *("payload", "value", "items", "shared", "copied"),
    }
)
"""Fields that hold JSON where they hold text."""


def payload(text: str | None) -> Any:
    """Return what a JSON text says; what is no JSON, or too deep to be read, stays text: anybody may have written it."""
    if text is None:
        return None
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(constant: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON doesn't have."""
    raise ValueError(constant)


def as_json(event: Any, read: Callable[[str], Any] = payload) -> dict[str, Any]:
    """Return an event (a dataclass of `events`) as a JSON object with its type's name under `type`. `read`: what payloads say."""
    found: dict[str, Any] = {"type": type(event).__name__}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        found[field.name] = read(value) if field.name in _PAYLOADS and isinstance(value, str) else _value(value, read)
    return found


def as_line(event: Any) -> bytes:
    """Return an event as one line of JSON in UTF-8, always the same one; payloads that can't be a part of it stay texts."""
    try:
        return _line(as_json(event))
    except (ValueError, RecursionError):  # half of a surrogate pair; deeper together with what is around it
        return _line(as_json(event, str), ascii_only=True)


def _line(value: Any, *, ascii_only: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":")).encode()


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


def _value(value: Any, read: Callable[[str], Any]) -> Any:
    if dataclasses.is_dataclass(value):
        return as_json(value, read)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_value(each, read) for each in value]
    if isinstance(value, Mapping):
        return {key: readable(each) if isinstance(each, bytes) else _value(each, read) for key, each in value.items()}
    return value
