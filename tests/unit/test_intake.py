import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import codec, topics
from events.commands import StartRun, WorkflowRequest
from events.decisions import DeadLetter
from events.ids import position_request_id, run_id
from events.results import InboxMessage
from streams.envelope import Incoming
from streams.processors.intake import Intake
from streams.workflow.spec import WorkflowSpec

TOPIC_ID = bytes(range(16))
SPEC = WorkflowSpec.model_validate(
    {
        "name": "greet",
        "input": {
            "type": "object",
            "required": ["who"],
            "additionalProperties": False,
            "properties": {"who": {"type": "string"}, "loud": {"type": "boolean", "default": False}},
        },
        "steps": {"hello": {"transform": "='Hello ' + input.who"}},
    }
)


class OneWorkflow:
    """A registry that knows `greet`."""

    def get(self, version: str) -> WorkflowSpec | None:
        """Return a version."""
        return SPEC if version == SPEC.digest else None

    def newest(self, workflow: str) -> WorkflowSpec | None:
        """Return the newest version."""
        return SPEC if workflow == SPEC.name else None

    def names(self) -> list[str]:
        """Return all names."""
        return [SPEC.name]


def incoming(value: bytes | None) -> Incoming:
    return Incoming("foldflow.requests", 3, 42, 1_000, b"any", value, {"h": b"x"})


def judge(value: bytes | None) -> StartRun | DeadLetter:
    """Return the event that intake makes of a value, checked against its envelope."""
    outgoing = Intake(OneWorkflow(), TOPIC_ID).check(incoming(value))
    if outgoing.topic is topics.DEADLETTER:
        letter = codec.decode(outgoing.value, DeadLetter)
        assert (letter.topic, letter.partition, letter.offset, letter.value) == ("foldflow.requests", 3, 42, value)
        return letter
    message = codec.decode(outgoing.value, InboxMessage)
    assert outgoing.topic is topics.INBOX
    assert outgoing.key.decode() == message.run_id
    assert isinstance(message.input, StartRun)
    assert message.run_id == run_id(message.input.request_id)
    return message.input


def test_json_and_avro_ask_for_the_same_run() -> None:
    """Given one request in both forms, then both become the same StartRun, with defaults filled in."""
    request = WorkflowRequest("greet", '{"who": "Ada"}', "r-1", None, {"team": "blue"})
    text = {"workflow": "greet", "input": {"who": "Ada"}, "request_id": "r-1", "labels": {"team": "blue"}}
    expected = StartRun("r-1", "greet", SPEC.digest, '{"loud":false,"who":"Ada"}', {"team": "blue"})
    assert judge(codec.encode(request)) == judge(json.dumps(text).encode()) == expected


def test_a_request_without_an_id_is_named_by_its_place() -> None:
    """Given no request id, then topic id, partition and offset are the identity, so reading it twice is one run."""
    start = judge(b'{"workflow": "greet", "input": {"who": "Ada"}}')
    assert isinstance(start, StartRun)
    assert start.request_id == position_request_id(TOPIC_ID, 3, 42)


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        (b"no json", "not_decodable", "neither Avro nor JSON"),
        (b"", "not_decodable", "neither Avro nor JSON"),
        (None, "not_decodable", "neither Avro nor JSON"),
        (b"\xff\xfe", "not_decodable", "neither Avro nor JSON"),
        (b"\x00\x00\x00\x00\x07junk", "not_decodable", "schema id 7"),
        (b"[1]", "not_decodable", "JSON object"),
        (b'{"workflow": "greet", "inptu": {}}', "not_decodable", "did you mean `input`?"),
        (b'{"workflow": 3}', "not_decodable", "`workflow` must be given"),
        (b'{"workflow": "greet", "labels": {"a": 1}}', "not_decodable", "object of strings"),
        (b'{"workflow": "greet", "request_id": "\\ud800"}', "not_decodable", "Unicode"),
        (b'{"workflow": "gret", "input": {"who": "x"}}', "unknown_workflow", "did you mean `greet`?"),
        (b'{"workflow": "greet", "digest": "00", "input": {"who": "x"}}', "unknown_workflow", "no version 00"),
        (b'{"workflow": "greet", "input": {}}', "invalid_input", "'who' is a required property"),
        (b'{"workflow": "greet", "input": {"who": 1}}', "invalid_input", "input.who"),
        (b'{"workflow": "greet", "input": {"who": "x", "x": 1}}', "invalid_input", "'x'"),
        (b'{"workflow": "greet", "input": NaN}', "not_decodable", "NaN"),
        (b'{"workflow": "greet", "input": ' + b"[" * 100_000, "not_decodable", "JSON"),
        (b'{"workflow": "greet", "input": {"who": "' + b"x" * 1_100_000 + b'"}}', "too_large", "the limit is"),
    ],
)
def test_what_cannot_start_says_why(value: bytes | None, reason: str, says: str) -> None:
    """Given a bad request, then a dead letter keeps its bytes and place, with the reason and what to do."""
    letter = judge(value)
    assert isinstance(letter, DeadLetter)
    assert letter.reason == reason
    assert says in letter.detail


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_no_bytes_stop_intake(value: bytes) -> None:
    """Whatever bytes come, the answer is an event."""
    assert isinstance(judge(value), StartRun | DeadLetter)


@given(
    st.dictionaries(
        st.sampled_from(["workflow", "input", "request_id", "digest", "labels"]), st.text() | st.integers() | st.none()
    )
)
def test_no_json_object_stops_intake(request: dict[str, Any]) -> None:
    """Whatever stands in the known keys, the answer is an event."""
    assert isinstance(judge(json.dumps(request).encode()), StartRun | DeadLetter)
