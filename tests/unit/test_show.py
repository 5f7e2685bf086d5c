"""How `foldflow show` and `tail` tell what decisions say: from the core's decisions through the read models and the API."""

import io
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest
from core import NOW, REJECTED, Case, started, tool, workflow
from rich.console import Console

from api import models
from api.routes.runs import list_runs, show_run
from api.views import View
from events import codec
from events.as_json import as_json
from events.commands import ApprovalAnswered, CancelRun, Origin, Parent, PauseRun, ResumeRun
from events.decisions import Effect
from events.failure import Failure
from events.results import LlmCallCompleted, Usage
from infra.cli import shown, tail, tree
from projections.ledger import Record
from projections.views import Batch, Views
from streams.workflow.expressions import to_json

TOPIC_IDS = {"decisions": b"d" * 16, "deadletter": b"l" * 16, "specs": b"s" * 16}


def answer(case: Case) -> dict[str, Any]:
    """Return what the API says of a run, as JSON."""
    records = [Record(0, offset, codec.encode(event.decision)) for offset, event in enumerate(case.events)]
    with tempfile.TemporaryDirectory() as folder:
        views = Views(Path(folder) / "v", TOPIC_IDS, 1)
        views.apply(Batch(records))
        with views.snapshot() as (db, positions):
            found: models.Run = show_run(View(db, positions, 0), "r")
            listed = list_runs(View(db, positions, 0), status="open", limit=5)
            assert bool(listed.runs) is not case.state.over
        views.close()
    return found.model_dump(mode="json")


def printed(case: Case) -> str:
    """Return what `foldflow show` writes of a run."""
    out = io.StringIO()
    shown.print_run(answer(case), Console(file=out, width=200, highlight=False))
    return out.getvalue()


def names(case: Case) -> list[str]:
    """Return the lines of the tree of a run's steps."""
    return [line.lead + line.name for line in tree.lines(map(tree.item_of, answer(case)["steps"]))]


EACH = {"for_each": {"items": "=range", "concurrency": 100, "tolerate": "all"}, "retry": {"attempts": 1}}


def many(count: int) -> dict[str, Any]:
    """Return a step with so many items."""
    return tool(**EACH | {"for_each": {**EACH["for_each"], "items": list(range(count))}})  # type: ignore[dict-item]


def rich() -> Case:
    """Return a run in the middle of everything."""
    case = workflow(
        {
            "charge": tool(compensation="refund"),
            "many": many(300),
            "agent": {
                "repeat": {"until": "false", "at_most": 9},
                "steps": {"think": {"llm": {"prompt": "?"}}, "act": {"needs": ["think"], "tool": {"name": "echo"}}},
            },
            "review": {"approval": {"message": "Send it to\n{{ input.n }} people?", "by": ["ann", "bob"], "deadline": "1h"}},
            "paid": {"wait_for": {"signal": "payment", "correlation": "=string(input.n)"}},
            "nap": {"sleep": "3d"},
            "sub": {"run": {"workflow": "report"}},
            "old": tool(),
            "gate": tool(needs=["charge"]),
            "pick": {"needs": ["old"], "switch": {"low": {"when": "input.n < 2", **tool()}, "high": {"transform": 1}}},
            "end": {"needs": ["gate", "many"], "transform": 1},
        },
        compensations={"refund": {"tool": {"name": "refund"}}},
    )
    copied = {"old": {"status": "completed", "output": "1"}}
    origin, parent = Origin("8f6a3a7e-0000-5000-8000-000000000001", 7, "ab" * 32), Parent("top", "ask[2].sub", "c" * 32)
    case.start('{"n":3}', break_at=("gate",), copied=to_json(copied), origin=origin, parent=parent)
    case.done("charge")
    for index in range(0, 60, 2):
        case.done(f"many[{index}]") if index % 20 else case.fails(f"many[{index}]", REJECTED)
    for index in range(2):
        path = f"agent[{index}].think"
        case.when(LlmCallCompleted(case.awaits(path), path, '"x"', "m", "p", "stop", Usage(100, 20), 0.01, 9))
        case.done(f"agent[{index}].act")
    return case


