import datetime as dt
import re
from typing import Any

import pytest
from core import NOW, REJECTED, UNAVAILABLE, Case, started, tool, workflow
from hypothesis import given
from hypothesis import strategies as st

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import PauseRun, ResumeRun, ResumeStep
from events.decisions import (
    BlockEntered,
    BreakpointCleared,
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    InputIgnored,
    LoopAdvanced,
    MapStarted,
    RetryScheduled,
    RunClosing,
    RunCompleted,
    RunFailed,
    RunResumed,
    SignalAwaited,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepHeld,
    TimerSet,
)
from events.failure import RETRYABLE, Failure, FailureKind
from events.ids import run_id as run_id_of
from events.results import ChildRunCompleted, LlmCallCompleted, LlmCallFailed, TimerFired, Usage
from streams.workflow.decider import MAX_MESSAGE_CHARS
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunStatus, StepStatus
from streams.workflow.times import LONGEST_MS, instant

DAY = 86_400_000
TIMEOUT = FailureKind.TIMEOUT
LATE = (InputIgnored("late"),)


def limited(ms: int = 60_000) -> Failure:
    """Return how a step fails whose time limit is over."""
    return Failure(TIMEOUT, f"the step did not end within {ms} ms")


def fire(case: Case, step: str, at: int, timer: str | None = None) -> Any:
    """Let a step's timer fire at a time, whether it is due or not."""
    case.at = at
    return case.when(TimerFired(timer if timer is not None else case.awaits(step), step))


# --- Attempts ---


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_step_has_so_many_attempts(attempts: int) -> None:
    """Given `retry.attempts`, when every attempt fails, then there are so many calls, each a new one, and the run fails."""
    case = started({"a": tool(retry={"attempts": attempts})})
    calls = [case.awaits("a")]
    for number in range(2, attempts + 1):
        (retry,) = case.fails("a")
        assert isinstance(retry, RetryScheduled)
        (again,) = case.timer("a")
        assert isinstance(again, ToolCallRequested)
        assert (retry.attempt, again.attempt, again.deadline) == (number, number, case.at - 1 + 60_000)
        calls.append(case.awaits("a"))
    assert case.fails("a") == (StepFailed("a", UNAVAILABLE, False), RunFailed("a", UNAVAILABLE))
    assert len(set(calls)) == attempts
    assert all(isinstance(event.decision.effects[0], ToolCallRequested) for event in case.events[:-1:2])


def test_a_model_step_is_tried_again_too() -> None:
    """When a model doesn't answer, then it is asked the same again; another answer completes the step."""
    case = started({"a": {"llm": {"prompt": "hi"}}})
    first = case.events[0].decision.effects[0]
    case.when(LlmCallFailed(case.awaits("a"), "a", UNAVAILABLE, "m", None, None, 1))
    (again,) = case.timer("a")
    assert isinstance(first, LlmCallRequested)
    assert isinstance(again, LlmCallRequested)
    assert (again.messages, again.attempt) == (first.messages, 2)
    answer = LlmCallCompleted(case.awaits("a"), "a", '"yes"', "m", "p", "stop", Usage(1, 2), None, 3)
    assert case.when(answer) == (StepCompleted("a"), RunCompleted('"yes"'))


@given(
    initial=st.integers(1, 100_000),
    factor=st.floats(1, 10),
    maximum=st.integers(1, 1_000_000),
    attempts=st.integers(2, 8),
)
def test_waits_are_bounded(initial: int, factor: float, maximum: int, attempts: int) -> None:
    """Given any retry, then each wait is between half and all of what it may be, and never longer than `maximum`."""
    retry = {"attempts": attempts, "initial": initial, "factor": factor, "maximum": maximum}
    case = started({"a": tool(retry=retry)})
    for number in range(2, attempts + 1):
        at = case.at
        (scheduled,) = case.fails("a")
        assert isinstance(scheduled, RetryScheduled)
        full = min(initial * factor ** (number - 2), maximum)
        assert full / 2 - 1 <= scheduled.due - at <= min(full + 1, maximum)
        case.timer("a")


def test_jitter_spreads_attempts_that_fail_together() -> None:
    """Given many items whose calls fail at the same moment, then their next attempts start at different times."""
    case = started({"a": tool(for_each={"items": list(range(50))}, retry={"initial": "1h", "maximum": "1h"})})
    at = case.at
    waits = []
    for index in range(50):
        case.at = at
        (retry,) = case.fails(f"a[{index}]")
        assert isinstance(retry, RetryScheduled)
        waits.append(retry.due - at)
    assert len(set(waits)) > 45
    assert min(waits) >= 1_800_000
    assert max(waits) < 3_600_000
    assert max(waits) - min(waits) > 1_200_000


