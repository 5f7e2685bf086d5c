from dataclasses import replace

import pytest

from events import codec
from events.decisions import Decision, Effect, InputIgnored, RunCompleted
from events.ids import FIRST_PREV, chain_hash
from events.results import TimerFired
from streams.workflow.chain import Chain, Verdict

ACCEPTED, OVERTAKEN, BROKEN = Verdict.ACCEPTED, Verdict.OVERTAKEN, Verdict.BROKEN


def decision(
    prev: Decision | None = None, *effects: Effect, run: str = "r", offset: int | None = None, said: str = "t"
) -> Decision:
    """Return a decision on top of another one of its run."""
    seq = prev.seq + 1 if prev else 1
    head = hash_of(prev) if prev else FIRST_PREV
    where = seq if offset is None else offset
    return Decision(run, seq, head, b"i" * 16, where, 0, TimerFired(said, "s"), effects or (InputIgnored("late"),))


def hash_of(each: Decision) -> bytes:
    """Return a decision's place in the chain."""
    return chain_hash(codec.body(each))


def verdicts(*log: Decision, chain: Chain | None = None, start: int = 0) -> list[Verdict]:
    """Let a reader judge a log from its beginning."""
    reader = chain or Chain()
    return [reader.judge(offset, each, hash_of(each)) for offset, each in enumerate(log, start)]


FIRST = decision()
SECOND = decision(FIRST)
THIRD = decision(SECOND)
LAST = decision(SECOND, RunCompleted("1"))
OTHER = decision(FIRST, said="other")


def test_a_chain_counts() -> None:
    """Given each decision on top of the one before, then all count."""
    assert verdicts(FIRST, SECOND, THIRD) == [ACCEPTED] * 3


def test_runs_have_chains_of_their_own() -> None:
    """Given two runs that take turns, then both count."""
    there = decision(run="there")
    assert verdicts(FIRST, there, SECOND, decision(there, run="there")) == [ACCEPTED] * 4


def test_a_duplicate_does_not_count() -> None:
    """Given the same records twice, as owners with the same code write them, then the first of each counts."""
    assert verdicts(FIRST, FIRST, SECOND, FIRST, SECOND, THIRD) == [ACCEPTED, OVERTAKEN, ACCEPTED, OVERTAKEN, OVERTAKEN, ACCEPTED]


def test_the_first_on_top_of_a_head_wins() -> None:
    """Given two different decisions on one state, then the second and whatever extends it have lost, and that is no break."""
    chain = Chain()
    after = decision(OTHER)
    log = (FIRST, SECOND, OTHER, after, decision(after), THIRD)
    assert verdicts(*log, chain=chain) == [ACCEPTED, ACCEPTED, OVERTAKEN, OVERTAKEN, OVERTAKEN, ACCEPTED]
    assert (chain.broken, chain.ignored) == ({}, 3)


def test_nothing_follows_the_end() -> None:
    """Given a run that is over, then nothing counts any more, however honest."""
    assert verdicts(FIRST, SECOND, LAST, decision(LAST), FIRST, decision(decision(LAST))) == [ACCEPTED] * 3 + [OVERTAKEN] * 3


@pytest.mark.parametrize("changed", [{"at": 1}, {"input_offset": 9}, {"input": TimerFired("u", "s")}, {"effects": ()}])
def test_a_changed_byte_breaks_the_run(changed: dict[str, object]) -> None:
    """Given a decision in which somebody changed anything, then what follows it extends nothing: the run is set aside."""
    chain = Chain()
    log = (FIRST, replace(SECOND, **changed), THIRD, decision(run="there"), decision(THIRD))  # type: ignore[arg-type]
    assert verdicts(*log, chain=chain) == [ACCEPTED, ACCEPTED, BROKEN, ACCEPTED, Verdict.SET_ASIDE]
    assert "offset 2: decision 3 of run r extends nothing" in chain.broken["r"]


def test_a_missing_record_breaks_the_run() -> None:
    """Given a log without one decision in the middle, or without the first, then its run is set aside."""
    assert verdicts(FIRST, THIRD) == [ACCEPTED, BROKEN]
    assert verdicts(SECOND) == [BROKEN]


def test_a_seq_that_does_not_fit_does_not_count() -> None:
    """Given a right `prev` and a wrong number, then the record breaks the run or loses, but never counts."""
    for seq in (0, 1, 3, -5):
        assert verdicts(FIRST, replace(SECOND, seq=seq))[1] is not ACCEPTED


def test_a_run_that_finished_before_the_mark_is_passed_over() -> None:
    """Given the index, when reading starts inside a finished run or behind it, then nothing of it counts again."""
    chain = Chain({"r": 1})
    assert verdicts(THIRD, FIRST, chain=chain, start=2) == [Verdict.FINISHED_BEFORE] * 2
    assert chain.broken == {}


def test_a_finished_run_that_began_at_the_mark_is_read() -> None:
    """Given an index entry at or behind the mark, then the run is read like any other."""
    assert verdicts(FIRST, SECOND, LAST, chain=Chain({"r": 2}), start=2) == [ACCEPTED] * 3


def test_heads_say_where_a_run_began() -> None:
    """Given losers before it, then `first` is the offset of the first decision that counts."""
    chain = Chain()
    verdicts(decision(run="there"), FIRST, FIRST, SECOND, chain=chain)
    assert (chain.heads["r"].first, chain.heads["r"].seq, chain.heads["there"].first) == (1, 2, 0)


def test_a_forgotten_run_does_not_start_again() -> None:
    """Given a run that is over, in the index and forgotten, when a late duplicate of its first decision comes, then it loses."""
    finished: dict[str, int] = {}
    chain = Chain(finished)
    verdicts(FIRST, SECOND, LAST, chain=chain)
    finished["r"] = 0
    chain.heads.pop("r")
    assert verdicts(FIRST, chain=chain, start=3) != [ACCEPTED]
