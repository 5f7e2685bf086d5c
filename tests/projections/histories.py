"""Real histories for projections: logs that `decide` wrote, with losers, repetitions and broken chains."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from events import codec
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    Origin,
    Parent,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    SignalReceived,
    StartRun,
)
from events.decisions import ApprovalRequested, ChildRunRequested, Decision, RetryScheduled, SignalAwaited, TimerSet
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id, run_id
from events.results import (
    ChildRunCompleted,
    ChildRunFailed,
    Input,
    LlmCallCompleted,
    LlmCallFailed,
    TimerFired,
    ToolCallCompleted,
    ToolCallFailed,
    Usage,
)
from events.topics import partition_for
from projections.extent import Extent, extents
from projections.ledger import Record
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.expressions import to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState

PARTITIONS = 3
TOPIC_IDS = {"decisions": b"d" * 16, "deadletter": b"l" * 16, "specs": b"s" * 16, "workers": b"w" * 16}
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

RICH = WorkflowSpec.model_validate(
    {
        "name": "order",
        "steps": {
            "charge": {"tool": {"name": "charge"}, "compensation": "refund"},
            "many": {
                "needs": ["charge"],
                "for_each": {"items": "=input.items", "concurrency": 2, "tolerate": 1},
                "retry": RETRY,
                "steps": {
                    "guess": {"llm": {"prompt": "{{ item }}"}, "retry": RETRY},
                    "odd": {"needs": ["guess"], "when": "index % 2 == 1", "transform": "=item"},
                },
                "output": "=steps.guess.output",
            },
            "agent": {
                "repeat": {"until": "index >= 2", "at_most": 5},
                "steps": {
                    "think": {"llm": {"prompt": "{{ index }}"}, "on_failure": "continue"},
                    "ok": {"needs": ["think"], "approval": {"message": "go on?", "on_reject": "continue", "deadline": "1h"}},
                },
            },
            "nap": {"sleep": "50ms"},
            "word": {"needs": ["nap"], "wait_for": {"signal": "word", "timeout": "1h", "otherwise": "=null"}},
            "more": {"wait_for": {"signal": "word", "correlation": "=string(input.n)"}, "on_failure": "continue"},
            "review": {
                "needs": ["charge"],
                "approval": {"message": "{{ input.n }}?", "show": "=input.n", "by": ["ann", "bob"], "editable": True},
                "compensation": "regret",
                "on_failure": "continue",
            },
            "child": {"run": {"workflow": "report", "input": {"n": "=input.n"}}, "retry": RETRY, "on_failure": "continue"},
            "aside": {"run": {"workflow": "report", "input": {"n": 1}, "detached": True}},
            "pick": {
                "needs": ["charge"],
                "switch": {
                    "low": {"when": "input.n < 2", "tool": {"name": "echo"}},
                    "high": {"steps": {"a": {"transform": 1}, "b": {"tool": {"name": "echo"}}}},
                },
            },
            "end": {"needs": ["many", "agent", "word", "more", "review", "child", "pick"], "transform": "=steps.pick.output"},
        },
        "compensations": {"refund": {"tool": {"name": "refund"}}, "regret": {"run": {"workflow": "report"}}},
        "finally": {"tidy": {"tool": {"name": "tidy"}}},
        "time_limit": "2h",
    }
)
"""Every kind of step there is."""
SPECS = {spec.digest: spec for spec in (SPEC, RICH)}
REPORT = (SPEC,)
BOTH = (SPEC, RICH)


@dataclass
class Run:
    """One run in the making; `waiting`: calls and timers (kind, id, step) that may be answered; `past`: inputs taken."""

    id: str
    state: RunState = INITIAL
    spec: WorkflowSpec = SPEC
    waiting: list[tuple[str, str, str]] = field(default_factory=list)
    past: list[Input] = field(default_factory=list)
    due: dict[str, int] = field(default_factory=dict)


class Logs:
    """Partitions of `decisions` that a seeded random history writes. `accepted`: what a perfect reader accepts, in order.

    `outputs`: the last output that each settled step of each run was seen with, also of those that the run has forgotten.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a reproducible history, no secret
        self.partitions: list[list[bytes | None]] = [[] for _ in range(PARTITIONS)]
        self.order: list[tuple[int, int]] = []
        self.accepted: list[RunEvent] = []
        self.states: dict[str, RunState] = {}
        self.outputs: dict[str, dict[str, str | None]] = {}
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

    def write(self, runs: int, faults: float, specs: tuple[WorkflowSpec, ...] = REPORT) -> None:
        """Write the histories of some runs, interleaved; `faults`: how likely each kind of fault is at each decision."""
        pending = [Run(run_id(f"request {number}"), spec=specs[number % len(specs)]) for number in range(runs)]
        numbers = {run.id: number for number, run in enumerate(pending)}
        left = 40 * runs * len(specs)
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
        rival = self._decided(run, before, cause, late=7)
        mine = self._decided(run, before, cause)
        if chance() < faults / 10 and before.seq > 0:  # a record is missing: this one extends nothing that is there
            missing = evolve(before, RunEvent(mine, b"never written".ljust(32)))
            self.append(run.id, codec.encode(self._decided(run, missing, cause)))
            self.broken.add(run.id)
            return
        self.append(run.id, codec.encode(mine))
        event = RunEvent(mine, chain_hash(codec.body(mine)))
        run.state = self.states[run.id] = evolve(before, event)
        seen = self.outputs.setdefault(run.id, {})
        seen |= {path: step.output for path, step in run.state.steps.items() if step.settled}
        self.accepted.append(event)
        run.past.append(cause)
        for index, effect in enumerate(mine.effects):
            if isinstance(effect, LlmCallRequested | ToolCallRequested):
                kind = "llm" if isinstance(effect, LlmCallRequested) else "tool"
                run.waiting.append((kind, effect_id(event.hash, index), effect.step))
            if isinstance(effect, RetryScheduled | TimerSet):
                run.waiting.append(("timer", effect_id(event.hash, index), effect.step))
                run.due[effect_id(event.hash, index)] = effect.due
            if isinstance(effect, SignalAwaited | ApprovalRequested):
                kind = "signal" if isinstance(effect, SignalAwaited) else "approval"
                run.waiting.append((kind, effect_id(event.hash, index), effect.step))
            if isinstance(effect, ChildRunRequested) and not effect.detached:
                run.waiting.append(("run", effect_id(event.hash, index), effect.step))
        if chance() < faults:
            self.append(run.id, codec.encode(mine))  # a repetition
        if chance() < faults:  # an owner that lost, and what it wrote on top of its own decision
            self.append(run.id, codec.encode(rival))
            lost = evolve(before, RunEvent(rival, chain_hash(codec.body(rival))))
            self.append(run.id, codec.encode(self._decided(run, lost, cause)))
        if chance() < faults:
            self.append(run.id, self.random.choice([None, b"no Avro", b"\0\0\0\0\0\0"]))
        if chance() < faults and self.accepted:  # an old decision of any run, also of a finished one
            old = self.random.choice(self.accepted).decision
            if old.run_id not in self.broken:
                self.append(old.run_id, codec.encode(old))

    def _decided(self, run: Run, state: RunState, cause: Input, late: int = 0) -> Decision:
        self._at += 10
        self._inputs += 1
        effects = decide(run.spec, state, cause, self._at + late)
        return Decision(run.id, state.seq + 1, state.head, INBOX_ID, self._inputs, self._at + late, cause, effects)

    def _input(self, run: Run, number: int, faults: float) -> Input | None:
        if run.state.seq == 0:
            return self._start(run, number)
        chance = self.random.random
        if chance() < faults and run.past:
            return self.random.choice(run.past)
        if run.spec is RICH and chance() < 0.05 + faults / 3:
            return self._command(run)
        if not run.waiting:
            return None
        waiting = self.random.choice(run.waiting)
        if chance() > faults / 3:  # else it may be answered again, late
            run.waiting.remove(waiting)
        kind, identity, step = waiting
        if kind == "timer" or chance() < faults:
            return self._fired(run, identity, step, faults)
        return self._answer(run, waiting, faults, failed=chance() < faults)

    def _fired(self, run: Run, identity: str, step: str, faults: float) -> Input | None:
        if not step and self.random.random() < 0.9:
            return None  # else hardly any run would live longer than its time limit
        if self.random.random() > faults:
            self._at = max(self._at, run.due.get(identity, 0))
        return TimerFired(identity, step)

    def _answer(self, run: Run, waiting: tuple[str, str, str], faults: float, *, failed: bool) -> Input:
        kind, identity, step = waiting
        usage = Usage(10, 5, 4, 0, 2)
        failure = Failure(self.random.choice([FailureKind.RATE_LIMITED, FailureKind.UNAUTHORIZED]), "no")
        match kind, failed:
            case "signal", _:
                return self._signal(run)
            case "approval", _:
                return ApprovalAnswered(step, not failed, self.random.choice(["ann", "bob", "eve"]), "", None)
            case "run", False:
                return ChildRunCompleted(identity, step, run_id(identity), '{"child":1}')
            case "run", True:
                return ChildRunFailed(identity, step, run_id(identity), Failure(FailureKind.CHILD_FAILED, "no"))
            case "llm", False:
                output = self.random.choice(['"yes"', "no JSON"]) if faults else '"yes"'
                return LlmCallCompleted(identity, step, output, "m", "p", "stop", usage, self.random.choice([0.25, None]), 12)
            case "llm", True:
                return LlmCallFailed(identity, step, failure, "m", self.random.choice([usage, None]), 0.125, 12)
            case _, False:
                return ToolCallCompleted(identity, step, '{"ok":true}', "1", 3)
            case _:
                return ToolCallFailed(identity, step, failure, None, 3)

    def _start(self, run: Run, number: int) -> StartRun:
        start = StartRun(f"request {number}", run.spec.name, run.spec.digest, f'{{"n":{number}}}', {"team": "ab"[number % 2]})
        if run.spec is not RICH:
            return start
        more: dict[str, Any] = {}
        if self.random.random() < 0.3:
            results = {"charge": {"status": "completed", "output": '"paid"'}, "many[1]": {"status": "completed", "output": "7"}}
            more = {"origin": Origin(run_id("request 1"), 3, "ab" * 32), "copied": to_json(results)}
        if self.random.random() < 0.3:
            more["parent"] = Parent(run_id("request 1"), "child", "c" * 32)
        if self.random.random() < 0.3:
            more["break_at"] = ("nap", "agent.think")
        text = to_json({"n": number, "items": list(range(self.random.randrange(6)))})
        return StartRun(start.request_id, start.workflow, start.digest, text, start.labels, **more)

    def _signal(self, run: Run) -> SignalReceived:
        correlation = self.random.choice([None, run.state.input.partition('"n":')[2].strip("}")])
        self._inputs += 1
        return SignalReceived(f"signal {self._inputs}", "word", correlation, f"[{self._inputs}]", "bob")

    def _command(self, run: Run) -> Input:
        """Return what somebody says to a run, at any time, about any step that it has or could have."""
        choice = self.random.choice
        step = choice([*sorted(run.state.steps), "nap", "many", "agent.think", "nobody"])
        value = choice([None, "5", "[1]"])
        commands: list[Input] = [
            self._signal(run),
            ApprovalAnswered(choice(["review", step]), choice([True, False]), "ann", "because", value),
            CancelRun("bob", "enough", choice([True, False])),
            CancelStep(step, "bob", "too slow"),
            PauseRun("ann", "wait"),
            PauseStep(step, "ann", "look"),
            *[ResumeRun("ann", choice([True, False]))] * 3,
            *[ResumeStep(step, "ann")] * 2,
            *[ChangeOutput(step, f'"changed {self._inputs}"', "ann", "wrong")] * 3,
        ]
        return choice(commands)


