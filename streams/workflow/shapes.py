"""Shapes: what is known of a value before there is one, from a JSON Schema or from how it is written.

A shape errs on the side of allowing: what isn't known (a schema's keyword that isn't read here) may be anything. So what a shape
rules out never works, and a definition that works is never called wrong because of it.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from typing import Any, Final

from events.frozen import frozen
from streams.workflow.expressions import Json

NUMBERS: Final = frozenset({"int", "double"})
"""JSON doesn't tell them apart (1.0 is an integer for JSON Schema), CEL does."""
KINDS: Final = frozenset({"null", "bool", "text", "list", "map", "other"}) | NUMBERS
"""What a value can be; `other` is what JSON doesn't know: times, durations, bytes."""
_JSON: Final = KINDS - {"other"}
_WORDS: Final = {"bool": "true or false", "text": "text", "list": "a list", "map": "a mapping", "other": "no JSON value"}
_TYPES: Final = {
    "null": frozenset({"null"}),
    "boolean": frozenset({"bool"}),
    "integer": NUMBERS,
    "number": NUMBERS,
    "string": frozenset({"text"}),
    "array": frozenset({"list"}),
    "object": frozenset({"map"}),
}
_OPENING: Final = frozenset(
    {"patternProperties", "unevaluatedProperties", "dependentSchemas", "if", "then", "else", "$dynamicRef", "not"}
)
"""Keywords that say more about a map's keys than is read here."""
_DEEPEST: Final = 20
"""How deep two shapes are compared."""
_SHOWN: Final = 10
"""How many names a message lists."""

Later = Callable[[], "Shape"]
"""A part's shape, found when it is asked for: schemas may contain themselves."""


@frozen
class Shape:
    """What a value can be: one of `kinds`.

    A text is one of `values`, None: any. A map has the keys `properties`, those `required` for sure, and others that hold `rest`,
    None: no others are declared; `strict`: there really are none. A list holds `items`.
    """

    kinds: frozenset[str]
    values: frozenset[str] | None = None
    properties: Mapping[str, Later] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    rest: Later | None = None
    strict: bool = False
    items: Later | None = None

    def member(self, key: str) -> "Shape | None":
        """Return what a map holds at a key, None if it has no such key."""
        found = self.properties.get(key, self.rest)
        return found() if found else None

    def item(self) -> "Shape":
        """Return what a list holds."""
        return self.items() if self.items else ANY

    def __str__(self) -> str:
        said = [words for kind, words in _WORDS.items() if kind in self.kinds]
        said += ["a number"] if self.kinds & NUMBERS else []
        return " or ".join(said) or "null"


def plain(*kinds: str) -> Shape:
    """Return the shape of something without parts."""
    return Shape(frozenset(kinds))


def record(**properties: Shape) -> Shape:
    """Return the shape of a map with exactly these keys."""
    return Shape(frozenset({"map"}), properties=_now(properties), required=frozenset(properties), strict=True)


def mapping(properties: Mapping[str, Shape]) -> Shape:
    """Return the shape of a map with exactly these keys, which may be any texts."""
    return Shape(frozenset({"map"}), properties=_now(properties), required=frozenset(properties), strict=True)


def listing(item: Shape) -> Shape:
    """Return the shape of a list."""
    return Shape(frozenset({"list"}), items=lambda: item)


def text(value: str) -> Shape:
    """Return the shape of a certain text."""
    return Shape(frozenset({"text"}), frozenset({value}))


def one_of(values: Iterable[str]) -> Shape:
    """Return the shape of a text that is one of these."""
    return Shape(frozenset({"text"}), frozenset(values))


def _now(properties: Mapping[str, Shape]) -> dict[str, Later]:
    return {key: lambda shape=shape: shape for key, shape in properties.items()}  # type: ignore[misc]


