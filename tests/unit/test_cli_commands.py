import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from events import codec
from events.catalog import EFFECTS
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    ChangeOutput,
    PauseRun,
    PauseStep,
    ResumeRun,
    SignalReceived,
    StartRun,
)
from events.decisions import ApprovalRequested, DeadLetter, Decision, InputIgnored, SignalKept
from events.ids import FIRST_PREV, chain_hash
from events.results import Input
from infra.cli import asking, naming, outcome, talk
from infra.cli.history import History
from infra.cli.main import COMMANDS, command_line
from streams.envelope import Incoming
from streams.workflow.decider import decide
from streams.workflow.spec import WorkflowSpec

RUN = "3f0a5a3e-0000-5000-8000-000000000001"
INBOX = b"i" * 16
SPEC = WorkflowSpec.model_validate(
    {
        "name": "mails",
        "steps": {
            "paid": {"wait_for": {"signal": "payment", "correlation": "order 7"}},
            "ask": {"approval": {"message": "Send it?", "show": {"to": "x"}, "by": ["ann", "bo"], "editable": True}},
            "free": {"approval": {"message": "Go on?"}},
            "after": {"needs": ["free"], "transform": 1},
        },
    }
)


class Run:
    """A run in the making: records as the ledger has them."""

    def __init__(self, spec: WorkflowSpec = SPEC) -> None:
        self.spec, self.history, self.records = spec, History(RUN), list[bytes]()
        self.hash = FIRST_PREV
        self.when(StartRun("q", spec.name, spec.digest, "{}"))

    def when(self, said: Input) -> Decision:
        """Decide on an input, write it down and take it."""
        seq = len(self.records) + 1
        effects = decide(self.spec, self.history.state, said, 1_000)
        decision = Decision(RUN, seq, self.hash, INBOX, 10 * seq, 1_000, said, effects)
        value = codec.encode(decision)
        self.hash = chain_hash(codec.unframed(value))
        assert self.history.take(seq - 1, value)
        self.records.append(value)
        return decision

    def outcome(self, said: Input) -> outcome.Outcome:
        """Say something and return what came of it."""
        decision = self.when(said)
        return outcome.decided(decision, self.history.before)


def approved(step: str, by: str = "ann", *, approved: bool = True, value: str | None = None) -> ApprovalAnswered:
    return ApprovalAnswered(step, approved, by, "why", value)


# --- In words ---


def test_every_effect_has_words() -> None:
    """No effect of the language is left out."""
    assert set(outcome.WORDS) == set(EFFECTS)


@pytest.mark.parametrize(
    ("said", "status", "reason", "text"),
    [
        (SignalReceived("s1", "payment", "order 7", "1", ""), "taken", None, "Done: step `paid` takes the signal."),
        (SignalReceived("s1", "payment", "order 8", "1", ""), "kept", None, "Kept: no step waits for it yet, so it is kept for"),
        (approved("ask"), "taken", None, "Done: step `ask` completed."),
        (approved("free"), "taken", None, "Done: step `free` completed; step `after` completed."),
        (approved("ask", "eve"), "ignored", "not_allowed", "Ignored: `eve` may not answer this, only ann, bo may."),
        (approved("paid"), "ignored", "nothing_to_approve", "Ignored: that step asks for no approval now."),
        (approved("free", value="1"), "ignored", "not_editable", "can't be changed"),
        (approved("free", approved=False), "taken", None, "the run failed: not_approved: rejected by ann: why"),
        (CancelRun("ann", "", False), "taken", None, "the run is cancelled"),
        (PauseRun("ann", ""), "taken", None, "Done: the run starts nothing more"),
        (PauseStep("aftr", "ann", ""), "ignored", "unknown_step", "the workflow has no such step"),
        (ResumeRun("ann", False), "ignored", "not_paused", "nothing is held there"),
        (ChangeOutput("free", "7", "ann", ""), "taken", None, "step `free` has the new output; step `after` completed"),
        (ChangeOutput("after", "7", "ann", ""), "ignored", "not_started", "has not begun"),
    ],
)
def test_what_came_of_a_command_is_said_in_words(said: Input, status: str, reason: str | None, text: str) -> None:
    """The core's decision on each, as a person understands it; and whether it had an effect."""
    found = Run().outcome(said)
    assert (found.status, found.reason, text in found.text) == (status, reason, True), found.text
    assert found.effective == (status in ("taken", "kept"))


