"""`foldflow runs` and `foldflow show`: ask the read API."""

import json
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from infra.cli.terminal import console, fail, money, say, took
from streams.settings import Settings

NOT_FOUND, UNREACHABLE = 2, 4
_NOT_FOUND_STATUS = (404, 409)

Json = Annotated[bool, typer.Option("--json", help="Print the API's answer as it is.")]


def runs(
    workflow: Annotated[str, typer.Option(help="Only runs of this workflow.")] = "",
    status: Annotated[str, typer.Option(help="Only runs that are open, completed or failed.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="Only runs with this KEY=VALUE; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most runs that are listed.")] = 20,
    as_json: Json = False,
) -> None:
    """List runs, newest first.

    For example:

        foldflow runs --status failed --limit 50

        foldflow runs --workflow market-analysis --label team=research --json

    Exit codes: 0 listed, 2 a wrong option, 4 the API can't be reached.
    """
    wanted = {"workflow": workflow, "status": status, "label": label or [], "limit": limit}
    answer = _ask("/runs", {key: value for key, value in wanted.items() if value})
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from rich.table import Column, Table  # noqa: PLC0415

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
            _status(run),
            steps,
            _local(run["started"]),
            _took(run),
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
) -> None:
    """Show a run with its steps and calls; or why a request was refused.

    For example:

        foldflow show 8f6a3a7e

        foldflow show order-17 --json

    Exit codes: 0 shown, 1 shown and the run has failed or was refused, 2 there is none, 4 the API can't be reached.
    """
    answer = _ask(f"/runs/{quote(run, safe='')}", missing_ok=True)
    if answer["status"] == 404:  # noqa: PLR2004 - HTTP: no run's id begins like that, so it may be a request's
        asked = _ask(f"/requests/{quote(run, safe='')}", missing_ok=True)
        if asked.get("run"):
            answer = _ask(f"/runs/{asked['run_id']}")
        elif "deadletters" in asked:
            answer = asked
    if answer["status"] in _NOT_FOUND_STATUS:
        fail(f"{answer['title']}: {answer['detail']}\n{answer['hint']}", NOT_FOUND)
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    elif answer["status"] == "refused":
        _show_refused(answer)
    else:
        _show_run(answer)
    if answer["status"] in {"failed", "refused"}:
        raise typer.Exit(1)


def _show_refused(request: dict[str, Any]) -> None:
    print(f"request {request['request_id']}: refused")
    for letter in request["deadletters"]:
        place = f"{letter['topic']}/{letter['partition']}/{letter['offset']}"
        print(f"  {_local(letter['received'])}  {place}  {letter['reason']}: {letter['detail']}")
    print("No run was started. Put that right and send the request again.")


def _show_run(run: dict[str, Any]) -> None:
    from rich.table import Table  # noqa: PLC0415

    from infra.cli.progress import LOOKS  # noqa: PLC0415

    terminal = console()
    facts = Table.grid(padding=(0, 2))
    facts.add_row("run", run["run_id"])
    facts.add_row("workflow", f"{run['workflow']}  (version {run['digest'][:12]})")
    facts.add_row("request", run["request_id"])
    facts.add_row("status", _status(run))
    if run["labels"]:
        facts.add_row("labels", "  ".join(f"{key}={value}" for key, value in run["labels"].items()))
    facts.add_row("started", f"{_local(run['started'])}   took {_took(run)}")
    tokens = f"{run['input_tokens']:,} in, {run['output_tokens']:,} out"
    unpriced = f"  ({run['unpriced_calls']} calls of unknown price not counted)" if run["unpriced_calls"] else ""
    facts.add_row("spent", f"{tokens}   {money(run['cost_usd'])}{unpriced}")
    facts.add_row(
        "ledger", f"partition {run['partition']}, offsets {run['first_offset']} to {run['last_offset']}, {run['seq']} decisions"
    )
    if run["failure_kind"]:
        step = f"step {run['failure_step']}: " if run["failure_step"] else ""
        facts.add_row("failure", f"[red]{_plain(step + run['failure_kind'] + ': ' + run['failure_message'])}[/]")
    if run["problem"]:
        facts.add_row("integrity", f"[red]{_plain(run['problem'])}[/]")
    facts.add_row("input", _short(run["input"]))
    if run["output"] is not None:
        facts.add_row("output", _short(run["output"]))
    terminal.print(facts)
    steps = Table("", "step", "", "attempt", "with", "took", "tokens", "cost", "", box=None)
    for step in run["steps"]:
        sign, style = LOOKS[step["status"]]
        detail = step["skipped_reason"] or ": ".join(filter(None, (step["failure_kind"], step["failure_message"])))
        used = f"{step['input_tokens']:,} → {step['output_tokens']:,}" if step["input_tokens"] or step["output_tokens"] else ""
        cost = money(step["cost_usd"]) if step["cost_usd"] else ""
        number = str(step["attempt"] or "")
        cells = (
            f"[{style}]{sign}[/]",
            step["step"],
            step["status"],
            number,
            step["model"] or step["tool"],
            _took(step),
            used,
            cost,
        )
        steps.add_row(*cells, _plain(detail[:200]))
    terminal.print(steps)
    retried = [call for call in run["calls_made"] if call["outcome"] != "completed"]
    if retried:
        calls = Table(
            "call",
            "step",
            "attempt",
            "outcome",
            "with",
            "latency",
            "",
            box=None,
            title="calls that did not complete",
            title_justify="left",
        )
        for call in retried:
            outcome = call["outcome"] + (" (answered late)" if call["late"] else "")
            detail = ": ".join(filter(None, (call["failure_kind"], call["failure_message"])))
            used = call["model"] or call["tool"]
            calls.add_row(
                call["call_id"][:8],
                call["step"],
                str(call["attempt"] or ""),
                outcome,
                used,
                took(call["latency_ms"]),
                _plain(detail[:200]),
            )
        terminal.print(calls)


def _ask(path: str, parameters: dict[str, Any] | None = None, *, missing_ok: bool = False) -> dict[str, Any]:
    """Return the API's answer; with `missing_ok` also a problem that says that there is none."""
    import httpx  # noqa: PLC0415 - 0.1 s

    settings = Settings()
    address = f"http://{settings.api_host}:{settings.api_port}"
    try:
        response = httpx.get(address + path, params=parameters or {}, timeout=30, trust_env=False)
    except httpx.HTTPError as error:
        hint = "Start it with `foldflow up` or `foldflow api`, or set FOLDFLOW_API_HOST and FOLDFLOW_API_PORT."
        fail(f"The API at {address} can't be reached ({error}). {hint}", UNREACHABLE)
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        fail(
            f"{address} answers, but not as Foldflow's API: is FOLDFLOW_API_PORT right? (HTTP {response.status_code})",
            UNREACHABLE,
        )
    if response.is_success or (missing_ok and response.status_code in _NOT_FOUND_STATUS):
        return answer
    code = UNREACHABLE if response.is_server_error else NOT_FOUND
    return fail(f"{answer.get('title')}: {answer.get('detail')}\n{answer.get('hint')}", code)


def _status(run: dict[str, Any]) -> str:
    colour = {"completed": "green", "failed": "red", "open": "cyan"}[run["status"]]
    return f"[{colour}]{run['status']}[/]" + (" [red]set aside[/]" if run["problem"] else "")


def _plain(text: str) -> str:
    """Keep rich from reading brackets in foreign text as its own marks."""
    return text.replace("[", r"\[")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return _plain(text if len(text) <= 500 else f"{text[:500]} … ({len(text):,} characters; --json shows all)")  # noqa: PLR2004


def _local(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _took(item: dict[str, Any]) -> str:
    if not item["started"]:
        return ""
    end = datetime.fromisoformat(item["ended"]) if item["ended"] else datetime.now().astimezone()
    return took((end - datetime.fromisoformat(item["started"])).total_seconds() * 1000)
