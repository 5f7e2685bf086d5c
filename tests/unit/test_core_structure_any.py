"""Any workflow, any order of answers: the run ends once, and with what the same structure gives in plain Python."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from core import NOW, tool, workflow
from core_twice import CALLS, ENDS, Run, computed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events.decisions import CallCancelled, StepCancelled, StepCompleted, StepFailed, StepSkipped, UndoPlanned
from events.failure import Failure, FailureKind
from events.results import TimerFired, ToolCallCompleted, ToolCallFailed
from streams.workflow.decider import decide
from streams.workflow.evolve import fold
from streams.workflow.state import RunState, RunStatus, StepStatus, owner_path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import long_run

BAD = Failure(FailureKind.REJECTED, "no")
DEPTH = 3


# --- Workflows ---


class Specs:
    """Makes definitions from choices, each name used once."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.count = draw, 0

    def pick(self, *values: Any) -> Any:
        """Return one of these values."""
        return self.draw(st.sampled_from(values))

    def name(self) -> str:
        """Return a name that no step has yet."""
        self.count += 1
        return f"s{self.count}"

    def steps(self, depth: int, least: int = 1) -> dict[str, Any]:
        """Return steps, of which later ones may need earlier ones."""
        made: dict[str, Any] = {}
        for _ in range(self.draw(st.integers(least, 3))):
            name = self.name()
            made[name] = self.step(depth, [before for before in made if self.draw(st.booleans())])
        return made

    def step(self, depth: int, needs: list[str], *, case: bool = False) -> dict[str, Any]:
        """Return a step."""
        body = self.body(depth, needs)
        if needs:
            body["needs"] = needs
        if not case and self.pick(0, 0, 0, 1):
            body["when"] = self.pick("input.x > 0", "input.x > 5", *(f"steps.{need}.status == 'completed'" for need in needs))
        if self.pick(0, 0, 1):
            body["on_failure"] = "continue"
        if self.pick(0, 0, 1):
            body["compensation"] = "undo"
        match self.pick("", "", "", "each", "again"):
            case "each":
                tolerate = self.pick(0, 1, "all")
                items = self.pick([], [1], [1, 2, 3], "=[4, 5, 6, 7]")
                body["for_each"] = {"items": items, "concurrency": self.draw(st.integers(1, 3)), "tolerate": tolerate}
            case "again":
                until, most = self.pick("index == 1", "index == 9"), self.draw(st.integers(1, 3))
                body["repeat"] = {"until": until, "at_most": most, "otherwise": self.pick("fail", "last")}
        return body

    def body(self, depth: int, needs: list[str]) -> dict[str, Any]:
        """Return what a step does."""
        kinds = ["tool", "tool", "transform"] + (["steps", "switch"] if depth else [])
        match self.pick(*kinds):
            case "steps":
                inner = self.steps(depth - 1)
                own = {"output": {name: f"=steps.{name}.output" for name in inner}} if self.pick(0, 1) else {}
                return {"steps": inner, **own}
            case "switch":
                cases = {}
                for condition in self.pick(("input.x > 3", None), ("input.x > 3", "input.x > 0"), (None,)):
                    name = self.name()
                    cases[name] = self.step(depth - 1, [], case=True) | ({"when": condition} if condition else {})
                return {"switch": cases}
            case "transform":
                return computed(
                    self.pick({"x": "=input.x", **{need: f"=steps.{need}.output" for need in needs}}, "=input.nope.x")
                )
            case _:
                return tool()


@st.composite
def specs(draw: Any) -> dict[str, Any]:
    """Draw a definition: steps in steps up to three deep, with all that may stand around them."""
    make = Specs(draw)
    steps = make.steps(DEPTH - 1)
    more: dict[str, Any] = {"compensations": {"undo": {"tool": {"name": "undo"}, "retry": {"attempts": 1}}}}
    if make.pick(0, 1):
        final = {"f1": tool(on_failure=make.pick("fail", "continue")), "f2": computed("=outcome", needs=["f1"])}
        more["finally"] = final
    more["output"] = {name: f"=[steps.{name}.status, steps.{name}.output]" for name in steps}
    return {"steps": steps, **more}


# --- Answers: what the world says to a call depends on its step alone ---


def numbers(seed: int, path: str, *what: object) -> random.Random:
    """Return chances that depend on these alone."""
    return random.Random(f"{seed} {path} {what}")  # noqa: S311 - repeatable


def answer(seed: int, path: str) -> int | None:
    """Return what the tool of a step answers; None: it fails for good."""
    chance = numbers(seed, path)
    return None if chance.random() < (seed % 4) * 0.1 else chance.randint(0, 9)


# --- What it should give, in plain Python ---

Outcome = tuple[str, Any]


class Failed(Exception):  # noqa: N818 - it is how a plain program would say it
    """A step failed for good, and nobody tolerates that."""


