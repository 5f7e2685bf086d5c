"""`foldflow approvals`: what waits for people, of all runs."""

import json
import shlex
from datetime import datetime
from typing import Annotated, Any, Final

import typer

from infra.cli.runs import Json, Since, Until, ask
from infra.cli.terminal import console, say, took

_LONG: Final = 100


def approvals(
    by: Annotated[str, typer.Option(help="Only those that this person may answer.")] = "",
    all_: Annotated[
        bool, typer.Option("--all", "-a", help="Those that were answered, too, or that nobody answers any more.")
    ] = False,
    since: Since = "",
    until: Until = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most approvals that are listed.")] = 20,
    as_json: Json = False,
) -> None:
    """List what waits for somebody's approval, newest first, with the command that answers it.

    For example:

        foldflow approvals

        foldflow approvals --by ann --json

        foldflow approvals --all --since 7d

    Exit codes: 0 listed, 2 a wrong option, 4 the API can't be reached.
    """
    wanted = {"by": by, "waiting": "" if all_ else "true", "since": since, "until": until, "limit": limit}
    answer = ask("/approvals", {key: value for key, value in wanted.items() if value})
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    if not answer["approvals"]:
        say("Nothing waits for an approval." if not all_ else "There are no such approvals.")
        return
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from infra.cli.shown import local  # noqa: PLC0415

    table = Table("workflow", "asks", "who may", "waited", "until", Column("", overflow="fold"), box=None)
    for each in answer["approvals"]:
        message = " ".join(each["message"].split())
        cells = (
            *(each["workflow"], message if len(message) <= _LONG else f"{message[:_LONG]} …"),
            *(", ".join(each["may_answer"]) or "anybody", _ago(each), local(each["due"]) if each["due"] else ""),
            _answer(each),
        )
        table.add_row(*map(Text, cells))
    console().print(table)
    if answer["next"]:
        say(f"… and more: --limit {min(1000, limit * 5)}")


def _ago(approval: dict[str, Any]) -> str:
    """Return how long it has waited, or did."""
    end = datetime.fromisoformat(approval["answered"]) if approval["answered"] else datetime.now().astimezone()
    return took((end - datetime.fromisoformat(approval["requested"])).total_seconds() * 1000)


def _answer(approval: dict[str, Any]) -> str:
    """Return the command that answers it, or what was answered."""
    if approval["status"] == "waiting":
        return f"foldflow approve {approval['run_id']} {shlex.quote(approval['step'])}"
    by = f" by {approval['answered_by']}" if approval["answered_by"] else ""
    reason = f": {approval['reason']}" if approval["reason"] else ""
    return f"{approval['status']}{by}{reason}"
