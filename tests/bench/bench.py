"""Measure Foldflow on this machine: `make bench`. One JSON line a figure on stdout; progress and targets on stderr.

    python tests/bench/bench.py                          everything, about 6 minutes
    python tests/bench/bench.py --only latency,throughput
    python tests/bench/bench.py --quick                  less than a minute: to see that it works, its figures say nothing
    python tests/bench/bench.py --record                 everything, and a row in RESULTS.md

Every process is real, on free ports with fresh data, and stopped at the end, also by Ctrl-C. A run has six trivial durable steps,
as in the comparison with other systems (peers.py). Leave the machine alone meanwhile: `foreign_cpu_cores` says whether it was.

Exit codes: 0 measured (whether targets are met or not), 1 something failed, 2 a wrong option.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parent))
import footprint
import targets
from cluster import interruptible, lines_alone
from figures import FIGURES, QUICK, Bench, Line, Sizes


def about() -> Line:
    """Return the line that says when, what and where."""
    return {
        "figure": "machine",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "commit": footprint.commit(),
        **footprint.machine(),
    }


def measured(names: Sequence[str], sizes: Sizes, outs: Sequence[TextIO]) -> list[Line]:
    """Measure these figures, writing each line as soon as it is there; return all of them."""
    lines = [about()]
    write(lines[0], outs)
    with ExitStack() as stack:
        bench = Bench(sizes, stack)
        for name in names:
            began = time.monotonic()
            print(f"{name} …", file=sys.stderr, flush=True)
            for line in FIGURES[name](bench):
                lines.append({"figure": name, **line})
                write(lines[-1], outs)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return lines


def write(line: dict[str, Any], outs: Sequence[TextIO]) -> None:
    """Write a line where it is wanted."""
    for out in outs:
        print(json.dumps(line, ensure_ascii=False), file=out, flush=True)


def chosen(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """Return the names in an option, in the order of the table."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - FIGURES.keys()):
        parser.error(f"there is no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
    return [name for name in FIGURES if not wanted or name in wanted]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME[,NAME]", help="measure these figures alone")
    parser.add_argument("--list", action="store_true", help="say which figures there are, and measure none")
    parser.add_argument("--quick", action="store_true", help="little of everything, in less than a minute")
    parser.add_argument("--out", type=Path, help="write the lines into this file as well")
    parser.add_argument("--record", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    names = chosen(parser, options.only)
    if options.quick and options.record:
        parser.error("what --quick measures says nothing: it isn't recorded")
    if options.list:
        for name in names:
            print(f"{name:<12} {(FIGURES[name].__doc__ or '').splitlines()[0]}")
        return
    interruptible()
    with ExitStack() as stack:
        outs = [lines_alone(), *([stack.enter_context(options.out.open("w"))] if options.out else [])]
        lines = measured(names, QUICK if options.quick else Sizes(), outs)
    print(*targets.told(lines), sep="\n", file=sys.stderr)
    if options.record:
        targets.record(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
