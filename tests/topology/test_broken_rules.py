# ruff: noqa: D102 - methods that override: their class says what it breaks
"""What happens when a rule of the ledger protocol is left out: the search finds it. So it can fail, and each rule is needed.

Each case breaks one rule, in a tenure or in its driver, and names the invariants that must catch it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
from memory import Move, Owner
from scenarios import (
    ALL_AGAIN,
    BOTH,
    CHILDREN,
    END,
    GRAND,
    ONE,
    ONLY,
    PACKED_BLINDLY,
    PEOPLE,
    STARTS_AFTER_ITS_END,
    TALK,
    THIRD_PACK_LOST,
    THREE,
    TWO,
    UNDONE,
)
from schedules import Setup, follow, play
from watch import PLACE, ViolationError

from events import codec, topics
from events.calls import ToolCallRequested
from events.commands import WorkflowRequest
from events.decisions import ChildRunRequested, Decision, FinishedRun, InputIgnored, RunClosing
from events.ids import effect_id
from events.topics import Topic
from streams.envelope import Incoming, Outgoing
from streams.processors.consequences import Consequence
from streams.processors.requests import decode
from streams.processors.tenure import Commit, Run, Tenure
from streams.workflow.advance import Advance
from streams.workflow.chain import Chain, Head, Verdict, ends_run
from streams.workflow.evolve import Draft, evolve
from streams.workflow.state import INITIAL, RunEvent, RunState, StepState, StepStatus

LEAST, MOST = 60, 2000
"""How many random schedules are tried for a case: so many in any case, and so many at most."""


# --- Tenures that break a rule ---


class NothingAgain(Tenure):
    """Rule 6: an input that already has its decision emits nothing again."""

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        records = super().take(record, give_up=give_up)
        return [] if record.offset in self._ahead.decided else records


class JudgesAgain(Tenure):
    """Rule 6: inputs at or before the run's last decided one are judged again."""

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        self._ahead.decided.pop(record.offset, None)
        run = self.runs.get((record.key or b"").decode())
        if run is not None:
            run.state = replace(run.state, last_offset=-1)
        return super().take(record, give_up=give_up)


class MarkAtTheEnd(Tenure):
    """Rule 8: the mark goes to the end, into runs that are open."""

    def commit(self) -> Commit:
        super().commit()
        self.base = Commit(self.position, self.end)
        return self.base


class AllAgain(Tenure):
    """Emits again whatever follows from a decision, as an effect that outlives its run will need it. Breaks nothing."""

    def _emitted_again(self, event: RunEvent, record: Incoming) -> list[Outgoing]:
        del record
        return [each.record for each in self._consequences(event)]


class MarkAhead(AllAgain):
    """Rule 8: a run counts as finished even if an input after the position finished it."""

    def commit(self) -> Commit:
        super().commit()
        self.base = Commit(
            self.position, min([run.first for run in self.runs.values() if run.first is not None], default=self.end)
        )
        return self.base


class Clock(Tenure):
    """Rule 3: the bytes depend on the writer's clock."""

    ticks = count()

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        return super().take(replace(record, timestamp=record.timestamp + next(self.ticks) % 2), give_up=give_up)


class Taciturn(Tenure):
    """Rule 2: an input that changes nothing makes no decision (and what changes nothing differs between versions)."""

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        run_id = (record.key or b"").decode()
        run = self.runs.get(run_id)
        known = record.offset in self._ahead.decided
        before = run.state if run else None
        records = super().take(record, give_up=give_up)
        if run and before and not known and records and records[0].topic is topics.DECISIONS:
            decision = codec.decode(records[0].value, Decision)
            if isinstance(decision.effects[0], InputIgnored):
                run.state = before
                self._own.pop()
                return records[1:]
        return records


class Forgetful(Tenure):
    """Rule 8: a finished run that the index knows may start again."""

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        run_id = (record.key or b"").decode()
        if run_id not in self._unindexed and run_id not in self._closed:
            self.finished._loose.pop(run_id, None)
        return super().take(record, give_up=give_up)


