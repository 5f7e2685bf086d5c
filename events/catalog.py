"""Which type has which schema, and which schema has which id. A mismatch between the two is refused at import.

`schemas/<Name>.avsc` is the source of truth; a type may name another one as the schema of a field, and the published schema has
it written out at its first use. Ids are fingerprints of Avro's parsing canonical form: every installation derives the same ones,
with or without a registry. Every version that was ever released stands in `schemas/history/<Name>-<id>.avsc` (docs/upgrades.md).
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Final, get_args, get_origin

from fastavro.schema import parse_schema, to_parsing_canonical_form

from events import calls, commands, decisions, failure, results, snapshots, workers
from events.errors import CatalogError

JsonSchema = dict[str, Any]
NAMESPACE: Final = "foldflow"

RECORDS: Final[tuple[type[Any], ...]] = (
    commands.WorkflowRequest,
    commands.RunRequest,
    results.InboxMessage,
    decisions.Decision,
    calls.LlmCall,
    calls.ToolCall,
    calls.CancelCall,
    decisions.DeadLetter,
    decisions.DeadLetterSettled,
    commands.WorkflowRegistered,
    decisions.FinishedRun,
    decisions.FinishedRuns,
    decisions.SchemaPublished,
    snapshots.RunSnapshot,
    workers.WorkerReported,
)
"""What stands on a topic as a value of its own."""

INPUTS: Final[tuple[type[Any], ...]] = get_args(results.Input)
EFFECTS: Final[tuple[type[Any], ...]] = get_args(decisions.Effect)

_PARTS: Final = (
    *(decisions.UnreadableInput, failure.Failure, results.Usage, commands.Parent, commands.Origin, commands.RequestPlace),
    workers.CircuitReported,
)
_PARTS_OF_SNAPSHOTS: Final = (snapshots.StepSnapshot, snapshots.Listening, snapshots.ItemFailure)

TYPES: Final[dict[str, type[Any]]] = {
    each.__name__: each for each in (*RECORDS, *INPUTS, *EFFECTS, *_PARTS, *_PARTS_OF_SNAPSHOTS)
}
"""Every type that has a schema, by name."""

_PRIMITIVES: Final = {str: "string", int: ("int", "long"), bytes: "bytes", float: "double", bool: "boolean"}


def _definition(name: str) -> JsonSchema:
    path = resources.files("events") / "schemas" / f"{name}.avsc"
    try:
        return typing.cast("JsonSchema", json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise CatalogError(f"events/schemas/{name}.avsc is missing") from error


def _written_out(schema: Any, seen: set[str]) -> Any:
    """Return the schema with each named type defined at its first use and named afterwards."""
    if isinstance(schema, str) and schema in TYPES:
        if schema in seen:
            return f"{NAMESPACE}.{schema}"
        seen.add(schema)
        schema = _definition(schema)
        fields = [field | {"type": _written_out(field["type"], seen)} for field in schema["fields"]]
        return schema | {"fields": fields}
    if isinstance(schema, list):
        return [_written_out(branch, seen) for branch in schema]
    if isinstance(schema, dict) and "items" in schema:
        return schema | {"items": _written_out(schema["items"], seen)}
    return schema


def _without_logical_types(schema: Any) -> Any:
    """Return the schema as the codec reads it: times stay integers (milliseconds since the epoch)."""
    if isinstance(schema, list):
        return [_without_logical_types(branch) for branch in schema]
    if isinstance(schema, dict):
        return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    return schema


def _check(annotation: Any, schema: Any, where: str) -> None:
    """Compare a field's type hint with its Avro type."""
    if isinstance(schema, dict) and schema["type"] not in ("array", "map", "record"):
        schema = schema["type"]
    if isinstance(annotation, types.UnionType):
        names = [each if each is not types.NoneType else None for each in get_args(annotation)]
        avro = [None if branch == "null" else branch for branch in schema] if isinstance(schema, list) else []
        if len(names) != len(avro) or (None in names) != (None in avro):
            raise CatalogError(f"{where}: {annotation} against {schema}")
        hints, branches = [n for n in names if n], [b for b in avro if b]
        for hint, branch in zip(hints, branches, strict=True):
            _check(hint, branch, where)
        return
    origin = get_origin(annotation)
    fits = (
        (annotation in _PRIMITIVES and schema in _PRIMITIVES[annotation])
        or (dataclasses.is_dataclass(annotation) and schema == getattr(annotation, "__name__", ""))
        or (origin is tuple and isinstance(schema, dict) and schema["type"] == "array")
        or (origin is not None and "Mapping" in str(origin) and isinstance(schema, dict) and schema["type"] == "map")
    )
    if not fits:
        raise CatalogError(f"{where}: {annotation} against {schema}")
    if origin is tuple:
        item, items = get_args(annotation)[0], schema["items"]
        _check(item, items[0] if isinstance(items, list) and len(items) == 1 else items, where)


