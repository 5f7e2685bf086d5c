"""Finds what can never work in a prompt, by the shapes of what it sees.

A key that isn't there is an error in a template, unless it is asked for: by `is defined`, `| default(…)` or `'key' in …`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Final

import jinja2
from jinja2 import nodes

from streams.workflow import shapes
from streams.workflow.check_expressions import Report
from streams.workflow.shapes import ANY, BOOL, INT, NUMBERS, TEXT, Shape, either

_READER: Final = jinja2.Environment(autoescape=False)  # noqa: S701 - it reads a prompt's tree and renders nothing
_COUNTS: Final = frozenset({"count", "length", "wordcount"})
_TEXTS: Final = frozenset({"capitalize", "join", "lower", "replace", "string", "title", "tojson", "trim", "truncate", "upper"})
_SAME: Final = frozenset({"list", "reverse", "sort", "unique"})


def check(source: str, variables: Mapping[str, Shape], report: Report) -> None:
    """Report what can't work in a template that compiles."""
    tree = _READER.parse(source)
    bound = {name for loop in tree.find_all(nodes.For) for name in _targets(loop.target)}
    assigned = [name.name for name in tree.find_all(nodes.Name) if name.ctx != "load" and name not in bound]
    # What a template sets itself may be anything, wherever it is named.
    seen = {**variables, **dict.fromkeys((*assigned, "loop"), ANY)}
    with contextlib.suppress(RecursionError):  # what is nested too deep for this is left to the run
        _Inference(report, frozenset(_asked_for(tree))).go(tree, seen)


def _targets(target: nodes.Node) -> list[nodes.Name]:
    return [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))


def _asked_for(tree: nodes.Node) -> Iterator[str]:
    """Yield the source of what a template asks for before it uses it."""
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined"):
            yield _source(test.node)
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name in ("default", "d") and filtered.node is not None:
            yield _source(filtered.node)
    for compared in tree.find_all(nodes.Compare):
        for operand in compared.ops:
            if operand.op in ("in", "notin") and isinstance(compared.expr, nodes.Const):
                yield f"{_source(operand.expr)}.{compared.expr.value}"


def _source(node: nodes.Node) -> str:
    """Return how a chain of names is written; what is no such chain is named by its kind."""
    match node:
        case nodes.Name():
            return node.name
        case nodes.Getattr():
            return f"{_source(node.node)}.{node.attr}"
        case nodes.Getitem(arg=nodes.Const(value=key)):
            return f"{_source(node.node)}.{key}" if isinstance(key, str) else f"{_source(node.node)}[{key}]"
        case nodes.Getitem():
            return f"{_source(node.node)}[…]"
        case _:
            return "(…)"


class _Inference:
    """Goes through one template."""

    def __init__(self, report: Report, asked_for: frozenset[str]) -> None:
        self._report, self._asked_for = report, asked_for

    def go(self, node: nodes.Node, seen: Mapping[str, Shape]) -> None:
        """Go through statements; `seen`: the variables."""
        if isinstance(node, nodes.Expr):
            self.shape(node, seen)
        elif isinstance(node, nodes.For):
            self._loop(node, seen)
        else:
            for child in node.iter_child_nodes():
                self.go(child, seen)

    def _loop(self, node: nodes.For, seen: Mapping[str, Shape]) -> None:
        whole = self.shape(node.iter, seen)
        if whole.kinds and whole.kinds <= {"bool", "null"} | NUMBERS:
            self._say(node, f"`{_source(node.iter)}` is {whole}, which can't be gone through")
        found = [whole.item()] if "list" in whole.kinds else []
        item = either([*found, TEXT]) if found and whole.kinds & {"map", "text"} else found[0] if found else TEXT
        # A recursive loop goes through other lists than this one.
        single = isinstance(node.target, nodes.Name) and whole.kinds & {"list", "map", "text"} and not node.recursive
        inner = {**seen, **{name.name: item if single else ANY for name in _targets(node.target)}}
        for part in (*([node.test] if node.test else []), *node.body):
            self.go(part, inner)
        for part in node.else_:
            self.go(part, seen)

    def shape(self, node: nodes.Node, seen: Mapping[str, Shape]) -> Shape:
        """Return an expression's shape."""
        match node:
            case nodes.Const():
                return shapes.of_value(node.value)
            case nodes.Name():
                return seen.get(node.name, ANY)
            case nodes.Getattr():
                return self._member(node, self.shape(node.node, seen), node.attr)
            case nodes.Getitem():
                return self._index(node, self.shape(node.node, seen), self.shape(node.arg, seen))
            case nodes.Filter():
                return self._filtered(node, seen)
            case nodes.CondExpr():
                self.shape(node.test, seen)
                return either([self.shape(node.expr1, seen), self.shape(node.expr2, seen) if node.expr2 else ANY])
            case nodes.List():
                return shapes.listing(either([self.shape(each, seen) for each in node.items]) if node.items else shapes.NOTHING)
            case _:
                for child in node.iter_child_nodes():
                    self.go(child, seen)
                if isinstance(node, nodes.Compare | nodes.Not | nodes.Test):
                    return BOOL
                return TEXT if isinstance(node, nodes.Concat | nodes.TemplateData) else ANY

    def _filtered(self, node: nodes.Filter, seen: Mapping[str, Shape]) -> Shape:
        whole = self.shape(node.node, seen) if node.node is not None else ANY
        for part in (*node.args, *node.kwargs):
            self.go(part, seen)
        if node.name in _COUNTS or node.name == "int":
            return INT
        if node.name in _TEXTS:
            return TEXT
        # `first` of a text is a text, of a map a key: only lists are looked into.
        if node.name in ("first", "last") and whole.kinds <= {"list", "null"}:
            return whole.item()
        return whole if node.name in _SAME and whole.kinds <= {"list", "null"} else ANY

    def _index(self, node: nodes.Getitem, whole: Shape, at: Shape) -> Shape:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._member(node, whole, node.arg.value)
        if isinstance(node.arg, nodes.Slice):
            return whole if whole.kinds <= {"list", "null"} else ANY
        if whole.kinds and not whole.kinds & {"list", "map", "text", "other"}:
            self._say(node, f"`{_source(node)}`: `{_source(node.node)}` is {whole}, which has no items")
        if whole.kinds <= {"list", "null"} and at.kinds and not at.kinds & {"int", "double", "bool"}:
            self._say(node, f"`{_source(node)}`: a list has no items by {at}")
        return whole.item() if whole.kinds <= {"list", "null"} else ANY

    def _member(self, node: nodes.Getattr | nodes.Getitem, whole: Shape, key: str) -> Shape:
        held = whole.member(key) if "map" in whole.kinds else None
        if held is not None or not whole.kinds or "other" in whole.kinds or _source(node) in self._asked_for:
            return held or ANY
        of = _source(node.node)
        if "map" in whole.kinds:
            self._say(node, f"`{of}` has no `{key}`{shapes.nearest(key, whole.properties)}")
        else:
            hint = "; name one of its items, as in `[0]`, or go through it" if "list" in whole.kinds else ""
            self._say(node, f"`{_source(node)}`: `{of}` is {whole}, which has no `{key}`{hint}")
        return ANY

    def _say(self, node: nodes.Node, message: str) -> None:
        self._report(message if node.lineno == 1 else f"line {node.lineno}: {message}")
