"""The chaos harness: what it plans is the same for the same seed and meets everything; and a short chaos run holds."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import chaos
import httpx
import pytest
import report as reports
import schedule
from farm import Farm
from ledger_watch import Run
from load import Load
from witness import UNLUCKY_ATTEMPTS, Witness, fate

from streams.processors.requests import decode
from streams.settings import Settings

FULL = {"seconds": 600.0, "kills": 62, "session_timeout_s": 6.0}
SHORT = {"seconds": 110.0, "kills": 18, "session_timeout_s": 6.0}


@pytest.mark.parametrize("brokers", [1, 3])
@pytest.mark.parametrize("asked", [FULL, SHORT])
@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_process_is_killed_as_often_as_asked(asked: dict[str, float], seed: int, brokers: int) -> None:
    """A plan has the kills that were asked for, each role among them; the same seed gives the same plan, another one another."""
    plan = schedule.plan(seed, brokers=brokers, **asked)  # type: ignore[arg-type]
    kills = Counter(each.role for each in plan if each.kind == "kill")
    assert sum(kills.values()) == asked["kills"]
    assert kills.keys() == schedule.ROLES.keys()
    assert {each.kind for each in plan} == set(schedule.KINDS)
    assert plan == schedule.plan(seed, brokers=brokers, **asked)  # type: ignore[arg-type]
    assert plan != schedule.plan(seed + 1, brokers=brokers, **asked)  # type: ignore[arg-type]
    assert max(each.at_s for each in plan) <= asked["seconds"]


@pytest.mark.parametrize("brokers", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_no_role_is_gone_for_long(seed: int, brokers: int) -> None:
    """Each slot works between two disruptions, zombies sleep longer than the session time-out, never are two brokers gone."""
    plan = schedule.plan(seed, brokers=brokers, **FULL)  # type: ignore[arg-type]
    working_from: dict[str, float] = {}
    for each in plan:
        slot = each.role if each.role == "kafka" else each.name
        assert each.at_s >= working_from.get(slot, 0.0) - 0.02
        assert each.for_s <= schedule.LONGEST_S
        assert each.kind != "stop" or each.for_s > FULL["session_timeout_s"]
        working_from[slot] = each.at_s + each.for_s + schedule.LEAST_WORK_S


def test_more_kills_than_time_are_refused() -> None:
    """A plan that can't be carried out is said to be none."""
    with pytest.raises(ValueError, match="don't fit"):
        schedule.plan(1, seconds=30.0, kills=60, session_timeout_s=6.0)


def test_the_same_seed_is_the_same_load() -> None:
    """Two loads of one seed say the same at the same times; all of it can be read as requests; each workflow is among it."""
    one, two = Load(7, 500, 60.0).messages, Load(7, 500, 60.0).messages
    assert [(each.at_s, each.record.value, each.request) for each in one] == [
        (each.at_s, each.record.value, each.request) for each in two
    ]
    assert [each.at_s for each in one] == sorted(each.at_s for each in one)
    for each in one:
        decode(each.record.value)
    requests = [each.request for each in one if each.request]
    assert {each.workflow for each in requests} == {"chaos-order", "chaos-crowd", "chaos-patient", "chaos-trip", "chaos-family"}
    assert {each.expect for each in requests} == {"completed", "failed", "cancelled"}
    assert any(each.nameless for each in requests)
    assert any(not (each.record.value or b"").startswith(b"\0") for each in one)
    assert any(count > 1 for count in Counter(each.name for each in requests).values())


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[str]:
    """Run a witness that treats every second first attempt badly."""
    with Witness(0, tmp_path / "witness.jsonl", 0.5) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_the_witness_notes_each_call_whatever_it_answers(witness: str, tmp_path: Path) -> None:
    """Calls that are answered, refused and hung up on all stand in the file, and the same call always fares the same."""
    seen: dict[str, set[str]] = {}
    for number in range(40):
        for _ in range(2):
            call = {"call_id": f"c{number}", "run_id": f"r{number}", "step": "s", "attempt": 1, "tool": "t", "delay_s": 0}
            seen.setdefault(f"r{number}", set()).add(_told(witness, call))
    assert all(fares == {fate(run, "s", 1, 0.5)} for run, fares in seen.items())
    assert set.union(*seen.values()) == {"answer", "refuse", "hang up"}
    noted = [json.loads(line) for line in (tmp_path / "witness.jsonl").read_text().splitlines()]
    assert Counter(each["call_id"] for each in noted) == {f"c{number}": 2 for number in range(40)}
    assert {"at_ms", "call_id", "run_id", "step", "attempt", "tool"} == set(noted[0])


