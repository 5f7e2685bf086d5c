import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import codec, topics
from events.commands import (
    ApprovalAnswered,
    ChangeOutput,
    Command,
    Origin,
    Parent,
    PauseRun,
    RunRequest,
    SignalReceived,
    StartRun,
    WorkflowRequest,
)
from events.decisions import DeadLetter
from events.failure import FailureKind
from events.ids import position_request_id, run_id
from events.results import ChildRunFailed, InboxMessage
from streams.envelope import Incoming
from streams.processors.intake import Intake
from streams.workflow.payloads import INLINE_BYTES, Memory, digest_of, is_reference
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
        "steps": {
            "hello": {"transform": "='Hello ' + input.who"},
            "check": {"for_each": {"items": [1, 2]}, "steps": {"ask": {"approval": {"message": "Go on?"}}}},
        },
    }
)
PLACE = position_request_id(TOPIC_ID, 3, 42)


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

    def refresh(self) -> None:
        """Look for new versions."""


def incoming(value: bytes | None) -> Incoming:
    return Incoming("foldflow.requests", 3, 42, 1_000, b"any", value, {"h": b"x"})


def judge(value: bytes | None) -> StartRun | Command | DeadLetter:
    """Return the event that intake makes of a value, checked against its envelope."""
    (outgoing,) = Intake(OneWorkflow(), TOPIC_ID).check(incoming(value))
    if outgoing.topic is topics.DEADLETTER:
        letter = codec.decode(outgoing.value, DeadLetter)
        assert (letter.topic, letter.partition, letter.offset, letter.value) == ("foldflow.requests", 3, 42, value)
        return letter
    message = codec.decode(outgoing.value, InboxMessage)
    assert outgoing.topic is topics.INBOX
    assert outgoing.key.decode() == message.run_id
    identity = dict(outgoing.headers)["ce_id"].decode()
    if isinstance(message.input, StartRun):
        assert message.run_id == run_id(message.input.request_id)
        assert identity == f"{message.run_id}/start"
        return message.input
    assert isinstance(message.input, Command)
    assert identity == PLACE
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
    assert start.request_id == PLACE


def test_all_that_a_request_says_goes_to_its_run() -> None:
    """Given a fork's request, then the run gets its origin, its results, who waits for it and where it stops, each place once."""
    copied = '{"hello":{"output":"\\"Hello Ada\\"","status":"completed"}}'
    parent, origin = Parent("run", "step", "call"), Origin("other", 7, "ab")
    breaks = ("hello", "check[1].ask", "check.ask", "hello")
    request = WorkflowRequest("greet", '{"who": "Ada"}', "r-1", SPEC.digest, {}, parent, breaks, origin, copied)
    start = judge(codec.encode(request))
    assert start == StartRun(
        "r-1",
        "greet",
        SPEC.digest,
        '{"loud":false,"who":"Ada"}',
        {},
        parent,
        ("hello", "check[1].ask", "check.ask"),
        origin,
        copied,
    )


def test_a_command_goes_to_the_run_it_names() -> None:
    """Given what is said to a run by its id or its request's, then its inbox has it; a signal may be named by its place."""
    value = b'{"request_id": "order-7", "command": "signal", "name": "payment", "payload": {"paid": true}}'
    (outgoing,) = Intake(OneWorkflow(), TOPIC_ID).check(incoming(value))
    assert outgoing.key.decode() == run_id("order-7")
    assert judge(value) == SignalReceived(PLACE, "payment", None, '{"paid":true}', "")
    named = RunRequest("any run", None, SignalReceived("s-1", "payment", "o", "1", "ann"))
    assert judge(codec.encode(named)) == named.command
    assert judge(codec.encode(RunRequest(None, "order-7", PauseRun("ann", "lunch")))) == PauseRun("ann", "lunch")


