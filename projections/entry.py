"""What read models are made of: a decision that counts, and where it stands."""

from dataclasses import dataclass

from events.decisions import Decision


@dataclass(frozen=True, slots=True)
class Entry:
    """An accepted decision. `size`: bytes of its Avro body."""

    partition: int
    offset: int
    decision: Decision
    hash: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What an answered LLM call used. `cost_usd` None: the model's price is unknown."""

    step: str
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
