from dataclasses import replace
from typing import Any

import pytest
from core import NOW, REJECTED, UNAVAILABLE, Case, started, tool, workflow
from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec
from events.calls import CancelCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    RunRequest,
    SignalReceived,
    StartRun,
)
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    BreakpointCleared,
    BreakpointSet,
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    Effect,
    InputIgnored,
    LoopAdvanced,
    MapStarted,
    OutputChanged,
    RetryScheduled,
    RunCancelled,
    RunClosing,
    RunCompleted,
    RunFailed,
    RunPaused,
    RunResumed,
    SignalAwaited,
    SignalKept,
    SignalTaken,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepHeld,
    StepSkipped,
    TimerSet,
    UndoPlanned,
    UnreadableInput,
)
from events.errors import NotDecodableError
from events.failure import Failure, FailureKind
from events.ids import effect_id
from events.ids import run_id as run_id_of
from events.results import (
    ChildRunCompleted,
    ChildRunFailed,
    Input,
    LlmCallCompleted,
    LlmCallFailed,
    TimerFired,
    ToolCallCompleted,
    ToolCallFailed,
    Usage,
)
from streams.processors.consequences import consequences
from streams.workflow.control import MOST_PATH, MOST_REASON, MOST_SIGNALS, MOST_SIGNALS_BYTES
from streams.workflow.decider import MAX_EFFECTS_BYTES, MAX_PAYLOAD_BYTES
from streams.workflow.evolve import fold
from streams.workflow.state import MOST_SEEN, SETTLED, RunState, RunStatus, StepState, StepStatus, owner_path

WAIT = {"wait_for": {"signal": "go"}}
ASK = {"approval": {"message": "ok?"}}
CANCELLED = FailureKind.CANCELLED
PAUSE = PauseRun("me", "")
RESUME = ResumeRun("me", single=False)
SINGLE = ResumeRun("me", single=True)


def twice(case: Case, cause: Input, again: str) -> tuple[Effect, ...]:
    """Give an input twice: the second time nothing happens, and why is said."""
    effects = case.when(cause)
    assert not isinstance(effects[0], InputIgnored), effects
    before = case.state
    assert case.when(cause) == (InputIgnored(again),)
    assert (case.state.steps, case.state.held, case.state.stops, case.state.paused) == (
        *(before.steps, before.held, before.stops),
        before.paused,
    )
    assert (case.state.signals, case.state.seen, case.state.undo) == (before.signals, before.seen, before.undo)
    return effects


def ignored(case: Case, cause: Input, why: str) -> None:
    """Give an input that changes nothing."""
    before = case.state
    assert case.when(cause) == (InputIgnored(why),)
    assert (case.state.steps, case.state.signals, case.state.stops) == (before.steps, before.signals, before.stops)


def signal(number: int | str = 1, payload: str = "1", correlation: str | None = None, name: str = "go") -> SignalReceived:
    """Return a signal."""
    return SignalReceived(f"s{number}", name, correlation, payload, "me")


def answered(
    approved: bool = True, by: str = "ann", reason: str = "", value: str | None = None, step: str = "a"
) -> ApprovalAnswered:
    """Return somebody's answer."""
    return ApprovalAnswered(step, approved, by, reason, value)


def requested(effects: tuple[Effect, ...]) -> list[str]:
    """Return the steps whose calls are requested."""
    return [each.step for each in effects if isinstance(each, ToolCallRequested | LlmCallRequested | ChildRunRequested)]


def outgoing(case: Case) -> list[tuple[str, str, Any]]:
    """Return the topic, key and value of each record that follows from the last decision (of a request for a run: None)."""
    found: list[tuple[str, str, Any]] = []
    for record in (each.record for each in consequences(case.events[-1], None)):
        kind = {"cancellations": CancelCall, "tool.calls": ToolCall}.get(record.topic.name, RunRequest)
        try:
            value = codec.decode(record.value, kind)
        except NotDecodableError:
            value = None
        found.append((record.topic.name, (record.key or b"").decode(), value))
    return found


# --- Signals ---


def test_a_signal_after_its_step_is_taken() -> None:
    """Given a step that waits, when its signal comes, then its payload is the step's output, and what needs the step goes on."""
    case = started({"a": WAIT, "b": {"transform": "=steps.a.output.x", "needs": ["a"]}, "c": tool()})
    assert case.events[0].decision.effects[0] == SignalAwaited("a", "go", None, None)
    assert twice(case, signal(payload='{"x":7}'), "duplicate") == (SignalTaken("a", "s1"), StepCompleted("b", "7"))
    assert case.state.steps["a"].output == '{"x":7}'
    assert not case.state.listening


def test_a_signal_before_its_step_is_kept() -> None:
    """When a signal comes before its step, then it is kept, and the step takes it as soon as it begins."""
    case = started({"a": tool(), "b": {**WAIT, "needs": ["a"]}, "c": tool()})
    assert twice(case, signal(payload="7"), "duplicate") == (SignalKept("s1"),)
    assert case.done("a") == (StepCompleted("a"), SignalTaken("b", "s1"))
    assert (case.state.steps["b"].output, case.state.signals) == ("7", ())
    ignored(case, signal(payload="8"), "duplicate")


