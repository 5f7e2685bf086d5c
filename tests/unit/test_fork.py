"""Forks of runs that have undone something: what was undone is not copied silently, and a fork undoes nothing that it copied."""

from typing import Any

import pytest

from events import codec
from events.ids import chain_hash
from streams.testing import NEVER, Failure, Run, answers, given
from streams.workflow.definition import parse
from streams.workflow.evolve import fold
from streams.workflow.expressions import from_json
from streams.workflow.fork import UndoneError, fork
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunEvent, RunState

SAGA = """
name: saga
compensations:
  release: {tool: {name: release, arguments: {id: "=output"}}}
steps:
  look: {tool: {name: look}}
  reserve: {needs: [look], tool: {name: reserve}, compensation: release}
  pay: {needs: [reserve], tool: {name: pay, arguments: {id: "=steps.reserve.output"}}}
"""
NESTED = """
name: nested
compensations:
  release: {tool: {name: release, arguments: {id: "=output"}}}
steps:
  group:
    steps:
      reserve: {tool: {name: reserve}, compensation: release}
      more: {needs: [reserve], tool: {name: more}}
  each: {for_each: {items: [1, 2], as: n}, tool: {name: reserve}, compensation: release}
  pay: {needs: [group, each], tool: {name: pay}}
"""


def flow(text: str) -> WorkflowSpec:
    """Return the definition that a text holds."""
    return parse(text.encode(), "saga.yaml")


def at(run: Run, seq: int) -> RunState:
    """Return a run's state after one of its decisions."""
    return fold(RunEvent(each, chain_hash(codec.body(each))) for each in run.history[:seq])


def cancelled(text: str = SAGA, release: Any = None) -> Run:
    """Return a run that was cancelled when it was about to pay."""
    tools = {
        "look": 1,
        "reserve": answers("r-1", "r-2", "r-3", "r-4"),
        "more": 1,
        "pay": answers(NEVER, "paid"),
        "release": release,
    }
    run = given(flow(text), tools=tools)
    run.when_cancelled("no", by="ann")
    return run


def copied(run: Run, seq: int = 0, **more: Any) -> set[str]:
    """Return what a fork of a run, as it was after a decision, copies."""
    state = at(run, seq) if seq else run.state
    request = fork(run.run_id, state, more.pop("spec", None) or flow(SAGA), now=run.state, **more)
    return set(from_json(request.copied or "{}"))


def test_what_was_undone_is_not_copied_silently() -> None:
    """Given a run that undid a step, when it is forked, then the step must be named: done again, or its result given."""
    run = cancelled().then_undone(["reserve"])
    with pytest.raises(UndoneError, match="`reserve` was undone") as refused:
        run.forked()
    assert refused.value.steps == ("reserve",)
    again = run.forked(rerun=["reserve"])
    again.then_called("look", times=0).then_called("pay", arguments={"id": "r-2"}).then_completed("paid")
    assert copied(run, outputs={"reserve": '"mine"'}) == {"look", "reserve"}
    assert copied(run, rerun=["look"]) == set(), "reserve needs look"


def test_an_earlier_decision_does_not_bring_back_what_was_undone_later() -> None:
    """Given a decision from before a step was undone, when it is forked, then the step counts as undone all the same.

    From before the step was done there is nothing to copy, so nothing to refuse.
    """
    run = cancelled()
    before = next(each.seq for each in run.history if type(each.input).__name__ == "CancelRun") - 1
    with pytest.raises(UndoneError, match="reserve"):
        copied(run, before)
    assert copied(run, before, rerun=["reserve"]) == {"look"}
    assert copied(run, 2) == {"look"}


@pytest.mark.parametrize("release", [NEVER, Failure("tool_terminal", "no")])
def test_what_is_being_undone_counts_as_undone(release: Any) -> None:
    """Given undoing that is under way, or that failed, when the run is forked, then nobody knows what is left: it is refused."""
    with pytest.raises(UndoneError, match="reserve"):
        cancelled(release=release).forked()


def test_what_waits_to_be_undone_counts_and_what_is_never_undone_does_not() -> None:
    """Given a step that is being undone, those behind it count as well; when the run is ended by force, only the first does."""
    text = SAGA.replace("pay:", "again: {needs: [reserve], tool: {name: reserve}, compensation: release}\n  pay:").replace(
        "needs: [reserve], tool: {name: pay", "needs: [again], tool: {name: pay"
    )
    run = cancelled(text, NEVER)
    with pytest.raises(UndoneError) as refused:
        run.forked()
    assert refused.value.steps == ("again", "reserve")
    run.when_cancelled("now", force=True).then_cancelled()
    assert run.history[-1].effects[-1].not_undone == ("again", "reserve")  # type: ignore[union-attr]
    with pytest.raises(UndoneError) as refused:
        run.forked()
    assert refused.value.steps == ("again",)


def test_what_was_undone_inside_of_a_step_counts_for_the_step() -> None:
    """Given a step whose parts were undone, then it is refused by its own name, or by an item's if only that is copied.

    A step that is done again is done again with all its parts.
    """
    run = cancelled(NESTED)
    with pytest.raises(UndoneError) as refused:
        run.forked()
    assert refused.value.steps == ("each", "group")
    spec = flow(NESTED)
    assert copied(run, spec=spec, rerun=["group.reserve", "each"]) == set()
    assert copied(run, spec=spec, rerun=["group"], outputs={"each": "[1, 2]"}) == {"each"}
    half = next(
        each.seq for each in run.history for effect in each.effects if getattr(effect, "step", "") == "each[0]" and each.seq > 1
    )
    with pytest.raises(UndoneError) as refused:
        copied(run, half, spec=spec, rerun=["group"])
    assert refused.value.steps == ("each[0]",)
    assert copied(run, half, spec=spec, rerun=["group", "each"]) == set()


def test_a_fork_undoes_no_step_that_it_copied() -> None:
    """Given a fork that copied a step, when it is cancelled or fails, then only what it did itself is undone."""
    tools = {"look": 1, "reserve": "r-1", "pay": answers("paid", NEVER, Failure("tool_terminal", "no")), "release": {}}
    run = given(flow(SAGA), tools=tools).then_completed("paid")
    run.forked(rerun=["pay"]).when_cancelled("no").then_undone([]).then_called("release", times=0).then_cancelled()
    failed = run.forked(rerun=["pay"]).then_failed("tool_terminal", step="pay").then_undone([])
    assert failed.state.not_undone == ()
