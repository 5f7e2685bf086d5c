"""One Kafka partition in memory, and owners that drive a `Tenure` over it as the orchestrator does.

`World` is what brokers hold: inbox, decisions, finished index, queues, the committed position and mark. `Owner` is one process:
what it has produced is in flight until it is delivered (decisions in their order, everything else in any). Nothing here happens
by itself: `moves` lists what may happen next, and a schedule picks. `Watch` sees every record land and says what must never
happen.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from events import codec, topics
from events.calls import LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import StartRun
from events.decisions import DeadLetter, Decision, FinishedRun, StepCompleted, UnreadableInput
from events.errors import NotDecodableError
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id
from events.ids import run_id as run_id_of
from events.results import InboxMessage, Input, LlmCallCompleted, ToolCallCompleted, ToolCallFailed, Usage
from streams.envelope import Incoming, Outgoing
from streams.processors.tenure import Commit, Place, Specs, Tenure
from streams.workflow.chain import Chain, Verdict
from streams.workflow.decider import decide
from streams.workflow.expressions import from_json, to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState, StepStatus, evolve

PLACE = Place(b"i" * 16, b"d" * 16, 0, 1)
KINDS = ("again", "end", "second", "loose", "garbage", "reset")
"""Kinds of faults: what is delivered again, ends of tenures, second owners, what lands late, garbage, resets of the position."""
MOST_APPENDS = 3
"""How often a message is delivered to the inbox at most."""


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
    reader: Chain = field(init=False)
    accepted: dict[str, list[RunEvent]] = field(default_factory=dict)
    states: dict[str, RunState] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    said: dict[object, bytes] = field(default_factory=dict)
    marks: list[tuple[int, Chain]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = self.chain()

    def produced(self, version: int, record: Outgoing) -> None:
        """Check that two owners who decide the same write the same bytes."""
        decision = codec.decode(record.value, Decision)
        key = (decision.run_id, decision.input_offset) if self.one_version else (version, decision.input_offset, decision.prev)
        whole = repr((record.key, record.value, record.headers, record.partition)).encode()
        if self.said.setdefault(key, whole) != whole:
            raise ViolationError("determinism", f"two owners say different bytes about input {decision.input_offset}")

    def landed(self, version: int, world: "World", offset: int) -> None:
        """Let all readers judge a decision record that is in the log now."""
        value = world.decisions[offset]
        decision = codec.decode(value, Decision)
        real = chain_hash(codec.unframed(value))
        verdict = self.reader.judge(offset, decision, real)
        self.verdicts.append(verdict)
        if verdict is Verdict.ACCEPTED:
            self.legal(version, world, decision, self.identity(decision, real), real)
        elif verdict in (Verdict.BROKEN, Verdict.SET_ASIDE):
            raise ViolationError("integrity", f"honest writers broke the chain: {self.reader.broken}")
        for mark, reader in self.marks:
            self.agree(mark, reader, offset, decision, reader.judge(offset, decision, real))

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
        effects = decide(self.specs[version](digest), state, cause or decision.input, record.timestamp)
        expected = Decision(
            run, state.seq + 1, state.head, PLACE.inbox_id, record.offset, record.timestamp, cause or decision.input, effects
        )
        if codec.body(expected) != codec.unframed(world.decisions[len(self.verdicts) - 1]):
            raise ViolationError("legality", f"input {record.offset} does not lead to decision {decision.seq} of run {run}")
        for effect in effects:
            if isinstance(effect, StepCompleted) and isinstance(cause, ToolCallCompleted) and effect.step == cause.step:
                self.fits(run, cause)
        self.states[run] = replace(evolve(state, RunEvent(decision, identity)), head=real)
        self.accepted.setdefault(run, []).append(RunEvent(decision, identity))

    def fits(self, run: str, answer: ToolCallCompleted) -> None:
        """Check that the answer which a step takes was given to what the accepted history asked."""
        asked = [
            effect.arguments
            for event in self.accepted[run]
            for effect in event.decision.effects
            if isinstance(effect, ToolCallRequested) and effect.step == answer.step
        ]
        if from_json(answer.output)["asked"] != from_json(asked[-1]):
            raise ViolationError("answers", f"step {answer.step} takes an answer to {answer.output}, but asked {asked[-1]}")

    def agree(self, mark: int, reader: Chain, offset: int, decision: Decision, verdict: Verdict) -> None:
        """Check that a reader who started at a mark sees the same open runs, and no finished one again."""
        if verdict is Verdict.ACCEPTED and self.verdicts[offset] is not Verdict.ACCEPTED:
            raise ViolationError("marks revive", f"a reader at mark {mark} accepts offset {offset} of run {decision.run_id}")
        if reader.broken:
            raise ViolationError("marks broken", f"a reader at mark {mark} finds a break: {reader.broken}")
        if (
            self.verdicts[offset] is Verdict.ACCEPTED
            and verdict is not Verdict.ACCEPTED
            and not self.states[decision.run_id].over
        ):
            raise ViolationError("marks miss", f"a reader at mark {mark} ignores offset {offset} of run {decision.run_id}")

    def marked(self, world: "World", commit: Commit) -> None:
        """Take note of a commit: now somebody may start at its mark, and nobody looks at the inputs before its position."""
        emitted = {call.call_id for call in world.calls}
        for run, state in self.states.items():
            awaited = {step.awaits for step in state.steps.values() if step.status is StepStatus.RUNNING and not state.over}
            for event in self.accepted[run] if awaited - emitted else ():
                lost = awaited & {*calls_of(event)} - emitted
                if lost and event.decision.input_offset < commit.position:
                    raise ViolationError(
                        "never emitted", f"run {run} waits for {lost}, and position {commit.position} is committed"
                    )
        self.marks.append((commit.mark, self.read_from(world, commit.mark)))

    def read_from(self, world: "World", mark: int) -> Chain:
        """Return a reader that started at a mark, knowing the index as it is now."""
        reader = self.chain(world.index())
        for offset in range(mark, len(world.decisions)):
            decision = codec.decode(world.decisions[offset], Decision)
            verdict = reader.judge(offset, decision, chain_hash(codec.unframed(world.decisions[offset])))
            self.agree(mark, reader, offset, decision, verdict)
        for run, state in self.states.items():
            if not state.over and (run not in reader.heads or reader.heads[run].hash != state.head):
                raise ViolationError("marks miss", f"a reader at mark {mark} does not know the open run {run}")
        return reader

    def at_rest(self, world: "World") -> None:
        """Check, once nothing is left to do: every request has one finished run, every decision had its consequences."""
        for mark in {mark for mark, _ in self.marks}:
            self.read_from(world, mark)
        for record in world.inbox:
            cause = readable(record)
            run = world.key(record)
            if isinstance(cause, StartRun) and run not in self.states:
                raise ViolationError("lost input", f"request {cause.request_id} has no run")
        for run, state in self.states.items():
            if not state.over:
                left = [record.offset for record in world.inputs_after(run, state)]
                raise ViolationError("lost input" if left else "stuck", f"run {run} is open for ever; undecided inputs: {left}")
        known = {call for events in self.accepted.values() for event in events for call in calls_of(event)}
        emitted = {call.call_id for call in world.calls}
        # Calls that are given up before they are emitted need not be, effects that outlive their run must.
        if self.all_again and known - emitted:
            raise ViolationError("never emitted", f"calls {sorted(known - emitted)}")
        if self.one_version and emitted - known:
            raise ViolationError("stray call", f"emitted, but in no accepted decision: {sorted(emitted - known)}")
        letters = {letter.offset for letter in world.dead_letters}
        for event in (event for events in self.accepted.values() for event in events):
            if isinstance(event.decision.input, UnreadableInput) and event.decision.input_offset not in letters:
                raise ViolationError("never emitted", f"no dead letter for input {event.decision.input_offset}")


def calls_of(event: RunEvent) -> Iterator[str]:
    """Yield the ids of a decision's calls."""
    for index, effect in enumerate(event.decision.effects):
        if isinstance(effect, LlmCallRequested | ToolCallRequested):
            yield effect_id(event.hash, index)


