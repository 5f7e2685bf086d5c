"""`foldflow export`: an archive holds what stands on real Kafka, to the byte, whatever ends the process that writes it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from events import codec, topics
from events.decisions import Decision
from events.topics import DAY_MS, Topic
from projections import export, export_files
from projections.export import Export
from projections.export_files import ArchiveError, Part
from streams import kafka as clients
from streams.envelope import Outgoing
from streams.registry import publish
from streams.settings import Settings

_SPEC = importlib.util.spec_from_file_location("projection_histories", Path(__file__).parents[1] / "projections" / "histories.py")
assert _SPEC
assert _SPEC.loader
histories: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["projection_histories"] = histories
_SPEC.loader.exec_module(histories)

WANTED = (topics.DECISIONS, topics.SPECS)
_NOON = 1_767_268_800_000
Record = tuple[int, int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]


class KilledError(BaseException):
    """What stands for the end of the process: nothing runs behind it."""


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return settings with topics that hold decisions of three days, and what is none; and specs."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    clients.connect(made)
    publish(made, [histories.SPEC, histories.RICH])
    write(made, 41)
    return made


def write(settings: Settings, seed: int) -> None:
    """Write decisions of some runs, garbage and a tombstone."""
    log = histories.logs(seed, 6, 0.2, histories.BOTH).records()
    odd = [(0, b"\0no Avro", [("twice", b"1"), ("twice", b"\xff"), ("none", None)]), (1, None, []), (2, b"", [])]
    records = [
        Outgoing(
            topics.DECISIONS, b"key", each.value, [("ce_type", b"Decision")], each.partition, at_ms=_NOON + index % 3 * DAY_MS
        )
        for index, each in enumerate(log)
    ]
    records += [Outgoing(topics.DECISIONS, None, value, headers, part, at_ms=_NOON) for part, value, headers in odd]
    clients.send(settings, records)


def stored(settings: Settings, topic: Topic) -> list[Record]:
    """Return what stands on a topic."""
    name, found = clients.name(settings, topic), list[Record]()
    with closing(clients.reader(settings)) as source:
        for partition in range(1 if topic.single else settings.partitions):
            for message in clients.read_partition(source, name, partition, 0):
                headers = clients.headers_of(message) or []
                place = message.partition() or 0, message.offset() or 0
                found.append((*place, message.timestamp()[1], message.key(), message.value(), headers))
    return sorted(found, key=lambda record: record[:2])


def archived(folder: Path, topic: Topic) -> list[Record]:
    """Return what an archive holds of a topic."""
    found = list[Record]()
    for path in (folder / topic.name).glob("day=*/p*.parquet"):
        with pq.ParquetFile(path) as file:
            for row in file.read().to_pylist():
                headers = [(each["key"], each["value"]) for each in row["headers"]]
                ms = round(row["timestamp"].timestamp() * 1000)
                found.append((row["partition"], row["offset"], ms, row["key"], row["value"], headers))
                assert path.parent.name == f"day={row['timestamp']:%Y-%m-%d}"
    return sorted(found, key=lambda record: record[:2])


def run(settings: Settings, folder: Path, **times: int) -> dict[str, int]:
    """Export, and return how many records were written of each topic."""
    return {one.topic: one.records for one in Export(settings, folder, WANTED, **times).run(lambda _: lambda _: None)}


def test_an_archive_holds_what_stands_on_kafka_and_goes_on(own: Settings, tmp_path: Path) -> None:
    """Given topics; when exported, and again when more has come; then all is there once, to the byte, and readable."""
    first = run(own, tmp_path / "a")
    assert archived(tmp_path / "a", topics.DECISIONS) == stored(own, topics.DECISIONS)
    assert archived(tmp_path / "a", topics.SPECS) == stored(own, topics.SPECS)
    assert first["specs"] == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.parquet")}
    write(own, 42)
    last = max(before, key=lambda path: int(path.stem.split("-")[1]))
    for name in ("p0-999.parquet", "p0-998.parquet.unfinished"):  # as of a process that was ended before it noted them
        last.with_name(name).write_bytes(last.read_bytes())
    second = run(own, tmp_path / "a")
    assert not list(tmp_path.rglob("p0-99[89].*"))
    assert archived(tmp_path / "a", topics.DECISIONS) == stored(own, topics.DECISIONS)
    assert second["decisions"] == len(stored(own, topics.DECISIONS)) - first["decisions"]
    assert second["specs"] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(own, tmp_path / "a") == {"decisions": 0, "specs": 0}
    told = [row for path in (tmp_path / "a/decisions").rglob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()]
    for row in told:
        if row["run_id"] is not None:
            decision = codec.decode(row["value"], Decision)
            assert (row["run_id"], row["seq"], row["input_type"]) == (
                decision.run_id,
                decision.seq,
                type(decision.input).__name__,
            )
            assert [each["type"] for each in json.loads(row["effects"])] == [type(each).__name__ for each in decision.effects]
            assert json.loads(row["input"])["type"] == row["input_type"]
    assert sum(row["run_id"] is None for row in told) >= 6


@pytest.mark.parametrize("noted", [True, False], ids=["a file at a time", "a part at a time"])
def test_whatever_ends_the_process_leaves_no_gap_and_no_double(
    own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, noted: bool
) -> None:
    """Given an export that is ended at its 1st, 2nd, 3rd … write to the disk; when it goes on each time; then all is there."""
    monkeypatch.setattr(export, "PART_RECORDS", 5 if noted else 60)
    monkeypatch.setattr(Part, "give_up", lambda _part: None)
    to_disk, folder, kills = export_files._to_disk, tmp_path / "a", 0
    left = [1]

    def counted(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        to_disk(path)

    monkeypatch.setattr(export_files, "_to_disk", counted)
    while True:
        left[0] = kills * (4 if noted else 1)
        try:
            run(own, folder)
        except KilledError:
            kills += 1
        else:
            break
    assert kills > 5
    assert archived(folder, topics.DECISIONS) == stored(own, topics.DECISIONS)
    assert archived(folder, topics.SPECS) == stored(own, topics.SPECS)
    assert not list(folder.rglob("*.unfinished"))


def foldflow(settings: Settings, *arguments: str) -> list[str]:
    """Return the line that runs a command, with the environment before it."""
    places = (("BOOTSTRAP_SERVERS", settings.bootstrap_servers), ("TOPIC_PREFIX", settings.topic_prefix))
    return ["env", *(f"FOLDFLOW_{name}={value}" for name, value in places), sys.executable, "-m", "infra.cli.main", *arguments]


def test_a_killed_command_is_simply_run_again(own: Settings, tmp_path: Path) -> None:
    """Given `foldflow export` killed while it writes its first file; when run again; then the archive is whole, and says so."""
    folder = tmp_path / "a"
    line = foldflow(own, "export", str(folder), "--json")
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None and not any(found(folder)):
            pass
        os.killpg(process.pid, signal.SIGKILL)
    again = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert {each["topic"] for each in json.loads(again.stdout)["topics"]} == {"decisions", "specs"}
    assert archived(folder, topics.DECISIONS) == stored(own, topics.DECISIONS)


def found(folder: Path) -> Iterator[Path]:
    """Yield the first trace of a file."""
    if folder.exists():
        yield from folder.glob("decisions/day=*/*")


def test_times_bound_an_archive_and_it_goes_on_from_there(own: Settings, tmp_path: Path) -> None:
    """Given decisions of days that follow each other; when exported up to a time, then on; then all since is there."""
    later = own.model_copy(update={"topic_prefix": f"{own.topic_prefix}later."})
    clients.connect(later)
    days = [Outgoing(topics.DECISIONS, b"k", b"x", [], 0, at_ms=_NOON + day * DAY_MS) for day in range(5)]
    clients.send(later, days)
    assert run(later, tmp_path / "a", since_ms=_NOON + DAY_MS, until_ms=_NOON + 3 * DAY_MS)["decisions"] == 2
    assert run(later, tmp_path / "a", since_ms=_NOON + 2 * DAY_MS)["decisions"] == 2
    assert [record[1] for record in archived(tmp_path / "a", topics.DECISIONS)] == [1, 2, 3, 4]
    with pytest.raises(ArchiveError, match="begins later"):
        run(later, tmp_path / "a", since_ms=_NOON)
    with pytest.raises(ArchiveError, match="holds topics"):
        run(own, tmp_path / "a")
    (tmp_path / "a/manifest.json").unlink()
    with pytest.raises(ArchiveError, match=r"no manifest\.json"):
        run(later, tmp_path / "a")
    assert len(archived(tmp_path / "a", topics.DECISIONS)) == 4


def test_two_exports_into_one_folder_are_refused(own: Settings, tmp_path: Path) -> None:
    """Given an export under way; when another one begins on its folder; then it is told to wait."""
    with export_files.held(tmp_path / "a"), pytest.raises(ArchiveError, match="another process"):
        run(own, tmp_path / "a")
