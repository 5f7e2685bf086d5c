"""The workers' handlers with payloads: a call that refers to what it needs, a result that refers to what came out."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from events import codec
from events.calls import LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.failure import FailureKind
from events.results import InboxMessage, LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from streams.envelope import Incoming
from streams.payloads import PayloadStore
from streams.processors import llm_call
from streams.processors.llm_worker import LlmCalls
from streams.processors.tool_worker import ToolCalls
from streams.settings import Settings
from streams.workflow import payloads
from streams.workflow.expressions import Json, from_json, to_json
from streams.workflow.payloads import INLINE_BYTES, MAX_PAYLOAD_BYTES, is_reference, reference
from tools.registry import load

TOOLS = '''
CALLS = []

def twice(text: str, times: int = 2) -> str:
    """Say a text twice."""
    return text * times

def length(text: str) -> int:
    """Measure a text."""
    return len(text)

async def same(value: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return what was given."""
    return value
'''
MEGABYTE = "x" * 1_000_000
NOWHERE = {"$payload": "0" * 64, "bytes": 5}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings with a folder and tools of their own."""
    (tmp_path / "some_tools.py").write_text(TOOLS)
    return Settings(data_dir=tmp_path / "data", tool_paths=(tmp_path / "some_tools.py",))


def record(call: ToolCall | LlmCall) -> Incoming:
    """Return a call as it comes from its queue."""
    return Incoming("calls", 0, 0, 0, call.call_id.encode(), codec.encode(call))


def called(settings: Settings, tool: str, arguments: str, handler: ToolCalls | None = None) -> ToolCallCompleted | ToolCallFailed:
    """Return the result of a tool's call."""
    request = ToolCallRequested("s", 1, tool, arguments, round((time.time() + 60) * 1000))
    handler = handler or ToolCalls(settings, load(settings.tool_paths))
    result = codec.decode(asyncio.run(handler(record(ToolCall("c", "r", request)))).value, InboxMessage).input
    assert isinstance(result, ToolCallCompleted | ToolCallFailed)
    return result


def output(result: Any) -> Json:
    """Return a completed call's output as it stands in the event."""
    assert isinstance(result, ToolCallCompleted | LlmCallCompleted), result
    return from_json(result.output)


def failed(result: Any) -> tuple[str, bool, str]:
    """Return why a call failed, and whether it is worth another attempt."""
    assert isinstance(result, ToolCallFailed | LlmCallFailed), result
    return result.failure.kind, result.failure.retryable, result.failure.message


# --- Tools ---


def test_a_tool_is_given_what_its_arguments_refer_to(settings: Settings) -> None:
    """It never sees a reference."""
    asked = PayloadStore(settings).put(to_json(MEGABYTE))
    assert output(called(settings, "length", f'{{"text":{asked}}}')) == 1_000_000
    whole = PayloadStore(settings).put(f'{{"text":{asked}}}')
    assert output(called(settings, "length", whole)) == 1_000_000


def test_a_large_output_is_a_reference(settings: Settings) -> None:
    """That goes into the event; the output itself is in the store."""
    result = called(settings, "twice", to_json({"text": MEGABYTE}))
    assert isinstance(result, ToolCallCompleted)
    assert result.output == reference(to_json(MEGABYTE * 2))
    assert payloads.resolve(result.output, PayloadStore(settings)) == MEGABYTE * 2


def test_one_call_s_output_is_the_next_one_s_argument(settings: Settings) -> None:
    """By reference all the way; what is passed on is stored once."""
    value = {"a": [MEGABYTE]}
    first = called(settings, "same", to_json({"value": value}))
    second = called(settings, "same", to_json({"value": output(first)}))
    assert is_reference(output(first))
    assert output(first) == output(second)
    assert len([path for path in (settings.data_dir / "payloads").rglob("*") if path.is_file()]) == 1


def test_the_largest_small_output_stands_in_the_event(settings: Settings) -> None:
    """The store isn't even opened for it, whatever it says."""
    text = to_json("$payload" + "x" * (INLINE_BYTES - 10))
    handler = ToolCalls(settings, load(settings.tool_paths))
    result = called(settings, "twice", f'{{"text":{text},"times":1}}', handler)
    assert isinstance(result, ToolCallCompleted)
    assert result.output == text
    assert not settings.data_dir.exists()
    assert not handler._payloads._threads._threads


def test_an_output_over_64_mib_is_too_large(settings: Settings) -> None:
    """Another attempt would give the same."""
    kind, retryable, message = failed(called(settings, "twice", to_json({"text": "x" * 1024, "times": 64 * 1024})))
    assert (kind, retryable) == (FailureKind.TOO_LARGE, False)
    assert message == f"a payload of {MAX_PAYLOAD_BYTES + 2:,} bytes is too large; the limit is {MAX_PAYLOAD_BYTES:,}"


def test_a_missing_argument_is_no_argument(settings: Settings) -> None:
    """The tool isn't called, now or later."""
    kind, retryable, message = failed(called(settings, "length", to_json({"text": NOWHERE})))
    assert (kind, retryable) == (FailureKind.INVALID_ARGUMENTS, False)
    assert "0" * 64 in message


def test_what_only_looks_like_a_reference_is_an_argument(settings: Settings) -> None:
    """The tool says what it thinks of it."""
    looks = {"a": ["$payload", '{"$payload":"'], "$payload": ["0" * 64]}
    assert output(called(settings, "same", to_json({"value": looks}))) == looks


def test_a_store_out_of_order_is_worth_another_attempt(settings: Settings) -> None:
    """Whether it is needed before the tool is called or after."""
    settings.data_dir.mkdir()
    (settings.data_dir / "payloads").write_text("no folder")
    for tool, arguments in (("length", {"text": NOWHERE}), ("twice", {"text": MEGABYTE})):
        kind, retryable, message = failed(called(settings, tool, to_json(arguments)))
        assert (kind, retryable) == (FailureKind.UNAVAILABLE, True)
        assert "FOLDFLOW_PAYLOAD_STORE" in message
    assert output(called(settings, "length", '{"text":"a"}')) == 1  # what needs no store goes on


def test_a_payload_that_is_no_json_is_no_argument(settings: Settings) -> None:
    """Somebody stored it without us."""
    asked = PayloadStore(settings).put("nonsense")
    assert failed(called(settings, "length", f'{{"text":{asked}}}'))[:2] == (FailureKind.INVALID_ARGUMENTS, False)


# --- Models ---


class Provider(ThreadingHTTPServer):
    """A model behind OpenAI's interface that answers always the same."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.asked: list[Any] = []
        self.answer = "hi"


class Requests(BaseHTTPRequestHandler):
    server: Provider
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer a chat completion."""
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.server.answer}}
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        body = {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
        sent = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Serve a model."""
    with Provider() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def answered(settings: Settings, provider: Provider, messages: str) -> LlmCallCompleted | LlmCallFailed:
    """Return the result of a model's call."""
    settings = settings.model_copy(update={"local_model_url": f"http://127.0.0.1:{provider.server_port}"})
    request = LlmCallRequested("s", 1, "local/m", messages, "{}", None, round((time.time() + 60) * 1000))

    async def work() -> InboxMessage:
        try:
            return codec.decode((await LlmCalls(settings)(record(LlmCall("c", "r", request)))).value, InboxMessage)
        finally:
            await llm_call.close()

    result = asyncio.run(work()).input
    assert isinstance(result, LlmCallCompleted | LlmCallFailed)
    return result


def test_a_model_is_given_the_messages_that_are_referred_to(settings: Settings, provider: Provider) -> None:
    """Whether all of them stand in one payload, or the content of one."""
    content = PayloadStore(settings).put(to_json(MEGABYTE))
    by_content = f'[{{"content":{content},"role":"user"}}]'
    for messages in (by_content, PayloadStore(settings).put(to_json([{"role": "user", "content": MEGABYTE}]))):
        assert output(answered(settings, provider, messages)) == "hi"
    assert [each["messages"] for each in provider.asked] == [[{"role": "user", "content": MEGABYTE}]] * 2


def test_a_large_answer_is_a_reference(settings: Settings, provider: Provider) -> None:
    """That goes into the event; a small one opens no store."""
    messages = '[{"content":"$payload","role":"user"}]'
    assert output(answered(settings, provider, messages.replace("$payload", "x"))) == "hi"
    assert not settings.data_dir.exists()
    provider.answer = MEGABYTE
    result = answered(settings, provider, messages)
    assert isinstance(result, LlmCallCompleted)
    assert result.output == reference(to_json(MEGABYTE))
    assert PayloadStore(settings).get(output(result)["$payload"]) == to_json(MEGABYTE)
    assert provider.asked[-1]["messages"] == from_json(messages)


def test_an_answer_that_cannot_be_stored_was_paid_all_the_same(settings: Settings, provider: Provider) -> None:
    """Its tokens count, and the attempt is worth another."""
    settings.data_dir.mkdir()
    (settings.data_dir / "payloads").write_text("no folder")
    provider.answer = MEGABYTE
    result = answered(settings, provider, '[{"content":"x","role":"user"}]')
    assert failed(result)[:2] == (FailureKind.UNAVAILABLE, True)
    assert isinstance(result, LlmCallFailed)
    assert result.usage is not None
    assert (result.usage.input_tokens, result.usage.output_tokens) == (1000, 100)


@pytest.mark.parametrize("stored", [None, "nonsense", "{}"])
def test_a_model_is_not_asked_without_its_messages(settings: Settings, provider: Provider, stored: str | None) -> None:
    """They are missing, no JSON, or no messages: now or later."""
    messages = to_json(NOWHERE) if stored is None else PayloadStore(settings).put(stored)
    assert failed(answered(settings, provider, messages))[:2] == (FailureKind.INVALID_ARGUMENTS, False)
    assert provider.asked == []
