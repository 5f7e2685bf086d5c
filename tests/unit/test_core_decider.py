import hashlib
from typing import Any

import pytest
from core import NOW, REJECTED, UNAVAILABLE, Case, started, tool, workflow
from hypothesis import given, settings
from hypothesis import strategies as st

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import (
    CallCancelled,
    InputIgnored,
    RetryScheduled,
    RunCompleted,
    RunFailed,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepSkipped,
    UnreadableInput,
)
from events.failure import RETRYABLE, Failure, FailureKind
from events.results import Input, LlmCallCompleted, LlmCallFailed, TimerFired, ToolCallCompleted, ToolCallFailed, Usage
from streams.workflow.decider import MAX_PAYLOAD_BYTES
from streams.workflow.evolve import fold
from streams.workflow.expressions import from_json
from streams.workflow.payloads import INLINE_BYTES
from streams.workflow.state import RunStatus, StepStatus

# --- Each kind of step ---


def test_a_tool_is_called() -> None:
    """When a run starts, then a tool step requests its call with its arguments and the deadline of its attempt."""
    case = workflow({"a": {"tool": {"name": "echo", "arguments": {"x": "=input.x"}}, "timeout": "5s"}})
    assert case.start('{"x":7}') == (ToolCallRequested("a", 1, "echo", '{"x":7}', NOW + 5000),)
    assert case.state.status is RunStatus.OPEN


def test_a_model_is_asked() -> None:
    """When a run starts, then an LLM step requests its call with the rendered prompt, the parameters and the schema."""
    llm = {"prompt": "Say {{ input.x }}", "system": "Be brief", "schema": {"type": "object"}, "model": "m", "seed": 3}
    case = workflow({"a": {"llm": llm}})
    (call,) = case.start('{"x":"hi"}')
    assert isinstance(call, LlmCallRequested)
    assert (call.model, call.schema, call.attempt) == ("m", '{"type":"object"}', 1)
    assert call.messages == '[{"content":"Be brief","role":"system"},{"content":"Say hi","role":"user"}]'
    assert call.parameters == '{"max_tokens":512,"seed":3,"temperature":0.0}'


def test_an_answer_completes_a_model_step() -> None:
    """When the model answers, then the step and the run are complete, and the answer is not written twice."""
    case = started({"a": {"llm": {"prompt": "hi"}}})
    answer = LlmCallCompleted(case.awaits("a"), "a", '"yes"', "m", "p", "stop", Usage(1, 2), None, 3)
    assert case.when(answer) == (StepCompleted("a", None), RunCompleted('"yes"'))
    assert (case.state.status, case.state.output) == (RunStatus.COMPLETED, '"yes"')


def test_a_transform_needs_no_call() -> None:
    """When a run of transforms starts, then it ends in the same decision."""
    twice = {"transform": {"twice": "=steps.a.output * 2"}, "needs": ["a"]}
    case = workflow({"a": {"transform": "=input.x + 1"}, "b": twice})
    assert case.start('{"x":1}') == (StepCompleted("a", "2"), StepCompleted("b", '{"twice":4}'), RunCompleted('{"twice":4}'))


def test_the_output_is_the_workflows_own() -> None:
    """Given an output in the definition, when the last step is settled, then the run's output is computed from it."""
    case = started({"a": tool(), "b": tool()}, output={"both": "=[steps.a.output, steps.b.output]"})
    assert case.done("a", "1") == (StepCompleted("a"),)
    assert case.done("b", "2") == (StepCompleted("b"), RunCompleted('{"both":[1,2]}'))


# --- Conditions, branches ---


def test_a_condition_that_is_not_met_skips_a_step() -> None:
    """Given a condition, when it isn't met, then the step is skipped and those that need it go on."""
    case = workflow({"a": tool(when="input.go"), "b": {"transform": "=steps.a.status", "needs": ["a"]}})
    assert case.start('{"go":false}') == (
        StepSkipped("a", "input.go"),
        StepCompleted("b", '"skipped"'),
        RunCompleted('"skipped"'),
    )


