"""The tool worker: takes calls from `tool.calls`, runs the tool, sends the result to the run's inbox."""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from events import codec, topics
from events.calls import ToolCall
from events.errors import NotDecodableError
from events.failure import Failure, FailureKind
from events.results import InboxMessage, ToolCallCompleted, ToolCallFailed
from streams import payloads
from streams.envelope import Incoming, Outgoing, dead_letter, envelope
from streams.settings import Settings
from streams.workflow.expressions import EvaluationError, clean_text, from_json, to_json
from streams.workflow.payloads import INLINE_BYTES, MARK, PayloadError, utf8_size
from tools.context import ToolContext
from tools.errors import RetryableError, TerminalError
from tools.tool import Tool

SOURCE: Final = "tool-worker"


class ToolCalls:
    """The handler of `tool.calls`."""

    def __init__(self, settings: Settings, tools: Mapping[str, Tool]) -> None:
        self.settings, self.tools = settings, tools
        self._payloads = payloads.PayloadStore(settings)

    async def __call__(self, record: Incoming) -> Outgoing:
        """Run one call's tool and return its result for the inbox, or a dead letter for what is no call."""
        try:
            call = codec.decode(record.value, ToolCall)
        except NotDecodableError as error:
            return dead_letter(record, "not_decodable", str(error), SOURCE)
        began = time.monotonic()
        tool = self.tools.get(call.request.tool)
        outcome = await self._outcome(call, tool)
        latency = round((time.monotonic() - began) * 1000)
        result: ToolCallCompleted | ToolCallFailed
        if isinstance(outcome, Failure):
            result = ToolCallFailed(call.call_id, call.request.step, outcome, tool.version if tool else None, latency)
        else:
            result = ToolCallCompleted(call.call_id, call.request.step, outcome, tool.version if tool else "", latency)
        message = InboxMessage(call.run_id, result)
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Return the result of a call that was given up, or (`latency_ms` None) never made."""
        try:
            call = codec.decode(record.value, ToolCall)
        except NotDecodableError as error:
            return dead_letter(record, "not_decodable", str(error), SOURCE)
        tool = self.tools.get(call.request.tool) if latency_ms is not None else None
        version = tool.version if tool else None
        failure = Failure(FailureKind.CANCELLED, reason)
        message = InboxMessage(call.run_id, ToolCallFailed(call.call_id, call.request.step, failure, version, latency_ms or 0))
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)

    async def _outcome(self, call: ToolCall, tool: Tool | None) -> str | Failure:
        """Return the output as JSON (a reference where it is large), or why there is none."""
        if tool is None:
            known = ", ".join(sorted(self.tools)) or "none"
            return Failure(FailureKind.UNKNOWN_TOOL, f"this worker has no tool `{call.request.tool}`; it has: {known}")
        request = call.request
        folder = self.settings.data_dir / "artifacts" / call.run_id
        context = ToolContext(call.call_id, call.run_id, request.step, request.attempt, folder)
        remaining = request.deadline / 1000 - time.time()
        try:
            async with asyncio.timeout(max(0.0, remaining)):
                refers = MARK in request.arguments
                arguments = await self._payloads.resolve(request.arguments) if refers else from_json(request.arguments)
                output = to_json(await tool.call(arguments, context))
                return output if utf8_size(output) <= INLINE_BYTES else await self._payloads.inlined(output)
        except TimeoutError:
            return Failure(FailureKind.TIMEOUT, f"`{request.tool}` did not return within its time limit")
        except TerminalError as error:
            return Failure(FailureKind.TOOL_TERMINAL, _text(error))
        except RetryableError as error:
            wait = None if error.retry_after_s is None else round(error.retry_after_s * 1000)
            return Failure(FailureKind.TOOL_RETRYABLE, _text(error), wait)
        except PayloadError as error:
            return payloads.failure(error)
        except EvaluationError as error:
            return Failure(FailureKind.INVALID_ARGUMENTS, f"`{request.tool}`: {error}")
        except Exception as error:  # noqa: BLE001 - a tool is somebody's code: whatever it raises is its result
            return Failure(FailureKind.TOOL_CRASHED, f"`{request.tool}` raised {type(error).__name__}: {_text(error)}")


def _text(error: Exception) -> str:
    return clean_text(str(error))[:2000]
