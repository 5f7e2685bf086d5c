"""Checks a ledger: the hash chain, `seq`, and every decision decided again from its input and compared byte for byte.

A partition is read once, in order, through the shared filter. What the filter passes over as honest writers may cause it is
counted. What no honest writer can cause is a finding, and names its record. A finding's cause is known once the run's next
decision was read: a changed byte breaks the chain behind it; who recomputes the chain as well is found by deciding again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from events import codec, ids
from events.commands import StartRun
from events.decisions import Decision
from events.errors import NotDecodableError
from events.topics import partition_for
from projections.export_files import differing
from projections.replay_again import Aside, CannotDecideError, Kept, Specs, decided_again, difference, stands_in
from projections.replay_parquet import DamagedError
from projections.replay_sources import KafkaLog, Record, Source, Span, run_of
from streams.payloads import PayloadStore
from streams.settings import Settings
from streams.workflow.chain import Chain, Head, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.state import INITIAL, RunEvent, RunState

MOST_FINDINGS: Final = 1000
"""How many findings of a partition are kept; more are counted."""
MISPLACED: Final = "misplaced"
_TICK: Final = 500
_LONG: Final = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that no honest writer can cause. `cause`: what has probably happened.

    `kind`: `changed` (a byte of this record), `rewritten` (deciding again differs although the chain is whole), `missing` (there
    are none of the records before this one), `unreadable`, `header`, `key`, `column`, `identity` (what stands beside the value
    says something else), `archive` (a file). `field`, `recorded`, `again`: what differs first.
    """

    kind: str
    problem: str
    cause: str
    partition: int = -1
    offset: int = -1
    run_id: str | None = None
    seq: int | None = None
    field: str | None = None
    recorded: str | None = None
    again: str | None = None


