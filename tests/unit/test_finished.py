import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import codec
from events.decisions import FinishedRun, FinishedRuns
from streams.envelope import Outgoing
from streams.processors import finished
from streams.processors.finished import FinishedIndex, Place, Without

PLACE = Place(b"i" * 16, b"d" * 16, 0, 1)

RUNS = st.dictionaries(st.uuids().map(str), st.integers(0, 1 << 62), max_size=40)
ODD = (
    "",
    "r",
    "ABCDEF00-0000-4000-8000-000000000000",
    "{6ba7b810-9dad-11d1-80b4-00c04fd430c8}",
    "6ba7b8109dad11d180b400c04fd430c8",
)


def packed(part: Outgoing) -> bytes:
    """Return the runs of a part of a pack."""
    return codec.decode(part.value, FinishedRuns).runs


@given(st.lists(RUNS, max_size=5), st.integers(1, 4))
def test_packing_changes_nothing_that_is_known(batches: list[dict[str, int]], runs_a_part: int) -> None:
    """Given entries that come in batches, each packed, when somebody reads the last pack in its parts, then all are there."""
    index, known = FinishedIndex(PLACE), dict[str, int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finished, "_MOST_BYTES", runs_a_part * 24)
        parts: list[Outgoing] = []
        for batch in batches:
            fresh = {run: first for run, first in batch.items() if run not in known}
            for run, first in fresh.items():
                index[run] = first
            known |= fresh
            parts = index.pack()
            assert not index._loose
            assert all(len(packed(part)) <= runs_a_part * 24 for part in parts)
    reader = FinishedIndex(PLACE)
    for offset, part in enumerate(parts):
        reader.read(offset, part.key, part.value)
    for some in (index, reader):
        assert {run: some.get(run) for run in known} == known
        assert len(some) == len(known)
        assert not any(run in some for run in (str(uuid.UUID(int=0)), *ODD))


@given(RUNS, RUNS)
def test_packs_of_several_writers_add_up(one: dict[str, int], other: dict[str, int]) -> None:
    """A late pack of an owner that lost holds less than another: a reader who finds both knows what either knows."""
    other = {run: one.get(run, first) for run, first in other.items()}
    reader = FinishedIndex(PLACE)
    for entries in (one, other):
        writer = FinishedIndex(PLACE)
        for run, first in entries.items():
            writer[run] = first
        for part in writer.pack():
            reader.read(reader.end, part.key, part.value)
    assert {run: reader.get(run) for run in one | other} == one | other


def test_what_has_no_run_id_of_ours_stays_as_it_is() -> None:
    """An entry that somebody forged is no UUID: it is not packed, and found all the same."""
    index = FinishedIndex(PLACE)
    for number, run in enumerate(ODD):
        index[run] = number
    assert index.pack() == []
    assert [index.get(run) for run in ODD] == [0, 1, 2, 3, 4]


def test_a_pack_is_due_when_a_quarter_is_not_packed() -> None:
    """Packing writes the whole index again: it must not happen for a few entries."""
    index = FinishedIndex(PLACE)
    for number in range(100):
        index[str(uuid.UUID(int=number + 1))] = number
    assert index.worth_packing(100)
    assert not index.worth_packing(101)
    index.pack()
    for number in range(24):
        index[str(uuid.UUID(int=1000 + number))] = number
    assert not index.worth_packing(1)
    index[str(uuid.UUID(int=2000))] = 1
    assert index.worth_packing(1)


def test_what_is_no_pack_is_passed_over() -> None:
    """24 bytes a run, whole runs only, of this decisions topic."""
    index = FinishedIndex(PLACE)
    for offset, pack in enumerate((FinishedRuns(b"d" * 16, b"x" * 25), FinishedRuns(b"another topic   ", b"x" * 24))):
        index.read(offset, b"packed/0/0", codec.encode(pack))
    assert (len(index), index.end) == (0, 2)


def test_reading_begins_at_the_last_pack_that_was_acknowledged() -> None:
    """And older packs are deleted after that, not before."""
    index = FinishedIndex(PLACE, start=3)
    index.read(7, str(uuid.uuid4()).encode(), codec.encode(FinishedRun(b"d" * 16, 1)))
    (first,) = index.pack()
    assert (first.key, index.start, index.deletions()) == (b"packed/8/0", 3, [])
    index.acknowledged()
    assert (index.start, index.deletions()) == (8, [])
    index.read(8, first.key, first.value)
    (second,) = index.pack()
    assert index.deletions() == []
    index.acknowledged()
    assert (second.key, index.start) == (b"packed/9/0", 9)
    assert [(each.key, each.value) for each in index.deletions()] == [(b"packed/8/0", None)]
    assert index.deletions() == []


def test_a_run_of_this_batch_is_over_though_its_place_is_not_known() -> None:
    """It counts as finished, and can't be packed before it is settled."""
    index = FinishedIndex(PLACE)
    run = str(uuid.uuid4())
    index[run] = -1
    assert run in index
    with pytest.raises(OverflowError):
        index.pack()


def test_a_reader_that_judges_runs_by_itself_does_not_know_them_as_finished() -> None:
    """What happened since the last settlement is read from the log."""
    index = FinishedIndex(PLACE)
    index["a"], index["b"] = 1, 2
    assert (Without(index, {"a"}).get("a"), Without(index, {"a"}).get("b")) == (None, 2)