def test_a_signal_twice_counts_once() -> None:
    """The second one is ignored, and it is said why."""
    run = Run()
    run.when(SignalReceived("s1", "other", None, "1", ""))
    found = run.outcome(SignalReceived("s1", "other", None, "1", ""))
    assert (found.status, "the same id counts once" in found.text) == ("ignored", True)


def test_a_reason_that_is_not_known_is_said_as_it_is() -> None:
    """A later version's word goes through."""
    decision = Decision(RUN, 2, b"", b"", 0, 0, PauseRun("", ""), (InputIgnored("wrong_moon"),))
    assert outcome.decided(decision, Run().history.state).text == "Ignored: wrong_moon."


def test_many_effects_are_counted() -> None:
    """A decision that starts a thousand items is told in one line."""
    told = outcome.in_words(tuple(SignalKept(str(i)) for i in range(1000)))
    assert told.endswith("; and 992 effects more")
    assert len(told) < 1000


def test_programs_get_the_whole_of_it() -> None:
    """The outcome as JSON has the command, a word, the text, and the decision's number and effects."""
    said = SignalReceived("s1", "payment", "order 7", '{"a":1}', "ann")
    found = Run().outcome(said).as_json(RUN, said)
    assert json.loads(json.dumps(found))["command"]["type"] == "SignalReceived"
    assert (found["outcome"], found["seq"], [each["type"] for each in found["effects"]]) == ("taken", 2, ["SignalTaken"])
    assert outcome.unanswered("3.0 s").as_json(RUN, said)["effects"] == []


def test_what_a_run_waits_for_is_said_with_the_command() -> None:
    """Approvals and signals, ready to be pasted into a shell."""
    assert outcome.waiting(Run().history.state, "R") == [
        "step `ask` waits for an approval by ann or bo (Send it?): foldflow approve R ask",
        "step `free` waits for an approval (Go on?): foldflow approve R free",
        "step `paid` waits for a signal: foldflow signal R payment --correlation 'order 7' --payload JSON",
    ]


def test_a_run_that_is_held_says_how_to_go_on() -> None:
    """At a breakpoint the step is named; a paused run is resumed as a whole; a run that is over waits for nothing."""
    run = Run()
    run.when(CancelRun("", "", False))
    assert outcome.waiting(run.history.state, "R") == []
    run = Run()
    run.when(PauseStep("after", "", ""))
    run.when(approved("free"))
    assert outcome.waiting(run.history.state, "R")[-1] == "step `after` is held: foldflow resume R after"
    run.when(PauseRun("", ""))
    assert outcome.waiting(run.history.state, "R")[-1] == "the run is paused: foldflow resume R"


# --- What came of it, found in the topics ---


REQUEST, QUEUE = ("p.requests", 1, 7), ("p.inbox", 3)


def record(offset: int, value: bytes, **headers: bytes) -> Incoming:
    return Incoming("any", 0, offset, 1_000, None, value, headers)


def letter(topic: str, partition: int, offset: int) -> Incoming:
    return record(0, codec.encode(DeadLetter(topic, partition, offset, 0, "unknown_run", "detail")))


def listening() -> tuple[talk._Answer, Run]:
    """Return what waits for an answer, and the run as others write it."""
    run, reader = Run(), History(RUN)
    reader.take(0, run.records[0])
    return talk._Answer(reader, "place", INBOX), run


