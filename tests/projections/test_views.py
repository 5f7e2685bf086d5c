"""Views on a real DuckDB file, of real decisions: the same rows however the log comes in."""

import itertools
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_histories import BOTH, PARTITIONS, SPEC, TOPIC_IDS, Logs, Run, extent, logs  # type: ignore[import-not-found]

from events import codec
from events.commands import WorkflowRegistered
from events.decisions import DeadLetter, DeadLetterSettled, Decision
from events.ids import chain_hash, effect_id, run_id
from events.results import LlmCallCompleted, TimerFired, Usage
from events.topics import partition_for
from projections import approvals, calls, database, deadletters, decisions, ledger, runs, signals, specs, step_pages
from projections.database import ViewsInUseError
from projections.ledger import Record
from projections.table import rows
from projections.views import Batch, Views
from streams.workflow.chain import Chain, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.state import RunEvent, RunState, StepStatus

Dump = dict[str, list[tuple[Any, ...]]]


@contextmanager
def opened(path: Path, topic_ids: dict[str, bytes] | None = None) -> Iterator[Views]:
    """Open views and close them."""
    views = Views(path, topic_ids or TOPIC_IDS, PARTITIONS)
    try:
        yield views
    finally:
        views.close()


def dump(views: Views) -> Dump:
    """Return the rows of all tables."""
    found: Dump = {}
    with views.snapshot() as (db, _):
        for table in database.TABLES:
            found[table.name] = sorted(map(_plain, db.table(table.name).fetchall()), key=repr)
    return found


def _plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(sorted(value.items())) if isinstance(value, dict) else value for value in row)


def rebuilt(records: list[Record]) -> tuple[Dump, Views]:
    """Return the rows after all records in one batch."""
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "views.duckdb") as views:
        views.apply(Batch(records))
        return dump(views), views


CUTS = st.lists(st.tuples(st.tuples(*[st.integers(0, 12)] * PARTITIONS), st.booleans()), max_size=10)


@settings(max_examples=20, deadline=None)
@given(CUTS, st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]))
def test_any_batches_and_restarts_give_what_one_rebuild_gives(
    cuts: list[tuple[tuple[int, ...], bool]], seed: int, faults: float
) -> None:
    """Batches of any size, in any interleaving of partitions, with restarts in between: the same rows."""
    log = logs(seed, 6, faults, BOTH)
    records = log.records()
    whole, _ = rebuilt(records)
    queues = [[record for record in records if record.partition == partition] for partition in range(PARTITIONS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "views.duckdb"
        views = Views(path, TOPIC_IDS, PARTITIONS)
        for sizes, restart in [*cuts, ((len(records),) * PARTITIONS, True)]:
            batch: list[Record] = []
            for queue, size in zip(queues, sizes, strict=True):
                batch += queue[:size]
                del queue[:size]
            views.apply(Batch(batch))
            if restart:
                views.close()
                views = Views(path, TOPIC_IDS, PARTITIONS)
        assert dump(views) == whole
        views.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.5]))
def test_views_say_what_the_folded_state_says(seed: int, faults: float) -> None:
    """Runs and steps agree with the core's own fold of what the shared filter accepts; everything else is listed as ignored."""
    log = logs(seed, 6, faults, BOTH)
    chains = [Chain() for _ in range(PARTITIONS)]
    verdicts: Counter[str] = Counter()
    for record in log.records():
        try:
            decision = codec.decode(record.value, Decision)
        except codec.NotDecodableError:
            verdicts["not_decodable"] += 1
            continue
        verdict = chains[record.partition].judge(record.offset, decision, chain_hash(codec.unframed(record.value or b"")))
        verdicts[verdict.value] += 1
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "v") as views:
        views.apply(Batch(log.records()))
        with views.snapshot() as (db, _):
            assert sum(row["records"] for row in ledger.ignored(db)) == sum(verdicts.values()) - verdicts["accepted"]
            assert Counter({row["verdict"]: 0 for row in ledger.ignored(db)}).keys() == verdicts.keys() - {"accepted"}
            assert {row["run_id"] for row in ledger.breaks(db)} == log.broken
            assert len(rows(db, "SELECT * FROM decisions")) == verdicts["accepted"] == len(log.accepted)
            for identity, state in log.states.items():
                check_run(db, identity, state, log.outputs[identity])


WAITS = {StepStatus.AWAITING_APPROVAL: "approval", StepStatus.AWAITING_SIGNAL: "signal", StepStatus.SLEEPING: "sleep"}


