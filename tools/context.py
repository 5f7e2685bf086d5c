"""What a tool may know of the call that it serves: ids, and a folder for its files; and where it says what the call cost."""

import hashlib
import math
import os
import tempfile
import threading
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

_MOST_USD = 1_000_000
_MOST_CHARS = 500


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that a tool wrote: its path and the SHA-256 of its bytes, in hexadecimal."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ToolContext:
    """One call: a tool gets it by annotating a parameter with this class.

    `attempt` counts from 1. `artifacts` is the run's own folder and need not exist yet. Repeats of a call
    (a worker that died, an attempt that timed out) must overwrite what the first one wrote: name files after
    `step`, never after `call_id`, a time or anything random.
    """

    call_id: str
    run_id: str
    step: str
    attempt: int
    artifacts: Path
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)
    _spent: list[tuple[Decimal, str]] = field(default_factory=list, init=False, repr=False, compare=False)

    def cancelled(self) -> bool:
        """Whether nobody waits for the result any more: the call was cancelled, its time is over, or the worker ends.

        A sync tool runs in a thread, which nothing can stop: one that takes long looks here now and then, and returns.
        """
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Make `cancelled` true. For whoever runs the tool, not for the tool."""
        self._cancelled.set()

    def spend(self, usd: float, what: str) -> None:
        """Say that this attempt has just cost `usd` US dollars, and for what; several times if need be. From any thread.

        Say it when the money is gone, not at the end: what was said before an error or a time limit is recorded with that.
        Raises ValueError for an amount that is negative, not finite, or above a million.
        """
        if not math.isfinite(usd) or not 0 <= usd <= _MOST_USD:
            raise ValueError(f"{usd!r} is no amount from 0 to {_MOST_USD:,} US dollars")
        self._spent.append((Decimal(str(usd)), " ".join(what.split())))

    def spent(self) -> tuple[float | None, str | None]:
        """Return what was spent so far in US dollars, and for what; (None, None): nothing was said. For whoever runs the tool."""
        said = self._spent.copy()
        if not said:
            return None, None
        parts: dict[str, Decimal] = {}
        for usd, what in said:
            parts[what] = parts.get(what, Decimal(0)) + usd
        text = "; ".join(f"{what} ${usd.normalize():f}" for what, usd in parts.items())
        return round(float(sum(parts.values())), 12), text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 1]}…"

    def write(self, name: str, data: bytes) -> Artifact:
        """Write `data` to the file `name` in the run's folder: whole or not at all, replacing an older one.

        Raises ValueError if `name` is more than a plain file name, and OSError as the file system does.
        """
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"{name!r} is no plain file name")
        self.artifacts.mkdir(parents=True, exist_ok=True)
        # The temporary file lies in the same folder because a rename is atomic only within one file system.
        descriptor, temporary = tempfile.mkstemp(dir=self.artifacts, prefix=f".{name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            # mkstemp's mode is 0600, which would hide a report from whoever shares the folder.
            Path(temporary).chmod(0o644)
            target = Path(temporary).replace(self.artifacts / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return Artifact(str(target), hashlib.sha256(data).hexdigest())
