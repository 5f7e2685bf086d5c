"""A tenure: the time in which one process owns one inbox partition, as a state machine without I/O.

    position and mark fetched ──▶ index_read* ──▶ read* (decisions from the mark) ──▶ begin ──▶ take* ──▶ settle ──▶ take* …

`take` judges one input and returns what must be written. Everything taken since the last settlement is one batch; to settle it
the driver waits until all of it is acknowledged and tells the offsets that the own decisions got. Those must go on without a gap
from the end that was read. A gap is somebody else's record: the driver reads on up to the own last record (`gap`, `reconcile`),
and if the runs' heads then differ from ours the tenure is over. Only what is settled may be committed.

The rules are numbered as in the design's section "The ledger protocol". Safety never rests on there being one owner.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from events import codec, topics
from events.commands import RequestPlace, StartRun
from events.decisions import Decision, FinishedRun, FinishedRuns, UnreadableInput
from events.errors import NewerCodeError, NotDecodableError
from events.failure import FailureKind
from events.ids import chain_hash
from events.ids import run_id as run_id_of
from events.results import InboxMessage, Input
from events.snapshots import RunSnapshot
from streams.envelope import Incoming, Outgoing, dead_letter, envelope
from streams.processors.ahead import Ahead
from streams.processors.consequences import SOURCE, Consequence, consequences, decision_record
from streams.processors.finished import PACK_AT, FinishedIndex, Place, Without
from streams.processors.inputs import failing, readable, unreadable
from streams.processors.open_runs import DUE, MAX_DECISION_BYTES, Commit, OpenRuns, Run, SnapshotDamagedError, Specs
from streams.workflow.chain import Chain, Head, Verdict
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.payloads import PayloadError, PayloadMissingError
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent

log = structlog.get_logger()

_NUMBER: Final = re.compile(r"[0-9]{1,18}")
"""A number that is one for SQLite too."""


class SpecUnknownError(Exception):
    """An input needs a workflow version that is not known yet: look again, and tell `take` when to give up waiting."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest


