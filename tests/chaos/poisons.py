"""The table of poisons: what outsiders put on the topics, and what becomes of it."""

import json
from dataclasses import replace
from typing import Any, Final

from poison import (
    CODECS,
    DEEP,
    FUTURE_MS,
    HONEST,
    MB,
    RECORD_LIMIT,
    WAITING,
    Dead,
    Decided,
    Name,
    Passed,
    Poison,
    Scene,
    Shot,
    junk,
    nobodys,
    one,
    single,
    spread,
)

from events import codec, ids, topics
from events.calls import CancelCall, LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import SignalReceived, StartRun, WorkflowRegistered, WorkflowRequest
from events.decisions import (
    DeadLetter,
    Decision,
    FinishedRun,
    InputIgnored,
    LoopAdvanced,
    OutputChanged,
    RetryScheduled,
    RunCompleted,
    StepCompleted,
    StepCopied,
    TimerSet,
)
from events.failure import Failure, FailureKind
from events.ids import FIRST_PREV
from events.results import ChildRunCompleted, InboxMessage, TimerFired, ToolCallCompleted, ToolCallFailed
from events.snapshots import RunSnapshot
from streams.workflow.spec import digest

SIGNAL: Final = SignalReceived("s", "never-awaited", None, "null", "somebody")
REQUEST: Final = WorkflowRequest(HONEST.name, '{"text": "x"}', "poison-request")
TOOL: Final = ToolCall("c" * 32, "no-run", ToolCallRequested("step", 1, "echo", '{"value": "x"}', FUTURE_MS))
LLM: Final = LlmCall("c" * 32, "no-run", LlmCallRequested("step", 1, None, "[]", "{}", None, FUTURE_MS))
FAILED: Final = ToolCallFailed("c" * 32, "wait", Failure(FailureKind.TOOL_CRASHED, "forged"), None, 1)
FULL: Final = RECORD_LIMIT - 400
"""The largest key or value that a topic takes, less some bytes for the batch around it."""
LONG_AGO: Final = (1, 1_000_000_000)
"""Milliseconds since the epoch. Times to come the broker refuses."""
NO_RUN: Final = ids.run_id("nobody asked for this")


def asked(**changes: Any) -> bytes:
    """Return a request as people write it."""
    return json.dumps({"workflow": HONEST.name, "input": {"text": "x"}} | changes).encode()


def raw(text: str) -> bytes:
    """Return a request whose input is this text, which need not be JSON."""
    return b'{"workflow": "honest", "input": ' + text.encode("utf-8", "surrogatepass") + b"}"


def registered(spec: str, name: str = "poison") -> bytes:
    """Return a workflow version whose digest is right, whatever it says."""
    return codec.encode(WorkflowRegistered(name, digest(spec), spec))


def decided(scene: Scene, *effects: Any, name: str = "forged", cause: Any = None, seq: int = 1) -> Shot:
    """Return a decision that nobody made, where it would stand: the first of a run, unless `seq` says otherwise."""
    run = ids.run_id(name)
    start = StartRun(name, WAITING.name, WAITING.digest, "{}")
    decision = Decision(run, seq, FIRST_PREV, scene.inbox_id, 1 << 40, 0, cause or start, effects)
    return Shot(codec.encode(decision), run.encode(), partition=scene.home(run))


def snapshot(scene: Scene, **changes: Any) -> RunSnapshot:
    """Return a snapshot that nobody made."""
    kept = RunSnapshot(
        *(NO_RUN, scene.decisions_id, 0, 3, b"h" * 32, scene.inbox_id, 0, 0, WAITING.name, WAITING.digest, "{}", 0),
        *(None, None, 0, False, (), None, (), (), (), (), None, (), ()),
    )
    return replace(kept, **changes)


def kept(key: str, value: bytes | None, **record: Any) -> Any:
    """Return a record of `snapshots` on the partition of NO_RUN."""
    return lambda scene: [Shot(value, key.encode("utf-8", "surrogateescape"), partition=scene.home(NO_RUN), **record)]


