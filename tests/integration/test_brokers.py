"""Three real brokers on this machine, killed with SIGKILL while records are produced."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

import psutil
import pytest
from confluent_kafka import KafkaError, Message
from confluent_kafka.admin import ConfigResource

from events import topics
from infra.embedded import quorum
from infra.embedded.errors import EmbeddedError
from infra.embedded.kafka import CONTROLLER_PORT_DISTANCE
from infra.embedded.services import with_brokers
from infra.embedded.supervisor import Supervisor
from streams import kafka
from streams.settings import Settings

BROKERS = frozenset({"kafka"})
SESSION_S = 5.0
"""After how long the controller misses a broker."""


def free_first_port() -> int:
    """Return a port that is free, with those that three brokers derive from it."""
    while True:
        with ExitStack() as probes:
            first = probes.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            try:
                for place in range(1, 6):
                    probes.enter_context(socket.create_server(("127.0.0.1", port + place * CONTROLLER_PORT_DISTANCE)))
            except (OSError, OverflowError):
                continue
            return port


def until(condition: Callable[[], bool], what: str, patience_s: float = 90) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience_s:.0f} s: {what}"
        time.sleep(0.05)


class Brokers:
    """The brokers, and what they are asked."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.settings = supervisor.settings
        self.addresses = supervisor.settings.bootstrap_servers

    def kill(self, *nodes: int) -> None:
        """Kill these nodes at once: they get no chance to do anything more."""
        found = {item.started.name: item.started.process() for item in self.supervisor.status()}
        processes = [found[f"kafka-{node}"] for node in nodes]
        for process in processes:
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs([process for process in processes if process is not None], timeout=30)

    def revive(self) -> list[str]:
        """Start the brokers that are dead and wait until every partition has all its replicas."""
        started = self.supervisor.up(BROKERS)
        until(lambda: quorum.missing_replicas(self.addresses) == {}, "every partition has all its replicas")
        return started

    def active_controller(self) -> int | None:
        """Return who leads the controllers, if anybody does."""
        try:
            return quorum.active_controller(self.addresses)
        except EmbeddedError:
            return None

    def stored(self) -> Counter[str]:
        """Return how often each record stands on the topic."""
        reader, found = kafka.reader(self.settings), Counter[str]()
        name = kafka.name(self.settings, topics.REQUESTS)
        with closing(reader):
            for partition in range(self.settings.partitions):
                found.update((message.value() or b"").decode() for message in kafka.read_partition(reader, name, partition, 0))
        return found


class Sending:
    """A producer with acks=all that sends small records all the time, as the processors' producer does."""

    def __init__(self, brokers: Brokers, label: str) -> None:
        self.topic = kafka.name(brokers.settings, topics.REQUESTS)
        self.label = label
        self.acknowledged: list[str] = []
        self.sent = 0
        self._open: set[int] = set()
        self.failures: list[str] = []
        self._producer = kafka.producer(brokers.settings)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _send(self) -> None:
        while not self._stopped.is_set():
            self._open.add(self.sent)
            self._producer.produce(self.topic, f"{self.label}-{self.sent}", on_delivery=self._delivered)
            self.sent += 1
            self._producer.poll(0.005)
        assert self._producer.flush(60) == 0

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.acknowledged.append((message.value() or b"").decode())
            self._open.remove(int(self.acknowledged[-1].rpartition("-")[2]))
        else:
            self.failures.append(error.str())

    def goes_on(self) -> None:
        """Wait until all that was sent so far, and 50 records more, on all partitions, are acknowledged."""
        target = self.sent + 50
        until(lambda: self.sent > target and min(self._open.copy(), default=target) >= target, "records are acknowledged again")


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    """Start three brokers with our topics on them."""
    one = Settings(
        bootstrap_servers=f"127.0.0.1:{free_first_port()}",
        data_dir=tmp_path_factory.mktemp("brokers"),
        topic_prefix="three.",
        partitions=3,
    )
    supervisor = Supervisor(with_brokers(one, 3))
    try:
        assert supervisor.up(BROKERS) == ["kafka-1", "kafka-2", "kafka-3"]
        kafka.connect(supervisor.settings)
        yield Brokers(supervisor)
    finally:
        supervisor.down()


@pytest.mark.thorough
def test_every_record_is_on_three_brokers(brokers: Brokers) -> None:
    """Our topics and Kafka's own have three replicas, and two must have a record; nobody behind is elected."""
    admin = kafka.admin(brokers.settings)
    with closing(kafka.consumer(brokers.settings, "a-group")) as member:  # makes Kafka's own topic of offsets
        member.subscribe([kafka.name(brokers.settings, topics.REQUESTS)])
        until(lambda: member.poll(0.1) is None and "__consumer_offsets" in admin.list_topics(timeout=5).topics, "offsets topic")
    found = admin.list_topics(timeout=5).topics
    assert {len(partition.replicas) for topic in found.values() for partition in topic.partitions.values()} == {3}
    asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in found]
    for future in admin.describe_configs(asked).values():
        config = future.result(30)
        assert config["min.insync.replicas"].value == "2"
        assert config["unclean.leader.election.enable"].value == "false"
    until(lambda: quorum.missing_replicas(brokers.addresses) == {}, "every partition has all its replicas")


