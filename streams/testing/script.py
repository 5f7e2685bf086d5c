"""What tools, models and other workflows answer in a test."""

import asyncio
import inspect
import re
import shutil
import tempfile
import weakref
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, Final, NamedTuple

from events.calls import LlmCall, ToolCall
from events.commands import WorkflowRequest
from events.failure import Failure, FailureKind
from events.frozen import frozen
from events.results import LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed, Usage
from streams.processors.llm_call import UnusableError, usable_output
from streams.testing.matching import short
from streams.testing.timeline import short_text
from streams.workflow.definition import load
from streams.workflow.expressions import EvaluationError, Json, clean_text, to_json
from streams.workflow.payloads import Memory, inlined, resolve
from streams.workflow.spec import WorkflowSpec
from streams.workflow.times import milliseconds
from tools.context import ToolContext
from tools.errors import RetryableError, TerminalError
from tools.tool import Tool, describe

_NUMBER: Final = re.compile(r"\[\d+\]")


class UnscriptedCallError(AssertionError):
    """A run makes a call of which the test doesn't say what it answers."""


class _Never:
    def __repr__(self) -> str:
        return "NEVER"


NEVER: Final = _Never()
"""An answer that doesn't come: the call's time limit ends it, or a cancellation."""


@frozen
class Answer:
    """An answer with more than its value; see `answer`."""

    value: Any
    after_ms: int = 0
    usage: Usage | None = None
    cost_usd: float | None = None
    finish_reason: str = "stop"


def answer(
    value: Any,
    *,
    after: str | int = 0,
    usage: Usage | None = None,
    cost_usd: float | None = None,
    finish_reason: str = "stop",
) -> Answer:
    """Return an answer that comes later (`after="20s"`), or that says what a model spent and why it stopped.

    Raises ValueError for an `after` that is no duration.
    """
    return Answer(value, milliseconds(after), usage, cost_usd, finish_reason)


class Answers(NamedTuple):
    """Answers, one for each call in turn."""

    values: tuple[Any, ...]


def answers(*values: Any) -> Answers:
    """Return answers for the first call, the second and so on. A call for which none is left is an error."""
    return Answers(values)


class Reply(NamedTuple):
    """What comes of a call, and after how many milliseconds. `result` None: nothing ever does."""

    result: ToolCallCompleted | ToolCallFailed | LlmCallCompleted | LlmCallFailed | None
    after_ms: int = 0


