"""What a chaos run found: its figures as a table, and what must not be, with its evidence."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import schedule
from farm import Farm, logs
from ledger_watch import LedgerWatch, Standstill
from sending import Sender

from events import codec, topics
from events.decisions import DeadLetter
from streams import kafka
from streams.settings import Settings

_NUMBERS: Final = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}|\d+")
_TRACEBACK: Final = re.compile(r"^.*Traceback \(most recent call last\):$", re.MULTILINE)
_ERROR_LINE: Final = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Timeout|Interrupt|Exit|Cancelled\w*)\b.*$", re.MULTILINE)


@dataclass(slots=True)
class Report:
    """`figures`: numbers by name; `violations`: what must not be; `remarks`: what somebody may want to know."""

    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing is there that must not be."""
        return not self.violations

    def markdown(self) -> str:
        """Return the table of figures, as a README takes it."""
        rows = [f"| {name} | {_shown(value)} |" for name, value in self.figures.items()]
        return "\n".join(["| | |", "|---|---|", *rows])


def load_figures(report: Report, sender: Sender, watch: LedgerWatch, seconds: float, load_s: float) -> None:
    """Add what was asked for and what came of it; a run that ended otherwise than it must is a violation."""
    ended = [run for run in watch.runs.values() if run.outcome]
    report.figures |= {
        "requests acknowledged (commands)": f"{sender.counts['requests']:,} ({sender.counts['commands']:,})",
        "requests/s": round(sender.counts["requests"] / load_s, 1),
        "runs asked for": len(sender.asked),
        "runs, child runs included": len(watch.runs),
        "runs ended": ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(Counter(r.outcome for r in ended).items())),
        "seconds": round(seconds),
    }
    for name, expected in sender.asked.items():
        run = watch.runs.get(name)
        if run is None:
            report.violations.append(f"run {name} was asked for and never began")
        elif run.outcome is None:
            report.violations.append(f"run {name} did not end; its last decisions: {' | '.join(run.last)}")
        elif expected not in {"any", run.outcome}:
            report.violations.append(f"run {name} {run.outcome}, and must be {expected}: {' | '.join(run.last)}")
    report.violations += [
        f"child run {name} did not end; its last decisions: {' | '.join(run.last)}"
        for name, run in watch.open_runs().items()
        if name not in sender.asked
    ]
    took = [run.ended_ms - sender.sent_ms[name] for name in sender.asked if (run := watch.runs.get(name)) and run.ended_ms]
    if len(took) > 1:
        cuts = statistics.quantiles(took, n=20, method="inclusive")
        report.figures["run duration p50 / p95 / max, s"] = " / ".join(
            f"{each / 1000:.1f}" for each in (cuts[9], cuts[18], max(took))
        )


def ledger_figures(report: Report, watch: LedgerWatch, witness: Path) -> None:
    """Add what was written, and how often a call was made again."""
    others = ", ".join(f"{count:,} {why}" for why, count in sorted(watch.verdicts.items()) if why != "accepted")
    calls = [json.loads(line)["call_id"] for line in witness.read_text().splitlines()]
    distinct = len(set(calls))
    report.figures |= {
        "decisions": watch.verdicts["accepted"],
        "records that don't count": others or 0,
        "tool calls requested": watch.calls_requested["tool"],
        "model calls requested": watch.calls_requested["llm"],
        "tool calls that the witness received": len(calls),
        "of them repeats": len(calls) - distinct,
    }
    report.violations += [f"chain of {run}: {problem}" for run, problem in watch.broken.items()]


def fault_figures(report: Report, farm: Farm, in_flight: Mapping[str, int]) -> None:
    """Add what was broken; a process that ended by itself is a violation, unless Kafka was away for long."""
    table = farm.counts
    for kind, name in (("kill", "kills"), ("stop", "stops"), ("terminate", "terminations"), ("start", "starts")):
        by_role = {role: table[role, kind] for role in schedule.ROLES if table[role, kind]}
        shared = ", ".join(f"{role} {count}" for role, count in by_role.items())
        report.figures[name] = f"{sum(by_role.values())} ({shared})" if by_role else 0
    report.figures["calls open at kills of tool, llm workers"] = f"{in_flight['tool']:,}, {in_flight['llm']:,}"
    report.figures["memory, MB at most"] = ", ".join(f"{role} {mb:.0f}" for role, mb in sorted(farm.memory_mb.items()))
    report.figures["start, s at most"] = ", ".join(f"{role} {max(each):.1f}" for role, each in sorted(farm.start_s.items()))
    for death in farm.deaths:
        said = "\n    ".join((f"{death.name} at {death.at_ms}: {death.what}", *death.last_lines))
        (report.remarks if death.excused else report.violations).append(said)
    report.figures["deaths by themselves (of them without Kafka)"] = (
        f"{len(farm.deaths)} ({sum(death.excused for death in farm.deaths)})"
    )


