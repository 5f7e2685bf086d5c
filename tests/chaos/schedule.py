"""When what is broken, and how: a plan made from a seed before anything runs. Pure: the same arguments, the same plan.

A role has slots (`tool-1`, `tool-2` …), each of which one process fills. A plan is a list of disruptions, each of which makes one
slot go without a working process for a while:

| kind | begins with | ends with |
|---|---|---|
| kill | SIGKILL | a new process |
| stop | SIGSTOP for longer than the session time-out: others take over, and then a zombie wakes | SIGCONT |
| terminate | SIGTERM, as at a deployment | a new process |
| extra | a process more than there were: the partitions are shared out anew | SIGTERM |

No slot is disrupted longer than `LONGEST_S`, and none again before it had time to work, so a role is never at zero for longer
than that plus a process's start.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["kill", "stop", "terminate", "extra"]
KINDS: Final[tuple[Kind, ...]] = ("kill", "stop", "terminate", "extra")

CONTROLLER: Final = "kafka-controller"
"""Stands for the broker that is the active controller when the time comes."""
LONGEST_S: Final = 14.0
"""The longest that a slot is without a working process on purpose."""
LEAST_WORK_S: Final = 10.0
"""How long a slot is left alone after a disruption: its process starts, joins its group and does some work."""
WARM_UP_S: Final = 6.0
"""From when on something is broken: the first runs are under way by then."""


@dataclass(frozen=True, slots=True)
class Role:
    """A kind of process. `slots`: filled from the start; `extra`: more of them that may come and go; the rest are shares."""

    slots: int
    extra: int
    kills: float
    stops: float
    terminates: float


ROLES: Final[Mapping[str, Role]] = {
    "orchestrator": Role(slots=2, extra=1, kills=0.28, stops=0.35, terminates=0.30),
    "tool": Role(slots=2, extra=1, kills=0.22, stops=0.25, terminates=0.25),
    "intake": Role(slots=1, extra=1, kills=0.14, stops=0.15, terminates=0.15),
    "llm": Role(slots=1, extra=1, kills=0.11, stops=0.10, terminates=0.10),
    "api": Role(slots=1, extra=0, kills=0.11, stops=0.05, terminates=0.10),
    "kafka": Role(slots=1, extra=0, kills=0.14, stops=0.10, terminates=0.10),
}
"""How many there are of each kind of process, and how the kills, stops and terminations are shared out among the kinds."""


@dataclass(frozen=True, slots=True)
class Disruption:
    """One thing that is done to one slot, `at_s` seconds after the load began, for `for_s` seconds."""

    at_s: float
    kind: Kind
    role: str
    name: str
    for_s: float


def plan(seed: int, seconds: float, kills: int, session_timeout_s: float, brokers: int = 1) -> list[Disruption]:
    """Return what is done to whom within `seconds`, in order of time: `kills` kills, and a third as many of each other kind.

    Raises ValueError when so many kills don't fit.
    """
    chance = random.Random(f"schedule-{seed}")  # noqa: S311 - a reproducible plan, no secret
    wanted: list[tuple[Kind, str]] = []
    others = max(3, round(kills / 3))
    wanted += [("kill", role) for role in _shared_out(kills, {name: role.kills for name, role in ROLES.items()}, least=1)]
    wanted += [("stop", role) for role in _shared_out(others, {name: role.stops for name, role in ROLES.items()})]
    wanted += [("terminate", role) for role in _shared_out(others, {name: role.terminates for name, role in ROLES.items()})]
    wanted += [("extra", role) for role in _shared_out(others, {name: float(role.extra) for name, role in ROLES.items()})]
    found: list[Disruption] = []
    for role in ROLES:
        kinds = [kind for kind, whose in wanted if whose == role]
        chance.shuffle(kinds)
        found += _spread(chance, role, kinds, seconds, session_timeout_s, brokers)
    last = max((each.at_s for each in found), default=0.0)
    if last > seconds:
        raise ValueError(f"{kills} kills don't fit into {seconds:.0f} s: the last one would be at {last:.0f} s")
    return sorted(found, key=lambda each: (each.at_s, each.name))


def _spread(
    chance: random.Random, role: str, kinds: Sequence[Kind], seconds: float, session_timeout_s: float, brokers: int
) -> Iterator[Disruption]:
    """Yield the disruptions of a role: spread evenly, with chance in it; where a slot is taken, as soon as it is free again."""
    free_at = dict.fromkeys((*slots(role, brokers), *extras(role)), WARM_UP_S)
    for number, kind in enumerate(kinds):
        names = extras(role) if kind == "extra" else slots(role, brokers)
        for_s = _length(chance, kind, session_timeout_s)
        first = min(free_at[each] for each in names)
        ideal = max(first, WARM_UP_S + (seconds - WARM_UP_S - LONGEST_S) * (number + chance.random()) / len(kinds))
        name = chance.choice([each for each in names if free_at[each] <= ideal])
        # Brokers one after the other: with two of three gone nothing is acknowledged, and that is no fault.
        for each in names if role == "kafka" else (name,):
            free_at[each] = ideal + for_s + LEAST_WORK_S
        if role == "kafka" and brokers > 1 and number % 3 == 0:
            name = CONTROLLER
        yield Disruption(round(ideal, 2), kind, role, name, round(for_s, 2))


def slots(role: str, brokers: int = 1) -> list[str]:
    """Return the names of the processes of a role that are there from the start."""
    return [f"{role}-{number + 1}" for number in range(brokers if role == "kafka" else ROLES[role].slots)]


def extras(role: str) -> list[str]:
    """Return the names of the processes of a role that come and go."""
    return [f"{role}-{ROLES[role].slots + number + 1}" for number in range(ROLES[role].extra)]


def _length(chance: random.Random, kind: Kind, session_timeout_s: float) -> float:
    match kind:
        case "kill":
            return chance.choice((0.0, 0.5, 2.0, 4.0, 8.0))  # at once as a supervisor does; longer than the session time-out
        case "stop":
            return min(LONGEST_S, session_timeout_s + chance.uniform(2.0, 5.0))
        case "terminate":
            return chance.choice((0.0, 1.0, 10.0))
        case "extra":
            return chance.uniform(5.0, LONGEST_S)


def _shared_out(total: int, shares: Mapping[str, float], least: int = 0) -> Iterator[str]:
    """Yield each name as often as it gets of `total` by its share (largest remainder), at least `least` times."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items() if share}
    given = {name: max(least, int(each)) for name, each in exact.items()}
    by_rest = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for name in by_rest[: max(0, total - sum(given.values()))]:
        given[name] += 1
    for name, times in given.items():
        yield from [name] * times
