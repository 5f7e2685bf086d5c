"""Single records read again from the log, where the views hold only their place."""

from events import codec, topics
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from streams import kafka
from streams.lending import lent
from streams.settings import Settings


class RecordGoneError(Exception):
    """The record is not (or no longer) what the views have read at this place."""


def decision_at(settings: Settings, partition: int, offset: int, expected_hash: bytes) -> Decision:
    """Return the decision at a place of the log.

    Raises RecordGoneError when another record, or none, is there, and KafkaUnreachableError.
    """
    topic = kafka.name(settings, topics.DECISIONS)
    with lent(settings) as source:
        for message in kafka.read_partition(source, topic, partition, offset, offset + 1):
            value = message.value()
            if message.offset() != offset or chain_hash(codec.unframed(value or b"")) != expected_hash:
                break
            try:
                return codec.decode(value, Decision)
            except NotDecodableError as error:
                raise RecordGoneError(f"{topic}/{partition}/{offset} can't be decoded: {error}") from error
    raise RecordGoneError(f"the record at {topic}/{partition}/{offset} is not the one that was read before")
