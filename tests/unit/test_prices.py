"""What an answer costs: by provider as each counts its tokens (real LiteLLM, real HTTP), and by a price list of one's own."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_llm_answers import Provider, call, ok  # type: ignore[import-not-found]

from events.results import LlmCallCompleted, LlmCallFailed, Usage
from streams.processors import llm_call, prices
from streams.processors.prices import Price, PricesError
from streams.settings import Settings

MODELS = ("OPENAI", "ANTHROPIC", "XAI", "DEEPSEEK", "GEMINI")


@pytest.fixture(scope="module")
def server() -> Iterator[Provider]:
    """Start a server that all providers' interfaces are served by; LiteLLM's import is no part of the calls' time."""
    llm_call.load()
    with Provider() as provider, pytest.MonkeyPatch.context() as environment:
        for name in MODELS:
            environment.setenv(f"{name}_API_KEY", "sk-none")
            environment.setenv(f"{name}_API_BASE", provider.url + ("" if name in ("ANTHROPIC", "GEMINI") else "/v1"))
        yield provider


def asked(server: Provider, *calls: Any, own: prices.Prices = prices.NONE) -> list[LlmCallCompleted | LlmCallFailed]:
    """Return the results of calls made one after another in one worker."""

    async def work() -> list[LlmCallCompleted | LlmCallFailed]:
        try:
            return [await llm_call.ask(each, Settings(local_model_url=server.url), own=own) for each in calls]
        finally:
            await llm_call.close()

    return asyncio.run(work())


