"""`evolve`: how an accepted decision changes the state of its run. The theory is in state.py."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, assert_never

from immutables import Map

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ChangeOutput, SignalReceived, StartRun
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    BreakpointCleared,
    BreakpointSet,
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    Effect,
    InputIgnored,
    LoopAdvanced,
    MapStarted,
    OutputChanged,
    RetryScheduled,
    RunCancelled,
    RunClosing,
    RunCompleted,
    RunFailed,
    RunPaused,
    RunResumed,
    SignalAwaited,
    SignalKept,
    SignalTaken,
    StepCancelled,
    StepCompleted,
    StepCopied,
    StepFailed,
    StepHeld,
    StepSkipped,
    TimerSet,
    UndoPlanned,
    UnreadableInput,
)
from events.failure import Failure, FailureKind
from events.ids import effect_id
from events.results import ChildRunCompleted, Input, LlmCallCompleted, ToolCallCompleted
from streams.workflow.state import (
    INITIAL,
    MOST_FAILURES,
    MOST_PAST,
    MOST_SEEN,
    OVER,
    RunEvent,
    RunState,
    RunStatus,
    StepState,
    StepStatus,
    children,
    copied_results,
    owner_path,
    undone,
)

_NONE_HELD: Final[Map[str, None]] = Map()


def evolve(state: RunState, event: RunEvent) -> RunState:
    """Return the state after an accepted decision."""
    decision = event.decision
    draft = Draft(state, decision.input, decision.at)
    for index, effect in enumerate(decision.effects):
        draft.apply(effect, event.hash, index)
    return draft.finish(event)


def fold(events: Iterable[RunEvent], state: RunState = INITIAL) -> RunState:
    """Return the state after all these decisions."""
    for event in events:
        state = evolve(state, event)
    return state


class Draft:
    """A state in the making: the one before a decision, moved on effect by effect. Made for speed: one copy for a decision."""

    __slots__ = (
        *("_at", "_before", "_cause", "closing", "copied", "failure", "held", "input", "limit", "listening", "not_undone"),
        *("output", "parent", "paused", "seen", "settled", "signals", "status", "steps", "stops", "undo"),
    )

    def __init__(self, before: RunState, cause: Input | UnreadableInput, at: int) -> None:
        """Begin with the state before a decision on the input `cause` at the broker's time `at`."""
        self._before, self._cause, self._at = before, cause, at
        self.status, self.settled, self.input = before.status, before.settled, before.input
        self.output, self.failure, self.closing, self.not_undone = (
            before.output,
            before.failure,
            before.closing,
            before.not_undone,
        )
        self.limit, self.paused, self.stops, self.held = before.limit, before.paused, before.stops, before.held
        self.listening, self.signals, self.seen = before.listening, before.signals, before.seen
        self.parent, self.copied, self.undo = before.parent, before.copied, before.undo
        self.steps = before.steps.mutate()
        if self.status is RunStatus.NEW and isinstance(cause, StartRun):
            self.status, self.input, self.parent = RunStatus.OPEN, cause.input, cause.parent
            if cause.break_at:
                self.stops = frozenset(cause.break_at)
            if cause.copied:
                self.copied = copied_results(cause.copied)

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.status in OVER

    def apply(self, effect: Effect, decision_hash: bytes, index: int) -> None:  # noqa: C901, PLR0912, PLR0915 - one arm for each effect
        """Move on by effect number `index` of the decision."""
        match effect:
            case LlmCallRequested() | ToolCallRequested():
                self._attempt(effect.step, effect.attempt, effect_id(decision_hash, index), effect.deadline, None)
            case ChildRunRequested():
                self._attempt(effect.step, effect.attempt, effect_id(decision_hash, index), effect.due or 0, effect)
                if effect.detached:
                    self._settle(effect.step, StepStatus.COMPLETED, "null", None)
            case RetryScheduled():
                before = self.steps[effect.step]
                past = (*before.past[1 - MOST_PAST :], before.awaits)
                timer = effect_id(decision_hash, index)
                self._put(
                    effect.step,
                    StepState(
                        *(StepStatus.WAITING, effect.attempt, timer, effect.due, None, effect.failure, past, before.began),
                        shared=before.shared,
                    ),
                )
            case StepCompleted():
                output = effect.output
                if effect.source is not None:
                    output = self.steps[effect.source].output
                elif output is None and isinstance(self._cause, LlmCallCompleted | ToolCallCompleted | ChildRunCompleted):
                    output = self._cause.output
                self._settle(effect.step, StepStatus.COMPLETED, output, None)
            case StepSkipped():
                self._settle(effect.step, StepStatus.SKIPPED, None, None)
            case StepFailed():
                self._settle(effect.step, StepStatus.FAILED, None, effect.failure)
            case StepCancelled():
                self._settle(effect.step, StepStatus.CANCELLED, None, Failure(FailureKind.CANCELLED, effect.reason))
            case StepCopied():
                status, output, failure = (self.copied or {})[effect.step]
                self._settle(effect.step, status, output, failure)
            case OutputChanged():
                assert isinstance(self._cause, ChangeOutput)
                self._settle(effect.step, StepStatus.COMPLETED, self._cause.output, None)
            case TimerSet():
                self._timer(effect.step, effect_id(decision_hash, index), effect.due)
            case SignalAwaited():
                self._put(effect.step, self._waiting(StepStatus.AWAITING_SIGNAL, effect, decision_hash, index))
                key = effect.signal, effect.correlation
                self.listening = self.listening.set(key, (*self.listening.get(key, ()), effect.step))
            case ApprovalRequested():
                self._put(effect.step, self._waiting(StepStatus.AWAITING_APPROVAL, effect, decision_hash, index))
            case SignalKept():
                assert isinstance(self._cause, SignalReceived)
                self.signals = (*self.signals, self._cause)
                self._see(effect.signal_id)
            case SignalTaken():
                self._settle(effect.step, StepStatus.COMPLETED, self._taken(effect.signal_id), None)
            case BlockEntered():
                self._put(effect.step, StepState(StepStatus.ENTERED, began=self._at))
            case MapStarted():
                items = {"total": effect.total, "items": effect.items, "shared": effect.shared}
                self._put(effect.step, StepState(StepStatus.ENTERED, began=self._at, **items))  # type: ignore[arg-type]
            case LoopAdvanced():
                self._advance(effect.step, effect.index)
            case StepHeld():
                held = self.steps.get(effect.step)
                kept = {"past": held.past, "began": held.began, "shared": held.shared} if held else {}
                self._put(effect.step, StepState(StepStatus.HELD, effect.attempt, **kept))  # type: ignore[arg-type]
                self.held = self.held.set(effect.step, None)
            case UndoPlanned():
                self.undo = effect, self.undo
            case RunClosing():
                self.closing = effect
                self.paused, self.stops, self.held, self.signals = False, frozenset(), _NONE_HELD, ()
            case RunPaused():
                self.paused = True
            case RunResumed():
                self.paused = effect.single
            case BreakpointSet():
                self.stops |= {effect.step}
            case BreakpointCleared():
                self.stops -= {effect.step}
            case RunCompleted():
                self.status, self.output = RunStatus.COMPLETED, effect.output
            case RunFailed():
                self.status, self.failure = RunStatus.FAILED, effect.failure
            case RunCancelled():
                self.status, self.failure = RunStatus.CANCELLED, Failure(FailureKind.CANCELLED, effect.reason)
            case InputIgnored() | CallCancelled() | ChildRunCancelled():
                pass
            case _:
                assert_never(effect)

    # --- Steps under way ---

    def _put(self, path: str, step: StepState) -> None:
        """Set a step that is not settled; one that is new is made known to the step that it is part of."""
        if self.held and step.status is not StepStatus.HELD and path in self.held:
            self.held = self.held.delete(path)
        if path not in self.steps and (owner := owner_path(path)) is not None:
            around = self.steps[owner]
            if path[-1] == "]":
                number = int(path[path.rindex("[") + 1 : -1])
                self.steps[owner] = replace(around, next=max(around.next, number + 1))
            else:
                self.steps[owner] = replace(around, inner=(*around.inner, path[len(owner) + 1 :]))
        self.steps[path] = step

    def _attempt(self, path: str, number: int, call: str, due: int, asked: ChildRunRequested | None) -> None:
        before = self.steps.get(path)
        past, began, shared = (
            ((*before.past[1 - MOST_PAST :], before.awaits), before.began, before.shared) if before else ((), 0, None)
        )
        if number == 1 and undone(path) is not None and self.undo is not None:
            planned, self.undo = self.undo
            shared = planned.arguments
        self._put(
            path, StepState(StepStatus.RUNNING, number, call, due, None, None, past, began or self._at, asked, shared=shared)
        )

    def _waiting(
        self, status: StepStatus, effect: SignalAwaited | ApprovalRequested, decision_hash: bytes, index: int
    ) -> StepState:
        return StepState(status, 0, effect_id(decision_hash, index), effect.due or 0, began=self._at, asked=effect)

    def _timer(self, path: str, timer: str, due: int) -> None:
        if not path:
            self.limit = timer, due
        elif (before := self.steps.get(path)) is not None and before.status is StepStatus.ENTERED:
            self.steps[path] = replace(before, awaits=timer, due=due)
        else:
            self._put(path, StepState(StepStatus.SLEEPING, 0, timer, due, began=self._at))

    def _advance(self, path: str, index: int) -> None:
        """Go into a loop's next iteration: the one before is its output so far, and is forgotten."""
        if index == 0:
            self._put(path, StepState(StepStatus.ENTERED, began=self._at))
            return
        last = f"{path}[{index - 1}]"
        output = self.steps[last].output
        self._forget(last)
        del self.steps[last]
        self.steps[path] = replace(self.steps[path], output=output)

    # --- Steps that are settled ---

    def _settle(self, path: str, status: StepStatus, output: str | None, failure: Failure | None) -> None:
        before = self.steps.get(path)
        if before is None:
            step = StepState(status, 0, "", 0, output, failure)
            self._put(path, step)
        else:
            if before.status is StepStatus.AWAITING_SIGNAL and isinstance(before.asked, SignalAwaited):
                self._unlisten(before.asked, path)
            if before.inner or before.next:
                self._forget(path)
            step = StepState(
                *(status, before.attempt, before.awaits, 0, output, failure, before.past, before.began),
                failed=before.failed,
                failures=before.failures,
            )
            self._put(path, step)
            if before.settled:
                return
        if status is not StepStatus.COMPLETED and (step_left := undone(path)) is not None:
            self.not_undone = (*self.not_undone, step_left)
        owner = owner_path(path)
        if owner is None:
            self.settled += path[-1] != ")"  # what undoes a step is no step of the workflow
            return
        around = self.steps[owner]
        failed = status in (StepStatus.FAILED, StepStatus.CANCELLED)
        failures = around.failures
        if failed and failure and path[-1] == "]" and len(failures) < MOST_FAILURES:
            failures = (*failures, (int(path[path.rindex("[") + 1 : -1]), failure))
        self.steps[owner] = replace(around, done=around.done + 1, failed=around.failed + failed, failures=failures)

    def _forget(self, path: str) -> None:
        """Forget the steps, items and iterations of a step."""
        for child in children(self.steps, path):
            self._forget(child)
            step = self.steps[child]
            if step.status is StepStatus.AWAITING_SIGNAL and isinstance(step.asked, SignalAwaited):
                self._unlisten(step.asked, child)
            if self.held and child in self.held:
                self.held = self.held.delete(child)
            del self.steps[child]

    def _unlisten(self, asked: SignalAwaited, path: str) -> None:
        key = asked.signal, asked.correlation
        left = tuple(each for each in self.listening.get(key, ()) if each != path)
        self.listening = self.listening.set(key, left) if left else self.listening.delete(key)

    # --- Signals ---

    def _see(self, signal_id: str) -> None:
        self.seen = (*self.seen[1 - MOST_SEEN :], signal_id)

    def _taken(self, signal_id: str) -> str:
        """Return the payload of a signal that a step takes, and keep it no longer."""
        if isinstance(self._cause, SignalReceived) and self._cause.signal_id == signal_id and signal_id not in self.seen:
            self._see(signal_id)
            return self._cause.payload
        kept = next(each for each in self.signals if each.signal_id == signal_id)
        self.signals = tuple(each for each in self.signals if each is not kept)
        return kept.payload

    def finish(self, event: RunEvent) -> RunState:
        """Return the state after the decision."""
        before, decision, cause = self._before, event.decision, self._cause
        workflow, digest = before.workflow, before.digest
        if before.status is RunStatus.NEW and isinstance(cause, StartRun):
            workflow, digest = cause.workflow, cause.digest
        heard, said = before.heard, decision.said
        if said is not None and said.offset > heard.get((said.topic_id, said.partition), -1):
            heard = heard.set((said.topic_id, said.partition), said.offset)
        return RunState(
            self.status,
            workflow,
            digest,
            self.input,
            self.steps.finish(),
            self.settled,
            self.output,
            self.failure,
            decision.seq,
            event.hash,
            decision.input_topic_id,
            decision.input_offset,
            self.parent,
            self.limit,
            self.paused,
            self.stops,
            self.held,
            self.listening,
            self.signals,
            self.seen,
            self.copied,
            self.undo,
            self.closing,
            self.not_undone,
            heard,
        )
