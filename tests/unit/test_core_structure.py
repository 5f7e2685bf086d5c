from typing import Any

import pytest
from core import REJECTED, UNAVAILABLE, tool
from core_twice import again, arguments, asks, block, computed, each, names, run

from events import codec
from events.decisions import (
    BlockEntered,
    LoopAdvanced,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepFailed,
    StepSkipped,
)
from events.failure import FailureKind
from events.topics import MAX_VALUE_BYTES
from streams.workflow.making import FULL_EFFECTS
from streams.workflow.state import RunStatus

# --- when ---


def test_skips_chain_through_status() -> None:
    """Given a step that is skipped, when another's condition looks at its status, then it is skipped in the same decision."""
    steps = {
        "a": tool(when="input.go"),
        "b": tool(needs=["a"], when="steps.a.status == 'completed'"),
        "c": computed("=[steps.a.status, steps.b.status, steps.b.output]", needs=["a", "b"]),
    }
    case = run(steps, '{"go":false}')
    assert case.skipped == {"a": "input.go", "b": "steps.a.status == 'completed'"}
    assert case.output == ["skipped", "skipped", None]


def test_a_condition_counts_for_a_loop_as_a_whole() -> None:
    """Given a condition on a step with `for_each` or `repeat`, when it isn't met, then no item or iteration begins."""
    steps = {
        "many": each("=input.nope", tool(), concurrency=1) | {"when": "input.go"},
        "loop": again("true", tool()) | {"when": "input.go"},
    }
    case = run(steps, '{"go":false}')
    assert names(case.effects) == ["StepSkipped", "StepSkipped", "RunCompleted"]


# --- switch ---

GRADES: dict[str, Any] = {
    "grade": {
        "switch": {
            "high": {"when": "input.x > 10", **computed("high")},
            "low": {"when": "input.x > 5", **tool()},
            "rest": computed({"rest": "=input.x"}),
        }
    },
    "end": computed("=steps.grade.output", needs=["grade"]),
}


def test_the_first_case_that_holds_is_taken() -> None:
    """When several cases hold, then the first is taken, the others are skipped with the reason, and its output is the step's."""
    case = run(GRADES, '{"x":11}')
    assert case.effects == [
        BlockEntered("grade"),
        StepSkipped("grade.low", "`high` was taken"),
        StepSkipped("grade.rest", "`high` was taken"),
        StepCompleted("grade.high", '"high"'),
        StepCompleted("grade", None, "grade.high"),
        StepCompleted("end", '"high"'),
        RunCompleted('"high"'),
    ]


def test_a_later_case_is_taken_when_earlier_ones_do_not_hold() -> None:
    """When the first case doesn't hold, then it is skipped with its condition, and the next one that holds is called."""
    case = run(GRADES, '{"x":7}')
    assert case.skipped == {"grade.high": "input.x > 10", "grade.rest": "`low` was taken"}
    assert asks(case.effects) == ["grade.low"]
    assert case.done("grade.low", '{"n":1}')[:2] == (StepCompleted("grade.low"), StepCompleted("grade", None, "grade.low"))
    assert case.output == {"n": 1}


def test_a_case_without_condition_is_the_default() -> None:
    """When no condition holds, then the case without one is taken."""
    case = run(GRADES, '{"x":1}')
    assert case.output == {"rest": 1}
    assert list(case.skipped) == ["grade.high", "grade.low"]


def test_a_switch_without_a_case_that_holds_has_no_output() -> None:
    """When no case holds, then the step completes with null."""
    case = run({"s": {"switch": {"a": tool(when="false"), "b": tool(when="1 == 2")}}})
    assert case.skipped == {"s.a": "false", "s.b": "1 == 2"}
    assert case.output is None


def test_a_case_that_fails_fails_the_switch() -> None:
    """Given a case that was taken, when it fails for good, then the switch and the run fail, and the case is named."""
    case = run(GRADES, '{"x":7}')
    assert case.fails("grade.low", REJECTED) == (
        StepFailed("grade.low", REJECTED, False),
        StepFailed("grade", REJECTED, False),
        RunFailed("grade.low", REJECTED),
    )


@pytest.mark.parametrize("inside", [True, False])
def test_a_case_that_fails_can_be_tolerated(*, inside: bool) -> None:
    """Given a tolerated failure in a case, or of the switch, when the case fails, then the run goes on without an output."""
    tolerated = {"on_failure": "continue"}
    case_of = tool() | (tolerated if inside else {})
    steps = {
        "s": {"switch": {"a": case_of}, **({} if inside else tolerated)},
        "end": computed("=[steps.s.status, steps.s.output, steps.s.error]", needs=["s"]),
    }
    case = run(steps)
    case.fails("s.a", REJECTED)
    wanted = ["completed", None, None] if inside else ["failed", None, {"kind": "rejected", "message": "no"}]
    assert case.output == wanted