@dataclass(slots=True)
class Tenure(OpenRuns):
    """One partition in the hands of one owner. Make it with what was committed last (`position` and `mark`, fetched first)."""

    pack_at: int = PACK_AT
    ignored: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    _chain: Chain = field(init=False)
    _ahead: Ahead = field(default_factory=Ahead)
    _unindexed: list[str] = field(default_factory=list)
    _ended: dict[str, Run] = field(default_factory=dict)  # read as ended, not indexed: their snapshots go with the entry
    # Since the last settlement:
    _own: list[tuple[str, int]] = field(default_factory=list)
    _before: dict[str, Head] = field(default_factory=dict)
    _closed: dict[str, Run] = field(default_factory=dict)
    _later: list[Outgoing] = field(default_factory=list)  # what follows, once these decisions count

    def __post_init__(self) -> None:
        self.position = self.base.position
        self.end = self.base.mark
        self.finished = FinishedIndex(self.place, self.base.index)
        self._chain = Chain(self.finished, restored=self._restored)

    # --- Taking over (rule 6) ---

    def index_read(self, offset: int, key: bytes | None, value: bytes | None) -> None:
        """Take a record of the index's partition, in order: a finished run, or a pack of them, if about this decisions topic.

        Raises NotDecodableError for what is no entry, and NewerCodeError: who passes over an entry starts its run again.
        """
        self._refuse_newer(f"offset {offset} of the index", value, FinishedRun, FinishedRuns)
        run_id = self.finished.read(offset, key, value)
        if run_id is not None and (found := self.shelf.take(run_id)):  # its deletion was lost with its last owner
            self._superseded.append(f"{run_id}/{found[0]}")

    def snapshot_read(self, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes | None]) -> None:
        """Take a record of the snapshots partition; call it before `index_read`: a snapshot goes when its run is indexed.

        Raises NewerCodeError, as everything does that is read here.
        """
        run_id, _, number = (key or b"").decode("utf-8", "replace").rpartition("/")
        if not _NUMBER.fullmatch(number):
            return
        if run_id in self.distrusted:
            self._obsolete += [f"{run_id}/{number}"] if value is not None else []
            return
        if value is None:
            self.shelf.drop(run_id, int(number))
            return
        self._refuse_newer("a snapshot", value, RunSnapshot)
        if codec.kind_of(value) is RunSnapshot:
            due = (headers.get(DUE) or b"0").decode("ascii", "replace")
            self.shelf.put(run_id, int(number), int(due) if _NUMBER.fullmatch(due) else 0, value)

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
            self._ahead.decided[decision.input_offset] = event
        run = self.runs.get(decision.run_id)
        if run is None:
            run = self.runs[decision.run_id] = Run(INITIAL, None, offset, offset)
            heapq.heappush(self._holds, (offset, decision.run_id))
        try:
            run.state = evolve(run.state, event)
        except Exception as error:  # a forged decision that extends the chain, and fits no state
            log.exception("tenure.no_state", run_id=decision.run_id, offset=offset)
            self._chain.broken[decision.run_id] = f"offset {offset}: decision {decision.seq} fits no state: {error!r}"
            return Verdict.BROKEN
        run.touched = decision.at
        if run.state.over:
            assert run.first is not None
            if decision.input_offset in self._ahead.decided:
                self._ahead.ended[decision.run_id] = decision.input_offset, run.state.parent
            del self.runs[decision.run_id]
            if decision.run_id in self.finished:
                self._supersede(decision.run_id, run)
            else:
                self._unindexed.append(decision.run_id)
                self._ended[decision.run_id] = run
            self.finished[decision.run_id] = run.first
        return verdict

    def _decoded(self, offset: int, value: bytes | None) -> Decision | None:
        """Return a record's decision, None for what is none."""
        try:
            return codec.decode(value, Decision)
        except NotDecodableError:
            self._refuse_newer(f"decision {offset}", value, Decision)
            self.ignored += 1
            return None

    def _refuse_newer(self, what: str, value: bytes | None, *kinds: type) -> None:
        schema_id = codec.unknown_schema(value)
        if schema_id is not None and self.newer(schema_id, *kinds):
            raise NewerCodeError(f"{what} (partition {self.place.partition})", schema_id)

    def begin(self, end: int, inbox_end: int = 0) -> None:
        """Everything before `end` was read: from now on inputs are taken. `inbox_end`: no timer fires before that is read."""
        self.end = max(self.end, end)
        self._fires_from = inbox_end
        self.ignored += self._chain.ignored
        self.broken = dict(self._chain.broken)
        for run_id in self.broken:
            self.runs.pop(run_id, None)
        self._chain = Chain()
        for run_id, run in self.runs.items():
            self._set_all_timers(run_id, run.state)

    def awaits_answers(self) -> bool:
        """Say whether calls may have to be made again: then `look_ahead` wants the inputs from the position to the end."""
        events = [(event, self.runs.get(event.decision.run_id)) for event in self._ahead.decided.values()]
        follows = ((each, run) for event, run in events for each in self._consequences(event))
        return self._ahead.await_answers(
            each.awaited for each, run in follows if each.step and each.wanted(run.state if run else None)
        )

    def look_ahead(self, record: Incoming) -> None:
        """Take note of an input still to come: a call that it answers was made, and isn't to be made again."""
        self._ahead.look(record)

    # --- Inputs (rules 2, 3, 6) ---

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        """Judge one input and return what must be written, the decision first.

        Raises SpecUnknownError or PayloadMissingError, with nothing changed, when the run's workflow version isn't known or a
        payload that it looks into can't be had; with `give_up` that run fails. NewerCodeError and SnapshotDamagedError end the
        tenure.
        """
        run_id = (record.key or b"").decode("utf-8", "replace")
        known = self._ahead.decided.get(record.offset)
        if known is not None:
            self.position = record.offset + 1
            return self._emitted_again(known, record)
        run = self.runs.get(run_id) or self._unshelved(run_id, self.end)
        if run and run.state.last_topic_id == self.place.inbox_id and record.offset <= run.state.last_offset:
            self.position = record.offset + 1
            return []
        message, problem = readable(record, run_id)
        cause: Input | UnreadableInput | None = message.input if message else None
        if message is None:
            self._refuse_newer(f"input {record.offset}", record.value, InboxMessage)
        if run is None:
            problem = problem or self._start_problem(run_id, cause)
            if problem or run_id in self.finished or not isinstance(cause, StartRun):
                self.position = record.offset + 1
                return [self._dead_letter(record, run_id, *problem)] if problem else []
            run = Run(INITIAL, self._spec(cause.digest, give_up=give_up), None, None)
            self.runs[run_id] = run
        elif run.spec is None:
            run.spec = self._spec(run.state.digest, give_up=give_up)
        if cause is None:
            cause = unreadable(record, problem[1] if problem else "")
        try:
            outgoing = self._decide(run_id, run, record, cause, message.said if message else None, give_up=give_up)
        except PayloadError:
            if run.state.seq == 0:
                del self.runs[run_id]
            raise
        self.position = record.offset + 1
        return outgoing

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

    def _decide(
        self,
        run_id: str,
        run: Run,
        record: Incoming,
        cause: Input | UnreadableInput,
        said: RequestPlace | None,
        *,
        give_up: bool,
    ) -> list[Outgoing]:
        state, place, at = run.state, self.place, record.timestamp
        made = partial(Decision, run_id, state.seq + 1, state.head, place.inbox_id, record.offset, at, cause, said=said)
        try:
            decision = made(decide(run.spec, state, cause, at, self.payloads, said))
            body = codec.body(decision)
        except PayloadError as missing:
            if not (give_up and isinstance(missing, PayloadMissingError)):
                raise
            decision = failing(made(()), record, FailureKind.UNAVAILABLE, str(missing))
            body = codec.body(decision)
        except Exception as error:
            # A fault of ours, or values that no check has foreseen: it fails one run, and never stops the partition.
            log.exception("tenure.fault", run_id=run_id, offset=record.offset)
            decision = failing(made(()), record, FailureKind.INTERNAL, f"the decision failed: {type(error).__name__}")
            body = codec.body(decision)
        if len(body) > MAX_DECISION_BYTES:
            size = len(record.value or b"")
            decision = failing(decision, record, FailureKind.TOO_LARGE, f"a decision on an input of {size:,} bytes is too large")
            body = codec.body(decision)
        event = RunEvent(decision, chain_hash(body))
        self._before.setdefault(run_id, Head(state.head, state.seq, run.first))
        run.state, run.touched = evolve(state, event), record.timestamp
        self._own.append((run_id, decision.seq))
        if not run.state.over:
            self.runs[run_id] = self.runs.pop(run_id)  # the least busy ones stay in front
            self._set_timers(run_id, run.state, decision)
        else:
            del self.runs[run_id]
            self._closed[run_id] = run
            self.finished[run_id] = -1 if run.first is None else run.first
        follow: list[Outgoing] = []
        for each in self._consequences(event):
            if each.ahead:
                follow.append(each.record)
            else:
                self._later.append(each.record)
        if isinstance(decision.input, UnreadableInput):
            follow.append(self._dead_letter(record, run_id, "unreadable", decision.input.problem))
        return [decision_record(event, body, self.place.partition), *follow]

    # --- What follows from a decision: the same, whenever it is said ---

    def _emitted_again(self, event: RunEvent, record: Incoming) -> list[Outgoing]:
        """Return what follows from a former tenure's decision, but for calls that are answered or that nobody waits for.

        Those were given up, or the run is over, or what they wait for is on the inbox: once more would only be paid once more.
        """
        decision = event.decision
        run = self.runs.get(decision.run_id)
        wanted = (each for each in self._consequences(event) if each.wanted(run.state if run else None))
        again = [each.record for each in wanted if each.awaited not in self._ahead.answered]
        if isinstance(decision.input, UnreadableInput):
            again.append(self._dead_letter(record, decision.run_id, "unreadable", decision.input.problem))
        return again

    def _consequences(self, event: RunEvent) -> Iterator[Consequence]:
        """Yield what follows from a decision, of this tenure or a former one."""
        run_id = event.decision.run_id
        run = self.runs.get(run_id) or self._closed.get(run_id)
        return consequences(event, run.state.parent if run else self._ahead.parent(run_id))

    def _dead_letter(self, record: Incoming, run_id: str, reason: str, detail: str) -> Outgoing:
        return dead_letter(record, reason, detail, SOURCE, run_id=run_id)

    # --- Settling a batch (rules 7, 8) ---

    @property
    def unfinished(self) -> bool:
        """Whether there is something to settle or to commit, or runs that should go out of memory."""
        return self.position != self.base.position or bool(self._own) or bool(self.runs) or bool(self._superseded)

    @property
    def unsettled(self) -> int:
        """How many own decisions were written since the last settlement."""
        return len(self._own)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for the next settlement: another run starts, ends or goes on by what follows then."""
        return bool(self._later)

    def gap(self, offsets: list[int]) -> bool:
        """Say whether somebody else's records lie between the own decisions, whose offsets these are."""
        return offsets != list(range(self.end, self.end + len(self._own)))

    def reconcile(self, records: list[tuple[int, bytes | None]], offsets: list[int]) -> bool:
        """Compare what the log says with what we hold, after a gap.

        `records`: the partition from `end` up to the own last record. False: the tenure is over, its state is worthless.
        """
        heads = dict(self._before)
        chain = Chain(Without(self.finished, self._before), heads, self._restored)
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
            held.hold = head.first if held.hold is None else held.hold
        self._settle(offsets[-1] + 1)
        return True

    def settle(self, offsets: list[int]) -> None:
        """Take the offsets of the own decisions, which go on without a gap."""
        for (run_id, seq), offset in zip(self._own, offsets, strict=True):
            if seq == 1:
                run = self.runs.get(run_id) or self._closed[run_id]
                run.first = run.hold = offset
        self._settle(offsets[-1] + 1 if offsets else self.end)

    def _settle(self, end: int) -> None:
        self.end = end
        for run_id, seq in self._own:
            if seq == 1 and run_id in self.runs and (hold := self.runs[run_id].hold) is not None:
                heapq.heappush(self._holds, (hold, run_id))
        for run_id, run in self._closed.items():
            assert run.first is not None
            self._supersede(run_id, run)
            self.finished[run_id] = run.first
            self._unindexed.append(run_id)
        self._own.clear()
        self._before.clear()
        self._closed.clear()

    def follows(self) -> list[Outgoing]:
        """Return what follows now that the decisions count. It must be acknowledged before the index says that runs are over."""
        records, self._later = self._later, []
        return records

    def index_entries(self) -> list[Outgoing]:
        """Return what must be acknowledged before the next commit: entries of the index, and deletions of its older packs."""
        assert not self._later
        entries = []
        # Not before what follows from a run's end is said: who finds the entry looks at its decisions no more.
        ahead = [run_id for run_id in self._unindexed if self._ahead.ends(run_id, self.position)]
        for run_id in dict.fromkeys(self._unindexed):
            if run_id in ahead:
                continue
            if run := self._ended.pop(run_id, None):
                self._supersede(run_id, run)
            first = self.finished.get(run_id)
            assert first is not None
            entry = FinishedRun(self.place.decisions_id, first)
            message = envelope(topics.FINISHED, run_id, entry, source=SOURCE, identity=run_id, run_id=run_id)
            entries.append(Outgoing(message.topic, message.key, message.value, message.headers, self.place.partition))
        self._unindexed = ahead
        return entries + self.finished.deletions()

    @property
    def pack_due(self) -> bool:
        """Whether the index should be packed, when everything is settled: read its partition on to the end first."""
        return self.finished.worth_packing(self.pack_at)

    def pack(self) -> list[Outgoing]:
        """Return the whole index, packed, to be acknowledged before the next commit."""
        return self.finished.pack(without=frozenset(self._unindexed))

    def commit(self) -> Commit:
        """Return what may be committed now: everything taken is settled and indexed."""
        assert not self._own
        assert not self._later
        self._shelve()
        self._superseded += self._obsolete
        self._obsolete.clear()
        while self._holds and not self._holds_the_mark(*self._holds[0]):
            heapq.heappop(self._holds)
        self._ahead.passed(self.position)
        self.finished.acknowledged()
        mark = min(self._holds[0][0], self.end) if self._holds else self.end
        self.base = Commit(self.position, mark, self.finished.start)
        return self.base

    def _holds_the_mark(self, hold: int, run_id: str) -> bool:
        """Whether a run is open, or was finished by an input still to come, whose decision is needed to emit again."""
        run = self.runs.get(run_id)
        return (run is not None and run.hold == hold) or self._ahead.ends(run_id, self.position)


__all__ = ["Commit", "NewerCodeError", "Place", "Run", "SnapshotDamagedError", "SpecUnknownError", "Specs", "Tenure"]
