"""What a workflow definition may compute: CEL expressions, and values with expressions in them.

Both are pure and see `input`, `steps`, and inside of loops a few variables more. CEL's runtime keeps maps in random order, so two
things are done about it here: what an expression returns is always written as canonical JSON, and macros (`.map(…)`, `.exists(…)`
and the like) go over a map's keys in sorted order. What a value only passes on (`=steps.fetch.output`) is never looked into: its
text goes on as it is, which is quick, and leaves a payload that lies in the object store where it is.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import cel

Json = Any
VARIABLES: Final = ("input", "steps")
MAX_EXPRESSION_CHARS: Final = 4096
MAX_DEPTH: Final = 200
"""How deep JSON may be nested: a fixed bound, since Python's own depends on how deep the caller stands."""


class Scope(dict[str, Json]):
    """What an expression sees: variables by name. `texts`: JSON texts of outputs that are only passed on, by step."""

    __slots__ = ("texts",)

    def __init__(self, variables: Mapping[str, Json], texts: Mapping[str, str] | None = None) -> None:
        super().__init__(variables)
        self.texts: Mapping[str, str] = texts or {}


class DefinitionError(ValueError):
    """An expression or a template is wrong in itself: the workflow's author mends it."""


class EvaluationError(Exception):
    """An expression or a template failed on these values."""


def to_json(value: Json) -> str:
    """Return canonical JSON: sorted keys, no white space, no NaN; readable unless it holds lone surrogates.

    Raises EvaluationError for what JSON can't say.
    """
    try:
        text = _READABLE.encode(value)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                text = _ASCII.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise EvaluationError(f"not a JSON value: {cleaned(error)}") from error
    return text


def from_json(text: str) -> Json:
    """Return the value of a JSON text. Raises EvaluationError."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise EvaluationError(f"not JSON that can be read: it is nested more than {MAX_DEPTH} deep")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"not JSON: {cleaned(error)}") from error


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _depth(text: str) -> int:
    """Return how deep brackets are nested outside strings."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif bracket in "]}":
            depth -= 1
    return deepest


_BRACKETS: Final = re.compile(r'"(?:\\.|[^"\\])*"|[][{}]', re.DOTALL)
# Made once: json.loads and json.dumps make new ones at each call that sets an option.
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_READABLE: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
_ASCII: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)


def cleaned(error: Exception) -> str:
    """Return an error's text, short and fit for UTF-8."""
    return clean_text(str(error))[:500]


def clean_text(text: str) -> str:
    """Return a text with question marks for lone surrogates, which UTF-8 can't say."""
    return text.encode("utf-8", "replace").decode()


# --- CEL ---

_TOKEN: Final = re.compile(
    r"""(?P<string>[rRbB]{0,2}(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>[0-9][0-9A-Za-z_]*(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?)?)|(?P<space>\s+|//[^\n]*)|(?P<mark>.)""",
    re.DOTALL | re.VERBOSE,
)
_OPEN: Final = {")": "(", "]": "[", "}": "{"}
_MACROS: Final = frozenset({"map", "filter", "all", "exists", "exists_one"})


def _tokens(source: str) -> list[tuple[str, str]]:
    return [(str(match.lastgroup), match.group()) for match in _TOKEN.finditer(source)]


def _code(tokens: list[tuple[str, str]]) -> list[int]:
    """Return the indices of the tokens that are not white space."""
    return [i for i, (kind, _) in enumerate(tokens) if kind != "space"]


def _receiver_start(tokens: list[tuple[str, str]], code: list[int], dot: int) -> int:
    """Return the place in `code` where the operand of the dot at place `dot` begins: a primary and its selectors."""
    at = dot - 1
    while True:
        text = tokens[code[at]][1]
        if text in _OPEN:
            depth = 0
            while at >= 0:
                text = tokens[code[at]][1]
                depth += (text in _OPEN) - (text in _OPEN.values())
                if depth == 0:
                    break
                at -= 1
            # A bracket may belong to what stands before it: a call, an index, another selector.
            if text in "([" and at > 0 and (tokens[code[at - 1]][0] == "name" or tokens[code[at - 1]][1] in _OPEN):
                at -= 1
                continue
        if at > 1 and tokens[code[at - 1]][1] == ".":
            at -= 2
            continue
        if at > 0 and tokens[code[at - 1]][1] == ".":
            at -= 1
        return at


def _in_order(source: str) -> str:
    """Return the expression with what its macros go over wrapped in `ordered(…)`."""
    tokens = _tokens(source)
    code = _code(tokens)
    opening: dict[int, int] = {}
    closing: dict[int, int] = {}
    for place in range(1, len(code) - 1):
        word = tokens[code[place]][1]
        if word in _MACROS and tokens[code[place - 1]][1] == "." and tokens[code[place + 1]][1] == "(":
            start = code[_receiver_start(tokens, code, place - 1)]
            opening[start] = opening.get(start, 0) + 1
            closing[code[place - 1]] = closing.get(code[place - 1], 0) + 1
    adding, added = _additions(tokens, code)
    return "".join(
        ")" * closing.get(i, 0) + "addend(" * adding.count(i) + "ordered(" * opening.get(i, 0) + text + ")" * added.count(i)
        for i, (_, text) in enumerate(tokens)
    )


