"""How a person names a run: by its id, the beginning of it, or its request's id."""

import re
import uuid
from typing import Final
from urllib.parse import quote

from infra.cli.terminal import fail

NOT_THERE: Final = 1
_BEGINNING: Final = re.compile(r"[0-9a-f][0-9a-f-]{3,35}")


def is_id(text: str) -> bool:
    """Say whether a text is a run's whole id."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def is_beginning(text: str) -> bool:
    """Say whether a text may be the beginning of a run's id."""
    return not is_id(text) and _BEGINNING.fullmatch(text) is not None


def whole_id(beginning: str) -> str | None:
    """Ask the read API for the run whose id begins like that; None if there is none. Ends the command if there are several."""
    from infra.cli.runs import ask  # noqa: PLC0415 - most commands don't ask it

    answer = ask(f"/runs/{quote(beginning, safe='')}", missing_ok=True)
    if "run_id" in answer:
        return str(answer["run_id"])
    if answer.get("status") != 404:  # noqa: PLR2004 - HTTP: it is the beginning of several
        fail(f"{answer['title']}: {answer['detail']}\n{answer['hint']}", NOT_THERE)
    return None
