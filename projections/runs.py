"""The read model `runs`: one row a run, with the head of its chain, so that the filter can go on after a restart."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import (
    BreakpointCleared,
    BreakpointSet,
    ChildRunRequested,
    Decision,
    Effect,
    RetryScheduled,
    RunCancelled,
    RunClosing,
    RunCompleted,
    RunFailed,
    RunPaused,
    RunResumed,
    TimerSet,
)
from events.failure import FailureKind
from projections.entry import PICO, Entry, Moved, Spent
from projections.table import Connection, Table, rows
from streams.workflow.chain import Head

RUNNING, PAUSED, CLOSING = "running", "paused", "closing"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
OPEN, WAITING = "open", "waiting"
"""What runs can be filtered by besides their statuses: not over; not over, and waiting for something but calls."""
KINDS: Final = ("approval", "signal", "sleep", "breakpoint")
"""What a step can wait for besides calls."""


@dataclass(slots=True)
class RunRow:
    """One run. `head` is the hash of its last accepted decision, `seq` that decision's number; `input` and `output` are JSON.

    `status`: `running`, `paused`, `closing` (what was done is undone, then the clean-up steps run), or how it ended: `completed`,
    `failed`, `cancelled`. `outcome`: how a run that is closing will end. `failure_…`: why it fails, failed, or was cancelled
    (`cancelled_by`: by whom). `waiting_…`: how many steps wait for what. `due`: its time limit. `breakpoints`: steps before which
    it stops; `not_undone`: steps that were done and could not be, or were not to be, undone (both JSON lists). `parent_…`: the
    step of another run that waits for this one; `origin_…`: the decision of another run that this one was forked from, `copied`
    (JSON) what it took over. `steps_settled` counts the workflow's own steps, not those within. `cost_usd` sums the known prices;
    `unpriced_calls` counts LLM answers whose price is unknown.
    """

    run_id: str
    partition: int
    first_offset: int
    started: int
    last_offset: int = -1
    head: bytes = b""
    seq: int = 0
    status: str = RUNNING
    workflow: str = ""
    digest: str = ""
    request_id: str | None = None
    labels: dict[str, str] | None = None
    input: str | None = None
    copied: str | None = None
    output: str | None = None
    outcome: str | None = None
    failure_kind: str | None = None
    failure_message: str | None = None
    failure_step: str | None = None
    cancelled_by: str | None = None
    not_undone: str = "[]"
    breakpoints: str = "[]"
    parent_run_id: str | None = None
    parent_step: str | None = None
    origin_run_id: str | None = None
    origin_seq: int | None = None
    origin_head: str | None = None
    updated: int = 0
    due: int | None = None
    ended: int | None = None
    waiting_approval: int = 0
    waiting_signal: int = 0
    waiting_sleep: int = 0
    waiting_breakpoint: int = 0
    steps_settled: int = 0
    calls: int = 0
    child_runs: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0


TABLE: Final = Table(
    "runs",
    {
        "run_id": "VARCHAR",
        "partition": "INTEGER",
        "first_offset": "BIGINT",
        "started": "TIMESTAMP_MS",
        "last_offset": "BIGINT",
        "head": "BLOB",
        "seq": "BIGINT",
        "status": "VARCHAR",
        "workflow": "VARCHAR",
        "digest": "VARCHAR",
        "request_id": "VARCHAR",
        "labels": "MAP(VARCHAR, VARCHAR)",
        "input": "VARCHAR",
        "copied": "VARCHAR",
        "output": "VARCHAR",
        "outcome": "VARCHAR",
        "failure_kind": "VARCHAR",
        "failure_message": "VARCHAR",
        "failure_step": "VARCHAR",
        "cancelled_by": "VARCHAR",
        "not_undone": "VARCHAR",
        "breakpoints": "VARCHAR",
        "parent_run_id": "VARCHAR",
        "parent_step": "VARCHAR",
        "origin_run_id": "VARCHAR",
        "origin_seq": "BIGINT",
        "origin_head": "VARCHAR",
        "updated": "TIMESTAMP_MS",
        "due": "TIMESTAMP_MS",
        "ended": "TIMESTAMP_MS",
        "waiting_approval": "BIGINT",
        "waiting_signal": "BIGINT",
        "waiting_sleep": "BIGINT",
        "waiting_breakpoint": "BIGINT",
        "steps_settled": "BIGINT",
        "calls": "BIGINT",
        "child_runs": "BIGINT",
        "retries": "BIGINT",
        "input_tokens": "BIGINT",
        "output_tokens": "BIGINT",
        "cost_usd": "DOUBLE",
        "unpriced_calls": "BIGINT",
    },
    key=("run_id",),
    once=frozenset({"labels", "input", "copied", "output"}),
)


@dataclass(slots=True)
class Runs:
    """Open runs in memory, without the payloads that were written."""

    open: dict[str, RunRow] = field(default_factory=dict)
    _changed: dict[str, RunRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Load open runs back."""
        self._changed.clear()
        self.open = {row["run_id"]: RunRow(**row) for row in TABLE.load(db, "WHERE ended IS NULL")}

    def heads(self, db: Connection, run_ids: Iterable[str]) -> dict[str, Head]:
        """Return the chain heads of those of the runs that there are; finished ones too, so that they never start again."""
        heads: dict[str, Head] = {}
        elsewhere: list[str] = []
        for run_id in dict.fromkeys(run_ids):
            row = self.open.get(run_id)
            if row is None:
                elsewhere.append(run_id)
            else:
                heads[run_id] = Head(row.head, row.seq, row.first_offset)
        for found in TABLE.load_keys(db, elsewhere):
            heads[found["run_id"]] = Head(found["head"], found["seq"], found["first_offset"], found["ended"] is not None)
        return heads

    def first_offset(self, run_ids: Iterable[str]) -> int:
        """Return where the first of these open runs begins: nothing of them lies before that offset."""
        return min((self.open[run_id].first_offset for run_id in run_ids), default=0)

    def workflow_of(self, decision: Decision) -> str:
        """Return the workflow of an open run, or of one that begins with this decision."""
        row = self.open.get(decision.run_id)
        if row is not None:
            return row.workflow or ""
        return decision.input.workflow if isinstance(decision.input, StartRun) else ""

    def apply(self, entry: Entry, spent: Spent | None, moved: Moved) -> RunRow:
        """Take an accepted decision, with what it says was spent and what it did to the steps; return the run's row."""
        decision = entry.decision
        row = self.open.get(decision.run_id)
        if row is None:
            row = self.open[decision.run_id] = RunRow(decision.run_id, entry.partition, entry.offset, decision.at)
        self._changed[decision.run_id] = row
        row.head, row.seq, row.last_offset, row.updated = entry.hash, decision.seq, entry.offset, decision.at
        row.steps_settled += moved.settled
        for kind, change in moved.waits.items():
            setattr(row, f"waiting_{kind}", getattr(row, f"waiting_{kind}") + change)
        if isinstance(decision.input, StartRun) and decision.seq == 1:
            _begin(row, decision.input)
        if spent is not None:
            row.input_tokens += spent.input_tokens
            row.output_tokens += spent.output_tokens
            row.cost_usd = round(row.cost_usd + (spent.cost_usd or 0.0), PICO)
            row.unpriced_calls += spent.cost_usd is None
        for effect in decision.effects:
            _take(row, effect, decision.at)
        if row.ended is not None:
            row.waiting_approval = row.waiting_signal = row.waiting_sleep = row.waiting_breakpoint = 0
            del self.open[decision.run_id]
        return row

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time."""
        TABLE.upsert(db, list(self._changed.values()))
        for row in self._changed.values():
            row.input = row.labels = row.copied = None  # they are in the database now
        self._changed.clear()


def _begin(row: RunRow, start: StartRun) -> None:
    row.workflow, row.digest, row.request_id = start.workflow, start.digest, start.request_id
    row.input, row.labels, row.copied = start.input, dict(start.labels), start.copied
    row.breakpoints = _list(start.break_at)
    if start.parent is not None:
        row.parent_run_id, row.parent_step = start.parent.run_id, start.parent.step
    if start.origin is not None:
        row.origin_run_id, row.origin_seq, row.origin_head = start.origin.run_id, start.origin.seq, start.origin.head


def _take(row: RunRow, effect: Effect, at: int) -> None:  # noqa: C901, PLR0912 - one arm for each effect
    match effect:
        case LlmCallRequested() | ToolCallRequested():
            row.calls += 1
        case ChildRunRequested():
            row.child_runs += 1
        case RetryScheduled():
            row.retries += 1
        case TimerSet(step=""):
            row.due = effect.due
        case RunPaused():
            row.status = PAUSED
        case RunResumed():
            row.status = PAUSED if effect.single else RUNNING
        case BreakpointSet():
            row.breakpoints = _list([*json.loads(row.breakpoints), effect.step])
        case BreakpointCleared():
            row.breakpoints = _list(each for each in json.loads(row.breakpoints) if each != effect.step)
        case RunClosing():
            row.status, row.outcome, row.breakpoints = CLOSING, effect.outcome, "[]"
            if effect.failure is not None:
                row.failure_step = effect.step
                row.failure_kind, row.failure_message = str(effect.failure.kind), effect.failure.message
            elif effect.outcome == CANCELLED:
                _cancelled(row, effect.by, effect.reason)
        case RunCompleted():
            row.status, row.ended, row.output = COMPLETED, at, effect.output
        case RunFailed():
            row.status, row.ended, row.failure_step = FAILED, at, effect.step
            row.failure_kind, row.failure_message = str(effect.failure.kind), effect.failure.message
            row.not_undone, row.cancelled_by = json.dumps(effect.not_undone, ensure_ascii=False), None
        case RunCancelled():
            row.status, row.ended, row.not_undone = CANCELLED, at, json.dumps(effect.not_undone, ensure_ascii=False)
            _cancelled(row, effect.by, effect.reason)
        case _:
            pass


def _cancelled(row: RunRow, by: str, reason: str) -> None:
    row.failure_kind, row.failure_message, row.failure_step = FailureKind.CANCELLED.value, reason, None
    row.cancelled_by = by


def _list(steps: Iterable[str]) -> str:
    return json.dumps(sorted(set(steps)), ensure_ascii=False)


# --- Queries ---

_Related = Literal["parent_run_id", "origin_run_id"]
_LISTED: Final = (
    "run_id, workflow, digest, status, request_id, labels, outcome, failure_kind, failure_message, failure_step, cancelled_by, "
    "not_undone, breakpoints, parent_run_id, parent_step, origin_run_id, origin_seq, started, updated, due, ended, seq, "
    "waiting_approval, waiting_signal, waiting_sleep, waiting_breakpoint, steps_settled, steps_total, calls, child_runs, "
    'retries, input_tokens, output_tokens, cost_usd, unpriced_calls, "partition", first_offset, last_offset, problem'
)
_FROM: Final = (
    "FROM runs LEFT JOIN (SELECT digest, len(steps) AS steps_total FROM specs) USING (digest) "
    "LEFT JOIN (SELECT run_id, problem FROM breaks) USING (run_id)"
)
_STATUS: Final = {
    OPEN: "ended IS NULL",
    WAITING: "ended IS NULL AND waiting_approval + waiting_signal + waiting_sleep + waiting_breakpoint > 0",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs are listed. All `labels` must be there; `after`: start (milliseconds) and id of the last run shown before.

    `status`: one of a run's, `open` or `waiting`; `parent`: only child runs of this run; `origin`: only forks of this run;
    `text`: contained in the run's or its request's id, upper or lower case; `since`, `until`: started from then on, before then
    (milliseconds).
    """

    workflow: str | None = None
    status: str | None = None
    request_id: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    after: tuple[int, str] | None = None
    parent: str | None = None
    origin: str | None = None
    text: str | None = None
    since: int | None = None
    until: int | None = None