def test_a_case_condition_that_has_no_answer_fails_the_switch() -> None:
    """When a case's condition can't be computed, then the switch fails, and no case is taken."""
    case = run({"s": {"switch": {"a": tool(when="input.nope == 1"), "b": tool()}}})
    assert names(case.effects) == ["BlockEntered", "StepFailed", "RunFailed"]


def test_cases_hold_blocks_and_loops() -> None:
    """Given cases with steps, items or switches of their own, when they are taken, then they run as anywhere else."""
    inner = block({"x": tool(), "y": computed("=steps.x.output + 1", needs=["x"])})
    nested = {"switch": {"no": tool(when="false"), "yes": inner}}
    many = each([1, 2], {"switch": {"odd": {"when": "item % 2 == 1", **tool()}, "even": computed("=item")}})
    case = run({"s": {"switch": {"n": {"when": "input.n", **nested}, "m": many}}}, '{"n":true}')
    case.done("s.n.yes.x", "41")
    assert case.output == 42
    case = run({"s": {"switch": {"n": {"when": "input.n", **nested}, "m": many}}}, '{"n":false}')
    assert asks(case.effects) == ["s.m[0].odd"]
    case.done("s.m[0].odd", '"one"')
    assert case.output == ["one", 2]


# --- Steps of a step ---


def test_a_block_runs_its_steps_in_parallel_and_settles_with_the_last() -> None:
    """Given a block, when it begins, then its steps that need nothing are requested at once; it settles when all have."""
    case = run({"b": block({"x": tool(), "y": tool(), "z": tool(needs=["x"])}), "end": tool(needs=["b"])})
    assert asks(case.effects) == ["b.x", "b.y"]
    assert case.done("b.y", "2") == (StepCompleted("b.y"),)
    assert asks(case.done("b.x", "1")) == ["b.z"]
    assert case.done("b.z", "3")[:2] == (StepCompleted("b.z"), StepCompleted("b", None, "b.z"))
    assert case.state.steps["b"].output == "3"
    assert "b.x" not in case.state.steps


def test_a_block_has_an_output_of_its_own() -> None:
    """Given `output`, when a block's steps have settled, then its output is computed from all of them."""
    steps = {"b": block({"x": tool(), "y": tool(when="false")}, output={"x": "=steps.x.output", "y": "=steps.y.status"})}
    case = run(steps)
    case.done("b.x", "7")
    assert case.output == {"x": 7, "y": "skipped"}


def test_blocks_in_blocks_see_the_steps_around_them() -> None:
    """Given blocks three deep, when the innermost names a step further out, then it sees it if what is around it needs it."""
    deep = block({"c": block({"d": computed("=steps.a.output + steps.x.output + steps.y.output + input.n")}, needs=["y"])})
    middle = block({"y": tool(), **deep["steps"]}, needs=["x"])
    case = run({"a": tool(), "b": block({"x": tool(), "m": middle}, needs=["a"])}, '{"n":1}')
    for step, output in (("a", "1000"), ("b.x", "100"), ("b.m.y", "10")):
        assert case.running == [step]
        case.done(step, output)
    assert case.output == 1111


def test_a_failure_ends_what_is_around_it_as_far_as_it_is_not_tolerated() -> None:
    """Given nested blocks of which the middle one is tolerated, when a step in it fails, then its calls end, no others."""
    inner = block({"x": tool(), "y": tool(), "z": tool(needs=["x"])})
    case = run({"o": block({"m": {**block({"i": inner}), "on_failure": "continue"}, "other": tool()})})
    effects = case.fails("o.m.i.x", REJECTED)
    assert names(effects) == ["StepFailed", "CallCancelled", "StepCancelled", "StepFailed", "StepFailed"]
    assert [(each.step, each.tolerated) for each in effects if isinstance(each, StepFailed)] == [
        ("o.m.i.x", False),
        ("o.m.i", False),
        ("o.m", True),
    ]
    assert case.running == ["o.other"]
    case.done("o.other", "5")
    assert case.output == 5


# --- repeat ---


def test_a_loop_goes_on_until_its_condition_holds() -> None:
    """Given `repeat`, when an iteration's output doesn't meet `until`, then the next one begins and sees it as `last`."""
    arguments_ = {"last": "=last", "index": "=index"}
    case = run({"l": again("last >= 3", {"tool": {"name": "t", "arguments": arguments_}})})
    seen = [arguments(case.effects)["l[0]"]]
    for index in range(2):
        effects = case.done(f"l[{index}]", str(index + 1))
        assert effects[:2] == (StepCompleted(f"l[{index}]"), LoopAdvanced("l", index + 1))
        seen.append(arguments(effects)[f"l[{index + 1}]"])
    assert seen == [{"index": 0, "last": None}, {"index": 1, "last": 1}, {"index": 2, "last": 2}]
    assert case.done("l[2]", "3") == (StepCompleted("l[2]"), StepCompleted("l", None, "l[2]"), RunCompleted("3"))
    assert dict(case.state.steps) == {"l": case.state.steps["l"]}


