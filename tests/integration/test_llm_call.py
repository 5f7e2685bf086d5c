"""`ask` against the real local model: SmolLM2-135M on llama.cpp."""

import asyncio
import json
import time
from typing import Any

import pytest

from events.calls import LlmCall, LlmCallRequested
from events.failure import FailureKind
from events.results import LlmCallCompleted, LlmCallFailed
from streams.processors import llm_call
from streams.settings import Settings


def asked(
    model: str, prompt: str, *, schema: Any = None, max_tokens: int = 40, seconds: float = 120
) -> LlmCallCompleted | LlmCallFailed:
    """Return the result of one call to the model at this address."""
    messages = json.dumps([{"role": "user", "content": prompt}])
    parameters = json.dumps({"max_tokens": max_tokens, "temperature": 0.0})
    deadline = round((time.time() + seconds) * 1000)
    text = json.dumps(schema) if schema is not None else None
    call = LlmCall("c", "r", LlmCallRequested("s", 1, "local/smollm2", messages, parameters, text, deadline))

    async def work() -> LlmCallCompleted | LlmCallFailed:
        try:
            return await llm_call.ask(call, Settings(local_model_url=model))
        finally:
            await llm_call.close()

    return asyncio.run(work())


def test_the_model_answers_with_text(model: str) -> None:
    """Tokens are counted, and nothing is paid."""
    result = asked(model, "Say hello.")
    assert isinstance(result, LlmCallCompleted), result
    assert json.loads(result.output)
    assert result.usage.input_tokens > 5
    assert 0 < result.usage.output_tokens <= 40
    assert (result.provider, result.cost_usd) == ("local", 0.0)


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "required": ["fruit", "ripe"],
            "additionalProperties": False,
            "properties": {"fruit": {"enum": ["apple", "plum"]}, "ripe": {"type": "boolean"}},
        },
        {"enum": ["yes", "no"]},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    ],
)
def test_the_model_is_held_to_the_schema(model: str, schema: Any) -> None:
    """Whatever the root of the schema is; `ask` has checked the answer."""
    result = asked(model, "Tell me about a fruit, as JSON.", schema=schema)
    assert isinstance(result, LlmCallCompleted), result


def test_an_answer_without_room_is_cut_off(model: str) -> None:
    """Two tokens hold no object."""
    schema = {"type": "object", "required": ["long_name"], "properties": {"long_name": {"type": "string", "minLength": 20}}}
    result = asked(model, "Tell me about a fruit, as JSON.", schema=schema, max_tokens=2)
    assert isinstance(result, LlmCallFailed)
    assert result.failure.kind == FailureKind.INVALID_OUTPUT
    assert "max_tokens" in result.failure.message
    assert result.usage is not None
    assert result.usage.output_tokens == 2


def test_a_prompt_beyond_the_context_is_too_long(model: str) -> None:
    """The local server has a code of its own for it."""
    result = asked(model, "word " * 10_000)
    assert isinstance(result, LlmCallFailed)
    assert result.failure.kind == FailureKind.CONTEXT_TOO_LONG, result


def test_the_time_limit_ends_a_long_answer(model: str) -> None:
    """The model stops generating when the connection is closed, so the next call isn't kept waiting."""
    result = asked(model, "Write a long story about the sea.", max_tokens=3000, seconds=0.5)
    assert isinstance(result, LlmCallFailed)
    assert result.failure.kind == FailureKind.TIMEOUT
    assert isinstance(asked(model, "Say hello.", max_tokens=5), LlmCallCompleted)
