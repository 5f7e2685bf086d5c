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
from dataclasses import dataclass, replace
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
    if state.status is RunStatus.NEW:
        state = started(state, decision.input)
    for index, effect in enumerate(decision.effects):
        state = apply(state, effect, decision.input, event.hash, index)
    return replace(
        state, seq=decision.seq, head=event.hash, last_topic_id=decision.input_topic_id, last_offset=decision.input_offset
    )


def fold(events: Iterable[RunEvent], state: RunState = INITIAL) -> RunState:
    """Return the state after all these decisions."""
    for event in events:
        state = evolve(state, event)
    return state


def apply(state: RunState, effect: Effect, cause: Input | UnreadableInput, decision_hash: bytes, index: int) -> RunState:
    """Return the state after one effect of a decision on the input `cause`."""
    match effect:
        case LlmCallRequested() | ToolCallRequested():
            before = state.steps.get(effect.step)
            past = (*before.past, before.awaits) if before else ()
            call = effect_id(decision_hash, index)
            return _with(state, effect.step, StepState(StepStatus.RUNNING, effect.attempt, call, effect.deadline, past=past))
        case RetryScheduled():
            before = state.steps[effect.step]
            timer = effect_id(decision_hash, index)
            waiting = StepState(
                StepStatus.WAITING, effect.attempt, timer, effect.due, failure=effect.failure, past=(*before.past, before.awaits)
            )
            return _with(state, effect.step, waiting)
        case StepCompleted():
            output = effect.output
            if output is None and isinstance(cause, LlmCallCompleted | ToolCallCompleted):
                output = cause.output
            return _settled(state, effect.step, StepStatus.COMPLETED, output=output)
        case StepSkipped():
            return _settled(state, effect.step, StepStatus.SKIPPED)
        case StepFailed():
            return _settled(state, effect.step, StepStatus.FAILED, failure=effect.failure)
        case RunCompleted():
            return replace(state, status=RunStatus.COMPLETED, output=effect.output)
        case RunFailed():
            return replace(state, status=RunStatus.FAILED, failure=effect.failure)
        case InputIgnored():
            return state
        case _:
            assert_never(effect)


def started(state: RunState, cause: Input | UnreadableInput) -> RunState:
    """Return the state of a run that begins with this input."""
    if isinstance(cause, StartRun):
        return replace(state, status=RunStatus.OPEN, workflow=cause.workflow, digest=cause.digest, input=cause.input)
    return state


def _settled(
    state: RunState, step: str, status: StepStatus, *, output: str | None = None, failure: Failure | None = None
) -> RunState:
    before = state.steps.get(step)
    if before is None:
        after = StepState(status, output=output, failure=failure)
    else:
        after = StepState(status, before.attempt, before.awaits, 0, output, failure, before.past)
    return replace(_with(state, step, after), settled=state.settled + 1)


def _with(state: RunState, step: str, after: StepState) -> RunState:
    return replace(state, steps=state.steps.set(step, after))
