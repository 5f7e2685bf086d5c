"""The testing kit: what is given, when and then; and that each check fails with a message that helps."""

import asyncio
import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from events.catalog import EFFECTS, INPUTS
from events.commands import PauseRun, StartRun
from events.decisions import InputIgnored, LoopAdvanced, RetryScheduled, UnreadableInput
from events.results import TimerFired
from streams.testing import ANYTHING, NEVER, Failure, Run, UnscriptedCallError, Usage, answer, answers, given, partly
from streams.testing import timeline as words
from streams.testing.histories import HistoryError, replay
from streams.workflow.definition import DefinitionFileError
from streams.workflow.expressions import DefinitionError
from streams.workflow.payloads import INLINE_BYTES
from streams.workflow.spec import WorkflowSpec
from tools.errors import RetryableError, TerminalError
from tools.registry import load

DOWN = Failure("unavailable", "the line is down")
FLOW = """
name: mails
input: {type: object, required: [to], properties: {to: {type: string}, tone: {default: kind}}}
steps:
  look: {tool: {name: look_up, arguments: {name: "=input.to"}}, retry: {attempts: 3, initial: 1s, factor: 2}}
  write:
    needs: [look]
    llm:
      prompt: "Write to {{ steps.look.output.name }}, {{ input.tone }}."
      schema: {type: object, required: [subject], properties: {subject: {type: string}}}
    retry: {attempts: 2, initial: 1s}
  release:
    needs: [write]
    approval: {message: "Send it?", show: "=steps.write.output", by: [ann, bo], editable: true, deadline: 2d}
  send: {needs: [release], tool: {name: send, arguments: {mail: "=steps.release.output.value"}}}
output: {sent: "=steps.send.output", subject: "=steps.release.output.value.subject"}
"""
TOOLS = {"look_up": {"name": "Ann"}, "send": True}
MODELS = {"write": {"subject": "Hello"}}


def spec(steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "w", "steps": steps, **more}


def tool(name: str = "echo", **more: Any) -> dict[str, Any]:
    return {"tool": {"name": name, **more.pop("given", {})}, **more}


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    path = tmp_path / "mails.yaml"
    path.write_text(FLOW)
    return path


@pytest.fixture
def mail(flow: Path) -> Run:
    return given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS)


def wrong(check: Callable[[], Any]) -> str:
    """Return what a check that fails says; the timeline is always part of it."""
    with pytest.raises(AssertionError) as error:
        check()
    text = str(error.value)
    assert "started with" in text
    return text


# --- Given ---


def test_the_readme_s_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workflow that the README writes passes the test that it shows."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    flow = next(each for each in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if each.startswith("name: summarise"))
    code = next(each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "streams.testing" in each)
    (tmp_path / "summarise.yaml").write_text(flow)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102 - our own
    scope["test_a_page_that_is_slow_today"]()


def test_a_run_goes_as_far_as_it_goes_without_time_and_people(mail: Run) -> None:
    """It starts from a file, and stops where a person is asked."""
    mail.then_waits_for(approval="release", time="2d").then_called("look_up", times=1, arguments={"name": "x"})
    mail.then_step("write", status="completed", output={"subject": "Hello"}).then_not_called("send")
    assert (mail.status, mail.output) == ("open", None)


def test_a_file_with_mistakes_says_where_they_are(tmp_path: Path) -> None:
    """Mistakes in the YAML are said with file and line."""
    path = tmp_path / "flow.yaml"
    path.write_text("name: x\nsteps:\n  a: {tol: {name: echo}}\n")
    with pytest.raises(DefinitionFileError, match=r"flow\.yaml:3"):
        given(path)


def test_an_input_that_intake_would_refuse_is_refused(flow: Path) -> None:
    """An input is checked against the workflow's schema, and defaults are filled in."""
    with pytest.raises(ValueError, match="'to' is a required property"):
        given(flow, input={}, tools=TOOLS, models=MODELS)
    given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS).then_asked_model("write", contains="kind")


def test_the_same_test_has_the_same_history(flow: Path) -> None:
    """Nothing in a run depends on when or where it runs."""
    first, second = (given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS) for _ in range(2))
    assert first.history == second.history
    other = given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS, at="2026-02-01T00:00:00Z", request_id="another")
    assert other.history != first.history


