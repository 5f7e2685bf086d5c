"""The first offsets and the ends of many partitions, each in one request: a consumer's own question waits behind its fetch."""

from collections.abc import Iterable

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from streams.kafka import KafkaUnreachableError

Offsets = dict[tuple[str, int], int]
"""By topic and partition."""


def firsts(client: AdminClient, places: Iterable[tuple[str, int]], timeout_s: float = 2.0) -> Offsets:
    """Return the first offsets of partitions as of now. Raises KafkaUnreachableError."""
    return _asked(client, places, OffsetSpec.earliest(), timeout_s)  # type: ignore[no-untyped-call]


def ends(client: AdminClient, places: Iterable[tuple[str, int]], timeout_s: float = 2.0) -> Offsets:
    """Return the ends of partitions as of now. Raises KafkaUnreachableError."""
    return _asked(client, places, OffsetSpec.latest(), timeout_s)  # type: ignore[no-untyped-call]


def _asked(client: AdminClient, places: Iterable[tuple[str, int]], spec: OffsetSpec, timeout_s: float) -> Offsets:
    wanted = {TopicPartition(*place): spec for place in places}
    try:
        found = client.list_offsets(wanted, request_timeout=timeout_s)
        return {(place.topic, place.partition): future.result().offset for place, future in found.items()}
    except KafkaException as error:
        raise KafkaUnreachableError(f"Kafka did not tell the offsets of {len(wanted)} partitions: {error.args[0]}") from error
