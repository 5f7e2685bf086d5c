import itertools
from typing import Any

import pytest
from core import NOW, REJECTED, Case, tool
from core_twice import Run, arguments, asks, computed, names, run

from events import topics
from events.codec import decode, encode
from events.commands import CancelRun, Parent, RunRequest, StartRun, WorkflowRequest
from events.decisions import (
    ChildRunCancelled,
    ChildRunRequested,
    InputIgnored,
    RunCancelled,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepCopied,
    StepFailed,
)
from events.failure import Failure, FailureKind
from events.ids import effect_id, run_id
from events.results import ChildRunCompleted, ChildRunFailed, InboxMessage
from streams.envelope import Incoming
from streams.processors.consequences import consequences
from streams.processors.tenure import Commit, Place, Tenure
from streams.workflow.decider import decide
from streams.workflow.expressions import to_json
from streams.workflow.payloads import INLINE_BYTES, Memory, NoPayloads, PayloadMissingError, digest_of
from streams.workflow.state import RunStatus, StepStatus

BIG = '"' + "x" * (INLINE_BYTES + 10) + '"'
CHILD_FAILED = Failure(FailureKind.CHILD_FAILED, "rejected: no")
STOP = CancelRun("ann", "enough", force=False)


# --- Child runs ---

CHILD: dict[str, Any] = {"run": {"workflow": "child", "version": "d1", "input": {"x": "=input.x"}}}


def follow(case: Case, parent: Parent | None = None, event: int = -1) -> list[tuple[str, str, Any]]:
    """Return what follows from the last decision: topic, key and value of each record."""
    kinds = {"requests": None, "inbox": InboxMessage}
    found = []
    for each in consequences(case.events[event], parent):
        value: Any = each.record.value
        kind = kinds.get(each.record.topic.name)
        if kind is not None:
            value = decode(value, kind)
        elif each.record.topic is topics.REQUESTS:
            value = next(_decoded(value, kind) for kind in (WorkflowRequest, RunRequest) if _decoded(value, kind) is not None)
        found.append((each.record.topic.name, each.record.key.decode(), value))
    return found


def _decoded(value: bytes, kind: Any) -> Any:
    try:
        return decode(value, kind)
    except Exception:  # noqa: BLE001 - the other of the two
        return None


def test_a_child_run_is_requested_and_answers() -> None:
    """Given a step that is a run, when it begins, then that run is requested with its parent; its output is the step's."""
    case = run({"a": CHILD}, '{"x":3}')
    assert case.effects == [ChildRunRequested("a", 1, "child", "d1", '{"x":3}', False, None)]
    call = case.awaits("a")
    request = WorkflowRequest("child", '{"x":3}', call, "d1", parent=Parent("r", "a", call))
    assert follow(case, event=0) == [("requests", run_id(call), request)]
    assert case.child_done("a", '{"y":4}') == (StepCompleted("a"), RunCompleted('{"y":4}'))


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        (RunCompleted("5"), ChildRunCompleted("c", "s", "r", "5")),
        (RunFailed("x", REJECTED), ChildRunFailed("c", "s", "r", Failure(FailureKind.CHILD_FAILED, "rejected: no"))),
        (
            RunCancelled("ann", "enough"),
            ChildRunFailed("c", "s", "r", Failure(FailureKind.CANCELLED, "the run was cancelled by ann: enough")),
        ),
    ],
)
def test_a_child_run_tells_its_parent_how_it_ended(end: Any, wanted: Any) -> None:
    """Given a run with a parent, when it ends, then the parent's inbox gets its result; without a parent nobody is told."""
    parent = Parent("p", "s", "c")
    case = run({"a": tool()}, start={"parent": parent})
    match end:
        case RunCompleted():
            case.done("a", "5")
        case RunFailed():
            case.fails("a", REJECTED)
        case _:
            case.when(STOP)
    assert case.state.parent == parent
    assert [each for each in follow(case, parent) if each[0] == "inbox"] == [("inbox", "p", InboxMessage("p", wanted))]
    assert [each for each in follow(case) if each[0] == "inbox"] == []


def test_a_child_run_that_fails_is_started_again_only_when_asked_for() -> None:
    """When a child run fails, then so does its step; another attempt needs its kind in `retry`, and is another run."""
    case = run({"a": CHILD}, '{"x":1}')
    assert names(case.child_fails("a", CHILD_FAILED)) == ["StepFailed", "RunFailed"]
    case = run({"a": CHILD | {"retry": {"kinds": ["child_failed"], "attempts": 2}}}, '{"x":1}')
    first = case.awaits("a")
    assert names(case.child_fails("a", CHILD_FAILED)) == ["RetryScheduled"]
    (again,) = case.timer("a")
    assert again == ChildRunRequested("a", 2, "child", "d1", '{"x":1}', False, None)
    assert run_id(case.awaits("a")) != run_id(first)
    assert case.when(ChildRunCompleted(first, "a", run_id(first), "1")) == (InputIgnored("late"),)
    assert names(case.child_fails("a", CHILD_FAILED)) == ["StepFailed", "RunFailed"]


