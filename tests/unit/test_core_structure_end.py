from typing import Any

import pytest
from core import REJECTED, UNAVAILABLE, tool
from core_twice import Run, arguments, asks, computed, names, run

from events.calls import ToolCallRequested
from events.commands import CancelRun, SignalReceived
from events.decisions import (
    CallCancelled,
    ChildRunRequested,
    InputIgnored,
    RunCancelled,
    RunClosing,
    RunCompleted,
    RunFailed,
    StepCancelled,
    StepCompleted,
    StepFailed,
    UndoPlanned,
)
from events.failure import Failure, FailureKind
from streams.workflow.expressions import to_json
from streams.workflow.payloads import INLINE_BYTES
from streams.workflow.state import RunStatus

BIG = '"' + "x" * (INLINE_BYTES + 10) + '"'
CHILD_FAILED = Failure(FailureKind.CHILD_FAILED, "rejected: no")
STOP = CancelRun("ann", "enough", force=False)


def undoing(name: str = "cancel_it", **more: Any) -> dict[str, Any]:
    """Return a compensation that calls a tool with the output of what it undoes."""
    return {"tool": {"name": name, "arguments": {"it": "=output"}}, **more}


def saga(steps: dict[str, Any], text: str = "{}", **more: Any) -> Run:
    """Return a run whose steps can be undone by `undo`."""
    return run(steps, text, compensations={"undo": undoing()}, **more)


def booked(**more: Any) -> dict[str, Any]:
    """Return a step that calls a tool and can be undone."""
    return tool(compensation="undo", **more)


# --- Undoing ---


def test_what_was_done_is_undone_in_reverse_with_arguments_of_then() -> None:
    """Given steps that completed, when the run fails, then each is undone, the latest first, by what was computed back then."""
    case = saga({"a": booked(), "b": booked(), "c": tool(needs=["a"])})
    assert case.done("b", '{"id":2}') == (StepCompleted("b"), UndoPlanned("b", "undo", '{"it":{"id":2}}'))
    case.done("a", '{"id":1}')
    failed, closing, asked = case.fails("c", REJECTED)
    assert (failed, closing) == (StepFailed("c", REJECTED, False), RunClosing("failed", step="c", failure=REJECTED))
    assert asked == ToolCallRequested("undo(a)", 1, "cancel_it", '{"it":{"id":1}}', case.at - 2 + 60_000)
    assert arguments(case.done("undo(a)")) == {"undo(b)": {"it": {"id": 2}}}
    assert case.done("undo(b)") == (StepCompleted("undo(b)"), RunFailed("c", REJECTED))


def test_arguments_of_undoing_see_what_their_step_needs() -> None:
    """Given a compensation that names a step which its own step needs but never mentions, then its arguments have it."""
    undo = {
        "tool": {
            "name": "t",
            "arguments": {"a": "=steps.a.output", "it": "=output", "x": "=input.x", "sum": "=steps.a.output + output"},
        }
    }
    case = run({"a": tool(), "b": booked(needs=["a"]), "c": tool(needs=["b"])}, '{"x":9}', compensations={"undo": undo})
    case.done("a", "1")
    case.done("b", "2")
    assert arguments(case.fails("c", REJECTED)) == {"undo(b)": {"a": 1, "it": 2, "sum": 3, "x": 9}}


def test_undoing_has_its_own_attempts() -> None:
    """Given a compensation with retries, when an attempt fails, then it is tried again with the same arguments."""
    undo = undoing(retry={"attempts": 2}, timeout="7s")
    case = run({"a": booked(), "b": tool(needs=["a"])}, compensations={"undo": undo})
    case.done("a", "5")
    case.fails("b", REJECTED)
    assert names(case.fails("undo(a)", UNAVAILABLE)) == ["RetryScheduled"]
    (again,) = case.timer("undo(a)")
    assert again == ToolCallRequested("undo(a)", 2, "cancel_it", '{"it":5}', case.state.steps["undo(a)"].due)
    assert case.fails("undo(a)", UNAVAILABLE)[-1] == RunFailed("b", REJECTED, ("a",))


