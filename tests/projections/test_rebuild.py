"""Views made anew by several processes say, row by row, what one that follows the topics says; and so do two api replicas."""

import importlib.util
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from projection_histories import BOTH, PARTITIONS, TOPIC_IDS, Logs, logs  # type: ignore[import-not-found]

from events import topics
from projections import database
from projections import projector as projector_module
from projections.projector import Projector
from projections.rebuild import Building, _make_room
from projections.views import Batch, Views
from streams import kafka as streams_kafka
from streams.envelope import Outgoing
from streams.settings import Settings

_SPEC = importlib.util.spec_from_file_location("integration_fixtures", Path(__file__).parents[1] / "integration" / "conftest.py")
assert _SPEC
assert _SPEC.loader
fixtures: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixtures)
embedded, kafka, settings = fixtures.embedded, fixtures.kafka, fixtures.settings

Dump = dict[str, list[str]]


def dump(views: Views) -> Dump:
    """Return all rows of all tables and where reading goes on, sorted."""
    names = [table.name for table in database.TABLES] + ["positions"]
    with views.snapshot() as (db, _):
        return {name: sorted(map(repr, db.table(name).fetchall())) for name in names}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_parts_put_together_are_one_rebuild(tmp_path: Path, seed: int) -> None:
    """Partitions folded into files of their own, put together, are what one rebuild gives.

    Given a log with losers and breaks; then the rows are the same, each once, and what is open can go on.
    """
    log = logs(seed, 8, 0.3, BOTH)
    records = log.records()
    early, late = records[: len(records) * 2 // 3], records[len(records) * 2 // 3 :]
    parts = [tmp_path / f"it's {partition}.duckdb" for partition in range(PARTITIONS)]
    for partition, part in enumerate(parts):
        with closing(Views(part, TOPIC_IDS, PARTITIONS)) as views:
            views.apply(Batch([record for record in early if record.partition == partition]))
    whole, together = (Views(tmp_path / name, TOPIC_IDS, PARTITIONS) for name in ("whole", "together"))
    whole.apply(Batch(early))
    together.close()
    database.merge(together.path, parts)
    with closing(whole), closing(Views(together.path, TOPIC_IDS, PARTITIONS)) as together:
        assert together.made_anew is None
        assert dump(together) == dump(whole)
        assert together.runs.open.keys() == whole.runs.open.keys() != set()
        for views in (whole, together):
            views.apply(Batch(late))
        assert dump(together) == dump(whole)
        assert_keys_are_unique(together)


KILLED = """
import os, sys
from pathlib import Path
from projections.views import Views

views = Views(Path(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3]))
print("open", flush=True)
if sys.argv[4] == "wait":
    sys.stdin.read()
os._exit(0)
"""
"""Opens empty views, waits if it is told to, and ends as if it were killed."""


def opened(path: Path, *more: str) -> "subprocess.Popen[str]":
    """Return a process that has opened views."""
    line = [sys.executable, "-c", KILLED, str(path), repr(TOPIC_IDS), str(PARTITIONS), *more]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def made(path: Path) -> Dump:
    """Make views with something in them, and return their rows."""
    with closing(Views(path, TOPIC_IDS, PARTITIONS)) as views:
        views.apply(Batch(logs(1, 8, 0.3, BOTH).records()))
        return dump(views)


def test_views_that_somebody_holds_are_not_taken_from_them(tmp_path: Path) -> None:
    """Given empty views that another process has opened meanwhile; then what was made does not take their place."""
    part, path = tmp_path / "part", tmp_path / "v"
    made(part)
    with opened(path, "wait") as holder:
        before = path.stat().st_ino
        with pytest.raises(database.ViewsInUseError):
            database.merge(path, [part])
        assert path.stat().st_ino == before
        holder.communicate("")


def test_what_a_killed_process_left_beside_the_empty_views_is_not_taken_for_the_new_ones(tmp_path: Path) -> None:
    """Given empty views with a log of changes beside them; then that belongs to them, and not to what takes their place."""
    part, path = tmp_path / "part", tmp_path / "v"
    rows = made(part)
    with opened(path, "go") as killed:
        killed.wait(30)
    assert path.with_name("v.wal").exists()
    database.merge(path, [part])
    with closing(Views(path, TOPIC_IDS, PARTITIONS)) as views:
        assert views.made_anew is None
        assert dump(views) == rows


def test_a_part_that_is_gone_takes_nobodys_place(tmp_path: Path) -> None:
    """Given parts that somebody deleted; then the empty views stay."""
    path = tmp_path / "v"
    Views(path, TOPIC_IDS, PARTITIONS).close()
    with pytest.raises(database.ViewsError, match="was deleted"):
        database.merge(path, [tmp_path / "part"])
    with closing(Views(path, TOPIC_IDS, PARTITIONS)) as views:
        assert views.made_anew is None


def test_where_there_is_little_room_a_part_is_put_in_order_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given no room for a log of changes as large as a part may have; then it is given up; only then there is too little."""
    path = tmp_path / "part"
    changes = path.with_name("part.wal")
    with closing(Views(path, TOPIC_IDS, PARTITIONS, part=True)) as views:
        views.apply(Batch(logs(1, 8, 0.3, BOTH).records()))
        before = dump(views)
        assert changes.stat().st_size > 10_000
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=database.ROOM_BYTES + 5000))
        _make_room(views)
        assert not changes.exists() or changes.stat().st_size < 5000
        views.check()
        assert dump(views) == before
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=database.ROOM_BYTES - 1))
        with pytest.raises(database.LittleRoomError):
            _make_room(views)


def assert_keys_are_unique(views: Views) -> None:
    """No table has two rows of one key, also those that no index watches."""
    with views.snapshot() as (db, _):
        for table in database.TABLES:
            if table.key:
                keys = db.table(table.name).select(*(f'"{column}"' for column in table.key)).fetchall()
                assert len(keys) == len(set(keys)), table.name


@pytest.fixture
def written(settings: Settings) -> tuple[Settings, Logs]:
    """Return settings of topics that hold a log, and the log."""
    made = settings.model_copy(update={"partitions": PARTITIONS})
    streams_kafka.connect(made)
    log = logs(7, 30, 0.2, BOTH)
    send(made, log)
    return made, log


def send(settings: Settings, log: Logs, after: int = 0) -> None:
    """Write the records of a log behind the first ones."""
    records = log.records()[after:]
    streams_kafka.send(settings, [Outgoing(topics.DECISIONS, b"", each.value, [], each.partition) for each in records])


def caught_up(projector: Projector) -> Projector:
    """Start a projector and wait until it holds everything."""
    projector.start()
    assert projector.caught_up.wait(90), projector.problem
    return projector


@pytest.mark.integration
def test_replicas_and_processes_say_the_same(
    written: tuple[Settings, Logs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas on one Kafka, each with its own file, have the same rows.

    Given one that several processes fill and one that reads alone; then that is so, also of what is written afterwards.
    """
    given, log = written
    alone = Projector(given, tmp_path / "alone" / "v")
    by_processes = Projector(given, tmp_path / "several" / "v")
    built: list[Building] = []
    run = Building.run

    def watched(self: Building, stop: threading.Event) -> None:
        run(self, stop)
        built.append(self)

    monkeypatch.setattr(Building, "run", watched)
    try:
        caught_up(alone)
        assert not built
        monkeypatch.setattr(projector_module, "_MANY", 1)
        caught_up(by_processes)
        (building,) = built
        assert building.positions() == {("decisions", p): len(each) for p, each in enumerate(log.partitions)}
        assert not (tmp_path / "several" / "v.parts").exists()
        assert by_processes.views.runs.open.keys() == alone.views.runs.open.keys()
        assert dump(by_processes.views) == dump(alone.views)
        before = len(log.order)
        log.write(40, 0.2, BOTH)
        send(given, log, before)
        expected = {("decisions", p): len(each) for p, each in enumerate(log.partitions)}
        for each in (alone, by_processes):
            until(lambda each=each: each.positions == expected)  # type: ignore[misc]
        assert dump(by_processes.views) == dump(alone.views)
        assert_keys_are_unique(alone.views)
    finally:
        alone.stop()
        by_processes.stop()


def until(condition: Any, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        waiting.wait(0.05)
    raise AssertionError("it did not come about in time")


@pytest.mark.integration
def test_told_to_stop_it_leaves_empty_views(written: tuple[Settings, Logs], tmp_path: Path) -> None:
    """When a rebuild is told to stop; then it ends, and the views are empty: the next one begins again."""
    given, log = written
    cluster = streams_kafka.connect(given)
    ends = {("decisions", p): len(each) for p, each in enumerate(log.partitions)}
    path = tmp_path / "v"
    Views(path, cluster.ids, PARTITIONS).close()
    stop = threading.Event()
    stop.set()
    Building(given, path, cluster, dict.fromkeys(ends, 0), ends).run(stop)
    with closing(Views(path, cluster.ids, PARTITIONS)) as views:
        assert views.positions == {}