class NoChain(Chain):
    """Rule 5: the first decision on an input counts, whatever it extends."""

    def judge(self, offset: int, decision: Decision, decision_hash: bytes) -> Verdict:
        run = decision.run_id
        head = self.heads.get(run)
        first = self.finished.get(run)
        if head is None and first is not None and first < offset:
            return self._ignore(Verdict.FINISHED_BEFORE)
        seen = self.losers.setdefault(run, set())
        key = decision.input_offset.to_bytes(8)
        if key in seen or (head is not None and head.over):
            return self._ignore(Verdict.OVERTAKEN)
        seen.add(key)
        self.heads[run] = Head(decision_hash, decision.seq, head.first if head else offset, ends_run(decision))
        return Verdict.ACCEPTED


class Chainless(Tenure):
    """Rule 5, for the owner: it reads without the chain, and compares nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._chain = NoChain(self.finished, restored=self._restored)


def by_place(decision: Decision, _: bytes = b"") -> bytes:
    """Return an identity that any version's decision on this place has."""
    return decision.run_id.encode() + decision.seq.to_bytes(8)


class WeakCallIds(Tenure):
    """Rule 3: a call is named by its decision's place, not by its bytes."""

    def take(self, record: Incoming, *, give_up: bool = False) -> list[Outgoing]:
        run_id = (record.key or b"").decode()
        before = self.runs[run_id].state if run_id in self.runs else INITIAL
        records = super().take(record, give_up=give_up)
        run = self.runs.get(run_id)
        if run and run.state is not before and records and records[0].topic is topics.DECISIONS:
            self._weaken(codec.decode(records[0].value, Decision), before)
        return records

    def read(self, offset: int, value: bytes | None) -> Verdict:
        decision = codec.decode(value, Decision)
        run = self.runs.get(decision.run_id)
        before = run.state if run else INITIAL
        verdict = super().read(offset, value)
        if verdict is Verdict.ACCEPTED and decision.run_id in self.runs:
            self._weaken(decision, before)
        return verdict

    def _weaken(self, decision: Decision, before: RunState) -> None:
        run = self.runs[decision.run_id]
        run.state = replace(evolve(before, RunEvent(decision, by_place(decision))), head=run.state.head)

    def _consequences(self, event: RunEvent) -> Iterator[Consequence]:
        return super()._consequences(RunEvent(event.decision, by_place(event.decision)))


class EntryOfTheEnd(Tenure):
    """Rule 7: the index holds where a run ended, not where it began."""

    def index_entries(self) -> list[Outgoing]:
        late = FinishedRun(PLACE.decisions_id, self.end - 1)
        return [
            replace(entry, value=codec.encode(late)) if entry.topic is topics.FINISHED else entry
            for entry in super().index_entries()
        ]


# --- Runs of runs, what waits, what people say ---


def again(tenure: Tenure, event: RunEvent, record: Incoming, *, but: Topic) -> list[Outgoing]:
    """Return what a tenure says again, but for what goes to one topic."""
    return [each for each in Tenure._emitted_again(tenure, event, record) if each.topic is not but]


class ResultsOnce(Tenure):
    """Rule 6: what a parent hears is not said again."""

    def _emitted_again(self, event: RunEvent, record: Incoming) -> list[Outgoing]:
        return again(self, event, record, but=topics.INBOX)


class RequestsOnce(Tenure):
    """Rule 6: child runs are not asked for again, nor are their ends."""

    def _emitted_again(self, event: RunEvent, record: Incoming) -> list[Outgoing]:
        return again(self, event, record, but=topics.REQUESTS)


class CancellationsOnce(Tenure):
    """Rule 6: the cancellations of calls are not said again."""

    def _emitted_again(self, event: RunEvent, record: Incoming) -> list[Outgoing]:
        return again(self, event, record, but=topics.CANCELLATIONS)


