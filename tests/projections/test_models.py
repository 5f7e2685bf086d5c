"""What each read model says about approvals, signals, loops, children, forks, pauses and compensations."""

from pathlib import Path
from typing import Any, get_args

import pytest
from projection_histories import PARTITIONS, TOPIC_IDS, Logs, Run, extent  # type: ignore[import-not-found]

from events import codec
from events.as_json import as_json
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    Origin,
    Parent,
    PauseRun,
    ResumeRun,
    SignalReceived,
    StartRun,
)
from events.decisions import Decision, Effect, RunCancelled
from events.failure import Failure, FailureKind
from events.ids import FIRST_PREV, chain_hash
from events.ids import run_id as run_id_of
from events.results import ChildRunCompleted, LlmCallCompleted, TimerFired, ToolCallCompleted, ToolCallFailed, Usage
from projections import approvals, calls, decisions, runs, signals, step_pages
from projections.calls import Calls
from projections.entry import Entry
from projections.runs import Runs
from projections.steps import Steps
from projections.views import Batch, Views
from streams.workflow.evolve import evolve
from streams.workflow.expressions import to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunEvent


class Story:
    """One run of a workflow, told input by input, each in a batch of its own, after a restart if wanted."""

    def __init__(self, folder: Path, steps_: dict[str, Any], *, restarts: bool = False, **more: Any) -> None:
        self.path, self.restarts, self.log = folder / "v", restarts, Logs(1)
        self.run = Run(run_id_of("story"), spec=WorkflowSpec.model_validate({"name": "w", "steps": steps_, **more}))
        self.views = Views(self.path, TOPIC_IDS, PARTITIONS)

    def start(self, text: str = "{}", **more: Any) -> None:
        """Start the run."""
        self.take(StartRun("story", "w", self.run.spec.digest, text, **more))

    def take(self, *causes: Any) -> None:
        """Let the run decide about inputs, and the views take the decisions."""
        for cause in causes:
            decision = self.log._decided(self.run, self.run.state, cause)
            self.log.append(self.run.id, codec.encode(decision))
            self.run.state = evolve(self.run.state, RunEvent(decision, chain_hash(codec.body(decision))))
            if self.restarts:
                self.views.close()
                self.views = Views(self.path, TOPIC_IDS, PARTITIONS)
            self.views.apply(Batch(self.log.records()[-1:]))

    def awaits(self, step: str) -> str:
        """Return the call or timer that a step waits for."""
        awaited: str = self.run.state.steps[step].awaits
        return awaited

    def done(self, step: str, output: str = "1") -> None:
        """Answer a step's call."""
        self.take(ToolCallCompleted(self.awaits(step), step, output, "1", 5))

    def timer(self, step: str) -> None:
        """Let a step's timer fire when it is due."""
        self.log._at = max(self.log._at, self.run.state.steps[step].due)
        self.take(TimerFired(self.awaits(step), step))

    def ask(self, question: Any, *arguments: Any) -> Any:
        """Ask a read model."""
        with self.views.snapshot() as (db, _):
            return question(db, *arguments)

    def ask_run(self, question: Any, *arguments: Any) -> Any:
        """Ask a read model about the run."""
        with self.views.snapshot() as (db, _):
            return question(db, extent(db, self.run.id), *arguments)

    def row(self) -> dict[str, Any]:
        """Return the run's row."""
        found: dict[str, Any] = self.ask(runs.one, self.run.id)
        return found

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the run's steps by path."""
        return {row["step"]: row for row in self.ask_run(step_pages.of_run)[0]}

    def approval(self) -> dict[str, Any]:
        """Return the run's only approval."""
        (found,) = self.ask_run(approvals.of_run)
        assert isinstance(found, dict)
        return found


TOOL = {"tool": {"name": "echo"}}
ASKS = {
    "approval": {"message": "Send {{ input.n }}?", "show": "=input", "by": ["ann", "bob"], "editable": True, "deadline": "1h"}
}


