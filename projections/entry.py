"""What read models are made of: a decision that counts, and where it stands."""

from dataclasses import dataclass, field
from typing import Final

from events.decisions import Decision
from streams.workflow.chain import ends_run

PICO: Final = 12
"""Amounts are whole numbers of 10⁻¹² dollars: a sum of floats that is rounded to so many digits is exact."""


@dataclass(slots=True)
class Entry:
    """A decision that counts. `size`: bytes of its Avro body; `ends`: it is its run's last one."""

    partition: int
    offset: int
    decision: Decision
    hash: bytes
    size: int
    ends: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ends = ends_run(self.decision)


@dataclass(frozen=True, slots=True)
class Spent:
    """What an answered call used. `cost_usd` None: the model's price is unknown."""

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
