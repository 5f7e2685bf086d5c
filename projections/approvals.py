"""The read model `approvals`: what people were asked, what they were shown, and what came of it."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from events.commands import ApprovalAnswered, CancelStep, ChangeOutput
from events.decisions import ApprovalRequested, Effect, OutputChanged, StepCancelled, StepCompleted, StepFailed
from events.failure import FailureKind
from events.results import TimerFired
from projections.entry import Entry
from projections.extent import Extent, in_extent
from projections.table import Connection, Table, rows


class Status(StrEnum):
    """Where an approval is."""

    WAITING = "waiting"
    APPROVED = "approved"
    REJECTED = "rejected"
    EXPIRED = "expired"
    """Nobody answered in time."""
    REPLACED = "replaced"
    """Somebody set the step's output instead."""
    CANCELLED = "cancelled"
    """The step, or the run, was cancelled or failed before anybody answered."""


@dataclass(slots=True)
class ApprovalRow:
    """One approval that a step asked for. `value` is what was shown, `answer` what somebody made of it, if they did; both JSON.

    `may_answer`: who may (a JSON list; empty: anybody), `editable`: they may change the value, `due`: how long it waits.
    `answered_by` is empty when nobody did: it was approved or rejected because its time was over (`reason` is `deadline` then).
    """

    run_id: str
    step: str
    partition: int
    offset: int
    requested: int
    message: str | None = None
    value: str | None = None
    may_answer: str = "[]"
    editable: bool = False
    due: int | None = None
    status: str = Status.WAITING
    answered: int | None = None
    answered_by: str | None = None
    reason: str | None = None
    edited: bool = False
    answer: str | None = None


TABLE: Final = Table(
    "approvals",
    {
        "run_id": "VARCHAR",
        "step": "VARCHAR",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "requested": "TIMESTAMP_MS",
        "message": "VARCHAR",
        "value": "VARCHAR",
        "may_answer": "VARCHAR",
        "editable": "BOOLEAN",
        "due": "TIMESTAMP_MS",
        "status": "VARCHAR",
        "answered": "TIMESTAMP_MS",
        "answered_by": "VARCHAR",
        "reason": "VARCHAR",
        "edited": "BOOLEAN",
        "answer": "VARCHAR",
    },
    key=("run_id", "step"),
    once=frozenset({"message", "value", "answer"}),
)


