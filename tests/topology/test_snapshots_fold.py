"""A snapshot is what the decisions say: of any run that the topology's world can have, after any of its decisions."""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import World
from scenarios import FAMILIES, ONE
from schedules import Setup, play
from watch import PLACE

from events import codec
from events.decisions import Decision
from events.ids import chain_hash
from events.snapshots import RunSnapshot
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.snapshot import keep, restore
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState, StepStatus

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
SOME = settings(max_examples=2_000 if THOROUGH else 15, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
CHOICE = st.integers(0, (1 << 16) - 1)
SCHEDULES = st.lists(CHOICE, min_size=2, max_size=40) | st.lists(CHOICE, min_size=50, max_size=120)
SETUPS = {"calls": ONE} | {name: family[0] for name, family in FAMILIES.items()}
Restore = Callable[[RunSnapshot], RunState]


def kept(run: str, state: RunState) -> bytes:
    """Return a snapshot's bytes."""
    return codec.encode(keep(run, state, PLACE.decisions_id, 5))


def goes_on(world: World, spec: WorkflowSpec | None, state: RunState, said: Decision) -> RunEvent:
    """Return the decision that a state leads to on the input of a recorded one."""
    place = said.input_topic_id, said.input_offset, said.at
    effects = decide(spec, state, said.input, said.at, world.watch.payloads, said.said)
    decision = Decision(said.run_id, state.seq + 1, state.head, *place, said.input, effects, said.said)
    return RunEvent(decision, chain_hash(codec.body(decision)))


def same_everywhere(world: World, back: Restore = restore) -> Iterator[str]:
    """Check each run after each of its decisions; yield the kinds of steps that stood in a snapshot.

    What comes back is the fold of all decisions so far; going on from it to the run's end gives the recorded bytes, and each
    further snapshot on the way the bytes that the fold gives.
    """
    for run, events in world.watch.accepted.items():
        states = [INITIAL]
        for event in events:
            states.append(evolve(states[-1], event))
        spec = world.watch.specs[0](states[-1].digest)
        for number, folded in enumerate(states[1:], 1):
            if folded.over:
                continue
            state = back(codec.decode(kept(run, folded), RunSnapshot))
            assert state == folded, f"run {run} after decision {number}"
            yield from (step.status.value for step in state.steps.values())
            for event, expected in zip(events[number:], states[number + 1 :], strict=True):
                made = goes_on(world, spec, state, event.decision)
                assert made.hash == event.hash, f"run {run}, from decision {number} on: {made.decision} is not {event.decision}"
                state = evolve(state, made)
                assert state.over or kept(run, state) == kept(run, expected)


@pytest.mark.parametrize("name", SETUPS)
@SOME
@given(SCHEDULES)
def test_a_snapshot_is_the_fold_and_goes_on_as_it_does(name: str, choices: list[int]) -> None:
    """Whatever happens to a run, keeping and restoring it at any point changes no byte of its future."""
    for _ in same_everywhere(play(SETUPS[name], choices)):
        pass


def some_world(setup: Setup, seed: int) -> World:
    """Return a world in which a seeded schedule was played."""
    chance = random.Random(seed)  # noqa: S311 - reproducible, no secret
    return play(setup, [chance.randrange(1 << 16) for _ in range(100)])


def test_the_worlds_have_what_a_snapshot_can_hold() -> None:
    """In seeded worlds, steps of every status stood in a snapshot."""
    seen = Counter(
        status for setup in SETUPS.values() for seed in range(3) for status in same_everywhere(some_world(setup, seed))
    )
    print(f"\n{dict(seen)}")  # noqa: T201 - shown with -s
    assert seen.keys() == {status.value for status in StepStatus}


def everywhere(state: RunState, **fields: Any) -> RunState:
    """Return a state in which each step has these fields."""
    return replace(state, steps=state.steps.update({path: replace(step, **fields) for path, step in state.steps.items()}))


FAULTS: dict[str, tuple[str, Callable[[RunState], RunState]]] = {
    "outputs are other ones": ("undone", lambda state: everywhere(state, output='"changed"')),
    "steps forget their attempts": ("calls", lambda state: everywhere(state, attempt=9)),
    "the head is lost": ("calls", lambda state: replace(state, head=bytes(32))),
    "signals are lost": ("people", lambda state: replace(state, signals=())),
    "who has been heard is lost": ("people", lambda state: replace(state, seen=())),
    "what to undo is lost": ("undone", lambda state: replace(state, undo=None)),
    "time limits are lost": ("people", lambda state: replace(state, limit=None)),
    "where to stop is lost": ("children", lambda state: replace(state, stops=frozenset())),
}
"""What a restore may get wrong, and in which of the worlds it shows."""


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_lost_is_noticed(fault: str) -> None:
    """Given a restore that forgets or changes something, then some world shows it."""
    name, change = FAULTS[fault]
    with pytest.raises(AssertionError):
        for_all_worlds(SETUPS[name], lambda each: change(restore(each)))


def for_all_worlds(setup: Setup, back: Restore) -> None:
    """Check seeded worlds with this way of restoring."""
    for seed in range(10):
        for _ in same_everywhere(some_world(setup, seed), back):
            pass