@pytest.mark.parametrize(
    ("wanted", "given", "taken"),
    [
        (None, None, True),
        (None, "x", True),
        ("x", "x", True),
        ("x", "y", False),
        ("x", None, False),
        ("=input.id", "7", True),
        ("=input.text", "x", True),
        ("=input.text", '"x"', False),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_signals_correlation(wanted: str | None, given: str | None, taken: bool, first: bool) -> None:
    """Given a step with a correlation, then only the signal with the same one is taken; without one any is."""
    wait = {"wait_for": {"signal": "go", **({"correlation": wanted} if wanted else {})}}
    case = workflow({"z": tool(), "a": {**wait, "needs": ["z"]}})
    case.start('{"id":7,"text":"x"}')
    if first:
        assert case.when(signal(correlation=given)) == (SignalKept("s1"),)
        effects = case.done("z")
        assert isinstance(effects[1], SignalTaken if taken else SignalAwaited)
    else:
        case.done("z")
        effects = case.when(signal(correlation=given))
        assert isinstance(effects[0], SignalTaken if taken else SignalKept)


def test_a_signal_of_another_name_is_kept() -> None:
    """When a signal comes that no step waits for now, then it is kept, whatever it is called."""
    assert twice(started({"a": WAIT}), signal(name="other"), "duplicate") == (SignalKept("s1"),)


def test_a_correlation_without_a_value_fails_its_step() -> None:
    """When a correlation can't be computed, then the step fails."""
    effects = workflow({"a": {"wait_for": {"signal": "go", "correlation": "=input.nope"}}}).start()
    assert [type(effect) for effect in effects] == [StepFailed, RunFailed]


def test_kept_signals_are_taken_in_their_order() -> None:
    """Given kept signals of one name, when steps wait for it, then they take the oldest first."""
    case = started({"a": tool(), "b": {**WAIT, "needs": ["a"]}, "c": {**WAIT, "needs": ["b"]}, "d": {**WAIT, "needs": ["c"]}})
    for number in (1, 2, 3):
        case.when(signal(number, str(number)))
    assert case.done("a")[1:] == (SignalTaken("b", "s1"), SignalTaken("c", "s2"), SignalTaken("d", "s3"), RunCompleted("3"))


def test_steps_that_wait_take_signals_in_their_order() -> None:
    """Given several steps that wait for the same signal, then each takes one, in the order of their waiting."""
    case = started({"a": WAIT, "b": WAIT, "c": WAIT})
    assert twice(case, signal(1, "1"), "duplicate") == (SignalTaken("a", "s1"),)
    assert twice(case, signal(2, "2"), "duplicate") == (SignalTaken("b", "s2"),)
    assert case.when(signal(3, "3")) == (SignalTaken("c", "s3"), RunCompleted("3"))


def test_who_waits_for_exactly_this_comes_first() -> None:
    """Given one step that takes any signal and one that takes a certain one, when that comes, then the latter takes it."""
    case = started({"a": WAIT, "b": {"wait_for": {"signal": "go", "correlation": "x"}}, "c": tool()})
    assert case.when(signal(1, correlation="x")) == (SignalTaken("b", "s1"),)
    assert case.when(signal(2, correlation="x")) == (SignalTaken("a", "s2"),)


def test_a_signal_counts_once_while_it_is_remembered() -> None:
    """Given a signal that was taken, when it comes again after many others, then it is ignored, up to MOST_SEEN of them."""
    case = started({"a": WAIT, "b": tool()})
    case.when(signal(0))
    for number in range(1, MOST_SEEN):
        case.when(signal(number, name="other"))
    ignored(case, signal(0), "duplicate")
    assert len(case.state.seen) == MOST_SEEN
    case.when(signal(MOST_SEEN, name="other"))
    assert len(case.state.seen) == MOST_SEEN


def test_a_kept_signal_counts_once_for_ever() -> None:
    """Given a signal that is kept, when it comes again, then it is ignored, however many came between."""
    case = started({"a": tool(), "b": {**WAIT, "needs": ["a"]}, "c": {**WAIT, "needs": ["b"]}})
    case.when(signal(0, '"first"'))
    for number in range(1, MOST_SEEN + 10):
        case.when(signal(number, name="other"))
    ignored(case, signal(0, '"again"'), "duplicate")
    assert case.done("a")[1:] == (SignalTaken("b", "s0"), SignalAwaited("c", "go", None, None))


def test_too_many_signals_are_ignored() -> None:
    """Given as many kept signals as a run keeps, when another comes, then it is ignored, unless a step waits for it."""
    case = started({"a": {"wait_for": {"signal": "other"}}, "b": tool()})
    for number in range(MOST_SIGNALS):
        assert case.when(signal(number)) == (SignalKept(f"s{number}"),)
    ignored(case, signal("more"), "too_many_signals")
    assert case.when(signal("more", name="other")) == (SignalTaken("a", "smore"),)


def test_too_large_signals_are_ignored() -> None:
    """Given kept signals that are large together, when another comes, then it is ignored."""
    case = started({"a": tool()})
    payload = '"' + "x" * (MAX_PAYLOAD_BYTES - 2) + '"'
    for number in range(MOST_SIGNALS_BYTES // len(payload)):
        assert case.when(signal(number, payload)) == (SignalKept(f"s{number}"),)
    ignored(case, signal("more"), "too_many_signals")


@pytest.mark.parametrize("payload", ["", "{", "NaN", '"' + "x" * MAX_PAYLOAD_BYTES + '"', "[" * 500 + "]" * 500])
def test_a_signal_that_is_no_json_or_too_large_is_ignored(payload: str) -> None:
    """When a signal's payload can't be an output, then it is ignored, and the step waits on."""
    case = started({"a": WAIT})
    ignored(case, signal(payload=payload), "not_json_or_too_large")
    assert case.when(signal(payload="1"))[-1] == RunCompleted("1")


def test_a_signal_after_the_timeout_is_kept_for_others() -> None:
    """Given a wait that is over, when its signal comes after all, then it is kept: another step may wait for it."""
    case = started({"a": {"wait_for": {"signal": "go", "timeout": "1m"}, "on_failure": "continue"}, "b": tool()})
    timer = case.awaits("a")
    assert isinstance(case.timer("a")[0], StepFailed)
    assert not case.state.listening
    ignored(case, TimerFired(timer, "a"), "late")
    assert twice(case, signal(), "duplicate") == (SignalKept("s1"),)


def test_the_timer_of_a_signal_that_came_is_late() -> None:
    """Given a signal that was taken, when the time limit's timer fires, then it is ignored."""
    case = started({"a": {"wait_for": {"signal": "go", "timeout": "1m"}}, "b": tool()})
    timer = case.awaits("a")
    case.when(signal())
    case.at = NOW + 60_000
    ignored(case, TimerFired(timer, "a"), "late")


def test_a_signal_is_taken_while_the_run_is_paused() -> None:
    """Given a run that is paused, when a signal comes, then its step takes it, and what needs the step is held."""
    case = started({"a": WAIT, "b": tool(needs=["a"]), "c": tool()})
    twice(case, PAUSE, "already_paused")
    assert twice(case, signal(), "duplicate") == (SignalTaken("a", "s1"), StepHeld("b", 0, "paused"))
    assert requested(twice(case, RESUME, "not_paused")) == ["b"]


def test_signals_of_a_run_that_closes() -> None:
    """Given a run that closes, when a signal comes that no clean-up step waits for, then it is ignored; else it is taken."""
    case = started({"a": tool(), "b": WAIT}, **{"finally": {"t": tool(), "u": {"wait_for": {"signal": "bye"}, "needs": ["t"]}}})
    case.when(signal(0, name="bye"))
    case.fails("a", REJECTED)
    assert case.state.closing is not None
    ignored(case, signal(1), "closing")
    ignored(case, signal(2, name="bye"), "closing")
    case.done("finally.t")
    assert case.when(signal(3, name="bye"))[0] == SignalTaken("finally.u", "s3")
    assert case.state.status is RunStatus.FAILED


# --- Approvals ---


def test_a_person_approves() -> None:
    """Given an approval, when somebody approves, then the output says who, why and what, and expressions see it."""
    steps = {
        "a": {"approval": {"message": "Pay {{ input.sum }}?", "show": {"sum": "=input.sum"}}},
        "b": {
            "transform": "=[steps.a.output.approved, steps.a.output.by, steps.a.output.reason, steps.a.output.value.sum]",
            "needs": ["a"],
        },
        "c": tool(),
    }
    case = workflow(steps)
    shown, _ = case.start('{"sum":5}')
    assert shown == ApprovalRequested("a", "Pay 5?", '{"sum":5}', (), False, None)
    completed, then = twice(case, answered(by="ann", reason="fine"), "late")
    output = '{"approved":true,"by":"ann","edited":false,"reason":"fine","value":{"sum":5}}'
    assert completed == StepCompleted("a", output)
    assert then == StepCompleted("b", '[true,"ann","fine",5]')


def test_only_those_who_may() -> None:
    """Given `by`, when somebody else answers, then that is ignored; one of them may."""
    case = started({"a": {"approval": {"message": "ok?", "by": ["ann", "bob"]}}, "b": tool()})
    for by in ("", "eve", "Ann"):
        ignored(case, answered(by=by), "not_allowed")
        ignored(case, answered(approved=False, by=by), "not_allowed")
    assert isinstance(twice(case, answered(by="bob"), "late")[0], StepCompleted)


def test_a_rejection_fails_its_step() -> None:
    """When somebody rejects, then the step fails with who and why."""
    case = started({"a": {**ASK, "on_failure": "continue"}, "b": tool()})
    failure = Failure(FailureKind.NOT_APPROVED, "rejected by ann: too dear")
    assert twice(case, answered(approved=False, reason="too dear"), "late") == (StepFailed("a", failure, True),)
    assert started({"a": ASK}).when(answered(approved=False))[0] == StepFailed(
        "a", Failure(FailureKind.NOT_APPROVED, "rejected by ann"), False
    )


def test_a_rejection_can_be_an_answer() -> None:
    """Given `on_reject: continue`, when somebody rejects, then the step completes with `approved: false`."""
    case = started(
        {"a": {"approval": {"message": "ok?", "on_reject": "continue"}}, "b": tool(needs=["a"], when="steps.a.output.approved")}
    )
    output = '{"approved":false,"by":"ann","edited":false,"reason":"no","value":null}'
    assert case.when(answered(approved=False, reason="no")) == (
        StepCompleted("a", output),
        StepSkipped("b", "steps.a.output.approved"),
        RunCompleted("null"),
    )


def test_an_edited_value() -> None:
    """Given `editable`, when somebody changes the value, then theirs counts; else their answer is ignored as a whole."""
    case = started({"a": {"approval": {"message": "ok?", "show": 1}}, "b": tool()})
    ignored(case, answered(value="2"), "not_editable")
    assert twice(case, answered(), "late")[0] == StepCompleted(
        "a", '{"approved":true,"by":"ann","edited":false,"reason":"","value":1}'
    )
    case = started({"a": {"approval": {"message": "ok?", "show": 1, "editable": True}}, "b": tool()})
    for value in ("", "{", '"' + "x" * MAX_PAYLOAD_BYTES + '"'):
        ignored(case, answered(value=value), "not_json_or_too_large")
    assert twice(case, answered(value='{"x":2}'), "late")[0] == StepCompleted(
        "a", '{"approved":true,"by":"ann","edited":true,"reason":"","value":{"x":2}}'
    )


def test_words_with_marks_stay_words() -> None:
    """Given names and reasons with quotes and line breaks, then the output is still JSON that says them."""
    case = started({"a": ASK, "b": {"transform": "=steps.a.output.reason", "needs": ["a"]}})
    effects = case.when(answered(by='"}', reason='say "hi"\n\\'))
    assert effects[-1] == RunCompleted('"say \\"hi\\"\\n\\\\"')


@pytest.mark.parametrize(
    ("otherwise", "on_reject", "expected"),
    [
        ("fail", "fail", StepFailed("a", Failure(FailureKind.TIMEOUT, "nobody approved within 60000 ms"), True)),
        ("fail", "continue", StepFailed("a", Failure(FailureKind.TIMEOUT, "nobody approved within 60000 ms"), True)),
        ("approve", "fail", StepCompleted("a", '{"approved":true,"by":"","edited":false,"reason":"deadline","value":null}')),
        ("reject", "continue", StepCompleted("a", '{"approved":false,"by":"","edited":false,"reason":"deadline","value":null}')),
        (
            *("reject", "fail"),
            StepFailed("a", Failure(FailureKind.NOT_APPROVED, "rejected by nobody's answer in time: deadline"), True),
        ),
    ],
)
def test_a_deadline(otherwise: str, on_reject: str, expected: Effect) -> None:
    """Given a deadline, when it passes, then `otherwise` says what happens; an answer after it is late."""
    approval = {"message": "ok?", "deadline": "1m", "otherwise": otherwise, "on_reject": on_reject, "by": ["ann"]}
    case = started({"a": {"approval": approval, "on_failure": "continue"}, "b": tool()})
    timer = case.awaits("a")
    assert case.timer("a") == (expected,)
    ignored(case, TimerFired(timer, "a"), "late")
    ignored(case, answered(), "late")


def test_nothing_to_approve() -> None:
    """When an answer comes for a step that asks nothing (yet), or for none, then it is ignored."""
    case = started({"a": tool(), "b": {**ASK, "needs": ["a"]}})
    for step in ("a", "b", "nope", "", "a[0]", "a.b"):
        ignored(case, answered(step=step), "nothing_to_approve")
    case.done("a")
    assert case.when(answered(step="b"))[-1] == RunCompleted(
        '{"approved":true,"by":"ann","edited":false,"reason":"","value":null}'
    )


def test_an_approval_in_each_item() -> None:
    """Given an approval for each item, then each is answered by its own path."""
    approval = {"approval": {"message": "{{ item }}?", "show": "=item"}, "for_each": {"items": ["x", "y"], "tolerate": 1}}
    case = started({"a": approval})
    assert case.events[0].decision.effects[1:] == (
        ApprovalRequested("a[0]", "x?", '"x"', (), False, None),
        ApprovalRequested("a[1]", "y?", '"y"', (), False, None),
    )
    twice(case, answered(step="a[1]"), "late")
    ignored(case, answered(step="a"), "nothing_to_approve")
    effects = case.when(answered(step="a[0]", approved=False))
    assert isinstance(effects[0], StepFailed)
    assert effects[-1] == RunCompleted('[null,{"approved":true,"by":"ann","edited":false,"reason":"","value":"y"}]')


def test_an_answer_while_the_run_is_paused_counts() -> None:
    """Given a run that is paused, when somebody approves, then that counts, and what needs it is held."""
    case = started({"a": ASK, "b": tool(needs=["a"]), "c": tool()})
    case.when(PAUSE)
    assert twice(case, answered(), "late")[1:] == (StepHeld("b", 0, "paused"),)


# --- Cancelling a run ---

EVERYTHING: dict[str, Any] = {
    "call": tool(),
    "model": {"llm": {"prompt": "hi"}},
    "child": {"run": {"workflow": "other"}},
    "retried": tool(retry={"initial": "1h", "maximum": "1h"}),
    "asleep": {"sleep": "1h"},
    "signal": WAIT,
    "person": ASK,
    "many": tool(for_each={"items": [1, 2]}),
    "block": {"steps": {"in": tool(), "by": WAIT}},
    "loop": tool(repeat={"until": "false", "at_most": 3}),
    "done": {"transform": 1},
    "later": tool(needs=["call"]),
}


def test_a_run_is_cancelled() -> None:
    """When a run is cancelled, then everything under way is, each call and child run by its id, and the run ends."""
    case = started(EVERYTHING)
    case.fails("retried")
    ids = {path: case.awaits(path) for path in case.state.steps}
    why = "the run was cancelled"
    assert case.when(CancelRun("ann", "enough", force=False)) == (
        CallCancelled("call", ids["call"], why),
        StepCancelled("call", why),
        CallCancelled("model", ids["model"], why),
        StepCancelled("model", why),
        ChildRunCancelled("child", run_id_of(ids["child"]), why),
        StepCancelled("child", why),
        StepCancelled("retried", why),
        StepCancelled("asleep", why),
        StepCancelled("signal", why),
        StepCancelled("person", why),
        CallCancelled("many[0]", ids["many[0]"], why),
        StepCancelled("many[0]", why),
        CallCancelled("many[1]", ids["many[1]"], why),
        StepCancelled("many[1]", why),
        StepCancelled("many", why),
        CallCancelled("block.in", ids["block.in"], why),
        StepCancelled("block.in", why),
        StepCancelled("block.by", why),
        StepCancelled("block", why),
        CallCancelled("loop[0]", ids["loop[0]"], why),
        StepCancelled("loop[0]", why),
        StepCancelled("loop", why),
        RunCancelled("ann", "enough"),
    )
    assert case.state.status is RunStatus.CANCELLED
    assert not case.state.listening
    assert case.state.failure == Failure(CANCELLED, "enough")


def test_what_follows_from_cancelling() -> None:
    """When a run is cancelled, then workers are told by the call's id, and intake by the child run's."""
    case = started({"a": tool(), "b": {"run": {"workflow": "other"}}})
    call, child = case.awaits("a"), run_id_of(case.awaits("b"))
    assert [record[:2] for record in outgoing(case)] == [("tool.calls", call), ("requests", child)]
    case.when(CancelRun("ann", "enough", force=False))
    why = "the run was cancelled"
    assert outgoing(case) == [
        ("cancellations", call, CancelCall(call, "r", "a", why)),
        ("requests", child, RunRequest(child, None, CancelRun("run r", why, force=False))),
    ]


def test_a_call_is_cancelled_in_the_same_breath() -> None:
    """Given a call that is requested and cancelled in one decision, then the cancellation follows with the call's own id."""
    case = workflow({"a": tool(), "b": {"run": {"workflow": "other"}}, "c": {"transform": "=input.nope"}})
    effects = case.start()
    assert effects[3:7] == (
        CallCancelled("a", "", "the run failed"),
        StepCancelled("a", "the run failed"),
        ChildRunCancelled("b", "", "the run failed"),
        StepCancelled("b", "the run failed"),
    )
    ids = [effect_id(case.events[0].hash, number) for number in (0, 1)]
    child = run_id_of(ids[1])
    records = outgoing(case)
    assert [record[:2] for record in records[:2]] == [("tool.calls", ids[0]), ("requests", child)]
    assert records[2:] == [
        ("cancellations", ids[0], CancelCall(ids[0], "r", "a", "the run failed")),
        ("requests", child, RunRequest(child, None, CancelRun("run r", "the run failed", force=False))),
    ]


def test_another_attempt_is_cancelled_in_the_same_breath() -> None:
    """Given an attempt that a decision requests and cancels, then it is that one, not the one before it."""
    steps = {"a": tool(), "b": {"wait_for": {"signal": "go"}}, "c": {"transform": "=input.nope", "needs": ["b"]}}
    case = started({"x": {"steps": steps}})
    case.fails("x.a")
    case.when(PAUSE)
    case.timer("x.a")
    case.when(signal())
    effects = case.when(RESUME)
    assert effects[:2] == (RunResumed(single=False), ToolCallRequested("x.a", 2, "echo", "{}", case.at - 1 + 60_000))
    assert CallCancelled("x.a", "", "x.c failed") in effects
    call, cancel = outgoing(case)
    assert call[:2] == ("tool.calls", effect_id(case.events[-1].hash, 1))
    assert cancel[:2] == ("cancellations", call[1])


UNDO: dict[str, Any] = {"compensations": {"refund": {"tool": {"name": "refund", "arguments": {"id": "=output"}}}}}
PAID = tool(compensation="refund")
TIDY: dict[str, Any] = {"finally": {"tidy": tool()}}


def test_a_cancelled_run_undoes_and_cleans_up() -> None:
    """Given compensations and clean-up steps, when a run is cancelled, then first the former, latest first, then the latter."""
    case = started({"a": PAID, "b": PAID, "c": tool()}, **UNDO, **TIDY)
    assert case.done("a", "1") == (StepCompleted("a"), UndoPlanned("a", "refund", '{"id":1}'))
    case.done("b", "2")
    call = case.awaits("c")
    closing = RunClosing("cancelled", by="ann", reason="enough")
    cancel = CancelRun("ann", "enough", force=False)
    assert twice(case, cancel, "closing") == (
        CallCancelled("c", call, "the run was cancelled"),
        StepCancelled("c", "the run was cancelled"),
        closing,
        ToolCallRequested("undo(b)", 1, "refund", '{"id":2}', NOW + 3 + 60_000),
    )
    assert case.done("c", call=call) == (InputIgnored("late"),)
    assert requested(case.done("undo(b)")) == ["undo(a)"]
    assert requested(case.done("undo(a)")) == ["finally.tidy"]
    ignored(case, cancel, "closing")
    assert case.done("finally.tidy")[-1] == RunCancelled("ann", "enough")


def test_what_could_not_be_undone_is_said() -> None:
    """Given compensations, when one fails for good, then the others go on, and the end names it."""
    case = started({"a": PAID, "b": PAID, "c": tool()}, **UNDO)
    case.done("a")
    case.done("b")
    case.when(CancelRun("ann", "", force=False))
    case.fails("undo(b)", REJECTED)
    assert case.done("undo(a)")[-1] == RunCancelled("ann", "", ("b",))


def test_force_only_cancels() -> None:
    """Given compensations and clean-up steps, when a run is cancelled by force, then it ends and names what isn't undone."""
    case = started({"a": PAID, "b": tool()}, **UNDO, **TIDY)
    case.done("a")
    call = case.awaits("b")
    *cancelled, end = case.when(CancelRun("ann", "now", force=True))
    assert cancelled == [CallCancelled("b", call, "the run was cancelled"), StepCancelled("b", "the run was cancelled")]
    assert end == RunCancelled("ann", "now", ("a",))


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_force_ends_a_run_that_closes(how: str) -> None:
    """Given a run that undoes, when it is cancelled by force, then the compensation is cancelled, which the end says."""
    case = started({"a": PAID, "b": tool()}, **UNDO, **TIDY)
    case.done("a")
    case.when(CancelRun("ann", "", force=False)) if how == "cancelled" else case.fails("b", REJECTED)
    call = case.awaits("undo(a)")
    assert case.when(CancelRun("bob", "now", force=True)) == (
        CallCancelled("undo(a)", call, "the run was cancelled"),
        StepCancelled("undo(a)", "the run was cancelled"),
        RunCancelled("bob", "now", ("a",)),
    )


def test_force_ends_the_cleaning_up() -> None:
    """Given a run that cleans up, when it is cancelled by force, then the clean-up's calls are cancelled."""
    case = started({"a": tool()}, **TIDY)
    case.done("a")
    call = case.awaits("finally.tidy")
    ignored(case, CancelRun("ann", "", force=False), "closing")
    assert case.when(CancelRun("ann", "now", force=True)) == (
        CallCancelled("finally.tidy", call, "the run was cancelled"),
        StepCancelled("finally.tidy", "the run was cancelled"),
        StepCancelled("finally", "the run was cancelled"),
        RunCancelled("ann", "now"),
    )


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        (PAUSE, "closing"),
        (PauseStep("b", "me", ""), "closing"),
        (ChangeOutput("a", "5", "me", ""), "closing"),
        (RESUME, "not_paused"),
    ],
)
def test_a_run_that_closes_takes_few_commands(cause: Input, why: str) -> None:
    """Given a run that closes, then it can't be paused, nor its outputs changed."""
    case = started({"a": tool(), "b": tool()}, **TIDY)
    case.fails("a", REJECTED)
    ignored(case, cause, why)


def test_a_paused_run_is_cancelled_all_the_way() -> None:
    """Given a paused run, when it is cancelled, then it undoes and cleans up: closing is not paused."""
    case = started({"a": PAID, "b": tool(needs=["a"])}, **UNDO, **TIDY)
    case.when(PAUSE)
    assert StepHeld("b", 0, "paused") in case.done("a")
    assert requested(twice(case, CancelRun("ann", "", force=False), "closing")) == ["undo(a)"]
    assert not case.state.paused
    assert requested(case.done("undo(a)")) == ["finally.tidy"]
    assert case.done("finally.tidy")[-1] == RunCancelled("ann", "")


# --- Cancelling a step ---


def by_ann(step: str, reason: str = "why") -> CancelStep:
    """Return a command to cancel a step."""
    return CancelStep(step, "ann", reason)


CUT = Failure(CANCELLED, "cancelled by ann: why")


@pytest.mark.parametrize("step", ["call", "model", "child", "retried", "asleep", "signal", "person", "many", "block", "loop"])
def test_a_step_is_cancelled(step: str) -> None:
    """Given a step that is under way in any way, when it is cancelled, then its parts and calls are too, and it fails."""
    case = started({**EVERYTHING, step: {**EVERYTHING[step], "on_failure": "continue"}})
    case.fails("retried")
    ids = {path: case.awaits(path) for path in case.state.steps}
    expected: dict[str, list[Effect]] = {
        "call": [CallCancelled("call", ids["call"], "why")],
        "model": [CallCancelled("model", ids["model"], "why")],
        "child": [ChildRunCancelled("child", run_id_of(ids["child"]), "why")],
        "many": [
            *(CallCancelled("many[0]", ids["many[0]"], "why"), StepCancelled("many[0]", "why")),
            *(CallCancelled("many[1]", ids["many[1]"], "why"), StepCancelled("many[1]", "why")),
        ],
        "block": [CallCancelled("block.in", ids["block.in"], "why"), *(StepCancelled(f"block.{p}", "why") for p in ("in", "by"))],
        "loop": [CallCancelled("loop[0]", ids["loop[0]"], "why"), StepCancelled("loop[0]", "why")],
    }
    effects = twice(case, by_ann(step), "late")
    assert list(effects[: len(expected.get(step, [])) + 1]) == [*expected.get(step, []), StepFailed(step, CUT, True)]
    assert requested(effects) == (["later"] if step == "call" else [])


def test_a_cancelled_step_fails_its_run() -> None:
    """Given a step that isn't tolerated, when it is cancelled, then the run fails with it."""
    case = started({"a": tool()})
    call = case.awaits("a")
    assert case.when(CancelStep("a", "", "")) == (
        CallCancelled("a", call, ""),
        StepFailed("a", Failure(CANCELLED, "cancelled"), False),
        RunFailed("a", Failure(CANCELLED, "cancelled")),
    )


def test_a_held_step_is_cancelled() -> None:
    """Given a step that is held, when it is cancelled, then it fails, is held no more, and what needs it is held."""
    case = started({"a": tool(), "b": tool(needs=["a"], on_failure="continue"), "c": tool(needs=["b"])})
    case.when(PAUSE)
    case.done("a")
    assert twice(case, by_ann("b"), "late") == (StepFailed("b", CUT, True), StepHeld("c", 0, "paused"))
    assert list(case.state.held) == ["c"]
    assert requested(twice(case, RESUME, "not_paused")) == ["c"]


def test_one_item_is_cancelled() -> None:
    """Given a step for each item, when one item is cancelled, then it counts as failed, and the next one begins."""
    case = started({"a": tool(for_each={"items": [1, 2, 3], "concurrency": 1, "tolerate": 1})})
    call = case.awaits("a[0]")
    effects = twice(case, by_ann("a[0]"), "late")
    assert effects[:2] == (CallCancelled("a[0]", call, "why"), StepFailed("a[0]", CUT, True))
    assert requested(effects) == ["a[1]"]
    call = case.awaits("a[1]")
    assert case.when(by_ann("a[1]")) == (
        CallCancelled("a[1]", call, "why"),
        StepFailed("a[1]", CUT, False),
        StepFailed("a", CUT, False),
        RunFailed("a[1]", CUT),
    )


def test_one_step_of_a_block_is_cancelled() -> None:
    """Given a tolerated block, when one of its steps is cancelled, then the block fails, and the run goes on behind it."""
    case = started({"a": {"steps": {"x": tool(), "y": tool()}, "on_failure": "continue"}, "b": tool(needs=["a"])})
    x, y = case.awaits("a.x"), case.awaits("a.y")
    effects = twice(case, by_ann("a.x"), "not_started")
    assert effects[:5] == (
        CallCancelled("a.x", x, "why"),
        StepFailed("a.x", CUT, False),
        CallCancelled("a.y", y, "a.x failed"),
        StepCancelled("a.y", "a.x failed"),
        StepFailed("a", CUT, True),
    )
    assert requested(effects) == ["b"]


def test_a_compensation_and_a_clean_up_step_are_cancelled() -> None:
    """Given a run that closes, when what it waits for is cancelled, then it goes on to its end."""
    case = started({"a": PAID, "b": tool()}, **UNDO, **TIDY)
    case.done("a")
    case.fails("b", REJECTED)
    assert requested(twice(case, by_ann("undo(a)"), "late")) == ["finally.tidy"]
    assert case.when(by_ann("finally.tidy"))[-1] == RunFailed("b", REJECTED, ("a",))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        *(
            ("nope", "unknown_step"),
            ("", "unknown_step"),
            ("a.b", "unknown_step"),
            ("a[0]", "unknown_step"),
            ("b", "not_started"),
        ),
        *(("undo(a)", "unknown_step"), ("undo(" * 3000 + ")" * 3000, "unknown_step"), ("x" * MOST_PATH, "unknown_step")),
        *(("c[7]", "not_started"), ("c[99999999]", "unknown_step"), ("finally", "unknown_step"), (".", "unknown_step")),
    ],
)
def test_steps_that_there_are_not(step: str, why: str) -> None:
    """When a command names a step that there isn't, or that isn't under way, then it is ignored with that reason."""
    case = started({"a": tool(), "b": tool(needs=["a"]), "c": tool(for_each={"items": [1]})})
    ignored(case, by_ann(step), why)
    ignored(case, ChangeOutput(step, "1", "me", ""), why)
    if why == "unknown_step":
        ignored(case, PauseStep(step, "me", ""), why)
    ignored(case, ResumeStep(step, "me"), "not_paused")
    ignored(case, answered(step=step), "nothing_to_approve")


