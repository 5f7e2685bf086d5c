"""The command `foldflow`: a table of commands, each in a module of its own that is imported only when it is called.

To add a command, add a line: the module has a function of the command's name (`set-output`: `set_output`), or a `typer.Typer` of
that name for a command with commands of its own.
"""

import faulthandler
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import typer

from events.errors import NewerCodeError

NEWER = 78
"""The exit code of what only newer code can do, as of a worker's process (EX_CONFIG of sysexits.h)."""
WRONG_SETTINGS = 2
"""The exit code of a command that can't work with its settings, as of one that is called wrongly."""


class Command(NamedTuple):
    """A command: its name, the module that holds a function or `typer.Typer` of that name, and a line of help."""

    name: str
    module: str
    help: str
    passes_on: bool = False
    """Whether it takes any arguments, to give them to another program."""


COMMANDS = (
    Command("up", "infra.cli.cluster", "Start Kafka, the local model, the workers and the API on this machine."),
    Command("down", "infra.cli.cluster", "Stop everything that `up` started; data is kept."),
    Command("status", "infra.cli.cluster", "Show what runs, where it listens and where it logs."),
    Command("worker", "infra.cli.worker", "Run one role's processors in the foreground."),
    Command("workers", "infra.cli.workers", "Show who works where, and what waits for them."),
    Command("api", "infra.cli.api", "Serve the read API in the foreground."),
    Command("gateway", "infra.cli.gateway", "Take requests and signals over HTTP, in the foreground."),
    Command("token", "infra.cli.token", "Make, list and revoke tokens for the API and the gateway."),
    Command("run", "infra.cli.requests", "Start a run, and follow it."),
    Command("runs", "infra.cli.runs", "List runs."),
    Command("show", "infra.cli.runs", "Show a run: its steps, calls and costs, or why a request was refused."),
    Command("cost", "infra.cli.cost", "Show what runs cost: tokens and money, by workflow, model, step, day …"),
    Command("lineage", "infra.cli.lineage", "Show where a result comes from, and what became of it."),
    Command("picture", "infra.cli.picture", "Draw a picture of a run, as SVG."),
    Command("openlineage", "infra.cli.openlineage", "Tell runs as OpenLineage events: to a receiver, a topic, or a file."),
    Command("audit", "infra.cli.audit", "Report on a run for an auditor: what it did, who decided, is its record intact."),
    Command("approvals", "infra.cli.approvals", "List what waits for somebody's approval."),
    Command("signal", "infra.cli.commands", "Send a signal to a run."),
    Command("approve", "infra.cli.commands", "Approve what a step of a run shows."),
    Command("reject", "infra.cli.commands", "Reject what a step of a run shows."),
    Command("cancel", "infra.cli.commands", "Cancel a run, or a step of it."),
    Command("pause", "infra.cli.commands", "Pause a run, or stop it before a step."),
    Command("resume", "infra.cli.commands", "Go on with a run that is paused or stopped before a step."),
    Command("set-output", "infra.cli.commands", "Replace the output of a run's step."),
    Command("fork", "infra.cli.fork", "Start a new run from another one, as it was at any of its decisions."),
    Command("history", "infra.cli.histories", "Write a run's history to a file, to decide it again."),
    Command("verify", "infra.cli.verify", "Check runs: the hash chain, and each decision decided again."),
    Command("replay", "infra.cli.replay", "Step through a run: its state after each decision."),
    Command("backtest", "infra.cli.backtest", "Decide recorded history by another version of its workflow."),
    Command("sql", "infra.cli.sql", "Ask the views in SQL: runs, steps, calls, costs and all else, read-only."),
    Command("export", "infra.cli.export", "Copy topics into an archive of Parquet files, by day; again: go on."),
    Command("tail", "infra.cli.tail", "Show the events on the topics, decoded, as they come."),
    Command("deadletters", "infra.cli.deadletters", "List what couldn't be processed; redrive or discard it."),
    Command("deploy", "infra.cli.workflows", "Register workflows."),
    Command("workflows", "infra.cli.workflows", "List the registered workflows, or all versions of one."),
    Command("validate", "infra.cli.validate", "Find the mistakes in workflow definitions."),
    Command("diff", "infra.cli.diff", "Show what differs between two versions of a workflow."),
    Command("reference", "infra.cli.reference", "Print all that a workflow definition may say, as Markdown."),
    Command("model", "infra.cli.cluster", "Serve the local model in the foreground."),
    Command(
        "kafka", "infra.cli.kafka_tools", "Run one of Kafka's own console tools against the configured cluster.", passes_on=True
    ),
)

PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def command_line(arguments: Sequence[str]) -> typer.Typer:
    """Return the command line in which only the command that `arguments` call is loaded; of the others it knows the help."""
    app = typer.Typer(
        name="foldflow",
        help="LLM and tool workflows as a ledger on Kafka that you own.",
        epilog="Settings: environment variables FOLDFLOW_…, or foldflow.toml in the current folder.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    called = _called(arguments)
    for command in COMMANDS:
        if command.name != called:
            app.command(command.name, help=command.help)(_not_loaded)
            continue
        found = getattr(importlib.import_module(command.module), command.name.replace("-", "_"))
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=command.name)
        else:
            app.command(command.name, context_settings=PASSES_ON if command.passes_on else None)(found)
    return app


def _called(arguments: Sequence[str]) -> str | None:
    """Return the name of the command that these arguments call."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _not_loaded() -> None:
    raise AssertionError("a command that was not called was run")


def main() -> None:
    """Run the command line of this process."""
    faulthandler.enable()  # should a library's machine code fail, the log says where
    _say_strangers()
    try:
        command_line(sys.argv[1:])(prog_name="foldflow")
    except NewerCodeError as error:
        text = f"{error}\nThis `foldflow` is older than the processes that work on these topics: upgrade foldflow."
        print(text, file=sys.stderr)
        raise SystemExit(NEWER) from None
    except ValueError as error:
        from infra.cli.wrong_settings import mistakes  # noqa: PLC0415 - the settings take long to load, and help needs none

        lines = mistakes(error)
        if not lines:
            raise
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(WRONG_SETTINGS) from None


def _say_strangers() -> None:
    """Say which environment variables look like settings and are none: a slip of the pen would otherwise have no effect."""
    if _called(sys.argv[1:]) is None or not any(name.upper().startswith("FOLDFLOW_") for name in os.environ):
        return
    from infra.cli.wrong_settings import strangers  # noqa: PLC0415 - as above

    for line in strangers(os.environ):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
