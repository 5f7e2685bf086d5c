"""The ledger as the checker sees it: every record, decoded by itself, and which decisions count.

A decision counts if its `prev` is the hash of the last one of its run that counts, in the order of its partition. Everything else
is ignored; whether it may be there is for the rules to say, so here it only gets the reason that would explain it.
"""

import json
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from checking import avro
from checking.records import Arrival, Disruption, Record, Wanted

RUNS: Final = uuid.UUID("8f6a3a7e-5f0d-5c53-9d1e-0b6f5d2c7a11")
FIRST_PREV: Final = bytes(32)
ENDS: Final = {"RunCompleted": "completed", "RunFailed": "failed", "RunCancelled": "cancelled"}
CALLS: Final = {"ToolCallRequested": "ToolCall", "LlmCallRequested": "LlmCall", "ChildRunRequested": "ChildRun"}
RESULTS: Final = {f"{call}{end}": call for call in CALLS.values() for end in ("Completed", "Failed")}
_NAMED_BY: Final = {"StartRun": "request_id", "TimerFired": "timer_id", **dict.fromkeys(RESULTS, "call_id")}
_PACKED_BYTES: Final = 24
Place = tuple[str, int, int]
"""Topic without prefix, partition, offset."""


def run_id_of(request_id: str) -> str:
    """Return the run that a request's id names."""
    return str(uuid.uuid5(RUNS, request_id))


def effect_id(decision_hash: bytes, index: int) -> str:
    """Return the id of a decision's effect: a call's, a timer's."""
    return blake2b(decision_hash + index.to_bytes(4, "big"), digest_size=16).hexdigest()


class Call(NamedTuple):
    """A call as a decision requested it. `kind`: ToolCall, LlmCall or ChildRun; `tool`: of a tool call; `request`: its digest."""

    call_id: str
    kind: str
    step: str
    attempt: int
    tool: str
    request: bytes


@dataclass(slots=True, eq=False)
class Decision:
    """A record of `decisions`.

    `odd`: what is wrong with its key or header; `input`: its input's digest, or, of an UnreadableInput, the hash that it gives;
    `named`: the call, timer or request that its input names; `effects`: how many; `ends`: how the run ends by it, each time
    that it says so.
    `verdict`: accepted, duplicate, loser or unexplained; `before`: the decision that it extends, if there is one.
    """

    partition: int
    offset: int
    odd: tuple[str, ...]
    hash: bytes
    run_id: str
    seq: int
    prev: bytes
    topic_id: bytes
    input_offset: int
    at: int
    kind: str
    input: bytes
    named: str | None
    step: str
    ignored: bool
    effects: int
    calls: tuple[Call, ...]
    completed: tuple[str, ...]
    ends: tuple[str, ...]
    verdict: str = ""
    before: "Decision | None" = None

    @property
    def where(self) -> str:
        """Say where it is."""
        return f"decisions/{self.partition}/{self.offset}, run {self.run_id}, seq {self.seq}"


class Input(NamedTuple):
    """A record of `inbox`.

    `kind` empty: it can't be read; `raw`: its value's BLAKE2b-256, for inputs that a decision only points at.
    """

    run: str
    kind: str
    named: str | None
    digest: bytes
    timestamp: int
    raw: bytes


class Request(NamedTuple):
    """A record of `requests`. `kind`: run, command, or empty for what can't be read."""

    place: Place
    kind: str
    request_id: str


class Sent(NamedTuple):
    """A record of a work queue."""

    place: Place
    call_id: str
    run_id: str
    request: bytes


class Entry(NamedTuple):
    """A record of the index of finished runs."""

    place: Place
    run_id: str
    decisions_topic_id: bytes
    first_offset: int


@dataclass(slots=True)
class Ledger:
    """Everything that was read. What is None was not given: the rules about it have nothing to say."""

    topic_ids: dict[str, bytes] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    inbox: dict[tuple[int, int], Input] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    letters: set[Place] = field(default_factory=set)
    finished: list[Entry] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    unreadable: list[tuple[Place, str]] = field(default_factory=list)
    wanted: Sequence[Wanted] | None = None
    witnessed: Sequence[Arrival] | None = None
    disruptions: Sequence[Disruption] = ()
    views: Any = None
    """What `checking.views.rebuild` returns."""

    chains: dict[tuple[int, str], list[Decision]] = field(default_factory=dict)
    """The decisions that count, by partition and run."""
    inputs: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    """The offsets of the inbox records, by partition and run."""
    first_inputs: dict[int, int] = field(default_factory=dict)
    """The first offset that was read, by inbox partition: what was before it has gone."""
    requested: dict[str, tuple[Call, Decision]] = field(default_factory=dict)
    """Each call with the decision that requested it, one that counts before others."""
    results: dict[str, int] = field(default_factory=dict)
    """When the first result of a tool or LLM call was appended to the inbox, milliseconds since the epoch."""

    def inbox_of(self, decision: Decision) -> Input | None:
        """Return the input that a decision says it decided."""
        return self.inbox.get((decision.partition, decision.input_offset))

    def here(self, decision: Decision) -> bool:
        """Whether a decision's input must be on the inbox: the same topic, and nothing that its retention has deleted."""
        known = self.topic_ids.get("inbox", decision.topic_id) == decision.topic_id
        return known and decision.input_offset >= self.first_inputs.get(decision.partition, 0)