def test_an_approval_waits_with_all_that_is_asked(tmp_path: Path) -> None:
    """While nobody has answered: the message, the value, who may, until when; and the run waits for one approval."""
    story = Story(tmp_path, {"ok": ASKS})
    story.start('{"n":3}')
    row = story.approval()
    assert (row["message"], row["value"], row["may_answer"], row["editable"]) == ("Send 3?", '{"n":3}', ["ann", "bob"], True)
    assert (row["status"], row["answered"]) == ("waiting", None)
    assert (row["due"] - row["requested"]).total_seconds() == 3600
    assert story.row()["waiting"] == {"approval": 1}
    (step,) = story.ask_run(step_pages.waiting, 10)
    assert (step["step"], step["status"], step["due"]) == ("ok", "awaiting_approval", row["due"])


@pytest.mark.parametrize("restarts", [False, True])
def test_an_answer_is_kept_with_who_gave_it_and_why(tmp_path: Path, restarts: bool) -> None:
    """One who may not answer changes nothing; the answer that counts says who, why, and what the value was made."""
    story = Story(tmp_path, {"ok": ASKS}, restarts=restarts)
    story.start('{"n":3}')
    story.take(ApprovalAnswered("ok", True, "eve", "mine", None))
    assert story.approval()["status"] == "waiting"
    story.take(ApprovalAnswered("ok", True, "ann", "less", '{"n":2}'))
    row = story.approval()
    assert (row["status"], row["answered_by"], row["reason"]) == ("approved", "ann", "less")
    assert (row["edited"], row["answer"], row["value"]) == (True, '{"n":2}', '{"n":3}')
    assert (story.row()["status"], story.row()["waiting"]) == ("completed", {})
    assert [each["by"] for each in story.ask_run(decisions.of_run, 0, 9)] == [None, "eve", "ann"]


@pytest.mark.parametrize(
    ("more", "cause", "expected"),
    [
        ({}, ApprovalAnswered("ok", False, "bob", "no", None), ("rejected", "bob", "no")),
        ({"on_reject": "continue"}, ApprovalAnswered("ok", False, "bob", "no", None), ("rejected", "bob", "no")),
        ({}, None, ("expired", "", "deadline")),
        ({"otherwise": "approve"}, None, ("approved", "", "deadline")),
        ({"otherwise": "reject"}, None, ("rejected", "", "deadline")),
        ({"otherwise": "reject", "on_reject": "continue"}, None, ("rejected", "", "deadline")),
        ({}, ChangeOutput("ok", "5", "cat", "I know"), ("replaced", "cat", "I know")),
        ({}, CancelStep("ok", "cat", "late"), ("cancelled", "cat", "late")),
        ({}, CancelRun("cat", "stop", False), ("cancelled", None, "the run was cancelled")),
        ({}, CancelRun("cat", "stop", True), ("cancelled", None, "the run was cancelled")),
    ],
)
def test_each_end_of_an_approval_is_told(tmp_path: Path, more: dict[str, Any], cause: Any, expected: tuple[Any, ...]) -> None:
    """Rejected, decided by its deadline, replaced by an output, cancelled with its step or run: with who and why."""
    story = Story(tmp_path, {"ok": {"approval": {**ASKS["approval"], **more}}})
    story.start('{"n":3}')
    if cause is None:
        story.timer("ok")
    else:
        story.take(cause)
    row = story.approval()
    assert (row["status"], row["answered_by"], row["reason"]) == expected
    assert row["answered"] is not None
    assert story.ask(approvals.newest, approvals.Filter(waiting=True), 10) == []
    assert not story.views.approvals.open


