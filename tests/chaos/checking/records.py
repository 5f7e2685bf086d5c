"""What stands on the topics and in the harness's folder, as it is read: nothing is judged here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

TOPICS: Final = ("requests", "inbox", "decisions", "finished", "tool.calls", "llm.calls", "deadletter")
_PATIENCE_S: Final = 60.0
"""How long nothing may come before reading is given up: the broker may just have been started again."""
_BATCH: Final = 10_000
Line = TypeVar("Line", bound="Wanted | Arrival | Disruption")


class CannotReadError(Exception):
    """Something that the checker must read can't be read: nothing is known about what it would say."""


class Record(NamedTuple):
    """A record. `topic` is without the prefix, `timestamp` in milliseconds; `identity`: its header `ce_id`, of decisions only."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    identity: bytes | None = None


class Wanted(NamedTuple):
    """A request that the load has sent (`requests.jsonl`). `expect`: how its run must end, or `any`."""

    request_id: str
    topic: str
    partition: int
    offset: int
    expect: str


class Arrival(NamedTuple):
    """A call as it came in at the witness (`witness.jsonl`)."""

    at_ms: int
    call_id: str
    run_id: str
    step: str
    attempt: int
    tool: str


class Disruption(NamedTuple):
    """What the schedule did to a process (`disruptions.jsonl`)."""

    at_ms: int
    until_ms: int
    kind: str
    role: str
    name: str


def lines(path: Path, kind: type[Line]) -> list[Line] | None:
    """Return a file's lines; None: there is no such file. Raises CannotReadError."""
    if not path.exists():
        return None
    found = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            fields = json.loads(text)
            found.append(kind(**{name: fields[name] for name in kind._fields}))
        except (ValueError, KeyError, TypeError) as error:
            raise CannotReadError(f"{path}, line {number}: {error!r}") from error
    return found


class Cluster:
    """The topics of one installation on a broker. Raises CannotReadError."""

    def __init__(self, servers: str, prefix: str) -> None:
        self._prefix = prefix
        client: dict[str, str | int | float | bool] = {"bootstrap.servers": servers, "log_level": 2}
        self._names = {prefix + topic: topic for topic in TOPICS}
        self._consumer = Consumer(
            client
            | {
                "group.id": f"{prefix}checker",  # needed by the library; nothing is committed
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
                "fetch.message.max.bytes": 16 * 1024 * 1024,
                "fetch.max.bytes": 64 * 1024 * 1024,
                "queued.max.messages.kbytes": 128 * 1024,
            }
        )
        self.topic_ids: dict[str, bytes] = {}
        self.partitions: dict[str, int] = {}
        try:
            admin = AdminClient(client)  # held by name: its answers come only while it lives
            described = admin.describe_topics(TopicCollection(list(self._names)), request_timeout=30)
            for full, topic in self._names.items():
                found = described[full].result()
                self.topic_ids[topic] = _bytes_of(found.topic_id)
                self.partitions[topic] = len(found.partitions)
        except KafkaException as error:
            raise CannotReadError(f"the topics {prefix}… on {servers}: {error}") from error

    def records(self) -> Iterator[Record]:
        """Yield all records of all topics up to their ends as they are now, each partition's in order."""
        ends: dict[tuple[str, int], int] = {}
        starts = []
        try:
            for full, topic in self._names.items():
                for partition in range(self.partitions[topic]):
                    low, high = self._consumer.get_watermark_offsets(TopicPartition(full, partition), timeout=30)
                    if low < high:
                        ends[full, partition] = high
                        starts.append(TopicPartition(full, partition, low))
            self._consumer.assign(starts)
            while ends:
                yield from self._some(ends)
        except KafkaException as error:
            raise CannotReadError(f"the topics {self._prefix}…: {error}") from error

    def _some(self, ends: dict[tuple[str, int], int]) -> Iterator[Record]:
        """Yield what is there, and take the partitions that were read to their ends out of `ends`."""
        messages = self._consumer.consume(1, _PATIENCE_S) + self._consumer.consume(_BATCH, 0)
        if not messages:
            raise CannotReadError(f"nothing came for {_PATIENCE_S:.0f} s; still to be read: {sorted(ends)}")
        for message in messages:
            place, offset = (message.topic() or "", message.partition() or 0), message.offset() or 0
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    ends.pop(place, None)
                elif error.fatal() or error.code() == KafkaError._AUTO_OFFSET_RESET:
                    raise CannotReadError(f"{place}: {error.str()}")
                continue
            if place not in ends or offset >= ends[place]:
                ends.pop(place, None)
                continue
            topic = self._names[place[0]]
            identity = _identity(message.headers()) if topic == "decisions" else None
            yield Record(topic, place[1], offset, message.timestamp()[1], message.key(), message.value(), identity)
            if offset + 1 >= ends[place]:
                del ends[place]

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


def _identity(headers: Any) -> bytes | None:
    found: bytes | str | None = dict(headers or ()).get("ce_id")
    return found.encode() if isinstance(found, str) else found


def _bytes_of(identity: Any) -> bytes:
    most, least = identity.get_most_significant_bits(), identity.get_least_significant_bits()
    return bytes(((most & (1 << 64) - 1) << 64 | least & (1 << 64) - 1).to_bytes(16, "big"))