NO_UTF8: Final = "aiokafka decodes header names as UTF-8 and raises: intake ends, and again at every start"
REQUESTS: Final = (
    Poison("bytes", topics.REQUESTS, spread(junk(REQUEST)), Dead("not_decodable")),
    Poison("deep JSON", topics.REQUESTS, one(DEEP.encode()), Dead("not_decodable")),
    Poison("deep input", topics.REQUESTS, one(raw(DEEP)), Dead("not_decodable")),
    Poison("deep input in Avro", topics.REQUESTS, one(codec.encode(replace(REQUEST, input=DEEP))), Dead("invalid_input")),
    Poison(
        "numbers that are none",
        topics.REQUESTS,
        spread([raw(text) for text in ("1e400", "-1e400", "NaN", "Infinity", "[1, NaN]", "1" + "0" * 5000)]),
        Dead("not_decodable"),
    ),
    Poison(
        "lone surrogates",
        topics.REQUESTS,
        spread([asked(request_id="\ud800"), asked(labels={"\ud800": "x"}), asked(workflow="\udfff"), raw('"\ud800"')]),
        Dead("not_decodable"),
    ),
    Poison(
        "not an object", topics.REQUESTS, spread([b"null", b"[]", b"1", b'"x"', b"{}", b'{"workflow": 1}']), Dead("not_decodable")
    ),
    Poison("unknown workflow", topics.REQUESTS, one(asked(workflow="none")), Dead("unknown_workflow")),
    Poison("forged digest", topics.REQUESTS, one(asked(digest="0" * 64)), Dead("unknown_workflow")),
    Poison("unknown command", topics.REQUESTS, one(b'{"run_id": "x", "command": "drop"}'), Dead("not_decodable")),
    Poison(
        "long texts",
        topics.REQUESTS,
        spread([asked(request_id="r" * 100_000), asked(labels={"l": "x" * 8 * MB})]),
        Dead("too_large"),
    ),
    Poison("unknown key, very long", topics.REQUESTS, one(asked(**{"k" * 8 * MB: 1})), Dead("not_decodable")),
    Poison("workflow, very long", topics.REQUESTS, one(asked(workflow="w" * 8 * MB)), Dead("too_large")),
    Poison("value just below the limit", topics.REQUESTS, one(b"\0" * FULL, key=None), Dead("not_decodable")),
    Poison("key just below the limit", topics.REQUESTS, one(b"x", key=b"k" * FULL), Dead("not_decodable")),
    Poison("key of bytes", topics.REQUESTS, one(b"x", key=b"\xff" * 4 * MB), Dead("not_decodable")),
    Poison("header just below the limit", topics.REQUESTS, one(b"x", headers=[("h", b"h" * FULL)]), Dead("not_decodable")),
    Poison("many headers", topics.REQUESTS, one(b"x", headers=[(f"h{i}", b"v") for i in range(50_000)]), Dead("not_decodable")),
    Poison(
        "a small batch of 40 MB",
        topics.REQUESTS,
        lambda _: [Shot(b"\0" * 40 * MB, codec=name) for name in ("gzip", "zstd", "lz4")],
        Dead("not_decodable"),
    ),
    Poison("a key of 40 MB", topics.REQUESTS, one(b"x", key=b"\0" * 40 * MB, codec="zstd"), Dead("not_decodable")),
    Poison(
        "keys",
        topics.REQUESTS,
        lambda _: [Shot(b"x", key) for key in (None, b"", b"\xff\xfe", b"\0", "\ud800".encode("utf-8", "surrogatepass"))],
        Dead("not_decodable"),
    ),
    Poison(
        "headers",
        topics.REQUESTS,
        one(b"x", headers=[("a", b"1"), ("a", b"2"), ("a", None), ("", b"x"), ("ce_id", b"\xff\xfe"), ("traceparent", b"\0")]),
        Dead("not_decodable"),
    ),
    Poison("header names", topics.REQUESTS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), Dead("not_decodable"), stops=NO_UTF8),
    Poison(
        "times",
        topics.REQUESTS,
        lambda _: [Shot(b"x", timestamp=at) for at in LONG_AGO],
        Dead("not_decodable"),
    ),
    Poison("codecs", topics.REQUESTS, lambda _: [Shot(b"x" * 500, codec=each) for each in CODECS], Dead("not_decodable")),
    Poison(
        "headers that look like ours",
        topics.REQUESTS,
        one(b"x", headers=[("foldflow_redriven", b"\xff"), ("foldflow_due", b"soon")]),
        Dead("not_decodable"),
    ),
)


