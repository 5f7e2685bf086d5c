"""Says something to a run, and finds what came of it: in the ledger, or in the dead letters.

A command is a record on `requests`; intake puts it into the run's inbox under an identity that derives from its place, and the
run's decision names its place in the inbox. So what came of it is found without guessing, whoever else says the same.
"""

import time
import uuid
from dataclasses import dataclass, field

from events import codec, ids, topics
from events.commands import Command, RunRequest
from events.decisions import DeadLetter
from events.errors import NotDecodableError
from infra.cli import outcome
from infra.cli.history import History
from infra.cli.outcome import Outcome
from infra.cli.terminal import took
from streams import kafka, schemas
from streams.envelope import Incoming, Outgoing, envelope
from streams.kafka import Cluster, TopicPartition
from streams.settings import Settings
from streams.workflow.state import RunState

_POLL_S = 0.2


class TooLargeError(kafka.DeliveryFailedError):
    """A command is larger than any record may be; nothing was sent."""


def send(settings: Settings, cluster: Cluster, run_id: str, command: Command) -> tuple[int, int]:
    """Send a command and return its partition and offset.

    Raises TooLargeError before anything is sent, DeliveryFailedError and KafkaUnreachableError.
    """
    partition = topics.partition_for(run_id.encode(), cluster.partitions[topics.REQUESTS.name])
    request = RunRequest(run_id, None, command)
    record = envelope(topics.REQUESTS, run_id, request, source="cli", identity=str(uuid.uuid4()), run_id=run_id)
    if (size := len(record.value or b"")) > topics.MAX_VALUE_BYTES:
        raise TooLargeError(f"the command is too large: {size:,} bytes; the limit is {topics.MAX_VALUE_BYTES:,}")
    schemas.publish(settings)
    (offset,) = kafka.send(settings, [Outgoing(record.topic, record.key, record.value, record.headers, partition)])
    return partition, offset


class Line:
    """A connection to one run's partition."""

    def __init__(self, settings: Settings, cluster: Cluster, run_id: str) -> None:
        self._settings, self._cluster = settings, cluster
        self._source = kafka.reader(settings)
        self._partition = topics.partition_for(run_id.encode(), cluster.partitions[topics.INBOX.name])
        self._decisions, self._inbox, self._letters, self._requests = (
            kafka.name(settings, topic) for topic in (topics.DECISIONS, topics.INBOX, topics.DEADLETTER, topics.REQUESTS)
        )
        self._next = 0
        self.history = History(run_id, schemas.Schemas(settings))

    def catch_up(self) -> RunState:
        """Read the run's decisions so far, and return what it has come to. Raises NewerCodeError."""
        low, high = kafka.watermarks(self._source, self._decisions, self._partition)
        for message in kafka.read_partition(self._source, self._decisions, self._partition, max(low, self._next), high):
            self.history.take(message.offset() or 0, message.value())
        self._next = max(high, self._next)
        return self.history.state

    def say(self, command: Command, timeout_s: float) -> Outcome:
        """Send a command and return what came of it; call `catch_up` before. Raises DeliveryFailedError and NewerCodeError."""
        places = [TopicPartition(self._decisions, self._partition, self._next), self._end(self._inbox, self._partition)]
        places += [self._end(self._letters, each) for each in range(self._cluster.partitions[topics.DEADLETTER.name])]
        self._source.assign(places)
        partition, offset = send(self._settings, self._cluster, self.history.run_id, command)
        place = ids.position_request_id(self._cluster.ids[topics.REQUESTS.name], partition, offset)
        answer = _Answer(self.history, place, self._cluster.ids[topics.INBOX.name])
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in kafka.poll(self._source, max(0.0, min(_POLL_S, deadline - time.monotonic()))):
                record = kafka.incoming(message)
                match record.topic:
                    case self._decisions:
                        self._next = record.offset + 1
                        answer.decision(record)
                    case self._inbox:
                        answer.inbox(record)
                    case _:
                        answer.letter(record)
            found = answer.found((self._requests, partition, offset), (self._inbox, self._partition))
            if found is not None:
                return found
        return outcome.unanswered(took(timeout_s * 1000))

    def _end(self, topic: str, partition: int) -> TopicPartition:
        return TopicPartition(topic, partition, kafka.watermarks(self._source, topic, partition)[1])

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


@dataclass
class _Answer:
    """What has come since a command was sent, in whatever order the topics were read. `place`: its identity in the inbox."""

    history: History
    place: str
    inbox_id: bytes
    offset: int | None = None
    """Where it stands in the inbox, once that is known."""
    decisions: dict[int, Outcome] = field(default_factory=dict)
    letters: dict[tuple[str, int, int], DeadLetter] = field(default_factory=dict)

    def decision(self, record: Incoming) -> None:
        taken = self.history.take(record.offset, record.value)
        if taken and (decision := self.history.last) is not None and decision.input_topic_id == self.inbox_id:
            self.decisions[decision.input_offset] = outcome.decided(decision, self.history.before)

    def inbox(self, record: Incoming) -> None:
        if self.offset is None and record.headers.get("ce_id") == self.place.encode():
            self.offset = record.offset

    def letter(self, record: Incoming) -> None:
        try:
            letter = codec.decode(record.value, DeadLetter)
        except NotDecodableError:
            if self.history.schemas is not None and self.history.run_id.encode() in (record.value or b""):
                self.history.schemas.refuse_newer(f"a dead letter about run {self.history.run_id}", record.value, DeadLetter)
            return
        self.letters[letter.topic, letter.partition, letter.offset] = letter

    def found(self, request: tuple[str, int, int], inbox: tuple[str, int]) -> Outcome | None:
        if request in self.letters:
            return outcome.refused(self.letters[request])
        if self.offset is None:
            return None
        if (*inbox, self.offset) in self.letters:
            return outcome.refused(self.letters[*inbox, self.offset])
        if self.offset in self.decisions:
            return self.decisions[self.offset]
        # A run that is over decides nothing more: what comes behind its last input is passed over.
        return outcome.over(self.history.state) if self.history.state.over else None
