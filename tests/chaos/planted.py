"""Faults that are planted into a recorded history, each as one function, with the rule that must find it.

Offsets, hashes and headers are put right around each fault as far as a forger could: what is left wrong is the fault alone.
"""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import duckdb
from checking.records import Arrival, Disruption, Record
from checking.views import Views
from planted_capture import NOISE, Capture, hash_of

from events import codec, ids
from events.calls import ToolCall, ToolCallRequested
from events.commands import SignalReceived, StartRun
from events.decisions import Decision, FinishedRun, FinishedRuns, InputIgnored, RunCompleted
from events.results import InboxMessage, TimerFired, ToolCallCompleted
from events.topics import partition_for


def rival(decision: Decision) -> bytes:
    """Return what other code might have decided on the same input: that it changes nothing."""
    return codec.encode(replace(decision, effects=(InputIgnored("late"),)))


# --- Decisions that are lost, moved, changed ---


def a_decision_is_dropped(capture: Capture) -> None:
    value = capture.chain("order-0")[2][0].value
    capture.drop("decisions", lambda each: each.value == value)


def the_last_decision_is_dropped(capture: Capture) -> None:
    value = capture.chain("order-0")[-1][0].value
    capture.drop("decisions", lambda each: each.value == value)


def two_decisions_of_a_run_are_swapped(capture: Capture) -> None:
    swap(capture, capture.chain("order-0")[1][0], capture.chain("order-0")[2][0])


def swap(capture: Capture, one: Record, other: Record) -> None:
    """Let two records of a partition change their places."""
    kept = (one.offset, one.timestamp)
    capture.put(one, one._replace(offset=other.offset, timestamp=other.timestamp))
    capture.put(other, other._replace(offset=kept[0], timestamp=kept[1]))


def a_byte_is_changed(capture: Capture) -> None:
    record = capture.chain("order-0")[2][0]
    capture.put(record, flipped(record, len(record.value or b"") - 3))


def flipped(record: Record, at: int) -> Record:
    """Return a record with one bit of a byte changed."""
    value = bytearray(record.value or b"")
    value[at] ^= 1
    return record._replace(value=bytes(value))


