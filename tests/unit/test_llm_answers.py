"""`ask` against a real HTTP server on the loopback address that speaks OpenAI's and Anthropic's interfaces."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any, Self

import pytest

from events.calls import LlmCall, LlmCallRequested
from events.failure import FailureKind
from events.results import LlmCallCompleted, LlmCallFailed, Usage
from streams.processors import llm_call
from streams.settings import Settings
from streams.workflow.expressions import from_json
from streams.workflow.payloads import is_reference

Body = dict[str, Any]
Answer = tuple[int, dict[str, str], str]
"""Status, headers and text of a response."""


class Provider:
    """An HTTP server in a thread. It counts connections, and those that a client closed while it was waiting for its answer."""

    def __init__(self) -> None:
        self.answer: Callable[[Body], Answer] = lambda _: ok("hi")
        self.hangs = False
        self.requests: list[Body] = []
        self.connections = 0
        self.abandoned = threading.Event()
        self.asked = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=8_000_000), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                self.requests.append(json.loads(await reader.readexactly(length)))
                self.asked.set()
                if self.hangs:
                    await reader.read()  # returns when the client has gone
                    self.abandoned.set()
                    return
                status, headers, text = self.answer(self.requests[-1])
                lines = [f"HTTP/1.1 {status} Status", f"content-length: {len(text.encode())}", "content-type: application/json"]
                lines += [f"{name}: {value}" for name, value in headers.items()]
                writer.write(("\r\n".join(lines) + "\r\n\r\n" + text).encode())
                await writer.drain()
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()


@pytest.fixture(scope="module", autouse=True)
def keys() -> Iterator[None]:
    """LiteLLM takes keys from the environment."""
    os.environ |= {"OPENAI_API_KEY": "sk-none", "ANTHROPIC_API_KEY": "sk-none"}
    yield
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "ANTHROPIC_API_KEY", "ANTHROPIC_API_BASE"):
        os.environ.pop(name, None)


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Start a server that says `hi` unless it is told otherwise."""
    with Provider() as server:
        os.environ |= {"OPENAI_API_BASE": f"{server.url}/v1", "ANTHROPIC_API_BASE": server.url}
        yield server


def ok(text: str | None, finish_reason: str = "stop", model: str = "gpt-4o-mini", **usage: Any) -> Answer:
    """Return a chat completion of 1000 tokens in, 100 out."""
    tokens = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100} | usage
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return 200, {}, json.dumps({"id": "1", "object": "chat.completion", "model": model, "choices": [choice], "usage": tokens})


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    """Return an error as OpenAI words it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "type": "t", "code": code}})


def call(
    model: str | None = None, *, schema: Any = None, seconds: float = 60, content: str = "x", parameters: Body | None = None
) -> LlmCall:
    """Return a call whose time is over in so many seconds."""
    request = LlmCallRequested(
        step="s",
        attempt=1,
        model=model,
        messages=json.dumps([{"role": "user", "content": content}]),
        parameters=json.dumps(parameters if parameters is not None else {"max_tokens": 10, "temperature": 0.0}),
        schema=json.dumps(schema) if schema is not None else None,
        deadline=round((time.time() + seconds) * 1000),
    )
    return LlmCall("c", "r", request)


def asked(provider: Provider, *calls: LlmCall, folder: Path | None = None) -> list[LlmCallCompleted | LlmCallFailed]:
    """Return the results of calls made one after another in one worker; large ones are kept in a folder."""

    async def work() -> list[LlmCallCompleted | LlmCallFailed]:
        settings = Settings(local_model_url=provider.url, **({"data_dir": folder} if folder else {}))
        try:
            return [await llm_call.ask(each, settings) for each in calls]
        finally:
            await llm_call.close()

    return asyncio.run(work())


def completed(provider: Provider, asking: LlmCall) -> LlmCallCompleted:
    """Return the result of a call that must succeed."""
    (result,) = asked(provider, asking)
    assert isinstance(result, LlmCallCompleted), result
    return result


def failed(provider: Provider, asking: LlmCall) -> LlmCallFailed:
    """Return the result of a call that must fail."""
    (result,) = asked(provider, asking)
    assert isinstance(result, LlmCallFailed), result
    return result


CLOSED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
OPEN = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}


def test_a_local_model_is_asked_at_its_address_and_costs_nothing(provider: Provider) -> None:
    """The answer's text is the output, as JSON."""
    provider.answer = lambda _: ok('say "hi"')
    result = completed(provider, call(parameters={"max_tokens": 7, "temperature": 0.0, "seed": 3, "stop": ["."], "top_p": 0.5}))
    assert (result.output, result.provider, result.finish_reason) == ('"say \\"hi\\""', "local", "stop")
    assert (result.call_id, result.step, result.cost_usd) == ("c", "s", 0.0)
    body = provider.requests[0]
    assert (body["model"], body["max_tokens"], body["seed"]) == ("smollm2", 7, 3)
    assert body["messages"] == [{"role": "user", "content": "x"}]


