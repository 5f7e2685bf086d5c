"""A cancelled call is cancelled where it runs: the server that it was asking sees the connection close."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from events import codec, topics
from events.calls import CancelCall, LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.failure import Failure, FailureKind
from events.results import InboxMessage, LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from events.topics import Topic
from streams import kafka
from streams.envelope import envelope
from streams.processors import llm_call
from streams.processors.cancellations import Cancellations
from streams.processors.llm_worker import LlmCalls
from streams.processors.tool_worker import ToolCalls
from streams.processors.worker import Handler, Worker
from streams.settings import Settings
from tools.registry import load

TOOLS = '''
import time
from pathlib import Path

import httpx

from tools.context import ToolContext


async def get(url: str) -> str:
    """Ask a server."""
    async with httpx.AsyncClient(timeout=60) as client:
        return (await client.get(url)).text


def stubborn(context: ToolContext, folder: str) -> bool:
    """Note when nobody waits any more, and stay all the same until told to go."""
    (Path(folder) / "began").touch()
    deadline = time.monotonic() + 30
    while not context.cancelled() and time.monotonic() < deadline:
        time.sleep(0.01)
    (Path(folder) / "seen").touch()
    while not (Path(folder) / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return True
'''


class Server:
    """Answers a request (a path, or a question to a model) when it is told to; knows who asked, and who left before that.

    `log` holds `asked NAME`, `left NAME` and `answered NAME`, as they happened.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self._let_go: dict[str, asyncio.Event] = {}
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._listening.wait(10)

    def answer(self, name: str) -> None:
        """Answer whoever asks for this, now and later."""
        self._loop.call_soon_threadsafe(self._event(name).set)

    def stop(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def _event(self, name: str) -> asyncio.Event:
        return self._let_go.setdefault(name, asyncio.Event())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._listening.set()
        await self._end.wait()
        server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for each in connections:
            each.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # nobody asks any more
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0])) if lengths else b""
        name = json.loads(body)["messages"][-1]["content"] if body else head.split()[1].removeprefix("/")
        self.log.append(f"asked {name}")
        gone, answered = asyncio.create_task(reader.read(1)), asyncio.create_task(self._event(name).wait())
        await asyncio.wait((gone, answered), return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            answered.cancel()
            self.log.append(f"left {name}")
            return False
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        message = {"role": "assistant", "content": f"answer to {name}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "slow", "choices": [choice], "usage": usage}
        content = json.dumps(completion).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        self.log.append(f"answered {name}")
        return True


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.stop()


@contextmanager
def working(settings: Settings, topic: Topic, handler: Handler, concurrency: int = 8) -> Iterator[Worker]:
    """Run a worker as its process does: a thread polls, the calls run on a loop in another one."""
    loop, stop, failures = asyncio.new_event_loop(), threading.Event(), list[BaseException]()
    worker = Worker(settings, topic, handler, concurrency, loop)

    def work() -> None:
        try:
            worker.run(stop)
        except BaseException as error:  # noqa: BLE001 - to be raised by the test
            failures.append(error)

    running, polling = (threading.Thread(target=each, daemon=True) for each in (loop.run_forever, work))
    running.start()
    polling.start()
    try:
        until(lambda: worker.ready.is_set() or bool(failures), 60)
        yield worker
    finally:
        stop.set()
        polling.join(60)
        asyncio.run_coroutine_threadsafe(_end(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        running.join(60)
        loop.close()
    assert failures == []


async def _end() -> None:
    await llm_call.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}  # LiteLLM has one that never ends
    for each in others:
        each.cancel()
    await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 40)
    await asyncio.get_running_loop().shutdown_default_executor()


def until(condition: Callable[[], bool], patience_s: float) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def send_tool_call(settings: Settings, name: str, tool: str, **arguments: str) -> None:
    """Put a tool call on the queue."""
    request = ToolCallRequested(f"step-{name}", 1, tool, json.dumps(arguments), round((time.time() + 60) * 1000))
    call = ToolCall(name, "run", request)
    kafka.send(settings, [envelope(topics.TOOL_CALLS, name, call, source="test", identity=name, run_id="run")])


def send_llm_call(settings: Settings, name: str) -> None:
    """Put a call on the queue that asks the model its own name."""
    messages = json.dumps([{"role": "user", "content": name}])
    request = LlmCallRequested(f"step-{name}", 1, "local/slow", messages, "{}", None, round((time.time() + 60) * 1000))
    record = envelope(topics.LLM_CALLS, name, LlmCall(name, "run", request), source="test", identity=name, run_id="run")
    kafka.send(settings, [record])


def cancel(settings: Settings, *names: str) -> None:
    """Cancel calls, as the orchestrator does."""
    cancels = [CancelCall(name, "run", f"step-{name}", f"nobody needs {name}") for name in names]
    kafka.send(
        settings,
        [
            envelope(topics.CANCELLATIONS, each.call_id, each, source="test", identity=f"{each.call_id}/cancel")
            for each in cancels
        ],
    )


def results(settings: Settings) -> dict[str, list[object]]:
    """Return all results on the inbox, by call."""
    found: dict[str, list[object]] = {}
    with kafka.closing(kafka.reader(settings)) as source:
        for partition in range(settings.partitions):
            for message in kafka.read_partition(source, kafka.name(settings, topics.INBOX), partition, 0):
                result = codec.decode(message.value(), InboxMessage).input
                assert isinstance(result, ToolCallCompleted | ToolCallFailed | LlmCallCompleted | LlmCallFailed)
                found.setdefault(result.call_id, []).append(result)
    return found


def result(settings: Settings, name: str, patience_s: float = 20) -> object:
    """Wait for a call's result; it must be the only one."""
    until(lambda: name in results(settings), patience_s)
    (only,) = results(settings)[name]
    return only


def assert_all_acknowledged(settings: Settings, topic: Topic) -> None:
    """No call of the queue is left to be made: the group has passed them all."""
    full = kafka.name(settings, topic)
    with kafka.closing(kafka.consumer(settings, topic.name)) as member:
        parts = [kafka.TopicPartition(full, partition) for partition in range(settings.partitions)]
        ends = {each.partition: kafka.watermarks(member, full, each.partition)[1] for each in parts}
        until(lambda: all(max(0, each.offset) == ends[each.partition] for each in member.committed(parts, timeout=10)), 20)


@pytest.fixture
def few(settings: Settings) -> Settings:
    """Return settings whose topics are there, with two partitions: reading them all is quick."""
    found = settings.model_copy(update={"partitions": 2})
    kafka.connect(found)
    return found


@pytest.fixture
def tool_calls(few: Settings, tmp_path: Path) -> ToolCalls:
    path = tmp_path / "slow_tools.py"
    path.write_text(TOOLS)
    return ToolCalls(few, load([path]))


def test_the_server_of_a_cancelled_tool_call_sees_the_connection_close(
    few: Settings, server: Server, tool_calls: ToolCalls
) -> None:
    """Within 2 s; the result says why, its call is acknowledged, and the call beside it gets its answer."""
    with working(few, topics.TOOL_CALLS, tool_calls):
        for name in ("one", "other"):
            send_tool_call(few, name, "get", url=f"{server.url}/{name}")
            until(lambda name=name: f"asked {name}" in server.log, 20)  # type: ignore[misc]
        cancel(few, "one")
        until(lambda: "left one" in server.log, 2)
        found = result(few, "one")
        assert isinstance(found, ToolCallFailed)
        assert found.failure == Failure(FailureKind.CANCELLED, "nobody needs one")
        assert found.latency_ms > 0
        assert found.tool_version == tool_calls.tools["get"].version
        server.answer("other")
        assert isinstance(result(few, "other"), ToolCallCompleted)
        assert_all_acknowledged(few, topics.TOOL_CALLS)


def test_the_server_of_a_cancelled_model_call_sees_the_connection_close(few: Settings, server: Server) -> None:
    """Within 2 s, through LiteLLM; the result says why, its call is acknowledged, and the call beside it gets its answer."""
    local = few.model_copy(update={"local_model_url": server.url})
    with working(local, topics.LLM_CALLS, LlmCalls(local)):
        for name in ("one", "other"):
            send_llm_call(few, name)
            until(lambda name=name: f"asked {name}" in server.log, 20)  # type: ignore[misc]
        cancel(few, "one")
        until(lambda: "left one" in server.log, 2)
        found = result(few, "one")
        assert isinstance(found, LlmCallFailed)
        assert found.failure == Failure(FailureKind.CANCELLED, "nobody needs one")
        assert (found.model, found.usage, found.cost_usd) == ("local/slow", None, None)
        server.answer("other")
        answered = result(few, "other")
        assert isinstance(answered, LlmCallCompleted)
        assert json.loads(answered.output) == "answer to other"
        assert_all_acknowledged(few, topics.LLM_CALLS)


def test_a_call_that_is_cancelled_before_a_worker_takes_it_is_never_made(
    few: Settings, server: Server, tool_calls: ToolCalls
) -> None:
    """Whether it waits while no worker runs, waits behind another call, or comes after its cancellation."""
    send_tool_call(few, "early", "get", url=f"{server.url}/early")
    cancel(few, "early")
    with working(few, topics.TOOL_CALLS, tool_calls, concurrency=1) as worker:
        early = result(few, "early")
        send_tool_call(few, "first", "get", url=f"{server.url}/first")
        until(lambda: "asked first" in server.log, 20)
        send_tool_call(few, "behind", "get", url=f"{server.url}/behind")
        cancel(few, "behind", "late")
        until(lambda: worker.cancellations.reason(b"late") is not None, 20)
        send_tool_call(few, "late", "get", url=f"{server.url}/late")
        server.answer("first")
        for name, found in (("early", early), ("behind", result(few, "behind")), ("late", result(few, "late"))):
            failure = Failure(FailureKind.CANCELLED, f"nobody needs {name}")
            assert found == ToolCallFailed(name, f"step-{name}", failure, None, 0)
        assert isinstance(result(few, "first"), ToolCallCompleted)
        assert_all_acknowledged(few, topics.TOOL_CALLS)
    assert server.log == ["asked first", "answered first"]


def test_a_model_call_that_is_cancelled_before_a_worker_takes_it_is_never_made(few: Settings, server: Server) -> None:
    """What nobody waits for isn't paid for."""
    local = few.model_copy(update={"local_model_url": server.url})
    send_llm_call(few, "early")
    cancel(few, "early")
    with working(local, topics.LLM_CALLS, LlmCalls(local)):
        failure = Failure(FailureKind.CANCELLED, "nobody needs early")
        assert result(few, "early") == LlmCallFailed("early", "step-early", failure, "local/slow", None, None, 0)
        assert_all_acknowledged(few, topics.LLM_CALLS)
    assert server.log == []


def test_a_cancellation_of_an_unknown_call_does_nothing(few: Settings, server: Server, tool_calls: ToolCalls) -> None:
    """Nor does one of a call that is done, nor a record that is none; calls in flight go on."""
    with working(few, topics.TOOL_CALLS, tool_calls) as worker:
        server.answer("done")
        send_tool_call(few, "done", "get", url=f"{server.url}/done")
        assert isinstance(result(few, "done"), ToolCallCompleted)
        send_tool_call(few, "one", "get", url=f"{server.url}/one")
        until(lambda: "asked one" in server.log, 20)
        good = envelope(topics.CANCELLATIONS, "one", CancelCall("one", "run", "s", "r"), source="test", identity="one/cancel")
        kafka.send(few, [type(good)(good.topic, good.key, b"nonsense", good.headers)])
        cancel(few, "done", "unknown")
        until(lambda: worker.cancellations.reason(b"unknown") is not None, 20)
        server.answer("one")
        assert isinstance(result(few, "one"), ToolCallCompleted)
        assert isinstance(result(few, "done"), ToolCallCompleted)
    assert "left one" not in server.log


def test_the_end_of_a_worker_cancels_no_calls(few: Settings, server: Server, tool_calls: ToolCalls) -> None:
    """Its connections close and no result is sent: the next worker makes the call again, and has its answer."""
    with working(few, topics.TOOL_CALLS, tool_calls):
        send_tool_call(few, "one", "get", url=f"{server.url}/one")
        until(lambda: "asked one" in server.log, 20)
    until(lambda: "left one" in server.log, 2)
    server.answer("one")
    with working(few, topics.TOOL_CALLS, tool_calls):
        assert isinstance(result(few, "one"), ToolCallCompleted)
    assert server.log == ["asked one", "left one", "asked one", "answered one"]


def test_a_sync_tool_can_see_that_it_is_cancelled(few: Settings, tool_calls: ToolCalls, tmp_path: Path) -> None:
    """Nothing stops its thread, and the result doesn't wait for it."""
    with working(few, topics.TOOL_CALLS, tool_calls):
        try:
            send_tool_call(few, "one", "stubborn", folder=str(tmp_path))
            until((tmp_path / "began").exists, 20)
            cancel(few, "one")
            until((tmp_path / "seen").exists, 2)
            found = result(few, "one")
            assert isinstance(found, ToolCallFailed)
            assert found.failure.kind == FailureKind.CANCELLED
        finally:
            (tmp_path / "go").touch()


def test_only_the_newest_cancellations_are_looked_back_for(few: Settings) -> None:
    """However many there are, and one that is sent again is no news."""
    cancel(few, *(f"call-{i}" for i in range(10)))
    found = Cancellations(few, most=3)
    try:
        found.open()
        assert [found.reason(f"call-{i}".encode()) is not None for i in range(10)] == [False] * 7 + [True] * 3
        cancel(few, "call-9", "new")
        fresh: dict[bytes, str] = {}
        until(lambda: bool(fresh.update(found.drain()) or fresh), 20)
        assert fresh == {b"new": "nobody needs new"}
        assert (found.reason(b"call-7"), found.reason(b"call-8")) == (None, "nobody needs call-8")
    finally:
        found.close()