@dataclass(slots=True)
class Approvals:
    """The approvals that open runs wait for, in memory, by run and step, without the texts that were written."""

    open: dict[str, dict[str, ApprovalRow]] = field(default_factory=dict)
    _changed: dict[tuple[str, str], ApprovalRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Load what waits back."""
        self.open.clear()
        self._changed.clear()
        for row in TABLE.load(db, "WHERE status = 'waiting'"):
            self.open.setdefault(row["run_id"], {})[row["step"]] = ApprovalRow(**row)

    def apply(self, entry: Entry) -> None:
        """Take an accepted decision."""
        decision = entry.decision
        run_id = decision.run_id
        for effect in decision.effects:
            if isinstance(effect, ApprovalRequested):
                row = ApprovalRow(run_id, effect.step, entry.partition, entry.offset, decision.at, effect.message, effect.value)
                row.may_answer, row.editable, row.due = json.dumps(effect.by, ensure_ascii=False), effect.editable, effect.due
                self.open.setdefault(run_id, {})[effect.step] = self._changed[run_id, effect.step] = row
        held = self.open.get(run_id)
        if held is None:
            return
        for effect in decision.effects:
            if isinstance(effect, StepCompleted | StepFailed | StepCancelled | OutputChanged) and effect.step in held:
                self._settle(held.pop(effect.step), entry, effect)
        if entry.ends:
            for row in held.values():
                self._close(row, Status.CANCELLED, decision.at, None, "the run ended")
            held.clear()
        if not held:
            del self.open[run_id]

    def _settle(self, row: ApprovalRow, entry: Entry, effect: Effect) -> None:
        """Record what came of an approval: the input says it if it is about this step, the effect if not."""
        decision, cause = entry.decision, entry.decision.input
        about = getattr(cause, "step", None) == row.step
        match cause:
            case ApprovalAnswered() if about:
                status = Status.APPROVED if cause.approved else Status.REJECTED
                self._close(row, status, decision.at, cause.by, cause.reason)
                row.edited, row.answer = cause.value is not None, cause.value
            case TimerFired() if about:
                self._close(row, _by_deadline(effect), decision.at, "", "deadline")
            case ChangeOutput() if about:
                self._close(row, Status.REPLACED, decision.at, cause.by, cause.reason)
                row.edited, row.answer = True, cause.output
            case CancelStep() if about:
                self._close(row, Status.CANCELLED, decision.at, cause.by, cause.reason)
            case _:
                self._close(row, Status.CANCELLED, decision.at, None, getattr(effect, "reason", None))

    def _close(self, row: ApprovalRow, status: Status, at: int, by: str | None, reason: str | None) -> None:
        row.status, row.answered, row.answered_by, row.reason = status, at, by, reason
        self._changed[row.run_id, row.step] = row

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time."""
        TABLE.upsert(db, list(self._changed.values()))
        for row in self._changed.values():
            row.message = row.value = row.answer = None  # they are in the database now
        self._changed.clear()


def _by_deadline(effect: Effect) -> Status:
    """Return what the end of its time made of an approval."""
    if isinstance(effect, StepFailed):
        return Status.REJECTED if effect.failure.kind == FailureKind.NOT_APPROVED else Status.EXPIRED
    output = (effect.output or "") if isinstance(effect, StepCompleted) else ""
    if output.startswith('{"approved":true'):
        return Status.APPROVED
    return Status.REJECTED if output.startswith('{"approved":false') else Status.EXPIRED


# --- Queries ---

_SHOWN: Final = 'approvals.* EXCLUDE (may_answer, "partition", "offset"), may_answer::JSON::VARCHAR[] AS may_answer'


@dataclass(frozen=True, slots=True)
class Filter:
    """Which approvals are listed. `by`: only those that this person may answer; `after`: the last one before.

    `since`, `until`: requested from then on, before then (milliseconds).
    """

    waiting: bool | None = None
    by: str | None = None
    after: tuple[int, str, str] | None = None
    since: int | None = None
    until: int | None = None


def of_run(db: Connection, extent: Extent, *, waiting: bool = False) -> list[dict[str, Any]]:
    """Return a run's approvals in the order in which they were requested; `waiting`: only those that nobody has answered."""
    query = f"""
        SELECT {_SHOWN} FROM approvals
        WHERE {in_extent("approvals")} {"AND status = 'waiting'" if waiting else ""} ORDER BY "offset", step
    """  # noqa: S608 - our own text
    return rows(db, query, extent.given())


def newest(db: Connection, wanted: Filter, limit: int) -> list[dict[str, Any]]:
    """Return approvals of all runs, newest first, each with its run's workflow."""
    conditions, parameters = ["true"], list[Any]()
    if wanted.waiting is not None:
        conditions.append(f"approvals.status {'=' if wanted.waiting else '!='} 'waiting'")
    if wanted.by is not None:
        conditions.append("(may_answer = '[]' OR list_contains(may_answer::JSON::VARCHAR[], ?))")
        parameters.append(wanted.by)
    for moment, comparison in ((wanted.since, ">="), (wanted.until, "<")):
        if moment is not None:
            conditions.append(f"requested {comparison} make_timestamp_ms(?)::TIMESTAMP_MS")
            parameters.append(moment)
    if wanted.after is not None:
        conditions.append("(requested, run_id, step) < (make_timestamp_ms(?)::TIMESTAMP_MS, ?, ?)")
        parameters += wanted.after
    query = f"""
        WITH page AS (
            SELECT rowid AS row FROM approvals WHERE {" AND ".join(conditions)}
            ORDER BY requested DESC, run_id DESC, step DESC LIMIT ?
        )
        SELECT {_SHOWN}, workflow FROM approvals JOIN (SELECT run_id, workflow FROM runs) USING (run_id)
        WHERE approvals.rowid IN (SELECT row FROM page) ORDER BY requested DESC, run_id DESC, step DESC
    """  # noqa: S608 - our own text
    return rows(db, query, [*parameters, limit])