def test_a_child_run_is_cancelled_with_its_parent() -> None:
    """Given a child run under way, when its parent is cancelled, then a request cancels the child."""
    case = run({"a": CHILD, "b": tool()}, '{"x":1}')
    child, call = run_id(case.awaits("a")), case.awaits("b")
    effects = case.when(STOP)
    assert ChildRunCancelled("a", child, "the run was cancelled") in effects
    cancel = RunRequest(child, None, CancelRun("run r", "the run was cancelled", force=False))
    found = follow(case)
    assert ("requests", child, cancel) in found
    assert [key for topic, key, _ in found if topic == "cancellations"] == [call]


def test_a_child_run_that_is_cancelled_as_it_is_requested() -> None:
    """Given a decision that requests calls and fails the run, then the calls are cancelled by the ids that they get by it."""
    case = run({"a": CHILD, "b": tool(), "c": computed("=input.nope")}, '{"x":1}')
    assert names(case.effects)[:3] == ["ChildRunRequested", "ToolCallRequested", "StepFailed"]
    first = case.events[0]
    call, other = effect_id(first.hash, 0), effect_id(first.hash, 1)
    assert ChildRunCancelled("a", "", "the run failed") in case.effects
    assert [(topic, key) for topic, key, _ in follow(case)] == [
        ("requests", run_id(call)),
        ("tool.calls", other),
        ("requests", run_id(call)),
        ("cancellations", other),
    ]


def test_a_detached_run_is_not_waited_for() -> None:
    """Given `detached`, when the step begins, then it completes at once, and the other run has no parent and isn't cancelled."""
    detached = {"run": {"workflow": "child", "detached": True}}
    case = run({"a": detached, "b": tool(needs=["a"])})
    assert names(case.effects) == ["ChildRunRequested", "ToolCallRequested"]
    call = effect_id(case.events[0].hash, 0)
    assert follow(case, event=0)[0] == ("requests", run_id(call), WorkflowRequest("child", "{}", call))
    assert "ChildRunCancelled" not in names(case.when(STOP))


def test_a_child_run_has_the_steps_time_limit() -> None:
    """Given a time limit, when it is over, then the child run is cancelled and the step fails; its late answer is ignored."""
    case = run({"a": CHILD | {"time_limit": "1h", "on_failure": "continue"}, "b": tool()}, '{"x":1}')
    call = case.awaits("a")
    assert case.state.steps["a"].due == NOW + 3_600_000
    effects = case.timer("a")
    assert names(effects) == ["ChildRunCancelled", "StepFailed"]
    assert case.when(ChildRunCompleted(call, "a", run_id(call), "1")) == (InputIgnored("late"),)


def test_child_runs_for_items_fail_one_by_one() -> None:
    """Given child runs for items, when one fails and may, then the others go on."""
    case = run({"m": {**CHILD, "for_each": {"items": [1, 2], "tolerate": 1}}}, '{"x":1}')
    case.child_fails("m[0]", CHILD_FAILED)
    case.child_done("m[1]", "2")
    assert case.output == [None, 2]


# --- Forks ---


def copy(**results: Any) -> dict[str, Any]:
    """Return what a fork brings: outputs by step (`m__0` is `m[0]`, `b__x` is `b.x`)."""
    return {"copied": to_json({path: {"status": "completed", "output": to_json(each)} for path, each in results.items()})}


def test_copied_steps_cost_nothing_and_the_rest_runs() -> None:
    """Given a fork, when it starts, then steps with a copied result have it at once; the others run and see it."""
    steps = {"a": tool(), "b": tool(needs=["a"], on_failure="continue"), "c": tool(needs=["b"])}
    steps["c"]["tool"] = {"name": "t", "arguments": {"a": "=steps.a.output", "b": "=steps.b.error.kind", "s": "=steps.b.status"}}
    steps["c"]["needs"] = ["a", "b"]
    results = {
        "a": {"status": "completed", "output": '{"n":1}', "error": None},
        "b": {"status": "failed", "output": None, "error": {"kind": "rejected", "message": "no"}},
    }
    case = run(steps, start={"copied": to_json(results)})
    assert case.effects[:2] == [StepCopied("a"), StepCopied("b")]
    assert arguments(case.effects) == {"c": {"a": {"n": 1}, "b": "rejected", "s": "failed"}}
    case.done("c", "2")
    assert case.output == 2


