"""Ids that a registry gave, on the topic `schemas`: who writes with them, and who can read that."""

import json
from collections.abc import Callable

import pytest

from events import catalog, codec, topics
from events.calls import CancelCall
from events.decisions import FinishedRun, SchemaPublished
from events.errors import UnknownSchemaError
from streams import kafka, schemas
from streams.envelope import Outgoing, envelope
from streams.settings import Settings

KINDS = [kind for kind in catalog.ENTRIES if kind is not SchemaPublished]
GIVEN = {own: number for number, own in enumerate((each for kind in KINDS for each in catalog.versions(kind)), 1)}
CANCEL = CancelCall("call", "run", "step", "why")
Restart = Callable[[], None]


def test_who_learns_a_registry_s_ids_reads_and_writes_them(few: Settings, restart: Restart) -> None:
    """Given ids of a registry, then they stand in front of what is written, with the same body, and can be learned.

    What was written before stays readable.
    """
    entry = catalog.ENTRIES[CancelCall]
    before = codec.encode(CANCEL)
    schemas.publish(few, registered=GIVEN)
    value = codec.encode(CANCEL)
    assert codec.FRAME.unpack_from(value) == (0, GIVEN[entry.id])
    assert codec.unframed(value) == codec.unframed(before)
    assert codec.decode(value, CancelCall) == codec.decode(before, CancelCall) == CANCEL
    assert codec.kind_of(value) is CancelCall
    assert codec.is_current(value, CancelCall)
    restart()
    with pytest.raises(UnknownSchemaError):
        codec.decode(value, CancelCall)
    configured = few.model_copy(update={"schema_registry": {"url": "http://127.0.0.1:1"}})
    kafka.reader(configured).close()
    assert codec.decode(value, CancelCall) == CANCEL, "whoever has a client has learned them"
    assert codec.encode(CANCEL) == value
    restart()
    schemas.publish(few)
    assert codec.encode(CANCEL) == value, "so has who publishes, whatever it is told"


def test_what_newer_code_writes_with_a_registry_s_id_is_known_as_such(few: Settings, restart: Restart) -> None:
    """Given a schema of newer code under a registry's id, then that id makes readers stop, until the schema is taken back."""
    restart()
    newer = json.loads(json.dumps(catalog.ENTRIES[CancelCall].schema))
    newer["fields"].append({"name": "novelty", "type": "string", "default": ""})
    own = catalog.fingerprint(newer)
    said = envelope(topics.SCHEMAS, str(own), SchemaPublished(own, "CancelCall", json.dumps(newer)), source="test", identity="1")
    said.headers.append((schemas.REGISTRY_IDS, b"4711,4712"))
    kafka.send(few, [said])
    known = schemas.Schemas(few)
    assert [known.newer(each, CancelCall) for each in (4711, 4712, own, 4713)] == [True, True, True, False]
    assert not known.newer(4712, FinishedRun)
    kafka.send(few, [Outgoing(topics.SCHEMAS, str(own).encode(), None, [])])
    known.refresh()
    assert [known.newer(each, CancelCall) for each in (4711, 4712, own)] == [False] * 3
    known.close()


def test_a_second_registry_must_not_mean_something_else_by_an_id(few: Settings, restart: Restart) -> None:
    """Given ids of one registry, then another one may add its own, and is refused if one of them is taken for another schema."""
    schemas.publish(few, registered=GIVEN)
    first = codec.encode(CANCEL)
    others = {own: number + 1000 for own, number in GIVEN.items()}
    schemas.publish(few, registered=others)
    assert codec.FRAME.unpack_from(codec.encode(CANCEL))[1] == others[catalog.ENTRIES[CancelCall].id]
    swapped = dict(zip(GIVEN, [*list(GIVEN.values())[1:], 1], strict=True))
    with pytest.raises(schemas.RegistryClashError, match="FOLDFLOW_TOPIC_PREFIX"):
        schemas.publish(few, registered=swapped)
    one, other, *_ = GIVEN
    with pytest.raises(schemas.RegistryClashError):
        schemas.publish(few, registered={one: other})
    restart()
    schemas.publish(few)
    assert codec.decode(first, CancelCall) == CANCEL, "the first registry's ids stay readable"