def the_input_in_the_last_decision_is_changed(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    assert isinstance(decision.input, ToolCallCompleted)
    capture.rewrite(record, replace(decision, input=replace(decision.input, output="666")))


def the_input_on_the_inbox_is_changed(capture: Capture) -> None:
    record = capture.input_of(*capture.chain("order-0")[2])
    message = codec.decode(record.value, InboxMessage)
    assert isinstance(message.input, ToolCallCompleted)
    capture.put(record, record._replace(value=codec.encode(replace(message, input=replace(message.input, latency_ms=123456)))))


def a_decision_has_another_key(capture: Capture) -> None:
    record = capture.chain("order-0")[2][0]
    capture.put(record, record._replace(key=b"somebody"))


def a_decision_has_another_time(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    capture.rewrite(record, replace(decision, at=decision.at + 1))


def a_decision_names_another_inbox(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    capture.rewrite(record, replace(decision, input_topic_id=b"?" * 16))


def the_last_decision_has_another_number(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    capture.rewrite(record, replace(decision, seq=decision.seq + 1))


# --- Decisions that are too many ---


def a_rival_comes_before(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[2]
    capture.insert(record, rival(decision))


def a_chain_is_forked(capture: Capture) -> None:
    chain = capture.chain("order-0")
    (_, old), (record, later), (_, last) = chain[0], chain[2], chain[3]
    one = codec.encode(replace(later, seq=old.seq + 1, prev=hash_of(chain[0][0].value or b"")))
    two = codec.encode(replace(last, seq=old.seq + 2, prev=hash_of(one)))
    for value in (one, two):
        capture.append("decisions", record.partition, record.key, value)


def a_decision_extends_nothing(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    capture.append("decisions", record.partition, record.key, codec.encode(replace(decision, prev=b"?" * 32)))


def a_loser_tells_another_input(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[2]
    value = codec.encode(replace(decision, input=TimerFired("invented", "first")))
    capture.append("decisions", record.partition, record.key, value)


def a_tombstone_among_decisions(capture: Capture) -> None:
    record, _ = capture.chain("order-0")[0]
    capture.append("decisions", record.partition, record.key, None)


def garbage_among_decisions(capture: Capture) -> None:
    record, _ = capture.chain("order-0")[0]
    whole = record.value or b""
    for value in (
        b"",
        b"\0",
        b"garbage",
        whole[:5],
        whole[:-1],
        whole + b"x",
        b"\0\0\0\0\7" + whole[5:],
        whole[:5] + b"\xff" * 50,
    ):
        capture.append("decisions", record.partition, record.key, value)


# --- Inputs ---


def an_input_is_never_decided(capture: Capture) -> None:
    chain = capture.chain("listener-0")
    run, partition = ids.run_id("listener-0"), chain[0][0].partition
    noise = next(
        each
        for each in capture.records["inbox"]
        if each.partition == partition
        and each.key == NOISE
        and chain[0][1].input_offset < each.offset < chain[-1][1].input_offset
    )
    value = codec.encode(InboxMessage(run, SignalReceived("s", "unheard", None, "null", "somebody")))
    capture.put(noise, noise._replace(key=run.encode(), value=value))


def an_input_is_decided_twice(capture: Capture) -> None:
    (_, before), (record, last) = capture.chain("order-0")[-2:]
    again = codec.encode(replace(before, seq=last.seq, prev=last.prev, effects=(InputIgnored("duplicate"),)))
    capture.rewrite(record, replace(last, seq=last.seq + 1, prev=hash_of(again)))
    capture.insert(capture.chain("order-0")[-1][0], again)


# --- Calls and results ---


def a_result_for_a_call_that_nobody_requested(capture: Capture) -> None:
    answer(capture, "order-0", ToolCallCompleted, call_id="0" * 32)


def a_timer_that_nobody_set(capture: Capture) -> None:
    answer(capture, "sleeper-0", TimerFired, timer_id="0" * 32)


def answer(capture: Capture, request: str, kind: type[Any], **changes: str) -> None:
    """Change a run's last input, on the inbox and in the decision."""
    record, decision = capture.chain(request)[-1]
    assert isinstance(decision.input, kind)
    changed: Any = replace(decision.input, **changes)
    given = capture.input_of(record, decision)
    capture.put(given, given._replace(value=codec.encode(InboxMessage(decision.run_id, changed))))
    capture.rewrite(record, replace(decision, input=changed))


def a_queued_call_that_nobody_requested(capture: Capture) -> None:
    call = ToolCall("0" * 32, ids.run_id("order-0"), ToolCallRequested("first", 1, "note", "{}", 0))
    capture.append("tool.calls", 0, call.call_id.encode(), codec.encode(call))


def a_queued_call_asks_for_something_else(capture: Capture) -> None:
    record = capture.records["tool.calls"][0]
    call = codec.decode(record.value, ToolCall)
    capture.put(
        record, record._replace(value=codec.encode(replace(call, request=replace(call.request, arguments='{"text":"another"}'))))
    )


# --- Side effects ---


def a_call_is_made_twice(capture: Capture) -> None:
    capture.witnessed.append(capture.witnessed[0]._replace(at_ms=capture.witnessed[0].at_ms + 5))


def a_call_is_made_twice_long_before_a_kill(capture: Capture) -> None:
    a_call_is_made_twice(capture)
    at = max(each.timestamp for each in capture.records["inbox"]) + 60_000
    capture.disruptions.append(Disruption(at, at + 10, "kill", "tool", "tool-1"))


def a_call_is_made_twice_when_an_orchestrator_is_killed(capture: Capture) -> None:
    a_call_is_made_twice(capture)
    capture.disruptions.append(around(capture.witnessed[0], "orchestrator"))


def more_repeats_than_calls_in_flight(capture: Capture) -> None:
    capture.witnessed += [capture.witnessed[0]] * 1_000
    capture.disruptions.append(around(capture.witnessed[0], "tool"))


def around(arrival: Arrival, role: str) -> Disruption:
    """Return a kill just after a call came in."""
    return Disruption(arrival.at_ms + 1, arrival.at_ms + 2, "kill", role, f"{role}-1")


def a_call_is_made_that_nobody_requested(capture: Capture) -> None:
    capture.witnessed.append(capture.witnessed[0]._replace(call_id="0" * 32))


def a_call_has_a_result_and_was_never_made(capture: Capture) -> None:
    run = ids.run_id("order-0")
    capture.witnessed = [each for each in capture.witnessed if (each.run_id, each.step) != (run, "second")]


def a_call_of_a_loser_is_made(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[1]
    (effect,) = [each for each in decision.effects if isinstance(each, ToolCallRequested)]
    value = codec.encode(replace(decision, effects=(replace(effect, deadline=effect.deadline + 1),)))
    capture.append("decisions", record.partition, record.key, value)
    arrival = next(each for each in capture.witnessed if (each.run_id, each.step) == (decision.run_id, effect.step))
    capture.witnessed.append(arrival._replace(call_id=ids.effect_id(hash_of(value), 0)))


# --- Runs ---


def a_run_has_no_end(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    capture.rewrite(record, replace(decision, effects=decision.effects[:-1]))


def a_run_ends_twice(capture: Capture) -> None:
    record, decision = capture.chain("order-0")[-1]
    capture.rewrite(record, replace(decision, effects=(*decision.effects, RunCompleted("null"))))


def a_run_ends_otherwise_than_expected(capture: Capture) -> None:
    capture.wanted = [each._replace(expect="completed") for each in capture.wanted]


def a_request_runs_twice(capture: Capture) -> None:
    partition = 1 - capture.chain("order-0")[0][0].partition
    started(capture, "order-0", partition)


def a_run_that_nobody_asked_for(capture: Capture) -> None:
    run = ids.run_id("unasked")
    started(capture, "unasked", partition_for(run.encode(), capture.partitions))


def started(capture: Capture, request: str, partition: int) -> None:
    """Append a whole run of one decision."""
    run = ids.run_id(request)
    start = StartRun(request, "small", "digest", "{}")
    given = capture.append("inbox", partition, run.encode(), codec.encode(InboxMessage(run, start)))
    whole = Decision(
        *(run, 1, ids.FIRST_PREV, capture.topic_ids["inbox"], given.offset, given.timestamp, start),
        (RunCompleted("1"),),
    )
    record = capture.append("decisions", partition, run.encode(), codec.encode(whole))
    entry = FinishedRun(capture.topic_ids["decisions"], record.offset)
    capture.append("finished", partition, run.encode(), codec.encode(entry))


def a_request_without_a_run(capture: Capture) -> None:
    run = ids.run_id("order-0")
    calls = {ids.effect_id(hash_of(each.value or b""), 0).encode() for each, _ in capture.chain("order-0")}
    for topic in ("decisions", "finished", "inbox"):
        capture.drop(topic, lambda each: each.key == run.encode())
    capture.drop("tool.calls", lambda each: each.key in calls)
    capture.witnessed = [each for each in capture.witnessed if each.run_id != run]


def an_acknowledged_request_is_gone(capture: Capture) -> None:
    (wanted,) = [each for each in capture.wanted if each.request_id == "order-0"]
    capture.drop("requests", lambda each: (each.partition, each.offset) == (wanted.partition, wanted.offset))


def a_request_is_passed_over(capture: Capture) -> None:
    capture.append("requests", 0, b"", b"{")


def a_run_is_not_in_the_index(capture: Capture) -> None:
    capture.drop("finished", lambda each: each.key == ids.run_id("order-0").encode())


def the_index_has_another_offset(capture: Capture) -> None:
    (record,) = [each for each in capture.records["finished"] if each.key == ids.run_id("order-0").encode()]
    entry = codec.decode(record.value, FinishedRun)
    capture.put(record, record._replace(value=codec.encode(replace(entry, first_offset=entry.first_offset + 1))))


def pack(capture: Capture, shift: int = 0) -> None:
    """Pack the index, as owners do once it is long: the entries go, with each offset moved by `shift`."""
    packs: dict[int, list[bytes]] = {}
    for record in capture.records["finished"]:
        first = codec.decode(record.value, FinishedRun).first_offset + shift
        packs.setdefault(record.partition, []).append(uuid.UUID((record.key or b"").decode()).bytes + first.to_bytes(8))
    capture.records["finished"] = []
    for partition, entries in packs.items():
        value = codec.encode(FinishedRuns(capture.topic_ids["decisions"], b"".join(sorted(set(entries)))))
        capture.append("finished", partition, b"packed/7/0", value)
        capture.append("finished", partition, b"packed/3/0", None)


def the_packed_index_has_other_offsets(capture: Capture) -> None:
    pack(capture, shift=1)


# --- Views ---


def a_row_is_changed(capture: Capture) -> None:
    changed_views(capture, f"UPDATE runs SET output = '666' WHERE run_id = '{ids.run_id('order-0')}'")  # noqa: S608


def a_row_is_missing(capture: Capture) -> None:
    changed_views(capture, "DELETE FROM calls WHERE call_id = (SELECT min(call_id) FROM calls)")


def a_row_stands_there_twice(capture: Capture) -> None:
    changed_views(capture, "INSERT INTO ignored FROM ignored LIMIT 1")


def changed_views(capture: Capture, statement: str) -> None:
    """Change a copy of the views."""
    given = capture.folder / "changed.duckdb"
    shutil.copy(capture.views.given, given)
    with duckdb.connect(str(given)) as db:
        db.execute(statement)
    capture.views = Views(given, capture.views.rebuilt)


Fault = Callable[[Capture], None]
FAULTS: Final[dict[Fault, str]] = {
    a_decision_is_dropped: "ignored_explained",
    the_last_decision_is_dropped: "every_run_ends",
    two_decisions_of_a_run_are_swapped: "ignored_explained",
    a_byte_is_changed: "ignored_explained",
    the_input_in_the_last_decision_is_changed: "chains_whole",
    the_input_on_the_inbox_is_changed: "chains_whole",
    a_decision_has_another_key: "chains_whole",
    a_decision_has_another_time: "chains_whole",
    a_decision_names_another_inbox: "chains_whole",
    the_last_decision_has_another_number: "seq_without_gaps",
    a_rival_comes_before: "every_run_ends",
    a_chain_is_forked: "ignored_explained",
    a_decision_extends_nothing: "ignored_explained",
    a_loser_tells_another_input: "ignored_explained",
    a_tombstone_among_decisions: "ignored_explained",
    garbage_among_decisions: "ignored_explained",
    an_input_is_never_decided: "one_decision_per_input",
    an_input_is_decided_twice: "one_decision_per_input",
    a_result_for_a_call_that_nobody_requested: "results_belong_to_calls",
    a_timer_that_nobody_set: "results_belong_to_calls",
    a_queued_call_that_nobody_requested: "results_belong_to_calls",
    a_queued_call_asks_for_something_else: "results_belong_to_calls",
    a_call_is_made_twice: "side_effects_explained",
    a_call_is_made_twice_long_before_a_kill: "side_effects_explained",
    a_call_is_made_twice_when_an_orchestrator_is_killed: "side_effects_explained",
    more_repeats_than_calls_in_flight: "side_effects_explained",
    a_call_is_made_that_nobody_requested: "side_effects_explained",
    a_call_has_a_result_and_was_never_made: "side_effects_explained",
    a_call_of_a_loser_is_made: "side_effects_explained",
    a_run_has_no_end: "every_run_ends",
    a_run_ends_twice: "every_run_ends",
    a_run_ends_otherwise_than_expected: "every_run_ends",
    a_request_runs_twice: "one_run_per_request",
    a_run_that_nobody_asked_for: "one_run_per_request",
    a_request_without_a_run: "one_run_per_request",
    an_acknowledged_request_is_gone: "one_run_per_request",
    a_request_is_passed_over: "one_run_per_request",
    a_run_is_not_in_the_index: "every_run_ends",
    the_index_has_another_offset: "every_run_ends",
    the_packed_index_has_other_offsets: "every_run_ends",
    a_row_is_changed: "projections_equal_rebuild",
    a_row_is_missing: "projections_equal_rebuild",
    a_row_stands_there_twice: "projections_equal_rebuild",
}
"""Each fault, and the rule that must find it."""