def test_a_run_in_the_middle_of_everything() -> None:
    """The tree has each step under its own, items and iterations folded, with what each waits for, comes from or leads to."""
    text = printed(rich())
    for line in (
        "status       running, waits for 1 approval, 1 signal, 1 sleep, 1 breakpoint",
        "parent       run top, step ask[2].sub",
        "forked from  run 8f6a3a7e-0000-5000-8000-000000000001, as its decision 7 left it",
        "stops before  gate",
    ):
        assert " ".join(line.split()) in " ".join(text.split()), line
    rows = {line[4:].split("  ")[0].strip(): line for line in text.splitlines()}
    assert "refund undoes it" in rows["charge"]
    assert "[300 items: 27 ✓ 3 ✗ 270 …]" in rows["many"]
    assert "[3 iterations]" in rows["agent"]
    assert "copied" in rows["old"]
    assert "report → run " in rows["sub"]
    assert "held" in rows["gate"]
    assert "breakpoint" in rows["gate"]
    assert "until " in rows["nap"]
    assert "pending" not in text  # nothing is known of its version here


def test_what_waits_is_said_with_the_command_that_answers() -> None:
    """Approvals with who may, until when and what is asked in one line; signals with their correlation; breakpoints."""
    lines = list(shown.waiting(answer(rich())))
    approval = next(line for line in lines if "approval" in line)
    assert approval.startswith("? step review waits for an approval by ann or bob until ")
    assert approval.endswith(": Send it to 3 people?")
    assert lines[lines.index(approval) + 1] == "    foldflow approve r review"
    assert "    foldflow signal r payment --correlation 3 --payload JSON" in lines
    assert "    foldflow resume r gate" in lines
    assert [line for line in lines if line.startswith("◔ step nap sleeps until ")]


def test_paths_in_commands_are_quoted_for_the_shell() -> None:
    """An item's path has brackets, which a shell would take for a pattern."""
    case = started({"ask": {"for_each": {"items": [1, 2]}, "approval": {"message": "?"}}})
    assert "    foldflow approve r 'ask[1]'" in list(shown.waiting(answer(case)))


def test_items_are_folded_to_those_that_matter() -> None:
    """Of many items three are shown, those that failed before those that are under way; the rest is counted."""
    case = started({"many": many(10)})
    assert names(case) == [
        "many  [10 items: 10 …]",
        "├─ [0]",
        "├─ [1]",
        "├─ [2]",
        "└─ … 7 more",
    ]
    case.fails("many[7]", REJECTED)
    case.done("many[0]")
    assert names(case) == ["many  [10 items: 1 ✓ 1 ✗ 8 …]", "├─ [1]", "├─ [2]", "├─ [7]", "└─ … 7 more"]
    for index in (1, 2, 3, 4, 5, 6, 8, 9):
        case.done(f"many[{index}]")
    assert names(case) == ["many  [10 items: 9 ✓ 1 ✗]", "├─ [7]", "└─ … 9 more"]


def test_few_items_are_shown_until_all_is_well() -> None:
    """Up to three items are shown while they are under way; a step whose items are all fine is one line."""
    case = started({"few": many(2), "none": many(0)})
    assert names(case) == ["few  [2 items: 2 …]", "├─ [0]", "└─ [1]", "none  [0 items]"]
    case.done("few[0]")
    case.done("few[1]")
    assert names(case) == ["few  [2 items: 2 ✓]", "none  [0 items]"]


def test_only_the_iteration_that_is_under_way_is_shown() -> None:
    """Of a loop with many iterations the last one stands there with its own steps."""
    inner = {"a": tool(), "b": {"needs": ["a"], **tool()}}
    case = started({"loop": {"repeat": {"until": "false", "at_most": 99}, "steps": inner}})
    for index in range(5):
        case.done(f"loop[{index}].a")
        case.done(f"loop[{index}].b")
    case.done("loop[5].a")
    assert names(case) == ["loop  [6 iterations]", "├─ [5]", "│  ├─ a", "│  └─ b", "└─ … 5 more"]


def test_nested_steps_stand_below_their_own() -> None:
    """A switch shows the case that was taken and why not the others; blocks in blocks are branches of branches."""
    pick = {"switch": {"low": {"when": "false", **tool()}, "high": {"steps": {"x": tool(), "y": tool()}}}}
    case = started({"pick": pick, "z": tool()})
    assert names(case) == ["pick", "├─ low", "└─ high", "   ├─ x", "   └─ y", "z"]
    assert "skipped" in next(line for line in printed(case).splitlines() if "─ low" in line)


