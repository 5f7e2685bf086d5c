import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import catalog, codec
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    Origin,
    Parent,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    RunRequest,
    SignalReceived,
    WorkflowRequest,
)
from events.decisions import Decision
from events.ids import run_id
from events.results import InboxMessage, TimerFired
from streams.processors.requests import MAX_COPIED_BYTES, MAX_PATH_CHARS, MAX_TEXTS_BYTES, WORDS, RefusedError, decode

RUN = run_id("q")
PARENT = {"run_id": RUN, "step": "ask", "call_id": "c1"}


def said(**data: Any) -> RunRequest:
    """Return what a JSON command becomes."""
    request = decode(json.dumps({"run_id": RUN, **data}).encode())
    assert isinstance(request, RunRequest)
    return request


def refusal(value: Any) -> RefusedError:
    """Return why a value (JSON, or bytes as they are) is refused."""
    with pytest.raises(RefusedError) as caught:
        decode(value if isinstance(value, bytes) else json.dumps(value).encode())
    return caught.value


@pytest.mark.parametrize(
    ("data", "command"),
    [
        ({"command": "signal", "name": "payment"}, SignalReceived("", "payment", None, "null", "")),
        (
            {
                "command": "signal",
                "name": "p",
                "correlation": "o-7",
                "payload": {"b": 1, "a": "ü"},
                "by": "ann",
                "signal_id": "s1",
            },
            SignalReceived("s1", "p", "o-7", '{"a":"ü","b":1}', "ann"),
        ),
        ({"command": "approve", "step": "ask", "by": "ann"}, ApprovalAnswered("ask", True, "ann", "", None)),
        (
            {"command": "approve", "step": "ask", "by": "ann", "reason": "fine", "value": [1]},
            ApprovalAnswered("ask", True, "ann", "fine", "[1]"),
        ),
        ({"command": "approve", "step": "ask", "by": "ann", "value": None}, ApprovalAnswered("ask", True, "ann", "", None)),
        (
            {"command": "reject", "step": "a[3].ask", "by": "bo", "reason": "no"},
            ApprovalAnswered("a[3].ask", False, "bo", "no", None),
        ),
        ({"command": "cancel"}, CancelRun("", "", False)),
        ({"command": "cancel", "step": None, "by": "bo", "reason": "late", "force": True}, CancelRun("bo", "late", True)),
        ({"command": "cancel", "step": "ask", "reason": "late"}, CancelStep("ask", "", "late")),
        ({"command": "pause", "by": "bo"}, PauseRun("bo", "")),
        ({"command": "pause", "step": "ask"}, PauseStep("ask", "", "")),
        ({"command": "resume"}, ResumeRun("", False)),
        ({"command": "resume", "single": True}, ResumeRun("", True)),
        ({"command": "resume", "step": "ask"}, ResumeStep("ask", "")),
        (
            {"command": "change_output", "step": "ask", "output": None, "by": "bo", "reason": "wrong"},
            ChangeOutput("ask", "null", "bo", "wrong"),
        ),
    ],
)
def test_each_command_can_be_said_in_json(data: dict[str, Any], command: Any) -> None:
    """What is left out has its default, payloads come in canonical form, and Avro says the same."""
    assert said(**data) == RunRequest(RUN, None, command)
    assert decode(codec.encode(RunRequest(RUN, None, command))) == RunRequest(RUN, None, command)


def test_every_command_has_a_word() -> None:
    """No command of the language is left out of the table, and each word's keys can be understood."""
    reached = {kind for word in WORDS.values() for kind in (word.run, word.step)} - {None}
    assert reached == set(RunRequest.__annotations__["command"].__args__)


def test_a_run_is_named_by_its_request_as_well() -> None:
    """`request_id` instead of `run_id`."""
    assert decode(b'{"request_id": "order-7", "command": "pause"}') == RunRequest(None, "order-7", PauseRun("", ""))


