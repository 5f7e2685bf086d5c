import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from infra.embedded import console, jars, kafka, supervisor
from infra.embedded.errors import EmbeddedError
from infra.embedded.keeper import Keeper, Patience
from infra.embedded.processes import Started, State, created, last_lines, read_state, stop_in_order, write_state
from infra.embedded.services import completed, environment_of, services, with_brokers
from infra.embedded.supervisor import Supervisor
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


def addresses(count: int) -> list[tuple[str, int]]:
    """Return the addresses of so many brokers."""
    return kafka.several(("127.0.0.1", 29092), count)


def test_several_brokers_share_a_quorum_and_have_room_for_its_ports(tmp_path: Path) -> None:
    """Each names all controllers, keeps three replicas of what is its own, and acknowledges what two have."""
    three = kafka.brokers(addresses(3), tmp_path, tmp_path)
    assert [(each.address, each.controller_port, each.folder.name) for each in three] == [
        ("127.0.0.1:29092", 29102, "kafka-1"),
        ("127.0.0.1:29112", 29122, "kafka-2"),
        ("127.0.0.1:29132", 29142, "kafka-3"),
    ]
    written = [kafka.properties(each) for each in three]
    assert [each["node.id"] for each in written] == ["1", "2", "3"]
    assert {each["controller.quorum.voters"] for each in written} == {"1@127.0.0.1:29102,2@127.0.0.1:29122,3@127.0.0.1:29142"}
    for name in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
        assert {each[f"{name}.replication.factor"] for each in written} == {"3"}
    assert {each["min.insync.replicas"] for each in written} == {"2"}
    alone = kafka.properties(*kafka.brokers(addresses(1), tmp_path, tmp_path))
    assert (alone["min.insync.replicas"], alone["offsets.topic.replication.factor"]) == ("1", "1")
    with pytest.raises(EmbeddedError, match="29092, 29102 collide"):
        kafka.brokers([("127.0.0.1", 29092), ("127.0.0.1", 29102)], tmp_path, tmp_path)


def test_several_loopback_addresses_are_brokers_of_ours(tmp_path: Path) -> None:
    """Each is a service, `kafka` means all of them, and topics have replicas unless the settings say how many."""
    one = Settings(bootstrap_servers="127.0.0.1:29092", data_dir=tmp_path)
    three = with_brokers(one, 3)
    assert three.bootstrap_servers == "127.0.0.1:29092,127.0.0.1:29112,127.0.0.1:29132"
    assert names(three)[:4] == ["kafka-1", "kafka-2", "kafka-3", "model"]
    assert names(three, "kafka") == ["kafka-1", "kafka-2", "kafka-3"]
    assert names(three, "kafka-2", "tool") == ["kafka-2", "tool"]
    assert (completed(one).replication_factor, completed(three).replication_factor) == (1, 3)
    assert completed(three.model_copy(update={"replication_factor": 2})).replication_factor == 2
    assert with_brokers(three, 3) == three
    with pytest.raises(EmbeddedError, match="names 3 brokers"):
        with_brokers(three, 2)
    mixed = Settings(bootstrap_servers="127.0.0.1:29092,kafka.example:9092", data_dir=tmp_path)
    assert names(mixed, "kafka") == []
    with pytest.raises(EmbeddedError, match="isn't ours"):
        with_brokers(mixed, 3)


@pytest.mark.parametrize(("made", "wanted", "said"), [(1, 3, "`foldflow up`"), (3, 1, "--brokers 3"), (3, 5, "--brokers 3")])
def test_data_of_another_number_of_brokers_is_refused(tmp_path: Path, made: int, wanted: int, said: str) -> None:
    """The message says how to start what is there; the number that made it, and an empty folder, are accepted."""
    kafka.check_number(kafka.brokers(addresses(wanted), tmp_path, tmp_path), tmp_path)
    first = kafka.brokers(addresses(made), tmp_path, tmp_path)[0]  # the others are not formatted yet
    first.data.mkdir(parents=True)
    (first.data / "meta.properties").touch()
    first.configuration.write_text("".join(f"{name}={value}\n" for name, value in kafka.properties(first).items()))
    kafka.check_number(kafka.brokers(addresses(made), tmp_path, tmp_path), tmp_path)
    with pytest.raises(EmbeddedError, match=said):
        kafka.check_number(kafka.brokers(addresses(wanted), tmp_path, tmp_path), tmp_path)
    names(Settings(bootstrap_servers="127.0.0.1:1", data_dir=tmp_path), "tool")  # Kafka's folders don't concern it


