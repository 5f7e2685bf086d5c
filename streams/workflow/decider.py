"""`decide`: what follows from one input of a run. Pure: the same spec, state, input and time give the same effects, always.

It takes the input, then goes on until nothing more is ready (there is no separate scheduler). An input that changes nothing gives
InputIgnored with the reason, never no effect at all: whether there is a decision must not depend on what this code understands.
"""

import hashlib
import heapq
from typing import Final, assert_never

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import (
    Effect,
    InputIgnored,
    RetryScheduled,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepFailed,
    StepSkipped,
    UnreadableInput,
)
from events.failure import Failure, FailureKind
from events.results import Input, LlmCallCompleted, LlmCallFailed, TimerFired, ToolCallCompleted, ToolCallFailed
from streams.workflow.expressions import EvaluationError, Json, Scope, from_json, to_json
from streams.workflow.spec import Llm, Plan, Step, StepPlan, WorkflowSpec
from streams.workflow.state import Draft, RunState, RunStatus, StepState, StepStatus

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""Largest output of a step, largest input of a run."""
MAX_EFFECTS_BYTES: Final = 4 * 1024 * 1024
"""Largest sum of what one decision's effects hold, so that every decision can be delivered (records hold 8 MB)."""
LONGEST_WAIT_MS: Final = 30 * 24 * 60 * 60 * 1000
"""Longest wait that a failure may ask for."""
_NO_HASH: Final = bytes(32)


def decide(spec: WorkflowSpec | None, state: RunState, cause: Input | UnreadableInput, at: int) -> tuple[Effect, ...]:
    """Return what follows from an input at the broker's time `at` (milliseconds since the epoch).

    `spec` is the run's version of its workflow, None if nobody knows it.
    """
    if isinstance(cause, UnreadableInput):
        return (InputIgnored("unreadable"),)
    if isinstance(cause, StartRun):
        if state.status is not RunStatus.NEW:
            return (InputIgnored("already_started"),)
        if (size := utf8_size(cause.input)) > MAX_PAYLOAD_BYTES:
            return (RunFailed(None, _too_large("the run's input", size)),)
    if spec is None:
        digest = cause.digest if isinstance(cause, StartRun) else state.digest
        return (RunFailed(None, Failure(FailureKind.UNKNOWN_WORKFLOW, f"no workflow is registered with digest {digest}")),)
    effects = tuple(_Advance(spec.plan, state, cause, at).effects())
    size = sum(_size(effect) for effect in effects)
    if size > MAX_EFFECTS_BYTES:
        return (RunFailed(None, _too_large("what follows from this input", size)),)
    return effects


