"""The tools of the chaos workflows. Each tells the witness of its call, with the ids by which the ledger knows it."""

import os
from typing import Any

import httpx

from tools.context import ToolContext
from tools.errors import RetryableError, TerminalError

_WITNESS = os.environ.get("CHAOS_WITNESS", "")
_client = httpx.AsyncClient(timeout=httpx.Timeout(30), limits=httpx.Limits(max_connections=256), trust_env=False)


async def quick(context: ToolContext, value: Any = None) -> Any:
    """Return the value."""
    await _tell(context, "quick")
    return value


async def slow(context: ToolContext, seconds: float) -> float:
    """Return after so many seconds."""
    await _tell(context, "slow", seconds)
    return seconds


async def flaky(context: ToolContext, fails: int, value: Any = None) -> Any:
    """Fail so many times, then return the value."""
    await _tell(context, "flaky")
    if context.attempt <= fails:
        raise RetryableError(f"attempt {context.attempt} fails")
    return value


async def hopeless(context: ToolContext) -> None:
    """Fail for good."""
    await _tell(context, "hopeless")
    raise TerminalError("never")


async def book(context: ToolContext, what: str) -> dict[str, str]:
    """Book something, to be undone by `unbook` with the booking that this returns."""
    await _tell(context, "book")
    return {"what": what, "booking": context.call_id}


async def unbook(context: ToolContext, booking: str) -> str:
    """Undo a booking."""
    await _tell(context, "unbook")
    return booking


async def _tell(context: ToolContext, tool: str, delay_s: float = 0.0) -> None:
    call = {
        "call_id": context.call_id,
        "run_id": context.run_id,
        "step": context.step,
        "attempt": context.attempt,
        "tool": tool,
        "delay_s": delay_s,
    }
    try:
        answer = await _client.post(_WITNESS, json=call)
    except httpx.TransportError as error:  # it hung up
        raise RetryableError(f"the witness is not reachable: {type(error).__name__}") from error
    if answer.status_code != httpx.codes.OK:
        raise RetryableError(f"the witness says {answer.status_code}")