def test_a_payload_in_avro_becomes_canonical() -> None:
    """White space, and the order of keys, say nothing."""
    request = decode(codec.encode(RunRequest(None, "q", SignalReceived("", "n", None, '{ "b": 1, "a": 2 }', ""))))
    assert isinstance(request, RunRequest)
    assert isinstance(request.command, SignalReceived)
    assert request.command.payload == '{"a":2,"b":1}'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"command": "singal", "name": "x"}, "unknown command `singal`; did you mean `signal`?"),
        ({"command": 3}, "unknown command `3`; there are: signal,"),
        ({"command": "signal", "name": "x", "paylaod": 1}, "unknown key of `signal` `paylaod`; did you mean `payload`?"),
        ({"command": "cancel", "step": "a", "force": True}, "unknown key of `cancel` `force`"),
        ({"command": "resume", "step": "a", "single": True}, "unknown key of `resume` `single`"),
        ({"command": "approve", "step": "a", "approved": False, "by": "x"}, "unknown key of `approve` `approved`"),
        ({"command": "signal"}, "`signal` needs `name`"),
        ({"command": "signal", "name": ""}, "`name` is empty"),
        ({"command": "signal", "name": None}, "`name` is empty"),
        ({"command": "signal", "name": 4}, "`name` is a text"),
        ({"command": "approve", "by": "ann"}, "`approve` needs `step`"),
        ({"command": "approve", "step": "a"}, "`approve` needs `by`"),
        ({"command": "reject", "step": "a", "by": ""}, "who says so?"),
        ({"command": "change_output", "step": "a", "by": "x"}, "`change_output` needs `output`"),
        ({"command": "cancel", "force": 1}, "`force` is true or false"),
        ({"command": "cancel", "step": ""}, "`step` is empty"),
        ({"command": "pause", "request_id": "q"}, "by either `run_id` or `request_id`"),
        ({"command": "pause", "run_id": None}, "by either `run_id` or `request_id`"),
        ({"command": "pause", "run_id": 7}, "`run_id` is a text"),
        ({"command": "pause", "by": "\ud800"}, "not valid Unicode"),
        ({"command": "pau\ud800se"}, "unknown command"),
        ({"command": "pause", "\ud800": 1}, "unknown key"),
    ],
)
def test_a_wrong_command_says_what_is_right(data: dict[str, Any], says: str) -> None:
    """The nearest right spelling, and which run it was for."""
    refused = refusal({"run_id": RUN, **data})
    assert (refused.reason, says in str(refused)) == ("not_decodable", True), refused
    run = data.get("run_id", RUN)
    assert (refused.request_id, refused.run_id, refused.parent) == (None, run if isinstance(run, str) else None, None)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"workflow": "w", "inptu": 1}, "unknown key `inptu`; did you mean `input`?"),
        ({"workflow": "w", "break_at": "a"}, "`break_at` is a list of steps"),
        ({"workflow": "w", "break_at": [1]}, "`break_at` is a list of steps"),
        ({"workflow": "w", "break_at": ["\udfff"]}, "not valid Unicode"),
        ({"workflow": "w", "digest": 1}, "`digest` is a text"),
        ({"workflow": "w", "labels": {"a": "\ud800"}}, "not valid Unicode"),
        ({"workflow": "w", "origin": {"run_id": "r", "seq": 1}}, "`origin` is an object with `run_id`, `seq`, `head`"),
        ({"workflow": "w", "origin": {"run_id": "r", "seq": True, "head": "00"}}, "`origin.seq` is a whole number"),
        ({"workflow": "w", "origin": {"run_id": "r", "seq": 0, "head": "00"}}, "`origin.seq` is the number of a decision"),
        ({"workflow": "w", "origin": {"run_id": "r", "seq": 2**63, "head": "00"}}, "`origin.seq` is the number of a decision"),
        ({"workflow": "w", "copied": "{"}, "copied: not JSON"),
        ({"workflow": "w", "copied": '{"a": "\ud800"}'}, "`copied` is not valid Unicode"),
        ({"workflow": "w", "copied": []}, "`copied` is an object of results by step"),
        ({"workflow": "w", "copied": {"a": {"output": 1}}}, "copied.a: a result is an object with `status`"),
        ({"workflow": "w", "copied": {"a": {"status": "running"}}}, "a result is an object with `status` (cancelled, completed,"),
        ({"workflow": "w", "copied": {"a": {"status": ["completed"]}}}, "a result is an object with `status`"),
        ({"workflow": "w", "copied": {"a": {"status": "completed", "ouput": 1}}}, "did you mean `output`?"),
        ({"workflow": "w", "copied": {"a": {"status": "completed", "output": {}}}}, "copied.a.output is the text of"),
        ({"workflow": "w", "copied": {"a": {"status": "completed", "output": "x"}}}, "copied.a.output is the text of"),
        ({"workflow": "w", "copied": {"a": {"status": "failed", "error": "x"}}}, "copied.a.error is an object with"),
    ],
)
def test_a_wrong_request_says_what_is_right(data: dict[str, Any], says: str) -> None:
    """What doesn't fit is named; the request's id and who waits for it are kept, so that both can hear of it."""
    refused = refusal({"request_id": "order-7", "parent": PARENT, **data})
    assert (refused.reason, says in str(refused)) == ("not_decodable", True), refused
    assert (refused.request_id, refused.run_id, refused.parent) == ("order-7", None, Parent(RUN, "ask", "c1"))


