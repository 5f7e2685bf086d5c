"""What the API answers about costs. Money is US dollars, summed exactly and rounded once, to what a JSON number holds."""

from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from api.models import Answer

By = Literal["workflow", "model", "tool", "step", "run", "day", "prices", "call"]
Usd = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, Decimal) else value)]


_SPENT: Final[dict[str, Any]] = {
    "calls": 12,
    "llm_calls": 3,
    "tool_calls": 9,
    "input_tokens": 3000,
    "cache_read_tokens": 1800,
    "cache_write_tokens": 0,
    "cache_write_1h_tokens": 0,
    "output_tokens": 300,
    "reasoning_tokens": 120,
    "cost_usd": 0.000495,
    "wasted_usd": 0.0,
    "unpriced_calls": 0,
    "unmetered_calls": 0,
}
_NOTHING: Final[dict[str, Any]] = dict.fromkeys(_SPENT, 0)
_GROUP: Final[dict[str, Any]] = {"key": {"workflow": "market-analysis", "step": "summary"}, **_SPENT}
_GROUPS: Final[dict[str, Any]] = {"by": "step", "total": _SPENT, "groups": [_GROUP], "rest": None, "left_out": 0}
_RUN: Final[dict[str, Any]] = {"run_id": "8f6a3a7e-5b2c-5d1e-9f00-1c2d3e4f5a6b", "own": _SPENT, "children": _NOTHING, **_GROUPS}


class Cost(Answer):
    """What some calls used and cost. Each kind of token has its own price; none is counted twice in `cost_usd`."""

    calls: int = Field(description="Calls that are over, each once: also late answers, and those of decisions that lost.")
    llm_calls: int
    tool_calls: int
    input_tokens: int = Field(description="Tokens read, those of the provider's cache included.")
    cache_read_tokens: int = Field(description="Part of `input_tokens` that came from the provider's cache.")
    cache_write_tokens: int = Field(description="Part of `input_tokens` that was written to the provider's cache.")
    cache_write_1h_tokens: int = Field(description="Part of `cache_write_tokens` that is kept for an hour, at a higher price.")
    output_tokens: int = Field(description="Tokens written, reasoning included.")
    reasoning_tokens: int = Field(description="Part of `output_tokens` spent on reasoning.")
    cost_usd: Usd = Field(description="Sum of the known prices.", examples=[0.002205])
    wasted_usd: Usd = Field(description="Part of `cost_usd` for calls that failed, or whose answer nobody used.")
    unpriced_calls: int = Field(description="LLM answers whose price is unknown; `cost_usd` lacks them.")
    unmetered_calls: int = Field(
        description="LLM calls given up before an answer told what they used; a provider may charge for them all the same."
    )


class CostGroup(Cost):
    """What the calls with one key cost."""

    key: dict[str, str | None] = Field(
        description="What they have in common. In steps, items and iterations are one: `check[*].ask`.",
        examples=[{"workflow": "market-analysis", "step": "summary"}],
    )


class Groups(Answer):
    """Costs by groups, the most expensive first; days from the newest on. `total` is the sum of `groups` and `rest`."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_GROUPS]})

    by: By
    total: Cost
    groups: list[CostGroup]
    rest: Cost | None = Field(description="The sum of the groups that are left out; null: all are there.")
    left_out: int = Field(description="How many groups are left out: ask with a higher `limit`.")


class RunCosts(Groups):
    """What a run and all runs that its steps started cost, each call once: `total` is the sum of `own` and `children`."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_RUN]})

    run_id: str
    own: Cost = Field(description="The run without those that it started.")
    children: Cost = Field(description="The runs that its steps wait or waited for, and those below them.")