@pytest.mark.parametrize("kind", [*FailureKind, "a word of later"])
@pytest.mark.parametrize("kinds", [["rejected"], ["timeout", "rejected"], []])
def test_a_retry_names_its_kinds(kinds: list[str], kind: str) -> None:
    """Given `retry.kinds`, then exactly these are tried again, be they normally so or not."""
    effects = started({"a": tool(retry={"kinds": kinds})}).fails("a", Failure(kind, "m"))
    assert isinstance(effects[0], RetryScheduled) == (kind in kinds)


def test_no_kinds_named_are_those_that_can_help() -> None:
    """Given no `retry.kinds`, then the kinds for which another attempt can help are tried again."""
    for kind in FailureKind:
        effects = started({"a": tool()}).fails("a", Failure(kind, "m"))
        assert isinstance(effects[0], RetryScheduled) == (kind in RETRYABLE)


def test_no_attempt_starts_after_within() -> None:
    """Given `retry.within`, when the next attempt would start later than that after the first, then the step fails."""
    retry = {"attempts": 9, "initial": "10s", "factor": 1, "maximum": "10s", "within": "30s"}
    case = started({"a": tool(retry=retry)})
    assert case.fails("a", Failure(FailureKind.RATE_LIMITED, "m", 29_999))[0] == RetryScheduled(
        "a", 2, Failure(FailureKind.RATE_LIMITED, "m", 29_999), NOW + 30_000
    )
    case.timer("a")
    assert case.fails("a") == (StepFailed("a", UNAVAILABLE, False), RunFailed("a", UNAVAILABLE))


def test_within_counts_from_the_first_attempt() -> None:
    """Given `retry.within`, when attempts take long, then that counts as well."""
    case = started({"a": tool(retry={"within": "30s", "initial": "1s"}, timeout="29500ms")})
    failed, ended = case.timer("a")
    assert isinstance(failed, StepFailed)
    assert isinstance(ended, RunFailed)
    assert failed.failure.kind == TIMEOUT


def test_the_wait_that_a_failure_asks_for_wins() -> None:
    """Given `retry_after_ms`, then it is longer than `maximum`, shorter than `initial`, zero: whatever it says."""
    for asked in (0, 1, 90_000):
        case = started({"a": tool(retry={"initial": "10s", "maximum": "20s"})})
        at = case.at
        (retry,) = case.fails("a", Failure(FailureKind.RATE_LIMITED, "m", asked))
        assert isinstance(retry, RetryScheduled)
        assert retry.due == at + asked
        (again,) = case.timer("a")
        assert isinstance(again, ToolCallRequested)


def test_the_wait_that_a_failure_asks_for_makes_nothing_retryable() -> None:
    """Given `retry_after_ms` in a failure for good, then there is no other attempt."""
    failure = Failure(FailureKind.REJECTED, "no", 10)
    assert started({"a": tool()}).fails("a", failure)[0] == StepFailed("a", failure, False)


def test_a_long_message_is_cut() -> None:
    """Given steps in steps, when a call fails with a long message, then each step says how it begins, and the run goes on."""
    step = {"steps": {"a": {"steps": {"b": {"steps": {"c": tool()}}}}}}
    case = started({"top": {**step, "on_failure": "continue"}, "z": tool()})
    effects = case.fails("top.a.b.c", Failure(FailureKind.REJECTED, "x" * 1_500_000))
    cut = Failure(FailureKind.REJECTED, "x" * MAX_MESSAGE_CHARS)
    assert effects == tuple(StepFailed(path, cut, path == "top") for path in ("top.a.b.c", "top.a.b", "top.a", "top"))


# --- Time limits of attempts ---


def test_each_attempt_has_its_own_time() -> None:
    """Given `timeout`, when an attempt's time is over, then the next one has all of it again, and the last one's end is final."""
    case = started({"a": tool(timeout="5s", retry={"attempts": 2})})
    (retry,) = case.timer("a")
    assert isinstance(retry, RetryScheduled)
    (again,) = case.timer("a")
    assert isinstance(again, ToolCallRequested)
    assert again.deadline == case.at - 1 + 5000
    failure = Failure(TIMEOUT, "no answer within 5000 ms")
    assert case.timer("a") == (StepFailed("a", failure, False), RunFailed("a", failure))


def test_an_answer_after_the_attempts_time_changes_nothing() -> None:
    """Given an attempt that ran out of time, when its answer comes, then it is ignored, also while the next one runs."""
    case = started({"a": tool(timeout="5s")})
    first = case.awaits("a")
    case.timer("a")
    assert case.done("a", call=first) == LATE
    case.timer("a")
    assert case.done("a", call=first) == LATE
    assert case.fails("a", REJECTED, call=first) == LATE
    assert case.done("a", "2") == (StepCompleted("a"), RunCompleted("2"))


def test_an_answer_in_the_last_moment_counts() -> None:
    """When an answer comes before the timer, though at the same time, then it is taken; the timer is late."""
    case = started({"a": tool(timeout="5s"), "b": tool()})
    call = case.awaits("a")
    case.at = NOW + 5000
    assert case.done("a") == (StepCompleted("a"),)
    assert fire(case, "a", NOW + 5000, call) == LATE