@pytest.mark.parametrize("inbox_first", [True, False])
def test_the_decision_on_a_command_is_found_by_its_place(inbox_first: bool) -> None:
    """Whichever topic is read first, and whoever says the same: the decision on this record of the inbox, and no other."""
    answer, run = listening()
    said = PauseRun("ann", "")
    run.when(said)  # somebody else's, at 20
    run.when(said)  # ours, at 30
    if inbox_first:
        answer.inbox(record(20, b"", ce_id=b"another place"))
        answer.inbox(record(30, b"", ce_id=b"place"))
    for offset, value in enumerate(run.records[1:], 1):
        answer.decision(record(offset, value))
    if not inbox_first:
        assert answer.found(REQUEST, QUEUE) is None
        answer.inbox(record(30, b"", ce_id=b"place"))
    found = answer.found(REQUEST, QUEUE)
    assert found is not None
    assert (found.status, found.reason) == ("ignored", "already_paused")


@pytest.mark.parametrize("place", [REQUEST, (*QUEUE, 30)])
def test_a_dead_letter_is_an_answer(place: tuple[str, int, int]) -> None:
    """Intake's about the request, or the orchestrator's about the inbox; those about others are not."""
    answer, _ = listening()
    answer.inbox(record(30, b"", ce_id=b"place"))
    answer.letter(letter("p.requests", 1, 8))
    answer.letter(letter("p.inbox", 3, 31))
    assert answer.found(REQUEST, QUEUE) is None
    answer.letter(letter(*place))
    found = answer.found(REQUEST, QUEUE)
    assert found is not None
    assert (found.status, found.reason, found.text) == ("refused", "unknown_run", "Refused: there is no such run: detail")


def test_a_run_that_ended_meanwhile_is_an_answer() -> None:
    """A run that is over decides nothing: what it was told behind its last input is said to be too late."""
    answer, run = listening()
    run.when(CancelRun("eve", "", False))
    answer.decision(record(1, run.records[1]))
    assert answer.found(REQUEST, QUEUE) is None
    answer.inbox(record(30, b"", ce_id=b"place"))
    found = answer.found(REQUEST, QUEUE)
    assert found is not None
    assert (found.status, found.text) == ("over", "Ignored: the run is over: it is cancelled.")


def test_foreign_records_are_no_history() -> None:
    """Garbage, other runs' decisions and those that lost are passed over."""
    run, reader = Run(), History(RUN)
    other = replace(codec.decode(run.records[0], Decision), run_id=RUN[:-1] + "2")
    lost = replace(codec.decode(run.records[0], Decision), at=5)
    values = [None, b"", b"junk" + RUN.encode(), codec.encode(other), run.records[0], codec.encode(lost), run.records[0]]
    assert [reader.take(offset, value) for offset, value in enumerate(values)] == [*[False] * 4, True, False, False]
    assert reader.state == run.history.state


# --- Asking a person ---

ASKED = ApprovalRequested("ask", "Send it?", '{"to":"x"}', (), True, None)