def test_a_history_is_chained_as_on_kafka(mail: Run) -> None:
    """Each decision names the one before."""
    decisions = mail.history
    assert [each.seq for each in decisions] == list(range(1, len(decisions) + 1))
    assert len({each.prev for each in decisions}) == len(decisions)


# --- Tools ---


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(RetryableError("busy"), "tool_retryable"), (TerminalError("no"), "tool_terminal"), (KeyError("x"), "tool_crashed")],
)
def test_what_a_tool_raises_is_its_failure(raised: Exception, kind: str) -> None:
    """Errors become the kinds that the tool worker makes of them."""

    def fails(**_: Any) -> Any:
        raise raised

    run = given(spec({"a": tool(retry={"attempts": 1})}), tools={"echo": fails})
    run.then_failed(kind, "a")


def test_a_tool_says_when_it_can_be_asked_again() -> None:
    """`retry_after_s` is taken as the worker takes it."""

    def busy(**_: Any) -> Any:
        raise RetryableError("busy", retry_after_s=90)

    run = given(spec({"a": tool()}), tools={"echo": answers(busy, 1)}).then_waits_for(time="90s")
    run.when_time_passes("90s").then_completed(1)


def test_tools_are_functions_of_any_kind() -> None:
    """Sync, async, typed or not, a real tool of the registry; with the arguments of the call."""

    async def later(text: str) -> str:
        await asyncio.sleep(0)
        return text.upper()

    async def bare(text):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return text + "!"

    arguments = {"given": {"arguments": {"text": "hi"}}}
    steps = {"a": tool("a", **arguments), "b": tool("b", **arguments), "c": tool("c", **arguments)}
    steps["d"] = tool("echo", given={"arguments": {"value": [1]}})
    tools = {**load(), "a": later, "b": bare, "c": lambda **arguments: len(arguments)}
    run = given(spec(steps, output={each: f"=steps.{each}.output" for each in steps}), tools=tools)
    run.then_completed({"a": "HI", "b": "hi!", "c": 1, "d": [1]})


def test_a_tool_may_be_called_where_a_loop_runs() -> None:
    """A test that is a coroutine itself can use async tools."""

    async def later() -> int:
        return 1

    async def test() -> Run:
        return given(spec({"a": tool()}), tools={"echo": later})

    asyncio.run(test()).then_completed(1)


def test_wrong_arguments_are_the_call_s_failure() -> None:
    """A function that can't take the arguments is not called, typed or not."""

    def typed(url: str) -> str:
        raise NotImplementedError

    for each in (typed, lambda url: url):
        run = given(spec({"a": tool(given={"arguments": {"uri": "x"}})}), tools={"echo": each})
        run.then_failed("tool_terminal", message="url")


def test_a_failed_assertion_in_a_script_fails_the_test() -> None:
    """It is the test's, not the tool's."""

    def check(**_: Any) -> Any:
        pytest.fail("no", pytrace=False)

    def also(**arguments: Any) -> Any:
        assert arguments == {"x": 1}

    with pytest.raises(pytest.fail.Exception):
        given(spec({"a": tool()}), tools={"echo": check})
    with pytest.raises(AssertionError):
        given(spec({"a": tool()}), tools={"echo": also})


def test_an_unscripted_call_says_what_to_add() -> None:
    """It names the call, its arguments, and where the answer belongs."""
    with pytest.raises(UnscriptedCallError) as error:
        given(spec({"a": tool("fetch", given={"arguments": {"url": "x"}})}), tools={"echo": 1})
    assert 'step `a` calls the tool fetch(url="x")' in str(error.value)
    assert "add it to `given(…, tools={'fetch': …})`; it has 'echo'" in str(error.value)
    with pytest.raises(UnscriptedCallError, match="asks a model: Say it"):
        given(spec({"a": {"llm": {"prompt": "Say it"}}}))
    with pytest.raises(UnscriptedCallError, match="starts a run of `other`"):
        given(spec({"a": {"run": {"workflow": "other"}}}))
    run = given(
        spec({"a": tool("one"), "s": {"needs": ["a"], "sleep": "1s"}, "b": tool("one", needs=["s"])}), tools={"one": answers(1)}
    )
    with pytest.raises(UnscriptedCallError, match=r"call number 2, and tools\['one'\] has 1 answers(.|\n)*time is up: s"):
        run.when_time_passes("1s")


