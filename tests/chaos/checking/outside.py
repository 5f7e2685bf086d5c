"""The rule about side effects: what the witness outside received, against what the ledger says."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from checking.ledger import Ledger
from checking.records import Arrival, Disruption

Finding = tuple[str, str]
BEFORE_MS: Final = 2_000
"""How long before a disruption a call may have been over that it repeats: its result was sent, and not yet committed."""
AFTER_MS: Final = 30_000
"""How long after a disruption's end its consequences may come: sessions run out, groups rebalance, owners take over."""
SEEN_MS: Final = 500
"""How long a result may be on the inbox until who takes over sees it there, on a busy machine."""
_WORKERS: Final = frozenset({"tool", "kafka"})
_OWNERS: Final = frozenset({"orchestrator", "kafka"})


@dataclass(frozen=True, slots=True)
class Made:
    """A call as the witness saw it: how often, first when, and when it was over (its result on the inbox), in milliseconds."""

    arrivals: tuple[Arrival, ...]
    first: int
    over: int


def made(ledger: Ledger) -> dict[str, Made]:
    """Return the calls that the witness received."""
    arrived: dict[str, list[Arrival]] = {}
    for each in ledger.witnessed or ():
        arrived.setdefault(each.call_id, []).append(each)
    found = {}
    for call_id, arrivals in arrived.items():
        times = [each.at_ms for each in arrivals]
        found[call_id] = Made(tuple(arrivals), min(times), max(min(times), ledger.results.get(call_id, max(times))))
    return found


def side_effects_explained(ledger: Ledger) -> Iterator[Finding]:
    """Find what was done outside and not decided; or done twice, or for a loser, though nobody broke anything then."""
    if ledger.witnessed is None:
        return
    calls = made(ledger)
    for call_id, call in calls.items():
        where, first = f"call {call_id}", call.arrivals[0]
        asked, decision = ledger.requested.get(call_id, (None, None))
        if asked is None or decision is None:
            yield where, f"step {first.step} of run {first.run_id} was done, and nobody decided it"
            continue
        said = (decision.run_id, asked.step, asked.attempt, asked.tool)
        for each in call.arrivals:
            if (each.run_id, each.step, each.attempt, each.tool) != said:
                yield where, f"the witness has {each}, the ledger {said}"
        if len(call.arrivals) > 1 and not _explained(call, ledger, _WORKERS):
            yield where, f"done {len(call.arrivals)} times ({_times(call)}): nothing happened to a tool worker or to Kafka then"
        if decision.verdict != "accepted" and not _explained(call, ledger, _OWNERS):
            yield where, f"done for {decision.where}, which was overtaken ({_times(call)}): nothing happened to an orchestrator"
    yield from _not_done(ledger, calls)
    repeats = _repeats(calls)
    if repeats > (most := _in_flight(calls, ledger.disruptions)):
        yield "witness.jsonl", f"{repeats} repeated calls, though at most {most} were in flight when something was broken"


def _not_done(ledger: Ledger, calls: dict[str, Made]) -> Iterator[Finding]:
    """Yield steps that are completed by a call that nobody made, or that has no result."""
    tools = {each.tool for each in ledger.witnessed or ()}
    for chain in ledger.chains.values():
        latest: dict[str, str | None] = {}
        for each in chain:
            if each.kind == "ToolCallCompleted" and not each.ignored and each.named in ledger.requested:
                asked, _ = ledger.requested[each.named]
                if asked.tool in tools and each.named not in calls:
                    yield each.where, f"call {each.named} of `{asked.tool}` has a result, and was never made"
            for step in each.completed:
                call_id = latest.get(step)
                if call_id is not None and call_id not in ledger.results and each.kind != "ChangeOutput":
                    yield each.where, f"step {step} is completed, and its call {call_id} has no result"
            for call in each.calls:
                latest[call.step] = call.call_id if call.tool in tools else None


def _explained(call: Made, ledger: Ledger, roles: frozenset[str]) -> bool:
    return any(
        each.role in roles and each.at_ms - BEFORE_MS <= call.over and each.until_ms + AFTER_MS >= call.first
        for each in ledger.disruptions
    )


def _in_flight(calls: dict[str, Made], disruptions: Iterable[Disruption]) -> int:
    """Return how many calls were under way whenever a worker or Kafka was broken: received before, no result on the inbox yet."""
    begun, over = _sorted(calls)
    times = [each.at_ms for each in disruptions if each.role in _WORKERS and each.kind != "start"]
    return sum(bisect_right(begun, at) - bisect_left(over, at) for at in times)


def side_effect_figures(ledger: Ledger) -> dict[str, int]:
    """Return what was counted of side effects; nothing without a witness."""
    if ledger.witnessed is None:
        return {}
    calls = made(ledger)
    verdicts = Counter(ledger.requested[call][1].verdict for call in calls if call in ledger.requested)
    kills = [each for each in ledger.disruptions if each.kind == "kill"]
    return {
        "disruptions": len(ledger.disruptions),
        "calls_witnessed": len(calls),
        "calls_witnessed_of_losers": verdicts["loser"],
        "repeats": _repeats(calls),
        "repeats_after_result": sum(each.at_ms > call.over + SEEN_MS for call in calls.values() for each in call.arrivals),
        "in_flight_at_kills": _in_flight(calls, kills),
        "in_flight_at_disruptions": _in_flight(calls, ledger.disruptions),
        "calls_witnessed_without_result": len(calls.keys() - ledger.results.keys()),
    }


def _repeats(calls: dict[str, Made]) -> int:
    return sum(len(call.arrivals) - 1 for call in calls.values())


def _sorted(calls: dict[str, Made]) -> tuple[list[int], list[int]]:
    return sorted(call.first for call in calls.values()), sorted(call.over for call in calls.values())


def _times(call: Made) -> str:
    return f"received at {', '.join(str(each.at_ms) for each in call.arrivals[:9])}, over at {call.over}"