def test_what_cannot_be_undone_is_reported_and_the_others_are() -> None:
    """Given three steps to undo, when the second one's compensation fails, then it is named at the end; the others are undone."""
    case = saga({"a": booked(), "b": booked(needs=["a"]), "c": booked(needs=["b"]), "d": tool(needs=["c"])})
    for step in "abc":
        case.done(step, f'"{step}"')
    case.fails("d", REJECTED)
    case.done("undo(c)")
    effects = case.fails("undo(b)", REJECTED)
    assert effects[0] == StepFailed("undo(b)", REJECTED, True)
    assert asks(effects) == ["undo(a)"]
    assert case.done("undo(a)")[-1] == RunFailed("d", REJECTED, ("b",))
    assert case.state.not_undone == ("b",)


def test_items_and_iterations_are_undone_too() -> None:
    """Given items and iterations that can be undone, when the run fails, then each is, in the reverse order of completion."""
    steps = {
        "m": booked(for_each={"items": [1, 2, 3], "tolerate": 1}),
        "l": booked(repeat={"until": "last == 2", "at_most": 3}, needs=["m"]),
        "end": tool(needs=["l"]),
    }
    case = saga(steps)
    case.done("m[2]", "30")
    case.fails("m[1]", REJECTED)
    case.done("m[0]", "10")
    case.done("l[0]", "1")
    case.done("l[1]", "2")
    case.fails("end", REJECTED)
    undone = []
    while not case.state.over:
        (path,) = case.running
        undone.append((path, arguments(case.effects)[path]["it"]))
        case.done(path)
    assert undone == [("undo(l[1])", 2), ("undo(l[0])", 1), ("undo(m[0])", 10), ("undo(m[2])", 30)]


def test_blocks_and_switches_are_undone_before_what_they_did() -> None:
    """Given a block and a switch with compensations, when the run fails, then they are undone, then the steps inside."""
    steps = {
        "b": {"steps": {"x": booked()}, "compensation": "undo"},
        "s": {"switch": {"y": booked()}, "compensation": "undo", "needs": ["b"]},
        "end": tool(needs=["s"]),
    }
    case = saga(steps)
    case.done("b.x", '"x"')
    case.done("s.y", '"y"')
    case.fails("end", REJECTED)
    undone = []
    while not case.state.over:
        (path,) = case.running
        undone.append((path, arguments(case.effects)[path]["it"]))
        case.done(path)
    assert undone == [("undo(s)", "y"), ("undo(s.y)", "y"), ("undo(b)", "x"), ("undo(b.x)", "x")]


def test_signals_and_detached_runs_are_undone_too() -> None:
    """Given steps that took a signal, at once or later, or started a detached run, when the run fails, then they are undone."""
    steps = {
        "now": {"wait_for": {"signal": "paid"}, "compensation": "undo"},
        "child": {"run": {"workflow": "w", "detached": True}, "compensation": "undo"},
        "early": {"wait_for": {"signal": "early"}, "compensation": "undo", "needs": ["now"]},
        "end": tool(needs=["early"]),
    }
    case = saga(steps)
    case.when(SignalReceived("2", "early", None, '"e"', "me"))
    case.when(SignalReceived("1", "paid", None, '"p"', "me"))
    planned = [effect for effect in case.effects if isinstance(effect, UndoPlanned)]
    assert [(each.step, each.arguments) for each in planned] == [
        ("child", '{"it":null}'),
        ("now", '{"it":"p"}'),
        ("early", '{"it":"e"}'),
    ]


def test_only_what_completed_is_undone() -> None:
    """Given steps that failed, were skipped, copied or cancelled, when the run fails, then nothing of them is undone."""
    steps = {
        "failed": booked(on_failure="continue"),
        "skipped": booked(when="false"),
        "copied": booked(),
        "under_way": booked(),
        "end": tool(),
    }
    case = saga(steps, start={"copied": to_json({"copied": {"status": "completed", "output": "1"}})})
    case.fails("failed", REJECTED)
    assert case.fails("end", REJECTED)[-1] == RunFailed("end", REJECTED)


