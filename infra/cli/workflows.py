"""`foldflow deploy` and `foldflow workflows`: registers versions of workflows, and lists what is registered."""

import contextlib
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from infra.cli.terminal import clock, console, fail, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.registry import SpecRegistry
    from streams.workflow.spec import WorkflowSpec

_CONNECT_S = 10.0


def deploy(
    files: Annotated[list[Path], typer.Argument(help="Workflow definitions (YAML), or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check workflow definitions and register them: new runs take the newest version, open runs stay on theirs.

    All files are checked before any is registered; what is registered already is left alone. What doesn't fit the tools that are
    installed here is said, and registered all the same: workers may have others.

    For example:

        foldflow deploy my_workflow.yaml

        foldflow deploy workflows/

    Exit codes: 0 registered (or already was), 2 a definition is wrong, 4 Kafka can't be reached.
    """
    from streams import kafka, registry  # noqa: PLC0415
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    specs = []
    problems = []
    paths = definitions(files)
    for path in paths:
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
    _say_what_tools_lack(settings, paths)
    if as_json:
        print(json.dumps([{"name": spec.name, "digest": spec.digest, "new": spec.digest in new} for spec in specs]))
        return
    for spec in specs:
        say(f"{spec.name} {spec.digest[:12]}: {'registered' if spec.digest in new else 'already the newest version'}")


def _say_what_tools_lack(settings: Settings, paths: list[Path]) -> None:
    """Say what in definitions doesn't fit the tools that are installed here."""
    from infra.cli.validate import installed_tools  # noqa: PLC0415 - importing tools takes a moment
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    try:
        tools = installed_tools(settings)
    except Exception as error:  # noqa: BLE001 - importing somebody's file can raise anything
        say(f"Not compared with the tools of this machine, which can't be loaded: {error}")
        return
    for path in paths:
        try:
            load(path, tools)
        except DefinitionFileError as error:
            say(f"{error}\nSo by the tools that are here (FOLDFLOW_TOOL_PATHS names further ones); workers may have others.")


def definitions(paths: list[Path]) -> list[Path]:
    """Return the files that paths name, folders searched; ends with exit code 2 for a folder that has none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(each for each in path.rglob("*") if each.suffix in {".yaml", ".yml"}) if path.is_dir() else [path]
        if not inside:
            fail(f"{path}: there is no .yaml file in it", 2)
        found += inside
    return found


def workflows(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="List all versions of this one.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """List the registered workflows with the newest version of each, or all versions of one, the newest first.

    For example:

        foldflow workflows

        foldflow workflows market-analysis

    Exit codes: 0 listed, 2 there is no workflow of this name, 4 Kafka can't be reached.
    """
    with registered() as registry:
        if name:
            _versions(registry, name, as_json=as_json)
            return
        specs = [spec for each in registry.names() if (spec := registry.newest(each)) is not None]
    if as_json:
        print(json.dumps([_described(spec) for spec in specs], indent=2, ensure_ascii=False))
        return
    if not specs:
        say("No workflow is registered yet. Register one with: foldflow deploy FILE")
        return
    from rich.table import Table  # noqa: PLC0415

    table = Table("name", "version", "steps", "description", box=None)
    for spec in specs:
        table.add_row(spec.name, spec.digest[:12], str(len(spec.steps)), spec.description)
    console().print(table)


def _described(spec: "WorkflowSpec") -> dict[str, Any]:
    return {
        "name": spec.name,
        "digest": spec.digest,
        "description": spec.description,
        "input": spec.input,
        "steps": [step.name for step in spec.steps],
    }


def _versions(registry: "SpecRegistry", name: str, *, as_json: bool) -> None:
    """List all versions of a workflow."""
    versions = registry.versions(name)[::-1]
    if not versions:
        no_workflow(registry, name)
    newest = registry.newest(name)
    rows = [
        {
            **_described(spec),
            "registered": version.registered,
            "newest": newest is not None and newest.digest == version.digest,
            "current": version.current,
        }
        for version in versions
        if (spec := registry.get(version.digest)) is not None
    ]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table  # noqa: PLC0415

    table = Table("version", "registered", "steps", "", "description", box=None)
    for row in rows:
        remark = "newest" if row["newest"] else "" if row["current"] else "only by its digest"
        table.add_row(row["digest"][:12], clock(row["registered"]), str(len(row["steps"])), remark, row["description"])
    console().print(table)


def no_workflow(registry: "SpecRegistry", name: str) -> NoReturn:
    """Say that there is no workflow of a name, and which may be meant; ends with exit code 2."""
    near = difflib.get_close_matches(name, registry.names(), 1)
    fail(f"There is no workflow `{name}`" + (f"; did you mean `{near[0]}`?" if near else "; see: foldflow workflows"), 2)


@contextlib.contextmanager
def registered() -> "Iterator[SpecRegistry]":
    """Return what is registered as of now; ends with exit code 4 when Kafka can't be reached."""
    from streams import kafka  # noqa: PLC0415
    from streams.registry import SpecRegistry  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        kafka.connect(settings, timeout_s=_CONNECT_S)
        registry = SpecRegistry(settings)
        registry.refresh()
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        fail(str(error), 4)
    try:
        yield registry
    finally:
        registry.close()