def test_items_iterations_and_steps_of_steps_are_copied() -> None:
    """Given a fork in the middle of a list, a loop and a block, when it starts, then only what is left is called."""
    steps = {
        "m": {"for_each": {"items": [1, 2, 3]}, **tool()},
        "l": {"repeat": {"until": "last == 2", "at_most": 9}, **tool()},
        "b": {"steps": {"x": tool(), "y": tool(needs=["x"])}},
        "s": {"switch": {"k": tool(when="true")}},
    }
    results = {"m[0]": 10, "m[2]": 30, "l[0]": 1, "b.x": "x", "s.k": "k"}
    case = run(steps, start=copy(**results), output="=[steps.m.output, steps.l.output, steps.b.output, steps.s.output]")
    assert asks(case.effects) == ["m[1]", "l[1]", "b.y"]
    assert [effect.step for effect in case.effects if isinstance(effect, StepCopied)] == list(results)
    case.done("m[1]", "20")
    case.done("l[1]", "2")
    case.done("b.y", '"y"')
    assert case.output == [[10, 20, 30], 2, "y", "k"]


def test_results_of_steps_that_are_no_more_are_not_copied() -> None:
    """Given a fork to another version, when copied steps are not in it, then they are ignored."""
    case = run({"a": tool()}, start=copy(**{"gone": 1, "a[0]": 2, "a.x": 3, "": 4, "undo(a)": 5}))
    assert asks(case.effects) == ["a"]
    case.done("a", "7")
    assert case.output == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"a":1}',
        '{"a":{}}',
        '{"a":{"status":"running","output":"1"}}',
        '{"a":{"status":[],"output":"1"}}',
        '{"a":{"status":{},"output":"1"}}',
        '{"a":{"status":"completed","output":"{"}}',
        '{"a":{"status":"completed","output":5}}',
        "[" * 1000,
    ],
)
def test_what_is_wrong_in_a_fork_is_left_out(text: str) -> None:
    """When copied results can't be read, then they are left out, and their steps run."""
    case = run({"a": tool()}, start={"copied": text})
    assert asks(case.effects) == ["a"]
    assert case.done("a", "7")[-1] == RunCompleted("7")


# --- Large payloads ---


