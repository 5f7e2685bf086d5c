"""What the LLM worker and the tool worker take for a call: what a result can be written about."""

from typing import Final, TypeVar

from events import codec
from events.calls import LlmCall, ToolCall
from events.errors import NotDecodableError
from streams.envelope import Incoming, Outgoing, dead_letter

Call = TypeVar("Call", LlmCall, ToolCall)

MOST_BYTES: Final = 64 * 1024
"""How long a call's ids and names may be together. The orchestrator's have hundreds of bytes; a result repeats them."""


def read(record: Incoming, kind: type[Call], source: str) -> Call | Outgoing:
    """Return the call that stands in a record, or the dead letter for what is none, or one whose result would fit no record."""
    try:
        call = codec.decode(record.value, kind)
    except NotDecodableError as error:
        return dead_letter(record, "not_decodable", str(error), source)
    called = call.request.tool if isinstance(call, ToolCall) else call.request.model or ""
    size = sum(len(name.encode()) for name in (call.call_id, call.run_id, call.request.step, called))
    if size > MOST_BYTES:
        told = f"its ids and names have {size:,} bytes, more than {MOST_BYTES:,}: no record would hold its result"
        return dead_letter(record, "too_large", told, source, run_id=call.run_id)
    return call