def test_a_long_reason_fits_into_the_decision() -> None:
    """Given a step with many parts, when it is cancelled with a long reason, then the decision stays small."""
    case = started({"a": tool(for_each={"items": list(range(100))}, on_failure="continue"), "b": tool()})
    effects = twice(case, by_ann("a", "x" * 60_000), "late")
    assert len(case.events[-2].decision.effects) == 201
    assert sum(len(getattr(effect, "reason", "")) for effect in effects) == 200 * MOST_REASON < MAX_EFFECTS_BYTES


# --- Pausing ---


def test_nothing_starts_while_a_run_is_paused() -> None:
    """Given a paused run, then results are taken and what becomes ready is held; resumed, everything starts, once."""
    inner = {"x": tool()}
    steps = {
        "a": tool(),
        "b": tool(needs=["a"]),
        "c": {"transform": 1, "needs": ["a"]},
        "d": {**WAIT, "needs": ["a"]},
        "e": {"steps": inner, "needs": ["a"]},
        "f": tool(needs=["a"], when="false"),
        "g": {"sleep": "1h", "needs": ["a"]},
        "h": tool(needs=["c"]),
    }
    case = started(steps)
    assert twice(case, PAUSE, "already_paused") == (RunPaused(),)
    held = tuple(StepHeld(name, 0, "paused") for name in "bcdefg")
    assert case.done("a") == (StepCompleted("a"), *held)
    call = case.state.steps["a"].awaits
    assert case.done("a", call=call) == (InputIgnored("duplicate"),)
    effects = twice(case, RESUME, "not_paused")
    assert effects[0] == RunResumed(single=False)
    assert requested(effects) == ["b", "h", "e.x"]
    assert {type(effect) for effect in effects} >= {StepCompleted, SignalAwaited, BlockEntered, StepSkipped, TimerSet}
    assert not case.state.held