class Counting(Memory):
    """Counts how often a payload is looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.gets = 0

    def get(self, digest: str) -> str:
        """Return a payload, and count that."""
        self.gets += 1
        return super().get(digest)


def large(steps: dict[str, Any], **more: Any) -> tuple[Run, Counting]:
    """Return a run whose payloads are counted."""
    case = run(steps, **more)
    payloads = Counting()
    case.payloads = payloads
    return case, payloads


def test_a_large_output_is_passed_on_as_a_reference() -> None:
    """Given an output kept as a payload, when steps and the run pass it on whole, then it is never fetched."""
    passing = {"tool": {"name": "t", "arguments": {"x": "=steps.a.output"}}, "needs": ["a"]}
    steps = {"a": tool(), "b": passing, "c": computed("=steps.a.output", needs=["a", "b"])}
    case, payloads = large(steps, output={"it": "=steps.c.output"})
    reference = payloads.put(BIG)
    case.done("a", reference)
    case.done("b")
    assert case.state.output == f'{{"it":{reference}}}'
    assert payloads.gets == 0


def test_a_large_output_that_is_looked_into_is_fetched() -> None:
    """Given an output kept as a payload, when an expression looks into it, then it is fetched."""
    case, payloads = large({"a": tool(), "b": computed("=size(steps.a.output)", needs=["a"])})
    case.done("a", payloads.put(BIG))
    assert case.output == INLINE_BYTES + 10
    assert payloads.gets > 0


def test_what_a_run_makes_large_is_kept_as_a_payload() -> None:
    """When a transform, arguments, items' outputs or the run's output grow above the limit, then the event has a reference."""
    half = "x" * (INLINE_BYTES * 2 // 3)
    steps = {
        "a": computed("=[input, input]"),
        "b": {"tool": {"name": "t", "arguments": {"x": "=[input, input]"}}, "needs": ["a"]},
        "m": {"for_each": {"items": [1, 2]}, "needs": ["b"], **tool()},
    }
    case = run(steps, f'"{half}"')
    assert (case.state.steps["a"].output or "").startswith('{"$payload"')
    assert list(arguments(case.effects)["b"]) == ["$payload", "bytes"]
    case.done("b")
    case.done("m[0]", f'"{half}"')
    case.done("m[1]", f'"{half}"')
    assert (case.state.output or "").startswith('{"$payload":')


def test_items_can_be_a_payload() -> None:
    """Given a list of items that is a payload, when items begin, then the events hold its reference, not the list."""
    call = {"tool": {"name": "t", "arguments": {"n": "=item.n"}}}
    case, payloads = large({"a": tool(), "m": {"for_each": {"items": "=steps.a.output"}, "needs": ["a"], **call}})
    items = to_json([{"n": n, "pad": "x" * 100} for n in range(3000)])
    effects = case.done("a", payloads.put(items))
    assert len(getattr(effects[1], "items", "")) < 200
    assert arguments(effects)["m[99]"] == {"n": 99}


def test_a_payload_that_cannot_be_had_changes_nothing() -> None:
    """When a payload that is looked into is missing, then there is no decision; with the payload it goes on."""
    case, payloads = large({"a": tool(), "b": computed("=size(steps.a.output)", needs=["a"])})
    case.twice = False
    reference = Memory().put(BIG)
    before = case.state
    with pytest.raises(PayloadMissingError):
        case.done("a", reference)
    assert case.state is before
    payloads.put(BIG)
    case.done("a", reference)
    assert case.output == INLINE_BYTES + 10


def test_a_tenure_waits_for_a_payload_or_gives_up() -> None:
    """Given a missing payload, when an input looks into it, then the tenure is unchanged; when it gives up, the run fails."""
    case = run({"a": computed("=size(input)")})
    reference = Memory().put(BIG)
    start = StartRun("q", "w", case.spec.digest, reference)
    tenure = Tenure(Place(b"i" * 16, b"d" * 16, 0, 1), {case.spec.digest: case.spec}.get, Commit(0, 0), NoPayloads())
    tenure.begin(0)
    message = InboxMessage(run_id("q"), start)
    record = next(record_of(message))
    with pytest.raises(PayloadMissingError):
        tenure.take(record)
    assert (tenure.position, tenure.runs, tenure.next_timer()) == (0, {}, None)
    decision, *_ = tenure.take(record, give_up=True)
    assert b"RunFailed" in dict(decision.headers)["foldflow_effects"]
    assert tenure.position == 1


def record_of(message: InboxMessage) -> Any:
    """Yield an inbox record."""
    yield Incoming("inbox", 0, 0, NOW, message.run_id.encode(), encode(message))


def test_too_much_in_references_is_a_failure_like_another() -> None:
    """When what references come to together is more than may be read, then the step fails cleanly."""
    case, payloads = large({"a": tool(), "b": computed("=size(steps.a.output)", needs=["a"], on_failure="continue")})
    text = '"' + "x" * (9 * 1024 * 1024) + '"'
    reference = payloads.put(text)
    case.done("a", f"[{','.join([reference] * 8)}]")
    assert case.state.status is RunStatus.COMPLETED
    failed = [effect for effect in case.effects if isinstance(effect, StepFailed)]
    assert [(each.step, each.failure.kind) for each in failed] == [("b", FailureKind.TOO_LARGE)]


def test_what_cannot_be_kept_fails_its_step() -> None:
    """Given nothing that keeps payloads, when an output, a step's undoing or items' outputs are large, then the step fails."""
    half = f'"{"x" * (INLINE_BYTES * 2 // 3)}"'
    undo = {"tool": {"name": "t", "arguments": {"x": "=[output, output]"}}}
    for steps in (
        {"a": tool(compensation="undo")},
        {"s": {"switch": {"a": tool()}, "compensation": "undo"}},
        {"m": {"for_each": {"items": [1, 2]}, **tool()}},
    ):
        case = run(steps, compensations={"undo": undo})
        case.payloads = NoPayloads()  # type: ignore[assignment]
        for path in list(case.running):
            case.done(path, half)
        assert case.state.failure is not None, steps
        assert case.state.failure.kind == FailureKind.TOO_LARGE


def test_the_names_of_payloads_are_their_contents() -> None:
    """A payload that two runs keep has one name: decisions on the same input say the same."""
    steps = {"a": computed("=[input, input]")}
    half = f'"{"x" * (INLINE_BYTES * 2 // 3)}"'
    first, second = run(steps, half), run(steps, half)
    assert first.events[0].hash == second.events[0].hash
    (text,) = first.payloads.texts.values()
    assert digest_of(text.encode()) in (first.state.output or "")
    assert decide(first.spec, first.state, STOP, NOW, first.payloads) is not None
    assert [step.status for step in first.state.steps.values()] == [StepStatus.COMPLETED]
    assert list(itertools.islice(first.payloads.texts, 2)) == list(second.payloads.texts)
