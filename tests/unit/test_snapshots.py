"""A run that waits for long goes out of memory and comes back as it was."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from events import codec
from events.commands import StartRun
from events.decisions import Decision, FinishedRun, RunCompleted
from events.ids import chain_hash, run_id
from events.results import InboxMessage, TimerFired
from events.snapshots import RunSnapshot
from events.topics import HOUR_MS
from streams.envelope import Incoming
from streams.processors.shelf import Shelf
from streams.processors.tenure import Commit, Place, Tenure
from streams.testing import Run, given
from streams.workflow.decider import decide
from streams.workflow.definition import parse
from streams.workflow.evolve import evolve
from streams.workflow.payloads import Memory
from streams.workflow.snapshot import keep, next_due, restore
from streams.workflow.state import INITIAL, RunEvent, RunState
from tools.errors import RetryableError, TerminalError

TOPIC = b"d" * 16
RUN = run_id("r")
RICH = parse(
    b"""
name: rich
time_limit: 30d
compensations:
  undo: {tool: {name: echo, arguments: {value: "=output"}}}
steps:
  first: {tool: {name: echo, arguments: {value: 1}}, compensation: undo}
  agent:
    needs: [first]
    repeat: {until: "last > 1", at_most: 5}
    steps:
      think: {tool: {name: count, arguments: {}}}
      rest: {needs: [think], sleep: 1h}
    output: "=steps.think.output"
  many:
    needs: [first]
    for_each: {items: [1, 2, 3, 4], as: x, concurrency: 2, tolerate: 1}
    tool: {name: some, arguments: {x: "=x", big: "=steps.first.output"}}
    retry: {attempts: 2, initial: 1m}
  paid: {needs: [first], wait_for: {signal: paid, correlation: a, timeout: 2d, otherwise: 0}}
  ok: {needs: [many, agent, paid], approval: {message: "ok?", by: [ann], editable: true, deadline: 3d}}
finally:
  tidy: {tool: {name: echo, arguments: {value: "=outcome"}}}
