"""The files of an archive: records as they stand on Kafka, to the byte, and what they say in columns that any tool reads.

`decisions/day=2026-11-21/p0-1234.parquet`: records of partition 0 and one day (UTC, by their timestamps), from offset 1234.
A file appears under its name when it is whole and on the disk. `manifest.json` says how far each partition is written: what it
says is there, and whatever goes beyond it is what a process left behind that was ended on the way; `leftovers` finds it.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from events import codec, topics
from events.as_json import as_json
from events.decisions import Decision
from events.errors import NotDecodableError
from events.topics import Topic

FORMAT: Final = 1
"""Raise it when files of another shape are written."""
_MANIFEST: Final = "manifest.json"
_NAME: Final = re.compile(r"p(\d+)-(\d+)\.parquet", re.ASCII)
_UNFINISHED: Final = ".unfinished"
_GROUP_ROWS: Final = 10_000
_GROUP_BYTES: Final = 16 * 1024 * 1024
"""How much is gathered for a row group: what one open file holds in memory."""

_RAW: Final = (
    ("partition", pa.int32()),
    ("offset", pa.int64()),
    ("timestamp", pa.timestamp("ms", tz="UTC")),
    ("key", pa.binary()),
    ("value", pa.binary()),
    ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
)
_DECISION: Final = ("run_id", pa.string()), ("seq", pa.int64()), ("input_type", pa.string())
_TEXTS: Final = ("input", pa.string()), ("effects", pa.string())
_OTHER: Final = ("type", pa.string()), ("event", pa.string())


class ArchiveError(Exception):
    """The folder is not, or can't be made, the archive that is wanted. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record. `timestamp`: milliseconds since the epoch; `headers` None: their names can't be read."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]] | None

    @property
    def day(self) -> str:
        """The day of its timestamp, in UTC; of one that no calendar has, the first."""
        try:
            return datetime.fromtimestamp(self.timestamp / 1000, UTC).strftime("%Y-%m-%d")
        except (ValueError, OverflowError, OSError):  # anybody may have written it
            return "1970-01-01"


# --- What a record says ---


TOLD: Final = tuple(name for name, _ in (*_DECISION, *_TEXTS))
"""The columns that say what a decision's value says."""


def told(decision: Decision) -> tuple[Any, ...]:
    """Return what these columns say of a decision."""
    found = as_json(decision)
    return found["run_id"], found["seq"], found["input"]["type"], _text(found["input"]), _text(found["effects"])


def differing(decision: Decision, said: tuple[Any, ...]) -> tuple[str, Any, Any] | None:
    """Return the first column that says something else than its decision: its name, what it says and what it should say.

    Fields that a later version has added may be missing in it where they say nothing.
    """
    for name, one, other in zip(TOLD, said, told(decision), strict=True):
        if one != other and not (isinstance(one, str) and name in dict(_TEXTS) and _agree(one, other)):
            return name, one, other
    return None


def _agree(said: str, now: str) -> bool:
    try:
        return _within(json.loads(said), json.loads(now))
    except ValueError:
        return False


def _within(said: Any, now: Any) -> bool:
    if isinstance(said, dict) and isinstance(now, dict):
        return all(name in now and _within(each, now[name]) for name, each in said.items()) and not any(
            each for name, each in now.items() if name not in said
        )
    if isinstance(said, list) and isinstance(now, list):
        return len(said) == len(now) and all(map(_within, said, now))
    return type(said) is type(now) and bool(said == now)


def _decision(row: Row) -> tuple[Any, ...]:
    try:
        return told(codec.decode(row.value, Decision))
    except NotDecodableError:
        return (None,) * len(TOLD)


def _other(row: Row) -> tuple[Any, ...]:
    kind = codec.kind_of(row.value)
    try:
        return (None, None) if kind is None else (kind.__name__, _text(as_json(codec.decode(row.value, kind))))
    except NotDecodableError:
        return None, None


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _said(topic: Topic) -> tuple[pa.Schema, Callable[[Row], tuple[Any, ...]]]:
    """Return the columns of a topic's files, and what fills those behind the raw ones."""
    if topic is topics.DECISIONS:
        return pa.schema([*_RAW, *_DECISION, *_TEXTS]), _decision
    return pa.schema([*_RAW, *_OTHER]), _other


# --- Files ---