def typed(*lines: str) -> Any:
    """Return what a person types, line by line; behind them the terminal ends."""
    left: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        assert prompt
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.mark.usefixtures("editor")
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("a",), ApprovalAnswered("ask", True, "ann", "", None)),
        (("what?", " APPROVE "), ApprovalAnswered("ask", True, "ann", "", None)),
        (("r", "too late"), ApprovalAnswered("ask", False, "ann", "too late", None)),
        (("l",), None),
        ((), None),
        (("r",), None),
        (("e", "a"), ApprovalAnswered("ask", True, "ann", "", '{"to":"y"}')),
        (("e", "e", "a"), ApprovalAnswered("ask", True, "ann", "", '{"to":"y"}')),
    ],
)
def test_an_approval_is_asked(
    lines: tuple[str, ...], expected: ApprovalAnswered | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown, and what is typed becomes the answer; what is not understood is asked again, an end means later."""
    assert asking.ask("ask", ASKED, {"to": "x"}, "ann", typed(*lines)) == expected
    assert 'Step `ask` asks: Send it?\n{\n  "to": "x"\n}\n' in capsys.readouterr().err


@pytest.mark.usefixtures("editor")
def test_what_must_not_be_edited_is_not() -> None:
    """`edit` is no answer where the value can't be changed."""
    fixed = replace(ASKED, editable=False)
    assert asking.ask("ask", fixed, {"to": "x"}, "ann", typed("e", "a")) == ApprovalAnswered("ask", True, "ann", "", None)


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set an editor that writes `y` for `x`."""
    edits(tmp_path, monkeypatch, "path.write_text(path.read_text().replace('x', 'y'))")


def edits(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Set a real program as the editor."""
    program = folder / "editor.py"
    program.write_text(f"import pathlib, sys\npath = pathlib.Path(sys.argv[1])\n{line}\n")
    monkeypatch.setenv("EDITOR", f"{sys.executable} {program}")
    monkeypatch.delenv("VISUAL", raising=False)


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("path.write_text('{\"to\":  [1, 2]}')", '{"to":[1,2]}'),
        ("pass", None),
        ('path.write_text(\'{"to":\\n"x"}\')', None),
        ("path.write_text('')", "the file is empty"),
        ("path.write_text('{')", "not JSON"),
        ("path.write_bytes(b'\"\\xff\"')", '"\ufffd"'),
        ("sys.exit(3)", "ended with code 3"),
    ],
)
def test_a_value_is_edited_as_json(line: str, result: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the editor leaves behind, in canonical form; None if it says the same; an error that says that nothing was sent."""
    edits(tmp_path, monkeypatch, line)
    try:
        found = asking.edited({"to": "x"})
    except asking.NotEditedError as error:
        assert result
        assert result in str(error)
        assert "nothing was sent" in str(error)
    else:
        assert found == result


def test_an_editor_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """EDITOR is what to set."""
    monkeypatch.setenv("VISUAL", "/nowhere/ed")
    with pytest.raises(asking.NotEditedError, match=r"/nowhere/ed.*set EDITOR"):
        asking.edited(1)


# --- The command line ---


@pytest.mark.parametrize(
    ("text", "whole", "beginning"),
    [
        (RUN, True, False),
        (RUN[:-1], False, True),
        ("3f0a", False, True),
        ("3f0", False, False),
        (RUN.upper(), False, False),
        ("order-17", False, False),
    ],
)
def test_a_run_is_named_by_its_id_or_the_beginning_of_it(text: str, whole: bool, beginning: bool) -> None:
    """What is neither is a request's id."""
    assert (naming.is_id(text), naming.is_beginning(text)) == (whole, beginning)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("signal", RUN, "x", "--payload", "{tru"), "--payload is no JSON: line 1"),
        (("signal", RUN, "x", "--payload", "@/nowhere.json"), "can't be read"),
        (("approve", RUN, "ask", "--edit", "--value", "1"), "either --edit or --value"),
        (("reject", RUN, "ask"), "--reason"),
        (("cancel", RUN, "ask", "--force"), "it is for a whole run"),
        (("resume", RUN, "ask", "--step"), "either STEP or --step"),
        (("set-output", RUN, "ask", "nope", "--reason", "r"), "OUTPUT is no JSON"),
        (("set-output", RUN, "ask", "1"), "--reason"),
        (("pause", RUN, "--timeout", "soon"), "--timeout"),
        (("fork", RUN, "--prompt", "draft=@/nowhere.txt"), "can't be read"),
    ],
)
def test_mistakes_are_said_before_anything_is_connected(arguments: tuple[str, ...], says: str) -> None:
    """Exit code 2 and what is wrong, without Kafka."""
    done = CliRunner().invoke(command_line(arguments), list(arguments), prog_name="foldflow")
    assert (done.exit_code, says in done.output) == (2, True), done.output


@pytest.mark.parametrize("name", [each.name for each in COMMANDS if each.module == "infra.cli.commands"])
def test_each_command_shows_examples_and_exit_codes(name: str) -> None:
    """--help has an example that begins with the command, and says what the exit codes mean."""
    done = CliRunner().invoke(command_line([name]), [name, "--help"], prog_name="foldflow")
    assert done.exit_code == 0
    assert f"foldflow {name} " in done.output.split("For example:")[1]
    assert "Exit codes: 0 it had an effect" in done.output
