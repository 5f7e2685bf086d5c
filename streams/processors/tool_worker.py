"""The tool worker: takes calls from `tool.calls`, runs the tool, sends the result to the run's inbox.

Each tool is an endpoint with a circuit of its own (breaker.py). What counts against it is what says that something it needs isn't
there: its time limit, an error of the network behind what it raised, or that it asks to be tried again without saying when.
"""

import asyncio
import errno
import time
from collections.abc import Mapping
from typing import Any, Final

from events import topics
from events.calls import ToolCall
from events.failure import Failure, FailureKind
from events.results import InboxMessage, ToolCallCompleted, ToolCallFailed
from streams import payloads
from streams.envelope import Incoming, Outgoing, envelope
from streams.processors.breaker import Attempt, Breakers, had_time
from streams.processors.calls import read
from streams.settings import Settings
from streams.workflow.expressions import EvaluationError, clean_text, from_json, to_json
from streams.workflow.payloads import INLINE_BYTES, MARK, PayloadError, utf8_size
from tools.context import ToolContext
from tools.errors import RetryableError, TerminalError
from tools.tool import Tool

SOURCE: Final = "tool-worker"


class ToolCalls:
    """The handler of `tool.calls`. `in_flight`: how many are being made now."""

    def __init__(self, settings: Settings, tools: Mapping[str, Tool]) -> None:
        self.settings, self.tools = settings, tools
        self.breakers = Breakers(settings)
        self.in_flight = 0
        self._payloads = payloads.PayloadStore(settings)
        self._artifacts = settings.data_dir / "artifacts"
        self._given_up: dict[str, ToolContext] = {}

    async def __call__(self, record: Incoming) -> Outgoing:
        """Run one call's tool and return its result for the inbox, or a dead letter for what is no call."""
        call = read(record, ToolCall, SOURCE)
        if isinstance(call, Outgoing):
            return call
        self.in_flight += 1
        try:
            result = await self._made(call, record.timestamp)
        finally:
            self.in_flight -= 1
        message = InboxMessage(call.run_id, result)
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Return the result of a call that was given up, or (`latency_ms` None) never made."""
        call = read(record, ToolCall, SOURCE)
        if isinstance(call, Outgoing):
            return call
        tool = self.tools.get(call.request.tool) if latency_ms is not None else None
        version = tool.version if tool else None
        failure = Failure(FailureKind.CANCELLED, reason)
        context = self._given_up.pop(call.call_id, None)
        spent = _spent(context) if context else (None, None)
        result = ToolCallFailed(call.call_id, call.request.step, failure, version, latency_ms or 0, *spent)
        message = InboxMessage(call.run_id, result)
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)

    async def _made(self, call: ToolCall, queued: int) -> ToolCallCompleted | ToolCallFailed:
        """Return a call's result; `queued`: when it was put on the queue, milliseconds since the epoch."""
        step, name = call.request.step, call.request.tool
        tool = self.tools.get(name)
        if tool is None:
            known = ", ".join(sorted(self.tools)) or "none"
            unknown = Failure(FailureKind.UNKNOWN_TOOL, f"this worker has no tool `{name}`; it has: {known}")
            return ToolCallFailed(call.call_id, step, unknown, None, 0)
        attempt = self.breakers.attempt(name, call.call_id)
        if isinstance(attempt, Failure):
            return ToolCallFailed(call.call_id, step, attempt, None, 0)
        context = ToolContext(call.call_id, call.run_id, step, call.request.attempt, self._artifacts / call.run_id)
        began = time.monotonic()
        try:
            with attempt:
                outcome = await self._outcome(call, tool, attempt, queued, context)
        except asyncio.CancelledError:
            self._given_up[call.call_id] = context  # what it has spent belongs into the result: see `cancelled`
            raise
        latency = round((time.monotonic() - began) * 1000)
        if isinstance(outcome, Failure):
            return ToolCallFailed(call.call_id, step, outcome, tool.version, latency, *_spent(context))
        return ToolCallCompleted(call.call_id, step, outcome, tool.version, latency, *_spent(context))

    async def _outcome(self, call: ToolCall, tool: Tool, attempt: Attempt, queued: int, context: ToolContext) -> str | Failure:
        """Return the output as JSON (a reference where it is large), or why there is none; tell the circuit how it went."""
        request = call.request
        now = time.time()
        limit = asyncio.timeout(max(0.0, request.deadline / 1000 - now))
        is_asked = False
        try:
            async with limit:
                refers = MARK in request.arguments
                arguments = await self._payloads.resolve(request.arguments) if refers else from_json(request.arguments)
                is_asked = True
                value = await tool.call(arguments, context)
                attempt.answered()
                output = to_json(value)
                return output if utf8_size(output) <= INLINE_BYTES else await self._payloads.inlined(output)
        except TimeoutError as error:
            late = f"`{request.tool}` did not return within its time limit"
            message = late if limit.expired() else _raised(tool, error)
            if is_asked and (not limit.expired() or had_time(now, queued, request.deadline)):
                attempt.failed(message)
            return Failure(FailureKind.TIMEOUT, message)
        except TerminalError as error:
            attempt.answered()
            return Failure(FailureKind.TOOL_TERMINAL, _text(error))
        except RetryableError as error:
            if error.retry_after_s is None:
                attempt.failed(_text(error))
            else:  # who says when to come back is there
                attempt.answered()
            wait = None if error.retry_after_s is None else round(error.retry_after_s * 1000)
            return Failure(FailureKind.TOOL_RETRYABLE, _text(error), wait)
        except PayloadError as error:
            return payloads.failure(error)
        except EvaluationError as error:
            return Failure(FailureKind.INVALID_ARGUMENTS, f"`{request.tool}`: {error}")
        except BaseException as error:
            # A tool is somebody's code: whatever it raises is its result, also what would end the task or the process. But a
            # cancellation that was asked for isn't the tool's.
            task = asyncio.current_task()
            if isinstance(error, GeneratorExit) or (isinstance(error, asyncio.CancelledError) and task and task.cancelling()):
                raise
            message = _raised(tool, error)
            if _of_the_network(error):
                attempt.failed(message)
            else:
                attempt.answered()
            return Failure(FailureKind.TOOL_CRASHED, message)


def _spent(context: ToolContext) -> tuple[float | None, str | None]:
    """Return what a tool said it spent, and for what, as a result says it."""
    usd, what = context.spent()
    return usd, None if what is None else clean_text(what)


def _raised(tool: Tool, error: BaseException) -> str:
    return f"`{tool.name}` raised {type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    return clean_text(str(error))[:2000]


_NETWORK: Final = frozenset({"ConnectionError", "TimeoutError", "gaierror", "TransportError", "ClientConnectionError", "Timeout"})
"""Names of exceptions, or of their bases, that the standard library, httpx, aiohttp and requests have for it."""
_UNREACHABLE: Final = frozenset({errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN})
_DEEP: Final = 10


def _of_the_network(error: BaseException | None) -> bool:
    """Say whether an exception, or one behind it, means: no connection, none in time, or a status 5xx."""
    for _ in range(_DEEP):
        if error is None:
            return False
        if any(each.__name__ in _NETWORK for each in type(error).__mro__) or getattr(error, "errno", None) in _UNREACHABLE:
            return True
        statuses: tuple[Any, ...] = (
            getattr(getattr(error, "response", None), "status_code", None),  # httpx, requests
            getattr(error, "status", None),  # aiohttp
            getattr(error, "code", None),  # urllib
        )
        if any(isinstance(status, int) and 500 <= status < 600 for status in statuses):  # noqa: PLR2004 - HTTP's
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
