"""A rolling upgrade under load, with real processes of two versions of the code on a real Kafka.

From the first release to today's code in the documented order (that needs the git history: it is skipped in an archive, or a
shallow clone, `git fetch --unshallow`), and from today's code to its next version in an order in which each kind of process
meets records that it can't read.
"""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import free_port
from upgrade import (
    CHANGED,
    ROOT,
    WITH_CHILDREN,
    Ledger,
    Load,
    NoHistoryError,
    Process,
    Roles,
    code_of,
    judged,
    next_code,
    schemas_of,
    until,
)

from events.catalog import ENTRIES
from infra.embedded.supervisor import Supervisor
from streams.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FIRST = "ddec903a13b1c8e7957bbb9ef427507d80c64b14"
"""The first release: decisions and the inbox had other schemas."""
OLD = ("orchestrator-1", "orchestrator-2", "tool-1", "tool-2", "intake-1")
"""Which processes there are, in the order in which they are replaced after the first release."""
TODAY = {kind.__name__: entry.id for kind, entry in ENTRIES.items()}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Start a Kafka of its own."""
    supervisor = Supervisor(
        Settings(bootstrap_servers=f"127.0.0.1:{free_port()}", data_dir=tmp_path_factory.mktemp("kafka"), replication_factor=1)
    )
    supervisor.up(frozenset({"kafka"}))
    yield supervisor.settings
    supervisor.down()


Start = Callable[..., Roles]


@pytest.fixture
def installation(broker: Settings, tmp_path: Path) -> Iterator[Start]:
    """Return what makes an installation of two versions; nothing runs yet."""
    made: list[Roles] = []

    def make(*args: object) -> Roles:
        (tmp_path / "data").mkdir()
        settings = broker.model_copy(
            update={
                "topic_prefix": f"t{uuid.uuid4().hex[:12]}.",
                "data_dir": tmp_path / "data",
                "session_timeout_ms": 6_000,
                "partitions": 4,
            }
        )
        made.append(Roles(settings, tmp_path, *args))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.mark.thorough
def test_an_upgrade_from_the_first_release_in_the_documented_order(installation: Start, tmp_path: Path) -> None:
    """Processes replaced one after the other while runs go on: each run ends once with its output, none of today's dies."""
    try:
        code = code_of(FIRST, tmp_path)
    except NoHistoryError as error:
        pytest.skip(f"no git history here back to {FIRST} ({error}); in a shallow clone: git fetch --unshallow")
    roles = installation(code)
    before = schemas_of(roles.old_code)
    assert schemas_of(ROOT) == TODAY
    assert before["Decision"] != TODAY["Decision"]
    roles.start(*OLD, old=True)
    load, ledger = Load(roles.settings, roles.folder, per_second=5), Ledger(roles.settings)
    load.send(30)
    with load:
        _until_ended(roles, ledger, 10)
        for name in OLD:
            load.send(10)  # so that some are on their way
            roles.replace(name)
            _until_ended(roles, ledger, len(ledger.ended) + 10)  # the next one goes when this one is seen to work
    _until_ended(roles, ledger, len(load.runs))
    _judge_processes(roles)
    figures = ledger.check(load.runs)
    assert figures[f"schema_{before['Decision']}"] >= 10, "the old code decided"
    assert figures[f"schema_{TODAY['Decision']}"] >= 10, "today's code decided"
    assert figures["runs_of_two_schemas"] > 0, "runs that the old code began and today's went on with"
    _judge_calls(roles, load)


@pytest.mark.thorough
def test_an_upgrade_to_the_next_version_in_the_wrong_order(installation: Start, tmp_path: Path) -> None:
    """A tool worker first: orchestrators meet its results. Then one of these: workers and intake meet its calls and requests.

    Each old process ends in front of what it can't read, with exit code 78, and newer ones go on: nothing is lost or doubled, and
    nothing becomes a dead letter.
    """
    code = next_code(tmp_path)
    after = schemas_of(code)
    assert {name for name, version in after.items() if version != TODAY[name]} == CHANGED.keys()
    roles = installation(ROOT, code, WITH_CHILDREN)
    roles.start(*OLD, old=True)
    load, ledger = Load(roles.settings, roles.folder, per_second=5), Ledger(roles.settings)
    load.send(30)
    with load:
        _until_ended(roles, ledger, 20)
        load.send(10)
        roles.replace("tool-1")
        roles.until_they_ask_for_newer_code("orchestrator-1", "orchestrator-2", during=ledger.read_on)
        roles.replace("orchestrator-1")
        roles.until_they_ask_for_newer_code("tool-2", "intake-1", during=ledger.read_on)
        roles.replace("tool-2", "intake-1", "orchestrator-2")
    _until_ended(roles, ledger, 2 * len(load.runs))
    _judge_processes(roles)
    ledger.check(load.runs, children=True)
    _judge_calls(roles, load)


def _until_ended(roles: Roles, ledger: Ledger, some: int) -> None:
    """Wait until so many runs have ended; fail at once when a process of the newer code has."""

    def enough() -> bool:
        ledger.read_on()
        dead = [process for process in roles.running.values() if not process.old and process.popen.poll() is not None]
        assert not dead, "\n".join(map(Process.tail, dead))
        return len(ledger.ended) >= some

    until(enough, 180, roles.logs)


def _judge_processes(roles: Roles) -> None:
    """Assert that newer processes live and end in order, and that older ones did, or said that only newer code can go on."""
    dead = [process for process in roles.running.values() if process.popen.poll() is not None]
    assert not dead, "\n".join(map(Process.tail, dead))
    roles.stop()
    for process in roles.all:
        if not (process.old and process.asks_for_newer_code):
            assert process.ended == 0, process.tail()


def _judge_calls(roles: Roles, load: Load) -> None:
    """Assert that each step's tool was called, and that the checker finds everything explained."""
    calls = roles.calls()
    assert len(calls) == 4 * len(load.runs), "each step's tool was called"
    report = judged(roles.settings, roles.folder, roles.new_code)
    assert report["holds"], report["violations"][:5]
    asked = [process.name for process in roles.all if process.asks_for_newer_code]
    print(f"{len(load.runs)} runs, calls repeated: {sum(calls.values()) - len(calls)}, asked for newer code: {asked}")  # noqa: T201