@pytest.mark.parametrize(
    "data",
    [
        {"workflow": "w", "request_id": "x" * (MAX_TEXTS_BYTES + 1)},
        {"workflow": "w", "labels": {f"k{i}": "€" * 200 for i in range(120)}},
        {"workflow": "w", "copied": {"a": {"status": "completed", "output": "x" * MAX_COPIED_BYTES}}},
        {"workflow": "w", "break_at": ["undo(" * 300]},
        {"run_id": RUN, "command": "pause", "step": "s" * (MAX_PATH_CHARS + 1)},
        {"run_id": RUN, "command": "pause", "reason": "r" * MAX_TEXTS_BYTES},
    ],
)
def test_what_is_too_large_is_refused(data: dict[str, Any]) -> None:
    """Texts, paths and copied results have limits, so that every decision about them can be delivered."""
    refused = refusal(data)
    assert (refused.reason, "the limit is" in str(refused)) == ("too_large", True)


def test_a_fork_brings_its_origin_and_results() -> None:
    """`copied` may be an object or its text; `break_at` becomes a tuple."""
    copied = {
        "a": {"status": "completed", "output": '{"n":1}'},
        "b": {"status": "failed", "error": {"kind": "k", "message": "m"}},
    }
    data = {
        "workflow": "w",
        "break_at": ["b"],
        "origin": {"run_id": RUN, "seq": 4, "head": "ab"},
        "copied": copied,
        "parent": PARENT,
    }
    request = decode(json.dumps(data).encode())
    text = json.dumps(copied, sort_keys=True, separators=(",", ":"))
    parent, origin = Parent(RUN, "ask", "c1"), Origin(RUN, 4, "ab")
    assert request == WorkflowRequest("w", "{}", None, None, {}, parent, ("b",), origin, text)
    assert decode(json.dumps(data | {"copied": text}).encode()) == request
    assert decode(codec.encode(request)) == request


def test_the_schemas_id_tells_requests_apart() -> None:
    """Today's ids, those of released schemas, and those that nobody knows."""
    command = codec.encode(RunRequest(None, "q", PauseRun("", "")))
    asked = codec.encode(WorkflowRequest("w"))
    assert (codec.kind_of(command), codec.kind_of(asked)) == (RunRequest, WorkflowRequest)
    for kind, old in ((WorkflowRequest, 231552449), (InboxMessage, 2091945738), (Decision, 70387487)):
        assert catalog.ENTRIES[kind].id != old
        assert codec.kind_of(codec.FRAME.pack(0, old) + b"x") is kind
    assert [codec.kind_of(value) for value in (None, b"", b"{}", b"\0\0\0\0\7junk")] == [None] * 4
    with pytest.raises(RefusedError, match="not readable"):
        decode(codec.encode(InboxMessage("r", TimerFired("t", "s"))))


# --- Whatever comes ---

WRONG = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANY = st.recursive(WRONG, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
KEYS = sorted(
    {"run_id", "request_id", "command", *(each.name for each in fields(WorkflowRequest))}
    | {each.name for word in WORDS.values() for kind in (word.run, word.step) if kind for each in fields(kind)}
)


def answer(value: bytes | None) -> None:
    """Decode a value; nothing but a refusal is ever raised, and what is taken can be written as Avro and read again."""
    try:
        request = decode(value)
    except RefusedError as refused:
        assert str(refused).encode()
        return
    except Exception as error:
        raise AssertionError(f"{error!r} for {value!r}") from error
    assert decode(codec.encode(request)) == request


@given(st.binary(max_size=100) | ANY.map(json.dumps).map(str.encode))
def test_any_bytes_and_any_json_are_answered(value: bytes) -> None:
    """Whatever stands on the topic is a request or a refusal."""
    answer(value)


@given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(["q", "", "\ud800", 1, True, None, [], {}, ["a"]]) | ANY, max_size=8),
    st.sampled_from([*WORDS, None]),
)
def test_any_object_of_the_right_keys_is_answered(data: dict[str, Any], word: str | None) -> None:
    """Known keys with anything in them, too."""
    answer(json.dumps(data | ({} if word is None else {"command": word, "run_id": RUN})).encode())


@given(st.sampled_from([RunRequest, WorkflowRequest, Decision]), st.binary(max_size=60))
def test_any_avro_body_is_answered(kind: type[Any], body: bytes) -> None:
    """Foreign bytes behind a right framing, too."""
    answer(codec.framed(kind, body))


@given(st.sampled_from([None, "", "q"]), st.sampled_from([None, "", "r"]), st.text(max_size=5), st.text(max_size=5))
def test_any_command_in_avro_is_answered(asked: str | None, run: str | None, name: str, payload: str) -> None:
    """Texts that are no JSON, empty names, both ids or none: refused, never passed on."""
    for command in (
        SignalReceived(name, name, None, payload, ""),
        ChangeOutput(name, payload, name, ""),
        PauseStep(name, "", ""),
    ):
        try:
            value = codec.encode(RunRequest(run, asked, command))
        except UnicodeEncodeError:
            continue  # what Avro can't say can't come
        answer(value)
