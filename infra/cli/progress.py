"""How a run that is being followed is shown: a table that changes on a terminal, a line for each change elsewhere."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from infra.cli import tree
from infra.cli.follow import Followed
from infra.cli.terminal import money, took
from projections.steps import StepRow

LOOKS = {
    "pending": ("·", "dim"),
    "running": ("▶", "cyan"),
    "waiting": ("◔", "yellow"),
    "sleeping": ("◔", "dim"),
    "awaiting_signal": ("◔", "yellow"),
    "awaiting_approval": ("?", "bold yellow"),
    "entered": ("▶", "cyan"),
    "held": ("‖", "yellow"),
    "completed": ("✓", "green"),
    "skipped": ("○", "dim"),
    "failed": ("✗", "red"),
    "cancelled": ("✗", "yellow"),
    "abandoned": ("✗", "dim"),
    "open": ("▶", "cyan"),
    "refused": ("✗", "red"),
}
_SLOW_S = 5.0
_HINT = "no decision yet: are intake and orchestrator running? `foldflow status`, `foldflow up`"


def look(status: str) -> tuple[str, str]:
    """Return the sign and style of a status."""
    return LOOKS.get(status, ("·", ""))


class Display(Protocol):
    """Shows what is known of a run."""

    def show(self, followed: Followed) -> None:
        """Show it as it is now."""

    def aside(self) -> AbstractContextManager[None]:
        """Keep quiet while a person is asked."""


@contextmanager
def display(console: Console, *, silent: bool) -> Iterator[Display]:
    """Give the display that fits the terminal."""
    if silent:
        yield _Silent()
    elif console.is_terminal:
        with Live(console=console, refresh_per_second=10, transient=False) as live:
            yield _Table(live)
    else:
        yield _Lines(console)


class _Silent:
    def show(self, followed: Followed) -> None:
        """Show nothing."""

    def aside(self) -> AbstractContextManager[None]:
        """Do nothing: it is quiet."""
        return nullcontext()


class _Table:
    def __init__(self, live: Live) -> None:
        self._live, self._began = live, time.monotonic()

    def show(self, followed: Followed) -> None:
        """Draw the table anew."""
        slow = followed.run is None and time.monotonic() - self._began > _SLOW_S
        hints = [_HINT] if slow else followed.waiting
        self._live.update(Group(steps_table(followed), *(Text(hint, "yellow") for hint in hints)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the table where it is, and draw it anew below."""
        self._live.stop()
        yield
        self._live.start(refresh=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._said, self._began, self._warned = console, dict[str, str](), time.monotonic(), False
        self._waiting: list[str] = []

    def show(self, followed: Followed) -> None:
        """Write a line for each step that has changed."""
        if followed.run is None:
            if not self._warned and time.monotonic() - self._began > _SLOW_S:
                self._warned = True
                self._console.print(_HINT, highlight=False)
            return
        for name, step in followed.listed.items():
            line = " ".join(filter(None, (step.status, attempt(step), step.model or step.tool, step.failure_message)))
            if self._said.get(name) != line:
                self._said[name] = line
                self._console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)
        waiting = followed.waiting
        for line in waiting:
            if line not in self._waiting:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._waiting = waiting

    def aside(self) -> AbstractContextManager[None]:
        """Do nothing: lines don't change."""
        return nullcontext()


def steps_table(followed: Followed) -> Table:
    """Return the steps as a table, with totals below."""
    run = followed.run
    now = time.time() * 1000
    table = Table(box=None, pad_edge=False, show_footer=run is not None)
    title = f"run {followed.sent.run_id}" if run is None else f"run {followed.sent.run_id}  {run.workflow}"
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    total = took((run.ended or now) - run.started) if run else ""
    tokens = f"{run.input_tokens:,} → {run.output_tokens:,}" if run else ""
    for header, footer in (("", ""), ("step", ""), ("", ""), ("with", ""), ("time", total), ("tokens", tokens)):
        table.add_column(header, footer)
    table.add_column("cost", money(run.cost_usd) if run else "")
    for step in followed.listed.values():
        table.add_row(*step_cells(step.status, step, now))
    if run is None:
        table.add_row("…", "sent, waiting for its first decision")
    return table


def step_cells(status: str, step: StepRow, now: float) -> tuple[Any, ...]:
    """Return the cells of a step."""
    sign, style = look(status)
    name = Text(step.step + tree.summary(tree.item_of(step)), style)
    if step.failure_message and status != "completed":
        name.append(f"\n{step.failure_kind}: {step.failure_message}"[:300], "red" if status == "failed" else "yellow")
    tokens = f"{step.input_tokens:,} → {step.output_tokens:,}" if step.input_tokens or step.output_tokens else ""
    duration = took((step.ended or now) - step.started) if step.started is not None else ""
    return (
        Text(sign, style),
        name,
        " ".join(filter(None, (status, attempt(step)))),
        step.model or step.tool or "",
        duration,
        tokens,
        money(step.cost_usd) if step.cost_usd else "",
    )


def attempt(step: StepRow) -> str:
    """Say which attempt it is, from the second on."""
    return f"(attempt {step.attempt})" if step.attempt > 1 else ""