@pytest.mark.parametrize("early", [1, 4999])
def test_a_timer_that_is_too_early_changes_nothing(early: int) -> None:
    """When a timer fires before it is due by the broker's clock, then it is ignored as early, and counts when it is due."""
    case = started({"a": tool(timeout="5s")})
    before = case.state.steps
    assert fire(case, "a", NOW + 5000 - early) == (InputIgnored("early"),)
    assert fire(case, "a", NOW + 5000 - early) == (InputIgnored("early"),)
    assert (case.state.steps, case.state.steps["a"].due) == (before, NOW + 5000)
    (retry,) = fire(case, "a", NOW + 5000)
    assert isinstance(retry, RetryScheduled)


@pytest.mark.parametrize(
    "step",
    [
        tool(retry={"attempts": 1}),
        {"sleep": "1m"},
        {"wait_for": {"signal": "s", "timeout": "1m"}},
        {"approval": {"message": "ok?", "deadline": "1m"}},
        {"steps": {"x": {"wait_for": {"signal": "s"}}}, "time_limit": "1m"},
        {"switch": {"x": {"wait_for": {"signal": "s"}}}, "time_limit": "1m"},
        {**tool(timeout="1h"), "for_each": {"items": [1]}, "time_limit": "1m"},
        {**tool(timeout="1h"), "repeat": {"until": "false", "at_most": 2}, "time_limit": "1m"},
        {"run": {"workflow": "w"}, "time_limit": "1m"},
    ],
)
def test_every_timer_can_be_too_early_and_fires_once(step: dict[str, Any]) -> None:
    """Given any step that waits, when its timer fires too early, then nothing happens; when due, something; then nothing more."""
    case = started({"a": {**step, "on_failure": "continue"}, "b": tool()})
    timer = case.awaits("a")
    assert case.state.steps["a"].due == NOW + 60_000
    assert fire(case, "a", NOW + 59_999) == (InputIgnored("early"),)
    assert isinstance(fire(case, "a", NOW + 60_000)[-1], StepCompleted | StepFailed)
    assert fire(case, "a", NOW + 60_001, timer) == LATE
    assert case.state.status is RunStatus.OPEN


@pytest.mark.parametrize(
    "step",
    [
        {"wait_for": {"signal": "s"}},
        {"approval": {"message": "ok?"}},
        {"run": {"workflow": "w"}},
        {"steps": {"x": tool()}},
        {"switch": {"x": tool()}},
        {**tool(), "for_each": {"items": [1]}},
        {**tool(), "repeat": {"until": "false", "at_most": 2}},
    ],
)
def test_what_has_no_limit_has_no_timer(step: dict[str, Any]) -> None:
    """Given a step that may wait for ever, when a timer fires that nobody set, then nothing happens."""
    case = started({"a": {**step}})
    assert case.state.steps["a"].due == 0
    for timer in ("", case.awaits("a")):
        assert fire(case, "a", NOW + 10 * DAY, timer) == (InputIgnored("unknown_timer"),)


# --- Time limits of steps ---


def test_a_steps_time_is_that_of_all_its_attempts_and_waits() -> None:
    """Given `time_limit`, then no attempt has more time than is left; at the end the step fails and its call is cancelled."""
    case = started({"a": tool(timeout="40s", time_limit="1m", retry={"attempts": 9})})
    case.timer("a")
    (again,) = case.timer("a")
    assert isinstance(again, ToolCallRequested)
    assert again.deadline == NOW + 60_000
    call = case.awaits("a")
    failure = limited()
    assert case.timer("a") == (CallCancelled("a", call, "time limit"), StepFailed("a", failure, False), RunFailed("a", failure))


def test_no_attempt_is_waited_for_beyond_the_steps_time() -> None:
    """Given `time_limit`, when the next attempt would start after it, then the step fails at once."""
    case = started({"a": tool(time_limit="1m")})
    failure = Failure(FailureKind.RATE_LIMITED, "m", 60_000)
    assert case.fails("a", failure) == (StepFailed("a", failure, False), RunFailed("a", failure))


def test_a_wait_for_the_next_attempt_that_lasts_too_long_is_the_end() -> None:
    """Given `time_limit`, when the timer of the next attempt comes only after it, then nothing more is called."""
    case = started({"a": tool(time_limit="1m")})
    case.fails("a", Failure(FailureKind.RATE_LIMITED, "m", 30_000))
    failure = limited()
    assert fire(case, "a", NOW + 60_000) == (StepFailed("a", failure, False), RunFailed("a", failure))


