"""One Kafka partition in memory, and owners that drive a `Tenure` over it as the orchestrator does.

`World` is what brokers hold: inbox, decisions, finished index, queues, the committed position and mark; and those around it who
answer: workers, intake, people. `Owner` is one process: what it has produced is in flight until it is delivered, records with the
same key in their order, everything else in any. Nothing here happens by itself: `moves` lists what may happen next, and a
schedule picks (schedules.py). `Watch` sees every record land and says what must never happen.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from watch import PLACE, ViolationError, Watch, readable

from events import codec, topics
from events.calls import CancelCall, LlmCall, ToolCall
from events.commands import Command, RequestPlace, StartRun
from events.decisions import DeadLetter
from events.failure import Failure, FailureKind
from events.ids import run_id as run_id_of
from events.results import (
    InboxMessage,
    Input,
    LlmCallCompleted,
    LlmCallFailed,
    ToolCallCompleted,
    ToolCallFailed,
    Usage,
)
from events.snapshots import RunSnapshot
from streams.envelope import Incoming, Outgoing
from streams.processors.finished import FinishedIndex
from streams.processors.intake import Intake
from streams.processors.requests import decode
from streams.processors.tenure import Commit, Tenure
from streams.workflow.expressions import from_json, to_json
from streams.workflow.state import RunState

KINDS = ("again", "end", "second", "loose", "garbage", "reset", "early", "back", "cancel", "hold", "talk", "change")
"""Kinds of faults: what is delivered again, ends of tenures, second owners, what lands late, garbage, resets of the position,
timers that fire early, intake going back. And of what people say: that something ends, waits, goes on, or is something else."""
MOST_APPENDS = 3
"""How often a message is delivered to the inbox at most."""
MOST_SAID = 2
"""How often somebody says the same thing to the same run."""


@dataclass(frozen=True)
class Said:
    """What people may say to the runs of a workflow, whether they exist or not. `kind`: one of KINDS."""

    workflow: str
    kind: str
    command: Command


@dataclass
class World:
    """What the brokers hold of one partition, and what is still on its way to them without an owner."""

    watch: Watch
    intake: Intake
    requests: tuple[StartRun, ...]
    says: tuple[Said, ...] = ()
    inbox: list[Incoming] = field(default_factory=list)
    decisions: list[bytes] = field(default_factory=list)
    finished: list[Outgoing] = field(default_factory=list)
    snapshots: list[Outgoing] = field(default_factory=list)
    wanted: list[Incoming] = field(default_factory=list)
    calls: dict[str, LlmCall | ToolCall] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    committed: Commit = field(default_factory=lambda: Commit(0, 0))
    clock: int = 1_700_000_000_000
    answers: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    asked_for: set[str] = field(default_factory=set)
    said: dict[tuple[str, int], int] = field(default_factory=dict)
    words: list[tuple[str, bytes]] = field(default_factory=list)
    repeated: int = 0
    loose: list[deque[tuple[int, Outgoing]]] = field(default_factory=list)
    judged: int = 0
    garbage: int = 0
    resets: int = 0
    early: int = 0
    back: int = 0

    @staticmethod
    def key(record: Incoming) -> str:
        """Return the run that an inbox record is for."""
        return (record.key or b"").decode()

    def index(self, start: int) -> FinishedIndex:
        """Return the finished-run index as one who reads from an offset on finds it now, where compaction has been at work."""
        last = {record.key: offset for offset, record in enumerate(self.finished)}
        found = FinishedIndex(PLACE)
        for offset, record in enumerate(self.finished):
            if offset >= start and last[record.key] == offset:
                found.read(offset, record.key, record.value)
        return found

    def kept(self) -> dict[str, RunSnapshot]:
        """Return the newest snapshot of each run that has one."""
        found: dict[str, RunSnapshot] = {}
        for value in {record.key: record.value for record in self.snapshots}.values():
            if value is not None:
                snapshot = codec.decode(value, RunSnapshot)
                if snapshot.run_id not in found or found[snapshot.run_id].seq < snapshot.seq:
                    found[snapshot.run_id] = snapshot
        return found

    def inputs_after(self, run: str, state: RunState) -> list[Incoming]:
        """Return what an owner has still to decide for a run: from its first StartRun on, everything, until it is over."""
        if state.over:
            return []
        records = [record for record in self.inbox[state.last_offset + 1 :] if self.key(record) == run]
        if state.seq == 0:
            starts = [i for i, record in enumerate(records) if isinstance(readable(record), StartRun)]
            return records[starts[0] :] if starts else []
        return records

    def append(self, key: bytes, value: bytes) -> None:
        """Append to the inbox with the broker's time."""
        self.clock += 1
        self.inbox.append(Incoming("inbox", 0, len(self.inbox), self.clock, key, value))

    def send(self, run: str, said: Input) -> None:
        """Append an input for a run to the inbox."""
        self.append(run.encode(), codec.encode(InboxMessage(run, said)))

    def land(self, version: int, record: Outgoing) -> int:
        """Append a record where it belongs; return the offset of a decision, else -1."""
        match record.topic:
            case topics.DECISIONS:
                self.decisions.append(record.value)
                self.watch.landed(version, self, len(self.decisions) - 1)
                return len(self.decisions) - 1
            case topics.INBOX:
                self.watch.told(codec.decode(record.value, InboxMessage).input)
                self.append(record.key, record.value)
            case topics.LLM_CALLS:
                call = codec.decode(record.value, LlmCall)
                self.calls[call.call_id] = call
            case topics.TOOL_CALLS:
                work = codec.decode(record.value, ToolCall)
                self.calls[work.call_id] = work
            case topics.CANCELLATIONS:
                cancel = codec.decode(record.value, CancelCall)
                self.watch.given_up_by(cancel.call_id)
                self.cancelled.add(cancel.call_id)
            case topics.REQUESTS:
                self.watch.requested(record)
                self.asked_for.add(decode(record.value).request_id or "")
                self.wanted.append(Incoming("requests", 0, len(self.wanted), self.clock, record.key, record.value))
            case topics.SNAPSHOTS:
                self.snapshots.append(record)
            case topics.DEADLETTER:
                self.dead_letters.append(codec.decode(record.value, DeadLetter))
            case topics.FINISHED:
                self.finished.append(record)
            case _:
                raise ViolationError("topics", f"nobody writes {record.topic.name} here")
        return -1

    def commit(self, commit: Commit) -> None:
        """Take a position and a mark from anybody, at any time."""
        self.committed = commit
        self.watch.marked(self, commit)

    # --- Those around it ---

    def ask(self, request: StartRun) -> None:
        """Deliver a request to the inbox once more."""
        self.asked[request.request_id] = self.asked.get(request.request_id, 0) + 1
        self.send(run_id_of(request.request_id), request)

    def judge(self) -> None:
        """Let intake take the next request of a run for another one."""
        record = self.wanted[self.judged]
        self.judged += 1
        for outgoing in self.intake.check(record):
            self.land(-1, outgoing)

    def go_back(self) -> None:
        """Let intake begin anew at what it has committed."""
        self.back += 1
        self.judged //= 2

    def answer(self, call: LlmCall | ToolCall) -> None:
        """Let a worker make a call (perhaps not for the first time: then it may say something else) and send the result."""
        times = self.answers[call.call_id] = self.answers.get(call.call_id, 0) + 1
        step = call.request.step
        result: Input
        if isinstance(call, LlmCall) and call.request.attempt == 1 and call.call_id[0] in "0123":
            failure = Failure(FailureKind.UNAVAILABLE, f"try {times}")
            result = LlmCallFailed(call.call_id, step, failure, "m", None, None, times)
        elif isinstance(call, LlmCall):
            text = to_json(f"answer {times}")
            result = LlmCallCompleted(call.call_id, step, text, "m", "p", "stop", Usage(1, 1), None, times)
        elif call.request.tool == "flaky" and call.request.attempt == 1:
            failure = Failure(FailureKind.UNAVAILABLE, f"try {times}")
            result = ToolCallFailed(call.call_id, step, failure, "1", times)
        else:
            output = to_json({"asked": from_json(call.request.arguments), "times": times})
            if call.request.tool == "large":
                output = self.watch.payloads.put(output)
            result = ToolCallCompleted(call.call_id, step, output, "1", times)
        self.send(call.run_id, result)

    def give_up(self, call: LlmCall | ToolCall) -> None:
        """Let a worker give up a call that is cancelled."""
        times = self.answers[call.call_id] = self.answers.get(call.call_id, 0) + 1
        step, failure = call.request.step, Failure(FailureKind.CANCELLED, "cancelled")
        if isinstance(call, LlmCall):
            self.send(call.run_id, LlmCallFailed(call.call_id, step, failure, "m", None, None, times))
        else:
            self.send(call.run_id, ToolCallFailed(call.call_id, step, failure, None, times))

    def say(self, run: str, number: int) -> None:
        """Let somebody say something to a run."""
        self.said[run, number] = self.said.get((run, number), 0) + 1
        message = InboxMessage(run, self.says[number].command, RequestPlace(b"r" * 16, 1, len(self.words)))
        self.words.append((run, codec.encode(message)))
        self.append(run.encode(), self.words[-1][1])

    def repeat(self, number: int) -> None:
        """Let an intake that woke up late say again what was said before, whatever was said since."""
        self.repeated += 1
        run, value = self.words[number]
        self.append(run.encode(), value)

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
    idle_ms: int = 1 << 60
    pack_at: int = 1 << 60
    phase: str = "idle"
    tenure: Tenure = field(init=False)
    decisions: deque[Outgoing] = field(default_factory=deque)
    others: list[Outgoing] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    # --- Taking over ---

    def fetch(self) -> None:
        """Fetch the committed position and mark, first of all."""
        watch = self.world.watch
        specs = watch.specs[self.version]
        committed, often = self.world.committed, {"idle_ms": self.idle_ms, "pack_at": self.pack_at}
        self.tenure = self.tenure_type(PLACE, specs, committed, watch.payloads, **often)
        self.decisions, self.others, self.offsets = deque(), [], []
        self.phase = "fetched"

    def read_snapshots(self) -> None:
        """Read the snapshots."""
        for record in self.world.snapshots:
            self.tenure.snapshot_read(record.key, record.value, dict(record.headers))
        self.phase = "shelved"

    def read_index(self) -> None:
        """Read the finished-run index."""
        self.index_on()
        self.phase = "indexed"

    def index_on(self) -> None:
        """Read the index from where it was read to its end; what compaction would have deleted is gone."""
        last = {record.key: offset for offset, record in enumerate(self.world.finished)}
        for offset in range(self.tenure.finished.end, len(self.world.finished)):
            record = self.world.finished[offset]
            if last[record.key] == offset:
                self.tenure.index_read(offset, record.key, record.value)

    def read_log(self) -> None:
        """Read the decisions from the mark to the end."""
        for offset in range(self.tenure.base.mark, len(self.world.decisions)):
            self.tenure.read(offset, self.world.decisions[offset])
        self.tenure.begin(len(self.world.decisions))
        if self.tenure.awaits_answers():
            for record in self.world.inbox[self.tenure.position :]:
                self.tenure.look_ahead(record)
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

    def fire(self, now: int | None = None) -> None:
        """Produce the inputs of timers that are due, by a clock that may be ahead of the broker's."""
        self.world.early += now is not None
        self.others.extend(self.tenure.due(now or self.world.clock))

    def next(self, most: int) -> list[Outgoing]:
        """Return what may be acknowledged next: of the records with the same key the oldest."""
        oldest = {(record.topic.name, record.key): record for record in reversed(self.others)}
        return list(oldest.values())[-most:]

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
        self.others.extend(self.tenure.follows())
        self.phase = "saying"
        if not self.others:
            self.index()

    def index(self) -> None:
        """Say which runs are over, once what follows from their ends is acknowledged."""
        self.others.extend((*self.tenure.index_entries(), *self.packed(), *self.tenure.keep_idle(self.world.clock)))
        self.phase = "indexing"

    def packed(self) -> list[Outgoing]:
        """Return the packed index, if that is due."""
        if not self.tenure.pack_due:
            return []
        self.index_on()
        return self.tenure.pack()

    def commit(self) -> None:
        """Commit, once the index is acknowledged."""
        self.world.commit(self.tenure.commit())
        self.phase = "running"

    def crash(self) -> None:
        """End the tenure: what is in flight may land later, partly or never; decisions in their order."""
        queues = [deque((self.version, record) for record in self.decisions)]
        others: dict[tuple[str, bytes], deque[tuple[int, Outgoing]]] = {}
        for record in self.others:
            others.setdefault((record.topic.name, record.key), deque()).append((self.version, record))
        self.world.loose += [queue for queue in (*queues, *others.values()) if queue]
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
                yield Move(6, f"{self.name} reads the snapshots", self.read_snapshots)
            case "shelved":
                yield Move(6, f"{self.name} reads the index", self.read_index)
            case "indexed":
                yield Move(6, f"{self.name} reads the log to {len(self.world.decisions)}", self.read_log)
            case "running":
                yield from self.running()
            case "saying":
                if not self.others:
                    yield Move(8, f"{self.name} indexes what is over", self.index)
            case _:
                if not self.others:
                    yield Move(8, f"{self.name} commits {self.tenure.position}", self.commit)
        if self.decisions:
            yield Move(8, f"{self.name}'s decision lands at {len(self.world.decisions)}", self.deliver_decision)
        for record in self.next(3):
            what = "deletion" if record.value is None else "record"
            yield Move(5, f"{self.name}'s {what} for {record.topic.name} lands", partial(self.deliver_other, record))
        yield Move(1, f"{self.name} crashes", self.crash, True, "end")
        if self.decisions or self.others:
            yield Move(1, f"{self.name} vanishes", self.vanish, True, "end")

    def running(self) -> Iterator["Move"]:
        """Yield what an owner may do that has taken over."""
        if self.tenure.position < len(self.world.inbox):
            yield Move(12, f"{self.name} takes input {self.tenure.position}", self.take)
        if (due := self.tenure.next_timer()) is not None and due <= self.world.clock:
            yield Move(6, f"{self.name} fires its timers", self.fire)
        elif due is not None and self.world.early < 2:
            yield Move(1, f"{self.name} fires a timer early", partial(self.fire, due), True, "early")
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
    found += [*around(world), *people(world)]
    timers = [due for owner in owners if owner.phase == "running" and (due := owner.tenure.next_timer()) is not None]
    if timers and min(timers) > world.clock:
        found.append(Move(1, "time passes", partial(setattr, world, "clock", min(timers) + 1)))
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