ANY: Final[Shape] = Shape(KINDS, rest=lambda: ANY, items=lambda: ANY)
NOTHING: Final = Shape(frozenset())
"""Of no value at all: what an empty list holds."""
NULL: Final = plain("null")
BOOL: Final = plain("bool")
INT: Final = plain("int")
TEXT: Final = plain("text")
NUMBER: Final = plain(*NUMBERS)
OTHER: Final = plain("other")


def either(shapes: Iterable[Shape]) -> Shape:
    """Return the shape of a value that has one of these shapes."""
    found = list(shapes)
    if any(shape is ANY for shape in found):
        return ANY
    if len(found) == 1:
        return found[0]
    texts = [shape for shape in found if "text" in shape.kinds]
    maps = [shape for shape in found if "map" in shape.kinds]
    lists = [shape for shape in found if "list" in shape.kinds]
    known = [shape.values for shape in texts if shape.values is not None]
    keys = {key: None for shape in maps for key in shape.properties}
    rests = [shape.rest for shape in maps if shape.rest]
    held = {key: [each for shape in maps if (each := shape.properties.get(key, shape.rest))] for key in keys}
    return Shape(
        kinds=frozenset[str]().union(*(shape.kinds for shape in found)),
        values=frozenset[str]().union(*known) if texts and len(known) == len(texts) else None,
        properties={key: _either_later(parts) for key, parts in held.items()},
        required=frozenset.intersection(*(shape.required for shape in maps)) if maps else frozenset(),
        rest=_either_later(rests) if rests else None,
        strict=all(shape.strict for shape in maps),
        items=_either_later([shape.item for shape in lists]) if lists else None,
    )


def _either_later(parts: list[Later]) -> Later:
    return parts[0] if len(parts) == 1 else lambda: either([part() for part in parts])


def of_value(value: Json) -> Shape:
    """Return the shape of a JSON value."""
    match value:
        case None:
            return NULL
        case bool():
            return BOOL
        case int():
            return INT
        case float():
            return plain("double")
        case str():
            return text(value)
        case dict():
            return mapping({key: of_value(each) for key, each in value.items()})
        case list() | tuple():
            return listing(either([of_value(each) for each in value]) if value else NOTHING)
        case _:
            return ANY


def of_schema(schema: Json) -> Shape:
    """Return the shape of what fits a JSON Schema."""
    return _Schema(schema).shape(schema)


class _Schema:
    """Reads a schema. Each part that is referred to is read once, so that a small schema never takes long."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._referred: dict[str, Shape] = {}

    def shape(self, schema: Json) -> Shape:
        """Return the shape of what fits a part of the schema."""
        if schema is False:
            return NOTHING
        if not isinstance(schema, Mapping) or not schema:
            return ANY
        parts: list[Shape] = []
        if isinstance(reference := schema.get("$ref"), str):
            parts.append(self._reference(reference))
        parts += [self.shape(each) for each in schema.get("allOf", ())]
        parts += [either([self.shape(each) for each in schema[key]]) for key in ("anyOf", "oneOf") if schema.get(key)]
        if "const" in schema:
            parts.append(_constant(schema["const"]))
        elif isinstance(schema.get("enum"), list):
            parts.append(either([_constant(each) for each in schema["enum"]]))
        shape = self._own(schema)
        for part in parts:
            shape = _both(shape, part)
        return shape

    def _reference(self, reference: str) -> Shape:
        if reference not in self._referred:
            self._referred[reference] = ANY  # for a schema that stands for itself
            self._referred[reference] = self.shape(_referred(self._root, reference))
        return self._referred[reference]

    def _later(self, schema: Json) -> Later:
        return lambda: self.shape(schema)

    def _own(self, schema: Mapping[str, Any]) -> Shape:
        """Return what a schema says itself."""
        named = schema.get("type", [])
        kinds = frozenset[str]().union(*(_TYPES.get(each, _JSON) for each in ([named] if isinstance(named, str) else named)))
        declared: Mapping[str, Any] = schema.get("properties", {})
        required = frozenset(schema.get("required", ()))
        more = schema.get("additionalProperties")
        open_ = bool(_OPENING & set(schema))
        # Without `additionalProperties` a schema allows further keys; but who declares some means those.
        closed = not open_ and (more is False or (more is None and bool(declared)))
        rest: Later | None = None if closed else self._later(more if isinstance(more, Mapping) else {})
        properties: dict[str, Later] = {key: self._later(each) for key, each in declared.items()}
        properties |= {key: rest or (lambda: ANY) for key in sorted(required - set(declared))}
        listed = [*schema.get("prefixItems", ()), schema.get("items", {})]
        return Shape(
            kinds=kinds or _JSON,
            properties=properties,
            required=required,
            rest=rest,
            strict=more is False and not open_,
            items=_either_later([self._later(each) for each in listed if each is not False] or [lambda: NOTHING]),
        )


def _constant(value: Json) -> Shape:
    """Return the shape of a schema's constant; 1 and 1.0 are the same for it."""
    return NUMBER if isinstance(value, int | float) and not isinstance(value, bool) else of_value(value)


