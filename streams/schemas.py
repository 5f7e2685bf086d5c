"""Which schemas processes of this installation write: a view of the compacted topic `schemas`.

In a rolling upgrade old code meets records that newer code wrote. To pass over one would lose it, and to stop in front of
whatever can't be read would let anybody stop a partition with six bytes. So each process publishes its schemas before it writes a
record, and whoever meets an unknown schema id looks here: only what newer code is known to write makes it stop.
"""

import json
import threading
import time

from events import catalog, codec, topics
from events.decisions import SchemaPublished
from events.errors import NewerCodeError, NotDecodableError
from streams import kafka
from streams.envelope import envelope
from streams.settings import Settings

FORGED_FOR_S = 1.0
"""How long an id that isn't published counts as forged without another look: a flood of them must not cost a look each."""


class Schemas:
    """The published schemas. For any thread; nothing is read before the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._names: dict[int, str] = {}
        self._forged: dict[int, float] = {}
        self._lock = threading.Lock()

    def newer(self, schema_id: int, *kinds: type) -> bool:
        """Whether newer code is known to write records of one of these types in this schema. Raises KafkaUnreachableError."""
        with self._lock:
            now = time.monotonic()
            if schema_id not in self._names and now >= self._forged.get(schema_id, 0.0):
                self._names = published(self._settings)
                self._forged = {each: until for each, until in self._forged.items() if until > now}
                if schema_id not in self._names:
                    self._forged[schema_id] = now + FORGED_FOR_S
            return self._names.get(schema_id) in {kind.__name__ for kind in kinds}

    def refuse_newer(self, where: str, value: bytes | None, *kinds: type) -> None:
        """Raise NewerCodeError for a value that newer code wrote; call it for what can't be read."""
        schema_id = codec.unknown_schema(value)
        if schema_id is not None and self.newer(schema_id, *kinds):
            raise NewerCodeError(where, schema_id)


def published(settings: Settings) -> dict[int, str]:
    """Return the names of all types whose schemas are published, by id. Raises KafkaUnreachableError."""
    found: dict[int, str] = {}
    with kafka.closing(kafka.reader(settings)) as source:
        for message in kafka.read_partition(source, kafka.name(settings, topics.SCHEMAS), 0, 0):
            key = (message.key() or b"").decode("utf-8", "replace")
            entry = _entry(message.value())
            if entry is not None and str(entry.id) == key:
                found[entry.id] = entry.name
            elif message.value() is None and key.isascii() and key.isdigit():
                found.pop(int(key), None)
    return found


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


def publish(settings: Settings) -> None:
    """Publish what this code writes and isn't there; call it before the first record. Raises KafkaUnreachableError."""
    there = published(settings)
    missing = [entry for entry in catalog.ENTRIES.values() if entry.id not in there]
    records = [
        envelope(
            topics.SCHEMAS,
            str(entry.id),
            SchemaPublished(entry.id, entry.kind.__name__, json.dumps(entry.schema)),
            source="schemas",
            identity=str(entry.id),
        )
        for entry in missing
    ]
    if records:
        kafka.send(settings, records)


__all__ = ["Schemas", "publish", "published"]