""",
    "rich.yaml",
)


def rich() -> Iterator[Run]:
    """Yield runs that have everything in them that a state can hold."""
    asked: Counter[int] = Counter()

    def some(x: int, big: int) -> int:
        asked[x] += 1
        if x == 4:
            raise TerminalError("no")
        if x == 2 and asked[x] % 2:
            raise RetryableError("later")
        return x * big

    numbers = itertools.count()
    tools = {"echo": lambda value: value, "count": lambda: next(numbers) % 3, "some": some}
    run = given(RICH, tools=tools, break_at=["ok"])
    run.when_signal("paid", 5, correlation="b").when_signal("other", 1).when_paused().when_time_passes("5m").when_resumed()
    run.when_time_passes("4h").when_signal("paid", 7, correlation="a").when_resumed().when_time_passes("1h")
    yield run
    yield given(RICH, tools=tools).when_cancelled("enough")
    yield run.forked(rerun=["many"])


def states(run: Run) -> Iterator[tuple[RunState, Decision]]:
    """Yield each state of a run, and the decision that came next."""
    state = INITIAL
    for decision in run.history:
        if state.seq:
            yield state, decision
        state = evolve(state, RunEvent(decision, chain_hash(codec.body(decision))))


def test_what_comes_back_is_what_went() -> None:
    """Whatever state a run is in, its snapshot gives that state, and the same decision on the next input."""
    seen = 0
    for run in rich():
        for state, decision in states(run):
            if state.over:
                continue
            kept = codec.decode(codec.encode(keep("r", state, TOPIC, 7)), RunSnapshot)
            back = restore(kept)
            assert back == state
            assert (kept.first_offset, kept.seq, kept.due) == (7, state.seq, next_due(state))
            if state.digest == RICH.digest:
                assert decide(RICH, back, decision.input, decision.at, Memory()) == decision.effects
                seen += 1
    assert seen > 20


def test_a_snapshot_knows_the_next_timer() -> None:
    """The earliest time of a step or of the run; none when it waits for a person for ever."""
    run = given(parse(b"name: a\ntime_limit: 2d\nsteps:\n  a: {sleep: 1h}\n  b: {sleep: 3h}\n", "a"), at=0)
    assert next_due(run.state) == 3_600_000
    assert next_due(run.when_time_passes("2h").state) == 3 * 3_600_000
    assert next_due(given(parse(b"name: a\nsteps:\n  a: {wait_for: {signal: s}}\n", "a")).state) == 0


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    """Return an empty shelf."""
    found = Shelf()
    yield found
    found.close()


def test_a_shelf_gives_back_what_was_put(shelf: Shelf) -> None:
    """Once: who takes a run has it."""
    shelf.put("a", 3, 0, b"x")
    assert (len(shelf), shelf.take("b"), shelf.take("a"), shelf.take("a"), len(shelf)) == (1, None, (3, b"x"), None, 0)


def test_a_shelf_keeps_the_latest(shelf: Shelf) -> None:
    """Whatever order snapshots are read in, that of the latest decision stays, and goes by its own number only."""
    shelf.put("a", 5, 0, b"new")
    shelf.put("a", 3, 0, b"old")
    shelf.drop("a", 3)
    assert shelf.take("a") == (5, b"new")
    shelf.put("a", 6, 0, b"y")
    shelf.drop("a", 6)
    assert (shelf.take("a"), len(shelf)) == (None, 0)


def test_a_shelf_knows_who_is_due(shelf: Shelf) -> None:
    """The earliest first, no more than asked for, none that has no timer; and when the next one is."""
    model: dict[str, int] = {}
    chance = random.Random(1)  # noqa: S311 - reproducible, no secret
    for number in range(2000):
        run = f"r{chance.randrange(150)}"
        if chance.random() < 0.4:
            assert (shelf.take(run) is None) == (run not in model)
            model.pop(run, None)
        else:
            due = chance.choice([0, chance.randrange(1, 1000)])
            shelf.put(run, number + 1, due, b"v")
            model[run] = due
        before = chance.randrange(1, 1200)
        expected = sorted(due for due in model.values() if 0 < due < before)[:5]
        assert [model[each] for each in shelf.due(before, 5)] == expected
        assert shelf.next_due() == min((due for due in model.values() if due), default=None)
        assert len(shelf) == len(model)


def test_a_large_shelf_takes_little_memory(shelf: Shelf) -> None:
    """It lies in a file: 100 MB on it are not 100 MB in memory."""
    before = psutil.Process().memory_info().rss
    for number in range(100_000):
        shelf.put(f"run-{number}", 1, number, bytes(1000))
    grown = psutil.Process().memory_info().rss - before
    assert shelf.take("run-77777") == (1, bytes(1000))
    assert grown < 40_000_000, f"{grown:,} bytes"


def test_a_new_owner_deletes_the_snapshot_of_a_finished_run() -> None:
    """Who finished it may have ended before deleting it; then the next owner does."""
    base = Commit(0, 0)
    tenure = Tenure(Place(b"i" * 16, TOPIC, 0, 1), lambda _: None, base)
    state = next(state for run in rich() for state, _ in states(run) if not state.over)
    tenure.snapshot_read(b"r/7", codec.encode(keep("r", state, TOPIC, 3)), {})
    tenure.index_read(0, b"r", codec.encode(FinishedRun(TOPIC, 3)))
    tenure.begin(0)
    assert tenure.unfinished
    assert (len(tenure.shelf), tenure.index_entries()) == (0, [])
    assert [(record.key, record.value) for record in tenure.keep_idle(0)] == [(b"r/7", None)]
    assert not tenure.unfinished


def test_a_run_whose_timer_has_fired_stays_in_memory_and_fires_once() -> None:
    """Given an inbox that is far behind, a timer that has fired is not fired again for each time its run is idle.

    Every copy is an input of its own: with many runs these made the inbox grow faster than it could be read.
    """
    spec = parse(b"name: a\nsteps:\n  a: {sleep: 1h}\n", "a")
    place = Place(b"i" * 16, TOPIC, 0, 1)
    tenure = Tenure(place, {spec.digest: spec}.get, Commit(0, 0), idle_ms=1000)
    tenure.begin(0)
    start = InboxMessage(RUN, StartRun("r", spec.name, spec.digest, "{}"))

    def settled(now: int) -> int:
        """Settle and commit as an orchestrator does; return how many runs are in memory."""
        tenure.settle(list(range(tenure.end, tenure.end + tenure.unsettled)))
        tenure.follows()
        tenure.index_entries()
        tenure.keep_idle(now)
        tenure.commit()
        return len(tenure.runs)

    tenure.take(Incoming("inbox", 0, 0, 1_000, RUN.encode(), codec.encode(start)))
    assert settled(3_000) == 0, "it waits for an hour, on the shelf"
    due = 1_000 + HOUR_MS
    fired = list(tenure.due(due + 1))
    assert len(fired) == 1
    for later in range(due + 2_000, due + 60_000, 2_000):
        assert settled(later) == 1
        assert list(tenure.due(later)) == []
    assert fired[0].value is not None
    decided = tenure.take(Incoming("inbox", 0, 1, due + 70_000, RUN.encode(), fired[0].value))
    assert isinstance(codec.decode(decided[0].value, Decision).effects[-1], RunCompleted)
    assert settled(due + 71_000) == 0


def test_a_new_owner_fires_no_timer_before_it_has_read_what_is_there() -> None:
    """Given a former owner's inputs, its timers among them, when another takes over, then it fires none before it has read them.

    Where the end is never reached (another program's transaction ends there) it does so after a minute.
    """
    spec = parse(b"name: a\nsteps:\n  a: {sleep: 1h}\n", "a")
    start = InboxMessage(RUN, StartRun("r", spec.name, spec.digest, "{}"))
    due = 1_000 + HOUR_MS

    def owner(end: int) -> Tenure:
        tenure = Tenure(Place(b"i" * 16, TOPIC, 0, 1), {spec.digest: spec}.get, Commit(0, 0))
        tenure.begin(0, end)
        tenure.take(Incoming("inbox", 0, 0, 1_000, RUN.encode(), codec.encode(start)))
        return tenure

    reader = owner(2)
    assert reader.next_timer() is None
    assert list(reader.due(due + 1)) == []
    fired = InboxMessage(RUN, TimerFired(reader.runs[RUN].state.steps["a"].awaits, "a"))
    reader.take(Incoming("inbox", 0, 1, due + 2, RUN.encode(), codec.encode(fired)))
    assert list(reader.due(due + 3)) == [], "it was fired before"
    assert len(list(owner(1).due(due + 1))) == 1
    waiting = owner(2)
    assert list(waiting.due(due + 1)) == []
    assert list(waiting.due(due + 60_000)) == []
    assert len(list(waiting.due(due + 60_001))) == 1
