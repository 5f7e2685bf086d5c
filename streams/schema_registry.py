"""A schema registry, if one is configured: our schemas are registered there, and its ids stand in front of what is written.

Only processes of roles ask it, when they start: all versions that were ever released, the oldest first, so that whoever reads
old records finds their schemas. Everybody else learns the ids from the topic `schemas`. An id is framing: the chain of hashes is
taken without it, so records with other ids are the same decisions.
"""

import json
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, TypeVar

try:
    from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
    from confluent_kafka.schema_registry.error import SchemaRegistryError
except ImportError as error:
    raise ImportError("FOLDFLOW_SCHEMA_REGISTRY needs more packages: pip install 'foldflow[registry]'") from error

from events import catalog, topics
from events.subjects import COMPATIBILITY, subjects
from streams.kafka import log
from streams.settings import Settings

Result = TypeVar("Result")

_TRY_AGAIN: Final = (408, 429, 500, 502, 503, 504)
_CONFLICTS: Final = 5
"""How often a conflict is tried again: processes that start together register the same, and some registries refuse one."""


class RegistryError(Exception):
    """The registry can't be reached, or refuses a schema."""


def register(settings: Settings, patience_s: float) -> dict[int, int]:
    """Register all versions of all schemas and return the registry's ids by the catalogue's; what is there already stays.

    A subject that is new gets our compatibility level. Raises RegistryError, when it is away after `patience_s` seconds.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        try:
            return _register(settings)
        except SchemaRegistryError as error:
            refused, problem = error.http_status_code not in _TRY_AGAIN, str(error)
        except OSError as error:
            refused, problem = False, str(error)
        except Exception as error:  # noqa: BLE001 - its HTTP library has a hierarchy of its own
            refused, problem = isinstance(error, TypeError | ValueError), repr(error)
        if refused or waited > patience_s:
            url = settings.schema_registry.get("url")
            raise RegistryError(
                f"the schema registry at {url} {'refuses' if refused else 'is away'}: {problem}; check FOLDFLOW_SCHEMA_REGISTRY"
            )
        log.warning("schema_registry.away", problem=problem)
        time.sleep(1.0)


def _register(settings: Settings) -> dict[int, int]:
    client, found = SchemaRegistryClient(dict(settings.schema_registry)), dict[int, int]()
    for subject, kind in subjects(settings.topic_prefix).items():
        if kind is topics.SCHEMAS.kind:
            continue  # who reads that topic learns the ids there, so its own must be known
        new = _is_new(client, subject)
        for own in catalog.versions(kind):
            found[own] = _insisted(client.register_schema, subject, Schema(json.dumps(catalog.schema(own)), "AVRO"))
            if new:  # before the next version: the registry's default may refuse it
                _insisted(client.set_compatibility, subject, COMPATIBILITY)
                new = False
    return found


def _insisted(call: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a call returns, made again after a conflict: what was in its way is there then."""
    for _ in range(_CONFLICTS):
        try:
            return call(*arguments)
        except SchemaRegistryError as error:
            if error.http_status_code != HTTPStatus.CONFLICT:
                raise
        time.sleep(0.2)
    return call(*arguments)


def _is_new(client: SchemaRegistryClient, subject: str) -> bool:
    try:
        return not client.get_versions(subject)
    except SchemaRegistryError as error:
        if error.http_status_code != HTTPStatus.NOT_FOUND:
            raise
        return True
