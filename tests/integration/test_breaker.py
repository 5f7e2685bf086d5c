"""An endpoint that is down, on a real Kafka and a real HTTP server: it is left alone, others work on, and all runs end well."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from one_worker import result, send_llm_call, until, working

from events import codec, topics
from events.commands import StartRun
from events.decisions import Decision, RetryScheduled, RunCompleted, RunFailed
from events.failure import FailureKind
from events.ids import run_id
from events.results import InboxMessage, LlmCallCompleted, LlmCallFailed
from streams import kafka, registry
from streams.envelope import envelope
from streams.processors.breaker import State
from streams.processors.llm_worker import LlmCalls
from streams.processors.orchestrator import Orchestrator
from streams.processors.tool_worker import ToolCalls
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec
from tools.registry import load

TOOLS = '''
import httpx


async def prices(url: str) -> str:
    """Ask a server, as people write it: what goes wrong is raised by the client."""
    async with httpx.AsyncClient(timeout=20, verify=False) as client:
        answer = await client.get(url)
        answer.raise_for_status()
        return answer.text


async def other(value: int) -> int:
    """Need nobody."""
    return value
'''

PRICES = {"tool": {"name": "prices", "arguments": {"url": "=input.url"}}, "retry": {"attempts": 30, "initial": "1ms"}}
SPECS = [
    WorkflowSpec.model_validate({"name": "asks", "steps": {"ask": PRICES}, "output": "=steps.ask.output"}),
    WorkflowSpec.model_validate(
        {"name": "works", "steps": {"work": {"tool": {"name": "other", "arguments": {"value": "=input.i"}}}}}
    ),
]


class Server(ThreadingHTTPServer):
    """Answers with `status`; counts requests."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.asked = 503, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request; a question to a model is answered as OpenAI does."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:  # noqa: D102 - the library's name
        self._answer(b"42")

    def do_POST(self) -> None:  # noqa: D102 - the library's name
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        self._answer(json.dumps(completion).encode())

    def _answer(self, content: bytes) -> None:
        with self.server.lock:
            self.server.asked += 1
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@contextmanager
def orchestrating(settings: Settings) -> Iterator[None]:
    """Run an orchestrator."""
    stop, orchestrator = threading.Event(), Orchestrator(settings)
    thread = threading.Thread(target=orchestrator.run, args=(stop,))
    thread.start()
    try:
        until(orchestrator.ready.is_set, 60)
        yield
    finally:
        stop.set()
        thread.join(60)


def start(settings: Settings, spec: WorkflowSpec, runs: int, **inputs: Any) -> set[str]:
    """Start runs; return their ids."""
    ids = [run_id(f"{spec.name}-{i}") for i in range(runs)]
    starts = [StartRun(f"{spec.name}-{i}", spec.name, spec.digest, json.dumps(inputs | {"i": i})) for i in range(runs)]
    messages = [InboxMessage(run, each) for run, each in zip(ids, starts, strict=True)]
    kafka.send(
        settings,
        [envelope(topics.INBOX, each.run_id, each, source="test", identity=each.run_id) for each in messages],
    )
    return set(ids)


def decisions(settings: Settings) -> list[Decision]:
    """Return all decisions."""
    with closing(kafka.reader(settings)) as source:
        return [
            codec.decode(message.value(), Decision)
            for partition in range(settings.partitions)
            for message in kafka.read_partition(source, kafka.name(settings, topics.DECISIONS), partition, 0)
        ]


def ended(settings: Settings) -> dict[str, type[Any]]:
    """Return which runs have ended, and how."""
    return {
        each.run_id: type(each.effects[-1])
        for each in decisions(settings)
        if each.effects and isinstance(each.effects[-1], RunCompleted | RunFailed)
    }


