"""Which schemas processes of this installation write: a view of the compacted topic `schemas`.

In a rolling upgrade old code meets records that newer code wrote. To pass over one would lose it, and to stop in front of
whatever can't be read would let anybody stop a partition with six bytes. So each process publishes its schemas before it writes a
record, and whoever meets an unknown schema id looks here: only what newer code is known to write makes it stop.

Where schemas are registered in a registry as well, each entry names the registry's ids of its schema in a header: whoever reads
here can read what is written with them, without asking the registry.
"""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from events import catalog, codec, topics
from events.decisions import SchemaPublished
from events.errors import NewerCodeError, NotDecodableError
from streams import kafka
from streams.envelope import Outgoing, envelope
from streams.settings import Settings

REGISTRY_IDS: Final = "foldflow_registry_ids"
"""Header of an entry: ids that registries gave its schema, the newest last, separated by commas."""
_DIGITS: Final = 20
_MOST_IDS: Final = 100


class RegistryClashError(Exception):
    """A registry's id of a schema stands for another one in records that are on the topics already."""


class Schemas:
    """The published schemas. For any thread; nothing is read before the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = kafka.name(settings, topics.SCHEMAS)
        self._names: dict[int, str] = {}
        self._given: dict[int, tuple[int, ...]] = {}
        self._texts: dict[int, str] = {}
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
                self._take(entry, _registry_ids(kafka.incoming(message).headers.get(REGISTRY_IDS)))
            elif message.value() is None and key.isascii() and key.isdigit() and len(key) < _DIGITS:
                for each in (int(key), *self._given.pop(int(key), ())):
                    self._names.pop(each, None)
        return self._names

    def _take(self, entry: SchemaPublished, given: tuple[int, ...]) -> None:
        self._given[entry.id], self._texts[entry.id] = given, entry.schema
        self._names |= dict.fromkeys((entry.id, *given), entry.name)
        if catalog.schema(entry.id) is not None:
            catalog.take_ids(dict.fromkeys(given, entry.id))

    @property
    def names(self) -> Mapping[int, str]:
        """The names of the types, by any id of their schemas, as far as they were read."""
        return self._names

    @property
    def given(self) -> Mapping[int, tuple[int, ...]]:
        """The ids that registries gave the schemas, by the catalogue's, the newest last; as far as it was read."""
        return self._given

    @property
    def texts(self) -> Mapping[int, str]:
        """The schemas, by the catalogue's ids, as far as they were read."""
        return self._texts

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


def _registry_ids(header: bytes | None) -> tuple[int, ...]:
    parts = (header or b"").decode("ascii", "replace").split(",")[-_MOST_IDS:]
    return tuple(int(each) for each in parts if each.isascii() and each.isdigit() and len(each) < _DIGITS)


def published(settings: Settings, patience_s: float = 0.0) -> dict[int, str]:
    """Return the names of all types whose schemas are published now, by id. Raises KafkaUnreachableError."""
    return dict(_read(settings, patience_s).names)


def _read(settings: Settings, patience_s: float) -> Schemas:
    """Return what is published now; its connection is closed."""
    known, deadline = Schemas(settings), time.monotonic() + patience_s
    try:
        while True:
            try:
                known.refresh()
            except kafka.KafkaUnreachableError:
                if time.monotonic() > deadline:
                    raise
            else:
                return known
    finally:
        known.close()


def learn(settings: Settings) -> None:
    """Take the ids that a registry gave, once for a process: what is written with them can be read from then on.

    Raises KafkaUnreachableError.
    """
    place = settings.bootstrap_servers, settings.topic_prefix
    if place not in _learned:
        _learned.add(place)  # first: what reads them is a client too, and asks for this
        try:
            _read(settings, 0.0)
        except kafka.KafkaUnreachableError:
            _learned.discard(place)
            raise


_learned: Final[set[tuple[str, str]]] = set()


def publish(settings: Settings, patience_s: float = 0.0, registered: Mapping[int, int] | None = None) -> None:
    """Publish what this code writes and isn't there; call it before the first record.

    `registered`: the ids that a registry gave the catalogue's (`schema_registry.register`), which are published with them.
    Raises KafkaUnreachableError and RegistryClashError.
    """
    known, given = _read(settings, patience_s), dict(registered or {})
    _check(given, known.given)
    names = {own: kind.__name__ for kind in catalog.ENTRIES for own in catalog.versions(kind)}
    wanted: dict[int, tuple[int, ...]] = {entry.id: () for entry in catalog.ENTRIES.values()}
    wanted |= {own: (*(each for each in known.given.get(own, ()) if each != new), new) for own, new in given.items()}
    records = [
        _record(own, names[own], ids)
        for own, ids in wanted.items()
        if own not in known.texts or (own in given and known.given[own] != ids)
    ]
    if records:
        kafka.send(settings, records)
    catalog.take_ids({new: own for own, new in given.items()})


def _check(given: Mapping[int, int], known: Mapping[int, tuple[int, ...]]) -> None:
    """Refuse ids that stand for other schemas in what was written already. Raises RegistryClashError."""
    meaning = {each: own for own, ids in known.items() for each in (own, *ids)}
    for own, new in given.items():
        other = meaning.get(new, own if catalog.schema(new) is None else new)
        if other != own:
            raise RegistryClashError(
                f"the registry gives id {new} to a schema (ours: {own}) while records on the topics mean another one by it "
                f"(ours: {other}): another registry was used here before. Use that one, or another FOLDFLOW_TOPIC_PREFIX"
            )


def _record(own: int, name: str, given: tuple[int, ...]) -> Outgoing:
    entry = SchemaPublished(own, name, json.dumps(catalog.schema(own)))
    made = envelope(topics.SCHEMAS, str(own), entry, source="schemas", identity=str(own))
    return replace(made, headers=[*made.headers, (REGISTRY_IDS, ",".join(map(str, given)).encode())]) if given else made


__all__ = ["REGISTRY_IDS", "RegistryClashError", "Schemas", "learn", "publish", "published"]
