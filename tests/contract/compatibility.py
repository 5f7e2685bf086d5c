"""Avro's rules of schema resolution, as far as our schemas go: what a reader's schema can't read of a writer's, and where.

Confluent's registry calls it BACKWARD, against all versions BACKWARD_TRANSITIVE. Schemas are written out: each named type is
defined at its first use. Aliases are no way out: who reads the topics with other tools may not follow them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_PROMOTED: Mapping[str, tuple[str, ...]] = {
    "int": ("long", "float", "double"),
    "long": ("float", "double"),
    "float": ("double",),
    "string": ("bytes",),
    "bytes": ("string",),
}
"""Into which other types a reader may read a writer's."""


def problems(writer: Any, reader: Any) -> list[str]:
    """Return why records of the writer's schema can't all be read with the reader's; empty: they can."""
    writers, readers = named(writer), named(reader)
    done: set[str] = set()

    def compare(then: Any, now: Any, where: str) -> Iterator[str]:
        then, now = _defined(then, writers), _defined(now, readers)
        if isinstance(then, list):
            for branch in then:
                yield from compare(branch, now, where)
        elif isinstance(now, list):
            fitting = [branch for branch in now if kind(_defined(branch, readers)) == kind(then)]
            fitting = fitting or [branch for branch in now if _fits(then, _defined(branch, readers))]
            if fitting:
                yield from compare(then, fitting[0], where)
            else:
                yield f"{where}: {kind(then)} is no branch of the union any more"
        elif not _fits(then, now):
            yield f"{where}: was {kind(then)}, is {kind(now)}"
        elif _type(then) == "record":
            if then["name"] not in done:
                done.add(then["name"])
                yield from _fields(then, now, compare)
        elif _type(then) == "array":
            yield from compare(then["items"], now["items"], f"{where}[]")
        elif _type(then) == "map":
            yield from compare(then["values"], now["values"], f"{where}{{}}")

    return list(compare(writer, reader, kind(writer)))


def _fields(then: Any, now: Any, compare: Any) -> Iterator[str]:
    before, after = ({field["name"]: field for field in each["fields"]} for each in (then, now))
    for name, field in after.items():
        where = f"{then['name']}.{name}"
        if name in before:
            yield from compare(before[name]["type"], field["type"], where)
        elif "default" not in field:
            yield f"{where}: is new and has no default"
    # Avro's rules would drop what a reader doesn't have. Ours is the whole history: nothing of it may become unreadable.
    yield from (f"{then['name']}.{name}: is gone" for name in before if name not in after)


def named(schema: Any) -> dict[str, Any]:
    """Return the records that are defined in a schema, by full name."""
    found: dict[str, Any] = {}
    if isinstance(schema, list):
        for branch in schema:
            found |= named(branch)
    elif isinstance(schema, dict):
        if schema["type"] == "record":
            found[f"{schema.get('namespace', 'foldflow')}.{schema['name']}"] = schema
            for field in schema["fields"]:
                found |= named(field["type"])
        for inner in ("items", "values"):
            found |= named(schema.get(inner, "null"))
    return found


def kind(schema: Any) -> str:
    """Return what a schema is called in a message: its record's name, or its type."""
    return str(schema["name"]) if _type(schema) == "record" else _type(schema)


def _defined(schema: Any, names: Mapping[str, Any]) -> Any:
    return names.get(schema, schema) if isinstance(schema, str) else schema


def _type(schema: Any) -> str:
    if isinstance(schema, list):
        return "union"
    return str(schema["type"] if isinstance(schema, dict) else schema)


def _fits(then: Any, now: Any) -> bool:
    """Say whether a reader may read one type as the other, whatever is inside."""
    if _type(then) == "record":
        return _type(now) == "record" and then["name"] == now["name"]
    return _type(then) == _type(now) or _type(now) in _PROMOTED.get(_type(then), ())
