"""Workflow definitions in YAML files, and what is wrong with one: all of it at once, each with its line.

YAML is read as far as JSON goes: text, numbers, booleans, null, lists and mappings. A date is text, other tags are
refused. Aliases work, within bounds that keep a small file from growing into a large definition.
"""

import difflib
import importlib.resources
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from streams.workflow.check import Place, ToolSchema, check
from streams.workflow.expressions import Json, clean_text
from streams.workflow.spec import NAME, WorkflowSpec

MAX_BYTES: Final = 1024 * 1024
MAX_VALUES: Final = 50_000
"""How many values a file may hold, each alias counted with all that it stands for."""
MAX_DEPTH: Final = 50


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """What is wrong, and where. Lines and columns count from 1; `where` is empty for the file as a whole."""

    file: str
    line: int
    column: int
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.where}{': ' if self.where else ''}{self.message}"


class DefinitionFileError(ValueError):
    """Definitions that can't be used. `problems`: all that was found, in the order of the files."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


def load(path: Path, tools: Mapping[str, ToolSchema] | None = None) -> WorkflowSpec:
    """Return the definition in a file. Raises DefinitionFileError, also for a file that can't be read.

    `tools`: those that there are; without them nothing is said about tools.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DefinitionFileError([Problem(str(path), 1, 1, "", f"can't be read: {error.strerror}")]) from error
    return parse(content, str(path), tools)


def load_all(paths: Iterable[Path]) -> dict[str, WorkflowSpec]:
    """Return the definitions in files and in folders (`*.yaml`, `*.yml`), by name. Raises DefinitionFileError."""
    found: dict[str, tuple[WorkflowSpec, Path]] = {}
    problems: list[Problem] = []
    for file in dict.fromkeys(file for path in paths for file in (sorted(path.glob("*.y*ml")) if path.is_dir() else [path])):
        try:
            spec = load(file)
        except DefinitionFileError as error:
            problems += error.problems
            continue
        if spec.name in found:
            problems.append(Problem(str(file), 1, 1, "name", f"there is a `{spec.name}` in {found[spec.name][1]} already"))
        else:
            found[spec.name] = spec, file
    if problems:
        raise DefinitionFileError(problems)
    return {name: spec for name, (spec, _) in found.items()}


def builtin() -> dict[str, WorkflowSpec]:
    """Return the definitions that come with this distribution, by name."""
    folder = importlib.resources.files("streams.workflows")
    files = sorted((each for each in folder.iterdir() if each.name.endswith(".yaml")), key=lambda each: each.name)
    return {spec.name: spec for spec in [parse(each.read_bytes(), each.name) for each in files]}


def parse(content: bytes, file: str, tools: Mapping[str, ToolSchema] | None = None) -> WorkflowSpec:
    """Return the definition in a YAML text. Raises DefinitionFileError; `file` is what its problems call the text."""
    document = _Document(file)
    data = document.read(content)
    readable = not document.problems
    spec, mended = _checked(document, data)
    if spec is not None and readable:
        for finding in check(spec, tools):
            place = _in_file(data, finding.place)
            if not any(place[: len(each)] == each for each in mended):
                document.report(place, finding.message)
    if spec is None or document.problems:
        raise DefinitionFileError(document.problems)
    return spec


# --- YAML to JSON values ---
_TAG: Final = "tag:yaml.org,2002:"
_TEXT: Final = frozenset({f"{_TAG}str", f"{_TAG}timestamp", f"{_TAG}value"})