@pytest.mark.parametrize("otherwise", ["fail", "last"])
def test_a_loop_ends_after_so_many_times(otherwise: str) -> None:
    """When `until` never holds, then the step fails after `at_most` iterations, or has the last one's output."""
    case = run({"l": again("false", computed("=index"), 7, otherwise=otherwise)})
    assert [effect.index for effect in case.effects if isinstance(effect, LoopAdvanced)] == list(range(7))
    if otherwise == "last":
        assert case.output == 6
    else:
        assert case.state.failure is not None
        assert (case.state.failure.kind, "7 times" in case.state.failure.message) == (FailureKind.LOOP_BOUND, True)


def test_a_loop_of_blocks_forgets_what_is_behind_it() -> None:
    """Given a loop over a block, when an iteration ends, then its steps start afresh and the ones before are forgotten."""
    body = block({"x": tool(), "y": computed("=steps.x.output + (last == null ? 0 : last)", needs=["x"])})
    case = run({"l": again("last >= 6", body)})
    for index, total in enumerate((1, 3, 6)):
        assert case.running == [f"l[{index}].x"]
        assert set(case.state.steps) == {"l", f"l[{index}]", f"l[{index}].x"}
        case.done(f"l[{index}].x", str(index + 1))
        assert case.state.over == (total == 6)
    assert case.output == 6


@pytest.mark.parametrize("tolerated", [True, False])
def test_an_iteration_that_fails_fails_the_loop(*, tolerated: bool) -> None:
    """When an iteration fails for good, then so does the loop; only the loop as a whole can be tolerated."""
    steps = {"l": again("false", tool()) | ({"on_failure": "continue"} if tolerated else {})}
    case = run(steps, output="=steps.l.status")
    case.done("l[0]")
    effects = case.fails("l[1]", REJECTED)
    assert effects[:2] == (StepFailed("l[1]", REJECTED, False), StepFailed("l", REJECTED, tolerated))
    assert case.state.status is (RunStatus.COMPLETED if tolerated else RunStatus.FAILED)


def test_a_condition_that_has_no_answer_fails_the_loop() -> None:
    """When `until` can't be computed, then the loop fails, although its iteration completed."""
    case = run({"l": again("last.done", tool())})
    effects = case.done("l[0]", "{}")
    assert names(effects) == ["StepCompleted", "StepFailed", "RunFailed"]
    assert case.state.failure is not None
    assert case.state.failure.kind == FailureKind.EXPRESSION


def test_an_attempt_within_a_loop_is_tried_again() -> None:
    """Given a loop of calls, when one fails in a way that can be retried, then the same iteration is asked again."""
    case = run({"l": again("last == 2", tool())})
    case.fails("l[0]", UNAVAILABLE)
    assert asks(case.timer("l[0]")) == ["l[0]"]
    case.done("l[0]", "2")
    assert case.output == 2


@pytest.mark.parametrize(("limit", "times"), [({}, 100_000), ({"time_limit": "1h"}, 10_000)])
def test_a_long_loop_without_calls_takes_several_decisions(limit: dict[str, Any], times: int) -> None:
    """Given a loop of 100,000 transforms, when it begins, then it goes on by timers, and no decision outgrows a record."""
    case = run({"l": again(f"index == {times - 1}", computed("=index"), times) | limit})
    case.twice = False
    decisions = 1
    while not case.state.over:
        assert case.state.steps["l"].due == case.at - 1 or decisions == 1
        case.timer("l")
        decisions += 1
    assert case.output == times - 1
    assert decisions == pytest.approx(times * 2 / FULL_EFFECTS, rel=0.1)
    for event in case.events:
        assert len(codec.body(event.decision)) < MAX_VALUE_BYTES / 8
    assert len(case.state.steps) == 1


def test_a_long_loop_of_large_outputs_stays_within_a_record() -> None:
    """Given a loop whose outputs are large, when it begins, then each decision still holds less than a record may."""
    case = run({"l": again("index == 99", computed({"x": "=input", "i": "=index"}), 100)}, '"' + "x" * 200_000 + '"')
    while not case.state.over:
        case.timer("l")
    assert case.output["i"] == 99
    assert max(len(codec.body(event.decision)) for event in case.events) < MAX_VALUE_BYTES / 4
