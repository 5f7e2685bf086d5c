"""Which calls of a partition are done, so that a crash repeats at most what was in flight.

The committed offset is that of the first call that isn't done. Calls behind it that are done already stand as a bit set in the
commit's metadata, so the next owner passes over them.
"""

import base64
import binascii
from collections import deque
from collections.abc import Iterator
from typing import Final

WINDOW: Final = 8192
"""How far the done may run ahead of the first that isn't: the metadata of a commit holds 4 KB."""


class OffsetTracker:
    """The calls of one partition since it was assigned."""

    __slots__ = ("_done", "_open", "_skip", "committable", "position")

    def __init__(self, position: int, metadata: str = "") -> None:
        self.committable = self.position = position
        self._open: deque[int] = deque()
        self._done: set[int] = set()
        self._skip = set(_unpacked(position, metadata))

    def take(self, offset: int) -> bool:
        """Note a call that was read; False: it is done already, its result is on the inbox."""
        self._open.append(offset)
        self.position = offset + 1
        if offset in self._skip:
            self._skip.discard(offset)
            self.done(offset)
            return False
        return True

    def done(self, offset: int) -> None:
        """Note that the broker has acknowledged a call's result."""
        self._done.add(offset)
        while self._open and self._open[0] in self._done:
            at = self._open.popleft()
            self._done.discard(at)
            self.committable = at + 1

    @property
    def open(self) -> bool:
        """Whether there are calls that were taken and aren't done."""
        return bool(self._open)

    @property
    def full(self) -> bool:
        """Whether the window is used up: the first call must be done before more are taken."""
        return bool(self._open) and self._open[-1] - self._open[0] >= WINDOW - 1

    def metadata(self) -> str:
        """Return what is done behind the committable offset, for the commit; empty when nothing is."""
        ahead = self._done | self._skip
        bits = bytearray(WINDOW // 8)
        last = -1
        for offset in ahead:
            place = offset - self.committable
            if 0 <= place < WINDOW:
                bits[place // 8] |= 1 << place % 8
                last = max(last, place)
        return base64.b64encode(bits[: last // 8 + 1]).decode() if last >= 0 else ""


def _unpacked(position: int, metadata: str) -> Iterator[int]:
    try:
        bits = base64.b64decode(metadata, validate=True)
    except binascii.Error:  # somebody else's metadata: nothing is known to be done
        return
    for place in range(min(len(bits) * 8, WINDOW)):
        if bits[place // 8] >> place % 8 & 1:
            yield position + place
