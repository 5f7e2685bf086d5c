"""The dead letters as they stand on Kafka, and what is done about them: put on their topic again, or discarded.

Both are events of their own on the same topic, under the dead letter's key, so a letter and its history are in one partition.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from confluent_kafka import KafkaError, Message

from events import codec, topics
from events.decisions import DeadLetter, DeadLetterSettled
from events.errors import NotDecodableError
from projections.deadletters import ACTIONS
from streams import kafka
from streams.envelope import CUT, REDRIVEN_FROM, Incoming, Outgoing, envelope, redriven_from
from streams.kafka import Cluster
from streams.settings import Settings

REDRIVABLE: Final = (topics.REQUESTS, topics.INBOX, topics.LLM_CALLS, topics.TOOL_CALLS)
"""Topics that processors take work from. `decisions` is history: nobody but a partition's owner may write it."""
BATCH: Final = 100
"""How many messages are sent before they are noted as redriven: so many a crash in between can repeat."""

Place = tuple[str, int, int]


class NotRedrivableError(Exception):
    """A message can't be put on its topic again; the text says why, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A dead letter without its value, and what was done about it, oldest first.

    `at`: when it became one, milliseconds since the epoch; `stands`: its own partition and offset; `size`: of the value, in
    bytes; `cut`: the parts of the message that are not whole.
    """

    letter: DeadLetter
    at: int
    stands: tuple[int, int]
    size: int | None
    cut: str = ""
    settled: tuple[DeadLetterSettled, ...] = ()

    @property
    def place(self) -> Place:
        """Where the message was."""
        return self.letter.topic, self.letter.partition, self.letter.offset

    @property
    def status(self) -> str:
        """`open`, or what was done last: `redriven` or `discarded`."""
        return self.settled[-1].action if self.settled else "open"


def written(place: Place) -> str:
    """Return a place as people write it."""
    return "/".join(map(str, place))


class Letters:
    """A connection to the topic `deadletter`, and what stands there."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self._settings = settings
        self._source = kafka.reader(settings)
        self._topic = kafka.name(settings, topics.DEADLETTER)
        self._partitions = cluster.partitions[topics.DEADLETTER.name]

    def read(self) -> list[Entry]:
        """Return all dead letters, oldest first. Raises KafkaUnreachableError."""
        found: dict[Place, Entry] = {}
        for partition in range(self._partitions):
            for message in kafka.read_partition(self._source, self._topic, partition, 0):
                take(found, kafka.incoming(message))
        return sorted(found.values(), key=lambda entry: (entry.at, entry.place))

    def whole(self, entry: Entry) -> DeadLetter:
        """Return a dead letter with its value. Raises KafkaUnreachableError, and NotRedrivableError when it is gone."""
        partition, offset = entry.stands
        for message in kafka.read_partition(self._source, self._topic, partition, offset, offset + 1):
            if message.offset() == offset:
                return codec.decode(message.value(), DeadLetter)
        raise NotRedrivableError(f"{written(entry.place)}: its dead letter is no longer on {self._topic}")

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


def take(found: dict[Place, Entry], record: Incoming) -> None:
    """Take a record of the topic; the first letter about a message counts, what can't be read is passed over."""
    value = record.value
    try:
        if codec.kind_of(value) is DeadLetterSettled:
            settled = codec.decode(value, DeadLetterSettled)
            place = settled.topic, settled.partition, settled.offset
            if place in found and settled.action in ACTIONS:  # the letter is always before it: they have one key
                found[place] = replace(found[place], settled=(*found[place].settled, settled))
            return
        letter = codec.decode(value, DeadLetter)
    except NotDecodableError:
        return
    size = None if letter.value is None else len(letter.value)
    cut = (record.headers.get(CUT) or b"").decode("utf-8", "replace")
    entry = Entry(replace(letter, value=None), record.timestamp, (record.partition, record.offset), size, cut)
    found.setdefault(entry.place, entry)


# --- What is done about them ---


