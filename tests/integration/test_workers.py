"""`foldflow workers` with real processes on a real Kafka: who works where, what is amiss, what waits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from one_worker import tool_call, until, working

from events import codec, topics
from events.workers import SILENT_AFTER_MS, CircuitReported, WorkerReported
from infra.cli.workers import done_ahead, problems, reports
from infra.embedded.services import environment_of
from streams import kafka
from streams.envelope import Outgoing, envelope
from streams.processors.offsets import OffsetTracker
from streams.processors.reports import Condition, Reporter
from streams.processors.tool_worker import ToolCalls
from streams.settings import Settings
from tools.registry import load

TOOLS = '''
import asyncio
import pathlib


async def fail() -> None:
    """Find nobody there."""
    raise ConnectionRefusedError("nobody is there")


async def hang(folder: str) -> str:
    """Return when it is told to."""
    while not (pathlib.Path(folder) / "go").exists():
        await asyncio.sleep(0.02)
    return "done"
'''


class Roles:
    """Processes of one installation, and its command line."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder, self.settings = folder, settings
        outside = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        self.environment = outside | environment_of(settings)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *roles: str) -> None:
        """Start roles and wait until they are ready."""
        for role in roles:
            (self.folder / f"{role}.ready").unlink(missing_ok=True)
            with (self.folder / f"{role}.log").open("ab") as log:
                self.running[role] = subprocess.Popen(
                    [sys.executable, "-m", "infra.cli.main", "worker", role],
                    env=self.environment | {"FOLDFLOW_READY_FILE": str(self.folder / f"{role}.ready")},
                    stdout=log,
                    stderr=log,
                )
        until(lambda: all((self.folder / f"{role}.ready").exists() for role in roles), 240)

    def end(self, role: str, how: int) -> None:
        """Send a role's process a signal and wait until it is gone."""
        process = self.running.pop(role)
        process.send_signal(how)
        process.wait(90)

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call `foldflow workers`."""
        command = [sys.executable, "-m", "infra.cli.main", "workers", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def told(self) -> dict[str, Any]:
        """Return what `foldflow workers --json` says."""
        answer = self.ask("--json")
        assert answer.returncode in {0, 1}, answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout)
        assert answer.returncode == (1 if found["problems"] else 0)
        return found

    def until_told(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask until something is said."""
        deadline = time.monotonic() + 120
        while not condition(told := self.told()):
            assert time.monotonic() < deadline, told
        return told


@pytest.fixture
def roles(settings: Settings, tmp_path: Path) -> Iterator[Roles]:
    path = tmp_path / "worker_tools.py"
    path.write_text(TOOLS)
    own = settings.model_copy(update={"tool_paths": (path,), "breaker_calls": 5, "breaker_open_s": 600.0, "tool_concurrency": 10})
    found = Roles(own, tmp_path)
    yield found
    for role in [*found.running]:
        found.end(role, signal.SIGTERM)


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_who_works_and_what_waits(roles: Roles) -> None:
    """Each role's process is listed, its open circuit and what waits for it; a clean stop takes it off the list."""
    settings = roles.settings
    roles.start("intake", "orchestrator", "llm", "tool")
    told = roles.until_told(lambda told: len(told["workers"]) == 4)
    assert [each["role"] for each in told["workers"]] == ["intake", "orchestrator", "llm", "tool"]
    assert {each["pid"] for each in told["workers"]} == {process.pid for process in roles.running.values()}
    assert [each["concurrency"] for each in told["workers"]] == [0, 0, settings.llm_concurrency, 10]
    assert [(each["topic"], each["records"]) for each in told["waiting"]] == [
        *(("requests", 0), ("inbox", 0), ("llm.calls", 0), ("tool.calls", 0)),
    ]
    assert told["problems"] == []

    kafka.send(settings, [tool_call(f"fail-{number}", "fail") for number in range(4)])
    opened = roles.until_told(lambda told: any(each["breakers"] for each in told["workers"]))
    (tool,) = [each for each in opened["workers"] if each["role"] == "tool"]
    (circuit,) = tool["breakers"]
    assert (circuit["endpoint"], circuit["state"], circuit["failures"], circuit["calls"]) == ("fail", "open", 4, 4)
    assert circuit["last_error"] == "`fail` raised ConnectionRefusedError: nobody is there"
    assert circuit["retry_at"] - circuit["since"] == pytest.approx(600_000, abs=50)
    assert f"circuit of fail in {tool['worker_id']} is open" in opened["problems"]
    table = roles.ask()
    assert table.returncode == 1
    assert "nobody is there" in table.stdout
    assert "4 of 4" in table.stdout

    kafka.send(settings, [tool_call(f"hang-{number}", "hang", folder=str(roles.folder)) for number in range(30)])
    behind = roles.until_told(lambda told: any(each["in_flight"] for each in told["workers"]))
    (waits,) = [each for each in behind["waiting"] if each["topic"] == "tool.calls"]
    assert waits["records"] == 30
    assert 30 / settings.partitions <= waits["worst_records"] <= 30
    assert waits["oldest_ms"] > 0
    (tool,) = [each for each in behind["workers"] if each["role"] == "tool"]
    assert tool["in_flight"] == 10
    (roles.folder / "go").touch()
    roles.until_told(lambda told: all(each["records"] == 0 for each in told["waiting"]))

    roles.end("tool", signal.SIGTERM)
    stopped = roles.told()
    assert [each["role"] for each in stopped["workers"]] == ["intake", "orchestrator", "llm"]
    assert stopped["problems"] == []
    kafka.send(settings, [tool_call("nobody", "fail")])
    assert roles.told()["problems"] == ["1 records wait on tool.calls, and nobody works as tool"]


