"""Results: what comes back to a run. Outputs are JSON, times in milliseconds, money in US dollars."""

from events.commands import Command, RequestPlace, StartRun
from events.failure import Failure
from events.frozen import frozen


@frozen
class Usage:
    """Tokens of one LLM call. Cached tokens are part of `input_tokens`, reasoning is part of `output_tokens`.

    `cache_write_1h_tokens` are those of `cache_write_tokens` that the provider keeps for an hour, at a higher price.
    """

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_1h_tokens: int = 0


@frozen
class LlmCallCompleted:
    """A model answered; `cost_usd` is None when the model's price is unknown. `prices`: which price list it is by.

    What a call cost is recorded once, and for good: prices that change later change nothing of it.
    """

    call_id: str
    step: str
    output: str
    model: str
    provider: str
    finish_reason: str
    usage: Usage
    cost_usd: float | None
    latency_ms: int
    prices: str | None = None


@frozen
class LlmCallFailed:
    """A model did not answer, or not usably; what was spent all the same is counted."""

    call_id: str
    step: str
    failure: Failure
    model: str
    usage: Usage | None
    cost_usd: float | None
    latency_ms: int
    prices: str | None = None


@frozen
class ToolCallCompleted:
    """A tool returned. `cost_usd`: what it said that took, `paid_for`: and for what; None when it said nothing."""

    call_id: str
    step: str
    output: str
    tool_version: str
    latency_ms: int
    cost_usd: float | None = None
    paid_for: str | None = None


@frozen
class ToolCallFailed:
    """A tool raised, ran out of time, or does not exist (`tool_version` None: nothing ran). What it spent it has spent."""

    call_id: str
    step: str
    failure: Failure
    tool_version: str | None
    latency_ms: int
    cost_usd: float | None = None
    paid_for: str | None = None


@frozen
class TimerFired:
    """A timer that a decision set is due; for an attempt's time limit, `timer_id` is the call's id. Step "": the run itself."""

    timer_id: str
    step: str


@frozen
class ChildRunCompleted:
    """A child run is over and has its output."""

    call_id: str
    step: str
    run_id: str
    output: str


@frozen
class ChildRunFailed:
    """A child run failed, was cancelled, or could not start (`run_id` as it would have been)."""

    call_id: str
    step: str
    run_id: str
    failure: Failure


Result = LlmCallCompleted | LlmCallFailed | ToolCallCompleted | ToolCallFailed | ChildRunCompleted | ChildRunFailed
"""Answers to calls."""
Input = StartRun | Result | TimerFired | Command


@frozen
class InboxMessage:
    """What a run receives. Topic `inbox`, key `run_id`."""

    run_id: str
    input: Input
    said: RequestPlace | None = None
