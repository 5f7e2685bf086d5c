"""Prompts: Jinja2 templates in its immutable sandbox. They see data only, no Python methods, and nothing that has an address."""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import field
from typing import Any, Final

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from events.frozen import frozen
from streams.workflow.expressions import VARIABLES, DefinitionError, EvaluationError, Scope, cleaned, to_json, unknown_name

_LARGEST: Final = 1024 * 1024


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


@frozen
class Template:
    """A compiled prompt. `variables`: those that it may use; `steps`, `names`: the steps and variables that it does use."""

    source: str
    variables: Iterable[str] = VARIABLES
    steps: frozenset[str] = field(init=False)
    names: frozenset[str] = field(init=False)
    _template: jinja2.Template = field(init=False)

    def __post_init__(self) -> None:
        try:
            tree = _SANDBOX.parse(self.source)
            object.__setattr__(self, "_template", _SANDBOX.from_string(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise DefinitionError(f"template, line {error.lineno}: {error.message}") from error
        names = meta.find_undeclared_variables(tree) - {"range"}
        for name in sorted(names - set(self.variables)):
            raise DefinitionError(f"template: {unknown_name(name, self.variables)}")
        object.__setattr__(self, "names", frozenset(names))
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
            raise EvaluationError(f"template: {cleaned(error)}") from error

    @property
    def whole(self) -> frozenset[str]:
        """Steps whose output is passed on as it is: none, a template looks into them."""
        return frozenset()
