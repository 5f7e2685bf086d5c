"""What a Kafka record looks like, coming in and going out: key, value, and the headers that a human filters by.

Headers are CloudEvents' (binary mode) and W3C's `traceparent`. A run's trace has the run's id, a call's span derives from the
call's id, so whoever knows a run can find its trace.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from events import codec
from events.decisions import DeadLetter
from events.topics import DEADLETTER, MAX_VALUE_BYTES, Topic

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A record as it was read. `timestamp` is milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be written; `partition` None: by the key; `value` None: a tombstone."""

    topic: Topic
    key: bytes
    value: bytes | None
    headers: Headers
    partition: int | None = None


def envelope(
    topic: Topic,
    key: str,
    event: Any,
    *,
    source: str,
    identity: str,
    run_id: str | None = None,
    span: str | None = None,
    at_ms: int | None = None,
) -> Outgoing:
    """Return an event as a record of a topic, partitioned by its key.

    `source`: the processor; `identity`: the same for every repetition of this event; `span`: what the trace's span derives from
    (hexadecimal), `identity` by default; `at_ms`: when it happened, now by default.
    """
    headers = cloud_event(type(event).__name__, source, identity, at_ms)
    if run_id is not None:
        headers.append(("traceparent", traceparent(run_id, span or identity)))
    return Outgoing(topic, key.encode(), codec.encode(event), headers)


def cloud_event(kind: str, source: str, identity: str, at_ms: int | None = None) -> Headers:
    """Return the CloudEvents headers of an event."""
    ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    stamp = datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return [
        ("ce_specversion", b"1.0"),
        ("ce_id", identity.encode()),
        ("ce_type", f"foldflow.{kind}".encode()),
        ("ce_source", f"/foldflow/{source}".encode()),
        ("ce_time", stamp.encode()),
        ("content-type", b"application/avro"),
    ]


def traceparent(run_id: str, span: str) -> bytes:
    """Return W3C's header: the run is the trace, `span` names the span (its first 16 hexadecimal digits)."""
    return f"00-{run_id.replace('-', '')[:32]:0>32}-{span[:16]:0>16}-01".encode()


def dead_letter(
    record: Incoming, reason: str, detail: str, source: str, *, run_id: str | None = None, request_id: str | None = None
) -> Outgoing:
    """Return a record that can't be processed as a dead letter with its original bytes (cut where they would not fit)."""
    value = record.value
    room = MAX_VALUE_BYTES - 256 * 1024
    if value is not None and len(value) > room:
        detail, value = f"{detail} (the first {room:,} of {len(value):,} bytes are kept here)", value[:room]
    identity = f"{record.topic}/{record.partition}/{record.offset}"
    letter = DeadLetter(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        reason,
        detail,
        request_id,
        run_id,
        record.key,
        value,
        dict(record.headers),
    )
    return envelope(DEADLETTER, identity, letter, source=source, identity=identity)