def test_a_late_answer_after_the_steps_time_changes_nothing() -> None:
    """Given a step that ran out of time and is tolerated, when its call is answered, then that is ignored."""
    case = started({"a": tool(time_limit="1m", on_failure="continue"), "b": tool()})
    call = case.awaits("a")
    case.timer("a")
    assert case.done("a", call=call) == LATE
    assert case.state.steps["a"].status is StepStatus.FAILED


def test_a_child_run_that_takes_too_long_is_cancelled() -> None:
    """Given `time_limit` on a child run, when it is over, then the child run is cancelled; its late result changes nothing."""
    case = started({"a": {"run": {"workflow": "w"}, "time_limit": "1m", "on_failure": "continue"}, "b": tool()})
    request = case.events[0].decision.effects[0]
    assert isinstance(request, ChildRunRequested)
    assert request.due == NOW + 60_000
    call = case.awaits("a")
    child = run_id_of(call)
    assert case.timer("a") == (ChildRunCancelled("a", child, "time limit"), StepFailed("a", limited(), True))
    assert case.when(ChildRunCompleted(call, "a", child, "1")) == LATE


def test_a_signal_that_never_comes() -> None:
    """Given a `timeout`, when no signal came, then the step fails, or has the output that `otherwise` says."""
    case = started({"a": {"wait_for": {"signal": "s", "timeout": "1m"}}})
    assert case.events[0].decision.effects == (SignalAwaited("a", "s", None, NOW + 60_000),)
    failure = Failure(TIMEOUT, "no signal `s` within 60000 ms")
    assert case.timer("a") == (StepFailed("a", failure, False), RunFailed("a", failure))
    wait = {"wait_for": {"signal": "s", "timeout": "1m", "otherwise": {"x": "=input.x"}}}
    case = started({"a": wait}, '{"x":1}')
    assert case.timer("a") == (StepCompleted("a", '{"x":1}'), RunCompleted('{"x":1}'))


def test_otherwise_can_be_nothing() -> None:
    """Given `otherwise: =null`, when no signal came, then the step completes without output."""
    case = started({"a": {"wait_for": {"signal": "s", "timeout": "1m", "otherwise": "=null"}}})
    assert case.timer("a") == (StepCompleted("a", "null"), RunCompleted("null"))


def test_otherwise_that_cannot_be_computed() -> None:
    """Given `otherwise` that has no value, when no signal came, then the step fails with that."""
    case = started({"a": {"wait_for": {"signal": "s", "timeout": "1m", "otherwise": "=input.nope"}}})
    failed, ended = case.timer("a")
    assert isinstance(failed, StepFailed)
    assert isinstance(ended, RunFailed)
    assert failed.failure.kind == FailureKind.EXPRESSION


WAITS: list[tuple[dict[str, Any], dict[str, Any], Any]] = [
    ({"wait_for": {"signal": "s"}}, {"otherwise": 1}, "timeout"),
    ({"approval": {"message": "ok?"}}, {"otherwise": "approve"}, "deadline"),
]


@pytest.mark.parametrize(("step", "otherwise", "name"), WAITS)
def test_the_shorter_of_two_limits_counts(step: dict[str, Any], otherwise: dict[str, Any], name: str) -> None:
    """Given a wait of its own and `time_limit`, then the shorter one decides what happens, however late its timer fires."""
    ((kind, what),) = step.items()
    for own, limit, delay in [("1m", "2m", 0), ("1m", "2m", 10 * DAY), ("1m", "1m", 0), ("2m", "1m", 0), ("2m", "1m", DAY)]:
        case = started({"a": {kind: {**what, **otherwise, name: own}, "time_limit": limit}})
        case.at = case.state.steps["a"].due + delay
        assert case.state.steps["a"].due == NOW + 60_000
        effects = case.timer("a")
        if own == "1m":
            assert isinstance(effects[-1], RunCompleted), (own, limit, delay)
        else:
            assert effects == (StepFailed("a", limited(), False), RunFailed("a", limited()))


@pytest.mark.parametrize(
    "step", [{"wait_for": {"signal": "s", "otherwise": 1}}, {"approval": {"message": "ok?", "otherwise": "approve"}}]
)
def test_a_wait_without_a_limit_of_its_own(step: dict[str, Any]) -> None:
    """Given only `time_limit` on a signal or an approval, when it is over, then the step fails: `otherwise` isn't meant."""
    case = started({"a": {**step, "time_limit": "1m"}})
    assert case.timer("a") == (StepFailed("a", limited(), False), RunFailed("a", limited()))