_LOOSER: Final = frozenset({"+", "-", "<", ">", "=", "!", "&", "|", "?", ":", ",", ")", "]", "}"})


def _additions(tokens: list[tuple[str, str]], code: list[int]) -> tuple[list[int], list[int]]:
    """Return the first and the last tokens of what is added to something that may be a list."""
    first, last = [], []
    for place in range(1, len(code) - 1):
        kind, text = tokens[code[place - 1]]
        if tokens[code[place]][1] != "+" or kind in ("string", "number") or not (kind == "name" or text in _OPEN):
            continue
        at, depth = place + 1, 0
        while at < len(code):
            kind, text = tokens[code[at]]
            if depth == 0 and (text in _LOOSER or text == "in") and (text not in "+-!" or at > place + 1):
                break
            depth += (text in _OPEN.values()) - (text in _OPEN)
            at += 1
        if at > place + 2 or tokens[code[place + 1]][0] not in ("string", "number"):
            first.append(code[place + 1])
            last.append(code[at - 1])
    return first, last


def _ordered(value: Json) -> Json:
    """Return a list as it is, and a map's keys sorted."""
    return sorted(value) if isinstance(value, dict) else value


def _addend(value: Json) -> Json:
    """Refuse a map: the library would add its keys to a list, in random order."""
    if isinstance(value, dict):
        raise TypeError("a map can't be added to something")
    return value


_FUNCTIONS: Final = {"ordered": _ordered, "addend": _addend}


def _steps_named(source: str) -> set[str]:
    """Return the steps that an expression names. Raises DefinitionError for `steps` without a fixed name."""
    tokens = _tokens(source)
    code = _code(tokens)
    words = [tokens[i] for i in code] + [("mark", "")] * 3
    found = set()
    for i, (kind, text) in enumerate(words[:-3]):
        if kind != "name" or text != "steps" or (i and words[i - 1][1] == "."):
            continue
        (_, mark), (kind_after, after), (_, close) = words[i + 1 : i + 4]
        if mark == "." and kind_after == "name":
            found.add(after)
        elif mark == "[" and kind_after == "string" and close == "]":
            found.add(after[1:-1])
        else:
            raise DefinitionError("`steps` needs the name of a step behind it: steps.NAME")
    return found


def _bound_names(source: str) -> set[str]:
    """Return the names that the macros of an expression bind."""
    words = [text for kind, text in _tokens(source) if kind != "space"]
    return {
        words[i + 2]
        for i, word in enumerate(words[:-3])
        if word in _MACROS and words[i - 1] == "." and words[i + 1] == "(" and words[i + 3] == ","
    }


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Return what to say about a variable that isn't there."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    seen = " and ".join([", ".join(f"`{each}`" for each in known[:-1]), f"`{known[-1]}`"])
    return f"`{name}` is not defined" + (f"; did you mean `{near[0]}`?" if near else f"; an expression sees {seen}")


_PATH: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")
_ASK_CEL: Final = object()
_CEL_INTEGERS: Final = range(-(2**63), 2**64)


def _found(scope: Scope, path: tuple[str, ...]) -> Json:
    """Return the plain value that stands at a path, as CEL would; `_ASK_CEL` where there is none, or it isn't that simple.

    Most expressions are no more than that, and CEL would convert all of the variables to its own types first.
    """
    value: Json = scope
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return _ASK_CEL
        value = value[name]
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if value in _CEL_INTEGERS else _ASK_CEL
    return value if isinstance(value, str) and value.isascii() else _ASK_CEL


class Expression:
    """A compiled CEL expression that may use `variables`. `steps`, `names`: the steps and variables that it does use."""

    __slots__ = ("_path", "_program", "_uses_order", "names", "source", "steps", "whole")

    def __init__(self, source: str, variables: Iterable[str] = VARIABLES) -> None:
        self.source = source
        if len(source) > MAX_EXPRESSION_CHARS:  # the parser recurses: what is enormous would end the process
            raise DefinitionError(f"an expression has {len(source):,} characters; the limit is {MAX_EXPRESSION_CHARS:,}")
        if clean_text(source) != source:
            raise DefinitionError(f"`{clean_text(source)}` is no CEL expression: it is not valid Unicode")
        ordered = _in_order(source)
        self._uses_order = ordered != source
        try:
            self._program = cel.compile(ordered)
        except ValueError as error:
            # Behind the first line the library draws the expression with an arrow below.
            reason = str(error).removeprefix(f"Failed to parse expression '{ordered}': ").splitlines()[0]
            raise DefinitionError(f"`{source}` is no CEL expression: {reason}") from error
        self.steps = frozenset(_steps_named(source))
        self.names = frozenset(set(self._program.variables()) - _bound_names(source)) | ({"steps"} if self.steps else frozenset())
        for name in sorted(self.names - set(variables)):
            raise DefinitionError(f"`{source}`: {unknown_name(name, variables)}")
        self.whole: frozenset[str] = frozenset()
        self._path = tuple(source.split(".")) if _PATH.fullmatch(source) else None

    def evaluate(self, scope: Scope) -> Json:
        """Return the value, made of what JSON knows. Raises EvaluationError."""
        if self._path is not None:
            value = _found(scope, self._path)
            if value is not _ASK_CEL:
                return value
        try:
            context = cel.Context(variables=dict(scope), functions=_FUNCTIONS) if self._uses_order else dict(scope)
            return self._program.execute(context)
        except Exception as error:  # CEL's runtime raises ValueError, TypeError, RuntimeError, KeyError, ZeroDivisionError …
            reason = f"there is no {error}" if isinstance(error, KeyError) else cleaned(error)
            raise EvaluationError(f"`{self.source}`: {reason}") from error

    def holds(self, scope: Scope) -> bool:
        """Return whether a condition is met. Raises EvaluationError, also for what is not true or false."""
        value = self.evaluate(scope)
        if not isinstance(value, bool):
            raise EvaluationError(f"`{self.source}` is neither true nor false but {to_json(value)[:100]}")
        return value


