import struct
import types
import typing
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events import catalog, codec
from events.commands import StartRun, WorkflowRequest
from events.decisions import Decision, FinishedRun
from events.errors import NotDecodableError
from events.results import InboxMessage, TimerFired

LONG = st.integers(-(2**63), 2**63 - 1)
INT = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


def of_hint(hint: Any, avro: Any) -> st.SearchStrategy[Any]:
    """Return values of a type hint that its Avro type can hold."""
    if isinstance(hint, types.UnionType):
        branches = [each for each in avro if each != "null"] if isinstance(avro, list) else []
        hints = [each for each in typing.get_args(hint) if each is not types.NoneType]
        options = [of_hint(each, branch) for each, branch in zip(hints, branches, strict=True)]
        return st.one_of(*options, *([st.none()] if types.NoneType in typing.get_args(hint) else []))
    if typing.get_origin(hint) is tuple:
        return st.lists(of_hint(typing.get_args(hint)[0], avro["items"]), max_size=4).map(tuple)
    if typing.get_origin(hint) is not None:
        value = typing.get_args(hint)[1]
        return st.dictionaries(TEXT, of_hint(value, avro["values"]), max_size=3)
    kind = avro["type"] if isinstance(avro, dict) else avro
    match hint:
        case _ if hint is str:
            return TEXT
        case _ if hint is int:
            return INT if kind == "int" else LONG
        case _ if hint is bytes:
            return st.binary(max_size=40)
        case _ if hint is float:
            return st.floats(allow_nan=False)
        case _ if hint is bool:
            return st.booleans()
        case _:
            return of_type(hint)


def of_type(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Return instances of a type of the catalogue."""
    hints = typing.get_type_hints(kind)
    schema = {field["name"]: field["type"] for field in catalog._definition(kind.__name__)["fields"]}
    return st.builds(kind, **{field.name: of_hint(hints[field.name], schema[field.name]) for field in fields(kind)})


DECISION = Decision("r", 1, bytes(32), b"i" * 16, 0, 0, TimerFired("t", "s"), ())


def zigzag(number: int) -> bytes:
    """Return a number as Avro writes it."""
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


@pytest.mark.parametrize("kind", catalog.RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_round_trips(kind: type[Any]) -> None:
    """What is encoded is decoded as it was, whatever it holds; and the same event gives the same bytes."""

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(of_type(kind))
    def round_trip(event: Any) -> None:
        value = codec.encode(event)
        assert codec.decode(value, kind) == event
        assert codec.encode(codec.decode(value, kind)) == value

    round_trip()


def test_every_type_is_reached_by_some_record() -> None:
    """Each type of the catalogue is a record on a topic or part of one, so the round trips cover all of them."""
    reached: set[str] = set()

    def visit(kind: type[Any]) -> None:
        reached.add(kind.__name__)
        for hint in typing.get_type_hints(kind).values():
            for each in (*typing.get_args(hint), hint, *(n for a in typing.get_args(hint) for n in typing.get_args(a))):
                if getattr(each, "__name__", "") in catalog.TYPES and each.__name__ not in reached:
                    visit(each)

    for record in catalog.RECORDS:
        visit(record)
    assert reached == set(catalog.TYPES)


@pytest.mark.parametrize("kind", catalog.RECORDS, ids=lambda kind: kind.__name__)
def test_foreign_bytes_raise_not_decodable_and_nothing_else(kind: type[Any]) -> None:
    """Any bytes behind a right frame either are an event or raise NotDecodableError."""

    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=120))
    def fuzz(avro: bytes) -> None:
        try:
            assert isinstance(codec.decode(codec.framed(kind, avro), kind), kind)
        except NotDecodableError as error:
            assert str(error)

    fuzz()


@settings(max_examples=300, deadline=None)
@given(of_type(Decision), st.data())
def test_changed_bytes_raise_not_decodable_and_nothing_else(decision: Decision, data: st.DataObject) -> None:
    """A decision with some bytes changed, cut out or put in either is an event or raises NotDecodableError."""
    value = bytearray(codec.encode(decision))
    start = data.draw(st.integers(0, len(value) - 1))
    end = data.draw(st.integers(start, min(len(value), start + 4)))
    value[start:end] = data.draw(st.binary(max_size=4))
    try:
        assert isinstance(codec.decode(bytes(value), Decision), Decision)
    except NotDecodableError as error:
        assert str(error)


@settings(max_examples=100, deadline=None)
@given(of_type(Decision))
def test_a_cut_record_is_not_decodable(decision: Decision) -> None:
    """No beginning of a record is a record."""
    value = codec.encode(decision)
    for length in {0, 1, 4, 5, 6, len(value) // 2, len(value) - 1}:
        with pytest.raises(NotDecodableError):
            codec.decode(value[:length], Decision)


HUGE = (2**62, 2**40, 2**31, -1, -(2**62))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("length", HUGE)
def test_a_length_that_lies_is_refused_at_once(length: int) -> None:
    """A string, bytes, a map or an array that claims to be enormous costs neither memory nor time."""
    empty = codec.body(DECISION)
    request = zigzag(1) + b"a" + zigzag(1) + b"{" + zigzag(0) * 2
    for value, kind in (
        (codec.framed(WorkflowRequest, zigzag(length) + b"abc"), WorkflowRequest),
        (codec.framed(FinishedRun, zigzag(length) + b"abc"), FinishedRun),
        (codec.framed(WorkflowRequest, request + zigzag(length) + bytes(9)), WorkflowRequest),
        (codec.framed(Decision, empty[:-1] + zigzag(length) + bytes(4)), Decision),
        (codec.framed(Decision, empty[:-1] + zigzag(-5) + zigzag(length) + bytes(4)), Decision),
        (codec.framed(WorkflowRequest, b"\xff" * 1000), WorkflowRequest),
    ):
        with pytest.raises(NotDecodableError):
            codec.decode(value, kind)


def test_left_over_bytes_are_refused() -> None:
    """An event with bytes behind it is not that event."""
    with pytest.raises(NotDecodableError, match="left over"):
        codec.decode(codec.encode(DECISION) + b"\0", Decision)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "tombstone"),
        (b"", "no Avro"),
        (b"\0\0\0\0", "no Avro"),
        (b'{"workflow": "x"}', "no Avro"),
        (b"\x01" + codec.encode(DECISION)[1:], "no Avro"),
        (struct.pack(">bI", 0, 12345) + codec.body(DECISION), "schema id 12345 is not known"),
    ],
)
def test_what_is_no_event_says_why(value: bytes | None, says: str) -> None:
    """Each reason for which a value can't be an event is named."""
    with pytest.raises(NotDecodableError, match=says):
        codec.decode(value, Decision)


@pytest.mark.parametrize("written", catalog.RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_of_another_topic_is_refused(written: type[Any]) -> None:
    """A value of one type is never taken for another type, although its schema is known."""

    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(of_type(written))
    def refused(event: Any) -> None:
        value = codec.encode(event)
        for kind in catalog.RECORDS:
            if kind is not written:
                with pytest.raises(NotDecodableError):
                    codec.decode(value, kind)

    refused()


def test_the_body_is_what_follows_the_frame() -> None:
    """Hashes are taken over the Avro body: five bytes of framing in front make the Kafka value."""
    value = codec.encode(InboxMessage("r", StartRun("q", "w", "d", "{}")))
    assert codec.unframed(value) == codec.body(InboxMessage("r", StartRun("q", "w", "d", "{}")))
    assert len(value) - len(codec.unframed(value)) == 5
