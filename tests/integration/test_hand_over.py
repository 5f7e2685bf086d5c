"""A worker that is told to stop, or gives partitions to another, hands over what it has begun: nothing is made twice for that."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from one_worker import assert_all_acknowledged, results, tool_call, until, working

from events import topics
from events.results import InboxMessage, ToolCallCompleted
from streams import commits, kafka
from streams.envelope import Outgoing, envelope
from streams.processors.offsets import OffsetTracker
from streams.processors.tool_worker import ToolCalls
from streams.processors.worker import Worker
from streams.settings import Settings
from tools.registry import load

TOOLS = '''
import asyncio
from pathlib import Path


async def slow(folder: str, call: str, seconds: str) -> str:
    """Note the call outside of all our books, and take a while."""
    with (Path(folder) / "calls").open("a") as calls:
        calls.write(call + "\\n")
    await asyncio.sleep(float(seconds))
    return call
'''


@pytest.fixture
def slow(few: Settings, tmp_path: Path) -> ToolCalls:
    path = tmp_path / "slow_tools.py"
    path.write_text(TOOLS)
    return ToolCalls(few, load([path]))


def calls(folder: Path) -> Counter[str]:
    """Return how often each call was made."""
    path = folder / "calls"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def test_a_worker_that_stops_ends_its_calls_first(few: Settings, slow: ToolCalls, tmp_path: Path) -> None:
    """Told to stop with 8 calls in flight: all have a result and are acknowledged, what waits in the queue is not begun."""
    names = [f"call-{i}" for i in range(12)]
    with working(few, topics.TOOL_CALLS, slow, concurrency=8):
        kafka.send(few, [tool_call(name, "slow", folder=str(tmp_path), call=name, seconds="5") for name in names])
        until(lambda: len(calls(tmp_path)) == 8, 20)
    begun = set(calls(tmp_path))
    assert set(results(few)) == begun
    assert len(begun) == 8
    with working(few, topics.TOOL_CALLS, slow, concurrency=8):
        until(lambda: len(results(few)) == 12, 30)
    assert calls(tmp_path) == Counter(names)


def test_partitions_go_to_another_worker_without_a_call_made_twice(few: Settings, slow: ToolCalls, tmp_path: Path) -> None:
    """A second worker joins while calls are in flight: it gets its partition when they have ended."""
    names = [f"call-{i}" for i in range(20)]
    with working(few, topics.TOOL_CALLS, slow, concurrency=32) as first:
        kafka.send(few, [tool_call(name, "slow", folder=str(tmp_path), call=name, seconds="5") for name in names])
        until(lambda: len(calls(tmp_path)) == 20, 20)
        with working(few, topics.TOOL_CALLS, slow, concurrency=32) as second:
            until(lambda: len(first._trackers) == len(second._trackers) == 1, 30)
            until(lambda: len(results(few)) == 20, 30)
            assert_all_acknowledged(few, topics.TOOL_CALLS)
    assert calls(tmp_path) == Counter(names)
    assert all(len(found) == 1 for found in results(few).values())


@pytest.mark.thorough
def test_a_call_that_takes_too_long_does_not_hold_up_a_stop(few: Settings, slow: ToolCalls, tmp_path: Path) -> None:
    """A stop waits for calls within bounds; what it gives up is made by the next worker."""
    kafka.send(few, [tool_call("long", "slow", folder=str(tmp_path), call="long", seconds="50")])
    began = time.monotonic()
    with working(few, topics.TOOL_CALLS, slow):
        until(lambda: calls(tmp_path)["long"] == 1, 20)
    assert time.monotonic() - began < 40
    assert results(few) == {}
    with working(few, topics.TOOL_CALLS, slow):
        until(lambda: calls(tmp_path)["long"] == 2, 30)


def test_a_call_that_another_worker_has_made_is_not_made_again(few: Settings, slow: ToolCalls, tmp_path: Path) -> None:
    """An orchestrator that takes over sends again what had no result yet; by the time it is read it may have one."""
    made = tool_call("one", "slow", folder=str(tmp_path), call="one", seconds="0")
    with working(few, topics.TOOL_CALLS, slow):
        kafka.send(few, [made])
        until(lambda: len(results(few)) == 1, 20)
        assert_all_acknowledged(few, topics.TOOL_CALLS)
    with working(few, topics.TOOL_CALLS, slow):
        kafka.send(few, [made, tool_call("other", "slow", folder=str(tmp_path), call="other", seconds="0")])
        until(lambda: len(results(few)) == 2, 20)
        assert_all_acknowledged(few, topics.TOOL_CALLS)
    assert calls(tmp_path) == Counter(["one", "other"])


@pytest.mark.parametrize("committed", [False, True], ids=["before any commit", "after some"])
def test_a_call_whose_result_is_on_the_inbox_is_not_made_again(
    few: Settings, slow: ToolCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, committed: bool
) -> None:
    """A worker crashes between its results and their commit, or Kafka loses the commit: the inbox tells what is done."""

    def call(name: str, seconds: str = "0") -> Outgoing:
        return tool_call(name, "slow", folder=str(tmp_path), call=name, seconds=seconds)

    names = [f"call-{i}" for i in range(8)]
    with working(few, topics.TOOL_CALLS, slow) as worker:
        if committed:
            kafka.send(few, [call("first")])
            until(lambda: "first" in results(few), 20)
            assert_all_acknowledged(few, topics.TOOL_CALLS)
        monkeypatch.setattr(worker, "_commit", lambda **_: None)
        kafka.send(few, [call(name) for name in names])
        until(lambda: results(few).keys() >= set(names), 20)
    # Somebody else's word about a call, under another run's key, answers nothing.
    stray = InboxMessage("other", ToolCallCompleted("stray", "step-stray", "1", "1", 0))
    kafka.send(few, [envelope(topics.INBOX, "other", stray, source="test", identity="stray/result"), call("stray")])
    with working(few, topics.TOOL_CALLS, slow):
        until(lambda: calls(tmp_path)["stray"] == 1, 20)
        assert_all_acknowledged(few, topics.TOOL_CALLS)
    assert calls(tmp_path) == Counter([*names, "stray", *["first"] * committed])


def record(offset: int) -> Message:
    """Return a call as it is read."""
    return Message(topic="tool.calls", partition=0, offset=offset, key=b"call", value=b"the call", timestamp=(1, 0))


def test_a_call_that_is_read_again_is_not_done_before_its_first_reading_is(slow: ToolCalls) -> None:
    """A partition went away and came back with a call in flight: its offset is open until that call's result is acknowledged.

    Committed before, a crash would lose the call: no result, and nobody to make it again.
    """
    worker = Worker(slow.settings, topics.TOOL_CALLS, slow, 8, None)  # type: ignore[arg-type]
    worker._trackers[0] = OffsetTracker(5)
    flight = worker._fresh(record(5))
    assert flight is not None
    worker._trackers[0] = OffsetTracker(5)  # revoked and assigned again
    assert worker._fresh(record(5)) is None, "it is in flight"
    assert worker._trackers[0].committable == 5
    worker._delivered(flight, None, record(0))
    assert worker._trackers[0].committable == 6
    assert worker._fresh(record(6)) is None, "its result is on the inbox"
    assert worker._trackers[0].committable == 7


@pytest.mark.parametrize("member", [True, False])
def test_a_worker_that_slept_takes_nothing_before_the_group_confirms_it(
    few: Settings, slow: ToolCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, member: bool
) -> None:
    """Calls that were fetched around a pause are made when a commit is taken, and not while the group refuses it."""
    refused = KafkaException(KafkaError(KafkaError.UNKNOWN_MEMBER_ID))
    commit, told = commits.commit, list[bool]()

    def answer(consumer: Consumer, offsets: list[TopicPartition], patience_s: float) -> None:
        told.append(member)
        if not member and len(told) < 10:
            raise refused
        commit(consumer, offsets, patience_s)

    with working(few, topics.TOOL_CALLS, slow) as worker:
        kafka.send(few, [tool_call("before", "slow", folder=str(tmp_path), call="before", seconds="0")])
        until(lambda: "before" in results(few), 20)
        monkeypatch.setattr(commits, "commit", answer)
        slept, polls = kafka.poll, list[float]()

        def poll(source: Consumer, timeout_s: float, most: int = 1000) -> list[Message]:
            polls.append(timeout_s)
            messages = slept(source, timeout_s, most)
            if source is worker.consumer and messages and not told:
                worker._awake_at -= 60
            return messages

        monkeypatch.setattr(kafka, "poll", poll)
        until(lambda: bool(polls), 20)  # the poll that was under way must not be the one that finds the call
        kafka.send(few, [tool_call("after", "slow", folder=str(tmp_path), call="after", seconds="0")])
        until(lambda: len(told) >= (1 if member else 9), 30)
        assert member or calls(tmp_path)["after"] == 0, "somebody else may have it"
        until(lambda: "after" in results(few), 20)
        assert_all_acknowledged(few, topics.TOOL_CALLS)
    assert calls(tmp_path) == Counter(["before", "after"])


def test_a_partition_that_was_lost_in_doubt_is_worked_on_when_it_comes_back(
    few: Settings, slow: ToolCalls, tmp_path: Path
) -> None:
    """Paused while the group was asked, then given to another worker and back: it is read again."""
    with working(few, topics.TOOL_CALLS, slow) as first:
        before = set(first.partitions)
        topic = kafka.name(few, topics.TOOL_CALLS)
        first.consumer.pause([TopicPartition(topic, partition) for partition in before])
        with working(few, topics.TOOL_CALLS, slow):
            until(lambda: len(first.partitions) == 1, 30)
            (gone,) = before - set(first.partitions)
        until(lambda: set(first.partitions) == before, 30)
        call = tool_call("one", "slow", folder=str(tmp_path), call="one", seconds="0")
        kafka.send(few, [replace(call, partition=gone)])
        until(lambda: "one" in results(few), 20)


class Group:
    """A consumer group whose coordinator is away for some commits."""

    def __init__(self, fails: int, code: int) -> None:
        self.fails, self.error, self.committed = fails, KafkaError(code), list[int]()

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        """Fail a few times, then take it."""
        assert not asynchronous
        self.fails -= 1
        if self.fails >= 0:
            raise KafkaException(self.error)
        self.committed += [each.offset for each in offsets]
        return offsets


def test_the_last_commit_is_tried_again_while_kafka_is_away() -> None:
    """Who gave up at once would leave what was done to be made again. A group that moved on is another matter."""
    place = TopicPartition("tool.calls", 0, 7)
    away = Group(3, KafkaError.COORDINATOR_NOT_AVAILABLE)
    commits.commit(away, [place], 20)  # type: ignore[arg-type]
    assert away.committed == [7]
    gone = Group(1, KafkaError.ILLEGAL_GENERATION)
    with pytest.raises(KafkaException):
        commits.commit(gone, [place], 20)  # type: ignore[arg-type]
    with pytest.raises(KafkaException):
        commits.commit(Group(1 << 30, KafkaError._TIMED_OUT), [place], 0.5)  # type: ignore[arg-type]


def test_a_commit_that_fails_later_is_made_again(slow: ToolCalls) -> None:
    """Commits are not waited for: what the broker says of one decides whether the next one repeats it."""
    worker = Worker(slow.settings, topics.TOOL_CALLS, slow, 8, None)  # type: ignore[arg-type]
    made: list[int] = []

    class Told:
        """Takes commits."""

        def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> None:
            """Remember what was committed."""
            assert asynchronous
            made.extend(each.offset for each in offsets)

    worker.consumer = Told()  # type: ignore[assignment]
    worker._trackers[0] = OffsetTracker(5)
    flight = worker._fresh(record(5))
    assert flight is not None
    worker._delivered(flight, None, record(0))
    for _ in range(2):
        worker._committed_at = 0.0
        worker._commit()
    assert made == [6], "once is enough"
    worker._reported(KafkaError(KafkaError._TIMED_OUT), [TopicPartition("tool.calls", 0, 6)])
    worker._commit()
    assert made == [6], "not at once"
    worker._committed_at = 0.0
    worker._commit()
    assert made == [6, 6]