def test_retries_are_held() -> None:
    """Given a paused run, when an attempt fails, then the wait for the next one goes on; when its timer fires, that is held."""
    case = started({"a": tool(), "b": tool()})
    case.when(PAUSE)
    (retry,) = case.fails("a")
    assert isinstance(retry, RetryScheduled)
    timer = case.awaits("a")
    assert case.timer("a") == (StepHeld("a", 2, "paused"),)
    ignored(case, TimerFired(timer, "a"), "unknown_timer")
    ignored(case, TimerFired("", "a"), "unknown_timer")
    assert twice(case, RESUME, "not_paused") == (
        RunResumed(single=False),
        ToolCallRequested("a", 2, "echo", "{}", case.at - 2 + 60_000),
    )
    assert case.done("a") == (StepCompleted("a"),)


def test_a_wait_for_the_next_attempt_outlasts_a_pause() -> None:
    """Given a run that is resumed before the next attempt is due, then that starts when it is."""
    case = started({"a": tool()})
    case.fails("a")
    case.when(PAUSE)
    assert twice(case, RESUME, "not_paused") == (RunResumed(single=False),)
    assert requested(case.timer("a")) == ["a"]


def test_timers_that_fire_during_a_pause_count() -> None:
    """Given a paused run, when sleeps, time limits and attempts are over, then that counts; what follows is held."""
    steps = {
        "s": {"sleep": "1m"},
        "t": tool(needs=["s"]),
        "w": {"wait_for": {"signal": "go", "timeout": "1m", "otherwise": 1}},
        "x": tool(timeout="1m", retry={"attempts": 1}, on_failure="continue"),
        "y": {"steps": {"z": WAIT}, "time_limit": "1m", "on_failure": "continue"},
    }
    case = started(steps)
    case.when(PAUSE)
    assert case.timer("s") == (StepCompleted("s", "null"), StepHeld("t", 0, "paused"))
    assert case.timer("w") == (StepCompleted("w", "1"),)
    assert isinstance(case.timer("x")[0], StepFailed)
    assert isinstance(case.timer("y")[-1], StepFailed)
    assert requested(twice(case, RESUME, "not_paused")) == ["t"]


