"""A run as people read it: a line for each decision, then what it waits for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from events import commands as c
from events import decisions as d
from events import results as r
from events.calls import LlmCallRequested, ToolCallRequested
from events.failure import Failure
from streams.testing.matching import short
from streams.workflow.expressions import EvaluationError, from_json
from streams.workflow.state import RunState, StepStatus

_MOST_EFFECTS: Final = 5
_MOST_LINES: Final = 60
_FIRST_LINES: Final = 10
_INPUT: Final = 50
_FOLLOWS: Final = 150
_VALUE: Final = 32
"""How long what comes in, what follows, and a value may be."""
_MINUTE: Final = 60_000
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR


def timeline(decisions: Sequence[d.Decision], since: int | None = None) -> list[str]:
    """Return a line for each decision; those from number `since` on (from 0) are marked as the last thing that happened."""
    began = decisions[0].at if decisions else 0
    said = [short_text(input_in_words(each.input), _INPUT) for each in decisions]
    times = [f"+{took(each.at - began)}" for each in decisions]
    wide, long = max(map(len, said), default=0), max(map(len, times), default=0)
    lines = [
        f"{'>' if since is not None and index >= since else ' '}{each.seq:4}  {times[index]:{long}}  "
        f"{said[index]:{wide}}  → {_follows(each)}"
        for index, each in enumerate(decisions)
    ]
    if len(lines) > _MOST_LINES:
        left_out, last = len(lines) - _MOST_LINES, _MOST_LINES - _FIRST_LINES
        lines = [*lines[:_FIRST_LINES], f"      … {left_out} decisions …", *lines[-last:]]
    return lines


def waits(state: RunState, now: int) -> list[str]:
    """Return what an open run waits for, a line each."""
    lines: list[str] = []
    for path, step in sorted(state.steps.items()):
        left = f", {took(step.due - now)} left" if step.due else ""
        match step.status, step.asked:
            case StepStatus.AWAITING_APPROVAL, d.ApprovalRequested() as asked:
                lines.append(f"{path}: an approval by {_who(asked.by)}{left}: {short_text(asked.message, 2 * _VALUE)}")
            case StepStatus.AWAITING_SIGNAL, d.SignalAwaited() as asked:
                lines.append(f"{path}: signal {asked.signal}{_which(asked.correlation)}{left}")
            case StepStatus.SLEEPING, _:
                lines.append(f"{path}: time{left}")
            case StepStatus.WAITING, _:
                lines.append(f"{path}: attempt {step.attempt}{left}")
            case StepStatus.RUNNING, d.ChildRunRequested() as asked:
                lines.append(f"{path}: a run of {asked.workflow}{left}")
            case StepStatus.RUNNING, _:
                lines.append(f"{path}: an answer{left}")
            case StepStatus.HELD, _:
                lines.append(f"{path}: to be resumed{', as the run is paused' if state.paused else ''}")
            case _:
                pass
    if state.limit is not None:
        lines.append(f"the run's time limit, {took(state.limit[1] - now)} left")
    return lines


def input_in_words(said: Any) -> str:
    """Return what came in."""
    return _INPUTS[type(said)](said)


def effects_in_words(effects: Sequence[d.Effect], at: int) -> str:
    """Return what follows from an input at this time; if that is much, the beginning and the end."""
    told = [_EFFECTS[type(effect)](effect, at) for effect in effects]
    if len(told) > _MOST_EFFECTS:
        told = [*told[: _MOST_EFFECTS - 1], f"… {len(told) - _MOST_EFFECTS} more …", told[-1]]
    if sum(map(len, told)) > _FOLLOWS and len(told) > 1:  # the end says most
        return f"{short_text('; '.join(told[:-1]), max(_VALUE, _FOLLOWS - len(told[-1])))}; {told[-1]}"
    return "; ".join(told)


def _follows(decision: d.Decision) -> str:
    """Return what follows from a decision, without what its input says already."""
    answered = d.StepCompleted(getattr(decision.input, "step", ""))
    news = [each for each in decision.effects if each != answered and not isinstance(each, d.UndoPlanned)]
    return effects_in_words(news or decision.effects, decision.at)


def call_arguments(text: str) -> str:
    """Return a tool's arguments as in a call."""
    try:
        given = from_json(text)
    except EvaluationError:
        return _value(text)
    if not isinstance(given, dict):
        return _value(text)
    return short_text(", ".join(f"{key}={short(value, _VALUE)}" for key, value in given.items()), _INPUT)