def check_run(db: Any, identity: str, state: RunState, outputs: dict[str, str | None]) -> None:
    """Compare a run's rows with its folded state."""
    run = runs.one(db, identity)
    assert run is not None
    under_way = "closing" if state.closing else "paused" if state.paused else "running"
    assert run["status"] == (state.status.name.lower() if state.over else under_way)
    assert (run["seq"], run["head"], run["output"]) == (state.seq, state.head.hex(), state.output)
    assert (run["input"], run["digest"]) == (state.input, state.digest)
    assert run["not_undone"][: len(state.not_undone)] == (list(state.not_undone) if state.over else [])
    assert run["parent_run_id"] == (state.parent.run_id if state.parent else None)
    found, known = step_pages.of_run(db, extent(db, identity))
    by_path = {row["step"]: row for row in found}
    assert len(by_path) == known
    assert by_path.keys() >= dict(state.steps).keys()
    for path, step in state.steps.items():
        status = "abandoned" if state.over and not step.settled else step.status.value
        row = by_path[path]
        assert row["status"] == status, path
        if step.settled:
            assert row["output"] == step.output, path
        if step.status is StepStatus.ENTERED:
            assert (row["done"], row["failed"], row["begun"]) == (step.done, step.failed, step.next or len(step.inner)), path
    for path in by_path.keys() - dict(state.steps).keys():  # what the run has forgotten is over
        assert by_path[path]["status"] in ("completed", "skipped", "failed", "cancelled", "abandoned"), path
    for path, output in outputs.items():
        assert by_path[path]["output"] == output, path
    own = [path for path, step in state.steps.items() if step.settled and not {".", "[", "("} & set(path) and path != "finally"]
    assert run["steps_settled"] == len(own)
    if not state.over:
        check_waiting(db, identity, state, run)
    made = calls.of_run(db, extent(db, identity))
    assert run["calls"] == sum(call["outcome"] != "stray" for call in made)
    assert run["cost_usd"] == sum(call["cost_usd"] or 0 for call in made) == sum(row["cost_usd"] for row in found)
    assert run["input_tokens"] == sum(call["input_tokens"] or 0 for call in made)
    awaited = {step.awaits for step in state.steps.values() if step.status is StepStatus.RUNNING and step.asked is None}
    assert {call["call_id"] for call in made if call["outcome"] == "pending"} == (set() if state.over else awaited)


def check_waiting(db: Any, identity: str, state: RunState, run: dict[str, Any]) -> None:
    """Compare what an open run waits for with its folded state."""
    waits = Counter(WAITS[step.status] for step in state.steps.values() if step.status in WAITS)
    rows_held = {row["step"]: row for row in step_pages.waiting(db, extent(db, identity), 1000) if row["status"] == "held"}
    assert rows_held.keys() == dict(state.held).keys()
    waits["breakpoint"] = sum(row["reason"] == "breakpoint" for row in rows_held.values())
    assert run["waiting"] == {kind: count for kind, count in waits.items() if count}
    assert run["breakpoints"] == sorted(state.stops)
    assert run["due"] is None or state.limit
    kept = [row["signal_id"] for row in signals.of_run(db, extent(db, identity), 0, 1000) if row["status"] == "kept"]
    assert kept == [signal.signal_id for signal in state.signals]
    asked = {row["step"]: row for row in approvals.of_run(db, extent(db, identity)) if row["status"] == "waiting"}
    expected = {path: step.asked for path, step in state.steps.items() if step.status is StepStatus.AWAITING_APPROVAL}
    assert asked.keys() == expected.keys()
    for path, approval in expected.items():
        row = asked[path]
        shown = (row["message"], row["value"], tuple(row["may_answer"]), row["editable"])
        assert approval is not None
        assert shown == (approval.message, approval.value, approval.by, approval.editable)


def test_a_late_answer_is_paid_once(tmp_path: Path) -> None:
    """An attempt that ran out of time costs what its late answer says; a second such answer costs nothing more."""
    log = Logs(1)
    run = Run(run_id("request 2"))
    log._step(run, 2, 0.0)
    kind, call, step = next(waiting for waiting in run.waiting if waiting[0] == "llm")
    answer = LlmCallCompleted(call, step, '"late"', "m", "p", "stop", Usage(10, 5), 0.5, 99)
    log._at += 60_000
    take(log, run, TimerFired(call, step), answer, answer)
    with opened(tmp_path / "v") as views:
        views.apply(Batch(log.records()))
        with views.snapshot() as (db, _):
            (row,) = [each for each in calls.of_run(db, extent(db, run.id)) if each["call_id"] == call]
            assert (kind, row["outcome"], row["late"], row["cost_usd"]) == ("llm", "timed_out", True, 0.5)
            found = runs.one(db, run.id)
            assert found is not None
            assert (found["cost_usd"], found["input_tokens"], found["retries"]) == (0.5, 10, 1)