def test_waiting_approvals_are_listed_for_those_who_may_answer(tmp_path: Path) -> None:
    """`by` leaves out what that person may not answer; each says of which run and workflow it is; pages go on behind the last."""
    story = Story(tmp_path, {"one": ASKS, "any": {"approval": {"message": "?"}}})
    story.start('{"n":3}')
    listed = story.ask(approvals.newest, approvals.Filter(waiting=True, by="eve"), 10)
    assert [(row["step"], row["run_id"], row["workflow"]) for row in listed] == [("any", story.run.id, "w")]
    both = story.ask(approvals.newest, approvals.Filter(waiting=True, by="ann"), 10)
    assert [row["step"] for row in both] == ["one", "any"]
    at = story.log._at
    rest = story.ask(approvals.newest, approvals.Filter(after=(at, story.run.id, "one")), 10)
    assert [row["step"] for row in rest] == ["any"]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_kept_signal_is_the_output_of_the_step_that_takes_it(tmp_path: Path, restarts: bool) -> None:
    """A signal that came early is kept with its sender, then taken; others are unused at the end."""
    spec = {"first": TOOL, "word": {"needs": ["first"], "wait_for": {"signal": "go"}}}
    story = Story(tmp_path, spec, restarts=restarts)
    story.start()
    story.take(SignalReceived("s1", "go", None, '{"a":1}', "bob"), SignalReceived("s2", "other", None, "2", ""))
    assert [row["status"] for row in story.ask_run(signals.of_run, 0, 9)] == ["kept", "kept"]
    story.done("first")
    first, second = story.ask_run(signals.of_run, 0, 9)
    assert (first["status"], first["step"], first["sent_by"], first["payload"]) == ("taken", "word", "bob", '{"a":1}')
    assert (second["status"], second["step"]) == ("unused", None)
    assert (story.steps()["word"]["output"], story.steps()["word"]["kind"]) == ('{"a":1}', "wait_for")
    assert not story.views.signals.open


def test_a_step_that_waits_says_for_what(tmp_path: Path) -> None:
    """Signals with their correlation, sleeps with their end; the run says how many of each."""
    steps_ = {"a": {"wait_for": {"signal": "go", "correlation": "=input.k"}}, "b": {"sleep": "2h"}, "c": {"sleep": "1h"}}
    story = Story(tmp_path, steps_)
    story.start('{"k":"x"}')
    assert story.row()["waiting"] == {"signal": 1, "sleep": 2}
    found = story.ask_run(step_pages.waiting, 10)
    assert [row["step"] for row in found] == ["c", "b", "a"]
    assert (found[2]["signal"], found[2]["correlation"]) == ("go", "x")
    story.timer("c")
    assert story.row()["waiting"] == {"signal": 1, "sleep": 1}
    assert [row["run_id"] for row in story.ask(runs.newest, runs.Filter(status="waiting"), 5)] == [story.run.id]


def test_a_paused_run_and_a_breakpoint_hold_steps(tmp_path: Path) -> None:
    """Held steps say why; only a breakpoint counts as something waited for; the statuses follow each other."""
    story = Story(tmp_path, {"a": TOOL, "b": {"needs": ["a"], **TOOL}, "c": {"needs": ["b"], **TOOL}})
    story.start(break_at=("b",))
    assert (story.row()["status"], story.row()["breakpoints"]) == ("running", ["b"])
    story.done("a")
    assert (story.steps()["b"]["status"], story.steps()["b"]["reason"]) == ("held", "breakpoint")
    assert story.row()["waiting"] == {"breakpoint": 1}
    story.take(ResumeRun("ann", True))
    assert (story.row()["status"], story.row()["waiting"]) == ("paused", {})
    story.done("b")
    assert (story.steps()["c"]["reason"], story.row()["waiting"]) == ("paused", {})
    assert [row["run_id"] for row in story.ask(runs.newest, runs.Filter(status="paused"), 5)] == [story.run.id]
    assert story.ask(runs.newest, runs.Filter(status="waiting"), 5) == []
    story.take(ResumeRun("ann", False), PauseRun("ann", ""), ResumeRun("ann", False))
    story.done("c")
    assert story.row()["status"] == "completed"


