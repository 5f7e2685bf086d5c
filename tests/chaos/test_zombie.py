"""Zombies: who is stopped for longer than its session lasts, wakes up and writes: what it says too late never counts."""

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from zombie import History, Installation, Process, Written, checked, now_ms, own_settings, until, views_of

from events import topics
from events.commands import SignalReceived, WorkflowRequest
from events.decisions import InputIgnored, StepCompleted
from events.ids import run_id
from events.results import Input, ToolCallCompleted
from infra.embedded.supervisor import Supervisor
from streams import kafka, registry
from streams.envelope import envelope
from streams.processors.orchestrator import GROUP
from streams.settings import Settings
from streams.workflow.chain import Verdict
from streams.workflow.spec import WorkflowSpec

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SESSION_MS = 3000
RUNS = 240
NOISE = 5
"""Inputs for each run that it ignores, before and after a signal: an owner is stopped with a queue full of them."""
ROUNDS = 6
"""How often a stop is tried at most, until it hit an owner that had something in hand."""

WORK = {"tool": {"name": "work", "arguments": {"seconds": 0.1, "fails": "=input.i % 4 == 0 ? 1 : 0"}}}
PAIR = {"retry": {"attempts": 3, "initial": "500ms"}, **WORK}


def turns() -> dict[str, object]:
    """Return the steps of a run: in each round it waits for a signal, then calls a tool, which fails at first in some runs."""
    steps: dict[str, object] = {"call_start": PAIR}
    before = "call_start"
    for turn in range(ROUNDS):
        steps[f"wait_{turn}"] = {"needs": [before], "wait_for": {"signal": f"go_{turn}"}}
        steps[before := f"call_{turn}"] = {"needs": [f"wait_{turn}"], **PAIR}
    return steps


SPEC = WorkflowSpec.model_validate({"name": "zombie-test", "steps": turns()})
SLOW = WorkflowSpec.model_validate(
    {
        "name": "zombie-tools",
        "steps": {
            "one": {"tool": {"name": "work", "arguments": {"seconds": 3.0}}},
            "end": {"needs": ["one"], "wait_for": {"signal": "end"}},
        },
        "output": "=steps.one.output",
    }
)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Start a broker and return settings that name it."""
    supervisor = Supervisor(own_settings(tmp_path_factory.mktemp("zombie")))
    supervisor.up(frozenset({"kafka"}))
    yield supervisor.settings
    supervisor.down()


@pytest.fixture
def installation(broker: Settings, tmp_path: Path) -> Iterator[Installation]:
    """Return topics of the test's own, with both workflows registered; nothing runs yet."""
    own = {
        "topic_prefix": f"z{uuid.uuid4().hex[:8]}.",
        "data_dir": tmp_path / "data",
        "session_timeout_ms": SESSION_MS,
        "breaker_calls": 0,
    }
    found = Installation(broker.model_copy(update=own), tmp_path)
    kafka.connect(found.settings)
    registry.publish(found.settings, [SPEC, SLOW])
    yield found
    found.end()


def ask(installation: Installation, spec: WorkflowSpec, runs: int, begin: int = 0) -> set[str]:
    """Request runs and return their ids."""
    names = [f"{spec.name}-{number}" for number in range(begin, begin + runs)]
    values = [WorkflowRequest(spec.name, json.dumps({"i": number}), name) for number, name in enumerate(names)]
    records = [
        envelope(topics.REQUESTS, name, value, source="test", identity=name) for name, value in zip(names, values, strict=True)
    ]
    kafka.send(installation.settings, records)
    (installation.folder / "disruptions.jsonl").touch()
    return {run_id(name) for name in names}


def note(installation: Installation, role: str, name: str, stopped: int) -> None:
    """Note for the checker that a process was stopped from then until now."""
    done = {"at_ms": stopped, "until_ms": now_ms(), "kind": "stop", "role": role, "name": name}
    with (installation.folder / "disruptions.jsonl").open("a") as file:
        file.write(json.dumps(done) + "\n")


def signals(runs: set[str], name: str) -> list[tuple[str, Input]]:
    """Return a signal for each run."""
    return [(run, SignalReceived(f"{name}/{run}", name, None, '"yes"', "test")) for run in sorted(runs)]


def flood(runs: set[str], turn: int, beginning: int = 0) -> list[tuple[str, Input]]:
    """Return inputs of which each makes a decision: results of calls that nobody has asked for, many for each run."""
    return [
        (run, ToolCallCompleted(f"noise-{turn}-{number}", "call_start", "1", "1", 1))
        for number in range(beginning, beginning + NOISE)
        for run in sorted(runs)
    ]


def completed(history: History, step: str) -> int:
    """Return in how many runs a step is completed."""
    effects = (effect for each in history.read().accepted.values() for record in each for effect in record.decision.effects)
    return sum(isinstance(effect, StepCompleted) and effect.step == step for effect in effects)


