"""`foldflow validate`: finds the mistakes in workflow definitions before a run does. It needs no Kafka."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import fail, say
from infra.cli.workflows import definitions
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.workflow.check import ToolSchema

_SAID: Final = ("line", "column", "where", "message")


def validate(
    files: Annotated[list[Path], typer.Argument(help="Workflow definitions (YAML), or folders of them.")],
    tools: Annotated[
        bool, typer.Option("--tools/--no-tools", help="Check calls against the tools that are installed here.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and editors.")] = False,
) -> None:
    """Find the mistakes in workflow definitions: all of them, each with file, line, column and the nearest right spelling.

    Besides the form, this is what can't work with what is known: a name that a schema doesn't have, a comparison of a number with
    a text, a missing argument of a tool, a step that can never run, steps that need each other in a circle.

    For example:

        foldflow validate my_workflow.yaml

        foldflow validate workflows/ --no-tools --json

    Exit codes: 0 nothing is wrong, 1 a definition has mistakes, 2 a wrong option, or the tools can't be loaded.
    """
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    known = _loaded() if tools else None
    found: list[dict[str, Any]] = []
    for path in definitions(files):
        one: dict[str, Any] = {"file": str(path), "name": None, "digest": None, "problems": []}
        found.append(one)
        try:
            spec = load(path, known)
        except DefinitionFileError as error:
            one["problems"] = [{key: getattr(each, key) for key in _SAID} for each in error.problems]
            if not as_json:
                print(error)
            continue
        one |= {"name": spec.name, "digest": spec.digest}
        if not as_json:
            say(f"{path}: {spec.name} {spec.digest[:12]}: nothing is wrong")
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    if any(one["problems"] for one in found):
        raise typer.Exit(1)


def _loaded() -> "Mapping[str, ToolSchema]":
    """Return what the tools that are installed take and give; ends with exit code 2 when they can't be loaded."""
    settings = Settings()
    try:
        return installed_tools(settings)
    except Exception as error:  # noqa: BLE001 - importing somebody's file can raise anything
        return fail(f"The tools can't be loaded: {error}\nTo check without them: foldflow validate --no-tools …", 2)


def installed_tools(settings: Settings) -> "Mapping[str, ToolSchema]":
    """Return what the tools that are installed here take and give. Raises whatever loading them raises."""
    from streams.workflow.check import ToolSchema  # noqa: PLC0415
    from tools.registry import load  # noqa: PLC0415

    tools = load(settings.tool_paths)
    return {name: ToolSchema(tool.arguments_schema, tool.result_schema) for name, tool in tools.items()}
