"""Whatever anybody writes: no process ends, no partition stops, honest runs complete, and nothing goes by unseen."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from confluent_kafka import Consumer
from poison import FUTURE_MS, HONEST, MB, WAITING, Dead, Decided, Outsider, Passed, Poison, Scene, Shot
from poisons import POISONS
from ports import free_ports

from events import codec, ids, topics
from events.commands import WorkflowRequest
from events.decisions import DeadLetter, Decision, InputIgnored
from events.errors import NotDecodableError
from infra.embedded.supervisor import Supervisor
from streams import kafka, registry
from streams.kafka import TopicPartition
from streams.settings import Settings
from streams.workflow.chain import ends_run

pytestmark = pytest.mark.integration

PARTITIONS = 4
PATIENCE_S = 120.0
START_S = 300.0
ROLES = ("intake", "orchestrator", "tool", "llm", "api")
GROUPS = (
    ("intake", topics.REQUESTS),
    ("intake", topics.DEADLETTER),
    ("orchestrator", topics.INBOX),
    ("tool.calls", topics.TOOL_CALLS),
    ("llm.calls", topics.LLM_CALLS),
)
Place = tuple[str, int, int]


class StoppedError(AssertionError):
    """A process has ended, or a partition doesn't go on."""


class Watch:
    """What stands on `decisions` and `deadletter`, as it comes."""

    def __init__(self, settings: Settings) -> None:
        self._reader = kafka.reader(settings)
        self._decisions, self._letters = (kafka.name(settings, topic) for topic in (topics.DECISIONS, topics.DEADLETTER))
        self._reader.assign([TopicPartition(name, p, 0) for name in (self._decisions, self._letters) for p in range(PARTITIONS)])
        self.over: set[str] = set()
        self.runs: set[str] = set()
        self.decided: dict[tuple[int, int], Decision] = {}
        self.letters: dict[Place, DeadLetter] = {}

    def look(self) -> None:
        """Take what has come since the last look."""
        for message in kafka.poll(self._reader, 0.02):
            try:
                if message.topic() == self._letters:
                    letter = codec.decode(message.value(), DeadLetter)
                    self.letters[letter.topic, letter.partition, letter.offset] = letter
                else:
                    self._take(codec.decode(message.value(), Decision), message.partition() or 0)
            except NotDecodableError:
                continue  # poison

    def _take(self, decision: Decision, partition: int) -> None:
        self.runs.add(decision.run_id)
        self.decided[partition, decision.input_offset] = decision
        if ends_run(decision):
            self.over.add(decision.run_id)

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()