class ChildrenWhileAwaited(Tenure):
    """Rule 6: a child run is asked for again only while its step waits for it, as a call is; a detached one never."""

    def _consequences(self, event: RunEvent) -> Iterator[Consequence]:
        requested = (
            (effect.step, effect_id(event.hash, index))
            for index, effect in enumerate(event.decision.effects)
            if isinstance(effect, ChildRunRequested)
        )
        for each in super()._consequences(event):
            if each.record.topic is topics.REQUESTS and isinstance(decode(each.record.value), WorkflowRequest):
                step, call = next(requested)
                yield replace(each, step=step, awaited=call)
            else:
                yield each


class ParentForgotten(Tenure):
    """Rule 6: of a run that is over, nobody knows any more who waits for it."""

    def read(self, offset: int, value: bytes | None) -> Verdict:
        verdict = super().read(offset, value)
        self._ahead.ended = {run: (ended, None) for run, (ended, _) in self._ahead.ended.items()}
        return verdict


class AllAhead(Tenure):
    """Rule 7: all that follows from a decision goes before anybody knows whether it counts."""

    def _consequences(self, event: RunEvent) -> Iterator[Consequence]:
        return (replace(each, ahead=True) for each in super()._consequences(event))


class AheadByPlace(WeakCallIds):
    """Rules 3 and 7: so it does, and children are named by the place of their decision."""

    def _consequences(self, event: RunEvent) -> Iterator[Consequence]:
        return (replace(each, ahead=True) for each in super()._consequences(event))


class TimersOfCallsOnly(Tenure):
    """Rule 6: after a takeover there are timers for calls alone, not for sleeps, signals, approvals, blocks."""

    def begin(self, end: int) -> None:
        super().begin(end)
        calls = (StepStatus.RUNNING, StepStatus.WAITING)
        self._timers = [
            timer for timer in self._timers if not timer[2] or self.runs[timer[1]].state.steps[timer[2]].status in calls
        ]


class NoLimitAfterTakeover(Tenure):
    """Rule 6: after a takeover nobody knows the time limits of runs."""

    def begin(self, end: int) -> None:
        super().begin(end)
        self._timers = [timer for timer in self._timers if timer[2]]


class EarlyForGood(Tenure):
    """A timer that fired before its time is not set again."""

    def _set_timers(self, run_id: str, state: RunState, decision: Decision) -> None:
        if not isinstance(decision.effects[0], InputIgnored):
            super()._set_timers(run_id, state, decision)


class SupersededAtOnce(Tenure):
    """Rule 11: a snapshot is deleted before the index entry of its run is acknowledged."""

    def _supersede(self, run_id: str, run: Run) -> None:
        super()._supersede(run_id, run)
        self._superseded += self._obsolete
        self._obsolete.clear()


class KeptTooSoon(Owner):
    """Rule 11: a run has a snapshot, and stands in the index, while what follows from its decisions is not acknowledged."""

    def settle(self) -> None:
        super().settle()
        if self.phase == "saying":
            self.index()


class KeptForGood(Tenure):
    """Rule 11: what comes back from a snapshot has no timers."""

    def _unshelved(self, run_id: str, hold: int) -> Run | None:
        before = list(self._timers)
        run = super()._unshelved(run_id, hold)
        self._timers = before
        return run


class OldPacksAtOnce(Owner):
    """Rule 8: a pack of the index is deleted before the next one is acknowledged."""

    def packed(self) -> list[Outgoing]:
        packs = super().packed()
        old = [Outgoing(topics.FINISHED, key.encode(), None, [], 0) for key in self.tenure.finished._packs]
        return [*old, *packs]


class PacksUnread(Owner):
    """Rule 8: a pack claims to hold entries that its writer has not read."""

    def index_on(self) -> None:
        if self.phase == "shelved":
            super().index_on()
        self.tenure.finished.end = len(self.world.finished)


