"""`foldflow up`, `down` and `status`: starts what the table of services says, and stops it in order (`keeper` watches it).

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
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.nursery import Nursery
from infra.embedded.processes import (
    Started,
    State,
    created,
    in_order,
    last_lines,
    listener,
    read_state,
    stop_in_order,
    wait_ended,
    write_state,
)
from infra.embedded.services import STARTED_LAST, STOPPED_LAST, Service, completed, run_folder, services
from streams import data_folder
from streams.settings import Settings

READY_SECONDS = 120.0  # from its start until a process must be ready; a cold disk and a busy machine included
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 10.0  # the supervisor holds the lock for the moment in which it starts a process again
SUPERVISOR_SECONDS = 90.0  # until a supervisor has ended: one in the foreground stops everything first, Kafka last
_PORT_FREED_S = 3.0  # until a port is free that nobody listens at any more
LEAST_FREE_BYTES = 1 << 30
LOG_BYTES_KEPT = 10 << 20
LINE_CHARACTERS = 300  # of a log's line that is told; Kafka writes some of thousands


@dataclass(frozen=True, slots=True)
class Standing:
    """How one process stands now."""

    started: Started
    condition: str
    """`ready`, `starting`, `dead` or `given up` (dead, and not started again by itself)."""

    @property
    def obituary(self) -> str:
        """Say which process it was that died, and its last log lines."""
        return obituary(self.started)

    @property
    def report(self) -> dict[str, object]:
        """What `foldflow status --json` says of it."""
        item = self.started
        return {
            "name": item.name,
            "condition": self.condition,
            "pid": item.pid,
            "restarts": item.restarts,
            "address": item.address,
            "logs": list(item.logs),
        }


class Supervisor:
    """Starts and stops the processes of one data folder."""

    def __init__(self, settings: Settings, progress: Callable[[int, int, str], None] = lambda _done, _total, _name: None) -> None:
        # Children may run elsewhere one day, and `down` may be called from another folder with the same settings.
        self.settings = completed(settings).model_copy(update={"data_dir": settings.data_dir.absolute()})
        self._progress = progress
        self._folder = run_folder(self.settings)
        self._state_file = self._folder / "state.json"
        self._write = threading.Lock()

    def status(self) -> list[Standing]:
        """Return every process that was started and not stopped since, dead ones included."""
        return [Standing(item, condition(item)) for item in self.state().started]

    def state(self) -> State:
        """Return what is remembered of all this."""
        return read_state(self._state_file)

    def up(self, only: frozenset[str] = frozenset(), *, foreground: bool = False) -> list[str]:
        """Start what isn't running and wait until all is ready; return the names of what was started.

        With `foreground` this process becomes the supervisor, and must `keep`, or nobody starts again what dies.

        Raises `EmbeddedError` after stopping what it started when a port is taken, the data folder can't be used, the disk is
        full, a download fails, or a process dies or isn't ready in time.
        """
        _check_folder(self.settings)
        wanted = services(self.settings, only, self._progress)
        with self._only_one():
            state = self.state()
            running = {item.name for item in state.started if item.process() is not None}
            missing = [service for service in wanted if service.name not in running]
            if not missing:
                return []
            _check_disk(self.settings.data_dir)
            for service in missing:
                _check_ports(service)
            state = replace(
                state, started=tuple(item for item in state.started if item.name not in {each.name for each in missing})
            )
            write_state(self._state_file, replace(state, supervisor=_self(), foreground=True) if foreground else state)
            try:
                with _nursery(missing) as nursery:
                    for last in (False, True):
                        these = [service for service in missing if (service.name in STARTED_LAST) == last]
                        with ThreadPoolExecutor(max(1, len(these))) as pool:
                            begun = list(pool.map(partial(self.start, nursery=nursery), these))
                        self._wait_ready(these, begun)
            except BaseException:
                self._stop({service.name for service in missing})
                raise
        return [service.name for service in missing]

    def become_supervisor(self) -> None:
        """Take over in the background: whoever was the supervisor notices, and ends without stopping anything."""
        with self._only_one():
            write_state(self._state_file, replace(self.state(), supervisor=_self(), foreground=False))

    def is_supervisor(self) -> bool:
        """Whether this process is (still) the one that starts again what dies."""
        supervisor = self.state().supervisor_process()
        return supervisor is not None and supervisor.pid == os.getpid()

    @contextmanager
    def changing(self) -> Iterator[bool]:
        """Hold off `up` and `down` meanwhile; false when one of them is at work, or somebody else is the supervisor now."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._only_one(patience_s=0))
            except _BusyError:
                yield False
                return
            yield self.is_supervisor()

    def remember(self, item: Started) -> None:
        """Write down what has become of a process, in place of what was known by its name."""
        with self._write:
            state = self.state()
            write_state(
                self._state_file, replace(state, started=(*(each for each in state.started if each.name != item.name), item))
            )

    def down(self) -> list[str]:
        """Stop everything, Kafka last; return the names of what was stopped.

        Raises `EmbeddedError` for what can't be stopped, and for a data folder that can't be used.
        """
        _check_folder(self.settings)
        alive = [item.started for item in self.status() if item.started.process() is not None]
        names = [item.name for item in in_order(alive, STOPPED_LAST)]
        supervisor = self.state().supervisor_process()
        if supervisor is not None and supervisor.pid != os.getpid():
            supervisor.send_signal(signal.SIGTERM)
            if wait_ended([supervisor], SUPERVISOR_SECONDS):
                raise EmbeddedError(f"The `foldflow up` that watches over these, process {supervisor.pid}, does not end.")
        with self._only_one():
            # One in the foreground has stopped everything itself.
            stopped = self._stop(None)
        return [*names, *(name for name in stopped if name not in names)]

    def _stop(self, names: set[str] | None) -> list[str]:
        state = self.state()
        chosen = [item for item in state.started if names is None or item.name in names]
        stopped = stop_in_order(chosen, STOPPED_LAST)
        kept = tuple(item for item in state.started if item not in chosen)
        write_state(self._state_file, State() if names is None else replace(state, started=kept))
        return stopped

    def start(self, service: Service, restarts: int = 0, nursery: Nursery | None = None) -> Started:
        """Start one process, of ours from a nursery if there is one, and remember it. Raises `EmbeddedError` and OSError."""
        ready_file = self._folder / f"{service.name}.ready"
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        ready_file.unlink(missing_ok=True)
        environment = {**service.environment(), "FOLDFLOW_READY_FILE": str(ready_file)}
        if nursery is not None and service.arguments:
            pid = nursery.start(service.arguments, environment, log_file(service.logs[0]))
        else:
            pid = spawn(service.command(), environment, service.logs[0]).pid
        logs = tuple(str(path) for path in service.logs)
        settings = self.settings.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
        item = Started(service.name, pid, created(pid), service.address, logs, str(ready_file), settings, restarts)
        try:
            self.remember(item)
        except OSError:  # a full disk, say; what nobody knows of would never be stopped
            os.kill(pid, signal.SIGKILL)
            raise
        return item

    def _wait_ready(self, wanted: Sequence[Service], begun: Sequence[Started]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        waiting = dict(zip(begun, wanted, strict=True))
        while waiting:
            for item, service in list(waiting.items()):
                if item.process() is None:
                    raise EmbeddedError(obituary(item))
                if is_ready(item, service):
                    del waiting[item]
            if time.monotonic() > deadline:
                late = next(iter(waiting))
                raise EmbeddedError(f"{late.name} was not ready after {READY_SECONDS:.0f} s.\n{_tail(late)}")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _only_one(self, patience_s: float = PATIENCE_SECONDS) -> Iterator[None]:
        """Refuse a second `up` or `down` on the same data folder while one is at work."""
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience_s
        with (self._folder / "lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        raise _BusyError(
                            f"Another `foldflow up` or `down` is at work on {self.settings.data_dir}; wait until it has finished."
                        ) from error
                time.sleep(POLL_SECONDS)
            yield


class _BusyError(EmbeddedError):
    """Somebody else changes what runs."""


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, its output appended to a log file."""
    with log_file(log).open("ab") as output:
        return subprocess.Popen(  # noqa: S603 — commands of our own table
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def log_file(log: Path) -> Path:
    """Return a log file that a process may append to; what it held is kept aside when that was much."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES_KEPT:
        log.replace(log.with_suffix(log.suffix + ".1"))
    return log


@contextmanager
def _nursery(services_: Sequence[Service]) -> Iterator[Nursery | None]:
    """Keep a nursery where several processes of ours are to be started: for one it would be a detour, and macOS forbids it."""
    ours = [service for service in services_ if service.arguments]
    if len(ours) < 2 or sys.platform != "linux":  # noqa: PLR2004
        yield None
        return
    with Nursery(ours[0].environment()) as nursery:
        yield nursery


def is_ready(item: Started, service: Service) -> bool:
    """Whether a process that lives is ready; asks those that don't say so by themselves."""
    if Path(item.ready_file).exists():
        return True
    if service.answers is None or not service.answers():
        return False
    Path(item.ready_file).write_text(f"{item.pid}\n")
    return True


def condition(item: Started) -> str:
    """How a process stands now: see `Standing.condition`."""
    if item.process() is None:
        return "given up" if item.given_up else "dead"
    return "ready" if Path(item.ready_file).exists() else "starting"


def obituary(item: Started) -> str:
    """Say which process it was that died, and its last log lines."""
    return f"{item.name} (pid {item.pid}) has died.\n{_tail(item)}"


def _self() -> tuple[int, float]:
    return os.getpid(), created(os.getpid())


def _tail(item: Started) -> str:
    for log in item.logs:
        if lines := last_lines([log]):
            return f"Last lines of its log ({log}):\n" + "\n".join(f"  {line[:LINE_CHARACTERS]}" for line in lines)
    return "Its log is empty."


def _check_folder(settings: Settings) -> None:
    try:
        data_folder.make(settings)
    except data_folder.DataFolderError as error:
        raise EmbeddedError(str(error)) from error


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
        deadline = time.monotonic() + _PORT_FREED_S
        while (error := _taken(port.host, port.number)) is not None:
            holder = listener(port.host, port.number)
            # Who was killed a moment ago is still giving up what it had, and is nobody that listens.
            if holder is None and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            by = f"process {holder.pid} ({holder.name()})" if holder is not None else "another process"
            message = f"Port {port.number}, which {service.name} needs, is taken by {by}."
            raise EmbeddedError(f"{message} Stop that, or set {port.setting} to another port.") from error


def _taken(host: str, port: int) -> OSError | None:
    with socket.socket() as probe:
        # As the servers themselves do: a connection that is just closing doesn't hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None
