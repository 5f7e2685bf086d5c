"""Runs in memory: what intake, orchestrator and workers do, one input after the other, by a clock that only the test moves.

Each decision is made by the real core, encoded, chained and decoded as on Kafka, and what follows from it is what the
orchestrator would send. What is due at the same time comes in the order in which it was asked for; answers before timers.
"""

import heapq
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from events import codec
from events.calls import CancelCall, LlmCall, ToolCall
from events.commands import RunRequest, StartRun, WorkflowRequest
from events.decisions import Decision, TimerSet
from events.failure import Failure, FailureKind
from events.ids import chain_hash, run_id
from events.results import ChildRunCompleted, ChildRunFailed, InboxMessage, Input, TimerFired
from streams.processors.consequences import consequences
from streams.testing.script import Script
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.payloads import inlined
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState

INBOX: Final = b"testing-testing."
"""The id of the topic that inputs come from."""
MOST_DECISIONS: Final = 100_000
"""How many decisions may follow from one thing that happens."""


@dataclass
class MemoryRun:
    """A run. `values`: its decisions as they would stand on Kafka; `events`: the same, decoded; `calls`: those that were made."""

    id: str
    spec: WorkflowSpec
    state: RunState = INITIAL
    values: list[bytes] = field(default_factory=list)
    events: list[RunEvent] = field(default_factory=list)
    calls: list[ToolCall | LlmCall] = field(default_factory=list)
    children: dict[str, str] = field(default_factory=dict)
    """Runs that its steps started, by step; the last one of each."""
    asked: list[tuple[str, WorkflowRequest]] = field(default_factory=list)
    """Requests for other runs, with their steps."""


class Sent(NamedTuple):
    """Something on its way to a run; `call`: whose answer it is."""

    run_id: str
    input: Input
    call: str = ""