INBOX: Final = (
    Poison(
        "bytes for no run",
        topics.INBOX,
        spread(junk(InboxMessage(NO_RUN, SIGNAL))),
        Dead("unreadable"),
    ),
    Poison(
        "bytes for an open run",
        topics.INBOX,
        lambda s: [Shot(each, s.open.encode(), partition=s.home(s.open)) for each in junk(InboxMessage(s.open, SIGNAL))],
        Decided("unreadable", "unreadable"),
    ),
    Poison(
        "bytes for a finished run",
        topics.INBOX,
        lambda s: [Shot(each, s.over.encode(), partition=s.home(s.over)) for each in junk(InboxMessage(s.over, SIGNAL))],
        Dead("unreadable"),
    ),
    Poison("result for no run", topics.INBOX, lambda s: [s.said(NO_RUN, FAILED)], Dead("unknown_run")),
    Poison("result for a finished run", topics.INBOX, lambda s: [s.said(s.over, FAILED)], Passed("the run is over")),
    Poison("forged call_id", topics.INBOX, lambda s: [s.said(s.open, FAILED)], Decided("unknown_call")),
    Poison(
        "another run's call_id",
        topics.INBOX,
        lambda s: [s.said(s.open, replace(FAILED, call_id=ids.effect_id(b"x" * 32, 0)))],
        Decided("unknown_call"),
    ),
    Poison(
        "result for no step",
        topics.INBOX,
        lambda s: [s.said(s.open, replace(FAILED, step="nowhere[9].x"))],
        Decided("unknown_call"),
    ),
    Poison(
        "deep JSON in a result",
        topics.INBOX,
        lambda s: [s.said(s.open, ToolCallCompleted("c" * 32, "wait", DEEP, "1", 1))],
        Decided("unknown_call"),
    ),
    Poison(
        "result with texts that are numbers",
        topics.INBOX,
        lambda s: [
            s.said(s.open, ToolCallCompleted("c" * 32, "wait", text, "1", 1)) for text in ("1e400", "NaN", "1" + "0" * 10_000)
        ],
        Decided("unknown_call"),
    ),
    Poison(
        "child's result that nobody waits for",
        topics.INBOX,
        lambda s: [s.said(s.open, ChildRunCompleted("c" * 32, "wait", NO_RUN, "null"))],
        Decided("unknown_call"),
    ),
    Poison("forged timer", topics.INBOX, lambda s: [s.said(s.open, TimerFired("t" * 32, "wait"))], Decided("unknown_timer")),
    Poison("forged time limit", topics.INBOX, lambda s: [s.said(s.open, TimerFired("t" * 32, ""))], Decided("unknown_timer")),
    Poison(
        "start of an open run, once more",
        topics.INBOX,
        lambda s: [s.said(s.open, StartRun("open", WAITING.name, WAITING.digest, "{}"))],
        Decided("duplicate"),
    ),
    Poison(
        "start of a finished run",
        topics.INBOX,
        lambda s: [s.said(s.over, StartRun("over", HONEST.name, HONEST.digest, "{}"))],
        Passed("the run is over, and starts once only"),
    ),
    Poison(
        "start under another run's id",
        topics.INBOX,
        lambda s: [s.said(NO_RUN, StartRun("another", WAITING.name, WAITING.digest, "{}"))],
        Dead("unreadable"),
    ),
    Poison(
        "start on a wrong partition",
        topics.INBOX,
        lambda s: [
            s.said(
                ids.run_id("misplaced"),
                StartRun("misplaced", WAITING.name, WAITING.digest, "{}"),
                partition=(s.home(ids.run_id("misplaced")) + 1) % s.partitions,
            )
        ],
        Dead("unreadable"),
    ),
    Poison(
        "input on a wrong partition",
        topics.INBOX,
        lambda s: [s.said(s.open, SIGNAL, partition=(s.home(s.open) + 1) % s.partitions)],
        Dead("unknown_run"),
    ),
    Poison(
        "key of another run",
        topics.INBOX,
        lambda s: [s.said(NO_RUN, SIGNAL, key=s.open, partition=s.home(s.open))],
        Decided("unreadable", "unreadable"),
    ),
    Poison("key just below the limit", topics.INBOX, one(b"x", key=b"k" * FULL), Dead("unreadable")),
    Poison("key of bytes", topics.INBOX, one(b"x", key=b"\xff" * 4 * MB), Dead("unreadable")),
    Poison("value just below the limit", topics.INBOX, one(b"\0" * FULL, key=b""), Dead("too_large")),
    Poison("a small batch of 40 MB", topics.INBOX, one(b"\0" * 40 * MB, codec="zstd"), Dead("too_large")),
    Poison(
        "a small batch of 40 MB for an open run",
        topics.INBOX,
        lambda s: [Shot(b"\0" * 40 * MB, s.open.encode(), partition=s.home(s.open), codec="zstd")],
        Decided("unreadable", "unreadable"),
    ),
    Poison(
        "an input of 2 MB for an open run",
        topics.INBOX,
        lambda s: [s.said(s.open, replace(SIGNAL, signal_id="large", payload=json.dumps("x" * (2 * MB - 5000))))],
        Passed("it is kept"),
    ),
    Poison("header just below the limit", topics.INBOX, one(b"x", headers=[("h", b"h" * FULL)]), Dead("unreadable")),
    Poison(
        "keys",
        topics.INBOX,
        lambda _: [Shot(b"x", key) for key in (None, b"", b"\xff\xfe", b"\0", b"\0" * 36)],
        Dead("unreadable"),
    ),
    Poison(
        "headers",
        topics.INBOX,
        one(b"x", headers=[("a", b"1"), ("a", b"2"), ("a", None), ("", b"x"), ("ce_id", b"\xff\xfe"), ("traceparent", b"\0")]),
        Dead("unreadable"),
    ),
    Poison("header names", topics.INBOX, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), Dead("unreadable")),
    Poison("codecs", topics.INBOX, lambda _: [Shot(b"x" * 500, codec=each) for each in CODECS], Dead("unreadable")),
    Poison(
        "signal of deep JSON, and of none",
        topics.INBOX,
        lambda s: [
            s.said(s.open, replace(SIGNAL, signal_id=f"deep{i}", payload=text)) for i, text in enumerate((DEEP, "NaN", "\0", ""))
        ],
        Passed("it is kept"),
    ),
)