def test_a_condition_that_is_met_calls() -> None:
    """Given a condition, when it is met, then the step runs."""
    (call,) = workflow({"a": tool(when="input.go")}).start('{"go":true}')
    assert isinstance(call, ToolCallRequested)


@pytest.mark.parametrize("condition", ["input.nope", "1 + 1", "input.go > 'x'"])
def test_a_condition_that_fails_fails_its_step(condition: str) -> None:
    """When a condition has no answer, then its step fails, and the run with it."""
    failed, ended = workflow({"a": tool(when=condition)}).start('{"go":1}')
    assert isinstance(failed, StepFailed)
    assert isinstance(ended, RunFailed)
    assert failed.failure.kind == FailureKind.EXPRESSION


def test_branches_run_in_parallel_in_the_definitions_order() -> None:
    """Given a diamond, then both branches are requested at once, and what needs both waits for both."""
    steps = {"z": tool(), "b": tool(needs=["z"]), "a": tool(needs=["z"]), "end": tool(needs=["a", "b"])}
    case = started(steps)
    assert [effect.step for effect in case.done("z")[1:]] == ["b", "a"]  # type: ignore[union-attr]
    assert case.done("a") == (StepCompleted("a"),)
    completed, requested = case.done("b")
    assert isinstance(requested, ToolCallRequested)
    assert (completed, requested.step) == (StepCompleted("b"), "end")


def test_nothing_is_requested_after_the_run_failed() -> None:
    """Given two steps that are ready at once, when the first fails the run, then the second is not requested."""
    effects = workflow({"a": {"transform": "=input.nope"}, "b": tool()}).start()
    assert [type(effect) for effect in effects] == [StepFailed, RunFailed]


# --- Failures and attempts ---


def test_a_tolerated_failure_lets_the_run_go_on() -> None:
    """Given `on_failure: continue`, when the step fails for good, then others see its failure and the run goes on."""
    steps = {"a": tool(on_failure="continue"), "b": {"transform": "=steps.a.error.kind", "needs": ["a"]}}
    effects = started(steps).fails("a", REJECTED)
    assert effects == (StepFailed("a", REJECTED, True), StepCompleted("b", '"rejected"'), RunCompleted('"rejected"'))


def test_a_failure_for_good_ends_the_run() -> None:
    """Given no tolerance, when a step fails for good, then the run fails with it."""
    case = started({"a": tool(), "b": tool()})
    assert case.fails("a", REJECTED) == (
        StepFailed("a", REJECTED, False),
        CallCancelled("b", case.past("b"), "the run failed"),
        StepCancelled("b", "the run failed"),
        RunFailed("a", REJECTED),
    )
    assert (case.state.status, case.state.failure) == (RunStatus.FAILED, REJECTED)


@pytest.mark.parametrize("kind", [*FailureKind, "a word of later"])
def test_retryability_derives_from_the_kind(kind: str) -> None:
    """When an attempt fails, then another one is scheduled if and only if the kind says it can help."""
    effects = started({"a": tool()}).fails("a", Failure(kind, "m"))
    assert isinstance(effects[0], RetryScheduled) == (kind in RETRYABLE)


def test_waits_grow_and_have_jitter_from_the_call() -> None:
    """Given retries, when attempts fail, then waits double up to the limit, each shortened by up to a half."""
    case = started({"a": tool(retry={"attempts": 6, "initial": "1s", "factor": 2, "maximum": "4s"})})
    for number, full in ((2, 1000), (3, 2000), (4, 4000), (5, 4000), (6, 4000)):
        call, at = case.awaits("a"), case.at
        (retry,) = case.fails("a")
        assert isinstance(retry, RetryScheduled)
        jitter = int.from_bytes(hashlib.blake2b(call.encode(), digest_size=4).digest()) / 2**32
        assert (retry.attempt, retry.due - at) == (number, round(full * (0.5 + jitter / 2)))
        assert full / 2 <= retry.due - at <= full
        (again,) = case.timer("a")
        assert isinstance(again, ToolCallRequested)
        assert again.attempt == number
    assert [type(effect) for effect in case.fails("a")] == [StepFailed, RunFailed]