def build(
    records: Iterable[Record],
    topic_ids: dict[str, bytes],
    *,
    wanted: Sequence[Wanted] | None = None,
    witnessed: Sequence[Arrival] | None = None,
    disruptions: Sequence[Disruption] = (),
    views: Any = None,
) -> Ledger:
    """Return the ledger that stands in these records, which come in the order of their partitions."""
    ledger = Ledger(topic_ids, wanted=wanted, witnessed=witnessed, disruptions=disruptions, views=views)
    for record in records:
        try:
            _READERS[record.topic](ledger, record)
        except avro.UnreadableError as error:
            ledger.unreadable.append((record[:3], str(error)))
    _judge(ledger)
    return ledger


# --- One record ---


def _decision(ledger: Ledger, record: Record) -> None:
    datum = avro.decode(record.value, "Decision")
    value = record.value or b""
    own = blake2b(memoryview(value)[avro.HEADER_BYTES :], digest_size=32).digest()
    calls: list[Call] = []
    completed: list[str] = []
    ends: list[str] = []
    ignored = False
    for index, effect in enumerate(datum["effects"]):
        kind, fields = effect[0][9:], effect[1]
        if kind in CALLS:
            step, tool = sys.intern(fields["step"]), sys.intern(fields.get("tool") or "")
            calls.append(Call(effect_id(own, index), CALLS[kind], step, fields["attempt"], tool, avro.digest(effect)))
        elif kind == "StepCompleted" and fields["source"] is None:
            completed.append(sys.intern(fields["step"]))
        elif kind in ENDS:
            ends.append(ENDS[kind])
        elif kind == "InputIgnored":
            ignored = True
    kind, fields = datum["input"][0][9:], datum["input"][1]
    said = fields["blake2b"].encode() if kind == "UnreadableInput" else avro.digest(datum["input"])
    inbox = ledger.topic_ids.get("inbox", b"")
    topic_id: bytes = inbox if datum["input_topic_id"] == inbox else datum["input_topic_id"]  # one object for all of them
    ledger.decisions.append(
        Decision(
            partition=record.partition,
            offset=record.offset,
            odd=tuple(_odd(record, datum["run_id"], own)),
            hash=own,
            run_id=sys.intern(datum["run_id"]),
            seq=datum["seq"],
            prev=datum["prev"],
            topic_id=topic_id,
            input_offset=datum["input_offset"],
            at=datum["at"],
            kind=sys.intern(kind),
            input=said,
            named=fields.get(_NAMED_BY.get(kind, "")),
            step=sys.intern(fields.get("step") or ""),
            ignored=ignored,
            effects=len(datum["effects"]),
            calls=tuple(calls),
            completed=tuple(completed),
            ends=tuple(ends),
        )
    )


def _odd(record: Record, run: str, own: bytes) -> Iterator[str]:
    """Yield what is wrong around a decision's value: its key is the run, its header the hash that its writer had in hand."""
    if record.key != run.encode():
        yield f"its key is {record.key!r}"
    if record.identity is not None and record.identity != own.hex().encode():
        yield f"its bytes are not those that its writer hashed (ce_id {record.identity!r})"


def _input(ledger: Ledger, record: Record) -> None:
    run = sys.intern((record.key or b"").decode("utf-8", "replace"))
    raw = blake2b(record.value or b"", digest_size=32).digest()
    ledger.first_inputs.setdefault(record.partition, record.offset)
    ledger.inputs.setdefault((record.partition, run), []).append(record.offset)
    kind, named, digest = "", None, b""
    try:
        datum = avro.decode(record.value, "InboxMessage")
        if datum["run_id"] == run:
            name, fields = datum["input"]
            kind, digest = sys.intern(name[9:]), avro.digest(datum["input"])
            named = fields.get(_NAMED_BY.get(kind, ""))
    except avro.UnreadableError:
        pass  # anybody may write here: what comes of it is a dead letter, or a decision that points at it
    if RESULTS.get(kind) in ("ToolCall", "LlmCall") and named is not None:
        ledger.results[named] = min(record.timestamp, ledger.results.get(named, record.timestamp))
    ledger.inbox[record.partition, record.offset] = Input(run, kind, named, digest, record.timestamp, raw)


