"""What is asked of Foldflow while it is being broken: a plan made from a seed before anything runs. Pure.

Six workflows (`workflows/`) use between them whatever the core can do. Each request says how its run must end. Requests come
steadily, whatever becomes of them (an open loop): as JSON, as console tools do it, and as Avro; some twice; some without an id.
Signals, cancellations and the like have their request's key, so they come to the run after its start; whether that is before the
run waits for them is chance. Approvals are given when they are asked for: `Load.answers`.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from events import topics
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    Command,
    PauseRun,
    ResumeRun,
    RunRequest,
    SignalReceived,
    WorkflowRequest,
)
from events.decisions import ApprovalRequested, Effect, SignalAwaited
from events.ids import run_id
from streams.envelope import Outgoing, envelope

Outcome = Literal["completed", "failed", "cancelled", "any"]

TWICE: Final = 0.03
"""Share of the requests that are sent a second time, at once or later."""
NAMELESS: Final = 0.02
"""Share of the orders without an id of their own: where they stand is their identity."""
PAUSED: Final = 0.2
"""Share of the runs that wait for a person that are paused, and resumed a little later."""
ASKING: Final = 0.01
"""Share of the orders that ask the real model."""


@dataclass(frozen=True, slots=True)
class Request:
    """A run that is asked for. `name`: its request id, or what we call it if it has none (`nameless`)."""

    name: str
    workflow: str
    input: Mapping[str, Any]
    expect: Outcome
    nameless: bool = False
    avro: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """What is produced, `at_s` seconds after the load began. `request` None: a command."""

    at_s: float
    record: Outgoing
    request: Request | None


class Load:
    """The messages of one seed, and what is answered when runs ask."""

    def __init__(self, seed: int, runs: int, seconds: float) -> None:
        self.messages: list[Message] = []
        self._patient: dict[str, Request] = {}
        self._signalled: set[str] = set()
        for number in range(runs):
            chance = random.Random(f"load-{seed}-{number}")  # noqa: S311 - a reproducible load, no secret
            at_s = (number + chance.random()) * seconds / runs
            request = _request(chance, f"chaos-{seed}-{number}")
            self.messages += self._of(chance, request, at_s, seconds)
        self.messages.sort(key=lambda each: each.at_s)

    def _of(self, chance: random.Random, request: Request, at_s: float, seconds: float) -> Iterator[Message]:
        yield Message(at_s, _asking(request), request)
        if not request.nameless and chance.random() < TWICE:
            later = min(seconds, at_s + chance.choice((0.0, 0.1, 5.0, 20.0)))
            yield Message(later, _asking(replace(request, avro=not request.avro)), request)
        if request.expect == "cancelled":
            cancel = CancelRun("chaos", "changed our mind", force=False)
            yield Message(at_s + chance.choice((0.0, 0.05, 0.2, 1.0, 3.0)), _saying(request, cancel), None)
        if request.workflow == "chaos-patient":
            self._patient[run_id(request.name)] = request
            if chance.random() < PAUSED:
                paused_s = at_s + chance.random()
                yield Message(paused_s, _saying(request, PauseRun("chaos", "wait")), None)
                yield Message(paused_s + chance.choice((0.0, 0.5, 5.0)), _saying(request, ResumeRun("chaos", single=False)), None)
            if chance.random() < 0.5:  # the other half is signalled when it waits
                self._signalled.add(run_id(request.name))
                for _ in range(chance.choice((1, 1, 1, 2))):  # the same signal twice counts once
                    yield Message(at_s + chance.random(), _saying(request, _payment(request)), None)

    def answers(self, run: str, effect: Effect) -> Iterator[Outgoing]:
        """Yield what is said to a run that waits for it."""
        request = self._patient.get(run)
        if request is None:
            return
        match effect:
            case SignalAwaited() if run not in self._signalled:
                self._signalled.add(run)
                yield _saying(request, _payment(request))
            case ApprovalRequested(step=step):
                yield _saying(request, ApprovalAnswered(step, request.expect == "completed", "chaos", "as planned", None))


def _order(chance: random.Random) -> tuple[dict[str, Any], Outcome]:
    seconds = round(chance.uniform(0.2, 2.0), 2) if chance.random() < 0.2 else 0
    asks = chance.random() < ASKING
    return {"number": chance.randrange(1000), "fails": chance.choice((0, 0, 1, 2)), "seconds": seconds, "ask": asks}, "completed"


def _crowd(chance: random.Random) -> tuple[dict[str, Any], Outcome]:
    return {"numbers": [chance.randrange(100) for _ in range(chance.randint(5, 10))]}, "completed"


def _patient(chance: random.Random) -> tuple[dict[str, Any], Outcome]:
    return {"nap": f"{chance.randint(100, 4000)}ms"}, "completed" if chance.random() < 0.8 else "failed"


def _trip(_: random.Random) -> tuple[dict[str, Any], Outcome]:
    return {"sold_out": True}, "failed"


def _stranded(_: random.Random) -> tuple[dict[str, Any], Outcome]:
    return {"sold_out": False}, "cancelled"  # nobody ever sends the signal that it waits for


def _family(chance: random.Random) -> tuple[dict[str, Any], Outcome]:
    return {"number": chance.randrange(1000)}, "completed"


_SHARES: Final[tuple[tuple[int, str, Callable[[random.Random], tuple[dict[str, Any], Outcome]]], ...]] = (
    (52, "chaos-order", _order),
    (10, "chaos-crowd", _crowd),
    (12, "chaos-patient", _patient),
    (8, "chaos-trip", _trip),
    (10, "chaos-trip", _stranded),
    (8, "chaos-family", _family),
)
"""How the runs are shared out among the workflows, in percent."""


def _request(chance: random.Random, name: str) -> Request:
    _, workflow, make = chance.choices(_SHARES, [share for share, _, _ in _SHARES])[0]
    values, expect = make(chance)
    if workflow == "chaos-patient":
        values["order"] = name
    nameless = workflow == "chaos-order" and chance.random() < NAMELESS
    return Request(name, workflow, values, expect, nameless, avro=chance.random() < 0.5)


def _payment(request: Request) -> SignalReceived:
    return SignalReceived(f"{request.name}/paid", "payment", request.name, '{"eur": 9}', "chaos")


def _asking(request: Request) -> Outgoing:
    identity = None if request.nameless else request.name
    if request.avro:
        asked = WorkflowRequest(request.workflow, json.dumps(request.input), identity)
        return envelope(topics.REQUESTS, request.name, asked, source="chaos", identity=request.name)
    said = {"workflow": request.workflow, "input": request.input} | ({} if identity is None else {"request_id": identity})
    return _json(request, said)


def _saying(request: Request, command: Command) -> Outgoing:
    """Return a command for a request's run, under the request's key: it comes after the request."""
    if request.avro:
        said = RunRequest(None, request.name, command)
        return envelope(topics.REQUESTS, request.name, said, source="chaos", identity=f"{request.name}/said")
    words: dict[str, Any] = {"request_id": request.name}
    match command:
        case SignalReceived():
            words |= {"command": "signal", "name": command.name, "correlation": command.correlation, "by": command.by}
            words |= {"signal_id": command.signal_id, "payload": json.loads(command.payload)}
        case ApprovalAnswered():
            words |= {"command": "approve" if command.approved else "reject", "step": command.step, "by": command.by}
        case PauseRun():
            words |= {"command": "pause", "by": command.by, "reason": command.reason}
        case ResumeRun():
            words |= {"command": "resume", "by": command.by}
        case CancelRun():
            words |= {"command": "cancel", "by": command.by, "reason": command.reason}
        case _:
            raise NotImplementedError(type(command).__name__)
    return _json(request, words)


def _json(request: Request, said: Mapping[str, Any]) -> Outgoing:
    return Outgoing(topics.REQUESTS, request.name.encode(), json.dumps(said).encode(), [])