def readable(record: Incoming) -> Input | None:
    """Return an inbox record's input, None if nobody can read it."""
    try:
        return codec.decode(record.value, InboxMessage).input
    except NotDecodableError:
        return None


@dataclass
class World:
    """What the brokers hold of one partition, and what is still on its way to them without an owner."""

    watch: Watch
    requests: tuple[StartRun, ...]
    inbox: list[Incoming] = field(default_factory=list)
    decisions: list[bytes] = field(default_factory=list)
    finished: list[tuple[str, FinishedRun]] = field(default_factory=list)
    calls: list[LlmCall | ToolCall] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    committed: Commit = field(default_factory=lambda: Commit(0, 0))
    clock: int = 1_700_000_000_000
    answers: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    loose: list[deque[tuple[int, Outgoing]]] = field(default_factory=list)
    garbage: int = 0
    resets: int = 0

    @staticmethod
    def key(record: Incoming) -> str:
        """Return the run that an inbox record is for."""
        return (record.key or b"").decode()

    def index(self) -> dict[str, int]:
        """Return the finished-run index as it is now."""
        return {run: entry.first_offset for run, entry in self.finished}

    def inputs_after(self, run: str, state: RunState) -> list[Incoming]:
        """Return what an owner has still to decide for a run: from its first StartRun on, everything, until it is over."""
        records = [record for record in self.inbox[state.last_offset + 1 :] if self.key(record) == run]
        if state.seq == 0:
            starts = [i for i, record in enumerate(records) if isinstance(readable(record), StartRun)]
            return records[starts[0] :] if starts else []
        return [] if state.over else records

    def append(self, key: bytes, value: bytes) -> None:
        """Append to the inbox with the broker's time."""
        self.clock += 1
        self.inbox.append(Incoming("inbox", 0, len(self.inbox), self.clock, key, value))

    def land(self, version: int, record: Outgoing) -> int:
        """Append a record where it belongs; return the offset of a decision, else -1."""
        match record.topic:
            case topics.DECISIONS:
                self.decisions.append(record.value)
                self.watch.landed(version, self, len(self.decisions) - 1)
                return len(self.decisions) - 1
            case topics.INBOX:
                self.append(record.key, record.value)
            case topics.LLM_CALLS:
                self.calls.append(codec.decode(record.value, LlmCall))
            case topics.TOOL_CALLS:
                self.calls.append(codec.decode(record.value, ToolCall))
            case topics.DEADLETTER:
                self.dead_letters.append(codec.decode(record.value, DeadLetter))
            case topics.FINISHED:
                self.finished.append((record.key.decode(), codec.decode(record.value, FinishedRun)))
            case _:
                raise ViolationError("topics", f"nobody writes {record.topic.name} here")
        return -1

    def commit(self, commit: Commit) -> None:
        """Take a position and a mark from anybody, at any time."""
        self.committed = commit
        self.watch.marked(self, commit)

    def ask(self, request: StartRun) -> None:
        """Deliver a request to the inbox once more."""
        self.asked[request.request_id] = self.asked.get(request.request_id, 0) + 1
        run = run_id_of(request.request_id)
        self.append(run.encode(), codec.encode(InboxMessage(run, request)))

    def answer(self, call: LlmCall | ToolCall) -> None:
        """Let a worker make a call (perhaps not for the first time: then it may say something else) and send the result."""
        times = self.answers[call.call_id] = self.answers.get(call.call_id, 0) + 1
        step = call.request.step
        result: Input
        if isinstance(call, LlmCall):
            text = to_json(f"answer {times}")
            result = LlmCallCompleted(call.call_id, step, text, "m", "p", "stop", Usage(1, 1), None, times)
        elif call.request.tool == "flaky" and call.request.attempt == 1:
            failure = Failure(FailureKind.UNAVAILABLE, f"try {times}")
            result = ToolCallFailed(call.call_id, step, failure, "1", times)
        else:
            output = to_json({"asked": from_json(call.request.arguments), "times": times})
            result = ToolCallCompleted(call.call_id, step, output, "1", times)
        self.append(call.run_id.encode(), codec.encode(InboxMessage(call.run_id, result)))

    def spoil(self, run: str) -> None:
        """Append what nobody can read."""
        self.garbage += 1
        self.append(run.encode(), b"no avro")

    def reset(self, position: int) -> None:
        """Set the position back as Kafka's tools do: without a mark."""
        self.resets += 1
        self.committed = Commit(position, 0)

    def land_loose(self, queue: deque[tuple[int, Outgoing]]) -> None:
        """Land the next record that a former tenure had in flight."""
        self.land(*queue.popleft())
        self.tidy()

    def drop_loose(self, queue: deque[tuple[int, Outgoing]]) -> None:
        """Lose the rest of what a former tenure had in flight."""
        queue.clear()
        self.tidy()

    def tidy(self) -> None:
        """Forget queues that are empty."""
        self.loose = [queue for queue in self.loose if queue]


