"""The table of poisons, of the work queues: what outsiders put there, and what becomes of it. `POISONS` is all of it."""

import json
from dataclasses import replace
from typing import Any, Final

from poison import (
    CODECS,
    DEEP,
    FULL,
    FUTURE_MS,
    HONEST,
    LONG_AGO,
    MB,
    NO_RUN,
    SIGNAL,
    WAITING,
    Dead,
    Decided,
    Name,
    Passed,
    Poison,
    Shot,
    again,
    junk,
    one,
    single,
    spread,
)
from poisons_kept import KEPT

from events import codec, ids, topics
from events.calls import CancelCall, LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import StartRun, WorkflowRequest
from events.failure import Failure, FailureKind
from events.results import ChildRunCompleted, InboxMessage, TimerFired, ToolCallCompleted, ToolCallFailed

REQUEST: Final = WorkflowRequest(HONEST.name, '{"text": "x"}', "poison-request")
TOOL: Final = ToolCall("c" * 32, "no-run", ToolCallRequested("step", 1, "echo", '{"value": "x"}', FUTURE_MS))
LLM: Final = LlmCall("c" * 32, "no-run", LlmCallRequested("step", 1, None, "[]", "{}", None, FUTURE_MS))
FAILED: Final = ToolCallFailed("c" * 32, "wait", Failure(FailureKind.TOOL_CRASHED, "forged"), None, 1)


def asked(**changes: Any) -> bytes:
    """Return a request as people write it."""
    return json.dumps({"workflow": HONEST.name, "input": {"text": "x"}} | changes).encode()


def raw(text: str) -> bytes:
    """Return a request whose input is this text, which need not be JSON."""
    return b'{"workflow": "honest", "input": ' + text.encode("utf-8", "surrogatepass") + b"}"


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
    Poison("header names", topics.REQUESTS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), Dead("not_decodable")),
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
        Decided("already_started"),
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

LONG: Final = "x" * 5 * MB
AGAIN: Final = Passed("a call that is put on the queue twice is one call, and these bytes are a dead letter already")
TOOLS: Final = (
    Poison("bytes", topics.TOOL_CALLS, spread(junk(TOOL)[1:]), Dead("not_decodable")),
    Poison("a tombstone, and the same bytes again", topics.TOOL_CALLS, again(junk(TOOL)), AGAIN),
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
        Dead("too_large"),
    ),
    Poison(
        "a call's id, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id=LONG))),
        Dead("too_large"),
    ),
    Poison(
        "a run's id, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="r", run_id=LONG))),
        Dead("too_large"),
    ),
    Poison(
        "a step, very long",
        topics.TOOL_CALLS,
        one(codec.encode(replace(TOOL, call_id="p", request=replace(TOOL.request, step="s" * (FULL - 600))))),
        Dead("too_large"),
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
    Poison("bytes", topics.LLM_CALLS, spread(junk(LLM)[1:]), Dead("not_decodable")),
    Poison("a tombstone, and the same bytes again", topics.LLM_CALLS, again(junk(LLM)), AGAIN),
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
        Dead("too_large"),
    ),
    Poison(
        "a call's id, very long",
        topics.LLM_CALLS,
        one(codec.encode(replace(LLM, call_id=LONG, request=replace(LLM.request, messages="")))),
        Dead("too_large"),
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
POISONS: Final = (*REQUESTS, *INBOX, *TOOLS, *LLMS, *CANCELLATIONS, *KEPT)