def test_cached_tokens_are_part_of_the_input_and_paid_at_their_own_price(provider: Provider) -> None:
    """OpenAI counts them in; gpt-4o-mini costs 0.15, cached 0.075, and 0.60 dollars a million."""
    cached, reasoning = {"cached_tokens": 600}, {"reasoning_tokens": 40}
    provider.answer = lambda _: ok("hi", prompt_tokens_details=cached, completion_tokens_details=reasoning)
    result = completed(provider, call("gpt-4o-mini"))
    assert result.usage == Usage(1000, 100, cache_read_tokens=600, reasoning_tokens=40)
    assert result.cost_usd == pytest.approx((400 * 0.15 + 600 * 0.075 + 100 * 0.60) / 1e6)
    assert (result.provider, result.model) == ("openai", "gpt-4o-mini")


def test_claude_counts_cached_tokens_apart_and_we_do_not(provider: Provider) -> None:
    """`input_tokens` of Anthropic's interface leaves out what was read from or written to its cache."""
    usage = {"input_tokens": 100, "cache_read_input_tokens": 600, "cache_creation_input_tokens": 300, "output_tokens": 10}
    message = {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "usage": usage,
    }
    provider.answer = lambda _: (200, {}, json.dumps(message))
    result = completed(provider, call("anthropic/claude-sonnet-4-5"))
    assert result.usage == Usage(1000, 10, cache_read_tokens=600, cache_write_tokens=300)
    assert result.cost_usd == pytest.approx((100 * 3 + 600 * 0.3 + 300 * 3.75 + 10 * 15) / 1e6)
    assert (result.provider, result.finish_reason) == ("anthropic", "stop")


def test_an_unknown_price_is_none(provider: Provider) -> None:
    """Neither a model that the list lacks nor an answer without a count of tokens is called free."""
    provider.answer = lambda _: ok("hi", model="new-model")
    assert completed(provider, call("openai/new-model")).cost_usd is None
    provider.answer = lambda _: ok("hi", prompt_tokens=0, completion_tokens=0)
    assert completed(provider, call("gpt-4o-mini")).cost_usd is None


@pytest.mark.parametrize("model", ["local/m", "gpt-4o-mini", "openai/gpt-3.5-turbo", "openai/new-model"])
def test_an_answer_that_fits_the_schema_is_the_output(provider: Provider, model: str) -> None:
    """Canonical JSON of it, whichever way the provider can be asked for it."""
    provider.answer = lambda _: ok('{ "z": 1.50, "n": 2 }')
    assert completed(provider, call(model, schema=OPEN)).output == '{"n":2,"z":1.5}'
    asked_for = provider.requests[0]
    if model in {"local/m", "gpt-4o-mini"}:
        assert asked_for["response_format"]["json_schema"] == {"name": "answer", "schema": OPEN, "strict": False}
    else:
        assert asked_for["response_format"] == {"type": "json_object"}
        assert "JSON Schema" in asked_for["messages"][-1]["content"]


def test_strict_mode_is_asked_for_where_it_surely_works(provider: Provider) -> None:
    """OpenAI refuses strict mode for schemas with open objects or optional properties."""
    provider.answer = lambda _: ok('{"n":1}')
    completed(provider, call("gpt-4o-mini", schema=CLOSED))
    assert provider.requests[0]["response_format"]["json_schema"]["strict"] is True


def test_a_parameter_that_a_provider_lacks_is_left_out(provider: Provider) -> None:
    """Reasoning models take no temperature but 1."""
    provider.answer = lambda _: ok("hi", model="o3-mini")
    completed(provider, call("o3-mini"))
    assert "temperature" not in provider.requests[0]
    assert len(provider.requests) == 1