@dataclass
class Owner:
    """One process that believes it owns the partition. `version` names what its code decides."""

    name: str
    world: World
    version: int
    tenure_type: type[Tenure] = Tenure
    phase: str = "idle"
    tenure: Tenure = field(init=False)
    decisions: deque[Outgoing] = field(default_factory=deque)
    others: list[Outgoing] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    # --- Taking over ---

    def fetch(self) -> None:
        """Fetch the committed position and mark, first of all."""
        self.tenure = self.tenure_type(PLACE, self.world.watch.specs[self.version], self.world.committed)
        self.decisions, self.others, self.offsets = deque(), [], []
        self.phase = "fetched"

    def read_index(self) -> None:
        """Read the finished-run index."""
        for run, entry in self.world.finished:
            self.tenure.index_read(run, entry)
        self.phase = "indexed"

    def read_log(self) -> None:
        """Read the decisions from the mark to the end."""
        for offset in range(self.tenure.base.mark, len(self.world.decisions)):
            self.tenure.read(offset, self.world.decisions[offset])
        self.tenure.begin(len(self.world.decisions))
        if self.tenure.broken:
            raise ViolationError("integrity", f"{self.name} finds a break: {self.tenure.broken}")
        self.phase = "running"

    # --- Inputs and timers ---

    def take(self) -> None:
        """Take the next input and produce what follows."""
        for record in self.tenure.take(self.world.inbox[self.tenure.position]):
            if record.topic is topics.DECISIONS:
                self.world.watch.produced(self.version, record)
                self.decisions.append(record)
            else:
                self.others.append(record)

    def fire(self) -> None:
        """Produce the inputs of timers that are due."""
        self.others.extend(self.tenure.due(self.world.clock))

    def deliver_decision(self) -> None:
        """Get the oldest decision in flight acknowledged."""
        self.offsets.append(self.world.land(self.version, self.decisions.popleft()))

    def deliver_other(self, record: Outgoing) -> None:
        """Get anything else in flight acknowledged."""
        self.others.remove(record)
        self.world.land(self.version, record)

    # --- Settling ---

    def may_settle(self) -> bool:
        """Say whether all is acknowledged and there is something to commit."""
        tenure = self.tenure
        return not self.decisions and not self.others and tenure.position > tenure.base.position

    def check(self) -> bool:
        """Compare the own offsets with what was read; False: the tenure is over."""
        tenure, offsets = self.tenure, self.offsets
        self.offsets = []
        if not tenure.gap(offsets):
            tenure.settle(offsets)
            return True
        last = offsets[-1] + 1
        return tenure.reconcile([(offset, self.world.decisions[offset]) for offset in range(tenure.end, last)], offsets)

    def settle(self) -> None:
        """Check the offsets; then index what finished, or take over again."""
        if not self.check():
            self.phase = "idle"
            self.fetch()
            return
        self.others.extend(self.tenure.index_entries())
        self.phase = "indexing"

    def commit(self) -> None:
        """Commit, once the index is acknowledged."""
        self.world.commit(self.tenure.commit())
        self.phase = "running"

    def crash(self) -> None:
        """End the tenure: what is in flight may land later, partly or never; decisions in their order."""
        queues = [deque((self.version, record) for record in self.decisions)]
        queues += [deque([(self.version, record)]) for record in self.others]
        self.world.loose += [queue for queue in queues if queue]
        self.decisions, self.others = deque(), []
        self.phase = "idle"

    def vanish(self) -> None:
        """End the tenure, and nothing of what is in flight ever lands."""
        self.decisions, self.others = deque(), []
        self.phase = "idle"

    def moves(self, *, alone: bool) -> Iterator["Move"]:
        """Yield what this process may do next."""
        match self.phase:
            case "idle":
                kind = "" if alone else "second"
                yield Move(10 if alone else 1, f"{self.name} fetches {self.world.committed}", self.fetch, kind=kind)
                return
            case "fetched":
                yield Move(6, f"{self.name} reads the index", self.read_index)
            case "indexed":
                yield Move(6, f"{self.name} reads the log to {len(self.world.decisions)}", self.read_log)
            case "running":
                yield from self.running()
            case _:
                if not self.others:
                    yield Move(8, f"{self.name} commits {self.tenure.position}", self.commit)
        if self.decisions:
            yield Move(8, f"{self.name}'s decision lands at {len(self.world.decisions)}", self.deliver_decision)
        for record in self.others[:3]:
            yield Move(5, f"{self.name}'s record for {record.topic.name} lands", partial(self.deliver_other, record))
        yield Move(1, f"{self.name} crashes", self.crash, True, "end")
        if self.decisions or self.others:
            yield Move(1, f"{self.name} vanishes", self.vanish, True, "end")

    def running(self) -> Iterator["Move"]:
        """Yield what an owner may do that has taken over."""
        if self.tenure.position < len(self.world.inbox):
            yield Move(12, f"{self.name} takes input {self.tenure.position}", self.take)
        if (due := self.tenure.next_timer()) is not None and due <= self.world.clock:
            yield Move(6, f"{self.name} fires its timers", self.fire)
        if self.may_settle():
            yield Move(8, f"{self.name} settles to {self.tenure.position}", self.settle)


