"""Workflow definitions in YAML files, and what is wrong with one: all of it at once, each with its line.

YAML is read as far as JSON goes: text, numbers, booleans, null, lists and mappings. A date is text, other tags are
refused. Aliases work, within bounds that keep a small file from growing into a large definition.
"""

import difflib
import importlib.resources
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from streams.workflow.expressions import Json, clean_text
from streams.workflow.spec import WorkflowSpec

Place = tuple[str | int, ...]
"""Where in a definition: `("steps", "fetch", "needs", 0)`."""
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


def load(path: Path) -> WorkflowSpec:
    """Return the definition in a file. Raises DefinitionFileError, also for a file that can't be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DefinitionFileError([Problem(str(path), 1, 1, "", f"can't be read: {error.strerror}")]) from error
    return parse(content, str(path))


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


def parse(content: bytes, file: str) -> WorkflowSpec:
    """Return the definition in a YAML text. Raises DefinitionFileError; `file` is what its problems call the text."""
    document = _Document(file)
    spec = _checked(document, document.read(content))
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


def _checked(document: _Document, data: dict[str, Json]) -> WorkflowSpec | None:
    """Return the definition, or None when it is wrong.

    The first wrong step ends its judgement. So what was found wrong is made harmless and the rest is judged again.
    """
    seen: set[Place] = set()
    while True:
        try:
            return WorkflowSpec.model_validate(data)
        except ValidationError as error:
            # When no step is right, pydantic also says that there are too few.
            errors = [each for each in error.errors(include_url=False) if each["type"] != "too_short" or not each["input"]]
            places = {_report(document, data, each) for each in errors}
        defused = [_defuse(data, place) for place in places]
        if places & seen or not all(defused):
            return None
        seen |= places


_NAMED: Final = re.compile(r"(steps\.\w+(?:\.\w+)*|input|output): (.*)", re.DOTALL)


def _report(document: _Document, data: dict[str, Json], error: ErrorDetails) -> Place:
    """Record a problem that pydantic found and return its place."""
    place: Place = error["loc"]
    if isinstance(steps := data.get("steps"), dict) and len(place) > 1 and isinstance(place[1], int):
        place = ("steps", list(steps)[place[1]], *place[2:])
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    if not place and (named := _NAMED.fullmatch(reason)):
        place, reason = tuple(named[1].split(".")), named[2]
        if isinstance(steps, list) and place[0] == "steps":
            index = next(i for i, step in enumerate(steps) if step["name"] == place[1])
            place = ("steps", index, *place[2:])
    match error["type"]:
        case "value_error":
            document.report(place, reason)
        case "extra_forbidden":
            document.report(place, f"unknown key `{place[-1]}`{_nearest(error['loc'])}", place[:-1])
        case "missing":
            document.report(place, f"`{place[-1]}` is missing", place[:-1])
        case _:
            rest = re.sub(r"^\w+ should ", "must ", error["msg"])
            document.report(place, f"{rest}, not `{str(error['input'])[:60]}`")
    return place


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
        for each in (info.annotation, *get_args(info.annotation)):
            if isinstance(each, type) and issubclass(each, BaseModel):
                found[key] = each
    return found


def _defuse(data: dict[str, Json], place: Place) -> bool:
    """Replace what is wrong by something harmless; False if that would make other things wrong."""
    match place:
        case ("steps", name, *rest) if rest != ["name"]:
            steps = data["steps"]
            names = list(steps) if isinstance(steps, dict) else [isinstance(each, dict) and each.get("name") for each in steps]
            at = names.index(name) if isinstance(name, str) else name
            needs = steps[name].get("needs") if isinstance(steps[name], dict) else None
            # Its needs stay: steps after it may name what it needs.
            kept = [need for need in needs if need in names[:at]] if isinstance(needs, list) else []
            steps[name] = {"name": names[at], "needs": kept, "transform": 0}
            return isinstance(names[at], str)
        case (str(key), *_) if key != "steps":
            data.pop(key, None)
            data.setdefault("name", "unnamed")
            return True
        case _:
            return False
