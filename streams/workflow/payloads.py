"""Payloads: JSON too large for an event is kept in an object store, and the event carries a reference to it.

A reference is a JSON object with exactly two keys: `$payload`, the BLAKE2b-256 of the payload's canonical JSON text in 64
hexadecimal digits, and `bytes`, that text's size. It may stand wherever a JSON value may, in a payload too. What only looks like
one is data. Named by its content, a payload is stored once however often it is passed on, can't change and can't hold itself.

Pure: what keeps payloads is given. The store that does so for real is `streams.payloads`.
"""

import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Final, Protocol

from streams.workflow.expressions import MAX_DEPTH, Json, from_json, to_json

INLINE_BYTES: Final = 256 * 1024
"""The largest JSON text that stands in an event itself."""
MAX_PAYLOAD_BYTES: Final = 64 * 1024 * 1024
"""The largest payload, and the most that the references in one JSON text may come to together."""
MAX_REFERENCE_DEPTH: Final = 8
"""How often a payload may refer to a payload that refers to a payload."""
KEY: Final = "$payload"
MARK: Final = f'"{KEY}"'
"""A canonical JSON text without this in it has no reference."""
_CONTAINERS: Final = frozenset({dict, list})
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class PayloadError(Exception):
    """A payload can't be had or kept."""


class PayloadMissingError(PayloadError):
    """There is no payload with this digest. Trying again doesn't help."""

    def __init__(self, digest: str, message: str = "") -> None:
        super().__init__(message or f"there is no payload {digest}")
        self.digest = digest


class PayloadDamagedError(PayloadMissingError):
    """What is kept under this digest is something else."""


class PayloadTooLargeError(PayloadError):
    """A payload is larger than any may be."""

    def __init__(self, size: int, limit: int = MAX_PAYLOAD_BYTES) -> None:
        super().__init__(f"a payload of {size:,} bytes is too large; the limit is {limit:,}")
        self.size, self.limit = size, limit


class PayloadTooDeepError(PayloadError):
    """References, or the value that they make together, are nested too deep."""


class Payloads(Protocol):
    """What keeps payloads."""

    def __hash__(self) -> int:
        """Say which one it is."""

    def get(self, digest: str) -> str:
        """Return a payload. Raises PayloadMissingError."""

    def put(self, text: str) -> str:
        """Keep a canonical JSON text and return the reference to it, as JSON. Raises PayloadTooLargeError."""


def resolve(text: str, payloads: Payloads) -> Json:
    """Return the value of a canonical JSON text, with what its references refer to in their place.

    Raises PayloadError, and EvaluationError for what is not JSON.
    """
    if MARK not in text:
        return from_json(text)
    whole = [from_json(text)]
    left = MAX_PAYLOAD_BYTES
    # No recursion: payloads in payloads may be nested deeper than Python's stack is. Each entry: a map or list, how deep it
    # stands in the value, and in how many payloads.
    todo: list[tuple[Json, int, int]] = [(whole, 0, 0)]
    while todo:
        container, depth, inside = todo.pop()
        if depth > MAX_DEPTH:
            raise PayloadTooDeepError(f"with its payloads the value is nested more than {MAX_DEPTH} deep")
        for key, value in _items(container):
            if type(value) not in _CONTAINERS:
                continue
            entered, found = inside, value
            while is_reference(found):
                entered += 1
                # Counted each time: few payloads that name each other often could make a value that fills the memory.
                left -= found["bytes"]
                if left < 0:
                    raise PayloadTooLargeError(MAX_PAYLOAD_BYTES - left)
                if entered > MAX_REFERENCE_DEPTH:
                    raise PayloadTooDeepError(f"payloads refer to payloads more than {MAX_REFERENCE_DEPTH} deep")
                found = container[key] = from_json(_payload(found, payloads))
            if type(found) in _CONTAINERS:
                todo.append((found, depth + 1, entered))
    return whole[0]


def _payload(found: Json, payloads: Payloads) -> str:
    digest, size = found[KEY], found["bytes"]
    text = payloads.get(digest)
    if utf8_size(text) != size:
        raise PayloadDamagedError(digest, f"payload {digest} has {utf8_size(text):,} bytes, its reference says {size:,}")
    return text


def inlined(text: str, payloads: Payloads) -> str:
    """Return a canonical JSON text itself if it may stand in an event, else keep it and return the reference to it.

    Raises PayloadTooLargeError, and what `put` raises.
    """
    return text if utf8_size(text) <= INLINE_BYTES else payloads.put(text)


def reference(text: str) -> str:
    """Return the reference to a canonical JSON text, as canonical JSON. Raises PayloadTooLargeError."""
    data = text.encode()
    return reference_to(digest_of(data), len(data))


def reference_to(digest: str, size: int) -> str:
    """Return the reference to a payload of this digest and size, as canonical JSON. Raises PayloadTooLargeError."""
    if size > MAX_PAYLOAD_BYTES:
        raise PayloadTooLargeError(size)
    return to_json({KEY: digest, "bytes": size})


def is_reference(value: Json) -> bool:
    """Say whether a JSON value is a reference, not data that looks like one."""
    return (
        isinstance(value, dict)
        and len(value) == 2  # noqa: PLR2004 - these two
        and KEY in value
        and "bytes" in value
        and is_digest(value[KEY])
        and type(value["bytes"]) is int
        and value["bytes"] > 0
    )


def references(value: Json) -> tuple[str, ...]:
    """Return the digests that stand in a value or a canonical JSON text, each once; not those in its payloads."""
    if isinstance(value, str):
        value = from_json(value) if MARK in value else None
    found: dict[str, None] = {}
    todo: list[Json] = [[value]]
    while todo:
        for _, each in _items(todo.pop()):
            if is_reference(each):
                found[each[KEY]] = None
            elif isinstance(each, dict | list):
                todo.append(each)
    return tuple(found)


def _items(container: Json) -> Iterable[tuple[Json, Json]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


def is_digest(value: Json) -> bool:
    """Say whether a value is a payload's digest as it is written in references."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def digest_of(data: Any) -> str:
    """Return the digest of a payload's UTF-8 bytes, in whatever holds bytes."""
    return blake2b(data, digest_size=32).hexdigest()


def utf8_size(text: str) -> int:
    """Return a text's size in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class Memory:
    """Keeps payloads in memory: for tests, and for what runs without a store."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def get(self, digest: str) -> str:
        """Return a payload. Raises PayloadMissingError."""
        try:
            text = self.texts[digest]
        except KeyError:
            raise PayloadMissingError(digest) from None
        if digest_of(text.encode()) != digest:
            raise PayloadDamagedError(digest, f"what is kept as payload {digest} is something else")
        return text

    def put(self, text: str) -> str:
        """Keep a text and return the reference to it. Raises PayloadTooLargeError."""
        named = reference(text)
        self.texts[digest_of(text.encode())] = text
        return named


class NoPayloads:
    """Keeps nothing: every reference is missing, and what can't stand in an event is too large."""

    def get(self, digest: str) -> str:
        """Raise PayloadMissingError."""
        raise PayloadMissingError(digest)

    def put(self, text: str) -> str:
        """Raise PayloadTooLargeError."""
        raise PayloadTooLargeError(utf8_size(text), INLINE_BYTES)