def test_a_block_has_a_time_limit() -> None:
    """Given `time_limit` on a step with steps, when it is over, then all that is under way in it is cancelled and it fails."""
    inner = {"x": tool(timeout="1h"), "y": {"wait_for": {"signal": "s"}}, "z": {"sleep": "1h"}, "w": tool(needs=["z"])}
    case = started({"a": {"steps": inner, "time_limit": "1m", "on_failure": "continue"}, "b": tool(needs=["a"])})
    assert case.events[0].decision.effects[:2] == (BlockEntered("a"), TimerSet("a", NOW + 60_000))
    call = case.awaits("a.x")
    *cancelled, failed, requested = case.timer("a")
    assert cancelled == [
        CallCancelled("a.x", call, "time limit"),
        StepCancelled("a.x", "time limit"),
        StepCancelled("a.y", "time limit"),
        StepCancelled("a.z", "time limit"),
    ]
    assert failed == StepFailed("a", limited(), True)
    assert isinstance(requested, ToolCallRequested)
    assert requested.step == "b"
    assert not case.state.listening
    assert [path for path in case.state.steps if path.startswith("a.")] == []
    assert case.done("a.x", call=call) == (InputIgnored("unknown_call"),)


def test_a_map_has_a_time_limit() -> None:
    """Given `time_limit` on a step for each item, when it is over, then the calls of its items are cancelled."""
    step = {**tool(timeout="1h", time_limit="1m"), "for_each": {"items": [1, 2, 3], "concurrency": 2, "tolerate": "all"}}
    case = started({"a": step})
    effects = case.events[0].decision.effects
    assert effects[:2] == (MapStarted("a", 3, "[1,2,3]", None), TimerSet("a", NOW + 60_000))
    assert effects[2].deadline == NOW + 3_600_000  # type: ignore[union-attr]
    first, second = case.awaits("a[0]"), case.awaits("a[1]")
    case.done("a[0]")
    third = case.awaits("a[2]")
    assert case.timer("a") == (
        CallCancelled("a[1]", second, "time limit"),
        StepCancelled("a[1]", "time limit"),
        CallCancelled("a[2]", third, "time limit"),
        StepCancelled("a[2]", "time limit"),
        StepFailed("a", limited(), False),
        RunFailed("a", limited()),
    )
    assert first != second


def test_a_loop_has_a_time_limit() -> None:
    """Given `time_limit` on a loop, then it is one of all iterations together."""
    case = started({"a": {**tool(timeout="1h", time_limit="1m"), "repeat": {"until": "last > 9", "at_most": 100}}})
    assert case.events[0].decision.effects[:2] == (LoopAdvanced("a", 0), TimerSet("a", NOW + 60_000))
    for index in range(5):
        case.at = NOW + 10_000 * index
        case.done(f"a[{index}]")
    call = case.awaits("a[5]")
    assert case.timer("a") == (
        CallCancelled("a[5]", call, "time limit"),
        StepCancelled("a[5]", "time limit"),
        StepFailed("a", limited(), False),
        RunFailed("a", limited()),
    )


def test_a_long_loop_keeps_its_time_limit() -> None:
    """Given a loop that goes on in a next decision because one holds enough, then its time limit still holds."""
    endless = {"transform": "=index", "repeat": {"until": "false", "at_most": 1_000_000}, "time_limit": "1m"}
    case = started({"a": endless})
    assert case.events[-1].decision.effects[-1] == TimerSet("a", NOW)
    limit = case.state.steps["a"].awaits
    case.timer("a")
    assert fire(case, "a", NOW + 10, limit) == (InputIgnored("unknown_timer"),)
    assert fire(case, "a", NOW + 60_000) == (StepFailed("a", limited(), False), RunFailed("a", limited()))


@pytest.mark.parametrize("limit", [None, "1h"])
def test_the_timer_that_goes_on_counts_once(limit: str | None) -> None:
    """Given a list whose items begin in several decisions, when that timer fires twice, then nothing happens twice."""
    step = {**tool(timeout="2h"), "for_each": {"items": "=input", "concurrency": 2000}}
    if limit:
        step["time_limit"] = limit
    case = started({"a": step}, f"[{','.join('1' * 1500)}]")
    timer = case.awaits("a")
    assert case.events[-1].decision.effects[-1] == TimerSet("a", NOW)
    first = case.events[0].decision.effects
    calls = [effect for effect in (*first, *case.timer("a")) if isinstance(effect, ToolCallRequested)]
    assert len({effect.step for effect in calls}) == len(calls) == 1500
    before = case.state.steps
    (ignored,) = fire(case, "a", case.at, timer)
    assert isinstance(ignored, InputIgnored)
    assert case.state.steps == before


def test_the_time_of_a_held_step_begins_when_it_does() -> None:
    """Given a step that is held before it begins, when it is released, then it has all its time."""
    case = workflow({"a": tool(time_limit="30s")})
    assert case.start(break_at=("a",)) == (StepHeld("a", 0, "breakpoint"),)
    case.at = NOW + DAY
    cleared, requested = case.when(ResumeStep("a", "me"))
    assert cleared == BreakpointCleared("a")
    assert isinstance(requested, ToolCallRequested)
    assert requested.deadline == NOW + DAY + 30_000


