"""Kafka through librdkafka: clients, topics, reading a partition to its end, and errors with names.

Whoever needs a client makes it here, so that what matters for the ledger is set in one place.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from events import topics
from events.topics import Topic
from streams.envelope import Incoming, Outgoing
from streams.settings import Settings

log = structlog.get_logger()

BATCH: Final = 1000
"""Most records that one poll takes."""
_MAX_RECORD_BYTES: Final = topics.MAX_VALUE_BYTES + 1024 * 1024


class KafkaUnreachableError(Exception):
    """No broker answered in time: check that Kafka runs and that `FOLDFLOW_BOOTSTRAP_SERVERS` names it."""


class TopicMismatchError(Exception):
    """A topic exists, but not as this installation needs it: its partitions decide where keys belong and can't be changed."""


class DeliveryFailedError(Exception):
    """A record could not be delivered: what depends on it must not go on."""


def client(settings: Settings, **properties: Any) -> dict[str, Any]:
    """Return librdkafka's configuration for any client of this installation."""
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": "foldflow",
        # Its own log repeats each failed connection many times a second; what matters comes back as errors.
        "log_level": 2,
        # Small requests that wait for each other's acknowledgement would wait for nothing.
        "socket.nagle.disable": True,
        # A broker that restarts is back within seconds: look again soon.
        "reconnect.backoff.max.ms": 1000,
        **settings.kafka,
        **properties,
    }


def producer(settings: Settings, **properties: Any) -> Producer:
    """Return a producer that never skips a record and goes on: order is kept, delivery is tried for ever."""
    return Producer(
        client(
            settings,
            **{
                "acks": "all",
                "enable.idempotence": True,
                "enable.gapless.guarantee": True,
                # For ever: a record that is given up would be a hole that nobody sees.
                "message.timeout.ms": 0,
                # Batches form by themselves under load; waiting for more would be pure latency.
                "linger.ms": 0,
                "compression.type": "lz4",
                # As the Java clients do, so that every key has one partition whoever writes it.
                "partitioner": "murmur2_random",
                "message.max.bytes": _MAX_RECORD_BYTES,
                "queue.buffering.max.messages": 200_000,
                **properties,
            },
        )
    )