class PacksUnacknowledged(Owner):
    """Rule 8: commits that reading may begin with a pack which is not acknowledged."""

    def settle(self) -> None:
        if not self.check():
            self.phase = "idle"
            self.fetch()
            return
        self.others.extend(self.tenure.follows())
        self.others.extend((*self.tenure.index_entries(), *self.tenure.keep_idle(self.world.clock)))
        self.phase = "indexing"

    def commit(self) -> None:
        packed = self.packed()
        super().commit()
        self.others.extend(packed)


class CommitsBeforeItIsSaid(Owner):
    """Rule 7: commits first, and says afterwards what follows."""

    def settle(self) -> None:
        if not self.check():
            self.phase = "idle"
            self.fetch()
            return
        later = [*self.tenure.follows(), *self.tenure.index_entries()]
        self.world.commit(self.tenure.commit())
        self.others.extend(later)


# --- A core that breaks a rule, for all owners alike ---


FINISH = Draft.finish


def unseen(self: Draft, signal_id: str) -> None:
    """Forget signals at once."""


def deaf(self: Draft, event: RunEvent) -> RunState:
    """Forget which words were heard."""
    return replace(FINISH(self, event), heard=self._before.heard)


def nothing_held(self: Advance, place: object) -> str:
    """Hold nothing."""
    del self, place
    return ""


def children_stay(self: Advance, path: str, step: StepState, reason: str) -> None:
    """Cancel no child."""
    if step.asked is None:
        cancel_call(self, path, step, reason)


def nothing_undone(self: Advance) -> None:
    """Undo nothing."""
    self.state.undo = None
    close_on(self)


def started_at_the_end(self: Advance, closing: RunClosing) -> None:
    """Go on after the end."""
    end(self, closing)
    self.add(ToolCallRequested("one", 2, "echo", "{}", 0))


cancel_call, close_on, end = Advance.cancel_call, Advance.close_on, Advance.end


# --- Drivers that break a rule ---


class CommitsEarly(Owner):
    """Rule 7: commits before the acknowledgements."""

    def may_settle(self) -> bool:
        return self.tenure.position > self.tenure.base.position

    def settle(self) -> None:
        first = self.tenure.end
        self.tenure.settle(list(range(first, first + self.tenure.unsettled)))
        self.others.extend(self.tenure.index_entries())
        self.world.commit(self.tenure.commit())


class NoCheck(Owner):
    """Rule 7: commits without a look at the offsets."""

    def check(self) -> bool:
        self.tenure.settle(self.offsets)
        self.offsets = []
        return True


class IndexLater(Owner):
    """Rule 7: commits first and writes the index afterwards."""

    def settle(self) -> None:
        if not self.check():
            self.phase = "idle"
            self.fetch()
            return
        entries = self.tenure.index_entries()
        self.world.commit(self.tenure.commit())
        self.others.extend(entries)


class LogFirst(Owner):
    """Rule 6: fetches the position after it read the log."""

    def read_log(self) -> None:
        super().read_log()
        self.phase = "position"

    def fetch_position(self) -> None:
        position = self.world.committed.position
        self.tenure.base = Commit(position, self.tenure.base.mark)
        self.tenure.position = position
        self.phase = "running"

    def moves(self, *, alone: bool) -> Iterator[Move]:
        if self.phase == "position":
            yield Move(3, f"{self.name} fetches the position", self.fetch_position)
        else:
            yield from super().moves(alone=alone)


class Skips(Owner):
    """Rule 7: the producer skips a record that fails and goes on."""

    def skip(self) -> None:
        self.decisions.popleft()
        self.tenure._own.pop(len(self.offsets))

    def moves(self, *, alone: bool) -> Iterator[Move]:
        yield from super().moves(alone=alone)
        if self.decisions:
            yield Move(1, f"{self.name}'s decision is skipped", self.skip, fault=True)


