"""What a workflow definition may compute: CEL expressions, values with expressions in them, and Jinja2 templates.

All three are pure and see two variables: `input` and `steps`. CEL's runtime keeps maps in random order, so two things are done
about it here: what an expression returns is always written as canonical JSON, and macros (`.map(…)`, `.exists(…)` and the like)
go over a map's keys in sorted order. Templates see data only, no Python methods.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import cel
import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

Json = Any
Scope = Mapping[str, Json]
VARIABLES: Final = ("input", "steps")
MAX_EXPRESSION_CHARS: Final = 4096
_LARGEST: Final = 1024 * 1024
MAX_DEPTH: Final = 200
"""How deep JSON may be nested: a fixed bound, since Python's own depends on how deep the caller stands."""


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
        raise EvaluationError(f"not a JSON value: {_clean(error)}") from error
    return text


def from_json(text: str) -> Json:
    """Return the value of a JSON text. Raises EvaluationError."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise EvaluationError(f"not JSON that can be read: it is nested more than {MAX_DEPTH} deep")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"not JSON: {_clean(error)}") from error


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


def _clean(error: Exception) -> str:
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
    return "".join(")" * closing.get(i, 0) + "ordered(" * opening.get(i, 0) + text for i, (_, text) in enumerate(tokens))


def _ordered(value: Json) -> Json:
    """Return a list as it is, and a map's keys sorted."""
    return sorted(value) if isinstance(value, dict) else value


_FUNCTIONS: Final = {"ordered": _ordered}


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


class Expression:
    """A compiled CEL expression. `steps`: the steps that it names."""

    __slots__ = ("_program", "_uses_order", "source", "steps")

    def __init__(self, source: str) -> None:
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
        for name in sorted(set(self._program.variables()) - set(VARIABLES) - _bound_names(source)):
            near = difflib.get_close_matches(name, VARIABLES, 1)
            hint = f"; did you mean `{near[0]}`?" if near else "; an expression sees `input` and `steps`"
            raise DefinitionError(f"`{source}`: `{name}` is not defined{hint}")

    def evaluate(self, scope: Scope) -> Json:
        """Return the value, made of what JSON knows. Raises EvaluationError."""
        try:
            context = cel.Context(variables=dict(scope), functions=_FUNCTIONS) if self._uses_order else dict(scope)
            return self._program.execute(context)
        except Exception as error:  # CEL's runtime raises ValueError, TypeError, RuntimeError, KeyError, ZeroDivisionError …
            reason = f"there is no {error}" if isinstance(error, KeyError) else _clean(error)
            raise EvaluationError(f"`{self.source}`: {reason}") from error

    def holds(self, scope: Scope) -> bool:
        """Return whether a condition is met. Raises EvaluationError, also for what is not true or false."""
        value = self.evaluate(scope)
        if not isinstance(value, bool):
            raise EvaluationError(f"`{self.source}` is neither true nor false but {to_json(value)[:100]}")
        return value


# --- Values with expressions in them ---


class Value:
    """A JSON value in which each string that starts with `=` is an expression (`==` writes a literal `=`)."""

    __slots__ = ("_constant", "_value", "steps")

    def __init__(self, value: Json) -> None:
        self._value = _compiled(value)
        found = list(_expressions(self._value))
        self.steps: frozenset[str] = frozenset().union(*(each.steps for each in found))
        self._constant = None if found else to_json(_filled(self._value, {}))

    def evaluate(self, scope: Scope) -> str:
        """Return the value as canonical JSON. Raises EvaluationError."""
        return self._constant if self._constant is not None else to_json(_filled(self._value, scope))


def _compiled(value: Json) -> Json:
    match value:
        case str() if value.startswith("=="):
            return value[1:]
        case str() if value.startswith("="):
            return Expression(value[1:].strip())
        case dict():
            return {key: _compiled(each) for key, each in value.items()}
        case list() | tuple():
            return [_compiled(each) for each in value]
        case _:
            return value


def _expressions(value: Json) -> Iterator[Expression]:
    match value:
        case Expression():
            yield value
        case dict():
            for each in value.values():
                yield from _expressions(each)
        case list():
            for each in value:
                yield from _expressions(each)


