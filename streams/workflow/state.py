"""The state of a run, and how accepted decisions change it.

Theory. A run begins with the decision on a StartRun and is open until a decision says RunCompleted or RunFailed. In between each
step goes its own way:

    (unknown) ──requested──▶ RUNNING ──answer──▶ COMPLETED
        │                    │    ▲ └─failure for good─▶ FAILED
        │                 failure │
        │                    ▼    │ timer
        ├──condition not met──▶ SKIPPED      WAITING (for the next attempt)
        └──transform──▶ COMPLETED

A step is settled when it is COMPLETED, SKIPPED or FAILED; a step is ready when all that it needs is settled. What moves a step is
always an effect in a decision; an input alone changes nothing. A RUNNING step waits for the answer to one certain call, a WAITING
step for one certain timer; both are named by the id that derives from their decision's hash, so the answer to a call of a
decision that nobody accepted finds no step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, assert_never

from immutables import Map

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import (
    Decision,
    Effect,
    InputIgnored,
    RetryScheduled,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepFailed,
    StepSkipped,
    UnreadableInput,
)
from events.failure import Failure
from events.ids import FIRST_PREV, effect_id
from events.results import Input, LlmCallCompleted, ToolCallCompleted


class RunStatus(Enum):
    """Where a run is."""

    NEW = auto()
    OPEN = auto()
    COMPLETED = auto()
    FAILED = auto()


class StepStatus(Enum):
    """Where a step is; one that isn't ready has no status."""

    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"


UNSETTLED: Final = (StepStatus.RUNNING, StepStatus.WAITING)


@dataclass(frozen=True, slots=True)
class StepState:
    """One step. `awaits`: id of the call or timer; `due`: when that timer or time limit is up, milliseconds since the epoch.

    `output` is JSON; `past` holds the ids of earlier attempts.
    """

    status: StepStatus
    attempt: int = 0
    awaits: str = ""
    due: int = 0
    output: str | None = None
    failure: Failure | None = None
    past: tuple[str, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether steps that need this one may go on."""
        return self.status not in UNSETTLED


_NO_STEPS: Final[Map[str, StepState]] = Map()


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run's decisions amount to. `head` is the hash of the last one; `input` and `output` are JSON."""

    status: RunStatus = RunStatus.NEW
    workflow: str = ""
    digest: str = ""
    input: str = "null"
    steps: Map[str, StepState] = _NO_STEPS
    settled: int = 0
    output: str | None = None
    failure: Failure | None = None
    seq: int = 0
    head: bytes = FIRST_PREV
    last_topic_id: bytes = b""
    last_offset: int = -1

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.status in (RunStatus.COMPLETED, RunStatus.FAILED)


INITIAL: Final = RunState()


@dataclass(frozen=True, slots=True)
class RunEvent:
    """A decision that its run's chain accepts, with its hash."""

    decision: Decision
    hash: bytes


def evolve(state: RunState, event: RunEvent) -> RunState:
    """Return the state after an accepted decision."""
    decision = event.decision
    draft = Draft(state, decision.input)
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

    __slots__ = ("_before", "_cause", "failure", "input", "output", "settled", "status", "steps")

    def __init__(self, before: RunState, cause: Input | UnreadableInput) -> None:
        """Begin with the state before a decision on the input `cause`."""
        self._before, self._cause = before, cause
        self.status, self.settled, self.input = before.status, before.settled, before.input
        self.output, self.failure = before.output, before.failure
        self.steps = before.steps.mutate()
        if self.status is RunStatus.NEW and isinstance(cause, StartRun):
            self.status, self.input = RunStatus.OPEN, cause.input

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.status in (RunStatus.COMPLETED, RunStatus.FAILED)

    def apply(self, effect: Effect, decision_hash: bytes, index: int) -> None:
        """Move on by effect number `index` of the decision."""
        match effect:
            case LlmCallRequested() | ToolCallRequested():
                before = self.steps.get(effect.step)
                past = (*before.past, before.awaits) if before else ()
                call = effect_id(decision_hash, index)
                self.steps[effect.step] = StepState(StepStatus.RUNNING, effect.attempt, call, effect.deadline, past=past)
            case RetryScheduled():
                before = self.steps[effect.step]
                timer, past = effect_id(decision_hash, index), (*before.past, before.awaits)
                self.steps[effect.step] = StepState(
                    StepStatus.WAITING, effect.attempt, timer, effect.due, failure=effect.failure, past=past
                )
            case StepCompleted():
                output = effect.output
                if output is None and isinstance(self._cause, LlmCallCompleted | ToolCallCompleted):
                    output = self._cause.output
                self._settle(effect.step, StepStatus.COMPLETED, output, None)
            case StepSkipped():
                self._settle(effect.step, StepStatus.SKIPPED, None, None)
            case StepFailed():
                self._settle(effect.step, StepStatus.FAILED, None, effect.failure)
            case RunCompleted():
                self.status, self.output = RunStatus.COMPLETED, effect.output
            case RunFailed():
                self.status, self.failure = RunStatus.FAILED, effect.failure
            case InputIgnored():
                pass
            case _:
                assert_never(effect)

    def _settle(self, step: str, status: StepStatus, output: str | None, failure: Failure | None) -> None:
        before = self.steps.get(step)
        attempt, awaits, past = (before.attempt, before.awaits, before.past) if before else (0, "", ())
        self.steps[step] = StepState(status, attempt, awaits, 0, output, failure, past)
        self.settled += 1

    def finish(self, event: RunEvent) -> RunState:
        """Return the state after the decision."""
        before, decision, cause = self._before, event.decision, self._cause
        workflow, digest = before.workflow, before.digest
        if before.status is RunStatus.NEW and isinstance(cause, StartRun):
            workflow, digest = cause.workflow, cause.digest
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
        )
