"""What `foldflow up` starts, as a table: name, command line, addresses, and how each says that it is ready."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.embedded import java, kafka, model, nursery
from infra.embedded.errors import EmbeddedError
from streams.settings import Settings

ROLES = ("intake", "orchestrator", "llm", "tool")
LOOPBACK = frozenset({"127.0.0.1", "localhost"})
# Stopped one after the other once everything else has ended: the roles hand in what they hold while Kafka is there. Brokers
# are stopped together, since the last one alone would wait for a quorum.
STOPPED_LAST = ("model", "kafka")
# Started once the others are ready: together they would only take the cores from each other, and a run can begin without these.
STARTED_LAST = frozenset({"model", "llm", "api", "mirror"})


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a service listens on, and the setting that changes it."""

    host: str
    number: int
    setting: str


@dataclass(frozen=True, slots=True)
class Service:
    """One process of the table."""

    name: str
    command: Callable[[], list[str]]
    """Makes the command line; called just before the start, and may prepare files (and raise `EmbeddedError`)."""
    logs: tuple[Path, ...]
    """The first takes the process's output."""
    ports: tuple[Port, ...] = ()
    environment: Callable[[], Mapping[str, str]] = dict
    answers: Callable[[], bool] | None = None
    """For a program that doesn't know `FOLDFLOW_READY_FILE`: whether it is ready, asked again and again."""
    address: str = field(default="")
    arguments: tuple[str, ...] = ()
    """Of `foldflow`, where it is a process of ours: it can begin as a fork (see `nursery`)."""


def run_folder(settings: Settings) -> Path:
    """Folder of the state file and of the ready files."""
    return settings.data_dir / "run"


def brings_kafka(settings: Settings) -> bool:
    """Whether Kafka is ours to start: all its addresses are on this machine's loopback."""
    parts = [address.rpartition(":") for address in settings.bootstrap_servers.split(",")]
    return all(host in LOOPBACK and port.isdigit() for host, _, port in parts)


def completed(settings: Settings) -> Settings:
    """Return the settings that all processes get: topics have replicas where several brokers are ours to start."""
    count = settings.bootstrap_servers.count(",") + 1
    if not brings_kafka(settings) or count == 1 or "replication_factor" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"replication_factor": min(kafka.REPLICAS, count)})


def with_brokers(settings: Settings, count: int) -> Settings:
    """Return settings for `count` brokers of ours; their ports follow from the first one's.

    Raises `EmbeddedError` when Kafka is somewhere else, or another number of addresses is set.
    """
    own = brokers(settings)
    if len(own) == count:
        return settings
    if len(own) != 1:
        raise EmbeddedError(f"FOLDFLOW_BOOTSTRAP_SERVERS names {len(own)} brokers: {settings.bootstrap_servers}, not {count}.")
    addresses = ",".join(f"{host}:{port}" for host, port in kafka.several((own[0].host, own[0].port), count))
    return settings.model_copy(update={"bootstrap_servers": addresses})


def services(settings: Settings, only: frozenset[str], progress: Callable[[int, int, str], None]) -> list[Service]:
    """Return what is to be started, Kafka first. `only` narrows it by name (`kafka` stands for all brokers).

    Raises `EmbeddedError` for an unknown name, and when Kafka's data was made by another number of brokers.
    """
    table = [_role(settings, role) for role in (*ROLES, *(("mirror",) if settings.json_mirror else ()))]
    table.append(_api(settings))
    if settings.model.startswith("local/"):
        table.insert(0, _model(settings))
    own = brokers(settings) if brings_kafka(settings) else ()
    new_id = kafka.cluster_id()
    table[:0] = [_kafka(each, new_id, progress) for each in own]
    names = {service.name for service in table}
    if kafka.ALONE in only:
        only |= {each.folder.name for each in own}
    if not only or any(each.folder.name in only for each in own):
        kafka.check_number(own, settings.data_dir)
    unknown = only - {*names, "kafka", "model"}
    if unknown:
        raise EmbeddedError(f"There is no {', '.join(sorted(unknown))} to start. Known: {', '.join(s.name for s in table)}.")
    return [service for service in table if not only or service.name in only]


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the environment variables that give a child process these very settings."""
    values = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
    return {f"FOLDFLOW_{name.upper()}": value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def brokers(settings: Settings) -> tuple[kafka.Broker, ...]:
    """Return where the embedded brokers of these settings live: one for each address."""
    if not brings_kafka(settings):
        raise EmbeddedError(f"FOLDFLOW_BOOTSTRAP_SERVERS is {settings.bootstrap_servers}: that Kafka isn't ours to start.")
    parts = [address.rpartition(":") for address in settings.bootstrap_servers.split(",")]
    addresses = [("127.0.0.1" if host == "localhost" else host, int(port)) for host, _, port in parts]
    return kafka.brokers(addresses, settings.data_dir, settings.data_dir / "logs")


def _foldflow(settings: Settings, name: str, *arguments: str, address: str = "", ports: tuple[Port, ...] = ()) -> Service:
    return Service(
        name=name,
        command=lambda: [*nursery.FOLDFLOW, *arguments],
        logs=(settings.data_dir / "logs" / f"{name}.log",),
        ports=ports,
        environment=lambda: {**os.environ, **environment_of(settings)},
        address=address,
        arguments=arguments,
    )


def _role(settings: Settings, role: str) -> Service:
    return _foldflow(settings, role, "worker", role)


def _api(settings: Settings) -> Service:
    port = Port(settings.api_host, settings.api_port, "FOLDFLOW_API_PORT")
    return _foldflow(settings, "api", "api", address=f"http://{settings.api_host}:{settings.api_port}", ports=(port,))


def _model(settings: Settings) -> Service:
    port = Port(*model.address(settings), "FOLDFLOW_LOCAL_MODEL_URL")
    return _foldflow(settings, "model", "model", address=settings.local_model_url, ports=(port,))


def _kafka(own: kafka.Broker, new_id: str, progress: Callable[[int, int, str], None]) -> Service:
    def command() -> list[str]:
        kafka.prepare(own, java.ensure_jars(progress), new_id)
        return kafka.command(own)

    return Service(
        name=own.folder.name,
        command=command,
        logs=(own.log.with_suffix(".out"), own.log),
        ports=(
            Port(own.host, own.port, "FOLDFLOW_BOOTSTRAP_SERVERS"),
            Port(own.host, own.controller_port, f"FOLDFLOW_BOOTSTRAP_SERVERS (its port + {kafka.CONTROLLER_PORT_DISTANCE})"),
        ),
        environment=lambda: java.environment(java.ensure_jars()),
        answers=lambda: kafka.answers(own),
        address=own.address,
    )
