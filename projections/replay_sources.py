r"""Where decisions are read again from: the topics, or an archive of them. Nothing is written, and no view is asked.

An archive is a folder of Parquet files (`foldflow export` writes it), or one file that a Kafka tool wrote: kcat with
`-f '%p %o %h\n%R%s'`, or Kafka's console consumer with partition, offset, headers and the value as `Bytes`. The headers may be
left out: then nothing says what a run's last decision was. Such a file may hold records of `specs` too, in any order: what a
record is, its schema's id says.
"""

import contextlib
import heapq
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from events import codec, topics
from events.commands import WorkflowRegistered
from events.decisions import Decision
from events.errors import NotDecodableError
from projections.replay_parquet import DamagedError, ParquetFile
from streams import kafka
from streams.lending import lent
from streams.schemas import Schemas
from streams.settings import Settings
from streams.workflow.spec import digest

KCAT: Final = r"%p %o %h\n%R%s"
"""What kcat's option -f must be for its output to be read here."""
_NUMBER: Final = 20
_CONSOLE: Final = re.compile(rb"(?:\S+\t)*?(?:Partition|Offset):")
_CLAIM: Final = re.compile(rb"(?:^|,)ce_id[=:]([0-9a-f]*)")
_MOST_HEADERS: Final = 1_000_000
_BINARY: Final = b"\x00\xff"
"""How a value's length begins, and no header's name: values are smaller than 16 MB, and -1 is none."""
_ESCAPED: Final = re.compile(rb"\\x([0-9A-Fa-f]{2})")
_RUN_AT: Final = slice(6, 42)
_RUN_SIZE: Final = 72
"""A run's id is 36 characters, which Avro writes as 72, right behind the framing in every schema of a decision so far."""


class ArchiveError(Exception):
    """This is no archive, or it doesn't hold what is asked for."""


class Record(NamedTuple):
    """A record of `decisions`. `claimed`: the hash that its header `ce_id` names, in hexadecimal; None where it isn't kept.

    `told`: what the columns beside its value say of it (`export_files.TOLD`), where there are such.
    """

    offset: int
    value: bytes | None
    key: bytes | None = None
    claimed: bytes | None = None
    told: tuple[Any, ...] | None = None


class Span(NamedTuple):
    """A partition's first offset, and the one behind its last."""

    first: int
    end: int


class Source(Protocol):
    """Where decisions are read from. It can be given to another process. `name`: for people."""

    @property
    def name(self) -> str:
        """Return what it is, for people."""

    @property
    def whole_topic(self) -> int | None:
        """Return how many partitions the topic has; None: it isn't known."""

    @property
    def gapless(self) -> bool:
        """Whether offsets that are left out are records that are missing."""

    def spans(self) -> Mapping[int, Span]:
        """Return the partitions that it has records of."""

    def records(self, partition: int, span: Span) -> Iterator[Record]:
        """Yield a partition's records in order. Raises DamagedError, KafkaUnreachableError."""

    def since(self, at_ms: int) -> Mapping[int, int]:
        """Return each partition's first offset from a time on (milliseconds since the epoch). Raises ArchiveError."""

    def specs(self) -> dict[str, str]:
        """Return the definitions that stand there, in canonical form, by digest."""

    def refuse_newer(self, where: str, value: bytes | None) -> None:
        """Raise NewerCodeError for what newer code wrote; call it for what can't be decoded."""

    @property
    def damage(self) -> Sequence[str]:
        """Return what was found to be wrong with it so far, although it could be read."""


def run_of(value: bytes | None) -> bytes | None:
    """Return the run that a record's value names, without decoding it; None: it must be decoded to know."""
    return value[_RUN_AT] if value is not None and len(value) > _RUN_AT.stop and value[5] == _RUN_SIZE else None


