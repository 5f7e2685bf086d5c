"""What a run waits for, and what came of something that was said to it, in words that a person understands. Pure."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from events.as_json import as_json
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ApprovalAnswered, Command, SignalReceived
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    BreakpointCleared,
    BreakpointSet,
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    DeadLetter,
    Decision,
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
)
from infra.cli.terminal import clock
from streams.workflow.state import RunState, StepStatus

Status = Literal["taken", "kept", "ignored", "refused", "over", "timeout"]
_MOST: Final = 8
"""How many effects, or things waited for, are told; the rest is counted."""

WORDS: Final[Mapping[type[Any], Callable[[Any], str]]] = {
    LlmCallRequested: lambda e: f"step `{e.step}` asks a model",
    ToolCallRequested: lambda e: f"step `{e.step}` calls `{e.tool}`",
    ChildRunRequested: lambda e: f"step `{e.step}` starts a run of `{e.workflow}`",
    RetryScheduled: lambda e: f"step `{e.step}` failed ({e.failure.kind}) and is tried again at {clock(e.due)}",
    TimerSet: lambda e: f"step `{e.step}` waits until {clock(e.due)}" if e.step else f"the run's time is up at {clock(e.due)}",
    SignalAwaited: lambda e: f"step `{e.step}` waits for the signal `{e.signal}`",
    SignalKept: lambda _: "no step waits for it yet, so it is kept for one that will",
    SignalTaken: lambda e: f"step `{e.step}` takes the signal",
    ApprovalRequested: lambda e: f"step `{e.step}` waits for an approval",
    BlockEntered: lambda e: f"step `{e.step}` begins",
    MapStarted: lambda e: f"step `{e.step}` begins with {e.total} items",
    LoopAdvanced: lambda e: f"step `{e.step}` begins iteration {e.index}",
    StepHeld: lambda e: f"step `{e.step}` is held ({e.reason})",
    StepCopied: lambda e: f"step `{e.step}` has the result of the other run",
    StepCompleted: lambda e: f"step `{e.step}` completed",
    StepSkipped: lambda e: f"step `{e.step}` is skipped",
    StepFailed: lambda e: f"step `{e.step}` failed: {e.failure.kind}: {e.failure.message}",
    StepCancelled: lambda e: f"step `{e.step}` is cancelled",
    OutputChanged: lambda e: f"step `{e.step}` has the new output",
    UndoPlanned: lambda e: f"should the run fail, `{e.compensation}` undoes step `{e.step}`",
    CallCancelled: lambda e: f"the call of step `{e.step}` is cancelled",
    ChildRunCancelled: lambda e: f"the run that step `{e.step}` waits for is cancelled",
    RunClosing: lambda e: f"what is to be undone and cleaned up comes next, then the run is {e.outcome}",
    RunCompleted: lambda _: "the run is completed",
    RunFailed: lambda e: f"the run failed: {e.failure.kind}: {e.failure.message}",
    RunCancelled: lambda _: "the run is cancelled",
    RunPaused: lambda _: "the run starts nothing more; what is under way goes on",
    RunResumed: lambda e: "the run goes on with one step, and holds what comes next" if e.single else "the run goes on",
    BreakpointSet: lambda e: f"the run stops before step `{e.step}`",
    BreakpointCleared: lambda e: f"the run stops before step `{e.step}` no more",
    InputIgnored: lambda e: f"nothing: {e.reason}",
}
"""Each effect in words."""

REASONS: Final[Mapping[str, str]] = {
    "already_paused": "it is paused already",
    "closing": "the run is coming to its end: it only undoes and cleans up",
    "duplicate": "the run has had this signal already: the same id counts once",
    "late": "that step is settled already",
    "not_editable": "what this step shows can't be changed, only approved or rejected as it is",
    "not_json_or_too_large": "the payload is no JSON, or too large",
    "not_paused": "nothing is held there",
    "not_started": "that step has not begun",
    "nothing_to_approve": "that step asks for no approval now",
    "over": "the run is over",
    "too_many_signals": "the run keeps too many signals already that no step has taken",
    "unchanged": "that is the step's output already",
    "unknown_run": "there is no such run",
    "unknown_step": "the workflow has no such step",
}
"""Why an input was ignored, or a message refused."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a command. `reason`: a word for programs, if nothing did; `text`: the whole for people."""

    status: Status
    text: str
    reason: str | None = None
    decision: Decision | None = None

    @property
    def effective(self) -> bool:
        """Whether something follows from it."""
        return self.status in ("taken", "kept")

    def as_json(self, run_id: str, command: Command) -> dict[str, Any]:
        """Return it for programs."""
        effects = [as_json(effect) for effect in self.decision.effects] if self.decision else []
        seq = self.decision.seq if self.decision else None
        found = {"run_id": run_id, "command": as_json(command), "outcome": self.status, "reason": self.reason}
        return found | {"text": self.text, "seq": seq, "effects": effects}


