"""`foldflow backtest`: decides recorded history by another version of its workflow."""

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import fail, quiet, say
from infra.cli.verify import Files, From, Json, Processes, ago, opened, progress, unusable
from streams.settings import Settings

if TYPE_CHECKING:
    from projections.backtest import Outcome
    from streams.workflow.spec import WorkflowSpec

DIFFER, UNUSABLE, UNCHECKED = 1, 2, 3
_SHOWN: Final = 20


def backtest(
    spec: Annotated[Path, typer.Option("--spec", help="The other version: a definition (YAML).")],
    since: Annotated[str, typer.Option("--since", help="Only runs that started within this time: 2h, 7d.")] = "",
    workflow: Annotated[
        str, typer.Option("--workflow", help="Whose runs, if not those of the workflow that the definition names.")
    ] = "",
    from_: From = None,
    files: Files = None,
    processes: Processes = 0,
    as_json: Json = False,
) -> None:
    """Decide recorded history by another version of a workflow: which runs would have gone another way, and where.

    Each recorded input is decided by that version, as far as a run goes the same way; the first decision that differs is shown.
    What calls answered is what they answered then; nothing is called and nothing is written.

    For example:

        foldflow backtest --spec new.yaml --since 7d

        foldflow backtest --spec new.yaml --workflow refund --json

        foldflow backtest --spec new.yaml --from archive/

        foldflow backtest --spec new.yaml --file tests/histories/refund-1.json

    Exit codes: 0 no run would have gone another way, 1 some would, 2 a wrong option or definition, no archive, or no such runs,
    3 none would, as far as is known: for some a payload is missing, 4 Kafka can't be reached.
    """
    from infra.cli.histories import decided_again, definition  # noqa: PLC0415 - pydantic

    other = definition(spec)
    if files:
        decided_again(files, other, as_json=as_json)
        return
    began, name, after = time.monotonic(), workflow or other.name, ago(since) if since else None
    settings = quiet(Settings())
    with unusable():
        from projections.backtest import Backtest, together  # noqa: PLC0415 - Kafka, Avro, Arrow
        from projections.replay_parallel import each_partition  # noqa: PLC0415
        from streams.payloads import PayloadStore  # noqa: PLC0415

        source = opened(settings, from_)
        job = Backtest(source, other.canonical, name, partial(PayloadStore, settings), after)
        spans = source.spans()
        with progress("deciding", sum(end - first for first, end in spans.values()), silent=as_json) as tick:
            outcome = together(each_partition(job, spans, processes or os.cpu_count() or 1, tick))
    if not outcome.runs:
        fail(f"There are no runs of `{name}` in {source.name}{f' that started within {since}' * bool(since)}.", UNUSABLE)
    took_s = time.monotonic() - began
    if as_json:
        print(json.dumps(_as_json(name, other, outcome, took_s), indent=2, ensure_ascii=False))
    else:
        _show(name, other, outcome, took_s)
    if outcome.differ:
        raise typer.Exit(DIFFER)
    if outcome.unknown or outcome.damage:
        raise typer.Exit(UNCHECKED)


def _show(name: str, other: "WorkflowSpec", outcome: "Outcome", took_s: float) -> None:
    print(f"{outcome.runs:,} runs of {name} ({outcome.decisions:,} decisions) by version {other.digest[:12]}, in {took_s:.1f} s")
    print(f"  the same way   {outcome.same:,}")
    refused = f"  ({outcome.refused:,} of them: it refuses their input)" if outcome.refused else ""
    print(f"  another way    {outcome.differ:,}{refused}")
    if outcome.unknown:
        print(f"  not known      {outcome.unknown:,}, for example {outcome.lacking}")
    for problem in outcome.damage:
        say(problem)
    if outcome.where:
        print("where: " + ", ".join(f"{step} {count:,}" for step, count in outcome.where.most_common(10)))
    for each in outcome.others[:_SHOWN]:
        print(f"\n  run {each.run_id} (version {each.digest[:12]}): decision {each.seq}, offset {each.partition}/{each.offset}")
        print(f"    {each.field}: recorded is {each.recorded}")
        print(f"    {' ' * len(each.field)}  now it is   {each.now}")
        if each.effects != each.recorded_effects:
            print(f"    recorded: {', '.join(each.recorded_effects) or 'nothing'}")
            print(f"    now:      {', '.join(each.effects) or 'nothing'}")
    if (more := outcome.differ - _SHOWN) > 0:
        say(f"… and {more:,} more; --json lists them")


def _as_json(name: str, other: "WorkflowSpec", outcome: "Outcome", took_s: float) -> dict[str, Any]:
    return {
        "workflow": name,
        "digest": other.digest,
        "runs": outcome.runs,
        "decisions": outcome.decisions,
        "same": outcome.same,
        "differ": outcome.differ,
        "refused": outcome.refused,
        "unknown": outcome.unknown,
        "unknown_example": outcome.lacking or None,
        "where": dict(outcome.where.most_common()),
        "runs_that_differ": [dataclasses.asdict(each) for each in outcome.others],
        "left_out": outcome.differ - len(outcome.others),
        "damage": outcome.damage,
        "seconds": round(took_s, 3),
    }
