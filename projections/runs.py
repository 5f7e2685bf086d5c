"""The read model `runs`: one row a run, with the head of its chain, so that the filter can go on after a restart."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, assert_never

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import (
    InputIgnored,
    RetryScheduled,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepFailed,
    StepSkipped,
)
from projections.entry import Entry, Spent
from projections.table import Connection, Table, rows
from streams.workflow.chain import Head

OPEN, COMPLETED, FAILED = "open", "completed", "failed"


@dataclass(slots=True)
class RunRow:
    """One run. `head` is the hash of its last accepted decision, `seq` that decision's number; `input` and `output` are JSON.

    `cost_usd` sums the known prices; `unpriced_calls` counts LLM answers whose price is unknown.
    """

    run_id: str
    partition: int
    first_offset: int
    started: int
    last_offset: int = -1
    head: bytes = b""
    seq: int = 0
    status: str = OPEN
    workflow: str = ""
    digest: str = ""
    request_id: str | None = None
    labels: dict[str, str] | None = None
    input: str | None = None
    output: str | None = None
    failure_kind: str | None = None
    failure_message: str | None = None
    failure_step: str | None = None
    updated: int = 0
    ended: int | None = None
    steps_settled: int = 0
    calls: int = 0
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
        "output": "VARCHAR",
        "failure_kind": "VARCHAR",
        "failure_message": "VARCHAR",
        "failure_step": "VARCHAR",
        "updated": "TIMESTAMP_MS",
        "ended": "TIMESTAMP_MS",
        "steps_settled": "BIGINT",
        "calls": "BIGINT",
        "retries": "BIGINT",
        "input_tokens": "BIGINT",
        "output_tokens": "BIGINT",
        "cost_usd": "DOUBLE",
        "unpriced_calls": "BIGINT",
    },
    key=("run_id",),
    once=frozenset({"labels", "input", "output"}),
)


@dataclass(slots=True)
class Runs:
    """Open runs in memory, without the payloads that were written."""

    open: dict[str, RunRow] = field(default_factory=dict)
    _changed: dict[str, RunRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Load open runs back."""
        self._changed.clear()
        self.open = {row["run_id"]: RunRow(**row) for row in TABLE.load(db, "WHERE status = 'open'")}

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
            heads[found["run_id"]] = Head(found["head"], found["seq"], found["first_offset"], found["status"] != OPEN)
        return heads

    def apply(self, entry: Entry, spent: Spent | None, settled: int) -> RunRow:
        """Take an accepted decision, with what it says was spent and how many steps it settled; return the run's row."""
        decision = entry.decision
        row = self.open.get(decision.run_id)
        if row is None:
            row = self.open[decision.run_id] = RunRow(decision.run_id, entry.partition, entry.offset, decision.at)
        self._changed[decision.run_id] = row
        row.head, row.seq, row.last_offset, row.updated = entry.hash, decision.seq, entry.offset, decision.at
        row.steps_settled += settled
        if isinstance(decision.input, StartRun) and decision.seq == 1:
            row.workflow, row.digest, row.request_id = decision.input.workflow, decision.input.digest, decision.input.request_id
            row.input, row.labels = decision.input.input, dict(decision.input.labels)
        if spent is not None:
            row.input_tokens += spent.input_tokens
            row.output_tokens += spent.output_tokens
            row.cost_usd += spent.cost_usd or 0.0
            row.unpriced_calls += spent.cost_usd is None
        for effect in decision.effects:
            match effect:
                case LlmCallRequested() | ToolCallRequested():
                    row.calls += 1
                case RetryScheduled():
                    row.retries += 1
                case RunCompleted():
                    row.status, row.output = COMPLETED, effect.output
                case RunFailed():
                    row.status, row.failure_step = FAILED, effect.step
                    row.failure_kind, row.failure_message = str(effect.failure.kind), effect.failure.message
                case StepCompleted() | StepSkipped() | StepFailed() | InputIgnored():
                    pass
                case _:
                    assert_never(effect)
        if row.status != OPEN:
            row.ended = decision.at
            del self.open[decision.run_id]
        return row

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time."""
        TABLE.upsert(db, list(self._changed.values()))
        for row in self._changed.values():
            row.input = row.labels = None  # they are in the database now
        self._changed.clear()


# --- Queries ---

_LISTED: Final = (
    "run_id, workflow, digest, status, request_id, labels, failure_kind, failure_message, failure_step, started, updated, ended, "
    'seq, steps_settled, steps_total, calls, retries, input_tokens, output_tokens, cost_usd, unpriced_calls, "partition", '
    "first_offset, last_offset, problem"
)
_FROM: Final = (
    "FROM runs LEFT JOIN (SELECT digest, len(steps) AS steps_total FROM specs) USING (digest) "
    "LEFT JOIN (SELECT run_id, problem FROM breaks) USING (run_id)"
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs are listed. All `labels` must be there; `after`: start (milliseconds) and id of the last run shown before."""

    workflow: str | None = None
    status: str | None = None
    request_id: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    after: tuple[int, str] | None = None


def newest(db: Connection, wanted: Filter, limit: int) -> list[dict[str, Any]]:
    """Return runs, newest first."""
    conditions, parameters = ["true"], list[Any]()
    for column in ("workflow", "status", "request_id"):
        if (value := getattr(wanted, column)) is not None:
            conditions.append(f"{column} = ?")
            parameters.append(value)
    for key, value in wanted.labels:
        conditions.append("labels[?] = ?")
        parameters += [key, value]
    if wanted.after is not None:
        conditions.append("(started, run_id) < (make_timestamp_ms(?)::TIMESTAMP_MS, ?)")
        parameters += wanted.after
    query = f"SELECT {_LISTED} {_FROM} WHERE {' AND '.join(conditions)} ORDER BY started DESC, run_id DESC LIMIT ?"
    return rows(db, query, [*parameters, limit])


def by_prefix(db: Connection, prefix: str, limit: int) -> list[str]:
    """Return the ids of runs that start with a prefix, at most `limit`."""
    found = rows(db, "SELECT run_id FROM runs WHERE starts_with(run_id, ?) ORDER BY run_id LIMIT ?", [prefix, limit])
    return [row["run_id"] for row in found]


def one(db: Connection, run_id: str) -> dict[str, Any] | None:
    """Return a run with its input and output, None if there is none."""
    found = rows(db, f"SELECT {_LISTED}, input, output, lower(hex(head)) AS head {_FROM} WHERE run_id = ?", [run_id])
    return found[0] if found else None
