"""Schedules: choices, or labels, pick what happens in a `World`; then everything comes to rest, and people answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memory import KINDS, Owner, Said, World, moves
from watch import ViolationError, Watch

from events.commands import ApprovalAnswered, Command, ResumeRun, SignalReceived, StartRun
from events.decisions import ApprovalRequested, Decision, SignalAwaited
from streams.processors.intake import Intake
from streams.processors.tenure import Specs, Tenure
from streams.workflow.chain import Chain, Verdict
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunState, StepStatus

OFTEN = {"cancel": (0, 0, 0, 1), "hold": (0, 0, 1, 2), "change": (0, 0, 0, 1)}
"""How likely things of a kind are in each of four moods, so that some runs get far; (1, 0, 3, 6) for all others."""
MOST_TURNS = 20
"""How often people answer at last, before a run counts as stuck."""


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
    says: tuple[Said, ...] = ()
    idle_ms: int = 1 << 60
    pack_at: int = 1 << 60


@dataclass(frozen=True)
class Versions:
    """Where intake finds workflow versions: the first ones, whatever code owners have."""

    specs: tuple[WorkflowSpec, ...]

    def get(self, version: str) -> WorkflowSpec | None:
        """Return a version by its digest."""
        return next((spec for spec in self.specs if spec.digest == version), None)

    def newest(self, workflow: str) -> WorkflowSpec | None:
        """Return the newest version of a workflow."""
        return next((spec for spec in self.specs if spec.name == workflow), None)

    def names(self) -> list[str]:
        """Return the names of all workflows."""
        return [spec.name for spec in self.specs]

    def refresh(self) -> None:
        """All are known."""


def opened(setup: Setup) -> tuple[World, list[Owner]]:
    """Return an empty partition and the processes that may own it."""
    digests = [spec.digest for spec in setup.versions[0]]
    by_version: dict[int, Specs] = {
        number: dict(zip(digests, specs, strict=True)).get for number, specs in enumerate(setup.versions)
    }
    watch = Watch(by_version, len(setup.versions) == 1, setup.chain, setup.identity, setup.all_again)
    intake = Intake(Versions(setup.versions[0]), b"r" * 16, watch.payloads)
    world = World(watch, intake, setup.requests, setup.says)
    numbered = enumerate("ABC"[: setup.owners])
    code, make = len(setup.versions), setup.owner_type
    return world, [make(name, world, number % code, setup.tenure_type, setup.idle_ms, setup.pack_at) for number, name in numbered]


def some(requests: tuple[StartRun, ...], mood: int) -> tuple[StartRun, ...]:
    """Return the requests that a mood has; never none."""
    return tuple(request for bit, request in enumerate(requests) if not mood >> bit & 1) or requests[:1]


def some_says(says: tuple[Said, ...], mood: int) -> tuple[Said, ...]:
    """Return what people may say in a mood: about half of it."""
    return tuple(said for bit, said in enumerate(says) if (mood * 40_503 >> bit % 16) & 1)


def play(setup: Setup, choices: Sequence[int], trace: list[str] | None = None) -> World:
    """Let the choices pick what happens, then let everything come to rest. Raises ViolationError.

    Each choice is a number below 1 << 16; the first two say which requests, kinds of faults and words there are, every other one
    picks one of the possible moves by their weights.
    """
    labels: list[str] = [] if trace is None else trace
    mood, faults, *picks = (*choices, 0)
    faults |= mood >> 8 << 16
    world, owners = opened(replace(setup, requests=some(setup.requests, mood), says=some_says(setup.says, mood ^ faults >> 3)))
    often = {"": 1} | {kind: OFTEN.get(kind, (1, 0, 3, 6))[faults >> 2 * place & 3] for place, kind in enumerate(KINDS)}
    for choice in picks:
        possible = moves(world, owners)
        weights = [move.weight * often[move.kind] for move in possible]
        at = choice * sum(weights) >> 16
        for move, weight in zip(possible, weights, strict=True):
            at -= weight
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
    """Without further faults everything comes to rest, people answer, and whoever takes over then has nothing to decide."""
    _drain(world, owners, labels, most)
    for turn in range(MOST_TURNS):
        waiting = {run: state for run, state in world.watch.states.items() if not state.over}
        if not waiting:
            break
        world.watch.at_rest(world)
        for run, state in waiting.items():
            for command in answers(state, turn):
                labels.append(f"then {command} for {run[:4]}")
                world.send(run, command)
        _drain(world, owners, labels, most)
    world.watch.at_rest(world, last=True)
    before = len(world.decisions)
    for owner in owners:
        owner.phase = "idle"
    _drain(world, owners[:1], labels, most)
    world.watch.at_rest(world, last=True)
    if Verdict.ACCEPTED in world.watch.verdicts[before:]:
        raise ViolationError("stuck", "a new owner still had something to decide after everything came to rest")


def answers(state: RunState, turn: int) -> list[Command]:
    """Return what people say at last to a run that waits for them."""
    said: list[Command] = [ResumeRun("ann", single=False)] if state.held or state.paused else []
    for path, step in state.steps.items():
        if step.status is StepStatus.AWAITING_APPROVAL and isinstance(step.asked, ApprovalRequested):
            said.append(ApprovalAnswered(path, True, "ann", "", None))
        elif step.status is StepStatus.AWAITING_SIGNAL and isinstance(step.asked, SignalAwaited):
            said.append(SignalReceived(f"last {path} {turn}", step.asked.signal, step.asked.correlation, "1", "ann"))
    return said


def _drain(world: World, owners: list[Owner], labels: list[str], most: int) -> None:
    """Let whoever lives go on, in turn, until nobody can."""
    for turn in range(most):
        alive = [owner for owner in owners if owner.phase != "idle"] or owners[:1]
        possible = [move for move in moves(world, alive) if not move.fault]
        late = [move for move in possible if move.label == "time passes"]
        if possible == late and (not late or _idle(alive)):
            return
        busy = [move for move in possible if move not in late] or late
        move = busy[turn % len(busy)]
        labels.append(f"then {move.label}")
        move.do()
    raise ViolationError("no end", f"after {most} steps nothing has come to rest")


def _idle(owners: list[Owner]) -> bool:
    """Say whether the timers that are left belong to attempts that were settled long ago."""
    shelved = any(owner.tenure.shelf.next_due() is not None for owner in owners)
    return not shelved and not any(owner.tenure._pending(timer) for owner in owners for timer in owner.tenure._timers)