def _told(address: str, call: dict[str, object]) -> str:
    try:
        answer = httpx.post(address, json=call, timeout=10, trust_env=False)
    except httpx.TransportError:
        return "hang up"
    assert answer.status_code in {200, 503}
    return "answer" if answer.status_code == 200 else "refuse"


def test_a_third_attempt_is_always_answered() -> None:
    """A step that may try three times succeeds, however unlucky."""
    assert {fate(f"r{number}", "s", UNLUCKY_ATTEMPTS + 1, 1.0) for number in range(100)} == {"answer"}


def _reported(outcome: str | None, expect: str) -> reports.Report:
    """Return the report on one run that ended so and must end so."""
    found = reports.Report()
    asked = SimpleNamespace(asked={"run": expect}, sent_ms={"run": 0}, counts=Counter(requests=1))
    run = Run(0, 5 if outcome else None, outcome, ["0@7 #3 TimerFired -> StepCompleted"])
    watch = SimpleNamespace(runs={"run": run}, open_runs=lambda: {} if outcome else {"run": run})
    reports.load_figures(found, asked, watch, 1.0, 1.0)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("expect", ["completed", "failed", "cancelled"])
def test_a_run_that_ends_otherwise_or_not_at_all_is_a_violation(expect: str) -> None:
    """A run that ends as it must is none; one that ends otherwise is, and one that hangs is, with its last decisions."""
    assert _reported(expect, expect).holds
    assert not _reported("completed" if expect != "completed" else "failed", expect).holds
    stuck = _reported(None, expect)
    assert "0@7 #3 TimerFired" in stuck.violations[0]
    missing = reports.Report()
    nobody = SimpleNamespace(asked={"run": expect}, sent_ms={"run": 0}, counts=Counter())
    reports.load_figures(missing, nobody, SimpleNamespace(runs={}, open_runs=dict), 1.0, 1.0)  # type: ignore[arg-type]
    assert "never began" in missing.violations[0]


def test_what_the_checker_finds_is_a_violation() -> None:
    """The checker's findings and figures stand in the report."""
    report = reports.Report()
    reports.checked(report, {"rules": ["chains_whole"], "figures": {"runs": 3}, "violations": []})
    assert report.holds
    reports.checked(report, {"violations": [{"rule": "chains_whole", "where": "decisions/3@7", "detail": "a byte was changed"}]})
    assert report.violations == ["chains_whole: decisions/3@7: a byte was changed"]


def test_a_death_without_a_cause_is_a_violation(tmp_path: Path) -> None:
    """A process that ends by itself is noted with its last lines and started again; the report doesn't hold."""
    settings = Settings(bootstrap_servers="127.0.0.1:1", data_dir=tmp_path)
    farm = Farm(settings, tmp_path, 1, "")
    dying = _Dying()
    farm.processes["tool-1"] = dying
    farm._start("tool-1")
    dying.alive = False
    farm.watch()
    assert [death.what for death in farm.deaths] == ["died by itself, exit code 3"]
    deadline = time.monotonic() + 30
    while not dying.alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    report = reports.Report()
    reports.fault_figures(report, farm, Counter())
    assert len(report.violations) == 1


class _Dying:
    """A process that lives until it doesn't."""

    alive = False

    def start(self) -> None:
        self.alive = True

    def signal(self, number: int) -> None:
        del number

    def wait(self, timeout_s: float) -> int | None:
        del timeout_s
        return 3

    def pid(self) -> int | None:
        return os.getpid() if self.alive else None


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_nothing_is_lost_though_everything_is_killed(tmp_path: Path) -> None:
    """2,000 runs while processes of every kind are killed, 18 in all: each run ends as it must, the checker finds nothing."""
    report = chaos.run(chaos.Options(seconds=110.0, runs=2000, kills=18, seed=11, folder=tmp_path))
    print(report.markdown())  # noqa: T201 - figures for whoever looks
    assert report.holds, "\n".join(report.violations)
