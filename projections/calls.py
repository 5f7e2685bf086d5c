"""The read model `calls`: every LLM and tool call, what became of it and what it cost.

A call is counted once, by the first answer that its run took notice of: also one that came after the attempt had been given up
(`late`), and one that belongs to a decision which lost (`stray`), because both were made and paid. `input_tokens` includes the
cached tokens, `output_tokens` the reasoning. A child run is no call: it has its own row in `runs`.

Only pending calls are in memory. What is known of a call that is over is fetched when another answer to it comes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, assert_never

from events.calls import LlmCallRequested, ToolCallRequested
from events.decisions import CallCancelled, Decision, InputIgnored, RetryScheduled, StepFailed
from events.failure import Failure
from events.ids import effect_id
from events.results import LlmCallCompleted, LlmCallFailed, TimerFired, ToolCallCompleted, ToolCallFailed
from projections.entry import Entry, Spent
from projections.extent import Extent, in_extent
from projections.runs import Runs
from projections.table import Connection, Table, rows

Result = LlmCallCompleted | LlmCallFailed | ToolCallCompleted | ToolCallFailed


class Outcome(StrEnum):
    """What became of a call."""

    PENDING = "pending"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    """Nobody waits for its answer any more."""
    ABANDONED = "abandoned"
    """The run ended before the answer came."""
    STRAY = "stray"
    """An answer to a call that no accepted decision requested."""


@dataclass(slots=True)
class CallRow:
    """One call. Times in milliseconds since the epoch; `partition` and `offset` are those of the decision that brought it."""

    call_id: str
    run_id: str
    step: str
    attempt: int | None
    kind: str
    partition: int
    offset: int
    outcome: str = Outcome.PENDING
    late: bool = False
    model: str | None = None
    provider: str | None = None
    tool: str | None = None
    tool_version: str | None = None
    requested: int | None = None
    deadline: int | None = None
    ended: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    cost_usd: float | None = None
    prices: str | None = None
    paid_for: str | None = None
    latency_ms: int | None = None
    finish_reason: str | None = None
    failure_kind: str | None = None
    failure_message: str | None = None
    workflow: str = ""
    """Of its run: what all calls cost is asked without a look at all runs."""
    stored: bool = False


TABLE: Final = Table(
    "calls",
    {
        "call_id": "VARCHAR",
        "run_id": "VARCHAR",
        "workflow": "VARCHAR",
        "step": "VARCHAR",
        "attempt": "BIGINT",
        "kind": "VARCHAR",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "outcome": "VARCHAR",
        "late": "BOOLEAN",
        "model": "VARCHAR",
        "provider": "VARCHAR",
        "tool": "VARCHAR",
        "tool_version": "VARCHAR",
        "requested": "TIMESTAMP_MS",
        "deadline": "TIMESTAMP_MS",
        "ended": "TIMESTAMP_MS",
        "input_tokens": "BIGINT",
        "output_tokens": "BIGINT",
        "cache_read_tokens": "BIGINT",
        "cache_write_tokens": "BIGINT",
        "reasoning_tokens": "BIGINT",
        "cache_write_1h_tokens": "BIGINT",
        "cost_usd": "DOUBLE",
        "prices": "VARCHAR",
        "paid_for": "VARCHAR",
        "latency_ms": "BIGINT",
        "finish_reason": "VARCHAR",
        "failure_kind": "VARCHAR",
        "failure_message": "VARCHAR",
    },
    key=("run_id", "call_id"),
    indexed=False,
)


@dataclass(slots=True)
class Calls:
    """The pending calls of open runs in memory, by run and call. Without a database (`write` is never called) all calls stay."""

    open: dict[str, dict[str, CallRow]] = field(default_factory=dict)
    _changed: dict[str, CallRow] = field(default_factory=dict)
    _fetched: set[tuple[str, str]] = field(default_factory=set)

    def load(self, db: Connection) -> None:
        """Load the pending calls of open runs back."""
        for held in (self.open, self._changed, self._fetched):
            held.clear()
        for row in TABLE.load(db, "WHERE outcome = 'pending' AND run_id IN (SELECT run_id FROM runs WHERE ended IS NULL)"):
            self.open.setdefault(row["run_id"], {})[row["call_id"]] = CallRow(**row, stored=True)

    def fetch(self, db: Connection, entries: Iterable[Entry], runs: Runs) -> None:
        """Get the calls back that these decisions have another answer to."""
        keys, begun = [], set[str]()
        for entry in entries:
            decision, cause = entry.decision, entry.decision.input
            if decision.seq == 1:
                begun.add(decision.run_id)
            elif isinstance(cause, Result) and decision.run_id not in begun:
                held = self.open.get(decision.run_id)
                if held is None or cause.call_id not in held:
                    keys.append((decision.run_id, cause.call_id))
        for row in TABLE.load_keys(db, keys, runs.first_offset(run_id for run_id, _ in keys)):
            self.open.setdefault(row["run_id"], {})[row["call_id"]] = CallRow(**row, stored=True)
            self._fetched.add((row["run_id"], row["call_id"]))

    def apply(self, entry: Entry, workflow: str) -> Spent | None:
        """Take an accepted decision; return what it says was spent. `workflow`: its run's."""
        decision = entry.decision
        held = self.open.setdefault(decision.run_id, {})
        spent = self._input(entry, held, workflow)
        requested: dict[str, str] = {}
        for index, effect in enumerate(decision.effects):
            if isinstance(effect, LlmCallRequested | ToolCallRequested):
                row = _requested(entry, effect, index, workflow)
                held[row.call_id] = self._changed[row.call_id] = row
                requested[row.step] = row.call_id
            elif isinstance(effect, CallCancelled):  # of a call that the same decision requests, the id was not known
                self._gives_up(held, effect.call_id or requested.get(effect.step, ""), Outcome.CANCELLED, decision.at)
        if entry.ends:
            for call_id in held:
                self._gives_up(held, call_id, Outcome.ABANDONED, decision.at)
            del self.open[decision.run_id]
        return spent

    def _gives_up(self, held: dict[str, CallRow], call_id: str, outcome: Outcome, at: int) -> None:
        row = held.get(call_id)
        if row is not None and row.outcome == Outcome.PENDING:
            row.outcome, row.ended = outcome, at
            self._changed[call_id] = row

    def _input(self, entry: Entry, held: dict[str, CallRow], workflow: str) -> Spent | None:
        decision = entry.decision
        match decision.input:
            case TimerFired(timer_id=timer_id):
                row = held.get(timer_id)  # the timer of an attempt's time limit has the call's id
                if row and row.outcome == Outcome.PENDING and not any(isinstance(e, InputIgnored) for e in decision.effects):
                    row.outcome, row.ended = Outcome.TIMED_OUT, decision.at
                    row.failure_kind, row.failure_message = _failure(_step_failure(decision, row.step))
                    self._changed[timer_id] = row
                return None
            case LlmCallCompleted() | LlmCallFailed() | ToolCallCompleted() | ToolCallFailed():
                return self._answered(entry, decision.input, held, workflow)
            case _:
                return None

    def _answered(self, entry: Entry, result: Result, held: dict[str, CallRow], workflow: str) -> Spent | None:
        decision = entry.decision
        kind = "llm" if isinstance(result, LlmCallCompleted | LlmCallFailed) else "tool"
        row = held.get(result.call_id)
        if row is None:
            row = CallRow(result.call_id, decision.run_id, result.step, None, kind, entry.partition, entry.offset, Outcome.STRAY)
            row.ended, row.workflow = decision.at, workflow
            held[result.call_id] = row
        elif row.outcome in (Outcome.TIMED_OUT, Outcome.CANCELLED) and not row.late:
            row.late = True
        elif row.outcome != Outcome.PENDING:
            return None  # a repetition: counted already
        else:
            _end(row, decision, result)
        self._changed[row.call_id] = row
        return _details(row, result)

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time, and forget the calls that are over."""
        TABLE.write(db, list(self._changed.values()))
        for run_id, call_id in (*((row.run_id, row.call_id) for row in self._changed.values()), *self._fetched):
            held = self.open.get(run_id)
            if held is not None and call_id in held and held[call_id].outcome != Outcome.PENDING:
                del held[call_id]
        self._changed.clear()
        self._fetched.clear()


def _requested(entry: Entry, effect: LlmCallRequested | ToolCallRequested, index: int, workflow: str) -> CallRow:
    decision = entry.decision
    kind = "llm" if isinstance(effect, LlmCallRequested) else "tool"
    call_id = effect_id(entry.hash, index)
    row = CallRow(call_id, decision.run_id, effect.step, effect.attempt, kind, entry.partition, entry.offset)
    row.requested, row.deadline, row.workflow = decision.at, effect.deadline, workflow
    match effect:
        case LlmCallRequested():
            row.model = effect.model
        case ToolCallRequested():
            row.tool = effect.tool
        case _:
            assert_never(effect)
    return row


def _end(row: CallRow, decision: Decision, result: Result) -> None:
    """Record how a pending call ended; an answer that the decision found unusable is a failure too."""
    failure = result.failure if isinstance(result, LlmCallFailed | ToolCallFailed) else _step_failure(decision, result.step)
    row.ended = decision.at
    row.outcome = Outcome.FAILED if failure else Outcome.COMPLETED
    row.failure_kind, row.failure_message = _failure(failure)


def _details(row: CallRow, result: Result) -> Spent | None:
    """Record what an answer tells, and return what it used."""
    row.latency_ms = result.latency_ms
    match result:
        case ToolCallCompleted() | ToolCallFailed():
            row.tool_version, row.cost_usd, row.paid_for = result.tool_version, result.cost_usd, result.paid_for
            return None if result.cost_usd is None else Spent(result.step, 0, 0, result.cost_usd)
        case LlmCallCompleted():
            row.provider, row.finish_reason = result.provider, result.finish_reason
        case LlmCallFailed():
            pass
        case _:
            assert_never(result)
    row.model, row.cost_usd, row.prices = result.model, result.cost_usd, result.prices
    if result.usage is None:
        return Spent(result.step, 0, 0, result.cost_usd or 0.0)
    usage = result.usage
    row.input_tokens, row.output_tokens = usage.input_tokens, usage.output_tokens
    row.cache_read_tokens, row.cache_write_tokens = usage.cache_read_tokens, usage.cache_write_tokens
    row.reasoning_tokens, row.cache_write_1h_tokens = usage.reasoning_tokens, usage.cache_write_1h_tokens
    return Spent(result.step, usage.input_tokens, usage.output_tokens, result.cost_usd)


def _step_failure(decision: Decision, step: str) -> Failure | None:
    for effect in decision.effects:
        if isinstance(effect, RetryScheduled | StepFailed) and effect.step == step:
            return effect.failure
    return None


def _failure(failure: Failure | None) -> tuple[str | None, str | None]:
    return (str(failure.kind), failure.message) if failure else (None, None)


def of_run(db: Connection, extent: Extent, most: int | None = None) -> list[dict[str, Any]]:
    """Return a run's calls in the order in which they were requested; of more than `most`, the last ones."""
    query = f"""
        SELECT * FROM calls WHERE {in_extent("calls")}
        ORDER BY "offset" DESC, requested DESC NULLS LAST, step DESC, attempt DESC, call_id DESC LIMIT $most
    """  # noqa: S608 - our own text
    return rows(db, query, extent.given(most=most))[::-1]