REFUND = {"refund": {"tool": {"name": "refund"}, "retry": {"attempts": 1}}}


def test_a_run_that_fails_says_what_could_not_be_undone(tmp_path: Path) -> None:
    """It closes first, with the reason; compensations and clean-up steps have rows; then it tells what is not undone."""
    paid = {"tool": {"name": "charge"}, "compensation": "refund"}
    more = {"compensations": REFUND, "finally": {"tidy": TOOL}}
    story = Story(tmp_path, {"pay": paid, "bad": {"needs": ["pay"], **TOOL}}, **more)
    story.start()
    story.done("pay")
    assert story.steps()["pay"]["compensation"] == "refund"
    failure = Failure(FailureKind.REJECTED, "no")
    story.take(ToolCallFailed(story.awaits("bad"), "bad", failure, "1", 5))
    row = story.row()
    assert (row["status"], row["outcome"], row["failure_step"], row["failure_kind"]) == ("closing", "failed", "bad", "rejected")
    assert [each["run_id"] for each in story.ask(runs.newest, runs.Filter(status="open"), 5)] == [story.run.id]
    story.take(ToolCallFailed(story.awaits("undo(pay)"), "undo(pay)", failure, "1", 5))
    story.done("finally.tidy")
    row, found = story.row(), story.steps()
    assert (row["status"], row["not_undone"], row["failure_step"]) == ("failed", ["pay"], "bad")
    assert (row["steps_settled"], found["undo(pay)"]["status"], found["finally"]["status"]) == (2, "failed", "completed")


def test_what_a_cancelled_run_leaves_undone_is_told_in_its_order() -> None:
    """The row has the steps that the last decision names as not undone, as it names them."""
    cause, effect = CancelRun("ann", "now", True), RunCancelled("ann", "now", ("pay", "book[2]"))
    row = apply_all(Decision("r", 1, FIRST_PREV, b"i" * 16, 0, 5, cause, (effect,)))
    assert (row.status, row.not_undone, row.cancelled_by, row.ended) == ("cancelled", '["pay", "book[2]"]', "ann", 5)


def test_a_cancelled_run_says_by_whom(tmp_path: Path) -> None:
    """Its steps are cancelled with the reason, its calls too; an answer that comes all the same is paid."""
    story = Story(tmp_path, {"ask": {"llm": {"prompt": "?"}}}, **{"finally": {"tidy": TOOL}})
    story.start()
    call = story.awaits("ask")
    story.take(CancelRun("ann", "enough", False))
    (row, _) = story.ask_run(calls.of_run)
    assert (row["outcome"], row["late"]) == ("cancelled", False)
    story.take(LlmCallCompleted(call, "ask", '"x"', "m", "p", "stop", Usage(10, 5), 0.5, 9))
    (row, _) = story.ask_run(calls.of_run)
    assert (row["outcome"], row["late"], row["cost_usd"], story.steps()["ask"]["cost_usd"]) == ("cancelled", True, 0.5, 0.5)
    story.done("finally.tidy")
    run = story.row()
    assert (run["status"], run["cancelled_by"], run["failure_message"], run["cost_usd"]) == ("cancelled", "ann", "enough", 0.5)
    assert (story.steps()["ask"]["status"], story.steps()["ask"]["reason"]) == ("cancelled", "the run was cancelled")
    assert [each["run_id"] for each in story.ask(runs.newest, runs.Filter(status="cancelled"), 5)] == [story.run.id]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_fork_has_the_results_that_it_copied(tmp_path: Path, restarts: bool) -> None:
    """Copied steps are marked and have their output, also those of items that begin later; the origin is told."""
    many = {"for_each": {"items": "=[1, 2, 3]", "concurrency": 1}, **TOOL}
    story = Story(tmp_path, {"a": TOOL, "many": many}, restarts=restarts)
    copied = {"a": {"status": "completed", "output": '"old"'}, "many[2]": {"status": "completed", "output": "9"}}
    story.start(origin=Origin(run_id_of("other"), 4, "ab" * 32), copied=to_json(copied))
    assert (story.steps()["a"]["output"], story.steps()["a"]["copied"]) == ('"old"', True)
    story.done("many[0]")
    story.done("many[1]")
    found = story.steps()
    assert [found[f"many[{index}]"]["copied"] for index in range(3)] == [False, False, True]
    assert (found["many[2]"]["output"], found["many"]["output"]) == ("9", "[1,1,9]")
    row = story.row()
    assert (row["origin_run_id"], row["origin_seq"], row["origin_head"]) == (run_id_of("other"), 4, "ab" * 32)
    assert len(story.ask(runs.newest, runs.Filter(origin=run_id_of("other")), 5)) == 1


