"""A worker in this process, on a real Kafka, and a server whose answers a test can hold back."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from events import codec, topics
from events.calls import CancelCall, LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.results import InboxMessage, LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from events.topics import Topic
from streams import kafka
from streams.envelope import Outgoing, envelope
from streams.processors import llm_call
from streams.processors.worker import Handler, Worker
from streams.settings import Settings


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


def tool_call(name: str, tool: str, **arguments: str) -> Outgoing:
    """Return a tool call for the queue."""
    request = ToolCallRequested(f"step-{name}", 1, tool, json.dumps(arguments), round((time.time() + 60) * 1000))
    return envelope(topics.TOOL_CALLS, name, ToolCall(name, "run", request), source="test", identity=name, run_id="run")


def send_tool_call(settings: Settings, name: str, tool: str, **arguments: str) -> None:
    """Put a tool call on the queue."""
    kafka.send(settings, [tool_call(name, tool, **arguments)])


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
    with closing(kafka.reader(settings)) as source:
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
    with closing(kafka.consumer(settings, topic.name)) as member:
        parts = [kafka.TopicPartition(full, partition) for partition in range(settings.partitions)]
        ends = {each.partition: kafka.watermarks(member, full, each.partition)[1] for each in parts}
        until(lambda: all(max(0, each.offset) == ends[each.partition] for each in member.committed(parts, timeout=10)), 20)
