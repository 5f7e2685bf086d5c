"""A model ten times slower than what is asked of it: what waits, waits in Kafka; no memory grows, and others are not slowed down.

Real processes on a real Kafka; the model's place is taken by a real HTTP server that answers as a provider does, only slowly:
what it says is of no interest here, when it says it is. Figures are printed (`pytest -s`).
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from confluent_kafka import Producer

from events import codec, topics
from events.commands import WorkflowRequest
from events.decisions import Decision, RunCompleted, RunFailed
from events.ids import run_id
from streams import kafka as streams_kafka
from streams import registry
from streams.envelope import envelope
from streams.kafka import TopicPartition
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec

_SPEC = importlib.util.spec_from_file_location("integration_fixtures", Path(__file__).parents[1] / "integration" / "conftest.py")
assert _SPEC
assert _SPEC.loader
fixtures: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixtures)
embedded, kafka, settings = fixtures.embedded, fixtures.kafka, fixtures.settings

ROLES: Final = ("intake", "orchestrator", "llm", "tool")
RUNS: Final = 1800
PER_S: Final = 120
IN_FLIGHT, ANSWER_S = 6, 0.5
"""12 answers a second: a tenth of what is asked."""
QUICK_EVERY_S: Final = 0.25
GROWTH_MB: Final = 20.0
"""How much a process that only passes things on may grow while 1,600 calls wait, from two seconds after the first."""
TREND_MB: Final = 4.0
"""How much it may be larger in the last quarter of that time than in the third."""
PER_RUN_KB: Final = 10.0
"""What an open run may take of the orchestrator."""
QUICK_P95_S: Final = 3.0

ASKING = WorkflowSpec.model_validate(
    {"name": "asking", "steps": {"ask": {"llm": {"prompt": "Say {{ input.n }}", "max_tokens": 3}, "timeout": "600s"}}}
)
QUICK = WorkflowSpec.model_validate(
    {
        "name": "quick",
        "steps": {
            "one": {"tool": {"name": "echo", "arguments": {"value": "one"}}},
            "two": {"needs": ["one"], "tool": {"name": "echo", "arguments": {"value": "two"}}},
        },
    }
)


class Model(ThreadingHTTPServer):
    """Speaks OpenAI's chat completions, `answer_s` after it is asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answer_s, self.answered, self.most = ANSWER_S, 0, 0
        self._lock, self._asking = threading.Lock(), 0

    def take(self, change: int) -> None:
        """Count who is being answered."""
        with self._lock:
            self._asking += change
            self.most = max(self.most, self._asking)
            self.answered += change < 0


class Answers(BaseHTTPRequestHandler):
    """One connection."""

    server: Model
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer with one word."""
        self.rfile.read(int(self.headers["content-length"]))
        self.server.take(1)
        time.sleep(self.server.answer_s)
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "smollm2", "choices": [choice], "usage": usage}
        body = json.dumps(answer).encode()
        self.server.take(-1)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def slow_model() -> Iterator[Model]:
    """Serve the model."""
    with Model() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


class Processes:
    """One process of each role."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        values = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        environment |= {
            f"FOLDFLOW_{key.upper()}": each if isinstance(each, str) else json.dumps(each) for key, each in values.items()
        }
        self.folder, self.running = folder, {}
        for role in ROLES:
            with (folder / f"{role}.log").open("ab") as log:
                command = [sys.executable, "-m", "infra.cli.main", "worker", role]
                ready = {"FOLDFLOW_READY_FILE": str(folder / f"{role}.ready")}
                self.running[role] = subprocess.Popen(command, env=environment | ready, stdout=log, stderr=log)
        self.seen: dict[str, list[tuple[float, float]]] = {role: [] for role in ROLES}

    def wait(self) -> None:
        """Wait until all are ready."""
        until(lambda: all((self.folder / f"{role}.ready").exists() for role in ROLES), 360, self.logs)

    def look(self) -> bool:
        """Note how much memory each has in MB; all must live. Always true, so that a condition can do it."""
        for role, process in self.running.items():
            assert process.poll() is None, self.logs()
            self.seen[role].append((time.monotonic(), psutil.Process(process.pid).memory_info().rss / 1e6))
        return True

    def memory(self, role: str, since: float, before: float) -> list[float]:
        """Return what was noted between two moments."""
        return [size for at, size in self.seen[role] if since <= at <= before]

    def stop(self) -> None:
        """End all."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(60)

    def logs(self) -> str:
        """Return the ends of the logs."""
        return "\n".join(f"--- {role}\n{(self.folder / f'{role}.log').read_text()[-2000:]}" for role in ROLES)


def until(condition: Callable[[], Any], patience_s: float, explain: Callable[[], Any]) -> None:
    """Wait until a condition is true; fail with an explanation when it doesn't come true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


class Ends:
    """When which run ended, as the topic `decisions` says: by its records' times, in milliseconds since the epoch."""

    def __init__(self, settings: Settings) -> None:
        self.topic = streams_kafka.name(settings, topics.DECISIONS)
        self.read_to = dict.fromkeys(range(streams_kafka.connect(settings).partitions[topics.DECISIONS.name]), 0)
        self.reader = streams_kafka.reader(settings)
        self.completed: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def read_on(self) -> int:
        """Take what was appended since; return how many runs have ended."""
        for partition, start in self.read_to.items():
            for message in streams_kafka.read_partition(self.reader, self.topic, partition, start):
                self.read_to[partition] = (message.offset() or 0) + 1
                decision = codec.decode(message.value(), Decision)
                match decision.effects[-1] if decision.effects else None:
                    case RunCompleted():
                        self.completed[decision.run_id] = message.timestamp()[1]
                    case RunFailed() as failed:
                        self.failed[decision.run_id] = str(failed)
        return len(self.completed) + len(self.failed)