@dataclass
class Script:
    """What every call answers. `used`: how many of its `answers` each name has given."""

    tools: Mapping[str, Any]
    models: Mapping[str, Any]
    runs: Mapping[str, Any]
    artifacts: Path | None = None
    payloads: Memory = field(default_factory=Memory)
    used: dict[tuple[str, str], int] = field(default_factory=dict)

    # --- Tools ---

    def tool(self, call: ToolCall) -> Reply:
        """Return what a tool answers. Raises UnscriptedCallError."""
        request = call.request
        arguments = resolve(request.arguments, self.payloads)
        shown = f"{request.tool}({', '.join(f'{key}={short(value)}' for key, value in arguments.items())})"
        what = f"step `{request.step}` calls the tool {shown}"
        found = self._given("tools", request.tool, [request.tool], what)
        given = found.value
        if isinstance(given, Tool) or callable(given):
            given = self._called(call, given, arguments)
        if given is NEVER:
            return Reply(None)
        outcome = given if isinstance(given, Failure) else self._json(given, f"the tool `{request.tool}`")
        if isinstance(outcome, Failure):
            return Reply(ToolCallFailed(call.call_id, request.step, outcome, "scripted", found.after_ms), found.after_ms)
        return Reply(ToolCallCompleted(call.call_id, request.step, outcome, "scripted", found.after_ms), found.after_ms)

    def _called(self, call: ToolCall, given: Any, arguments: dict[str, Any]) -> Any:
        """Call a tool, with what the tool worker makes of its errors; but a failed assertion is the test's."""
        request = call.request
        try:
            if (tool := _as_tool(given, request.tool)) is not None:
                context = ToolContext(call.call_id, call.run_id, request.step, request.attempt, self._folder / call.run_id)
                return _awaited(tool.call(arguments, context))
            try:
                inspect.signature(given).bind(**arguments)
            except TypeError as error:
                raise TerminalError(f"wrong arguments for {request.tool}: {error}") from error
            value = given(**arguments)
            return _awaited(value) if inspect.isawaitable(value) else value
        except AssertionError:
            raise
        except TerminalError as error:
            return Failure(FailureKind.TOOL_TERMINAL, _text(error))
        except RetryableError as error:
            wait = None if error.retry_after_s is None else round(error.retry_after_s * 1000)
            return Failure(FailureKind.TOOL_RETRYABLE, _text(error), wait)
        except Exception as error:  # noqa: BLE001 - as on the worker: whatever a tool raises is its result
            return Failure(FailureKind.TOOL_CRASHED, f"`{request.tool}` raised {type(error).__name__}: {_text(error)}")

    @cached_property
    def _folder(self) -> Path:
        """Where tools write files: a temporary folder goes with the script."""
        if self.artifacts is not None:
            return self.artifacts
        folder = tempfile.mkdtemp(prefix="foldflow-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    # --- Models ---

    def model(self, call: LlmCall) -> Reply:
        """Return what a model answers, checked as the LLM worker checks it. Raises UnscriptedCallError."""
        request = call.request
        messages: Json = resolve(request.messages, self.payloads)
        pattern = without_numbers(request.step)
        what = f"step `{request.step}` asks a model: {short_text(str(messages[-1]['content']), 300)}"
        found = self._given("models", pattern, [request.step, pattern, "*"], what)
        given = found.value
        if callable(given):
            given = given(messages, call)
            if isinstance(given, Answer):
                found, given = given, given.value
        if given is NEVER:
            return Reply(None)
        model = request.model or "scripted"
        outcome: str | Failure = given if isinstance(given, Failure) else ""
        if not isinstance(given, Failure):
            said = given if isinstance(given, str) else self._text(given, pattern)
            choice = SimpleNamespace(message=SimpleNamespace(content=said), finish_reason=found.finish_reason)
            try:
                outcome = inlined(usable_output(SimpleNamespace(choices=[choice]), request.schema)[0], self.payloads)
            except UnusableError as error:
                outcome = error.failure
        if isinstance(outcome, Failure):
            spent = (model, found.usage, found.cost_usd, found.after_ms)
            return Reply(LlmCallFailed(call.call_id, request.step, outcome, *spent), found.after_ms)
        usage = found.usage or Usage(0, 0)
        ended = (model, "scripted", found.finish_reason, usage, found.cost_usd, found.after_ms)
        return Reply(LlmCallCompleted(call.call_id, request.step, outcome, *ended), found.after_ms)

    # --- Other workflows ---

    def run(self, request: WorkflowRequest, step: str, own: WorkflowSpec) -> tuple[WorkflowSpec | Failure | str | None, int]:
        """Return what a run of another workflow comes to: its definition, if it is really run, a failure, or its output (JSON).

        And after how many milliseconds; None as the output: it never ends. A workflow that starts itself needs no script: `own`
        is its definition. Raises UnscriptedCallError.
        """
        if request.workflow == own.name and own.name not in self.runs:
            return own, 0
        given_input = resolve(request.input, self.payloads)
        what = f"step `{step}` starts a run of `{request.workflow}` with {short(given_input)}"
        found = self._given("runs", request.workflow, [request.workflow], what)
        given = found.value
        if callable(given):
            given = given(given_input)
        if isinstance(given, Path):
            given = load(given)
        if given is NEVER:
            return None, 0
        if isinstance(given, WorkflowSpec | Failure):
            return given, found.after_ms
        return self._json(given, f"the run of `{request.workflow}`"), found.after_ms

    # --- What they have in common ---

    def _given(self, table: str, name: str, keys: list[str], what: str) -> Answer:
        given = getattr(self, table)
        key = next((key for key in keys if key in given), None)
        if key is None:
            known = f"; it has {', '.join(map(repr, given))}" if given else ""
            hint = f"add it to `given(…, {table}={{{name!r}: …}})`{known}"
            raise UnscriptedCallError(f"{what},\nbut the test doesn't say what it answers: {hint}")
        value = given[key]
        if isinstance(value, Answers):
            number = self.used.get((table, key), 0)
            if number >= len(value.values):
                count = len(value.values)
                raise UnscriptedCallError(
                    f"{what},\nbut that is call number {number + 1}, and {table}[{key!r}] has {count} answers: add one"
                )
            self.used[table, key] = number + 1
            value = value.values[number]
        return value if isinstance(value, Answer) else Answer(value)

    def _json(self, value: Any, whose: str) -> str:
        return inlined(self._text(value, whose), self.payloads)

    def _text(self, value: Any, whose: str) -> str:
        try:
            return to_json(value)
        except EvaluationError as error:
            raise UnscriptedCallError(f"what the test says that {whose} answers is {error}") from error


def without_numbers(path: str) -> str:
    """Return a step's path without the numbers of items and iterations."""
    return _NUMBER.sub("", path)


def _as_tool(given: Any, name: str) -> Tool | None:
    """Return what the registry would make of a function; None: it is no typed function."""
    if isinstance(given, Tool):
        return given
    if isinstance(given, FunctionType) and "return" in given.__annotations__:
        try:
            return describe(given, name=name, version_of=b"")
        except (TypeError, NameError):
            return None
    return None


def _awaited(value: Awaitable[Any]) -> Any:
    """Return what an awaitable comes to, whether or not a loop runs here."""

    async def wait() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def _text(error: Exception) -> str:
    return clean_text(str(error))[:2000]


__all__ = ["NEVER", "Answer", "Answers", "Reply", "Script", "UnscriptedCallError", "answer", "answers", "without_numbers"]