class _Advance:
    """One decision in the making: the effects so far, and the state that they lead to."""

    def __init__(self, plan: Plan, state: RunState, cause: Input, at: int) -> None:
        self.plan, self.cause, self.at = plan, cause, at
        self.state = Draft(state, cause)
        self.found: list[Effect] = []

    def effects(self) -> list[Effect]:
        """Take the input, then go on to the fixed point."""
        match self.cause:
            case StartRun():
                self.go_on(self.plan.roots)
            case LlmCallCompleted() | ToolCallCompleted():
                self.answered(self.cause)
            case LlmCallFailed() | ToolCallFailed():
                if step := self.awaited(self.cause.step, self.cause.call_id, StepStatus.RUNNING):
                    self.failed(step, self.cause.failure)
            case TimerFired():
                self.timer(self.cause)
            case _:
                assert_never(self.cause)
        return self.found

    def add(self, effect: Effect) -> None:
        """Record an effect and advance the state by it."""
        self.state.apply(effect, _NO_HASH, len(self.found))
        self.found.append(effect)

    def awaited(self, name: str, identity: str, *statuses: StepStatus) -> StepState | None:
        """Return the step that waits for this call or timer; if none does, record why the input is ignored."""
        step = self.state.steps.get(name)
        timer = isinstance(self.cause, TimerFired)
        if step and step.awaits == identity:
            if step.status in statuses:
                return step
            self.add(InputIgnored("late" if timer else "duplicate"))
        elif step and identity in step.past:
            self.add(InputIgnored("late"))
        else:
            self.add(InputIgnored("unknown_timer" if timer else "unknown_call"))
        return None

    def answered(self, result: LlmCallCompleted | ToolCallCompleted) -> None:
        """Take the answer to a call, unless it is too large or no JSON."""
        step = self.awaited(result.step, result.call_id, StepStatus.RUNNING)
        if step is None:
            return
        if (size := utf8_size(result.output)) > MAX_PAYLOAD_BYTES:
            self.failed(step, _too_large("the output", size))
            return
        try:
            from_json(result.output)
        except EvaluationError as error:
            self.failed(step, Failure(FailureKind.INVALID_OUTPUT, str(error)))
            return
        self.add(StepCompleted(result.step))
        self.go_on(self.plan.dependents.get(result.step, ()))

    def timer(self, fired: TimerFired) -> None:
        """Give up the attempt whose time is over, or start the next one."""
        step = self.awaited(fired.step, fired.timer_id, StepStatus.RUNNING, StepStatus.WAITING)
        if step is None:
            return
        plan = self.plan.steps[fired.step]
        if step.status is StepStatus.RUNNING:
            limit = plan.step.timeout
            self.failed(step, Failure(FailureKind.TIMEOUT, f"no answer within {limit} ms"))
        else:
            self.attempt(plan, step.attempt)
            if self.is_settled(plan.name):
                self.go_on(self.plan.dependents.get(plan.name, ()))

    def failed(self, before: StepState, failure: Failure) -> None:
        """Schedule another attempt of the input's step, or let it fail for good."""
        assert not isinstance(self.cause, StartRun)
        name = self.cause.step
        step = self.plan.steps[name].step
        if failure.retryable and before.attempt < step.retry.attempts:
            asked = failure.retry_after_ms
            wait = min(max(asked, 0), LONGEST_WAIT_MS) if asked is not None else _backoff(step, before)
            self.add(RetryScheduled(name, before.attempt + 1, failure, self.at + wait))
        else:
            self.fail(step, failure)
            self.go_on(self.plan.dependents.get(name, ()))

    def fail(self, step: Step, failure: Failure) -> None:
        """Record that a step failed for good, and the run with it unless the step may fail."""
        tolerated = step.on_failure == "continue"
        self.add(StepFailed(step.name, failure, tolerated))
        if not tolerated:
            self.add(RunFailed(step.name, failure))

    def go_on(self, candidates: tuple[str, ...]) -> None:
        """Enter every step that became ready, in the definition's order, until nothing more is; then end the run."""
        queue = [self.plan.steps[name].index for name in candidates]
        heapq.heapify(queue)
        while queue and not self.state.over:
            plan = self.plan.steps[self.plan.order[heapq.heappop(queue)]]
            if plan.name in self.state.steps or not all(self.is_settled(need) for need in plan.needs):
                continue
            self.enter(plan)
            if self.is_settled(plan.name):
                for name in self.plan.dependents.get(plan.name, ()):
                    heapq.heappush(queue, self.plan.steps[name].index)
        if not self.state.over and self.state.settled == len(self.plan.steps):
            self.complete()

    def is_settled(self, name: str) -> bool:
        """Whether steps that need this one may go on."""
        step = self.state.steps.get(name)
        return step is not None and step.settled

    def enter(self, plan: StepPlan) -> None:
        """Skip, compute or request a step that is ready."""
        try:
            scope = self.scope(plan.refs)
            if plan.when and not plan.when.holds(scope):
                self.add(StepSkipped(plan.name, plan.when.source))
            elif plan.step.llm or plan.step.tool:
                self.attempt(plan, 1)
            else:
                self.computed(plan, plan.value.evaluate(scope))
        except EvaluationError as error:
            self.fail(plan.step, Failure(FailureKind.EXPRESSION, str(error)))

    def computed(self, plan: StepPlan, output: str) -> None:
        """Take the output of a step that needs no call."""
        if (size := utf8_size(output)) > MAX_PAYLOAD_BYTES:
            self.fail(plan.step, _too_large("the output", size))
        else:
            self.add(StepCompleted(plan.name, output))

    def attempt(self, plan: StepPlan, number: int) -> None:
        """Request an attempt of a step."""
        deadline = self.at + plan.step.timeout
        try:
            scope = self.scope(plan.refs)
            if plan.step.llm is not None:
                self.add(_llm_call(plan, plan.step.llm, scope, number, deadline))
            elif plan.step.tool is not None:
                self.add(ToolCallRequested(plan.name, number, plan.step.tool.name, plan.value.evaluate(scope), deadline))
        except EvaluationError as error:
            self.fail(plan.step, Failure(FailureKind.EXPRESSION, str(error)))

    def complete(self) -> None:
        """End the run with its output."""
        try:
            self.add(RunCompleted(self.plan.output.evaluate(self.scope(self.plan.output.steps))))
        except EvaluationError as error:
            self.add(RunFailed(None, Failure(FailureKind.EXPRESSION, f"output: {error}")))

    def scope(self, refs: frozenset[str]) -> Scope:
        """Return what expressions see: the input, and the steps that they name."""
        return {"input": from_json(self.state.input), "steps": {name: _view(self.state.steps.get(name)) for name in refs}}