@pytest.mark.thorough
def test_any_broker_may_die_the_active_controller_included(brokers: Brokers) -> None:
    """Each is killed in turn while records are produced: production goes on, and each acknowledged record is there once."""
    first = brokers.active_controller()
    assert first is not None
    with Sending(brokers, "one-dead") as sending:
        sending.goes_on()
        for node in (first, *({1, 2, 3} - {first})):
            brokers.kill(node)
            until(lambda node=node: brokers.active_controller() not in {node, None}, "another node leads the controllers")
            sending.goes_on()
            assert brokers.revive() == [f"kafka-{node}"]
        sending.goes_on()
    assert sending.failures == []
    assert len(sending.acknowledged) == sending.sent
    stored = brokers.stored()
    assert {value: stored[value] for value in sending.acknowledged if stored[value] != 1} == {}


@pytest.mark.thorough
def test_with_two_dead_nothing_is_acknowledged_and_nothing_is_lost(brokers: Brokers) -> None:
    """One broker alone acknowledges nothing, however long it lives; what was acknowledged before is there when they return."""
    alone = brokers.active_controller() or 1
    with Sending(brokers, "two-dead") as sending:
        sending.goes_on()
        brokers.kill(*{1, 2, 3} - {alone})
        before = len(sending.acknowledged)
        deadline = time.monotonic() + SESSION_S + 2  # by then the controller would have made the ISR smaller, if it could
        time.sleep(0.5)  # acknowledgements of before the kill that were on their way
        on_the_way = len(sending.acknowledged)
        while time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(sending.acknowledged) == on_the_way, f"{len(sending.acknowledged) - on_the_way} acknowledged by one broker"
        assert on_the_way - before < 50
        assert brokers.revive() == [f"kafka-{node}" for node in sorted({1, 2, 3} - {alone})]
        sending.goes_on()
    assert sending.failures == []
    stored = brokers.stored()
    assert {value: stored[value] for value in sending.acknowledged if stored[value] != 1} == {}


@pytest.mark.thorough
def test_all_three_may_die_at_once(brokers: Brokers) -> None:
    """What was acknowledged is in the page cache of this machine: killing all processes loses nothing."""
    with Sending(brokers, "all-dead") as sending:
        sending.goes_on()
        brokers.kill(1, 2, 3)
        acknowledged = list(sending.acknowledged)
        assert brokers.revive() == ["kafka-1", "kafka-2", "kafka-3"]
        sending.goes_on()
    stored = brokers.stored()
    assert {value: stored[value] for value in acknowledged if stored[value] != 1} == {}


def test_another_number_of_brokers_is_refused(brokers: Brokers) -> None:
    """The message names the folders and how to start what is there."""
    first = brokers.addresses.partition(",")[0]
    one = Supervisor(brokers.settings.model_copy(update={"bootstrap_servers": first}))
    with pytest.raises(EmbeddedError, match=r"made by 3 brokers, and 1 broker would be.*--brokers 3"):
        one.up(BROKERS)
    assert all(item.condition == "ready" for item in brokers.supervisor.status())


def test_one_command_makes_three_brokers(cli_environment: dict[str, str], tmp_path: Path) -> None:
    """`up --brokers 3` says what other terminals need; without the number the same data is refused; `down` ends all three."""
    first = free_first_port()
    environment = cli_environment | {"FOLDFLOW_BOOTSTRAP_SERVERS": f"127.0.0.1:{first}"}

    def foldflow(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)

    try:
        up = foldflow("up", "--brokers", "3", "--only", "kafka", "--detach")
        assert up.returncode == 0, up.stderr
        addresses = ",".join(f"127.0.0.1:{first + distance}" for distance in (0, 20, 40))
        assert f"export FOLDFLOW_BOOTSTRAP_SERVERS={addresses} FOLDFLOW_REPLICATION_FACTOR=3" in up.stderr
        found = {item["name"]: item["address"] for item in json.loads(foldflow("status", "--json").stdout)}
        assert found == {f"kafka-{node}": address for node, address in enumerate(addresses.split(","), 1)}
        other = foldflow("up", "--detach")
        assert other.returncode == 1
        assert "made by 3 brokers" in other.stderr
    finally:
        down = foldflow("down")
    assert set(down.stderr.split(": ")[1].strip(".\n").split(", ")) == {"kafka-1", "kafka-2", "kafka-3"}
