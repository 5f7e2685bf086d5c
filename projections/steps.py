"""The read model `steps`: where each step of each run is. A step that nothing was decided about yet has no row."""

from dataclasses import dataclass, field
from typing import Any, Final, assert_never

from events.calls import LlmCallRequested, ToolCallRequested
from events.decisions import (
    Effect,
    InputIgnored,
    RetryScheduled,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepFailed,
    StepSkipped,
)
from events.results import LlmCallCompleted, ToolCallCompleted
from projections.entry import Entry, Spent
from projections.table import Connection, Table, rows
from streams.workflow.chain import ends_run
from streams.workflow.state import UNSETTLED, StepStatus

ABANDONED: Final = "abandoned"
"""Status of a step that was not settled when its run failed."""
_UNSETTLED: Final = frozenset(status.value for status in UNSETTLED)


@dataclass(slots=True)
class StepRow:
    """One step. `position`: the order in which steps were first decided about; tokens and cost are sums over its attempts."""

    run_id: str
    step: str
    position: int
    partition: int
    offset: int
    status: str = ""
    attempt: int = 0
    kind: str | None = None
    model: str | None = None
    tool: str | None = None
    started: int | None = None
    due: int | None = None
    ended: int | None = None
    output: str | None = None
    failure_kind: str | None = None
    failure_message: str | None = None
    tolerated: bool = False
    skipped_reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


TABLE: Final = Table(
    "steps",
    {
        "run_id": "VARCHAR",
        "step": "VARCHAR",
        "position": "BIGINT",
        "partition": "INTEGER",
        "offset": "BIGINT",
        "status": "VARCHAR",
        "attempt": "BIGINT",
        "kind": "VARCHAR",
        "model": "VARCHAR",
        "tool": "VARCHAR",
        "started": "TIMESTAMP_MS",
        "due": "TIMESTAMP_MS",
        "ended": "TIMESTAMP_MS",
        "output": "VARCHAR",
        "failure_kind": "VARCHAR",
        "failure_message": "VARCHAR",
        "tolerated": "BOOLEAN",
        "skipped_reason": "VARCHAR",
        "input_tokens": "BIGINT",
        "output_tokens": "BIGINT",
        "cost_usd": "DOUBLE",
    },
    key=("run_id", "step"),
    once=frozenset({"output"}),
)


@dataclass(slots=True)
class Steps:
    """The steps of open runs in memory, without the outputs that were written."""

    open: dict[str, dict[str, StepRow]] = field(default_factory=dict)
    _changed: dict[tuple[str, str], StepRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Load the steps of open runs back."""
        self.open.clear()
        self._changed.clear()
        for row in TABLE.load(db, "WHERE run_id IN (SELECT run_id FROM runs WHERE status = 'open')"):
            self.open.setdefault(row["run_id"], {})[row["step"]] = StepRow(**row)

    def apply(self, entry: Entry, spent: Spent | None) -> int:
        """Take an accepted decision; return how many steps it settled."""
        decision = entry.decision
        held = self.open.setdefault(decision.run_id, {})
        settled = 0
        for effect in decision.effects:
            settled += self._effect(entry, held, effect)
        if spent is not None and spent.step in held:
            row = self._row(entry, held, spent.step)
            row.input_tokens += spent.input_tokens
            row.output_tokens += spent.output_tokens
            row.cost_usd += spent.cost_usd or 0.0
            if isinstance(decision.input, LlmCallCompleted):
                row.model = decision.input.model
        if ends_run(decision):
            for name, row in held.items():
                if row.status in _UNSETTLED:
                    row.status, row.ended, row.due = ABANDONED, decision.at, None
                    self._changed[decision.run_id, name] = row
            del self.open[decision.run_id]
        return settled

    def _effect(self, entry: Entry, held: dict[str, StepRow], effect: Effect) -> int:
        """Apply one effect; return 1 if it settles a step."""
        decision = entry.decision
        match effect:
            case LlmCallRequested() | ToolCallRequested():
                row = self._row(entry, held, effect.step)
                row.status, row.attempt, row.due = StepStatus.RUNNING.value, effect.attempt, effect.deadline
                row.started = decision.at if row.started is None else row.started
                if isinstance(effect, LlmCallRequested):
                    row.kind, row.model = "llm", effect.model
                else:
                    row.kind, row.tool = "tool", effect.tool
                return 0
            case RetryScheduled():
                row = self._row(entry, held, effect.step)
                row.status, row.attempt, row.due = StepStatus.WAITING.value, effect.attempt, effect.due
                row.failure_kind, row.failure_message = str(effect.failure.kind), effect.failure.message
                return 0
            case StepCompleted():
                row = self._settled(entry, held, effect.step, StepStatus.COMPLETED)
                row.kind = row.kind or "transform"
                row.failure_kind = row.failure_message = None
                row.output = effect.output
                if effect.output is None and isinstance(decision.input, LlmCallCompleted | ToolCallCompleted):
                    row.output = decision.input.output
                return 1
            case StepSkipped():
                row = self._settled(entry, held, effect.step, StepStatus.SKIPPED)
                row.skipped_reason = effect.reason
                return 1
            case StepFailed():
                row = self._settled(entry, held, effect.step, StepStatus.FAILED)
                row.failure_kind, row.failure_message = str(effect.failure.kind), effect.failure.message
                row.tolerated = effect.tolerated
                return 1
            case RunCompleted() | RunFailed() | InputIgnored():
                return 0
            case _:
                assert_never(effect)

    def _row(self, entry: Entry, held: dict[str, StepRow], name: str) -> StepRow:
        run_id = entry.decision.run_id
        row = held.get(name)
        if row is None:
            row = held[name] = StepRow(run_id, name, len(held), entry.partition, entry.offset)
        self._changed[run_id, name] = row
        return row

    def _settled(self, entry: Entry, held: dict[str, StepRow], name: str, status: StepStatus) -> StepRow:
        row = self._row(entry, held, name)
        row.status, row.ended, row.due = status.value, entry.decision.at, None
        return row

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time."""
        TABLE.upsert(db, list(self._changed.values()))
        for row in self._changed.values():
            row.output = None  # it is in the database now
        self._changed.clear()


def of_run(db: Connection, run_id: str) -> list[dict[str, Any]]:
    """Return a run's steps in the order in which they were first decided about."""
    query = """
        SELECT steps.* FROM steps, (SELECT "partition" AS p, first_offset AS low, last_offset AS high FROM runs WHERE run_id = $1)
        WHERE run_id = $1 AND "partition" = p AND "offset" BETWEEN low AND high ORDER BY position
    """
    return rows(db, query, [run_id])
