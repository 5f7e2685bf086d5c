"""Lineage of runs that the real core decided: what fed what, what caused what, in a run and across runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from projection_histories import PARTITIONS, TOPIC_IDS, Logs, Run  # type: ignore[import-not-found]

from events import codec
from events.commands import (
    ApprovalAnswered,
    ChangeOutput,
    Origin,
    Parent,
    PauseRun,
    ResumeRun,
    SignalReceived,
    StartRun,
    WorkflowRegistered,
)
from events.decisions import ChildRunRequested
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id
from events.ids import run_id as run_id_of
from events.results import ChildRunCompleted, TimerFired, ToolCallCompleted, ToolCallFailed
from projections.ledger import Record
from projections.lineage import Asked, Found, UnknownNodeError, lineage, node_of
from projections.views import Batch, Views
from streams.workflow.evolve import evolve
from streams.workflow.expressions import to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunEvent


class Told:
    """Runs told input by input; `found` asks the views that hold them."""

    def __init__(self, folder: Path) -> None:
        self.log, self.runs, self._taken = Logs(1), dict[str, Any](), 0
        self.views = Views(folder / "v", TOPIC_IDS, PARTITIONS)
        self._specs: dict[str, WorkflowSpec] = {}

    def run(self, name: str, steps: dict[str, Any], text: str = "{}", *, more: dict[str, Any] | None = None, **start: Any) -> str:
        """Start a run of a workflow with these steps; return its id. `more`: the rest of the definition."""
        spec = WorkflowSpec.model_validate({"name": name, "steps": steps, **(more or {})})
        identity = run_id_of(name)
        self._specs[spec.digest] = spec
        self.runs[identity] = Run(identity, spec=spec)
        self.take(identity, StartRun(name, name, spec.digest, text, **start))
        return identity

    def take(self, run: str, *causes: Any) -> None:
        """Let a run decide about inputs."""
        for cause in causes:
            told = self.runs[run]
            decision = self.log._decided(told, told.state, cause)
            self.log.append(run, codec.encode(decision))
            told.state = evolve(told.state, RunEvent(decision, chain_hash(codec.body(decision))))
            self.log.accepted.append(RunEvent(decision, chain_hash(codec.body(decision))))

    def done(self, run: str, step: str, output: Any) -> None:
        """Answer the call that a step waits for."""
        self.take(run, ToolCallCompleted(self.runs[run].state.steps[step].awaits, step, to_json(output), "1", 3))

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Let the views take what was told, and give a connection to them."""
        specs = [
            Record(0, number, codec.encode(WorkflowRegistered(each.name, each.digest, each.canonical)))
            for number, each in enumerate(self._specs.values())
        ]
        self.views.apply(Batch(self.log.records()[self._taken :], specs=specs))
        self._taken = len(self.log.records())
        with self.views.snapshot() as (db, _):
            yield db

    def ask(self, run: str, node: str | None = None, **more: Any) -> Found:
        """Ask about a run."""
        with self.open() as db:
            return lineage(db, Asked(run, None if node is None else node_of(run, node), **more))


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    made = Told(tmp_path)
    yield made
    made.views.close()


def edges(found: Found, run: str) -> set[tuple[str, str, str, str, str]]:
    """Return edges with this run's id left out."""
    short: Callable[[str], str] = lambda node: node.replace(f"/{run}", "")  # noqa: E731
    return {(short(each.source), short(each.target), each.kind, each.of, each.into) for each in found.edges}


TWO = {
    "fetch": {"tool": {"name": "get", "arguments": {"url": "=input.url"}}},
    "odd": {
        "needs": ["fetch"],
        "when": "steps.fetch.output.odd",
        "tool": {"name": "get", "arguments": {"n": "=steps.fetch.output.n"}},
    },
    "write": {
        "needs": ["fetch", "odd"],
        "tool": {"name": "put", "arguments": {"rows": "=steps.fetch.output.rows", "odd": "=steps.odd.output"}},
    },
}