def _request(ledger: Ledger, record: Record) -> None:
    topic = uuid.UUID(bytes=ledger.topic_ids.get("requests", bytes(16)))
    kind, identity = "", None
    try:
        if record.value and record.value[0] == 0:
            command = avro.kind_of(record.value) == "RunRequest"
            datum = avro.decode(record.value, "RunRequest" if command else "WorkflowRequest")
        else:
            datum = json.loads(record.value or b"")
            command = "command" in datum
        kind, identity = "command" if command else "run", datum.get("request_id")
    except (avro.UnreadableError, ValueError, RecursionError, TypeError, AttributeError):
        pass  # anybody may write here: it must be a dead letter
    identity = identity if isinstance(identity, str) and identity else f"{topic}/{record.partition}/{record.offset}"
    ledger.requests.append(Request(record[:3], kind, identity))


def _finished(ledger: Ledger, record: Record) -> None:
    """Take an entry of the index, or a pack of many: 24 bytes a run, its id and the offset of its first decision."""
    key = (record.key or b"").decode("utf-8", "replace")
    packed = key.startswith("packed/")
    if packed and record.value is None:
        return  # a pack that a later one has replaced
    datum = avro.decode(record.value, "FinishedRuns" if packed else "FinishedRun")
    if not packed:
        ledger.finished.append(Entry(record[:3], sys.intern(key), datum["decisions_topic_id"], datum["first_offset"]))
        return
    for at in range(0, len(datum["runs"]), _PACKED_BYTES):
        entry = datum["runs"][at : at + _PACKED_BYTES]
        run, first = str(uuid.UUID(bytes=entry[:16])), int.from_bytes(entry[16:], "big")
        ledger.finished.append(Entry(record[:3], run, datum["decisions_topic_id"], first))


def _sent(ledger: Ledger, record: Record) -> None:
    kind = "ToolCall" if record.topic == "tool.calls" else "LlmCall"
    datum = avro.decode(record.value, kind)
    request = avro.digest((f"foldflow.{kind}Requested", datum["request"]))
    ledger.sent.append(Sent(record[:3], datum["call_id"], sys.intern(datum["run_id"]), request))


def _letter(ledger: Ledger, record: Record) -> None:
    datum = avro.decode(record.value, "DeadLetter")
    for topic in _READERS:
        if datum["topic"].endswith(topic):  # whatever the prefix
            ledger.letters.add((topic, datum["partition"], datum["offset"]))


_READERS: Final = {
    "decisions": _decision,
    "inbox": _input,
    "requests": _request,
    "finished": _finished,
    "tool.calls": _sent,
    "llm.calls": _sent,
    "deadletter": _letter,
}


# --- What counts ---


def _judge(ledger: Ledger) -> None:
    """Say of each decision whether it counts, and gather what rules ask for."""
    ledger.decisions.sort(key=lambda each: (each.partition, each.offset))
    others: dict[tuple[int, str], dict[bytes, Decision]] = defaultdict(dict)
    accepted: dict[tuple[int, bytes], Decision] = {}
    for each in ledger.decisions:
        where = each.partition, each.run_id
        chain = ledger.chains.get(where)
        if each.prev == (chain[-1].hash if chain else FIRST_PREV):
            each.verdict, each.before = "accepted", chain[-1] if chain else None
            each.prev = chain[-1].hash if chain else FIRST_PREV  # the same bytes, once in memory
            ledger.chains.setdefault(where, []).append(each)
            accepted[each.partition, each.hash] = each
            ledger.requested.update((call.call_id, (call, each)) for call in each.calls)
            continue
        if (same := accepted.get((each.partition, each.hash))) is not None:
            each.verdict, each.before = "duplicate", same.before
            continue
        losers = others[where]
        each.before = accepted.get((each.partition, each.prev)) or losers.get(each.prev)
        began = each.prev == FIRST_PREV  # `chain` is there, or it would count
        if (began and each.seq == 1) or (each.before and each.before.run_id == each.run_id and each.seq == each.before.seq + 1):
            each.verdict = "loser"
            losers[each.hash] = each
            for call in each.calls:
                ledger.requested.setdefault(call.call_id, (call, each))
        else:
            each.verdict, each.before = "unexplained", None
