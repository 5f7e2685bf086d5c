"""What a tool raises reaches who called it, at once."""

import asyncio
from pathlib import Path

import pytest

from tools.context import ToolContext
from tools.tool import describe


def ends() -> int:
    """Raise what no future can hold."""
    raise StopIteration("enough")


async def ends_too() -> int:
    """Raise it in a coroutine."""
    raise StopIteration("enough")


@pytest.mark.parametrize("function", [ends, ends_too], ids=["sync", "async"])
def test_stop_iteration_is_an_error_like_any_other(function: object, tmp_path: Path) -> None:
    """A future refuses it: who waited for a sync tool would wait until the call's deadline."""
    tool = describe(function, name="ends", version_of=b"")  # type: ignore[arg-type]
    context = ToolContext("c", "r", "s", 1, tmp_path)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        asyncio.run(asyncio.wait_for(tool.call({}, context), 10))