def _filled(value: Json, scope: Scope) -> Json:
    match value:
        case Expression():
            return value.evaluate(scope)
        case dict():
            return {key: _filled(each, scope) for key, each in value.items()}
        case list():
            return [_filled(each, scope) for each in value]
        case _:
            return value


# --- Templates ---


class _Sandbox(ImmutableSandboxedEnvironment):
    """Shows data, and nothing of Python: no methods (`input.items` is a key), no generators, nothing with an address."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return a map's item, a loop's variable, or a group's field."""
        if isinstance(obj, LoopContext) or attribute in getattr(obj, "_fields", ()):
            return super().getattr(obj, attribute)
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item of a map, a list or a text."""
        try:
            return obj[argument]
        except (LookupError, TypeError, AttributeError):
            return self.undefined(obj=obj, name=str(argument))

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply, but make nothing enormous: `'a' * 300000000` would be made before anybody could measure it."""
        sizes = [len(each) if isinstance(each, str | list | tuple) else abs(each) for each in (left, right) if _sized(each)]
        if operator == "**" or (len(sizes) == 2 and math.prod(sizes) > _LARGEST and not _numbers(left, right)):  # noqa: PLR2004
            raise EvaluationError(f"template: {operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple | int | float)


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _listed(function: Any) -> Any:
    """Return a filter that gives a list where it gave a generator."""

    @functools.wraps(function)
    def listed(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        return list(result) if isinstance(result, Iterator) else result

    return listed


def _shown(value: Any) -> Any:
    """Refuse to print what is no data."""
    if value is None or isinstance(value, str | int | float | list | dict | tuple | jinja2.Undefined):
        return value
    raise EvaluationError(f"template: a {type(value).__name__} can't be printed")


def _sandbox() -> _Sandbox:
    environment = _Sandbox(undefined=jinja2.StrictUndefined, autoescape=False, finalize=_shown)
    for chance in ("random", "pprint"):
        environment.filters.pop(chance)
    environment.filters |= {name: _listed(function) for name, function in environment.filters.items()}
    environment.filters["tojson"] = to_json
    environment.globals.clear()
    environment.globals["range"] = safe_range
    return environment


_SANDBOX: Final = _sandbox()


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled prompt. `steps`: the steps that it names."""

    source: str
    steps: frozenset[str] = field(init=False)
    _template: jinja2.Template = field(init=False)

    def __post_init__(self) -> None:
        try:
            tree = _SANDBOX.parse(self.source)
            object.__setattr__(self, "_template", _SANDBOX.from_string(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise DefinitionError(f"template, line {error.lineno}: {error.message}") from error
        object.__setattr__(self, "steps", frozenset(self._named(tree)))

    def _named(self, tree: nodes.Template) -> Iterator[str]:
        fixed = 0
        selectors: list[nodes.Getattr | nodes.Getitem] = [*tree.find_all(nodes.Getattr), *tree.find_all(nodes.Getitem)]
        for node in selectors:
            if isinstance(node.node, nodes.Name) and node.node.name == "steps":
                key = nodes.Const(node.attr) if isinstance(node, nodes.Getattr) else node.arg
                if not isinstance(key, nodes.Const):
                    raise DefinitionError("template: `steps` needs the name of a step behind it: steps.NAME")
                fixed += 1
                yield str(key.value)
        names = [node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"]
        if names.count("steps") != fixed:
            raise DefinitionError("template: `steps` needs the name of a step behind it: steps.NAME")

    def render(self, scope: Scope) -> str:
        """Return the text. Raises EvaluationError."""
        parts, size = [], 0
        try:
            for part in self._template.generate(scope):
                parts.append(part)
                size += len(part)
                if size > _LARGEST:
                    raise EvaluationError(f"template: its text is too large; the limit is {_LARGEST:,} characters")  # noqa: TRY301
            return "".join(parts)
        except EvaluationError:
            raise
        except Exception as error:  # a template can raise anything that Python's operators raise
            raise EvaluationError(f"template: {_clean(error)}") from error
