"""Labels in questions: `label=key=value`, several times."""

from typing import Annotated

from fastapi import Query

from api.problems import ProblemError

Labels = Annotated[
    list[str] | None, Query(description="`key=value`; several must all be there.", examples=[["team=research"]], max_length=20)
]


def pairs(labels: list[str] | None) -> tuple[tuple[str, str], ...]:
    """Return labels as pairs. Raises ProblemError for one that is none."""
    return tuple(_pair(each) for each in labels or ())


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        hint = "Write key=value, for example ?label=team=research."
        raise ProblemError(400, "invalid-label", "A label has a key and a value", f"label={text}", hint)
    return key, value
