"""How far back the next owner of a queue's partition looks for results that no commit covers."""

import pytest
from confluent_kafka import Message

from events import topics
from streams import commits
from streams.processors.answered import Answered
from streams.settings import Settings

LOG_APPEND_TIME = 2


def result(at_ms: int, kind: int = LOG_APPEND_TIME) -> Message:
    """Return an acknowledged result."""
    return Message(topic="inbox", partition=0, offset=0, timestamp=(kind, at_ms))


@pytest.mark.parametrize("covered", [None, 0, 1_763_730_000_000])
@pytest.mark.parametrize("done", ["", "/w==", "AAE="])
def test_a_commit_says_up_to_when_it_covers_results(covered: int | None, done: str) -> None:
    """What a commit's metadata says is read back; what is older says only what is done."""
    assert commits.covered(commits.metadata(covered, done)) == (covered, done)


@pytest.mark.parametrize("text", ["somebody's", "some:body's", "-5:AAE=", "²:AAE="])
def test_metadata_of_somebody_else_covers_nothing(text: str) -> None:
    """A commit by another tool may carry any text."""
    assert commits.covered(text)[0] is None


def test_a_commit_covers_what_was_acknowledged_last() -> None:
    """Only the broker's own time counts, and it never goes back."""
    answered = Answered(Settings(), topics.TOOL_CALLS)
    assert answered.covered(0, 10) is None
    answered.acknowledged(result(5_000))
    answered.acknowledged(result(4_000))
    answered.acknowledged(result(9_000, kind=1))
    assert answered.covered(0, 10) == 5_000


def test_the_next_owner_looks_as_far_back_until_all_that_was_found_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look found results of calls that still wait in the queue: a crash now must not hide them from the next owner."""
    looked: list[int] = []
    monkeypatch.setattr("streams.kafka.watermarks", lambda *_: (0, 100))
    monkeypatch.setattr("streams.kafka.first_since", lambda *some: looked.append(some[-1]) or dict.fromkeys(some[2], 100))
    monkeypatch.setattr("streams.kafka.read_partitions", lambda *_: iter(()))
    answered = Answered(Settings(), topics.TOOL_CALLS)
    answered.look(None, {0: (7, 1_000_000, 20), 1: (3, 2_000_000, 9)}, {0: 1_003_000, 1: None, 2: 5})  # type: ignore[arg-type]
    assert looked == [998_000], "five seconds before the earlier commit; the other's call was queued a minute later than that"
    answered.acknowledged(result(3_000_000))
    assert answered.covered(0, 19) == 1_003_000, "call 19 still waits"
    assert answered.covered(1, 8) is None
    assert answered.covered(2, 1) == 3_000_000
    assert answered.covered(0, 20) == 3_000_000
    answered.lost(1)
    assert answered.covered(1, 8) == 3_000_000