def test_a_child_run_is_named_by_its_step_and_names_its_parent(tmp_path: Path) -> None:
    """The step says which run it waits for; that run is listed among the parent's."""
    story = Story(tmp_path, {"sub": {"run": {"workflow": "w2"}}, "away": {"run": {"workflow": "w3", "detached": True}}})
    story.start(parent=Parent(run_id_of("top"), "up", "c" * 32))
    found = story.steps()
    child = run_id_of(story.awaits("sub"))
    assert (found["sub"]["kind"], found["sub"]["workflow"], found["sub"]["child_run_id"]) == ("run", "w2", child)
    assert (found["away"]["status"], found["away"]["detached"], found["away"]["output"]) == ("completed", True, "null")
    assert (story.row()["child_runs"], story.row()["parent_run_id"], story.row()["parent_step"]) == (2, run_id_of("top"), "up")
    assert [each["run_id"] for each in story.ask(runs.newest, runs.Filter(parent=run_id_of("top")), 5)] == [story.run.id]
    story.take(ChildRunCompleted(story.awaits("sub"), "sub", child, '{"x":1}'))
    assert story.steps()["sub"]["output"] == '{"x":1}'


@pytest.mark.parametrize("restarts", [False, True])
def test_items_are_counted_and_only_open_ones_are_in_memory(tmp_path: Path, restarts: bool) -> None:
    """A step with items says how many there are, have begun, are done and failed; settled items leave the memory."""
    many = {"for_each": {"items": "=range", "concurrency": 3, "tolerate": 2}, "retry": {"attempts": 1}, **TOOL}
    many["for_each"]["items"] = list(range(20))
    story = Story(tmp_path, {"many": many}, restarts=restarts)
    story.start()
    for index in range(10):
        if index % 5:
            story.done(f"many[{index}]")
        else:
            failure = Failure(FailureKind.REJECTED, "no")
            story.take(ToolCallFailed(story.awaits(f"many[{index}]"), f"many[{index}]", failure, "1", 5))
    row = story.steps()["many"]
    assert (row["total"], row["begun"], row["done"], row["failed"]) == (20, 13, 10, 2)
    assert story.views.steps.open[story.run.id].keys() == {"many", "many[10]", "many[11]", "many[12]"}
    assert len(story.views.calls.open[story.run.id]) == 3
    shown, known = story.ask_run(step_pages.of_run, 5)
    assert known == 14
    assert [each["step"] for each in shown] == ["many", "many[0]", "many[5]", "many[10]", "many[11]"]
    part = step_pages.Part(below="many", status="failed")
    assert [each["step"] for each in story.ask_run(step_pages.page, part, 9)] == ["many[0]", "many[5]"]
    rest = step_pages.Part(after=(shown[3]["offset"], shown[3]["position"]))
    assert [each["step"] for each in story.ask_run(step_pages.page, rest, 9)] == ["many[11]", "many[12]"]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_loop_has_the_output_of_its_last_iteration(tmp_path: Path, restarts: bool) -> None:
    """Every iteration stays as a row with its output; the loop's and its blocks' outputs are those that they come from."""
    inner = {"think": TOOL, "act": {"needs": ["think"], "transform": "=steps.think.output"}}
    story = Story(tmp_path, {"agent": {"repeat": {"until": "last == 3", "at_most": 5}, "steps": inner}}, restarts=restarts)
    story.start()
    for number in (1, 2, 3):
        story.done(f"agent[{number - 1}].think", str(number))
    found = story.steps()
    assert [found[f"agent[{index}].think"]["output"] for index in range(3)] == ["1", "2", "3"]
    assert [found[f"agent[{index}]"]["output"] for index in range(3)] == ["1", "2", "3"]
    assert (found["agent"]["output"], found["agent"]["kind"], found["agent"]["begun"]) == ("3", "repeat", 3)
    assert story.ask_run(step_pages.of_run, 1)[0][0]["output"] == "3"  # also when the iterations are not shown