def test_the_time_of_a_step_goes_on_while_it_is_held() -> None:
    """Given a step that is held between attempts, when it is released after its time, then it fails and nothing is called."""
    for late in (False, True):
        case = started({"a": tool(time_limit="10m", timeout="1m")})
        case.fails("a")
        case.when(PauseRun("me", ""))
        assert case.timer("a") == (StepHeld("a", 2, "paused"),)
        case.at = NOW + 600_000 - (not late)
        resumed, *then = case.when(ResumeRun("me", single=False))
        assert resumed == RunResumed(single=False)
        if late:
            assert then == [StepFailed("a", limited(600_000), False), RunFailed("a", limited(600_000))]
        else:
            assert then == [ToolCallRequested("a", 2, "echo", "{}", NOW + 600_000)]


# --- Time limit of the run ---


def test_a_run_has_a_time_limit() -> None:
    """Given `time_limit` of the workflow, when it is over, then what is under way is cancelled and the run fails."""
    case = workflow({"a": tool(timeout="1h"), "b": {"wait_for": {"signal": "s"}}}, time_limit="1m")
    first, *_ = case.start()
    assert first == TimerSet("", NOW + 60_000)
    assert case.state.limit is not None
    timer, call = case.state.limit[0], case.awaits("a")
    assert fire(case, "", NOW + 59_999, timer) == (InputIgnored("early"),)
    assert fire(case, "", NOW + 60_000, "other") == (InputIgnored("unknown_timer"),)
    failure = Failure(TIMEOUT, "the run did not end within 60000 ms")
    assert fire(case, "", NOW + 60_000, timer) == (
        CallCancelled("a", call, "the run failed"),
        StepCancelled("a", "the run failed"),
        StepCancelled("b", "the run failed"),
        RunFailed(None, failure),
    )
    assert case.state.status is RunStatus.FAILED


def test_a_run_without_a_limit_has_no_timer() -> None:
    """Given no `time_limit`, when a timer of the run fires, then nobody knows it."""
    case = started({"a": tool()})
    for timer in ("", "x"):
        assert fire(case, "", NOW + 10 * DAY, timer) == (InputIgnored("unknown_timer"),)


def test_clean_up_has_the_time_it_needs() -> None:
    """Given clean-up steps, when the run's time is over, then they run; the timer fires twice, the second is late."""
    case = started({"a": tool(timeout="1h")}, time_limit="1m", **{"finally": {"tidy": tool()}})
    assert case.state.limit is not None
    timer = case.state.limit[0]
    effects = fire(case, "", NOW + 60_000, timer)
    failure = Failure(TIMEOUT, "the run did not end within 60000 ms")
    assert RunClosing("failed", failure=failure) in effects
    assert fire(case, "", NOW + 60_001, timer) == LATE
    assert case.done("finally.tidy")[-1] == RunFailed(None, failure)


def test_the_runs_time_goes_on_while_it_is_paused() -> None:
    """Given a run that is paused, when its time is over, then it fails."""
    case = started({"a": tool()}, time_limit="1m")
    case.when(PauseRun("me", ""))
    assert case.done("a") == (StepCompleted("a"), RunCompleted("1"))
    case = started({"a": tool(), "b": tool(needs=["a"])}, time_limit="1m")
    case.when(PauseRun("me", ""))
    assert case.done("a") == (StepCompleted("a"), StepHeld("b", 0, "paused"))
    assert case.state.limit is not None
    cancelled, failed = fire(case, "", NOW + 60_000, case.state.limit[0])
    assert cancelled == StepCancelled("b", "the run failed")
    assert isinstance(failed, RunFailed)


# --- Sleeping ---


def test_a_step_sleeps() -> None:
    """Given `sleep`, then a timer is set, and when it fires the step completes with null and what needs it goes on."""
    case = started({"a": {"sleep": "3d"}, "b": {"transform": "=steps.a.output", "needs": ["a"]}})
    assert case.events[0].decision.effects == (TimerSet("a", NOW + 3 * DAY),)
    assert case.state.steps["a"].status is StepStatus.SLEEPING
    assert fire(case, "a", NOW + 3 * DAY - 1) == (InputIgnored("early"),)
    assert fire(case, "a", NOW + 3 * DAY) == (StepCompleted("a", "null"), StepCompleted("b", "null"), RunCompleted("null"))


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ('"1.5m"', 90_000),
        ('"500ms"', 500),
        ("250", 250),
        ("0", 0),
        ('"0s"', 0),
        ("1.4", 1),
        ('" 2h "', 7_200_000),
        ('"3650d"', LONGEST_MS),
    ],
)
def test_a_computed_sleep(text: str, ms: int) -> None:
    """Given an expression, then its text with a unit, or its number of milliseconds, is how long the step sleeps."""
    assert workflow({"a": {"sleep": "=input"}}).start(text) == (TimerSet("a", NOW + ms),)


