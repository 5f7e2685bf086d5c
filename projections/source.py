"""Where the views come from: a consumer of the topics without a group. It reads and never writes.

It ends in front of a record that newer code wrote: views that pass over one stay wrong, and take what follows for a break.
"""

import time
from collections.abc import Sequence
from typing import Final

import structlog

from events import topics
from events.decisions import DeadLetterSettled
from events.errors import NewerCodeError
from events.topics import Topic
from projections.database import Positions
from projections.ledger import Record
from projections.views import SOURCES, Batch
from streams import kafka
from streams.ends import ends
from streams.kafka import Cluster, KafkaUnreachableError, TopicPartition, TopicsMissingError
from streams.schemas import Schemas
from streams.settings import Settings

log = structlog.get_logger()

BATCH: Final = 10_000
"""Most records of one transaction (measured: 9,500 decisions/s at 1,000, 15,600 at 10,000, 15,700 at 50,000)."""
_BATCH_BYTES: Final = 32 * 1024 * 1024
"""From which size on a batch is not added to: decoded it takes several times as much memory."""
_PATIENCE_S: Final = 0.2
_GATHER_S: Final = 0.1
_LOOK_EVERY_S: Final = 5.0
"""How often to ask whether the topics are still the same ones: 2 ms each time."""
_SILENCE_S: Final = 10.0
"""When nothing has come for so long, the partitions' ends are asked for, rather than taken from fetches that may have ceased."""
_FETCHES: Final = {"fetch.min.bytes": 64 * 1024, "fetch.wait.max.ms": 50}
"""Under load a fetch for each record that comes would take the broker as much as another processor; this one isn't in a hurry."""
_KINDS: Final = {
    topic.name: (topic.kind, DeadLetterSettled) if topic is topics.DEADLETTER else (topic.kind,) for topic in SOURCES
}
"""What stands on the topics."""


class TopicsChangedError(Exception):
    """The topics are no longer those that the views were made from."""


