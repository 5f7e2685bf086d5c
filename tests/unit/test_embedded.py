import os
from pathlib import Path

import psutil
import pytest

from infra.embedded import console, jars, kafka
from infra.embedded.errors import EmbeddedError
from infra.embedded.processes import Started, State, created, last_lines, read_state, stop_in_order, write_state
from infra.embedded.services import environment_of, services
from streams.settings import Settings


def names(settings: Settings, *only: str) -> list[str]:
    """Return the names of what these settings start."""
    return [service.name for service in services(settings, frozenset(only), lambda *_: None)]


def test_the_pins_are_complete_and_name_no_place() -> None:
    """Every line is coordinates and a SHA-256; addresses stay out of the repository."""
    text = jars.PINS.read_text()
    pins = jars.read_pins(text)
    assert len({pin.file_name for pin in pins}) == len(pins) > 40
    assert all(len(pin.sha256) == 64 for pin in pins)
    assert "://" not in text


def test_verified_jars_are_not_read_again(tmp_path: Path) -> None:
    """The stamp of a check that was right stands for it; a missing jar voids it."""
    pin = jars.Pin("g", "a", "1", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")
    (tmp_path / pin.file_name).write_text("test")
    assert jars.jars(tmp_path, [pin]) == [tmp_path / "a-1.jar"]
    assert (tmp_path / "verified").exists()


def test_the_broker_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    """No listener is bound to another address."""
    broker = kafka.Broker("127.0.0.1", 29092, tmp_path, tmp_path / "kafka.log")
    assert kafka.properties(broker)["listeners"] == "PLAINTEXT://127.0.0.1:29092,CONTROLLER://127.0.0.1:29102"
    assert len(kafka.cluster_id()) == 22


def test_what_is_started_follows_the_settings() -> None:
    """A Kafka elsewhere and a remote model are used, not started."""
    assert names(Settings()) == ["kafka", "model", "intake", "orchestrator", "llm", "tool", "api"]
    elsewhere = Settings(bootstrap_servers="kafka.example:9092", model="anthropic/claude")
    assert names(elsewhere) == ["intake", "orchestrator", "llm", "tool", "api"]
    assert names(elsewhere, "kafka", "api") == ["api"]
    with pytest.raises(EmbeddedError, match="no nosuch to start"):
        names(Settings(), "nosuch")


def test_children_get_these_very_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What goes through the environment comes back as the same settings."""
    given = Settings(data_dir=tmp_path, kafka={"a": "b"}, tool_paths=(Path("x.py"),), partitions=3)
    for name, value in environment_of(given).items():
        monkeypatch.setenv(name, value)
    assert Settings() == given


def test_a_recycled_pid_is_not_ours(tmp_path: Path) -> None:
    """A pid that belongs to a process of another time is dead to us, and never stopped."""
    mine = Started("me", os.getpid(), created(os.getpid()), "", (), str(tmp_path / "ready"))
    other = Started("other", os.getpid(), created(os.getpid()) - 60, "", (), str(tmp_path / "ready"))
    assert mine.process() == psutil.Process()
    assert other.process() is None
    assert stop_in_order([other], ()) == []


def test_the_state_file_comes_back(tmp_path: Path) -> None:
    """What is written is what is read; no file means nothing was started."""
    state = State((1, 2.5), (Started("kafka", 3, 4.5, "127.0.0.1:1", ("a.log", "b.log"), "r"),))
    write_state(tmp_path / "run" / "state.json", state)
    assert read_state(tmp_path / "run" / "state.json") == state
    assert read_state(tmp_path / "none.json") == State()


def test_the_last_lines_come_from_the_first_log_that_has_any(tmp_path: Path) -> None:
    """An empty output file doesn't hide the log beside it."""
    (tmp_path / "out").touch()
    (tmp_path / "log").write_text("1\n2\n3\n")
    assert last_lines([str(tmp_path / "none"), str(tmp_path / "out"), str(tmp_path / "log")], 2) == ["2", "3"]


def test_librdkafkas_security_settings_become_javas() -> None:
    """The console tools reach a secured cluster with the settings that the processors have."""
    translated = console.java_properties(
        {
            "security.protocol": "sasl_ssl",
            "sasl.mechanisms": "SCRAM-SHA-512",
            "sasl.username": "me",
            "sasl.password": 'a"b',
            "ssl.ca.location": "/ca.pem",
            "linger.ms": "5",
        }
    )
    assert translated == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.jaas.config": 'org.apache.kafka.common.security.scram.ScramLoginModule required username="me" password="a\\"b";',
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": "/ca.pem",
    }
    with pytest.raises(EmbeddedError, match=r"ssl\.key\.location"):
        console.java_properties({"ssl.key.location": "/key.pem"})


def test_an_unknown_console_tool_is_refused_with_the_known_ones() -> None:
    """The message lists what there is."""
    with pytest.raises(EmbeddedError, match="console-consumer"):
        console.command_line("nosuch", [], "127.0.0.1:1", None)


def test_a_cluster_id_is_never_taken_for_an_option() -> None:
    """One random id in 64 would begin with a dash, and the storage tool would refuse it."""
    assert not any(kafka.cluster_id().startswith("-") for _ in range(1000))
