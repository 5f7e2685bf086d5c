"""The calls in an audit report: what models and tools were given and what they answered, as the log has it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from events.as_json import payload
from events.calls import LlmCallRequested, ToolCallRequested
from events.results import LlmCallCompleted, ToolCallCompleted
from projections.audit_document import Content, Listed, Message, ModelCall, ToolCall
from projections.audit_log import Told
from projections.audit_values import PROMPT, VALUE, clean, content, cut, utc

FIRST, LAST, BAD, MESSAGES = 40, 20, 20, 40
"""Of calls: the first, the last, and as many that did not succeed between them; of a prompt: the most messages."""
T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]


def chosen(made: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the calls that are shown, and in words which ones are not."""
    made = sorted(made, key=lambda call: (call["offset"], _numbered(call["step"])))
    if len(made) <= FIRST + LAST + BAD:
        return made, ""
    middle = made[FIRST:-LAST]
    bad = [each for each in middle if each["outcome"] != "completed"][:BAD]
    text = (
        f"of the run's {len(made):,} calls to models and tools, the first {FIRST} and the last {LAST} are shown, and "
        f"of those between them the first {BAD} that did not succeed"
    )
    return [*made[:FIRST], *bad, *made[-LAST:]], text


def _numbered(path: str) -> list[tuple[int, str]]:
    """Return a path's place among others: `item[10]` stands behind `item[9]`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def of_kind(kind: str, made: Rows, shown: Rows, left_out: str, tell: Callable[[Mapping[str, Any]], T]) -> Listed[T]:
    """Return the calls of a kind among those that are shown. `made`: all of the run's, `left_out`: which ones are not shown."""
    total = sum(each["kind"] == kind for each in made)
    entries = [tell(each) for each in shown if each["kind"] == kind]
    return Listed(entries, total, left_out if len(entries) < total else "")


def model_call(call: Mapping[str, Any], log: Told) -> ModelCall:
    """Return what is told of a call to a model. `call`: its row of `calls`."""
    asked = log.requests.get(call["call_id"])
    answer = log.answers.get(call["call_id"])
    request = asked if isinstance(asked, LlmCallRequested) else None
    return ModelCall(
        **{name: call[name] for name in (*_CALL, *_MODEL_CALL)},
        requested=utc(call["requested"]),
        ended=utc(call["ended"]),
        asked=request.model if request else None,
        parameters=content(request.parameters, VALUE) if request and request.parameters != "{}" else None,
        schema=content(request.schema, VALUE) if request else None,
        prompt=_messages(request.messages) if request else [],
        answer=content(answer.output, PROMPT) if isinstance(answer, LlmCallCompleted) else None,
    )


_CALL: Final = ("call_id", "step", "attempt", "outcome", "late", "latency_ms", "cost_usd", "failure_kind", "failure_message")
_MODEL_CALL: Final = (
    *("model", "provider", "finish_reason", "input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens"),
    *("reasoning_tokens", "prices"),
)


def _messages(text: str) -> list[Message]:
    """Return a prompt's messages, together no longer than may be; a conversation of too many without its middle."""
    found = payload(text)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        whole = content(text, PROMPT)
        return [Message("prompt", whole)] if whole else []
    told, left = list[Message](), PROMPT
    for each in found if len(found) <= MESSAGES else (*found[: MESSAGES // 2], None, *found[-MESSAGES // 2 :]):
        if each is None:
            gap = f"{len(found) - MESSAGES:,} messages are left out"
            told.append(Message("…", Content(gap, "text", len(gap))))
            continue
        told.append(Message(clean(str(each.get("role", "?"))), cut(_spoken(each), "text", left)))
        left -= len(told[-1].content.text)
    return told


def _spoken(message: Mapping[str, Any]) -> str:
    spoken = message.get("content")
    if isinstance(spoken, str) and not message.keys() - {"role", "content"}:
        return spoken
    return json.dumps({key: each for key, each in message.items() if key != "role"}, indent=2, ensure_ascii=False)


def tool_call(call: Mapping[str, Any], log: Told) -> ToolCall:
    """Return what is told of a call to a tool. `call`: its row of `calls`."""
    asked = log.requests.get(call["call_id"])
    answer = log.answers.get(call["call_id"])
    return ToolCall(
        **{name: call[name] for name in (*_CALL, "tool", "paid_for")},
        version=call["tool_version"],
        requested=utc(call["requested"]),
        ended=utc(call["ended"]),
        arguments=content(asked.arguments, VALUE) if isinstance(asked, ToolCallRequested) else None,
        output=content(answer.output, VALUE) if isinstance(answer, ToolCallCompleted) else None,
    )