def test_items_and_iterations_are_held() -> None:
    """Given a paused run, when an item or iteration settles, then the next one is held, and starts with the run."""
    steps = {
        "m": tool(for_each={"items": [1, 2, 3], "concurrency": 1}),
        "l": tool(repeat={"until": "false", "at_most": 3, "otherwise": "last"}),
    }
    case = started(steps)
    case.when(PAUSE)
    assert case.done("m[0]") == (StepCompleted("m[0]"), StepHeld("m[1]", 0, "paused"))
    assert case.done("l[0]") == (StepCompleted("l[0]"), LoopAdvanced("l", 1), StepHeld("l[1]", 0, "paused"))
    assert requested(twice(case, RESUME, "not_paused")) == ["l[1]", "m[1]"]
    for step in ("m[1]", "l[1]", "m[2]"):
        case.done(step)
    assert case.done("l[2]")[-1] == RunCompleted("1")


def test_everything_resumed_in_one_breath_may_end_the_run() -> None:
    """Given several steps that are held, when the first that starts fails the run, then the others don't start."""
    case = started({"z": tool(), "a": {"transform": "=input.nope", "needs": ["z"]}, "b": tool(needs=["z"]), "c": tool()})
    case.when(PAUSE)
    case.done("z")
    effects = case.when(RESUME)
    assert requested(effects) == []
    assert isinstance(effects[-1], RunFailed)


