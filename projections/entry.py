"""What read models are made of: a decision that counts, and where it stands."""

from dataclasses import dataclass, field

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


@dataclass(slots=True)
class Moved:
    """What a decision did to its run's steps.

    `settled`: how many of the workflow's own steps it settled; `waits`: how many more wait for something, fewer if negative, by
    what it is: `approval`, `signal`, `sleep`, `breakpoint`.
    """

    settled: int = 0
    waits: dict[str, int] = field(default_factory=dict)
