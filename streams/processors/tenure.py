"""A tenure: the time in which one process owns one inbox partition, as a state machine without I/O.

    position and mark fetched ──▶ index_read* ──▶ read* (decisions from the mark) ──▶ begin ──▶ take* ──▶ settle ──▶ take* …

`take` judges one input and returns what must be written. Everything taken since the last settlement is one batch; to settle it
the driver waits until all of it is acknowledged and tells the offsets that the own decisions got. Those must go on without a gap
from the end that was read. A gap is somebody else's record: the driver reads on up to the own last record (`gap`, `reconcile`),
and if the runs' heads then differ from ours the tenure is over. Only what is settled may be committed.

The rules are numbered as in the design's section "The ledger protocol". Safety never rests on there being one owner.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final

import structlog

from events import codec, topics
from events.calls import LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import StartRun
from events.decisions import Decision, FinishedRun, InputIgnored, RetryScheduled, RunFailed, UnreadableInput
from events.errors import NotDecodableError, UnknownSchemaError
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id
from events.ids import run_id as run_id_of
from events.results import InboxMessage, Input, TimerFired
from streams.envelope import Incoming, Outgoing, cloud_event, dead_letter, envelope, traceparent
from streams.workflow.chain import Chain, Head, Verdict
from streams.workflow.decider import decide
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, UNSETTLED, RunEvent, RunState, StepState, evolve

log = structlog.get_logger()

SOURCE: Final = "orchestrator"
_MAX_DECISION_BYTES: Final = topics.MAX_VALUE_BYTES - 64 * 1024
_MAX_EMBEDDED_BYTES: Final = 2 * 1024 * 1024

Specs = Callable[[str], WorkflowSpec | None]


class SpecUnknownError(Exception):
    """An input needs a workflow version that is not known yet: look again, and tell `take` when to give up waiting."""


class NewerCodeError(Exception):
    """The partition holds decisions that this code can't read: only newer code may own it. Upgrade this process."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which partition this is: ids (16 bytes) of the inbox and decisions topics, and how many partitions they have."""

    inbox_id: bytes
    decisions_id: bytes
    partition: int
    partitions: int


@dataclass(frozen=True, slots=True)
class Commit:
    """What may be committed: the next input's offset, and where reading decisions may start (rule 8)."""

    position: int
    mark: int


@dataclass(slots=True)
class Run:
    """An open run in memory."""

    state: RunState
    spec: WorkflowSpec | None
    first: int | None  # offset of its first decision, None until that is settled


