"""What an audit report says in words, for somebody who knows nothing of the system."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import PurePath
from typing import Any, Final, assert_never

from events.as_json import payload
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    Command,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    SignalReceived,
)
from projections.audit_document import AuditedRun, Content, Integrity, Report
from projections.picture import took
from projections.picture_cards import money

_DID: Final = {
    "llm": "asked a language model",
    "tool": "called a tool",
    "run": "started another run",
    "transform": "computed from what was known",
    "approval": "asked a person",
    "wait_for": "waited for a signal",
    "sleep": "waited for a time",
    "steps": "a group of steps",
    "for_each": "once for each item of a list",
    "repeat": "again and again, until it was good",
}
ENDED: Final = {
    "completed": "completed",
    "failed": "failed",
    "cancelled": "was cancelled",
    "running": "is not over yet",
    "paused": "is paused",
    "closing": "is ending: what was done is being undone and cleaned up",
}
"""What became of a run, in words."""
STATUSES: Final = {
    "completed": "done",
    "skipped": "skipped",
    "failed": "failed",
    "cancelled": "cancelled",
    "abandoned": "given up",
    "pending": "not begun",
    "running": "under way",
    "waiting": "waits for its next attempt",
    "awaiting_approval": "waits for a person",
    "awaiting_signal": "waits for a signal",
    "sleeping": "waits for a time",
    "entered": "under way",
    "held": "held",
    "approved": "approved",
    "rejected": "rejected",
    "expired": "not answered in time",
    "replaced": "replaced: somebody set the result",
    "timed_out": "no answer in time",
    "stray": "of a decision that lost",
    "paused": "paused",
    "closing": "ending",
}
"""How things are, in words."""
_GIST: Final = 300
_PART: Final = 120
_NAMED: Final = 5


def did(kind: str | None) -> str:
    """Return what a step of this kind is for."""
    return _DID.get(kind or "", "not done")


def said(command: Command) -> str:
    """Return what somebody did by a command."""
    match command:
        case SignalReceived():
            return f"sent the signal “{command.name}”" + (f" for {command.correlation}" if command.correlation else "")
        case ApprovalAnswered():
            changed = " with a changed value" if command.value is not None else ""
            return f"{'approved' if command.approved else 'rejected'} what step “{command.step}” showed{changed}"
        case CancelRun():
            return "cancelled the run" + (" at once, without undoing or cleaning up" if command.force else "")
        case CancelStep():
            return f"cancelled step “{command.step}”"
        case PauseRun():
            return "paused the run"
        case PauseStep():
            return f"had the run stop before step “{command.step}”"
        case ResumeRun():
            return "let the run go on" + (", up to the next step" if command.single else "")
        case ResumeStep():
            return f"let step “{command.step}” go on"
        case ChangeOutput():
            return f"set the output of step “{command.step}” by hand"
        case _:
            assert_never(command)


def remarks(step: Mapping[str, Any]) -> list[str]:
    """Return what is special about a step. `step`: its row of `steps`."""
    failure = ": ".join(filter(None, (step["failure_kind"], step["failure_message"])))
    child = f"it started run {step['child_run_id']}" if step["child_run_id"] else ""
    parts = (
        f"skipped, because this did not hold: {step['reason']}" if step["status"] == "skipped" and step["reason"] else "",
        step["reason"] if step["status"] != "skipped" else "",
        f"{failure}; the run went on without it" if failure and step["tolerated"] else failure,
        child + (", and did not wait for it" if child and step["detached"] else ""),
        f"took the signal “{step['signal']}”" if step["signal"] and step["status"] == "completed" else "",
        "not done in this run: its result was taken over from the run that this one was forked from" if step["copied"] else "",
        "its result was set by a person, not by the step itself" if step["changed"] else "",
        f"its result is that of {step['source']}" if step["source"] else "",
        f"“{step['compensation']}” undoes it, should that be needed" if step["compensation"] else "",
        f"{step['done']:,} of {step['total']:,} items done, {step['failed']:,} failed" if step["total"] is not None else "",
    )
    return [part for part in parts if part]


def moment(at: datetime) -> str:
    """Return a time as people write it."""
    return f"{at:%-d %B %Y, %H:%M:%S} UTC"


def gist(found: Content, run_id: str) -> str:
    """Return a value in a line: a text as it is, an object as its parts, sentences first; of the run's own files the names."""
    value = payload(found.text) if found.kind == "json" else found.text
    if isinstance(value, dict):
        parts = {key: _part(each, run_id) for key, each in value.items() if each is not None}
        value = "; ".join(f"{key}: {parts[key]}" for key in sorted(parts, key=lambda key: not _is_prose(value[key])))
    elif not isinstance(value, str):
        value = _part(value, run_id)
    line = " ".join(value.split())
    return line if len(line) <= _GIST else f"{line[:_GIST]}…"


def _closed(sentence: str) -> str:
    """Return a sentence with its full stop, which the words of others may have brought."""
    return sentence if sentence.endswith((".", "!", "?", "…")) else f"{sentence}."


def _is_prose(value: Any) -> bool:
    return isinstance(value, str) and " " in value


def _part(value: Any, run_id: str) -> str:
    if isinstance(value, dict):
        return f"{len(value)} parts"
    if isinstance(value, list):
        short = all(isinstance(each, str | int | float) for each in value) and len(str(value)) <= _PART
        return ", ".join(map(str, value)) if short else f"{len(value):,} entries"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and f"/{run_id}/" in value and "\n" not in value:
        return f"the file {PurePath(value).name}"
    text = "nothing" if value is None else f"“{value}”" if isinstance(value, str) else str(value)
    return text if len(text) <= _PART else f"{text[:_PART]}…”"