@pytest.mark.thorough
def test_a_tool_that_is_down_is_left_alone_and_every_run_completes(settings: Settings, server: Server, tmp_path: Path) -> None:
    """40 runs ask a server that is down: it gets 8 requests and what was in flight, then one at a time, until it is up."""
    path = tmp_path / "network_tools.py"
    path.write_text(TOOLS)
    own = settings.model_copy(update={"breaker_calls": 10, "breaker_open_s": 1.5, "tool_concurrency": 8})
    kafka.connect(own)
    registry.publish(own, SPECS)
    calls = ToolCalls(own, load([path]))
    states: list[State] = []
    circuit = None
    calls.breakers.on_change = lambda: states.append(calls.breakers._circuits["prices"].state)
    with orchestrating(own), working(own, topics.TOOL_CALLS, calls, own.tool_concurrency):
        asking = start(own, SPECS[0], 40, url=server.url)
        until(lambda: State.OPEN in states, 60)
        circuit = calls.breakers._circuits["prices"]
        until(lambda: calls.in_flight == 0, 60)
        assert 8 <= server.asked <= 8 + own.tool_concurrency, "it was left alone"
        others = start(own, SPECS[1], 40)
        until(lambda: others <= ended(own).keys(), 60)
        assert circuit.state is not State.CLOSED, "the others were not kept waiting by it"
        assert server.asked <= 8 + own.tool_concurrency + states.count(State.HALF_OPEN)
        until(lambda: states.count(State.HALF_OPEN) >= 2, 60)
        until(lambda: circuit.state is State.OPEN, 60)
        probes = server.asked
        server.status = 200
        until(lambda: asking <= ended(own).keys(), 120)
    assert set(ended(own).values()) == {RunCompleted}
    assert states[:4] == [State.OPEN, State.HALF_OPEN, State.OPEN, State.HALF_OPEN]
    assert states[-1] is State.CLOSED
    assert probes <= 8 + own.tool_concurrency + states.count(State.HALF_OPEN)
    assert server.asked == probes + 40, "each run was answered once"
    waits = Counter[str]()
    for each in decisions(own):
        for effect in each.effects:
            if isinstance(effect, RetryScheduled) and effect.failure.kind == FailureKind.UNAVAILABLE:
                assert effect.due - each.at == effect.failure.retry_after_ms, "the orchestrator waits as long as it is told to"
                waits[each.run_id] += 1
    assert waits, "calls were refused"
    # The circuit was open for 1.5, 3 and 6 s: who comes back when it is told to isn't refused more often than that, and a little.
    assert max(waits.values()) <= 2 * states.count(State.OPEN) + 2


def test_a_model_that_is_down_is_left_alone(settings: Settings, server: Server) -> None:
    """Its calls are refused without a request; another model answers meanwhile; once it is up, one call closes the circuit."""
    own = settings.model_copy(
        update={"local_model_url": server.url, "breaker_calls": 5, "breaker_open_s": 1.0, "llm_concurrency": 1}
    )
    kafka.connect(own)
    calls = LlmCalls(own)
    with working(own, topics.LLM_CALLS, calls, 1):
        for number in range(4):
            send_llm_call(own, f"down-{number}")
            failed = result(own, f"down-{number}", 60)
            assert isinstance(failed, LlmCallFailed)
        (circuit,) = calls.breakers._circuits.values()
        assert (circuit.endpoint, circuit.state) == (f"local/slow at {server.url}", State.OPEN)
        send_llm_call(own, "refused")
        refused = result(own, "refused", 60)
        assert isinstance(refused, LlmCallFailed)
        assert refused.failure.message.startswith(f"circuit of local/slow at {server.url} is open since ")
        assert (refused.failure.retry_after_ms or 0) > 0
        assert server.asked == 4
        server.status = 200
        assert circuit.retry_at is not None
        until(lambda: time.monotonic() >= (circuit.retry_at or 0), 60)
        send_llm_call(own, "probe")
        assert isinstance(result(own, "probe", 60), LlmCallCompleted)
        assert (circuit.state, server.asked) == (State.CLOSED, 5)
