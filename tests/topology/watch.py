"""What must hold of one partition, whatever happens to it. `Watch` sees every record land and says what must never be."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from events import codec
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import RequestPlace, ResumeRun, ResumeStep, RunRequest, StartRun, WorkflowRequest
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    Decision,
    Effect,
    InputIgnored,
    MapStarted,
    RunCancelled,
    RunCompleted,
    RunFailed,
    SignalAwaited,
    SignalKept,
    SignalTaken,
    StepCompleted,
    TimerSet,
    UndoPlanned,
    UnreadableInput,
)
from events.errors import NotDecodableError
from events.ids import chain_hash, effect_id
from events.ids import run_id as run_id_of
from events.results import ChildRunCompleted, ChildRunFailed, InboxMessage, Input, ToolCallCompleted
from streams.envelope import Incoming, Outgoing
from streams.processors.requests import decode
from streams.processors.tenure import Commit, Place, Specs
from streams.workflow.chain import NEW, Chain, Head, Verdict
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.expressions import from_json
from streams.workflow.payloads import Memory, resolve
from streams.workflow.state import INITIAL, RunEvent, RunState, StepState, StepStatus

if TYPE_CHECKING:
    from memory import World

PLACE: Final = Place(b"i" * 16, b"d" * 16, 0, 1)
ENDS: Final = (RunCompleted, RunFailed, RunCancelled)
CALLS: Final = (LlmCallRequested, ToolCallRequested)
STARTS: Final = (*CALLS, ChildRunRequested, SignalAwaited, ApprovalRequested, BlockEntered, MapStarted)
"""Effects by which a step starts something."""


class ViolationError(AssertionError):
    """Something happened that must never happen. `rule`: the invariant, in a few words."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule


