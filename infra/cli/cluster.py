"""`foldflow up`, `down`, `status` and `model`: what runs on this machine."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from infra.embedded.errors import EmbeddedError
from streams.settings import Settings

DEAD, NOTHING = 1, 3

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def up(
    only: Annotated[str, typer.Option(help="Start these alone, separated by commas: kafka, model, intake, …")] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once all is ready and leave it running.")] = False,
    brokers: Annotated[
        int | None, typer.Option(min=1, max=9, help="Make Kafka a cluster of so many brokers; 3 survive one.")
    ] = None,
) -> None:
    """Start Kafka, the local model, the workers and the API on this machine, and wait until each is ready.

    The first time, Kafka's jars are downloaded (45 MB). Where the settings name another Kafka or another model, those are
    used and not started here. Without --detach it stays in the foreground; Ctrl-C stops everything in order. What dies later is
    started again after a pause; with --detach a small process of its own sees to that, which tells what it does in logs/up.log.

    For example:

        foldflow up

        foldflow up --detach && foldflow status

        foldflow up --only kafka,model --detach

        foldflow up --brokers 3 --detach

    Exit codes: 0 all is ready (or already was), 1 something could not be started.
    """
    from infra.embedded import keeper  # noqa: PLC0415 — not needed for --help
    from infra.embedded.services import with_brokers  # noqa: PLC0415
    from infra.embedded.supervisor import Supervisor  # noqa: PLC0415

    names = frozenset(name.strip() for name in only.split(",") if name.strip())
    with _told(), _progress() as progress:
        supervisor = Supervisor(Settings() if brokers is None else with_brokers(Settings(), brokers), progress)
        if not detach:
            # `down` from another terminal ends us with SIGTERM: same way out as Ctrl-C (which a shell's `&` would ignore).
            signal.signal(signal.SIGTERM, _interrupt)
            signal.signal(signal.SIGINT, _interrupt)
        try:
            started = supervisor.up(names, foreground=not detach)
            in_background = keeper.ensure(supervisor, anew=bool(started)) if detach or not started else None
        except KeyboardInterrupt:
            _say("Stopped.")
            raise typer.Exit(130) from None
    stopped = threading.Event()
    if started and not detach:  # from now on the way out is to stop everything; a second Ctrl-C must not leave half of it running
        signal.signal(signal.SIGTERM, lambda _number, _frame: stopped.set())
        signal.signal(signal.SIGINT, lambda _number, _frame: stopped.set())
    if not started:
        _say("Already up; nothing was started.")
    _table(supervisor.status())
    if supervisor.settings.bootstrap_servers != Settings().bootstrap_servers:
        own = supervisor.settings
        _say(
            "Commands in other terminals reach Kafka while its first broker lives; to have all:\n  export "
            f"FOLDFLOW_BOOTSTRAP_SERVERS={own.bootstrap_servers} FOLDFLOW_REPLICATION_FACTOR={own.replication_factor}"
        )
    if in_background is not None:
        log = keeper.log_file(supervisor.settings)
        _say(f"Process {in_background} starts again what dies, and says so in {log}.")
    if started and not detach:
        _say("Ready. Ctrl-C stops everything.")
        _keep(supervisor, stopped)


def _keep(supervisor: Any, stopped: threading.Event) -> None:
    """Watch in the foreground until somebody ends it, then stop everything."""
    from infra.embedded.keeper import Keeper  # noqa: PLC0415

    if not Keeper(supervisor, _say).keep(stopped):
        _say("Another `foldflow up` watches over all this now.")
        return
    _say("Stopping …")
    with _told():
        _say(f"Stopped: {', '.join(supervisor.down())}.")


def down() -> None:
    """Stop everything that `up` started, Kafka last. Data is kept.

    Exit codes: 0 stopped (or nothing ran), 1 something could not be stopped.
    """
    from infra.embedded.supervisor import Supervisor  # noqa: PLC0415

    with _told():
        stopped = Supervisor(Settings()).down()
    _say(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")


def status(as_json: Json = False) -> None:
    """Show what runs, where it listens and where it logs.

    Exit codes: 0 all is ready, 1 something is dead, given up or still starting, 3 nothing was started.
    """
    from infra.embedded.supervisor import Supervisor  # noqa: PLC0415

    supervisor = Supervisor(Settings())
    standings = supervisor.status()
    if as_json:
        print(json.dumps([standing.report for standing in standings], indent=2))
    elif standings:
        _table(standings)
        for standing in standings:
            if standing.condition in {"dead", "given up"}:
                _say(standing.obituary)
        if supervisor.state().supervisor_process() is None:
            _say("What dies is not started again by itself; `foldflow up` sees to that.")
    else:
        _say("Nothing is running. Start it with: foldflow up")
    if not standings:
        raise typer.Exit(NOTHING)
    if any(standing.condition != "ready" for standing in standings):
        raise typer.Exit(DEAD)


def model() -> None:
    """Serve the local model (SmolLM2) in the foreground, with OpenAI's HTTP interface, at the address of the settings.

    `foldflow up` runs this by itself.
    """
    from infra.embedded.model import serve  # noqa: PLC0415

    with _told():
        serve(Settings())


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _told() -> Iterator[None]:
    """Turn an expected failure into its message and exit code 1."""
    try:
        yield
    except EmbeddedError as error:
        _say(str(error))
        raise typer.Exit(1) from error


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show on a terminal that it is starting, and the download; in a log, one line at its begin and its end."""
    if not sys.stderr.isatty():

        def line(done: int, total: int, _name: str) -> None:
            if done in {1, total}:
                _say(f"Downloading Kafka: {done} of {total} jars")

        yield line
        return
    from rich.console import Console  # noqa: PLC0415 — only for a person

    with Console(stderr=True).status("Starting …") as spinner:
        yield lambda done, total, name: spinner.update(f"Downloading Kafka, once: {done} of {total} jars ({name})")


def _table(standings: Sequence[Any]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table("name", "", "pid", "listens at", "log", box=None)
    colours = {"ready": "green", "starting": "yellow", "dead": "red", "given up": "red"}
    for standing in standings:
        item = standing.started
        condition = (
            f"[{colours[standing.condition]}]{standing.condition}[/]{f' (restart {item.restarts})' if item.restarts else ''}"
        )
        table.add_row(item.name, condition, str(item.pid), item.address, item.logs[-1])
    Console(soft_wrap=True).print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