def test_an_answer_that_is_no_json_is_the_test_s_mistake() -> None:
    """A value that JSON can't say is no answer."""
    with pytest.raises(UnscriptedCallError, match="not a JSON value"):
        given(spec({"a": tool()}), tools={"echo": {1, 2}})


def test_tools_that_write_files_have_a_folder(tmp_path: Path) -> None:
    """The folder is the test's, or a temporary one."""
    code = "def note(context: ToolContext) -> str:\n    return context.write('n.txt', b'x').path\n"
    (tmp_path / "noting.py").write_text(f"from tools.context import ToolContext\n{code}")
    tools = load([tmp_path / "noting.py"])
    run = given(spec({"a": tool("note")}), tools=tools, artifacts=tmp_path)
    assert Path(run.output) == tmp_path / run.run_id / "n.txt"
    run = given(spec({"a": tool("note")}), tools=tools)
    assert Path(run.output).read_bytes() == b"x"


# --- Models ---


def test_answers_are_checked_as_the_worker_checks_them(flow: Path) -> None:
    """An answer that doesn't fit its schema is a failure, and the next attempt is asked."""
    run = given(flow, input={"to": "x"}, tools=TOOLS, models={"write": answers("nonsense", {"subject": 7}, {"subject": "x"})})
    run.then_step("write", status="waiting")
    run.when_time_passes("1s").then_failed("invalid_output", step="write", message="7 is not of type 'string'")
    run.then_asked_model("write", times=2)


def test_models_are_found_by_path_without_numbers() -> None:
    """`each.ask` stands for all items, `*` for all others; a function sees the messages and the call."""
    inner = {"ask": {"llm": {"system": "Be brief.", "prompt": "Count {{ n }}"}}, "other": {"llm": {"prompt": "Go"}}}
    flow = spec(
        {
            "each": {
                "for_each": {"items": [1, 2], "as": "n"},
                "steps": inner,
                "output": ["=steps.ask.output", "=steps.other.output"],
            }
        }
    )

    def ask(messages: Any, call: Any) -> Any:
        assert messages[0] == {"role": "system", "content": "Be brief."}
        return f"{call.request.step}: {messages[1]['content']}"

    run = given(flow, models={"each.ask": ask, "*": "gone"})
    run.then_completed([["each[0].ask: Count 1", "gone"], ["each[1].ask: Count 2", "gone"]])
    run.then_asked_model("each.ask", times=2).then_asked_model("each[1].ask", times=1, contains=["Be brief", "Count 2"])


def test_usage_cost_and_ends_can_be_said() -> None:
    """They stand in the history as the worker would have written them."""
    said = answer("Hi", usage=Usage(12, 3), cost_usd=0.02, finish_reason="length")
    run = given(spec({"a": {"llm": {"prompt": "x"}}}), models={"a": said}).then_completed("Hi")
    answered: Any = run.history[1].input
    assert (answered.usage, answered.cost_usd, answered.finish_reason) == (Usage(12, 3), 0.02, "length")
    cut = given(spec({"a": {"llm": {"prompt": "x", "schema": {}}, "retry": {"attempts": 1}}}), models={"a": said})
    cut.then_failed("invalid_output", message="max_tokens")


# --- Time ---


def test_timers_fire_in_order_at_their_times() -> None:
    """Whatever is passed at once, each fires when it is due."""
    flow = spec({"slow": {"sleep": "3h"}, "fast": {"sleep": "1h"}, "after": {"needs": ["fast"], "sleep": "1h"}})
    run = given(flow, at="2026-01-01T00:00:00Z").when_time_passes("3d")
    fired = [
        (each.input.step, (each.at - run.history[0].at) / 3_600_000)
        for each in run.history[1:]
        if isinstance(each.input, TimerFired)
    ]
    assert fired == [("fast", 1), ("after", 2), ("slow", 3)]
    assert run.now == run.history[0].at + 3 * 86_400_000


def test_retries_wait_for_time(flow: Path) -> None:
    """An attempt that failed is followed by the next one when its time has come, not before."""
    run = given(flow, input={"to": "x"}, tools=TOOLS | {"look_up": answers(DOWN, DOWN, {"name": "Bo"})}, models=MODELS)
    run.then_called("look_up", times=1)
    run.when_time_passes("100ms").then_nothing_happened()
    run.when_time_passes().then_called("look_up", times=2)
    run.when_time_passes().then_called("look_up", times=3).then_asked_model("write", contains="Bo")
    assert [each.attempt for decision in run.history for each in decision.effects if isinstance(each, RetryScheduled)] == [2, 3]


