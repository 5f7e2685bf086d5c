"""A cancelled call is cancelled where it runs: the server that it was asking sees the connection close."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_worker import (
    Server,
    assert_all_acknowledged,
    cancel,
    result,
    send_llm_call,
    send_tool_call,
    until,
    working,
)

from events import topics
from events.calls import CancelCall
from events.failure import Failure, FailureKind
from events.results import LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from streams import kafka
from streams.envelope import envelope
from streams.processors.cancellations import Cancellations
from streams.processors.llm_worker import LlmCalls
from streams.processors.tool_worker import ToolCalls
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


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.stop()


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