def test_data_lineage_is_what_the_expressions_say(told: Told) -> None:
    """Given a run of three steps of which one is skipped, then each edge is one that an expression names, and there is no other.

    A step that was skipped put nothing into what names it: it only decided.
    """
    run = told.run("w", TWO, '{"url":"u"}')
    told.done(run, "fetch", {"odd": False, "n": 1, "rows": [1]})
    told.done(run, "write", "ok")
    assert edges(told.ask(run), run) == {
        ("request/w", "input", "feeds", "input", "input"),
        ("input", "step/fetch", "feeds", "url", "arguments.url"),
        ("step/fetch", "step/odd", "gates", "output.odd", "when"),
        ("step/fetch", "step/write", "feeds", "output.rows", "arguments.rows"),
        ("step/odd", "step/write", "gates", "output", "arguments.odd"),
        ("step/write", "output", "feeds", "output", "output"),
    }
    up = told.ask(run, "step/fetch", direction="up")
    assert {each.removesuffix(f"/{run}") for each in up.nodes} == {f"step/{run}/fetch", "input", "request/w"}
    assert set(told.ask(run, "step/fetch", direction="up", depth=1).nodes) == {f"step/{run}/fetch", f"input/{run}"}
    with pytest.raises(UnknownNodeError, match=f"step/{run}/nope"):
        told.ask(run, "step/nope")


def test_an_item_comes_from_the_list_that_it_is_of(told: Told) -> None:
    """Given a step for each item of another's output, then each item's step comes from its own item, and the whole from each."""
    run = told.run(
        "w",
        {
            "fetch": {"tool": {"name": "get"}},
            "many": {
                "needs": ["fetch"],
                "for_each": {"items": "=steps.fetch.output.rows", "as": "row"},
                "steps": {
                    "ask": {"tool": {"name": "look", "arguments": {"name": "=row.name"}}},
                    "end": {"needs": ["ask"], "transform": "=steps.ask.output"},
                },
            },
        },
    )
    told.done(run, "fetch", {"rows": [{"name": "a"}, {"name": "b"}]})
    told.done(run, "many[1].ask", 5)
    found = edges(told.ask(run, "step/many", direction="up"), run)
    assert ("step/fetch", "step/many[1].ask", "feeds", "output.rows[1].name", "arguments.name") in found
    assert ("step/many[1].ask", "step/many[1].end", "feeds", "output", "transform") in found
    assert ("step/many[1].end", "step/many[1]", "feeds", "output", "output") in found
    assert ("step/many[1]", "step/many", "feeds", "output", "output[1]") in found
    assert ("step/fetch", "step/many", "feeds", "output.rows", "for_each.items") in found
    assert not {each for each in found if each[1] == "step/many[1].ask" and "many[0]" in each[0]}


def test_an_iteration_comes_from_the_one_before(told: Told) -> None:
    """Given a loop that sees its last output, then each iteration's argument comes from the one before, the first's from none."""
    loop = {"until": "last > 1", "at_most": 3}
    run = told.run("w", {"again": {"repeat": loop, "tool": {"name": "t", "arguments": {"n": "=last"}}}})
    told.done(run, "again[0]", 1)
    told.done(run, "again[1]", 2)
    found = edges(told.ask(run), run)
    assert ("step/again[0]", "step/again[1]", "feeds", "output", "arguments.n") in found
    assert ("step/again[1]", "step/again", "feeds", "output", "output") in found
    assert not [each for each in found if each[1] == "step/again[0]"]


def test_many_items_are_one_node_until_one_is_asked_for(told: Told) -> None:
    """Given 400 items, then the graph has one node that counts them; asked for item 37, it stands apart with its source."""
    items = {"items": "=input.rows"}
    run = told.run("w", {"many": {"for_each": items, "transform": "=item.n"}}, to_json({"rows": [{"n": n} for n in range(400)]}))
    whole = told.ask(run)
    node = whole.nodes[f"step/{run}/many[]"]
    assert (node.detail["times"], node.detail["statuses"], len(whole.nodes)) == (400, {"completed": 400}, 5)
    one = edges(told.ask(run, "step/many[37]", depth=1), run)
    assert one == {
        ("input", "step/many[37]", "feeds", "rows[37].n", "transform"),
        ("step/many[37]", "step/many", "feeds", "output", "output[37]"),
    }


