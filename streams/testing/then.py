"""What a run in a test came to: the properties of it, and the assertions, whose errors show what happened."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Self

from events.calls import LlmCall, ToolCall
from events.commands import ChangeOutput, SignalReceived
from events.decisions import (
    ChildRunRequested,
    Decision,
    Effect,
    InputIgnored,
    OutputChanged,
    RunCancelled,
    RunFailed,
    SignalTaken,
    StepCancelled,
    StepCompleted,
    StepCopied,
    StepFailed,
    StepSkipped,
)
from events.failure import Failure
from events.results import ChildRunCompleted, LlmCallCompleted, ToolCallCompleted
from streams.testing.matching import ANYTHING, difference, short
from streams.testing.script import without_numbers
from streams.testing.timeline import call_arguments, listed, short_text, timeline, took, waits
from streams.testing.world import MemoryRun, World
from streams.workflow.expressions import Json
from streams.workflow.payloads import resolve
from streams.workflow.state import RunState, RunStatus, StepState, StepStatus, copied_results, undone
from streams.workflow.times import instant, milliseconds

__tracebackhide__ = True  # pytest shows the test's line, not these


class Then:
    """A run in a test. Each `then_…` raises AssertionError with the run's timeline if it isn't so, else returns the run."""

    def __init__(self, world: World, run_id: str) -> None:
        self._world, self._id = world, run_id
        self._since = 0
        """How many decisions there were before the last thing that happened."""

    # --- What there is ---

    @property
    def _run(self) -> MemoryRun:
        return self._world.runs[self._id]

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._id

    @property
    def history(self) -> list[Decision]:
        """All decisions so far."""
        return [event.decision for event in self._run.events]

    @property
    def effects(self) -> list[Effect]:
        """What followed from the last thing that happened."""
        return [effect for decision in self.history[self._since :] for effect in decision.effects]

    @property
    def state(self) -> RunState:
        """What the decisions amount to."""
        return self._run.state

    @property
    def status(self) -> str:
        """Where the run is: `open`, `completed`, `failed` or `cancelled`."""
        return self.state.status.name.lower()

    @property
    def output(self) -> Json:
        """The run's output, as far as it has one."""
        return self._value(self.state.output)

    @property
    def now(self) -> int:
        """What time it is, milliseconds since the epoch."""
        return self._world.now

    @property
    def timeline(self) -> str:
        """The run so far, a line for each decision, then what it waits for. The last thing that happened is marked by `>`."""
        run, spec = self._run, self._run.spec
        lines = [f"{spec.name} {spec.digest[:12]}: {self._summary()}", *timeline(self.history, self._since)]
        if not run.state.over:
            lines += listed("waits for", waits(run.state, self.now))
        for step, child in run.children.items():
            other = self._world.runs[child]
            lines.append(
                f"child of {step}: {other.spec.name}, {other.state.status.name.lower()}; see `.child({step!r}).timeline`"
            )
        return "\n".join(lines)

    # --- How it ended ---

    def then_completed(self, output: Any = ANYTHING) -> Self:
        """Check that the run is completed, with this output: a value, a function, or `partly(…)`."""
        if self.state.status is not RunStatus.COMPLETED:
            self._fail(f"the run is not completed: {self._summary()}")
        return self._match(output, self.output, "output")

    def then_failed(self, kind: str | None = None, step: str | None = None, message: str | None = None) -> Self:
        """Check that the run failed, by this kind of failure, because of this step, with this in the failure's message."""
        if self.state.status is not RunStatus.FAILED:
            self._fail(f"the run has not failed: {self._summary()}")
        ended = next(effect for effect in self.history[-1].effects if isinstance(effect, RunFailed))
        if kind is not None and ended.failure.kind != kind:
            self._fail(f"the run failed by {ended.failure.kind}, not by {kind}")
        if step is not None and ended.step != step:
            self._fail(f"the run failed because of {f'step {ended.step}' if ended.step else 'no step'}, not of step {step}")
        if message is not None and message not in ended.failure.message:
            self._fail(f"the failure says {ended.failure.message!r}, and not {message!r}")
        return self

    def then_cancelled(self, by: str | None = None, reason: str | None = None) -> Self:
        """Check that the run is cancelled, by whom and why."""
        if self.state.status is not RunStatus.CANCELLED:
            self._fail(f"the run is not cancelled: {self._summary()}")
        ended = next(effect for effect in self.history[-1].effects if isinstance(effect, RunCancelled))
        if by is not None and ended.by != by:
            self._fail(f"the run was cancelled by {ended.by!r}, not by {by!r}")
        if reason is not None and ended.reason != reason:
            self._fail(f"the run was cancelled because of {ended.reason!r}, not of {reason!r}")
        return self

    def then_undone(self, steps: Sequence[str]) -> Self:
        """Check which steps were undone, in this order; `[]`: none was."""
        completed = (each.step for each in self._all() if isinstance(each, StepCompleted))
        done = [step for each in completed if (step := undone(each)) is not None]
        if done != list(steps):
            failed = f"; undoing {', '.join(self.state.not_undone)} failed" if self.state.not_undone else ""
            self._fail(f"undone was {', '.join(done) or 'nothing'}, not {', '.join(steps) or 'nothing'}{failed}")
        return self

    # --- Where it is ---

    def then_waits_for(
        self, *, approval: str | None = None, signal: str | None = None, time: str | int | None = None, held: str | None = None
    ) -> Self:
        """Check that the open run waits: for the approval of a step, for a signal, for a time, or for a held step's release.

        `time` is how long from now (`3d`), or a point in time (`2026-01-04T00:00:00Z`); a time limit counts as well.
        """
        if self.state.over:
            self._fail(f"the run waits for nothing: {self._summary()}")
        steps = self.state.steps
        if approval is not None and (approval not in steps or steps[approval].status is not StepStatus.AWAITING_APPROVAL):
            self._fail(f"no approval of step {approval} is awaited")
        if signal is not None and not any(name == signal for name, _ in self.state.listening):
            self._fail(f"signal {signal} is not awaited")
        if held is not None and held not in self.state.held:
            self._fail(f"step {held} is not held")
        if time is not None:
            due = self._instant(time)
            dues = {step.due for step in steps.values() if step.due and not step.settled}
            dues |= {self.state.limit[1]} if self.state.limit else set()
            if due not in dues:
                others = ", ".join(took(each - self.now) for each in sorted(dues))
                self._fail(f"nothing is due in {took(due - self.now)}; due is {others or 'nothing'}")
        return self

    def then_step(self, step: str, *, status: str | None = None, output: Any = ANYTHING, failure: str | None = None) -> Self:
        """Check a step: its status, its output (as in `then_completed`) and the kind of its failure. Raises AssertionError.

        `step` is a path: `ask`, `check[3].ask`, `undo(pay)`, `finally.tidy`. Statuses are those of `StepStatus`.
        """
        found = self._step(step)
        if found is None:
            known = self._run.spec.plan.place(step) is not None
            self._fail(f"step {step} has not begun" if known else f"the workflow has no step {step}", self._paths(), "steps")
        if status is not None and found.status.value != status:
            why = f" ({found.failure.kind}: {short_text(found.failure.message, 100)})" if found.failure else ""
            self._fail(f"step {step} is {found.status.value}, not {status}{why}")
        if failure is not None and (found.failure is None or found.failure.kind != failure):
            self._fail(f"step {step} failed by {found.failure.kind if found.failure else 'nothing'}, not by {failure}")
        return self if output is ANYTHING else self._match(output, self._value(found.output), f"{step}'s output")

    def then_nothing_happened(self) -> Self:
        """Check that nothing followed from the last thing that happened: it was ignored, or came to no decision at all."""
        happened = [effect for effect in self.effects if not isinstance(effect, InputIgnored)]
        if happened:
            self._fail(f"something happened: {', '.join(type(effect).__name__ for effect in happened[:10])}")
        return self

    # --- What it asked for ---

    def then_called(self, tool: str, *, times: int | None = None, arguments: Any = ANYTHING) -> Self:
        """Check that a tool was called, so many times (else at least once), with these arguments (as in `then_completed`)."""
        calls = [call for call in self._run.calls if isinstance(call, ToolCall) and call.request.tool == tool]
        asked = [self._value(call.request.arguments) for call in calls]
        different = [difference(arguments, each, "arguments") for each in asked]
        self._count(f"tool {tool}", different, times, [f"{tool}({call_arguments(c.request.arguments)})" for c in calls])
        return self

    def then_not_called(self, tool: str) -> Self:
        """Check that a tool was never called."""
        return self.then_called(tool, times=0)

    def then_asked_model(self, step: str, *, times: int | None = None, contains: str | Sequence[str] = ()) -> Self:
        """Check that a step (a path, with or without numbers) asked a model, with all these texts in one of its messages."""
        wanted = (contains,) if isinstance(contains, str) else tuple(contains)
        calls = [each for each in self._run.calls if isinstance(each, LlmCall) and _named(each.request.step, step)]
        said = ["\n".join(str(each["content"]) for each in self._value(call.request.messages)) for call in calls]
        missing = [[each for each in wanted if each not in text] for text in said]
        different = [
            f"{call.request.step} was not asked {short(each[0])}" if each else None
            for call, each in zip(calls, missing, strict=True)
        ]
        self._count(
            f"a model for {step}",
            different,
            times,
            [f"{c.request.step}: {short_text(t, 400)}" for c, t in zip(calls, said, strict=True)],
        )
        return self

    def then_started_run(self, workflow: str, *, times: int | None = None, input: Any = ANYTHING) -> Self:  # noqa: A002 - as in `given`
        """Check that another workflow was started, so many times (else at least once), with this input."""
        asked = [(step, self._value(each.input)) for step, each in self._run.asked if each.workflow == workflow]
        different = [difference(input, value, "input") for _, value in asked]
        self._count(f"workflow {workflow}", different, times, [f"{step}: {short(value)}" for step, value in asked])
        return self

    # --- How that is found out ---

    def _count(self, what: str, different: Sequence[str | None], times: int | None, calls: Sequence[str]) -> None:
        right = sum(each is None for each in different)
        if right == times or (times is None and right):
            return
        wrong = next((each for each in different if each), None)
        if times == 0:
            problem = f"{what} was called {right} times, not never"
        elif not calls:
            problem = f"{what} was never called"
        elif times is None or (wrong and not right):
            problem = f"{what} was not called like that: {wrong}"
        else:
            problem = f"{what} was called {right} times{' like that' if wrong else ''}, not {times}"
        self._fail(problem, calls, "calls")

    def _match(self, expected: Any, actual: Json, where: str) -> Self:
        if found := difference(expected, actual, where):
            self._fail(found)
        return self

    def _value(self, text: str | None) -> Json:
        return None if text is None else resolve(text, self._world.script.payloads)

    def _instant(self, time: str | int) -> int:
        with contextlib.suppress(ValueError):
            return self.now + int(milliseconds(time))
        return instant(str(time))

    def _all(self) -> Iterator[Effect]:
        return (effect for decision in self.history for effect in decision.effects)

    def _paths(self) -> list[str]:
        return sorted({step for effect in self._all() if (step := getattr(effect, "step", None))})

    def _summary(self) -> str:
        state = self.state
        since = f"at +{took(self.history[-1].at - self.history[0].at)}" if self.history else ""
        if state.status is RunStatus.COMPLETED:
            return f"completed {since} with {short(self.output, 60)}"
        if state.failure is not None:
            return f"{self.status} {since}: {state.failure.kind}: {short_text(state.failure.message, 100)}"
        lines = waits(state, self.now)
        waiting = f"waits for {short_text(lines[0], 100)}" if lines else "waits for nothing"
        return f"open at +{took(self.now - self.history[0].at)}, {waiting}"

    def _fail(self, problem: str, more: Sequence[str] = (), title: str = "") -> NoReturn:
        raise AssertionError("\n".join([problem, *listed(title, more[:20]), "", self.timeline]))

    def _step(self, path: str) -> StepState | None:
        """Return a step, also one that was forgotten with what it was part of."""
        known = self.state.steps.get(path)
        return known if known is not None else settled(self.history).get(path)