def archive(path: Path) -> Source:
    """Return the archive in a folder or file. Raises ArchiveError."""
    if path.is_dir():
        return Folder.open(path)
    if path.is_file():
        return DumpFile(path)
    raise ArchiveError(f"{path}: there is no such file or folder")


def registered(values: Iterable[bytes | None], damage: list[str]) -> dict[str, str]:
    """Return the definitions in records of `specs` by digest; what is none, or isn't what its digest says, goes into `damage`."""
    found: dict[str, str] = {}
    for value in values:
        if value is None:
            continue
        try:
            each = codec.decode(value, WorkflowRegistered)
        except NotDecodableError as error:
            damage.append(f"a record of `specs` can't be decoded: {error}")
            continue
        if digest(each.spec) == each.digest:
            found[each.digest] = each.spec
        else:
            damage.append(f"a definition of {each.name} in `specs` isn't the one that its digest {each.digest[:12]} names")
    return found


# --- The topics ---


@dataclass(frozen=True, slots=True)
class KafkaLog:
    """The topics of an installation, as long as they were when it was opened. `partitions`: how many `decisions` has."""

    settings: Settings
    partitions: int
    ends: Mapping[int, Span]
    damage: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, settings: Settings, only: int | None = None) -> "KafkaLog":
        """Look how long the partitions are, or the only one. Raises KafkaUnreachableError and TopicsMissingError."""
        topic = kafka.name(settings, topics.DECISIONS)
        with lent(settings) as source:
            counts = kafka.partition_counts(source, settings, [topics.DECISIONS, topics.SPECS], timeout_s=5.0)
            count = counts[topics.DECISIONS.name]
            wanted = range(count) if only is None else (only,)
            return cls(settings, count, {each: Span(*kafka.watermarks(source, topic, each)) for each in wanted})

    @property
    def name(self) -> str:
        """Return the topic and where it is."""
        return f"{kafka.name(self.settings, topics.DECISIONS)} at {self.settings.bootstrap_servers}"

    @property
    def whole_topic(self) -> int | None:
        """Return how many partitions the topic has."""
        return self.partitions

    @property
    def gapless(self) -> bool:
        """Kafka may leave offsets out: the log's own word is that nothing was there."""
        return False

    def spans(self) -> Mapping[int, Span]:
        """Return the partitions."""
        return self.ends

    def records(self, partition: int, span: Span) -> Iterator[Record]:
        """Yield a partition's records."""
        topic = kafka.name(self.settings, topics.DECISIONS)
        with lent(self.settings) as source:
            for message in kafka.read_partition(source, topic, partition, *span):
                found = kafka.incoming(message)
                yield Record(found.offset, found.value, found.key, found.headers.get("ce_id"))

    def since(self, at_ms: int) -> Mapping[int, int]:
        """Return each partition's first offset from a time on."""
        with lent(self.settings) as source:
            ends = {partition: span.end for partition, span in self.ends.items()}
            return kafka.first_since(source, kafka.name(self.settings, topics.DECISIONS), ends, at_ms)

    def specs(self) -> dict[str, str]:
        """Return what is registered."""
        with lent(self.settings) as source:
            messages = kafka.read_partition(source, kafka.name(self.settings, topics.SPECS), 0, 0)
            return registered((message.value() for message in messages), self.damage)

    def refuse_newer(self, where: str, value: bytes | None) -> None:
        """Ask the topic `schemas` whether newer code writes such records."""
        known = Schemas(self.settings)
        try:
            known.refuse_newer(where, value, Decision)
        finally:
            known.close()