@dataclass
class _Document:
    """A YAML text on its way to a JSON value: the places of its values, and what is wrong with it."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    _marks: dict[Place, tuple[int, int]] = field(default_factory=dict)
    _values: int = 0

    def read(self, content: bytes) -> dict[str, Json]:
        """Return the file's value. Raises DefinitionFileError when it is no mapping, or no YAML at all."""
        if len(content) > MAX_BYTES:
            self._give_up(0, 0, f"the file is larger than {MAX_BYTES:,} bytes")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = content[: error.start]
            self._give_up(before.count(b"\n"), error.start - before.rfind(b"\n") - 1, "this is not UTF-8")
        try:
            node = YAML(typ="safe", pure=True).compose(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            message = "a tab stands here; YAML is indented with spaces" if "'\\t'" in reason else f"not YAML: {reason}"
            self._give_up(mark.line, mark.column, message)
        except (YAMLError, RecursionError) as error:
            self._give_up(0, 0, f"not YAML: {str(error).splitlines()[0]}")
        if node is None:
            self._give_up(0, 0, "the file is empty; a workflow needs `name` and `steps`")
        value = self._value(node, ())
        if not isinstance(value, dict):
            self._give_up(node.start_mark.line, node.start_mark.column, "a workflow is a mapping with `name` and `steps`")
        return value

    def _give_up(self, line: int, column: int, message: str) -> NoReturn:
        raise DefinitionFileError([*self.problems, Problem(self.file, line + 1, column + 1, "", message)])

    def report(self, place: Place, message: str, where: Place | None = None) -> None:
        """Record a problem at a place, or at the nearest one around it that stands in the file; `where`: how to name it."""
        known = next((place[:length] for length in range(len(place), 0, -1) if place[:length] in self._marks), ())
        line, column = self._marks.get(known, (0, 0))
        spelled = _spelled(place if where is None else where)
        self.problems.append(Problem(self.file, line + 1, column + 1, spelled, message.split("\n", 1)[0]))

    def _value(self, node: Node, place: Place) -> Json:
        self._values += 1
        if self._values > MAX_VALUES or len(place) > MAX_DEPTH:
            limit = f"{MAX_VALUES:,} values" if self._values > MAX_VALUES else f"{MAX_DEPTH} levels"
            self._give_up(node.start_mark.line, node.start_mark.column, f"it has more than {limit}, aliases included")
        self._marks.setdefault(place, (node.start_mark.line, node.start_mark.column))
        match node:
            case MappingNode() if node.tag == f"{_TAG}map":
                return self._mapping(node, place)
            case SequenceNode() if node.tag == f"{_TAG}seq":
                return [self._value(each, (*place, index)) for index, each in enumerate(node.value)]
            case ScalarNode() if node.tag in _TEXT:
                return self._text(node)
            case ScalarNode() if str(node.tag).removeprefix(_TAG) in {"int", "float", "bool", "null"}:
                return self._scalar(node, place)
            case _:
                self.report(place, f"the tag `{node.tag}` is not allowed")
                return None

    def _text(self, node: Node) -> str:
        text = node.value if isinstance(node, ScalarNode) else "?"
        if text != clean_text(text):
            self._give_up(node.start_mark.line, node.start_mark.column, "a text with half of a surrogate pair is none")
        return text

    def _scalar(self, node: ScalarNode, place: Place) -> Json:
        try:
            value = SafeConstructor(loader=YAML(typ="safe", pure=True)).construct_object(node)
        except (YAMLError, ValueError) as error:  # `!!int x`, or more digits than Python reads
            self.report(place, f"`{node.value[:50]}` can't be read: {str(error)[:100]}")
            return 1  # of which nothing more will be said
        if isinstance(value, float) and not math.isfinite(value):
            self.report(place, f"`{node.value}` is no number that JSON knows")
            return 1
        return value

    def _mapping(self, node: MappingNode, place: Place) -> dict[str, Json]:
        value: dict[str, Json] = {}
        for key, each in node.value:
            name = self._text(key)
            first = self._marks.get((*place, name), (0, 0))
            self._marks[*place, name] = key.start_mark.line, key.start_mark.column
            if not isinstance(key, ScalarNode):
                self.report((*place, name), "a key must be text", place)
            elif key.tag == f"{_TAG}merge":
                self.report((*place, name), "`<<` is not known here; only whole values can be repeated, with & and *", place)
            elif name in value:
                self.report((*place, name), f"`{name}` stands here twice, first in line {first[0] + 1}", place)
            else:
                value[name] = self._value(each, (*place, name))
        return value


def _spelled(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _checked(document: _Document, data: dict[str, Json]) -> tuple[WorkflowSpec | None, set[Place]]:
    """Return the definition, None when it can't be understood; and the places where something harmless stands for what is wrong.

    The first wrong step ends its judgement. So what was found wrong is made harmless and the rest is judged again.
    """
    seen: set[Place] = set()
    mended: set[Place] = set()
    while True:
        try:
            return WorkflowSpec.model_validate(data), mended
        except ValidationError as error:
            # When no step is right, pydantic also says that there are too few.
            errors = [each for each in error.errors(include_url=False) if each["type"] != "too_short" or not each["input"]]
            places = _report(document, data, errors)
        defused = [_defuse(data, place) for place in places]
        if places & seen or not all(defused):
            return None, mended
        seen |= places
        mended |= {place for place in defused if place}


_NAMED: Final = re.compile(r"((?:steps|switch|finally|compensations)(?:\.\w+)*|input|output): (.*)", re.DOTALL)
_PARTS: Final = frozenset({"steps", "finally", "compensations"})


def _report(document: _Document, data: dict[str, Json], errors: list[ErrorDetails]) -> set[Place]:
    """Record the problems that pydantic found and return their places."""
    places: set[Place] = set()
    alternatives: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        place = _in_file(data, error["loc"], known=error["type"] != "missing")
        if error["type"] == "value_error":
            reason = str(error["ctx"]["error"])
            if named := _NAMED.fullmatch(reason):
                place, reason = _in_file(data, (*place, *named[1].split("."))), named[2]
            document.report(place, reason)
        elif error["type"] == "extra_forbidden":
            document.report(place, f"unknown key `{place[-1]}`{_nearest(error['loc'])}", place[:-1])
        elif error["type"] == "missing":
            document.report(place, f"`{place[-1]}` is missing", place[:-1])
        else:
            alternatives.setdefault(place, []).append(error)
        places.add(place)
    for place, each in alternatives.items():
        wanted = dict.fromkeys(_wanted(error) for error in each)
        document.report(place, f"must {' or '.join(wanted)}, not `{str(each[0]['input'])[:60]}`")
    return places


def _wanted(error: ErrorDetails) -> str:
    """Return what a value must be, as people say it."""
    match error["type"]:
        case "model_type":
            return "be a mapping"
        case "tuple_type":
            return "be a mapping by name" if error["loc"][-1] in {*_PARTS, "switch"} else "be a list"
        case _:
            return re.sub(r"^\w+ should ", "", error["msg"])


def _in_file(data: Json, place: Place, *, known: bool = False) -> Place:
    """Return how the file spells a place: by key what it has by key, by number what it lists.

    `known`: what isn't in the file is no part of the place, but says which of several types was tried.
    """
    found: list[str | int] = []
    value = data
    for index, part in enumerate(place):
        match value, part:
            case dict(), int() if part < len(value):
                key, value = list(value.items())[part]
            case dict(), str() if part in value:
                key, value = part, value[part]
            case list(), int() if part < len(value):
                key, value = part, value[part]
            case list(), str() if part in (names := [isinstance(each, dict) and each.get("name") for each in value]):
                key = names.index(part)
                value = value[key]
            case _:
                return tuple(found) if known else (*found, *place[index:])
        found.append(key)
    return tuple(found)


def _nearest(place: Place) -> str:
    """Return a hint at the key that may have been meant by an unknown one."""
    model: type[BaseModel] = WorkflowSpec
    for part in place[:-1]:
        if isinstance(part, str):
            model = _submodels(model)[part]
    own = _keys(model)
    if near := difflib.get_close_matches(str(place[-1]), own, 1):
        return f"; did you mean `{near[0]}`?"
    if below := [f"{key}.{place[-1]}" for key, each in _submodels(model).items() if place[-1] in _keys(each)]:
        return f"; did you mean `{below[0]}`?"
    return f"; there are {', '.join(f'`{key}`' for key in own)}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _submodels(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the models that a model's fields hold, themselves or in a tuple, by key."""
    found = {}
    for key, info in zip(_keys(model), model.model_fields.values(), strict=True):
        for each in _types(info.annotation):
            if isinstance(each, type) and issubclass(each, BaseModel):
                found[key] = each
    return found


def _types(annotation: object) -> Iterator[object]:
    """Yield a type and all that it is made of."""
    yield annotation
    for each in get_args(annotation):
        yield from _types(each)


def _defuse(data: dict[str, Json], place: Place) -> Place | None:
    """Replace what is wrong by something harmless and return its place; None if that would make other things wrong."""
    where = _step_around(place)
    if where is None:
        if not place or place[0] in _PARTS:
            return None
        data.pop(str(place[0]), None)
        data.setdefault("name", "unnamed")
        return place[:1]
    parts: Json = data
    for key in where[:-1]:
        parts = parts[key]
    kind, name = where[-2:]
    names = list(parts) if isinstance(parts, dict) else [isinstance(each, dict) and each.get("name") for each in parts]
    at = names.index(name) if isinstance(name, str) else name
    if place[len(where) :] == ("name",) or not isinstance(names[at], str):
        return None
    wrong = place[len(where)] if len(place) > len(where) else None
    if wrong in ("repeat", "for_each", "when") and isinstance(parts[name], dict):
        # What it does can still be judged.
        parts[name][wrong] = _harmless(wrong, parts[name][wrong])
        return (*where, wrong)
    if kind == "compensations":
        parts[name] = {"name": names[at], "tool": {"name": "unknown"}}
    elif kind == "switch":
        # A case without a condition would be the last one.
        parts[name] = {"name": names[at], "when": "true", "wait_for": {"signal": "unknown"}}
    else:
        # Its needs stay: steps after it may name what it needs. Of the output of a wait for a signal nothing is known.
        needs = parts[name].get("needs") if isinstance(parts[name], dict) else None
        kept = [need for need in needs if need in names[:at]] if isinstance(needs, list) else []
        parts[name] = {"name": names[at], "needs": kept, "wait_for": {"signal": "unknown"}}
    return where


def _harmless(key: str | int, was: Json) -> Json:
    """Return a condition that holds, or a loop whose steps see the same variables."""
    if key == "when":
        return "true"
    if key == "repeat":
        return {"until": "true", "at_most": 1}
    name = was.get("as") if isinstance(was, dict) else None
    return {"items": [], **({"as": name} if isinstance(name, str) and re.match(NAME, name) else {})}


def _step_around(place: Place) -> Place | None:
    """Return the place of the innermost step (or compensation) that a place lies in."""
    if len(place) < 2 or place[0] not in _PARTS:  # noqa: PLR2004 - a key and a name
        return None
    end = 2
    while len(place) > end + 1 and place[end] in ("steps", "switch") and place[0] != "compensations":
        end += 2
    return place[:end]
