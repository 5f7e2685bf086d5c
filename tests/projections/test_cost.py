"""What the cost ledger says: groups add up to totals, each call is paid once, and by its own answer's word."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_histories import BOTH, PARTITIONS, TOPIC_IDS, Logs, Run, extent, logs  # type: ignore[import-not-found]

from events import codec
from events.commands import Origin, Parent, StartRun
from events.ids import chain_hash
from events.ids import run_id as run_id_of
from events.results import LlmCallCompleted, LlmCallFailed, TimerFired, ToolCallCompleted, ToolCallFailed, Usage
from projections import calls, cost, runs, step_pages
from projections.calls import CallRow
from projections.runs import RunRow
from projections.views import Batch, Views
from streams.workflow.evolve import evolve
from streams.workflow.expressions import to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunEvent

DAY = 86_400_000
BEGIN = 1_700_006_400_000
"""The beginning of a day in UTC."""
AMOUNTS = st.sampled_from([None, 0.0, 0.1, 0.2, 0.3, 1e-12, 2.8e-9, 0.00020999999999999998, 1234.000165, 1e300, -1.0])
TOKENS = st.tuples(st.integers(0, 10**9), st.integers(0, 10**6))
CALLS = st.lists(
    st.tuples(
        st.integers(0, 7),  # its run
        st.sampled_from(["llm", "tool"]),
        st.sampled_from(["completed", "failed", "timed_out", "stray", "abandoned", "pending"]),
        AMOUNTS,
        TOKENS,
        st.integers(0, 3 * DAY),
        st.sampled_from(["ask", "many[0].ask", "many[12].ask", "undo(pay)"]),
        st.sampled_from(["m", "n"]),
    ),
    max_size=30,
)
PARENTS = [None, 0, 1, None, 3, None, 3, None]
"""Of each run, the one that started it."""


def workflow(run: int) -> str:
    """Return the workflow of a run."""
    return "odd" if run % 2 else "even"


@contextmanager
def ledger(made: list[Any]) -> Iterator[Any]:
    """Give a database with 8 runs in 4 families, and these calls."""
    rows = []
    for number, (run, kind, outcome, usd, (read, written), at, step, name) in enumerate(made):
        row = CallRow(f"c{number}", f"r{run}", step, 1, kind, 0, number, outcome, cost_usd=usd)
        row.ended, row.workflow = None if outcome == "pending" else BEGIN + at, workflow(run)
        row.latency_ms = None if outcome == "abandoned" else 5
        if kind == "llm":
            row.model, row.input_tokens, row.output_tokens, row.prices = name, read, written, "p"
            row.cache_read_tokens, row.cache_write_tokens, row.cache_write_1h_tokens = read // 2, read // 3, read // 4
            row.reasoning_tokens = written // 2
        else:
            row.tool = name
        rows.append(row)
    started = []
    for number, parent in enumerate(PARENTS):
        run_row = RunRow(f"r{number}", 0, 0, BEGIN, workflow=workflow(number), labels={})
        run_row.last_offset = len(made)
        run_row.parent_run_id = None if parent is None else f"r{parent}"
        run_row.labels = {"team": "a", "n": str(number)} if number in (0, 1, 5) else {}
        started.append(run_row)
    with duckdb.connect() as db:
        for table, held in ((runs.TABLE, started), (calls.TABLE, rows)):
            db.execute(table.ddl)
            table.insert(db, held)
        yield db


def exact(usd: float | None) -> Decimal:
    """Return an amount as the ledger counts it: in whole 10⁻¹² dollars; what can't be one counts as unknown."""
    return round(Decimal(usd), 12) if usd is not None and 0 <= usd <= 1e9 else Decimal(0)


def counted(made: list[Any], family: set[int] = frozenset(range(8))) -> list[Any]:  # type: ignore[assignment]
    """Return the calls of these runs that are over."""
    return [each for each in made if each[2] != "pending" and each[0] in family]


