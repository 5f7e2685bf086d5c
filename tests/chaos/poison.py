"""What anybody with write access can put on the topics, and what must come of it: a table, and what is needed to send it.

`POISONS` is the contract: each line says what stands on which topic and what becomes of it. `Dead`: it is a dead letter with this
reason. `Decided`: its run's decision says that it changed nothing. `Passed`: nothing follows from it, and why that is right.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from confluent_kafka import Producer
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from events import codec, ids, topics
from events.commands import SignalReceived
from events.decisions import DeadLetter, FinishedRun
from events.results import InboxMessage, Input
from events.topics import Topic
from streams.workflow.spec import WorkflowSpec

CODECS: Final = ("none", "gzip", "snappy", "lz4", "zstd")
MB: Final = 1024 * 1024
RECORD_LIMIT: Final = topics.MAX_VALUE_BYTES + MB
"""Largest batch that a topic of ours takes, in bytes, as it is sent: a compressed one may hold far more."""
FULL: Final = RECORD_LIMIT - 400
"""The largest key or value that a topic takes, less some bytes for the batch around it."""
DEEP: Final = "[" * 100_000 + "]" * 100_000
FUTURE_MS: Final = 32_503_680_000_000  # the year 3000
LONG_AGO: Final = (1, 1_000_000_000)
"""Milliseconds since the epoch. Times to come the broker refuses."""
NO_RUN: Final = ids.run_id("nobody asked for this")
SIGNAL: Final = SignalReceived("s", "never-awaited", None, "null", "somebody")
Headers = Sequence[tuple[Any, bytes | None]]

HONEST: Final = WorkflowSpec.model_validate(
    {
        "name": "honest",
        "steps": {
            "one": {"tool": {"name": "echo", "arguments": {"value": "=input.text"}}},
            "two": {"tool": {"name": "echo", "arguments": {"value": "=input.text"}}, "needs": ["one"]},
        },
    }
)
WAITING: Final = WorkflowSpec.model_validate({"name": "waiting", "steps": {"wait": {"wait_for": {"signal": "never"}}}})


@dataclass(frozen=True, slots=True)
class Shot:
    """One record, as an outsider sends it. `partition` None: any; `timestamp` 0: now; `codec`: how its batch is compressed."""

    value: bytes | None
    key: bytes | None = b"k"
    headers: Headers = ()
    partition: int | None = None
    timestamp: int = 0
    codec: str = "none"


@dataclass(frozen=True, slots=True)
class Scene:
    """What the senders know. `open`: a run that waits for ever; `over`: one that is finished; `partitions`: of every topic."""

    inbox_id: bytes
    decisions_id: bytes
    partitions: int
    open: str
    over: str

    def home(self, run_id: str) -> int:
        """Return a run's partition."""
        return topics.partition_for(run_id.encode(), self.partitions)

    def said(self, run_id: str, said: Input, *, key: str | None = None, partition: int | None = None) -> Shot:
        """Return an input as anybody can put it into a run's inbox."""
        where = self.home(run_id) if partition is None else partition
        return Shot(codec.encode(InboxMessage(run_id, said)), (key or run_id).encode(), partition=where)


@dataclass(frozen=True, slots=True)
class Dead:
    """A dead letter with this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision of the run that was meant: `InputIgnored` with this reason; `letter`: and a dead letter with that one."""

    ignored: str
    letter: str | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """Neither; and why that is right."""

    why: str


Outcome = Dead | Decided | Passed


@dataclass(frozen=True, slots=True)
class Poison:
    """One kind of poison. `takeover`: it is read when a process starts, or an owner takes over."""

    name: str
    topic: Topic
    shots: Callable[[Scene], Sequence[Shot]]
    outcome: Outcome
    takeover: bool = False


# --- Sending ---


