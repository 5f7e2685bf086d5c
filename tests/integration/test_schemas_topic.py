"""Real processes meet what they can't judge: they end in front of what newer code wrote, and nothing is lost.

Six bytes of anybody stop nobody, and neither does a fault in judging a request.
"""

import copy
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastavro import parse_schema, schemaless_writer

from events import catalog, codec, topics
from events.calls import CancelCall, ToolCall, ToolCallRequested
from events.commands import StartRun, WorkflowRegistered, WorkflowRequest
from events.decisions import DeadLetter, Decision, SchemaPublished
from events.ids import FIRST_PREV, run_id
from events.results import InboxMessage
from events.topics import Topic
from projections.projector import Projector
from streams import commits, kafka, schemas
from streams.envelope import Outgoing, envelope
from streams.processors.orchestrator import GROUP
from streams.registry import publish
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec

ROOT = Path(__file__).parents[2]
NEWER = 78
SPEC = WorkflowSpec.model_validate({"name": "w", "steps": {"a": {"transform": "=1 + 1"}}})
SIX_BYTES = codec.FRAME.pack(0, 4711) + b"x"
TOOL = 'async def twice(value: int) -> int:\n    """Double it."""\n    return 2 * value\n'


def newer(event: Any) -> tuple[Outgoing, bytes]:
    """Return an event as newer code would write it, with one more field, and what that code has published before."""
    schema = copy.deepcopy(catalog.ENTRIES[type(event)].schema)
    schema["fields"].append({"name": "novelty", "type": "string", "default": ""})
    out = io.BytesIO()
    schemaless_writer(out, parse_schema(catalog._without_logical_types(schema)), codec.datum(event) | {"novelty": "new"})
    number = catalog.fingerprint(schema)
    entry = SchemaPublished(number, type(event).__name__, json.dumps(schema))
    said = envelope(topics.SCHEMAS, str(number), entry, source="test", identity=str(number))
    return said, codec.FRAME.pack(0, number) + out.getvalue()


def start_of(name: str) -> InboxMessage:
    return InboxMessage(run_id(name), StartRun(name, SPEC.name, SPEC.digest, "{}"))


def call(name: str) -> ToolCall:
    due = round((time.time() + 300) * 1000)
    return ToolCall(name, run_id("any"), ToolCallRequested("a", 1, "twice", '{"value": 4}', due))


ROLES: dict[str, tuple[Topic, str, Callable[[str], Any]]] = {
    "intake": (topics.REQUESTS, "intake", lambda name: WorkflowRequest(SPEC.name, "{}", name)),
    "orchestrator": (topics.INBOX, GROUP, start_of),
    "tool": (topics.TOOL_CALLS, topics.TOOL_CALLS.name, call),
}
"""What each role reads, its consumer group, and what makes it work."""


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Settings:
    """Return settings with one partition, so that what is sent is read in that order."""
    (tmp_path / "doubling.py").write_text(TOOL)
    made = settings.model_copy(update={"partitions": 1, "tool_paths": (tmp_path / "doubling.py",)})
    kafka.connect(made)
    return made