def test_a_fence_around_the_json_is_taken_off(provider: Provider) -> None:
    """Models that are only asked for JSON wrap it like this."""
    provider.answer = lambda _: ok('```json\n{"n": 1}\n```\n')
    assert completed(provider, call("openai/new-model", schema=OPEN)).output == '{"n":1}'


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (ok("I think it is 3."), "the answer is not JSON"),
        (ok('{"n": NaN}'), "NaN is not JSON"),
        (ok('{"n": 1, "z": 1e999}'), "not JSON"),
        (ok('{"n": 12}'), "answer.n: 12 is greater than the maximum of 9"),
        (ok("{}"), "'n' is a required property"),
        (ok("[" * 200_000), "not JSON"),
        (ok('{"n": 1', "length"), "longest length (max_tokens)"),
        (ok(None), "gave no text"),
    ],
)
def test_an_answer_that_does_not_fit_is_a_failure_that_was_paid(provider: Provider, answer: Answer, says: str) -> None:
    """Another attempt may help, and what this one cost is counted."""
    provider.answer = lambda _: answer
    result = failed(provider, call("gpt-4o-mini", schema=OPEN))
    assert result.failure.kind == FailureKind.INVALID_OUTPUT
    assert says in result.failure.message
    assert len(result.failure.message) < 600
    assert result.usage == Usage(1000, 100)
    assert result.cost_usd == pytest.approx((1000 * 0.15 + 100 * 0.60) / 1e6)


def test_no_choice_is_invalid_output(provider: Provider) -> None:
    """Some gateways answer so under load."""
    provider.answer = lambda _: (200, {}, json.dumps({"id": "1", "choices": [], "model": "m"}))
    assert failed(provider, call()).failure.kind == FailureKind.INVALID_OUTPUT


def test_a_cut_off_text_is_an_answer(provider: Provider) -> None:
    """Without a schema, and `finish_reason` says so."""
    provider.answer = lambda _: ok("and so", "length")
    assert completed(provider, call()).finish_reason == "length"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(400), FailureKind.INVALID_ARGUMENTS),
        (error(400, "too long", "context_length_exceeded"), FailureKind.CONTEXT_TOO_LONG),
        (error(400, "your request was rejected by the safety system", "content_policy_violation"), FailureKind.REJECTED),
        (error(400, "This model's maximum context length is 10 tokens."), FailureKind.CONTEXT_TOO_LONG),
        (error(401), FailureKind.UNAUTHORIZED),
        (error(402), FailureKind.UNAUTHORIZED),
        (error(403), FailureKind.UNAUTHORIZED),
        (error(404), FailureKind.INVALID_ARGUMENTS),
        (error(408), FailureKind.TIMEOUT),
        (error(413), FailureKind.TOO_LARGE),
        (error(418), FailureKind.INVALID_ARGUMENTS),
        (error(422), FailureKind.INVALID_ARGUMENTS),
        (error(429), FailureKind.RATE_LIMITED),
        (error(500), FailureKind.UNAVAILABLE),
        (error(503), FailureKind.UNAVAILABLE),
        (error(529), FailureKind.UNAVAILABLE),
        ((502, {}, "<html>bad gateway</html>"), FailureKind.UNAVAILABLE),
        ((200, {}, "rubbish"), FailureKind.UNAVAILABLE),
        (ok("no", "content_filter"), FailureKind.REJECTED),
    ],
)
def test_what_a_provider_refuses_has_a_kind_and_is_asked_once(provider: Provider, answer: Answer, kind: FailureKind) -> None:
    """Neither LiteLLM nor OpenAI's client tries again."""
    provider.answer = lambda _: answer
    result = failed(provider, call())
    assert result.failure.kind == kind, result
    assert len(provider.requests) == 1
    assert result.model == "local/smollm2"


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ({"retry_after": "7"}, 7000, 7000),
        ({"retry_after_ms": "250"}, 250, 250),
        ({"retry_after": formatdate(time.time() + 3600, usegmt=True)}, 3_000_000, 3_600_000),
        ({"retry_after": formatdate(0, usegmt=True)}, 0, 0),
        ({"retry_after": "99999999999"}, 86_400_000, 86_400_000),
    ],
)
def test_a_rate_limit_says_how_long_to_wait(provider: Provider, header: dict[str, str], least: int, most: int) -> None:
    """In seconds, in milliseconds or as a date, a day at most."""
    provider.answer = lambda _: error(429, **header)
    wait = failed(provider, call()).failure.retry_after_ms
    assert wait is not None
    assert least <= wait <= most


