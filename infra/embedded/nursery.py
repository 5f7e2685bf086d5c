"""Our own processes begin as forks of one that has imported what they share: once in time and once in memory, not six times.

`foldflow up` runs this program while it starts things and asks it, a line of JSON each, for processes; they outlive it. It has
no thread and no Kafka client when it forks, so a fork is as good as a new process. Whatever is started alone (`keeper`, by hand)
is an ordinary process.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from setproctitle import setproctitle

from infra.embedded.errors import EmbeddedError

# The same interpreter, so that it works from an environment that isn't activated. Without the current folder on its path (-P): a
# project's own `tools.py` or `events/` must not stand in for ours.
_MODULE: Final = (sys.executable, "-P", "-m")
FOLDFLOW: Final = (*_MODULE, "infra.cli.main")
"""The command `foldflow`, and COMMAND: this program."""
COMMAND: Final = (*_MODULE, "infra.embedded.nursery")


class Nursery:
    """The one who asks. Threads may share it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            COMMAND, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it; what it started goes on."""
        self._process.communicate()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Start `foldflow` with these arguments, its output appended to a log file, and return its pid. Raises EmbeddedError."""
        asked = json.dumps({"arguments": arguments, "environment": dict(environment), "log": str(log)})
        with self._one_at_a_time:
            try:
                print(asked, file=self._process.stdin, flush=True)
                return int(self._process.stdout.readline())  # type: ignore[union-attr]
            except (OSError, ValueError) as error:
                told = f"foldflow {' '.join(arguments)} could not be started: what starts it has ended ({self._process.wait()})."
                raise EmbeddedError(told) from error


def prepare() -> None:
    """Import what all share, and let no collection of garbage write to it: each child would copy it all."""
    importlib.import_module("infra.cli.main")
    importlib.import_module("streams.app")
    gc.collect()
    gc.freeze()


def main() -> None:
    """Fork whatever is asked for, until nobody asks any more."""
    prepare()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if (pid := os.fork()) == 0:
            _become(asked)
            return
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def _become(asked: dict[str, Any]) -> None:
    """Be a process of its own: session, environment, output and name; then do what it is for."""
    from infra.cli.main import main as foldflow  # noqa: PLC0415

    os.setsid()
    setproctitle(" ".join((*FOLDFLOW, *asked["arguments"])))
    os.environ.clear()
    os.environ.update(asked["environment"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        (2, asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    ):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["foldflow", *asked["arguments"]]
    foldflow()


if __name__ == "__main__":
    main()