def test_undoing_by_a_child_run() -> None:
    """Given a compensation that is a run, when a step is undone, then that run is started and waited for."""
    undo = {"run": {"workflow": "refund", "input": {"it": "=output"}}}
    case = run({"a": booked(), "b": tool(needs=["a"])}, compensations={"undo": undo})
    case.done("a", "5")
    due = case.at + 60_000
    assert case.fails("b", REJECTED)[-1] == ChildRunRequested("undo(a)", 1, "refund", None, '{"it":5}', False, due)
    assert case.child_fails("undo(a)", CHILD_FAILED)[-1] == RunFailed("b", REJECTED, ("a",))


def test_a_cancelled_run_is_undone_and_a_failure_meanwhile_changes_nothing() -> None:
    """Given a run that is cancelled, when a compensation fails, then the run still ends as cancelled and says what is left."""
    case = saga({"a": booked(), "b": tool(needs=["a"])})
    case.done("a", "1")
    call = case.awaits("b")
    assert case.when(STOP)[:3] == (
        CallCancelled("b", call, "the run was cancelled"),
        StepCancelled("b", "the run was cancelled"),
        RunClosing("cancelled", by="ann", reason="enough"),
    )
    assert case.fails("undo(a)", REJECTED)[-1] == RunCancelled("ann", "enough", ("a",))


def test_force_ends_undoing_and_cleaning_up() -> None:
    """Given a run that is being undone, when it is cancelled by force, then that call is cancelled too, and nothing follows."""
    case = saga({"a": booked(), "b": booked(needs=["a"]), "c": tool(needs=["b"])}, **{"finally": {"tidy": tool()}})
    case.done("a", "1")
    case.done("b", "2")
    case.fails("c", REJECTED)
    call = case.awaits("undo(b)")
    effects = case.when(CancelRun("ann", "now", force=True))
    assert CallCancelled("undo(b)", call, "the run was cancelled") in effects
    assert effects[-1] == RunCancelled("ann", "now", ("b", "a"))
    assert asks(effects) == []


def test_a_run_that_completes_undoes_nothing() -> None:
    """Given steps that can be undone, when the run completes, even if its clean-up fails, then nothing is undone."""
    case = saga({"a": booked()})
    assert case.done("a", "1")[-1] == RunCompleted("1")
    case = saga({"a": booked()}, **{"finally": {"tidy": tool()}})
    case.done("a", "1")
    case.fails("finally.tidy", REJECTED)
    assert [step for step in asks(case.effects) if step.startswith("undo")] == []
    assert case.state.status is RunStatus.FAILED


@pytest.mark.parametrize("needs", ["output.nope", "input.nope"])
def test_a_step_whose_undoing_cannot_be_computed_fails(needs: str) -> None:
    """When a compensation's arguments can't be computed, then its step fails, and the run's end names it as not undone."""
    undo = {"tool": {"name": "t", "arguments": {"x": f"={needs}"}}}
    case = run({"a": booked()}, compensations={"undo": undo})
    effects = case.done("a", "{}")
    assert names(effects) == ["StepFailed", "StepFailed", "RunFailed"]
    assert case.state.not_undone == ("a",)
    assert case.state.failure is not None
    assert case.state.failure.message.startswith("done, but how to undo it could not be computed")


def test_what_failed_before_it_could_be_asked_ends_all_around_it() -> None:
    """Given a tolerated block, when a block in it fails at its first step or its output, then no other step in it begins."""
    tolerated = {"on_failure": "continue"}
    inner = {"steps": {"x": computed("=input.nope"), "y": tool()}}
    case = run({"o": {"steps": {"i": inner, "z": tool()}, **tolerated}, "end": computed("=steps.o.error.kind", needs=["o"])})
    assert case.output == "expression"
    assert asks(case.effects) == []
    inner = {"steps": {"x": tool()}, "output": "=steps.x.output.nope"}
    case = run({"o": {"steps": {"i": inner, "z": tool()}, **tolerated}, "end": computed("=steps.o.error.kind", needs=["o"])})
    case.done("o.i.x", "{}")
    assert case.output == "expression"


# --- Cleaning up ---

TIDY: dict[str, Any] = {
    "finally": {"tidy": {"tool": {"name": "t", "arguments": {"outcome": "=outcome", "error": "=error", "a": "=steps.a.status"}}}}
}


