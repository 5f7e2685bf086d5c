"""What stands on the inbox: an input, or something that a decision can only point at."""

from dataclasses import replace
from hashlib import blake2b
from typing import Final

from events import codec
from events.decisions import Decision, InputIgnored, RunFailed, UnreadableInput
from events.errors import NotDecodableError
from events.failure import Failure, FailureKind
from events.results import InboxMessage
from streams.envelope import Incoming

_MAX_EMBEDDED_BYTES: Final = 2 * 1024 * 1024


def readable(record: Incoming, run_id: str) -> tuple[InboxMessage | None, tuple[str, str] | None]:
    """Return what an inbox record says to its run, or why it can't be read (reason, detail)."""
    size = len(record.value or b"")
    if size > _MAX_EMBEDDED_BYTES:  # before it is decoded: a small item can take a hundred times its size in memory
        return None, ("too_large", f"an input of {size:,} bytes; the limit is {_MAX_EMBEDDED_BYTES:,}")
    try:
        message = codec.decode(record.value, InboxMessage)
    except NotDecodableError as error:
        return None, ("unreadable", str(error))
    if message.run_id != run_id:
        return None, ("unreadable", f"the key says run {run_id}, the value run {message.run_id}")
    return message, None


def unreadable(record: Incoming, problem: str) -> UnreadableInput:
    """Return what a decision says about an input that it can't hold."""
    value = record.value or b""
    return UnreadableInput(len(value), blake2b(value, digest_size=32).hexdigest(), problem)


def failing(decision: Decision, record: Incoming, kind: FailureKind, message: str) -> Decision:
    """Return a decision that can surely be written in this one's place: the input as a reference, and the run fails."""
    effects = (InputIgnored("unreadable"), RunFailed(None, Failure(kind, message)))
    return replace(decision, input=unreadable(record, message), effects=effects)