@pytest.mark.parametrize(
    "text",
    [
        '"soon"',
        '""',
        "null",
        "true",
        "[]",
        "{}",
        "-1",
        '"-5s"',
        '"5"',
        "1e300",
        "9223372036854775807",
        '"3651d"',
        '"\\ud800"',
        '"NaN"',
    ],
)
def test_a_sleep_that_makes_no_sense_fails_the_step(text: str) -> None:
    """When the computed time to sleep is nonsense, then the step fails and says so."""
    failed, ended = workflow({"a": {"sleep": "=input"}}).start(text)
    assert isinstance(failed, StepFailed)
    assert isinstance(ended, RunFailed)
    assert failed.failure.kind == FailureKind.EXPRESSION


def test_a_sleep_that_fails_can_be_tolerated() -> None:
    """Given `on_failure: continue`, when the time is nonsense, then the run goes on."""
    case = workflow({"a": {"sleep": "=input", "on_failure": "continue"}, "b": {"transform": "=steps.a.status", "needs": ["a"]}})
    assert case.start('"x"')[-1] == RunCompleted('"failed"')


@pytest.mark.parametrize(
    ("until", "due"),
    [
        ("2030-01-01T00:00:00Z", 1_893_456_000_000),
        ("2030-01-01T01:00:00+01:00", 1_893_456_000_000),
        ("2020-01-01T00:00:00Z", NOW),
        ("0000-01-01T00:00:00Z", NOW),
    ],
)
def test_a_step_sleeps_until_then(until: str, due: int) -> None:
    """Given `sleep_until`, fixed or computed, then the timer is due then; in the past, at once."""
    assert workflow({"a": {"sleep_until": until}}).start() == (TimerSet("a", due),)
    case = workflow({"a": {"sleep_until": "=input"}})
    assert case.start(f'"{until}"') == (TimerSet("a", due),)
    assert case.timer("a")[-1] == RunCompleted("null")


@pytest.mark.parametrize(("text", "due"), [(str(NOW + 5), NOW + 5), ("0", NOW), ("-9", NOW)])
def test_a_computed_instant_can_be_a_number(text: str, due: int) -> None:
    """Given milliseconds since the epoch, then the timer is due then."""
    assert workflow({"a": {"sleep_until": "=input"}}).start(text) == (TimerSet("a", due),)


@pytest.mark.parametrize(
    "text",
    [
        *('"tomorrow"', '""', "null", "true", "[]", "1.5", '"2030-01-01"', '"2030-01-01T00:00:00"', '"2030-02-30T00:00:00Z"'),
        *('"9999-01-01T00:00:00Z"', "9223372036854775807", '"2030-01-01T24:00:00Z"'),
        *('"٢٠٣٠-01-01T00:00:00Z"', '"\\ud800"'),
    ],
)
def test_an_instant_that_makes_no_sense_fails_the_step(text: str) -> None:
    """When the computed point in time is nonsense, or more than ten years away, then the step fails and says so."""
    failed, ended = workflow({"a": {"sleep_until": "=input"}}).start(text)
    assert isinstance(failed, StepFailed)
    assert isinstance(ended, RunFailed)
    assert failed.failure.kind == FailureKind.EXPRESSION


@pytest.mark.parametrize("text", ["tomorrow", "2030-01-01", "2030-01-01T00:00:00", "2030-02-30T00:00:00Z"])
def test_a_fixed_instant_that_makes_no_sense_is_refused(text: str) -> None:
    """When a definition names a point in time that there is not, then it is refused."""
    with pytest.raises(ValueError, match=r"point in time|no such day"):
        WorkflowSpec.model_validate({"name": "w", "steps": {"a": {"sleep_until": text}}})


def test_a_sleep_has_a_time_limit_too() -> None:
    """Given `time_limit` on a sleep that turns out longer, when it is over, then the step fails."""
    case = started({"a": {"sleep": "=input", "time_limit": "1m"}}, '"1h"')
    assert case.state.steps["a"].due == NOW + 60_000
    assert case.timer("a") == (StepFailed("a", limited(), False), RunFailed("a", limited()))
    case = started({"a": {"sleep": "=input", "time_limit": "1m"}}, '"30s"')
    case.at = NOW + DAY
    assert case.timer("a")[-1] == RunCompleted("null")


def test_a_sleep_whose_undoing_cannot_be_computed() -> None:
    """Given a sleep in tolerated steps, when its compensation has no arguments, then the run goes on behind them."""
    undo = {"refund": {"tool": {"name": "refund", "arguments": {"id": "=output.nope"}}}}
    inner = {"steps": {"nap": {"sleep": "1m", "compensation": "refund"}, "z": tool(needs=["nap"])}}
    steps = {"outer": {"steps": {"inner": inner}, "on_failure": "continue"}, "b": tool(needs=["outer"])}
    case = started(steps, compensations=undo)
    *failed, request = case.timer("outer.inner.nap")
    assert [each.step for each in failed if isinstance(each, StepFailed)] == [
        *("undo(outer.inner.nap)", "outer.inner.nap", "outer.inner", "outer")
    ]
    assert isinstance(request, ToolCallRequested)
    assert request.step == "b"


