"""Which schemas processes of this installation write: a view of the compacted topic `schemas`.

In a rolling upgrade old code meets records that newer code wrote. To pass over one would lose it, and to stop in front of
whatever can't be read would let anybody stop a partition with six bytes. So each process publishes its schemas before it writes a
record, and whoever meets an unknown schema id looks here: only what newer code is known to write makes it stop.
"""

import json
import threading
import time
from typing import Final

from events import catalog, codec, topics
from events.decisions import SchemaPublished
from events.errors import NewerCodeError, NotDecodableError
from streams import kafka
from streams.envelope import envelope
from streams.settings import Settings

_DIGITS: Final = 20


class Schemas:
    """The published schemas. For any thread; nothing is read before the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = kafka.name(settings, topics.SCHEMAS)
        self._names: dict[int, str] = {}
        self._next = 0
        self._source: kafka.Consumer | None = None
        self._lock = threading.Lock()

    def newer(self, schema_id: int, *kinds: type) -> bool:
        """Whether newer code is known to write records of one of these types in this schema. Raises KafkaUnreachableError.

        A look is conclusive for every record that was there before it: who wrote it had published its schema first.
        """
        with self._lock:
            if schema_id not in self._names:
                self.refresh()
            return self._names.get(schema_id) in {kind.__name__ for kind in kinds}

    def refuse_newer(self, where: str, value: bytes | None, *kinds: type) -> None:
        """Raise NewerCodeError for a value that newer code wrote; call it for what can't be read."""
        schema_id = codec.unknown_schema(value)
        if schema_id is not None and self.newer(schema_id, *kinds):
            raise NewerCodeError(where, schema_id)

    def refresh(self) -> dict[int, str]:
        """Read on to the end and return the names of all types whose schemas are published, by id.

        Raises KafkaUnreachableError. Where there is no such topic nothing is published.
        """
        if self._source is None:
            try:
                kafka.find(kafka.admin(self._settings), self._settings, [topics.SCHEMAS])
            except kafka.TopicsMissingError:
                return self._names
            self._source = kafka.reader(self._settings)
        for message in kafka.read_partition(self._source, self._topic, 0, self._next):
            self._next = (message.offset() or 0) + 1
            key = (message.key() or b"").decode("utf-8", "replace")
            entry = _entry(message.value())
            if entry is not None and str(entry.id) == key:
                self._names[entry.id] = entry.name
            elif message.value() is None and key.isascii() and key.isdigit() and len(key) < _DIGITS:
                self._names.pop(int(key), None)
        return self._names

    def close(self) -> None:
        """Close the connection."""
        if self._source is not None:
            self._source.close()


def _entry(value: bytes | None) -> SchemaPublished | None:
    """Return an entry that is what it says: a text can't be published under the id of another one."""
    try:
        entry = codec.decode(value, SchemaPublished)
        schema = json.loads(entry.schema)
        same = catalog.fingerprint(schema) == entry.id and schema["name"] == entry.name
    except Exception as error:  # noqa: BLE001 - the fingerprint's library raises whatever a strange schema makes it
        if not isinstance(error, NotDecodableError) or value is not None:
            kafka.log.warning("schemas.unreadable", problem=str(error))
        return None
    return entry if same else None


def published(settings: Settings, patience_s: float = 0.0) -> dict[int, str]:
    """Return the names of all types whose schemas are published now, by id. Raises KafkaUnreachableError."""
    known, deadline = Schemas(settings), time.monotonic() + patience_s
    try:
        while True:
            try:
                return known.refresh()
            except kafka.KafkaUnreachableError:
                if time.monotonic() > deadline:
                    raise
    finally:
        known.close()


def publish(settings: Settings, patience_s: float = 0.0) -> None:
    """Publish what this code writes and isn't there; call it before the first record. Raises KafkaUnreachableError."""
    there = published(settings, patience_s)
    records = [
        envelope(
            topics.SCHEMAS,
            str(entry.id),
            SchemaPublished(entry.id, entry.kind.__name__, json.dumps(entry.schema)),
            source="schemas",
            identity=str(entry.id),
        )
        for entry in catalog.ENTRIES.values()
        if entry.id not in there
    ]
    if records:
        kafka.send(settings, records)


__all__ = ["Schemas", "publish", "published"]