def test_a_run_can_go_in_single_steps() -> None:
    """Given a paused run, when it is resumed for a single step, then what was held starts, and what comes next is held again."""
    case = started(
        {"a": tool(), "b": {"transform": 1, "needs": ["a"]}, "c": tool(needs=["b"]), "d": {"transform": 2, "needs": ["c"]}}
    )
    case.when(PAUSE)
    ignored(case, SINGLE, "nothing_held")
    case.done("a")
    assert case.when(SINGLE) == (RunResumed(single=True), StepCompleted("b", "1"), StepHeld("c", 0, "paused"))
    assert requested(twice(case, SINGLE, "nothing_held")) == ["c"]
    assert case.done("c") == (StepCompleted("c"), StepHeld("d", 0, "paused"))
    assert case.when(SINGLE) == (RunResumed(single=True), StepCompleted("d", "2"), RunCompleted("2"))


def test_single_steps_go_into_blocks() -> None:
    """Given a block that is held, when a single step is made, then the block is entered, and its steps are held."""
    case = started({"z": tool(), "a": {"steps": {"x": tool(), "y": tool()}, "needs": ["z"]}})
    case.when(PAUSE)
    case.done("z")
    assert case.when(SINGLE) == (
        *(RunResumed(single=True), BlockEntered("a")),
        *(StepHeld("a.x", 0, "paused"), StepHeld("a.y", 0, "paused")),
    )
    assert requested(twice(case, ResumeStep("a.y", "me"), "not_paused")) == ["a.y"]
    assert requested(twice(case, SINGLE, "nothing_held")) == ["a.x"]


def test_one_step_of_a_paused_run_starts() -> None:
    """Given a paused run, when one step that is held is resumed, then only that starts."""
    case = started({"z": tool(), "a": tool(needs=["z"]), "b": tool(needs=["z"])})
    case.when(PAUSE)
    case.done("z")
    assert requested(twice(case, ResumeStep("b", "me"), "not_paused")) == ["b"]
    assert list(case.state.held) == ["a"]
    assert case.state.paused


def test_a_run_that_is_not_paused_cannot_be_resumed() -> None:
    """Given a run that goes on, when it is resumed, then that is ignored."""
    case = started({"a": tool()})
    for cause in (RESUME, SINGLE, ResumeStep("a", "me")):
        ignored(case, cause, "not_paused")


# --- Breakpoints ---


def test_a_run_starts_with_breakpoints() -> None:
    """Given `break_at`, then the run stops before these steps, and only there; resumed, they start."""
    case = workflow({"a": tool(), "b": tool(), "c": tool(needs=["b"])})
    assert requested(case.start(break_at=("a", "c"))) == ["b"]
    assert case.done("b") == (StepCompleted("b"), StepHeld("c", 0, "breakpoint"))
    assert requested(twice(case, RESUME, "not_paused")) == ["a", "c"]


def test_a_breakpoint_on_a_later_step() -> None:
    """Given a breakpoint on a step that hasn't begun, when it is its turn, then it is held until it is resumed."""
    case = started({"a": tool(), "b": tool(needs=["a"])})
    assert twice(case, PauseStep("b", "me", ""), "already_paused") == (BreakpointSet("b"),)
    assert case.done("a") == (StepCompleted("a"), StepHeld("b", 0, "breakpoint"))
    cleared, request = twice(case, ResumeStep("b", "me"), "not_paused")
    assert cleared == BreakpointCleared("b")
    assert isinstance(request, ToolCallRequested)
    assert not case.state.stops


def test_a_breakpoint_can_be_taken_back() -> None:
    """Given a breakpoint that nothing has reached, when its step is resumed, then the run doesn't stop there."""
    case = started({"a": tool(), "b": tool(needs=["a"])})
    case.when(PauseStep("b", "me", ""))
    assert twice(case, ResumeStep("b", "me"), "not_paused") == (BreakpointCleared("b"),)
    assert requested(case.done("a")) == ["b"]


def test_a_breakpoint_holds_the_next_attempt() -> None:
    """Given a step under way, when it is paused, then its result still counts, and another attempt is held."""
    case = started({"a": tool()})
    twice(case, PauseStep("a", "me", ""), "already_paused")
    case.fails("a")
    assert case.timer("a") == (StepHeld("a", 2, "breakpoint"),)
    assert requested(twice(case, ResumeStep("a", "me"), "not_paused")) == ["a"]
    assert case.done("a")[-1] == RunCompleted("1")


AGENT: dict[str, Any] = {
    "agent": {
        "steps": {"think": tool(), "act": tool(needs=["think"])},
        "repeat": {"until": "last == 2", "at_most": 9},
    }
}


@pytest.mark.parametrize("how", ["start", "command"])
def test_a_breakpoint_in_a_loop_stops_in_each_iteration(how: str) -> None:
    """Given a breakpoint on `agent.think`, then each iteration stops before it; resumed by its path, only this one goes on."""
    case = workflow({"z": tool(), "agent": {**AGENT["agent"], "needs": ["z"]}})
    case.start(break_at=("agent.think",) if how == "start" else ())
    if how == "command":
        assert twice(case, PauseStep("agent.think", "me", ""), "already_paused") == (BreakpointSet("agent.think"),)
    case.done("z")
    for index in range(3):
        assert list(case.state.held) == [f"agent[{index}].think"]
        assert requested(twice(case, ResumeStep(f"agent[{index}].think", "me"), "not_paused")) == [f"agent[{index}].think"]
        case.done(f"agent[{index}].think")
        effects = case.done(f"agent[{index}].act", "2" if index == 2 else "1")
    assert effects[-1] == RunCompleted("2")


def test_a_step_resumed_in_all_iterations() -> None:
    """Given a step that is held in an iteration, when `agent.think` is resumed, then it starts, and no iteration stops again."""
    case = workflow(AGENT)
    case.start(break_at=("agent.think",))
    assert requested(twice(case, ResumeStep("agent.think", "me"), "not_paused")) == ["agent[0].think"]
    case.done("agent[0].think")
    assert requested(case.done("agent[0].act")) == ["agent[1].think"]


def test_a_breakpoint_in_one_iteration() -> None:
    """Given a breakpoint on `agent[1].think`, then only that iteration stops."""
    case = started(AGENT)
    assert twice(case, PauseStep("agent[1].think", "me", ""), "already_paused") == (BreakpointSet("agent[1].think"),)
    case.done("agent[0].think")
    assert case.done("agent[0].act")[-1] == StepHeld("agent[1].think", 0, "breakpoint")


def test_a_breakpoint_deep_inside() -> None:
    """Given steps in lists in blocks in loops, then a path without numbers names them, and those of all of them."""
    many = {"steps": {"ask": tool()}, "for_each": {"items": [1, 2]}}
    block = {"steps": {"many": many}}
    case = workflow(
        {"z": tool(), "outer": {"steps": {"loop": {**block, "repeat": {"until": "true", "at_most": 2}}}, "needs": ["z"]}}
    )
    case.start()
    assert twice(case, PauseStep("outer.loop.many.ask", "me", ""), "already_paused") == (BreakpointSet("outer.loop.many.ask"),)
    for path in ("outer.loop.many.nope", "outer.many.ask", "outer[0].loop.many.ask", "outer.loop[0].many.ask", "z.x", "many"):
        ignored(case, PauseStep(path, "me", ""), "unknown_step")
    case.done("z")
    assert sorted(case.state.held) == ["outer.loop[0].many[0].ask", "outer.loop[0].many[1].ask"]


def test_a_breakpoint_on_a_list_holds_it_as_a_whole() -> None:
    """Given a breakpoint on a step for each item, then it is held once, not each item; a number names one item."""
    case = workflow({"a": tool(for_each={"items": [1, 2]})})
    assert case.start(break_at=("a", "a[1]")) == (StepHeld("a", 0, "breakpoint"),)
    effects = case.when(ResumeStep("a", "me"))
    assert requested(effects) == ["a[0]"]
    assert effects[-1] == StepHeld("a[1]", 0, "breakpoint")


