"""Dataclasses that nobody changes: mypy sees to that."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

Kind = TypeVar("Kind")


@dataclass_transform(frozen_default=True, eq_default=True)
def frozen(kind: type[Kind]) -> type[Kind]:
    """Make a dataclass with slots and a hash that is frozen for whoever checks types.

    `dataclass(frozen=True)` would keep it so at run time too, and call `object.__setattr__` for each field of each new one: that
    takes five times as long as all the rest (measured), and every step makes dozens.
    """
    return dataclass(slots=True, unsafe_hash=True)(kind)