def test_pauses_grow_and_a_start_that_keeps_failing_is_given_up() -> None:
    """1 s to 30 s while it dies soon; 1 s again after a steady minute; None after five starts that never were ready."""
    patience = Patience()
    soon = [patience.after_death(2, was_ready=True) for _ in range(7)]
    assert soon == [1, 2, 4, 8, 16, 30, 30]
    assert patience.after_death(60, was_ready=True) == 1
    assert [patience.after_death(1, was_ready=False) for _ in range(5)] == [2, 4, 8, 16, None]
    patience = Patience()
    failing = [patience.after_death(1, was_ready=ready) for ready in (False, False, False, False, True, False)]
    assert None not in failing, "one that was ready once more starts anew"


def test_a_start_that_is_impossible_is_told_and_the_keeper_goes_on(tmp_path: Path) -> None:
    """Settings that another version wrote don't end the keeper; it ends when somebody else is the supervisor."""
    supervisor, told, stopped = Supervisor(Settings(data_dir=tmp_path)), list[str](), threading.Event()
    supervisor.become_supervisor()
    supervisor.remember(Started("tool", os.getpid(), 1.0, "", (), str(tmp_path / "ready"), {"of_another_version": 1}))
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(Keeper(supervisor, told.append).keep, stopped)
        deadline = time.monotonic() + 60
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        write_state(tmp_path / "run" / "state.json", State((1, 1.0), supervisor.state().started))
        assert kept.result(60) is False
    assert "tool is started again in 1 s." in told[0]
    assert "could not be started" in told[1]
    assert "of_another_version" in told[1]
    assert "again in 2 s." in told[1]


def test_what_is_started_follows_the_settings(tmp_path: Path) -> None:
    """A Kafka elsewhere and a remote model are used, not started."""
    assert names(Settings(data_dir=tmp_path)) == ["kafka", "model", "intake", "orchestrator", "llm", "tool", "api"]
    elsewhere = Settings(data_dir=tmp_path, bootstrap_servers="kafka.example:9092", model="anthropic/claude")
    assert names(elsewhere) == ["intake", "orchestrator", "llm", "tool", "api"]
    assert names(elsewhere, "kafka", "api") == ["api"]
    with pytest.raises(EmbeddedError, match="no nosuch to start"):
        names(Settings(data_dir=tmp_path), "nosuch")


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
    item = Started("kafka", 3, 4.5, "127.0.0.1:1", ("a.log", "b.log"), "r", {"partitions": 3}, 2, given_up=True)
    state = State((1, 2.5), (item,), foreground=False)
    write_state(tmp_path / "run" / "state.json", state)
    assert read_state(tmp_path / "run" / "state.json") == state
    assert read_state(tmp_path / "none.json") == State()
    assert (tmp_path / "run" / "state.json").stat().st_mode & 0o077 == 0


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


def test_the_port_of_who_was_just_killed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is on its way out may hold its port for a moment: that is no reason to refuse to start."""
    monkeypatch.setattr(supervisor, "listener", lambda *_: None)
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.listen()
    settings = Settings(api_host="127.0.0.1", api_port=held.getsockname()[1], data_dir=tmp_path)
    (api,) = services(settings, frozenset({"api"}), lambda *_: None)
    threading.Timer(0.3, held.close).start()
    supervisor._check_ports(api)
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.api_port))
        other.listen()
        monkeypatch.setattr(supervisor, "_PORT_FREED_S", 0.2)
        with pytest.raises(EmbeddedError, match="is taken by another process"):
            supervisor._check_ports(api)