@dataclass(slots=True)
class Result:
    """What came of checking. `decisions`: those that count; `again`: of them decided again, `stand_ins` not decided but written.

    `ignored`: records that the filter passed over, by verdict; `unchecked`: runs that could not be decided again, by what is
    missing (`spec`, `payload`, `beginning`; `end`: what names their last decision's hash), with an example in `lacking`;
    `begins`: partitions that don't begin at offset 0.
    """

    decisions: int = 0
    again: int = 0
    stand_ins: int = 0
    runs: int = 0
    open: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    unchecked: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, str] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    more: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing was found; see `unchecked` for what could not be looked at."""
        return not self.findings

    def add(self, other: "Result") -> None:
        """Take another partition's result in."""
        for name in ("decisions", "again", "stand_ins", "runs", "open", "more"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ignored += other.ignored
        self.unchecked += other.unchecked
        self.lacking = {**other.lacking, **self.lacking}
        self.begins |= other.begins
        self.findings += [each for each in other.findings if each not in self.findings]

    def found(self, finding: Finding) -> None:
        """Note a finding."""
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(finding)
        else:
            self.more += 1


@dataclass(frozen=True, slots=True)
class Check:
    """What is to be checked, for any process. `only`: these runs, all if None; `canonical`: the definitions, by digest."""

    source: Source
    canonical: Mapping[str, str]
    kept: Callable[[], Kept]
    only: frozenset[bytes] | None = None

    def __call__(self, partition: int, tick: Callable[[int], None]) -> Result:
        """Check a partition; `tick` hears how many records were read. Raises KafkaUnreachableError and NewerCodeError."""
        span = self.source.spans()[partition]
        checker = _Checker(partition, span, self.source, Specs(self.canonical), Aside(self.kept()))
        read = 0
        try:
            for record in self.source.records(partition, span):
                read += 1
                if read % _TICK == 0:
                    tick(_TICK)
                checker.in_order(record)
                if self.only is None or (run_of(record.value) or b"") in self.only or run_of(record.value) is None:
                    checker.take(record)
        except DamagedError as error:
            problem = f"{error}; what stands behind it in partition {partition} was not checked"
            checker.result.found(Finding("archive", problem, "a byte of the file was changed, or its end is missing", partition))
        tick(read % _TICK)
        return checker.finish()


def runs_since(source: Source, at_ms: int, tick: Callable[[int], None] = lambda _: None) -> frozenset[bytes]:
    """Return the runs that have a record from a time on (milliseconds since the epoch), without decoding any."""
    firsts, spans, found = source.since(at_ms), source.spans(), set[bytes]()
    for partition, span in spans.items():
        for record in source.records(partition, Span(firsts.get(partition, span.end), span.end)):
            tick(1)
            if (run := run_of(record.value)) is not None:
                found.add(run)
    return frozenset(found)


@dataclass(slots=True)
class _Run:
    """A run that is under way in the log. `state` None: it can't be decided again; `offset`: where its last decision is.

    `finding`: what deciding again has found, until its cause is known; `passed`: the last record of it that was passed over.
    `named`: whether something beside the last decision names its hash.
    """

    state: RunState | None
    offset: int
    finding: Finding | None = None
    passed: int | None = None
    named: bool = True


@dataclass(slots=True)
class _Break:
    """A record that doesn't extend its run's chain, until the run's next record tells which of the two was changed."""

    finding: Finding
    before: Finding
    hash: bytes
    repaired: bytes


class _Over:
    """Runs that are over: nothing of them is kept but that they are."""

    def __init__(self) -> None:
        self._runs: set[int] = set()

    def add(self, run_id: str) -> None:
        self._runs.add(hash(run_id))

    def get(self, run_id: str, /) -> int | None:
        return -1 if hash(run_id) in self._runs else None


class _Checker:
    """One partition in the check."""

    def __init__(self, partition: int, span: Span, source: Source, specs: Specs, payloads: Aside) -> None:
        self.result = Result(begins={partition: span.first} if span.first else {})
        self._partition, self._source, self._specs, self._payloads = partition, source, specs, payloads
        self._over, self._runs, self._breaks = _Over(), dict[str, _Run](), dict[str, _Break]()
        self._chain = Chain(self._over, restored=self._restored)
        self._next, self._cut = span.first, span.first > 0
        self._taken: Decision | None = None
        self._unreadable, self._misnamed = dict[bytes, int](), set[int]()

    def in_order(self, record: Record) -> None:
        """Note records that are missing, where all must be there."""
        if self._source.gapless and record.offset != self._next:
            missing = f"the records at offsets {self._next} to {record.offset - 1} are missing"
            problem = missing if record.offset > self._next else f"offset {record.offset} stands there twice"
            self._found("missing", problem, "they were taken out of the archive, or its files are not complete", record.offset)
        self._next = record.offset + 1

    def take(self, record: Record) -> None:
        """Check the partition's next record."""
        offset, value = record.offset, record.value
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError as error:
            self._source.refuse_newer(f"decision {self._partition}/{offset}", value)
            run = (run_of(value) or record.key or b"").decode("utf-8", "replace")
            self._found(
                "unreadable", f"it can't be decoded: {error}", "a byte was changed, or somebody else wrote it", offset, run
            )
            self._unreadable[run.encode()] = offset
            return
        assert value is not None
        self._taken = decision
        hashed = ids.chain_hash(codec.unframed(value))
        self._outside(record, decision, hashed)
        run_id = decision.run_id
        if run_id in self._breaks:
            self._tell(self._breaks.pop(run_id), decision)
        if run_id not in self._chain.heads and self._is_misplaced(decision, offset):
            return
        verdict = self._chain.judge(offset, decision, hashed)
        if verdict is Verdict.BROKEN:
            self._broken(offset, decision, hashed)
        elif verdict is not Verdict.ACCEPTED:
            self.result.ignored[verdict.value] += 1
            if run_id in self._runs:
                self._runs[run_id].passed = offset
        else:
            self._accepted(record, decision, value, hashed)

    def _outside(self, record: Record, decision: Decision, hashed: bytes) -> None:
        """Compare a value with what stands beside it."""
        if record.key is not None and record.key != decision.run_id.encode():
            problem = f"its key says run {record.key.decode('utf-8', 'replace')}, its value run {decision.run_id}"
            self._found("key", problem, "the key was changed, or the value", record.offset, decision.run_id, decision.seq)
        if record.claimed is not None and record.claimed != hashed.hex().encode():
            problem = f"its header ce_id names {record.claimed.decode('utf-8', 'replace')}, its value's hash is {hashed.hex()}"
            cause = "a byte of the value was changed since it was written, or the header"
            self._found("header", problem, cause, record.offset, decision.run_id, decision.seq)
            self._misnamed.add(record.offset)
        if record.told is not None and (found := differing(decision, record.told)) is not None:
            name, said, now = found
            problem = f"its column `{name}` says {_short(said)}, its value says {_short(now)}"
            self._found("column", problem, "the column was changed, or the value", record.offset, decision.run_id, decision.seq)

    def _is_misplaced(self, decision: Decision, offset: int) -> bool:
        """Whether a new run's decision is not what this partition may hold; else whether its id is its request's is checked."""
        count = self._source.whole_topic
        if count is not None and partition_for(decision.run_id.encode(), count) != self._partition:
            self.result.ignored[MISPLACED] += 1
            return True
        cause = decision.input
        if decision.seq == 1 and isinstance(cause, StartRun) and ids.run_id(cause.request_id) != decision.run_id:
            problem = f"run {decision.run_id} is not the run of request {cause.request_id}"
            self._found("identity", problem, "the run's id was changed, or its request's", offset, decision.run_id, 1)
        return False

    def _restored(self, run_id: str) -> Head | None:
        """Where the log doesn't begin with its first record, a run may have begun before it: trust its first decision here."""
        first = self._taken
        if not self._cut or first is None or first.run_id != run_id or first.seq == 1:
            return None
        self._runs[run_id] = _Run(None, -1)
        self.result.runs += 1
        self._lacks("beginning", f"run {run_id} began before the first record that is here")
        return Head(first.prev, first.seq - 1)

    def _accepted(self, record: Record, decision: Decision, value: bytes, hashed: bytes) -> None:
        offset = record.offset
        run = self._runs.get(decision.run_id)
        if run is None:
            run = self._runs[decision.run_id] = _Run(INITIAL, offset)
            self.result.runs += 1
        self.result.decisions += 1
        run.offset, run.named = offset, record.claimed is not None
        if run.finding is not None:
            self._settled(run, "its successor")
        if run.state is not None:
            self._decide_again(run, decision, value, hashed)
        if self._chain.heads[decision.run_id].over:
            if run.finding is not None:
                self._settled(run, "")
            self._ends(decision.run_id, run)
            del self._runs[decision.run_id], self._chain.heads[decision.run_id]
            self._over.add(decision.run_id)

    def _ends(self, run_id: str, run: _Run) -> None:
        """Note a run of whose last decision nothing says what it was: a changed byte shows only in what follows from it."""
        if not run.named:
            self._lacks("end", f"run {run_id}, at offset {run.offset}")

    def _decide_again(self, run: _Run, decision: Decision, value: bytes, hashed: bytes) -> None:
        state = run.state
        assert state is not None
        start = decision.input
        spec = self._specs.get(start.digest if isinstance(start, StartRun) and decision.seq == 1 else state.digest)
        try:
            effects = decided_again(spec, state, decision, self._payloads)
            if stands_in(decision):
                self.result.stand_ins += 1
            if found := difference(decision, value, effects):
                where = f"{found.field}: recorded is {found.recorded}, decided again it is {found.again}"
                run.finding = self._finding("rewritten", where, "", run.offset, decision.run_id, decision.seq)
                run.finding = replace(run.finding, field=found.field, recorded=found.recorded, again=found.again)
            self.result.again += 1
            run.state = evolve(state, RunEvent(decision, hashed)) if run.finding is None else None
        except CannotDecideError as error:
            self._lacks(error.lacks, f"run {decision.run_id}: {error}")
            run.state = None
        except Exception as error:  # noqa: BLE001 - a forged decision may fit no state, and fail anywhere in the core
            problem = f"it fits no state that its run can be in: {type(error).__name__}: {error}"
            run.finding = self._finding("rewritten", problem, "", run.offset, decision.run_id, decision.seq)
            run.state = None
        finally:
            self._payloads.clear()

    # --- What was the cause ---

    def _settled(self, run: _Run, successor: str) -> None:
        """Note that a decision which comes out differently was extended all the same, or was its run's last one."""
        assert run.finding is not None
        old = "; or other code decided it (see `foldflow backtest`)"
        if successor:
            cause = f"the record was rewritten and the chain behind it recomputed: it is whole{old}"
        else:
            cause = f"the record, its run's last one, was changed or rewritten{old}"
        self.result.found(replace(run.finding, cause=cause))
        run.finding = None

    def _broken(self, offset: int, decision: Decision, hashed: bytes) -> None:
        run_id = decision.run_id
        run, head = self._runs.pop(run_id, None), self._chain.heads.get(run_id)
        finding = self._finding("changed", "", "", offset, run_id, decision.seq)
        if run is None or head is None or decision.seq > head.seq + 1:
            behind = head.seq + 1 if head else 1
            there = self._unreadable.get(run_id.encode())
            cause = f"the record at offset {there} can't be read" if there is not None else "they were taken out, or changed"
            if there is None and run is not None and run.passed is not None:
                cause += f"; the record at offset {run.passed} extends nothing either, and was passed over"
            between = f"decision {behind}" if behind == decision.seq - 1 else f"decisions {behind} to {decision.seq - 1}"
            problem = f"it extends nothing that is there: {between} of its run must stand before it"
            if decision.seq <= behind:
                problem, cause = "it extends nothing that is there", "its field `prev`, `seq` or `run_id` was changed"
            self.result.found(
                replace(finding, kind="missing" if decision.seq > behind else "changed", problem=problem, cause=cause)
            )
            return
        before = self._finding("changed", "", "", run.offset, run_id, head.seq)
        if run.finding is not None:  # deciding again has found it already
            cause = f"a byte of it was changed: decision {decision.seq} (offset {offset}) was written on top of other bytes"
            self.result.found(replace(run.finding, kind="changed", cause=cause))
            return
        repaired = ids.chain_hash(codec.body(replace(decision, prev=head.hash)))
        self._breaks[run_id] = _Break(finding, before, hashed, repaired)

    def _tell(self, found: _Break, following: Decision | None) -> None:
        """Say which of two records was changed, by what the run's next decision was written on top of."""
        own, before = found.finding, found.before
        prev = following.prev if following is not None and following.seq == (own.seq or 0) + 1 else None
        if prev == found.repaired or own.offset in self._misnamed:
            problem = f"its field `prev` doesn't name decision {before.seq} (offset {before.offset})"
            cause = "a byte of it was changed: others know it with the right one"
            self.result.found(replace(own, problem=problem, cause=cause, field="prev"))
        elif prev is None or prev == found.hash:
            problem = f"decision {own.seq} (offset {own.offset}) was written on top of other bytes than these"
            known = prev is not None or before.offset in self._misnamed
            cause = "a byte of it was changed" if known else f"a byte of it was changed, or of `prev` in decision {own.seq}"
            self.result.found(replace(before, problem=problem, cause=cause))
        else:
            problem = f"neither it nor decision {before.seq} (offset {before.offset}) is what others were written on top of"
            self.result.found(replace(own, problem=problem, cause="bytes of both were changed"))

    def finish(self) -> Result:
        """Return what was found; the partition was read."""
        for run_id, run in self._runs.items():
            if run.finding is not None:
                self._settled(run, "")
            self._ends(run_id, run)
        for found in self._breaks.values():
            self._tell(found, None)
        self.result.open = len(self._runs)
        for problem in dict.fromkeys(self._source.damage):
            self.result.found(Finding("archive", problem, "a byte was changed, or somebody else wrote it"))
        self.result.findings.sort(key=lambda each: each.offset)
        return self.result

    def _lacks(self, what: str, example: str) -> None:
        self.result.unchecked[what] += 1
        self.result.lacking.setdefault(what, example)

    def _finding(self, kind: str, problem: str, cause: str, offset: int, run: str | None, seq: int | None) -> Finding:
        return Finding(kind, problem, cause, self._partition, offset, run, seq)

    def _found(self, kind: str, problem: str, cause: str, offset: int, run: str | None = None, seq: int | None = None) -> None:
        self.result.found(self._finding(kind, problem, cause, offset, run, seq))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def verified(settings: Settings, run_id: str, partition: int, first: int, end: int | None) -> Result:
    """Check one run of the topics, whose decisions lie between these offsets; `end` None: the partition's end as of now.

    Raises KafkaUnreachableError, TopicsMissingError and NewerCodeError.
    """
    source = KafkaLog.open(settings, partition)
    span = Span(first, source.ends[partition].end if end is None else end)
    source = replace(source, ends={partition: span})
    check = Check(source, source.specs(), partial(PayloadStore, settings), frozenset([run_id.encode()]))
    return replace(check(partition, lambda _: None), begins={})


def together(results: Iterable[Result]) -> Result:
    """Return the result of all partitions."""
    whole = Result()
    for each in results:
        whole.add(each)
    return whole