@dataclass(frozen=True, slots=True)
class Move:
    """Something that may happen now. `weight`: how likely a random schedule picks it; `fault`: it may as well never happen.

    `kind`: what a schedule may leave out altogether or have more of (swarm testing: few kinds of faults go deeper).
    """

    weight: int
    label: str
    do: Callable[[], None]
    fault: bool = False
    kind: str = ""


def moves(world: World, owners: Sequence[Owner]) -> list[Move]:
    """Return everything that may happen next."""
    found = [move for owner in owners for move in owner.moves(alone=all(each.phase == "idle" for each in owners))]
    for request in world.requests:
        times = world.asked.get(request.request_id, 0)
        if times < MOST_APPENDS:
            found.append(
                Move(
                    1 if times else 8,
                    f"{request.request_id} is asked",
                    partial(world.ask, request),
                    fault=times > 0,
                    kind="again" if times else "",
                )
            )
    for call in world.calls:
        times = world.answers.get(call.call_id, 0)
        if times < MOST_APPENDS:
            label = f"{call.request.step} of {call.run_id[:4]} is answered"
            found.append(
                Move(1 if times else 8, label, partial(world.answer, call), fault=times > 0, kind="again" if times else "")
            )
    timers = [due for owner in owners if owner.phase == "running" and (due := owner.tenure.next_timer()) is not None]
    if timers and min(timers) > world.clock:
        found.append(Move(1, "time passes", partial(setattr, world, "clock", min(timers))))
    for queue in world.loose[:4]:
        found.append(
            Move(2, f"a loose record for {queue[0][1].topic.name} lands", partial(world.land_loose, queue), True, "loose")
        )
        found.append(Move(1, "loose records are lost", partial(world.drop_loose, queue), True, "loose"))
    if world.garbage < 1 and world.asked:
        run = run_id_of(next(iter(world.asked)))
        found.append(Move(1, "garbage arrives", partial(world.spoil, run), True, "garbage"))
    if world.resets < 1 and world.committed.position > 0:
        half = world.committed.position // 2
        found.append(Move(1, f"the position is reset to {half}", partial(world.reset, half), True, "reset"))
    return found