class Model:
    """Evaluates a definition as a plain program would, step after step."""

    def __init__(self, seed: int, x: int) -> None:
        self.seed, self.x = seed, x

    def frame(self, steps: dict[str, Any], prefix: str) -> dict[str, Outcome]:
        """Return the outcomes of steps that stand together. Raises Failed."""
        seen: dict[str, Outcome] = {}
        failed = False
        for name, step in steps.items():
            try:
                seen[name] = self.step(step, prefix + name, seen)
            except Failed:
                failed = True  # the others may have run before it or not: the whole fails
                seen[name] = ("failed", None)
        if failed:
            raise Failed
        return seen

    def holds(self, condition: str, seen: dict[str, Outcome]) -> bool:
        """Return whether a condition is met."""
        if condition.startswith("input.x > "):
            return self.x > int(condition.rsplit(" ", 1)[1])
        return seen[condition.split(".")[1]][0] == "completed"

    def step(self, step: dict[str, Any], path: str, seen: dict[str, Outcome]) -> Outcome:
        """Return the status and output of a step. Raises Failed."""
        if "when" in step and not self.holds(step["when"], seen):
            return "skipped", None
        try:
            return "completed", self.whole(step, path, seen)
        except Failed:
            if step.get("on_failure") == "continue":
                return "failed", None
            raise

    def whole(self, step: dict[str, Any], path: str, seen: dict[str, Outcome]) -> Any:
        """Return the output of a step with all its items or iterations. Raises Failed."""
        if "for_each" in step:
            items = step["for_each"]["items"]
            outputs, failures = [], 0
            for index in range(len(items) if isinstance(items, list) else 4):
                try:
                    outputs.append(self.once(step, f"{path}[{index}]", seen))
                except Failed:
                    outputs.append(None)
                    failures += 1
            tolerate = step["for_each"]["tolerate"]
            if tolerate != "all" and failures > tolerate:
                raise Failed
            return outputs
        if "repeat" in step:
            most, end = step["repeat"]["at_most"], int(step["repeat"]["until"].rsplit(" ", 1)[1])
            for index in range(most):
                output = self.once(step, f"{path}[{index}]", seen)
                if index == end or (index == most - 1 and step["repeat"]["otherwise"] == "last"):
                    return output
            raise Failed
        return self.once(step, path, seen)

    def once(self, step: dict[str, Any], path: str, seen: dict[str, Outcome]) -> Any:
        """Return the output of a step, or of one item or iteration. Raises Failed."""
        if "tool" in step:
            output = answer(self.seed, path)
            if output is None:
                raise Failed
            return output
        if "transform" in step:
            if isinstance(step["transform"], str):
                raise Failed
            return {"x": self.x} | {name: seen[name][1] for name in step["transform"] if name != "x"}
        if "switch" in step:
            for name, case in step["switch"].items():
                if "when" not in case or self.holds(case["when"], {}):
                    return self.step({**case, "when": "input.x > -1"}, f"{path}.{name}", {})[1]
            return None
        inside = self.frame(step["steps"], f"{path}.")
        return {name: inside[name][1] for name in step["steps"]} if "output" in step else inside[list(step["steps"])[-1]][1]


# --- The run ---


class World:
    """Answers a run's calls in a random order, some twice, some too late."""

    def __init__(self, definition: dict[str, Any], seed: int, x: int) -> None:
        self.seed, self.chance = seed, random.Random(seed)  # noqa: S311 - repeatable
        self.case = Run(workflow(definition["steps"], **{key: value for key, value in definition.items() if key != "steps"}).spec)
        self.case.twice = False
        self.calls: dict[str, tuple[str, int]] = {}
        self.over: dict[str, str] = {}
        self.completed: list[str] = []
        self.undone: list[str] = []
        self.took = 0
        self.case.start(f'{{"x":{x}}}')
        self.look()

    def look(self) -> None:
        """Take note of what the last decision says, and check what must hold after any."""
        case, event = self.case, self.case.events[-1]
        assert event.decision.effects
        for effect in event.decision.effects:
            path = getattr(effect, "step", None) or ""
            match effect:
                case CallCancelled():
                    assert self.calls.pop(path)
                    self.over[path] = "cancelled"
                case StepCompleted() | StepFailed() | StepCancelled() | StepSkipped():
                    assert path not in self.calls or path == getattr(event.decision.input, "step", "")
                case UndoPlanned():
                    self.completed.append(path)
            if isinstance(effect, CALLS):
                self.calls[path] = (case.state.steps[path].awaits if path in case.state.steps else "", effect.attempt)
                if path.startswith("undo("):
                    self.undone.append(path[5:-1])
        for path, (_, attempt) in list(self.calls.items()):
            step = case.state.steps.get(path)
            assert step is not None, path
            if step.status is StepStatus.RUNNING:
                self.calls[path] = step.awaits, attempt
        check(case.state, case.spec)

    def go(self) -> None:
        """Answer until the run is over."""
        case = self.case
        old: list[Any] = []
        while not case.state.over:
            timers = [path for path, step in case.state.steps.items() if step.status is StepStatus.WAITING]
            assert self.calls or timers, "nothing is under way, and the run is not over"
            if old and self.chance.random() < 0.3:
                ((ignored),) = case.when(self.chance.choice(old))
                assert type(ignored).__name__ == "InputIgnored"
                continue
            if timers and (not self.calls or self.chance.random() < 0.5):
                path = self.chance.choice(timers)
                old.append(TimerFired(case.awaits(path), path))
                case.timer(path)
                self.look()
                continue
            path = self.chance.choice(sorted(self.calls))
            call, attempt = self.calls.pop(path)
            output = answer(self.seed, path)
            cause: Any
            if attempt == 1 and not path.startswith("undo(") and numbers(self.seed, path, "flaky").random() < 0.1:
                cause = ToolCallFailed(call, path, Failure(FailureKind.UNAVAILABLE, "down"), "1", 1)
            elif output is None:
                cause = ToolCallFailed(call, path, BAD, "1", 1)
            else:
                cause = ToolCallCompleted(call, path, str(output), "1", 1)
            assert not any(type(each).__name__ == "InputIgnored" for each in case.when(cause))
            old.append(cause)
            self.look()
            self.took += 1


