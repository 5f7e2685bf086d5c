"""Kafka through librdkafka: clients, topics, reading a partition to its end, and errors with names.

Whoever needs a client makes it here, so that what matters for the ledger is set in one place.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, Final

import structlog
from confluent_kafka import (
    TIMESTAMP_LOG_APPEND_TIME,
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
from events.frozen import frozen
from events.topics import Topic
from streams import patience
from streams.envelope import Incoming, Outgoing, ReadHeaders
from streams.patience import ADVICE, PATIENCE_S, KafkaUnreachableError, Patience
from streams.settings import Settings

log = structlog.get_logger()

BATCH: Final = 1000  # records that one poll takes at most
FOLLOWS: Final = {"fetch.wait.max.ms": 100}
"""A reader asks again after 10 ms: what else it asks waits behind a fetch that finds nothing. Many who wait so burden Kafka."""
_MAX_RECORD_BYTES: Final = topics.MAX_VALUE_BYTES + 1024 * 1024


class TopicsMissingError(Exception):
    """Topics don't exist (yet), and who asks for them makes none: a processor does, when it starts."""


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
        "topic.metadata.refresh.interval.ms": 10_000,  # else who asked while a broker was starting may be deaf for 5 minutes
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
                "queue.buffering.max.kbytes": 64 * 1024,
                **properties,
            },
        )
    )


def consumer(settings: Settings, group: str, **properties: Any) -> Consumer:
    """Return a member of a consumer group (its name gets the prefix).

    Raises KafkaUnreachableError where a registry's ids must be learned first.
    """
    if settings.schema_registry:
        from streams import schemas  # noqa: PLC0415 - it needs this module

        schemas.learn(settings)
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
                # What waits to be sent to a broker that went away has no other time limit: a last commit, for a minute.
                "socket.timeout.ms": 3_000,
                # The broker answers a fetch as soon as there is one byte; this bounds how long it holds an empty one.
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": _MAX_RECORD_BYTES,
                "fetch.max.bytes": 4 * _MAX_RECORD_BYTES,
                "queued.max.messages.kbytes": 64 * 1024,
                **properties,
            },
        )
    )


def reader(settings: Settings, **properties: Any) -> Consumer:
    """Return a consumer without a group, for `read_partition`; with `FOLLOWS`, for one who stays at the end and waits."""
    return consumer(settings, "reader", **{"enable.partition.eof": True, "fetch.wait.max.ms": 10, **properties})


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
        ReadHeaders(partial(headers_of, message)),
    )


_ask_headers: Final = methodcaller("headers")
"""In a hot loop Python 3.11 doesn't look whether a library's method has failed while it returned something; this does."""


def headers_of(message: Message) -> list[tuple[str, bytes | None]] | None:
    """Return a message's headers; None where the name of one is no UTF-8: anybody can write it, and the client can't read it."""
    try:
        found = _ask_headers(message)
    except SystemError as error:  # it has failed and returned a list with holes: looking into that would end the process
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        return None
    pairs = found.items() if isinstance(found, dict) else found or ()
    return [(key, value.encode() if isinstance(value, str) else value) for key, value in pairs]


def produce(target: Producer, settings: Settings, record: Outgoing, on_delivery: Callable[[Any, Any], None]) -> None:
    """Queue a record, waiting while the queue is full. Raises EndingError."""
    where: dict[str, Any] = {} if record.partition is None else {"partition": record.partition}
    if record.at_ms is not None:
        where["timestamp"] = record.at_ms
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
            patience.check("room for a record")
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


def flush(target: Producer, *acks: Acks, timeout_s: float = PATIENCE_S) -> None:
    """Wait until everything is acknowledged. Raises DeliveryFailedError, and EndingError."""
    waiting = Patience("what was produced", timeout_s)
    while target.flush(1.0):
        for each in acks:
            each.check()
        try:
            waiting.check("not acknowledged")
        except KafkaUnreachableError as error:
            raise DeliveryFailedError(str(error)) from error
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
    return read_partitions(source, topic, {partition: start}, None if end is None else {partition: end})


def read_partitions(
    source: Consumer, topic: str, starts: Mapping[int, int], ends: Mapping[int, int] | None = None
) -> Iterator[Message]:
    """Yield the records of partitions, each from its start up to its end (exclusive), or to its end as of now.

    All are fetched together, so those of one partition come in order, and between those of others: one after the other, each
    would cost a round of requests. Raises KafkaUnreachableError when the broker stays away.
    """
    open_ = {}
    for partition, start in starts.items():
        low, high = watermarks(source, topic, partition)
        stop = high if ends is None else ends[partition]
        if max(low, start) < stop:
            open_[partition] = max(low, start), stop
    if not open_:
        return
    places = [TopicPartition(topic, partition, at) for partition, (at, _) in open_.items()]
    source.assign(places)
    waiting = Patience(f"{topic}/{sorted(open_)}")
    try:
        while open_:
            first = source.poll(0.2)  # `consume(n, t)` would wait at the end
            for message in () if first is None else (first, *source.consume(5000, 0)):
                partition, offset, error = message.partition() or 0, message.offset() or 0, message.error()
                if partition not in open_ or (error is not None and error.code() != KafkaError._PARTITION_EOF):  # noqa: SLF001
                    continue
                waiting.renew()
                stop = open_[partition][1]
                if error is None and offset < stop:
                    yield message
                if offset + (error is None) >= stop:  # a gap may lie at the end, where compaction has been
                    del open_[partition]
            waiting.check()
    finally:
        source.incremental_unassign(places)


