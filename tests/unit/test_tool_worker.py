"""The tool worker's handler with real tools: whatever a tool does is its own call's result, and nothing else's."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from events import codec
from events.calls import ToolCall, ToolCallRequested
from events.failure import FailureKind
from events.results import InboxMessage, ToolCallCompleted, ToolCallFailed
from streams.envelope import Incoming
from streams.processors.tool_worker import ToolCalls
from streams.settings import Settings
from tools.registry import load

TOOLS = """
import asyncio
import sys


async def cancels_itself() -> int:
    raise asyncio.CancelledError


async def waits_for_what_is_cancelled() -> int:
    other = asyncio.ensure_future(asyncio.sleep(60))
    other.cancel()
    return await other


async def interrupts() -> int:
    raise KeyboardInterrupt("by the tool")


async def exits() -> int:
    sys.exit("enough")


def cancels_itself_in_a_thread() -> int:
    raise asyncio.CancelledError


def interrupts_in_a_thread() -> int:
    raise KeyboardInterrupt("by the tool")


def exits_in_a_thread() -> int:
    sys.exit("enough")


async def hangs() -> int:
    return await asyncio.sleep(60, 1)


async def times_out_by_itself() -> int:
    async with asyncio.timeout(0.01):
        return await asyncio.sleep(60, 1)


async def works(value: int = 1) -> int:
    return value
"""


@pytest.fixture
def calls(tmp_path: Path) -> ToolCalls:
    path = tmp_path / "hostile.py"
    path.write_text(TOOLS)
    return ToolCalls(Settings(data_dir=tmp_path), load([path]))


def record(tool: str, seconds: float = 30.0) -> Incoming:
    now = round(time.time() * 1000)
    call = ToolCall("c" * 32, "run", ToolCallRequested("step", 1, tool, json.dumps({}), now + round(seconds * 1000)))
    return Incoming("tool.calls", 0, 0, now, b"c", codec.encode(call))


async def outcome(calls: ToolCalls, tool: str, seconds: float = 30.0) -> ToolCallCompleted | ToolCallFailed:
    """Make a call as a worker does, in a task of its own."""
    task = asyncio.create_task(calls(record(tool, seconds)))  # type: ignore[arg-type]
    result = codec.decode((await asyncio.wait_for(task, 20)).value, InboxMessage).input
    assert isinstance(result, ToolCallCompleted | ToolCallFailed)
    return result


@pytest.mark.parametrize(
    "tool",
    [
        *("cancels_itself", "waits_for_what_is_cancelled", "interrupts", "exits"),
        *("cancels_itself_in_a_thread", "interrupts_in_a_thread", "exits_in_a_thread"),
    ],
)
def test_a_tool_can_end_only_its_own_call(calls: ToolCalls, tool: str) -> None:
    """A tool that raises what ends tasks, loops or processes has crashed, and the next call is made as ever."""

    async def two_calls() -> None:
        failed = await outcome(calls, tool)
        assert isinstance(failed, ToolCallFailed)
        assert failed.failure.kind == FailureKind.TOOL_CRASHED
        assert f"`{tool}` raised " in failed.failure.message
        assert isinstance(await outcome(calls, "works"), ToolCallCompleted)

    asyncio.run(two_calls())


def test_a_call_that_is_given_up_has_no_outcome(calls: ToolCalls) -> None:
    """Who cancels the call's task gets the cancellation, not a crash of the tool."""

    async def give_up() -> None:
        task = asyncio.create_task(calls(record("hangs")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())


def test_a_time_limit_is_told_from_the_tools_own(calls: ToolCalls) -> None:
    """Both are of the kind timeout, but only one is the call's time limit."""

    async def both() -> None:
        limit, own = await outcome(calls, "hangs", 0.3), await outcome(calls, "times_out_by_itself")
        assert isinstance(limit, ToolCallFailed)
        assert isinstance(own, ToolCallFailed)
        assert (limit.failure.kind, own.failure.kind) == (FailureKind.TIMEOUT, FailureKind.TIMEOUT)
        assert "time limit" in limit.failure.message
        assert "raised TimeoutError" in own.failure.message

    asyncio.run(both())
