"""What the tests of the core share: a run in a test, and short ways to write workflows."""

from dataclasses import dataclass, field
from typing import Any

from events import codec
from events.commands import StartRun
from events.decisions import Decision, Effect, UnreadableInput
from events.failure import Failure, FailureKind
from events.ids import chain_hash
from events.results import Input, TimerFired, ToolCallCompleted, ToolCallFailed
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.payloads import Memory
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState

NOW = 1_700_000_000_000
UNAVAILABLE = Failure(FailureKind.UNAVAILABLE, "down")
REJECTED = Failure(FailureKind.REJECTED, "no")


@dataclass
class Case:
    """A run in a test: `given` what happened, `when` an input comes, `then` these effects follow."""

    spec: WorkflowSpec
    state: RunState = INITIAL
    events: list[RunEvent] = field(default_factory=list)
    at: int = NOW
    payloads: Memory = field(default_factory=Memory)

    def when(self, cause: Input | UnreadableInput, *, known: bool = True) -> tuple[Effect, ...]:
        """Decide on an input, twice (the same both times), and fold the decision as it comes back from its bytes."""
        spec = self.spec if known else None
        effects = decide(spec, self.state, cause, self.at, self.payloads)
        assert decide(spec, self.state, cause, self.at, self.payloads) == effects
        offset = self.state.last_offset + 1
        decision = Decision("r", self.state.seq + 1, self.state.head, b"i" * 16, offset, self.at, cause, effects)
        body = codec.body(decision)
        event = RunEvent(codec.decode(codec.framed(Decision, body), Decision), chain_hash(body))
        self.state = evolve(self.state, event)
        self.events.append(event)
        self.at += 1
        return effects

    def start(self, text: str = "{}", **more: Any) -> tuple[Effect, ...]:
        """Start the run."""
        return self.when(StartRun("q", self.spec.name, self.spec.digest, text, **more))

    def awaits(self, step: str) -> str:
        """Return the call or timer that a step waits for."""
        return self.state.steps[step].awaits

    def done(self, step: str, output: str = "1", call: str | None = None) -> tuple[Effect, ...]:
        """Answer a step's call."""
        return self.when(ToolCallCompleted(call or self.awaits(step), step, output, "1", 5))

    def fails(self, step: str, failure: Failure = UNAVAILABLE, call: str | None = None) -> tuple[Effect, ...]:
        """Let a step's call fail."""
        return self.when(ToolCallFailed(call or self.awaits(step), step, failure, "1", 5))

    def past(self, step: str) -> str:
        """Return the call that a settled step waited for."""
        return self.state.steps[step].awaits

    def timer(self, step: str, timer: str | None = None) -> tuple[Effect, ...]:
        """Let a step's timer fire when it is due."""
        if step in self.state.steps:
            self.at = max(self.at, self.state.steps[step].due)
        return self.when(TimerFired(timer or self.awaits(step), step))


def workflow(steps: dict[str, Any], **more: Any) -> Case:
    """Return a run of a workflow of these steps."""
    return Case(WorkflowSpec.model_validate({"name": "w", "steps": steps, **more}))


def tool(**more: Any) -> dict[str, Any]:
    """Return a step that calls a tool."""
    return {"tool": {"name": "echo"}, **more}


def started(steps: dict[str, Any], text: str = "{}", **more: Any) -> Case:
    """Return a run that was started."""
    case = workflow(steps, **more)
    case.start(text)
    return case