LARGE_RESULT: Final = "a call with such ids has a result that no record holds: the worker ends, for ever"
NO_DEFINITION: Final = "the views raise RecursionError for deep JSON: the api ends, for ever"
LONG: Final = "x" * 5 * MB
TOOLS: Final = (
    Poison("bytes", topics.TOOL_CALLS, spread(junk(TOOL)), Dead("not_decodable")),
    Poison("a call of no run", topics.TOOL_CALLS, one(codec.encode(TOOL)), Passed("the result is a dead letter of the inbox")),
    Poison(
        "arguments of deep JSON",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="d", request=replace(TOOL.request, arguments=DEEP)))),
        Passed("the result says so"),
    ),
    Poison(
        "arguments that are numbers",
        topics.TOOL_CALLS,
        spread(
            [
                codec.encode(replace(TOOL, call_id="n" + text[:4], request=replace(TOOL.request, arguments=text)))
                for text in ("1e400", "NaN", "1" + "0" * 10_000, "[]", "null")
            ]
        ),
        Passed("the result says so"),
    ),
    Poison(
        "a deadline beyond time",
        topics.TOOL_CALLS,
        spread(
            [
                codec.encode(replace(TOOL, call_id=f"t{at}", request=replace(TOOL.request, deadline=at)))
                for at in ((1 << 63) - 1, -(1 << 63), 0)
            ]
        ),
        Passed("the result says so"),
    ),
    Poison(
        "a run's id with slashes",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="s", run_id="../../x\0y"))),
        Passed("the result is a dead letter of the inbox"),
    ),
    Poison(
        "unknown tool, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="u", request=replace(TOOL.request, tool="t" * (FULL - 1000))))),
        Passed("the result says so"),
    ),
    Poison(
        "a call's id, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id=LONG))),
        Passed("the result says so"),
        broken=LARGE_RESULT,
    ),
    Poison(
        "a run's id, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="r", run_id=LONG))),
        Passed("the result says so"),
        broken=LARGE_RESULT,
    ),
    Poison(
        "a step, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="p", request=replace(TOOL.request, step="s" * (FULL - 600))))),
        Passed("the result says so"),
    ),
    Poison("key just below the limit", topics.TOOL_CALLS, one(b"x", key=b"k" * FULL), Dead("not_decodable")),
    Poison("a small batch of 40 MB", topics.TOOL_CALLS, one(b"\0" * 40 * MB, codec="zstd"), Dead("not_decodable")),
    Poison(
        "keys",
        topics.TOOL_CALLS,
        lambda _: [Shot(b"x%d" % i, key) for i, key in enumerate((None, b"", b"\xff\xfe", b"\0"))],
        Dead("not_decodable"),
    ),
    Poison(
        "headers", topics.TOOL_CALLS, one(b"h", headers=[("a", b"1"), ("a", None), ("ce_id", b"\xff\xfe")]), Dead("not_decodable")
    ),
    Poison("header names", topics.TOOL_CALLS, one(b"hn", headers=[(Name(b"\xff\xfe"), b"x")]), Dead("not_decodable")),
    Poison(
        "times",
        topics.TOOL_CALLS,
        lambda _: [Shot(b"t%d" % at, timestamp=at) for at in LONG_AGO],
        Dead("not_decodable"),
    ),
    Poison(
        "codecs", topics.TOOL_CALLS, lambda _: [Shot(each.encode() * 200, codec=each) for each in CODECS], Dead("not_decodable")
    ),
)
LLMS: Final = (
    Poison("bytes", topics.LLM_CALLS, spread(junk(LLM)), Dead("not_decodable")),
    Poison(
        "messages that are none",
        topics.LLM_CALLS,
        spread(
            [
                codec.encode(replace(LLM, call_id=f"m{i}", request=replace(LLM.request, messages=text)))
                for i, text in enumerate((DEEP, "NaN", "1e400", "null", "", '[{"role": 1}]', "[[]]"))
            ]
        ),
        Passed("the result says so"),
    ),
    Poison(
        "parameters that are none",
        topics.LLM_CALLS,
        spread(
            [
                codec.encode(replace(LLM, call_id=f"p{i}", request=replace(LLM.request, parameters=text)))
                for i, text in enumerate((DEEP, "[]", "1", '{"model": 1}', '{"temperature": "x"}'))
            ]
        ),
        Passed("the result says so"),
    ),
    Poison(
        "schemas that are none",
        topics.LLM_CALLS,
        spread(
            [
                codec.encode(replace(LLM, call_id=f"s{i}", request=replace(LLM.request, schema=text)))
                for i, text in enumerate((DEEP, "[]", "1", '{"type": 7}'))
            ]
        ),
        Passed("the result says so"),
    ),
    Poison(
        "a model, very long",
        topics.LLM_CALLS,
        one(codec.encode(replace(LLM, call_id="l", request=replace(LLM.request, model="m" * (FULL - 600))))),
        Passed("the result says so"),
        broken=LARGE_RESULT,
    ),
    Poison(
        "a call's id, very long",
        topics.LLM_CALLS,
        one(codec.encode(replace(LLM, call_id=LONG, request=replace(LLM.request, messages="")))),
        Passed("the result says so"),
        broken=LARGE_RESULT,
    ),
    Poison("key just below the limit", topics.LLM_CALLS, one(b"x", key=b"k" * FULL), Dead("not_decodable")),
    Poison("header names", topics.LLM_CALLS, one(b"hn", headers=[(Name(b"\xff\xfe"), b"x")]), Dead("not_decodable")),
    Poison(
        "codecs", topics.LLM_CALLS, lambda _: [Shot(each.encode() * 200, codec=each) for each in CODECS], Dead("not_decodable")
    ),
)
CANCEL: Final = CancelCall("c" * 32, NO_RUN, "step", "no")
CANCELLATIONS: Final = (
    Poison("bytes", topics.CANCELLATIONS, single(junk(CANCEL)), Passed("workers log it")),
    Poison(
        "long texts",
        topics.CANCELLATIONS,
        single([codec.encode(replace(CANCEL, call_id=LONG)), codec.encode(replace(CANCEL, reason=LONG))]),
        Passed("no such call"),
    ),
    Poison(
        "keys and headers",
        topics.CANCELLATIONS,
        lambda _: [Shot(b"x", None), Shot(b"x", b"\xff" * 9 * 1000, [("a", None)], timestamp=1)],
        Passed("workers log it"),
    ),
    Poison("header names", topics.CANCELLATIONS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), Passed("workers log it")),
    Poison("codecs", topics.CANCELLATIONS, lambda _: [Shot(b"x" * 500, codec=each) for each in CODECS], Passed("workers log it")),
)
SPECS: Final = (
    Poison("bytes", topics.SPECS, single(junk(WorkflowRegistered("n", "d", "{}"))), Passed("readers log it")),
    Poison(
        "forged digest",
        topics.SPECS,
        one(codec.encode(WorkflowRegistered(HONEST.name, HONEST.digest, WAITING.canonical))),
        Passed("it isn't what it says"),
    ),
    Poison(
        "no definition, with its right digest",
        topics.SPECS,
        single(
            [
                registered(text, "other")
                for text in (
                    "",
                    "{}",
                    "[]",
                    "null",
                    DEEP,
                    "NaN",
                    "1e400",
                    '{"name": "other", "steps": []}',
                    '{"steps": [{"name": 1}]}',
                    '{"steps": 1}',
                )
            ]
        ),
        Passed("nobody asks for it"),
        broken=NO_DEFINITION,
    ),
    Poison(
        "no definition, as the newest of a workflow in use",
        topics.SPECS,
        one(registered('{"name": "honest", "steps": "none"}', HONEST.name)),
        Passed("the newest that is one counts"),
    ),
    Poison(
        "another workflow's definition under a name in use",
        topics.SPECS,
        one(registered(WAITING.canonical, HONEST.name)),
        Passed("its name isn't that of the definition"),
    ),
    Poison(
        "names",
        topics.SPECS,
        single([registered("{}", name) for name in ("", "\0", "x" * MB)]),
        Passed("nobody asks for it"),
    ),
    Poison(
        "times",
        topics.SPECS,
        lambda _: [Shot(registered("{}"), timestamp=at) for at in LONG_AGO],
        Passed("nobody asks for it"),
    ),
    Poison("header names", topics.SPECS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), Passed("readers log it")),
    Poison("codecs", topics.SPECS, lambda _: [Shot(b"x" * 500, codec=each) for each in CODECS], Passed("readers log it")),
)
LETTER: Final = DeadLetter("t", 0, 0, 0, "r", "d", "q", "r", b"k", b"v", {"h": None})
DEADLETTER: Final = (
    Poison("bytes", topics.DEADLETTER, spread(junk(LETTER)), Passed("there is no place further back")),
    Poison("about itself", topics.DEADLETTER, one(codec.encode(replace(LETTER, topic="deadletter"))), Passed("it is listed")),
    Poison(
        "odd facts",
        topics.DEADLETTER,
        spread(
            [
                codec.encode(replace(LETTER, partition=-1, offset=-(1 << 63), timestamp=-(1 << 63))),
                codec.encode(replace(LETTER, partition=(1 << 31) - 1, offset=(1 << 63) - 1, timestamp=(1 << 63) - 1)),
                codec.encode(replace(LETTER, topic="\0", reason="\0" * 1000, detail="x" * MB, key=b"\xff" * MB)),
            ]
        ),
        Passed("it is listed"),
    ),
    Poison(
        "header names",
        topics.DEADLETTER,
        one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]),
        Passed("there is no place further back"),
        stops=NO_UTF8,
    ),
    Poison(
        "times",
        topics.DEADLETTER,
        lambda _: [Shot(b"x", timestamp=at) for at in LONG_AGO],
        Passed("there is no place further back"),
    ),
    Poison(
        "codecs",
        topics.DEADLETTER,
        lambda _: [Shot(b"x" * 500, codec=each) for each in CODECS],
        Passed("there is no place further back"),
    ),
    Poison(
        "a small batch of 40 MB", topics.DEADLETTER, one(b"\0" * 40 * MB, codec="zstd"), Passed("there is no place further back")
    ),
)

