"""Points in time in questions: RFC 3339, a day, or how long ago."""

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import Query
from pydantic import BeforeValidator, WithJsonSchema

from api.problems import ProblemError
from streams.workflow.times import LONGEST_MS, instant, milliseconds

RELATIVE: Final = re.compile(r"\s*[0-9.]{1,31}(ms|s|m|h|d)\s*", re.ASCII)
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def point(text: object) -> datetime | None:
    """Return what a text says: `7d` (ago), `2026-11-21` (its beginning in UTC) or RFC 3339. Raises ValueError."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError("a point in time is a text")  # noqa: TRY004 - pydantic reports ValueErrors
    if RELATIVE.fullmatch(text):
        ago: int = milliseconds(text)
        if ago > LONGEST_MS:
            raise ValueError(f"`{text}` is longer ago than ten years")
        return datetime.fromtimestamp((time.time_ns() // 1_000_000 - ago) / 1000, UTC)
    ms = instant(f"{text}T00:00:00Z" if _DAY.fullmatch(text) else text)
    try:
        return datetime.fromtimestamp(ms / 1000, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"`{text}`: there is no such day") from error


def _told(text: object) -> datetime | None:
    """Return what a text in a question says. Raises ProblemError."""
    try:
        return point(text)
    except ValueError as error:
        hint = "Write 2026-11-21T09:30:00Z, a day (2026-11-21), or how long ago (90m, 7d)."
        raise ProblemError(400, "invalid-time", "This is no point in time", str(error), hint) from error


Point = Annotated[
    datetime | None,
    BeforeValidator(_told),
    WithJsonSchema({"type": "string", "examples": ["7d", "2026-11-21", "2026-11-21T09:30:00Z"]}),
]
Since = Annotated[Point, Query(description="Only from then on: a time, a day, or how long ago (`90m`, `7d`).")]
Until = Annotated[Point, Query(description="Only before then: a time, a day, or how long ago (`90m`, `7d`).")]


def ms_of(moment: datetime | None) -> int | None:
    """Return a point in time in milliseconds since the epoch."""
    return None if moment is None else round(moment.timestamp() * 1000)