class Processes:
    """Processes of roles, and commands, with one test's settings."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder, self.running = folder, list[subprocess.Popen[bytes]]()
        values = settings.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        self.environment |= {
            f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
        }

    def start(self, role: str, code: str = "") -> subprocess.Popen[bytes]:
        """Start a role, by its command or by code; it may be ready later, or never."""
        with (self.folder / "log").open("ab") as log:
            line = [sys.executable, *(("-c", code) if code else ("-m", "infra.cli.main", "worker", role))]
            process = subprocess.Popen(line, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def command(self, *line: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a `foldflow` command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "infra.cli.main", *line],
            cwd=ROOT,
            env=self.environment,
            input=stdin,
            capture_output=True,
            check=False,
            timeout=180,
        )

    @property
    def log(self) -> str:
        """What they have logged."""
        return (self.folder / "log").read_text(errors="replace")[-5000:]

    def stop(self) -> None:
        """End all."""
        for process in self.running:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


@pytest.fixture
def processes(own: Settings, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(own, tmp_path)
    yield made
    made.stop()


def until(condition: Callable[[], bool], explain: Callable[[], object], patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def values(settings: Settings, topic: Topic) -> list[bytes]:
    """Return what stands on partition 0 of a topic."""
    with closing(kafka.reader(settings)) as source:
        return [each.value() or b"" for each in kafka.read_partition(source, kafka.name(settings, topic), 0, 0)]


def done(settings: Settings, role: str) -> list[str]:
    """Return what a role has brought about: names of requests or calls, in order."""
    if role == "orchestrator":
        started = [codec.decode(each, Decision).input for each in values(settings, topics.DECISIONS)]
        return [each.request_id for each in started if isinstance(each, StartRun)]
    inputs = [codec.decode(each, InboxMessage).input for each in values(settings, topics.INBOX)]
    named = [(each.request_id if isinstance(each, StartRun) else getattr(each, "call_id", None)) for each in inputs]
    return [name for name in named if name is not None]


def letters(settings: Settings) -> list[tuple[int, str, bytes | None]]:
    """Return the dead letters: offset, reason, value."""
    found = [codec.decode(each, DeadLetter) for each in values(settings, topics.DEADLETTER)]
    return sorted((each.offset, each.reason, each.value) for each in found)


def committed(settings: Settings, topic: Topic, group: str) -> int:
    with closing(kafka.consumer(settings, group)) as member:
        (found,) = commits.committed(member, [kafka.TopicPartition(kafka.name(settings, topic), 0)])
        return found.offset


def take_back(processes: Processes) -> None:
    """Do what docs/upgrades.md says about going back, to the letter."""
    text = (
        (ROOT / "docs" / "upgrades.md").read_text("utf-8").split("## Going back", 1)[1].split("```sh\n", 1)[1].split("```", 1)[0]
    )
    code = text.split("'", 2)[1]
    prefix = processes.environment["FOLDFLOW_TOPIC_PREFIX"]
    line = shlex.split(text.split("newer-schemas\n", 1)[1].split("<", 1)[0].replace("foldflow.schemas", f"{prefix}schemas"))
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=processes.environment, capture_output=True, check=True)
    assert line[0] == "foldflow"
    told = processes.command(*line[1:], stdin=found.stdout)
    assert told.returncode == 0, told


@pytest.mark.timeout(400)
@pytest.mark.parametrize("role", [each if each == "intake" else pytest.param(each, marks=pytest.mark.thorough) for each in ROLES])
def test_a_role_ends_in_front_of_what_newer_code_wrote(own: Settings, processes: Processes, role: str) -> None:
    """Six bytes of anybody stop nothing; a published schema does, with what came before it done and acknowledged.

    Started again it ends again. When its schema is taken back it is a dead letter, and what stands behind it is done.
    """
    topic, group, make = ROLES[role]
    publish(own, [SPEC])
    known = {each for each in schemas.published(own) if each in {entry.id for entry in catalog.ENTRIES.values()}}
    assert known == {entry.id for entry in catalog.ENTRIES.values()}, "who registers workflows writes, so it publishes"
    said, value = newer(make("newer"))

    def send(**records: bytes) -> None:
        kafka.send(own, [Outgoing(topic, run_id(name).encode(), each, [], 0) for name, each in records.items()])

    process = processes.start(role)
    send(garbage=SIX_BYTES, one=codec.encode(make("one")))
    until(lambda: done(own, role) == ["one"], lambda: processes.log)
    garbage = ("unreadable" if role == "orchestrator" else "not_decodable", SIX_BYTES)
    until(lambda: letters(own) == [(0, *garbage)], lambda: processes.log)
    assert process.poll() is None
    kafka.send(own, [said])
    send(two=codec.encode(make("two")), newer=value, three=codec.encode(make("three")))
    assert process.wait(90) == NEWER, processes.log
    assert "upgrade this process" in processes.log
    assert processes.start(role).wait(90) == NEWER, processes.log
    assert (done(own, role), committed(own, topic, group)) == (["one", "two"], 3)
    assert letters(own) == [(0, *garbage)]
    if role == "intake":
        take_back(processes)
    else:
        kafka.send(own, [Outgoing(topics.SCHEMAS, said.key, None, [])])
    processes.start(role)
    until(lambda: done(own, role) == ["one", "two", "three"], lambda: processes.log)
    until(lambda: letters(own) == [(0, *garbage), (3, garbage[0], value)], lambda: processes.log)


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_newer_workflow_or_cancellation_ends_who_must_know_of_it(own: Settings, processes: Processes) -> None:
    """Also when it stands there already at their start: one that went on would refuse, fail or pay for what it doesn't know."""
    for topic, event in (
        (topics.SPECS, WorkflowRegistered(SPEC.name, SPEC.digest, SPEC.canonical)),
        (topics.CANCELLATIONS, CancelCall("c", run_id("any"), "a", "why")),
    ):
        said, value = newer(event)
        kafka.send(own, [said])
        kafka.send(own, [Outgoing(topic, b"k", value, [], 0)])
    for process in [processes.start(role) for role in ROLES]:
        assert process.wait(90) == NEWER, processes.log