def take(log: Logs, run: Run, *inputs: Any) -> None:
    """Let a run decide about inputs."""
    for cause in inputs:
        decision = log._decided(run, run.state, cause)
        log.append(run.id, codec.encode(decision))
        run.state = evolve(run.state, RunEvent(decision, chain_hash(codec.body(decision))))


def test_a_finished_run_asked_for_again_stays_finished_after_a_restart(tmp_path: Path) -> None:
    """The first decision of a finished run, written again, is overtaken: it never starts the run anew."""
    log = logs(3, 1, 0.0)
    identity = log.accepted[0].decision.run_id
    path = tmp_path / "v"
    with opened(path) as views:
        views.apply(Batch(log.records()))
        before = dump(views)
    log.append(identity, codec.encode(log.accepted[0].decision))
    with opened(path) as views:
        assert not views.runs.open
        views.apply(Batch(log.records()[-1:]))
        after = dump(views)
    assert after["runs"] == before["runs"]
    assert [row[3] for row in after["ignored"]] == [Verdict.OVERTAKEN.value]


def test_a_failed_batch_leaves_nothing_behind(tmp_path: Path) -> None:
    """After an error in the middle of a batch neither rows nor positions nor memory have changed, and it can be taken again."""
    log = logs(4, 4, 0.2)
    records = log.records()
    whole, _ = rebuilt(records)
    with opened(tmp_path / "v") as views:
        views.apply(Batch(records[:10]))
        before = dump(views)
        views._db.execute("ALTER TABLE decisions RENAME TO hidden")
        with pytest.raises(duckdb.Error):
            views.apply(Batch(records[10:]))
        views._db.execute("ALTER TABLE hidden RENAME TO decisions")
        assert dump(views) == before
        views.apply(Batch(records[10:]))
        assert dump(views) == whole


def test_positions_are_those_of_the_rows(tmp_path: Path) -> None:
    """A snapshot's positions are the offsets behind the last records, per topic and partition."""
    log = logs(5, 4, 0.1)
    with opened(tmp_path / "v") as views:
        views.apply(Batch(log.records()))
        with views.snapshot() as (_, positions):
            assert positions == {("decisions", p): len(records) for p, records in enumerate(log.partitions) if records}


@pytest.mark.parametrize("damage", ["other topic", "garbage", "cut", "version", "table"])
def test_a_file_that_is_not_the_view_of_these_topics_is_built_anew(tmp_path: Path, damage: str) -> None:
    """Of another topic id, damaged, or of another version: put aside, and empty at offset 0."""
    path = tmp_path / "v"
    ids = dict(TOPIC_IDS)
    with opened(path) as views:
        views.apply(Batch(logs(6, 50, 0.1).records()))
        if damage == "version":
            views._db.execute("UPDATE about SET version = 0")
        if damage == "table":
            views._db.execute("DROP TABLE steps")
    if damage == "other topic":
        ids["decisions"] = b"x" * 16
    if damage == "garbage":
        path.write_bytes(b"garbage" * 3000)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    with opened(path, ids) as views:
        assert views.positions == {}
        assert not views.runs.open
    stale = damage in {"other topic", "version"}
    assert [each.name.split("-")[0] for each in tmp_path.glob("v.*")] == ["v.old" if stale else "v.damaged"]


def test_a_file_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    """A second api on one data folder is refused, and takes nothing away from the first."""
    path = tmp_path / "v"
    code = f"import duckdb, sys; db = duckdb.connect({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ViewsInUseError, match="only one"):
            Views(path, TOPIC_IDS, PARTITIONS)
        assert holder.stdin
        holder.stdin.close()


def test_a_name_is_a_table_s_or_nobody_s(tmp_path: Path) -> None:
    """In new and in opened views, DuckDB doesn't take a variable for a table that is missing."""
    variable = pa.table({"a": [1]})
    for _ in range(2):
        with opened(tmp_path / "v") as views, views.snapshot() as (db, _), pytest.raises(duckdb.CatalogException):
            db.execute("SELECT * FROM variable")
    with duckdb.connect() as usual:  # as it does by itself
        assert usual.execute("SELECT * FROM variable").fetchall() == [(1,)] == [tuple(variable.to_pylist()[0].values())]


