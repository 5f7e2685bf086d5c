"""Bytes to events and back: Confluent framing (0x00, schema id as big-endian int32), then Avro binary.

An old writer's schema is resolved to today's by Avro's rules. What can't be read raises NotDecodableError, nothing else.
"""

import struct
from collections.abc import Callable
from io import BytesIO
from operator import attrgetter
from typing import Any, Final, TypeVar

from fastavro import schemaless_reader, schemaless_writer

from events.catalog import ENTRIES, NAMESPACE, TYPES, WRITTEN_IDS, writer_schema
from events.errors import NotDecodableError, UnknownSchemaError

Event = TypeVar("Event")
_Datum = dict[str, Any]

FRAME: Final = struct.Struct(">bI")
_MAGIC: Final = 0


def _to_datum(event: Any) -> _Datum:
    """Return the record as fastavro writes it: unions of records as (name, record)."""
    return _WRITERS[type(event)](event)


def _writer(kind: type[Any]) -> Callable[[Any], _Datum]:
    names, nested = tuple(kind.__dataclass_fields__), _NESTED.get(kind, ())
    one_by_one: Callable[[Any], tuple[Any, ...]] = lambda event: tuple(getattr(event, name) for name in names)  # noqa: E731
    values = attrgetter(*names) if len(names) > 1 else one_by_one

    def write(event: Any) -> _Datum:
        datum = dict(zip(names, values(event), strict=True))
        for name in nested:
            value = datum[name]
            writer = _WRITERS.get(type(value))
            if writer is not None:
                datum[name] = (_FULL_NAMES[type(value)], writer(value)) if (kind, name) in _UNIONS else writer(value)
            elif type(value) is tuple:
                datum[name] = [_item(item) for item in value]
        return datum

    return write


def _item(item: Any) -> Any:
    """Return an array's item: a record as (name, record), anything else as it is."""
    writer = _WRITERS.get(type(item))
    return item if writer is None else (_FULL_NAMES[type(item)], writer(item))


def _from_datum(kind: type[Any], datum: _Datum) -> Any:
    """Return the dataclass; nested records come as (full name, record)."""
    for name in _NESTED[kind]:
        value = datum[name]
        if type(value) is tuple:
            datum[name] = _from_datum(_BY_FULL_NAME[value[0]], value[1])
        elif type(value) is dict:
            datum[name] = _from_datum(_SINGLE[kind, name], value)
        elif type(value) is list:
            datum[name] = tuple(_from_datum(_BY_FULL_NAME[item[0]], item[1]) if type(item) is tuple else item for item in value)
    return kind(**datum)


_FULL_NAMES: Final = {kind: f"{NAMESPACE}.{name}" for name, kind in TYPES.items()}
_BY_FULL_NAME: Final = {full: kind for kind, full in _FULL_NAMES.items()}
_UNIONS: Final[set[tuple[type[Any], str]]] = set()
_SINGLE: Final[dict[tuple[type[Any], str], type[Any]]] = {}
_NESTED: Final[dict[type[Any], tuple[str, ...]]] = {}


def _collect(schema: Any) -> None:
    """Note which fields hold records, alone, in a union or in an array."""
    if isinstance(schema, list):
        for branch in schema:
            _collect(branch)
    elif isinstance(schema, dict) and schema.get("type") == "array":
        _collect(schema["items"])
    elif isinstance(schema, dict) and schema.get("type") == "record":
        kind = _BY_FULL_NAME[schema["name"]]
        nested = []
        for field in schema["fields"]:
            of = field["type"]
            names = [b.get("name") if isinstance(b, dict) else b for b in of] if isinstance(of, list) else []
            single = of.get("name") if isinstance(of, dict) else str(of)
            if any(name in _BY_FULL_NAME for name in names):
                _UNIONS.add((kind, field["name"]))
                nested.append(field["name"])
            elif single in _BY_FULL_NAME:
                _SINGLE[kind, field["name"]] = _BY_FULL_NAME[single]
                nested.append(field["name"])
            elif isinstance(of, dict) and of.get("type") == "array":
                nested.append(field["name"])
            _collect(of)
        _NESTED[kind] = tuple(nested)


for _entry in ENTRIES.values():
    _collect(_entry.parsed)
_WRITERS: Final[dict[type[Any], Callable[[Any], _Datum]]] = {kind: _writer(kind) for kind in TYPES.values()}


def body(event: Any) -> bytes:
    """Return the event's Avro body, without the framing."""
    out = BytesIO()
    schemaless_writer(out, ENTRIES[type(event)].parsed, _to_datum(event))
    return out.getvalue()


def framed(kind: type[Any], avro: bytes) -> bytes:
    """Return an Avro body with Confluent's framing in front."""
    return FRAME.pack(_MAGIC, WRITTEN_IDS[kind]) + avro


def encode(event: Any) -> bytes:
    """Return the event as a Kafka value."""
    return framed(type(event), body(event))


def unframed(value: bytes) -> bytes:
    """Return the Avro body of a framed value."""
    return value[FRAME.size :]


def kind_of(value: bytes | None) -> type[Any] | None:
    """Return the type that a Kafka value says it holds, by its schema's id, today's or an old one; None: it says none we know."""
    if value is None or len(value) <= FRAME.size or value[0] != _MAGIC:
        return None
    schema = writer_schema(FRAME.unpack_from(value)[1])
    return None if schema is None else _BY_FULL_NAME.get(schema["name"])


def is_current(value: bytes, kind: type[Any]) -> bool:
    """Return whether a well-framed value is in today's schema of a type, by whichever id."""
    return writer_schema(FRAME.unpack_from(value)[1]) is ENTRIES[kind].parsed


def unknown_schema(value: bytes | None) -> int | None:
    """Return the schema id of a well-framed value in a schema that isn't known here; None for any other bytes."""
    if value is None or len(value) <= FRAME.size or value[0] != _MAGIC:
        return None
    schema_id = int(FRAME.unpack_from(value)[1])
    return schema_id if writer_schema(schema_id) is None else None


def decode(value: bytes | None, kind: type[Event]) -> Event:
    """Return the event of type `kind` in a Kafka value.

    Raises NotDecodableError: no value, no framing, a schema id that is not known (UnknownSchemaError), or Avro that doesn't fit.
    """
    if value is None:
        raise NotDecodableError("there is no value (a tombstone)")
    if len(value) <= FRAME.size or value[0] != _MAGIC:
        raise NotDecodableError("no Avro: a value starts with a zero byte and the schema's id (4 bytes)")
    schema_id = FRAME.unpack_from(value)[1]
    entry = ENTRIES[kind]
    schema = entry.parsed if schema_id == entry.id else writer_schema(schema_id)
    if schema is None:
        raise UnknownSchemaError(schema_id)
    reader = None if schema is entry.parsed else entry.parsed
    source = BytesIO(value)
    source.seek(FRAME.size)
    try:
        datum: Any = schemaless_reader(source, schema, reader, return_record_name=True)
        event = _from_datum(kind, datum)
    except Exception as error:  # fastavro raises whatever its C code meets in foreign bytes: EOFError, IndexError, UnicodeError …
        raise NotDecodableError(f"not readable as {kind.__name__}: {error!r}") from error
    if source.read(1):
        raise NotDecodableError(f"bytes are left over behind the {kind.__name__}")
    return event  # type: ignore[no-any-return]