def flooded(history: History, turn: int) -> int:
    """Return how many of a flood's inputs are decided."""
    inputs = (record.decision.input for each in history.read().accepted.values() for record in each)
    return sum(isinstance(cause, ToolCallCompleted) and cause.call_id.startswith(f"noise-{turn}-") for cause in inputs)


def partitions_in(lines: list[str]) -> list[int]:
    """Return the partitions that log lines speak of."""
    return [int(line.split("partition=")[1].split()[0]) for line in lines]


def of_the_zombie(history: History, stopped: int, woken: int) -> list[Written]:
    """Return the records of a zombie that lost: while it was stopped another owner had decided their inputs.

    A record bears the time at which its writer produced it: these before the stop, and in nobody's log then, or after waking up.
    Who was the owner meanwhile has no reason to decide its own inputs twice.
    """
    return [late for first, late in history.twice() if stopped < first.at_ms < woken and not stopped < late.at_ms < woken]


@dataclass(frozen=True)
class Round:
    """What came of one stop. `seconds`: until the other one owned everything; `lost`: the zombie's records that did."""

    early: bool
    seconds: float
    lost: int
    overtaken: dict[str, list[int]]


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("versions", [1, 2])
def test_what_an_orchestrator_writes_after_its_time_never_counts(
    installation: Installation, versions: int, tmp_path: Path
) -> None:
    """An owner is stopped with its hands full, another one decides on, the first one wakes up and writes: one history remains."""
    installation.start({"intake": ("intake", False), "tool": ("tool", False), "A": ("orchestrator", versions == 2)})
    installation.start({"B": ("orchestrator", False)})
    history = History(installation.settings)
    runs = ask(installation, SPEC, RUNS)
    until(lambda: completed(history, "call_start") > RUNS * 3 // 4 and history.accepted.keys() == runs, 120, installation.logs)
    rounds: list[Round] = []
    for turn in range(ROUNDS):
        # Every second time it wakes while the new owner is still at work, so that either may be the first in the log.
        rounds.append(stopped_and_woken(installation, history, runs, turn, early=bool(turn % 2)))
        enough = rounds[-1].early and any(each.overtaken["B"] for each in rounds if each.early)
        if any(each.lost for each in rounds if not each.early) and (enough or (versions == 1 and turn)):
            break
    rest = [f"go_{turn}" for turn in range(len(rounds), ROUNDS)]
    installation.send([each for name in rest for each in signals(runs, name)])
    until(lambda: history.read().ended >= runs, 120, installation.logs)
    verdicts = history.check(runs)
    print(f"\n{versions} versions: {dict(verdicts)}", *rounds, sep="\n")  # noqa: T201 - shown with -s
    assert any(each.lost for each in rounds if not each.early), "the zombie wrote nothing"
    same = [first.value == late.value for first, late in history.twice()]
    if versions == 1:
        assert all(same), "who decides on the same state and input writes the same bytes"
    else:
        assert not all(same), "the versions decide the same"
        assert any(each.overtaken["B"] for each in rounds), "no living owner was overtaken"
    agree(installation, runs, verdicts, tmp_path)


def stopped_and_woken(installation: Installation, history: History, runs: set[str], turn: int, *, early: bool) -> Round:
    """Stop A in a flood of inputs until B owns everything (and, unless `early`, has decided everything); then wake it up."""
    until(lambda: installation.shared(GROUP, "A", "B"), 120, installation.logs)
    zombie, both = installation.running["A"], {name: installation.running[name] for name in "AB"}
    logged = {name: each.logged() for name, each in both.items()}
    mine = installation.members(GROUP)["A"]
    end = history.end(mine)
    installation.send([*flood(runs, turn), *signals(runs, f"go_{turn}"), *flood(runs, turn, beginning=NOISE)])
    until(lambda: history.end(mine) > end + 50, 60, installation.logs)
    zombie.stop()
    stopped = now_ms()

    def new_owner() -> bool:
        return set(partitions_in(both["B"].said("orchestrator.took_over", logged["B"]))) >= mine

    seconds = until(new_owner, 60, installation.logs)
    if not early:
        until(lambda: flooded(history, turn) == 2 * NOISE * RUNS, 120, installation.logs)
    woken = now_ms()
    zombie.wake()
    note(installation, "orchestrator", "A", stopped)
    until(lambda: installation.shared(GROUP, "A", "B"), 120, installation.logs)
    until(lambda: flooded(history, turn) == 2 * NOISE * RUNS, 120, installation.logs)
    overtaken = {name: partitions_in(each.said("orchestrator.overtaken", logged[name])) for name, each in both.items()}
    for name, each in both.items():
        again = Counter(partitions_in(each.said("orchestrator.took_over", logged[name])))
        assert not Counter(overtaken[name]) - again, f"{name} was overtaken and did not take over again"
    return Round(early, round(seconds, 1), len(of_the_zombie(history, stopped, woken)), overtaken)


def agree(installation: Installation, runs: set[str], verdicts: Counter[str], tmp_path: Path) -> None:
    """Assert that the views, built anew, and the checker see what the shared filter sees."""
    passed_over, statuses, breaks = views_of(installation.settings, tmp_path / "views.duckdb")
    assert passed_over == {name: count for name, count in verdicts.items() if name != Verdict.ACCEPTED.value}
    assert statuses == dict.fromkeys(runs, "completed")
    assert breaks == []
    found = checked(installation.settings, installation.folder)
    assert found is None or found["holds"], found


@pytest.mark.thorough
def test_what_a_tool_worker_says_after_its_time_is_ignored(installation: Installation, tmp_path: Path) -> None:
    """A tool worker is stopped with calls in flight, another one makes them again, the first one wakes up and answers too."""
    installation.start({"intake": ("intake", False), "A": ("orchestrator", False), "T1": ("tool", False), "T2": ("tool", False)})
    until(lambda: installation.shared("tool.calls", "T1", "T2"), 60, installation.logs)
    history = History(installation.settings)
    zombie, other = installation.running["T1"], installation.running["T2"]
    runs = ask(installation, SLOW, 40)

    def by(process: Process) -> set[str]:
        return {call["call_id"] for call in installation.calls() if call["pid"] == process.pid}

    until(lambda: len(by(zombie)) > 10, 60, installation.logs)
    stopped = now_ms()
    zombie.stop()
    seconds = until(lambda: completed(history, "one") == len(runs), 120, installation.logs)
    again = by(zombie) & by(other)
    assert len(again) > 5, "the other one makes the calls that nobody answered"
    zombie.wake()
    note(installation, "tool", "T1", stopped)

    def ignored() -> dict[str, str]:
        every = (record.decision for each in history.read().accepted.values() for record in each)
        found = [(decision.input, effect) for decision in every for effect in decision.effects]
        return {
            cause.call_id: effect.reason
            for cause, effect in found
            if isinstance(effect, InputIgnored) and isinstance(cause, ToolCallCompleted)
        }

    late = until(lambda: ignored().keys() >= again, 120, installation.logs)
    assert set(ignored().values()) == {"duplicate"}
    installation.send(signals(runs, "end"))
    until(lambda: history.read().ended >= runs, 120, installation.logs)
    verdicts = history.check(runs)
    taken = {
        record.decision.input.call_id: record.decision.input.output
        for each in history.accepted.values()
        for record in each
        for effect in record.decision.effects
        if isinstance(effect, StepCompleted) and isinstance(record.decision.input, ToolCallCompleted)
    }
    assert len(taken) == len(runs)
    assert {taken[call] for call in again} == {str(other.pid)}, "the first result counts"
    print(f"\n{len(again)} calls made twice, all done {seconds:.1f} s after the stop, ignored {late:.1f} s after waking")  # noqa: T201
    agree(installation, runs, verdicts, tmp_path)


@pytest.mark.thorough
def test_a_tool_worker_that_wakes_makes_no_call_that_another_one_has_by_now(installation: Installation, tmp_path: Path) -> None:
    """A tool worker is stopped, calls come, another one takes its partitions and makes them; on waking it makes none of these."""
    installation.start({"intake": ("intake", False), "A": ("orchestrator", False), "T1": ("tool", False), "T2": ("tool", False)})
    until(lambda: installation.shared("tool.calls", "T1", "T2"), 60, installation.logs)
    history = History(installation.settings)
    zombie, other = installation.running["T1"], installation.running["T2"]
    stopped = now_ms()
    zombie.stop()
    runs = ask(installation, SLOW, 60)
    until(lambda: len(installation.calls()) == len(runs), 60, installation.logs)
    assert {call["pid"] for call in installation.calls()} == {other.pid}
    zombie.wake()
    note(installation, "tool", "T1", stopped)
    until(lambda: completed(history, "one") == len(runs), 120, installation.logs)
    assert len(installation.calls()) == len(runs), "each call is made once"
    until(lambda: installation.shared("tool.calls", "T1", "T2"), 60, installation.logs)
    runs |= ask(installation, SLOW, 60, begin=60)
    until(lambda: completed(history, "one") == len(runs), 120, installation.logs)
    assert {call["pid"] for call in installation.calls()} == {zombie.pid, other.pid}, "it works again"
    assert len(installation.calls()) == len(runs)
    installation.send(signals(runs, "end"))
    until(lambda: history.read().ended >= runs, 120, installation.logs)
    agree(installation, runs, history.check(runs), tmp_path)
