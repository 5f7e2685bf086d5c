"""Calls: work for the workers, as the effect that a decision recorded and as the message on a work queue."""

from events.frozen import frozen


@frozen
class LlmCallRequested:
    """A model is asked. `messages`, `parameters` and `schema` are JSON; `deadline` is milliseconds since the epoch."""

    step: str
    attempt: int
    model: str | None
    messages: str
    parameters: str
    schema: str | None
    deadline: int


@frozen
class ToolCallRequested:
    """A tool is called. `arguments` is JSON; `deadline` is milliseconds since the epoch."""

    step: str
    attempt: int
    tool: str
    arguments: str
    deadline: int


@frozen
class LlmCall:
    """Topic `llm.calls`, key `call_id`."""

    call_id: str
    run_id: str
    request: LlmCallRequested


@frozen
class ToolCall:
    """Topic `tool.calls`, key `call_id`."""

    call_id: str
    run_id: str
    request: ToolCallRequested


@frozen
class CancelCall:
    """Nobody waits for this call any more: whoever makes it should stop. Topic `cancellations`, key `call_id`."""

    call_id: str
    run_id: str
    step: str
    reason: str
