"""`foldflow kafka TOOL …`: Kafka's own console tools against the configured cluster."""

import os
import sys
import tempfile
from typing import Annotated

import typer

from infra.embedded import console, java
from infra.embedded.errors import EmbeddedError
from streams.settings import Settings


def kafka(
    ctx: typer.Context,
    tool: Annotated[str, typer.Argument(help=f"One of: {', '.join(console.CLASSES)}.")],
) -> None:
    """Run one of Kafka's own console tools against the configured cluster.

    --bootstrap-server and the security settings are added; all other arguments go to the tool as they are
    (`foldflow kafka topics --help` shows the tool's own help). The exit code is the tool's.

    For example:

        foldflow kafka topics --list

        foldflow kafka console-consumer --topic foldflow.decisions --from-beginning --formatter-property print.headers=true

        foldflow kafka consumer-groups --describe --all-groups

        foldflow kafka dump-log --files .foldflow/kafka/data/foldflow.inbox-0/00000000000000000000.log
    """
    settings = Settings()
    try:
        config_path = _config(console.java_properties(settings.kafka))
        line = console.command_line(tool, ctx.args, settings.bootstrap_servers, config_path)
        environment = java.environment(java.ensure_jars(_downloading))
    except EmbeddedError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    # In place of this process: Ctrl-C, pipes and the exit code are the tool's own.
    os.execve(line[0], line, environment)  # noqa: S606 — an argument list, no shell


def _config(properties: dict[str, str]) -> str | None:
    """Put the properties where only the tool can read them: an unlinked file that it inherits; they may hold a password."""
    if not properties:
        return None
    with tempfile.TemporaryFile("w") as file:
        file.write(console.properties_text(properties))
        file.flush()
        descriptor = os.dup(file.fileno())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.set_inheritable(descriptor, True)
    return f"/dev/fd/{descriptor}"


def _downloading(done: int, total: int, _name: str) -> None:
    if done in {1, total}:
        print(f"Downloading Kafka: {done} of {total} jars", file=sys.stderr)
