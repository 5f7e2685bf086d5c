"""How many instructions of Python and calls of C a step takes on its way, and how many bytes it writes, against what is recorded.

    python tests/bench/instructions.py             compare with instructions.json
    python tests/bench/instructions.py --record    what is measured now is right: write it there

Counted, not timed, so it says the same on any machine however busy it is: some runs go their way in memory (way.py) by the real
functions. What happens inside a call of C isn't seen (fastavro, librdkafka), only that it is called, and how much is written.
Another minor version of Python has other instructions, and figures of its own in the file.

Exit codes: 0 nothing takes 5 % more than recorded, 1 something does, 2 a wrong option, 3 nothing is recorded for this Python.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
import way
from parts import PARTS, Part, Recorder, forget, watched

from streams import kafka
from streams.kafka import Acks

Counts = dict[str, float]
"""What a step takes, by what takes it: `orchestrator`, `orchestrator: decode` … (instructions and calls), `bytes on inbox` …"""
RECORDED: Final = Path(__file__).with_name("instructions.json")
TOLERANCE: Final = 0.05
RUNS: Final = 12
VERSION: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
STAGE: Final = ": "
MORE, UNKNOWN = 1, 3


class Counter:
    """Counts while it is entered: `instructions` of Python, in whatever file they stand, and `calls` of what is written in C."""

    def __init__(self) -> None:
        self.instructions = self.calls = 0

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        del argument
        if event == "opcode":
            self.instructions += 1
        elif event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        del frame, argument
        self.calls += event == "c_call"

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what this thread does within."""
        clock = time.time_ns
        # A millisecond goes by each time: how many records are of the same one would be by chance.
        time.time_ns = partial(next, itertools.count(1_000_000 * way.BEGAN, 1_000_000))  # type: ignore[assignment]
        gc.disable()  # what a collection calls depends on what was there before
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            time.time_ns = clock
            gc.enable()


def measured() -> dict[str, Counts]:
    """Return what a step takes. Only names without a stage (`role: stage`) are compared; stages say where it comes from."""
    way.walk(RUNS)  # what is compiled and remembered at the first time isn't the cost of a step
    log = way.walk(RUNS, inflight=4)
    steps = len(log.calls)
    found: dict[str, Counts] = {}

    def note(name: str, work: Callable[[], Any]) -> None:
        forget()
        counter = Counter()
        with counter.counting():
            work()
        found[name] = {"instructions": round(counter.instructions / steps, 1), "calls": round(counter.calls / steps, 1)}

    for role, part in PARTS.items():
        note(role, part.whole(log))
        for stage, calls in recorded(part, log).items():
            note(f"{role}{STAGE}{stage}", partial(all_of, calls))
    owner = way.tenure()
    note("takeover", lambda: [owner.read(each.offset, each.value) for each in log.decisions])
    acks, settings = Acks(), way.SETTINGS
    note("producing", lambda: [kafka.produce(_Nowhere(), settings, each, acks) for each in log.written])
    sizes: Counts = {}
    for record in log.written:
        parts = (record.key or b"", record.value or b"", *(part for name, value in record.headers for part in (name, value)))
        sizes[record.topic.name] = sizes.get(record.topic.name, 0) + sum(map(len, parts))
    for topic, size in sizes.items():
        records = sum(record.topic.name == topic for record in log.written)
        found[f"topic {topic}"] = {"bytes": round(size / steps, 1), "records": round(records / steps, 2)}
    return found


class _Nowhere:
    """Takes records as a producer does."""

    def produce(self, *arguments: Any, **named: Any) -> None:
        """Take a record."""


def recorded(part: Part, log: way.Log) -> dict[str, list[Callable[[], Any]]]:
    """Return the calls of a part's stages."""
    recorder = Recorder()
    with watched(part.stages, recorder):
        part.whole(log)()
    return recorder.calls


def all_of(calls: list[Callable[[], Any]]) -> None:
    """Call them all."""
    for call in calls:
        call()


def more(was: dict[str, Counts], now: dict[str, Counts]) -> list[str]:
    """Return what takes more than it did, and in which stages; empty where nothing does but a stage for another."""
    found = {name: lines for name, counts in now.items() if (lines := list(_more(name, was.get(name, {}), counts)))}
    grown = [name for name in found if STAGE not in name]
    return [line for name, lines in found.items() if name.split(STAGE)[0] in grown for line in lines]


def _more(name: str, was: Counts, now: Counts) -> Iterator[str]:
    for kind, value in now.items():
        before = was.get(kind)
        if before is None:
            yield f"{name}: {kind} are not recorded yet ({value:g} a step)"
        elif value > before * (1 + TOLERANCE) + 1:
            yield f"{name}: {value:g} {kind} a step, {before:g} recorded ({value / before - 1:+.0%})"


def main() -> None:
    """Compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write what is measured into instructions.json")
    parser.add_argument("--json", action="store_true", help="print what is measured")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets decides which way some code goes
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})  # noqa: S606 - itself
    known: dict[str, dict[str, Counts]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    now = measured()
    if options.json:
        print(json.dumps(now, indent=2))
    if options.record:
        RECORDED.write_text(json.dumps(dict(sorted((known | {VERSION: now}).items())), indent=2) + "\n")
        return
    was = known.get(VERSION)
    if was is None:
        print(f"Nothing is recorded for Python {VERSION}, only for {', '.join(known)}: instructions.py --record")
        sys.exit(UNKNOWN)
    lines = more(was, now)
    for line in lines:
        print(line)
    if lines:
        print("A step takes more than it did. If that is worth it: python tests/bench/instructions.py --record")
        sys.exit(MORE)
    told = (f"{role} {now[role]['instructions']:g} ({was[role]['instructions']:g} recorded)" for role in PARTS)
    print("instructions of Python a step:", ", ".join(told))


if __name__ == "__main__":
    main()
