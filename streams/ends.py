"""The ends of many partitions, asked for in one request: through a consumer each question would wait behind its fetch."""

from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from streams.kafka import KafkaUnreachableError


def ends(client: AdminClient, places: Iterable[tuple[str, int]], timeout_s: float = 2.0) -> dict[tuple[str, int], int]:
    """Return the ends of partitions, given by topic and number, as of now. Raises KafkaUnreachableError."""
    latest: Any = OffsetSpec
    wanted = {TopicPartition(topic, partition): latest.latest() for topic, partition in places}
    try:
        found = client.list_offsets(wanted, request_timeout=timeout_s)
        return {(place.topic, place.partition): future.result().offset for place, future in found.items()}
    except KafkaException as error:
        raise KafkaUnreachableError(f"the ends of {len(wanted)} partitions: {error}") from error
