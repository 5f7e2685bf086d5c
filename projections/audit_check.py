"""The integrity part of an audit report: the run's record checked now, from the log, and how anybody can check it."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from events.topics import DECISIONS, SPECS, Topic
from projections.audit_document import Integrity, IntegrityProblem, Place
from projections.audit_log import Told
from projections.replay_again import Kept
from projections.replay_sources import KCAT, KafkaLog, Record, Source, Span, run_of
from projections.verify import Check, Finding, Result
from streams.payloads import PayloadStore
from streams.settings import Settings

MOST_PROBLEMS: Final = 20
_MOST_KEPT: Final = 16 * 1024 * 1024
"""Bytes of a run's records that are kept between two readings: to fetch them again takes 5 ms."""
_LACKS: Final = {
    "spec": "this version of the workflow is not known here, so nothing could be decided again",
    "payload": "a value that is kept outside of the log can't be had here",
    "beginning": "the beginning of the run is no longer in the log",
    "end": "nothing names the hash of its last decision",
}


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a report needs besides the views. `source`: the log, `kept`: large values, `artifacts`: where runs have their folders.

    `prefix`: of the topics' names; `verify`: commands by which anybody can check the run.
    """

    source: Source
    kept: Kept
    artifacts: Path
    prefix: str = ""
    verify: tuple[str, ...] = ()

    def name(self, topic: Topic) -> str:
        """Return a topic's full name."""
        return self.prefix + topic.name


@dataclass(frozen=True, slots=True)
class RunLog(KafkaLog):
    """The log as far as a run stands in it, for two readers: unless it is much, the second gets what was fetched for the first.

    `run`: the run's id; `kept`: by partition and span.
    """

    run: bytes = b""
    kept: dict[tuple[int, Span], list[Record]] = field(default_factory=dict)

    def records(self, partition: int, span: Span) -> Iterator[Record]:
        """Yield the records of a partition that may concern the run."""
        if (partition, span) in self.kept:
            yield from self.kept[partition, span]
            return
        found, size = list[Record](), 0
        for each in KafkaLog.records(self, partition, span):
            if run_of(each.value) is None or self.run in (each.value or b""):
                size += len(each.value or b"")
                if size <= _MOST_KEPT:
                    found.append(each)
                else:
                    found.clear()
                yield each
        if size <= _MOST_KEPT:  # else, or when the first reader has not read to the end, it is read again
            self.kept[partition, span] = found


def ledger_of(settings: Settings, run: Mapping[str, Any]) -> Ledger:
    """Return the ledger as far as a run stands in it. `run`: its row of `runs`. Raises KafkaUnreachableError."""
    partition = run["partition"]
    log = KafkaLog.open(settings, partition)
    there = log.ends[partition]
    # What broke a chain stands behind the last decision that counts.
    end = there.end if run["problem"] else min(there.end, run["last_offset"] + 1)
    span = Span(min(max(there.first, run["first_offset"]), end), end)
    read = f"kcat -b {settings.bootstrap_servers} -C -e -q -o beginning -f '{KCAT}' -t {settings.topic_prefix}"
    return Ledger(
        RunLog(settings, log.partitions, {partition: span}, run=run["run_id"].encode()),
        PayloadStore(settings),
        settings.data_dir / "artifacts",
        settings.topic_prefix,
        (
            f"foldflow verify {run['run_id']}",
            f"{read}{DECISIONS.name} -p {partition} > run.bin",
            f"{read}{SPECS.name} >> run.bin",
            f"foldflow verify {run['run_id']} --from run.bin",
        ),
    )


def checked(ledger: Ledger, run: Mapping[str, Any], canonical: str | None) -> tuple[Result, float]:
    """Check a run, decide it again, and return what was found and how many milliseconds that took. Raises what reading raises."""
    began = time.monotonic()
    known = {} if canonical is None else {run["digest"]: canonical}
    check = Check(ledger.source, known, lambda: ledger.kept, frozenset([run["run_id"].encode()]))
    whole = Result()
    for partition in ledger.source.spans():
        whole.add(check(partition, lambda _: None))
    # Others may have written garbage between this run's records.
    whole.findings = [each for each in whole.findings if each.run_id == run["run_id"] or each.kind == "archive"]
    return whole, (time.monotonic() - began) * 1000


def integrity(ledger: Ledger, run: Mapping[str, Any], told: Told, canonical: str | None) -> Integrity:
    """Check a run, and return what a report says of that. `canonical`: its version's definition, None if it isn't known."""
    topic = ledger.name(DECISIONS)
    result, took_ms = checked(ledger, run, canonical)
    problems = [_problem(each, topic) for each in result.findings]
    place = Place(topic, run["partition"], run["last_offset"])
    if not problems and run["problem"]:
        problems.append(
            IntegrityProblem("set aside", run["problem"], "see `foldflow verify`", place, run["seq"], None, None, None)
        )
    if not problems and (told.head, told.seq) != (run["head"], run["seq"]):
        text = f"the log holds {told.seq:,} decisions of this run, and {run['seq']:,} were read from it before"
        cause = told.stopped or "records were removed or replaced since: rebuild the views and look again"
        problems.append(IntegrityProblem("views", text, cause, place, told.seq, None, None, None))
    unchecked = [_LACKS.get(each, each) for each in sorted(result.unchecked)]
    return Integrity(
        verdict="damaged" if problems else "partly" if unchecked else "intact",
        checked=datetime.now(UTC),
        took_ms=round(took_ms, 1),
        source=ledger.source.name,
        decisions=result.decisions,
        again=result.again,
        stand_ins=result.stand_ins,
        head=told.head,
        passed_over=dict(sorted(result.ignored.items())),
        unchecked=unchecked,
        problems=problems[:MOST_PROBLEMS],
        problems_left_out=max(0, len(problems) - MOST_PROBLEMS) + result.more,
        verify=list(ledger.verify),
    )


def _problem(found: Finding, topic: str) -> IntegrityProblem:
    place = Place(topic, found.partition, found.offset)
    return IntegrityProblem(found.kind, found.problem, found.cause, place, found.seq, found.field, found.recorded, found.again)
