"""Live streams: how many there are, and what one sends. A slow reader holds one page in memory and goes on at its own pace."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import anyio
import anyio.to_thread

from api.problems import ProblemError
from projections.database import ViewsError
from projections.feed import Feed, OtherLogError, Place
from projections.projector import NotReadyError, Projector

HEARTBEAT_S: Final = 10.0
"""After how long without a decision a stream says that it lives, and where it is."""
_LOOK_S: Final = 0.05
"""How often to look whether the views have moved on: a comparison of a few numbers."""
_READERS: Final = 4
"""How many streams read the views at the same time: the other questions have threads of their own."""


class Streams:
    """The streams of a process. `stopping`: whether the server is to end, which waits for all of them."""

    def __init__(self, most: int, stopping: Callable[[], bool]) -> None:
        self._most, self._stopping = most, stopping
        self.open = 0
        self._limiter: anyio.CapacityLimiter | None = None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places there are. Raises ProblemError when all are taken."""
        if self.open >= self._most:
            raise ProblemError(
                429,
                "too-many-streams",
                "Too many live streams",
                f"{self.open} are open, and that is the limit",
                "Close one, or raise FOLDFLOW_API_STREAMS.",
                headers={"Retry-After": "5"},
            )
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def follow(self, feed: Feed, projector: Projector) -> AsyncIterator[tuple[Place, dict[str, Any] | None]]:
        """Yield decisions, each with the place behind it, as they are accepted; None now and then when there are none.

        It ends when the server does, or the log is another one. While the views can't be asked it waits.
        """
        self._limiter = self._limiter or anyio.CapacityLimiter(_READERS)
        heard = time.monotonic()
        yield feed.place, None
        while not self._stopping():
            try:
                behind = feed.behind(projector.positions)
                page = await anyio.to_thread.run_sync(_read, feed, projector, limiter=self._limiter) if behind else ()
            except (NotReadyError, ViewsError):
                page = ()
            except OtherLogError:
                return
            for each in page:
                if self._stopping():
                    return
                yield each
            if page:
                heard = time.monotonic()
                continue
            if time.monotonic() - heard > HEARTBEAT_S:
                heard = time.monotonic()
                yield feed.place, None
            await anyio.sleep(_LOOK_S)


def _read(feed: Feed, projector: Projector) -> list[tuple[Place, dict[str, Any]]]:
    return feed.read(projector.views)