FAULTY = """
from streams import app
from streams.processors.intake import Intake
from streams.settings import Settings

check = Intake.check
def faulty(self, record):
    if b"fault" in record.value:
        raise RuntimeError("nobody foresaw this")
    return check(self, record)

Intake.check = faulty
app.run("intake", Settings())
"""


@pytest.mark.timeout(300)
def test_a_fault_in_judging_a_request_is_a_dead_letter_and_intake_goes_on(own: Settings, processes: Processes) -> None:
    """The request's bytes are kept, those behind it are taken, all is acknowledged, and the process still ends when told to."""
    publish(own, [SPEC])
    process = processes.start("intake", FAULTY)
    sent = [codec.encode(WorkflowRequest(SPEC.name, "{}", name)) for name in ("one", "fault", "two")]
    kafka.send(own, [Outgoing(topics.REQUESTS, b"k", value, [], 0) for value in sent])
    until(lambda: done(own, "intake") == ["one", "two"], lambda: processes.log)
    until(lambda: letters(own) == [(1, "internal", sent[1])], lambda: processes.log)
    until(lambda: committed(own, topics.REQUESTS, "intake") == 3, lambda: processes.log)
    process.terminate()
    assert process.wait(60) == 0, processes.log


@pytest.mark.timeout(300)
def test_roles_publish_before_they_write(own: Settings, processes: Processes) -> None:
    """Each schema of this code stands there when the first record does, once however often a process starts."""
    ids = {entry.id: kind.__name__ for kind, entry in catalog.ENTRIES.items()}
    assert schemas.published(own) == {}
    processes.start("orchestrator")
    until(lambda: schemas.published(own) == ids, lambda: processes.log)
    stands = len(values(own, topics.SCHEMAS))
    schemas.publish(own)
    assert len(values(own, topics.SCHEMAS)) == stands == len(ids)


@pytest.mark.timeout(300)
def test_views_and_commands_end_in_front_of_a_newer_decision(own: Settings, processes: Processes, tmp_path: Path) -> None:
    """The views say what to do and go on when they can; a command says so instead of showing the run as it was."""
    run = run_id("one")
    publish(own, [SPEC])
    said, value = newer(Decision(run, 1, FIRST_PREV, b"i" * 16, 0, 0, StartRun("one", SPEC.name, SPEC.digest, "{}"), ()))
    projector = Projector(own, tmp_path / "views.duckdb")
    projector.start()
    try:
        until(projector.caught_up.is_set, lambda: projector.problem)
        kafka.send(own, [said])
        kafka.send(own, [Outgoing(topics.DECISIONS, run.encode(), each, [], 0) for each in (SIX_BYTES, value)])
        until(lambda: "upgrade this process" in (projector.problem or ""), lambda: projector.problem)
        assert (projector.positions["decisions", 0], projector.failure) == (1, None)
        for line in (("history", run), ("fork", run), ("cancel", run), ("run", SPEC.name, "--request-id", "one", "--wait")):
            ended = processes.command(*line)
            assert (ended.returncode, ended.stdout.strip()) == (NEWER, b"" if line[0] != "run" else run.encode()), ended
            assert b"was written by newer code" in ended.stderr
            assert b"upgrade foldflow" in ended.stderr
        shown = processes.command("tail", "decisions", "--no-follow")
        assert (shown.returncode, b"newer code" in shown.stdout) == (0, True)
        kafka.send(own, [Outgoing(topics.SCHEMAS, said.key, None, [])])
        until(lambda: projector.positions["decisions", 0] == 2 and projector.problem is None, lambda: projector.problem)
    finally:
        projector.stop()