def test_a_call_that_is_never_answered_runs_into_its_limit() -> None:
    """The attempt's own time limit ends it."""
    run = given(spec({"a": tool(timeout="20s", retry={"attempts": 1})}), tools={"echo": NEVER}).then_waits_for(time="20s")
    run.when_time_passes("19s").then_nothing_happened()
    run.when_time_passes("1s").then_failed("timeout", "a")


def test_an_answer_may_come_later_or_too_late() -> None:
    """It comes at its time; the answer to an attempt that was given up changes nothing."""
    run = given(
        spec({"a": tool(timeout="20s", retry={"attempts": 2, "initial": "1s"})}),
        tools={"echo": answers(answer(1, after="30s"), answer(2, after="30s"))},
    )
    run.when_time_passes("25s").then_step("a", status="running")
    run.when_time_passes("6s")
    assert InputIgnored("late") in run.effects
    run.when_time_passes("1d").then_failed("timeout")


def test_time_limits_of_runs_count() -> None:
    """The limit of the whole run is something that is due."""
    run = given(spec({"a": {"wait_for": {"signal": "x"}}}, time_limit="1h")).then_waits_for(
        signal="x", time="2026-01-01T01:00:00Z"
    )
    run.when_time_passes("1h").then_failed("timeout")


def test_a_long_loop_goes_on_by_itself() -> None:
    """A loop that leaves off since one decision holds enough goes on without the test's help."""
    run = given(spec({"a": {"for_each": {"items": list(range(1500)), "concurrency": 2000}, "transform": "=item"}}))
    run.then_completed(lambda items: len(items) == 1500)
    assert len(run.history) > 1


# --- When ---


def test_people_approve_edit_and_reject(mail: Run, flow: Path) -> None:
    """An approval is found without its name, and answered by the first who may."""
    mail.when_approved(value={"subject": "Better"}).then_completed({"sent": True, "subject": "Better"})
    mail.then_called("send", arguments={"mail": {"subject": "Better"}}).then_step("release", output=partly(by="ann", edited=True))
    again = given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS)
    again.when_approved(by="eve").then_nothing_happened().then_waits_for(approval="release")
    again.when_rejected("release", by="bo", reason="too short").then_failed("not_approved", "release", "too short")
    over = given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS).when_time_passes("3d")
    over.then_failed("timeout", "release")


def test_signals_are_kept_taken_and_count_once() -> None:
    """A signal that nobody waits for yet is kept; the same one again is ignored."""
    flow = spec(
        {
            "s": {"sleep": "1h"},
            "w": {"needs": ["s"], "wait_for": {"signal": "paid", "correlation": "7"}},
            "v": {"wait_for": {"signal": "go"}},
        }
    )
    run = given(flow).when_signal("paid", {"eur": 5}, correlation="7", signal_id="one")
    run.when_signal("paid", {"eur": 6}, correlation="7", signal_id="one").then_nothing_happened()
    run.when_time_passes("1h").then_step("w", output={"eur": 5}).then_waits_for(signal="go")
    run.when_signal("go").then_completed(None)


def test_runs_are_paused_and_go_on(flow: Path) -> None:
    """What is held waits; a breakpoint holds one step."""
    run = given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS, break_at=["write"]).then_waits_for(held="write")
    run.when_resumed("write").then_waits_for(approval="release")
    run.when_paused(reason="lunch").when_approved().then_waits_for(held="send")
    run.when_paused().then_nothing_happened()
    run.when_resumed().then_completed()
    one = (
        given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS)
        .when_paused("send")
        .when_approved()
        .then_step("send", status="held")
    )
    one.when_resumed(single=True).then_completed()


def test_outputs_are_set_and_steps_cancelled() -> None:
    """A call whose output is set, or that is cancelled, is not answered any more."""
    flow = spec({"a": tool(on_failure="continue"), "b": {"needs": ["a"], "transform": "=steps.a.output"}})
    late = {"echo": answer(1, after="10s")}
    run = given(flow, tools=late).when_output_changed("a", 5, reason="known").then_completed(5)
    run.when_time_passes("1m").then_nothing_happened()
    given(flow, tools=late).when_cancelled("no", step="a").then_step("a", status="failed", failure="cancelled").then_completed(
        None
    )


