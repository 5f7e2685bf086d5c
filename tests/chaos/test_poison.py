"""Whatever anybody writes: no process ends, no partition stops, honest runs complete, and nothing goes by unseen."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import httpx
import pytest
from confluent_kafka import Consumer
from poison import FUTURE_MS, HONEST, MB, WAITING, Dead, Decided, Outsider, Poison, Scene, Shot
from poisons import POISONS
from ports import free_ports
from processes import views_behind

from events import codec, ids, topics
from events.commands import WorkflowRequest
from events.decisions import DeadLetter, Decision, InputIgnored
from events.errors import NotDecodableError
from infra.embedded.supervisor import Supervisor
from streams import kafka, registry
from streams.envelope import CUT, Incoming
from streams.kafka import TopicPartition
from streams.settings import Settings
from streams.workflow.chain import ends_run

pytestmark = pytest.mark.integration

PARTITIONS = 2
PATIENCE_S = 120.0
START_S = 300.0
ROLES = ("intake", "orchestrator", "tool", "llm", "api")
GROUPS = (
    ("intake", topics.REQUESTS),
    ("orchestrator", topics.INBOX),
    ("tool.calls", topics.TOOL_CALLS),
    ("llm.calls", topics.LLM_CALLS),
)
LEAST = {"key": 64 * 1024, "value": 7 * MB}
"""How much of a part a dead letter keeps at least when it must cut it."""
Place = tuple[str, int, int]


class StoppedError(AssertionError):
    """A process has ended, or a partition doesn't go on."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A dead letter, without what is large in it. `cut`: the parts of its message that aren't whole."""

    reason: str
    key: tuple[int, bytes] | None
    value: tuple[int, bytes] | None
    headers: dict[str, bytes | None]
    cut: str


def mark(data: bytes | None) -> tuple[int, bytes] | None:
    """Return how many bytes there are and their hash."""
    return None if data is None else (len(data), blake2b(data).digest())


class Watch:
    """What stands on `decisions` and `deadletter`, as it comes."""

    def __init__(self, settings: Settings) -> None:
        self._reader = kafka.reader(settings)
        self._decisions, self._letters = (kafka.name(settings, topic) for topic in (topics.DECISIONS, topics.DEADLETTER))
        self._read = {(name, p): 0 for name in (self._decisions, self._letters) for p in range(PARTITIONS)}
        self._reader.assign([TopicPartition(*place, 0) for place in self._read])
        self.over: set[str] = set()
        self.runs: set[str] = set()
        self.decided: dict[tuple[int, int], Decision] = {}
        self.letters: dict[Place, Kept] = {}

    def look(self) -> None:
        """Take what has come since the last look."""
        for message in kafka.poll(self._reader, 0.02):
            where = message.topic() or "", message.partition() or 0
            self._read[where] = (message.offset() or 0) + 1
            with suppress(NotDecodableError):  # poison
                if where[0] == self._letters:
                    self._keep(kafka.incoming(message))
                else:
                    self._take(codec.decode(message.value(), Decision), where[1])

    def catch_up(self) -> None:
        """Take everything that is there."""
        ends = {place: kafka.watermarks(self._reader, *place)[1] for place in self._read}
        while any(self._read[place] < end for place, end in ends.items()):
            self.look()

    def _keep(self, record: Incoming) -> None:
        letter = codec.decode(record.value, DeadLetter)
        cut = (record.headers.get(CUT) or b"").decode()
        kept = Kept(letter.reason, mark(letter.key), mark(letter.value), dict(letter.headers), cut)
        self.letters[letter.topic, letter.partition, letter.offset] = kept

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

    def until(self, condition: Callable[[], bool], what: str, every_s: float = 0.0) -> None:
        """Wait until a condition is true while all processes live. Raises StoppedError."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.watch.look()
            if condition():
                return
            self.alive()
            time.sleep(every_s)
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

    def command(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command of ours to its end."""
        call = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(call, env=self._environment, capture_output=True, timeout=PATIENCE_S, check=False)

    def requests(self) -> int:
        """Return how many records were ever put on `requests`."""
        name = kafka.name(self.settings, topics.REQUESTS)
        with closing(kafka.reader(self.settings)) as source:
            return sum(kafka.watermarks(source, name, p)[1] for p in range(PARTITIONS))

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
        """Return how many records the views are behind; -1: they can't be asked."""
        try:
            return views_behind(self.settings)
        except (OSError, kafka.KafkaUnreachableError):
            return -1

    def settled(self, runs: set[str]) -> None:
        """Wait until honest runs are over and everything is read, by all. Raises StoppedError."""
        self.until(lambda: self.completed(runs), "the honest runs")
        self.until(lambda: not self.lag(), "everything is read", every_s=0.3)
        self.watch.catch_up()

    def wrong(self, poison: Poison, shot: Shot, place: Place) -> str | None:
        """Return what has become of a record that is not what it should be; None: it is what it should be."""
        letter, decision = self.watch.letters.get(place), self.watch.decided.get(place[1:])
        if poison.topic is not topics.INBOX:
            decision = None
        expected: str | None = None
        match poison.outcome:
            case Dead(reason):
                expected = reason
            case Decided(ignored, reason):
                expected = reason
                reasons = [e.reason for e in decision.effects if isinstance(e, InputIgnored)] if decision else []
                if ignored not in reasons:
                    return f"decided as {decision and decision.effects}"
        if (letter.reason if letter else None) != expected:
            return f"dead letter: {letter and letter.reason}, not {expected}"
        return changed(shot, letter) if letter else None


def changed(shot: Shot, letter: Kept) -> str | None:
    """Return what a dead letter has not kept of a record, as far as it doesn't say that it was cut."""
    for part, sent, kept in (("key", shot.key, letter.key), ("value", shot.value, letter.value)):
        cut = part in letter.cut and sent is not None and kept is not None and kept[0] >= LEAST[part]
        if kept != mark(sent[: kept[0]] if cut and sent and kept else sent):
            return f"its dead letter has another {part}"
    if "headers" not in letter.cut and dict(shot.headers) != letter.headers:
        return f"its dead letter has other headers: {letter.headers}"
    return None


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


class Story:
    """All of the poison, a wave for each topic, and what was wrong with each row. One that stops something ends its wave."""

    def __init__(self, broker: Settings, folder: Callable[[], Path]) -> None:
        self._broker, self._folder = broker, folder
        self.wrong: dict[tuple[str, str], list[str]] = {}
        self.installation = self._new()
        takeover = [poison for poison in POISONS if poison.takeover]
        for _, wave in groupby((poison for poison in POISONS if not poison.takeover), key=lambda poison: poison.topic):
            self._send([*wave])
        self._send(takeover, then=self.installation.take_over)

    def _new(self) -> Installation:
        folder = self._folder()
        own = {"topic_prefix": f"p{uuid.uuid4().hex[:8]}.", "data_dir": folder / "data", "partitions": PARTITIONS}
        made = Installation(self._broker.model_copy(update={**own, "session_timeout_ms": 6_000}), folder)
        made.begin()
        return made

    def _send(self, wave: list[Poison], then: Callable[[], None] = lambda: None) -> None:
        """Send honest requests, poison, and honest requests; note what has become of each row when all is read."""
        here = self.installation
        try:
            runs = here.ask()
            sent = [
                (poison, shots, here.outsider.send(poison.topic, shots))
                for poison in wave
                if (shots := [*poison.shots(here.scene)])
            ]
            runs |= here.ask()
            then()
            here.settled(runs)
        except StoppedError as error:
            self.wrong |= {(poison.topic.name, poison.name): [str(error)] for poison in wave}
            here.stop()
            self.installation = self._new()
            return
        for poison, shots, places in sent:
            found = (here.wrong(poison, shot, place) for shot, place in zip(shots, places, strict=True))
            self.wrong[poison.topic.name, poison.name] = [*filter(None, found)]


@pytest.fixture(scope="module")
def story(broker: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Tell it once; the tests read from it."""
    told = Story(broker, lambda: tmp_path_factory.mktemp("roles"))
    yield told
    told.installation.stop()


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: f"{poison.topic.name}: {poison.name}")
def test_poison_stops_nothing(story: Story, poison: Poison) -> None:
    """Honest runs on every partition complete before, beside and behind it, all is read; what becomes of it the table says."""
    assert story.wrong[poison.topic.name, poison.name] == []


@pytest.mark.parametrize(
    ("shot", "refusal"),
    [
        (Shot(b"x" * 10 * MB), "MSG_SIZE_TOO_LARGE"),
        (Shot(b"x", b"k" * 10 * MB), "MSG_SIZE_TOO_LARGE"),
        (Shot(b"x", timestamp=FUTURE_MS), "INVALID_TIMESTAMP"),
    ],
    ids=["value of 10 MB", "key of 10 MB", "the year 3000"],
)
def test_what_the_broker_refuses(story: Story, shot: Shot, refusal: str) -> None:
    """Such a record never stands on a topic: its sender hears why."""
    assert story.installation.outsider.refused(topics.REQUESTS, shot) == refusal


def test_what_is_compacted_has_keys(story: Story) -> None:
    """The broker refuses records without one there."""
    assert story.installation.outsider.refused(topics.SPECS, Shot(b"x", None)) == "INVALID_RECORD"


@pytest.mark.parametrize("page", ["/runs", "/deadletters", "/approvals", "/health"])
def test_the_read_api_answers(story: Story, page: str) -> None:
    """Whoever asks has an answer, after all of it."""
    answer = httpx.get(f"http://127.0.0.1:{story.installation.settings.api_port}{page}", trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text[:2000]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["tail", "--no-follow", "--last", "30"], 0),
        (["tail", "--no-follow", "--last", "30", "--json"], 0),
        (["deadletters", "list", "--all"], 0),
        (["workers"], 1),  # a report says that a circuit is open
        (["runs"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_commands_answer(story: Story, command: list[str], code: int) -> None:
    """They show what they can of it."""
    done = story.installation.command(*command)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr[-3000:]


def test_what_is_too_large_is_said_before_anything_is_sent(story: Story, tmp_path: Path) -> None:
    """An input or a payload of 10 MB is refused by the command, with its size and the limit; nothing stands on the topic."""
    large, here = tmp_path / "large.json", story.installation
    large.write_text(json.dumps("x" * 10 * MB))
    before = here.requests()
    for command in (["run", HONEST.name, "--input", f"@{large}"], ["signal", here.scene.open, "never", "--payload", f"@{large}"]):
        done = here.command(*command)
        assert (done.returncode, b"too large" in done.stderr, b"8,388,608" in done.stderr) == (2, True, True), done.stderr[-3000:]
    assert here.requests() == before


def test_every_partition_is_read_to_its_end(story: Story) -> None:
    """After all of it, once more taken over, every group and the views have read everything."""
    runs = story.installation.ask()
    story.installation.take_over()
    story.installation.settled(runs)
