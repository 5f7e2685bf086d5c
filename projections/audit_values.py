"""How values and times stand in an audit report: as people read them, and not longer than they can be shown."""

import json
from datetime import UTC, datetime
from typing import Final, Literal

from projections.audit_document import Content
from streams.workflow.expressions import EvaluationError, from_json

PROMPT: Final = 50_000
VALUE: Final = 20_000
LINE: Final = 100
"""The most characters of a prompt or an answer of a model, and of any other value; of JSON on one line."""


def content(text: str | None, most: int) -> Content | None:
    """Return a JSON value as it is shown: a text as it is, anything else indented; at most so many characters."""
    if text is None:
        return None
    try:
        value = from_json(text)
    except EvaluationError:  # anybody may have written it
        return cut(text, "text", most)
    if isinstance(value, str):
        return cut(value, "text", most)
    line = json.dumps(value, ensure_ascii=False)
    return cut(line if len(line) <= LINE else json.dumps(value, indent=2, ensure_ascii=False), "json", most)


def cut(text: str, kind: Literal["text", "json"], most: int) -> Content:
    """Return a text as it is shown: at most so many characters."""
    text = clean(text)
    return Content(text[:most], kind, len(text), max(0, len(text) - most))


def clean(text: str) -> str:
    """Return a text that can be written: half of a surrogate pair can't."""
    return text.encode("utf-8", "replace").decode()


def utc(at: datetime | None) -> datetime | None:
    """Return a time of the views, which are UTC, as one that says so."""
    return None if at is None else at.replace(tzinfo=UTC)


def between(since: datetime | None, until: datetime | None) -> float | None:
    """Return how many milliseconds lie between two times that are known."""
    return None if since is None or until is None else (until - since).total_seconds() * 1000
