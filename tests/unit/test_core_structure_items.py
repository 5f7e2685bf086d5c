import random
from typing import Any

import pytest
from core import NOW, tool, workflow
from core_twice import Run, again, arguments, asks, block, computed, each, names, run, timers_of

from events import codec
from events.calls import LlmCallRequested
from events.commands import SignalReceived
from events.decisions import (
    ChildRunRequested,
    Decision,
    InputIgnored,
    MapStarted,
    RunCompleted,
    RunFailed,
    SignalAwaited,
    StepCompleted,
    StepFailed,
    TimerSet,
)
from events.failure import Failure, FailureKind
from events.results import TimerFired
from streams.workflow.state import MOST_FAILURES


def test_items_are_under_way_up_to_the_bound_and_their_outputs_in_order() -> None:
    """Given a bound, when answers come in any order, then as many items as allowed are under way, and order is kept."""
    for seed in range(10):
        chance = random.Random(seed)  # noqa: S311 - repeatable
        total, bound = chance.randint(1, 30), chance.randint(1, 8)
        echo = {"tool": {"name": "t", "arguments": {"n": "=item", "i": "=index"}}}
        case = run({"m": each(f"={[n * n for n in range(total)]}", echo, concurrency=bound)})
        begun, left = set(case.running), total
        while not case.state.over:
            assert len(case.running) == min(bound, left)
            step = chance.choice(case.running)
            left -= 1
            case.done(step, str(int(step[2:-1]) ** 2))
            begun |= set(case.running)
        assert case.output == [n * n for n in range(total)]
        assert [arguments(case.effects)[f"m[{i}]"] for i in range(total)] == [{"i": i, "n": i * i} for i in range(total)]


@pytest.mark.parametrize(("tolerate", "survives"), [(0, 0), (1, 1), (2, 2), (3, 3), ("all", 3)])
def test_items_may_fail_so_often(tolerate: int | str, survives: int) -> None:
    """Given `tolerate`, when more items fail, then the step fails and the rest is cancelled; else their output is null."""
    case = run(
        {"m": each("=[1, 2, 3, 4]", tool(), tolerate=tolerate), "end": computed("=steps.m", needs=["m"])},
    )
    for index in range(3):
        effects = case.fails(f"m[{index}]", Failure(FailureKind.REJECTED, f"no {index}"))
        if index == survives:
            assert names(effects) == ["StepFailed", *["CallCancelled", "StepCancelled"] * (3 - index), "StepFailed", "RunFailed"]
            assert case.ends == [RunFailed(f"m[{index}]", Failure(FailureKind.REJECTED, f"no {index}"))]
            return
        assert effects == (StepFailed(f"m[{index}]", Failure(FailureKind.REJECTED, f"no {index}"), True),)
    case.done("m[3]", "4")
    assert case.output["output"] == [None, None, None, 4]
    assert case.output["status"] == "completed"
    assert case.output["failures"] == [{"index": i, "kind": "rejected", "message": f"no {i}"} for i in range(3)]


def test_a_list_of_failures_has_an_end() -> None:
    """Given many items that all fail, when all may, then the first hundred failures are listed."""
    bad = each("=input", computed("=item.nope"), tolerate="all")
    case = run({"m": bad, "end": computed("=size(steps.m.failures)", needs=["m"])}, "[" + "1," * 299 + "1]")
    assert case.output == MOST_FAILURES


def test_an_empty_list_is_done_at_once() -> None:
    """When there are no items, then the step completes with an empty list."""
    case = run({"m": each("=input", tool())}, "[]")
    assert case.effects == [MapStarted("m", 0, "[]", None), StepCompleted("m", "[]"), RunCompleted("[]")]


@pytest.mark.parametrize("items", ['{"a":1}', '"abc"', "3", "null"])
def test_what_is_no_list_has_no_items(items: str) -> None:
    """When the items are no list, then the step fails and says what they are."""
    case = run({"m": each("=input", tool())}, items)
    assert names(case.effects) == ["StepFailed", "RunFailed"]
    assert case.state.failure is not None
    assert (case.state.failure.kind, "no list" in case.state.failure.message) == (FailureKind.EXPRESSION, True)


