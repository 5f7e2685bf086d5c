"""Finds what can never work in a CEL expression, by the shapes of what it sees.

An operation is wrong only if it fails for each kind of value that its operands can have. So what is open stays unchallenged. So
does what may not be there but is asked for: what `has(…)` or `'key' in …` tests can be used in the same expression.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from streams.workflow import cel_syntax as cel
from streams.workflow import shapes
from streams.workflow.shapes import ANY, BOOL, INT, NUMBERS, OTHER, TEXT, Shape, either

Report = Callable[[str], None]
_COMPARED: Final = ({"int", "double"}, {"text"}, {"bool"}, {"other"})
"""Kinds that can be smaller or larger than each other."""
_ARITHMETIC: Final = {
    "+": ("int", "double", "text", "list", "other"),
    "-": ("int", "double", "other"),
    "*": ("int", "double", "other"),
    "/": ("int", "double", "other"),
    "%": ("int", "other"),
}
"""Kinds of which an operator joins two; never two different ones, but what `other` stands for isn't looked into."""
_CONVERTED: Final = NUMBERS | {"text"}
_TEXT_TESTS: Final = frozenset({"contains", "startsWith", "endsWith", "matches"})
_RESULTS: Final = {
    **dict.fromkeys(_TEXT_TESTS, BOOL),
    **dict.fromkeys(("size", "int"), INT),
    **dict.fromkeys(("bytes", "timestamp", "duration", "uint"), OTHER),
    **dict.fromkeys(("getFullYear", "getMonth", "getDayOfYear", "getDayOfMonth", "getDate", "getDayOfWeek"), INT),
    **dict.fromkeys(("getHours", "getMinutes", "getSeconds", "getMilliseconds"), INT),
    **dict.fromkeys(("type", "dyn"), ANY),
    "string": TEXT,
    "double": shapes.plain("double"),
}
"""The functions that there are, and what they give."""
_TAKES: Final = {"size": shapes.plain("text", "list", "map", "other"), "string": shapes.plain("text", "int", "double", "other")}
MACROS: Final = frozenset({"map", "filter", "all", "exists", "exists_one"})


def infer(source: str, variables: Mapping[str, Shape], report: Report) -> Shape:
    """Return the shape of an expression's value, and report what can't work in it."""
    try:
        tree = cel.parse(source)
        return _Inference(report, frozenset(_asked_for(tree))).shape(tree, variables)
    except (cel.SyntaxUnknownError, RecursionError):  # what is nested too deep for this is left to the run
        return ANY


def _asked_for(node: cel.Node) -> Iterator[tuple[str, str]]:
    """Yield what an expression asks for before it is used: the source of a map, and a key."""
    match node:
        case cel.Call(function="has", target=None, arguments=(cel.Select(of=of, key=key),)):
            yield of.source, key
        case cel.Operation(operator="in", operands=(cel.Literal(value=str(key)), of)):
            yield of.source, key
    for child in _children(node):
        yield from _asked_for(child)


def _children(node: cel.Node) -> tuple[cel.Node, ...]:
    match node:
        case cel.Select(of=of):
            return (of,)
        case cel.Index(of=of, at=at):
            return (of, at)
        case cel.Call(target=target, arguments=arguments):
            return (*((target,) if target else ()), *arguments)
        case cel.Operation(operands=operands):
            return operands
        case cel.Items(items=items):
            return items
        case cel.Entries(entries=entries):
            return tuple(each for entry in entries for each in entry)
        case _:
            return ()