# --- Values with expressions in them ---

_WHOLE: Final = re.compile(r"=\s*steps\.([A-Za-z_][A-Za-z0-9_]*)\.output\s*")


class Whole:
    """A step's whole output, passed on as it is."""

    __slots__ = ("step",)

    def __init__(self, step: str) -> None:
        self.step = step


class Value:
    """A JSON value in which each string that starts with `=` is an expression (`==` writes a literal `=`).

    `steps`: the steps that it looks into; `whole`: those whose output it only passes on; `names`: the variables that it uses.
    """

    __slots__ = ("_constant", "_texts", "_value", "names", "steps", "whole")

    def __init__(self, value: Json, variables: Iterable[str] = VARIABLES) -> None:
        self._take(_compiled(value, tuple(variables)))

    def _take(self, compiled: Json) -> None:
        self._value = compiled
        found = list(_expressions(compiled))
        expressions = [each for each in found if isinstance(each, Expression)]
        self.whole = frozenset(each.step for each in found if isinstance(each, Whole))
        self.steps: frozenset[str] = frozenset().union(*(each.steps for each in expressions))
        self.names: frozenset[str] = frozenset().union(*(each.names for each in expressions))
        self._texts = _joined(_texts(compiled))
        self._constant = None if found else to_json(compiled)

    def parts(self) -> "dict[str, Value]":
        """Return the items of a value that is a mapping, each a value of its own."""
        parts = {key: object.__new__(Value) for key in self._value}
        for key, part in parts.items():
            part._take(self._value[key])  # noqa: SLF001 - made here, by this class
        return parts

    def evaluate(self, scope: Scope) -> str:
        """Return the value as canonical JSON. Raises EvaluationError."""
        if self._constant is not None:
            return self._constant
        return "".join([each if isinstance(each, str) else _text(each, scope) for each in self._texts])


def _compiled(value: Json, variables: tuple[str, ...]) -> Json:
    match value:
        case str() if value.startswith("=="):
            return value[1:]
        case str() if whole := _WHOLE.fullmatch(value):
            return Whole(whole[1])
        case str() if value.startswith("="):
            return Expression(value[1:].strip(), variables)
        case dict():
            return {key: _compiled(each, variables) for key, each in value.items()}
        case list() | tuple():
            return [_compiled(each, variables) for each in value]
        case _:
            return value


def _expressions(value: Json) -> "Iterator[Expression | Whole]":
    match value:
        case Expression() | Whole():
            yield value
        case dict():
            for each in value.values():
                yield from _expressions(each)
        case list():
            for each in value:
                yield from _expressions(each)


def _texts(value: Json) -> "Iterator[str | Expression | Whole]":
    """Yield the pieces of canonical JSON that the value is made of: texts, and what they are computed by."""
    match value:
        case Whole() | Expression():
            yield value
        case dict():
            for number, key in enumerate(sorted(value)):
                yield f"{',' if number else '{'}{to_json(key)}:"
                yield from _texts(value[key])
            yield "}" if value else "{}"
        case list():
            for number, each in enumerate(value):
                yield "," if number else "["
                yield from _texts(each)
            yield "]" if value else "[]"
        case _:
            yield to_json(value)


def _joined(pieces: "Iterable[str | Expression | Whole]") -> "list[str | Expression | Whole]":
    """Return the pieces with texts that stand together made one."""
    found: list[str | Expression | Whole] = []
    for each in pieces:
        if isinstance(each, str) and found and isinstance(last := found[-1], str):
            found[-1] = last + each
        else:
            found.append(each)
    return found


def _text(value: "Expression | Whole", scope: Scope) -> str:
    """Return the canonical JSON of what is computed; of what is only passed on, the text as it is."""
    return scope.texts.get(value.step, "null") if isinstance(value, Whole) else to_json(value.evaluate(scope))
