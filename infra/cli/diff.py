"""`foldflow diff`: what differs between two versions of a workflow, part by part."""

import difflib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import console, fail, say
from infra.cli.workflows import no_workflow, registered

if TYPE_CHECKING:
    from streams.workflow.spec import WorkflowSpec

_PARTS: Final = ("steps", "compensations", "finally")
_COLOURS: Final = {"+": "green", "-": "red", "@": "cyan"}
_SIGNS: Final = {"added": "+", "removed": "-", "changed": "~", "moved": "~"}
_CONTEXT: Final = 2


@dataclass(frozen=True, slots=True)
class Change:
    """One part that differs: `change` is added, removed, changed or moved; `diff`: its lines, as `diff -u` writes them."""

    part: str
    change: str
    diff: tuple[str, ...]


def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A file, or NAME, or NAME@VERSION of what is registered.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same for the other version.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show what differs between two versions of a workflow: steps that came, went or changed, and what changed in them.

    A version is the beginning of its digest; NAME alone is the newest. Both are compared in their canonical form, so another
    spelling of the same is no difference.

    For example:

        foldflow diff market-analysis my_market_analysis.yaml

        foldflow diff market-analysis@3f9a market-analysis

    Exit codes: 0 they are the same, 1 they differ, 2 there is no such file or version, 4 Kafka can't be reached.
    """
    one, other = _version(old), _version(new)
    changes = compare(one, other)
    if as_json:
        sides = [{"given": given, "name": spec.name, "digest": spec.digest} for given, spec in ((old, one), (new, other))]
        listed = [{"part": each.part, "change": each.change, "diff": list(each.diff)} for each in changes]
        print(json.dumps({"old": sides[0], "new": sides[1], "changes": listed}, indent=2, ensure_ascii=False))
    elif not changes:
        say(f"{old} and {new} are the same version: {one.name} {one.digest[:12]}")
    else:
        _show(one, other, changes)
    if changes:
        raise typer.Exit(1)


def _version(given: str) -> "WorkflowSpec":
    """Return the version that a file holds or that is registered; ends with an exit code if there is none."""
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    path = Path(given)
    if path.is_file() or path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        try:
            return load(path)
        except DefinitionFileError as error:
            fail(str(error), 2)
    name, _, beginning = given.partition("@")
    with registered() as registry:
        versions = registry.versions(name)
        if not versions:
            no_workflow(registry, name)
        newest = registry.newest(name)
        if not beginning and newest is not None:
            return newest
        meant = [each.digest for each in versions if each.digest.startswith(beginning.lower())]
        spec = registry.get(meant[0]) if len(meant) == 1 else None
    if spec is None:
        known = ", ".join(each.digest[:12] for each in versions[::-1][:10])
        problem = "more than one version begins like that" if meant else "there is no such version"
        fail(f"{given}: {problem}; there are {known}. See: foldflow workflows {name}", 2)
    return spec


def compare(old: "WorkflowSpec", new: "WorkflowSpec") -> list[Change]:
    """Return what differs, in the order of the newer definition; what is gone comes last of its kind."""
    before, after = json.loads(old.canonical), json.loads(new.canonical)
    changes: list[Change] = []
    for key in dict.fromkeys(("name", "description", "input", *_PARTS, "output", "time_limit", *before, *after)):
        if key not in _PARTS:
            changes += _changed(key, before.get(key), after.get(key))
            continue
        ours, theirs = _named(before.get(key, [])), _named(after.get(key, []))
        for name in (*theirs, *(name for name in ours if name not in theirs)):
            changes += _changed(f"{key}.{name}", ours.get(name), theirs.get(name))
        kept, now = [name for name in ours if name in theirs], [name for name in theirs if name in ours]
        if kept != now:
            changes.append(Change(key, "moved", _lines(kept, now)))
    return changes


def _changed(part: str, before: Any, after: Any) -> list[Change]:
    if before == after:
        return []
    change = "added" if before is None else "removed" if after is None else "changed"
    return [Change(part, change, _lines(before, after))]


def _lines(before: Any, after: Any) -> tuple[str, ...]:
    """Return the difference of two values, as lines of YAML."""
    ours, theirs = ([] if value is None else _yaml(value).splitlines() for value in (before, after))
    lines = tuple(difflib.unified_diff(ours, theirs, n=_CONTEXT, lineterm=""))[2:]  # without the names of files
    return lines if ours and theirs else lines[1:]  # of what is all new or all gone, the place says nothing


def _named(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return parts by name, as people write them, also those inside."""
    return {part["name"]: {key: _inner(key, value) for key, value in part.items() if key != "name"} for part in parts}


def _inner(key: str, value: Any) -> Any:
    return _named(value) if key in ("steps", "switch") else value


def _yaml(value: Any) -> str:
    """Return a JSON value as YAML, with long texts as they stand in a file."""
    from ruamel.yaml import YAML  # noqa: PLC0415
    from ruamel.yaml.scalarstring import walk_tree  # noqa: PLC0415

    if isinstance(value, dict | list):
        walk_tree(value)
    writer, text = YAML(), io.StringIO()
    writer.width = 100
    writer.dump(value, text)
    return text.getvalue().removesuffix("...\n")


def _show(old: "WorkflowSpec", new: "WorkflowSpec", changes: list[Change]) -> None:
    terminal = console()

    def line(text: str, colour: str = "") -> None:
        terminal.print(text, style=colour, markup=False, soft_wrap=True)

    line(f"{old.name} {old.digest[:12]} → {new.name} {new.digest[:12]}", "bold")
    for change in changes:
        sign = _SIGNS[change.change]
        line(f"{sign} {change.part} {change.change}", f"bold {_COLOURS.get(sign, '')}".strip())
        for each in change.diff:
            line(f"    {each}", _COLOURS.get(each[0], ""))
