"""Names of headers that are no UTF-8: anybody can write them, and aiokafka's reader raises at them.

It would raise again at every start, so one such record would hold its partition for ever. What it can't read is read once more
here, by aiokafka's reader in Python, with the wrong bytes of names as lone surrogates (`surrogateescape`).
"""

from typing import Any, Final

from aiokafka.consumer import fetcher  # type: ignore[import-untyped]
from aiokafka.record.default_records import _DefaultRecordBatchPy  # type: ignore[import-untyped]
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy  # type: ignore[import-untyped]

_MAGIC_AT: Final = 16
_MAGIC: Final = 2
"""Where a batch says which format it has, and the only one with headers."""


class _Text(bytearray):
    """Bytes whose parts are decoded whatever they are."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Text(found) if isinstance(found, bytearray) else found

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        del errors
        return super().decode(encoding, "surrogateescape")


class _Batch(_DefaultRecordBatchPy):  # type: ignore[misc]
    """A batch whose headers may have any names."""

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer: bytearray = _Text(self._buffer)


class _Tolerant(_MemoryRecordsPy):  # type: ignore[misc]
    """What a fetch brought of a partition, without the batches before a position, whatever the names of headers are."""

    def __init__(self, fetched: bytes, position: int) -> None:
        super().__init__(fetched)
        # What unpacks batches takes its position from each: one that it had already would set it back.
        while (batch := self._batch()) is not None and batch.next_offset <= position:
            self._cache_next()

    def _batch(self) -> _Batch | None:
        found = self._next_slice
        return None if found is None or len(found) <= _MAGIC_AT or found[_MAGIC_AT] < _MAGIC else _Batch(found)

    def next_batch(self, *_: Any) -> Any:
        """Return the next batch."""
        batch = self._batch()
        if batch is None:
            return super().next_batch()
        self._cache_next()
        return batch


class _Records(MemoryRecords):  # type: ignore[misc]
    """What a fetch brought of a partition, and its bytes."""

    def __init__(self, fetched: bytes) -> None:
        super().__init__(fetched)
        self.fetched = fetched


class _PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    """Unpacks what a fetch brought, a second time if a name was in the way: it passes over what it has had."""

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except UnicodeDecodeError:
            self._records: Any = _Tolerant(self._records.fetched, self.next_fetch_offset)
            self._records_iterator = self._unpack_records()
            return super().__next__()


def accept_any() -> None:
    """Let all of this process's aiokafka consumers read records whatever the names of their headers are."""
    fetcher.MemoryRecords, fetcher.PartitionRecords = _Records, _PartitionRecords
