"""What the LLM worker and the tool worker have in common: many calls in flight, acknowledged in order.

A thread polls Kafka; the calls run on the event loop that the Faust app runs on. A call is done when the broker has acknowledged
its result. One that can't be decoded goes to the dead letters. No retries here: an attempt that fails is a result.

A call that is cancelled is given up: its task is cancelled, which closes its connections, and its result says so. At the worker's
end tasks are cancelled too, but without results: those calls are still to be made, by whoever takes them next.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Final, Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from events.topics import Topic
from streams import kafka
from streams.envelope import Incoming, Outgoing
from streams.processors.cancellations import Cancellations
from streams.processors.offsets import OffsetTracker
from streams.settings import Settings

log = structlog.get_logger()

_POLL_S: Final = 0.1
_COMMIT_EVERY_S: Final = 0.02
"""How long what is done may stay uncommitted: a crash repeats it. Each commit is a write on the broker, so not at every round."""

_RECENT: Final = 100_000
"""How many calls are remembered, so that one that is sent again after a takeover isn't made again; 100 bytes each."""


class Handler(Protocol):
    """Makes calls."""

    async def __call__(self, record: Incoming) -> Outgoing:
        """Make one call and return its result for the inbox; whatever goes wrong with the call is a result too."""

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Return the result of a call that was given up, or (`latency_ms` None) never made."""


@dataclass(eq=False, slots=True)
class _Flight:
    """A call in flight. `began`: None before it is made; `cancelled`: why it is given up."""

    record: Incoming
    task: asyncio.Task[None] | None = None
    began: float | None = None
    cancelled: str | None = None


class Worker:
    """Consumes a work queue, writes results to `inbox`. `run` is for a thread of its own, `loop` is where calls run."""

    def __init__(
        self, settings: Settings, topic: Topic, handler: Handler, concurrency: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.settings, self.topic, self.handler, self.loop = settings, topic, handler, loop
        self.ready = threading.Event()
        self._concurrency = concurrency
        self._flying = 0
        self._flights: set[_Flight] = set()
        self._change = threading.Condition()
        self._trackers: dict[int, OffsetTracker] = {}
        self._committed: dict[int, tuple[int, str]] = {}
        self._committed_at = 0.0
        self._uncommitted = False
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._failure: BaseException | None = None

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. Raises DeliveryFailedError when a result can't be delivered."""
        kafka.connect(self.settings)
        self.producer = kafka.producer(self.settings)
        self.cancellations = Cancellations(self.settings)
        self.cancellations.open()
        # Calls may take long; that this process lives shows in its heartbeats, that it works in its progress.
        self.consumer = kafka.consumer(self.settings, self.topic.name, **{"max.poll.interval.ms": 86_400_000})
        name = kafka.name(self.settings, self.topic)
        self.consumer.subscribe([name], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked)
        try:
            while not stop.is_set():
                self._round()
            self._commit(wait=True)
        finally:
            self.consumer.close()
            self.cancellations.close()
            self.loop.call_soon_threadsafe(self._cancel)

    def _round(self) -> None:
        free = self._free()
        # While calls fly, acknowledgements come in, and are worth a commit soon.
        patience = _COMMIT_EVERY_S if self._flying or self._uncommitted else _POLL_S
        messages = kafka.poll(self.consumer, patience, free) if free else []
        fresh = [record for message in messages if (record := self._fresh(message))]
        if fresh:
            with self._change:
                self._flying += len(fresh)
            self.loop.call_soon_threadsafe(self._start, fresh)
        # After the start of what was taken: a cancellation that comes in between finds its call.
        if cancelled := self.cancellations.drain():
            self.loop.call_soon_threadsafe(self._give_up, cancelled)
        self.producer.poll(0)
        if self._failure is not None:
            raise self._failure
        self._commit()

    def _free(self) -> int:
        """Return how many more calls may fly, waiting a little while there are none."""
        with self._change:
            if self._flying >= self._concurrency or any(tracker.full for tracker in self._trackers.values()):
                # For half of them: to take each place as it becomes free would mean batches of one. Not for slow calls.
                self._change.wait_for(lambda: 2 * self._flying <= self._concurrency, _COMMIT_EVERY_S)
            full = any(tracker.full for tracker in self._trackers.values())
            return 0 if full else max(0, self._concurrency - self._flying)

    def _fresh(self, message: Message) -> Incoming | None:
        """Return a call that has to be made: not one that is done, or that an orchestrator has sent twice."""
        record = kafka.incoming(message)
        with self._change:
            tracker = self._trackers.get(record.partition)
            if tracker is None or not tracker.take(record.offset):
                return None
            call = blake2b(record.value or b"", digest_size=16).digest()
            if call in self._recent:  # its result is sent, or will be; should this process end before, the first is still open
                tracker.done(record.offset)
                self._uncommitted = True
                return None
            self._recent[call] = None
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
            return record

    # --- On the event loop ---

    def _start(self, records: list[Incoming]) -> None:
        for record in records:
            flight = _Flight(record, cancelled=self.cancellations.reason(record.key))
            self._flights.add(flight)
            flight.task = self.loop.create_task(self._call(flight))

    async def _call(self, flight: _Flight) -> None:
        """Make one call and queue its result; the call is done when that is acknowledged."""
        record = flight.record
        tracker = self._trackers.get(record.partition)
        try:
            result = await self._result(flight)
            kafka.produce(self.producer, self.settings, result, partial(self._delivered, tracker, record.offset))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # A handler turns whatever goes wrong into a result; this is a fault of ours, and acknowledging would lose the call.
            self._failure = error
            log.exception("worker.fault", topic=record.topic, partition=record.partition, offset=record.offset)
        finally:
            self._flights.discard(flight)
            with self._change:
                self._flying -= 1
                self._change.notify()

    async def _result(self, flight: _Flight) -> Outgoing:
        """Return a call's result; one that is cancelled isn't made, or no longer. Raises CancelledError when the worker ends."""
        reason, latency = flight.cancelled, None
        if reason is None:
            flight.began = time.monotonic()
            try:
                return await self.handler(flight.record)
            except asyncio.CancelledError:
                reason = flight.cancelled
                if reason is None:
                    raise
            latency = round((time.monotonic() - flight.began) * 1000)
        return self.handler.cancelled(flight.record, reason, latency)

    def _give_up(self, reasons: dict[bytes, str]) -> None:
        """End the calls that are cancelled, where they are in flight here."""
        for flight in self._flights:
            reason = reasons.get(flight.record.key or b"")
            if reason is None or flight.task is None:
                continue
            flight.cancelled = reason
            if flight.began is not None:  # a task that is cancelled before it runs never runs: it would have no result
                flight.task.cancel()

    def _cancel(self) -> None:
        for flight in self._flights:
            flight.cancelled = None
            if flight.task is not None:
                flight.task.cancel()

    # --- Acknowledging ---

    def _delivered(self, tracker: OffsetTracker | None, offset: int, error: KafkaError | None, message: Any) -> None:
        del message
        if error is not None:
            self._failure = kafka.DeliveryFailedError(error.str())
        elif tracker is not None:
            with self._change:
                tracker.done(offset)
                self._uncommitted = True

    def _commit(self, *, wait: bool = False) -> None:
        """Commit what is done since the last time, soon: what isn't committed is repeated after a crash."""
        now = time.monotonic()
        if not wait and now - self._committed_at < _COMMIT_EVERY_S:
            return
        self._committed_at = now
        with self._change:
            self._uncommitted = False
            state = {partition: (tracker.committable, tracker.metadata()) for partition, tracker in self._trackers.items()}
        new = {partition: done for partition, done in state.items() if self._committed.get(partition) != done}
        if not new:
            return
        topic = kafka.name(self.settings, self.topic)
        offsets = [TopicPartition(topic, partition, offset, metadata) for partition, (offset, metadata) in new.items()]
        try:
            self.consumer.commit(offsets=offsets, asynchronous=not wait)  # type: ignore[call-overload]
            self._committed.update(new)
        except KafkaException as error:  # the group moved on: the next owner repeats what is in flight
            log.info("worker.not_committed", topic=topic, error=str(error))

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        starts = []
        for each in consumer.committed(partitions, timeout=30.0):
            start = max(0, each.offset)
            with self._change:
                self._trackers[each.partition] = OffsetTracker(start, each.metadata or "")
            self._committed[each.partition] = (start, each.metadata or "")
            starts.append(TopicPartition(each.topic, each.partition, start))
        consumer.incremental_assign(starts)
        self.ready.set()

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._commit(wait=True)
        with self._change:
            for each in partitions:
                self._trackers.pop(each.partition, None)
                self._committed.pop(each.partition, None)
        consumer.incremental_unassign(partitions)