# --- Points in time ---

ZONES = st.one_of(st.just(dt.UTC), st.integers(-23 * 60 - 59, 23 * 60 + 59).map(lambda m: dt.timezone(dt.timedelta(minutes=m))))
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@given(
    moment=st.datetimes(timezones=ZONES),
    mark=st.sampled_from("Tt "),
    zulu=st.sampled_from("Zz"),
    digits=st.integers(0, 9),
    colon=st.booleans(),
)
def test_instants_are_those_of_the_calendar(moment: dt.datetime, mark: str, zulu: str, digits: int, colon: bool) -> None:
    """Given any RFC 3339 text, then `instant` is the same point in time that Python's calendar says, in whole milliseconds."""
    fraction = f"{moment.microsecond:06d}000"[:digits]
    offset = moment.utcoffset()
    assert offset is not None
    minutes = int(offset.total_seconds()) // 60
    if moment.tzinfo is dt.UTC:
        zone = zulu
    else:
        zone = f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}{':' if colon else ''}{abs(minutes) % 60:02d}"
    text = f"{moment:%Y-%m-%d}".rjust(10, "0") + f"{mark}{moment:%H:%M:%S}{'.' if digits else ''}{fraction}{zone}"
    micros = int(f"{fraction:0<6}"[:6])
    wall = moment.replace(microsecond=0, tzinfo=dt.UTC) - EPOCH
    expected = (wall // dt.timedelta(milliseconds=1)) - minutes * 60_000 + micros // 1000
    assert instant(text) == expected


@given(st.text(max_size=40) | st.from_regex(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:?\d\d)?"))
def test_any_text_is_an_instant_or_a_value_error(text: str) -> None:
    """Given any text, then it is a point in time that Python's calendar knows as well, or refused."""
    try:
        found = instant(text)
    except ValueError:
        return
    assert isinstance(found, int)
    cleaned = text.strip().upper()
    if int(cleaned[:4]) and ":60" not in cleaned and _known_offset(cleaned):
        assert found == round(dt.datetime.fromisoformat(re.sub(r"\s+(?=[Z+-])", "", cleaned)).timestamp() * 1000)


def _known_offset(text: str) -> bool:
    return text.endswith("Z") or (
        int(text[-5:].replace(":", "")[:2] if text[-3] == ":" else text[-4:-2]) < 24 and int(text[-2:]) < 60
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:59.999Z", -1),
        ("2000-02-29T00:00:00Z", 951_782_400_000),
        ("1985-04-12T23:20:50.52Z", 482_196_050_520),
        ("1996-12-19T16:39:57-08:00", 851_042_397_000),
        ("1990-12-31T23:59:60Z", 662_688_000_000),
        ("1990-12-31T15:59:60-08:00", 662_688_000_000),
        ("2026-11-21T09:30Z", 1_795_253_400_000),
        (" 2026-11-21 09:30:00z ", 1_795_253_400_000),
        ("2026-11-21T09:30:00-00:00", 1_795_253_400_000),
        ("9999-12-31T23:59:59.999999999Z", 253_402_300_799_999),
    ],
)
def test_instants_of_the_standard(text: str, expected: int) -> None:
    """The examples of RFC 3339, leap seconds, and what people write."""
    assert instant(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "1900-02-29T00:00:00Z", "2023-02-29T00:00:00Z", "2024-13-01T00:00:00Z", "2024-00-01T00:00:00Z"),
        *("2024-01-00T00:00:00Z", "2024-04-31T00:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01T00:60:00Z"),
        *("2024-01-01T00:00:61Z", "2024-01-01T00:00:00", "2024-01-01", "2024-01-01T00:00:00.Z", "24-01-01T00:00:00Z"),
        *("2024-01-01T00:00:00+1:00", "-2024-01-01T00:00:00Z"),
        *("2024-01-01T00:00:00Z\nx", "12024-01-01T00:00:00Z", "2024-W01-1T00:00:00Z", "\uff12\uff10\uff12\uff14-01-01T00:00:00Z"),
    ],
)
def test_what_is_no_instant_is_refused(text: str) -> None:
    """Given what is no point in time, then it is refused with what to write."""
    with pytest.raises(ValueError, match=r"point in time|no such day"):
        instant(text)


@pytest.mark.parametrize("zone", ["+24:00", "+00:60", "-99:99"])
def test_an_offset_that_there_is_not_is_refused(zone: str) -> None:
    """Given an offset of more than 23 hours and 59 minutes, then the text is refused, as RFC 3339 says."""
    with pytest.raises(ValueError, match=r"point in time|no such day"):
        instant(f"2024-01-01T00:00:00{zone}")