@dataclass(eq=False, slots=True)
class Outsider:
    """Somebody with write access and any client."""

    bootstrap: str
    prefix: str
    _producers: dict[str, Producer] = field(default_factory=dict)

    def send(self, topic: Topic, shots: Sequence[Shot]) -> list[tuple[str, int, int]]:
        """Send records and return where each stands (full topic, partition, offset)."""
        places: dict[int, tuple[str, int, int]] = {}
        name = self.prefix + topic.name
        for i, shot in enumerate(shots):

            def delivered(error: Any, message: Any, i: int = i) -> None:
                assert error is None, error
                places[i] = message.topic(), message.partition(), message.offset()

            if any(not isinstance(key, str) for key, _ in shot.headers):
                places[i] = name, *self._raw(name, shot)
                continue
            where: dict[str, Any] = {} if shot.partition is None else {"partition": shot.partition}
            self._producer(shot.codec).produce(
                name,
                shot.value,
                shot.key,
                headers=list(shot.headers),
                timestamp=shot.timestamp,
                on_delivery=delivered,
                **where,
            )
        for producer in self._producers.values():
            assert producer.flush(60) == 0
        return [places[i] for i in range(len(shots))]

    def refused(self, topic: Topic, shot: Shot) -> str | None:
        """Send a record and return the name of the broker's refusal, None: it took it."""
        found: list[Any] = []
        self._producer(shot.codec).produce(
            self.prefix + topic.name,
            shot.value,
            shot.key,
            timestamp=shot.timestamp,
            on_delivery=lambda error, _: found.append(error.name() if error else None),
        )
        assert self._producer(shot.codec).flush(60) == 0
        return str(found[0]) if found[0] else None

    def _producer(self, compression: str) -> Producer:
        if compression not in self._producers:
            self._producers[compression] = Producer(
                {
                    "bootstrap.servers": self.bootstrap,
                    "compression.type": compression,
                    "message.max.bytes": 200 * MB,
                    "partitioner": "murmur2_random",
                    "linger.ms": 0,
                    "log_level": 0,
                }
            )
        return self._producers[compression]

    def _raw(self, topic: str, shot: Shot) -> tuple[int, int]:
        """Send what no client library lets one send (header names that are no UTF-8), in the protocol's own bytes."""
        builder = _DefaultRecordBatchBuilderPy(2, 0, False, -1, -1, -1, 1 << 24)
        builder.append(0, shot.timestamp or round(time.time() * 1000), shot.key, shot.value, [*shot.headers])
        batch, partition = bytes(builder.build()), shot.partition or 0
        text = struct.Struct(">h")
        name = topic.encode()
        body = struct.pack(">hhii", -1, -1, 10_000, 1)  # no transaction, all acknowledgements, 10 s, one topic
        body += text.pack(len(name)) + name + struct.pack(">iii", 1, partition, len(batch)) + batch
        header = struct.pack(">hhi", 0, 7, 1) + text.pack(4) + b"evil"
        host, _, port = self.bootstrap.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as line:
            line.sendall(struct.pack(">i", len(header) + len(body)) + header + body)
            (size,) = struct.unpack(">i", _exactly(line, 4))
            answer = _exactly(line, size)
        at = 4 + 4 + 2 + len(name) + 4
        _, error, offset = struct.unpack_from(">ihq", answer, at)
        assert error == 0, f"the broker refuses it: {error}"
        return partition, offset


def _exactly(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += line.recv(size - len(found))
    return found


class Name:
    """A header's name in bytes of its own."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def encode(self, encoding: str) -> bytes:
        """Return the bytes, whatever the encoding."""
        del encoding
        return self.raw


# --- What is sent ---

_SCHEMA_IDS: Final = struct.Struct(">bI")


def unknown_schema() -> bytes:
    """Return what is framed well, and in a schema that nobody knows."""
    return _SCHEMA_IDS.pack(0, 0x7EADBEEF) + b"\x02\x02\x02"


def junk(sample: Any) -> list[bytes | None]:
    """Return what can't be decoded where `sample` belongs: a tombstone, the ways in which bytes are wrong, hypothesis's."""
    whole = codec.encode(sample)
    other = codec.encode(DeadLetter("t", 0, 0, 0, "r", "d") if not isinstance(sample, DeadLetter) else FinishedRun(b"x", 1))
    named: list[bytes | None] = [
        None,
        b"",
        b"\0",
        whole[:4],
        whole[:5],
        whole[: len(whole) // 2],
        whole + b"\0",
        whole[:5] + b"\xff" * 40,
        whole[:5] + b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01" + b"x" * 20,  # a text of 2^62 characters
        unknown_schema(),
        other,
        b"\x01" + whole[1:],
        "ÿ\udcff".encode("utf-8", "surrogatepass"),
        DEEP.encode(),
        b"\0" * 64,
    ]
    return [*dict.fromkeys(named + fuzzed(whole))]


def fuzzed(whole: bytes, most: int = 40) -> list[bytes | None]:
    """Return the same random bytes at every run: any, and well-framed values with bytes exchanged; none of them decodes."""
    found: list[bytes | None] = []
    kind = codec.kind_of(whole)
    assert kind is not None
    body = whole[5:]
    framed = st.binary(max_size=200).map(lambda tail: whole[:5] + tail)
    spots = st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), min_size=1, max_size=8)

    def exchanged(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(body)
        for at, byte in changes:
            changed[at] = byte
        return whole[:5] + bytes(changed)

    @profile(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(st.binary(max_size=200), framed, spots.map(exchanged)))
    def collect(value: bytes) -> None:
        with contextlib.suppress(Exception):
            codec.decode(value, kind)
            return
        found.append(value)

    collect()
    return found


def spread(values: Sequence[bytes | None], key: bytes | None = b"k") -> Callable[[Scene], list[Shot]]:
    """Return values as records on all partitions in turn."""
    return lambda scene: [Shot(value, key, partition=i % scene.partitions) for i, value in enumerate(values)]


def again(values: Sequence[bytes | None], key: bytes | None = b"k") -> Callable[[Scene], list[Shot]]:
    """Return values whose first one stands for nothing, the others on the partitions where `spread` puts them alone.

    On others they could be read before those that they repeat.
    """
    return lambda scene: [Shot(values[0], key, partition=0), *spread(values[1:], key)(scene)]


def single(values: Sequence[bytes | None], key: bytes | None = b"k") -> Callable[[Scene], list[Shot]]:
    """Return values as records of a topic with one partition."""
    return lambda _: [Shot(value, key, partition=0) for value in values]


def one(value: bytes | None, **record: Any) -> Callable[[Scene], list[Shot]]:
    """Return one record."""
    return lambda _: [Shot(value, **record)]