DECISION: Final = Decision(NO_RUN, 1, FIRST_PREV, b"i" * 16, 0, 0, SIGNAL, (InputIgnored("late"),))
NOT_COUNTED: Final = Passed("it is nobody's decision")
FORGED: Final = Passed("a run that nobody asked for; nothing else suffers")
DECISIONS: Final = (
    Poison(
        "bytes",
        topics.DECISIONS,
        spread(nobodys(DECISION)),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "ends what it never began",
        topics.DECISIONS,
        lambda s: [decided(s, RunCompleted("null"), seq=5, name="f5")],
        FORGED,
        takeover=True,
    ),
    Poison("completes a run", topics.DECISIONS, lambda s: [decided(s, RunCompleted(DEEP), name="fc")], FORGED, takeover=True),
    Poison(
        "a step that isn't there",
        topics.DECISIONS,
        lambda s: [decided(s, StepCompleted("none", None, None), name="fs")],
        FORGED,
        takeover=True,
    ),
    Poison(
        "a retry of nothing",
        topics.DECISIONS,
        lambda s: [decided(s, RetryScheduled("none", 2, Failure(FailureKind.TIMEOUT, "x"), FUTURE_MS), name="fr")],
        FORGED,
        takeover=True,
    ),
    Poison("a copy of nothing", topics.DECISIONS, lambda s: [decided(s, StepCopied("none"), name="fy")], FORGED, takeover=True),
    Poison(
        "an output of nothing", topics.DECISIONS, lambda s: [decided(s, OutputChanged("none"), name="fo")], FORGED, takeover=True
    ),
    Poison(
        "a loop of nothing", topics.DECISIONS, lambda s: [decided(s, LoopAdvanced("none", 3), name="fl")], FORGED, takeover=True
    ),
    Poison(
        "a timer at the end of time",
        topics.DECISIONS,
        lambda s: [decided(s, TimerSet("", (1 << 63) - 1), name="ft")],
        FORGED,
        takeover=True,
    ),
    Poison("no effects", topics.DECISIONS, lambda s: [decided(s, name="fn")], FORGED, takeover=True),
    Poison(
        "an unknown failure's kind",
        topics.DECISIONS,
        lambda s: [decided(s, RetryScheduled("none", 1, Failure("odd", "x"), 1), name="fk")],
        FORGED,
        takeover=True,
    ),
    Poison("header names", topics.DECISIONS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), NOT_COUNTED, takeover=True),
    Poison("codecs", topics.DECISIONS, lambda _: [Shot(b"x" * 500, codec=each) for each in CODECS], NOT_COUNTED, takeover=True),
)
INDEX: Final = (
    Poison("bytes", topics.FINISHED, spread(nobodys(FinishedRun(b"i" * 16, 5))), NOT_COUNTED, takeover=True),
    Poison(
        "keys",
        topics.FINISHED,
        lambda s: [Shot(codec.encode(FinishedRun(s.decisions_id, -5)), key) for key in (None, b"", b"\xff" * 100)],
        NOT_COUNTED,
        takeover=True,
    ),
    Poison("header names", topics.FINISHED, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), NOT_COUNTED, takeover=True),
)
SNAPSHOTS: Final = (
    Poison(
        "keys",
        topics.SNAPSHOTS,
        lambda _: [Shot(b"x", key, partition=0) for key in (None, b"", b"\xff", b"/", b"x/", b"x/-1", b"x/y")],
        NOT_COUNTED,
        takeover=True,
    ),
    Poison("key with an odd digit", topics.SNAPSHOTS, kept(f"{NO_RUN}/²", b"x"), NOT_COUNTED, takeover=True),
    Poison("key with many digits", topics.SNAPSHOTS, kept(f"{NO_RUN}/" + "9" * 5000, b"x"), NOT_COUNTED, takeover=True),
    Poison(
        "key of a number beyond SQLite",
        topics.SNAPSHOTS,
        lambda s: kept(f"{NO_RUN}/{1 << 64}", codec.encode(snapshot(s)))(s),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "tombstone of a number beyond SQLite", topics.SNAPSHOTS, kept(f"{NO_RUN}/{1 << 64}", None), NOT_COUNTED, takeover=True
    ),
    Poison("bytes", topics.SNAPSHOTS, kept(f"{NO_RUN}/1", b"x"), NOT_COUNTED, takeover=True),
    Poison("another topic's schema", topics.SNAPSHOTS, kept(f"{NO_RUN}/2", codec.encode(LETTER)), NOT_COUNTED, takeover=True),
    Poison(
        "a due time that is none",
        topics.SNAPSHOTS,
        lambda s: kept(f"{NO_RUN}/4", codec.encode(snapshot(s)), headers=[("foldflow_due", b"soon")])(s),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "a due time beyond SQLite",
        topics.SNAPSHOTS,
        lambda s: kept(f"{NO_RUN}/4", codec.encode(snapshot(s)), headers=[("foldflow_due", b"9" * 30)])(s),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "due now, cut",
        topics.SNAPSHOTS,
        lambda s: kept(f"{NO_RUN}/4", codec.encode(snapshot(s))[:40], headers=[("foldflow_due", b"1")])(s),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "due now, of a status that is none",
        topics.SNAPSHOTS,
        lambda s: kept(f"{NO_RUN}/4", codec.encode(snapshot(s, copied="[", listening=())), headers=[("foldflow_due", b"1")])(s),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison("a forged run", topics.SNAPSHOTS, lambda s: kept(f"{NO_RUN}/4", codec.encode(snapshot(s)))(s), FORGED, takeover=True),
    Poison("header names", topics.SNAPSHOTS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), NOT_COUNTED, takeover=True),
)
POISONS: Final = (
    *(*REQUESTS, *INBOX, *TOOLS, *LLMS, *CANCELLATIONS, *SPECS, *DEADLETTER),
    *(*DECISIONS, *INDEX, *SNAPSHOTS),
)
