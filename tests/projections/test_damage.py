"""Damage and pressure on the views, all of it real: files, full disks, locks, Kafka. They say so, and come back by themselves."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import httpx
import psutil
import pytest
from confluent_kafka.admin import AdminClient
from projection_histories import BOTH, PARTITIONS, RICH, SPEC, logs  # type: ignore[import-not-found]

from events import topics
from infra.embedded.supervisor import Supervisor
from projections import database
from projections import projector as projector_module
from projections.projector import NotReadyError, Projector
from streams import kafka as streams_kafka
from streams.envelope import Outgoing
from streams.registry import publish
from streams.settings import Settings

_SPEC = importlib.util.spec_from_file_location("integration_fixtures", Path(__file__).parents[1] / "integration" / "conftest.py")
assert _SPEC
assert _SPEC.loader
fixtures: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixtures)
embedded, kafka, settings = fixtures.embedded, fixtures.kafka, fixtures.settings

pytestmark = pytest.mark.integration


def until(condition: Callable[[], Any], seconds: float = 90, explain: Callable[[], Any] = lambda: "") -> Any:
    """Wait until a condition holds, and return what it said."""
    deadline = time.monotonic() + seconds
    while not (said := condition()):
        assert time.monotonic() < deadline, f"did not come about in time: {explain()}"
        time.sleep(0.02)
    return said


# --- The comparison ---


def tables(path: Path) -> dict[str, list[str]]:
    """Return all rows of all tables of a views file, sorted; of a copy, since another process may hold it (and be idle)."""
    copy = path.with_name(f"{path.name}.copy")
    for ending in ("", ".wal"):
        copy.with_name(copy.name + ending).unlink(missing_ok=True)
        if path.with_name(path.name + ending).exists():
            shutil.copy(path.with_name(path.name + ending), copy.with_name(copy.name + ending))
    with duckdb.connect(str(copy)) as db:
        names = [table.name for table in database.TABLES] + ["positions"]
        return {name: sorted(map(repr, db.table(name).fetchall())) for name in names}


def rebuilt(settings: Settings, folder: Path) -> dict[str, list[str]]:
    """Build the views of these topics anew elsewhere, and return all rows of all tables."""
    fresh = folder / "fresh" / "views.duckdb"
    shutil.rmtree(fresh.parent, ignore_errors=True)
    with projector(settings, fresh) as other:
        until(other.caught_up.is_set, explain=lambda: other.problem)
    return tables(fresh)


def assert_same(expected: dict[str, list[str]], path: Path) -> None:
    """Compare each row of each table."""
    found = tables(path)
    assert sum(map(len, expected.values())) > 100
    for name, rows in expected.items():
        assert found[name] == rows, name


def assert_as_rebuilt(settings: Settings, path: Path, folder: Path) -> None:
    """Compare a file with what these topics say now."""
    assert_same(rebuilt(settings, folder), path)


@contextmanager
def projector(settings: Settings, path: Path) -> Iterator[Projector]:
    """Run a projector in this process."""
    made = Projector(settings, path)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        assert made.failure is None


# --- Histories, and a process that is asked ---


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made and workflows registered."""
    made = settings.model_copy(update={"partitions": PARTITIONS, "api_port": fixtures.free_port()})
    streams_kafka.connect(made)
    publish(made, [SPEC, RICH])
    return made


def write(settings: Settings, seed: int, runs: int) -> None:
    """Write the decisions of some runs."""
    records = logs(seed, runs, 0.2, BOTH).records()
    streams_kafka.send(settings, [Outgoing(topics.DECISIONS, b"", each.value, [], each.partition) for each in records])


