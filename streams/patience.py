"""Waiting for Kafka: for a while, and no longer than the process is wanted."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from confluent_kafka import KafkaException

PATIENCE_S: Final = 120.0
"""How long Kafka may be away, as when it starts anew, until a process that needs it gives up."""
ADVICE: Final = "start one with `foldflow up`, or set FOLDFLOW_BOOTSTRAP_SERVERS"
_PAUSE_S: Final = 0.1  # the library fails at once while it has no connection


class KafkaUnreachableError(Exception):
    """No broker answered in time: check that Kafka runs and that `FOLDFLOW_BOOTSTRAP_SERVERS` names it."""


class EndingError(BaseException):
    """The process was told to end while it waited for Kafka. No Exception: nobody who handles whatever goes wrong is meant."""


@dataclass(slots=True)
class _End:
    """When the waiting of a thread is over."""

    stop: threading.Event
    grace_s: float
    told_at: float = math.inf

    def check(self, what: str) -> None:
        if self.stop.is_set():
            now = time.monotonic()
            self.told_at = min(self.told_at, now)
            if now >= self.told_at + self.grace_s:
                raise EndingError(f"told to end while waiting for Kafka: {what}")


_NEVER: Final = _End(threading.Event(), math.inf)
_end: ContextVar[_End] = ContextVar("end", default=_NEVER)


@contextmanager
def until(stop: threading.Event, grace_s: float) -> Iterator[None]:
    """Let every wait for Kafka in this block, and thread, raise EndingError when `stop` was seen set `grace_s` ago."""
    token = _end.set(_End(stop, grace_s))
    try:
        yield
    finally:
        _end.reset(token)


@contextmanager
def unless_ending() -> Iterator[None]:
    """Let every wait for Kafka in this block end the block when the process is told to end.

    For partitions that just came: others get them. The client hands out their records all the same, so the block must make them
    known only at its end: records of partitions that aren't known are passed over.
    """
    with suppress(EndingError), until(_end.get().stop, 0.0):
        yield


def check(what: str) -> None:
    """Raise EndingError when the process is told to end, and the time that it has for that is over."""
    _end.get().check(what)


class Patience:
    """The time that one question to Kafka may take, with all its repetitions. `what` stands in the error."""

    __slots__ = ("_deadline", "_seconds", "_what")

    def __init__(self, what: str, seconds: float = PATIENCE_S) -> None:
        self._what, self._seconds = what, seconds
        self.renew()

    def renew(self) -> None:
        """Begin anew: something came."""
        self._deadline = time.monotonic() + self._seconds

    def check(self, problem: object = "nothing came") -> None:
        """Raise KafkaUnreachableError when the time is over, and EndingError when the process is told to end."""
        check(self._what)
        if time.monotonic() > self._deadline:
            raise KafkaUnreachableError(f"{self._what}: {problem} within {self._seconds:.0f} s; {ADVICE}")

    def after(self, error: KafkaException) -> None:
        """Pause after an error, before the next try. Raises as `check` does."""
        try:
            self.check(error.args[0])
        except KafkaUnreachableError as over:
            raise over from error
        time.sleep(_PAUSE_S)
