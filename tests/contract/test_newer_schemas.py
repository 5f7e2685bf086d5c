"""What today's code does with a record in a schema that it doesn't have: one test for each reader of each topic.

During a rolling upgrade old processes meet records of newer code. Where newer code has published that schema, they stop in front
of it and lose nothing; where nobody has, it is somebody's garbage, and what becomes of that is the same as ever.
`docs/upgrades.md` has the table; these tests hold it, and `tests/integration/test_schemas_topic.py` shows it with real processes.
"""

import asyncio
import copy
import io
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message
from fastavro import parse_schema, schemaless_writer

from events import catalog, codec, topics
from events.calls import CancelCall, LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import Parent, PauseRun, RunRequest, StartRun, WorkflowRegistered, WorkflowRequest
from events.decisions import (
    DeadLetter,
    DeadLetterSettled,
    Decision,
    FinishedRun,
    InputIgnored,
    RunCompleted,
    UnreadableInput,
)
from events.errors import NewerCodeError, UnknownSchemaError
from events.ids import FIRST_PREV, chain_hash, effect_id, run_id
from events.results import InboxMessage, ToolCallCompleted
from events.topics import Topic, partition_for
from infra.cli.follow import Followed, Sent
from infra.cli.history import History
from infra.cli.records import Tail
from projections.ledger import Record
from projections.source import Source
from projections.views import SOURCES, Batch, Views
from streams import kafka
from streams.envelope import Incoming, Outgoing
from streams.kafka import Cluster
from streams.payloads import PayloadStoreError
from streams.processors import intake_loop
from streams.processors.cancellations import Cancellations
from streams.processors.intake import Intake
from streams.processors.llm_worker import LlmCalls
from streams.processors.offsets import OffsetTracker
from streams.processors.tenure import Commit, Place, Tenure
from streams.processors.tool_worker import ToolCalls
from streams.processors.worker import Worker
from streams.registry import SpecRegistry
from streams.schemas import Schemas
from streams.settings import Settings
from streams.testing import given
from streams.testing.histories import read
from streams.workflow.chain import Chain
from streams.workflow.spec import WorkflowSpec

NOWHERE = Settings(bootstrap_servers="127.0.0.1:1")
SPEC = WorkflowSpec.model_validate({"name": "w", "steps": {"a": {"tool": {"name": "echo"}, "timeout": "10s"}}})
RUN = run_id("q")
START = InboxMessage(RUN, StartRun("q", SPEC.name, SPEC.digest, "{}"))


def newer(event: Any) -> bytes:
    """Return an event as newer code would write it: its schema has one more field, with a default."""
    schema = copy.deepcopy(catalog.ENTRIES[type(event)].schema)
    schema["fields"].append({"name": "novelty", "type": "string", "default": ""})
    out = io.BytesIO()
    schemaless_writer(out, parse_schema(catalog._without_logical_types(schema)), codec.datum(event) | {"novelty": "new"})
    return codec.FRAME.pack(0, catalog.fingerprint(schema)) + out.getvalue()


def record(value: bytes, offset: int = 0, key: str = RUN) -> Incoming:
    return Incoming("some.topic", 0, offset, 1000 + offset, key.encode(), value)


def letters(records: list[Outgoing]) -> list[DeadLetter]:
    return [codec.decode(each.value, DeadLetter) for each in records if each.topic is topics.DEADLETTER]


def decided(records: list[Outgoing]) -> Decision:
    (value,) = (each.value for each in records if each.topic is topics.DECISIONS)
    return codec.decode(value, Decision)


class Said(Schemas):
    """What is published: nothing, or everything that isn't known here; `asked`: about which types."""

    def __init__(self, *, published: bool) -> None:
        super().__init__(NOWHERE)
        self.published, self.asked = published, set[type]()

    def newer(self, schema_id: int, *kinds: type) -> bool:
        """Whether newer code is known to write this."""
        assert schema_id not in {entry.id for entry in catalog.ENTRIES.values()}
        self.asked |= set(kinds)
        return self.published