def test_what_was_done_is_undone_in_reverse() -> None:
    """Cancelling and failing undo; `then_undone` says what was."""
    flow = spec(
        {
            "a": tool(compensation="back"),
            "b": tool(needs=["a"], compensation="back"),
            "w": {"needs": ["b"], "wait_for": {"signal": "x"}},
        },
        compensations={"back": tool("back", given={"arguments": {"of": "=output"}}, retry={"attempts": 1})},
        **{"finally": {"tidy": tool("tidy")}},
    )
    tools = {"echo": answers(1, 2), "back": {"ok": True}, "tidy": None}
    run = (
        given(flow, tools=tools)
        .when_cancelled("enough", by="ann")
        .then_cancelled(by="ann", reason="enough")
        .then_undone(["b", "a"])
    )
    run.then_called("back", times=1, arguments={"of": 2}).then_step("undo(a)", status="completed").then_step(
        "finally.tidy", status="completed"
    )
    given(flow, tools=tools | {"back": answers(DOWN, 1)}).when_cancelled().then_cancelled().then_undone(["a"])
    given(flow, tools=tools).when_cancelled(force=True).then_undone([])


def test_anything_may_come_in(mail: Run) -> None:
    """Any input of the inbox can be given as it is."""
    mail.when_input(StartRun("again", "mails", "0", "{}")).then_nothing_happened()
    mail.when_input(PauseRun("ann", "")).then_waits_for(approval="release")


# --- Child runs ---

PARENT = {"name": "parent", "steps": {"a": {"run": {"workflow": "child", "input": {"n": 1}}, "on_failure": "continue"}}}
CHILD = {
    "name": "child",
    "input": {"properties": {"n": {"type": "integer"}}},
    "steps": {"c": {"wait_for": {"signal": "x"}}, "d": tool(needs=["c"])},
}


def test_other_workflows_are_scripted() -> None:
    """By an output, a function of the input, or a failure."""
    given(PARENT, runs={"child": {"x": 1}}).then_completed({"x": 1}).then_started_run("child", times=1, input={"n": 1})
    given(PARENT, runs={"child": lambda i: i["n"] + 1}).then_completed(2)
    given(PARENT, runs={"child": Failure("child_failed", "no")}).then_step("a", failure="child_failed")
    given(PARENT, runs={"child": NEVER}).then_step("a", status="running")


def test_other_workflows_are_really_run() -> None:
    """A child is a run of its own, with the same tools, models and clock."""
    run = given(PARENT, runs={"child": WorkflowSpec.model_validate(CHILD)}, tools={"echo": "done"})
    child = run.child("a").then_waits_for(signal="x")
    assert "child of a: child, open" in run.timeline
    assert isinstance(child, Run)
    child.when_signal("x").then_completed("done").then_called("echo")
    run.then_completed("done")
    cancelled = given(PARENT, runs={"child": WorkflowSpec.model_validate(CHILD)}).when_cancelled()
    cancelled.then_cancelled().child("a").then_cancelled()
    wrong_input = {"name": "parent", "steps": {"a": {"run": {"workflow": "child", "input": {"n": "x"}}}}}
    given(wrong_input, runs={"child": WorkflowSpec.model_validate(CHILD)}).then_failed("invalid_arguments")
    with pytest.raises(AssertionError, match="step b has started no run"):
        run.child("b")


def test_other_workflows_are_read_from_files(flow: Path) -> None:
    """A path is a definition's; a version that isn't that one is unknown."""
    parent = {"name": "parent", "steps": {"a": {"run": {"workflow": "mails", "input": {"to": "x"}}}}}
    run = given(parent, runs={"mails": flow}, tools=TOOLS, models=MODELS)
    run.child("a").when_approved().then_completed()
    run.then_completed(partly(sent=True))
    parent["steps"] = {"a": {"run": {"workflow": "mails", "version": "0" * 64}}}
    given(parent, runs={"mails": flow}).then_failed("unknown_workflow")


