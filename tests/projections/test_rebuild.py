"""Views made anew by several processes say, row by row, what one that follows the topics says; and so do two api replicas."""

import importlib.util
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
from projections.rebuild import Building
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