class ComparesNothing(Owner):
    """Rule 5, with `Chainless`: what lies in between is not compared."""

    def check(self) -> bool:
        self.tenure.settle(self.offsets)
        self.offsets = []
        return True


def test_the_mark_stays_behind_runs_that_inputs_ahead_have_finished() -> None:
    """Given an effect of a run that is over by an input ahead, when two owners end in a row, then the third still emits it."""
    follow(replace(ONLY["fails"], tenure_type=AllAgain, all_again=True), MARK)


# --- The search ---


@dataclass(frozen=True)
class Case:
    """A rule left out. `history`: a schedule that shows it, where random ones rarely do. `core`: what the core does instead."""

    setup: Setup
    caught_by: set[str]
    history: tuple[str, ...] = ()
    core: tuple[type, str, Callable[..., Any]] | None = None


def of(setup: Setup, *workflows: str, **broken: object) -> Setup:
    """Return a setup with few requests (so that schedules go deep) and something broken."""
    broken.setdefault("says", tuple(said for said in setup.says if said.workflow in workflows))
    chosen = tuple(request for request in setup.requests if request.workflow in workflows)
    return replace(setup, requests=chosen or setup.requests, **broken)


KIN, KIN_TWO, WAITS, DONE = CHILDREN[0], CHILDREN[1], PEOPLE[0], UNDONE[0]
PACKED = replace(ONE, pack_at=1)
KEPT, KEPT_WAITS = replace(KIN, idle_ms=2), replace(WAITS, idle_ms=2)
MARK = ALL_AGAIN["the mark stays behind runs that inputs after the position finished"][1]