@pytest.mark.parametrize("restarts", [False, True])
def test_an_output_that_is_replaced_is_the_one_that_is_shown(tmp_path: Path, restarts: bool) -> None:
    """The step, settled long ago or not at all, has the new output and is marked; what it cost stays."""
    story = Story(tmp_path, {"a": {"llm": {"prompt": "?"}}, "b": TOOL, "c": TOOL}, restarts=restarts)
    story.start()
    story.take(LlmCallCompleted(story.awaits("a"), "a", '"x"', "m", "p", "stop", Usage(10, 5), 0.5, 9))
    story.done("b")
    story.take(ChangeOutput("a", '"y"', "ann", ""), ChangeOutput("c", '"z"', "ann", ""))
    found = story.steps()
    assert (found["a"]["output"], found["a"]["changed"], found["a"]["cost_usd"], found["a"]["model"]) == ('"y"', True, 0.5, "m")
    assert (found["c"]["output"], found["c"]["changed"], found["b"]["changed"]) == ('"z"', True, False)
    assert story.row()["steps_settled"] == 3


@pytest.mark.parametrize("kind", get_args(Effect), ids=lambda kind: kind.__name__)
def test_no_effect_is_refused(kind: type[Any]) -> None:
    """Each effect alone, about a step that nobody knows, as a later version might write it, is taken and can be shown."""
    texts = {"effect": Failure("new_kind", "?"), "failure": Failure("new_kind", "?"), "tolerated": False, "not_undone": ()}
    numbers = dict.fromkeys(("attempt", "deadline", "due", "total", "index"), 1)
    flags = {"by": "", "editable": True, "detached": False, "single": False, "outcome": "failed"}
    values = {**texts, **numbers, **flags}
    effect = kind(**{name: values.get(name, "a[1].b") for name in kind.__dataclass_fields__})
    decision = Decision("r", 1, FIRST_PREV, b"i" * 16, 0, 5, CancelRun("", "", False), (effect,))
    apply_all(decision)
    assert as_json(decision)["effects"][0]["type"] == kind.__name__


def test_what_this_code_does_not_know_is_passed_over() -> None:
    """An effect and an input of a later version change nothing, and refuse nothing."""

    class Later:
        step = "a"

    row = apply_all(Decision("r", 1, FIRST_PREV, b"i" * 16, 0, 5, Later(), (Later(),)))  # type: ignore[arg-type]
    assert row.status == "running"


def apply_all(decision: Decision) -> Any:
    """Let every read model take a decision; return the run's row."""
    entry = Entry(0, 0, decision, b"h" * 32, 10)
    spent = Calls().apply(entry, "w")
    moved = Steps().apply(entry, spent)
    approvals.Approvals().apply(entry)
    signals.Signals().apply(entry)
    decisions.Decisions().apply(entry)
    return Runs().apply(entry, spent, moved)