def test_clean_up_after_a_run_that_completed() -> None:
    """Given clean-up steps, when the run has its output, then they run and see how it went; then it completes with its output."""
    case = run({"a": tool()}, **TIDY)
    effects = case.done("a", "7")
    assert effects[1] == RunClosing("completed", "7")
    assert arguments(effects) == {"finally.tidy": {"a": "completed", "error": None, "outcome": "completed"}}
    assert case.done("finally.tidy")[-1] == RunCompleted("7")


def test_clean_up_after_a_run_that_failed_comes_behind_undoing() -> None:
    """Given clean-up steps and a compensation, when the run fails, then it is undone first, and clean-up sees the error."""
    case = saga({"a": booked(), "b": tool(needs=["a"])}, **TIDY)
    case.done("a", "7")
    assert asks(case.fails("b", REJECTED)) == ["undo(a)"]
    error = {"kind": "rejected", "message": "no"}
    assert arguments(case.done("undo(a)")) == {"finally.tidy": {"a": "completed", "error": error, "outcome": "failed"}}
    assert case.done("finally.tidy")[-1] == RunFailed("b", REJECTED)


def test_clean_up_after_a_run_that_was_cancelled() -> None:
    """Given clean-up steps, when the run is cancelled, then they run; what was under way is seen as cancelled."""
    case = run({"a": tool()}, **TIDY)
    assert arguments(case.when(STOP)) == {"finally.tidy": {"a": "cancelled", "error": None, "outcome": "cancelled"}}
    assert case.when(STOP) == (InputIgnored("closing"),)
    assert case.done("finally.tidy")[-1] == RunCancelled("ann", "enough")


def test_clean_up_that_fails_fails_a_run_that_completed() -> None:
    """Given a run that completed, when its clean-up fails, then the run fails by that."""
    case = run({"a": tool()}, **TIDY)
    case.done("a")
    assert case.fails("finally.tidy", REJECTED)[-1] == RunFailed("finally", REJECTED)
    assert len(case.ends) == 1


def test_clean_up_that_fails_keeps_the_first_failure() -> None:
    """Given a run that failed or was cancelled, when its clean-up fails too, then the run ends as it would have."""
    case = run({"a": tool()}, **TIDY)
    first = Failure(FailureKind.UNAUTHORIZED, "key")
    case.fails("a", first)
    assert case.fails("finally.tidy", REJECTED)[-1] == RunFailed("a", first)
    case = run({"a": tool()}, **TIDY)
    case.when(STOP)
    assert case.fails("finally.tidy", REJECTED)[-1] == RunCancelled("ann", "enough")


def test_clean_up_steps_are_steps_like_others() -> None:
    """Given clean-up steps with needs, conditions, items and tolerated failures, then they run as anywhere else."""
    final = {
        "x": tool(on_failure="continue"),
        "y": tool(needs=["x"], when="outcome == 'failed'"),
        "m": {"for_each": {"items": "=[1, 2]"}, "needs": ["y"], **tool()},
    }
    case = run({"a": tool()}, **{"finally": final})
    case.done("a")
    case.fails("finally.x", REJECTED)
    assert case.skipped == {"finally.y": "outcome == 'failed'"}
    case.done("finally.m[1]")
    assert case.done("finally.m[0]")[-1] == RunCompleted("1")


def test_clean_up_without_calls_takes_no_further_decision() -> None:
    """Given clean-up steps that need no call, when the run ends, then it ends in the same decision, whatever comes of them."""
    case = run({"a": computed(1)}, **{"finally": {"x": computed("=outcome")}})
    assert case.effects[-1] == RunCompleted("1")
    case = run({"a": computed(1)}, **{"finally": {"b": {"steps": {"x": computed("=error.kind"), "y": tool()}}}})
    assert names(case.effects)[-1] == "RunFailed"
    assert asks(case.effects) == []


def test_an_output_that_cannot_be_computed_is_undone_and_cleaned_up() -> None:
    """Given a wrong run output, when all steps completed, then the run fails as any other: undone, then cleaned up."""
    case = saga({"a": booked()}, output="=steps.a.output.nope", **TIDY)
    assert asks(case.done("a", "{}")) == ["undo(a)"]
    assert asks(case.done("undo(a)")) == ["finally.tidy"]
    effects = case.done("finally.tidy")
    assert isinstance(effects[-1], RunFailed)
    assert effects[-1].step is None