def _view(step: StepState | None) -> Json:
    """Return a step as expressions see it."""
    if step is None:
        return {"status": "pending", "output": None, "error": None}
    error = {"kind": str(step.failure.kind), "message": step.failure.message} if step.failure else None
    return {"status": step.status.value, "output": from_json(step.output) if step.output is not None else None, "error": error}


def _llm_call(plan: StepPlan, llm: Llm, scope: Scope, attempt: int, deadline: int) -> LlmCallRequested:
    assert plan.prompt is not None
    messages = [{"role": "system", "content": plan.system.render(scope)}] if plan.system else []
    messages.append({"role": "user", "content": plan.prompt.render(scope)})
    parameters = llm.model_dump(include={"max_tokens", "temperature", "top_p", "seed", "stop"}, exclude_none=True)
    if not llm.stop:
        parameters.pop("stop")
    schema = to_json(llm.answer) if llm.answer is not None else None
    return LlmCallRequested(plan.name, attempt, llm.model, to_json(messages), to_json(parameters), schema, deadline)


def _backoff(step: Step, before: StepState) -> int:
    """Return the wait before the next attempt in milliseconds: exponential, with jitter in [0.5, 1) from the failed call's id."""
    retry = step.retry
    wait = min(retry.initial * retry.factor ** (before.attempt - 1), retry.maximum)
    jitter = int.from_bytes(hashlib.blake2b(before.awaits.encode(), digest_size=4).digest()) / 2**32
    return round(wait * (0.5 + jitter / 2))


def utf8_size(text: str) -> int:
    """Return a text's size in bytes."""
    return len(text) if text.isascii() else len(text.encode())


def _too_large(what: str, size: int) -> Failure:
    return Failure(FailureKind.TOO_LARGE, f"{what} is too large: {size:,} bytes; the limit is {MAX_PAYLOAD_BYTES:,}")


def _size(effect: Effect) -> int:
    """Return about how many bytes an effect holds."""
    match effect:
        case LlmCallRequested():
            return utf8_size(effect.messages) + utf8_size(effect.schema or "") + utf8_size(effect.parameters)
        case ToolCallRequested():
            return utf8_size(effect.arguments)
        case StepCompleted() | RunCompleted():
            return utf8_size(effect.output or "")
        case _:
            return 0


__all__ = ["LONGEST_WAIT_MS", "MAX_EFFECTS_BYTES", "MAX_PAYLOAD_BYTES", "decide", "utf8_size"]