def test_who_was_killed_is_listed_until_it_is_silent(roles: Roles) -> None:
    """Nobody says of a killed process that it is gone; after 90 seconds without a report it is called silent."""
    roles.start("orchestrator")
    pid = roles.running["orchestrator"].pid
    roles.until_told(lambda told: bool(told["workers"]))
    roles.end("orchestrator", signal.SIGKILL)
    (killed,) = roles.told()["workers"]
    assert (killed["pid"], killed["silent"]) == (pid, False)
    assert killed["partitions"] == list(range(roles.settings.partitions))
    (seen,) = reports(roles.settings)
    then = envelope(
        topics.WORKERS,
        seen.report.worker_id,
        WorkerReported(**{name: getattr(seen.report, name) for name in WorkerReported.__dataclass_fields__} | {"reported_at": 0}),
        source="test",
        identity="then",
    )
    kafka.send(roles.settings, [then])
    told = roles.told()
    assert [each["silent"] for each in told["workers"]] == [True]
    assert told["problems"][0].startswith(f"{killed['worker_id']} has been silent for ")


def test_without_kafka_it_says_so(cli_environment: dict[str, str]) -> None:
    """Exit code 4, and what to do."""
    command = [sys.executable, "-m", "infra.cli.main", "workers"]
    answer = subprocess.run(command, env=cli_environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 4
    assert "foldflow up" in answer.stderr


def test_calls_that_are_done_ahead_do_not_wait(settings: Settings, tmp_path: Path) -> None:
    """One slow call holds the committed offset; the calls behind it that are done aren't counted as waiting."""
    path = tmp_path / "worker_tools.py"
    path.write_text(TOOLS)
    roles = Roles(settings, tmp_path)
    kafka.connect(settings)
    with working(settings, topics.TOOL_CALLS, ToolCalls(settings, load([path])), 128):
        kafka.send(settings, [_into(0, tool_call("slow", "hang", folder=str(tmp_path)))])
        kafka.send(settings, [_into(0, tool_call(f"quick-{number}", "echo", value="1")) for number in range(50)])
        waits = roles.until_told(lambda told: told["waiting"][3]["records"] == 1)["waiting"][3]
        assert (waits["topic"], waits["worst_partition"], waits["worst_records"]) == ("tool.calls", 0, 1)
        (tmp_path / "go").touch()
        roles.until_told(lambda told: told["waiting"][3]["records"] == 0)


def _into(partition: int, record: Outgoing) -> Outgoing:
    return Outgoing(record.topic, record.key, record.value, record.headers, partition)


def test_bits_of_the_commit() -> None:
    """What an offset tracker writes is what is counted; somebody else's metadata counts nothing."""
    tracker = OffsetTracker(5)
    for offset in range(5, 300):
        tracker.take(offset)
    for offset in range(7, 300, 3):
        tracker.done(offset)
    assert done_ahead(tracker.metadata()) == len(range(7, 300, 3))
    assert (done_ahead(None), done_ahead(""), done_ahead("{not ours}")) == (0, 0, 0)


def test_a_silent_workers_circuits_are_nobodys() -> None:
    """What it said last is no news of an endpoint."""
    from infra.cli.workers import Seen  # noqa: PLC0415 - of this test only

    circuit = CircuitReported("tool", "half_open", 1, 2, 3, 4, None)
    report = WorkerReported("tool-1", "tool", "here", 1, "0", 0, 0, 0, 8, (), (circuit,))
    assert problems([Seen(report, SILENT_AFTER_MS)], []) == ["circuit of tool in tool-1 is half open"]
    assert problems([Seen(report, SILENT_AFTER_MS + 1)], []) == ["tool-1 has been silent for 1 min 30 s"]


# --- The reporter alone ---


def said(settings: Settings) -> list[WorkerReported | None]:
    """Return all records of the topic; None: a tombstone."""
    with closing(kafka.reader(settings)) as source:
        return [
            None if (value := message.value()) is None else codec.decode(value, WorkerReported)
            for message in kafka.read_partition(source, kafka.name(settings, topics.WORKERS), 0, 0)
        ]


def test_it_reports_when_something_changes_and_not_otherwise(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start, at once when it is told of a change, when it sees one, at each heartbeat; a tombstone at its end."""
    kafka.connect(settings)
    monkeypatch.setattr("streams.processors.reports.EVERY_S", 0.1)
    reporter = Reporter(settings, "tool")
    flying = [0]
    reporter.look = lambda: Condition(in_flight=flying[0], concurrency=4)
    reporter.start()
    until(lambda: len(said(settings)) == 1, 60)
    time.sleep(1)  # ten looks
    assert len(said(settings)) == 1, "nothing has changed"
    flying[0] = 3
    until(lambda: len(said(settings)) == 2, 60)
    reporter.changed()
    until(lambda: len(said(settings)) == 3, 60)
    monkeypatch.setattr("streams.processors.reports.HEARTBEAT_S", 0.0)
    until(lambda: len(said(settings)) >= 6, 60)
    reporter.stop()
    *before, last = said(settings)
    assert last is None
    assert [each.in_flight for each in before if each][:3] == [0, 3, 3]
    assert reports(settings) == []