@dataclass(slots=True)
class Tenure:
    """One partition in the hands of one owner. Make it with what was committed last (`position` and `mark`, fetched first)."""

    place: Place
    specs: Specs
    base: Commit
    runs: dict[str, Run] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    position: int = field(init=False)
    end: int = field(init=False)
    _chain: Chain = field(init=False)
    _decided: dict[int, RunEvent] = field(default_factory=dict)
    _indexed: set[str] = field(default_factory=set)
    _unindexed: list[str] = field(default_factory=list)
    _order: deque[tuple[int, str]] = field(default_factory=deque)
    _ended_ahead: dict[str, int] = field(default_factory=dict)
    _timers: list[tuple[int, str, str, str]] = field(default_factory=list)
    _timers_bound: int = 1024
    # Since the last settlement:
    _own: list[tuple[str, int]] = field(default_factory=list)
    _before: dict[str, Head] = field(default_factory=dict)
    _closed: dict[str, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = self.base.position
        self.end = self.base.mark
        self._chain = Chain(self.finished)

    # --- Taking over (rule 6) ---

    def index_read(self, run_id: str, entry: FinishedRun) -> None:
        """Take an entry of the finished-run index; one about a former decisions topic says nothing."""
        if entry.decisions_topic_id == self.place.decisions_id:
            self.finished[run_id] = entry.first_offset
            self._indexed.add(run_id)

    def read(self, offset: int, value: bytes | None) -> Verdict:
        """Take the record at an offset of the decisions partition; call it in order, from the mark to the end.

        Raises NewerCodeError: who passes over a decision decides its input again, on top of a state that nobody shares.
        """
        self.end = offset + 1
        decision = self._decoded(offset, value)
        if decision is None:
            return Verdict.BROKEN
        event = RunEvent(decision, chain_hash(codec.unframed(value or b"")))
        verdict = self._chain.judge(offset, decision, event.hash)
        if verdict is not Verdict.ACCEPTED:
            return verdict
        if decision.input_topic_id == self.place.inbox_id and decision.input_offset >= self.base.position:
            self._decided[decision.input_offset] = event
        run = self.runs.get(decision.run_id)
        if run is None:
            run = self.runs[decision.run_id] = Run(INITIAL, None, offset)
            self._order.append((offset, decision.run_id))
        run.state = evolve(run.state, event)
        if run.state.over:
            assert run.first is not None
            if decision.input_offset in self._decided:
                self._ended_ahead[decision.run_id] = decision.input_offset
            del self.runs[decision.run_id]
            self.finished[decision.run_id] = run.first
            if decision.run_id not in self._indexed:
                self._unindexed.append(decision.run_id)
        return verdict

    def _decoded(self, offset: int, value: bytes | None) -> Decision | None:
        """Return a record's decision, None for what is none. Raises NewerCodeError."""
        try:
            return codec.decode(value, Decision)
        except UnknownSchemaError as error:
            raise NewerCodeError(f"partition {self.place.partition}, offset {offset}: {error}; upgrade this process") from error
        except NotDecodableError:
            self.ignored += 1
            return None

    def begin(self, end: int) -> None:
        """Everything before `end` was read: from now on inputs are taken."""
        self.end = max(self.end, end)
        self.ignored += self._chain.ignored
        self.broken = dict(self._chain.broken)
        for run_id in self.broken:
            self.runs.pop(run_id, None)
        self._chain = Chain()
        for run_id, run in self.runs.items():
            for name, step in run.state.steps.items():
                if step.status in UNSETTLED:
                    self._set_timer(run_id, name, step)

    # --- Inputs (rules 2, 3, 6) ---

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        """Judge one input and return what must be written, the decision first.

        Raises SpecUnknownError, with nothing changed, when the run's workflow version isn't known; with `give_up` that run fails.
        """
        run_id = (record.key or b"").decode("utf-8", "replace")
        known = self._decided.get(record.offset)
        if known is not None:
            self.position = record.offset + 1
            return self._emitted_again(known, record)
        run = self.runs.get(run_id)
        if run and run.state.last_topic_id == self.place.inbox_id and record.offset <= run.state.last_offset:
            self.position = record.offset + 1
            return []
        cause: Input | UnreadableInput | None
        cause, problem = _readable(record, run_id)
        if run is None:
            problem = problem or self._start_problem(run_id, cause)
            if problem or run_id in self.finished or not isinstance(cause, StartRun):
                self.position = record.offset + 1
                return [self._dead_letter(record, run_id, *problem)] if problem else []
            run = Run(INITIAL, self._spec(cause.digest, give_up=give_up), None)
            self.runs[run_id] = run
        elif run.spec is None:
            run.spec = self._spec(run.state.digest, give_up=give_up)
        self.position = record.offset + 1
        if cause is None:
            cause = _unreadable(record, problem[1] if problem else "")
        return self._decide(run_id, run, record, cause)

    def _spec(self, digest: str, *, give_up: bool) -> WorkflowSpec | None:
        spec = self.specs(digest)
        if spec is None and not give_up:
            raise SpecUnknownError(digest)
        return spec

    def _start_problem(self, run_id: str, cause: Input | UnreadableInput | None) -> tuple[str, str] | None:
        """Say why an input for a run that isn't open can't be processed (reason, detail); None if it can, or has no effect."""
        if run_id in self.finished:
            return None
        if run_id in self.broken:
            return "set_aside", self.broken[run_id]
        if not isinstance(cause, StartRun):
            return "unknown_run", f"there is no run {run_id}"
        if run_id != run_id_of(cause.request_id):
            return "unreadable", f"run id {run_id} is not that of request {cause.request_id}"
        partition = topics.partition_for(run_id.encode(), self.place.partitions)
        if partition != self.place.partition:
            return "unreadable", f"run {run_id} belongs to partition {partition}; produce with the partitioner murmur2_random"
        return None

    def _decide(self, run_id: str, run: Run, record: Incoming, cause: Input | UnreadableInput) -> list[Outgoing]:
        state = run.state
        decision = Decision(run_id, state.seq + 1, state.head, self.place.inbox_id, record.offset, record.timestamp, cause, ())
        try:
            decision = replace(decision, effects=decide(run.spec, state, cause, record.timestamp))
            body = codec.body(decision)
        except Exception as error:
            # A fault of ours, or values that no check has foreseen: it fails one run, and never stops the partition.
            log.exception("tenure.fault", run_id=run_id, offset=record.offset)
            decision = _failing(decision, record, FailureKind.INTERNAL, f"the decision failed: {type(error).__name__}")
            body = codec.body(decision)
        if len(body) > _MAX_DECISION_BYTES:
            size = len(record.value or b"")
            decision = _failing(decision, record, FailureKind.TOO_LARGE, f"a decision on an input of {size:,} bytes is too large")
            body = codec.body(decision)
        event = RunEvent(decision, chain_hash(body))
        self._before.setdefault(run_id, Head(state.head, state.seq, run.first))
        run.state = evolve(state, event)
        self._own.append((run_id, decision.seq))
        for effect in decision.effects:
            if isinstance(effect, LlmCallRequested | ToolCallRequested | RetryScheduled) and not run.state.over:
                self._set_timer(run_id, effect.step, run.state.steps[effect.step])
        if run.state.over:
            del self.runs[run_id]
            self._closed[run_id] = run
            self.finished[run_id] = -1 if run.first is None else run.first
        return [self._record(event, body), *self._follow(event, record)]

    # --- What follows from a decision: the same, whenever it is said ---

    def _record(self, event: RunEvent, body: bytes) -> Outgoing:
        decision = event.decision
        headers = cloud_event("Decision", SOURCE, event.hash.hex(), decision.at)
        headers.append(("traceparent", traceparent(decision.run_id, event.hash.hex())))
        headers.append(("foldflow_seq", str(decision.seq).encode()))
        headers.append(("foldflow_input", type(decision.input).__name__.encode()))
        headers.append(("foldflow_effects", ",".join(type(effect).__name__ for effect in decision.effects).encode()))
        value = codec.framed(Decision, body)
        return Outgoing(topics.DECISIONS, decision.run_id.encode(), value, headers, self.place.partition)

    def _emitted_again(self, event: RunEvent, record: Incoming) -> list[Outgoing]:
        """Return what follows from a former tenure's decision, but for calls that nobody waits for any more.

        Those were answered or given up, or the run is over: once more would only be paid once more.
        """
        run = self.runs.get(event.decision.run_id)
        steps = run.state.steps if run else {}
        called = [effect.step for effect in event.decision.effects if isinstance(effect, LlmCallRequested | ToolCallRequested)]
        awaited = {step.awaits for name in called if (step := steps.get(name)) and not step.settled}
        return [each for each in self._follow(event, record) if each.topic is topics.DEADLETTER or each.key.decode() in awaited]

    def _follow(self, event: RunEvent, record: Incoming) -> Iterator[Outgoing]:
        """Yield the calls and dead letters of a decision."""
        decision = event.decision
        run_id = decision.run_id
        for index, effect in enumerate(decision.effects):
            match effect:
                case LlmCallRequested():
                    call_id = effect_id(event.hash, index)
                    yield _call(topics.LLM_CALLS, LlmCall(call_id, run_id, effect), decision.at)
                case ToolCallRequested():
                    call_id = effect_id(event.hash, index)
                    yield _call(topics.TOOL_CALLS, ToolCall(call_id, run_id, effect), decision.at)
                case _:
                    pass
        if isinstance(decision.input, UnreadableInput):
            yield self._dead_letter(record, run_id, "unreadable", decision.input.problem)

    def _dead_letter(self, record: Incoming, run_id: str, reason: str, detail: str) -> Outgoing:
        return dead_letter(record, reason, detail, SOURCE, run_id=run_id)

    # --- Timers: inputs that the owner writes itself ---

    def _set_timer(self, run_id: str, name: str, step: StepState) -> None:
        heapq.heappush(self._timers, (step.due, run_id, name, step.awaits))
        if len(self._timers) > self._timers_bound:  # most time limits are never reached: drop those of settled attempts
            self._timers = [timer for timer in self._timers if self._pending(timer)]
            heapq.heapify(self._timers)
            self._timers_bound = max(1024, 2 * len(self._timers))

    def _pending(self, timer: tuple[int, str, str, str]) -> bool:
        run = self.runs.get(timer[1])
        step = run.state.steps.get(timer[2]) if run else None
        return step is not None and step.awaits == timer[3] and not step.settled

    def next_timer(self) -> int | None:
        """Return when a timer may be due next, milliseconds since the epoch."""
        return self._timers[0][0] if self._timers else None

    def due(self, now: int) -> Iterator[Outgoing]:
        """Yield the inputs of all timers that are due at `now` (milliseconds since the epoch)."""
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            if self._pending(timer):
                due, run_id, step, timer_id = timer
                message = InboxMessage(run_id, TimerFired(timer_id, step))
                yield envelope(topics.INBOX, run_id, message, source=SOURCE, identity=timer_id, run_id=run_id, at_ms=due)

    # --- Settling a batch (rules 7, 8) ---

    @property
    def unsettled(self) -> int:
        """How many own decisions were written since the last settlement."""
        return len(self._own)

    def gap(self, offsets: list[int]) -> bool:
        """Say whether somebody else's records lie between the own decisions, whose offsets these are."""
        return offsets != list(range(self.end, self.end + len(self._own)))

    def reconcile(self, records: list[tuple[int, bytes | None]], offsets: list[int]) -> bool:
        """Compare what the log says with what we hold, after a gap.

        `records`: the partition from `end` up to the own last record. False: the tenure is over, its state is worthless.
        """
        heads = dict(self._before)
        chain = Chain({run: first for run, first in self.finished.items() if run not in self._before}, heads)
        for offset, value in records:
            decision = self._decoded(offset, value)
            if decision is None:
                continue
            run = self.runs.get(decision.run_id)
            if decision.run_id not in heads and run is not None:
                heads[decision.run_id] = Head(run.state.head, run.state.seq, run.first)
            chain.judge(offset, decision, chain_hash(codec.unframed(value or b"")))
        self.ignored += chain.ignored
        for run_id, head in heads.items():
            held = self.runs.get(run_id) or self._closed.get(run_id)
            if held is None or held.state.head != head.hash or run_id in chain.broken:
                return False
            held.first = head.first
        self._settle(offsets[-1] + 1)
        return True

    def settle(self, offsets: list[int]) -> None:
        """Take the offsets of the own decisions, which go on without a gap."""
        for (run_id, seq), offset in zip(self._own, offsets, strict=True):
            if seq == 1:
                run = self.runs.get(run_id) or self._closed[run_id]
                run.first = offset
        self._settle(offsets[-1] + 1 if offsets else self.end)

    def _settle(self, end: int) -> None:
        self.end = end
        started = [(self.runs[run_id].first, run_id) for run_id, seq in self._own if seq == 1 and run_id in self.runs]
        self._order.extend(sorted((first, run_id) for first, run_id in started if first is not None))
        for run_id, run in self._closed.items():
            assert run.first is not None
            self.finished[run_id] = run.first
            self._unindexed.append(run_id)
        self._own.clear()
        self._before.clear()
        self._closed.clear()

    def index_entries(self) -> list[Outgoing]:
        """Return the index entries that must be acknowledged before the next commit."""
        entries = []
        for run_id in self._unindexed:
            entry = FinishedRun(self.place.decisions_id, self.finished[run_id])
            message = envelope(topics.FINISHED, run_id, entry, source=SOURCE, identity=run_id, run_id=run_id)
            entries.append(Outgoing(message.topic, message.key, message.value, message.headers, self.place.partition))
        self._unindexed.clear()
        return entries

    def commit(self) -> Commit:
        """Return what may be committed now: everything taken is settled and indexed."""
        assert not self._own
        assert not self._unindexed
        while self._order and not self._holds_the_mark(self._order[0][1]):
            self._ended_ahead.pop(self._order.popleft()[1], None)
        for offset in [offset for offset in self._decided if offset < self.position]:
            del self._decided[offset]
        self.base = Commit(self.position, min(self._order[0][0], self.end) if self._order else self.end)
        return self.base

    def _holds_the_mark(self, run_id: str) -> bool:
        """Whether a run is open, or was finished by an input still to come, whose decision is needed to emit again."""
        return run_id in self.runs or self._ended_ahead.get(run_id, -1) >= self.position


def _failing(decision: Decision, record: Incoming, kind: FailureKind, message: str) -> Decision:
    """Return a decision that can surely be written in this one's place: the input as a reference, and the run fails."""
    effects = (InputIgnored("unreadable"), RunFailed(None, Failure(kind, message)))
    return replace(decision, input=_unreadable(record, message), effects=effects)


def _call(topic: topics.Topic, call: LlmCall | ToolCall, at: int) -> Outgoing:
    return envelope(topic, call.call_id, call, source=SOURCE, identity=call.call_id, run_id=call.run_id, at_ms=at)


def _readable(record: Incoming, run_id: str) -> tuple[Input | None, tuple[str, str] | None]:
    """Return an inbox record's input, or why it can't be read (reason, detail)."""
    size = len(record.value or b"")
    if size > _MAX_EMBEDDED_BYTES:  # before it is decoded: a small item can take a hundred times its size in memory
        return None, ("too_large", f"an input of {size:,} bytes; the limit is {_MAX_EMBEDDED_BYTES:,}")
    try:
        message = codec.decode(record.value, InboxMessage)
    except NotDecodableError as error:
        return None, ("unreadable", str(error))
    if message.run_id != run_id:
        return None, ("unreadable", f"the key says run {run_id}, the value run {message.run_id}")
    return message.input, None


def _unreadable(record: Incoming, problem: str) -> UnreadableInput:
    value = record.value or b""
    return UnreadableInput(len(value), blake2b(value, digest_size=32).hexdigest(), problem)


__all__ = ["Commit", "NewerCodeError", "Place", "Run", "SpecUnknownError", "Tenure"]