def test_a_workflow_may_start_itself() -> None:
    """Recursion needs no script."""
    step = {"again": {"when": "input.n > 0", "run": {"workflow": "down", "input": {"n": "=input.n - 1"}}}}
    flow = {"name": "down", "input": {"properties": {"n": {"type": "integer"}}}, "steps": step, "output": "=input.n"}
    run = given(flow, input={"n": 3}).then_completed(3)
    run.child("again").child("again").child("again").then_completed(0).then_step("again", status="skipped")


# --- Payloads ---


def test_large_values_travel_by_reference() -> None:
    """What is too large for an event is kept beside, and seen whole by steps and checks."""
    text = "x" * (INLINE_BYTES + 10)
    flow = spec(
        {
            "a": tool(),
            "n": {"needs": ["a"], "transform": "=size(steps.a.output)"},
            "b": tool("last", needs=["a"], given={"arguments": {"of": "=steps.a.output"}}),
        },
        output=["=steps.n.output", "=steps.a.output"],
    )
    run = (
        given(flow, tools={"echo": text, "last": 1}).then_completed([len(text), text]).then_called("last", arguments={"of": text})
    )
    run.then_step("a", output=text)
    assert "$payload" in run.history[1].input.output  # type: ignore[union-attr]


# --- Forks ---


def test_a_fork_runs_only_what_is_changed(mail: Run) -> None:
    """Results are copied; what depends on a change runs again, and the first run stays as it is."""
    before = mail.history
    fork = mail.forked(outputs={"write": {"subject": "Mine"}}, rerun=["release"]).then_waits_for(approval="release")
    fork.then_not_called("look_up").then_step("look", status="completed", output={"name": "Ann"})
    fork.when_approved().then_completed(partly(subject="Mine"))
    assert mail.history == before
    assert fork.run_id != mail.run_id
    other = mail.forked(rerun=["look"], input={"to": "y"}, spec=FLOW_WITHOUT_RELEASE).then_completed(True)
    other.then_called("look_up", arguments={"name": "y"})
    with pytest.raises(DefinitionError, match="there is no step `nothing`"):
        mail.forked(rerun=["nothing"])


FLOW_WITHOUT_RELEASE = {
    "name": "mails",
    "steps": {"look": tool("look_up", given={"arguments": {"name": "=input.to"}}), "send": tool("send", needs=["look"])},
}


# --- Then: each check fails with what helps ---


def test_how_it_ended_is_checked(mail: Run, flow: Path) -> None:
    """A wrong end says what the run waits for, or how it ended, and where an output differs."""
    assert "not completed: open at +0s, waits for release: an approval by ann or bo" in wrong(mail.then_completed)
    assert "has not failed" in wrong(mail.then_failed)
    assert "is not cancelled" in wrong(mail.then_cancelled)
    mail.when_approved()
    assert 'output.subject is "Hello", not "Bye"' in wrong(lambda: mail.then_completed({"sent": True, "subject": "Bye"}))
    assert "output has subject besides" in wrong(lambda: mail.then_completed({"sent": True}))
    assert "output has no title" in wrong(lambda: mail.then_completed(partly(title=ANYTHING)))
    assert "which <lambda> refuses" in wrong(lambda: mail.then_completed(partly(sent=lambda sent: not sent)))
    assert "waits for nothing: completed at +0s" in wrong(lambda: mail.then_waits_for(approval="release"))
    failed = given(flow, input={"to": "x"}, tools=TOOLS | {"look_up": Failure("tool_terminal", "unknown person")}, models=MODELS)
    failed.then_failed("tool_terminal", "look", "unknown")
    assert "the run failed by tool_terminal, not by timeout" in wrong(lambda: failed.then_failed("timeout"))
    assert "because of step look, not of step send" in wrong(lambda: failed.then_failed(step="send"))
    assert "'unknown person', and not 'x y'" in wrong(lambda: failed.then_failed(message="x y"))
    cancelled = given(flow, input={"to": "x"}, tools=TOOLS, models=MODELS).when_cancelled("late", by="ann")
    assert "cancelled by 'ann', not by 'bo'" in wrong(lambda: cancelled.then_cancelled(by="bo"))
    assert "because of 'late', not of 'x'" in wrong(lambda: cancelled.then_cancelled(reason="x"))
    assert "undone was nothing, not look" in wrong(lambda: cancelled.then_undone(["look"]))


