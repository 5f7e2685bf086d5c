"""Deterministic ids: the same facts give the same id, on any machine, in any attempt."""

import hashlib
import uuid
from functools import lru_cache

RUNS = uuid.UUID("8f6a3a7e-5f0d-5c53-9d1e-0b6f5d2c7a11")
FIRST_PREV = bytes(32)
"""`prev` of a run's first decision."""


def run_id(request_id: str) -> str:
    """Return the run that a request's own id names (UUIDv5)."""
    return str(uuid.uuid5(RUNS, request_id))


def position_request_id(topic_id: bytes, partition: int, offset: int) -> str:
    """Return the identity of a request that brings none: where it is.

    The topic's id, not its name: a topic made anew starts again at offset 0 and must not repeat old runs.
    """
    return f"{uuid.UUID(bytes=topic_id)}/{partition}/{offset}"


def chain_hash(body: bytes) -> bytes:
    """Return the hash of a decision's Avro body (without the framing), 32 bytes."""
    return hashlib.blake2b(body, digest_size=32).digest()


@lru_cache(maxsize=256)
def effect_id(decision_hash: bytes, index: int) -> str:
    """Return the id of a decision's effect number `index` (a call or a timer), 32 hexadecimal digits.

    It derives from the decision's bytes, so an answer to one version's call is never taken for another's.
    """
    return hashlib.blake2b(decision_hash + index.to_bytes(4), digest_size=16).hexdigest()