def test_one_item_is_a_list_too() -> None:
    """Given one item, when it is done, then the output is a list of one."""
    case = run({"m": each([{"a": 1}], tool(), **{"as": "thing"}) | {"tool": {"name": "t", "arguments": {"x": "=thing.a"}}}})
    assert arguments(case.effects) == {"m[0]": {"x": 1}}
    case.done("m[0]", '"ok"')
    assert case.output == ["ok"]


def test_ten_thousand_items() -> None:
    """Given 10,000 items, when all are answered in a random order, then the output has them all in order."""
    total, bound = 10_000, 500
    case = run({"m": each("=input", tool(), concurrency=bound)}, f"[{','.join(map(str, range(total)))}]")
    case.twice = False
    under_way, chance = asks(case.effects), random.Random(1)  # noqa: S311 - repeatable
    assert len(under_way) == bound
    while under_way:
        at = chance.randrange(len(under_way))
        under_way[at], under_way[-1] = under_way[-1], under_way[at]
        step = under_way.pop()
        under_way += asks(case.done(step, step[2:-1]))
        assert case.state.over or len(under_way) == min(bound, case.state.steps["m"].total - case.state.steps["m"].done)
    assert case.output == list(range(total))
    assert len(case.state.steps) == 1


def test_ten_thousand_items_without_calls_take_several_decisions() -> None:
    """Given 10,000 items that need no call, when they begin, then they go on by timers, even under a time limit."""
    case = run({"m": each("=input", computed("=item * 2")) | {"time_limit": "1h"}}, f"[{','.join(map(str, range(10_000)))}]")
    fired = 0
    while not case.state.over:
        assert case.state.steps["m"].due < NOW + 1_000_000
        case.timer("m")
        fired += 1
    assert case.output == [2 * n for n in range(10_000)]
    assert 5 < fired < 20


def test_a_time_limit_still_counts_after_a_loop_went_on() -> None:
    """Given a step that went on by timers and then waits for a call, when its time limit is over, then it fails."""
    body = block({"x": computed("=index"), "y": tool(needs=["x"], when="index == 999")})
    case = run({"l": again("false", body, 1000) | {"time_limit": "1h", "on_failure": "continue"}}, output="=steps.l.error.kind")
    while "l[999].y" not in case.state.steps:
        case.timer("l")
    assert case.state.steps["l"].due == NOW + 3_600_000
    effects = case.timer("l")
    assert names(effects)[:2] == ["CallCancelled", "StepCancelled"]
    assert case.output == "timeout"


BODIES: dict[str, dict[str, Any]] = {
    "llm": {"llm": {"prompt": "{{ item }} {{ index }}"}},
    "tool": tool(),
    "transform": computed("=item"),
    "block": block({"x": tool(), "y": computed("=steps.x.output", needs=["x"])}),
    "run": {"run": {"workflow": "child", "input": {"x": "=item"}}},
    "sleep": {"sleep": "=string(item) + 's'"},
    "wait_for": {"wait_for": {"signal": "go", "correlation": "=string(item)"}},
}


@pytest.mark.parametrize("kind", BODIES)
def test_whatever_a_step_does_it_can_do_for_each_item(kind: str) -> None:
    """Given three items, two at a time, when each is answered as its kind asks, then the outputs are in their order."""
    case = run({"m": each("=input", BODIES[kind], concurrency=2)}, "[5, 6, 7]")
    for index in range(3):
        path = f"m[{index}]"
        match kind:
            case "llm":
                asked = [effect for effect in case.effects if isinstance(effect, LlmCallRequested) and effect.step == path]
                assert f"{index + 5} {index}" in asked[0].messages
                case.done(path, str(index + 5))
            case "tool":
                case.done(path, str(index + 5))
            case "block":
                case.done(f"{path}.x", str(index + 5))
            case "run":
                started_ = [effect for effect in case.effects if isinstance(effect, ChildRunRequested) and effect.step == path]
                assert started_[0].input == f'{{"x":{index + 5}}}'
                case.child_done(path, str(index + 5))
            case "sleep":
                assert case.state.steps[path].due - case.state.steps[path].began == (index + 5) * 1000
                case.timer(path)
            case "wait_for":
                assert SignalAwaited(path, "go", str(index + 5), None) in case.effects
                case.when(SignalReceived(f"s{index}", "go", str(index + 5), str(index + 5), "me"))
            case _:
                pass
    assert case.output == ([None] * 3 if kind == "sleep" else [5, 6, 7])


