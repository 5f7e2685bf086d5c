"""The processes that were started on this machine: what is remembered of them, whether they live, how they end.

A process is known by its pid **and** its creation time, so a pid that the system gave to somebody else is never taken for ours.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from infra.embedded.errors import EmbeddedError

STOP_SECONDS = 20.0  # Kafka writes its last segments; the first stop also leaves a class cache behind
KILL_SECONDS = 5.0
CREATION_TOLERANCE = 0.05  # seconds; psutil derives it from clock ticks


@dataclass(frozen=True, slots=True)
class Started:
    """One process that `foldflow up` started."""

    name: str
    pid: int
    created: float
    """Creation time in seconds since the epoch, as psutil tells it."""
    address: str
    logs: tuple[str, ...]
    ready_file: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What it was started with (JSON), so that it is started again just so."""
    restarts: int = 0
    """How often it was started again by itself."""
    given_up: bool = False
    """Whether it failed so often before it was ready that it is not started again by itself."""

    def process(self) -> psutil.Process | None:
        """Return the living process, or None if it ended (also when its pid belongs to somebody else by now)."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < CREATION_TOLERANCE and lives(process):
                return process
        return None

    def is_ready(self) -> bool:
        """Whether the process lives and has said that it is ready."""
        return Path(self.ready_file).exists() and self.process() is not None


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs; one that has ended and was not collected by its parent yet does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def created(pid: int) -> float:
    """Creation time of a process that lives."""
    return float(psutil.Process(pid).create_time())


@dataclass(frozen=True, slots=True)
class State:
    """What the state file says: who starts again what dies, if anybody does, and all processes in start order."""

    supervisor: tuple[int, float] | None = None
    started: tuple[Started, ...] = ()
    foreground: bool = True
    """Whether the supervisor is a `foldflow up` in the foreground, which stops everything when it ends."""

    def supervisor_process(self) -> psutil.Process | None:
        """Return the living supervisor, if there is one."""
        if self.supervisor is None:
            return None
        pid, moment = self.supervisor
        return Started("up", pid, moment, "", (), "").process()


def read_state(path: Path) -> State:
    """Read the state file; a missing one means that nothing was started."""
    if not path.exists():
        return State()
    raw = json.loads(path.read_text())
    supervisor = raw["supervisor"]
    started = tuple(Started(**{**item, "logs": tuple(item["logs"])}) for item in raw["started"])
    return State((supervisor[0], supervisor[1]) if supervisor else None, started, raw.get("foreground", True))


def write_state(path: Path, state: State) -> None:
    """Replace the state file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    # For its owner alone: settings may hold a password of Kafka's.
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(json.dumps(asdict(state), indent=2) + "\n")
    part.replace(path)


def stop(processes: Sequence[psutil.Process]) -> None:
    """End these processes together: ask, wait up to `STOP_SECONDS`, then kill what is left."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in wait_ended(processes, STOP_SECONDS):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    stubborn = wait_ended(processes, KILL_SECONDS)
    if stubborn:
        raise EmbeddedError(f"Could not be stopped, not even by SIGKILL: {', '.join(str(process.pid) for process in stubborn)}.")


def wait_ended(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until these processes have ended; return those that still live after so many seconds.

    `psutil.wait_procs` would also wait until somebody has collected them, which takes a second where that is a slow init.
    """
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def stop_in_order(started: Iterable[Started], last: Sequence[str]) -> list[str]:
    """Stop all that live: first those not in `last`, together, then those of `last` one kind after the other.

    A name stands for its numbered ones as well (`kafka` for `kafka-1`, `kafka-2` …). Return the names of what was stopped.
    """
    alive = [(item, process) for item in in_order(started, last) if (process := item.process()) is not None]
    stop([process for item, process in alive if _kind(item) not in last])
    for name in last:
        stop([process for item, process in alive if _kind(item) == name])
    return [item.name for item, _ in alive]


def in_order(started: Iterable[Started], last: Sequence[str]) -> list[Started]:
    """Return them as they are to be stopped: those of `last` come last."""
    return sorted(started, key=lambda item: last.index(_kind(item)) if _kind(item) in last else -1)


def _kind(item: Started) -> str:
    name, dash, number = item.name.rpartition("-")
    return name if dash and number.isdigit() else item.name


def last_lines(logs: Iterable[str], count: int = 20) -> list[str]:
    """Return the last lines of the first log file that has any; a worker writes ten more after the error that ended it."""
    for log in logs:
        path = Path(log)
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 20_000))
                return file.read().decode(errors="replace").splitlines()[-count:]
    return []


def listener(host: str, port: int) -> psutil.Process | None:
    """Return the process that listens on a port of this machine, if the system tells us."""
    addresses = {host, f"::ffff:{host}", "0.0.0.0", "::"}  # noqa: S104 — what others may have bound; Java writes IPv4 as IPv6
    with suppress(psutil.AccessDenied, psutil.NoSuchProcess):
        for connection in psutil.net_connections("tcp"):
            at = connection.laddr
            if connection.status == psutil.CONN_LISTEN and at and at.port == port and at.ip in addresses:
                return psutil.Process(connection.pid) if connection.pid else None
    return None
