"""Durations and points in time as texts, in whole milliseconds. No clock here: what time it is, the input says."""

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, PlainSerializer

_UNITS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|s|m|h|d)")
LONGEST_MS: Final = 3650 * 86_400_000
"""Ten years: what is added to a time stays a time."""
_INSTANT: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?\s*(?:([Zz])|([+-])(\d\d):?(\d\d))", re.ASCII
)


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


def instant(text: str) -> int:
    """Return a point in time (RFC 3339, `2026-11-21T09:30:00Z` or `…+01:00`) in milliseconds since the epoch.

    Raises ValueError, also without an offset: nobody knows where that would be meant.
    """
    match = _INSTANT.fullmatch(text.strip())
    if not match:
        raise ValueError(f"`{text[:50]}` is no point in time; write 2026-11-21T09:30:00Z, or +01:00 instead of Z")
    year, month, day, hour, minute = (int(match[group]) for group in range(1, 6))
    second = int(match[6] or 0)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    there_is = 1 <= month <= 12 and 1 <= day <= lengths[month - 1] and hour < 24 and minute < 60 and second < 61  # noqa: PLR2004
    if not there_is or int(match[10] or 0) >= 24 or int(match[11] or 0) >= 60:  # noqa: PLR2004
        raise ValueError(f"`{text[:50]}`: there is no such day or time")
    before = year - 1
    days = 365 * before + before // 4 - before // 100 + before // 400 + sum(lengths[: month - 1]) + day - 1 - 719_162
    offset = (1 if match[9] == "+" else -1) * (int(match[10]) * 60 + int(match[11])) if match[9] else 0
    milli = int(f"{match[7] or 0:0<3}"[:3])
    return ((days * 24 + hour) * 60 + minute - offset) * 60_000 + second * 1000 + milli


def _written(ms: int) -> str:
    return f"{ms}ms"


Duration = Annotated[int, BeforeValidator(milliseconds), Field(gt=0, le=LONGEST_MS), PlainSerializer(_written, return_type=str)]
"""Milliseconds, written as text with a unit."""


def _duration_or_expression(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("="):
        return value
    number = milliseconds(value)
    if not isinstance(number, int) or not 0 < number <= LONGEST_MS:
        raise ValueError("a duration is written 500ms, 60s, 5m, 2h or 3d, and not longer than ten years")
    return number


ComputedDuration = Annotated[
    int | str,
    BeforeValidator(_duration_or_expression),
    PlainSerializer(lambda value: value if isinstance(value, str) else _written(value), return_type=str),
]
"""A duration, or an expression (`=…`) that gives one."""