CASES = {
    "commit before acks": Case(of(ONE, "single", owner_type=CommitsEarly), {"lost input"}),
    "no check, two versions": Case(of(TWO, "single", owner_type=NoCheck), {"marks miss"}),
    "inputs judged again": Case(of(ONE, "single", tenure_type=JudgesAgain), {"determinism"}),
    "mark inside a run": Case(of(ONE, "single", tenure_type=MarkAtTheEnd), {"marks miss"}),
    "mark ahead of the position": Case(
        of(ONE, "fails", tenure_type=MarkAhead, all_again=True, owners=1), {"never emitted"}, MARK
    ),
    "index after the commit": Case(of(ONE, "single", owner_type=IndexLater), {"marks revive"}),
    "index says the end": Case(of(ONE, "single", "fails", tenure_type=EntryOfTheEnd), {"marks broken"}),
    "finished runs start again": Case(of(ONE, "single", tenure_type=Forgetful), {"marks revive"}),
    "nothing emitted again": Case(of(ONE, "single", tenure_type=NothingAgain), {"never emitted"}),
    "position after the log": Case(of(ONE, "single", owner_type=LogFirst), {"determinism"}),
    "no chain, two versions": Case(
        of(TWO, "single", tenure_type=Chainless, owner_type=ComparesNothing, chain=NoChain), {"legality"}
    ),
    "clock in the bytes": Case(of(ONE, "single", tenure_type=Clock), {"determinism"}),
    "producer skips a record": Case(of(ONE, "single", owner_type=Skips), {"integrity"}),
    "call ids of the place alone": Case(of(TWO, "single", tenure_type=WeakCallIds, identity=by_place), {"answers"}),
    "no decision on what changes nothing": Case(of(ONE, "single", tenure_type=Taciturn), {"order"}),
    "child results not said again": Case(of(KIN, "attached", tenure_type=ResultsOnce), {"waits for ever"}),
    "child results said by nobody's child": Case(of(KIN, "attached", tenure_type=ParentForgotten), {"waits for ever"}),
    "child runs not asked for again": Case(of(KIN, "loosely", tenure_type=RequestsOnce), {"never emitted"}),
    "ends of child runs not asked for again": Case(of(KIN, "grand", says=END, tenure_type=RequestsOnce), {"orphan"}),
    "cancellations not said again": Case(of(DONE, "undone", tenure_type=CancellationsOnce), {"never emitted"}),
    "child runs asked for again while awaited": Case(
        replace(GRAND, tenure_type=ChildrenWhileAwaited), {"orphan"}, STARTS_AFTER_ITS_END
    ),
    "parents told ahead": Case(of(KIN_TWO, "attached", tenure_type=AllAhead), {"told wrong", "of no decision"}),
    "children named by place, ahead": Case(of(KIN_TWO, "attached", tenure_type=AheadByPlace, identity=by_place), {"answers"}),
    "commit before children are asked for": Case(of(KIN, "attached", owner_type=CommitsBeforeItIsSaid), {"never emitted"}),
    "no timers of sleeps and waits": Case(of(WAITS, "people", tenure_type=TimersOfCallsOnly), {"stuck"}),
    "no time limit of runs": Case(of(WAITS, "until", tenure_type=NoLimitAfterTakeover), {"stuck"}),
    "early timers not set again": Case(of(WAITS, "until", tenure_type=EarlyForGood), {"stuck"}),
    "snapshots deleted before the index": Case(of(KEPT, "attached", tenure_type=SupersededAtOnce), {"marks broken"}),
    "snapshots before what follows": Case(of(KEPT, "attached", owner_type=KeptTooSoon), {"never emitted"}),
    "packs of what was not read": Case(replace(BOTH, owner_type=PacksUnread), {"marks broken"}, PACKED_BLINDLY),
    "packs deleted too soon": Case(replace(THREE, owner_type=OldPacksAtOnce), {"stray call"}, THIRD_PACK_LOST),
    "commit before the pack": Case(of(PACKED, "single", "fails", owner_type=PacksUnacknowledged), {"marks revive"}),
    "no timers of what was kept": Case(of(KEPT_WAITS, "people", tenure_type=KeptForGood), {"stuck"}),
    "signals count twice": Case(of(WAITS, "people", says=TALK[:3]), {"signals"}, core=(Draft, "_see", unseen)),
    "words count whenever they are said": Case(of(WAITS, "people", says=TALK[:6]), {"said twice"}, core=(Draft, "finish", deaf)),
    "pauses hold nothing": Case(of(WAITS, "people"), {"paused"}, core=(Advance, "hold", nothing_held)),
    "children outlive their parents": Case(of(KIN, "grand", says=END), {"orphan"}, core=(Advance, "cancel_call", children_stay)),
    "nothing is undone": Case(of(DONE, "undone"), {"undo"}, core=(Advance, "close_on", nothing_undone)),
    "runs go on after their end": Case(of(KIN, "attached"), {"after the end"}, core=(Advance, "end", started_at_the_end)),
}


def violations(case: Case, name: str) -> dict[str, tuple[int, str]]:
    """Return the invariants that random schedules violate: by which schedule first, and how."""
    generator = random.Random(name)  # noqa: S311 - the same schedules each time
    found: dict[str, tuple[int, str]] = {}
    for tried in range(1, MOST + 1):
        choices = [generator.randrange(1 << 16) for _ in range(generator.randrange(20, 100))]
        try:
            play(case.setup, choices)
        except AssertionError as error:  # the tenure's own assertions may be first
            found.setdefault(getattr(error, "rule", "assertion"), (tried, str(error)))
        if tried >= LEAST and case.caught_by <= set(found):
            break
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_rule_left_out_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a tenure or a driver that breaks one rule, when schedules are tried, then an invariant is violated."""
    case = CASES[name]
    if case.core:
        monkeypatch.setattr(*case.core)
    if case.history:
        with pytest.raises(ViolationError) as caught:
            follow(case.setup, case.history)
        found = {caught.value.rule: (0, str(caught.value))}
    else:
        found = violations(case, name)
    for rule, (schedule, how) in sorted(found.items(), key=lambda item: item[1]):
        print(f"{name} | {rule} | schedule {schedule} | {how}")  # noqa: T201 - for the record: pytest -rP
    assert case.caught_by <= set(found)