def claude(**usage: Any) -> Any:
    """Return a message of Anthropic's interface."""
    content = [{"type": "text", "text": "hi"}]
    head = {"id": "1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "content": content}
    return 200, {}, json.dumps({**head, "stop_reason": "end_turn", "usage": usage})


def gemini(**usage: Any) -> Any:
    """Return an answer of Gemini's interface."""
    said = {"content": {"parts": [{"text": "hi"}], "role": "model"}, "finishReason": "STOP", "index": 0}
    return 200, {}, json.dumps({"candidates": [said], "usageMetadata": usage, "modelVersion": "gemini-2.5-flash"})


CACHED, REASONING = {"cached_tokens": 600}, {"reasoning_tokens": 40}
TWO_LIFETIMES = {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}
CASES = {
    "OpenAI: cached tokens are inside the input, reasoning inside the output": (
        "openai/gpt-4o-mini",
        ok("hi", prompt_tokens_details=CACHED, completion_tokens_details=REASONING),
        Usage(1000, 100, 600, 0, 40),
        400 * 0.15 + 600 * 0.075 + 100 * 0.60,
    ),
    "Anthropic: cached and written tokens are outside of the input, and written ones have two prices": (
        "anthropic/claude-sonnet-4-5",
        claude(
            input_tokens=100,
            cache_read_input_tokens=600,
            cache_creation_input_tokens=300,
            cache_creation=TWO_LIFETIMES,
            output_tokens=10,
        ),
        Usage(1000, 10, 600, 300, 0, 200),
        100 * 3 + 600 * 0.30 + 100 * 3.75 + 200 * 6 + 10 * 15,
    ),
    "Gemini: cached tokens are inside the input, reasoning outside of the output": (
        "gemini/gemini-2.5-flash",
        gemini(
            promptTokenCount=1000,
            cachedContentTokenCount=600,
            candidatesTokenCount=60,
            thoughtsTokenCount=40,
            totalTokenCount=1100,
        ),
        Usage(1000, 100, 600, 0, 40),
        400 * 0.30 + 600 * 0.03 + 100 * 2.50,
    ),
    "DeepSeek: cached tokens are inside the input, by a name of its own": (
        "deepseek/deepseek-chat",
        ok("hi", model="deepseek-chat", prompt_cache_hit_tokens=600, prompt_cache_miss_tokens=400),
        Usage(1000, 100, 600),
        400 * 0.28 + 600 * 0.028 + 100 * 0.42,
    ),
    "xAI: reasoning is outside of the output": (
        "xai/grok-code-fast-1",
        ok("hi", model="grok-code-fast-1", total_tokens=1140, completion_tokens_details=REASONING),
        Usage(1000, 140, 0, 0, 40),
        1000 * 1 + 140 * 2,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_kind_of_token_is_paid_once_at_its_own_price(server: Provider, case: tuple[str, Any, Usage, float]) -> None:
    """Given an answer as a provider counts it, when it is priced, then no token is left out and none is paid twice."""
    model, answer, usage, millionths = case
    server.answer = lambda _: answer
    (result,) = asked(server, call(model))
    assert isinstance(result, LlmCallCompleted), result
    assert result.usage == usage
    assert result.cost_usd == round(millionths / 1e6, 12)
    assert result.prices is not None
    assert result.prices.startswith("litellm-1.")


def test_a_server_that_litellm_does_not_know_may_count_parts_apart(server: Provider) -> None:
    """Given parts that are larger than their whole, or that only the sum of all has, then they are added to the whole."""
    server.answer = lambda _: ok("hi", prompt_tokens=100, prompt_tokens_details=CACHED)
    apart = ok("hi", total_tokens=1140, completion_tokens_details=REASONING)
    (cached,) = asked(server, call("openai/mine"))
    server.answer = lambda _: apart
    (reasoned,) = asked(server, call("openai/mine"))
    assert (cached.usage, reasoned.usage) == (Usage(700, 100, 600), Usage(1000, 140, 0, 0, 40))


def test_an_unknown_price_is_not_nothing_and_a_known_one_of_nothing_is(server: Provider) -> None:
    """Given no price anywhere, then cost and prices are None; given a local model or a proxy that says 0, then it is 0."""
    server.answer = lambda _: ok("hi", model="mine")
    unknown, local = asked(server, call("openai/mine"), call("local/m"))
    assert (unknown.cost_usd, unknown.prices, local.cost_usd, local.prices) == (None, None, 0.0, "local")
    server.answer = lambda _: (200, {"x-litellm-response-cost": "0.0"}, ok("hi")[2])
    (hit,) = asked(server, call("gpt-4o-mini"))
    assert (hit.cost_usd, hit.prices) == (0.0, "proxy")  # the proxy had the answer in its cache
    server.answer = lambda _: (200, {"x-litellm-response-cost": "nan"}, ok("hi")[2])
    (nonsense,) = asked(server, call("gpt-4o-mini"))
    assert nonsense.cost_usd == round((1000 * 0.15 + 100 * 0.60) / 1e6, 12)


def test_a_hit_in_litellm_s_own_cache_costs_nothing() -> None:
    """Given an answer that LiteLLM marks as a hit of its cache, then its tokens are told and nothing is paid."""
    litellm = llm_call.load()
    response = litellm.ModelResponse(model="gpt-4o-mini", usage=litellm.Usage(prompt_tokens=1000, completion_tokens=100))
    response._hidden_params = {"cache_hit": True}
    usage = prices.usage_of(response)
    own = prices.Prices("own-1", (Price.model_validate({"model": "gpt-4o-mini", "input": 1, "output": 2}),))
    assert prices.paid(litellm, response, "gpt-4o-mini", usage, own) == (0.0, "cache")
    response._hidden_params = {}
    assert prices.paid(litellm, response, "gpt-4o-mini", usage, own) == (0.0012, "own-1")


def test_what_was_spent_on_a_useless_answer_is_told_with_its_prices(server: Provider) -> None:
    """Given an answer that doesn't fit its schema, then the failure says what it cost, and by which prices."""
    server.answer = lambda _: ok("no JSON")
    (result,) = asked(server, call("gpt-4o-mini", schema={"type": "object"}))
    assert isinstance(result, LlmCallFailed)
    assert result.cost_usd == round((1000 * 0.15 + 100 * 0.60) / 1e6, 12)
    assert str(result.prices).startswith("litellm-1.")


# --- Prices of one's own ---

FILE = """
prices:
  - {model: gpt-4o-mini, from: 2020-01-01, input: 10, output: 20}
  - model: gpt-4o-mini
    from: 2024-06-01
    input: 1.10
    cache_read: 0.1
    cache_write: 2
    cache_write_1h: 4
    output: 3
    reasoning: 5
  - {model: gpt-4o-mini, from: 2999-01-01, input: 99, output: 99}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file of prices."""
    (tmp_path / "prices.yaml").write_text(FILE)
    return tmp_path / "prices.yaml"


def test_own_prices_come_first_and_name_their_file(server: Provider, path: Path) -> None:
    """Given own prices from several days on, when a model is asked, then those of today count, and the file's digest is told."""
    own = prices.load(path)
    server.answer = lambda _: ok("hi", prompt_tokens_details=CACHED, completion_tokens_details=REASONING)
    (result,) = asked(server, call("gpt-4o-mini"), own=own)
    assert result.cost_usd == round((400 * 1.10 + 600 * 0.1 + 60 * 3 + 40 * 5) / 1e6, 12)
    assert result.prices == own.name == "own-" + hashlib.sha256(FILE.encode()).hexdigest()[:12]
    path.write_text(FILE.replace("1.10", "1.20"))
    assert prices.load(path).name != own.name


def test_a_price_counts_from_its_day_on(path: Path) -> None:
    """Given three prices of a model, then the newest that has begun counts; before the first there is none."""
    own = prices.load(path)
    days = [date(2019, 12, 31), date(2020, 1, 1), date(2024, 5, 31), date(2024, 6, 1), date(2998, 12, 31)]
    found = [own.on("gpt-4o-mini", day) for day in days]
    assert [price and float(price.input) for price in found] == [None, 10, 10, 1.1, 1.1]
    assert own.on("gpt-4o", days[-1]) is None


def test_a_kind_without_a_price_costs_what_it_is_part_of(path: Path) -> None:
    """Given only prices of input and output, then cached tokens cost as input and reasoning as output; else each its own."""
    usage = Usage(1000, 100, 300, 200, 40, 50)
    short, full = prices.load(path).prices[:2]
    assert short.of(usage) == round((1000 * 10 + 100 * 20) / 1e6, 12)
    assert full.of(usage) == round((500 * 1.10 + 300 * 0.1 + 150 * 2 + 50 * 4 + 60 * 3 + 40 * 5) / 1e6, 12)


WRONG = {
    "prices: [{model: a, input: -1, output: 2}]": "prices.0.input",
    "prices: [{model: a, input: 1}]": "prices.0.output",
    "prices: [{model: a, input: .nan, output: 1}]": "prices.0.input",
    "prices: [{model: a, input: 1, output: 2, cached: 3}]": "prices.0.cached",
    "prices: [{model: a, from: May, input: 1, output: 2}]": "prices.0.from",
    "prices: [{model: a, input: 1, output: 2}, {model: a, input: 2, output: 2}]": "a has two prices",
    "prices: [": "is no YAML",
    "": "the file",
}


@pytest.mark.parametrize(("text", "where"), WRONG.items())
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, where: str) -> None:
    """Given a file that can't be used, then no worker starts with it, and the error names the setting, the file and the place."""
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(PricesError, match="FOLDFLOW_PRICES") as caught:
        prices.load(file)
    assert str(file) in str(caught.value)
    assert where in str(caught.value)


def test_no_file_is_no_prices_and_a_missing_one_an_error(tmp_path: Path) -> None:
    """Given no setting, then there are no own prices; given a path to nothing, then it is refused."""
    assert prices.load(Settings().prices) == prices.NONE
    with pytest.raises(PricesError, match="can't be read"):
        prices.load(tmp_path / "none.yaml")
