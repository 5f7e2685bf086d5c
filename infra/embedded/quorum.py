"""What a cluster says of itself: who leads its controllers, and which partitions lack replicas.

librdkafka can't ask for the controllers' leader (its `describe_cluster` names any broker that lives), and Kafka's console
tool takes seconds, so this one request is written by hand: DescribeQuorum, version 0.
"""

import socket
import struct

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from infra.embedded.errors import EmbeddedError

_DESCRIBE_QUORUM = 55
_TOPIC = b"__cluster_metadata"
_REQUEST = struct.pack(">hhihxBB", _DESCRIBE_QUORUM, 0, 1, -1, 2, len(_TOPIC) + 1) + _TOPIC + struct.pack(">Bixxx", 2, 0)
"""No client id; one topic, its one partition. Lengths of arrays and strings are one more than they are; 0 ends each record."""
_RESPONSE = struct.Struct(f">4xxhBB{len(_TOPIC)}sB4xhi")
"""Correlation id, tags, error, number of topics, length of the name, name, number of partitions, index, error, leader."""


def active_controller(bootstrap_servers: str, timeout_s: float = 5.0) -> int:
    """Return the node id of the controllers' leader, as the first broker that answers tells.

    Raises `EmbeddedError` when none does, or when there is no leader now.
    """
    problem: object = "no address"
    for address in bootstrap_servers.split(","):
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
                connection.sendall(struct.pack(">i", len(_REQUEST)) + _REQUEST)
                with connection.makefile("rb") as answer:
                    answer.read(4)  # its length
                    error, _, _, _, _, partition_error, leader = _RESPONSE.unpack(answer.read(_RESPONSE.size))
        except (OSError, struct.error) as cause:  # refused, silent, or gone in the middle of its answer
            problem = cause
            continue
        if error == partition_error == 0 and leader > 0:
            return int(leader)
        problem = f"error {error or partition_error}, leader {leader}"
    raise EmbeddedError(f"No active controller is known at {bootstrap_servers}: {problem}.")


def missing_replicas(bootstrap_servers: str, timeout_s: float = 5.0) -> dict[str, frozenset[int]]:
    """Return the partitions (`topic/number`) that lack replicas in sync, each with the nodes that are missing; empty: all whole.

    Raises `EmbeddedError` when no broker answers.
    """
    try:
        found = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0}).list_topics(timeout=timeout_s)
    except KafkaException as error:
        raise EmbeddedError(f"No broker answers at {bootstrap_servers}: {error}") from error
    return {
        f"{topic.topic}/{partition.id}": missing
        for topic in found.topics.values()
        for partition in topic.partitions.values()
        if (missing := frozenset(partition.replicas) - frozenset(partition.isrs))
    }
