"""The index of runs that are over: which they are, with the offsets of their first decisions. Of one partition, in memory.

It only grows, so it must be small and quick to read: from time to time all of it is packed into a few records, 24 bytes a run,
and the next commit says from which offset on the index has to be read (packs and later entries). A pack holds everything before
that offset, whoever wrote it: its writer has read the partition up to there first. So whichever commit an owner starts from, even
a late one of an owner that lost, it finds every entry in a pack or one by one. A pack is deleted only after a later one of the
same writer, which holds all of it, is acknowledged.
"""

import uuid
from bisect import bisect_left
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Final

from events import codec, topics
from events.decisions import FinishedRun, FinishedRuns
from events.frozen import frozen
from streams.envelope import Outgoing, cloud_event
from streams.processors.consequences import SOURCE

PACK_AT: Final = 10_000
"""Entries that aren't packed at which a pack is written, if they are a quarter of what is: so packing costs little each."""
PACK_SHARE: Final = 4
_ID: Final = 16
_ENTRY: Final = _ID + 8
_MOST_BYTES: Final = 6 * 1024 * 1024 // _ENTRY * _ENTRY


@frozen
class Place:
    """Which partition this is: ids (16 bytes) of the inbox and decisions topics, and how many partitions they have."""

    inbox_id: bytes
    decisions_id: bytes
    partition: int
    partitions: int


class FinishedIndex:
    """Runs of a partition that are over. An offset of -1: of this batch, it isn't known yet.

    `start`: where reading may begin, as it was committed; `end`: up to where it was read.
    """

    def __init__(self, place: Place, start: int = 0) -> None:
        self.start = self.end = start
        self._place = place
        self._packed = b""
        self._loose: dict[str, int] = {}
        self._packs: list[str] = []  # keys of the packs that were read, and are not superseded
        self._obsolete: list[str] = []
        self._packing: int | None = None

    def __len__(self) -> int:
        return len(self._packed) // _ENTRY + len(self._loose)

    def __contains__(self, run_id: str) -> bool:
        return self.get(run_id) is not None

    def __setitem__(self, run_id: str, first_offset: int) -> None:
        self._loose[run_id] = first_offset

    def get(self, run_id: str) -> int | None:
        """Return the offset of a finished run's first decision, None for a run that isn't known to be over."""
        first = self._loose.get(run_id)
        if first is not None or not self._packed:
            return first
        key = _key(run_id)
        if key is None:
            return None
        place = bisect_left(range(len(self._packed) // _ENTRY), key, key=lambda i: self._packed[i * _ENTRY : i * _ENTRY + _ID])
        at = place * _ENTRY
        return int.from_bytes(self._packed[at + _ID : at + _ENTRY]) if self._packed.startswith(key, at) else None

    # --- Reading ---

    def read(self, offset: int, key: bytes | None, value: bytes | None) -> str | None:
        """Take a record of the index's partition, in order; return the run if it is an entry about one, of this decisions topic.

        Raises NotDecodableError for what is no entry.
        """
        self.end = offset + 1
        name = (key or b"").decode("utf-8", "replace")
        if value is None:
            return None
        if codec.kind_of(value) is FinishedRuns:
            pack = codec.decode(value, FinishedRuns)
            if pack.decisions_topic_id == self._place.decisions_id and _is_pack(pack.runs):
                self._add_packed(pack.runs)
            self._packs.append(name)
            return None
        entry = codec.decode(value, FinishedRun)
        if entry.decisions_topic_id != self._place.decisions_id or entry.first_offset < 0:
            return None
        self._loose[name] = entry.first_offset
        return name

    def _add_packed(self, runs: bytes) -> None:
        if self._packed[-_ENTRY:] < runs[:_ENTRY]:  # the next part of the same pack
            self._packed += runs
        else:
            self._packed = b"".join(sorted({*_entries(self._packed), *_entries(runs)}))

    # --- Packing ---

    def worth_packing(self, at_least: int) -> bool:
        """Whether so much isn't packed that a new pack is worth it."""
        return len(self._loose) >= max(at_least, len(self._packed) // _ENTRY // PACK_SHARE)

    def pack(self, without: Collection[str] = ()) -> list[Outgoing]:
        """Pack everything and return the parts, to be acknowledged before the next commit. Every offset must be known.

        `without`: runs that are over, but of which the index must not say so yet.
        """
        named = {run_id: key for run_id in self._loose if run_id not in without and (key := _key(run_id)) is not None}
        loose = {key + self._loose.pop(run_id).to_bytes(8) for run_id, key in named.items()}
        self._packed = b"".join(sorted({*_entries(self._packed), *loose}))
        self._packing = self.end
        parts = range(0, len(self._packed), _MOST_BYTES)
        return [self._part(number, self._packed[at : at + _MOST_BYTES]) for number, at in enumerate(parts)]

    def _part(self, number: int, runs: bytes) -> Outgoing:
        key = f"packed/{self.end}/{number}"
        headers = cloud_event("FinishedRuns", SOURCE, f"{self._place.partition}/{key}")
        value = codec.encode(FinishedRuns(self._place.decisions_id, runs))
        return Outgoing(topics.FINISHED, key.encode(), value, headers, self._place.partition)

    def acknowledged(self) -> None:
        """Take the acknowledgement of what `pack` returned: reading may begin there from now on, and older packs may go."""
        if self._packing is not None:
            self._obsolete += [key for key in self._packs if not key.startswith(f"packed/{self._packing}/")]
            self._packs.clear()
            self.start, self._packing = self._packing, None

    def deletions(self) -> list[Outgoing]:
        """Return what deletes packs that a later one holds, whose acknowledgement was told."""
        records = [Outgoing(topics.FINISHED, key.encode(), None, [], self._place.partition) for key in self._obsolete]
        self._obsolete.clear()
        return records


class Without:
    """The index without some runs, as a reader sees it that must judge these by itself."""

    def __init__(self, index: FinishedIndex, runs: Collection[str]) -> None:
        self._index, self._runs = index, runs

    def get(self, run_id: str) -> int | None:
        """Return what the index says of a run that isn't left out."""
        return None if run_id in self._runs else self._index.get(run_id)


def _is_pack(runs: bytes) -> bool:
    """Whether these are entries in order: what is looked for by halves must not be hidden by what somebody forged."""
    return len(runs) % _ENTRY == 0 and all(one < other for one, other in pairwise(_entries(runs)))


def _entries(packed: bytes) -> Iterator[bytes]:
    return (packed[at : at + _ENTRY] for at in range(0, len(packed), _ENTRY))


def _key(run_id: str) -> bytes | None:
    """Return the bytes of a run's id; None for what is none of ours (every run's id is a UUID in its usual spelling)."""
    try:
        found = uuid.UUID(run_id)
    except ValueError:
        return None
    return found.bytes if str(found) == run_id else None