def tenure(**more: Any) -> Tenure:
    owner = Tenure(Place(b"i" * 16, b"d" * 16, 0, 1), {SPEC.digest: SPEC}.get, Commit(0, 0), **more)
    owner.begin(0)
    return owner


class Registry:
    """Knows the one workflow."""

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
        """There is never anything new."""


# --- All readers: the codec ---


@pytest.mark.parametrize(
    "event", [START, FinishedRun(b"d" * 16, 7), CancelCall("c", RUN, "a", "why")], ids=lambda e: type(e).__name__
)
def test_a_newer_schema_is_told_from_garbage(event: Any) -> None:
    """Well-framed bytes with an id that isn't known have an error of their own; no reader guesses what they say."""
    with pytest.raises(UnknownSchemaError):
        codec.decode(newer(event), type(event))
    assert codec.kind_of(newer(event)) is None


# --- Intake ---

REQUESTS = {
    "run": WorkflowRequest("w", "{}", "q", parent=Parent(RUN, "call", "step")),
    "command": RunRequest(None, "q", PauseRun("ann", "")),
}


def judged(value: bytes, *, published: bool, judge: Any = None) -> list[Outgoing]:
    judge = judge or Intake(Registry(), b"r" * 16)
    return intake_loop.judged(judge, Said(published=published), record(value))


@pytest.mark.parametrize("name", REQUESTS)
def test_intake_ends_at_a_newer_request(name: str) -> None:
    """Nothing is said about it, so it isn't acknowledged: newer code will judge it, also what a run's parent is to hear."""
    with pytest.raises(NewerCodeError, match=r"request some\.topic/0/0 .*upgrade this process"):
        judged(newer(REQUESTS[name]), published=True)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_in_a_schema_of_nobody_is_a_dead_letter_with_its_bytes(name: str) -> None:
    """Whose it was can't be read; nothing is known of a parent."""
    value = newer(REQUESTS[name])
    outgoing = judged(value, published=False)
    (letter,) = letters(outgoing)
    assert (len(outgoing), letter.reason, letter.request_id, letter.value) == (1, "not_decodable", None, value)
    assert "is not known" in letter.detail


class Broken:
    """Judges nothing: what nobody foresaw happens, or what goes by."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def check(self, record: Incoming) -> list[Outgoing]:
        """Raise each error once, then find nothing to say."""
        del record
        if self.errors:
            raise self.errors.pop(0)
        return []


@pytest.mark.parametrize("error", [RecursionError("too deep \ud800"), ValueError(), KeyError("x")], ids=repr)
def test_what_nobody_foresaw_is_a_dead_letter_that_can_be_redriven(error: Exception) -> None:
    """A fault of ours must neither lose the request nor hold those behind it."""
    value = codec.encode(REQUESTS["run"])
    (letter,) = letters(judged(value, published=False, judge=Broken(error)))
    assert (letter.reason, letter.value, letter.key) == ("internal", value, RUN.encode())
    assert type(error).__name__ in letter.detail


@pytest.mark.parametrize("error", [PayloadStoreError("away"), kafka.KafkaUnreachableError("away")], ids=repr)
def test_what_goes_by_is_not_the_request_s_fault(error: Exception) -> None:
    """A store or Kafka that can't be asked says nothing about the request: it has to wait, and no letter is written."""
    with pytest.raises(type(error)):
        judged(codec.encode(REQUESTS["run"]), published=False, judge=Broken(error))


# --- The orchestrator ---


def test_a_newer_start_is_a_dead_letter_and_the_run_never_starts() -> None:
    """Where nobody has published its schema it may be anybody's: it is a dead letter, and the partition goes on."""
    owner = tenure()
    (letter,) = letters(owner.take(record(newer(START))))
    assert (letter.reason, owner.position, owner.runs) == ("unreadable", 1, {})