def test_the_other_side_says_how_long_to_wait() -> None:
    """Given `retry_after_ms` in a failure, then that is the wait, without jitter."""
    case = started({"a": tool()})
    (retry,) = case.fails("a", Failure(FailureKind.RATE_LIMITED, "m", 123_456))
    assert isinstance(retry, RetryScheduled)
    assert retry.due == NOW + 1 + 123_456


@pytest.mark.parametrize("wait", [2**63 - 1, 2**62, -1, -(2**63)])
def test_no_wait_can_stop_the_partition(wait: int) -> None:
    """Given any `retry_after_ms`, then the decision can be written and the timer lies ahead, within a year."""
    case = started({"a": tool()})
    (retry,) = case.fails("a", Failure(FailureKind.RATE_LIMITED, "m", wait))
    assert isinstance(retry, RetryScheduled)
    assert NOW <= retry.due <= NOW + 366 * 86_400_000


def test_an_attempt_has_a_time_limit() -> None:
    """When an attempt's time is over, then it fails as a timeout and is tried again; its late answer is ignored."""
    case = started({"a": tool(timeout="5s")})
    call = case.awaits("a")
    (retry,) = case.timer("a")
    assert isinstance(retry, RetryScheduled)
    assert (retry.failure.kind, retry.failure.message) == (FailureKind.TIMEOUT, "no answer within 5000 ms")
    assert case.done("a", call=call) == (InputIgnored("late"),)


def test_another_attempt_asks_the_same() -> None:
    """When a step is tried again, then its call has the same arguments: they come from what was settled before it."""
    case = started({"a": {"tool": {"name": "echo", "arguments": {"x": "=input.x"}}}}, '{"x":1}')
    first = case.events[0].decision.effects[0]
    case.fails("a")
    (again,) = case.timer("a")
    assert isinstance(first, ToolCallRequested)
    assert isinstance(again, ToolCallRequested)
    assert first.arguments == again.arguments


# --- Answers that change nothing ---


def test_an_answer_counts_once() -> None:
    """When an answer comes twice, then the second is ignored as a duplicate, for success and failure alike."""
    case = started({"a": tool(), "b": tool()})
    call = case.awaits("a")
    case.done("a")
    assert case.done("a", "2", call) == (InputIgnored("duplicate"),)
    assert case.fails("a", call=call) == (InputIgnored("duplicate"),)
    assert case.state.steps["a"].output == "1"


def test_a_timer_after_the_answer_is_late() -> None:
    """When a time limit is reached after the answer came, then it is ignored."""
    case = started({"a": tool(), "b": tool()})
    call = case.awaits("a")
    case.done("a")
    assert case.timer("a", call) == (InputIgnored("late"),)


def test_an_answer_to_an_earlier_attempt_is_late() -> None:
    """When an attempt is answered after the next one began, then the answer is ignored; the current one still counts."""
    case = started({"a": tool()})
    first = case.awaits("a")
    case.fails("a")
    timer = case.awaits("a")
    case.timer("a")
    assert case.done("a", call=first) == (InputIgnored("late"),)
    assert case.timer("a", timer) == (InputIgnored("late"),)
    assert case.done("a", "2") == (StepCompleted("a"), RunCompleted("2"))


def test_an_answer_while_waiting_for_the_next_attempt_is_late() -> None:
    """When the failed attempt is answered after all, before the next one begins, then the answer is ignored."""
    case = started({"a": tool()})
    first = case.awaits("a")
    case.fails("a")
    assert case.done("a", call=first) == (InputIgnored("late"),)
    assert case.fails("a", call=first) == (InputIgnored("late"),)


