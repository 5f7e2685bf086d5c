"""The checker: reads the topics alone, decodes them by itself, and says whether every promise was kept.

    python tests/chaos/checker.py --bootstrap-servers 127.0.0.1:9092 --topic-prefix p. --folder FOLDER [--views FILE] [--json]

FOLDER holds what is known outside of Foldflow: `requests.jsonl`, `witness.jsonl`, `disruptions.jsonl`; each may be missing, then
what it tells is not checked. Exit code 0: all holds; 1: something doesn't; 2: something can't be read.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import structlog
from checking import outside, rules, views
from checking.ledger import Ledger, build
from checking.records import Arrival, CannotReadError, Cluster, Disruption, Wanted, lines

Rule = Callable[[Ledger], Iterable[tuple[str, str]]]
RULES: Final[Mapping[str, Rule]] = {
    "one_run_per_request": rules.one_run_per_request,
    "every_run_ends": rules.every_run_ends,
    "seq_without_gaps": rules.seq_without_gaps,
    "one_decision_per_input": rules.one_decision_per_input,
    "chains_whole": rules.chains_whole,
    "ignored_explained": rules.ignored_explained,
    "results_belong_to_calls": rules.results_belong_to_calls,
    "side_effects_explained": outside.side_effects_explained,
    "projections_equal_rebuild": views.projections_equal_rebuild,
}
"""The rules by name. The names are what others rely on."""
MOST: Final = 100
"""How many violations of one rule are told; the others are counted."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What breaks a rule, and where."""

    rule: str
    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `rules`: those that there was something to check with."""

    holds: bool
    figures: dict[str, float]
    violations: list[Violation]
    rules: list[str]


def check(ledger: Ledger, table: Mapping[str, Rule] = RULES) -> Report:
    """Judge a ledger by the rules of a table."""
    left_out = {"side_effects_explained": ledger.witnessed is None, "projections_equal_rebuild": ledger.views is None}
    checked = [name for name in table if not left_out.get(name, False)]
    found: list[Violation] = []
    total = 0
    for name in checked:
        findings = [Violation(name, *each) for each in table[name](ledger)]
        total += len(findings)
        found += findings[:MOST]
        if len(findings) > MOST:
            found.append(Violation(name, "and more", f"{len(findings) - MOST} others"))
    figures: dict[str, float] = {**rules.history_figures(ledger), **outside.side_effect_figures(ledger), "violations": total}
    return Report(not found, figures, found, checked)


def read(servers: str, prefix: str, folder: Path | None, given: Path | None) -> Iterator[Ledger]:
    """Yield the ledger that stands on the topics; what was built for it is there until the next step. Raises CannotReadError."""
    wanted = lines(folder / "requests.jsonl", Wanted) if folder else None
    witnessed = lines(folder / "witness.jsonl", Arrival) if folder else None
    disruptions = (lines(folder / "disruptions.jsonl", Disruption) if folder else None) or ()
    with tempfile.TemporaryDirectory(prefix="checker-") as own, closing(Cluster(servers, prefix)) as cluster:
        built = views.rebuild(servers, prefix, given, Path(own)) if given else None
        records, ids = cluster.records(), cluster.topic_ids
        yield build(records, ids, wanted=wanted, witnessed=witnessed, disruptions=disruptions, views=built)


def tell(report: Report) -> Iterator[str]:
    """Yield the report for people, line by line."""
    broken = {each.rule for each in report.violations}
    for name in RULES:
        yield f"{'-' if name not in report.rules else 'BROKEN' if name in broken else 'holds':8}{name}"
    yield ""
    for name, figure in report.figures.items():
        yield f"{figure:>12,}  {name}"
    for each in report.violations:
        yield f"\n{each.rule}: {each.where}\n  {each.detail}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bootstrap-servers", required=True, help="Kafka's address")
    parser.add_argument("--topic-prefix", default="foldflow.", help="what stands before the topics' names")
    parser.add_argument("--folder", type=Path, help="where requests.jsonl, witness.jsonl and disruptions.jsonl are")
    parser.add_argument("--views", type=Path, help="views to compare with a rebuild; nobody else may have them open")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # of the projector; stdout is the report's
    gc.disable()  # millions of small objects that all stay: to look for cycles among them takes longer than everything else
    began = time.monotonic()
    try:
        for ledger in read(given.bootstrap_servers, given.topic_prefix, given.folder, given.views):
            report = check(ledger)
            report.figures["seconds"] = round(time.monotonic() - began, 1)
    except CannotReadError as error:
        sys.stderr.write(f"checker: {error}\n")
        return 2
    sys.stdout.write(json.dumps(asdict(report), indent=1) + "\n" if given.json else "\n".join([*tell(report), ""]))
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # for the projector, should Foldflow not be installed
    sys.exit(main())