class Installation:
    """Real processes of every role on topics of their own, and what is known of them."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        values = settings.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        self._environment |= {
            f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._starts = self._honest = 0
        self.spoiled = False
        settings.data_dir.mkdir(parents=True)
        cluster = kafka.connect(settings)
        registry.publish(settings, [HONEST, WAITING])
        self.watch = Watch(settings)
        self.outsider = Outsider(settings.bootstrap_servers, settings.topic_prefix)
        inbox, decisions = cluster.ids[topics.INBOX.name], cluster.ids[topics.DECISIONS.name]
        self.scene = Scene(inbox, decisions, PARTITIONS, ids.run_id("open"), ids.run_id("over"))

    def begin(self) -> None:
        """Start every role, and the two runs that the poison is about."""
        self.start(*ROLES)
        self._request(WorkflowRequest(WAITING.name, "{}", "open"), 0)
        self._request(WorkflowRequest(HONEST.name, '{"text": "x"}', "over"), 1)
        self.until(lambda: self.scene.open in self.watch.runs and self.scene.over in self.watch.over, "the first runs")

    def start(self, *roles: str) -> None:
        """Start roles and wait until they are ready."""
        ready = {role: self._spawn(role) for role in roles}
        deadline = time.monotonic() + START_S
        while not all(path.exists() for path in ready.values()):
            self.alive()
            self.spoiled = time.monotonic() > deadline
            assert not self.spoiled, f"not ready: {[role for role, path in ready.items() if not path.exists()]}"
            time.sleep(0.02)

    def _spawn(self, role: str) -> Path:
        self._starts += 1
        ready = self.folder / f"{role}-{self._starts}.ready"
        command = ["api"] if role == "api" else ["worker", role]
        with (self.folder / f"{role}.log").open("ab") as log:
            self._running[role] = subprocess.Popen(
                [sys.executable, "-m", "infra.cli.main", *command],
                env=self._environment | {"FOLDFLOW_READY_FILE": str(ready)},
                stdout=log,
                stderr=log,
            )
        return ready

    def take_over(self) -> None:
        """Let another orchestrator take the partitions over."""
        former = self._running.pop("orchestrator")
        former.terminate()
        former.wait(60)
        self.start("orchestrator")

    def stop(self) -> None:
        """End all."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.watch.close()

    def alive(self) -> None:
        """Raise StoppedError if a process has ended."""
        for role, process in self._running.items():
            if process.poll() is not None:
                self.spoiled = True
                raise StoppedError(f"{role} has ended with {process.returncode}:\n{self.log(role)}")

    def log(self, role: str) -> str:
        """Return the end of a role's log."""
        return (self.folder / f"{role}.log").read_text(errors="replace")[-4000:]

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition is true while all processes live. Raises StoppedError."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.watch.look()
            if condition():
                return
            self.alive()
            if time.monotonic() > deadline:
                self.spoiled = True
                logs = "\n".join(f"--- {role}\n{self.log(role)}" for role in ROLES)
                raise StoppedError(f"{what}: not within {PATIENCE_S:.0f} s; lag {self.lag()}\n{logs}")

    def _request(self, request: WorkflowRequest, partition: int) -> str:
        self.outsider.send(topics.REQUESTS, [Shot(codec.encode(request), partition=partition)])
        return ids.run_id(request.request_id or "")

    def ask(self) -> set[str]:
        """Request an honest run for every partition of the inbox, by every partition of the requests; return their ids."""
        asked: set[str] = set()
        for partition in range(PARTITIONS):
            while True:
                self._honest += 1
                request = WorkflowRequest(HONEST.name, json.dumps({"text": f"{self._honest}"}), f"honest-{self._honest}")
                if self.scene.home(ids.run_id(request.request_id or "")) == partition:
                    break
            asked.add(self._request(request, partition))
        return asked

    def completed(self, runs: set[str]) -> bool:
        """Say whether all these runs are over."""
        return runs <= self.watch.over

    def lag(self) -> dict[str, int]:
        """Return how many records of each partition a group has not committed yet, where there are any; the views as well."""
        found = {}
        for group, topic in GROUPS:
            member = Consumer(
                {"bootstrap.servers": self.settings.bootstrap_servers, "group.id": self.settings.topic_prefix + group}
            )
            name = kafka.name(self.settings, topic)
            for place in member.committed([TopicPartition(name, p) for p in range(PARTITIONS)], timeout=20):
                low, high = member.get_watermark_offsets(TopicPartition(name, place.partition), timeout=20)
                if (behind := high - (place.offset if place.offset >= 0 else low)) > 0:
                    found[f"{group}: {topic.name}/{place.partition}"] = behind
            member.close()
        if self.behind():
            found["api"] = self.behind()
        return found

    def behind(self) -> int:
        """Return how many records the views are behind."""
        try:
            health = httpx.get(f"http://127.0.0.1:{self.settings.api_port}/health", trust_env=False, timeout=20).json()
        except httpx.HTTPError:
            return -1
        return int(health["lag"])

    def outcome(self, poison: Poison, place: Place) -> str | None:
        """Return what has become of a record that is not what it should be; None: it is what it should be."""
        letter, decision = self.watch.letters.get(place), self.watch.decided.get(place[1:])
        if poison.topic is not topics.INBOX:
            decision = None
        match poison.outcome:
            case Dead(reason):
                return (
                    None if letter is not None and letter.reason == reason else f"no dead letter but {letter and letter.reason}"
                )
            case Decided(ignored, reason):
                reasons = [e.reason for e in decision.effects if isinstance(e, InputIgnored)] if decision else []
                if ignored not in reasons:
                    return f"decided as {decision and decision.effects}"
                return None if (letter and letter.reason) == reason else f"dead letter {letter and letter.reason}"
            case Passed():
                return None if letter is None else f"a dead letter: {letter.reason}"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Start a broker and return the settings that name it."""
    broker_port, model_port, api_port = free_ports(3)
    settings = Settings(
        bootstrap_servers=f"127.0.0.1:{broker_port}",
        local_model_url=f"http://127.0.0.1:{model_port}",  # nobody listens there: no honest run asks a model
        api_host="127.0.0.1",
        api_port=api_port,
        data_dir=tmp_path_factory.mktemp("poison"),
    )
    supervisor = Supervisor(settings)
    try:
        supervisor.up(frozenset({"kafka"}))
        yield supervisor.settings
    finally:
        supervisor.down()


@pytest.fixture(scope="module")
def installations() -> Iterator[list[Installation]]:
    """Hold the installation that the tests share; one that poison has stopped is replaced."""
    held: list[Installation] = []
    yield held
    for each in held:
        each.stop()


@pytest.fixture
def installation(broker: Settings, installations: list[Installation], tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Return an installation that works."""
    if installations and installations[-1].spoiled:
        installations.pop().stop()
    if not installations:
        folder = tmp_path_factory.mktemp("roles")
        own = {"topic_prefix": f"p{uuid.uuid4().hex[:8]}.", "data_dir": folder / "data", "partitions": PARTITIONS}
        installations.append(Installation(broker.model_copy(update={**own, "session_timeout_ms": 6_000}), folder))
        installations[-1].begin()
    return installations[-1]