def watermarks(source: Consumer, topic: str, partition: int, timeout_s: float = PATIENCE_S) -> tuple[int, int]:
    """Return a partition's first offset and its end, as of now. Raises KafkaUnreachableError."""
    waiting = Patience(f"{topic}/{partition}", timeout_s)
    while True:
        try:
            low, high = source.get_watermark_offsets(TopicPartition(topic, partition), timeout=5.0, cached=False)
        except KafkaException as error:
            waiting.after(error)
            with contextlib.suppress(KafkaException):  # and remembers for minutes that it heard nothing of a topic
                source.list_topics(topic, timeout=1.0)
        else:
            return low, high


def first_since(source: Consumer, topic: str, ends: Mapping[int, int], at_ms: int) -> dict[int, int]:
    """Return each partition's first offset from a time on (milliseconds since the epoch), or its end where there is none.

    Raises KafkaUnreachableError.
    """
    waiting = Patience(topic)
    while True:
        try:
            found = source.offsets_for_times([TopicPartition(topic, each, max(0, at_ms)) for each in ends], timeout=10.0)
        except KafkaException as error:
            waiting.after(error)
        else:
            return {each.partition: each.offset if each.offset >= 0 else ends[each.partition] for each in found}


@frozen
class Cluster:
    """What is known of the topics: ids (16 bytes) and numbers of partitions, by our names."""

    ids: Mapping[str, bytes]
    partitions: Mapping[str, int]


def connect(settings: Settings, timeout_s: float = PATIENCE_S, also: Sequence[Topic] = ()) -> Cluster:
    """Wait for Kafka, make the topics that are missing, and return what is known of them.

    `also`: topics that not everybody needs. Raises KafkaUnreachableError and TopicMismatchError.
    """
    client_ = admin(settings)
    waiting = Patience(f"no Kafka at {settings.bootstrap_servers}", timeout_s)
    wanted = (*topics.TOPICS.values(), *also)
    while True:
        try:
            there = client_.list_topics(timeout=2.0).topics
            missing = [topic for topic in wanted if name(settings, topic) not in there]
            if not missing:
                return _describe(client_, settings, wanted)
            _create(client_, settings, missing)
        except KafkaException as error:
            waiting.after(error)


def find(client_: AdminClient, settings: Settings, wanted: Sequence[Topic], timeout_s: float = 2.0) -> Cluster:
    """Return what is known of these topics, and make none. Raises KafkaUnreachableError and TopicsMissingError."""
    partition_counts(client_, settings, wanted, timeout_s)
    with _found_or_not(settings):
        return _described(client_, settings, wanted)


def partition_counts(
    client_: AdminClient | Consumer, settings: Settings, wanted: Sequence[Topic], timeout_s: float = 2.0
) -> dict[str, int]:
    """Return how many partitions these topics have, by our names. Raises KafkaUnreachableError and TopicsMissingError."""
    with _found_or_not(settings):
        there = client_.list_topics(timeout=timeout_s).topics
    if missing := [full for topic in wanted if (full := name(settings, topic)) not in there]:
        raise TopicsMissingError(
            f"Kafka at {settings.bootstrap_servers} has no {', '.join(missing)} yet; a processor makes them when it starts"
        )
    return {topic.name: len(there[name(settings, topic)].partitions) for topic in wanted}


@contextlib.contextmanager
def _found_or_not(settings: Settings) -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:  # deleted since the list was made
            raise TopicsMissingError(f"Kafka at {settings.bootstrap_servers}: {error.args[0].str()}") from error
        raise KafkaUnreachableError(f"no Kafka at {settings.bootstrap_servers} ({error.args[0]}); {ADVICE}") from error


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


def _described(client_: AdminClient, settings: Settings, wanted: Iterable[Topic]) -> Cluster:
    names, ids, partitions = {name(settings, topic): topic for topic in wanted}, {}, {}
    for full, future in client_.describe_topics(TopicCollection(list(names)), request_timeout=30).items():
        description = future.result()
        ids[names[full].name] = uuid_bytes(description.topic_id)
        partitions[names[full].name] = len(description.partitions)
    return Cluster(ids, partitions)


def _describe(client_: AdminClient, settings: Settings, wanted: Iterable[Topic]) -> Cluster:
    cluster = _described(client_, settings, wanted)
    partitions, inbox = cluster.partitions, cluster.partitions[topics.INBOX.name]
    for each in (topics.DECISIONS, topics.FINISHED, topics.DECISIONS_JSON):
        if partitions.get(each.name, inbox) != inbox:
            raise TopicMismatchError(
                f"{name(settings, each)} has {partitions[each.name]} partitions and {name(settings, topics.INBOX)} has {inbox}; "
                "they need the same number: make them anew under another FOLDFLOW_TOPIC_PREFIX"
            )
    return cluster


def uuid_bytes(identity: Any) -> bytes:
    """Return a Kafka topic id as 16 bytes."""
    most, least = identity.get_most_significant_bits(), identity.get_least_significant_bits()
    return bytes((most & (1 << 64) - 1).to_bytes(8) + (least & (1 << 64) - 1).to_bytes(8))


__all__ = [
    "BATCH",
    "PATIENCE_S",
    "TIMESTAMP_LOG_APPEND_TIME",
    "Acks",
    "Cluster",
    "Consumer",
    "KafkaUnreachableError",
    "Message",
    "TopicPartition",
]
