"""Values as anybody can read them: Confluent's framing, Avro, and the schemas of `events/schemas` taken as data."""

import hashlib
import json
import struct
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from fastavro import schemaless_reader
from fastavro.schema import parse_schema, to_parsing_canonical_form

SCHEMAS: Final = Path(__file__).parents[3] / "events" / "schemas"
_FRAME: Final = struct.Struct(">bI")
HEADER_BYTES: Final = _FRAME.size


class UnreadableError(Exception):
    """A value can't be read as what its topic holds."""


def decode(value: bytes | None, kind: str) -> dict[str, Any]:
    """Return the record of schema `kind` in a value; records in unions come as (name, fields). Raises UnreadableError."""
    if value is None:
        raise UnreadableError("a tombstone")
    if len(value) <= HEADER_BYTES or value[0] != 0:
        raise UnreadableError("no framing")
    schema_id = _FRAME.unpack_from(value)[1]
    writer, reader = _writer(schema_id), _today(kind)[1]
    if writer is None:
        raise UnreadableError(f"schema id {schema_id} is nobody's")
    source = BytesIO(value)
    source.seek(HEADER_BYTES)
    try:
        datum = schemaless_reader(source, writer, None if writer is reader else reader, return_record_name=True)
    except Exception as error:  # fastavro raises whatever its C code meets in foreign bytes
        raise UnreadableError(f"no {kind}: {error!r}") from error
    if source.read(1):
        raise UnreadableError(f"bytes are left over behind the {kind}")
    return datum  # type: ignore[return-value]


def kind_of(value: bytes) -> str | None:
    """Return the schema's name that a framed value says it has; None: none that is known."""
    writer = _writer(_FRAME.unpack_from(value)[1]) if len(value) > HEADER_BYTES and value[0] == 0 else None
    return None if writer is None else writer["name"].rpartition(".")[2]


def digest(record: tuple[str, dict[str, Any]]) -> bytes:
    """Return 16 bytes that are the same for the same record, whatever version of its schema wrote it."""
    name, fields = record
    if labels := fields.get("labels"):  # a map has no order
        fields = fields | {"labels": dict(sorted(labels.items()))}
    return hashlib.blake2b(repr((name, fields)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@cache
def _names() -> frozenset[str]:
    return frozenset(path.stem for path in SCHEMAS.glob("*.avsc"))


@cache
def _today(kind: str) -> tuple[int, Any]:
    """Return the id of today's schema and the schema as it is read: times stay milliseconds."""
    written = _written_out(kind, set())
    return _fingerprint(written), parse_schema(_plain(written))


@cache
def _writer(schema_id: int) -> Any | None:
    for name in _names():
        if (found := _today(name))[0] == schema_id:
            return found[1]
    for path in (SCHEMAS / "history").glob(f"*-{schema_id}.avsc"):
        return parse_schema(_plain(json.loads(path.read_text("utf-8"))))
    return None


def _fingerprint(schema: Any) -> int:
    canonical = to_parsing_canonical_form(schema)
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:4], "big") & 0x7FFFFFFF


def _written_out(schema: Any, seen: set[str]) -> Any:
    """Return a schema with each of our types defined where it is named first."""
    if isinstance(schema, str):
        if schema not in _names():
            return schema
        if schema in seen:
            return f"foldflow.{schema}"
        seen.add(schema)
        schema = json.loads((SCHEMAS / f"{schema}.avsc").read_text("utf-8"))
        return schema | {"fields": [each | {"type": _written_out(each["type"], seen)} for each in schema["fields"]]}
    if isinstance(schema, list):
        return [_written_out(each, seen) for each in schema]
    return schema | {key: _written_out(schema[key], seen) for key in ("items", "values") if key in schema}


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if isinstance(schema, dict):
        return {key: _plain(each) for key, each in schema.items() if key != "logicalType"}
    return schema