class _Inference:
    """Goes through one expression."""

    def __init__(self, report: Report, asked_for: frozenset[tuple[str, str]]) -> None:
        self._report, self._asked_for = report, asked_for

    def shape(self, node: cel.Node, seen: Mapping[str, Shape]) -> Shape:
        """Return a part's shape; `seen`: the variables."""
        match node:
            case cel.Literal(kind="text", value=str(value)):
                return shapes.text(value)
            case cel.Literal(kind=kind):
                return shapes.plain(kind) if kind in shapes.KINDS else OTHER
            case cel.Name(source=name):
                return seen.get(name, ANY)
            case cel.Select(of=of, key=key):
                return self._member(node, of, self.shape(of, seen), key)
            case cel.Index(of=of, at=at):
                return self._index(node, self.shape(of, seen), self.shape(at, seen))
            case cel.Call():
                return self._call(node, seen)
            case cel.Operation(operator="?", operands=(condition, then, otherwise)):
                self._must_be(condition, self.shape(condition, seen), BOOL)
                return either([self.shape(then, seen), self.shape(otherwise, seen)])
            case cel.Operation(operator=operator, operands=(operand,)):
                found = self.shape(operand, seen)
                self._must_be(operand, found, BOOL if operator == "!" else shapes.plain(*NUMBERS, "other"))
                return BOOL if operator == "!" else ANY if "other" in found.kinds else Shape(found.kinds & NUMBERS)
            case cel.Operation(operands=(left, right)):
                return self._binary(node, (left, self.shape(left, seen)), (right, self.shape(right, seen)))
            case cel.Items(items=items):
                return shapes.listing(either([self.shape(each, seen) for each in items]) if items else shapes.NOTHING)
            case cel.Entries(entries=entries):
                held = [(key, self.shape(key, seen), self.shape(value, seen)) for key, value in entries]
                if all(isinstance(key, cel.Literal) and isinstance(key.value, str) for key, _, _ in held):
                    return shapes.mapping({str(key.value): shape for key, _, shape in held if isinstance(key, cel.Literal)})
                return Shape(frozenset({"map"}), rest=lambda: ANY)
            case _:
                return ANY

    def _member(self, node: cel.Node, of: cel.Node, whole: Shape, key: str) -> Shape:
        if "map" in whole.kinds:
            held = whole.member(key)
            if held is None and (of.source, key) not in self._asked_for:
                self._report(f"`{of.source}` has no `{key}`{shapes.nearest(key, whole.properties)}")
            return held or ANY
        if whole.kinds and "other" not in whole.kinds:
            hint = "; name one of its items first, as in `[0]`" if whole.kinds & {"list"} else ""
            self._report(f"`{node.source}`: `{of.source}` is {whole}, which has no `{key}`{hint}")
        return ANY

    def _index(self, node: cel.Index, whole: Shape, at: Shape) -> Shape:
        if isinstance(node.at, cel.Literal) and isinstance(node.at.value, str) and "list" not in whole.kinds:
            return self._member(node, node.of, whole, node.at.value)
        if not whole.kinds & {"list", "map", "other"}:
            if whole.kinds:
                self._report(f"`{node.source}`: `{node.of.source}` is {whole}, which has no items")
            return ANY
        found: list[Shape] = []
        if "list" in whole.kinds and at.kinds & {"int", "other"}:
            found.append(whole.item())
        if "map" in whole.kinds and at.kinds & {"text", "int", "bool", "other"}:
            found.append(ANY)
        if not found and "other" not in whole.kinds and at.kinds and whole.kinds:
            self._report(f"`{node.source}`: {whole} has no items by {at}")
        return either(found) if found else ANY

    def _call(self, node: cel.Call, seen: Mapping[str, Shape]) -> Shape:
        if node.function in MACROS and node.target is not None:
            return self._macro(node, node.target, seen)
        if node.function == "has" and node.target is None:
            for argument in node.arguments:
                self.shape(argument, seen)
            return BOOL
        given = [(each, self.shape(each, seen)) for each in (*((node.target,) if node.target else ()), *node.arguments)]
        if node.function not in _RESULTS:
            hint = shapes.nearest(node.function, (*_RESULTS, *sorted(MACROS)))
            self._report(f"`{node.source}`: there is no function `{node.function}`{hint}")
            return ANY
        if node.function in _TEXT_TESTS:
            for part, shape in given:
                self._must_be(part, shape, shapes.plain("text", "other"))
        if node.function in _TAKES and given:
            self._must_be(*given[0], _TAKES[node.function])
        return _RESULTS[node.function]

    def _macro(self, node: cel.Call, target: cel.Node, seen: Mapping[str, Shape]) -> Shape:
        whole = self.shape(target, seen)
        self._must_be(target, whole, shapes.plain("list", "map"), f"{node.function}(…) goes over")
        match node.arguments:
            case (cel.Name(source=name), *bodies) if bodies:
                found = [whole.item()] if "list" in whole.kinds else []
                item = either([*found, *([TEXT] if "map" in whole.kinds else [])]) if whole.kinds & {"list", "map"} else ANY
                inner = {**seen, name: item}
                values = [self.shape(body, inner) for body in bodies]
            case _:
                return ANY
        if node.function != "map" or len(bodies) > 1:
            self._must_be(bodies[0], values[0], BOOL)
        if node.function in ("map", "filter"):
            return shapes.listing(values[-1] if node.function == "map" else item)
        return BOOL

    def _binary(self, node: cel.Operation, left: tuple[cel.Node, Shape], right: tuple[cel.Node, Shape]) -> Shape:
        (one, a), (other, b) = left, right
        operator = node.operator
        if operator in ("&&", "||"):
            self._must_be(one, a, BOOL)
            self._must_be(other, b, BOOL)
            return BOOL
        if operator in ("==", "!="):
            self._equal(node, a, b)
            return BOOL
        if operator == "in":
            self._must_be(other, b, shapes.plain("list", "map"))
            if isinstance(other, cel.Items):
                for item in other.items:
                    self._equal(cel.Operation(f"{one.source} == {item.source}", "==", (one, item)), a, self.shape(item, {}))
            return BOOL
        if not a.kinds or not b.kinds:
            return ANY
        if operator in _ARITHMETIC:
            kinds = frozenset(kind for kind in _ARITHMETIC[operator] if kind in a.kinds and kind in b.kinds)
            if not kinds and "other" not in a.kinds | b.kinds:
                hint = "; `string(…)`, `int(…)` and `double(…)` convert" if a.kinds | b.kinds <= _CONVERTED else ""
                # The library appends a map's keys to a list, in any order: no two runs would agree.
                self._report(f"`{node.source}`: {a} {operator} {b} never works{hint}")
            if not kinds or "other" in a.kinds | b.kinds:
                return ANY
            return Shape(kinds, items=either([a, b]).items)
        if not any(a.kinds & kinds and b.kinds & kinds for kinds in _COMPARED):
            self._report(f"`{node.source}`: {a} is never smaller or larger than {b}")
        return BOOL

    def _equal(self, node: cel.Operation, a: Shape, b: Shape) -> None:
        """Report two that are never equal."""
        one, other = node.operands
        numbers = bool(a.kinds & NUMBERS and b.kinds & NUMBERS)
        if not a.kinds or not b.kinds or "other" in a.kinds | b.kinds or {"null"} in (a.kinds, b.kinds):
            return
        if not a.kinds & b.kinds and not numbers:
            self._report(f"`{node.source}`: {a} never equals {b}")
        elif a.kinds & b.kinds != {"text"} or numbers or a.values is None or b.values is None:
            return
        elif not a.values & b.values:
            if isinstance(one, cel.Literal):
                one, other, a, b = other, one, b, a
            if isinstance(other, cel.Literal):
                self._report(f"`{one.source}` is never {other.source}{shapes.nearest(str(other.value), sorted(a.values or ()))}")
            else:
                self._report(f"`{node.source}`: they are never equal")

    def _must_be(self, node: cel.Node, shape: Shape, wanted: Shape, what: str = "") -> None:
        if shape.kinds and not shape.kinds & wanted.kinds:
            needed = Shape(wanted.kinds - {"other"})
            self._report(f"`{node.source}` is {shape}, " + (f"but {what} {needed}" if what else f"not {needed}"))
