from hypothesis import given
from hypothesis import strategies as st

from streams.processors.watchdog import Stillness

STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.1, 4)), min_size=1, max_size=30)


def test_who_has_something_to_take_and_does_not_is_still() -> None:
    """Only after the whole time, only that partition, and not once it has moved."""
    still = Stillness(10)
    assert still.look({0: 5, 1: 5}, {0: 9, 1: 5}, 100) == []
    assert still.look({0: 5, 1: 5}, {0: 9, 1: 5}, 104) == []
    assert still.look({0: 5, 1: 5}, {0: 9, 1: 6}, 108) == []
    assert still.look({0: 5, 1: 5}, {0: 9, 1: 6}, 110) == [0]
    assert still.look({0: 6, 1: 5}, {0: 9, 1: 6}, 114) == []
    assert still.look({0: 6, 1: 5}, {0: 9, 1: 6}, 118) == [1]


def test_who_has_taken_everything_may_stand_still_for_ever() -> None:
    """A quiet partition is nobody's fault; its time begins when something comes."""
    still = Stillness(10)
    assert not any(still.look({0: 5}, {0: 5}, at) for at in range(100, 200, 4))
    assert not any(still.look({0: 5}, {0: 6}, at) for at in (200, 204, 208))
    assert still.look({0: 5}, {0: 6}, 210) == [0]


def test_a_process_that_was_stopped_begins_anew() -> None:
    """While it could not look it could not work either."""
    still = Stillness(10)
    assert still.look({0: 5}, {0: 9}, 100) == []
    assert still.look({0: 5}, {0: 9}, 1000) == []
    assert still.look({0: 5}, {0: 9}, 1004) == []


def test_what_was_right_until_now_does_not_count() -> None:
    """Busy, or Kafka away: then it begins anew."""
    still = Stillness(10)
    still.look({0: 5}, {0: 9}, 100)
    still.look({0: 5}, {0: 9}, 105)
    still.forget()
    assert still.look({0: 5}, {0: 9}, 110) == []


@given(STEPS)
def test_nobody_who_goes_on_is_ever_still(steps: list[tuple[int, int, float]]) -> None:
    """Whatever comes, a partition that moves at each look is never told, and one that is told has not moved for the time."""
    still, now, moved, position, end = Stillness(10), 0.0, 0.0, 0, 0
    for taken, come, wait in steps:
        now += wait
        if taken:
            moved = now
        position, end = position + taken, max(end + come, position + taken)
        told = still.look({0: position}, {0: end}, now)
        assert told == [] or now - moved >= 10