class Requests:
    """Asks for runs, steadily, whatever becomes of them."""

    def __init__(self, settings: Settings) -> None:
        self.producer: Producer = streams_kafka.producer(settings)
        self.settings, self.acks = settings, streams_kafka.Acks()
        self.sent_ms: dict[str, int] = {}

    def ask(self, spec: WorkflowSpec, name: str) -> None:
        """Ask for one run."""
        request = WorkflowRequest(spec.name, json.dumps({"n": name}), name, spec.digest)
        self.sent_ms[run_id(name)] = time.time_ns() // 1_000_000
        record = envelope(topics.REQUESTS, name, request, source="test", identity=name)
        streams_kafka.produce(self.producer, self.settings, record, self.acks)
        self.producer.poll(0)

    def load(self) -> None:
        """Ask for all runs that ask the model, and beside them for those that don't."""
        began, quick = time.monotonic(), 0
        for number in range(RUNS):
            self.ask(ASKING, f"asking-{number}")
            while (at := number / PER_S) > time.monotonic() - began:
                time.sleep(0.005)
            if at >= quick * QUICK_EVERY_S:
                self.ask(QUICK, f"quick-{quick}")
                quick += 1
        streams_kafka.flush(self.producer, self.acks)


def waiting_calls(settings: Settings, partitions: int) -> int:
    """Return how many calls of `llm.calls` are not done, as the broker knows it: ends minus committed offsets."""
    topic = streams_kafka.name(settings, topics.LLM_CALLS)
    with closing(streams_kafka.consumer(settings, topics.LLM_CALLS.name)) as group:
        committed = group.committed([TopicPartition(topic, number) for number in range(partitions)], timeout=30)
        ends = [streams_kafka.watermarks(group, topic, number)[1] for number in range(partitions)]
    return sum(ends) - sum(max(0, each.offset) for each in committed)


@pytest.mark.integration
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_slow_model_fills_a_topic_and_nobody_s_memory(settings: Settings, slow_model: Model, tmp_path: Path) -> None:
    """Memory stays bounded, the queue is seen at the broker, runs without a model are quick, and in the end every run is over."""
    own = settings.model_copy(
        update={"local_model_url": f"http://127.0.0.1:{slow_model.server_port}", "llm_concurrency": IN_FLIGHT, "partitions": 4}
    )
    streams_kafka.connect(own)
    registry.publish(own, [ASKING, QUICK])
    processes, requests, ends = Processes(own, tmp_path), Requests(own), Ends(own)
    try:
        processes.wait()
        requests.ask(ASKING, "first")  # what is loaded at the first use isn't growth
        requests.ask(QUICK, "first-quick")
        until(lambda: ends.read_on() == 2, 120, processes.logs)
        processes.look()
        before = dict(processes.seen)
        base = processes.seen["orchestrator"][-1][1]
        load = threading.Thread(target=requests.load)
        began = time.monotonic()
        load.start()
        most_waiting = most_open = 0
        while load.is_alive():
            processes.look()
            most_waiting = max(most_waiting, waiting_calls(own, 4))
            most_open = max(most_open, len(requests.sent_ms) - ends.read_on())
            load.join(0.5)
        over = time.monotonic()
        answered = slow_model.answered
        peak = max(processes.memory("orchestrator", began, over)) - base
        slow_model.answer_s = 0.0
        until(lambda: processes.look() and ends.read_on() >= len(requests.sent_ms), 600, lambda: (ends.failed, processes.logs()))
        drained = time.monotonic()
        until(lambda: waiting_calls(own, 4) == 0, 60, processes.logs)
    finally:
        processes.stop()

    assert ends.failed == {}
    assert set(ends.completed) == set(requests.sent_ms)
    quick = sorted(
        (ends.completed[run] - sent) / 1000
        for number in range(RUNS)
        if (run := run_id(f"quick-{number}")) in ends.completed and (sent := requests.sent_ms[run])
    )
    p95 = quick[int(len(quick) * 0.95)]
    figures: dict[str, Any] = {
        "asked in s": round(over - began, 1),
        "answered meanwhile": answered,
        "most calls waiting": most_waiting,
        "most runs open": most_open,
        "drained in s": round(drained - over, 1),
        "tool-only runs": f"{len(quick)}, p50 {statistics.median(quick):.3f} s, p95 {p95:.3f} s",
        "orchestrator, KB for an open run": round(peak * 1000 / most_open, 1),
    }
    for role in ROLES:
        under = processes.memory(role, began + 2, over)
        figures[f"{role} MB"] = f"{before[role][0][1]:.0f} before, {under[0]:.0f} to {max(under):.0f} under pressure"
    print(json.dumps(figures, indent=1))  # noqa: T201 - `pytest -s` shows it

    assert len(requests.sent_ms) >= RUNS + 2
    assert slow_model.most <= IN_FLIGHT
    assert most_waiting > RUNS / 2, figures
    assert p95 < QUICK_P95_S, figures
    assert peak * 1000 / most_open < PER_RUN_KB, figures
    for role in ("intake", "llm", "tool"):
        under = processes.memory(role, began + 2, over)
        quarter = len(under) // 4
        assert max(under) - under[0] < GROWTH_MB, (role, figures)
        assert statistics.mean(under[-quarter:]) - statistics.mean(under[-2 * quarter : -quarter]) < TREND_MB, (role, figures)