def test_where_it_is_is_checked(mail: Run) -> None:
    """A wrong place says what is awaited."""
    assert "no approval of step send is awaited" in wrong(lambda: mail.then_waits_for(approval="send"))
    assert "signal paid is not awaited" in wrong(lambda: mail.then_waits_for(signal="paid"))
    assert "step send is not held" in wrong(lambda: mail.then_waits_for(held="send"))
    assert "nothing is due in 3d; due is 2d" in wrong(lambda: mail.then_waits_for(time="3d"))
    assert "step write is completed, not failed" in wrong(lambda: mail.then_step("write", status="failed"))
    assert "step write failed by nothing, not by timeout" in wrong(lambda: mail.then_step("write", failure="timeout"))
    assert "write's output.subject is" in wrong(lambda: mail.then_step("write", output=partly(subject="x")))
    assert "step send has not begun" in wrong(lambda: mail.then_step("send"))
    assert "the workflow has no step sned" in wrong(lambda: mail.then_step("sned"))
    assert "something happened" in wrong(mail.then_nothing_happened)
    assert "no approval is awaited" in wrong(mail.when_approved().when_approved)


def test_what_it_asked_for_is_checked(mail: Run) -> None:
    """A wrong call says which calls there were."""
    assert "tool send was never called" in wrong(lambda: mail.then_called("send"))
    assert 'look_up(name="x")' in wrong(lambda: mail.then_not_called("look_up"))
    assert "was called 1 times, not 2" in wrong(lambda: mail.then_called("look_up", times=2))
    assert 'not called like that: arguments.name is "x", not "y"' in wrong(
        lambda: mail.then_called("look_up", arguments={"name": "y"})
    )
    assert 'write was not asked "Bo"' in wrong(lambda: mail.then_asked_model("write", contains="Bo"))
    assert "workflow other was never called" in wrong(lambda: mail.then_started_run("other"))
    two = given(spec({"a": {"approval": {"message": "A"}}, "b": {"approval": {"message": "B"}}}))
    assert "2 approvals are awaited: say which step" in wrong(two.when_approved)


def test_the_timeline_is_readable(mail: Run) -> None:
    """A line for each decision, the last thing that happened marked, then what is awaited."""
    lines = mail.when_time_passes("1d").when_approved(by="bo", reason="fine").timeline.splitlines()
    assert lines[0].startswith("mails ")
    assert [line[:6].split() for line in lines[1:]] == [["1"], ["2"], ["3"], [">", "4"], [">", "5"]]
    assert lines[1].split("→")[1] == ' look calls look_up(name="x")'
    assert lines[3].split("→")[1].startswith(" release asks ann or bo: Send it?, for 2d at most")
    assert "bo approved release (fine)" in lines[4]
    assert "RUN COMPLETED" in lines[5]
    assert "+1d" in lines[5]


def test_a_long_timeline_is_cut() -> None:
    """What is between the beginning and the end is counted."""
    run = given(spec({"a": {"repeat": {"until": "index == 98", "at_most": 99}, **tool()}}), tools={"echo": 1}).then_completed()
    lines = run.timeline.splitlines()
    assert len(lines) == 62
    assert "… 40 decisions …" in lines[11]


def test_everything_has_words() -> None:
    """Each kind of input and effect can be told."""
    assert set(words._INPUTS) == {*INPUTS, UnreadableInput}
    assert set(words._EFFECTS) == set(EFFECTS)
    assert words.effects_in_words([LoopAdvanced("a", n) for n in range(9)], 0).count(";") == 5


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0s"), (1500, "1.5s"), (61_000, "1m 1s"), (3_600_000, "1h"), (86_399_999, "1d"), (90_000_000, "1d 1h"), (-5, "-0.005s")],
)
def test_durations_are_short(ms: int, text: str) -> None:
    """Two units are enough."""
    assert words.took(ms) == text


# --- Recorded histories ---


@pytest.fixture
def recorded(mail: Run, tmp_path: Path) -> Path:
    path = tmp_path / "mails.json"
    mail.when_approved().then_completed()
    mail.save(path)
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    other = path.with_name("changed.json")
    other.write_text(json.dumps(document))
    return other