def standstill_figures(report: Report, watch: LedgerWatch, span_ms: tuple[int, int], limit_ms: int, disruptions: Path) -> None:
    """Add how long a partition stood still under load, and how much of that after whoever decides was there again.

    The latter, longer than `limit_ms`, is a remark with what was being done to whom.
    """
    seen = [each for each in watch.standstills if span_ms[0] <= each.from_ms <= span_ms[1]]
    lines_read = [json.loads(line) for line in disruptions.read_text().splitlines()]
    done = [each for each in lines_read if each["role"] in {"orchestrator", "kafka", "intake"}]
    waited = {each: _waited(each, done) for each in seen}
    report.figures |= {
        "longest time a partition stood still, s": round(max((each.ms for each in seen), default=0) / 1000, 1),
        "of it with all that decides there, s": round(max(waited.values(), default=0) / 1000, 1),
    }
    told_until = 0
    for each in sorted(seen, key=lambda each: each.from_ms):
        if waited[each] > limit_ms and each.from_ms > told_until:  # most partitions stand still together
            told_until = each.from_ms + each.ms
            report.remarks.append(_around(each, done))


def _waited(still: Standstill, done: Sequence[Mapping[str, Any]]) -> int:
    """Return for how long a partition stood still after the last thing that was done, in milliseconds."""
    until = still.from_ms + still.ms
    return until - max((each["until_ms"] for each in done if still.from_ms < each["until_ms"] <= until), default=still.from_ms)


def _around(still: Standstill, done: Sequence[Mapping[str, Any]]) -> str:
    """Say what was done to whom while a partition stood still, in seconds since that began."""
    until = still.from_ms + still.ms
    said = [
        f"{each['kind']} {each['name']} {_since(still, each['at_ms'])} to {_since(still, each['until_ms'])}"
        for each in done
        if each["at_ms"] < until and each["until_ms"] > still.from_ms - 2000
    ]
    return f"partition {still.partition} stood still for {still.ms / 1000:.1f} s from {still.from_ms} on: {'; '.join(said)}"


def _since(still: Standstill, at_ms: int) -> str:
    return f"{(at_ms - still.from_ms) / 1000:+.1f}"


def dead_letters(report: Report, settings: Settings) -> None:
    """Every dead letter is a violation: whatever this load sends can be processed."""
    reader = kafka.reader(settings)
    try:
        name, partitions = kafka.name(settings, topics.DEADLETTER), kafka.connect(settings).partitions[topics.DEADLETTER.name]
        letters = [
            codec.decode(message.value(), DeadLetter)
            for partition in range(partitions)
            for message in kafka.read_partition(reader, name, partition, 0)
        ]
    finally:
        reader.close()
    report.figures["dead letters"] = len(letters)
    for (reason, detail), count in Counter((each.reason, each.detail[:300]) for each in letters).items():
        report.violations.append(f"{count} dead letters: {reason}: {detail}")


def log_remarks(report: Report, folder: Path) -> None:
    """Add the tracebacks in the logs, by how they end, and warnings, by what they say."""
    ends: Counter[tuple[str, str]] = Counter()
    for name, text in logs(folder):
        role = name.rpartition("-")[0]
        for start in _TRACEBACK.finditer(text):
            found = _ERROR_LINE.search(text, start.end())
            ends[role, _NUMBERS.sub("#", found.group()[:200]) if found else "?"] += 1
    report.figures["tracebacks in logs"] = sum(ends.values())
    report.remarks += [f"{count} tracebacks of {role}: {end}" for (role, end), count in ends.most_common()]


def checked(report: Report, said: Mapping[str, Any]) -> None:
    """Add what the checker says."""
    report.figures["rules that the checker holds the topics against"] = len(said.get("rules", ()))
    report.figures |= {f"checker: {name}": value for name, value in said.get("figures", {}).items()}
    report.violations += [f"{each['rule']}: {each['where']}: {each['detail']}" for each in said.get("violations", ())]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def lines(items: Iterable[str], most: int = 40) -> str:
    """Return a list to print, cut where it gets too long."""
    every = list(items)
    cut = [f"- … and {len(every) - most} more"] if len(every) > most else []
    return "\n".join([*(f"- {each}" for each in every[:most]), *cut])