def _both(one: Shape, other: Shape) -> Shape:
    """Return the shape of a value that has both shapes."""
    if one is ANY or other is ANY:
        return other if one is ANY else one
    known = [shape.values for shape in (one, other) if shape.values is not None]
    keys = {**dict.fromkeys(one.properties), **dict.fromkeys(other.properties)}
    held = {key: [shape.properties[key] for shape in (one, other) if key in shape.properties] for key in keys}
    strict = one.strict or other.strict
    # Each may declare a part of the keys, and means with it: not only those.
    closed = [shape.rest is None for shape in (one, other) if shape.properties or shape.rest is None]
    return Shape(
        kinds=one.kinds & other.kinds,
        values=frozenset.intersection(*known) if known else None,
        properties={key: _both_later(parts) for key, parts in held.items()},
        required=one.required | other.required,
        rest=None if strict or (closed and all(closed)) else (lambda: ANY),
        strict=strict,
        items=_both_later([shape.items for shape in (one, other) if shape.items]) if one.items or other.items else None,
    )


def _both_later(parts: list[Later]) -> Later:
    return parts[0] if len(parts) == 1 else lambda: _both(parts[0](), parts[1]())


def _referred(root: Json, reference: str) -> Json:
    """Return what a reference leads to; what is anything if it doesn't lead into the same schema by its keys."""
    if reference == "#":
        return root
    found = root
    for part in reference.split("/")[1:] if reference.startswith("#/") else [None]:
        key = (part or "").replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and part is not None and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return {}
    return found


def misfits(given: Shape, wanted: Shape, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield where a value of one shape can't have another one, and why."""
    if not given.kinds or not wanted.kinds or len(place) > _DEEPEST:
        return
    if not given.kinds & wanted.kinds:
        yield place, f"is {given}, not {wanted}"
    elif given.kinds == {"text"} and given.values and wanted.values is not None and not given.values & wanted.values:
        yield place, f"is {_quoted(given.values)}, not one of {_quoted(wanted.values)}"
    elif given.kinds == {"map"}:
        missing = wanted.required - set(given.properties) if given.strict and given.rest is None else frozenset()
        for key in sorted(missing):
            yield place, f"`{key}` is missing"
        for key, each in given.properties.items():
            held = wanted.member(key)
            if held is not None:
                yield from misfits(each(), held, (*place, key))
            elif wanted.strict:
                yield (*place, key), f"unknown key `{key}`{nearest(key, wanted.properties)}"
    elif given.kinds == {"list"} and given.items and wanted.items:
        yield from misfits(given.items(), wanted.items(), (*place, 0))


def _quoted(values: Iterable[str]) -> str:
    listed = sorted(values)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(f"'{each[:40]}'" for each in listed[:_SHOWN]) + more


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the name that may have been meant by one that isn't there."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, 1):
        return f"; did you mean `{near[0]}`?"
    listed = ", ".join(f"`{each}`" for each in known[:_SHOWN])
    return f"; there {'is' if len(known) == 1 else 'are'} {listed}{' …' if len(known) > _SHOWN else ''}" if known else ""
