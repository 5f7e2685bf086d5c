"""Kafka's own console tools, run against the configured cluster with the embedded Java runtime."""

from collections.abc import Mapping, Sequence

from infra.embedded import class_cache, java
from infra.embedded.errors import EmbeddedError

_TOOLS = "org.apache.kafka.tools"
CLASSES = {
    "acls": f"{_TOOLS}.AclCommand",
    "broker-api-versions": f"{_TOOLS}.BrokerApiVersionsCommand",
    "configs": "kafka.admin.ConfigCommand",
    "console-consumer": f"{_TOOLS}.consumer.ConsoleConsumer",
    "console-producer": f"{_TOOLS}.ConsoleProducer",
    "console-share-consumer": f"{_TOOLS}.consumer.ConsoleShareConsumer",
    "consumer-groups": f"{_TOOLS}.consumer.group.ConsumerGroupCommand",
    "delete-records": f"{_TOOLS}.DeleteRecordsCommand",
    "dump-log": f"{_TOOLS}.DumpLogSegments",
    "get-offsets": f"{_TOOLS}.GetOffsetShell",
    "groups": f"{_TOOLS}.GroupsCommand",
    "leader-election": f"{_TOOLS}.LeaderElectionCommand",
    "log-dirs": f"{_TOOLS}.LogDirsCommand",
    "metadata-quorum": f"{_TOOLS}.MetadataQuorumCommand",
    "reassign-partitions": f"{_TOOLS}.reassign.ReassignPartitionsCommand",
    "share-groups": f"{_TOOLS}.consumer.group.ShareGroupCommand",
    "topics": f"{_TOOLS}.TopicCommand",
    "transactions": f"{_TOOLS}.TransactionsCommand",
}
OFFLINE = frozenset({"dump-log"})
"""Tools that read files and know no `--bootstrap-server`."""

_LOGIN = {
    "PLAIN": "org.apache.kafka.common.security.plain.PlainLoginModule",
    "SCRAM-SHA-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "SCRAM-SHA-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
}
_SAME_NAME = frozenset({"ssl.endpoint.identification.algorithm", "ssl.key.password", "ssl.cipher.suites", "client.id"})


def command_line(tool: str, arguments: Sequence[str], bootstrap_servers: str, config_path: str | None) -> list[str]:
    """Return the command line of a console tool; it needs `java.environment`.

    `--bootstrap-server` and `--command-config` are added unless the arguments have them. Raises `EmbeddedError` for an
    unknown tool.
    """
    if tool not in CLASSES:
        raise EmbeddedError(f"There is no tool {tool!r}. Known: {', '.join(CLASSES)}.")
    added: list[str] = []
    if tool not in OFFLINE:
        if "--bootstrap-server" not in arguments:
            added += ["--bootstrap-server", bootstrap_servers]
        if config_path is not None and "--command-config" not in arguments:
            added += ["--command-config", config_path]
    flags = ("-Xmx256m", *class_cache.flags_to_use(java.jar_folder(), java.java_version()))
    return java.command_line(java.TOOL_LOG, flags, CLASSES[tool], [*added, *arguments])


def java_properties(librdkafka: Mapping[str, str]) -> dict[str, str]:
    """Translate the security settings of librdkafka's clients into those of Java's.

    Raises `EmbeddedError` for what has no counterpart there; `--command-config FILE` is the way then.
    """
    result: dict[str, str] = {}
    mechanism = librdkafka.get("sasl.mechanism", librdkafka.get("sasl.mechanisms", ""))
    for name, value in librdkafka.items():
        match name:
            case "security.protocol":
                result[name] = value.upper()
            case "sasl.mechanism" | "sasl.mechanisms":
                result["sasl.mechanism"] = value
            case "sasl.username" if mechanism in _LOGIN:
                user, password = _quoted(value), _quoted(librdkafka.get("sasl.password", ""))
                result["sasl.jaas.config"] = f"{_LOGIN[mechanism]} required username={user} password={password};"
            case "ssl.ca.location":
                result |= {"ssl.truststore.type": "PEM", "ssl.truststore.location": value}
            case "sasl.password":
                pass
            case _ if name in _SAME_NAME:
                result[name] = value
            case _ if name.startswith(("ssl.", "sasl.")):
                raise EmbeddedError(
                    f"Kafka's own tools know no counterpart of {name}: write a Java client configuration and pass it with "
                    "--command-config FILE."
                )
            case _:  # tuning of librdkafka's own clients
                pass
    return result


def properties_text(properties: Mapping[str, str]) -> str:
    """Return the text of a Java properties file."""
    return "".join(f"{name}={value.replace(chr(92), chr(92) * 2)}\n" for name, value in properties.items())


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