def test_a_history_comes_out_as_it_is_recorded(recorded: Path) -> None:
    """Every decision, to the byte; what is recorded needs no tools and models."""
    found = replay(recorded).then_the_same()
    assert (found.decisions, found.workflow, found.same) == (5, "mails", True)
    assert "all 5 decisions come out as recorded" in str(found)


def test_payloads_are_recorded_too(tmp_path: Path) -> None:
    """Also those that only a payload refers to; without one, the history says which is missing."""
    text = "x" * (INLINE_BYTES + 10)
    flow = spec({"a": tool(), "b": {"needs": ["a"], "transform": {"a": "=size(steps.a.output)"}}})
    given(flow, tools={"echo": text}).then_completed().save(tmp_path / "large.json")
    replay(tmp_path / "large.json").then_the_same()
    found = replay(changed(tmp_path / "large.json", lambda each: each["payloads"].clear()))
    assert found.difference is not None
    assert "there is no payload" in found.difference.problem


def test_a_changed_byte_is_noticed(recorded: Path) -> None:
    """Wherever it is, in any decision, also in the last one."""
    values = [base64.b64decode(each) for each in json.loads(recorded.read_text())["decisions"]]
    for number, value in enumerate(values):
        for place in range(5, len(value), 7):
            other = value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]

            def change(document: dict[str, Any], number: int = number, other: bytes = other) -> None:
                document["decisions"][number] = base64.b64encode(other).decode()

            assert not replay(changed(recorded, change)).same, (number, place)


def test_missing_and_reordered_decisions_are_noticed(recorded: Path) -> None:
    """The difference is where the chain breaks."""

    def swap(document: dict[str, Any]) -> None:
        document["decisions"][1:3] = document["decisions"][2:0:-1]

    found = replay(changed(recorded, swap)).difference
    assert found is not None
    assert (found.seq, found.field) == (2, "seq")
    found = replay(changed(recorded, lambda each: each["decisions"].pop())).difference
    assert found is not None
    assert (found.seq, found.field) == (4, "head")


def test_another_version_says_where_runs_would_go_another_way(recorded: Path, tmp_path: Path) -> None:
    """A backtest: the first decision that differs, by field, with what came in and what follows now."""
    other = tmp_path / "other.yaml"
    other.write_text(FLOW.replace("Write to", "Please write to"))
    found = replay(recorded, load_spec(other))
    assert found.difference is not None
    assert (found.difference.seq, found.difference.field) == (2, "effects[1].messages")
    text = str(found)
    assert "decision 2 of 5 comes out differently: effects[1].messages" in text
    assert "Please write to Ann" in text
    assert 'input     look returned {"name":"Ann"}' in text
    with pytest.raises(AssertionError, match="comes out differently"):
        found.then_the_same()


def test_a_version_that_does_the_same_does_the_same(recorded: Path, tmp_path: Path) -> None:
    """What didn't matter for a run makes no difference; a step more or less does."""
    other = tmp_path / "other.yaml"
    other.write_text(FLOW.replace("attempts: 3", "attempts: 7"))
    assert replay(recorded, load_spec(other)).same
    other.write_text(FLOW.replace("output: {sent", "  last: {needs: [send], transform: 1}\noutput: {sent"))
    found = replay(recorded, load_spec(other)).difference
    assert found is not None
    assert (found.seq, found.field) == (5, "effects[1]")
    assert "recorded is RunCompleted of the run, now it is StepCompleted of step last" in found.problem
    other.write_text(FLOW.replace("required: [to]", "required: [to, cc]"))
    found = replay(recorded, load_spec(other)).difference
    assert found is not None
    assert "refuses the run's input" in found.problem


def load_spec(path: Path) -> WorkflowSpec:
    from streams.workflow.definition import load as load_file  # noqa: PLC0415 - another `load` is above

    return load_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no", "no recorded history"),
        ("[]", "no recorded history"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "foldflow-history-1"}', "no recorded history: KeyError: 'spec'"),
        (
            '{"format": "foldflow-history-1", "spec": null, "decisions": [], "run_id": "r", "payloads": {}, "head": null}',
            "no decision",
        ),
    ],
)
def test_other_files_are_no_histories(tmp_path: Path, content: str, message: str) -> None:
    """The error says what is wrong with the file."""
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(HistoryError, match=message):
        replay(path)
    with pytest.raises(HistoryError, match="can't be read"):
        replay(tmp_path / "nothing.json")
