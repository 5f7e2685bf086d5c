"""What the LLM worker and the tool worker have in common: many calls in flight, acknowledged in order.

A thread polls Kafka; the calls run on the event loop that the Faust app runs on. A call is done when the broker has acknowledged
its result. One that can't be decoded goes to the dead letters. No retries here: an attempt that fails is a result.

A call that is cancelled is given up: its task is cancelled, which closes its connections, and its result says so. A worker that
is told to stop, or that another takes partitions from, ends its calls first, as long as `HAND_OVER_S`. What isn't over by then is
cancelled too, but without a result: those calls are still to be made, by whoever takes them next. A call or a cancellation that
newer code wrote ends the worker in the same way, in front of it: it is for newer workers.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Final, Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from events import topics
from events.errors import NewerCodeError
from events.topics import Topic
from streams import commits, kafka, patience
from streams.envelope import Incoming, Outgoing
from streams.processors.answered import Answered
from streams.processors.cancellations import Cancellations
from streams.processors.offsets import OffsetTracker
from streams.processors.watchdog import Progress
from streams.schemas import Schemas
from streams.settings import Settings

log = structlog.get_logger()

_POLL_S: Final = 0.1
_COMMIT_EVERY_S: Final = 0.02
"""How long what is done may stay uncommitted: a crash repeats it. Each commit is a write on the broker, so not at every round."""

_COMMIT_AGAIN_S: Final = 0.5
"""How long after a commit that failed the next one is tried."""
HAND_OVER_S: Final = 10.0
"""How long a stop, or a partition that goes to another worker, waits for calls in flight: what is given up is made twice."""
_COMMIT_S: Final = 5.0
"""How long a last commit is tried while Kafka is away; without it those calls are found on the inbox by who takes them next."""
_MAY_SLEEP: Final = 0.8
"""What part of a session this process may stand still without a doubt; a heartbeat comes five times in it."""
_LOOK_BACK: Final = 2_000
"""How many calls of a partition that are done a new owner looks back at."""
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
    """A call in flight. `began`: None before it is made; `cancelled`: why it is given up.

    `places`: where it was read, more than once if it was sent twice or its partition went away and came back.
    """

    record: Incoming
    digest: bytes
    places: list[tuple[OffsetTracker, int]] = field(default_factory=list)
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
        self._results: list[tuple[Outgoing, _Flight]] = []  # what isn't produced yet; of the loop's thread
        self._change = threading.Condition()
        self._trackers: dict[int, OffsetTracker] = {}
        self._committed: dict[int, tuple[int, str]] = {}
        self._committed_at = 0.0
        self._uncommitted = False
        self._recent: OrderedDict[bytes, _Flight | None] = OrderedDict()  # None: its result is acknowledged
        self._answered = Answered(settings, topic)
        self._awake_at = time.monotonic()
        self._doubtful: set[int] = set()  # partitions that others may have by now
        self._stopping = False
        self._failure: BaseException | None = None

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set.

        Raises DeliveryFailedError when a result can't be delivered, and NewerCodeError: then only newer code may go on.
        """
        self._answered.partitions = kafka.connect(self.settings).partitions[topics.INBOX.name]
        self.producer = kafka.producer(self.settings)
        self.schemas = Schemas(self.settings)
        self.cancellations = Cancellations(self.settings, self.schemas)
        self.cancellations.open()
        # Calls may take long; that this process lives shows in its heartbeats, that it works in its progress.
        own = {"max.poll.interval.ms": 86_400_000, "on_commit": self._reported}
        self.consumer = kafka.consumer(self.settings, self.topic.name, **own)
        name = kafka.name(self.settings, self.topic)
        self.consumer.subscribe([name], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)
        try:
            while not stop.is_set():
                self._round()
            self._leave()
        except NewerCodeError:
            self._leave()  # what is in flight is paid for
            raise
        finally:
            self._stopping = True
            self.consumer.close()
            self.cancellations.close()
            self.loop.call_soon_threadsafe(self._cancel)

    def progress(self) -> Progress:
        """Return how far it has come; for the watchdog. One whose hands are full takes nothing, for as long as its calls take."""
        with self._change:
            full = self._flying >= self._concurrency or any(tracker.full for tracker in self._trackers.values())
            return Progress(
                {partition: tracker.position for partition, tracker in self._trackers.items()}, full or self._stopping
            )

    @property
    def partitions(self) -> tuple[int, ...]:
        """The partitions in hand."""
        with self._change:
            return tuple(sorted(self._trackers))

    def _leave(self) -> None:
        self._stopping = True
        self._end_calls(list(self._trackers.values()))
        self._commit(wait=True)

    def _round(self) -> None:
        self.cancellations.refuse_newer()
        free = self._free()
        # While calls fly, acknowledgements come in, and are worth a commit soon.
        patience = _COMMIT_EVERY_S if self._flying or self._uncommitted else _POLL_S
        messages = kafka.poll(self.consumer, patience, free) if free else []
        if self._was_asleep():
            messages = []
        fresh, newer = self._fresh_ones(messages)
        if fresh:
            with self._change:
                self._flying += len(fresh)
            self.loop.call_soon_threadsafe(self._start, fresh)
        # After the start of what was taken: a cancellation that comes in between finds its call.
        self._serve(0)
        self._commit()
        if newer is not None:
            raise newer

    def _was_asleep(self) -> bool:
        """Say whether this process stood still for so long that the group may have given its partitions to others.

        Fetches are answered whoever asks, and on waking sooner than the heartbeat that tells: what they brought is read again
        once the group has confirmed the partitions by taking a commit.
        """
        now = time.monotonic()
        asleep, self._awake_at = now - self._awake_at > self.settings.session_timeout_ms / 1000 * _MAY_SLEEP, now
        topic = kafka.name(self.settings, self.topic)
        if asleep:
            places = [TopicPartition(topic, partition, tracker.position) for partition, tracker in self._trackers.items()]
            self._doubtful = {each.partition for each in places}
            self.consumer.pause(places)
            for each in places:
                self.consumer.seek(each)
        if self._doubtful and self._confirmed():
            self.consumer.resume([TopicPartition(topic, partition) for partition in self._doubtful])
            self._doubtful.clear()
        return asleep

    def _confirmed(self) -> bool:
        try:
            commits.commit(self.consumer, self._places(self._doubtful), 0)
        except KafkaException as error:
            log.info("worker.not_confirmed", topic=self.topic.name, error=str(error))
            return False
        return True

    def _serve(self, timeout_s: float) -> None:
        """Give up what was cancelled and take acknowledgements. Raises what ended a call that should have had a result."""
        if cancelled := self.cancellations.drain():
            self.loop.call_soon_threadsafe(self._give_up, cancelled)
        self.producer.poll(timeout_s)
        if self._failure is not None:
            raise self._failure

    def _free(self) -> int:
        """Return how many more calls may fly, waiting a little while there are none."""
        with self._change:
            if self._flying >= self._concurrency or any(tracker.full for tracker in self._trackers.values()):
                # For half of them: to take each place as it becomes free would mean batches of one. Not for slow calls.
                self._change.wait_for(lambda: 2 * self._flying <= self._concurrency, _COMMIT_EVERY_S)
            full = any(tracker.full for tracker in self._trackers.values())
            return 0 if full else max(0, self._concurrency - self._flying)

    def _fresh_ones(self, messages: list[Message]) -> tuple[list[_Flight], NewerCodeError | None]:
        """Return the calls that have to be made, up to the first one that newer code wrote, and what to say about that."""
        fresh: list[_Flight] = []
        for message in messages:
            try:
                where = f"call {message.topic()}/{message.partition()}/{message.offset()}"
                self.schemas.refuse_newer(where, message.value(), self.topic.kind)
            except NewerCodeError as error:
                return fresh, error
            if flight := self._fresh(message):
                fresh.append(flight)
        return fresh, None

    def _fresh(self, message: Message) -> _Flight | None:
        """Return a call that has to be made: not one that is done, or that an orchestrator has sent twice."""
        record = kafka.incoming(message)
        with self._change:
            tracker = self._trackers.get(record.partition)
            if tracker is None:
                return None
            digest = _digest(record.value)
            if not tracker.take(record.offset):
                self._recent.setdefault(digest, None)
                return None
            if self._answered.has(record):
                self._recent.setdefault(digest, None)
            if digest in self._recent:
                known = self._recent[digest]
                if known is None:
                    tracker.done(record.offset)
                    self._uncommitted = True
                else:  # until its result is acknowledged this place is open as well: a crash must not lose the call
                    known.places.append((tracker, record.offset))
                return None
            flight = self._recent[digest] = _Flight(record, digest, [(tracker, record.offset)])
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
            return flight

    # --- On the event loop ---

    def _start(self, flights: list[_Flight]) -> None:
        for flight in flights:
            flight.cancelled = self.cancellations.reason(flight.record.key)
            self._flights.add(flight)
            flight.task = self.loop.create_task(self._call(flight))

    async def _call(self, flight: _Flight) -> None:
        """Make one call and keep its result to be produced; the call is done when that is acknowledged."""
        record = flight.record
        try:
            result = await self._result(flight)  # first: meanwhile the list is another one
            self._results.append((result, flight))
            if len(self._results) == 1:
                self.loop.call_soon(self._produce)
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

    def _produce(self) -> None:
        """Produce the results of all calls that ended in one turn of the loop: one by one, each would be a request of its own."""
        results, self._results = self._results, []
        try:
            for result, flight in results:
                kafka.produce(self.producer, self.settings, result, partial(self._delivered, flight))
        except BaseException as error:
            self._failure = error
            log.exception("worker.fault", topic=self.topic.name, results=len(results))

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

    def _delivered(self, flight: _Flight, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._failure = kafka.DeliveryFailedError(error.str())
            return
        with self._change:
            self._answered.acknowledged(message)
            for tracker, offset in flight.places:
                tracker.done(offset)
            if flight.digest in self._recent:
                self._recent[flight.digest] = None
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
            offsets = self._places(new)
        if not new:
            return
        try:
            if wait:
                commits.commit(self.consumer, offsets, _COMMIT_S)
            else:
                self.consumer.commit(offsets=offsets, asynchronous=True)
            self._committed.update(new)
        except KafkaException as error:  # the group moved on: the next owner repeats what is in flight
            log.info("worker.not_committed", topic=self.topic.name, error=str(error))

    def _places(self, partitions: Iterable[int]) -> list[TopicPartition]:
        """Return what may be committed of partitions in hand."""
        topic, places = kafka.name(self.settings, self.topic), []
        for partition in partitions:
            tracker = self._trackers[partition]
            told = commits.metadata(self._answered.covered(partition, tracker.position), tracker.metadata())
            places.append(TopicPartition(topic, partition, tracker.committable, told))
        return places

    def _reported(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Commit again what could not be committed: while Kafka was away all that was done would else be repeated."""
        for each in partitions:
            if error is not None or each.error is not None:
                self._committed.pop(each.partition, None)
                self._committed_at = time.monotonic() + _COMMIT_AGAIN_S

    @patience.unless_ending()
    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        starts: dict[int, int] = {}
        covered: dict[int, int | None] = {}
        made: dict[int, str] = {}
        for each in commits.committed(consumer, partitions):
            starts[each.partition] = max(0, each.offset)
            covered[each.partition], made[each.partition] = commits.covered(each.metadata or "")
        self._look_back(starts, covered)
        with self._change:
            self._trackers |= {partition: OffsetTracker(start, made[partition]) for partition, start in starts.items()}
        self._committed |= {partition: (start, made[partition]) for partition, start in starts.items()}
        topic = kafka.name(self.settings, self.topic)
        places = [TopicPartition(topic, partition, start) for partition, start in starts.items()]
        consumer.incremental_assign(places)
        consumer.resume(places)  # one that was paused when it was lost would stay so
        self.ready.set()

    def _look_back(self, starts: dict[int, int], covered: dict[int, int | None]) -> None:
        """Find out what others have made of what is to come.

        An orchestrator that took over may have sent calls again that are done, and a worker may have made calls that it didn't
        commit.
        """
        topic = kafka.name(self.settings, self.topic)
        firsts = {partition: max(0, start - _LOOK_BACK) for partition, start in starts.items()}
        open_: dict[int, tuple[int, int, int]] = {}
        with closing(kafka.reader(self.settings)) as source:
            ends = {partition: kafka.watermarks(source, topic, partition)[1] for partition in starts}
            upto = {partition: min(start + 1, ends[partition]) for partition, start in starts.items()}
            for message in kafka.read_partitions(source, topic, firsts, upto):
                partition, offset = message.partition() or 0, message.offset() or 0
                if offset < starts[partition]:
                    with self._change:
                        self._recent.setdefault(_digest(message.value()), None)
                else:
                    open_[partition] = offset, message.timestamp()[1], ends[partition]
            self._answered.look(source, open_, covered)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with self._change:
            trackers = [tracker for each in partitions if (tracker := self._trackers.get(each.partition))]
        if not self._stopping:
            self._end_calls(trackers)
        self._commit(wait=True)
        self._lost(consumer, partitions)

    def _end_calls(self, trackers: list[OffsetTracker]) -> None:
        """Wait until the calls of these partitions are done, or `HAND_OVER_S` is over."""
        deadline = time.monotonic() + HAND_OVER_S
        while any(tracker.open for tracker in trackers) and time.monotonic() < deadline:
            self._serve(_COMMIT_EVERY_S)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Drop partitions; calls of them that are in flight go on, and whoever has them now may make them as well."""
        with self._change:
            for each in partitions:
                self._trackers.pop(each.partition, None)
                self._committed.pop(each.partition, None)
                self._answered.lost(each.partition)
                self._doubtful.discard(each.partition)
        consumer.incremental_unassign(partitions)


def _digest(value: bytes | None) -> bytes:
    return blake2b(value or b"", digest_size=16).digest()