def newest(db: Connection, wanted: Filter, limit: int) -> list[dict[str, Any]]:
    """Return runs, newest first."""
    conditions, parameters = ["true"], list[Any]()
    for column, value in (
        ("workflow", wanted.workflow),
        ("status", wanted.status if wanted.status not in _STATUS else None),
        ("request_id", wanted.request_id),
        ("parent_run_id", wanted.parent),
        ("origin_run_id", wanted.origin),
    ):
        if value is not None:
            conditions.append(f"{column} = ?")
            parameters.append(value)
    if wanted.status in _STATUS:
        conditions.append(_STATUS[wanted.status])
    for key, value in wanted.labels:
        conditions.append("labels[?] = ?")
        parameters += [key, value]
    if wanted.text is not None:
        conditions.append("(contains(run_id, lower(?)) OR contains(lower(request_id), lower(?)))")
        parameters += [wanted.text] * 2
    # A comparison of pairs is not looked up in the zone maps; one of the first column alone is.
    latest = wanted.after[0] + 1 if wanted.after else None
    for moment, comparison in ((wanted.since, ">="), (wanted.until, "<"), (latest, "<")):
        if moment is not None:
            conditions.append(f"started {comparison} make_timestamp_ms(?)::TIMESTAMP_MS")
            parameters.append(moment)
    if wanted.after is not None:
        conditions.append("(started, run_id) < (make_timestamp_ms(?)::TIMESTAMP_MS, ?)")
        parameters += wanted.after
    # First which rows, then all that they say: of most row groups nothing but two or three columns is read.
    query = f"""
        WITH page AS (
            SELECT rowid AS row FROM runs WHERE {" AND ".join(conditions)} ORDER BY started DESC, run_id DESC LIMIT ?
        )
        SELECT {_LISTED} {_FROM} WHERE runs.rowid IN (SELECT row FROM page) ORDER BY started DESC, run_id DESC
    """  # noqa: S608 - our own text
    return [_opened(row) for row in rows(db, query, [*parameters, limit])]


def relatives(db: Connection, column: _Related, run_id: str, limit: int) -> list[dict[str, Any]]:
    """Return what tells apart the runs that a run has started, or its forks, newest first."""
    query = f"""
        SELECT run_id, workflow, status, parent_step, origin_seq FROM runs
        WHERE {column} = $1 ORDER BY started DESC, run_id DESC LIMIT $2
    """  # noqa: S608 - our own names
    return rows(db, query, [run_id, limit])


def one(db: Connection, run_id: str) -> dict[str, Any] | None:
    """Return a run with its input and output, None if there is none."""
    columns = f"{_LISTED}, input, output, lower(hex(head)) AS head, origin_head"
    found = rows(db, f"SELECT {columns} {_FROM} WHERE run_id = ?", [run_id])
    return _opened(found[0]) if found else None


def _opened(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its lists as lists, and what it waits for, by kind."""
    waiting = {kind: count for kind in KINDS if (count := row.pop(f"waiting_{kind}"))}
    lists = {column: json.loads(row[column]) for column in ("not_undone", "breakpoints")}
    return {**row, **lists, "waiting": waiting}
