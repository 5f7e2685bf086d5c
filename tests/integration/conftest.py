import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import free_port

from events import catalog
from infra.embedded.supervisor import Supervisor
from streams import schemas
from streams.kafka import connect
from streams.settings import Settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `one_worker` is a module of this folder's tests only


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the embedded Kafka, and says so."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


def own_settings(folder: Path) -> Settings:
    """Return settings with free ports and an own data folder, whatever the environment says."""
    return Settings(
        bootstrap_servers=f"127.0.0.1:{free_port()}",
        local_model_url=f"http://127.0.0.1:{free_port()}",
        api_host="127.0.0.1",
        api_port=free_port(),
        data_dir=folder,
        model="local/smollm2",
    )


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """Hold what this test session starts, and stop it at its end. Nothing runs until `kafka` or `model` is asked for."""
    supervisor = Supervisor(own_settings(tmp_path_factory.mktemp("embedded")))
    yield supervisor
    supervisor.down()


@pytest.fixture(scope="session")
def kafka(embedded: Supervisor) -> str:
    """Start a real broker and return its address."""
    embedded.up(frozenset({"kafka"}))
    return embedded.settings.bootstrap_servers


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Supervisor]:
    """Start a Kafka that this test may kill."""
    supervisor = Supervisor(own_settings(tmp_path))
    supervisor.up(frozenset({"kafka"}))
    yield supervisor
    supervisor.down()


@pytest.fixture(scope="session")
def model(embedded: Supervisor) -> str:
    """Start the real local model and return its address."""
    embedded.up(frozenset({"model"}))
    return embedded.settings.local_model_url


@pytest.fixture
def settings(kafka: str, embedded: Supervisor, tmp_path: Path) -> Settings:
    """Return the settings of one test: the session's broker, topics and a data folder of its own."""
    return embedded.settings.model_copy(
        update={
            "bootstrap_servers": kafka,
            "topic_prefix": f"t{uuid.uuid4().hex[:12]}.",
            "data_dir": tmp_path,
            "session_timeout_ms": 6_000,
        }
    )


@pytest.fixture
def restart() -> Iterator[Callable[[], None]]:
    """Return what makes this process forget what it has learned, as if it were started anew; at the end it has."""
    written = dict(catalog.WRITTEN_IDS)

    def forget() -> None:
        catalog.OWN_IDS.clear()
        catalog.WRITTEN_IDS.update(written)
        schemas._learned.clear()

    yield forget
    forget()


@pytest.fixture
def few(settings: Settings) -> Settings:
    """Return settings whose topics are there, with two partitions: reading them all is quick."""
    found = settings.model_copy(update={"partitions": 2})
    connect(found)
    return found


@pytest.fixture
def cli_environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a `foldflow` command with free ports and an own data folder."""
    own = own_settings(tmp_path / "data")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
        "FOLDFLOW_BOOTSTRAP_SERVERS": own.bootstrap_servers,
        "FOLDFLOW_LOCAL_MODEL_URL": own.local_model_url,
        "FOLDFLOW_API_PORT": str(own.api_port),
        "FOLDFLOW_DATA_DIR": str(own.data_dir),
    }