@dataclass(frozen=True)
class Setup:
    """What a schedule is run on: the workflows of each version, the requests, and how owners are made."""

    versions: tuple[tuple[WorkflowSpec, ...], ...]
    requests: tuple[StartRun, ...]
    owners: int = 2
    tenure_type: type[Tenure] = Tenure
    owner_type: type[Owner] = Owner
    chain: Callable[..., Chain] = Chain
    identity: Callable[[Decision, bytes], bytes] = lambda _, real: real
    all_again: bool = False


def opened(setup: Setup) -> tuple[World, list[Owner]]:
    """Return an empty partition and the processes that may own it."""
    digests = [spec.digest for spec in setup.versions[0]]
    by_version: dict[int, Specs] = {
        number: dict(zip(digests, specs, strict=True)).get for number, specs in enumerate(setup.versions)
    }
    world = World(Watch(by_version, len(setup.versions) == 1, setup.chain, setup.identity, setup.all_again), setup.requests)
    names = "ABC"[: setup.owners]
    return world, [setup.owner_type(name, world, i % len(setup.versions), setup.tenure_type) for i, name in enumerate(names)]


def some(requests: tuple[StartRun, ...], mood: int) -> tuple[StartRun, ...]:
    """Return the requests that a mood has; never none."""
    return tuple(request for bit, request in enumerate(requests) if not mood >> bit & 1) or requests[:1]