def cases() -> list[object]:
    """Return the table. What is known to break would end processes that the others need: it is judged, not sent."""
    return [
        pytest.param(
            poison,
            id=f"{poison.topic.name}: {poison.name}",
            marks=[pytest.mark.xfail(run=False, reason=poison.broken or poison.stops or "")]
            if poison.broken or poison.stops
            else [],
        )
        for poison in POISONS
    ]


@pytest.mark.parametrize("poison", cases())
def test_poison_stops_nothing(installation: Installation, poison: Poison) -> None:
    """Honest runs on every partition complete before, beside and behind it; what becomes of it is what the table says."""
    runs = installation.ask()
    places = installation.outsider.send(poison.topic, poison.shots(installation.scene))
    runs |= installation.ask()
    if poison.takeover:
        installation.take_over()
    if not isinstance(poison.outcome, Passed):
        installation.until(lambda: not wrong(installation, poison, places), "what becomes of it")
    installation.until(lambda: installation.completed(runs), "the honest runs")
    installation.until(lambda: installation.behind() == 0, "the views")
    assert not wrong(installation, poison, places)


@pytest.mark.parametrize(
    ("shot", "refusal"),
    [
        (Shot(b"x" * 10 * MB), "MSG_SIZE_TOO_LARGE"),
        (Shot(b"x", b"k" * 10 * MB), "MSG_SIZE_TOO_LARGE"),
        (Shot(b"x", timestamp=FUTURE_MS), "INVALID_TIMESTAMP"),
    ],
    ids=["value of 10 MB", "key of 10 MB", "the year 3000"],
)
def test_what_the_broker_refuses(installation: Installation, shot: Shot, refusal: str) -> None:
    """Such a record never stands on a topic: its sender hears why."""
    assert installation.outsider.refused(topics.REQUESTS, shot) == refusal


def wrong(installation: Installation, poison: Poison, places: list[Place]) -> list[str]:
    """Return what has not become what it should."""
    return [f"{place}: {found}" for place in places if (found := installation.outcome(poison, place))]


def test_every_partition_is_read_to_its_end(installation: Installation) -> None:
    """After all of it, once more taken over, every group and the views have read everything."""
    runs = installation.ask()
    installation.take_over()
    installation.until(lambda: installation.completed(runs), "the honest runs")
    installation.until(lambda: not installation.lag(), "no lag")
