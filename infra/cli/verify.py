"""`foldflow verify`: checks runs from the topics alone, from an archive of them, or from recorded histories."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import console, fail, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from projections.replay_sources import Source
    from projections.verify import Finding, Result

FOUND, UNUSABLE, UNCHECKED, UNREACHABLE = 1, 2, 3, 4
_SHOWN: Final = 20

From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Read an archive instead of Kafka: a folder of `foldflow export`, or a file of kcat or kafka-console-consumer.",
        show_default=False,
    ),
]
Processes = Annotated[int, typer.Option("--processes", min=0, max=256, help="How many processes; 0: as many as cores.")]
Files = Annotated[
    list[Path] | None,
    typer.Option("--file", help="A recorded history of `foldflow history`, or a folder of them; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def verify(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="A run's id or the beginning of it, or a request's id.")] = "",
    all_: Annotated[bool, typer.Option("--all", help="All runs.")] = False,
    since: Annotated[str, typer.Option("--since", help="Runs of which something was recorded within this time: 2h, 3d.")] = "",
    from_: From = None,
    workflows: Annotated[
        list[Path] | None,
        typer.Option("--workflows", help="Definitions (YAML) or folders of them, where an archive has none; may be repeated."),
    ] = None,
    files: Files = None,
    processes: Processes = 0,
    as_json: Json = False,
) -> None:
    r"""Check that runs are what was decided: the hash chain, the numbers, and each decision decided again from its input.

    What is decided again is compared byte for byte with what stands on the log; nothing is called and nothing is written. What is
    found names its record, the first field that differs, and what has probably happened. All of it is read from the topics alone,
    or from an archive: then no Kafka is needed. Payloads above 256 KB are read from the payload store if they are needed.

    For example:

        foldflow verify 8f6a3a7e

        foldflow verify --all --processes 4

        foldflow verify --since 2d --json

        foldflow verify --from archive/

        foldflow verify --file tests/histories/               recorded histories, by today's code

    A file of kcat, or of Kafka's console consumer, is an archive too; with both topics in one file it needs nothing else:

        kcat -b HOST -C -e -o beginning -t foldflow.decisions -f '%p %o %h\n%R%s' > run.bin

        kcat -b HOST -C -e -o beginning -t foldflow.specs -f '%p %o %h\n%R%s' >> run.bin

        foldflow kafka console-consumer --topic foldflow.decisions --from-beginning --timeout-ms 5000
        --formatter-property print.partition=true --formatter-property print.offset=true --formatter-property print.headers=true
        --formatter-property value.deserializer=org.apache.kafka.common.serialization.BytesDeserializer > run.txt

        foldflow verify --from run.bin

    Exit codes: 0 whole, 1 something was found, 2 a wrong option, no such run or no archive, 3 nothing was found, but not
    everything could be checked (a version or a payload is missing, the beginning of a run, or the headers), 4 Kafka can't be
    reached.
    """
    if sum((bool(run), all_, bool(since), bool(files))) > 1 or not (run or all_ or since or files or from_):
        fail("What is to be checked? Say one of RUN, --all, --since, --file, or --from for a whole archive.", UNUSABLE)
    if files:
        from infra.cli.histories import decided_again  # noqa: PLC0415 - the others don't need it

        decided_again(files, None, as_json=as_json)
        return
    began, after = time.monotonic(), ago(since) if since else None
    settings = quiet(Settings())
    with unusable():
        source = opened(settings, from_)
        result = _checked(settings, source, run, after, canonical(source, workflows or []), processes, silent=as_json)
    if as_json:
        print(json.dumps(_as_json(source.name, result, time.monotonic() - began), indent=2, ensure_ascii=False))
    else:
        _show(source.name, result, time.monotonic() - began)
    if not result.whole:
        raise typer.Exit(FOUND)
    if result.unchecked:
        raise typer.Exit(UNCHECKED)


def _checked(
    settings: Settings, source: "Source", run: str, since: int | None, known: dict[str, str], processes: int, *, silent: bool
) -> "Result":
    from infra.cli.replay import ids_of, spans_of  # noqa: PLC0415 - Avro
    from projections.replay_parallel import each_partition  # noqa: PLC0415
    from projections.verify import Check, runs_since, together  # noqa: PLC0415
    from streams.payloads import PayloadStore  # noqa: PLC0415

    check = Check(source, known, partial(PayloadStore, settings))
    spans = source.spans()
    if run:
        for run_id in ids_of(source, run):
            mine = spans_of(source, run_id)
            with progress("verifying", sum(end - first for first, end in mine.values()), silent=silent) as tick:
                only = dataclasses.replace(check, only=frozenset([run_id.encode()]))
                result = together(each_partition(only, mine, processes or 1, tick))
            if result.runs or result.findings:
                return result
        fail(f"There is no run `{run}` in {source.name}. `foldflow runs` lists them.", UNUSABLE)
    total = sum(end - first for first, end in spans.values())
    if since is not None:
        with progress("looking for runs", None, silent=silent) as tick:
            check = dataclasses.replace(check, only=runs_since(source, since, tick))
    with progress("verifying", total, silent=silent) as tick:
        return together(each_partition(check, spans, processes or os.cpu_count() or 1, tick))


# --- What the commands that read again share ---


def opened(settings: Settings, archive: Path | None) -> "Source":
    """Return where to read from. Raises what `unusable` says."""
    from projections import replay_sources  # noqa: PLC0415 - Kafka, Avro, Arrow

    return replay_sources.archive(archive) if archive is not None else replay_sources.KafkaLog.open(settings)


@contextmanager
def unusable() -> Iterator[None]:
    """End the command where it can't be read from there."""
    from projections.replay_parquet import DamagedError  # noqa: PLC0415 - Kafka, Arrow
    from projections.replay_sources import ArchiveError  # noqa: PLC0415
    from streams import kafka  # noqa: PLC0415

    try:
        yield
    except (kafka.KafkaUnreachableError, kafka.TopicsMissingError) as error:
        fail(f"{error}\nAn archive needs no Kafka: --from PATH.", UNREACHABLE)
    except ArchiveError as error:
        fail(str(error), UNUSABLE)
    except DamagedError as error:
        fail(str(error), FOUND)


