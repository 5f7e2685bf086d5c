"""The Parquet files of an archive, read as records: what stood on Kafka, to the byte."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from projections.export_files import TOLD

_BATCH: Final = 10_000
_NEEDED: Final = ("partition", "offset", "value")
_BESIDE: Final = ("key", "headers", "timestamp", *TOLD)
"""What else is read of each record, also where only the page's checksum can say whether it was changed."""
Row = tuple[int, bytes | None, bytes | None, bytes | None, tuple[Any, ...] | None]
"""Offset, value, key, what the header `ce_id` says, and the columns `TOLD`."""


class DamagedError(Exception):
    """A part of an archive can't be read: it was changed, or cut off."""


@dataclass(frozen=True, slots=True, order=True)
class ParquetFile:
    """One file of an archive. `damage`: gets what was found to be wrong while it was read, and could be read all the same."""

    path: Path
    damage: list[str] = field(compare=False)

    def spans(self) -> Mapping[int, tuple[int, int]]:
        """Return the first offset, and the one behind the last, of each partition in it. Raises DamagedError."""
        found: dict[int, tuple[int, int]] = {}
        for batch in self._batches(("partition", "offset")):
            for partition in pc.unique(batch["partition"]).to_pylist():
                offsets = pc.min_max(pc.filter(batch["offset"], pc.equal(batch["partition"], partition))).as_py()
                first, end = found.get(partition, (offsets["min"], 0))
                found[partition] = min(first, offsets["min"]), max(end, offsets["max"] + 1)
        return found

    def since(self, at_ms: int) -> Mapping[int, int]:
        """Return each partition's first offset from a time on, of those that have one. Raises DamagedError."""
        found: dict[int, int] = {}
        for batch in self._batches(("partition", "offset", "timestamp")):
            late = batch.filter(pc.greater_equal(pc.cast(batch["timestamp"], pa.int64()), at_ms))
            for partition, offset in zip(late["partition"].to_pylist(), late["offset"].to_pylist(), strict=True):
                found[partition] = min(offset, found.get(partition, offset))
        return found

    def rows(self, partition: int) -> Iterator[Row]:
        """Yield a partition's records in order. Raises DamagedError."""
        for batch in self._batches((*_NEEDED, *_BESIDE)):
            mine = batch.filter(pc.equal(batch["partition"], partition))
            columns = (mine["offset"].to_pylist(), mine["value"].to_pylist(), _optional(mine, "key"), _claims(mine), _told(mine))
            yield from zip(*columns, strict=True)

    def values(self) -> Iterator[bytes | None]:
        """Yield all values. Raises DamagedError."""
        for batch in self._batches(("value",)):
            yield from batch["value"].to_pylist()

    def _batches(self, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self.path) as file:
                there, groups = file.schema_arrow.names, file.num_row_groups
        except (pa.ArrowException, OSError) as error:
            raise DamagedError(self._problem(error)) from error
        if missing := [name for name in _NEEDED if name in columns and name not in there]:
            raise DamagedError(f"{self.path}: it has no column {', '.join(missing)}")
        for group in range(groups):
            yield from self._group(group, [name for name in columns if name in there])

    def _group(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield a row group's batches. What a page's checksum refuses is read without it: the chain says which record it is."""
        done = 0
        for verified in (True, False):
            seen = 0
            try:
                with pq.ParquetFile(self.path, page_checksum_verification=verified) as file:
                    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                        if seen + batch.num_rows > done:
                            yield batch.slice(max(0, done - seen))
                        seen += batch.num_rows
                        done = max(done, seen)
            except (pa.ArrowException, OSError) as error:
                if not verified:
                    raise DamagedError(f"{self._problem(error)}, behind its row {done:,} of row group {group}") from error
                self.damage.append(self._problem(error))
            else:
                return

    def _problem(self, error: BaseException) -> str:
        text = str(error).split("\n", 1)[0].strip()
        return f"{self.path}: it was changed or cut off ({text})"


def _optional(batch: pa.RecordBatch, name: str) -> list[Any]:
    return batch[name].to_pylist() if name in batch.schema.names else [None] * batch.num_rows


def _told(batch: pa.RecordBatch) -> list[Any]:
    if not set(TOLD) <= set(batch.schema.names):
        return [None] * batch.num_rows
    return list(zip(*(batch[name].to_pylist() for name in TOLD), strict=True))


def _claims(batch: pa.RecordBatch) -> list[bytes | None]:
    """Return what each record's header `ce_id` says."""
    found: list[bytes | None] = [None] * batch.num_rows
    if "headers" in batch.schema.names:
        headers = batch["headers"]
        each, rows = pc.list_flatten(headers), pc.list_parent_indices(headers)
        wanted = pc.equal(pc.struct_field(each, 0), "ce_id")
        values = pc.struct_field(each, 1).filter(wanted).to_pylist()
        for row, value in zip(rows.filter(wanted).to_pylist(), values, strict=True):
            found[row] = value
    return found


__all__ = ["DamagedError", "ParquetFile"]