def test_each_decision_follows_from_what_its_input_answers(told: Told) -> None:
    """Given a call that fails, is made again, and answered late, then each event leads to the next by the ids that they bear."""
    retry = {"attempts": 3, "initial": "10ms"}
    run = told.run("w", {"a": {"tool": {"name": "x"}, "retry": retry}, "b": {"tool": {"name": "y"}}})
    first = told.runs[run].state.steps["a"].awaits
    told.take(run, ToolCallFailed(first, "a", Failure(FailureKind.RATE_LIMITED, "no"), "1", 2))
    told.take(run, TimerFired(told.runs[run].state.steps["a"].awaits, "a"))
    second = told.runs[run].state.steps["a"].awaits
    told.take(run, ToolCallCompleted(first, "a", "1", "1", 2))  # late
    told.take(run, ToolCallCompleted(second, "a", "2", "1", 2))
    found = told.ask(run, about="control")
    ways = {(each.source.replace(f"/{run}", ""), each.target.replace(f"/{run}", ""), each.into) for each in found.edges}
    assert {
        ("request/w", "decision/1", "StartRun"),
        ("decision/1", f"call/{first}", "ToolCallRequested"),
        (f"call/{first}", "decision/2", "ToolCallFailed"),
        ("decision/2", "decision/3", "timer"),
        ("decision/3", f"call/{second}", "ToolCallRequested"),
        (f"call/{first}", "decision/4", "ToolCallCompleted"),
        (f"call/{second}", "decision/5", "ToolCallCompleted"),
        ("decision/1", "step/a", "begins"),
    } <= ways
    assert found.nodes[f"decision/{run}/4"].detail["ignored"] == "late"
    up = told.ask(run, "decision/3", direction="up", about="control")
    assert f"call/{second}" not in up.nodes
    assert {f"call/{first}", "request/w"} <= set(up.nodes)


def test_lineage_goes_through_child_runs_and_forks(told: Told) -> None:
    """Given a parent, its child and a fork, then data is followed into the child and back, and from the origin into the fork."""
    parent = told.run(
        "p",
        {
            "get": {"tool": {"name": "get"}},
            "sub": {"needs": ["get"], "run": {"workflow": "c", "input": {"n": "=steps.get.output.n"}}},
            "use": {"needs": ["sub"], "tool": {"name": "use", "arguments": {"x": "=steps.sub.output.y"}}},
        },
    )
    told.done(parent, "get", {"n": 1})
    asked = told.log.accepted[-1]
    index = next(n for n, each in enumerate(asked.decision.effects) if isinstance(each, ChildRunRequested))
    call = effect_id(asked.hash, index)
    child = run_id_of(call)
    spec = WorkflowSpec.model_validate({"name": "c", "steps": {"work": {"tool": {"name": "t", "arguments": {"n": "=input.n"}}}}})
    told._specs[spec.digest] = spec
    told.runs[child] = Run(child, spec=spec)
    told.take(child, StartRun(call, "c", spec.digest, '{"n":1}', parent=Parent(parent, "sub", call)))
    told.done(child, "work", {"y": 2})
    told.take(parent, ChildRunCompleted(call, "sub", child, '{"y":2}'))
    told.done(parent, "use", 3)

    up = told.ask(parent, "output", direction="up")
    assert {f"step/{child}/work", f"output/{child}", f"input/{child}", f"step/{parent}/get"} <= set(up.nodes)
    assert (f"step/{parent}/get", f"input/{child}", "feeds", "output.n", "input.n") in edges(up, "-")
    from_child = told.ask(child, "step/work", direction="up")
    assert f"step/{parent}/get" in from_child.nodes
    down = told.ask(child, "step/work", direction="down")
    assert {f"output/{child}", f"step/{parent}/sub", f"step/{parent}/use", f"output/{parent}"} <= set(down.nodes)
    causes = told.ask(parent, "decision/1", direction="down", about="control")
    assert {f"decision/{child}/1", f"run/{child}", f"run/{parent}"} <= set(causes.nodes)
    back = told.ask(child, "decision/1", direction="up", about="control")
    assert {f"decision/{parent}/2", f"decision/{parent}/1", "request/p"} <= set(back.nodes)

    copied = to_json({"get": {"status": "completed", "output": '{"n":1}'}})
    fork = told.run("f", {"get": {"tool": {"name": "get"}}}, origin=Origin(parent, 2, "ab" * 32), copied=copied)
    assert (f"step/{parent}/get", f"step/{fork}/get", "copies", "output", "output") in edges(told.ask(fork, "output"), "-")
    assert f"output/{fork}" in told.ask(parent, "step/get", direction="down").nodes