def test_a_paused_run_with_a_breakpoint() -> None:
    """Given a breakpoint in a paused run, when the run is resumed, then all that was held starts, and the breakpoint stays."""
    case = workflow(AGENT)
    case.start(break_at=("agent.think",))
    case.when(PAUSE)
    assert requested(twice(case, RESUME, "not_paused")) == ["agent[0].think"]
    case.done("agent[0].think")
    assert case.done("agent[0].act")[-1] == StepHeld("agent[1].think", 0, "breakpoint")


# --- Changing an output ---


def set_to(step: str, output: str = "5") -> ChangeOutput:
    """Return a command to change an output."""
    return ChangeOutput(step, output, "ann", "better")


def test_the_output_of_a_settled_step_is_changed() -> None:
    """Given a settled step, when its output is changed, then later steps see the new one; nothing is done again."""
    steps = {"a": tool(), "b": tool(needs=["a"]), "c": {"transform": "=steps.a.output", "needs": ["b"]}}
    case = started(steps)
    case.done("a", "1")
    assert twice(case, set_to("a"), "unchanged") == (OutputChanged("a"),)
    assert case.state.settled == 1
    assert case.done("b")[-1] == RunCompleted("5")


@pytest.mark.parametrize("how", ["failed", "skipped", "cancelled"])
def test_a_step_that_did_not_complete_gets_an_output(how: str) -> None:
    """Given a step that failed, was skipped or cancelled, when its output is set, then it counts as completed with it."""
    when = {"when": "false"} if how == "skipped" else {}
    case = started({"a": tool(on_failure="continue", **when), "b": tool(), "c": {"transform": "=steps.a", "needs": ["a", "b"]}})
    if how != "skipped":
        case.fails("a", REJECTED) if how == "failed" else case.when(by_ann("a"))
    assert twice(case, set_to("a"), "unchanged") == (OutputChanged("a"),)
    assert case.done("b")[-1] == RunCompleted('{"error":null,"failures":[],"output":5,"status":"completed"}')


@pytest.mark.parametrize("step", ["call", "model", "child", "retried", "asleep", "signal", "person", "many", "block", "loop"])
def test_a_step_under_way_is_completed_by_its_output(step: str) -> None:
    """Given a step under way in any way, when its output is set, then its parts and calls are cancelled and the run goes on."""
    case = started({**EVERYTHING, "next": {"transform": f"=steps.{step}.output", "needs": [step]}})
    case.fails("retried")
    ids = {path: case.awaits(path) for path in case.state.steps}
    why = "its output was set"
    calls: dict[str, list[Effect]] = {
        "child": [ChildRunCancelled("child", run_id_of(ids["child"]), why)],
        **{name: [CallCancelled(name, ids[name], why)] for name in ("call", "model")},
        "many": [CallCancelled(f"many[{index}]", ids[f"many[{index}]"], why) for index in (0, 1)],
        "block": [CallCancelled("block.in", ids["block.in"], why)],
        "loop": [CallCancelled("loop[0]", ids["loop[0]"], why)],
    }
    effects = twice(case, set_to(step), "unchanged")
    assert [each for each in effects if isinstance(each, CallCancelled | ChildRunCancelled)] == calls.get(step, [])
    place = effects.index(OutputChanged(step))
    assert StepCompleted("next", "5") in effects[place:]
    assert not [path for path in case.state.steps if path.startswith((f"{step}.", f"{step}["))]
    late = ToolCallCompleted(ids[step], step, "9", "1", 1)
    if step in ("call", "model", "child"):
        ignored(case, late, "duplicate")


def test_a_held_step_is_completed_by_its_output() -> None:
    """Given a step that is held at a breakpoint, when its output is set, then it is completed without its call."""
    case = workflow({"a": tool(), "b": tool(needs=["a"])})
    case.start(break_at=("a",))
    effects = twice(case, set_to("a"), "unchanged")
    assert effects[0] == OutputChanged("a")
    assert requested(effects) == ["b"]
    assert not case.state.held
    assert twice(case, ResumeStep("a", "me"), "not_paused") == (BreakpointCleared("a"),)


def test_an_output_set_while_the_run_is_paused() -> None:
    """Given a paused run, when an output is set, then what needs it is held."""
    case = started({"a": tool(), "b": tool(needs=["a"])})
    case.when(PAUSE)
    _, changed, held = twice(case, set_to("a"), "unchanged")
    assert (changed, held) == (OutputChanged("a"), StepHeld("b", 0, "paused"))


def test_the_output_of_an_item_is_set() -> None:
    """Given an item under way, when its output is set, then the list goes on with the next, and its output has it."""
    case = started({"a": tool(for_each={"items": [1, 2], "concurrency": 1})})
    assert requested(twice(case, set_to("a[0]"), "unchanged")) == ["a[1]"]
    twice(case, set_to("a[0]", "6"), "unchanged")
    assert case.done("a[1]", "2")[-1] == RunCompleted("[6,2]")


def test_the_output_of_an_iteration_is_set() -> None:
    """Given a loop, when the output of the iteration under way is set, then its condition is looked at."""
    case = started({"a": tool(repeat={"until": "last == 5", "at_most": 9})})
    case.done("a[0]")
    ignored(case, set_to("a[0]"), "not_started")
    assert case.when(set_to("a[1]"))[-1] == RunCompleted("5")


@pytest.mark.parametrize("output", ["", "{", '"' + "x" * MAX_PAYLOAD_BYTES + '"'])
def test_an_output_that_can_be_none_is_not_set(output: str) -> None:
    """When a step is to get what is no JSON or too large, then that is ignored."""
    ignored(started({"a": tool()}), set_to("a", output), "not_json_or_too_large")


def test_an_output_that_ends_the_run() -> None:
    """Given the last step, when its output is set, then the run ends with it; a call that was cancelled is known by its id."""
    case = started({"a": tool()})
    call = case.awaits("a")
    assert case.when(set_to("a")) == (CallCancelled("a", call, "its output was set"), OutputChanged("a"), RunCompleted("5"))


# --- Anything, in any order ---

ANYTHING: dict[str, Any] = {
    "input": {},
    "time_limit": "30d",
    "compensations": {"refund": UNDO["compensations"]["refund"], "stop": {"run": {"workflow": "stop", "input": "=output"}}},
    "steps": {
        "call": tool(retry={"attempts": 2}, compensation="refund", on_failure="continue"),
        "model": {"llm": {"prompt": "{{ input.x }}"}, "time_limit": "90s", "on_failure": "continue"},
        "signal": {"wait_for": {"signal": "go", "timeout": "2h", "otherwise": "=null"}, "compensation": "refund"},
        "person": {"approval": {"message": "ok?", "deadline": "1h", "otherwise": "reject", "editable": True, "by": ["ann"]}},
        "nap": {"sleep": "=input.nap", "on_failure": "continue", "time_limit": "2h"},
        "sum": {"transform": "=steps.call.output", "needs": ["call", "person"], "on_failure": "continue"},
        "many": {
            "steps": {"ask": tool(compensation="refund"), "got": {"transform": "=[item, steps.ask.output]", "needs": ["ask"]}},
            "for_each": {"items": "=input.items", "concurrency": 2, "tolerate": 1},
            "needs": ["nap"],
            "on_failure": "continue",
        },
        "agent": {
            "steps": {"think": tool(), "act": {"wait_for": {"signal": "go", "correlation": "x"}, "needs": ["think"]}},
            "repeat": {"until": "last == 2", "at_most": 3, "otherwise": "last"},
            "needs": ["call"],
            "time_limit": "1d",
            "on_failure": "continue",
        },
        "fast": {"transform": "=index", "repeat": {"until": "index == 2", "at_most": 3}, "needs": ["model"]},
        "pick": {
            "switch": {"one": tool(when="steps.call.output == 1", compensation="stop"), "two": {"sleep": "1m"}},
            "needs": ["call"],
            "on_failure": "continue",
        },
        "child": {"run": {"workflow": "other"}, "needs": ["model"], "compensation": "stop", "on_failure": "continue"},
        "alone": {"run": {"workflow": "other", "detached": True}, "needs": ["signal"]},
        "outer": {
            "steps": {"inner": {"steps": {"x": tool(), "y": {"transform": "=steps.x.output.z", "needs": ["x"]}}}},
            "on_failure": "continue",
            "needs": ["person"],
        },
        "last": tool(needs=["outer", "many", "agent"], when="steps.many.status == 'completed'"),
    },
    "finally": {"tidy": tool(on_failure="continue"), "bye": {"wait_for": {"signal": "go", "timeout": "1h"}, "needs": ["tidy"]}},
}
STARTS = (ToolCallRequested, LlmCallRequested, ChildRunRequested, SignalAwaited, ApprovalRequested, BlockEntered, MapStarted)
ENDS = (RunCompleted, RunFailed, RunCancelled)
STRANGE = [
    "nope",
    "",
    "many[9].ask",
    "many.ask",
    "agent.think",
    "last",
    "call[0]",
    "undo(call)",
    "finally",
    "finally.tidy",
    "pick.two",
]
KINDS = [
    *(["right"] * 24),
    *("done", "done", "llm", "fails", "rejected", "child", "child_fails", "timer", "run_timer", "start", "unreadable", "signal"),
    *("approve", "reject", "cancel", "cancel_step", "pause", "pause_step", "resume", "single", "resume_step", "change"),
]
MOVE = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 60),
    st.sampled_from(["now", "now", "now", "now", "past", "", "x", "other"]),
    st.sampled_from(["1", "2", "{", '{"z":2}', "null"]),
    st.sampled_from([0, 0, 1, 60_000, 7_200_000]),
)


