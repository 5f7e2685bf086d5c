"""A process that lives and does nothing is worse than one that has died: nobody starts it anew. So each watches itself.

It compares how far it has come in its partitions with where the broker says that they end, and looks whether its event loop still
turns. One that has something to take, can reach Kafka, isn't busy, and doesn't go on for a while is stuck: it says where every
thread is and ends at once. Nothing is lost by that, and whoever supervises it starts it anew.
"""

import asyncio
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import structlog

from events.frozen import frozen
from events.topics import Topic
from streams import commits, kafka
from streams.kafka import Consumer
from streams.settings import Settings

log = structlog.get_logger()

EXIT_STUCK: Final = 75
"""Exit code of a process that was stuck (EX_TEMPFAIL: try again)."""
_LOOKS: Final = 10
"""How often it looks in the time after which a process is stuck."""
_ANSWER_S: Final = 5.0


@frozen
class Progress:
    """How far a process has come: the next offset to be taken of each partition in hand; None: as the group has committed.

    `busy`: it takes no more for now, and that is right.
    """

    positions: Mapping[int, int | None]
    busy: bool = False


@dataclass(slots=True)
class Stillness:
    """Since when each partition stands still though there is something to take."""

    after_s: float
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)
    _looked: float | None = None

    def look(self, positions: Mapping[int, int], ends: Mapping[int, int], now: float) -> list[int]:
        """Return the partitions that have stood still for too long at `now` (seconds), with something to take.

        A gap between two looks means that the whole process was stopped: then it begins anew.
        """
        if self._looked is not None and now - self._looked > self.after_s / 2:
            self._seen.clear()
        self._looked = now
        waiting = {partition: at for partition, at in positions.items() if at < ends.get(partition, 0)}
        self._seen = {
            partition: seen if (seen := self._seen.get(partition)) and seen[0] == at else (at, now)
            for partition, at in waiting.items()
        }
        return [partition for partition, (_, since) in self._seen.items() if now - since >= self.after_s]

    def forget(self) -> None:
        """Begin anew: standing still was right until now."""
        self._seen.clear()


class Watchdog:
    """Watches one process, from a thread of its own. `end`: what ends it, given what is wrong."""

    def __init__(
        self,
        settings: Settings,
        topic: Topic,
        group: str,
        progress: Callable[[], Progress],
        loop: asyncio.AbstractEventLoop,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._settings, self._group, self._progress, self._loop = settings, group, progress, loop
        self._topic = kafka.name(settings, topic)
        self._stillness = Stillness(settings.stuck_after_s)
        self._end = end or _end
        self._turned = time.monotonic()
        self._looked = self._turned
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more: the process is told to end."""
        self._stop.set()

    def _watch(self) -> None:
        with closing(kafka.consumer(self._settings, self._group)) as source:
            self._turned = self._looked = time.monotonic()
            while not self._stop.wait(self._settings.stuck_after_s / _LOOKS):
                problem = self._problem(source, time.monotonic())
                if problem is not None and not self._stop.is_set():
                    self._end(problem)

    def _problem(self, source: Consumer, now: float) -> str | None:
        """Return what is wrong, None if nothing is."""
        after, suspended = self._settings.stuck_after_s, now - self._looked > self._settings.stuck_after_s / 2
        self._looked = now
        if suspended:
            self._turned = now
        if now - self._turned >= after:
            return f"its event loop has not turned for {now - self._turned:.0f} s"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._turns)
        progress = self._progress()
        if progress.busy:
            self._stillness.forget()
            return None
        try:
            positions = self._positions(source, progress.positions)
            ends = {each: kafka.watermarks(source, self._topic, each, _ANSWER_S)[1] for each in positions}
        except kafka.KafkaUnreachableError:  # then nobody can go on
            self._stillness.forget()
            return None
        still = self._stillness.look(positions, ends, now)
        waits = ", ".join(f"{each} at {positions[each]} of {ends[each]}" for each in still)
        return f"nothing was taken from {self._topic} for {after:.0f} s, though it goes on: partition {waits}" if still else None

    def _positions(self, source: Consumer, known: Mapping[int, int | None]) -> dict[int, int]:
        unknown = [kafka.TopicPartition(self._topic, partition) for partition, at in known.items() if at is None]
        committed = commits.committed(source, unknown, _ANSWER_S) if unknown else []
        return {partition: at for partition, at in known.items() if at is not None} | {
            each.partition: max(0, each.offset) for each in committed
        }

    def _turns(self) -> None:
        self._turned = time.monotonic()


def _end(problem: str) -> None:
    """End this process, whatever its threads do."""
    log.critical("watchdog.stuck", problem=problem, next="the process ends; whoever supervises it starts it anew")
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(EXIT_STUCK)
