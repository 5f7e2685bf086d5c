"""The processes of one installation, each real: started, killed, stopped, continued, ended in order, and watched.

Whoever dies without being killed is noted and started again, as whatever supervises processes would.
"""

import json
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import schedule
from processes import BrokerProcess, Process, RoleProcess
from schedule import Disruption, Kind

from infra.embedded import quorum
from infra.embedded.errors import EmbeddedError
from infra.embedded.supervisor import Supervisor
from streams.settings import Settings

END_S: Final = 45.0
"""How long a process may take to end in order; it has 30 s for what it holds, see `streams/app.py`."""
WHOLE_S: Final = 60.0
EXCUSE_S: Final = 20.0
EXCUSED_FOR_S: Final = 60.0
"""Who dies within a minute of an outage of Kafka that lasted longer than 20 s did what it may: give up, to be started again."""


@dataclass(frozen=True, slots=True)
class Death:
    """A process ended by itself, or not as it was told."""

    at_ms: int
    name: str
    what: str
    last_lines: tuple[str, ...]
    excused: bool
    """Kafka had been away for longer than anybody must wait for it."""


class Farm:
    """All processes by the names of their slots, and what was done to them (`disruptions.jsonl`)."""

    def __init__(self, settings: Settings, folder: Path, brokers: int, witness: str) -> None:
        self.settings, self.folder, self.brokers = settings, folder, brokers
        self.supervisor = Supervisor(settings)
        self.deaths: list[Death] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.memory_mb: dict[str, float] = {}
        self.start_s: dict[str, list[float]] = {}
        self._environment = environment(settings) | {"CHAOS_WITNESS": witness}
        self._file = (folder / "disruptions.jsonl").open("a", buffering=1)
        self._lock, self._one_broker = threading.Lock(), threading.Lock()
        self._slots: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self.processes: dict[str, Process] = {
            name: self._process(role, name)
            for role in schedule.ROLES
            for name in (*schedule.slots(role, brokers), *schedule.extras(role))
        }
        self._should_run: set[str] = set()
        self._ready_at: dict[str, float] = {}
        self._over = self._closed = False
        self._away_since: dict[str, int] = {}
        self._outages: list[tuple[int, int]] = []

    def _process(self, role: str, name: str) -> Process:
        if role == "kafka":
            return BrokerProcess(self.supervisor, self._service(name))
        return RoleProcess(role, name, self._environment, self.folder)

    def _service(self, broker: str) -> str:
        """Return what the supervisor calls a broker: one alone has no number."""
        return broker if self.brokers > 1 else "kafka"

    # --- From the beginning to the end ---

    def start(self, *roles: str) -> None:
        """Start what is there from the start of these roles, and wait until all is ready."""
        names = [name for role in roles for name in schedule.slots(role, self.brokers)]
        if "kafka" in roles:  # together: one of three alone is never ready, since it has no quorum
            self.supervisor.up(frozenset(self._service(name) for name in schedule.slots("kafka", self.brokers)))
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(self._start, names))

    def restore(self) -> None:
        """Start again whatever isn't there."""
        for role in schedule.ROLES:
            for name in schedule.slots(role, self.brokers):
                self._start_again(name)

    def stop(self, *roles: str) -> None:
        """End these roles in order, all at once, which counts no more; who doesn't end, or says that it failed, is noted."""
        self._over = True
        names = [name for role in roles for name in (*schedule.slots(role, self.brokers), *schedule.extras(role))]
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(self._end, names))

    def down(self) -> None:
        """End everything, whatever it does, and close the books; also amid disruptions: nothing is started any more."""
        self._over = self._closed = True
        for _ in range(2):  # one may just have been started by a disruption that is under way
            for process in self.processes.values():
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGKILL)
            time.sleep(0.5)
        with BrokerProcess.one_at_a_time:
            self.supervisor.down()
        with self._lock:
            self._file.close()

    # --- What is done to one slot ---

    def disrupt(self, what: Disruption) -> None:
        """Do it, from its beginning to its end. In a thread of its own."""
        if what.role != "kafka" or self.brokers == 1:
            self._disrupt(what.kind, what.name, what.for_s)
            return
        with self._one_broker:
            self._wait_whole()
            self._disrupt(what.kind, self._active_controller() if what.name == schedule.CONTROLLER else what.name, what.for_s)

    def _disrupt(self, kind: Kind, name: str, for_s: float) -> None:
        with self._slots[name]:  # on a slow machine what was done last may not be over yet
            time.sleep(max(0.0, self._ready_at.get(name, 0.0) + schedule.LEAST_WORK_S / 2 - time.monotonic()))
            match kind:
                case "kill":
                    self._kill(name)
                    time.sleep(for_s)
                    self._start(name)
                case "stop":
                    self._stopped(name, for_s)
                case "terminate":
                    self._end(name)
                    time.sleep(for_s)
                    self._start(name)
                case "extra":
                    self._start(name)
                    time.sleep(for_s)
                    self._end(name)

    def _active_controller(self) -> str:
        return f"kafka-{quorum.active_controller(self.settings.bootstrap_servers)}"

    def _kill(self, name: str) -> None:
        with self._noting("kill", name):
            self._should_run.discard(name)
            self.processes[name].signal(signal.SIGKILL)
            self.processes[name].wait(10)

    def _stopped(self, name: str, for_s: float) -> None:
        with self._noting("stop", name):
            self.processes[name].signal(signal.SIGSTOP)
            time.sleep(for_s)
            self.processes[name].signal(signal.SIGCONT)

    def _end(self, name: str) -> None:
        if self.processes[name].pid() is None:
            return
        with self._noting("terminate", name):
            self._should_run.discard(name)
            self.processes[name].signal(signal.SIGTERM)
            code = self.processes[name].wait(END_S)
            if code is None:
                self.processes[name].signal(signal.SIGKILL)
                self.processes[name].wait(10)
        if code != 0:
            self._note_death(name, f"told to end, exit code {code}" if code else f"told to end, still there after {END_S:.0f} s")

    def _start(self, name: str) -> None:
        began = time.monotonic()
        for attempt in range(3):
            if self._closed:
                return
            with self._noting("start", name):
                try:
                    self.processes[name].start()
                except RuntimeError as error:
                    self._note_death(name, f"start {attempt + 1}: {error}")
                    self.processes[name].signal(signal.SIGKILL)
                    continue
            self._should_run.add(name)
            self._ready_at[name] = time.monotonic()
            self.start_s.setdefault(name.rpartition("-")[0], []).append(time.monotonic() - began)
            return

    def _start_again(self, name: str) -> None:
        with self._slots[name]:
            if self.processes[name].pid() is None:
                self._start(name)

    def _wait_whole(self) -> None:
        """Wait until every partition has all its replicas again: one broker at a time is what a cluster of three bears."""
        deadline = time.monotonic() + WHOLE_S
        while time.monotonic() < deadline:
            with suppress(EmbeddedError):
                if not quorum.missing_replicas(self.settings.bootstrap_servers):
                    return
            time.sleep(0.25)
        self._note_death("kafka-1", f"replicas were not whole within {WHOLE_S:.0f} s")

    # --- Watching ---

    def watch(self) -> None:
        """Note who has died by itself and start it again; note how much memory each role has."""
        for name in sorted(self._should_run):
            process = self.processes[name]
            pid = process.pid()
            if pid is not None:
                self._note_memory(name, pid)
            elif name in self._should_run:
                self._should_run.discard(name)
                self._note_death(name, f"died by itself, exit code {process.wait(1)}")
                threading.Thread(target=self._start_again, args=(name,), daemon=True).start()

    def _note_memory(self, name: str, pid: int) -> None:
        role = name.rpartition("-")[0]
        with suppress(psutil.Error):
            self.memory_mb[role] = max(self.memory_mb.get(role, 0.0), psutil.Process(pid).memory_info().rss / 1e6)

    def _note_death(self, name: str, what: str) -> None:
        process = self.processes[name]
        lines = process.log.read_text(errors="replace").splitlines()[-12:] if isinstance(process, RoleProcess) else []
        self.deaths.append(Death(_now(), name, what, tuple(lines), self._without_kafka()))

    def _without_kafka(self) -> bool:
        """Say whether Kafka was away for long lately, as a whole: of several brokers one at a time is missed by nobody."""
        until = _now()
        with self._lock:
            outages = [*self._outages, *((since, until) for since in self._away_since.values())]
        return self.brokers == 1 and any(
            end - begin > 1000 * EXCUSE_S and until - end < 1000 * EXCUSED_FOR_S for begin, end in outages
        )

    @contextmanager
    def _noting(self, kind: str, name: str) -> Iterator[None]:
        """Note what is done to a slot, from just before it to its end."""
        at_ms = _now()
        try:
            yield
        finally:
            self._noted(at_ms, kind, name)

    def _noted(self, at_ms: int, kind: str, name: str) -> None:
        role = name.rpartition("-")[0]
        line = {"at_ms": at_ms, "until_ms": _now(), "kind": kind, "role": role, "name": name}
        with self._lock:
            self.counts[role, kind] += not self._over
            if role == "kafka" and kind == "start":
                self._outages.append((self._away_since.pop(name, _now()), _now()))
            elif role == "kafka":
                self._away_since[name] = at_ms
            if role == "kafka" and kind == "stop":
                self._outages.append((self._away_since.pop(name), _now()))
            if not self._file.closed:
                self._file.write(json.dumps(line) + "\n")


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a process with these very settings, whatever the environment says here."""
    values: dict[str, Any] = settings.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
    own = {f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()}
    return {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")} | own


def logs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each process's log."""
    for path in sorted((folder / "logs").glob("*.log")):
        yield path.stem, path.read_text(errors="replace")


def _now() -> int:
    return time.time_ns() // 1_000_000
