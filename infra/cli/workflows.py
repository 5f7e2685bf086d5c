"""`foldflow deploy` and `foldflow workflows`: registers versions of workflows, and lists what is registered."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.cli.terminal import console, fail, quiet, say
from streams.settings import Settings

_CONNECT_S = 10.0


def deploy(
    files: Annotated[list[Path], typer.Argument(help="Workflow definitions (YAML), or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check workflow definitions and register them: new runs take the newest version, open runs stay on theirs.

    All files are checked before any is registered; what is registered already is left alone.

    For example:

        foldflow deploy my_workflow.yaml

        foldflow deploy workflows/

    Exit codes: 0 registered (or already was), 2 a definition is wrong, 4 Kafka can't be reached.
    """
    from streams import kafka, registry  # noqa: PLC0415
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    specs = []
    problems = []
    for path in _definitions(files):
        try:
            specs.append(load(path))
        except DefinitionFileError as error:
            problems.append(str(error))
    if problems:
        fail("\n".join([*problems, "Nothing was registered."]), 2)
    settings = quiet(Settings())
    try:
        kafka.connect(settings, timeout_s=_CONNECT_S)
        new = {spec.digest for spec in registry.publish(settings, specs)}
    except (kafka.KafkaUnreachableError, kafka.DeliveryFailedError, kafka.TopicMismatchError) as error:
        fail(str(error), 4)
    if as_json:
        print(json.dumps([{"name": spec.name, "digest": spec.digest, "new": spec.digest in new} for spec in specs]))
        return
    for spec in specs:
        say(f"{spec.name} {spec.digest[:12]}: {'registered' if spec.digest in new else 'already the newest version'}")


def _definitions(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(each for each in path.rglob("*") if each.suffix in {".yaml", ".yml"}) if path.is_dir() else [path]
        if not inside:
            fail(f"{path}: there is no .yaml file in it", 2)
        found += inside
    return found


def workflows(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False) -> None:
    """List the registered workflows, with the newest version of each and its steps.

    Exit codes: 0 listed, 4 Kafka can't be reached.
    """
    from streams import kafka  # noqa: PLC0415
    from streams.registry import SpecRegistry  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        kafka.connect(settings, timeout_s=_CONNECT_S)
        registry = SpecRegistry(settings)
        registry.refresh()
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        fail(str(error), 4)
    specs = [spec for name in registry.names() if (spec := registry.newest(name)) is not None]
    registry.close()
    if as_json:
        listed: list[dict[str, Any]] = [
            {
                "name": spec.name,
                "digest": spec.digest,
                "description": spec.description,
                "input": spec.input,
                "steps": [step.name for step in spec.steps],
            }
            for spec in specs
        ]
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    if not specs:
        say("No workflow is registered yet. Register one with: foldflow deploy FILE")
        return
    from rich.table import Table  # noqa: PLC0415

    table = Table("name", "version", "steps", "description", box=None)
    for spec in specs:
        table.add_row(spec.name, spec.digest[:12], str(len(spec.steps)), spec.description)
    console().print(table)
