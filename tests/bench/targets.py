"""What Foldflow is held to: figures with their bounds, and the rows of RESULTS.md. Data, and little that reads it.

    python tests/bench/targets.py bench.jsonl peers.jsonl [--record]

Says which targets are met by what `bench.py --out` and `peers.py --out` have written, and puts all into one row of RESULTS.md.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Lines = list[dict[str, Any]]
RESULTS: Final = Path(__file__).with_name("RESULTS.md")


def of(figure: str, key: str, **where: Any) -> Callable[[Lines], Any]:
    """Return what finds a figure's value in lines (the last that fits), or None where it wasn't measured."""

    def find(lines: Lines) -> Any:
        fitting = [
            line for line in lines if line["figure"] == figure and all(line.get(name) == value for name, value in where.items())
        ]
        return fitting[-1].get(key) if fitting else None

    return find


def most(figure: str, key: str) -> Callable[[Lines], Any]:
    """Return what finds a figure's largest value."""
    return lambda lines: max((line[key] for line in lines if line["figure"] == figure), default=None)


@dataclass(frozen=True)
class Target:
    """A bound of the project's own: `at_least` or at most."""

    what: str
    find: Callable[[Lines], Any]
    bound: float
    at_least: bool = False

    def line(self, lines: Lines) -> str | None:
        """Return whether it is met, for people; None where it wasn't measured."""
        value = self.find(lines)
        if value is None:
            return None
        met = value >= self.bound if self.at_least else value <= self.bound
        return f"{'met   ' if met else 'MISSED'}  {self.what:<72} {value:>8} ({'≥' if self.at_least else '≤'} {self.bound})"


TARGETS: Final = (
    Target("runs/s against the best peer", of("peers", "runs_per_s_ratio"), 4, at_least=True),
    Target("p50 against the best peer that is a server", of("peers", "p50_ratio"), 0.5),
    Target("p99 against the p50 of the best peer", of("peers", "p99_to_p50_ratio"), 1),
    Target("a step of a run of 10,000 steps against one of 10: time", of("long_run", "ratio"), 1.1),
    Target("the same: CPU of the orchestrator", of("long_run", "cpu_ratio"), 1.1),
    Target("cold start to the first finished run, s", of("cold_start", "first_run_s"), 8),
    Target("memory of all processes but broker and model, idle, MB", of("idle", "ours_mb"), 500),
    Target("seconds until the views hold all, after full throughput", most("throughput", "views_caught_up_s"), 1),
)


def told(lines: Lines) -> list[str]:
    """Return which targets are met, as far as they were measured."""
    return [line for target in TARGETS if (line := target.line(lines)) is not None]


# --- Rows of RESULTS.md ---


def _sum(figure: str, key: str, names: Iterable[str], **where: Any) -> Callable[[Lines], Any]:
    def find(lines: Lines) -> Any:
        found = of(figure, key, **where)(lines)
        return None if found is None else round(sum(value for name, value in found.items() if name in names))

    return find


def _join(form: str, *finds: Callable[[Lines], Any]) -> Callable[[Lines], Any]:
    def find(lines: Lines) -> Any:
        values = [each(lines) for each in finds]
        return None if all(value is None for value in values) else form.format(*("-" if v is None else v for v in values))

    return find


def _machine(lines: Lines) -> Any:
    found = next((line for line in lines if line["figure"] == "machine"), None)
    if found is None:
        return None
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "java", "kafka", "confluent-kafka", "fastavro"))
    return f"{found['cores']} x {found['cpu']}, {found['memory_gb']} GB, Linux {found['kernel']}; {versions}"


OURS: Final = ("intake", "orchestrator", "tool", "api")
_BUSY: Final = {"inflight": 200}
COLUMNS: Final[dict[str, Callable[[Lines], Any]]] = {
    "date": of("machine", "date"),
    "commit": of("machine", "commit"),
    "runs/s at 20 / 200 / 1,000 in flight": _join(
        "{} / {} / {}", *(of("throughput", "runs_per_s", inflight=inflight) for inflight in (20, 200, 1000))
    ),
    "steps/s at 200": of("throughput", "steps_per_s", **_BUSY),
    "views behind, s": most("throughput", "views_caught_up_s"),
    "one at a time: p50 / p95 / p99 / max, ms": _join(
        "{} / {} / {} / {}", *(of("latency", key) for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
    ),
    "above 100 ms": _join("{} of {}", of("latency", "above_100_ms"), of("latency", "runs")),
    "against peers, times: runs/s / p50 / p99 to p50": _join(
        "{} / {} / {}", *(of("peers", key) for key in ("runs_per_s_ratio", "p50_ratio", "p99_to_p50_ratio"))
    ),
    "cold start, s": of("cold_start", "first_run_s"),
    "memory idle: ours, Kafka, MB": _join("{} + {}", of("idle", "ours_mb"), _sum("idle", "memory_mb", ("kafka",))),
    "CPU a step: ours, Kafka, µs": _join(
        "{} + {}",
        _sum("throughput", "cpu_us_a_step", OURS, **_BUSY),
        _sum("throughput", "cpu_us_a_step", ("kafka",), **_BUSY),
    ),
    "bytes a step on `decisions`": _sum("throughput", "log_bytes_a_step", ("decisions",), **_BUSY),
    "items/s of one run": of("fan_out", "items_per_s"),
    "step of 10,000 ÷ step of 10: time, CPU": _join("{} / {}", of("long_run", "ratio"), of("long_run", "cpu_ratio")),
    "2 + 2 processes ÷ 1 + 1": of("scaling", "ratio"),
    "decisions/s: views, replay": _join("{} / {}", of("projection", "decisions_per_s"), of("replay", "decisions_per_s")),
    "foreign CPU, cores": most("throughput", "foreign_cpu_cores"),
    "machine": _machine,
}


def row(lines: Lines) -> str:
    """Return the row of the table that these figures make."""
    found = (find(lines) for find in COLUMNS.values())
    return "| " + " | ".join("-" if value is None else str(value) for value in found) + " |"


def record(lines: Lines, path: Path = RESULTS) -> None:
    """Put these figures on top of the table, and make its head if the columns are others by now."""
    head = "| " + " | ".join(COLUMNS) + " |"
    text = path.read_text().splitlines()
    if head not in text:
        text += ["", head, "|" + "---|" * len(COLUMNS)]
    at = text.index(head) + 2
    path.write_text("\n".join([*text[:at], row(lines), *text[at:]]) + "\n")


def main() -> None:
    """Read lines, say which targets are met, and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="lines of bench.py and peers.py")
    parser.add_argument("--record", action="store_true", help="put them into RESULTS.md")
    options = parser.parse_args()
    lines = [json.loads(line) for path in options.files for line in path.read_text().splitlines()]
    print(*told(lines), sep="\n")
    if options.record:
        record(lines)


if __name__ == "__main__":
    main()