@pytest.mark.parametrize("step", ["a", "b", "nope"])
def test_unknown_calls_and_timers_are_ignored(step: str) -> None:
    """When nobody waits for a call or a timer, or there is no such step, then the input is ignored."""
    case = started({"a": tool(), "b": tool(needs=["a"])})
    assert case.done(step, call="x") == (InputIgnored("unknown_call"),)
    assert case.fails(step, call="x") == (InputIgnored("unknown_call"),)
    assert case.timer(step, "x") == (InputIgnored("unknown_timer"),)
    failed = LlmCallFailed("x", step, UNAVAILABLE, "m", None, None, 1)
    assert case.when(failed) == (InputIgnored("unknown_call"),)


def test_a_second_start_changes_nothing() -> None:
    """When a run is asked for twice, then the second time is ignored."""
    case = started({"a": tool()})
    before = case.state.steps
    assert case.start('{"other":1}') == (InputIgnored("already_started"),)
    assert (case.state.steps, case.state.input) == (before, "{}")


def test_an_unreadable_input_changes_nothing() -> None:
    """When an input can't be read, then that is what the decision says."""
    case = started({"a": tool()})
    assert case.when(UnreadableInput(3, "00", "no avro")) == (InputIgnored("unreadable"),)


# --- What can't be kept or computed ---


def test_an_output_that_is_too_large_fails_the_step() -> None:
    """When an answer is larger than the limit, then the step fails and is not tried again."""
    failed, ended = started({"a": tool()}).done("a", '"' + "x" * MAX_PAYLOAD_BYTES + '"')
    assert isinstance(failed, StepFailed)
    assert isinstance(ended, RunFailed)
    assert (failed.failure.kind, ended.step) == (FailureKind.TOO_LARGE, "a")


def test_the_limit_counts_bytes() -> None:
    """A payload's limit is one of bytes: text of three bytes a character is too large sooner."""
    failed = started({"a": tool()}).done("a", '"' + "€" * (MAX_PAYLOAD_BYTES // 2) + '"')[0]
    assert isinstance(failed, StepFailed)


def test_a_run_input_that_is_too_large_fails_the_run() -> None:
    """When a run is asked for with too large an input, then it fails at once."""
    (ended,) = workflow({"a": tool()}).start('"' + "x" * MAX_PAYLOAD_BYTES + '"')
    assert isinstance(ended, RunFailed)
    assert (ended.step, ended.failure.kind) == (None, FailureKind.TOO_LARGE)


def test_a_decision_never_outgrows_a_record() -> None:
    """Given a large input that many steps copy, then the copies are kept as payloads, and the decision stays small."""
    steps = {f"s{i}": {"tool": {"name": "echo", "arguments": {"x": "=input", "n": i}}} for i in range(30)}
    effects = workflow(steps).start('"' + "x" * (INLINE_BYTES - 100) + '"')
    assert len(effects) == 30
    assert sum(len(effect.arguments) for effect in effects if isinstance(effect, ToolCallRequested)) < 4 * INLINE_BYTES
    assert isinstance(effects[-1], ToolCallRequested)
    assert list(from_json(effects[-1].arguments)) == ["$payload", "bytes"]


@pytest.mark.parametrize("output", ["", "{", "NaN", "nonsense", '{"a":1e999}'])
def test_an_output_that_is_no_json_is_tried_again(output: str) -> None:
    """When an answer is no JSON, then that is a failure of the attempt."""
    (retry,) = started({"a": tool()}).done("a", output)
    assert isinstance(retry, RetryScheduled)
    assert retry.failure.kind == FailureKind.INVALID_OUTPUT


def test_a_wrong_run_output_fails_the_run() -> None:
    """When the run's output can't be computed, then the run fails and says so."""
    case = started({"a": tool()}, output="=steps.a.output.nope")
    completed, ended = case.done("a", "{}")
    assert (completed, type(ended)) == (StepCompleted("a"), RunFailed)
    assert "output" in ended.failure.message  # type: ignore[union-attr]


def test_a_workflow_that_nobody_knows_fails_the_run() -> None:
    """When nobody has the run's version of its workflow, then the run fails, at its start or later."""
    case = workflow({"a": tool()})
    (ended,) = case.when(StartRun("q", "w", "d", "{}"), known=False)
    assert isinstance(ended, RunFailed)
    assert (ended.failure.kind, "digest d" in ended.failure.message) == (FailureKind.UNKNOWN_WORKFLOW, True)
    later = started({"a": tool()})
    (ended,) = later.when(TimerFired("t", "a"), known=False)
    assert isinstance(ended, RunFailed)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000 + "]" * 100_000])