def test_items_take_signals_that_were_kept() -> None:
    """Given signals that came before the items, when the items begin, then each takes its own without waiting."""
    steps = {"a": tool(), "m": each([1, 2], BODIES["wait_for"], concurrency=1) | {"needs": ["a"]}}
    case = run(steps)
    case.when(SignalReceived("s2", "go", "2", '"two"', "me"))
    case.when(SignalReceived("s1", "go", "1", '"one"', "me"))
    case.done("a")
    assert case.output == ["one", "two"]


def test_items_of_items() -> None:
    """Given `for_each` in a block of a `for_each`, when items are answered, then both bounds hold and the lists are nested."""
    inner = each("=row", {"tool": {"name": "t", "arguments": {"n": "=n", "j": "=index", "row": "=row"}}}, concurrency=2)
    inner["for_each"]["as"] = "n"
    outer = each("=input", block({"i": inner, "k": computed("=[index, steps.i.output]", needs=["i"])}), concurrency=2)
    outer["for_each"]["as"] = "row"
    rows = [[1, 2, 3], [], [4], [5, 6]]
    case = run({"m": outer}, str(rows))
    chance = random.Random(3)  # noqa: S311 - repeatable
    while not case.state.over:
        rows_open = {path[: path.index(".")] for path in case.running}
        assert len(rows_open) <= 2
        assert all(sum(path.startswith(row) for path in case.running) <= 2 for row in rows_open)
        step = chance.choice(case.running)
        asked = arguments(case.effects)[step]
        assert asked["row"][asked["j"]] == asked["n"]
        case.done(step, str(asked["n"] * 10))
    assert case.output == [[0, [10, 20, 30]], [1, []], [2, [40]], [3, [50, 60]]]


def test_shared_arguments_are_computed_and_kept_once() -> None:
    """Given arguments that are the same for all items and large, when items begin, then each event has a reference only."""
    big = "x" * 100_000
    call = {"tool": {"name": "t", "arguments": {"text": "=steps.a.output", "n": "=item", "small": "=input.s", "fixed": [1, 2]}}}
    case = run({"a": tool(), "m": each(list(range(50)), call, concurrency=10) | {"needs": ["a"]}}, '{"s":"s"}')
    case.done("a", f'"{big}"')
    for index in range(49):
        case.done(f"m[{index}]", str(index))
    asked = arguments(case.effects)
    reference = asked["m[0]"]["text"]
    assert set(reference) == {"$payload", "bytes"}
    assert [asked[f"m[{i}]"] for i in range(50)] == [
        {"fixed": [1, 2], "n": i, "small": "s", "text": reference} for i in range(50)
    ]
    items = [event for event in case.events if getattr(event.decision.input, "step", "").startswith("m[")]
    assert max(len(codec.body(event.decision)) for event in items) < 1000
    assert case.payloads.texts == {reference["$payload"]: f'"{big}"'}


def test_small_arguments_stand_in_the_events() -> None:
    """Given shared arguments of at most 1 KB, when items begin, then they are in the calls themselves."""
    call = {"tool": {"name": "t", "arguments": {"text": "=input", "n": "=item"}}}
    case = run({"m": each([1], call)}, '"' + "x" * 1000 + '"')
    assert arguments(case.effects)["m[0]"]["text"] == "x" * 1000


def test_a_shared_argument_that_cannot_be_computed_fails_the_step() -> None:
    """When what all items have in common can't be computed, then the step fails once, before any item begins."""
    call = {"tool": {"name": "t", "arguments": {"text": "=input.nope", "n": "=item"}}}
    case = run({"m": each([1, 2], call, tolerate="all")})
    assert names(case.effects) == ["StepFailed", "RunFailed"]


