"""What a definition's expressions and templates name: which variable, how far into it, and what it is used for.

This is how it is known which output fed which argument: it is read off the definition, never guessed from values that look alike.
A name is followed as far as it is written with fixed keys: `steps.fetch.output.rows[0].price` whole; `input.map[steps.a.output]`
names both `input.map` and `steps.a.output`. What a macro or a loop of a template binds is part of what it goes over.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

import jinja2
from jinja2 import nodes

from events.frozen import frozen
from streams.workflow import cel_syntax as cel
from streams.workflow.expressions import Expression, Json
from streams.workflow.spec import Compensation, Step

CONDITIONS: Final = ("when", "repeat.until")
"""Uses that decide whether something happens, and put nothing into it."""
_MACROS: Final = frozenset({"map", "filter", "all", "exists", "exists_one"})
_WORD: Final = re.compile(r"[A-Za-z_]\w*")
_READER: Final = jinja2.Environment(autoescape=False)  # noqa: S701 - it reads a prompt's tree and renders nothing


@frozen
class Reference:
    """One name in a definition. `into`: what it is used for (`arguments.rows`, `prompt`, `when` …); `root`: the variable.

    `step`: of `steps` the one that is named; `path`: the keys behind that, as they are written.
    """

    into: str
    root: str
    step: str | None
    path: tuple[str, ...]

    @property
    def of(self) -> str:
        """The part of the variable that is named: `output.rows`, `question`; "" for all of it."""
        return ".".join(self.path).replace(".[", "[")

    @property
    def is_condition(self) -> bool:
        """Whether it only decides if something happens."""
        return self.into in CONDITIONS


def of_step(step: Step | Compensation) -> tuple[Reference, ...]:
    """Return what a step's definition names, each use once, but not what its own steps name."""
    found: list[Reference] = []
    if isinstance(step, Step):
        found += _expression("when", step.when)
        if step.for_each:
            found += of_value("for_each.items", step.for_each.items)
        if step.repeat:
            found += _expression("repeat.until", step.repeat.until)
        if step.llm:
            found += [*_template("prompt", step.llm.prompt), *_template("system", step.llm.system)]
        if step.wait_for:
            found += of_value("wait_for.correlation", step.wait_for.correlation)
            found += of_value("wait_for.otherwise", step.wait_for.otherwise)
        if step.approval:
            found += [*_template("message", step.approval.message), *of_value("show", step.approval.show)]
        for name in ("transform", "sleep", "sleep_until", "output"):
            found += of_value(name, getattr(step, name))
    if step.tool:
        found += of_value("arguments", step.tool.arguments)
    if step.run:
        found += of_value("run.input", step.run.input)
    return tuple(dict.fromkeys(found))


def of_value(into: str, value: Json) -> Iterator[Reference]:
    """Yield what the expressions in a value name."""
    match value:
        case str() if value.startswith("=") and not value.startswith("=="):
            yield from _expression(into, value[1:].strip())
        case dict():
            for key, each in value.items():
                yield from of_value(f"{into}.{key}", each)
        case list() | tuple():
            for index, each in enumerate(value):
                yield from of_value(f"{into}[{index}]", each)
        case _:
            pass


def _expression(into: str, source: str | None) -> Iterator[Reference]:
    if source is None:
        return
    try:
        yield from _references(into, _chains(cel.parse(source), frozenset()))
    except cel.SyntaxUnknownError:  # CEL all the same: then it is known what is named, not how far into it
        compiled = Expression(source, _WORD.findall(source))
        yield from (Reference(into, name, None, ()) for name in sorted(compiled.names - {"steps"}))
        yield from (Reference(into, "steps", step, ()) for step in sorted(compiled.steps))


def _template(into: str, source: str | None) -> Iterator[Reference]:
    if source is not None:
        yield from _references(into, _printed(_READER.parse(source), frozenset()))


def _references(into: str, chains: Iterable[tuple[str, ...]]) -> Iterator[Reference]:
    for root, *path in chains:
        if root == "steps":
            yield Reference(into, root, path[0], tuple(path[1:]))
        else:
            yield Reference(into, root, None, tuple(path))