@dataclass
class World:
    """Runs, and a clock: `now` is milliseconds since the epoch."""

    script: Script
    now: int
    runs: dict[str, MemoryRun] = field(default_factory=dict)
    _agenda: list[tuple[int, int, int, Any]] = field(default_factory=list)
    """What comes: when, answers before timers, in the order in which it was asked for."""
    _number: int = 0
    _offset: int = 0
    _cancelled: set[str] = field(default_factory=set)

    # --- What others do ---

    def start(self, request: WorkflowRequest, spec: WorkflowSpec) -> str:
        """Start a run as intake does and return its id. Raises ValueError for an input that doesn't fit."""
        identity = request.request_id or f"request {len(self.runs)}"
        value, problems = spec.check_input(request.input)
        if problems:
            raise ValueError("; ".join(problems))
        run = MemoryRun(run_id(identity), spec)
        self.runs[run.id] = run
        start = StartRun(identity, spec.name, spec.digest, inlined(value, self.script.payloads))
        more = {key: getattr(request, key) for key in ("labels", "parent", "break_at", "origin", "copied")}
        self.send(Sent(run.id, replace(start, **more)))
        return run.id

    def send(self, sent: Any, after_ms: int = 0) -> None:
        """Put something on its way."""
        self._push(self.now + after_ms, 0, sent)

    def _push(self, due: int, rank: int, what: Any) -> None:
        self._number += 1
        heapq.heappush(self._agenda, (due, rank, self._number, what))

    # --- Time ---

    def play(self) -> None:
        """Let everything happen that is due. Raises UnscriptedCallError."""
        left = MOST_DECISIONS
        while self._agenda and self._agenda[0][0] <= self.now:
            _, _, _, what = heapq.heappop(self._agenda)
            self._happen(what)
            left -= 1
            if not left:
                raise AssertionError(f"the run does not come to rest: {MOST_DECISIONS:,} things happened at the same time")

    def pass_until(self, then: int) -> None:
        """Move the clock, and let everything happen on the way at its time. Raises UnscriptedCallError."""
        while self._agenda and self._agenda[0][0] <= then:
            self.now = max(self.now, self._agenda[0][0])
            self.play()
        self.now = max(self.now, then)

    def next_time(self) -> int | None:
        """Return when something happens next; None: nothing will by itself."""
        while self._agenda and not self._pending(self._agenda[0][3]):
            heapq.heappop(self._agenda)
        return self._agenda[0][0] if self._agenda else None

    def _pending(self, what: Any) -> bool:
        """Whether something still concerns anybody."""
        match what:
            case Sent(run, TimerFired() as timer):
                state = self.runs[run].state
                if state.over:
                    return False
                if not timer.step:
                    return state.limit is not None and state.limit[0] == timer.timer_id
                step = state.steps.get(timer.step)
                return step is not None and not step.settled and step.awaits == timer.timer_id
            case Sent():
                return not self.runs[what.run_id].state.over and what.call not in self._cancelled
            case LlmCall() | ToolCall():
                return what.call_id not in self._cancelled
            case _:
                return True

    # --- What happens ---

    def _happen(self, what: Any) -> None:
        if not self._pending(what):
            return
        match what:
            case Sent():
                self._decide(self.runs[what.run_id], what.input)
            case LlmCall() | ToolCall():
                self.runs[what.run_id].calls.append(what)
                reply = self.script.model(what) if isinstance(what, LlmCall) else self.script.tool(what)
                if reply.result is not None:
                    self.send(Sent(what.run_id, reply.result, what.call_id), reply.after_ms)
            case CancelCall():
                self._cancelled.add(what.call_id)
            case (str() as asking, str() as step, WorkflowRequest() as request):
                self._start_child(self.runs[asking], step, request)
            case RunRequest():
                child = what.run_id or ""
                self._cancelled.add(child)
                if child in self.runs:
                    self.send(Sent(child, what.command))
            case _:
                raise AssertionError(what)

    def _decide(self, run: MemoryRun, cause: Input) -> None:
        self._offset += 1
        state, payloads = run.state, self.script.payloads
        effects = decide(run.spec, state, cause, self.now, payloads)
        value = codec.encode(Decision(run.id, state.seq + 1, state.head, INBOX, self._offset, self.now, cause, effects))
        event = RunEvent(codec.decode(value, Decision), chain_hash(codec.unframed(value)))
        run.state = evolve(state, event)
        run.values.append(value)
        run.events.append(event)
        self._set_timers(run, event.decision)
        for each in consequences(event, run.state.parent):
            record = each.record
            kind = codec.kind_of(record.value)
            assert kind is not None
            self._follow(run, each.step or "", codec.decode(record.value, kind))

    def _follow(self, run: MemoryRun, step: str, said: Any) -> None:
        match said:
            case InboxMessage():
                self.send(Sent(said.run_id, said.input, run.id))
            case WorkflowRequest():
                step = said.parent.step if said.parent else step
                self.send((run.id, step, said))
            case _:
                self.send(said)

    def _set_timers(self, run: MemoryRun, decision: Decision) -> None:
        for effect in decision.effects:
            path: str | None = getattr(effect, "step", None)
            step = run.state.steps.get(path) if path else None
            if path and step is not None and step.due and not step.settled:
                self._push(step.due, 1, Sent(run.id, TimerFired(step.awaits, path)))
            elif isinstance(effect, TimerSet) and not path and run.state.limit is not None:
                self._push(run.state.limit[1], 1, Sent(run.id, TimerFired(run.state.limit[0], "")))

    def _start_child(self, run: MemoryRun, step: str, request: WorkflowRequest) -> None:
        child = run_id(request.request_id or "")
        if child in self._cancelled:
            return
        run.asked.append((step, request))
        given, after_ms = self.script.run(request, step, run.spec)
        parent = request.parent
        refused: Failure | None = given if isinstance(given, Failure) else None
        if isinstance(given, WorkflowSpec):
            if request.digest not in (None, given.digest):
                problem = f"workflow `{request.workflow}` has no version {request.digest}"
                refused = Failure(FailureKind.UNKNOWN_WORKFLOW, problem)
            else:
                try:
                    self.start(request, given)
                    run.children[step] = child
                except ValueError as error:
                    refused = Failure(FailureKind.INVALID_ARGUMENTS, str(error))
        if parent is None:
            return
        if refused is not None:
            self.send(Sent(parent.run_id, ChildRunFailed(parent.call_id, parent.step, child, refused), child), after_ms)
        elif isinstance(given, str):
            self.send(Sent(parent.run_id, ChildRunCompleted(parent.call_id, parent.step, child, given), child), after_ms)


__all__ = ["INBOX", "MemoryRun", "Sent", "World"]