class Asked:
    """`foldflow api` as a process of its own, asked all the time from a thread; what it answered that was wrong."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.log = settings, folder / "api.log"
        self.views = settings.data_dir / "views.duckdb"
        ready = folder / "ready"
        ready.unlink(missing_ok=True)
        values = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        environment |= {f"FOLDFLOW_{name.upper()}": str(value) for name, value in values.items() if isinstance(value, str | int)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "infra.cli.main", "api"],
                env=environment | {"FOLDFLOW_READY_FILE": str(ready)},
                stdout=log,
                stderr=log,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{settings.api_port}", trust_env=False, timeout=60)
        until(lambda: ready.exists() or self.process.poll() is not None, explain=self.said)
        self.wrong: list[str] = []
        self.refused: list[dict[str, Any]] = []
        self.expected: set[tuple[str, str, int]] = self.runs(self.client.get("/runs", params={"limit": 1000}).json())
        self.growing = False
        """Whether there may be more now than at the start; else an answer is always the same."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    @staticmethod
    def runs(page: Any) -> set[tuple[str, str, int]]:
        """Return a page's runs."""
        return {(run["run_id"], run["status"], run["seq"]) for run in page["runs"]}

    def _ask(self) -> None:
        while not self._stop.wait(0.02):
            answer = self.client.get("/runs", params={"limit": 1000})
            if answer.status_code == 503:
                problem = answer.json()
                self.refused.append(problem)
                if answer.headers["content-type"] != "application/problem+json" or not problem["detail"] or not problem["hint"]:
                    self.wrong.append(answer.text)
            elif answer.status_code != 200 or not self._right(self.runs(answer.json())):
                self.wrong.append(f"{answer.status_code} {answer.text[:500]}")

    def _right(self, runs: set[tuple[str, str, int]]) -> bool:
        if self.growing:
            return {run[0] for run in runs} >= {run[0] for run in self.expected}
        return runs == self.expected

    def health(self) -> Any:
        """Return what it says about itself."""
        return self.client.get("/health").json()

    def said(self) -> str:
        """Return the end of its log."""
        return self.log.read_text()[-5000:]

    def has_said(self, what: str, times: int) -> bool:
        """Say whether something stands in its log so often."""
        return self.log.read_text().count(what) == times

    def end(self) -> None:
        """Stop it in order."""
        self._stop.set()
        self._thread.join()
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.said()


@contextmanager
def asked(settings: Settings, folder: Path) -> Iterator[Asked]:
    """Run `foldflow api`, ask it all the time, and find no wrong answer in the end."""
    api = Asked(settings, folder)
    try:
        yield api
    finally:
        api.end()
    assert api.wrong == []


# --- Damage ---


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(3 * 4096 + 5000, len(data), 50_000):  # in each block, and not in the headers
        data[place] ^= 0xFF
    with path.open("r+b") as file:
        file.write(data)


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"garbage" * 10_000)
    other.replace(path)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


UNDER_IT: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "replaced": _replaced,
    "flipped": _flip,
}
BEFORE_IT: dict[str, Callable[[Path], object]] = {
    "garbage": lambda path: path.write_bytes(b"garbage" * 10_000),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": _flip,
}
WAL_DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted log": lambda path: _wal(path).unlink(),
    "garbage log": lambda path: _wal(path).write_bytes(b"\x99" * 5000),
    "flipped log": lambda path: _flip(_wal(path)),
    "cut log": lambda path: os.truncate(_wal(path), _wal(path).stat().st_size - 7),
}


@pytest.mark.thorough
def test_a_file_damaged_under_a_running_api_is_made_anew_by_itself(own: Settings, tmp_path: Path) -> None:
    """Whatever befalls the file while it is asked: no wrong row, one clear error, the damaged file aside, the same rows again."""
    write(own, 1, 100)
    with projector(own, own.data_dir / "views.duckdb") as first:
        until(first.caught_up.is_set)  # and is closed: what it read stands in the file, and no longer in its log
    expected = rebuilt(own, tmp_path)
    with asked(own, tmp_path) as api:
        for number, (name, damage) in enumerate(UNDER_IT.items(), 1):
            damage(api.views)
            until(partial(api.has_said, "projector.caught_up", number + 1), 90, api.said)
            until(lambda: api.health()["status"] in {"ok", "degraded"} and api.health()["problem"] is None, 90, api.said)
            assert api.log.read_text().count("projector.hindered") == number, (name, api.said())
            assert_same(expected, api.views)
        aside = [path.name for path in api.views.parent.glob("views.damaged-*.duckdb")]
        assert len(aside) == 1
        api.growing = True
        for seed, name in enumerate(("deleted log", "garbage log"), 1):  # nobody reads it before the next start
            write(own, seed, 1)
            until(lambda: api.health()["lag"] == 0)
            if _wal(api.views).exists():
                WAL_DAMAGES[name](api.views)
    assert_as_rebuilt(own, api.views, tmp_path)


def test_a_file_damaged_before_the_start_is_made_anew_by_itself(own: Settings, tmp_path: Path) -> None:
    """Nothing of it is believed: what can't be read is read again from Kafka."""
    write(own, 3, 40)
    path, kept = tmp_path / "views.duckdb", tmp_path / "kept.duckdb"
    with projector(own, path) as first:
        until(first.caught_up.is_set)
        for file in (path, _wal(path)):  # as a process leaves them that is killed
            shutil.copy(file, kept.with_name(file.name.replace("views", "kept")))
    write(own, 4, 3)
    expected = rebuilt(own, tmp_path)
    for damage in (BEFORE_IT | WAL_DAMAGES).values():
        shutil.copy(kept, path)
        shutil.copy(_wal(kept), _wal(path))
        damage(path)
        with projector(own, path) as again:
            until(partial(_served, again), explain=partial(getattr, again, "problem"))
        assert_same(expected, path)


