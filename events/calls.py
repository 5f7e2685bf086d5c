"""Calls: work for the workers, as the effect that a decision recorded and as the message on a work queue."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LlmCallRequested:
    """A model is asked. `messages`, `parameters` and `schema` are JSON; `deadline` is milliseconds since the epoch."""

    step: str
    attempt: int
    model: str | None
    messages: str
    parameters: str
    schema: str | None
    deadline: int


@dataclass(frozen=True, slots=True)
class ToolCallRequested:
    """A tool is called. `arguments` is JSON; `deadline` is milliseconds since the epoch."""

    step: str
    attempt: int
    tool: str
    arguments: str
    deadline: int


@dataclass(frozen=True, slots=True)
class LlmCall:
    """Topic `llm.calls`, key `call_id`."""

    call_id: str
    run_id: str
    request: LlmCallRequested


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Topic `tool.calls`, key `call_id`."""

    call_id: str
    run_id: str
    request: ToolCallRequested


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Nobody waits for this call any more: whoever makes it should stop. Topic `cancellations`, key `call_id`."""

    call_id: str
    run_id: str
    step: str
    reason: str