def test_an_item_argument_that_cannot_be_computed_fails_the_item() -> None:
    """When one item's own argument can't be computed, then that item fails, and the others run."""
    call = {"tool": {"name": "t", "arguments": {"n": "=item.x"}}}
    case = run({"m": each([{"x": 1}, {}, {"x": 3}], call, tolerate=1)})
    assert case.running == ["m[0]", "m[2]"]
    case.done("m[0]", "1")
    case.done("m[2]", "3")
    assert case.output == [1, None, 3]


def test_a_loop_in_items_and_items_in_a_loop() -> None:
    """Given `repeat` in `for_each` and the other way round, when they go on, then each knows its own index and item."""
    loop = again("index == 1", {"tool": {"name": "t", "arguments": {"i": "=index", "item": "=item", "last": "=last"}}})
    case = run({"m": each(["a", "b"], block({"l": loop}))})
    for path in ("m[0].l[0]", "m[1].l[0]", "m[0].l[1]", "m[1].l[1]"):
        case.done(path, f'"{path}"')
    asked = arguments(case.effects)
    assert asked["m[1].l[1]"] == {"i": 1, "item": "b", "last": "m[1].l[0]"}
    assert case.output == ["m[0].l[1]", "m[1].l[1]"]
    items = each("=[1, 2]", {"tool": {"name": "t", "arguments": {"i": "=index", "item": "=item", "last": "=last"}}})
    case = run({"l": again("index == 1", block({"m": items}))})
    for path in ("l[0].m[1]", "l[0].m[0]", "l[1].m[0]", "l[1].m[1]"):
        case.done(path, f'"{path}"')
    assert arguments(case.effects)["l[1].m[1]"] == {"i": 1, "item": 2, "last": ["l[0].m[0]", "l[0].m[1]"]}
    assert case.output == ["l[1].m[0]", "l[1].m[1]"]


def test_long_loops_in_long_lists_all_come_to_their_end() -> None:
    """Given loops without calls in many items, when one decision can't hold them, then timers of several places carry them on."""
    loop = again("index == 299", computed("=index + item"), 300)
    case = run({"m": each(list(range(20)), block({"l": loop}), concurrency=7)})
    timers, taken = timers_of(case), 0
    while not case.state.over:
        assert timers
        path, timer = timers.pop()
        before = case.events[-1]
        case.when(TimerFired(timer, path))
        taken += 1
        assert case.events[-1] is not before
        timers += [each for each in timers_of(case) if each not in timers and each != (path, timer)]
    assert case.output == [299 + n for n in range(20)]
    assert taken < 100


def test_a_timer_that_answers_have_overtaken_changes_nothing() -> None:
    """Given a list that waits for its timer, when answers carry it on before, then the timer comes too late, however often."""
    body = block({"x": computed("=index"), "y": tool(when="index < 3", needs=["x"])})
    case = run({"m": each("=input", body, concurrency=10_000), "other": tool()}, f"[{','.join(map(str, range(700)))}]")
    timer = case.awaits("m")
    for index in range(3):
        case.done(f"m[{index}].y")
    assert case.state.steps["m"].settled or case.awaits("m") != timer
    assert case.when(TimerFired(timer, "m"))[0] in (InputIgnored("late"), InputIgnored("unknown_timer"))
    while not case.state.steps["m"].settled:
        case.timer("m")
    assert case.timer("m") == (InputIgnored("late"),)


def test_an_early_timer_does_not_carry_a_loop_on() -> None:
    """Given a loop that waits for its timer, when another timer's id comes, then nothing happens."""
    case = run({"l": again("false", computed(1), 2000, otherwise="last")})
    assert isinstance(case.effects[-1], TimerSet)
    assert names(case.when(TimerFired("x", "l"))) == ["InputIgnored"]
    while not case.state.over:
        case.timer("l")
    assert case.output == 1


def test_a_workflow_knows_its_places() -> None:
    """Every path that a run's events name leads back to its step."""
    case = run({"m": each([1, 2], block({"l": again("index == 1", tool())}))})
    for path in case.state.steps:
        place = case.spec.plan.place(path)
        assert place is not None
        assert place.path == path
    assert workflow({"a": tool()}).spec.plan.place("a[0]") is None
    assert all(isinstance(event.decision, Decision) for event in case.events)
    assert isinstance(case, Run)