def _served(views: Projector) -> bool:
    """Say whether all can be read: a damaged block that nobody has read yet is found when somebody does."""
    return all(_read(views, table) for table in ("runs", "steps", "calls", "decisions")) and views.problem is None


def _read(views: Projector, table: str) -> bool:
    try:
        with views.views.snapshot() as (db, _):
            return bool(db.table(table).fetchall())
    except (NotReadyError, database.ViewsError):
        return False


# --- Pressure ---


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Give a file system of its own."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path, but: int) -> Path:
    """Fill a file system but for so many bytes; return the file that does."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - but))
    return filler


def test_a_full_disk_stops_nothing_for_good(own: Settings, tmp_path: Path) -> None:
    """The rows that are there can be asked; when there is room, it goes on by itself, and nothing is missing."""
    write(own, 5, 40)
    with small_disk(tmp_path / "disk", "128m") as disk:
        small = own.model_copy(update={"data_dir": disk})
        with asked(small, tmp_path) as api:
            filler = fill(disk, 100_000)
            api.growing = True
            write(own, 6, 100)
            problem = until(lambda: api.health()["problem"], 90, api.said)
            assert "there is no room for" in problem
            assert "MB are free" in problem
            health = api.health()
            assert (health["status"], health["lag"] > 0) == ("degraded", True)
            filler.unlink()
            until(lambda: api.health()["problem"] is None and api.health()["lag"] == 0, 90, api.said)
            assert api.log.read_text().count("projector.hindered") == 1
            assert not api.refused
        assert_as_rebuilt(own, api.views, tmp_path)


def test_a_disk_that_duckdb_finds_full_costs_no_row(own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should it be filled by others at that very moment: the views are opened anew, for what is in memory may be wrong."""
    monkeypatch.setattr(projector_module, "check_room", lambda _: None)
    write(own, 5, 40)
    with small_disk(tmp_path / "disk", "24m") as disk:
        path = disk / "views.duckdb"
        with projector(own, path) as views:
            until(views.caught_up.is_set, explain=lambda: views.problem)
            before = views.views
            filler = fill(disk, 100_000)
            write(own, 6, 100)
            assert "No space left on device" in until(lambda: views.problem)
            with pytest.raises(NotReadyError, match="there is no room"):
                views.views.snapshot()
            filler.unlink()
            until(lambda: views._answering and not any(views.lag(views.positions).values()), explain=lambda: views.problem)
            assert views.views is not before
        assert_as_rebuilt(own, path, tmp_path)


def test_a_full_disk_at_the_start_is_waited_for(own: Settings, tmp_path: Path) -> None:
    """Also half-way through a rebuild; the file that was put aside makes room first."""
    write(own, 7, 60)
    with small_disk(tmp_path / "disk", "128m") as disk:
        path = disk / "views.duckdb"
        filler = fill(disk, 8192)
        with projector(own, path) as views:
            assert "there is no room for" in until(lambda: views.problem)
            with pytest.raises(NotReadyError, match="there is no room"):
                views.views.snapshot()
            filler.unlink()
            until(views.caught_up.is_set, explain=lambda: views.problem)
        assert_as_rebuilt(own, path, tmp_path)
        path.write_bytes(b"garbage" * 10_000)
        filler = fill(disk, 300_000)
        with projector(own, path) as views:
            assert "there is no room for" in until(lambda: views.problem)
            assert views.rebuild is not None
            assert not views.caught_up.is_set()
            filler.unlink()
            until(views.caught_up.is_set, explain=lambda: views.problem)
        assert_as_rebuilt(own, path, tmp_path)


def test_a_file_that_was_put_aside_makes_room_for_the_new_one(own: Settings, tmp_path: Path) -> None:
    """What is damaged is kept for who wants to know why, but not at the price of the views."""
    write(own, 13, 20)
    with small_disk(tmp_path / "disk", "128m") as disk:
        path = disk / "views.duckdb"
        path.write_bytes(b"garbage!" * 8_000_000)
        fill(disk, 0)
        with projector(own, path) as views:
            until(views.caught_up.is_set, explain=lambda: views.problem)
        assert not list(disk.glob("views.damaged-*"))
        assert_as_rebuilt(own, path, tmp_path)


def test_a_folder_that_is_read_only_is_waited_for(own: Settings, tmp_path: Path) -> None:
    """It is said, and what was read before isn't thrown away."""
    write(own, 8, 20)
    with small_disk(tmp_path / "disk", "128m") as disk:
        path = disk / "views.duckdb"
        with projector(own, path) as views:
            until(views.caught_up.is_set)
        inode = path.stat().st_ino
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with projector(own, path) as views:
            assert "can't be written: allow it" in until(lambda: views.problem)
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            until(views.caught_up.is_set, explain=lambda: views.problem)
            until(lambda: views.problem is None)
        assert path.stat().st_ino == inode
        assert_as_rebuilt(own, path, tmp_path)


