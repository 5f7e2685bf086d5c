"""Where the views come from: a consumer of the topics without a group. It reads and never writes."""

import time
from typing import Final

import structlog

from events import topics
from projections.database import Positions
from projections.ledger import Record
from projections.views import SOURCES, Batch
from streams import kafka
from streams.kafka import Cluster, KafkaUnreachableError, TopicPartition
from streams.settings import Settings

log = structlog.get_logger()

BATCH: Final = 10_000
"""Most records of one transaction (measured: 9,500 decisions/s at 1,000, 15,600 at 10,000, 15,700 at 50,000)."""
_PATIENCE_S: Final = 0.2
_GATHER_S: Final = 0.1


class Source:
    """The topics of the views. `ends`: the ends of all partitions, as last heard. For one thread."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self._settings, self._cluster = settings, cluster
        self._consumer = kafka.reader(settings)
        self._positions: Positions = {}
        self.ends: Positions = {}

    def look(self) -> Positions:
        """Ask for first offsets and ends of all partitions; return the first offsets. Raises KafkaUnreachableError."""
        firsts: Positions = {}
        for topic in SOURCES:
            for partition in range(self._cluster.partitions[topic.name]):
                low, high = kafka.watermarks(self._consumer, kafka.name(self._settings, topic), partition)
                firsts[topic.name, partition], self.ends[topic.name, partition] = low, high
        return firsts

    def begin(self, positions: Positions) -> None:
        """Read from these positions on."""
        self._positions = dict(positions)
        self._consumer.assign([self._place(*place, positions.get(place, 0)) for place in self.ends])

    def poll(self) -> Batch:
        """Return what has come within 0.2 s; far behind, wait a little for a full batch: each transaction costs 10 ms."""
        messages = kafka.poll(self._consumer, _PATIENCE_S, BATCH)
        until = time.monotonic() + _GATHER_S
        while messages and len(messages) < BATCH and time.monotonic() < until and self._behind() > BATCH:
            messages += kafka.poll(self._consumer, _GATHER_S, BATCH - len(messages))
        found: dict[str, list[Record]] = {topic.name: [] for topic in SOURCES}
        prefix = len(self._settings.topic_prefix)
        for message in messages:
            topic = (message.topic() or "")[prefix:]
            record = Record(message.partition() or 0, message.offset() or 0, message.value())
            # After a broker's "offset out of range" librdkafka starts from the beginning: what was read isn't read again.
            if record.offset >= self._positions.get((topic, record.partition), 0):
                found[topic].append(record)
                self._positions[topic, record.partition] = record.offset + 1
        self._hear_ends()
        return Batch(found[topics.DECISIONS.name], found[topics.DEADLETTER.name], found[topics.SPECS.name])

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


def reachable(settings: Settings) -> bool:
    """Ask Kafka whether it answers (two seconds if it doesn't)."""
    try:
        kafka.connect(settings, timeout_s=0)
    except KafkaUnreachableError:
        return False
    return True