def test_dead_letters_and_versions(tmp_path: Path) -> None:
    """A repeated dead letter counts once; a forged version and unreadable records are passed over and listed."""
    letter = DeadLetter("requests", 1, 7, 1_700_000_000_000, "unknown_workflow", "there is none", "r1", None, b"k", b"{}")
    again = DeadLetter("requests", 1, 7, 1_700_000_000_000, "other", "later", "r1")
    letters = [Record(0, 0, codec.encode(letter)), Record(0, 1, codec.encode(again)), Record(0, 2, b"?")]
    forged = WorkflowRegistered("report", "0" * 64, SPEC.canonical)
    versions = [
        Record(0, 0, codec.encode(WorkflowRegistered(SPEC.name, SPEC.digest, SPEC.canonical))),
        Record(0, 1, codec.encode(forged)),
    ]
    with opened(tmp_path / "v") as views:
        views.apply(Batch(deadletters=letters, specs=versions))
        with views.snapshot() as (db, positions):
            found = deadletters.one(db, "requests", 1, 7)
            assert found is not None
            assert (found["reason"], found["key"], found["value"], found["size"]) == ("unknown_workflow", b"k", b"{}", 2)
            assert [row["offset"] for row in deadletters.about(db, "r1", "-")] == [7]
            assert specs.steps_of(db, SPEC.digest) == ["ask", "look", "odd", "both", "end"]
            assert sum(row["records"] for row in ledger.ignored(db)) == 2
            assert positions == {("deadletter", 0): 3, ("specs", 0): 2}


def test_what_was_done_about_a_dead_letter(tmp_path: Path) -> None:
    """The last settlement says how it stands, all are its history, and one that nobody can make is passed over and counted."""
    letter = DeadLetter("requests", 1, 7, 1_700_000_000_000, "unknown_workflow", "there is none", "r1")
    redriven = DeadLetterSettled("requests", 1, 7, "redriven", 5, "ann", "deployed", 3, 9)
    events = [letter, replace(redriven, action="discarded"), redriven, replace(redriven, action="vanished")]
    with opened(tmp_path / "v") as views:
        for offset, event in enumerate(events):
            with views.snapshot() as (db, _):
                statuses = [row["status"] for row in deadletters.newest(db, 10)]
            assert statuses == [[], ["open"], ["discarded"], ["redriven"]][offset]
            views.apply(Batch(deadletters=[Record(0, offset, codec.encode(event))]))
        with views.snapshot() as (db, _):
            assert [row["settled_by"] for row in deadletters.newest(db, 10, status="redriven")] == ["ann"]
            assert deadletters.newest(db, 10, status="open") == []
            found = deadletters.one(db, "requests", 1, 7)
            assert found is not None
            assert [(each["action"], each["to_offset"]) for each in found["history"]] == [("discarded", 9), ("redriven", 9)]
            assert sum(row["records"] for row in ledger.ignored(db)) == 1


def test_pages_of_runs_hold_every_run_once(tmp_path: Path) -> None:
    """Going on behind the last run of each page lists all runs, newest first, also those of the same millisecond."""
    log = logs(8, 23, 0.0)
    with opened(tmp_path / "v") as views:
        views.apply(Batch(log.records()))
        with views.snapshot() as (db, _):
            seen: list[str] = []
            after = None
            while page := runs.newest(db, runs.Filter(after=after), 5):
                seen += [row["run_id"] for row in page]
                after = (round(page[-1]["started"].replace(tzinfo=UTC).timestamp() * 1000), seen[-1])
            assert len(seen) == len(set(seen)) == 23
            team = [row["run_id"] for row in runs.newest(db, runs.Filter(labels=(("team", "a"),)), 50)]
            assert team == [identity for identity in seen if identity in team]
            assert len(team) == 12


def test_a_decision_in_a_foreign_partition_does_not_count(tmp_path: Path) -> None:
    """A decision that stands where its run doesn't belong is passed over, so no run is ever in two partitions."""
    log = logs(9, 1, 0.0)
    first = log.records()[0]
    wrong = (first.partition + 1) % PARTITIONS
    with opened(tmp_path / "v") as views:
        views.apply(Batch([Record(wrong, 0, first.value)]))
        with views.snapshot() as (db, _):
            assert ledger.ignored(db) == [{"topic": "decisions", "partition": wrong, "verdict": "misplaced", "records": 1}]
            assert runs.newest(db, runs.Filter(), 10) == []


def test_call_ids_are_those_of_the_protocol(tmp_path: Path) -> None:
    """A call is named by its decision's hash and its index in it."""
    log = logs(10, 1, 0.0)
    event = log.accepted[0]
    with opened(tmp_path / "v") as views:
        views.apply(Batch(log.records()))
        with views.snapshot() as (db, _):
            ids = {row["call_id"] for row in calls.of_run(db, extent(db, event.decision.run_id))}
            assert {effect_id(event.hash, index) for index in range(len(event.decision.effects))} <= ids
            listed = decisions.of_run(db, extent(db, event.decision.run_id), 0, 100)
            assert [row["seq"] for row in listed] == list(range(1, len(listed) + 1))
            assert listed[0]["hash"] == event.hash.hex()
            assert partition_for(event.decision.run_id.encode(), PARTITIONS) == listed[0]["partition"]
            page = decisions.of_run(db, extent(db, event.decision.run_id), 1, 2)
            assert [row["seq"] for row in page] == list(itertools.islice(range(2, 4), len(listed) - 1))