def told(made: list[Any]) -> dict[str, Any]:
    """Return what sums must say of calls, computed one by one."""
    llm = [each for each in made if each[1] == "llm"]
    return {
        "calls": len(made),
        "llm_calls": len(llm),
        "tool_calls": len(made) - len(llm),
        "input_tokens": sum(each[4][0] for each in llm),
        "cache_read_tokens": sum(each[4][0] // 2 for each in llm),
        "cache_write_tokens": sum(each[4][0] // 3 for each in llm),
        "cache_write_1h_tokens": sum(each[4][0] // 4 for each in llm),
        "output_tokens": sum(each[4][1] for each in llm),
        "reasoning_tokens": sum(each[4][1] // 2 for each in llm),
        "cost_usd": sum((exact(each[3]) for each in made), Decimal(0)),
        "wasted_usd": sum((exact(each[3]) for each in made if each[2] != "completed"), Decimal(0)),
        "unpriced_calls": sum(each[3] is None or not 0 <= each[3] <= 1e9 for each in llm),
        "unmetered_calls": 0,
    }


def added(sums: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of sums."""
    return {name: sum((each[name] for each in sums), Decimal(0)) for name in cost.SUMS}


@settings(max_examples=10, deadline=None)
@given(CALLS, st.integers(1, 4))
def test_groups_add_up_to_the_total_and_the_total_to_the_calls(made: list[Any], limit: int) -> None:
    """Given any calls, when they are grouped by anything, then the groups, cut off or not, have exactly what all calls have."""
    with ledger(made) as db:
        expected = told(counted(made))
        for by in cost.GROUPS:
            full = cost.costs(db, cost.Filter(), by, 1000)
            assert full.total == expected
            assert full.rest is None
            assert added(full.groups) == expected
            some = cost.costs(db, cost.Filter(), by, limit)
            assert [group["key"] for group in some.groups] == [group["key"] for group in full.groups[:limit]]
            assert some.left_out == max(0, len(full.groups) - limit)
            assert added([*some.groups, *([some.rest] if some.rest else [])]) == expected


@settings(max_examples=10, deadline=None)
@given(CALLS)
def test_a_family_is_counted_once(made: list[Any]) -> None:
    """Given runs that started others, then a run's costs are its own and those below it; all families together are the total."""
    families = {0: {0, 1, 2}, 3: {3, 4, 6}, 1: {1, 2}, 5: {5}, 7: {7}}
    with ledger(made) as db:
        for first, family in families.items():
            wanted = cost.Filter(runs=cost.family(db, f"r{first}"))
            found = cost.costs(db, wanted, "run", 100)
            assert found.total == told(counted(made, family))
            own, children = cost.in_family(db, wanted, found.total)
            assert own == told(counted(made, {first}))
            assert added([own, children]) == found.total
            kinds = ("step", "model", "tool", "prices")
            together = cost.of_family(db, f"r{first}", kinds, 2)
            assert (together.total, together.own, together.children) == (found.total, own, children)
            assert together.by == {by: cost.costs(db, wanted, by, 2) for by in kinds}
        # Labels are those of whoever asked for the work: what its runs started counts with them, and once.
        assert cost.costs(db, cost.Filter(labels=(("team", "a"),)), "day", 9).total == told(counted(made, {0, 1, 2, 5}))
        assert cost.costs(db, cost.Filter(labels=(("team", "a"), ("n", "1"))), "day", 9).total == told(counted(made, {1, 2}))


@settings(max_examples=10, deadline=None)
@given(CALLS, st.integers(0, 3 * DAY), st.integers(0, 3 * DAY))
def test_times_and_workflows_choose_calls(made: list[Any], since: int, until: int) -> None:
    """Given a range, then calls that ended in it are counted, its beginning included; days are those of UTC."""
    with ledger(made) as db:
        found = cost.costs(db, cost.Filter(BEGIN + since, BEGIN + until, "odd"), "day", 100)
        chosen = [each for each in counted(made, {1, 3, 5, 7}) if since <= each[5] < until]
        assert found.total == told(chosen)
        days = {group["key"]["day"]: group["cost_usd"] for group in found.groups}
        assert list(days) == sorted(days, reverse=True)
        for day, spent in days.items():
            of_day = [each for each in chosen if datetime.fromtimestamp((BEGIN + each[5]) / 1000, UTC).date().isoformat() == day]
            assert spent == told(of_day)["cost_usd"]


def test_floats_that_do_not_add_up_do_here() -> None:
    """Given 0.1 and 0.2 dollars a thousand times, then they are 300 dollars in every grouping, and as a JSON number too."""
    made = [(number % 8, "llm", "completed", (0.1, 0.2)[number % 2], (1, 1), 0, "ask", "m") for number in range(2000)]
    assert sum(each[3] for each in made) != 300
    with ledger(made) as db:
        found = cost.costs(db, cost.Filter(), "run", 100)
        assert found.total["cost_usd"] == 300
        assert sum(Decimal(str(float(group["cost_usd"]))) for group in found.groups) == 300


# --- Histories that the core decided ---


@pytest.mark.parametrize("seed", [5, 6])
def test_what_runs_and_steps_say_is_what_the_ledger_says(tmp_path: Path, seed: int) -> None:
    """Given histories with late, stray and repeated answers, retries and children, then all read models tell the same money."""
    log = logs(seed, 10, 0.4, BOTH)
    views = Views(tmp_path / "v", TOPIC_IDS, PARTITIONS)
    views.apply(Batch(log.records()))
    first_answers: dict[str, Any] = {}
    for event in log.accepted:
        if isinstance(event.decision.input, LlmCallCompleted | LlmCallFailed):
            first_answers.setdefault(event.decision.input.call_id, event.decision.input)
    with views.snapshot() as (db, _):
        by_run = cost.costs(db, cost.Filter(), "run", 1000)
        assert float(by_run.total["cost_usd"]) == sum(each.cost_usd or 0 for each in first_answers.values())
        assert by_run.total["input_tokens"] == sum(each.usage.input_tokens for each in first_answers.values() if each.usage)
        assert by_run.total["unpriced_calls"] > 0
        for group in by_run.groups:
            row = runs.one(db, group["key"]["run_id"])
            assert row is not None
            assert {name: row[name] for name in ("input_tokens", "output_tokens", "cost_usd", "unpriced_calls")} == {
                name: float(group[name]) for name in ("input_tokens", "output_tokens", "cost_usd", "unpriced_calls")
            }
            family = cost.Filter(runs=cost.family(db, row["run_id"]))
            own, _ = cost.in_family(db, family, cost.costs(db, family, "run", 1).total)
            assert own == {name: group[name] for name in cost.SUMS}
    views.close()


class Story:
    """Runs told input by input, and what they cost."""

    def __init__(self, folder: Path) -> None:
        self.log, self.views = Logs(1), Views(folder / "v", TOPIC_IDS, PARTITIONS)

    def run(self, name: str, steps: dict[str, Any], **more: Any) -> Run:
        """Start a run."""
        run = Run(run_id_of(name), spec=WorkflowSpec.model_validate({"name": "w", "steps": steps}))
        self.take(run, StartRun(name, "w", run.spec.digest, "{}", **more))
        return run

    def take(self, run: Run, *causes: Any) -> None:
        """Let a run decide about inputs, and the views take the decisions."""
        for cause in causes:
            decision = self.log._decided(run, run.state, cause)
            self.log.append(run.id, codec.encode(decision))
            run.state = evolve(run.state, RunEvent(decision, chain_hash(codec.body(decision))))
            self.views.apply(Batch(self.log.records()[-1:]))

    def cost(self, run: Run, by: str = "step") -> cost.Costs:
        """Return what a run and its children cost."""
        with self.views.snapshot() as (db, _):
            return cost.costs(db, cost.Filter(runs=cost.family(db, run.id)), by, 100)


def answer(run: Run, step: str, usd: float | None, call: str = "") -> LlmCallCompleted:
    """Return a model's answer of 10 tokens in and 5 out."""
    call = call or run.state.steps[step].awaits
    return LlmCallCompleted(call, step, '"x"', "m", "p", "stop", Usage(10, 5), usd, 9, "own-1")


ASK: dict[str, Any] = {"llm": {"prompt": "x"}, "retry": {"attempts": 3, "initial": "10ms"}}
TOOL: dict[str, Any] = {"tool": {"name": "echo"}}


def test_every_attempt_is_paid_also_a_late_one_and_a_stranger_s(tmp_path: Path) -> None:
    """Given a time-out answered late, twice, a failure and an answer to a lost decision's call, then each is paid once."""
    story = Story(tmp_path)
    run = story.run("r", {"ask": ASK, "wait": {"sleep": "1h"}})
    late = run.state.steps["ask"].awaits
    story.log._at = max(story.log._at, run.state.steps["ask"].due)
    story.take(run, TimerFired(late, "ask"))
    assert story.cost(run).total["unmetered_calls"] == 1  # nobody has said yet what it took
    story.take(run, answer(run, "ask", 0.1, late), answer(run, "ask", 0.1, late))
    story.take(run, answer(run, "ask", 0.4, "0" * 32))
    story.log._at = max(story.log._at, run.state.steps["ask"].due)
    story.take(run, TimerFired(run.state.steps["ask"].awaits, "ask"))
    story.take(run, answer(run, "ask", 0.2))
    found = story.cost(run, "call")
    assert {group["key"]["outcome"]: float(group["cost_usd"]) for group in found.groups} == {
        "timed_out": 0.1,
        "stray": 0.4,
        "completed": 0.2,
    }
    assert {name: float(found.total[name]) for name in ("calls", "cost_usd", "wasted_usd", "unmetered_calls")} == {
        "calls": 3,
        "cost_usd": 0.7,
        "wasted_usd": 0.5,
        "unmetered_calls": 0,
    }
    with story.views.snapshot() as (db, _):
        row = runs.one(db, run.id)
    assert row is not None
    assert row["cost_usd"] == 0.7  # 0.1 + 0.4 + 0.2 of floats is 0.7000000000000001
    story.views.close()


def test_tools_cost_what_they_say_also_when_they_fail_and_when_it_is_late(tmp_path: Path) -> None:
    """Given tools that spend, fail after spending, and answer late, then step, run and ledger have it, with what for."""
    story = Story(tmp_path)
    run = story.run("r", {"a": TOOL, "b": TOOL | {"on_failure": "continue"}, "wait": {"sleep": "1h"}})
    late = run.state.steps["b"].awaits
    story.take(run, ToolCallCompleted(run.state.steps["a"].awaits, "a", "1", "v", 5, 0.03, "pages $0.03"))
    story.log._at = max(story.log._at, run.state.steps["b"].due)
    story.take(run, TimerFired(late, "b"))
    failure = ToolCallFailed(late, "b", run.state.steps["b"].failure, "v", 5, 0.5, "search $0.5")
    story.take(run, failure, failure)
    found = story.cost(run, "call")
    assert {(group["key"]["step"], group["key"]["paid_for"], float(group["cost_usd"])) for group in found.groups} == {
        ("a", "pages $0.03", 0.03),
        ("b", "search $0.5", 0.5),
    }
    assert (found.total["tool_calls"], float(found.total["wasted_usd"]), found.total["unpriced_calls"]) == (2, 0.5, 0)
    with story.views.snapshot() as (db, _):
        steps = {row["step"]: row["cost_usd"] for row in step_pages.of_run(db, extent(db, run.id))[0]}
        row = runs.one(db, run.id)
    assert row is not None
    assert (steps["a"], steps["b"], row["cost_usd"], row["unpriced_calls"]) == (0.03, 0.5, 0.53, 0)
    story.views.close()


def test_children_are_paid_once_and_what_a_fork_copied_by_its_origin(tmp_path: Path) -> None:
    """Given a run that started one that started one, and a fork that copied a step, then nothing is paid twice or lost."""
    story = Story(tmp_path)
    parent = story.run("parent", {"ask": ASK})
    child = story.run("child", {"ask": ASK}, parent=Parent(parent.id, "ask", "c" * 32))
    grandchild = story.run("grandchild", {"ask": ASK}, parent=Parent(child.id, "ask", "d" * 32))
    copied = to_json({"ask": {"status": "completed", "output": '"x"'}})
    fork = story.run("fork", {"ask": ASK, "more": ASK}, origin=Origin(parent.id, 2, "ab" * 32), copied=copied)
    for number, run in enumerate((parent, child, grandchild)):
        story.take(run, answer(run, "ask", (0.1, 0.2, 0.4)[number]))
    story.take(fork, answer(fork, "more", 0.8))
    spent = [float(story.cost(run).total["cost_usd"]) for run in (parent, child, grandchild, fork)]
    assert spent == [0.7, 0.6, 0.4, 0.8]
    assert [(group["key"]["step"], group["calls"]) for group in story.cost(fork).groups] == [("more", 1)]
    with story.views.snapshot() as (db, _):
        assert float(cost.costs(db, cost.Filter(), "prices", 9).total["cost_usd"]) == 1.5
    story.views.close()


def test_a_price_that_was_recorded_stays_whatever_prices_are_now(tmp_path: Path) -> None:
    """Given calls by two price lists, when the views are made anew, then each has its price and the name of its list."""
    story = Story(tmp_path)
    run = story.run("r", {"a": ASK, "b": ASK})
    story.take(run, answer(run, "a", 0.1))
    other = LlmCallCompleted(run.state.steps["b"].awaits, "b", '"x"', "m", "p", "stop", Usage(10, 5), 0.2, 9, "own-2")
    story.take(run, other)
    story.views.close()
    story.views = Views(tmp_path / "anew", TOPIC_IDS, PARTITIONS)
    story.views.apply(Batch(story.log.records()))
    found = {group["key"]["prices"]: float(group["cost_usd"]) for group in story.cost(run, "prices").groups}
    assert found == {"own-1": 0.1, "own-2": 0.2}
    story.views.close()