def test_large_payloads_are_stored_and_go_on_as_references() -> None:
    """Given an input, a signal's payload or an output too large for an event, then it is stored, or refused without a store."""
    large = "x" * INLINE_BYTES
    asked = json.dumps({"workflow": "greet", "input": {"who": large, "loud": True}}).encode()
    signal = codec.encode(RunRequest("r", None, SignalReceived("s", "n", None, json.dumps(large), "")))
    changed = codec.encode(RunRequest("r", None, ChangeOutput("hello", json.dumps(large), "ann", "")))
    approved = codec.encode(RunRequest("r", None, ApprovalAnswered("hello", True, "ann", "", json.dumps(large))))
    for value, name, text in (
        (asked, "input", json.dumps({"loud": True, "who": large}, separators=(",", ":"))),
        (signal, "payload", json.dumps(large)),
        (changed, "output", json.dumps(large)),
        (approved, "value", json.dumps(large)),
    ):
        store = Memory()
        (outgoing,) = Intake(OneWorkflow(), TOPIC_ID, store).check(incoming(value))
        kept = json.loads(getattr(codec.decode(outgoing.value, InboxMessage).input, name))
        assert is_reference(kept)
        assert store.texts == {kept["$payload"]: text}
        assert digest_of(text.encode()) == kept["$payload"]
        letter = judge(value)
        assert isinstance(letter, DeadLetter)
        assert letter.reason == "too_large"


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        ({"workflow": "gret"}, FailureKind.UNKNOWN_WORKFLOW, "did you mean `greet`?"),
        ({"workflow": "greet", "input": {}}, FailureKind.INVALID_ARGUMENTS, "'who' is a required property"),
        ({"workflow": "greet", "labels": 3}, FailureKind.INVALID_ARGUMENTS, "object of strings"),
    ],
)
def test_a_run_that_waits_hears_of_a_refusal(request_: dict[str, Any], kind: FailureKind, says: str) -> None:
    """Given a parent, then besides the dead letter its inbox has the failure of the run that can't start."""
    request_ |= {"request_id": "child", "parent": {"run_id": "parent", "step": "ask", "call_id": "c-1"}}
    letter, told = Intake(OneWorkflow(), TOPIC_ID).check(incoming(json.dumps(request_).encode()))
    assert codec.decode(letter.value, DeadLetter).run_id == run_id("child")
    message = codec.decode(told.value, InboxMessage)
    assert (told.topic, told.key, message.run_id) == (topics.INBOX, b"parent", "parent")
    assert isinstance(message.input, ChildRunFailed)
    assert (message.input.call_id, message.input.step, message.input.run_id) == ("c-1", "ask", run_id("child"))
    assert (message.input.failure.kind, says in message.input.failure.message) == (kind, True)


def test_what_a_run_hears_of_a_refusal_is_short() -> None:
    """Given a refusal with many and long reasons, then the waiting run's history has the beginning."""
    request_ = {"workflow": "greet", "input": {"who": "x", **{f"{i}" * 300: 1 for i in range(10)}}}
    request_ |= {"parent": {"run_id": "parent", "step": "ask", "call_id": "c-1"}}
    request_["digest"] = "0" * 5000
    letter, told = Intake(OneWorkflow(), TOPIC_ID).check(incoming(json.dumps(request_).encode()))
    message = codec.decode(told.value, InboxMessage)
    assert isinstance(message.input, ChildRunFailed)
    assert len(codec.decode(letter.value, DeadLetter).detail) > len(message.input.failure.message) == 2000


def test_a_refused_command_names_its_run() -> None:
    """Given a wrong command, then its dead letter is found with the run, and isn't taken for a refused request."""
    letter = judge(b'{"request_id": "order-7", "command": "paus"}')
    assert isinstance(letter, DeadLetter)
    assert (letter.run_id, letter.request_id) == (run_id("order-7"), None)


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
        (b'{"workflow": "greet", "input": {"who": "x"}, "break_at": ["helo"]}', "unknown_step", "did you mean `hello`?"),
        (b'{"workflow": "greet", "input": {"who": "x"}, "break_at": ["check[0].aks"]}', "unknown_step", "mean `check.ask`?"),
        (b'{"run_id": "r", "command": "resum"}', "not_decodable", "did you mean `resume`?"),
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
    assert isinstance(judge(value), StartRun | Command | DeadLetter)


KEYS = [
    "workflow",
    "input",
    "request_id",
    "digest",
    "labels",
    "break_at",
    "origin",
    "copied",
    "run_id",
    "command",
    "step",
    "name",
]


@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(["greet", "pause", "hello", ["hello"]]) | st.text() | st.none()))
def test_no_json_object_stops_intake(request: dict[str, Any]) -> None:
    """Whatever stands in the known keys, the answer is an event."""
    assert isinstance(judge(json.dumps(request).encode()), StartRun | Command | DeadLetter)


def test_a_version_that_was_registered_a_moment_ago_is_found() -> None:
    """Before a request is refused, intake looks whether its workflow has come meanwhile."""

    class Late(OneWorkflow):
        fresh = False

        def newest(self, workflow: str) -> WorkflowSpec | None:
            """Return the newest version, once somebody has looked."""
            return super().newest(workflow) if self.fresh else None

        def refresh(self) -> None:
            """Look."""
            self.fresh = True

    value = json.dumps({"workflow": "greet", "input": {"who": "Ada"}}).encode()
    (found,) = Intake(Late(), TOPIC_ID).check(incoming(value))
    assert found.topic is topics.INBOX