def decided(decision: Decision, before: RunState) -> Outcome:
    """Return what a run's decision on a command says; `before`: the run as it was then."""
    for effect in decision.effects:
        if isinstance(effect, InputIgnored):
            return Outcome("ignored", f"Ignored: {_why(effect.reason, decision.input, before)}.", effect.reason, decision)
        if isinstance(effect, SignalKept):
            return Outcome("kept", f"Kept: {in_words(decision.effects)}.", None, decision)
    return Outcome("taken", f"Done: {in_words(decision.effects)}.", None, decision)


def refused(letter: DeadLetter) -> Outcome:
    """Return what a dead letter says about a command."""
    return Outcome("refused", f"Refused: {REASONS.get(letter.reason, letter.reason)}: {letter.detail}", letter.reason)


def over(state: RunState) -> Outcome:
    """Return what to say of a command for a run that is over."""
    return Outcome("over", f"Ignored: the run is over: it is {state.status.name.lower()}.", "over")


def unanswered(waited: str) -> Outcome:
    """Return what to say when no decision came."""
    hint = "are intake and orchestrator running (`foldflow status`)? What was said is on the topic, and counts when they do"
    return Outcome("timeout", f"Sent, but not decided on within {waited}: {hint}.", "timeout")


def in_words(effects: tuple[Effect, ...]) -> str:
    """Return what follows from an input, in words."""
    told = [WORDS[type(effect)](effect) for effect in effects]
    return "; ".join(told[:_MOST]) + (f"; and {len(told) - _MOST} effects more" if len(told) > _MOST else "")


def _why(reason: str, said: Any, before: RunState) -> str:
    if reason == "not_allowed" and isinstance(said, ApprovalAnswered):
        asked = approvals(before).get(said.step)
        may = ", ".join(asked.by) if asked else "others"
        return f"`{said.by}` may not answer this, only {may} may"
    if reason == "duplicate" and not isinstance(said, SignalReceived):
        return "the run has had this already"
    return REASONS.get(reason, reason)


# --- What a run waits for ---


def approvals(state: RunState) -> dict[str, ApprovalRequested]:
    """Return the approvals that a run waits for, by step."""
    found = {}
    for path, step in state.steps.items():
        if step.status is StepStatus.AWAITING_APPROVAL and isinstance(step.asked, ApprovalRequested):
            found[path] = step.asked
    return dict(sorted(found.items()))


def signals(state: RunState) -> dict[str, SignalAwaited]:
    """Return the signals that a run waits for, by step."""
    found = {}
    for path, step in state.steps.items():
        if step.status is StepStatus.AWAITING_SIGNAL and isinstance(step.asked, SignalAwaited):
            found[path] = step.asked
    return dict(sorted(found.items()))


def waiting(state: RunState, run_id: str) -> list[str]:
    """Return what a run waits for that somebody must do, each with the command that does it."""
    if state.over:
        return []
    lines = list[str]()
    for path, asked in approvals(state).items():
        who = f" by {' or '.join(asked.by)}" if asked.by else ""
        question = asked.message.strip().replace("\n", " ")[:200]
        lines.append(f"step `{path}` waits for an approval{who} ({question}): foldflow approve {run_id} {shlex.quote(path)}")
    for path, awaited in signals(state).items():
        which = f" --correlation {shlex.quote(awaited.correlation)}" if awaited.correlation is not None else ""
        until = f" until {clock(awaited.due)}" if awaited.due else ""
        name = shlex.quote(awaited.signal)
        lines.append(f"step `{path}` waits for a signal{until}: foldflow signal {run_id} {name}{which} --payload JSON")
    if state.paused:
        lines.append(f"the run is paused: foldflow resume {run_id}")
    else:
        lines += [f"step `{path}` is held: foldflow resume {run_id} {shlex.quote(path)}" for path in sorted(state.held)]
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"… and {len(lines) - _MOST:,} more: foldflow show {run_id}"]


def shown(value: Any) -> str:
    """Return a JSON value as people read it."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