def test_people_files_and_payloads_are_sources_too(told: Told) -> None:
    """Given answers, signals, set outputs, files and a large payload, then each is a node with an edge to what it fed.

    Who may not see payloads is told of no file and no payload.
    """
    digest = "ab" * 32
    run = told.run(
        "w",
        {
            "get": {"tool": {"name": "get"}},
            "ok": {"needs": ["get"], "approval": {"message": "?"}},
            "word": {"needs": ["ok"], "wait_for": {"signal": "word"}},
            "put": {"needs": ["word"], "tool": {"name": "put", "arguments": {"w": "=steps.word.output"}}},
        },
    )
    own = f"/data/{run}/report.html"
    told.done(run, "get", {"source": "prices.csv", "sha256": "cd" * 32, "rows": {"$payload": digest, "bytes": 9}})
    told.take(run, ApprovalAnswered("ok", True, "ann", "", None), SignalReceived("1", "word", None, '"hi"', "post"))
    told.done(run, "put", {"html": own, "sha256s": {"report.html": "ef" * 32}, "other": "/data/of/others.html"})
    found = told.ask(run)
    ways = edges(found, "-")
    assert ("file/prices.csv", f"step/{run}/get", "feeds", "", "output.source") in ways
    assert (f"step/{run}/put", f"file/{own}", "feeds", "output.html", "") in ways
    assert found.nodes[f"file/{own}"].detail["sha256"] == "ef" * 32
    assert (f"step/{run}/get", f"payload/{digest}", "feeds", "output", "") in ways
    assert (f"decision/{run}/3", f"step/{run}/ok", "feeds", "answer", "output") in ways
    assert (f"decision/{run}/4", f"step/{run}/word", "feeds", "payload", "output") in ways
    assert found.nodes[f"decision/{run}/4"].name == "SignalReceived word by post"
    assert not [each for each in found.nodes if "others.html" in each]
    shown = told.ask(run, files=False)
    assert {each.kind for each in shown.nodes.values()} == {each.kind for each in found.nodes.values()} - {"file", "payload"}
    other = told.run("x", {"a": {"tool": {"name": "t"}}})
    told.take(other, ChangeOutput("a", '"mine"', "bob", "slow"))
    assert (f"decision/{other}/2", f"step/{other}/a", "feeds", "output", "output") in edges(told.ask(other), "-")


def test_what_ends_a_wait_follows_from_what_began_it(told: Told) -> None:
    """Given waits for signals, for an answer and for a child run, then each end follows from the decision that asked for it.

    A signal that comes before its step follows from no decision, and leads to the one that took it; nor do other commands.
    """
    wait = {"wait_for": {"signal": "word"}}
    run = told.run(
        "w",
        {
            "a": wait,
            "b": {"needs": ["a"], "wait_for": {"signal": "early"}},
            "ok": {"needs": ["b"], "approval": {"message": "?"}},
            "c": {"needs": ["ok"], **wait},
            "sub": {"needs": ["c"], "run": {"workflow": "child", "input": {}}},
        },
    )
    told.take(
        run,
        SignalReceived("1", "early", None, "1", "post"),
        SignalReceived("2", "word", None, "2", "post"),
        PauseRun("ann", "lunch"),
        ApprovalAnswered("ok", True, "ann", "", None),
        ResumeRun("ann", False),
        SignalReceived("3", "word", None, "3", "post"),
    )
    call = told.runs[run].state.steps["sub"].awaits
    child = run_id_of(call)
    told.take(run, ChildRunCompleted(call, "sub", child, "1"))
    found = told.ask(run, about="control")
    ways = {(each.source.replace(f"/{run}", ""), each.target.replace(f"/{run}", ""), each.into) for each in found.edges}
    assert {way for way in ways if way[0].startswith("decision/") and not way[1].startswith("step/")} == {
        ("decision/1", "decision/3", "SignalAwaited"),
        ("decision/2", "decision/3", "SignalTaken"),
        ("decision/3", "decision/5", "ApprovalRequested"),
        ("decision/6", "decision/7", "SignalAwaited"),
        ("decision/7", f"decision/{child}/1", "ChildRunRequested"),
        ("decision/7", f"run/{child}", "ChildRunRequested"),
        ("decision/8", "run", "ends"),
    }
    assert (f"run/{child}", "decision/8", "ChildRunCompleted") in ways
    begun = {each for each in found.nodes if each.startswith("decision/")} - {each.target for each in found.edges}
    assert begun == {f"decision/{run}/{seq}" for seq in (2, 4, 6)}, "these come from outside"


def test_a_child_run_begins_with_its_parent_s_step(told: Told) -> None:
    """Given a child run, then its first decision follows from its parent's step, also when only the child is asked about."""
    parent = run_id_of("p")
    child = told.run("c", {"a": {"tool": {"name": "t"}}}, parent=Parent(parent, "sub", "c" * 32))
    found = told.ask(child, about="control")
    ways = [(each.source, each.into) for each in found.edges if each.target == f"decision/{child}/1"]
    assert ways == [(f"step/{parent}/sub", "ChildRunRequested")]
