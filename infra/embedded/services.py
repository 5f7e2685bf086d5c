"""What `foldflow up` starts, as a table: name, command line, addresses, and how each says that it is ready."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.embedded import java, kafka, model
from infra.embedded.errors import EmbeddedError
from streams.settings import Settings

ROLES = ("intake", "orchestrator", "llm", "tool")
LOOPBACK = frozenset({"127.0.0.1", "localhost"})
# Stopped one after the other once everything else has ended: the roles hand in what they hold while Kafka is there.
STOPPED_LAST = ("model", "kafka")


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


def run_folder(settings: Settings) -> Path:
    """Folder of the state file and of the ready files."""
    return settings.data_dir / "run"


def brings_kafka(settings: Settings) -> bool:
    """Whether Kafka is ours to start: one address, on this machine's loopback."""
    host, _, port = settings.bootstrap_servers.rpartition(":")
    return host in LOOPBACK and port.isdigit()


def services(settings: Settings, only: frozenset[str], progress: Callable[[int, int, str], None]) -> list[Service]:
    """Return what is to be started, Kafka first. `only` narrows it by name; raises `EmbeddedError` for an unknown name."""
    table = [_role(settings, role) for role in ROLES]
    table.append(_api(settings))
    if settings.model.startswith("local/"):
        table.insert(0, _model(settings))
    if brings_kafka(settings):
        table.insert(0, _kafka(settings, progress))
    names = {service.name for service in table}
    unknown = only - {*names, "kafka", "model"}
    if unknown:
        raise EmbeddedError(f"There is no {', '.join(sorted(unknown))} to start. Known: {', '.join(s.name for s in table)}.")
    return [service for service in table if not only or service.name in only]


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the environment variables that give a child process these very settings."""
    values = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
    return {f"FOLDFLOW_{name.upper()}": value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def broker(settings: Settings) -> kafka.Broker:
    """Return where the embedded broker of these settings lives."""
    host, _, port = settings.bootstrap_servers.rpartition(":")
    if not brings_kafka(settings):
        raise EmbeddedError(f"FOLDFLOW_BOOTSTRAP_SERVERS is {settings.bootstrap_servers}: that Kafka isn't ours to start.")
    address = "127.0.0.1" if host == "localhost" else host
    return kafka.Broker(address, int(port), settings.data_dir / "kafka", _log(settings, "kafka"))


def _log(settings: Settings, name: str) -> Path:
    return settings.data_dir / "logs" / f"{name}.log"


def _foldflow(*arguments: str) -> Callable[[], list[str]]:
    # The same interpreter, so that it works from an environment that isn't activated.
    return lambda: [sys.executable, "-m", "infra.cli.main", *arguments]


def _role(settings: Settings, role: str) -> Service:
    return Service(
        name=role,
        command=_foldflow("worker", role),
        logs=(_log(settings, role),),
        environment=lambda: {**os.environ, **environment_of(settings)},
    )


def _api(settings: Settings) -> Service:
    return Service(
        name="api",
        command=_foldflow("api"),
        logs=(_log(settings, "api"),),
        ports=(Port(settings.api_host, settings.api_port, "FOLDFLOW_API_PORT"),),
        environment=lambda: {**os.environ, **environment_of(settings)},
        address=f"http://{settings.api_host}:{settings.api_port}",
    )


def _model(settings: Settings) -> Service:
    host, port = model.address(settings)
    return Service(
        name="model",
        command=_foldflow("model"),
        logs=(_log(settings, "model"),),
        ports=(Port(host, port, "FOLDFLOW_LOCAL_MODEL_URL"),),
        environment=lambda: {**os.environ, **environment_of(settings)},
        address=settings.local_model_url,
    )


def _kafka(settings: Settings, progress: Callable[[int, int, str], None]) -> Service:
    own = broker(settings)

    def command() -> list[str]:
        kafka.prepare(own, java.ensure_jars(progress))
        return kafka.command(own)

    return Service(
        name="kafka",
        command=command,
        logs=(own.log.with_suffix(".out"), own.log),
        ports=(
            Port(own.host, own.port, "FOLDFLOW_BOOTSTRAP_SERVERS"),
            Port(own.host, own.controller_port, f"FOLDFLOW_BOOTSTRAP_SERVERS (its port + {kafka.CONTROLLER_PORT_DISTANCE})"),
        ),
        environment=lambda: java.environment(java.ensure_jars()),
        answers=lambda: kafka.answers(f"{own.host}:{own.port}"),
        address=f"{own.host}:{own.port}",
    )