@dataclass
class Watch:
    """What every reader from offset 0 sees, checked record by record, and readers that started at each mark committed."""

    specs: dict[int, Specs]
    one_version: bool = True
    chain: Callable[..., Chain] = Chain
    identity: Callable[[Decision, bytes], bytes] = lambda _, real: real
    all_again: bool = False
    payloads: Memory = field(default_factory=Memory)
    reader: Chain = field(init=False)
    accepted: dict[str, list[RunEvent]] = field(default_factory=dict)
    states: dict[str, RunState] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    said: dict[object, bytes] = field(default_factory=dict)
    marks: list[tuple[Commit, Chain, dict[str, Head]]] = field(default_factory=list)
    # What accepted decisions ask for, by call id or run id:
    calls: dict[str, str] = field(default_factory=dict)
    children: dict[str, tuple[str, ChildRunRequested]] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    cancelled: dict[str, str] = field(default_factory=dict)
    heard: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = self.chain()

    def produced(self, version: int, record: Outgoing) -> None:
        """Check that two owners who decide the same write the same bytes."""
        decision, _ = decided(record.value)
        key = (decision.run_id, decision.input_offset) if self.one_version else (version, decision.input_offset, decision.prev)
        whole = repr((record.key, record.value, record.headers, record.partition)).encode()
        if self.said.setdefault(key, whole) != whole:
            raise ViolationError("determinism", f"two owners say different bytes about input {decision.input_offset}")

    # --- Decisions land ---

    def landed(self, version: int, world: "World", offset: int) -> None:
        """Let all readers judge a decision record that is in the log now."""
        decision, real = decided(world.decisions[offset])
        verdict = self.reader.judge(offset, decision, real)
        self.verdicts.append(verdict)
        if verdict is Verdict.ACCEPTED:
            self.legal(version, world, decision, self.identity(decision, real), real)
        elif verdict in (Verdict.BROKEN, Verdict.SET_ASIDE):
            raise ViolationError("integrity", f"honest writers broke the chain: {self.reader.broken}")
        for commit, reader, restored in self.marks:
            self.agree(commit.mark, reader, restored, offset, decision, reader.judge(offset, decision, real))

    def legal(self, version: int, world: "World", decision: Decision, identity: bytes, real: bytes) -> None:
        """Check that an accepted decision is what its writer's version decides on the run's next input."""
        run = decision.run_id
        state = self.states.get(run, INITIAL)
        todo = world.inputs_after(run, state)
        if not todo or todo[0].offset != decision.input_offset:
            wanted = todo[0].offset if todo else "none"
            raise ViolationError("order", f"run {run} took input {decision.input_offset} as {decision.seq}, next was {wanted}")
        record = todo[0]
        cause = readable(record)
        digest = cause.digest if isinstance(cause, StartRun) else state.digest
        said = said_at(record)
        effects = decide(self.specs[version](digest), state, cause or decision.input, record.timestamp, self.payloads, said)
        place = PLACE.inbox_id, record.offset, record.timestamp
        expected = Decision(run, state.seq + 1, state.head, *place, cause or decision.input, effects, said)
        if codec.body(expected) != codec.unframed(world.decisions[len(self.verdicts) - 1]):
            raise ViolationError("legality", f"input {record.offset} does not lead to decision {decision.seq} of run {run}")
        event = RunEvent(decision, identity)
        for effect in effects:
            if isinstance(effect, StepCompleted) and isinstance(cause, ToolCallCompleted) and effect.step == cause.step:
                self.fits(run, cause)
            elif isinstance(effect, StepCompleted) and isinstance(cause, ChildRunCompleted) and effect.step == cause.step:
                self.fits_child(run, cause)
        self.sensible(state, event)
        self.states[run] = replace(evolve(state, event), head=real)
        self.accepted.setdefault(run, []).append(event)
        self.note(event)

    def fits(self, run: str, answer: ToolCallCompleted) -> None:
        """Check that the answer which a step takes was given to what the accepted history asked."""
        asked = self.last_asked(run, answer.step, ToolCallRequested).arguments
        if resolve(answer.output, self.payloads)["asked"] != resolve(asked, self.payloads):
            raise ViolationError("answers", f"step {answer.step} takes an answer to {answer.output}, but asked {asked}")

    def fits_child(self, run: str, answer: ChildRunCompleted) -> None:
        """Check that the output which a step takes is that of the child that the accepted history asked for."""
        asked = self.last_asked(run, answer.step, ChildRunRequested).input
        output = from_json(answer.output)
        if isinstance(output, dict) and "given" in output and output["given"] != from_json(asked):
            raise ViolationError("answers", f"step {answer.step} takes a child's {answer.output}, but asked for {asked}")

    def last_asked(self, run: str, step: str, kind: type[Any]) -> Any:
        """Return what a step of an accepted history asked last."""
        return next(
            effect
            for event in reversed(self.accepted[run])
            for effect in reversed(event.decision.effects)
            if isinstance(effect, kind) and effect.step == step
        )

    def sensible(self, before: RunState, event: RunEvent) -> None:
        """Check what no decision may say, whatever came in."""
        run, effects = event.decision.run_id, event.decision.effects
        ends = [index for index, effect in enumerate(effects) if isinstance(effect, ENDS)]
        if ends and ends != [len(effects) - 1]:
            raise ViolationError("after the end", f"run {run} goes on after its end: {effects}")
        closing = before.closing is not None
        for effect in effects:
            closing = closing or type(effect).__name__ == "RunClosing"
            starts = isinstance(effect, STARTS) or (isinstance(effect, TimerSet) and self.sleeps(before, effect))
            resumed = isinstance(event.decision.input, ResumeRun | ResumeStep)
            if starts and before.paused and not closing and not resumed:
                raise ViolationError("paused", f"run {run} is paused, and starts {effect}")
            if isinstance(effect, RunFailed) and effect.failure.kind == "internal":
                raise ViolationError("fault", f"run {run}: {effect.failure.message}")
        taken = Counter(
            (type(effect), effect.signal_id)
            for each in (*self.accepted.get(run, ()), event)
            for effect in each.decision.effects
            if isinstance(effect, SignalTaken | SignalKept)
        )
        if taken and max(taken.values()) > 1:
            raise ViolationError("signals", f"run {run} takes a signal twice: {taken}")

    @staticmethod
    def sleeps(before: RunState, effect: TimerSet) -> bool:
        """Say whether a timer starts a sleep; others are time limits, and loops that go on."""
        step = before.steps.get(effect.step)
        return bool(effect.step) and (step is None or step.status is StepStatus.HELD)

    def note(self, event: RunEvent) -> None:
        """Take note of what an accepted decision asks for."""
        run, said = event.decision.run_id, event.decision.said
        if said is not None:
            if said.offset <= self.heard.get((run, said.partition), -1) and event.decision.effects != (
                InputIgnored("duplicate"),
            ):
                raise ViolationError("said twice", f"run {run} does again what was said at {said.offset}")
            self.heard[run, said.partition] = max(said.offset, self.heard.get((run, said.partition), -1))
        here: dict[str, str] = {}
        for index, effect in enumerate(event.decision.effects):
            identity = effect_id(event.hash, index)
            match effect:
                case LlmCallRequested() | ToolCallRequested():
                    here[effect.step] = identity
                    self.calls[identity] = run
                case ChildRunRequested():
                    here[effect.step] = identity
                    self.children[identity] = run, effect
                case CallCancelled():
                    self.given_up[effect.call_id or here[effect.step]] = run
                case ChildRunCancelled():
                    self.cancelled[effect.run_id or run_id_of(here[effect.step])] = run
                case _:
                    pass

    # --- What follows from decisions lands ---

    def requested(self, record: Outgoing) -> None:
        """Check a record for the topic `requests`: a decision that counts asked for it."""
        request = decode(record.value)
        if isinstance(request, WorkflowRequest) and request.request_id not in self.children:
            raise ViolationError("of no decision", f"a run of {request.workflow} is asked for by no decision that counts")
        if isinstance(request, RunRequest) and request.run_id not in self.cancelled:
            raise ViolationError("of no decision", f"run {request.run_id} is cancelled by no decision that counts")

    def given_up_by(self, call_id: str) -> None:
        """Check the cancellation of a call."""
        if call_id not in self.given_up:
            raise ViolationError("of no decision", f"call {call_id} is cancelled by no decision that counts")

    def told(self, cause: Input) -> None:
        """Check what a run is told of its child: that is how the child ended, or it was refused."""
        if not isinstance(cause, ChildRunCompleted | ChildRunFailed):
            return
        if cause.call_id not in self.children:
            raise ViolationError("of no decision", f"{cause.step} hears of child {cause.run_id}, which nobody asked for")
        state = self.states.get(cause.run_id)
        if state is None:
            if isinstance(cause, ChildRunCompleted):
                raise ViolationError("told wrong", f"{cause.step} hears of child {cause.run_id}, which has no history")
            return
        output = cause.output if isinstance(cause, ChildRunCompleted) else None
        if not state.over or state.output != output or (state.failure is None) != isinstance(cause, ChildRunCompleted):
            raise ViolationError("told wrong", f"{cause.step} hears {cause}, but the child's history says {state.status}")

    # --- Marks and commits ---

    def agree(
        self, mark: int, reader: Chain, restored: dict[str, Head], offset: int, decision: Decision, verdict: Verdict
    ) -> None:
        """Check that a reader who started at a mark sees the same open runs, and no finished one again."""
        if verdict is Verdict.ACCEPTED and self.verdicts[offset] is not Verdict.ACCEPTED:
            raise ViolationError("marks revive", f"a reader at mark {mark} accepts offset {offset} of run {decision.run_id}")
        if reader.broken:
            raise ViolationError("marks broken", f"a reader at mark {mark} finds a break: {reader.broken}")
        if (
            self.verdicts[offset] is Verdict.ACCEPTED
            and verdict is not Verdict.ACCEPTED
            and not self.states[decision.run_id].over
            and decision.seq > restored.get(decision.run_id, NEW).seq
        ):
            raise ViolationError("marks miss", f"a reader at mark {mark} ignores offset {offset} of run {decision.run_id}")

    def marked(self, world: "World", commit: Commit) -> None:
        """Take note of a commit: now somebody may start at its mark, and nobody looks at the inputs before its position."""
        emitted = world.calls.keys() | world.asked_for
        for run, state in self.states.items():
            awaited = {step.awaits for step in state.steps.values() if step.status is StepStatus.RUNNING and not state.over}
            for event in self.accepted[run] if awaited - emitted else ():
                lost = awaited & {*calls_of(event)} - emitted
                if lost and event.decision.input_offset < commit.position:
                    raise ViolationError(
                        "never emitted", f"run {run} waits for {lost}, and position {commit.position} is committed"
                    )
        self.marks.append((commit, *self.read_from(world, commit)))

    def read_from(self, world: "World", commit: Commit) -> tuple[Chain, dict[str, Head]]:
        """Return a reader that started at a commit, knowing index and snapshots as they are now; and what it has of these."""
        mark, index = commit.mark, world.index(commit.index)
        restored = {
            run: Head(each.head, each.seq, each.first_offset, partial=True)
            for run, each in world.kept().items()
            if run not in index
        }
        reader = self.chain(index, restored=restored.get)
        for offset in range(mark, len(world.decisions)):
            decision, real = decided(world.decisions[offset])
            verdict = reader.judge(offset, decision, real)
            self.agree(mark, reader, restored, offset, decision, verdict)
        for run, state in self.states.items():
            head = reader.heads.get(run) or restored.get(run) or NEW
            if not state.over and head.hash != state.head:
                raise ViolationError("marks miss", f"a reader at mark {mark} does not know the open run {run}")
        return reader, restored

    # --- At rest ---

    def at_rest(self, world: "World", *, last: bool = False) -> None:
        """Check, once nothing is left to do: every request has one run, every decision had its consequences.

        Runs are over, but for those that somebody holds; after the `last` rest nobody does.
        """
        for record in world.inbox:
            cause = readable(record)
            run = world.key(record)
            if isinstance(cause, StartRun) and run not in self.states:
                raise ViolationError("lost input", f"request {cause.request_id} has no run")
        for run, state in self.states.items():
            self.awake(world, run, state, last=last)
            if state.over:
                self.undone(run, state)
        self.families(world)
        self.emitted(world)
        if last:
            for commit in {commit for commit, *_ in self.marks}:
                self.read_from(world, commit)

    def awake(self, world: "World", run: str, state: RunState, *, last: bool) -> None:
        """Check that an open run waits for people alone."""
        if state.over:
            return
        left = [record.offset for record in world.inputs_after(run, state)]
        if left or last:
            raise ViolationError("lost input" if left else "stuck", f"run {run} is open for ever; undecided inputs: {left}")
        if state.limit is not None and state.closing is None:
            raise ViolationError("stuck", f"run {run} is open past its time limit, {state.limit[1]}")
        waits = {path: step for path, step in state.steps.items() if not step.settled and step.status is not StepStatus.ENTERED}
        if not waits:
            raise ViolationError("stuck", f"run {run} is open for ever, and waits for nothing")
        for path, step in waits.items():
            if step.due or step.status in (StepStatus.WAITING, StepStatus.SLEEPING):
                raise ViolationError("stuck", f"step {path} of run {run} is {step.status} until {step.due}, which is over")
            if step.status is StepStatus.RUNNING and (step.asked is None or not self.open_child(step)):
                raise ViolationError("waits for ever", f"step {path} of run {run} waits for what never comes: {step.awaits}")

    def open_child(self, step: StepState) -> bool:
        """Say whether the child that a step waits for is under way."""
        state = self.states.get(run_id_of(step.awaits))
        return state is not None and not state.over

    def families(self, world: "World") -> None:
        """Check that no child outlives its parent's interest in it, and that every child was asked for, once."""
        refused = {letter.run_id for letter in world.dead_letters}
        for call, (parent, effect) in self.children.items():
            child = run_id_of(call)
            state = self.states.get(child)
            if effect.detached and state is None and child not in refused:
                raise ViolationError("never emitted", f"detached run {child} of {parent} never started")
            awaited = not self.states[parent].over and self.states[parent].steps.get(effect.step)
            if state is None or state.over or effect.detached or (awaited and awaited.awaits == call and not awaited.settled):
                continue
            raise ViolationError("orphan", f"child {child} ({effect.step} of {parent}) is open, and nobody waits for it")
        started = Counter(state.parent.call_id for state in self.states.values() if state.parent)
        if self.one_version and started.keys() - self.children.keys():
            raise ViolationError("of no decision", f"children that nobody asked for: {started.keys() - self.children.keys()}")
        if started and max(started.values()) > 1:
            raise ViolationError("twice", f"two children for one call: {started}")

    def undone(self, run: str, state: RunState) -> None:
        """Check that what was done is undone once if the run failed or was cancelled, and never if it completed."""
        effects: list[Effect] = [effect for event in self.accepted[run] for effect in event.decision.effects]
        planned = Counter(f"undo({effect.step})" for effect in effects if isinstance(effect, UndoPlanned))
        asked = Counter(
            effect.step
            for effect in effects
            if isinstance(effect, ToolCallRequested | ChildRunRequested)
            and effect.step.startswith("undo(")
            and effect.attempt == 1
        )
        last = self.accepted[run][-1].decision.input
        forced = getattr(last, "force", False)
        if isinstance(effects[-1], RunCompleted):
            planned.clear()
        if asked != planned and not (forced and asked <= planned):
            raise ViolationError("undo", f"run {run} ended {state.status}; to be undone: {planned}, undone: {asked}")

    def emitted(self, world: "World") -> None:
        """Check that every accepted decision had its consequences."""
        # Calls that are given up before they are emitted need not be, effects that outlive their run must.
        if self.all_again and self.calls.keys() - world.calls.keys():
            raise ViolationError("never emitted", f"calls {self.calls.keys() - world.calls.keys()}")
        if self.one_version and world.calls.keys() - self.calls.keys():
            raise ViolationError("stray call", f"emitted, but in no accepted decision: {world.calls.keys() - self.calls.keys()}")
        if self.given_up.keys() - world.cancelled:
            raise ViolationError("never emitted", f"cancellations of calls {self.given_up.keys() - world.cancelled}")
        letters = {letter.offset for letter in world.dead_letters if letter.topic == "inbox"}
        for event in (event for events in self.accepted.values() for event in events):
            if isinstance(event.decision.input, UnreadableInput) and event.decision.input_offset not in letters:
                raise ViolationError("never emitted", f"no dead letter for input {event.decision.input_offset}")


def calls_of(event: RunEvent) -> Iterator[str]:
    """Yield the ids of a decision's calls and child runs."""
    for index, effect in enumerate(event.decision.effects):
        if isinstance(effect, LlmCallRequested | ToolCallRequested | ChildRunRequested):
            yield effect_id(event.hash, index)


@lru_cache(maxsize=1000)
def decided(value: bytes) -> tuple[Decision, bytes]:
    """Return the decision in a record, and its hash."""
    return codec.decode(value, Decision), chain_hash(codec.unframed(value))


def readable(record: Incoming) -> Input | None:
    """Return an inbox record's input, None if nobody can read it."""
    message = _message(record.value)
    return message.input if message else None


def said_at(record: Incoming) -> RequestPlace | None:
    """Return where an inbox record's command was said."""
    message = _message(record.value)
    return message.said if message else None


@lru_cache(maxsize=1000)
def _message(value: bytes | None) -> InboxMessage | None:
    try:
        return codec.decode(value, InboxMessage)
    except NotDecodableError:
        return None
