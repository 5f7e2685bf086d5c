"""What each process of the processors says of itself, on the topic `workers`.

A report is written when it is ready, when a circuit changes its state, when anything else has changed (looked at every
`EVERY_S`), and every `HEARTBEAT_S` in any case; a tombstone at its end.

A thread and a producer of its own: no event passes through here, and what waits for the broker here holds up nobody.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

import structlog

from events import topics
from events.frozen import frozen
from events.workers import CircuitReported, WorkerReported
from streams import kafka
from streams.envelope import Outgoing, cloud_event, envelope
from streams.settings import Settings

log = structlog.get_logger()

EVERY_S: Final = 10.0
HEARTBEAT_S: Final = 30.0
_FAREWELL_S: Final = 3.0
"""How long the end of a process waits for its tombstone to be acknowledged: without it, it counts as silent some time later."""


@frozen
class Condition:
    """How a process is now; the fields as in WorkerReported."""

    in_flight: int = 0
    concurrency: int = 0
    partitions: tuple[int, ...] = ()
    breakers: tuple[CircuitReported, ...] = ()


class Reporter:
    """Reports a process. `look` says how it is, in any thread; `start` it when the process is ready, and `stop` it at its end."""

    def __init__(self, settings: Settings, role: str) -> None:
        self.look: Callable[[], Condition] = Condition
        self.worker_id = f"{role}-{uuid.uuid4().hex[:8]}"
        self._settings, self._role = settings, role
        self._started_at = _now_ms()
        self._host, self._version = socket.gethostname(), version("foldflow")
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Report from now on."""
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Report at once. From any thread, without waiting."""
        self._wake.set()

    def stop(self) -> None:
        """Say that this process has stopped, and wait for it a little."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * _FAREWELL_S)

    def _run(self) -> None:
        # What can't be delivered is dropped, not kept for ever: the next report says more than a late one.
        producer = kafka.producer(self._settings, **{"enable.gapless.guarantee": False, "message.timeout.ms": 10_000})
        said: Condition | None = None
        said_at = 0.0
        while True:
            woken = self._wake.is_set()
            self._wake.clear()
            if self._stopping:
                break
            now = self.look()
            if woken or now != said or time.monotonic() - said_at >= HEARTBEAT_S:
                said, said_at = now, time.monotonic()
                kafka.produce(producer, self._settings, self._report(now), _delivered)
            producer.poll(0)
            self._wake.wait(EVERY_S)
        headers = cloud_event(WorkerReported.__name__, self._role, f"{self.worker_id}/stopped")
        kafka.produce(producer, self._settings, Outgoing(topics.WORKERS, self.worker_id.encode(), None, headers), _delivered)
        producer.flush(_FAREWELL_S)

    def _report(self, now: Condition) -> Outgoing:
        at = _now_ms()
        report = WorkerReported(
            self.worker_id,
            self._role,
            self._host,
            os.getpid(),
            self._version,
            self._started_at,
            at,
            now.in_flight,
            now.concurrency,
            now.partitions,
            now.breakers,
        )
        return envelope(topics.WORKERS, self.worker_id, report, source=self._role, identity=f"{self.worker_id}/{at}", at_ms=at)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _delivered(error: Any, _: Any) -> None:
    if error is not None:
        log.info("reports.not_delivered", error=error.str())
