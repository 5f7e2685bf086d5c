"""Our schemas as a schema registry shows them: subjects, versions, ids. From the catalogue and the topic `schemas`; read-only.

What newer code has published is there too, behind the versions that this code knows; and where schemas are registered in a
registry, its ids lead to the same schemas as the catalogue's do, since records with either may be on the topics.
"""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
from avro.schema import parse

from events import catalog, topics
from events.subjects import subjects
from streams import kafka
from streams.schemas import Schemas
from streams.settings import Settings

_LOOK_EVERY_S: Final = 2.0


class InvalidSchemaError(Exception):
    """This is no Avro schema."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a subject, 1 the oldest. `id`: stands in front of records; `own`: the catalogue's, which may be the same."""

    subject: str
    version: int
    id: int
    own: int
    schema: str


@dataclass(slots=True)
class Known:
    """All that is known at one time. `ids`: every id that may stand in front of a record, and whose it is."""

    subjects: dict[str, list[Version]] = field(default_factory=dict)
    ids: dict[int, Version] = field(default_factory=dict)

    def same(self, subject: str, text: str) -> Version | None:
        """Return the version of a subject that this schema is, by Avro's canonical form. Raises InvalidSchemaError."""
        own = _fingerprint(text)
        return next((each for each in self.subjects[subject] if each.own == own), None)

    def all(self) -> Iterator[Version]:
        """Yield all versions of all subjects."""
        for name in sorted(self.subjects):
            yield from self.subjects[name]


class Registry:
    """Answers for one installation; for any thread. While Kafka is away it knows what it has read before, and the catalogue."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._schemas, self._lock = settings, Schemas(settings), threading.Lock()
        self._looked, self._known = float("-inf"), _known(settings, self._schemas)

    def known(self) -> Known:
        """Return all that is known, a new look at Kafka included if the last one was two seconds ago."""
        with self._lock:
            if time.monotonic() - self._looked > _LOOK_EVERY_S:
                try:
                    # Asked first: a reader would wait for minutes for a broker that is away.
                    kafka.find(kafka.admin(self._settings), self._settings, [topics.SCHEMAS])
                    self._schemas.refresh()
                except (kafka.KafkaUnreachableError, kafka.TopicsMissingError) as error:
                    kafka.log.warning("registry.catalogue_alone", problem=str(error))
                self._known, self._looked = _known(self._settings, self._schemas), time.monotonic()
            return self._known


def _known(settings: Settings, published: Schemas) -> Known:
    found = Known()
    for subject, kind in subjects(settings.topic_prefix).items():
        texts = {own: json.dumps(catalog.schema(own)) for own in catalog.versions(kind)}
        texts |= {own: text for own, text in published.texts.items() if published.names[own] == kind.__name__}
        versions = found.subjects[subject] = []
        for number, (own, text) in enumerate(texts.items(), 1):
            given = published.given.get(own, ())
            version = Version(subject, number, given[-1] if given else own, own, text)
            versions.append(version)
            found.ids |= dict.fromkeys((*given, own), version)
    return found


def _fingerprint(text: str) -> int:
    try:
        return catalog.fingerprint(json.loads(text))
    except Exception as error:  # the fingerprint's library raises whatever a strange schema makes it
        raise InvalidSchemaError(f"this is no Avro schema: {error!r}") from error


def obstacles(text: str, version: Version) -> list[str]:
    """Return why a reader with this schema can't read all records of a version; empty: it can. Raises InvalidSchemaError."""
    try:
        reader: Any = parse(text)
    except Exception as error:  # as above
        raise InvalidSchemaError(f"this is no Avro schema: {error!r}") from error
    checker: Any = ReaderWriterCompatibilityChecker
    found = checker().get_compatibility(reader, parse(version.schema))
    if found.compatibility is SchemaCompatibilityType.compatible:
        return []
    return sorted({f"{place}: {message}" for place in found.locations for message in found.messages})
