"""`foldflow picture`: a run as a picture."""

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from infra.cli.runs import get, refuse
from infra.cli.terminal import fail, say

UNWRITABLE = 2


def picture(
    run: Annotated[str, typer.Argument(help="A run's id or the beginning of it, or its request's id.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write it; else standard output. `run.svg` opens in any browser.", show_default=False
        ),
    ] = None,
) -> None:
    """Draw a picture of a run: what was asked, what each step did with what, who approved, and what came of it.

    It is an SVG for people who know nothing of the system: each card is a step, each line what one gave to another. Items of a
    list are one card. It shows a run that goes on as far as it is.

    For example:

        foldflow picture 8f6a3a7e -o run.svg

        foldflow picture 8f6a3a7e > run.svg

    Exit codes: 0 drawn, 2 there is no such run or the file can't be written, 4 the API can't be reached.
    """
    response = get(f"/runs/{quote(run, safe='')}/lineage.svg")
    if not response.is_success:
        refuse(response)
    if output is None:
        print(response.text)
        return
    try:
        output.write_bytes(response.content)
    except OSError as error:
        fail(f"{output}: can't be written: {error.strerror}", UNWRITABLE)
    say(f"{output}: open it in a browser. It shows what the run was given and what came out.")
