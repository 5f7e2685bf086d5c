"""The table of poisons, of what is kept and read anew at a start: registries, dead letters, history, index and snapshots."""

import json
from dataclasses import replace
from typing import Any, Final

from poison import (
    CODECS,
    DEEP,
    FUTURE_MS,
    HONEST,
    LONG_AGO,
    MB,
    NO_RUN,
    SIGNAL,
    WAITING,
    Name,
    Passed,
    Poison,
    Scene,
    Shot,
    junk,
    one,
    single,
    spread,
)

from events import catalog, codec, ids, topics
from events.commands import StartRun, WorkflowRegistered
from events.decisions import (
    DeadLetter,
    Decision,
    FinishedRun,
    FinishedRuns,
    InputIgnored,
    LoopAdvanced,
    OutputChanged,
    RetryScheduled,
    RunCompleted,
    SchemaPublished,
    StepCompleted,
    StepCopied,
    TimerSet,
)
from events.failure import Failure, FailureKind
from events.ids import FIRST_PREV
from events.snapshots import RunSnapshot
from events.workers import CircuitReported, WorkerReported
from streams.workflow.spec import digest

OURS: Final = json.dumps(catalog.ENTRIES[FinishedRun].schema)
NOT_COUNTED: Final = Passed("it is nobody's decision")
FORGED: Final = Passed("a run that nobody asked for; nothing else suffers")


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


def packed(scene: Scene, runs: bytes, key: bytes | None = b"packed/1/0") -> Shot:
    """Return a pack of the index that nobody made, on the partition of NO_RUN."""
    return Shot(codec.encode(FinishedRuns(scene.decisions_id, runs)), key, partition=scene.home(NO_RUN))


def published(schema_id: int, name: str, text: str) -> Shot:
    """Return a schema as anybody can publish it."""
    return Shot(codec.encode(SchemaPublished(schema_id, name, text)), str(schema_id).encode())


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
SCHEMAS: Final = (
    Poison("bytes", topics.SCHEMAS, single(junk(SchemaPublished(1, "X", "{}"))), NOT_COUNTED, takeover=True),
    Poison(
        "texts under ids that aren't theirs",
        topics.SCHEMAS,
        lambda _: [
            published(0x7EADBEEF, "Decision", text) for text in (OURS, "{}", "[]", "null", '"string"', DEEP, '{"type": 7}')
        ],
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "another name for a schema of ours",
        topics.SCHEMAS,
        lambda _: [published(catalog.fingerprint(json.loads(OURS)), "Decision", OURS)],
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "tombstones",
        topics.SCHEMAS,
        lambda _: [Shot(None, key) for key in (b"", b"-1", b"\xff", "\u00b2".encode(), b"9" * 5000)],
        Passed("there is nothing to delete"),
        takeover=True,
    ),
    Poison(
        "tombstones of schemas of ours",
        topics.SCHEMAS,
        lambda _: [Shot(None, str(entry.id).encode()) for entry in catalog.ENTRIES.values()],
        Passed("who starts next publishes them again"),
        takeover=True,
    ),
    Poison("header names", topics.SCHEMAS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), NOT_COUNTED, takeover=True),
)
REPORT: Final = WorkerReported("forged", "tool", "host", 1, "1", 0, 0, 0, 0, (), ())
WORKERS: Final = (
    Poison("bytes", topics.WORKERS, single(junk(REPORT)), Passed("readers pass over it")),
    Poison(
        "odd facts",
        topics.WORKERS,
        lambda _: [
            Shot(codec.encode(report), b"w%d" % i)
            for i, report in enumerate(
                (
                    replace(REPORT, role="", started_at=(1 << 63) - 1, reported_at=-(1 << 63), pid=-(1 << 31)),
                    replace(REPORT, reported_at=FUTURE_MS, partitions=tuple(range(10_000))),
                    replace(REPORT, worker_id="[/]", host="[bold", version="\0", reported_at=FUTURE_MS),
                    replace(REPORT, reported_at=FUTURE_MS, breakers=(CircuitReported("[/]", "odd", 1 << 62, -1, -1, 0, "[/x]"),)),
                )
            )
        ],
        Passed("it is shown"),
    ),
    Poison("keys", topics.WORKERS, lambda _: [Shot(codec.encode(REPORT), key) for key in (b"", b"\xff")], Passed("it is shown")),
    Poison("header names", topics.WORKERS, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), Passed("readers pass over it")),
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
DECISIONS: Final = (
    Poison(
        "bytes",
        topics.DECISIONS,
        spread(junk(DECISION)),
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
    Poison("bytes", topics.FINISHED, spread(junk(FinishedRun(b"i" * 16, 5))), NOT_COUNTED, takeover=True),
    Poison(
        "bytes of packs", topics.FINISHED, spread(junk(FinishedRuns(b"i" * 16, b"")), b"packed/1/0"), NOT_COUNTED, takeover=True
    ),
    Poison(
        "packs that are none",
        topics.FINISHED,
        lambda s: [packed(s, runs) for runs in (b"", b"x", b"x" * 23, b"\xff" * 25, b"y" * 24 * 1000, b"z" * 8 * MB)],
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "packs under odd keys",
        topics.FINISHED,
        lambda s: [
            packed(s, b"x" * 24, key)
            for key in (b"", b"packed", b"packed/x", b"packed/-1/" + b"9" * 5000, b"\xff", NO_RUN.encode())
        ],
        FORGED,
        takeover=True,
    ),
    Poison(
        "a pack out of order",
        topics.FINISHED,
        lambda s: [packed(s, b"".join(bytes([each]) * 16 + (1 << 62).to_bytes(8) for each in (0xFF, 1, 0x80, 1, 0)))],
        FORGED,
        takeover=True,
    ),
    Poison(
        "a pack of another topic",
        topics.FINISHED,
        one(codec.encode(FinishedRuns(b"other" * 3 + b"!", b"x" * 24)), key=b"packed/1/0"),
        NOT_COUNTED,
        takeover=True,
    ),
    Poison(
        "an entry that begins before time",
        topics.FINISHED,
        lambda s: [Shot(codec.encode(FinishedRun(s.decisions_id, -5)), NO_RUN.encode(), partition=s.home(NO_RUN))],
        FORGED,
        takeover=True,
    ),
    Poison(
        "keys",
        topics.FINISHED,
        lambda s: [Shot(codec.encode(FinishedRun(s.decisions_id, -5)), key) for key in (b"", b"\xff" * 100)],
        NOT_COUNTED,
        takeover=True,
    ),
    Poison("header names", topics.FINISHED, one(b"x", headers=[(Name(b"\xff\xfe"), b"x")]), NOT_COUNTED, takeover=True),
)
SNAPSHOTS: Final = (
    Poison(
        "keys",
        topics.SNAPSHOTS,
        lambda _: [Shot(b"x", key, partition=0) for key in (b"", b"\xff", b"/", b"x/", b"x/-1", b"x/y")],
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
KEPT: Final = (*SPECS, *SCHEMAS, *WORKERS, *DEADLETTER, *DECISIONS, *INDEX, *SNAPSHOTS)