def play(setup: Setup, choices: Sequence[int], trace: list[str] | None = None) -> World:
    """Let the choices pick what happens, then let everything come to rest. Raises ViolationError.

    Each choice is a number below 1 << 16; the first says which requests and kinds of faults there are, every other one picks one
    of the possible moves by their weights.
    """
    labels: list[str] = [] if trace is None else trace
    mood, *picks = choices
    world, owners = opened(replace(setup, requests=some(setup.requests, mood)))
    often = {kind: (1, 0, 3, 6)[mood >> 2 * place + 4 & 3] for place, kind in enumerate(KINDS)}
    for choice in picks:
        possible = [replace(move, weight=move.weight * often.get(move.kind, 1)) for move in moves(world, owners)]
        at = choice * sum(move.weight for move in possible) >> 16
        for move in possible:
            at -= move.weight
            if at < 0:
                labels.append(move.label)
                move.do()
                break
    rest(world, owners, labels)
    return world


def follow(setup: Setup, labels: Sequence[str]) -> World:
    """Let happen what the labels say (each the beginning of a move's label), then let everything come to rest."""
    world, owners = opened(setup)
    for label in labels:
        possible = moves(world, owners)
        chosen = next((move for move in possible if move.label.startswith(label)), None)
        assert chosen is not None, f"`{label}` can't happen now; possible: {[move.label for move in possible]}"
        chosen.do()
    rest(world, owners, [])
    return world


def rest(world: World, owners: list[Owner], labels: list[str], most: int = 3000) -> None:
    """Without further faults everything comes to rest; and whoever takes over then has nothing to decide."""
    _drain(world, owners, labels, most)
    world.watch.at_rest(world)
    before = len(world.decisions)
    for owner in owners:
        owner.phase = "idle"
    _drain(world, owners[:1], labels, most)
    world.watch.at_rest(world)
    if Verdict.ACCEPTED in world.watch.verdicts[before:]:
        raise ViolationError("stuck", "a new owner still had something to decide after everything came to rest")


def _drain(world: World, owners: list[Owner], labels: list[str], most: int) -> None:
    """Let whoever lives go on, in turn, until nobody can."""
    for turn in range(most):
        alive = [owner for owner in owners if owner.phase != "idle"] or owners[:1]
        possible = [move for move in moves(world, alive) if not move.fault]
        late = [move for move in possible if move.label == "time passes"]
        if possible == late and (not late or _idle(world, alive)):
            return
        busy = [move for move in possible if move not in late] or late
        move = busy[turn % len(busy)]
        labels.append(f"then {move.label}")
        move.do()
    raise ViolationError("no end", f"after {most} steps nothing has come to rest")


def _idle(world: World, owners: list[Owner]) -> bool:
    """Say whether the timers that are left belong to attempts that were settled long ago."""
    return not any(owner.tenure._pending(timer) for owner in owners for timer in owner.tenure._timers) and all(
        state.over for state in world.watch.states.values()
    )