# --- All of it in a few sentences ---


def summary(report: Report) -> list[str]:
    """Return the report in a few sentences: who asked what, how it ended, what came out, who decided, cost, integrity."""
    return [
        " ".join((_asked(report.run), *_ended(report))),
        " ".join((*_people(report), *_calls(report), _cost(report))),
        record(report.integrity),
    ]


def _asked(run: AuditedRun) -> str:
    of = f"run of the workflow “{run.workflow}” (version {run.digest[:12]})"
    who, how = "somebody", f" in request {run.request_id}" if run.request_id else ""
    if run.parent is not None:
        who, how = f"step “{run.parent.step}” of run {run.parent.run_id}", ""
    elif run.origin is not None:
        how = f" as a fork of run {run.origin.run_id}, as that one's decision {run.origin.seq} had left it"
    return f"On {moment(run.started)}, {who} started this {of}{how}. It was asked: {gist(run.asked, run.run_id)}."


def _ended(report: Report) -> Iterator[str]:
    run = report.run
    after = f" after {took(run.took_ms)}" if run.took_ms is not None else ""
    by = f" by {run.cancelled_by}" if run.cancelled_by else ""
    told = ", ".join(f"{count:,} {STATUSES.get(status, status)}" for status, count in report.statuses.items())
    yield f"It {ENDED.get(run.status, run.status)}{by}{after}. Of its {sum(report.statuses.values()):,} steps: {told}."
    if run.status == "completed" and "failed" in report.statuses:
        yield "It was made to go on without those that failed."
    if run.failure_message is not None and run.failure_kind != "cancelled":
        at = f" at step “{run.failure_step}”" if run.failure_step else ""
        yield _closed(f"The reason{at}: {run.failure_message}")
    elif run.failure_message:
        yield f"The reason given: “{run.failure_message}”."
    if run.not_undone:
        yield f"Not undone, although that was planned: {', '.join(run.not_undone)}."
    if run.answer is not None:
        yield _closed(f"What came out: {gist(run.answer, run.run_id)}")


def _people(report: Report) -> Iterator[str]:
    approvals, words = report.approvals, report.words
    answered = {"approved", "rejected"}
    for asked in approvals.entries[:_NAMED]:
        if asked.status in answered and asked.answered_by:
            changed = ", and changed it" if asked.answer is not None else ""
            reason = f" (“{asked.words}”)" if asked.words else ""
            yield f"{asked.answered_by} {asked.status} what step “{asked.step}” showed{changed}{reason}."
        elif asked.status in answered:
            yield f"Nobody answered step “{asked.step}” in time, so it was {asked.status} by rule."
        elif asked.status == "waiting":
            yield f"Step “{asked.step}” still waits for a person."
    if approvals.total > _NAMED:
        yield f"People were asked {approvals.total - _NAMED:,} more times."
    told = ("ApprovalAnswered", "SignalReceived", *(("CancelRun",) if report.run.cancelled_by is not None else ()))
    others = [each for each in words.entries if each.kind not in told and each.ignored is None]
    for each in others[:_NAMED]:
        yield f"{each.by or 'Somebody'} {each.did}{f' (“{each.words}”)' if each.words else ''}."
    if not approvals.total and not words.total:
        yield "No person was asked, and nobody intervened."


def _calls(report: Report) -> Iterator[str]:
    for calls, what, names in (
        (report.model_calls, "language models", dict.fromkeys(each.model or each.asked for each in report.model_calls.entries)),
        (report.tool_calls, "tools", dict.fromkeys(each.tool for each in report.tool_calls.entries)),
    ):
        known = [name for name in names if name]
        listed = f" ({', '.join(known[:_NAMED])}{' …' if len(known) > _NAMED else ''})" if known else ""
        count = f"{calls.total:,} call{'s' if calls.total != 1 else ''}" if calls.total else "no calls"
        lost = sum(each.outcome != "completed" for each in calls.entries)
        failed = f", {lost:,} of which did not succeed" if lost else ""
        yield f"It made {count} to {what}{listed}{failed}."


def _cost(report: Report) -> str:
    total = report.cost.total
    tokens = total.input_tokens + total.output_tokens
    unknown = f", without {total.unpriced_calls:,} calls whose price is not known" if total.unpriced_calls else ""
    started = ", with the runs that it started" if report.run.children.total else ""
    return f"The recorded cost is {money(total.cost_usd)} for {tokens:,} tokens{started}{unknown}."


def record(found: Integrity) -> str:
    """Return what came of checking the record, in a sentence."""
    again = f"{found.again:,} of its" if found.again < found.decisions else "all"
    match found.verdict:
        case "intact":
            return (
                f"The record is intact: its chain of hashes is whole, and {again} {found.decisions:,} decisions, made again from "
                "what came in, came out the same to the byte."
            )
        case "partly":
            return f"Nothing wrong was found in the record, but not all of it could be checked: {'; '.join(found.unchecked)}."
        case "damaged":
            first = found.problems[0]
            return f"The record is not intact: {first.problem}. Probable cause: {first.cause}. Do not rely on what follows it."
        case _:
            assert_never(found.verdict)
