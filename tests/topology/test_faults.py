"""What no check has foreseen fails one run, and never stops a partition."""

from typing import Any

import pytest

from events import codec, topics
from events.calls import ToolCall
from events.commands import StartRun
from events.decisions import (
    CallCancelled,
    ChildRunCancelled,
    DeadLetter,
    Decision,
    RunCompleted,
    RunFailed,
    StepCancelled,
    UnreadableInput,
)
from events.failure import FailureKind
from events.ids import run_id
from events.results import InboxMessage, TimerFired, ToolCallCompleted
from streams.envelope import Incoming, Outgoing
from streams.processors.tenure import Commit, NewerCodeError, Place, Tenure
from streams.workflow.chain import Verdict
from streams.workflow.spec import WorkflowSpec

GOOD = WorkflowSpec.model_validate({"name": "good", "steps": {"a": {"transform": 1}}})


class Faulty:
    """A definition with a fault of ours in it."""

    @property
    def plan(self) -> Any:
        """Fail as a fault would."""
        raise RuntimeError("a fault")


def tenure() -> Tenure:
    versions: dict[str, Any] = {"good": GOOD, "faulty": Faulty()}
    begun = Tenure(Place(b"i" * 16, b"d" * 16, 0, 1), versions.get, Commit(0, 0))
    begun.begin(0)
    return begun


def message(offset: int, run: str, value: bytes) -> Incoming:
    return Incoming("inbox", 0, offset, 1000 + offset, run.encode(), value)


def start(offset: int, request: str, digest: str) -> Incoming:
    run = run_id(request)
    return message(offset, run, codec.encode(InboxMessage(run, StartRun(request, "w", digest, "{}"))))


def decided(records: list[Outgoing]) -> Decision:
    (record,) = (each for each in records if each.topic is topics.DECISIONS)
    return codec.decode(record.value, Decision)


def test_a_fault_in_deciding_fails_that_run_and_the_next_one_goes_on() -> None:
    """Given a definition that makes `decide` raise, then its run fails with a dead letter, and the next input is decided."""
    owner = tenure()
    records = owner.take(start(0, "one", "faulty"))
    decision = decided(records)
    assert isinstance(decision.input, UnreadableInput)
    assert isinstance(decision.effects[-1], RunFailed)
    assert decision.effects[-1].failure.kind == FailureKind.INTERNAL
    (letter,) = (codec.decode(each.value, DeadLetter) for each in records if each.topic is topics.DEADLETTER)
    assert letter.value == start(0, "one", "faulty").value
    assert isinstance(decided(owner.take(start(1, "two", "good"))).effects[-1], RunCompleted)
    assert owner.position == 2


def test_a_run_whose_decision_would_be_too_large_ends_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a child under way, when what follows from an input is too much, then the run fails, and its child is cancelled."""
    monkeypatch.setattr("streams.workflow.decider.MAX_EFFECTS_BYTES", 2000)
    steps = {
        "slow": {"run": {"workflow": "good"}},
        "a": {"tool": {"name": "echo"}},
        "b": {"tool": {"name": "echo", "arguments": {"text": "x" * 3000}}, "needs": ["a"]},
    }
    spec = WorkflowSpec.model_validate({"name": "much", "steps": steps})
    owner = Tenure(Place(b"i" * 16, b"d" * 16, 0, 1), {"much": spec}.get, Commit(0, 0))
    owner.begin(0)
    begun = owner.take(start(0, "one", "much"))
    (call,) = (codec.decode(each.value, ToolCall) for each in begun if each.topic is topics.TOOL_CALLS)
    answer = InboxMessage(call.run_id, ToolCallCompleted(call.call_id, "a", "1", "1", 1))
    effects = decided(owner.take(message(1, call.run_id, codec.encode(answer)))).effects
    assert [type(effect) for effect in effects] == [ChildRunCancelled, StepCancelled, CallCancelled, StepCancelled, RunFailed]


def test_inputs_of_nobody_are_dead_letters() -> None:
    """Given bytes that are no event, a result for an unknown run, a forged run id, then each is a dead letter with its reason."""
    owner = tenure()
    stray = codec.encode(InboxMessage("r", TimerFired("t", "s")))
    forged = codec.encode(InboxMessage("r", StartRun("not r", "w", "good", "{}")))
    reasons = []
    for offset, value in enumerate((b"junk", stray, forged)):
        (record,) = owner.take(message(offset, "r", value))
        reasons.append(codec.decode(record.value, DeadLetter).reason)
    assert reasons == ["unreadable", "unknown_run", "unreadable"]
    assert (owner.position, owner.unsettled) == (3, 0)


def test_who_cannot_read_a_decision_does_not_own_the_partition() -> None:
    """Given a decision in a schema of newer code, then this owner gives up: it would decide that input again for itself alone."""
    owner = Tenure(Place(b"i" * 16, b"d" * 16, 0, 1), {"good": GOOD}.get, Commit(0, 0), newer=lambda *_: True)
    with pytest.raises(NewerCodeError, match="upgrade this process"):
        owner.read(0, codec.FRAME.pack(0, 123456) + b"whatever newer code says")
    assert owner.read(1, b"no framing at all") is Verdict.BROKEN


def test_an_input_that_is_too_large_is_not_even_decoded() -> None:
    """Given three megabytes for a run, then they are a dead letter, and cost no more than that."""
    (record,) = tenure().take(message(0, "r", codec.encode(InboxMessage("r", TimerFired("t", "s" * 3_000_000)))))
    assert codec.decode(record.value, DeadLetter).reason == "too_large"
