"""What the tests of the core's structure share: a run in which each input comes twice, and short ways to look at it."""

from dataclasses import dataclass, field
from typing import Any

from core import Case, workflow

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import CancelRun, SignalReceived, StartRun
from events.decisions import (
    ChildRunRequested,
    Effect,
    InputIgnored,
    RunCancelled,
    RunCompleted,
    RunFailed,
    StepSkipped,
    UnreadableInput,
)
from events.failure import Failure
from events.ids import run_id
from events.results import ChildRunCompleted, ChildRunFailed, Input, TimerFired
from streams.workflow.expressions import from_json
from streams.workflow.state import RunState, StepStatus

CALLS = (LlmCallRequested, ToolCallRequested, ChildRunRequested)
ENDS = (RunCompleted, RunFailed, RunCancelled)


def reason_again(state: RunState, cause: Any) -> set[str]:
    """Return why an input that was taken is ignored the second time."""
    match cause:
        case StartRun():
            return {"already_started"}
        case SignalReceived():
            return {"duplicate"}
        case CancelRun():
            return {"closing"}
        case TimerFired():
            return {"late", "unknown_timer"}
    step = state.steps.get(cause.step)
    if step is None:
        return {"unknown_call"}  # it settled, and what it was part of, so it is forgotten
    return {"duplicate"} if step.status is StepStatus.COMPLETED and step.awaits == cause.call_id else {"late"}


@dataclass
class Run(Case):
    """A run in which each input comes twice: the second time nothing happens."""

    effects: list[Effect] = field(default_factory=list)
    twice: bool = True

    def when(self, cause: Input | UnreadableInput, *, known: bool = True) -> tuple[Effect, ...]:
        """Decide on an input, then on the same once more."""
        effects = super().when(cause, known=known)
        self.effects += effects
        if self.twice and not self.state.over and not isinstance(effects[0], InputIgnored):
            before = self.state
            (ignored,) = super().when(cause)
            assert isinstance(ignored, InputIgnored)
            assert ignored.reason in reason_again(self.state, cause)
            assert (self.state.steps, self.state.settled, self.state.closing) == (before.steps, before.settled, before.closing)
        return effects

    def child_done(self, step: str, output: str = "1") -> tuple[Effect, ...]:
        """Let the child run of a step complete."""
        call = self.awaits(step)
        return self.when(ChildRunCompleted(call, step, run_id(call), output))

    def child_fails(self, step: str, failure: Failure) -> tuple[Effect, ...]:
        """Let the child run of a step fail."""
        call = self.awaits(step)
        return self.when(ChildRunFailed(call, step, run_id(call), failure))

    @property
    def running(self) -> list[str]:
        """The steps whose calls are under way, in the order of their names."""
        return sorted(path for path, step in self.state.steps.items() if step.status is StepStatus.RUNNING)

    @property
    def ends(self) -> list[Effect]:
        """How the run ended: one effect, if it did."""
        return [effect for effect in self.effects if isinstance(effect, ENDS)]

    @property
    def output(self) -> Any:
        """The run's output."""
        assert self.state.output is not None, self.state.failure
        return from_json(self.state.output)

    @property
    def skipped(self) -> dict[str, str]:
        """The steps that were skipped, and why."""
        return {effect.step: effect.reason for effect in self.effects if isinstance(effect, StepSkipped)}


def run(steps: dict[str, Any], text: str = "{}", *, start: dict[str, Any] | None = None, **more: Any) -> Run:
    """Return a run of a workflow of these steps that was started."""
    case = Run(workflow(steps, **more).spec)
    case.start(text, **(start or {}))
    return case


def computed(value: Any, **more: Any) -> dict[str, Any]:
    """Return a step that computes a value."""
    return {"transform": value, **more}


def asks(effects: Any) -> list[str]:
    """Return the steps whose calls are requested, in order."""
    return [effect.step for effect in effects if isinstance(effect, CALLS)]


def names(effects: Any) -> list[str]:
    """Return what kinds of effects these are."""
    return [type(effect).__name__ for effect in effects]


def arguments(effects: Any) -> dict[str, Any]:
    """Return the arguments of the calls that are requested, by step."""
    return {effect.step: from_json(effect.arguments) for effect in effects if isinstance(effect, ToolCallRequested)}


def block(steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a step with steps of its own."""
    return {"steps": steps, **more}


def each(items: Any, body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a step that is done for each item."""
    return {"for_each": {"items": items, **more}, **body}


def again(until: str, body: dict[str, Any], at_most: int = 100, **more: Any) -> dict[str, Any]:
    """Return a step that is done again and again."""
    return {"repeat": {"until": until, "at_most": at_most, **more}, **body}


def timers_of(case: Run) -> list[tuple[str, str]]:
    """Return the loops that go on by a timer, and these."""
    steps = case.state.steps.items()
    return [(path, step.awaits) for path, step in steps if step.status is StepStatus.ENTERED and step.due]