@pytest.mark.parametrize("header", [{}, {"retry_after": "soon"}, {"retry_after_ms": "nan"}])
def test_without_a_sensible_retry_after_there_is_none(provider: Provider, header: dict[str, str]) -> None:
    """The step's own retry rules then count."""
    provider.answer = lambda _: error(429, **header)
    assert failed(provider, call()).failure.retry_after_ms is None


def test_keys_in_an_error_are_blotted_out(provider: Provider) -> None:
    """The ledger is kept for ever."""
    provider.answer = lambda _: error(401, "Incorrect key sk-abcdefghijklmnop at http://x/?key=12345678&a=b")
    message = failed(provider, call()).failure.message
    assert message == "AuthenticationError: Incorrect key … at http://x/?key=…&a=b"


def test_the_time_limit_ends_the_request(provider: Provider) -> None:
    """The connection is closed, so that a provider can stop generating."""
    provider.hangs = True
    result = failed(provider, call(seconds=0.3))
    assert result.failure.kind == FailureKind.TIMEOUT
    assert 200 <= result.latency_ms < 5000
    assert provider.abandoned.wait(10)


def test_a_call_whose_time_is_over_is_not_made(provider: Provider) -> None:
    """Nobody waits for it any more."""
    assert failed(provider, call(seconds=-5)).failure.kind == FailureKind.TIMEOUT
    assert provider.requests == []


def test_cancellation_passes_and_ends_the_request(provider: Provider) -> None:
    """A worker that stops must not record a failure."""
    provider.hangs = True

    async def cancel() -> None:
        task = asyncio.create_task(llm_call.ask(call(), Settings(local_model_url=provider.url)))
        await asyncio.to_thread(provider.asked.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await llm_call.close()

    asyncio.run(cancel())
    assert provider.abandoned.wait(10)


def test_nobody_listening_is_unavailable(provider: Provider) -> None:
    """A model that isn't up yet may come."""
    nowhere = Settings(local_model_url="http://127.0.0.1:9")
    result = asyncio.run(llm_call.ask(call(), nowhere))
    assert isinstance(result, LlmCallFailed)
    assert result.failure.kind == FailureKind.UNAVAILABLE
    assert provider.requests == []


@pytest.mark.parametrize(
    "asking",
    [
        # Made in the test: a call's time limit runs from when it is made.
        lambda: call("nobody/knows-this"),
        lambda: call(parameters={"api_base": "http://elsewhere"}),
        lambda: call(schema={"type": "no such type"}),
        lambda: LlmCall("c", "r", LlmCallRequested("s", 1, None, "no JSON", "{}", None, 2**50)),
        lambda: LlmCall("c", "r", LlmCallRequested("s", 1, None, "{}", "{}", None, 2**50)),
    ],
)
def test_what_cannot_be_asked_is_not_asked(provider: Provider, asking: Callable[[], LlmCall]) -> None:
    """It can't be helped by another attempt."""
    assert failed(provider, asking()).failure.kind == FailureKind.INVALID_ARGUMENTS
    assert provider.requests == []


def test_a_schema_is_never_fetched(provider: Provider) -> None:
    """A `$ref` elsewhere would let a definition's author make the worker ask any address."""
    provider.answer = lambda _: ok("{}")
    result = failed(provider, call(schema={"$ref": f"{provider.url}/schema"}))
    assert result.failure.kind == FailureKind.INVALID_ARGUMENTS
    assert len(provider.requests) == 1


def test_lone_surrogates_are_question_marks_to_a_model_and_escapes_in_an_output(provider: Provider) -> None:
    """UTF-8 can't say them, JSON can."""
    provider.answer = lambda _: ok("a\ud800b", model="m\ud800")
    result = completed(provider, call(content="c\udfffd é"))
    assert provider.requests[0]["messages"][0]["content"] == "c?d é"
    assert (result.output, result.model) == ('"a\\ud800b"', "m?")


def test_a_large_answer_is_kept_as_a_payload(provider: Provider, tmp_path: Path) -> None:
    """It would not fit an event: the output is the reference to it, and the tokens are counted."""
    provider.answer = lambda _: ok("é" * 600_000)
    (result,) = asked(provider, call(), folder=tmp_path)
    assert isinstance(result, LlmCallCompleted)
    assert is_reference(from_json(result.output))
    assert result.usage == Usage(1000, 100)


def test_calls_share_a_connection(provider: Provider) -> None:
    """Whatever their time limits are: LiteLLM would open one for each timeout that it is given."""
    asked(provider, *(call(seconds=10 + n) for n in range(20)))
    assert (len(provider.requests), provider.connections) == (20, 1)
