"""A tool that gives back what it gets: for examples and for measuring what Foldflow itself costs."""

from typing import Any


async def echo(value: Any = None) -> Any:
    """Return `value` unchanged."""
    return value
