from hypothesis import given
from hypothesis import strategies as st

from streams.processors.offsets import WINDOW, OffsetTracker


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(0, 10**6))
def test_a_crash_repeats_exactly_what_was_not_done(order: list[int], done: int, position: int) -> None:
    """Given calls done in any order and a crash, when another owner reads on from the commit, then it takes what wasn't done."""
    first = OffsetTracker(position)
    assert all(first.take(position + i) for i in range(12))
    for i in order[:done]:
        first.done(position + i)
    next_owner = OffsetTracker(first.committable, first.metadata())
    again = [offset for offset in range(first.committable, position + 12) if next_owner.take(offset)]
    assert again == sorted(position + i for i in order[done:])


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_the_committable_offset_never_passes_an_open_call(taken: set[int], done: set[int]) -> None:
    """Whatever is done, and though offsets have gaps, every taken call below the committable offset is done."""
    tracker = OffsetTracker(0)
    for offset in sorted(taken):
        tracker.take(offset)
    for offset in taken & done:
        tracker.done(offset)
    assert all(offset in done for offset in taken if offset < tracker.committable)
    assert tracker.committable <= min(taken - done, default=41)


def test_what_is_passed_over_counts_as_done_for_the_next_owner_too() -> None:
    """Given two crashes before the slow first call ends, then the third owner still passes over what was done at first."""
    first = OffsetTracker(5)
    for offset in (5, 6, 7):
        first.take(offset)
    first.done(6)
    second = OffsetTracker(first.committable, first.metadata())
    assert second.take(5)
    third = OffsetTracker(second.committable, second.metadata())
    assert [offset for offset in (5, 6, 7) if third.take(offset)] == [5, 7]


def test_the_window_bounds_the_metadata() -> None:
    """Kafka allows 4,096 bytes of metadata: a full window fits, and says so."""
    tracker = OffsetTracker(0)
    for offset in range(WINDOW):
        tracker.take(offset)
    for offset in range(1, WINDOW):
        tracker.done(offset)
    assert tracker.full
    assert len(tracker.metadata()) <= 4096
    tracker.done(0)
    assert not tracker.full
    assert (tracker.committable, tracker.metadata()) == (WINDOW, "")


def test_metadata_of_somebody_else_means_nothing_is_done() -> None:
    """A commit by another tool may carry any text."""
    assert OffsetTracker(3, "not base64!").take(3)
