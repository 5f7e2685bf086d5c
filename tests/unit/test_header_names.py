"""What aiokafka's reader makes of headers whose names are no UTF-8, without a broker: from the bytes of a fetch."""

from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka import TopicPartition  # type: ignore[import-untyped]
from aiokafka.consumer import fetcher  # type: ignore[import-untyped]
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy  # type: ignore[import-untyped]

from streams import header_names


class Odd(str):
    """A name in bytes of its own."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        """Return them, whatever the encoding."""
        return b"a\xff\xfe"


def batch(first: int, headers: dict[int, list[tuple[str, bytes | None]]], codec: int) -> bytes:
    """Return a batch of three records in the protocol's bytes; `headers`: of some of them; `codec`: how it is compressed."""
    builder = _DefaultRecordBatchBuilderPy(2, codec, False, -1, -1, -1, 1 << 20)
    for i in range(3):
        builder.append(i, 1_000, b"k", b"v%d" % (first + i), headers.get(i, []))
    made = bytearray(builder.build())
    made[:8] = first.to_bytes(8)
    return bytes(made)


@pytest.fixture
def accepting() -> Iterator[None]:
    """Accept any name for one test."""
    before = fetcher.MemoryRecords, fetcher.PartitionRecords
    header_names.accept_any()
    yield
    fetcher.MemoryRecords, fetcher.PartitionRecords = before


def unpacked(fetched: bytes, position: int) -> list[tuple[int, bytes, list[tuple[str, bytes | None]]]]:
    """Return what a fetch brings from a position on, as the consumer unpacks it."""
    records = fetcher.PartitionRecords(
        TopicPartition("t", 0),
        fetcher.MemoryRecords(fetched),
        aborted_transactions=None,
        fetch_offset=position,
        key_deserializer=None,
        value_deserializer=None,
        check_crcs=True,
        isolation_level=0,
    )
    found = []
    while (record := next(records, None)) is not None:
        found.append((record.offset, record.value, [*record.headers]))
    assert records.next_fetch_offset == 6
    return found


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4], ids=["none", "gzip", "snappy", "lz4", "zstd"])
@pytest.mark.parametrize("odd", [{1}, {4}, {0, 5}, {2, 3}, set(range(6))], ids=str)
@pytest.mark.usefixtures("accepting")
def test_every_record_is_read_once_and_in_order(codec: int, odd: set[int]) -> None:
    """Also those around it, wherever in a batch the fetch begins; the name's bytes aren't lost."""
    written: list[tuple[str, bytes | None]] = [("plain", b"1"), (Odd("?"), b"x"), ("none", None)]
    read = [("plain", b"1"), ("a\udcff\udcfe", b"x"), ("none", None)]
    first, second = (batch(at, {i: written for i in range(3) if at + i in odd}, codec) for at in (0, 3))
    for position in range(6):  # a broker sends whole batches, from the one with the position on
        fetched = first + second if position < 3 else second
        expected = [(i, b"v%d" % i, read if i in odd else []) for i in range(position, 6)]
        assert unpacked(fetched, position) == expected


def test_without_it_such_a_name_is_in_the_way_for_ever() -> None:
    """As long as this fails aiokafka can't read them; when it no longer does, header_names.py may go."""
    with pytest.raises(UnicodeDecodeError):
        unpacked(batch(0, {1: [(Odd("?"), b"x")]}, 0) + batch(3, {}, 0), 0)
