"""One process of an installation: started until it is ready, sent signals, waited for."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import psutil

from events import topics
from infra.embedded.errors import EmbeddedError
from infra.embedded.supervisor import Supervisor
from streams import kafka
from streams.ends import ends
from streams.settings import Settings

READY_S: Final = 240.0


class Process(Protocol):
    """One slot's process, a role's or a broker's."""

    def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError if it isn't in time."""

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end; return its exit code, 0 where nobody can know, None: it still runs."""

    def pid(self) -> int | None:
        """Return its process id while it lives."""


class RoleProcess:
    """`foldflow worker ROLE` or `foldflow api`."""

    def __init__(self, role: str, name: str, environment: Mapping[str, str], folder: Path) -> None:
        self._arguments = ("api",) if role == "api" else ("worker", role)
        self._name, self._environment, self._folder = name, environment, folder
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / "logs" / f"{name}.log"

    def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError if it isn't in time."""
        self._starts += 1
        ready = self._folder / "ready" / f"{self._name}-{self._starts}"
        ready.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "infra.cli.main", *self._arguments],
                env={**self._environment, "FOLDFLOW_READY_FILE": str(ready)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._process = process
        deadline = time.monotonic() + READY_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._name} is not ready (exit code {process.poll()})")
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """Return its exit code, None while it runs."""
        if self._process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def pid(self) -> int | None:
        """Return its process id while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None


class BrokerProcess:
    """A broker of the embedded cluster, started by the supervisor of `foldflow up`."""

    one_at_a_time = threading.Lock()
    """Held while brokers are started or stopped: a second `up` or `down` on the same folder is refused meanwhile."""

    def __init__(self, supervisor: Supervisor, name: str) -> None:
        self._supervisor, self._name = supervisor, name
        self._seen: psutil.Process | None = None

    def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError if it isn't in time."""
        with self.one_at_a_time:
            try:
                self._supervisor.up(frozenset({self._name}))
            except EmbeddedError as error:
                raise RuntimeError(str(error)) from error
        for standing in self._supervisor.status():
            if standing.started.name == self._name:
                self._seen = standing.started.process()

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self._seen is not None:
            with suppress(psutil.NoSuchProcess):
                self._seen.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """Return 0 when it has ended: it isn't our child, so nobody knows its exit code. None: it still runs."""
        deadline = time.monotonic() + timeout_s
        while self.pid() is not None:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return 0

    def pid(self) -> int | None:
        """Return its process id while it lives."""
        with suppress(psutil.NoSuchProcess):
            if self._seen is not None and self._seen.is_running() and self._seen.status() != psutil.STATUS_ZOMBIE:
                return self._seen.pid
        return None


def views_behind(settings: Settings) -> int:
    """Return how many records the api's views are behind the topics as they end now.

    What the api itself says of that is as old as its last fetch. Raises OSError and KafkaUnreachableError.
    """
    with urllib.request.urlopen(f"http://{settings.api_host}:{settings.api_port}/health", timeout=20) as answer:
        read = {(each["topic"], each["partition"]): each["position"] for each in json.load(answer)["partitions"]}
    names = {(kafka.name(settings, topics.TOPICS[topic]), each): (topic, each) for topic, each in read if topic != "workers"}
    return sum(max(0, end - read[names[place]]) for place, end in ends(kafka.admin(settings), names).items())