def test_a_newer_result_is_lost_to_its_run() -> None:
    """A result that was paid for is decided as unreadable, once and for all; the run waits for its attempt's time limit."""
    owner = tenure()
    call = effect_id(chain_hash(codec.body(decided(owner.take(record(codec.encode(START)))))), 0)
    result = InboxMessage(RUN, ToolCallCompleted(call, "a", "1", "1", 5))
    decision = decided(owner.take(record(newer(result), 1)))
    assert isinstance(decision.input, UnreadableInput)
    assert decision.effects == (InputIgnored("unreadable"),)
    late = decided(owner.take(record(codec.encode(result), 2)))  # what would have been, had the old schema been used
    assert isinstance(late.effects[-1], RunCompleted)


def test_what_newer_code_is_known_to_write_ends_the_tenure() -> None:
    """Inputs, decisions, snapshots and the index: nothing is judged, and the position stays in front of it."""
    decision = Decision(RUN, 1, FIRST_PREV, b"i" * 16, 0, 0, START.input, ())
    owner = tenure(newer=Said(published=True).newer)
    with pytest.raises(NewerCodeError, match="upgrade this process"):
        owner.take(record(newer(START)))
    with pytest.raises(NewerCodeError):
        owner.read(0, newer(decision))
    with pytest.raises(NewerCodeError):
        owner.snapshot_read(f"{RUN}/4".encode(), newer(decision), {})
    with pytest.raises(NewerCodeError):
        owner.index_read(0, RUN.encode(), newer(FinishedRun(b"d" * 16, 0)))
    assert (owner.position, owner.runs) == (0, {})


# --- The workers ---


CALLS = [
    ToolCall("c", RUN, ToolCallRequested("a", 1, "echo", "{}", 2**40)),
    LlmCall("c", RUN, LlmCallRequested("a", 1, None, "[]", "{}", None, 2**40)),
]


def worker_of(topic: Topic, handler: Any, schemas: Schemas) -> Worker:
    """Return a worker that holds partition 0 from its beginning on, without its threads."""
    worker = Worker(NOWHERE, topic, handler, 8, asyncio.new_event_loop())
    worker.schemas = schemas
    worker._trackers[0] = OffsetTracker(0)
    return worker


@pytest.mark.parametrize("call", CALLS, ids=lambda each: type(each).__name__)
def test_a_worker_ends_in_front_of_a_newer_call(call: Any) -> None:
    """Calls before it are made; from it on nothing is taken, so nothing behind it is ever acknowledged."""
    topic = topics.TOOL_CALLS if isinstance(call, ToolCall) else topics.LLM_CALLS
    worker = worker_of(topic, Calls(), said := Said(published=True))
    values = codec.encode(call), newer(call), codec.encode(replace(call, call_id="d"))
    fresh, problem = worker._fresh_ones([Message("calls", 0, offset, b"k", each) for offset, each in enumerate(values)])
    assert [each.record.offset for each in fresh] == [0]
    assert "call calls/0/1 was written by newer code" in str(problem)
    assert (worker._trackers[0].position, said.asked) == (1, {type(call)})
    worker.loop.close()


class Calls:
    """A handler that is never asked."""

    async def __call__(self, record: Incoming) -> Outgoing:
        """Make no call."""
        raise AssertionError(record)

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Cancel none."""
        raise AssertionError(record, reason, latency_ms)


@pytest.mark.parametrize("call", CALLS, ids=lambda each: type(each).__name__)
def test_a_call_in_a_schema_of_nobody_is_a_dead_letter(call: Any) -> None:
    """The worker takes it and goes on; whose call it was can't be read."""
    topic = topics.TOOL_CALLS if isinstance(call, ToolCall) else topics.LLM_CALLS
    worker = worker_of(topic, Calls(), Said(published=False))
    fresh, problem = worker._fresh_ones([Message("calls", 0, 0, b"k", newer(call))])
    assert (len(fresh), problem) == (1, None)
    worker.loop.close()
    handler: Any = ToolCalls(NOWHERE, {}) if isinstance(call, ToolCall) else LlmCalls(NOWHERE)
    for answer in (asyncio.run(handler(record(newer(call)))), handler.cancelled(record(newer(call)), "why", None)):
        (letter,) = letters([answer])
        assert (answer.topic, letter.reason, letter.run_id) == (topics.DEADLETTER, "not_decodable", None)