class _File:
    """One file that is being written, under another name until it is whole."""

    def __init__(self, path: Path, schema: pa.Schema, says: Callable[[Row], tuple[Any, ...]]) -> None:
        self.path, self._schema, self._says = path, schema, says
        self._at = path.with_name(path.name + _UNFINISHED)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._at, schema, compression="zstd", write_page_checksum=True)
        self._rows: list[Row] = []
        self._bytes = 0

    def add(self, row: Row) -> None:
        """Take a record."""
        self._rows.append(row)
        self._bytes += len(row.value or b"")
        if len(self._rows) >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        raw = [(each.partition, each.offset, each.timestamp, each.key, each.value, each.headers) for each in self._rows]
        columns = zip(*(one + self._says(row) for one, row in zip(raw, self._rows, strict=True)), strict=True)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows.clear()
        self._bytes = 0

    def finish(self) -> int:
        """Bring it to the disk, and give it its name; return its bytes."""
        if self._rows:
            self._write()
        self._writer.close()
        _to_disk(self._at)
        self._at.replace(self.path)
        _to_disk(self.path.parent)
        return self.path.stat().st_size

    def give_up(self) -> None:
        """Leave nothing of it."""
        self._writer.close()
        self._at.unlink(missing_ok=True)


class Part:
    """Consecutive records of one partition on their way into files, one for each day: all are given their names, or none."""

    def __init__(self, folder: Path, topic: Topic) -> None:
        self._folder = folder / topic.name
        self._schema, self._says = _said(topic)
        self._files: dict[str, _File] = {}
        self.rows = self.bytes = 0

    @property
    def days(self) -> int:
        """How many files it is writing."""
        return len(self._files)

    def add(self, row: Row) -> None:
        """Take a record."""
        file = self._files.get(row.day)
        if file is None:
            path = self._folder / f"day={row.day}" / f"p{row.partition}-{row.offset}.parquet"
            file = self._files[row.day] = _File(path, self._schema, self._says)
        file.add(row)
        self.rows += 1
        self.bytes += len(row.value or b"")

    def finish(self) -> tuple[int, int]:
        """Give all files their names; return how many there are, and their bytes."""
        sizes = [file.finish() for file in self._files.values()]
        self._files.clear()
        return len(sizes), sum(sizes)

    def give_up(self) -> None:
        """Leave nothing of what has no name yet."""
        for file in self._files.values():
            file.give_up()


def leftovers(folder: Path, topic: Topic, ends: Iterable[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files beyond what is known to be written: unfinished ones, and those whose names were given but not noted."""
    known = dict(ends)
    for path in sorted((folder / topic.name).glob("day=*/*")):
        match = _NAME.fullmatch(path.name.removesuffix(_UNFINISHED))
        if match and (path.name.endswith(_UNFINISHED) or int(match[2]) >= known.get(int(match[1]), 0)):
            yield path


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- The manifest ---


@dataclass(slots=True)
class Written:
    """How far a topic is written. `since_ms`: from which time on, None: from its beginning; `partitions`: next offsets.

    `gaps`: partition, first offset, and the one behind the last, of records that Kafka had deleted before they were written.
    """

    topic_id: str
    since_ms: int | None
    partitions: dict[int, int] = field(default_factory=dict)
    records: int = 0
    gaps: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Manifest:
    """What an archive holds, by our names of the topics."""

    prefix: str
    topics: dict[str, Written] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, prefix: str) -> "Manifest":
        """Return the manifest of a folder, a new one if it has none. Raises ArchiveError."""
        try:
            data = json.loads((folder / _MANIFEST).read_text("utf-8"))
        except FileNotFoundError:
            if any(folder.glob("*/day=*/*.parquet")):
                raise ArchiveError(f"{folder} has files, but no {_MANIFEST}: export into an empty folder") from None
            return cls(prefix)
        except ValueError as error:
            raise ArchiveError(f"{folder / _MANIFEST} can't be read ({error}): export into an empty folder") from error
        if data.get("format") != FORMAT:
            raise ArchiveError(f"{folder} was written by another version of foldflow: export into an empty folder")
        if data["prefix"] != prefix:
            raise ArchiveError(f"{folder} holds topics `{data['prefix']}…`, not `{prefix}…`: export into another folder")
        return cls(
            prefix,
            {
                name: Written(
                    each["topic_id"],
                    each["since_ms"],
                    {int(partition): end for partition, end in each["partitions"].items()},
                    each["records"],
                    [(partition, low, high) for partition, low, high in each["gaps"]],
                )
                for name, each in data["topics"].items()
            },
        )

    def save(self, folder: Path) -> None:
        """Write it to the disk, whole or not at all."""
        known = {
            name: {
                "topic_id": each.topic_id,
                "since_ms": each.since_ms,
                "partitions": {str(partition): end for partition, end in sorted(each.partitions.items())},
                "records": each.records,
                "gaps": each.gaps,
            }
            for name, each in self.topics.items()
        }
        at = folder / (_MANIFEST + _UNFINISHED)
        at.write_text(json.dumps({"format": FORMAT, "prefix": self.prefix, "topics": known}, indent=2) + "\n", "utf-8")
        _to_disk(at)
        at.replace(folder / _MANIFEST)
        _to_disk(folder)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let no other process write to the archive meanwhile. Raises ArchiveError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArchiveError(f"another process is writing to {folder}: wait for its end") from error
        yield
    finally:
        os.close(handle)
