"""The ledger protocol under any interleaving that Kafka allows: `memory.Watch` says what must hold, `moves` what may happen."""

import os
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from memory import World
from scenarios import FAMILIES, HISTORIES, ONE, START, TWO
from schedules import Setup, follow, play

from events.catalog import EFFECTS, INPUTS
from streams.workflow.chain import Verdict

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
MANY = settings(max_examples=20_000 if THOROUGH else 400, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
SOME = settings(MANY, max_examples=5_000 if THOROUGH else 80)
CHOICE = st.integers(0, (1 << 16) - 1)
SCHEDULES = st.lists(CHOICE, min_size=2, max_size=40) | st.lists(CHOICE, min_size=50, max_size=150)


def played(setup: Setup, choices: list[int]) -> World:
    """Run a schedule; what happened stands in the note when it ends badly."""
    trace: list[str] = []
    try:
        return play(setup, choices, trace)
    finally:
        note("\n".join(trace))


@MANY
@given(SCHEDULES)
def test_one_version(choices: list[int]) -> None:
    """Duplicates, two owners, ended tenures, late and lost records, resets: the same legal history for every reader."""
    played(ONE, choices)


@MANY
@given(SCHEDULES)
def test_two_versions(choices: list[int]) -> None:
    """The same when the owners' code versions decide differently: every accepted decision is its writer's, none is mixed."""
    played(TWO, choices)


@MANY
@given(SCHEDULES)
def test_three_owners(choices: list[int]) -> None:
    """The same with three processes that all believe they own the partition."""
    played(replace(TWO, owners=3), choices)


@pytest.mark.parametrize("name", FAMILIES)
@SOME
@given(SCHEDULES)
def test_runs_of_all_kinds(name: str, choices: list[int]) -> None:
    """The same with child runs, loops, blocks, payloads, people, time limits, what is undone: and all that people may say."""
    played(FAMILIES[name][0], choices)


@pytest.mark.parametrize("name", FAMILIES)
@SOME
@given(SCHEDULES)
def test_runs_of_all_kinds_in_two_versions(name: str, choices: list[int]) -> None:
    """The same when two versions of the code decide differently: nothing but calls follows from what doesn't count."""
    played(FAMILIES[name][1], choices)


@pytest.mark.parametrize("name", FAMILIES)
@SOME
@given(SCHEDULES)
def test_runs_that_wait_out_of_memory(name: str, choices: list[int]) -> None:
    """The same when runs have snapshots: who waits a little goes out of memory, who is busy for long does not.

    And when the index of finished runs is packed: readers begin at the last pack that a commit names.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streams.processors.open_runs._LONG_HOLD", 6)
        played(replace(FAMILIES[name][0], idle_ms=2 if choices[0] % 2 else 20, pack_at=1 + choices[1] % 3), choices)


@SOME
@given(SCHEDULES)
def test_many_short_runs_whose_index_is_packed(choices: list[int]) -> None:
    """Two versions of the code, and packs all the time: no finished run comes back, whichever commit somebody starts from."""
    played(replace(TWO, pack_at=1 + choices[0] % 2), choices)


# --- Schedules that once ended badly ---


@pytest.mark.parametrize("name", HISTORIES)
def test_known_schedules(name: str) -> None:
    """Each schedule comes to rest with a legal history."""
    follow(*HISTORIES[name])


def test_an_overtaken_owner_takes_over_again() -> None:
    """Given two owners with different code, when both decide the same input, then the later one in the log takes over again."""
    setup = replace(TWO, requests=TWO.requests[:1])
    both = ("ask single", *START, *(label.replace("A", "B", 1) for label in START), "A takes", "B takes")
    world = follow(setup, (*both, "A's decision", "B's decision", "B's record", "B settles", "B reads the snapshots"))
    assert Verdict.OVERTAKEN in world.watch.verdicts


def test_the_search_meets_every_input_and_every_effect() -> None:
    """In seeded schedules of all families decisions with each type of the catalogue are accepted."""
    seen: Counter[str] = Counter()
    chance = random.Random(7)  # noqa: S311 - reproducible, no secret
    for _ in range(40):
        for setup in (ONE, *(family[0] for family in FAMILIES.values())):
            choices = [chance.randrange(1 << 16) for _ in range(chance.choice([40, 150]))]
            for events in play(setup, choices).watch.accepted.values():
                seen.update(type(event.decision.input).__name__ for event in events)
                seen.update(type(effect).__name__ for event in events for effect in event.decision.effects)
    missing = {kind.__name__ for kind in (*INPUTS, *EFFECTS)} - seen.keys()
    print(f"\naccepted: {dict(sorted(seen.items()))}")  # noqa: T201 - shown with -s
    assert missing == set()