@pytest.mark.parametrize("published", [True, False])
def test_a_newer_cancellation_ends_the_worker(published: bool) -> None:
    """It can't know which call is to be given up; one in a schema of nobody is passed over."""
    found = Cancellations(NOWHERE, Said(published=published))
    try:
        assert found._take(newer(CancelCall("c", RUN, "a", "why"))) is None
        assert found.reason(b"c") is None
        assert found._take(codec.encode(CancelCall("d", RUN, "a", "why"))) == (b"d", "why"), "those that can be read count"
        with pytest.raises(NewerCodeError, match="a cancellation") if published else nullcontext():
            found.refuse_newer()
    finally:
        found.close()


# --- The registry ---


@pytest.mark.parametrize("published", [True, False])
def test_a_newer_registration_ends_who_looks_for_workflows(published: bool) -> None:
    """Intake would refuse requests for it, the orchestrator would fail its runs; one in a schema of nobody is passed over."""
    registry = SpecRegistry(NOWHERE, Said(published=published))
    value = newer(WorkflowRegistered(SPEC.name, SPEC.digest, SPEC.canonical))
    try:
        with pytest.raises(NewerCodeError, match=r"workflow version .*specs/0/3") if published else nullcontext():
            registry._take(3, value, 0)
        assert registry.get(SPEC.digest) is None
    finally:
        registry.close()


# --- Views ---

IDS = {topic.name: bytes([number]) * 16 for number, topic in enumerate(SOURCES)}
LETTER = DeadLetter("requests", 0, 0, 0, "any", "", None, None, None, None, {})
SETTLED = DeadLetterSettled("requests", 0, 0, "discarded", 0, "ann", "", None, None)
VIEWED: dict[str, tuple[Topic, Any]] = {
    "decision": (topics.DECISIONS, Decision(RUN, 1, FIRST_PREV, b"i" * 16, 0, 0, START.input, ())),
    "dead letter": (topics.DEADLETTER, LETTER),
    "settled": (topics.DEADLETTER, SETTLED),
    "workflow": (topics.SPECS, WorkflowRegistered(SPEC.name, SPEC.digest, SPEC.canonical)),
}


class Brought:
    """A consumer that brings what a test says, once."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)

    def poll(self, timeout_s: float) -> Message | None:
        """Return the first."""
        del timeout_s
        return self.messages.pop(0) if self.messages else None

    def consume(self, most: int, timeout_s: float) -> list[Message]:
        """Return the others."""
        del most, timeout_s
        found, self.messages = self.messages, []
        return found

    def get_watermark_offsets(self, place: Any, *, cached: bool) -> None:
        """Nothing is known of the ends."""


@pytest.mark.parametrize("name", VIEWED)
def test_the_views_stop_in_front_of_a_newer_record(name: str) -> None:
    """What stands before it, and in other partitions, is taken; its own partition's position stays."""
    topic, event = VIEWED[name]
    other = topics.DECISIONS if topic is not topics.DECISIONS else topics.DEADLETTER
    source = Source(NOWHERE, Cluster(IDS, dict.fromkeys(IDS, 2)))
    source.close()
    source._schemas = Said(published=True)
    full, beside = kafka.name(NOWHERE, topic), kafka.name(NOWHERE, other)
    source._consumer = Brought(  # type: ignore[assignment]
        Message(full, 0, 0, None, codec.encode(event)),
        Message(full, 0, 1, None, newer(event)),
        Message(full, 0, 2, None, codec.encode(event)),
        Message(full, 1, 5, None, codec.encode(event)),
        Message(beside, 0, 7, None, b"anything"),
    )
    batch = source.poll()
    assert batch.positions() == {(topic.name, 0): 1, (topic.name, 1): 6, (other.name, 0): 8}
    with pytest.raises(NewerCodeError, match=rf"{topic.name}/0/1 .*upgrade this process"):
        source.refuse_newer()


