"""Committed offsets of a consumer group: fetched and written though the group's coordinator is away for a while."""

import time
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streams.patience import PATIENCE_S, Patience

_AWAY: Final = frozenset(
    {
        KafkaError._TIMED_OUT,  # noqa: SLF001 - the library's own names
        KafkaError._TRANSPORT,  # noqa: SLF001
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        KafkaError._WAIT_COORD,  # noqa: SLF001
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
    }
)
"""Errors of a commit for which trying again can help: the group's coordinator is away, or not here any more."""


def commit(member: Consumer, offsets: list[TopicPartition], patience_s: float) -> None:
    """Commit and wait for it, trying again for a while when the group's coordinator is away. Raises KafkaException."""
    deadline = time.monotonic() + patience_s
    while (error := _commit_error(member, offsets)) is not None:
        if error.code() not in _AWAY or time.monotonic() > deadline:
            raise KafkaException(error)
        time.sleep(0.2)


def _commit_error(member: Consumer, offsets: list[TopicPartition]) -> KafkaError | None:
    try:
        done = member.commit(offsets=offsets, asynchronous=False)
    except KafkaException as error:
        return error.args[0]  # type: ignore[no-any-return]
    return next((each.error for each in done if each.error is not None), None)


def committed(member: Consumer, places: list[TopicPartition], timeout_s: float = PATIENCE_S) -> list[TopicPartition]:
    """Return what a group has committed for these partitions.

    Raises KafkaUnreachableError when the broker stays away, and EndingError.
    """
    patience = Patience(f"the committed offsets of {', '.join({each.topic for each in places})}", timeout_s)
    while True:
        try:
            return member.committed(places, timeout=10.0)
        except KafkaException as error:
            patience.after(error)


def metadata(covered_ms: int | None, done: str) -> str:
    """Return a worker's metadata of a commit: up to when it covers results (see `processors.answered`), and what is done."""
    return f"{covered_ms}:{done}" if covered_ms is not None else done


def covered(metadata_: str) -> tuple[int | None, str]:
    """Return what a worker's metadata says: up to when the commit covers results, if it says so, and what is done."""
    covered_ms, colon, done = metadata_.rpartition(":")
    return (int(covered_ms), done) if colon and covered_ms.isdecimal() else (None, done)
