"""What a Kafka record looks like, coming in and going out: key, value, and the headers that a human filters by.

Headers are CloudEvents' (binary mode) and W3C's `traceparent`. A run's trace has the run's id, a call's span derives from the
call's id, so whoever knows a run can find its trace.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import structlog

from events import codec
from events.decisions import DeadLetter
from events.frozen import frozen
from events.topics import DEADLETTER, MAX_VALUE_BYTES, Topic

log = structlog.get_logger()

Headers = list[tuple[str, bytes]]

CUT: Final = "foldflow_cut"
"""Header of a dead letter that doesn't hold all of its message: the parts that were cut."""
REDRIVEN_FROM: Final = "foldflow_redriven"
"""Header of a message that stands on its topic again after it was a dead letter: where it stood first."""
_MOST_VALUE: Final = MAX_VALUE_BYTES - 256 * 1024
_MOST_KEY: Final = 64 * 1024
_MOST_HEADERS: Final = 64 * 1024
_MOST_TEXT: Final = 8 * 1024  # characters
_PLACE: Final = re.compile(r"(.+)/(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,17})", re.ASCII)


class ReadHeaders(Mapping[str, bytes | None]):
    """A record's headers, read when somebody asks for them: hardly any record is asked for its own.

    `read` returns them, None where some can't be read: then they are `lost`.
    """

    __slots__ = ("_found", "_read")

    def __init__(self, read: Callable[[], list[tuple[str, bytes | None]] | None]) -> None:
        self._read: Callable[[], list[tuple[str, bytes | None]] | None] | None = read
        self._found: dict[str, bytes | None] | None = None

    @property
    def lost(self) -> bool:
        """Whether there are some that can't be read."""
        return self._all() is None

    def _all(self) -> dict[str, bytes | None] | None:
        if self._read is not None:
            found, self._read = self._read(), None
            self._found = None if found is None else dict(found)
        return self._found

    def __getitem__(self, name: str) -> bytes | None:
        return (self._all() or {})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all() or {})

    def __len__(self) -> int:
        return len(self._all() or {})


@frozen
class Incoming:
    """A record as it was read. `timestamp` is milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes | None] = field(default_factory=dict)


@frozen
class Outgoing:
    """A record to be written; `partition` None: by the key; `value` None: a tombstone; `at_ms` None: the time of writing."""

    topic: Topic
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int | None = None
    at_ms: int | None = None


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
    version, type_, from_, content = _fixed(kind, source)
    stamp = _stamp(time.time_ns() // 1_000_000 if at_ms is None else at_ms)
    return [version, ("ce_id", identity.encode()), type_, from_, stamp, content]


@lru_cache(maxsize=1024)
def _fixed(kind: str, source: str) -> tuple[tuple[str, bytes], ...]:
    """Return the headers that all events of a kind have alike."""
    return (
        ("ce_specversion", b"1.0"),
        ("ce_type", f"foldflow.{kind}".encode()),
        ("ce_source", f"/foldflow/{source}".encode()),
        ("content-type", b"application/avro"),
    )


@lru_cache(maxsize=1024)
def _stamp(ms: int) -> tuple[str, bytes]:
    """Return the header that says when; under load many events are of one millisecond."""
    at = datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return "ce_time", at.encode()


def traceparent(run_id: str, span: str) -> bytes:
    """Return W3C's header: the run is the trace, `span` names the span (its first 16 hexadecimal digits)."""
    return f"00-{run_id.replace('-', '')[:32]:0>32}-{span[:16]:0>16}-01".encode()


def dead_letter(
    record: Incoming, reason: str, detail: str, source: str, *, run_id: str | None = None, request_id: str | None = None
) -> Outgoing:
    """Return a record that can't be processed as a dead letter with its original bytes.

    Parts that would not fit are cut, and `CUT` names them: a letter that can't be written would stop the partition for good.
    It is logged here, so that none goes by unseen.
    """
    key, value, headers = record.key, record.value, _fitting(record.headers)
    sizes = {"value": (len(value or b""), _MOST_VALUE), "key": (len(key or b""), _MOST_KEY)}
    cut = [part for part, (size, most) in sizes.items() if size > most]
    lost = isinstance(record.headers, ReadHeaders) and record.headers.lost
    cut += ["headers"] * (lost or len(headers) < len(record.headers))
    told = "; ".join(f"of its {part} the first {sizes[part][1]:,} of {sizes[part][0]:,} bytes" for part in cut if part in sizes)
    detail = (
        detail[:_MOST_TEXT] + (f" ({told} are kept here)" if told else "") + " (not all headers are kept)" * ("headers" in cut)
    )
    identity = f"{record.topic}/{record.partition}/{record.offset}"
    letter = DeadLetter(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        reason,
        detail,
        request_id and request_id[:_MOST_KEY],
        run_id and run_id[:_MOST_TEXT],
        key and key[:_MOST_KEY],
        value and value[:_MOST_VALUE],
        headers,
    )
    found = envelope(DEADLETTER, identity, letter, source=source, identity=identity)
    # Once it is bytes: what Avro takes as text can be written to any log.
    log.warning("deadletter", reason=reason, detail=detail, source=source, at=identity, run_id=letter.run_id)
    return replace(found, headers=[*found.headers, (CUT, ",".join(cut).encode())]) if cut else found


def redriven_from(topic: str, headers: Mapping[str, bytes | None]) -> tuple[int, int] | None:
    """Return the partition and offset where a message of a topic stood first, if it was redriven."""
    found = _PLACE.fullmatch((headers.get(REDRIVEN_FROM) or b"").decode("utf-8", "replace"))
    return None if found is None or found[1] != topic else (int(found[2]), int(found[3]))


def _fitting(headers: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """Return the headers, as far as a dead letter has room for them and their names are text."""
    kept, size = dict[str, bytes | None](), 0
    for name, value in headers.items():
        try:
            size += len(name.encode()) + len(value or b"") + 16
        except UnicodeEncodeError:  # no UTF-8: anybody can write such a name
            continue
        if size > _MOST_HEADERS:
            break
        kept[name] = value
    return kept