@pytest.mark.parametrize("name", VIEWED)
def test_the_views_pass_over_what_is_in_a_schema_of_nobody(name: str) -> None:
    """Anybody can write six bytes; the views go on behind them."""
    topic, event = VIEWED[name]
    source = Source(NOWHERE, Cluster(IDS, dict.fromkeys(IDS, 1)))
    source.close()
    source._schemas = Said(published=False)
    source._consumer = Brought(Message(kafka.name(NOWHERE, topic), 0, 0, None, newer(event)))  # type: ignore[assignment]
    assert source.poll().positions() == {(topic.name, 0): 1}
    source.refuse_newer()


def test_what_the_views_would_make_of_a_newer_decision(tmp_path: Path) -> None:
    """Passed over, it makes a break of what follows it: that is why the source ends in front of it."""
    given(SPEC, input={}, tools={"echo": 1}).save(tmp_path / "h.json")
    first, second = read(tmp_path / "h.json").values[:2]
    run = codec.decode(first, Decision).run_id
    views = Views(tmp_path / "v", IDS, 1)
    try:
        assert partition_for(run.encode(), 1) == 0
        views.apply(Batch([Record(0, 0, newer(codec.decode(first, Decision))), Record(0, 1, second)]))
        assert views.positions["decisions", 0] == 2
        with views.snapshot() as (db, _):
            assert db.execute('SELECT verdict FROM ignored ORDER BY "offset"').fetchall()[0] == ("not_decodable",)
            assert db.execute("SELECT count(*) FROM runs").fetchone() == (0,)
            assert db.execute("SELECT count(*) FROM breaks").fetchone() == (1,)
    finally:
        views.close()


# --- Commands ---


def test_commands_that_fold_a_run_end_at_a_newer_decision() -> None:
    """They would show, fork or answer the run as it isn't; six bytes of somebody are passed over."""
    _, decision = VIEWED["decision"]
    with pytest.raises(NewerCodeError, match=f"decision 7 .run {RUN}. was written by newer code"):
        History(RUN, Said(published=True)).take(7, newer(decision))
    for history in (History(RUN), History(RUN, Said(published=False))):
        assert history.take(7, newer(decision)) is False
        assert history.state.seq == 0


@pytest.mark.parametrize(("published", "about"), [(True, RUN), (True, "another"), (False, RUN)])
def test_who_follows_a_run_ends_at_a_newer_letter_about_it(published: bool, about: str) -> None:
    """It may say that the request was refused; one about another run is nobody's business here."""
    followed = Followed(Sent("q", RUN, "requests", 0, again=False), Said(published=published))
    letter = Message("deadletter", 0, 0, None, newer(replace(LETTER, run_id=about)))
    if published and about == RUN:
        with pytest.raises(NewerCodeError, match="a dead letter about run"):
            followed.letter(letter)
    else:
        assert followed.letter(letter) is False


@pytest.mark.parametrize("published", [True, False])
def test_tail_says_who_wrote_what_it_cannot_show(published: bool) -> None:
    """And gives no verdict on the decisions behind it, which would be a false one."""
    topic, decision = VIEWED["decision"]
    tail = Tail(NOWHERE, Cluster(IDS, {"decisions": 1}), ["decisions"], "")
    try:
        tail._schemas = Said(published=published)
        tail._chains[0] = Chain()
        shown = tail._shown(Message(kafka.name(NOWHERE, topic), 0, 0, None, newer(decision)))
        assert shown is not None
        assert ("newer code" in shown.event["problem"]) is published
        assert (0 in tail._chains) is not published
    finally:
        tail._source.close()