def took(ms: int) -> str:
    """Return a duration: `0s`, `1.5s`, `2m 3s`, `3d 4h`."""
    if ms < 0:
        return f"-{took(-ms)}"
    if ms < _MINUTE:
        return f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    unit = 1000 if ms < _HOUR else _MINUTE if ms < _DAY else _HOUR  # two units are enough
    ms = (ms + unit // 2) // unit * unit
    parts = ((ms // _DAY, "d"), (ms // _HOUR % 24, "h"), (ms // _MINUTE % 60, "m"), (ms // 1000 % 60, "s"))
    return " ".join(f"{number}{letter}" for number, letter in parts if number)


def short_text(text: str, most: int) -> str:
    """Return a text on one line and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(title: str, lines: Iterable[str]) -> list[str]:
    """Return a title with lines below it; nothing without lines."""
    found = [f"  {line}" for line in lines]
    return [title, *found] if found else []


# --- Inputs and effects in words ---


def _value(text: str) -> str:
    return short_text(text, _VALUE)


def _failure(failure: Failure) -> str:
    return f"{failure.kind}: {short_text(failure.message, 2 * _VALUE)}"


def _by(said: Any) -> str:
    return said.by or "somebody"


def _who(by: Sequence[str]) -> str:
    return " or ".join(by) or "anybody"


def _why(reason: str) -> str:
    return f" ({_value(reason)})" if reason else ""


def _which(correlation: str | None) -> str:
    return f" for {correlation}" if correlation is not None else ""


def _until(due: int | None, at: int) -> str:
    return f", for {took(due - at)} at most" if due else ""


def _attempt(number: int) -> str:
    return f" (attempt {number})" if number > 1 else ""


def _with(value: str | None) -> str:
    return f" with {_value(value)}" if value is not None else ""


def _not_undone(steps: Sequence[str]) -> str:
    return f"; not undone: {', '.join(steps)}" if steps else ""


_INPUTS: Final[Mapping[type[Any], Callable[[Any], str]]] = {
    c.StartRun: lambda i: f"started with {_value(i.input)}",
    r.LlmCallCompleted: lambda i: f"model answered {i.step} {_value(i.output)}",
    r.LlmCallFailed: lambda i: f"model of {i.step} failed: {_failure(i.failure)}",
    r.ToolCallCompleted: lambda i: f"{i.step} returned {_value(i.output)}",
    r.ToolCallFailed: lambda i: f"tool of {i.step} failed: {_failure(i.failure)}",
    r.ChildRunCompleted: lambda i: f"run of {i.step} completed with {_value(i.output)}",
    r.ChildRunFailed: lambda i: f"run of {i.step} failed: {_failure(i.failure)}",
    r.TimerFired: lambda i: f"time is up: {i.step or 'the whole run'}",
    c.SignalReceived: lambda i: f"signal {i.name}{_which(i.correlation)} {_value(i.payload)}",
    c.ApprovalAnswered: lambda i: f"{_by(i)} {'approved' if i.approved else 'rejected'} {i.step}{_with(i.value)}{_why(i.reason)}",
    c.CancelRun: lambda i: f"{_by(i)} cancelled the run{_why(i.reason)}",
    c.CancelStep: lambda i: f"{_by(i)} cancelled {i.step}{_why(i.reason)}",
    c.PauseRun: lambda i: f"{_by(i)} paused the run{_why(i.reason)}",
    c.PauseStep: lambda i: f"{_by(i)} paused {i.step}{_why(i.reason)}",
    c.ResumeRun: lambda i: f"{_by(i)} resumed the run{' by one step' if i.single else ''}",
    c.ResumeStep: lambda i: f"{_by(i)} resumed {i.step}",
    c.ChangeOutput: lambda i: f"{_by(i)} set {i.step} to {_value(i.output)}{_why(i.reason)}",
    d.UnreadableInput: lambda i: f"something unreadable: {_value(i.problem)}",
}

_EFFECTS: Final[Mapping[type[Any], Callable[[Any, int], str]]] = {
    LlmCallRequested: lambda e, _: f"{e.step} asks a model{_attempt(e.attempt)}",
    ToolCallRequested: lambda e, _: f"{e.step} calls {e.tool}({call_arguments(e.arguments)}){_attempt(e.attempt)}",
    d.RetryScheduled: lambda e, at: f"{e.step} is tried again in {took(e.due - at)}",
    d.TimerSet: lambda e, at: f"{e.step or 'the run'} has {took(e.due - at)}",
    d.SignalAwaited: lambda e, at: f"{e.step} waits for signal {e.signal}{_which(e.correlation)}{_until(e.due, at)}",
    d.SignalKept: lambda *_: "kept for a step that will wait for it",
    d.SignalTaken: lambda e, _: f"{e.step} takes it",
    d.ApprovalRequested: lambda e, at: f"{e.step} asks {_who(e.by)}: {_value(e.message)}{_until(e.due, at)}",
    d.ChildRunRequested: lambda e, _: f"{e.step} starts a run of {e.workflow}{_with(e.input)}{_attempt(e.attempt)}",
    d.BlockEntered: lambda e, _: f"{e.step} begins",
    d.MapStarted: lambda e, _: f"{e.step} begins with {e.total} items",
    d.LoopAdvanced: lambda e, _: f"{e.step} goes into [{e.index}]",
    d.StepHeld: lambda e, _: f"{e.step} is held ({e.reason})",
    d.StepCopied: lambda e, _: f"{e.step} copied",
    d.StepCompleted: lambda e, _: f"{e.step} completed{_with(e.output)}",
    d.OutputChanged: lambda e, _: f"{e.step} has the new output",
    d.UndoPlanned: lambda e, _: f"{e.compensation} would undo {e.step}",
    d.CallCancelled: lambda e, _: f"call of {e.step} cancelled",
    d.ChildRunCancelled: lambda e, _: f"run of {e.step} cancelled",
    d.StepCancelled: lambda e, _: f"{e.step} cancelled{_why(e.reason)}",
    d.StepSkipped: lambda e, _: f"{e.step} skipped{_why(e.reason)}",
    d.StepFailed: lambda e, _: f"{e.step} failed: {_failure(e.failure)}{' (tolerated)' if e.tolerated else ''}",
    d.RunCompleted: lambda e, _: f"RUN COMPLETED{_with(e.output)}",
    d.RunFailed: lambda e, _: f"RUN FAILED: {f'{e.step}: ' if e.step else ''}{_failure(e.failure)}{_not_undone(e.not_undone)}",
    d.RunCancelled: lambda e, _: f"RUN CANCELLED by {_by(e)}{_why(e.reason)}{_not_undone(e.not_undone)}",
    d.RunClosing: lambda e, _: f"closing: the run will have {e.outcome}",
    d.RunPaused: lambda *_: "paused",
    d.RunResumed: lambda e, _: "goes on with one step" if e.single else "goes on",
    d.BreakpointSet: lambda e, _: f"stops before {e.step}",
    d.BreakpointCleared: lambda e, _: f"stops before {e.step} no more",
    d.InputIgnored: lambda e, _: f"ignored: {e.reason}",
}

__all__ = ["call_arguments", "effects_in_words", "input_in_words", "listed", "short_text", "timeline", "took", "waits"]
