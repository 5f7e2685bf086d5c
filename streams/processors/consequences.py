"""What follows outside from a decision: calls, their cancellations, child runs, the word to a parent.

The same records, whenever it is said, so that it can be said again after a takeover.
"""

from collections.abc import Iterator
from typing import Any, Final

from events import codec, topics
from events.calls import CancelCall, LlmCall, LlmCallRequested, ToolCall, ToolCallRequested
from events.commands import CancelRun, Parent, RunRequest, WorkflowRequest
from events.decisions import (
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    Decision,
    Effect,
    RunCancelled,
    RunCompleted,
    RunFailed,
)
from events.failure import Failure, FailureKind
from events.frozen import frozen
from events.ids import effect_id
from events.ids import run_id as run_id_of
from events.results import ChildRunCompleted, ChildRunFailed, InboxMessage
from streams.envelope import Outgoing, cloud_event, envelope, traceparent
from streams.workflow.state import RunEvent, RunState

SOURCE: Final = "orchestrator"


@frozen
class Consequence:
    """A record that follows. `step`: it is of use only while that step awaits `awaited`; None: always.

    `ahead`: it may go before anybody knows whether its decision counts. Calls may: what answers them names the decision's hash.
    Whatever else follows would be taken at its word: a child's result, the end of a call or run that others wait for.
    """

    record: Outgoing
    step: str | None = None
    awaited: str = ""
    ahead: bool = False

    def wanted(self, state: RunState | None) -> bool:
        """Whether it is still worth saying again, where its run stands now; None: the run is over."""
        if self.step is None:
            return True
        step = state.steps.get(self.step) if state else None
        return step is not None and step.awaits == self.awaited and not step.settled


def decision_record(event: RunEvent, body: bytes, partition: int) -> Outgoing:
    """Return the record of a decision. What stands in its headers serves people who filter."""
    decision = event.decision
    headers = cloud_event("Decision", SOURCE, event.hash.hex(), decision.at)
    headers.append(("traceparent", traceparent(decision.run_id, event.hash.hex())))
    headers.append(("foldflow_seq", str(decision.seq).encode()))
    headers.append(("foldflow_input", type(decision.input).__name__.encode()))
    headers.append(("foldflow_effects", ",".join(type(effect).__name__ for effect in decision.effects).encode()))
    return Outgoing(topics.DECISIONS, decision.run_id.encode(), codec.framed(Decision, body), headers, partition)


def consequences(event: RunEvent, parent: Parent | None) -> Iterator[Consequence]:
    """Yield what follows from a decision of a run whose result `parent` waits for."""
    decision = event.decision
    for index, effect in enumerate(decision.effects):
        match effect:
            case LlmCallRequested():
                call_id = effect_id(event.hash, index)
                record = _record(topics.LLM_CALLS, call_id, LlmCall(call_id, decision.run_id, effect), call_id, decision)
                yield Consequence(record, effect.step, call_id, ahead=True)
            case ToolCallRequested():
                call_id = effect_id(event.hash, index)
                record = _record(topics.TOOL_CALLS, call_id, ToolCall(call_id, decision.run_id, effect), call_id, decision)
                yield Consequence(record, effect.step, call_id, ahead=True)
            case ChildRunRequested():
                yield _child(effect, effect_id(event.hash, index), decision)
            case CallCancelled():
                call_id = effect.call_id or _requested(event, effect.step)
                cancel = CancelCall(call_id, decision.run_id, effect.step, effect.reason)
                yield Consequence(_record(topics.CANCELLATIONS, call_id, cancel, f"{call_id}/cancel", decision))
            case ChildRunCancelled():
                child = effect.run_id or run_id_of(_requested(event, effect.step))
                request = RunRequest(child, None, CancelRun(f"run {decision.run_id}", effect.reason, force=False))
                yield Consequence(_record(topics.REQUESTS, child, request, f"{child}/cancel", decision))
            case RunCompleted() | RunFailed() | RunCancelled() if parent is not None:
                result = _result(effect, parent, decision.run_id)
                message = InboxMessage(parent.run_id, result)
                yield Consequence(_record(topics.INBOX, parent.run_id, message, f"{parent.call_id}/result", decision))
            case _:
                pass


def _record(topic: topics.Topic, key: str, event: Any, identity: str, decision: Decision) -> Outgoing:
    return envelope(topic, key, event, source=SOURCE, identity=identity, run_id=decision.run_id, at_ms=decision.at)


def _child(effect: ChildRunRequested, call_id: str, decision: Decision) -> Consequence:
    """Return the request for a child run: intake finds the version, so that the core needs to know no other workflow.

    Always of use: a late one that a former owner wrote would start the child after its end was asked for. It starts once anyway.
    """
    parent = None if effect.detached else Parent(decision.run_id, effect.step, call_id)
    request = WorkflowRequest(effect.workflow, effect.input, call_id, effect.digest, parent=parent)
    return Consequence(_record(topics.REQUESTS, run_id_of(call_id), request, call_id, decision))


def _requested(event: RunEvent, step: str) -> str:
    """Return the id of the call that this very decision requests for a step, to cancel it in the same breath."""
    kinds = (LlmCallRequested, ToolCallRequested, ChildRunRequested)
    found: list[int] = [
        index for index, effect in enumerate(event.decision.effects) if isinstance(effect, kinds) and effect.step == step
    ]
    return effect_id(event.hash, found[-1])


def _result(effect: Effect, parent: Parent, run_id: str) -> ChildRunCompleted | ChildRunFailed:
    match effect:
        case RunCompleted():
            return ChildRunCompleted(parent.call_id, parent.step, run_id, effect.output)
        case RunFailed():
            why = f"{effect.failure.kind}: {effect.failure.message}"
            return ChildRunFailed(parent.call_id, parent.step, run_id, Failure(FailureKind.CHILD_FAILED, why))
        case RunCancelled():
            by = f" by {effect.by}" if effect.by else ""
            failure = Failure(FailureKind.CANCELLED, f"the run was cancelled{by}{': ' if effect.reason else ''}{effect.reason}")
            return ChildRunFailed(parent.call_id, parent.step, run_id, failure)
        case _:
            raise AssertionError(effect)


__all__ = ["SOURCE", "Consequence", "consequences", "decision_record"]
