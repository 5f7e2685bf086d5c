"""Bytes to events and back: Confluent framing (0x00, schema id as big-endian int32), then Avro binary.

An old writer's schema is resolved to today's by Avro's rules. What can't be read raises NotDecodableError, nothing else.
"""

import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any, Final, NamedTuple, TypeVar

from fastavro import schemaless_reader, schemaless_writer

from events.catalog import ENTRIES, NAMESPACE, TYPES, WRITTEN_IDS, writer_schema
from events.errors import NotDecodableError, UnknownSchemaError

Event = TypeVar("Event")
_Datum = dict[str, Any]

FRAME: Final = struct.Struct(">bI")
_MAGIC: Final = 0


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


# --- Records to dataclasses and back ---
#
# A function for each type, made once: to look at each field of each record for what it may hold took half of the time.


def _tagged(value: Any) -> Any:
    """Return what stands in a union or an array as fastavro writes it: a record as (name, record), anything else as it is."""
    kind = type(value)
    return (_FULL_NAMES[kind], _WRITE[kind](value)) if kind in _WRITE else value


def _untagged(value: Any) -> Any:
    """Return what stood in a union or an array, of which fastavro makes (name, record)."""
    return _READ[value[0]](value[1]) if type(value) is tuple else value


class _Forms(NamedTuple):
    """The code for a field, by what it holds: `plain` gets it; `union`, `single` (a record) and `array` are made of that."""

    plain: str
    union: str
    single: str
    array: str


_WRITTEN: Final = _Forms(
    "event.{name}", "_tagged({plain})", "_WRITE[type({plain})]({plain})", "[_tagged(item) for item in {plain}]"
)
_TAKEN: Final = _Forms(
    "datum[{name!r}]", "_untagged({plain})", "_READ[{record!r}]({plain})", "tuple([_untagged(item) for item in {plain}])"
)


def _fields(kind: type[Any], forms: _Forms) -> dict[str, str]:
    """Return the code for each field of a type."""
    fields = {name: forms.plain.format(name=name) for name in kind.__dataclass_fields__}
    for name in _NESTED.get(kind, ()):
        single = _SINGLE.get((kind, name))
        form = forms.union if (kind, name) in _UNIONS else forms.single if single is not None else forms.array
        fields[name] = form.format(plain=fields[name], record=single and _FULL_NAMES[single])
    return fields


def _made(kind: type[Any], argument: str, code: str) -> Callable[[Any], Any]:
    names = {"_tagged": _tagged, "_untagged": _untagged, "_WRITE": _WRITE, "_READ": _READ, "kind": kind}
    return eval(f"lambda {argument}: {code}", names)  # type: ignore[no-any-return] # noqa: S307 - of our own schemas' names


def _writer(kind: type[Any]) -> Callable[[Any], _Datum]:
    """Return what makes fastavro's record of an event."""
    pairs = ", ".join(f"{name!r}: {code}" for name, code in _fields(kind, _WRITTEN).items())
    return _made(kind, "event", f"{{{pairs}}}")


def _reader(kind: type[Any]) -> Callable[[_Datum], Any]:
    """Return what makes the event of fastavro's record."""
    return _made(kind, "datum", f"kind({', '.join(_fields(kind, _TAKEN).values())})")


_WRITE: Final[dict[type[Any], Callable[[Any], _Datum]]] = {}
_READ: Final[dict[str, Callable[[_Datum], Any]]] = {}
for _kind in TYPES.values():
    _WRITE[_kind] = _writer(_kind)
    _READ[_FULL_NAMES[_kind]] = _reader(_kind)


def datum(event: Any) -> _Datum:
    """Return the event as fastavro writes it: unions of records as (name, record)."""
    return _WRITE[type(event)](event)


def body(event: Any) -> bytes:
    """Return the event's Avro body, without the framing."""
    out, kind = BytesIO(), type(event)
    schemaless_writer(out, ENTRIES[kind].parsed, _WRITE[kind](event))
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
        found: Any = schemaless_reader(source, schema, reader, return_record_name=True)
        event = _READ[_FULL_NAMES[kind]](found)
    except Exception as error:  # fastavro raises whatever its C code meets in foreign bytes: EOFError, IndexError, UnicodeError …
        raise NotDecodableError(f"not readable as {kind.__name__}: {error!r}") from error
    if source.read(1):
        raise NotDecodableError(f"bytes are left over behind the {kind.__name__}")
    return event  # type: ignore[no-any-return]
