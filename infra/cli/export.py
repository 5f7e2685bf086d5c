"""`foldflow export`: copies topics into an archive of Parquet files."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.terminal import fail, quiet, say
from streams.settings import Settings

FAILED, WRONG, UNREACHABLE = 1, 2, 4


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the archive; made if there is none.")],
    topics: Annotated[
        str, typer.Option("--topics", help="Topics, without prefix and with commas between; `all`: all of ours.")
    ] = "decisions,specs",
    since: Annotated[
        str, typer.Option("--since", help="What a new archive begins with: 7d (ago), 2026-11-21, or a time.", show_default=False)
    ] = "",
    until: Annotated[
        str, typer.Option("--until", help="Only what was written before: 1d (ago), 2026-11-21, or a time.", show_default=False)
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")] = False,
) -> None:
    """Copy topics into an archive of Parquet files, partitioned by day: `decisions/day=2026-11-21/p0-1234.parquet`.

    Each record is there to the byte (partition, offset, timestamp, key, value, headers), and what it says in columns that any
    tool reads. `foldflow verify --from DIR` checks runs from it without Kafka. Into the same folder again: it goes on where it
    ended, also after it was killed; no record is left out, none is there twice. Files never change once they have their name,
    so they can be copied elsewhere at any time; `manifest.json` says how far each partition is written. Large payloads are kept
    in the payload store, not here. An archive that begins with --since lacks the beginnings of runs that were open then.

    For example:

        foldflow export archive

        foldflow export archive --topics decisions,specs,deadletter --since 2026-01-01 --until 1d --json

        duckdb -c "SELECT input_type, count(*) FROM 'archive/decisions/*/*.parquet' GROUP BY ALL"

    Exit codes: 0 exported, 1 the folder can't be written or it was stopped (again: it goes on), 2 a wrong option or another
    archive's folder, 4 Kafka can't be reached.
    """
    from events.topics import TOPICS  # noqa: PLC0415 - Kafka, Avro and Arrow are not needed for mistakes in the options
    from infra.cli.tail import chosen  # noqa: PLC0415
    from infra.cli.verify import progress  # noqa: PLC0415
    from projections.export import Export  # noqa: PLC0415
    from projections.export_files import ArchiveError  # noqa: PLC0415
    from streams import kafka  # noqa: PLC0415

    settings = quiet(Settings())
    names = [] if topics == "all" else [name.strip() for name in topics.split(",") if name.strip()]
    wanted = [TOPICS[name] for name in chosen(settings, names)]
    since_ms, until_ms = _time("--since", since), _time("--until", until)
    try:
        work = Export(settings, folder, wanted, since_ms, until_ms)
        with contextlib.ExitStack() as stack:

            def planned(total: int) -> Callable[[int], None]:
                return stack.enter_context(progress(f"Exporting to {folder}", total, silent=as_json))

            found = work.run(planned)
    except ArchiveError as error:
        fail(str(error), WRONG)
    except (kafka.KafkaUnreachableError, kafka.TopicsMissingError) as error:
        fail(str(error), UNREACHABLE)
    except OSError as error:
        fail(f"{folder} can't be written ({error}): what is finished stays; export again to go on", FAILED)
    except KeyboardInterrupt:
        fail(f"Stopped. What is finished is in {folder}; export again to go on.", FAILED)
    if as_json:
        print(json.dumps({"folder": str(folder), "topics": [dataclasses.asdict(one) for one in found]}, indent=2))
        return
    for one in found:
        files = f"in {one.files:,} file{'' if one.files == 1 else 's'}, {one.bytes / 1e6:,.2f} MB" if one.files else "more"
        print(f"{one.topic}: {one.records:,} records {files}")
        if one.gaps:
            say(f"{one.topic}: {one.gaps:,} records were deleted from Kafka before they were exported; manifest.json says which")


def _time(option: str, text: str) -> int | None:
    """Return what a time says, milliseconds since the epoch; ends the command if it is none."""
    from api.times import ms_of, point  # noqa: PLC0415 - FastAPI

    try:
        return ms_of(point(text)) if text else None
    except ValueError as error:
        return fail(f"{option}: {error}", WRONG)
