"""`foldflow up`, `down` and `status`: starts what the table of services says, watches it, and stops it in order.

Everything is started at once: Kafka's JVM, the model and the Python imports of the roles overlap, and the roles wait for
Kafka themselves. Each process is the leader of a session of its own, so Ctrl-C reaches the supervisor alone and Kafka can
be stopped last; with `--detach` they simply stay.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.processes import Started, State, created, last_lines, listener, read_state, stop_in_order, write_state
from infra.embedded.services import STOPPED_LAST, Service, run_folder, services
from streams.settings import Settings

READY_SECONDS = 120.0  # from its start until a process must be ready; a cold disk and a busy machine included
POLL_SECONDS = 0.05
LEAST_FREE_BYTES = 1 << 30
LOG_BYTES_KEPT = 10 << 20


@dataclass(frozen=True, slots=True)
class Standing:
    """How one process stands now."""

    started: Started
    condition: str
    """`ready`, `starting` or `dead`."""

    @property
    def obituary(self) -> str:
        """Say which process it was that died, and its last log lines."""
        return _obituary(self.started)

    @property
    def report(self) -> dict[str, object]:
        """What `foldflow status --json` says of it."""
        item = self.started
        return {"name": item.name, "condition": self.condition, "pid": item.pid, "address": item.address, "logs": list(item.logs)}


class Supervisor:
    """Starts and stops the processes of one data folder."""

    def __init__(self, settings: Settings, progress: Callable[[int, int, str], None] = lambda _done, _total, _name: None) -> None:
        # Children may run elsewhere one day, and `down` may be called from another folder with the same settings.
        self.settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
        self._progress = progress
        self._folder = run_folder(self.settings)
        self._state_file = self._folder / "state.json"
        self._write = threading.Lock()

    def status(self) -> list[Standing]:
        """Return every process that was started and not stopped since, dead ones included."""
        return [Standing(item, _condition(item)) for item in read_state(self._state_file).started]

    def up(self, only: frozenset[str] = frozenset(), *, foreground: bool = False) -> list[str]:
        """Start what isn't running and wait until all is ready; return the names of what was started.

        Raises `EmbeddedError` after stopping what it started when a port is taken, the disk is full, a download fails, or a
        process dies or isn't ready in time.
        """
        wanted = services(self.settings, only, self._progress)
        with self._only_one():
            state = read_state(self._state_file)
            running = {item.name for item in state.started if item.process() is not None}
            missing = [service for service in wanted if service.name not in running]
            if not missing:
                return []
            _check_disk(self.settings.data_dir)
            for service in missing:
                _check_ports(service)
            supervisor = (os.getpid(), created(os.getpid())) if foreground else None
            write_state(self._state_file, State(supervisor, tuple(item for item in state.started if item.name in running)))
            try:
                with ThreadPoolExecutor(len(missing)) as pool:
                    begun = list(pool.map(self._start, missing))
                self._wait_ready(missing, begun)
            except BaseException:
                self._stop({service.name for service in missing})
                raise
        return [service.name for service in missing]

    def watch(self) -> None:
        """Return when one of the processes has died: raises `EmbeddedError` that says which, and why."""
        while not (dead := [item.started for item in self.status() if item.condition == "dead"]):
            time.sleep(0.5)
        raise EmbeddedError(_obituary(dead[0]))

    def down(self) -> list[str]:
        """Stop everything, Kafka last; return the names of what was stopped."""
        state = read_state(self._state_file)
        supervisor = state.supervisor_process()
        if supervisor is not None and supervisor.pid != os.getpid():
            names = [item.started.name for item in self.status() if item.condition != "dead"]
            supervisor.send_signal(signal.SIGTERM)
            supervisor.wait(timeout=60)
            return names
        with self._only_one():
            return self._stop(None)

    def _stop(self, names: set[str] | None) -> list[str]:
        state = read_state(self._state_file)
        chosen = [item for item in state.started if names is None or item.name in names]
        stopped = stop_in_order(chosen, STOPPED_LAST)
        kept = tuple(item for item in state.started if item not in chosen)
        write_state(self._state_file, State(None if names is None else state.supervisor, kept))
        return stopped

    def _start(self, service: Service) -> Started:
        ready_file = self._folder / f"{service.name}.ready"
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        ready_file.unlink(missing_ok=True)
        command = service.command()
        log = service.logs[0]
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_BYTES_KEPT:
            log.replace(log.with_suffix(log.suffix + ".1"))
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 — commands of our own table
                command,
                env={**service.environment(), "FOLDFLOW_READY_FILE": str(ready_file)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        logs = tuple(str(path) for path in service.logs)
        item = Started(service.name, process.pid, created(process.pid), service.address, logs, str(ready_file))
        with self._write:
            state = read_state(self._state_file)
            write_state(self._state_file, replace(state, started=(*state.started, item)))
        return item

    def _wait_ready(self, wanted: Sequence[Service], begun: Sequence[Started]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        waiting = dict(zip(begun, wanted, strict=True))
        while waiting:
            for item, service in list(waiting.items()):
                if item.process() is None:
                    raise EmbeddedError(_obituary(item))
                if service.answers is not None and service.answers():
                    Path(item.ready_file).write_text(f"{item.pid}\n")
                if Path(item.ready_file).exists():
                    del waiting[item]
            if time.monotonic() > deadline:
                late = next(iter(waiting))
                raise EmbeddedError(f"{late.name} was not ready after {READY_SECONDS:.0f} s.\n{_tail(late)}")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """Refuse a second `up` or `down` on the same data folder while one is at work."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EmbeddedError(
                    f"Another `foldflow up` or `down` is at work on {self.settings.data_dir}; wait until it has finished."
                ) from error
            yield


def _condition(item: Started) -> str:
    if item.process() is None:
        return "dead"
    return "ready" if Path(item.ready_file).exists() else "starting"


def _obituary(item: Started) -> str:
    return f"{item.name} (pid {item.pid}) has died.\n{_tail(item)}"


def _tail(item: Started) -> str:
    lines = last_lines(item.logs)
    return (
        f"Last lines of its log ({item.logs[0]}):\n" + "\n".join(f"  {line}" for line in lines) if lines else "Its log is empty."
    )


def _check_disk(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise EmbeddedError(
            f"Only {free / (1 << 20):.0f} MiB are free on the disk of {folder}; Kafka stops for good when it can't write. "
            "Free at least 1 GiB, or set FOLDFLOW_DATA_DIR to a folder on another disk."
        )


def _check_ports(service: Service) -> None:
    for port in service.ports:
        with socket.socket() as probe:
            # As the servers themselves do: a connection that is just closing doesn't hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((port.host, port.number))
            except OSError as error:
                holder = listener(port.host, port.number)
                by = f"process {holder.pid} ({holder.name()})" if holder is not None else "another process"
                message = f"Port {port.number}, which {service.name} needs, is taken by {by}."
                raise EmbeddedError(f"{message} Stop that, or set {port.setting} to another port.") from error
