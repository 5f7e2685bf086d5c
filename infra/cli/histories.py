"""`foldflow history`: writes a run's history to a file. `foldflow verify --file` and `backtest --file` decide it again."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.cli.naming import is_beginning, is_id, whole_id
from infra.cli.terminal import fail, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.kafka import Cluster
    from streams.testing.histories import Recorded, Replay
    from streams.workflow.spec import WorkflowSpec

DIFFERENT, UNUSABLE, UNREACHABLE = 1, 2, 4
_CONNECT_S = 10.0


def history(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or the beginning of it, or a request's id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; else standard output.", show_default=False)
    ] = None,
) -> None:
    """Write a run's history to a file: its decisions as they stand on Kafka, its workflow, and its large payloads.

    `foldflow verify --file` and `streams.testing.replay` decide it again. The file holds all the run's data: what was asked, what
    models and tools answered, and any secret among it. A run that goes on is written as far as it is.

    For example:

        foldflow history 8f6a3a7e --output tests/histories/refund-1.json

    Exit codes: 0 written, 1 a payload is missing, 2 there is no such run, or a wrong option, 4 Kafka or the payload
    store can't be reached.
    """
    from streams import kafka, payloads  # noqa: PLC0415 - Kafka and Avro are not needed for mistakes in the options
    from streams.testing.histories import text_of  # noqa: PLC0415
    from streams.workflow.payloads import PayloadError, PayloadMissingError  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        cluster = kafka.connect(settings, timeout_s=_CONNECT_S)
        found = recorded(settings, cluster, run)
        text = text_of(found, payloads.PayloadStore(settings))
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        fail(str(error), UNREACHABLE)
    except PayloadError as error:
        fail(str(error), DIFFERENT if isinstance(error, PayloadMissingError) else UNREACHABLE)
    if found.spec is None:
        say("Its workflow's version is not registered here: the history can be read, but hardly be decided again.")
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        fail(f"{output}: can't be written: {error.strerror}", UNUSABLE)
    say(f"{output}: {len(found.values)} decisions of run {found.run_id}. It holds all the run's data.")


def decided_again(files: list[Path], other: "WorkflowSpec | None", *, as_json: bool) -> None:
    """Decide recorded histories again by today's code, or by another version, and print what came of it; ends with its code."""
    from streams.testing.histories import HistoryError  # noqa: PLC0415
    from streams.testing.histories import replay as again  # noqa: PLC0415

    found: list[Replay] = []
    for path in _files(files):
        try:
            found.append(again(path, other))
        except HistoryError as error:
            fail(str(error), UNUSABLE)
        if not as_json:
            print(found[-1])
    if as_json:
        print(json.dumps([_as_json(each) for each in found], indent=2, ensure_ascii=False))
    if not all(each.same for each in found):
        raise typer.Exit(DIFFERENT)


def _as_json(found: "Replay") -> dict[str, Any]:
    return {"same": found.same, **dataclasses.asdict(found)}


def _files(paths: list[Path]) -> list[Path]:
    """Return the files that paths name, folders searched; ends with exit code 2 for a folder that has none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not inside:
            fail(f"{path}: there is no .json file in it", UNUSABLE)
        found += inside
    return found


def definition(path: Path) -> "WorkflowSpec":
    """Return the definition in a file; ends with exit code 2 if it is none."""
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    try:
        return load(path)
    except DefinitionFileError as error:
        return fail(str(error), UNUSABLE)


def recorded(settings: Settings, cluster: "Cluster", run: str) -> "Recorded":
    """Return a run as the ledger has it; ends with an exit code if there is none, or it is broken."""
    from events.ids import run_id  # noqa: PLC0415

    found = read(settings, cluster, run if is_id(run) else run_id(run))
    if not found.values and is_id(run):  # requests may have such ids too
        found = read(settings, cluster, run_id(run))
    elif not found.values and is_beginning(run) and (whole := whole_id(run)) is not None:
        found = read(settings, cluster, whole)
    if not found.values:
        fail(f"There is no run `{run}`. `foldflow runs` lists them.", UNUSABLE)
    return found


def read(settings: Settings, cluster: "Cluster", run_id: str) -> "Recorded":
    """Return a run's decisions that count, and its workflow's version. Raises KafkaUnreachableError and NewerCodeError."""
    from events import topics  # noqa: PLC0415
    from infra.cli.history import History  # noqa: PLC0415
    from streams import kafka  # noqa: PLC0415
    from streams.registry import SpecRegistry  # noqa: PLC0415
    from streams.schemas import Schemas  # noqa: PLC0415
    from streams.testing.histories import Recorded  # noqa: PLC0415

    schemas = Schemas(settings)
    history, values = History(run_id, schemas), list[bytes]()
    source = kafka.reader(settings)
    try:
        partition = topics.partition_for(run_id.encode(), cluster.partitions[topics.DECISIONS.name])
        for message in kafka.read_partition(source, kafka.name(settings, topics.DECISIONS), partition, 0):
            value = message.value()
            if history.take(message.offset() or 0, value) and value is not None:
                values.append(value)
            if history.state.over:
                break
    finally:
        source.close()
    if not values:
        return Recorded(run_id, None, ())
    specs = SpecRegistry(settings, schemas)
    try:
        specs.refresh()
        return Recorded(run_id, specs.get(history.state.digest), tuple(values))
    finally:
        specs.close()