def source_topic(settings: Settings, entry: Entry) -> topics.Topic:
    """Return the topic that a message goes to again. Raises NotRedrivableError for one that can't or must not."""
    name, place = entry.letter.topic, written(entry.place)
    topic = next((each for each in REDRIVABLE if kafka.name(settings, each) == name), None)
    if topic is None:
        allowed = ", ".join(kafka.name(settings, each) for each in REDRIVABLE)
        raise NotRedrivableError(f"{place}: nothing is ever put on {name} again, only on {allowed}; discard it")
    if entry.cut:
        raise NotRedrivableError(
            f"{place}: the dead letter holds only a part of the message (cut: {entry.cut}), it was too large to keep; "
            "send it anew from where it came from, and discard this"
        )
    return topic


class Settler:
    """Settles dead letters; `by`, `reason`: what their events say. For one thread."""

    def __init__(self, settings: Settings, letters: Letters, by: str, reason: str) -> None:
        self._settings, self._letters, self._by, self._reason = settings, letters, by, reason
        self._producer = kafka.producer(settings)

    def redrive(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, DeadLetterSettled | NotRedrivableError]]:
        """Put messages on their topics again, and yield each with what was noted, or why not.

        A message is noted as redriven when the broker has acknowledged it there; between the two a crash leaves it open.
        Raises DeliveryFailedError.
        """
        batch: list[Entry] = []
        for entry in entries:
            batch.append(entry)
            if len(batch) == BATCH:
                yield from self._redriven(batch)
                batch = []
        yield from self._redriven(batch)

    def _redriven(self, batch: list[Entry]) -> Iterator[tuple[Entry, DeadLetterSettled | NotRedrivableError]]:
        now: dict[Place, tuple[int, int]] = {}
        refused: dict[Place, NotRedrivableError] = {}
        acks = kafka.Acks()
        for entry in batch:
            try:
                record = again(source_topic(self._settings, entry), self._letters.whole(entry))
            except NotRedrivableError as error:
                refused[entry.place] = error
                continue
            kafka.produce(self._producer, self._settings, record, _noting(acks, now, entry.place))
        kafka.flush(self._producer, acks, timeout_s=60)
        settled = {place: self._settlement(place, "redriven", where) for place, where in now.items()}
        self._write(settled.values())
        for entry in batch:
            yield entry, refused[entry.place] if entry.place in refused else settled[entry.place]

    def discard(self, entries: Iterable[Entry]) -> list[DeadLetterSettled]:
        """Note that nothing is to be done about dead letters any more; they stay where they are. Raises DeliveryFailedError."""
        settled = [self._settlement(entry.place, "discarded", (None, None)) for entry in entries]
        self._write(settled)
        return settled

    def _settlement(self, place: Place, action: str, where: tuple[int | None, int | None]) -> DeadLetterSettled:
        return DeadLetterSettled(*place, action, time.time_ns() // 1_000_000, self._by, self._reason, *where)

    def _write(self, settled: Iterable[DeadLetterSettled]) -> None:
        acks = kafka.Acks()
        for each in settled:
            place = written((each.topic, each.partition, each.offset))
            record = envelope(topics.DEADLETTER, place, each, source="cli", identity=f"{place}/{each.action}/{each.at}")
            kafka.produce(self._producer, self._settings, record, acks)
        kafka.flush(self._producer, acks, timeout_s=60)


def again(topic: topics.Topic, letter: DeadLetter) -> Outgoing:
    """Return the message of a dead letter as it was, and where it was first in a header. Its key chooses the partition anew."""
    headers: Mapping[str, bytes | None] = letter.headers
    place = written((letter.topic, *(redriven_from(letter.topic, headers) or (letter.partition, letter.offset)))).encode()
    kept: list[Any] = [(name, value) for name, value in headers.items() if name != REDRIVEN_FROM]
    return Outgoing(topic, letter.key, letter.value, [*kept, (REDRIVEN_FROM, place)])


def _noting(acks: kafka.Acks, now: dict[Place, tuple[int, int]], place: Place) -> Any:
    def noted(error: KafkaError | None, message: Message) -> None:
        acks(error, message)
        if error is None:
            now[place] = message.partition() or 0, message.offset() or 0

    return noted