def around(world: World) -> Iterator[Move]:
    """Yield what workers and intake may do next."""
    for call in world.calls.values():
        times = world.answers.get(call.call_id, 0)
        if times < MOST_APPENDS:
            label, kind = f"{call.request.step} of {call.run_id[:4]}", "again" if times else ""
            if call.call_id in world.cancelled:
                yield Move(1 if times else 4, f"{label} is given up", partial(world.give_up, call), times > 0, kind)
            yield Move(1 if times else 8, f"{label} is answered", partial(world.answer, call), times > 0, kind)
    if world.judged < len(world.wanted):
        yield Move(8, f"intake takes request {world.judged}", world.judge)
    if world.words and world.repeated < MOST_SAID:
        yield Move(1, "the first words are said again", partial(world.repeat, 0), True, "back")
        yield Move(1, "the last words are said again", partial(world.repeat, len(world.words) - 1), True, "back")
    if world.judged and world.back < MOST_SAID:
        yield Move(1, "intake goes back", world.go_back, True, "back")


def people(world: World) -> Iterator[Move]:
    """Yield what people may ask for and say next."""
    for request in world.requests:
        times = world.asked.get(request.request_id, 0)
        if times < MOST_APPENDS:
            label, kind = f"{request.request_id} is asked", "again" if times else ""
            yield Move(1 if times else 8, label, partial(world.ask, request), times > 0, kind)
    for number, said in enumerate(world.says):
        for run in runs_of(world, said.workflow):
            if world.said.get((run, number), 0) < (MOST_SAID if run in world.watch.states else 1):
                label = f"{type(said.command).__name__} {number} for {run[:4]}"
                yield Move(1, label, partial(world.say, run, number), True, said.kind)


def runs_of(world: World, workflow: str) -> list[str]:
    """Return the runs of a workflow: those that are asked for from outside, whether they exist or not, and children."""
    roots = [run_id_of(request.request_id) for request in world.requests if request.workflow == workflow]
    children = (run for run, state in world.watch.states.items() if state.workflow == workflow)
    return list(dict.fromkeys((*roots, *children)))
