"""`foldflow runs` and `foldflow show`: ask the read API."""

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import quote

import typer

from infra.cli.terminal import console, fail, money, say
from streams.settings import Settings

if TYPE_CHECKING:
    import httpx

NOT_FOUND, UNREACHABLE = 2, 4
_NOT_FOUND_STATUS = (404, 409)

Json = Annotated[bool, typer.Option("--json", help="Print the API's answer as it is.")]
Since = Annotated[str, typer.Option(help="Only what began from then on: 7d (ago), 2026-11-21, 2026-11-21T09:30:00Z.")]
Until = Annotated[str, typer.Option(help="Only what began before then.")]


def runs(  # noqa: PLR0913, PLR0917 - what can be asked for
    workflow: Annotated[str, typer.Option(help="Only runs of this workflow.")] = "",
    status: Annotated[
        str,
        typer.Option(
            help="Only runs that are running, paused, closing, completed, failed or cancelled; open: not over; waiting: for an "
            "approval, a signal, a time or at a breakpoint."
        ),
    ] = "",
    parent: Annotated[str, typer.Option(help="Only runs that steps of the run with this id have started.")] = "",
    origin: Annotated[str, typer.Option(help="Only forks of the run with this id.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="Only runs with this KEY=VALUE; may be repeated.")
    ] = None,
    since: Since = "",
    until: Until = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most runs that are listed.")] = 20,
    as_json: Json = False,
) -> None:
    """List runs, newest first.

    For example:

        foldflow runs --status failed --since 7d --limit 50

        foldflow runs --status waiting

        foldflow runs --workflow market-analysis --label team=research --json

    Exit codes: 0 listed, 2 a wrong option, 4 the API can't be reached.
    """
    wanted = {"workflow": workflow, "status": status, "label": label or [], "limit": limit, "parent": parent, "origin": origin}
    wanted |= {"since": since, "until": until}
    answer = ask("/runs", {key: value for key, value in wanted.items() if value})
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from rich.table import Column, Table  # noqa: PLC0415

    from infra.cli.shown import local, run_took, status_cell  # noqa: PLC0415

    table = Table(
        Column("run", no_wrap=True, min_width=36),
        "workflow",
        "",
        "steps",
        "started",
        "took",
        "tokens",
        "cost",
        "failure",
        box=None,
    )
    for run in answer["runs"]:
        steps = f"{run['steps_settled']}/{run['steps_total'] or '?'}"
        tokens = f"{run['input_tokens'] + run['output_tokens']:,}"
        failure = ": ".join(filter(None, (run["failure_step"], run["failure_kind"])))
        cells = (
            run["run_id"],
            run["workflow"],
            status_cell(run),
            steps,
            local(run["started"]),
            run_took(run),
            tokens,
            money(run["cost_usd"]),
        )
        table.add_row(*cells, failure)
    console().print(table)
    if not answer["runs"]:
        say("There are no such runs. Start one with: foldflow run WORKFLOW")
    elif answer["next"]:
        say(f"… and more: --limit {min(1000, limit * 5)}")


def show(
    run: Annotated[str, typer.Argument(help="A run's id or the beginning of it, or a request's id.")],
    as_json: Json = False,
    at: Annotated[
        int, typer.Option("--at", metavar="SEQ", min=0, help="The run as this decision left it.", show_default=False)
    ] = 0,
) -> None:
    """Show a run: its steps as a tree, what it waits for and the commands that answer, its calls; or why a request was refused.

    Items and iterations are folded: what is fine is counted, what waits, failed or is under way is shown.

    For example:

        foldflow show 8f6a3a7e

        foldflow show order-17 --json

        foldflow show 8f6a3a7e --at 12                        as decision 12 left it; `foldflow replay` steps through

    Exit codes: 0 shown, 1 shown and the run failed, was cancelled or refused, 2 there is none, 4 the API can't be reached (with
    --at: Kafka).
    """
    if at:
        from infra.cli.replay import at_place, read_run, show_state  # noqa: PLC0415 - reads the topics themselves

        show_state(at_place(read_run(None, run), str(at)), as_json=as_json)
        return
    answer = ask(f"/runs/{quote(run, safe='')}", missing_ok=True)
    if answer["status"] == 404:  # noqa: PLR2004 - HTTP: no run's id begins like that, so it may be a request's
        asked = ask(f"/requests/{quote(run, safe='')}", missing_ok=True)
        if asked.get("run"):
            answer = ask(f"/runs/{asked['run_id']}")
        elif "deadletters" in asked:
            answer = asked
    if answer["status"] in _NOT_FOUND_STATUS:
        fail(f"{answer['title']}: {answer['detail']}\n{answer['hint']}", NOT_FOUND)
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    elif answer["status"] == "refused":
        _show_refused(answer)
    else:
        from infra.cli.shown import print_run  # noqa: PLC0415

        print_run(answer)
    if answer["status"] in {"failed", "refused", "cancelled"}:
        raise typer.Exit(1)


def _show_refused(request: dict[str, Any]) -> None:
    from infra.cli.shown import local  # noqa: PLC0415

    print(f"request {request['request_id']}: refused")
    for letter in request["deadletters"]:
        place = f"{letter['topic']}/{letter['partition']}/{letter['offset']}"
        print(f"  {local(letter['received'])}  {place}  {letter['reason']}: {letter['detail']}")
    print("No run was started. Put that right and send the request again.")


def authorization(settings: Settings) -> dict[str, str]:
    """Return the header that shows the API who asks, if it wants to know."""
    return {} if settings.api_token is None else {"Authorization": f"Bearer {settings.api_token.get_secret_value()}"}


def ask(path: str, parameters: dict[str, Any] | None = None, *, missing_ok: bool = False) -> dict[str, Any]:
    """Return the API's answer; with `missing_ok` also a problem that says that there is none."""
    response = get(path, parameters)
    if not response.is_success:
        if missing_ok and response.status_code in _NOT_FOUND_STATUS:
            return _said(response)
        refuse(response)
    return _said(response)


def refuse(response: "httpx.Response") -> NoReturn:
    """Say which problem the API answers with, and what to do, and end with an exit code."""
    problem = _said(response)
    code = UNREACHABLE if response.is_server_error else NOT_FOUND
    fail(f"{problem.get('title')}: {problem.get('detail')}\n{problem.get('hint')}", code)


def _said(response: "httpx.Response") -> dict[str, Any]:
    """Return what the API answers; where a problem's hint speaks of HTTP, which commands do that."""
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        fail(
            f"{response.url} answers, but not as Foldflow's API: is FOLDFLOW_API_PORT right? (HTTP {response.status_code})",
            UNREACHABLE,
        )
    if answer.get("type") == "urn:foldflow:unknown-run":
        request = answer.get("request_id")
        lag = int(response.headers.get("Foldflow-Lag", 0))
        answer["hint"] = (
            f"`foldflow show {shlex.quote(request)}` says why."
            if request
            else "`foldflow runs` lists all runs; `foldflow show REQUEST` says why a request has none."
        ) + (f" The API is {lag:,} records behind Kafka: it may just not be there yet." if lag else "")
    return answer


def get(path: str, parameters: dict[str, Any] | None = None) -> "httpx.Response":
    """Return what the API answers, whatever it is; ends with an exit code if it can't be reached."""
    import httpx  # noqa: PLC0415 - 0.1 s

    settings = Settings()
    address = f"http://{settings.api_host}:{settings.api_port}"
    try:
        return httpx.get(address + path, params=parameters or {}, headers=authorization(settings), timeout=30, trust_env=False)
    except httpx.HTTPError as error:
        hint = "Start it with `foldflow up` or `foldflow api`, or set FOLDFLOW_API_HOST and FOLDFLOW_API_PORT."
        return fail(f"The API at {address} can't be reached ({error}). {hint}", UNREACHABLE)