# --- A folder of Parquet files ---


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that `foldflow export` wrote: `decisions/day=…/….parquet`, and the same of `specs`. `files`: what each holds."""

    path: Path
    files: tuple[tuple[ParquetFile, Mapping[int, Span]], ...]
    damage: list[str]

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Look what the files hold. Raises ArchiveError."""
        damage: list[str] = []
        files: list[tuple[ParquetFile, Mapping[int, Span]]] = []
        paths = sorted((path / topics.DECISIONS.name).rglob("*.parquet"))
        for each in paths:
            file = ParquetFile(each, damage)
            try:
                files.append((file, {partition: Span(*found) for partition, found in file.spans().items()}))
            except DamagedError as error:
                damage.append(str(error))
        if not paths:
            raise ArchiveError(f"{path}: no archive: there is no {topics.DECISIONS.name}/day=…/….parquet in it")
        return cls(path, tuple(files), damage)

    @property
    def name(self) -> str:
        """Return the folder."""
        return str(self.path)

    @property
    def whole_topic(self) -> int | None:
        """It isn't written down."""
        return None

    @property
    def gapless(self) -> bool:
        """Every record of the topic was copied, from the first one on."""
        return True

    def spans(self) -> Mapping[int, Span]:
        """Return the partitions."""
        spans: dict[int, Span] = {}
        for _, held in self.files:
            for partition, (first, end) in held.items():
                before = spans.get(partition, Span(first, end))
                spans[partition] = Span(min(before.first, first), max(before.end, end))
        return dict(sorted(spans.items()))

    def records(self, partition: int, span: Span) -> Iterator[Record]:
        """Yield a partition's records by offset: those of one day may stand in several files, and days may overlap."""
        mine = sorted((held[partition], file) for file, held in self.files if partition in held)
        together: list[ParquetFile] = []
        until = -1
        for (first, end), file in mine:
            if first >= until:
                yield from _merged(together, partition, span)
                together = []
            if first < span.end and end > span.first:
                together.append(file)
                until = max(until, end)
        yield from _merged(together, partition, span)

    def since(self, at_ms: int) -> Mapping[int, int]:
        """Return each partition's first offset from a time on."""
        found = {partition: span.end for partition, span in self.spans().items()}
        for file, _ in self.files:
            for partition, offset in file.since(at_ms).items():
                found[partition] = min(found[partition], offset)
        return found

    def specs(self) -> dict[str, str]:
        """Return what the archive holds of `specs`."""
        files = [ParquetFile(path, self.damage) for path in sorted((self.path / topics.SPECS.name).rglob("*.parquet"))]
        return registered((value for file in files for value in file.values()), self.damage)

    def refuse_newer(self, where: str, value: bytes | None) -> None:
        """Nobody can tell: an archive has no `schemas`."""


def _merged(files: list[ParquetFile], partition: int, span: Span) -> Iterator[Record]:
    rows = heapq.merge(*(file.rows(partition) for file in files))
    return (Record(*row) for row in rows if span.first <= row[0] < span.end)


# --- One file ---


@dataclass(frozen=True, slots=True)
class DumpFile:
    """A file that kcat or Kafka's console consumer wrote."""

    path: Path
    damage: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the file."""
        return str(self.path)

    @property
    def whole_topic(self) -> int | None:
        """It isn't written down."""
        return None

    @property
    def gapless(self) -> bool:
        """It may be a choice of records, as those of one run."""
        return False

    def _entries(self) -> Iterator[tuple[int, Record]]:
        """Yield each record, with its partition. Raises DamagedError, ArchiveError."""
        try:
            with self.path.open("rb") as file:
                if self.path.stat().st_size == 0:
                    raise ArchiveError(f"{self.path}: the file is empty")
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ArchiveError(f"{self.path}: can't be read: {error.strerror}") from error
        with data:
            yield from (_console if _CONSOLE.match(data[:200]) else _kcat)(data, self.name)

    def spans(self) -> Mapping[int, Span]:
        """Return the partitions of the decisions in it, as far as it can be read."""
        spans: dict[int, Span] = {}
        try:
            for partition, record in self._entries():
                if not _is_spec(record.value):
                    before = spans.get(partition, Span(record.offset, record.offset))
                    spans[partition] = Span(min(before.first, record.offset), max(before.end, record.offset + 1))
        except DamagedError:
            if not spans:
                raise
        if not spans:
            raise ArchiveError(f"{self.path}: it holds no decision")
        return dict(sorted(spans.items()))

    def records(self, partition: int, span: Span) -> Iterator[Record]:
        """Yield a partition's decisions."""
        for of, record in self._entries():
            if of == partition and span.first <= record.offset < span.end and not _is_spec(record.value):
                yield record

    def since(self, at_ms: int) -> Mapping[int, int]:
        """Refuse: times aren't written down."""
        raise ArchiveError(f"{self.path}: such a file holds no times; leave --since out ({at_ms})")

    def specs(self) -> dict[str, str]:
        """Return the definitions in it, as far as it can be read."""
        found: list[bytes | None] = []
        with contextlib.suppress(DamagedError):  # said when the decisions are read
            found.extend(record.value for _, record in self._entries() if _is_spec(record.value))
        return registered(found, self.damage)

    def refuse_newer(self, where: str, value: bytes | None) -> None:
        """Nobody can tell: a file has no `schemas`."""


