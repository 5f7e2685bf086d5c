"""What tools say they spend is in the results of their calls, however those end."""

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
from tools.context import ToolContext
from tools.registry import load

TOOLS = """
import asyncio
import time

from tools.context import ToolContext
from tools.errors import RetryableError


def pays(context: ToolContext) -> int:
    for _ in range(3):
        context.spend(0.1, "page")
    context.spend(0.005, "geo\\ncoding")
    return 1


def pays_nothing(context: ToolContext) -> int:
    context.spend(0, "free of charge")
    return 1


def pays_and_fails(context: ToolContext) -> int:
    context.spend(2, "search")
    raise RetryableError("down")


async def pays_and_hangs(context: ToolContext) -> int:
    context.spend(0.25, "start")
    return await asyncio.sleep(60, 1)


def pays_wrongly(context: ToolContext) -> int:
    context.spend(0.5, "a page")
    context.spend(-1, "a refund")
    return 1


def says_much(context: ToolContext) -> int:
    for number in range(200):
        context.spend(0.01, f"page {number} \\ud800")
    return 1


def says_nothing() -> int:
    return 1
"""


@pytest.fixture
def calls(tmp_path: Path) -> ToolCalls:
    (tmp_path / "paid.py").write_text(TOOLS)
    return ToolCalls(Settings(data_dir=tmp_path), load([tmp_path / "paid.py"]))


def record(tool: str, seconds: float) -> Incoming:
    now = round(time.time() * 1000)
    call = ToolCall("c" * 32, "run", ToolCallRequested("step", 1, tool, json.dumps({}), now + round(seconds * 1000)))
    return Incoming("tool.calls", 0, 0, now, b"c", codec.encode(call))


def result(calls: ToolCalls, tool: str, seconds: float = 30.0) -> ToolCallCompleted | ToolCallFailed:
    """Make a call and return its result, as it stands on the inbox."""

    async def made() -> ToolCallCompleted | ToolCallFailed:
        found = codec.decode((await calls(record(tool, seconds))).value, InboxMessage).input
        assert isinstance(found, ToolCallCompleted | ToolCallFailed)
        return found

    return asyncio.run(made())


def test_what_a_tool_spends_is_in_its_result(calls: ToolCalls) -> None:
    """Given tools that spend several times, nothing, or say nothing, then the sum is exact, and 0 isn't None."""
    assert (result(calls, "pays").cost_usd, result(calls, "pays").paid_for) == (0.305, "page $0.3; geo coding $0.005")
    assert (result(calls, "pays_nothing").cost_usd, result(calls, "pays_nothing").paid_for) == (0.0, "free of charge $0")
    assert (result(calls, "says_nothing").cost_usd, result(calls, "says_nothing").paid_for) == (None, None)


def test_what_was_spent_before_a_failure_is_told_with_it(calls: ToolCalls) -> None:
    """Given a tool that pays and then fails, runs out of time, or names no amount, then its failure says what it had paid."""
    failed, late, wrong = result(calls, "pays_and_fails"), result(calls, "pays_and_hangs", 0.5), result(calls, "pays_wrongly")
    kinds = [each.failure.kind for each in (failed, late, wrong) if isinstance(each, ToolCallFailed)]
    assert kinds == [FailureKind.TOOL_RETRYABLE, FailureKind.TIMEOUT, FailureKind.TOOL_CRASHED]
    assert [each.cost_usd for each in (failed, late, wrong)] == [2.0, 0.25, 0.5]


def test_what_was_spent_before_a_call_was_given_up_is_told(calls: ToolCalls) -> None:
    """Given a call that is cancelled under way, then its result says what it had paid; one that was never made paid nothing."""

    async def given_up() -> list[ToolCallFailed]:
        asked = record("pays_and_hangs", 30)
        task = asyncio.create_task(calls(asked))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        made = [calls.cancelled(asked, "enough", 50), calls.cancelled(asked, "enough", None)]
        return [codec.decode(each.value, InboxMessage).input for each in made]  # type: ignore[misc]

    under_way, never = asyncio.run(given_up())
    assert (under_way.cost_usd, under_way.paid_for, never.cost_usd) == (0.25, "start $0.25", None)


def test_what_a_tool_says_is_bounded(calls: ToolCalls) -> None:
    """Given a tool that talks, then its sum is whole and what it says is cut, and is text that every reader can read."""
    found = result(calls, "says_much")
    assert found.cost_usd == 2.0
    assert found.paid_for is not None
    assert len(found.paid_for) <= 500
    assert found.paid_for.endswith("…")


@pytest.mark.parametrize("usd", [float("nan"), float("inf"), -0.01, 2e6])
def test_no_amount_is_refused(tmp_path: Path, usd: float) -> None:
    """Given what is no amount of money, then the tool hears it at once and nothing is recorded."""
    context = ToolContext("c", "r", "s", 1, tmp_path)
    with pytest.raises(ValueError, match="no amount"):
        context.spend(usd, "x")
    assert context.spent() == (None, None)
