"""Whether a value is what a test expects, and if not, where it differs."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from events.frozen import frozen
from streams.workflow.expressions import Json, to_json


class _Anything:
    def __repr__(self) -> str:
        return "ANYTHING"


ANYTHING: Final = _Anything()
"""Stands for any value, also inside of one."""


@frozen
class Partly:
    """Stands for an object that has at least these items; see `partly`."""

    items: Mapping[str, Any]


def partly(items: Mapping[str, Any] | None = None, **more: Any) -> Partly:
    """Return what stands for an object that has at least these items, each exactly, by a function, or partly in turn."""
    return Partly({**(items or {}), **more})


def difference(expected: Any, actual: Json, where: str) -> str | None:
    """Return where and how a value is not what is expected; None: it is.

    `expected` is a value, a function that says whether it is right, `partly(…)` or ANYTHING; inside of lists and objects too.
    """
    if expected is ANYTHING:
        return None
    if isinstance(expected, Partly):
        return _object(expected.items, actual, where, whole=False)
    if isinstance(expected, Mapping):
        return _object(expected, actual, where, whole=True)
    if isinstance(expected, list | tuple):
        if not isinstance(actual, list):
            return f"{where} is {short(actual)}, no list"
        if len(expected) != len(actual):
            return f"{where} has {len(actual)} items, not {len(expected)}: {short(actual)}"
        found = (
            difference(each, item, f"{where}[{index}]") for index, (each, item) in enumerate(zip(expected, actual, strict=True))
        )
        return next((each for each in found if each), None)
    if callable(expected):
        return _asked(expected, actual, where)
    same = type(expected) is type(actual) if isinstance(expected, bool) or isinstance(actual, bool) else True
    return None if same and expected == actual else f"{where} is {short(actual)}, not {short(expected)}"


def _asked(expected: Callable[[Json], Any], actual: Json, where: str) -> str | None:
    answer = expected(actual)
    if answer or answer is None:  # a function that asserts returns nothing
        return None
    return f"{where} is {short(actual)}, which {getattr(expected, '__name__', expected)} refuses"


def _object(expected: Mapping[str, Any], actual: Json, where: str, *, whole: bool) -> str | None:
    if not isinstance(actual, dict):
        return f"{where} is {short(actual)}, no object"
    for key, each in expected.items():
        if key not in actual:
            return f"{where} has no {key}; it has {', '.join(actual) or 'nothing'}"
        if found := difference(each, actual[key], f"{where}.{key}"):
            return found
    more = [key for key in actual if key not in expected]
    return f"{where} has {', '.join(more)} besides" if whole and more else None


def short(value: Any, most: int = 100) -> str:
    """Return a value as JSON, on one line and not too long."""
    try:
        text = to_json(value)
    except Exception:  # noqa: BLE001 - what a test expects may be anything
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


__all__ = ["ANYTHING", "Partly", "difference", "partly", "short"]