def _is_spec(value: bytes | None) -> bool:
    return codec.kind_of(value) is WorkflowRegistered


def _kcat(data: mmap.mmap, name: str) -> Iterator[tuple[int, Record]]:
    at = 0
    while at < len(data):
        if data[at] in b"\r\n":  # with `\n` at the end of the format
            at += 1
            continue
        first = data.find(b" ", at, at + _NUMBER)
        second = data.find(b" ", first + 1, first + 1 + _NUMBER)
        partition, offset = data[at:first], data[first + 1 : second]
        length = _length_at(data, second + 1)
        size = int.from_bytes(data[length : length + 4], signed=True)
        end = length + 4 + max(0, size)
        whole = first >= 0 and second >= 0 and partition.isdigit() and offset.isdigit()
        if not whole or length < 0 or size < -1 or end > len(data):
            problem = f"{name}: at byte {at:,} there is no whole record as kcat writes it with -f '{KCAT}'"
            raise DamagedError(problem) if at else ArchiveError(problem)
        value = None if size < 0 else data[length + 4 : end]
        yield int(partition), Record(int(offset), value, claimed=_claimed(data[second + 1 : length]))
        at = end


def _length_at(data: mmap.mmap, at: int) -> int:
    """Return where the length of a value stands: here, or behind the headers and their line's end; -1: nowhere."""
    if data[at : at + 1] in (_BINARY[:1], _BINARY[1:]):
        return at
    line = data.find(b"\n", at, at + _MOST_HEADERS)
    while line >= 0 and data[line + 1 : line + 2] not in (_BINARY[:1], _BINARY[1:]):  # somebody's header may have a line's end
        line = data.find(b"\n", line + 1, at + _MOST_HEADERS)
    return line + 1 if line >= 0 else -1


def _claimed(headers: bytes) -> bytes | None:
    """Return what the header `ce_id` says, in a list of headers as a tool writes it."""
    found = _CLAIM.search(headers)
    return found[1] if found else None


def _console(data: mmap.mmap, name: str) -> Iterator[tuple[int, Record]]:
    byte: Callable[[Any], bytes] = lambda found: bytes((int(found[1], 16),))  # noqa: E731
    for number, line in enumerate(iter(data.readline, b""), 1):
        *fields, value = line.rstrip(b"\r\n").split(b"\t")
        said = dict(field.split(b":", 1) for field in fields if b":" in field)
        partition, offset = said.get(b"Partition", b""), said.get(b"Offset", b"")
        if not partition.isdigit() or not offset.isdigit():
            problem = f"{name}: line {number:,} has no `Partition:…` and `Offset:…` in front of its value"
            raise DamagedError(problem) if number > 1 else ArchiveError(problem)
        claimed = next(filter(None, map(_claimed, fields)), None)
        yield int(partition), Record(int(offset), None if value == b"null" else _ESCAPED.sub(byte, value), claimed=claimed)
