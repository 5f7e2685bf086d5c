"""`foldflow audit`: the audit report of a run, asked of the read API."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import quote

import typer

from infra.cli.runs import UNREACHABLE, authorization, refuse
from infra.cli.terminal import fail, say
from streams.settings import Settings

if TYPE_CHECKING:
    import httpx

FOUND, UNWRITABLE, UNCHECKED = 1, 2, 3
_CODES: Final = {"damaged": FOUND, "partly": UNCHECKED}
_TIME_S: Final = 600.0
"""A run of many thousand steps is read and decided again for it."""


def audit(
    run: Annotated[str, typer.Argument(help="A run's id or the beginning of it, or its request's id.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write it; else standard output. `run.html` opens in any browser.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")] = False,
) -> None:
    """Report on a run for somebody who knows nothing of the system: an auditor, a manager, a customer.

    Who asked what, what each step did, who decided, models and prompts with their versions, the data, the cost, and whether the
    record is intact: for that its decisions are read from Kafka, and each is decided again. One HTML file without scripts, to be
    kept, sent and printed. It holds what the run was given and what came out, and any secret among it.

    For example:

        foldflow audit 8f6a3a7e -o audit.html

        foldflow audit 8f6a3a7e --json | jq .integrity

    Exit codes: 0 written, the record is intact; 1 written, something is wrong with the record; 2 there is no such run or the file
    can't be written; 3 written, but not all of the record could be checked; 4 the API can't be reached.
    """
    response = _answer(f"/runs/{quote(run, safe='')}/audit{'' if as_json else '.html'}")
    if not response.is_success:
        refuse(response)
    text = json.dumps(response.json(), indent=2, ensure_ascii=False) + "\n" if as_json else response.text
    verdict = response.headers.get("Foldflow-Integrity", "")
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, "utf-8")
        except OSError as error:
            fail(f"{output}: can't be written: {error.strerror}", UNWRITABLE)
        say(f"{output}: the record is {_TOLD.get(verdict, verdict)}. It holds what the run was given and what came out.")
    if verdict in _CODES:
        raise typer.Exit(_CODES[verdict])


_TOLD: Final = {"intact": "intact", "damaged": "NOT intact, see part 9", "partly": "checked in part only, see part 9"}


def _answer(path: str) -> "httpx.Response":
    """Return the API's answer, which may take longer than others; ends with an exit code if it can't be reached."""
    import httpx  # noqa: PLC0415 - 0.1 s

    settings = Settings()
    address = f"http://{settings.api_host}:{settings.api_port}"
    try:
        return httpx.get(address + path, headers=authorization(settings), timeout=_TIME_S, trust_env=False)
    except httpx.HTTPError as error:
        hint = "Start it with `foldflow up` or `foldflow api`, or set FOLDFLOW_API_HOST and FOLDFLOW_API_PORT."
        return fail(f"The API at {address} can't be reached ({error}). {hint}", UNREACHABLE)