def check(state: RunState, spec: Any) -> None:
    """Check that what a state counts is what it holds, and that no bound is exceeded."""
    tops = [path for path in state.steps if owner_path(path) is None and path[-1] != ")"]
    assert state.settled == sum(state.steps[path].settled for path in tops)
    assert set(state.held) == {path for path, step in state.steps.items() if step.status is StepStatus.HELD}
    parts: dict[str, list[str]] = {}
    for path in state.steps:
        if (owner := owner_path(path)) is not None:
            assert not state.steps[owner].settled, f"{path} is a part of what is settled"
            parts.setdefault(owner, []).append(path)
    for owner, inner in parts.items():
        around, place = state.steps[owner], spec.plan.place(owner)
        items = [path for path in inner if path.endswith("]")]
        if not place.repeats:
            assert around.done == sum(state.steps[path].settled for path in inner)
            assert {f"{owner}.{name}" for name in around.inner} == set(inner)
        elif place.plan.step.for_each:
            bound = place.plan.step.for_each.concurrency
            under_way = sum(not state.steps[path].settled for path in items)
            assert around.done == len(items) - under_way
            assert around.next == len(items)
            assert under_way == (0 if state.over else min(bound, around.total - around.done))
        else:
            assert len(items) == 1


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(specs(), st.integers(0, 10_000), st.sampled_from([0, 1, 4, 9]))
def test_any_workflow_comes_to_one_end_with_the_right_output(definition: dict[str, Any], seed: int, x: int) -> None:
    """Given any workflow, when its calls are answered in any order, then it ends once, with what a plain program would give."""
    world = World(definition, seed, x)
    world.go()
    case = world.case
    assert len(case.ends) == 1
    assert isinstance(case.events[-1].decision.effects[-1], ENDS)
    assert not world.calls, "a call is neither answered nor cancelled"
    assert all(step.settled for step in case.state.steps.values())
    final_fails = "finally" in definition and definition["finally"]["f1"]["on_failure"] == "fail"
    try:
        seen = Model(seed, x).frame(definition["steps"], "")
    except Failed:
        assert case.state.status is RunStatus.FAILED
        assert world.undone == world.completed[::-1]
    else:
        assert world.undone == []
        if final_fails and answer(seed, "finally.f1") is None:
            assert case.state.status is RunStatus.FAILED
        else:
            assert case.state.status is RunStatus.COMPLETED, case.state.failure
            assert case.output == {name: list(outcome) for name, outcome in seen.items()}
    assert case.state.not_undone == tuple(path for path in world.undone if answer(seed, f"undo({path})") is None)
    assert fold(case.events) == case.state
    assert decide(case.spec, fold(case.events[:-1]), case.events[-1].decision.input, case.at - 1, case.payloads)
    assert case.at > NOW


@pytest.mark.parametrize("name", ["loop", "items"])
def test_a_long_run_costs_no_more_per_step_than_a_short_one(name: str) -> None:
    """Given a loop or a list of 30,000 calls, then the last decisions cost what the first did; a loop takes no memory."""
    made = getattr(long_run, name)(30_000)
    costs = long_run.measured(made, 5000)
    memory = long_run.remembered(getattr(long_run, name)(6000), 1000)
    print(name, costs, memory)  # noqa: T201 - the figures are of interest: pytest -s
    assert costs["ratio"] <= 1.5
    assert costs["record_bytes_median"] < 500
    if name == "loop":
        assert memory["peak_kb"] < memory["first_kb"] + 64
    else:
        assert memory["peak_kb"] / 6000 < 1  # what is kept of an item until the list is done