def logs(seed: int, runs: int, faults: float, specs: tuple[WorkflowSpec, ...] = REPORT) -> Logs:
    """Return the logs of one random history of runs of these workflows, in turn."""
    made = Logs(seed)
    made.write(runs, faults, specs)
    return made


def extent(db: Any, identity: str) -> Extent:
    """Return where a run lies."""
    (found,) = extents(db, identity, 2)
    return found


Row = tuple[int, int, bytes | None]
"""Partition, offset and value of a record."""


def as_kcat(rows: Iterable[Row], claims: Iterable[bytes | None] | None = None) -> bytes:
    r"""Return what `kcat -f '%p %o %h\n%R%s'` writes. `claims`: the values as they were when their headers were made."""
    there = list(rows)
    said = [value for *_, value in there] if claims is None else claims
    return b"".join(
        b"%d %d %s\n" % (partition, offset, _headers(claim)) + _behind_its_length(value)
        for (partition, offset, value), claim in zip(there, said, strict=True)
    )


def as_kcat_values(rows: Iterable[Row]) -> bytes:
    """Return what `kcat -f '%p %o %R%s'` writes."""
    return b"".join(b"%d %d " % (partition, offset) + _behind_its_length(value) for partition, offset, value in rows)


def claim(value: bytes | None) -> list[tuple[str, bytes]]:
    """Return the header that names a decision's hash."""
    return [("ce_id", chain_hash(codec.unframed(value or b"")).hex().encode())]


def _headers(value: bytes | None) -> bytes:
    """Return a record's headers as kcat writes them; the first one is somebody else's, with a line's end in it."""
    ((name, said),) = claim(value)
    return b"tracestate=a\nb,%s=%s,ce_type=Decision" % (name.encode(), said)


def _behind_its_length(value: bytes | None) -> bytes:
    return (-1 if value is None else len(value)).to_bytes(4, signed=True) + (value or b"")
