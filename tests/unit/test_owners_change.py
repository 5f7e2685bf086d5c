"""What must survive several owners in a row that end before they have said everything."""

from events import codec, topics
from events.calls import ToolCall
from events.commands import Parent, StartRun
from events.ids import run_id
from events.results import ChildRunCompleted, InboxMessage, ToolCallCompleted
from streams.envelope import Incoming, Outgoing
from streams.processors.open_runs import Commit
from streams.processors.tenure import Place, Tenure
from streams.workflow.spec import WorkflowSpec

SPEC = WorkflowSpec.model_validate(
    {"name": "child", "steps": {"work": {"tool": {"name": "work"}}, "more": {"tool": {"name": "work"}, "needs": ["work"]}}}
)
CHILD = run_id("child-1")
PLACE = Place(b"i" * 16, b"d" * 16, topics.partition_for(CHILD.encode(), 8), 8)
START = StartRun("child-1", "child", SPEC.digest, "{}", parent=Parent("parent", "part", "call-1"))


def tenure(base: Commit, *, pack_at: int = 1 << 60) -> Tenure:
    return Tenure(PLACE, {SPEC.digest: SPEC}.get, base, idle_ms=0, pack_at=pack_at)


def inbox(offset: int, said: StartRun | ToolCallCompleted) -> Incoming:
    value = codec.encode(InboxMessage(CHILD, said))
    return Incoming("inbox", PLACE.partition, offset, 1000 + offset, CHILD.encode(), value)


def of(records: list[Outgoing], topic: topics.Topic) -> list[Outgoing]:
    return [each for each in records if each.topic is topic]


def result(records: list[Outgoing]) -> ToolCallCompleted:
    """Return the result of the call among these records."""
    (call,) = (codec.decode(each.value, ToolCall) for each in of(records, topics.TOOL_CALLS))
    return ToolCallCompleted(call.call_id, call.request.step, "1", "v", 1)


def took_over(base: Commit, log: list[Outgoing], index: list[Outgoing], snapshots: list[Outgoing], **how: int) -> Tenure:
    """Return an owner that has read what there is."""
    found = tenure(base, **how)
    for each in snapshots:
        found.snapshot_read(each.key, each.value, dict(each.headers))
    for offset, each in enumerate(index):
        found.index_read(offset, each.key, each.value)
    for offset, each in enumerate(log):
        if offset >= base.mark:
            found.read(offset, each.value)
    found.begin(len(log))
    return found


def ended_ahead() -> tuple[Commit, list[Outgoing], list[Outgoing], Incoming]:
    """Return what is there when the owner who has decided a child's end dies before it says so: commit, log, snapshots, input.

    The child was on the shelf before.
    """
    one = tenure(Commit(0, 0))
    first = one.take(inbox(0, START))
    second = one.take(inbox(1, result(first)))
    one.settle([0, 1])
    assert one.follows() == one.index_entries() == []
    snapshots = of(one.keep_idle(10_000), topics.SNAPSHOTS)
    base = one.commit()
    assert (len(snapshots), base.mark) == (1, 2)
    end = inbox(2, result(second))
    log = [*of(first, topics.DECISIONS), *of(second, topics.DECISIONS), *of(one.take(end), topics.DECISIONS)]
    return base, log, snapshots, end


def told(owner: Tenure, end: Incoming) -> list[type]:
    """Return what an owner says when it comes to the input that ended the child."""
    return [type(codec.decode(each.value, InboxMessage).input) for each in of(owner.take(end), topics.INBOX)]


def test_a_child_s_end_is_told_though_two_owners_die_before_they_tell_it() -> None:
    """The second settles before it comes to the ending input: its index must not say yet that the child is over."""
    base, log, snapshots, end = ended_ahead()
    two = took_over(base, log, [], snapshots)
    index = of([*two.follows(), *two.index_entries()], topics.FINISHED)
    deleted = [*two.keep_idle(0)]
    two.commit()
    assert (index, deleted, two.keep_idle(0)) == ([], [], []), "nor is the snapshot deleted"
    three = took_over(base, log, index, snapshots)
    assert told(three, end) == [ChildRunCompleted]


def test_a_pack_does_not_hold_a_run_whose_end_is_not_told() -> None:
    """The same, when the second owner packs its index."""
    base, log, snapshots, _ = ended_ahead()
    two = took_over(base, log, [], snapshots, pack_at=1)
    two.index_entries()
    assert two.pack_due
    assert two.pack() == []


def test_when_the_end_is_told_the_index_says_so_and_the_snapshot_goes() -> None:
    """What was put off is made up for: entry first, deletion after its acknowledgement."""
    base, log, snapshots, end = ended_ahead()
    two = took_over(base, log, [], snapshots)
    assert told(two, end) == [ChildRunCompleted]
    (entry,) = two.index_entries()
    assert entry.key == CHILD.encode()
    assert two.keep_idle(0) == []
    two.commit()
    assert [(each.key, each.value) for each in two.keep_idle(0)] == [(snapshots[0].key, None)]


def test_calls_whose_results_are_on_the_inbox_are_not_made_again() -> None:
    """A new owner comes to inputs that are decided: what their calls gave stands further on, so nobody pays for them twice."""
    one = tenure(Commit(0, 0))
    first = one.take(inbox(0, START))
    log, answer = of(first, topics.DECISIONS), inbox(1, result(first))
    blind = took_over(Commit(0, 0), log, [], [])
    assert blind.awaits_answers()
    assert len(of(blind.take(inbox(0, START)), topics.TOOL_CALLS)) == 1, "nobody knows"
    for headers in ({}, {"ce_id": answer_id(answer)}):
        two = took_over(Commit(0, 0), log, [], [])
        assert two.awaits_answers()
        for record in (inbox(0, START), answer):
            two.look_ahead(Incoming(*tuple_of(record), headers))
        assert two.take(inbox(0, START)) == []
        assert len(of(two.take(answer), topics.TOOL_CALLS)) == 1, "the run goes on"
    other = took_over(Commit(0, 0), log, [], [])
    other.awaits_answers()
    other.look_ahead(Incoming(*tuple_of(answer), {"ce_id": b"another/result"}))
    assert len(of(other.take(inbox(0, START)), topics.TOOL_CALLS)) == 1


def answer_id(record: Incoming) -> bytes:
    """Return the identity that a result's header has."""
    message = codec.decode(record.value, InboxMessage).input
    assert isinstance(message, ToolCallCompleted)
    return f"{message.call_id}/result".encode()


def tuple_of(record: Incoming) -> tuple[str, int, int, int, bytes | None, bytes | None]:
    return record.topic, record.partition, record.offset, record.timestamp, record.key, record.value