def consumer(settings: Settings, group: str, **properties: Any) -> Consumer:
    """Return a member of a consumer group (its name gets the prefix)."""
    return Consumer(
        client(
            settings,
            **{
                "group.id": settings.topic_prefix + group,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": settings.session_timeout_ms,
                "heartbeat.interval.ms": max(300, settings.session_timeout_ms // 5),
                # The broker answers a fetch as soon as there is one byte; this bounds how long it holds an empty one.
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": _MAX_RECORD_BYTES,
                "fetch.max.bytes": 4 * _MAX_RECORD_BYTES,
                "queued.max.messages.kbytes": 64 * 1024,
                **properties,
            },
        )
    )


def reader(settings: Settings) -> Consumer:
    """Return a consumer without a group, for `read_partition` and `follow`."""
    return consumer(settings, "reader", **{"enable.partition.eof": True})


def admin(settings: Settings) -> AdminClient:
    """Return a client that makes and describes topics."""
    return AdminClient(client(settings))


def name(settings: Settings, topic: Topic) -> str:
    """Return a topic's full name."""
    return settings.topic_prefix + topic.name


def poll(source: Consumer, timeout_s: float, most: int = BATCH) -> list[Message]:
    """Return what is there, or what comes first within the timeout. Raises KafkaException for fatal errors only."""
    first = source.poll(timeout_s)
    if first is None:
        return []
    # `consume(n, t)` would wait for n messages: poll waits for one, this takes what else is there.
    return [message for message in (first, *source.consume(most - 1, 0)) if _is_record(message)]


def _is_record(message: Message) -> bool:
    error = message.error()
    if error is None:
        return True
    if error.fatal():
        raise KafkaException(error)
    if error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - the library's own name for it
        log.warning("kafka.error", error=error.str(), code=error.name())
    return False


def incoming(message: Message) -> Incoming:
    """Return a consumed message as a record."""
    return Incoming(
        message.topic() or "",
        message.partition() or 0,
        message.offset() or 0,
        message.timestamp()[1],
        message.key(),
        message.value(),
        {key: value.encode() if isinstance(value, str) else value for key, value in _pairs(message.headers())},
    )


def _pairs(headers: Any) -> list[tuple[str, bytes | str | None]]:
    return list(headers.items()) if isinstance(headers, dict) else list(headers or ())


def produce(target: Producer, settings: Settings, record: Outgoing, on_delivery: Callable[[Any, Any], None]) -> None:
    """Queue a record, waiting while the queue is full."""
    where: dict[str, Any] = {} if record.partition is None else {"partition": record.partition}
    while True:
        try:
            target.produce(
                settings.topic_prefix + record.topic.name,
                record.value,
                record.key,
                headers=[*record.headers],
                on_delivery=on_delivery,
                **where,
            )
        except BufferError:
            target.poll(0.1)
        else:
            return


class Acks:
    """Counts acknowledgements of one kind of record; `failure` is the first error."""

    __slots__ = ("failure", "offsets")

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.failure: KafkaError | None = None

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        """Take a delivery report."""
        if error is not None:
            self.failure = self.failure or error
        else:
            self.offsets.append(message.offset() or 0)

    def check(self) -> None:
        """Raise DeliveryFailedError if any record failed."""
        if self.failure is not None:
            raise DeliveryFailedError(self.failure.str())


def flush(target: Producer, *acks: Acks, timeout_s: float = 120.0) -> None:
    """Wait until everything is acknowledged. Raises DeliveryFailedError."""
    deadline = time.monotonic() + timeout_s
    while target.flush(1.0):
        for each in acks:
            each.check()
        if time.monotonic() > deadline:
            raise DeliveryFailedError(f"not acknowledged within {timeout_s:.0f} s: is Kafka reachable?")
    for each in acks:
        each.check()


def send(settings: Settings, records: list[Outgoing]) -> list[int]:
    """Produce records with a producer of its own and return their offsets. Raises DeliveryFailedError."""
    acks, target = Acks(), producer(settings)
    for record in records:
        produce(target, settings, record, acks)
    flush(target, acks, timeout_s=30)
    return acks.offsets


def read_partition(source: Consumer, topic: str, partition: int, start: int, end: int | None = None) -> Iterator[Message]:
    """Yield the records of a partition from `start` up to `end` (exclusive), or to its end as of now.

    Raises KafkaUnreachableError when the broker stays away.
    """
    here = TopicPartition(topic, partition)
    low, high = watermarks(source, topic, partition)
    stop = high if end is None else end
    at = max(low, start)
    if at >= stop:
        return
    source.assign([TopicPartition(topic, partition, at)])
    patience = time.monotonic() + 60
    try:
        while at < stop:
            first = source.poll(0.2)  # `consume(n, t)` would wait at the end, for each partition
            for message in () if first is None else (first, *source.consume(5000, 0)):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF and (message.offset() or 0) >= stop:  # noqa: SLF001
                        return
                    continue
                at = (message.offset() or 0) + 1
                patience = time.monotonic() + 60
                if at <= stop:
                    yield message
            if time.monotonic() > patience:
                raise KafkaUnreachableError(f"{topic}/{partition}: nothing came from offset {at} on for 60 s")
    finally:
        source.incremental_unassign([here])


def watermarks(source: Consumer, topic: str, partition: int, timeout_s: float = 30.0) -> tuple[int, int]:
    """Return a partition's first offset and its end, as of now. Raises KafkaUnreachableError."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            low, high = source.get_watermark_offsets(TopicPartition(topic, partition), timeout=5.0, cached=False)
        except KafkaException as error:
            if time.monotonic() > deadline:
                raise KafkaUnreachableError(f"{topic}/{partition}: {error}") from error
            time.sleep(0.1)  # the library fails at once while it has no connection
        else:
            return low, high


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is known of the topics: ids (16 bytes) and numbers of partitions, by our names."""

    ids: Mapping[str, bytes]
    partitions: Mapping[str, int]


def connect(settings: Settings, timeout_s: float = 120.0) -> Cluster:
    """Wait for Kafka, make the topics that are missing, and return what is known of them.

    Raises KafkaUnreachableError and TopicMismatchError.
    """
    client_ = admin(settings)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            there = client_.list_topics(timeout=2.0).topics
            missing = [topic for topic in topics.TOPICS.values() if name(settings, topic) not in there]
            if not missing:
                return _describe(client_, settings)
            _create(client_, settings, missing)
        except KafkaException as error:
            if time.monotonic() > deadline:
                raise KafkaUnreachableError(
                    f"no Kafka at {settings.bootstrap_servers} within {timeout_s:.0f} s ({error.args[0]}); "
                    "start one with `foldflow up`, or set FOLDFLOW_BOOTSTRAP_SERVERS"
                ) from error
            time.sleep(0.1)  # the library fails at once while it has no connection


def _create(client_: AdminClient, settings: Settings, missing: list[Topic]) -> None:
    wanted = [
        NewTopic(
            name(settings, topic),
            1 if topic.single else settings.partitions,
            settings.replication_factor,
            config=topic.config() | ({"min.insync.replicas": "2"} if settings.replication_factor >= 3 else {}),  # noqa: PLR2004
        )
        for topic in missing
    ]
    for future in client_.create_topics(wanted, operation_timeout=10).values():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another process made it meanwhile
                raise


def _describe(client_: AdminClient, settings: Settings) -> Cluster:
    names = {name(settings, topic): topic for topic in topics.TOPICS.values()}
    ids, partitions = {}, {}
    for full, future in client_.describe_topics(TopicCollection(list(names))).items():
        description = future.result()
        ids[names[full].name] = uuid_bytes(description.topic_id)
        partitions[names[full].name] = len(description.partitions)
    inbox = partitions[topics.INBOX.name]
    for each in (topics.DECISIONS, topics.FINISHED):
        if partitions[each.name] != inbox:
            raise TopicMismatchError(
                f"{name(settings, each)} has {partitions[each.name]} partitions and {name(settings, topics.INBOX)} has {inbox}; "
                "they need the same number: make them anew under another FOLDFLOW_TOPIC_PREFIX"
            )
    return Cluster(ids, partitions)


def uuid_bytes(identity: Any) -> bytes:
    """Return a Kafka topic id as 16 bytes."""
    most, least = identity.get_most_significant_bits(), identity.get_least_significant_bits()
    return bytes((most & (1 << 64) - 1).to_bytes(8) + (least & (1 << 64) - 1).to_bytes(8))


@contextlib.contextmanager
def closing(source: Consumer) -> Iterator[Consumer]:
    """Close a consumer at the end, whatever happens."""
    try:
        yield source
    finally:
        source.close()


__all__ = ["BATCH", "Acks", "Cluster", "TopicPartition"]