def canonical(source: "Source", definitions: list[Path]) -> dict[str, str]:
    """Return the known versions of workflows: those that stand there, and those in files."""
    found = source.specs()
    for path in definitions:
        inside = sorted((*path.rglob("*.yaml"), *path.rglob("*.yml"))) if path.is_dir() else [path]
        if not inside:
            fail(f"{path}: there is no .yaml file in it", UNUSABLE)
        for each in inside:
            from infra.cli.histories import definition  # noqa: PLC0415 - pydantic

            spec = definition(each)
            found[spec.digest] = spec.canonical
    return found


def ago(text: str) -> int:
    """Return when that long ago was, milliseconds since the epoch; ends the command if it is no duration."""
    from streams.workflow.times import milliseconds  # noqa: PLC0415 - pydantic

    try:
        return int(time.time() * 1000 - milliseconds(text))
    except ValueError as error:
        return fail(f"--since: {error}", UNUSABLE)


@contextmanager
def progress(title: str, total: int | None, *, silent: bool) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many records were read; what is given is called with how many more."""
    terminal = console(stderr=True)
    if silent or not terminal.is_terminal:
        yield lambda _: None
        return
    from rich import progress as bars  # noqa: PLC0415 - 0.1 s

    columns = (
        *(bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()),
        *(bars.TextColumn("records"), bars.TimeRemainingColumn()),
    )
    with bars.Progress(*columns, console=terminal, transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda more: shown.advance(task, more)


# --- What came of it ---


_LACKS: Final = {
    "spec": "their workflow's version isn't known here; give its definition with --workflows FILE",
    "payload": "a payload can't be had here; set FOLDFLOW_PAYLOAD_STORE or FOLDFLOW_DATA_DIR",
    "beginning": "they began before the first record that is here",
    "end": "nothing here names the hash of their last decision, so a changed byte in it may not show; copy the headers too",
}


def _show(source: str, result: "Result", took_s: float) -> None:
    runs = f"{result.runs:,} run{'s' * (result.runs != 1)}"
    print(f"{source}: {runs} ({result.open:,} not over), {result.decisions:,} decisions, in {took_s:.1f} s")
    print(
        f"  decided again      {result.again:,}"
        + (f", {result.stand_ins:,} of which only stand in for one that failed" * bool(result.stand_ins))
    )
    if result.ignored:
        told = ", ".join(f"{verdict} {count:,}" for verdict, count in sorted(result.ignored.items()))
        print(f"  passed over        {sum(result.ignored.values()):,} records, as the protocol says: {told}")
    for partition, first in sorted(result.begins.items()) if "beginning" in result.unchecked else ():
        print(f"  partition {partition} begins with offset {first:,}")
    for what, count in sorted(result.unchecked.items()):
        said = "not decided again " if what != "end" else "end not known     "
        print(f"  {said} {count:,} runs (their chain was checked): {_LACKS[what]}")
        print(f"                     for example {result.lacking[what]}")
    if result.whole:
        print("✓ whole" if not result.unchecked else "✓ nothing wrong was found in what could be checked")
        return
    print(f"✗ found: {len(result.findings) + result.more:,}")
    for finding in result.findings[:_SHOWN]:
        print(told_finding(finding))
    if (more := len(result.findings) + result.more - _SHOWN) > 0:
        say(f"… and {more:,} more; --json has up to 1,000 of each partition")


def told_finding(finding: "Finding") -> str:
    """Return a finding for people."""
    place = f"partition {finding.partition}, offset {finding.offset}" if finding.offset >= 0 else "the archive"
    of = f", run {finding.run_id}" if finding.run_id else ""
    number = f", decision {finding.seq}" if finding.seq is not None else ""
    return f"\n  {finding.kind}: {place}{of}{number}\n    {finding.problem}\n    cause: {finding.cause}"


def _as_json(source: str, result: "Result", took_s: float) -> dict[str, Any]:
    return {
        "source": source,
        "whole": result.whole,
        "runs": result.runs,
        "open_runs": result.open,
        "decisions": result.decisions,
        "decided_again": result.again,
        "stand_ins": result.stand_ins,
        "passed_over": dict(sorted(result.ignored.items())),
        "not_decided_again": {
            what: {"runs": count, "example": result.lacking[what]} for what, count in sorted(result.unchecked.items())
        },
        "begins": {str(partition): first for partition, first in sorted(result.begins.items())},
        "findings": [dataclasses.asdict(each) for each in result.findings],
        "findings_left_out": result.more,
        "seconds": round(took_s, 3),
    }
