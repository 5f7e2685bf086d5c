"""Attempts, timers, labels, usage and workers, of real decisions."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from projection_histories import BOTH, PARTITIONS, TOPIC_IDS, Logs, logs  # type: ignore[import-not-found]

from events import codec
from events.calls import LlmCallRequested, ToolCallRequested
from events.decisions import InputIgnored
from events.results import TimerFired
from events.workers import CircuitReported, WorkerReported
from projections import workers
from projections.ledger import Record
from projections.table import Connection, rows
from projections.views import Batch, Views
from streams.workflow.state import StepStatus

REPORT = WorkerReported(
    "llm-1", "llm", "here", 7, "1.0", 1_000, 50_000, 2, 8, (0, 2), (CircuitReported("m", "open", 5, 9, 3, 4, "no"),)
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a log of runs of every kind, some still open, and a connection to views of it."""
    log = logs(21, 24, 0.15, BOTH)
    views = Views(tmp_path_factory.mktemp("derived") / "v", TOPIC_IDS, PARTITIONS)
    views.apply(Batch(log.records()))
    with views.snapshot() as (db, _):
        yield log, db
    views.close()


def test_every_attempt_has_a_row(asked: tuple[Logs, Connection]) -> None:
    """Given runs with retries; then each call that a decision requested is an attempt of its step, with its number."""
    log, db = asked
    requested = Counter(
        (event.decision.run_id, effect.step, effect.attempt)
        for event in log.accepted
        for effect in event.decision.effects
        if isinstance(effect, LlmCallRequested | ToolCallRequested)
    )
    found = rows(db, "SELECT run_id, step, attempt FROM attempts WHERE kind <> 'run'")
    assert Counter((row["run_id"], row["step"], row["attempt"]) for row in found) == requested
    assert max(attempt for *_, attempt in requested) > 1
    children = rows(db, "SELECT run_id, step, child_run_id, attempt FROM attempts WHERE kind = 'run'")
    expected = {(state.parent.run_id, run_id) for run_id, state in log.states.items() if state.parent}
    assert {(row["run_id"], row["child_run_id"]) for row in children} == expected
    assert [row["attempt"] for row in children] != []


def test_timers_are_what_the_runs_wait_for(asked: tuple[Logs, Connection]) -> None:
    """Given open and finished runs; then pending are the timers of steps that sleep or wait for a retry; fired ones are told."""
    log, db = asked
    pending = {
        (row["run_id"], row["step"]): row["kind"]
        for row in rows(db, "SELECT * FROM timers WHERE status = 'pending' AND step IS NOT NULL")
    }
    kinds = {StepStatus.SLEEPING: "sleep", StepStatus.WAITING: "retry"}
    expected = {
        (run_id, path): kinds[step.status]
        for run_id, state in log.states.items()
        if not state.over
        for path, step in state.steps.items()
        if step.status in kinds
    }
    assert {place: kind for place, kind in pending.items() if kind in kinds.values()} == expected != {}
    limits = {row["run_id"] for row in rows(db, "SELECT run_id FROM timers WHERE kind = 'time_limit'")}
    assert limits == {run_id for run_id, state in log.states.items() if state.limit and not state.over} != set()
    fired = Counter(
        any(isinstance(effect, InputIgnored) for effect in event.decision.effects)
        for event in log.accepted
        if isinstance(event.decision.input, TimerFired)
    )
    told = {
        row["status"]: row["n"] for row in rows(db, "SELECT status, count(*) AS n FROM timers WHERE fired IS NOT NULL GROUP BY 1")
    }
    assert told == {"fired": fired[False], "ignored": fired[True]}


def test_labels_and_usage(asked: tuple[Logs, Connection]) -> None:
    """Given labelled runs and answered calls; then each label is a row, and what calls used sums to what their runs say."""
    log, db = asked
    found = rows(db, "SELECT run_id FROM labels WHERE key = 'team' AND value = 'a'")
    wanted = {event.decision.run_id for event in log.accepted if getattr(event.decision.input, "labels", {}).get("team") == "a"}
    assert {row["run_id"] for row in found} == wanted
    assert len(found) == len(wanted) > 0
    sums = rows(db, "SELECT run_id, sum(input_tokens) AS n, sum(cost_usd) AS usd FROM usage GROUP BY 1 HAVING n > 0")
    said = rows(db, "SELECT run_id, input_tokens AS n, cost_usd AS usd FROM runs WHERE input_tokens > 0")
    assert (
        {(row["run_id"], row["n"], round(row["usd"] or 0, 9)) for row in sums}
        == {(row["run_id"], row["n"], round(row["usd"], 9)) for row in said}
        != set()
    )
    assert len(rows(db, "SELECT DISTINCT day, workflow, model FROM usage WHERE kind = 'llm'")) > 1


def test_workers(tmp_path: Path) -> None:
    """Given reports of three workers; when one stops and one falls silent; then that is said, and what they said last stays."""
    reports = [replace(REPORT, worker_id=name, reported_at=at) for name, at in (("a", 50_000), ("b", 50_000), ("c", 200_000))]
    records = [Record(0, offset, codec.encode(report), report.worker_id.encode()) for offset, report in enumerate(reports)]
    views = Views(tmp_path / "v", TOPIC_IDS, PARTITIONS)
    views.apply(Batch(workers=records))
    views.apply(Batch(workers=[Record(0, 3, None, b"a"), Record(0, 4, b"?", b"d"), Record(0, 5, None, b"never seen")]))
    with views.snapshot() as (db, positions):
        found = {row["worker_id"]: row for row in workers.newest(db, 210_000, 10)}
    views.close()
    assert {name: row["status"] for name, row in found.items()} == {
        "a": "stopped",
        "b": "silent",
        "c": "working",
        "never seen": "stopped",
    }
    assert (found["a"]["role"], found["a"]["partitions"], found["a"]["in_flight"]) == ("llm", "[0, 2]", 2)
    assert '"state": "open"' in found["b"]["circuits"]
    assert positions == {("workers", 0): 6}