class Source:
    """The topics of the views. `ends`: the ends of all partitions, as last heard. For one thread.

    `decisions`: only these partitions of `decisions`, and no other topic. `most`: how many records a batch may have.
    """

    def __init__(self, settings: Settings, cluster: Cluster, decisions: Sequence[int] | None = None, most: int = BATCH) -> None:
        self._settings, self._cluster, self._most = settings, cluster, most
        self._read: dict[Topic, Sequence[int]] = {topic: range(cluster.partitions[topic.name]) for topic in SOURCES}
        if decisions is not None:
            self._read = {topics.DECISIONS: decisions}
        self._consumer, self._admin = kafka.reader(settings, **_FETCHES), kafka.admin(settings)
        self._schemas = Schemas(settings)
        self._newer: dict[tuple[str, int], NewerCodeError] = {}
        self._looked = self._heard = time.monotonic()
        self._doubted: Positions = {}
        self._positions: Positions = {}
        self.ends: Positions = {}

    def look(self) -> Positions:
        """Ask for first offsets and ends of all partitions; return the first offsets. Raises KafkaUnreachableError."""
        firsts: Positions = {}
        for topic, partitions in self._read.items():
            for partition in partitions:
                low, high = kafka.watermarks(self._consumer, kafka.name(self._settings, topic), partition)
                firsts[topic.name, partition], self.ends[topic.name, partition] = low, high
        return firsts

    def begin(self, positions: Positions) -> None:
        """Read from these positions on."""
        self._positions = dict(positions)
        self._heard = time.monotonic()  # a rebuild may have taken minutes since it was made
        self._consumer.assign([self._place(*place, positions.get(place, 0)) for place in self.ends])

    def check(self) -> None:
        """Look whether the topics are still the same ones (now and then) and as long as they were. Raises TopicsChangedError.

        librdkafka doesn't tell: in a topic that was made anew it would go on at the offset where it was.
        """
        shorter = [place for place, end in self.ends.items() if end < self._positions.get(place, 0)]
        if shorter:
            raise TopicsChangedError(f"the log is shorter than what was read: {shorter}")
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        try:
            now = kafka.find(self._admin, self._settings, SOURCES)
        except TopicsMissingError as error:
            raise TopicsChangedError(str(error)) from error
        except KafkaUnreachableError:
            return  # it is away for now; who asks for health is told
        if now != self._cluster:
            changed = [topic.name for topic in SOURCES if now.ids[topic.name] != self._cluster.ids[topic.name]]
            raise TopicsChangedError(f"{changed or 'the numbers of partitions'} changed while they were read")
        if time.monotonic() - self._heard >= _SILENCE_S:
            self._listen_again()

    def _listen_again(self) -> None:
        """Begin anew with another consumer if this one is silent though there is something to be heard.

        One was seen that had heard nothing for minutes after its broker went away and came back.
        """
        self._heard = time.monotonic()
        places = {(kafka.name(self._settings, topics.TOPICS[topic]), each): (topic, each) for topic, each in self.ends}
        try:
            self.ends |= {places[place]: end for place, end in ends(self._admin, places).items()}
        except KafkaUnreachableError:
            return
        unheard = {
            place: end for place, end in self.ends.items() if self._positions.get(place, 0) < end and place not in self._newer
        }
        # Once for the same ends: what is left there may be nothing to be read, as a transaction's end mark or what is deleted.
        if unheard and unheard != self._doubted:
            log.warning("views.unheard", records={f"{topic}/{partition}": end for (topic, partition), end in unheard.items()})
            self._doubted = unheard
            self._consumer.close()
            self._consumer = kafka.reader(self._settings, **_FETCHES)
            self.begin(self._positions)

    def poll(self) -> Batch:
        """Return what has come within 0.2 s; far behind, wait a little for a full batch: each transaction costs 10 ms.

        Of a partition nothing behind a record that newer code wrote. Raises KafkaUnreachableError.
        """
        messages = kafka.poll(self._consumer, _PATIENCE_S, self._most)
        if messages:
            self._heard = time.monotonic()
        size = sum(map(len, messages))
        until = time.monotonic() + _GATHER_S
        while messages and len(messages) < self._most and time.monotonic() < until and self.far_behind:
            if size > _BATCH_BYTES:
                break
            more = kafka.poll(self._consumer, _GATHER_S, self._most - len(messages))
            messages += more
            size += sum(map(len, more))
        found: dict[str, list[Record]] = {topic.name: [] for topic in SOURCES}
        prefix = len(self._settings.topic_prefix)
        for message in messages:
            topic = (message.topic() or "")[prefix:]
            key = message.key() if topic == topics.WORKERS.name else None
            record = Record(message.partition() or 0, message.offset() or 0, message.value(), key)
            # After a broker's "offset out of range" librdkafka starts from the beginning: what was read isn't read again.
            if record.offset >= self._positions.get((topic, record.partition), 0) and not self._is_newer(topic, record):
                found[topic].append(record)
                self._positions[topic, record.partition] = record.offset + 1
        self._hear_ends()
        return Batch(*(found[topic.name] for topic in SOURCES))

    def _is_newer(self, topic: str, record: Record) -> bool:
        """Whether newer code wrote this, or something before it in its partition: nothing behind that is to be taken."""
        place = topic, record.partition
        if place not in self._newer and topic != topics.WORKERS.name:
            try:
                self._schemas.refuse_newer(f"{topic}/{record.partition}/{record.offset}", record.value, *_KINDS[topic])
            except NewerCodeError as error:
                self._newer[place] = error
        return place in self._newer

    def refuse_newer(self) -> None:
        """Raise NewerCodeError if there is a record that newer code wrote; everything else of the last batch was taken before."""
        for error in self._newer.values():
            raise error

    @property
    def far_behind(self) -> bool:
        """Whether there is more than a batch to be read."""
        return self._behind() > self._most

    def _behind(self) -> int:
        return sum(max(0, end - self._positions.get(place, 0)) for place, end in self.ends.items())

    def _hear_ends(self) -> None:
        """Take the partitions' ends that came with the last fetches: no question to the broker."""
        for place in self.ends:
            low_high = self._consumer.get_watermark_offsets(self._place(*place), cached=True)
            if low_high is not None and low_high[1] >= 0:
                self.ends[place] = low_high[1]

    def _place(self, topic: str, partition: int, offset: int | None = None) -> TopicPartition:
        full = kafka.name(self._settings, topics.TOPICS[topic])
        return TopicPartition(full, partition) if offset is None else TopicPartition(full, partition, offset)

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


def found(settings: Settings) -> Cluster:
    """Return what is known of the views' topics. Raises KafkaUnreachableError and TopicsMissingError within two seconds."""
    return kafka.find(kafka.admin(settings), settings, SOURCES)


def reachable(settings: Settings) -> bool:
    """Ask Kafka whether it answers (two seconds if it doesn't)."""
    try:
        found(settings)
    except KafkaUnreachableError:
        return False
    except TopicsMissingError:
        pass
    return True