def check_type(kind: type[Any]) -> None:
    """Compare a dataclass with its schema: the same fields, in order, of the same types.

    Raises CatalogError with the field that differs.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    schema = _definition(kind.__name__)
    if names != [field["name"] for field in schema["fields"]]:
        raise CatalogError(f"{kind.__name__}: fields {names} against {[field['name'] for field in schema['fields']]}")
    for field in schema["fields"]:
        _check(hints[field["name"]], field["type"], f"{kind.__name__}.{field['name']}")


def fingerprint(schema: JsonSchema) -> int:
    """Return a schema's id: the first 31 bits of the SHA-256 of its parsing canonical form."""
    canonical = to_parsing_canonical_form(schema)
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:4]) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One record type: its class, its published schema, the codec's form of it, and its id."""

    kind: type[Any]
    schema: JsonSchema
    parsed: Any
    id: int


def _for_codec(schema: JsonSchema) -> Any:
    """Return a schema as fastavro reads and writes by it.

    Named types stand in full wherever they are used: fastavro collects the names of a schema anew for each record that it reads
    or writes, 2 µs for a decision's 55, unless there are none.
    """
    parsed_: Any = parse_schema(_without_logical_types(schema), expand=True)
    return {**parsed_, "__fastavro_parsed": True, "__named_schemas": {}}


def _entry(kind: type[Any]) -> Entry:
    schema = _written_out(kind.__name__, set())
    return Entry(kind, schema, _for_codec(schema), fingerprint(schema))


for _kind in TYPES.values():
    check_type(_kind)

ENTRIES: Final[dict[type[Any], Entry]] = {kind: _entry(kind) for kind in RECORDS}
BY_ID: Final[dict[int, Entry]] = {entry.id: entry for entry in ENTRIES.values()}


# --- Versions ---


@cache
def _released() -> dict[str, list[int]]:
    text = (resources.files("events") / "schemas" / "released.json").read_text("utf-8")
    return typing.cast("dict[str, list[int]]", json.loads(text))


def versions(kind: type[Any]) -> tuple[int, ...]:
    """Return the ids of all released versions of a record's schema, the oldest first, today's last."""
    today = ENTRIES[kind].id
    return (*(each for each in _released().get(kind.__name__, ()) if each != today), today)


@cache
def schema(schema_id: int) -> JsonSchema | None:
    """Return a current or formerly released schema as it is published, or None for an id that is not the catalogue's."""
    if schema_id in BY_ID:
        return BY_ID[schema_id].schema
    history = resources.files("events") / "schemas" / "history"
    if history.is_dir():
        for path in history.iterdir():
            if path.name.endswith(f"-{schema_id}.avsc"):
                return typing.cast("JsonSchema", json.loads(path.read_text("utf-8")))
    return None


@cache
def parsed(schema_id: int) -> Any | None:
    """Return the codec's form of a schema by the catalogue's id, or None for an id that is not the catalogue's."""
    if schema_id in BY_ID:
        return BY_ID[schema_id].parsed
    found = schema(schema_id)
    return None if found is None else _for_codec(found)


def writer_schema(schema_id: int) -> Any | None:
    """Return the codec's form of a current or formerly released schema, or None for an id that is not known."""
    return parsed(OWN_IDS.get(schema_id, schema_id))


# --- Ids of a registry ---

OWN_IDS: Final[dict[int, int]] = {}
"""A registry's ids of schemas, and the catalogue's; empty where no registry is configured."""
WRITTEN_IDS: Final[dict[type[Any], int]] = {kind: entry.id for kind, entry in ENTRIES.items()}
"""Which id stands in front of what is written."""


def take_ids(registered: Mapping[int, int]) -> None:
    """Read and write a registry's ids from now on: the catalogue's id by the registry's, of one schema the newest last.

    For the whole process. What was written with the catalogue's own ids, or older ones of a registry, stays readable.
    """
    for given, own in registered.items():
        OWN_IDS[given] = own
        if own in BY_ID:
            WRITTEN_IDS[BY_ID[own].kind] = given