def _named(path: str, step: str) -> bool:
    return path == step or without_numbers(path) == step


def settled(decisions: Sequence[Decision]) -> dict[str, StepState]:
    """Return all steps that settled in a run, by path, also those that its state has forgotten."""
    found: dict[str, StepState] = {}
    signals: dict[str, str] = {}
    copied: Any = {}
    for decision in decisions:
        cause = decision.input
        if isinstance(cause, SignalReceived):
            signals.setdefault(cause.signal_id, cause.payload)
        if decision.seq == 1 and (text := getattr(cause, "copied", None)):
            copied = copied_results(text)
        for effect in decision.effects:
            if (step := _settled(effect, cause, found, signals, copied)) is not None:
                found[getattr(effect, "step", "")] = step
    return found


def _settled(effect: Effect, cause: Any, found: Any, signals: Any, copied: Any) -> StepState | None:
    match effect:
        case StepCompleted(source=str() as source):
            return StepState(StepStatus.COMPLETED, output=found[source].output if source in found else None)
        case StepCompleted():
            answered = cause.output if isinstance(cause, LlmCallCompleted | ToolCallCompleted | ChildRunCompleted) else None
            return StepState(StepStatus.COMPLETED, output=effect.output if effect.output is not None else answered)
        case ChildRunRequested(detached=True):
            return StepState(StepStatus.COMPLETED, output="null")
        case OutputChanged() if isinstance(cause, ChangeOutput):
            return StepState(StepStatus.COMPLETED, output=cause.output)
        case SignalTaken():
            return StepState(StepStatus.COMPLETED, output=signals.get(effect.signal_id))
        case StepSkipped():
            return StepState(StepStatus.SKIPPED)
        case StepFailed():
            return StepState(StepStatus.FAILED, failure=effect.failure)
        case StepCancelled():
            return StepState(StepStatus.CANCELLED, failure=Failure("cancelled", effect.reason))
        case StepCopied() if effect.step in copied:
            status, output, failure = copied[effect.step]
            return StepState(status, output=output, failure=failure)
        case _:
            return None


__all__ = ["Then", "settled"]
