"""The checker against one real history with faults planted into it: each is found, and each rule is needed for one."""

import ast
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from checker import RULES, Report, check
from checking import avro
from checking.ledger import Ledger, build, effect_id, run_id_of
from checking.records import TOPICS, Cluster, Disruption
from checking.views import rebuild
from planted import FAULTS, Fault, a_call_is_made_twice, a_call_of_a_loser_is_made, around, flipped, pack, rival, swap
from planted_capture import Capture
from planted_history import FIRST, PATIENCE_S, SECOND, TOOLS, WORKFLOWS, Recording, make_history
from ports import free_ports

from events import catalog, codec, ids
from events.decisions import Decision, InputIgnored
from infra.embedded.supervisor import Supervisor
from projections.projector import Projector
from streams import registry
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict
from streams.workflow.definition import parse

pytestmark = pytest.mark.integration
HERE = Path(__file__).parent


def project(settings: Settings) -> None:
    """Bring the views up to date."""
    projector = Projector(settings)
    projector.start()
    assert projector.caught_up.wait(PATIENCE_S), projector.failure
    projector.stop()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    """Make the history, and keep Kafka running."""
    folder = tmp_path_factory.mktemp("checker")
    tools = folder / "checked_tools.py"
    tools.write_text(TOOLS)
    broker, api, model = free_ports(3)
    settings = Settings(
        bootstrap_servers=f"127.0.0.1:{broker}",
        api_port=api,
        local_model_url=f"http://127.0.0.1:{model}",
        data_dir=folder / "data",
        topic_prefix="checked.",
        partitions=2,
        tool_paths=(tools,),
    )
    supervisor = Supervisor(settings)
    try:
        supervisor.up(frozenset({"kafka", "intake", "tool"}))
        registry.publish(settings, [parse(each.encode(), "test.yaml") for each in WORKFLOWS.split("---\n")])
        recording = Recording(settings, folder)
        try:
            make_history(recording)
            project(settings)
        finally:
            recording.end()
        project(settings)
        (folder / "requests.jsonl").write_text("".join(json.dumps(each._asdict()) + "\n" for each in recording.wanted))
        yield recording
    finally:
        supervisor.down()


