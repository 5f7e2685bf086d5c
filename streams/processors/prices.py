"""What a model's answer costs, and by which prices.

The price is worked out once, by the worker that got the answer, and recorded with the name of the price list: prices that change
later change nothing of what was paid. Tokens are kinds of their own and never counted twice: what was read from or written to the
provider's cache is part of the input, reasoning is part of the output. Prices come, in this order, from

1. whoever had the answer already: that costs nothing (`cache`);
2. `FOLDFLOW_PRICES`, a file of one's own (`own-<beginning of its SHA-256>`);
3. a LiteLLM proxy in between, which says what it charges (`proxy`);
4. nobody, for a model of one's own (`local`);
5. the list in the installed LiteLLM (`litellm-<version>`).

If none of them knows, the price is unknown, which isn't nothing.
"""

import functools
import hashlib
import importlib.metadata
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from events.frozen import frozen
from events.results import Usage

LOCAL: Final = "local/"
_MILLION: Final = 1_000_000
_PICO: Final = 12
"""Amounts are rounded to 10⁻¹² dollars, a thousandth of what the cheapest token costs: so sums of them are exact."""
_PROXY: Final = "llm_provider-x-litellm-response-cost"
"""LiteLLM's name for the header in which a proxy of its kind says what an answer costs."""

Rate = Annotated[Decimal, Field(ge=0, le=_MILLION, allow_inf_nan=False)]
Paid = tuple[float | None, str | None]
"""US dollars, and which prices they are by; (None, None): the price is unknown."""


class PricesError(ValueError):
    """A file of prices can't be used. The text says where and why."""


class Price(BaseModel):
    """What a million tokens of a model cost from a day on (UTC), in US dollars. What isn't said costs what it is part of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    begins: date = Field(date.min, alias="from")
    input: Rate
    output: Rate
    cache_read: Rate | None = None
    cache_write: Rate | None = None
    cache_write_1h: Rate | None = None
    reasoning: Rate | None = None

    def of(self, usage: Usage) -> float:
        """Return what these tokens cost."""
        write = _or(self.cache_write, self.input)
        short = usage.cache_write_tokens - usage.cache_write_1h_tokens
        total = (
            (usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens) * self.input
            + usage.cache_read_tokens * _or(self.cache_read, self.input)
            + short * write
            + usage.cache_write_1h_tokens * _or(self.cache_write_1h, write)
            + (usage.output_tokens - usage.reasoning_tokens) * self.output
            + usage.reasoning_tokens * _or(self.reasoning, self.output)
        )
        return round(float(total / _MILLION), _PICO)


def _or(rate: Decimal | None, otherwise: Decimal) -> Decimal:
    return otherwise if rate is None else rate


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    prices: tuple[Price, ...]

    @model_validator(mode="after")
    def _one_a_day(self) -> "_File":
        seen = set[tuple[str, date]]()
        for price in self.prices:
            if (price.model, price.begins) in seen:
                raise ValueError(f"{price.model} has two prices from {price.begins} on")
            seen.add((price.model, price.begins))
        return self


@frozen
class Prices:
    """A price list of one's own. `name`: what events call it."""

    name: str = ""
    prices: tuple[Price, ...] = ()

    def on(self, model: str, day: date) -> Price | None:
        """Return a model's price of a day, None if there is none."""
        found = [price for price in self.prices if price.model == model and price.begins <= day]
        return max(found, key=lambda price: price.begins, default=None)


NONE: Final = Prices()


def load(path: Path | None) -> Prices:
    """Return the prices in a YAML or JSON file; no file: none. Raises PricesError."""
    if path is None:
        return NONE
    try:
        data = path.read_bytes()
        listed = _File.model_validate(YAML(typ="safe", pure=True).load(data.decode()))
    except OSError as error:
        raise PricesError(f"FOLDFLOW_PRICES: {path} can't be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise PricesError(f"FOLDFLOW_PRICES: {path} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors())
        raise PricesError(f"FOLDFLOW_PRICES: {path}: {wrong}") from error
    return Prices(f"own-{hashlib.sha256(data).hexdigest()[:12]}", listed.prices)


def usage_of(response: Any) -> Usage:
    """Return the tokens that an answer of LiteLLM's tells. It counts cached tokens in `prompt_tokens` for every provider.

    A part that is larger than its whole, or that the sum of all tokens has besides it, was counted apart by a server that LiteLLM
    doesn't know: it is added.
    """
    usage = getattr(response, "usage", None)
    prompt = getattr(usage, "prompt_tokens_details", None)
    completion = getattr(usage, "completion_tokens_details", None)
    read, write = _count(prompt, "cached_tokens"), _count(prompt, "cache_write_tokens")
    hour = _count(getattr(prompt, "cache_creation_token_details", None), "ephemeral_1h_input_tokens")
    asked, answered = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    reasoning = _count(completion, "reasoning_tokens")
    if read + write > asked:
        asked += read + write
    if reasoning > answered or (reasoning and _count(usage, "total_tokens") == asked + answered + reasoning):
        answered += reasoning
    return Usage(asked, answered, read, write, reasoning, min(hour, write))


def _count(source: Any, name: str) -> int:
    value = getattr(source, name, None)
    return value if isinstance(value, int) and value > 0 else 0


def paid(litellm: Any, response: Any, model: str, usage: Usage, own: Prices) -> Paid:
    """Return what an answer cost, and by which prices. `model`: as it was asked for."""
    hidden = getattr(response, "_hidden_params", None) or {}
    if hidden.get("cache_hit") is True:
        return 0.0, "cache"
    is_counted = bool(usage.input_tokens or usage.output_tokens)
    price = own.on(model, datetime.now(UTC).date())
    if price is not None:
        return (price.of(usage), own.name) if is_counted else (None, None)
    charged = _charged(hidden)
    if charged is not None:
        return charged, "proxy"
    if model.startswith(LOCAL):
        return 0.0, "local"
    cost = _listed(litellm, response, model) if is_counted else None
    return (None, None) if cost is None else (cost, _litellm())


def _charged(hidden: Any) -> float | None:
    """Return what a LiteLLM proxy says that it charges; None if there is none or it doesn't know."""
    try:
        charged = float((hidden.get("additional_headers") or {})[_PROXY])
    except (KeyError, TypeError, ValueError):
        return None
    return round(charged, _PICO) if math.isfinite(charged) and charged >= 0 else None


def _listed(litellm: Any, response: Any, model: str) -> float | None:
    """Return the price by LiteLLM's list; None when that doesn't tell."""
    try:
        cost = float(litellm.completion_cost(completion_response=response, model=model))
        # Nothing to pay may also mean that the list has the model but not its price.
        free = cost > 0 or "input_cost_per_token" in litellm.model_cost[litellm.get_model_info(model)["key"]]
    except Exception:  # noqa: BLE001 — it raises a bare Exception for a model that it doesn't know
        return None
    return round(cost, _PICO) if free else None


@functools.cache
def _litellm() -> str:
    return f"litellm-{importlib.metadata.version('litellm')}"
