"""Real histories for projections: logs that `decide` wrote, with losers, repetitions and broken chains."""

import random
from dataclasses import dataclass, field

from events import codec
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import Decision, RetryScheduled
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id, run_id
from events.results import Input, LlmCallCompleted, LlmCallFailed, TimerFired, ToolCallCompleted, ToolCallFailed, Usage
from events.topics import partition_for
from projections.ledger import Record
from streams.workflow.decider import decide
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState, evolve

PARTITIONS = 3
TOPIC_IDS = {"decisions": b"d" * 16, "deadletter": b"l" * 16, "specs": b"s" * 16}
INBOX_ID = b"i" * 16
RETRY = {"attempts": 2, "initial": "10ms"}
SPEC = WorkflowSpec.model_validate(
    {
        "name": "report",
        "steps": {
            "ask": {"llm": {"prompt": "Say {{ input.n }}"}, "retry": RETRY, "on_failure": "continue"},
            "look": {"tool": {"name": "echo", "arguments": {"text": "=input.n"}}, "retry": RETRY},
            "odd": {"needs": ["look"], "when": "input.n % 2 == 1", "tool": {"name": "echo", "arguments": {}}},
            "both": {"needs": ["ask", "odd"], "transform": {"n": "=input.n"}},
            "end": {"needs": ["both"], "tool": {"name": "echo", "arguments": {}}},
        },
        "output": "=steps.both.output",
    }
)


@dataclass
class Run:
    """One run in the making; `waiting`: calls and timers (kind, id, step) that may be answered; `past`: inputs taken."""

    id: str
    state: RunState = INITIAL
    waiting: list[tuple[str, str, str]] = field(default_factory=list)
    past: list[Input] = field(default_factory=list)


class Logs:
    """Partitions of `decisions` that a seeded random history writes. `accepted`: what a perfect reader accepts, in order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a reproducible history, no secret
        self.partitions: list[list[bytes | None]] = [[] for _ in range(PARTITIONS)]
        self.order: list[tuple[int, int]] = []
        self.accepted: list[RunEvent] = []
        self.states: dict[str, RunState] = {}
        self.broken: set[str] = set()
        self._at = 1_700_000_000_000
        self._inputs = 0

    def records(self) -> list[Record]:
        """Return all records in the order in which they were written."""
        return [Record(partition, offset, self.partitions[partition][offset]) for partition, offset in self.order]

    def append(self, run: str, value: bytes | None) -> None:
        """Write a record to its run's partition."""
        partition = partition_for(run.encode(), PARTITIONS)
        self.order.append((partition, len(self.partitions[partition])))
        self.partitions[partition].append(value)

    def write(self, runs: int, faults: float) -> None:
        """Write the histories of some runs, interleaved; `faults`: how likely each kind of fault is at each decision."""
        pending = [Run(run_id(f"request {number}")) for number in range(runs)]
        numbers = {run.id: number for number, run in enumerate(pending)}
        left = 40 * runs
        while pending and left:
            left -= 1
            run = self.random.choice(pending)
            self._step(run, numbers[run.id], faults)
            if run.state.over or run.id in self.broken:
                pending.remove(run)

    def _step(self, run: Run, number: int, faults: float) -> None:
        chance = self.random.random
        before = run.state
        cause = self._input(run, number, faults)
        if cause is None:
            return
        rival = self._decided(run.id, before, cause, late=7)
        mine = self._decided(run.id, before, cause)
        if chance() < faults / 10 and before.seq > 0:  # a record is missing: this one extends nothing that is there
            missing = evolve(before, RunEvent(mine, b"never written".ljust(32)))
            self.append(run.id, codec.encode(self._decided(run.id, missing, cause)))
            self.broken.add(run.id)
            return
        self.append(run.id, codec.encode(mine))
        event = RunEvent(mine, chain_hash(codec.body(mine)))
        run.state = self.states[run.id] = evolve(before, event)
        self.accepted.append(event)
        run.past.append(cause)
        for index, effect in enumerate(mine.effects):
            if isinstance(effect, LlmCallRequested | ToolCallRequested):
                kind = "llm" if isinstance(effect, LlmCallRequested) else "tool"
                run.waiting.append((kind, effect_id(event.hash, index), effect.step))
            if isinstance(effect, RetryScheduled):
                run.waiting.append(("timer", effect_id(event.hash, index), effect.step))
        if chance() < faults:
            self.append(run.id, codec.encode(mine))  # a repetition
        if chance() < faults:  # an owner that lost, and what it wrote on top of its own decision
            self.append(run.id, codec.encode(rival))
            lost = evolve(before, RunEvent(rival, chain_hash(codec.body(rival))))
            self.append(run.id, codec.encode(self._decided(run.id, lost, cause)))
        if chance() < faults:
            self.append(run.id, self.random.choice([None, b"no Avro", b"\0\0\0\0\0\0"]))
        if chance() < faults and self.accepted:  # an old decision of any run, also of a finished one
            old = self.random.choice(self.accepted).decision
            if old.run_id not in self.broken:
                self.append(old.run_id, codec.encode(old))

    def _decided(self, run: str, state: RunState, cause: Input, late: int = 0) -> Decision:
        self._at += 10
        self._inputs += 1
        effects = decide(SPEC, state, cause, self._at + late)
        return Decision(run, state.seq + 1, state.head, INBOX_ID, self._inputs, self._at + late, cause, effects)

    def _input(self, run: Run, number: int, faults: float) -> Input | None:
        if run.state.seq == 0:
            return StartRun(f"request {number}", SPEC.name, SPEC.digest, f'{{"n":{number}}}', {"team": "ab"[number % 2]})
        chance = self.random.random
        if chance() < faults and run.past:
            return self.random.choice(run.past)
        if not run.waiting:
            return None
        waiting = self.random.choice(run.waiting)
        if chance() > faults / 3:  # else it may be answered again, late
            run.waiting.remove(waiting)
        kind, identity, step = waiting
        if chance() < faults or kind == "timer":
            return TimerFired(identity, step)
        failed = chance() < faults
        usage = Usage(10, 5, 4, 0, 2)
        failure = Failure(self.random.choice([FailureKind.RATE_LIMITED, FailureKind.UNAUTHORIZED]), "no")
        match kind, failed:
            case "llm", False:
                output = self.random.choice(['"yes"', "no JSON"]) if faults else '"yes"'
                return LlmCallCompleted(identity, step, output, "m", "p", "stop", usage, self.random.choice([0.25, None]), 12)
            case "llm", True:
                return LlmCallFailed(identity, step, failure, "m", self.random.choice([usage, None]), 0.125, 12)
            case _, False:
                return ToolCallCompleted(identity, step, '{"ok":true}', "1", 3)
            case _:
                return ToolCallFailed(identity, step, failure, None, 3)


def logs(seed: int, runs: int, faults: float) -> Logs:
    """Return the logs of one random history."""
    made = Logs(seed)
    made.write(runs, faults)
    return made
