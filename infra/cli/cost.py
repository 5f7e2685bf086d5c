"""`foldflow cost`: what runs cost, asked of the read API."""

import json
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

import typer

from infra.cli.runs import Json, ask
from infra.cli.terminal import console, money, say

By = Literal["workflow", "model", "tool", "step", "run", "day", "prices", "call"]
_NOBODY: Final[dict[str, dict[str | None, str]]] = {
    "model": {"tool": "(tools)", "llm": "(unknown)"},
    "tool": {"llm": "(models)", "tool": "(unknown)"},
    "prices": {"tool": "(as tools say)", "llm": "(none known)"},
}
"""How a key's column without a value is told, by the kind of the calls."""


def cost(
    run: Annotated[
        str,
        typer.Argument(help="A run's id or the beginning of it, or its request's id: what it and the runs that it started cost."),
    ] = "",
    by: Annotated[By | None, typer.Option(help="What to group by; `workflow` if not said, for one run `step`.")] = None,
    since: Annotated[
        str, typer.Option(help="Only calls that ended from then on: 7d (ago), 2026-11-21, 2026-11-21T09:30:00Z.")
    ] = "",
    until: Annotated[str, typer.Option(help="Only calls that ended before then.")] = "",
    workflow: Annotated[str, typer.Option(help="Only calls of runs of this workflow.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="Only runs with this KEY=VALUE, and those that they started; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most groups that are listed; the others are summed.")] = 20,
    as_json: Json = False,
) -> None:
    """Show tokens of each kind and money: what was spent, on what, by which prices.

    A call costs what was recorded when it was made: prices that change later change nothing of it. Each is counted once, also
    when its answer came too late. Tokens in brackets are part of those before them: from and to the provider's cache, reasoning.

    For example:

        foldflow cost --since 7d --by model

        foldflow cost --label team=research --by day

        foldflow cost 8f6a3a7e

        foldflow cost 8f6a3a7e --by call --json

    Exit codes: 0 shown, 2 there is no such run or an option is wrong, 4 the API can't be reached.
    """
    wanted = {"by": by, "since": since, "until": until, "workflow": workflow, "label": label or [], "limit": limit}
    if run and (workflow or label):
        raise typer.BadParameter("--workflow and --label choose among all runs; leave them out, or RUN")
    path = f"/runs/{quote(run, safe='')}/cost" if run else "/cost"
    answer = ask(path, {key: value for key, value in wanted.items() if value})
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    if not answer["total"]["calls"]:
        say("No calls that are over: nothing was spent." if run else "There are no such calls.")
        return
    if run:
        _print_family(answer)
    _print(answer)
    for line in _notes(answer["total"]):
        say(line)
    if answer["left_out"] and limit < 1000:  # noqa: PLR2004 - the most
        say(f"… and {answer['left_out']:,} more: --limit {min(1000, limit * 5)}")


def _print_family(answer: dict[str, Any]) -> None:
    children = answer["children"]
    started = f", of it {money(children['cost_usd'])} in runs that it started" if children["calls"] else ""
    print(f"run {answer['run_id']}: {money(answer['total']['cost_usd'])}{started}")


def _print(answer: dict[str, Any]) -> None:
    from rich.table import Column, Table  # noqa: PLC0415 - 0.1 s
    from rich.text import Text  # noqa: PLC0415

    shown = [name for name in answer["groups"][0]["key"] if name not in _HIDDEN]
    figures = ("calls", "tokens in", "out", "cost", "wasted")
    table = Table(*shown, *(Column(name, justify="right") for name in figures), box=None)
    for group in answer["groups"]:
        key = group["key"]
        key["prices"] = key.get("prices") or key.get("paid_for")  # of a call, what is there
        names = (key[name] or _NOBODY.get(answer["by"], {}).get(key.get("kind"), "") for name in shown)
        table.add_row(*map(Text, names), *_figures(group))
    blank = [""] * (len(shown) - 1)
    if answer["rest"]:
        table.add_row(Text(f"{answer['left_out']:,} others"), *blank, *_figures(answer["rest"]), style="dim")
    table.add_row("total", *blank, *_figures(answer["total"]), style="bold")
    console().print(table)


_HIDDEN: Final = frozenset({"kind", "paid_for"})


def _figures(sums: dict[str, Any]) -> list[str]:
    return [
        f"{sums['calls']:,}",
        _tokens(sums["input_tokens"], cached=sums["cache_read_tokens"], written=sums["cache_write_tokens"]),
        _tokens(sums["output_tokens"], reasoning=sums["reasoning_tokens"]),
        money(sums["cost_usd"]) + ("?" if sums["unpriced_calls"] else ""),
        money(sums["wasted_usd"]) if sums["wasted_usd"] else "",
    ]


def _tokens(whole: int, **parts: int) -> str:
    told = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    return (f"{whole:,}" + (f" ({told})" if told else "")) if whole else ""


def _notes(total: dict[str, Any]) -> list[str]:
    """Return what the sums lack."""
    notes = []
    if (count := total["unpriced_calls"]) > 0:
        notes.append(
            f"? {_calls(count)} of a model whose price is unknown, not counted: FOLDFLOW_PRICES can name it for the next ones."
        )
    if (count := total["unmetered_calls"]) > 0:
        notes.append(f"! {_calls(count)} given up before an answer told what it took; the provider may charge for that.")
    return notes


def _calls(count: int) -> str:
    return f"{count:,} call{'s' if count != 1 else ''}"