def right(case: Case, path: str, step: StepState, output: str) -> Input:
    """Return what a step waits for."""
    match step.status:
        case StepStatus.RUNNING if isinstance(step.asked, ChildRunRequested):
            return ChildRunCompleted(step.awaits, path, "c", output)
        case StepStatus.RUNNING:
            return ToolCallCompleted(step.awaits, path, output, "1", 1)
        case StepStatus.AWAITING_SIGNAL:
            return SignalReceived(f"right{case.state.seq}", "go", "x", output, "ann")
        case StepStatus.AWAITING_APPROVAL:
            return ApprovalAnswered(path, output != "2", "ann", "", None)
        case StepStatus.HELD:
            return ResumeStep(path, "ann")
        case _:
            case.at = max(case.at, step.due)
            return TimerFired(step.awaits, path)


def of(case: Case, kind: str, number: int, which: str, output: str) -> Input | UnreadableInput:  # noqa: PLR0912, C901 - one arm each
    """Return the input that a schedule picked, on what there is now."""
    waiting = sorted(path for path, step in case.state.steps.items() if not step.settled)
    paths = [*waiting, *sorted(case.state.steps), *STRANGE] if number % 3 else [*waiting, *STRANGE]
    path = paths[number % len(paths)]
    state = case.state.steps.get(path)
    other = case.state.steps.get(waiting[-1]) if waiting else None
    identity = which
    if which == "now" and state:
        identity = state.awaits
    elif which == "past" and state and state.past:
        identity = state.past[0]
    elif which == "other" and other:
        identity = other.awaits
    ready = [path for path in waiting if case.state.steps[path].status is not StepStatus.ENTERED]
    if kind == "right":
        path = ready[number % len(ready)]
        return right(case, path, case.state.steps[path], output)
    failure = UNAVAILABLE if kind == "fails" else REJECTED
    if kind == "timer" and which == "now" and state:
        case.at = max(case.at, state.due)
    match kind:
        case "done":
            return ToolCallCompleted(identity, path, output, "1", 1)
        case "llm":
            return LlmCallCompleted(identity, path, output, "m", "p", "stop", Usage(1, 1), 0.5, 1)
        case "fails":
            return ToolCallFailed(identity, path, failure, "1", 1)
        case "rejected":
            return LlmCallFailed(identity, path, failure, "m", None, None, 1)
        case "child":
            return ChildRunCompleted(identity, path, "c", output)
        case "child_fails":
            return ChildRunFailed(identity, path, "c", failure)
        case "timer":
            return TimerFired(identity, path)
        case "run_timer":
            return TimerFired(case.state.limit[0] if case.state.limit and which == "now" else which, "")
        case "start":
            return StartRun("q", "w", case.spec.digest, "{}")
        case "signal":
            return SignalReceived(f"s{number}", "go" if number % 5 else "other", "x" if number % 2 else None, output, "ann")
        case "approve" | "reject":
            return ApprovalAnswered(path, kind == "approve", "ann" if number % 4 else "eve", "", output if number % 2 else None)
        case "cancel":
            return CancelRun("ann", "", force=number == 0)
        case "cancel_step":
            return CancelStep(path, "ann", "")
        case "pause":
            return PAUSE
        case "pause_step":
            return PauseStep(path, "ann", "")
        case "resume":
            return RESUME
        case "single":
            return SINGLE
        case "resume_step":
            return ResumeStep(path, "ann")
        case "change":
            return ChangeOutput(path, output, "ann", "")
        case _:
            return UnreadableInput(1, "00", "why")


def sound(state: RunState) -> None:
    """Say what is true of every state of a run."""
    by_status: dict[StepStatus, set[str]] = {}
    for path, step in state.steps.items():
        by_status.setdefault(step.status, set()).add(path)
        owner = owner_path(path)
        assert owner is None or not state.steps[owner].settled
    assert {path for paths in state.listening.values() for path in paths} == by_status.get(StepStatus.AWAITING_SIGNAL, set())
    assert set(state.held) == by_status.get(StepStatus.HELD, set())
    assert state.settled == sum(
        step.settled for path, step in state.steps.items() if owner_path(path) is None and path[-1] != ")"
    )
    under_way = set(by_status) - set(SETTLED) - {StepStatus.ENTERED}
    assert under_way if state.status is RunStatus.OPEN else not under_way
    for step in state.steps.values():
        assert step.settled or step.status in (StepStatus.HELD, StepStatus.ENTERED) or step.awaits


def follows(before: RunState, cause: Input | UnreadableInput, effects: tuple[Effect, ...], after: RunState) -> None:
    """Say what is true of every decision."""
    assert effects
    if isinstance(effects[0], InputIgnored):
        assert len(effects) == 1
        assert replace(after, seq=before.seq, head=before.head, last_offset=before.last_offset) == before
    ends = [number for number, effect in enumerate(effects) if isinstance(effect, ENDS)]
    assert ends == ([len(effects) - 1] if after.over else [])
    closed = before.closing is not None
    for effect in effects:
        assert not closed or not isinstance(effect, STARTS) or effect.step.startswith(("undo(", "finally"))
        closed = closed or isinstance(effect, RunClosing)
    if before.paused and not closed and not isinstance(cause, ResumeRun | ResumeStep):
        assert not [effect for effect in effects if isinstance(effect, STARTS)]
        settled = [each.step for each in effects if isinstance(each, StepCompleted | StepSkipped | SignalTaken | StepFailed)]
        assert set(settled) <= set(before.steps)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(MOVE, min_size=10, max_size=50),
    st.sampled_from(
        ['{"x":1,"nap":"1m","items":[1,2,3]}', '{"x":1,"nap":"soon","items":[]}', '{"nap":"3h","items":{}}', "{", "[]"]
    ),
    st.sampled_from([(), ("agent.think",), ("many", "call"), ("nope",)]),
)
def test_any_commands_in_any_order(moves: list[tuple[str, int, str, str, int]], text: str, stops: tuple[str, ...]) -> None:
    """Any input has a decision that can be written and folded; none is taken twice; a run can always be ended."""
    case = workflow(**ANYTHING)
    case.start(text, break_at=stops)
    sound(case.state)
    for kind, number, which, output, later in moves:
        if case.state.over:
            break
        case.at += later
        cause, before = of(case, kind, number, which, output), case.state
        effects = case.when(cause)
        assert case.events[-1].decision.effects == effects
        follows(before, cause, effects, case.state)
        sound(case.state)
        if not case.state.over and not isinstance(cause, ResumeRun):
            again, before = case.when(cause), case.state
            assert [type(effect) for effect in again] == [InputIgnored] or (isinstance(cause, CancelRun) and cause.force), again
    if not case.state.over:
        before = case.state
        effects = case.when(CancelRun("ann", "", force=True))
        follows(before, CancelRun("ann", "", force=True), effects, case.state)
        sound(case.state)
    assert case.state.over
    assert sum(isinstance(effect, ENDS) for event in case.events for effect in event.decision.effects) == 1
    assert fold(case.events) == case.state