def test_a_run_input_that_is_no_json_fails_the_step(text: str) -> None:
    """When a run's input is no JSON although intake checks it, then the run ends; the orchestrator doesn't."""
    assert isinstance(workflow({"a": {"transform": "=input"}}).start(text)[-1], RunFailed)


# --- Any history ---

STEPS: dict[str, Any] = {
    "a": tool(retry={"attempts": 2}),
    "b": tool(needs=["a"], when="steps.a.output == 1", on_failure="continue"),
    "c": {"llm": {"prompt": "{{ input.x }}"}, "needs": ["a"], "on_failure": "continue"},
    "d": {"transform": "=steps.b.output", "needs": ["b", "c"], "on_failure": "continue"},
    "e": tool(needs=["d"]),
}
MOVES = st.tuples(
    st.sampled_from(["done", "fails", "rejected", "timer", "start", "unreadable", "old", "llm"]),
    st.sampled_from([*STEPS, "nope"]),
    st.sampled_from(["1", "2", "null", "{", '"\\ud800"', '{"x":[1,2]}']),
)


def inputs(case: Case, name: str, step: str, output: str) -> Input | UnreadableInput:
    """Return an input that a schedule picked."""
    state = case.state.steps.get(step)
    call = state.awaits if state else "x"
    if name == "old" and state and state.past:
        call = state.past[0]
    match name:
        case "fails":
            return ToolCallFailed(call, step, UNAVAILABLE, None, 1)
        case "rejected":
            return LlmCallFailed(call, step, REJECTED, "m", None, None, 1)
        case "timer":
            return TimerFired(call, step)
        case "start":
            return StartRun("q", "w", case.spec.digest, "{}")
        case "unreadable":
            return UnreadableInput(1, "00", "why")
        case "llm":
            return LlmCallCompleted(call, step, output, "m", "p", "stop", Usage(1, 1), 0.5, 1)
        case _:
            return ToolCallCompleted(call, step, output, "1", 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(MOVES, max_size=30), st.sampled_from(["{}", '{"x":1}', '{"x":"\\ud800"}', "[]", "{"]))
def test_any_inputs_in_any_order_have_a_decision(moves: list[tuple[str, str, str]], text: str) -> None:
    """Deciding and folding are total, every decision has effects and can be written, and the fold of all is the state."""
    case = workflow(STEPS)
    case.start(text)
    for move in moves:
        if case.state.over:
            break
        before = case.state
        effects = case.when(inputs(case, *move))
        assert effects
        if isinstance(effects[0], InputIgnored):
            assert len(effects) == 1
            assert (case.state.steps, case.state.status) == (before.steps, before.status)
    state = fold(case.events)
    assert state == case.state
    assert state.settled == sum(step.settled for step in state.steps.values())
    assert state.seq == len(case.events)
    if not state.over:
        assert any(step.status in (StepStatus.RUNNING, StepStatus.WAITING) for step in state.steps.values())
