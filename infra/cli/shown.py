"""How `foldflow show` and `foldflow runs` write what the API says of a run."""

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.cli import tree
from infra.cli.progress import look
from infra.cli.terminal import console, money, took

_COLOURS: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "closing": "magenta",
}
_WAITS: Final = {"approval": "approval", "signal": "signal", "sleep": "sleep", "breakpoint": "breakpoint"}
_CALLS: Final = 20
_LONG: Final = 500
_DETAIL: Final = 200


def print_run(run: dict[str, Any], terminal: Console | None = None) -> None:
    """Write all that is known of a run."""
    terminal = terminal or console()
    terminal.print(_facts(run))
    for line in waiting(run):
        terminal.print(Text(line, "yellow" if not line.startswith("    ") else "bold"))
    terminal.print(_steps(run))
    if run["steps_known"] > len([step for step in run["steps"] if step["status"] != "pending"]):
        terminal.print(
            Text(f"of {run['steps_known']:,} steps, items and iterations; all: GET /runs/{run['run_id']}/steps", "dim"),
        )
    if run["children"]:
        terminal.print(_children(run))
    broken = [call for call in run["calls_made"] if call["outcome"] not in ("completed", "pending")]
    if broken:
        terminal.print(_calls(broken))


def _facts(run: dict[str, Any]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("run", run["run_id"])
    facts.add_row("workflow", f"{run['workflow']}  (version {run['digest'][:12]})")
    facts.add_row("request", run["request_id"])
    facts.add_row("status", status_cell(run) + _ending(run))
    if run["parent_run_id"]:
        facts.add_row("parent", f"run {run['parent_run_id']}, step {_plain(run['parent_step'])}")
    if run["origin_run_id"]:
        facts.add_row("forked from", f"run {run['origin_run_id']}, as its decision {run['origin_seq']} left it")
    if run["labels"]:
        facts.add_row("labels", _plain("  ".join(f"{key}={value}" for key, value in run["labels"].items())))
    if run["breakpoints"]:
        facts.add_row("stops before", _plain(", ".join(run["breakpoints"])))
    limit = f"   at most until {local(run['due'])}" if run["due"] and not run["ended"] else ""
    facts.add_row("started", f"{local(run['started'])}   took {run_took(run)}{limit}")
    tokens = f"{run['input_tokens']:,} in, {run['output_tokens']:,} out"
    unpriced = f"  ({run['unpriced_calls']} calls of unknown price not counted)" if run["unpriced_calls"] else ""
    facts.add_row("spent", f"{tokens}   {money(run['cost_usd'])}{unpriced}")
    offsets = f"partition {run['partition']}, offsets {run['first_offset']} to {run['last_offset']}"
    facts.add_row("ledger", f"{offsets}, {run['seq']} decisions")
    if run["failure_kind"] and run["cancelled_by"] is None:
        step = f"step {run['failure_step']}: " if run["failure_step"] else ""
        facts.add_row("failure", f"[red]{_plain(step + run['failure_kind'] + ': ' + run['failure_message'])}[/]")
    if run["not_undone"]:
        facts.add_row(
            "not undone",
            f"[red]{_plain(', '.join(run['not_undone']))}[/]  (done, and what undoes it failed or was left out)",
        )
    if run["problem"]:
        facts.add_row("integrity", f"[red]{_plain(run['problem'])}[/]")
    facts.add_row("input", _short(run["input"]))
    if run["output"] is not None:
        facts.add_row("output", _short(run["output"]))
    return facts


def _ending(run: dict[str, Any]) -> str:
    """Return how a run that is closing will end, and who cancelled it, if somebody did."""
    found = f"  (will be {run['outcome']}: what is to be undone and cleaned up comes first)" if run["status"] == "closing" else ""
    if run["cancelled_by"] is not None:
        by = f" by {run['cancelled_by']}" if run["cancelled_by"] else ""
        reason = f": {run['failure_message']}" if run["failure_message"] else ""
        found += _plain(f"  cancelled{by}{reason}" if run["status"] == "closing" else f"{by}{reason}")
    return found


def waiting(run: dict[str, Any]) -> Iterator[str]:
    """Yield what a run waits for, each with the command that answers it, if there is one."""
    run_id, held = run["run_id"], 0
    for wait in run["waits_for"]:
        step, until = wait["step"], f" until {local(wait['due'])}" if wait["due"] else ""
        path = shlex.quote(step)
        match wait["kind"]:
            case "approval":
                who = f" by {' or '.join(wait['may_answer'])}" if wait["may_answer"] else ""
                message = " ".join((wait["message"] or "").split())[:_DETAIL]
                yield f"? step {step} waits for an approval{who}{until}: {message}"
                yield f"    foldflow approve {run_id} {path}"
            case "signal":
                name, correlation = shlex.quote(wait["signal"] or ""), wait["correlation"]
                which = f" --correlation {shlex.quote(correlation)}" if correlation is not None else ""
                yield f"◔ step {step} waits for the signal {wait['signal']}{until}"
                yield f"    foldflow signal {run_id} {name}{which} --payload JSON"
            case "sleep":
                yield f"◔ step {step} sleeps{until}"
            case "breakpoint":
                yield f"‖ step {step} is held at a breakpoint"
                yield f"    foldflow resume {run_id} {path}"
            case _:
                held += 1
    if run["status"] == "paused":
        steps = f"; {held:,} step{'s are' if held != 1 else ' is'} held" if held else ""
        yield f"‖ the run is paused: what is under way goes on, nothing more is started{steps}"
        yield f"    foldflow resume {run_id}"
    hidden = sum(run["waiting"].values()) - (len(run["waits_for"]) - held)
    if hidden > 0:
        yield f"… and {hidden:,} more"


def _steps(run: dict[str, Any]) -> Table:
    table = Table("", "step", "", "attempt", "with", "took", "tokens", "cost", "", box=None)
    for line in tree.lines(map(tree.item_of, run["steps"])):
        step = line.item.row if line.item else None
        name = _plain(f"{line.lead}{line.name}")
        if step is None:
            table.add_row("", f"[dim]{name}[/]")
            continue
        sign, style = look(step["status"])
        used = f"{step['input_tokens']:,} → {step['output_tokens']:,}" if step["input_tokens"] or step["output_tokens"] else ""
        table.add_row(
            f"[{style}]{sign}[/]" if style else sign,
            name,
            step["status"].replace("_", " "),
            str(step["attempt"] or ""),
            _plain(_with(step)),
            run_took(step),
            used,
            money(step["cost_usd"]) if step["cost_usd"] else "",
            _plain(_detail(step)[:_DETAIL]),
        )
    return table


def _with(step: dict[str, Any]) -> str:
    if step["child_run_id"]:
        return f"{step['workflow']} → run {step['child_run_id'][:8]}" + (" (detached)" if step["detached"] else "")
    return str(step["model"] or step["tool"] or "")


def _detail(step: dict[str, Any]) -> str:
    """Return what is special about a step: why it is as it is, and where its result comes from."""
    failure = ": ".join(filter(None, (step["failure_kind"], step["failure_message"])))
    until = local(step["due"]) if step["due"] else ""
    parts = (
        step["reason"],
        f"{failure} (tolerated)" if failure and step["tolerated"] else failure,
        f"until {until}" if until and step["status"] in ("sleeping", "awaiting_signal", "awaiting_approval") else "",
        f"again at {until}" if until and step["status"] == "waiting" else "",
        "copied from the run it was forked from" if step["copied"] else "",
        "its output was set by somebody" if step["changed"] else "",
        f"{step['compensation']} undoes it" if step["compensation"] else "",
    )
    return "; ".join(filter(None, parts))


def _children(run: dict[str, Any]) -> Table:
    table = Table("run", "workflow", "", "step", "took", box=None, title="runs that its steps have started", title_justify="left")
    for child in run["children"]:
        cells = child["run_id"], child["workflow"], status_cell(child), _plain(child["parent_step"] or ""), run_took(child)
        table.add_row(*cells)
    if run["child_runs"] > len(run["children"]):
        table.add_row(f"[dim]… of {run['child_runs']:,} that were asked for: foldflow runs --parent {run['run_id']}[/]")
    return table


def _calls(broken: list[dict[str, Any]]) -> Table:
    table = Table("call", "step", "attempt", "outcome", "with", "latency", "", box=None)
    table.title, table.title_justify = "calls that did not complete", "left"
    for call in broken[:_CALLS]:
        outcome = call["outcome"].replace("_", " ") + (" (answered late)" if call["late"] else "")
        detail = ": ".join(filter(None, (call["failure_kind"], call["failure_message"])))
        table.add_row(
            call["call_id"][:8],
            _plain(call["step"]),
            str(call["attempt"] or ""),
            outcome,
            call["model"] or call["tool"],
            took(call["latency_ms"]),
            _plain(detail[:_DETAIL]),
        )
    if len(broken) > _CALLS:
        table.add_row("", f"[dim]… {len(broken) - _CALLS:,} more; --json shows all[/]")
    return table


def status_cell(run: Mapping[str, Any]) -> str:
    """Return a run's status, what it waits for, and whether its chain is broken."""
    counts = (f"{count:,} {_WAITS.get(kind, kind)}{'s' if count != 1 else ''}" for kind, count in run["waiting"].items())
    waits = ", ".join(counts)
    found = f"[{_COLOURS.get(run['status'], 'cyan')}]{run['status']}[/]"
    return found + (f", waits for {waits}" if waits else "") + (" [red]set aside[/]" if run["problem"] else "")


def _plain(text: str) -> str:
    """Keep rich from reading brackets in foreign text as its own marks."""
    return text.replace("[", r"\[")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return _plain(text if len(text) <= _LONG else f"{text[:_LONG]} … ({len(text):,} characters; --json shows all)")


def local(text: str) -> str:
    """Return a time of the API's in this machine's time zone."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def run_took(item: Mapping[str, Any]) -> str:
    """Return how long a run or step took, or has taken so far."""
    if not item["started"]:
        return ""
    end = datetime.fromisoformat(item["ended"]) if item["ended"] else datetime.now().astimezone()
    return took((end - datetime.fromisoformat(item["started"])).total_seconds() * 1000)