# --- CEL ---


def _chains(node: cel.Node, bound: frozenset[str]) -> Iterator[tuple[str, ...]]:
    """Yield the names in an expression, each with the fixed keys behind it. `bound`: what macros around it bind."""
    match node:
        case cel.Name() | cel.Select() | cel.Index():
            path, inside = _unwound(node)
            if path and path[0] not in bound:
                yield path
            for each in inside:
                yield from _chains(each, bound)
        case cel.Call(function=function, target=target, arguments=arguments):
            if target is not None:
                yield from _chains(target, bound)
            is_macro = target is not None and function in _MACROS and arguments and isinstance(arguments[0], cel.Name)
            inner = bound | {arguments[0].source} if is_macro else bound
            for each in arguments[1:] if is_macro else arguments:
                yield from _chains(each, inner)
        case cel.Operation(operands=operands):
            for each in operands:
                yield from _chains(each, bound)
        case cel.Items(items=items):
            for each in items:
                yield from _chains(each, bound)
        case cel.Entries(entries=entries):
            for key, value in entries:
                yield from _chains(key, bound)
                yield from _chains(value, bound)
        case _:
            pass


def _unwound(node: cel.Node) -> tuple[tuple[str, ...], list[cel.Node]]:
    """Return a chain of keys from its variable on (empty if there is none), and the expressions that stand inside of it."""
    keys: list[str | None] = []
    inside: list[cel.Node] = []
    while True:
        match node:
            case cel.Select(of=of, key=key):
                keys.append(key)
                node = of
            case cel.Index(of=of, at=cel.Literal(value=value)) if value is not None:
                keys.append(value if isinstance(value, str) else f"[{value}]")
                node = of
            case cel.Index(of=of, at=at):
                keys.append(None)
                inside.append(at)
                node = of
            case cel.Name(source=name):
                return (name, *_fixed(reversed(keys))), inside
            case _:
                return (), [*inside, node]


def _fixed(keys: Iterable[str | None]) -> Iterator[str]:
    """Yield the keys up to the first that is computed."""
    for key in keys:
        if key is None:
            return
        yield key


# --- Templates ---


def _printed(node: nodes.Node, bound: frozenset[str]) -> Iterator[tuple[str, ...]]:
    """Yield the names in a template, each with the fixed keys behind it. `bound`: what loops and `set` around it bind."""
    match node:
        case nodes.Name() | nodes.Getattr() | nodes.Getitem():
            path, inside = _selected(node)
            if path and path[0] not in bound and path[0] not in ("loop", "range"):
                yield path
            for each in inside:
                yield from _printed(each, bound)
        case nodes.For():
            yield from _printed(node.iter, bound)
            inner = bound | _targets(node.target)
            for part in (*([node.test] if node.test else []), *node.body):
                yield from _printed(part, inner)
            for part in node.else_:
                yield from _printed(part, bound)
        case _:
            set_here = bound
            for child in node.iter_child_nodes():
                if isinstance(child, nodes.Assign):
                    yield from _printed(child.node, set_here)
                    set_here |= _targets(child.target)
                else:
                    yield from _printed(child, set_here)


def _targets(target: nodes.Node) -> frozenset[str]:
    names = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return frozenset(name.name for name in names)


def _selected(node: nodes.Node) -> tuple[tuple[str, ...], list[nodes.Node]]:
    """Return a chain of keys from its variable on (empty if there is none), and what stands inside of it."""
    keys: list[str | None] = []
    inside: list[nodes.Node] = []
    while True:
        match node:
            case nodes.Getattr(node=of, attr=key):
                keys.append(key)
                node = of
            case nodes.Getitem(node=of, arg=nodes.Const(value=str() | int() as value)):
                keys.append(value if isinstance(value, str) else f"[{value}]")
                node = of
            case nodes.Getitem(node=of, arg=at):
                keys.append(None)
                inside.append(at)
                node = of
            case nodes.Name(name=name):
                return (name, *_fixed(reversed(keys))), inside
            case _:
                return (), [*inside, node]


__all__ = ["CONDITIONS", "Reference", "of_step", "of_value"]