def test_a_file_that_another_process_holds_is_waited_for(own: Settings, tmp_path: Path) -> None:
    """The process that holds it is named; once it is gone, its file is taken as it is."""
    write(own, 9, 20)
    path = tmp_path / "views.duckdb"
    with projector(own, path) as views:
        until(views.caught_up.is_set)
    code = f"import duckdb, sys; db = duckdb.connect({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdin
        assert holder.stdout.readline() == b"held\n"
        with projector(own, path) as views:
            problem = until(lambda: views.problem)
            assert "held by another process" in problem
            assert f"PID {holder.pid}" in problem
            with pytest.raises(NotReadyError, match="held by another process"):
                views.views.snapshot()
            holder.stdin.close()
            until(views.caught_up.is_set, explain=lambda: views.problem)
            until(lambda: views.problem is None)
    assert not list(tmp_path.glob("views.damaged-*"))
    assert_as_rebuilt(own, path, tmp_path)


# --- Kafka ---


def kill_who_listens(port: int) -> None:
    """Kill the process that listens on a port of this machine."""
    (pid,) = {
        each.pid
        for each in (*psutil.net_connections("tcp4"), *psutil.net_connections("tcp6"))
        if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid
    }
    os.kill(pid, signal.SIGKILL)


@pytest.mark.thorough
def test_kafka_may_go_away_for_a_while(tmp_path: Path) -> None:
    """Killed under a running api: what was read can be asked, and what comes after its return is read."""
    supervisor = Supervisor(fixtures.own_settings(tmp_path / "kafka"))
    supervisor.up(frozenset({"kafka"}))
    try:
        own = supervisor.settings.model_copy(update={"partitions": PARTITIONS, "data_dir": tmp_path})
        streams_kafka.connect(own)
        publish(own, [SPEC, RICH])
        write(own, 10, 20)
        with asked(own, tmp_path) as api:
            kill_who_listens(int(own.bootstrap_servers.rpartition(":")[2]))
            away = until(lambda: not (health := api.health())["kafka_reachable"] and health, 90, api.said)
            assert away["status"] == "degraded"
            supervisor.up(frozenset({"kafka"}))
            before = sum(each["position"] for each in api.health()["partitions"])
            api.growing = True
            write(own, 10, 40)
            until(lambda: sum(each["position"] for each in api.health()["partitions"]) > before, 90, api.said)
            until(lambda: api.health()["lag"] == 0 and api.health()["kafka_reachable"])
            assert not api.refused
        assert_as_rebuilt(own, api.views, tmp_path)
    finally:
        supervisor.down()


def test_topics_that_are_made_anew_are_read_from_their_beginning(own: Settings, tmp_path: Path) -> None:
    """While it runs: not the old rows with the new ones behind them, but the rows of the new topic."""
    write(own, 11, 20)
    path = tmp_path / "views.duckdb"
    with projector(own, path) as views:
        until(views.caught_up.is_set)
        with views.views.snapshot() as (db, _):
            before = db.table("runs").fetchall()
        name = streams_kafka.name(own, topics.DECISIONS)
        admin = AdminClient({"bootstrap.servers": own.bootstrap_servers})
        admin.delete_topics([name])[name].result(30)
        until(lambda: name not in admin.list_topics(timeout=5).topics)
        streams_kafka.connect(own)
        write(own, 12, 40)
        until(lambda: _read(views, "runs") and _runs(views) != before, explain=lambda: views.problem)
        until(lambda: views.problem is None and not any(views.lag(views.positions).values()))
    assert_as_rebuilt(own, path, tmp_path)


def _runs(views: Projector) -> list[Any]:
    with views.views.snapshot() as (db, _):
        return db.table("runs").fetchall()


def test_topics_are_waited_for_and_not_made(settings: Settings, tmp_path: Path) -> None:
    """The api only reads: on an empty Kafka it says what is missing, until a processor has made it."""
    path = tmp_path / "views.duckdb"
    with projector(settings, path) as views:
        assert "decisions" in until(lambda: views.problem)
        with pytest.raises(NotReadyError, match="a processor makes them"):
            views.views.snapshot()
        assert views.reachable()
        time.sleep(1)  # several looks
        there = AdminClient({"bootstrap.servers": settings.bootstrap_servers}).list_topics(timeout=10).topics
        assert [name for name in there if name.startswith(settings.topic_prefix)] == []
        streams_kafka.connect(settings)
        until(views.caught_up.is_set, explain=lambda: views.problem)