@pytest.fixture(scope="module")
def captured(live: Recording, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """Read everything once."""
    settings, folder = live.settings, tmp_path_factory.mktemp("captured")
    cluster = Cluster(settings.bootstrap_servers, settings.topic_prefix)
    records: dict[str, list[Any]] = {topic: [] for topic in TOPICS}
    for record in cluster.records():
        records[record.topic].append(record)
    cluster.close()
    views = rebuild(settings.bootstrap_servers, settings.topic_prefix, settings.data_dir / "views.duckdb", folder)
    for each in records.values():
        each.sort(key=lambda record: (record.partition, record.offset))
    return Capture(records, cluster.topic_ids, live.wanted, live.notes(), views, folder)


def ledger(capture: Capture, *, views: bool = False) -> Ledger:
    """Return the ledger of what was captured, in the order of its partitions; comparing `views` takes long."""
    records = [record for topic in TOPICS for record in sorted(capture.records[topic], key=lambda each: each[:3])]
    return build(
        records,
        capture.topic_ids,
        wanted=capture.wanted,
        witnessed=capture.witnessed,
        disruptions=capture.disruptions,
        views=capture.views if views else None,
    )


def planted(captured: Capture, fault: Fault, folder: Path) -> Ledger:
    """Return the ledger with a fault in it."""
    changed = captured.copy(folder)
    fault(changed)
    return ledger(changed, views=FAULTS[fault] == "projections_equal_rebuild")


def broken(report: Report) -> set[str]:
    """Return the rules that don't hold."""
    return {each.rule for each in report.violations}


def test_an_untouched_history_holds(captured: Capture) -> None:
    """All rules hold, and there was something for each of them: two owners, refusals, retries, noise, all kinds of ends."""
    report = check(ledger(captured, views=True))
    assert report.holds, report.violations
    assert report.rules == list(RULES)
    figures = report.figures
    runs = sum(FIRST.values()) + FIRST["family"] + sum(SECOND.values())
    assert (figures["runs"], figures["runs_failed"], figures["runs_cancelled"]) == (runs, 2, 2)
    assert figures["duplicate"] > 20
    assert figures["dead_letters"] >= 5
    assert (figures["repeats"], figures["unexplained"], figures["losers_differing"], figures["inputs_gone"]) == (0, 0, 0, 0)
    assert figures["calls_witnessed"] == len({each.call_id for each in captured.witnessed}) > 60


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(captured: Capture, fault: Fault, tmp_path: Path) -> None:
    """The rule that is there for it finds it."""
    report = check(planted(captured, fault, tmp_path))
    assert FAULTS[fault] in broken(report), report.violations
    assert not report.holds


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(captured: Capture, rule: str, tmp_path: Path) -> None:
    """With a rule that finds nothing in its place, a fault that it is there for goes unnoticed."""
    weakened = {**RULES, rule: lambda _: ()}
    for number, fault in enumerate(each for each, finder in FAULTS.items() if finder == rule):
        folder = tmp_path / str(number)
        folder.mkdir()
        if check(planted(captured, fault, folder), weakened).holds:
            return
    pytest.fail(f"no planted fault needs {rule}")


def test_any_changed_byte_of_a_decision_is_found(captured: Capture, tmp_path: Path) -> None:
    """Whichever bit of whichever decision is changed, a rule breaks."""
    chance = random.Random(7)  # noqa: S311 - which bytes are tried
    for _ in range(60):
        changed = captured.copy(tmp_path)
        record = chance.choice(changed.records["decisions"])
        at = chance.randrange(len(record.value or b""))
        changed.put(record, flipped(record, at))
        assert not check(ledger(changed)).holds, (record.partition, record.offset, at)


def test_decisions_of_different_runs_may_stand_in_any_order(captured: Capture, tmp_path: Path) -> None:
    """Neighbours of different runs that change places break nothing: each run's chain is whole."""
    changed = captured.copy(tmp_path)
    decisions = changed.records["decisions"]
    decoded = [codec.decode(each.value, Decision) for each in decisions]
    number = next(
        number
        for number in range(len(decisions) - 1)
        if decisions[number].partition == decisions[number + 1].partition
        and decoded[number].run_id != decoded[number + 1].run_id
        and min(decoded[number].seq, decoded[number + 1].seq) > 1
    )
    swap(changed, decisions[number], decisions[number + 1])
    assert check(ledger(changed)).holds


def test_the_index_may_be_packed(captured: Capture, tmp_path: Path) -> None:
    """Entries that stand in a pack instead of one by one are entries, and a pack that was replaced is nothing."""
    changed = captured.copy(tmp_path)
    pack(changed)
    assert check(ledger(changed)).holds


def test_a_rival_that_was_overtaken_is_explained(captured: Capture, tmp_path: Path) -> None:
    """Other code that decides the same inputs otherwise, too late, is no fault: it is counted."""
    changed = captured.copy(tmp_path)
    (record, decision), (_, after) = changed.chain("order-0")[2:4]
    value = rival(decision)
    changed.append("decisions", record.partition, record.key, value)
    then = Decision(*(after.run_id, after.seq, ids.chain_hash(codec.unframed(value))), *_rest(after))
    changed.append("decisions", record.partition, record.key, codec.encode(then))
    report = check(ledger(changed))
    assert report.holds, report.violations
    assert (report.figures["loser"], report.figures["losers_differing"]) == (2, 1)


def _rest(decision: Decision) -> tuple[Any, ...]:
    return decision.input_topic_id, decision.input_offset, decision.at, decision.input, (InputIgnored("late"),)


def test_what_somebody_broke_explains_what_was_done_twice(captured: Capture, tmp_path: Path) -> None:
    """A call that is made twice around the kill of a tool worker, and one of a loser around that of an owner, are counted."""
    changed = captured.copy(tmp_path)
    a_call_is_made_twice(changed)
    changed.disruptions.append(around(changed.witnessed[0], "tool"))
    a_call_of_a_loser_is_made(changed)
    changed.disruptions.append(around(changed.witnessed[-1], "orchestrator"))
    report = check(ledger(changed))
    assert report.holds, report.violations
    assert (report.figures["repeats"], report.figures["calls_witnessed_of_losers"]) == (1, 1)


def test_the_same_decisions_count_as_for_foldflow(captured: Capture, tmp_path: Path) -> None:
    """The checker and the product's own filter agree on every record up to where a run breaks, whatever is planted."""
    for fault in (None, *(each for each, rule in FAULTS.items() if rule in ("ignored_explained", "every_run_ends"))):
        changed = captured.copy(tmp_path)
        if fault is not None:
            fault(changed)
        chains: dict[int, Chain] = {}
        for each in ledger(changed).decisions:
            (record,) = [r for r in changed.records["decisions"] if (r.partition, r.offset) == (each.partition, each.offset)]
            chain = chains.setdefault(each.partition, Chain())
            verdict = chain.judge(each.offset, codec.decode(record.value, Decision), each.hash)
            if verdict is not Verdict.SET_ASIDE:  # the product gives a broken run up; the checker goes on looking
                assert (verdict is Verdict.ACCEPTED) == (each.verdict == "accepted"), (fault, each.where)


def test_the_checker_derives_what_the_ledger_derives() -> None:
    """Schema ids, run ids and call ids are the same, though written anew."""
    for entry in catalog.ENTRIES.values():
        assert avro._today(entry.kind.__name__)[0] == entry.id
    assert run_id_of("q-42") == ids.run_id("q-42")
    assert effect_id(b"h" * 32, 3) == ids.effect_id(b"h" * 32, 3)


def test_the_checker_uses_nothing_of_foldflow() -> None:
    """It imports nothing of ours but the projector, and that only to rebuild views."""
    ours = ("events", "streams", "projections", "tools", "api", "infra")
    for path in (HERE / "checker.py", *(HERE / "checking").glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        names = [each.module or "" for each in nodes if isinstance(each, ast.ImportFrom)]
        names += [alias.name for each in nodes if isinstance(each, ast.Import) for alias in each.names]
        found = sorted(name for name in names if name.partition(".")[0] in ours)
        assert found == (["projections.projector", "streams.settings"] if path.name == "views.py" else []), path


# --- The command ---


def run(live: Recording, *arguments: str, prefix: str = "checked.") -> "subprocess.CompletedProcess[str]":
    """Run the checker."""
    where = ["--bootstrap-servers", live.settings.bootstrap_servers, "--topic-prefix", prefix]
    command = [sys.executable, str(HERE / "checker.py"), *where, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)


def test_the_command_says_that_all_holds(live: Recording) -> None:
    """On the live topics, with the files and the views: exit code 0, and JSON with all rules."""
    done = run(live, "--folder", str(live.folder), "--views", str(live.settings.data_dir / "views.duckdb"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["holds"], report["violations"], report["rules"]) == (True, [], list(RULES))


def test_the_command_says_what_is_broken(live: Recording, tmp_path: Path) -> None:
    """With one more call at the witness: exit code 1, and the rule and the call are named."""
    (tmp_path / "disruptions.jsonl").write_text(json.dumps(Disruption(1, 2, "kill", "tool", "tool-1")._asdict()) + "\n")
    notes = (live.folder / "witness.jsonl").read_text()
    (tmp_path / "witness.jsonl").write_text(notes + notes.splitlines()[0] + "\n")
    done = run(live, "--folder", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN  side_effects_explained" in done.stdout
    assert live.notes()[0].call_id in done.stdout


def test_what_cannot_be_read_is_neither(live: Recording, tmp_path: Path) -> None:
    """Topics that aren't there, a torn line, views that another process holds: exit code 2, and why."""
    assert "absent." in _unreadable(run(live, prefix="absent."))
    (tmp_path / "witness.jsonl").write_text('{"at_ms": 1,')
    assert "witness.jsonl, line 1" in _unreadable(run(live, "--folder", str(tmp_path)))
    views = tmp_path / "views.duckdb"
    with duckdb.connect(str(views)):
        assert "held by another process" in _unreadable(run(live, "--views", str(views)))


def _unreadable(done: "subprocess.CompletedProcess[str]") -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    return done.stderr
