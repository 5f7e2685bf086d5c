"""Starts again what dies: in the foreground as part of `foldflow up`, else as a small process of its own.

A process that died is started again after a pause that grows while it keeps dying. One that fails again and again before it
is ever ready is given up, and the rest goes on. The keeper holds nothing that anybody needs: killed itself, it takes nothing
with it, and the next `foldflow up` starts another one.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.processes import Started, last_lines
from infra.embedded.services import Service, environment_of, services
from infra.embedded.supervisor import Supervisor, is_ready, obituary, spawn
from streams.settings import Settings

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
STEADY_SECONDS = 60.0
"""One that has lived for so long has recovered: should it die, the pause is short again."""
MOST_FAILURES = 5
"""So many starts in a row that never became ready, and it is given up."""
LOOK_SECONDS = 0.5
TAKEOVER_SECONDS = 30.0


@dataclass(slots=True)
class Patience:
    """How long one process that keeps dying is waited for, and whether at all."""

    failures: int = 0
    pause: float = FIRST_PAUSE

    def after_death(self, lived_s: float, *, was_ready: bool) -> float | None:
        """Return the seconds to wait before it is started again; None: give it up."""
        self.failures = 0 if was_ready else self.failures + 1
        if self.failures >= MOST_FAILURES:
            return None
        if lived_s >= STEADY_SECONDS:
            self.pause = FIRST_PAUSE
        now, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        return now


@dataclass(slots=True)
class _Watched:
    """What the keeper knows of one name."""

    pid: int
    patience: Patience = field(default_factory=Patience)
    due: float | None = None
    """When it is started again, on the monotonic clock; None while it lives, or when it was given up."""


class Keeper:
    """Watches over the processes of a data folder. `tell` takes what a person should read, a few lines each."""

    def __init__(self, supervisor: Supervisor, tell: Callable[[str], None]) -> None:
        self._supervisor = supervisor
        self._tell = tell
        self._watched: dict[str, _Watched] = {}
        self._trouble = ""

    def keep(self, stopped: threading.Event) -> bool:
        """Return once `stopped` is set (true), or when somebody else has become the supervisor or ended everything (false)."""
        while not stopped.is_set():
            # While `up` or `down` is at work, what dies is theirs.
            with self._supervisor.changing() as free:
                if free:
                    self._look_in_spite_of_trouble()
            if not self._supervisor.is_supervisor():
                return False
            stopped.wait(LOOK_SECONDS)
        return True

    def _look_in_spite_of_trouble(self) -> None:
        """Go on where a file can't be written, on a full disk for example; say so once."""
        try:
            self._look()
            self._trouble = ""
        except OSError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                with suppress(OSError):
                    self._tell(f"What dies can't be started again now: {error}")

    def _look(self) -> None:
        for item in self._supervisor.state().started:
            watched = self._watched.get(item.name)
            if watched is None or watched.pid != item.pid:  # somebody else started it
                watched = self._watched[item.name] = _Watched(item.pid)
            if item.process() is not None:
                self._ask(item)
            elif watched.due is None and not item.given_up:
                self._mourn(item, watched)
            elif watched.due is not None and time.monotonic() >= watched.due:
                self._start(item, watched)

    def _ask(self, item: Started) -> None:
        """See whether a process that starts is ready by now."""
        if not Path(item.ready_file).exists():
            with suppress(EmbeddedError):  # settings that no longer make sense: nothing to be asked
                is_ready(item, self._service(item)[1])

    def _mourn(self, item: Started, watched: _Watched) -> None:
        """Decide what happens to a process that was found dead, and tell it."""
        was_ready = Path(item.ready_file).exists()
        self._decide(item, watched, obituary(item), time.time() - item.created, was_ready=was_ready)

    def _decide(self, item: Started, watched: _Watched, what: str, lived_s: float, *, was_ready: bool) -> None:
        pause = watched.patience.after_death(lived_s, was_ready=was_ready)
        if pause is None:
            self._supervisor.remember(replace(item, given_up=True))
            self._tell(
                f"{what}\n{item.name} is given up: {MOST_FAILURES} starts in a row failed. The rest goes on; "
                "`foldflow up` tries it again."
            )
        else:
            watched.due = time.monotonic() + pause
            self._tell(f"{what}\n{item.name} is started again in {pause:.0f} s.")

    def _start(self, item: Started, watched: _Watched) -> None:
        watched.due = None
        try:
            supervisor, service = self._service(item)
            begun = supervisor.start(service, item.restarts + 1)
        except (EmbeddedError, OSError) as error:
            self._decide(item, watched, f"{item.name} could not be started: {error}", 0, was_ready=False)
        else:
            watched.pid = begun.pid
            self._tell(f"{begun.name} was started again (pid {begun.pid}, restart {begun.restarts}).")

    def _service(self, item: Started) -> tuple[Supervisor, Service]:
        """Return how a process is started again: with the settings that it had, whoever started it."""
        try:
            settings = Settings(**item.settings) if item.settings else self._supervisor.settings
        except ValueError as error:  # written by another version
            raise EmbeddedError(f"The settings that it was started with are not understood: {error}") from error
        supervisor = Supervisor(settings)
        found = services(supervisor.settings, frozenset({item.name}), lambda _done, _total, _name: None)
        if not found:
            raise EmbeddedError("Its settings don't say how it is started.")
        return supervisor, found[0]


def ensure(supervisor: Supervisor, *, anew: bool) -> int | None:
    """See to it that a keeper runs in the background, unless a `foldflow up` in the foreground watches; return a new one's pid.

    `anew` replaces a keeper that runs: what was just started may need what is in this process's environment. Raises
    `EmbeddedError` when the keeper doesn't come up.
    """
    state = supervisor.state()
    watching = state.supervisor_process() is not None
    if not state.started or (watching and (state.foreground or not anew)):
        return None
    log = log_file(supervisor.settings)
    command = [sys.executable, "-P", "-m", "infra.embedded.keeper"]
    process = spawn(command, {**os.environ, **environment_of(supervisor.settings)}, log)
    deadline = time.monotonic() + TAKEOVER_SECONDS
    while (supervisor.state().supervisor or (0,))[0] != process.pid:
        if process.poll() is not None or time.monotonic() > deadline:
            lines = "\n".join(f"  {line}" for line in last_lines([str(log)]))
            raise EmbeddedError(f"All runs, but the process that starts again what dies didn't come up ({log}):\n{lines}")
        time.sleep(0.02)
    return process.pid


def log_file(settings: Settings) -> Path:
    """Where the keeper in the background tells what it does."""
    return settings.data_dir / "logs" / "up.log"


def main() -> None:
    """Keep until SIGTERM, which stops the keeper alone."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopped.set())
    supervisor = Supervisor(Settings())
    supervisor.become_supervisor()
    Keeper(supervisor, _log).keep(stopped)


def _log(text: str) -> None:
    print(time.strftime("%Y-%m-%dT%H:%M:%S"), text, flush=True)  # noqa: T201 — this process's log is its output


if __name__ == "__main__":
    main()