def test_a_cancelled_run_shows_what_undoes_it_last() -> None:
    """While it closes it says how it will end; then by whom and why, what could not be undone, and the clean-up steps."""
    undo = {"refund": {"tool": {"name": "refund"}, "retry": {"attempts": 1}}}
    case = started({"pay": tool(compensation="refund"), "b": tool()}, compensations=undo, **{"finally": {"tidy": tool()}})
    case.done("pay")
    case.when(CancelRun("ann", "asked twice", False))
    closing = printed(case)
    assert (
        "closing  (will be cancelled: what is to be undone and cleaned up comes first)  cancelled by ann: asked twice" in closing
    )
    case.fails("undo(pay)", REJECTED)
    case.done("finally.tidy")
    text = printed(case)
    assert "cancelled by ann: asked twice" in text
    assert "not undone" in text
    assert names(case) == ["pay", "b", "undo(pay)", "finally", "└─ tidy"]
    assert "failure" not in text.split("input")[0].replace("calls", "")


def test_a_paused_run_says_how_to_go_on() -> None:
    """Paused, with how many steps are held and the command; once resumed nothing of that is left."""
    case = started({"a": tool(), "b": tool(needs=["a"])})
    case.when(PauseRun("ann", ""))
    case.done("a")
    assert list(shown.waiting(answer(case))) == [
        "‖ the run is paused: what is under way goes on, nothing more is started; 1 step is held",
        "    foldflow resume r",
    ]
    case.when(ResumeRun("ann", False))
    assert list(shown.waiting(answer(case))) == []


def test_very_many_steps_are_shown_as_far_as_they_matter() -> None:
    """Beyond 500 steps the answer has those that are under way or went wrong, and the page says how many there are."""
    case = started({"many": many(600)})
    index = 0
    while case.state.steps["many"].done < 550:
        case.done(f"many[{index}]") if index else case.fails("many[0]", REJECTED)
        index += 1
    run = answer(case)
    assert (run["steps_known"], len(run["steps"])) == (601, 52)
    assert [step["step"] for step in run["steps"][:2]] == ["many", "many[0]"]
    assert "of 601 steps, items and iterations" in printed(case)
    assert names(case) == ["many  [600 items: 549 ✓ 1 ✗ 50 …]", "├─ [0]", "├─ [550]", "├─ [551]", "└─ … 597 more"]


# --- tail ---


@pytest.mark.parametrize("kind", get_args(Effect), ids=lambda kind: kind.__name__)
def test_each_effect_is_one_line(kind: type[Any]) -> None:
    """`foldflow tail` tells each effect in one line that begins with its type, whatever stands in it."""
    values = {"failure": Failure("timeout", "no\nanswer"), "tolerated": False, "not_undone": ("x",), "by": "ann\nbob"}
    values |= dict.fromkeys(("attempt", "deadline", "due", "total", "index"), NOW)
    effect = kind(**{name: values.get(name, "many[1].ask") for name in kind.__dataclass_fields__})
    line = tail.in_words(as_json(effect))
    assert line.startswith(f"{kind.__name__}  ")
    assert "\n" not in line
    assert "Namespace" not in line
    if hasattr(effect, "step") and kind.__name__ not in ("RunClosing", "RunFailed"):
        assert "many[1].ask" in line


def test_an_effect_of_a_later_version_is_shown_as_it_is() -> None:
    """What has no words here is shown as JSON, in one line."""
    assert tail.in_words({"type": "StepBlessed", "step": "a"}) == 'StepBlessed  {"step": "a"}'


def test_a_decision_is_told_in_words() -> None:
    """Its number and input, then its effects; of very many the first 50."""
    ask = started({"ok": {"approval": {"message": "Really?", "by": ["ann"]}}})
    ask.when(ApprovalAnswered("ok", True, "ann", "fine", None))
    first, second = (tail.decision_lines(as_json(event.decision)) for event in ask.events)
    assert first[0].startswith("   1 ← StartRun {")
    assert "waits for an approval" in first[1]
    assert "Really?" in first[1]
    assert second[0].startswith('   2 ← ApprovalAnswered {"step": "ok", "approved": true, "by": "ann"')
    assert [line.split()[1] for line in second[1:]] == ["StepCompleted", "RunCompleted"]
    lines = tail.decision_lines(as_json(started({"many": many(80)}).events[0].decision))
    assert (len(lines), lines[-1]) == (52, "     … and 31 effects more; --full shows all")
