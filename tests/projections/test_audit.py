"""The audit report of a run says what its log says, to anybody, within bounds, and whether the log is as it was written."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from projection_histories import (  # type: ignore[import-not-found]
    BOTH,
    PARTITIONS,
    SPECS,
    TOPIC_IDS,
    Logs,
    Run,
    as_kcat,
    logs,
)
from pydantic import TypeAdapter

from events import codec
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ApprovalAnswered, CancelRun, ChangeOutput, SignalReceived, StartRun, WorkflowRegistered
from events.decisions import Decision, RunCompleted
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id, run_id
from events.results import LlmCallCompleted, LlmCallFailed, TimerFired, ToolCallCompleted, ToolCallFailed, Usage
from events.topics import partition_for
from projections import audit_check, replay_sources, runs
from projections.audit import report
from projections.audit_calls import BAD, FIRST, LAST
from projections.audit_check import Ledger, RunLog
from projections.audit_document import Report
from projections.audit_page import page
from projections.audit_values import PROMPT
from projections.ledger import Record
from projections.picture import picture
from projections.replay_sources import KafkaLog, Span, archive
from projections.views import Batch, Views
from streams.settings import Settings
from streams.testing.histories import read
from streams.workflow.evolve import evolve
from streams.workflow.expressions import to_json
from streams.workflow.payloads import PayloadMissingError
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunEvent

HISTORIES = Path(__file__).parents[1] / "histories"


class Nothing:
    """Keeps no payload."""

    def get(self, digest: str) -> str:
        """Refuse."""
        raise PayloadMissingError(digest)


@dataclasses.dataclass
class Known:
    """What reports are made from: views of records, and the log itself."""

    db: Any
    ledger: Ledger

    def report(self, run: str) -> Report:
        """Return a run's report."""
        row = runs.one(self.db, run)
        assert row is not None
        return report(self.db, row, self.ledger)

    def page(self, run: str) -> str:
        """Return a run's page."""
        row = runs.one(self.db, run)
        assert row is not None
        return page(report(self.db, row, self.ledger), picture(self.db, row))


@contextmanager
def known(folder: Path, records: list[Record], *specs: WorkflowSpec, log: list[Record] | None = None) -> Iterator[Known]:
    """Give views of these records, and a log of them (or of others, if the log was changed since)."""
    registered = [codec.encode(WorkflowRegistered(each.name, each.digest, each.canonical)) for each in specs]
    file = folder / "log.bin"
    rows = [(each.partition, each.offset, each.value) for each in (records if log is None else log)]
    file.write_bytes(as_kcat(rows))
    views = Views(folder / "v", TOPIC_IDS, PARTITIONS)
    try:
        views.apply(Batch(records, specs=[Record(0, number, value) for number, value in enumerate(registered)]))
        with views.snapshot() as (db, _):
            yield Known(db, Ledger(archive(file), Nothing(), folder / "artifacts", "x."))
    finally:
        views.close()


def recorded(name: str) -> tuple[str, WorkflowSpec, list[Record]]:
    """Return a recorded history: its run, the definition, the records."""
    found = read(HISTORIES / f"{name}.json")
    assert found.spec is not None
    partition = partition_for(found.run_id.encode(), PARTITIONS)
    return found.run_id, found.spec, [Record(partition, number, value) for number, value in enumerate(found.values)]


class Told:
    """A run that is told input by input."""

    def __init__(self, steps: dict[str, Any], **more: Any) -> None:
        self.log = Logs(1)
        self.run = Run(run_id("told"), spec=WorkflowSpec.model_validate({"name": "w", "steps": steps, **more}))

    def start(self, text: str = "{}", **more: Any) -> None:
        """Start the run."""
        self.take(StartRun("told", "w", self.run.spec.digest, text, **more))

    def take(self, *causes: Any) -> None:
        """Let the run decide about inputs."""
        for cause in causes:
            decision = self.log._decided(self.run, self.run.state, cause)
            self.log.append(self.run.id, codec.encode(decision))
            self.run.state = evolve(self.run.state, RunEvent(decision, chain_hash(codec.body(decision))))

    def awaits(self, step: str) -> str:
        """Return the call or timer that a step waits for."""
        awaited: str = self.run.state.steps[step].awaits
        return awaited


class Tags(HTMLParser):
    """The tags of a page, with the names of their attributes, and all its addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.addresses += [value or "" for name, value in attrs if name in {"href", "src", "action", "data", "xlink:href"}]


# --- What it says ---


def test_the_report_of_the_market_analysis_says_what_its_log_says(tmp_path: Path) -> None:
    """Given the recorded run, then prompts, answers, arguments, approval and head are those of its decisions."""
    run, spec, records = recorded("market_analysis-1")
    decisions = [codec.decode(each.value, Decision) for each in records]
    hashes = [chain_hash(codec.unframed(each.value or b"")) for each in records]
    with known(tmp_path, records, spec) as found:
        told, html = found.report(run), found.page(run)
    assert (told.integrity.verdict, told.integrity.problems, told.integrity.unchecked) == ("intact", [], [])
    assert told.integrity.decisions == told.integrity.again == told.run.seq == len(decisions)
    assert told.integrity.head == hashes[-1].hex()
    start = decisions[0].input
    assert isinstance(start, StartRun)
    assert json.loads(told.run.asked.text) == json.loads(start.input)
    (completed,) = [effect for effect in decisions[-1].effects if isinstance(effect, RunCompleted)]
    assert told.run.answer is not None
    assert json.loads(told.run.answer.text) == json.loads(completed.output)
    requested = {
        effect_id(hashed, index): effect
        for each, hashed in zip(decisions, hashes, strict=True)
        for index, effect in enumerate(each.effects)
        if isinstance(effect, LlmCallRequested | ToolCallRequested)
    }
    inputs = [each.input for each in decisions]
    answered = {each.call_id: each for each in inputs if isinstance(each, LlmCallCompleted | ToolCallCompleted)}
    assert {call.call_id for call in (*told.model_calls.entries, *told.tool_calls.entries)} == requested.keys()
    for call in told.model_calls.entries:
        asked, answer = requested[call.call_id], answered.get(call.call_id)
        assert isinstance(asked, LlmCallRequested)
        assert [(each.role, each.content.text) for each in call.prompt] == [
            (each["role"], each["content"]) for each in json.loads(asked.messages)
        ]
        if isinstance(answer, LlmCallCompleted) and call.answer:
            assert call.model == answer.model
            assert (call.input_tokens, call.latency_ms) == (answer.usage.input_tokens, answer.latency_ms)
    for tool in told.tool_calls.entries:
        asked = requested[tool.call_id]
        assert isinstance(asked, ToolCallRequested)
        assert tool.arguments is not None
        assert tool.arguments.left_out or json.loads(tool.arguments.text) == json.loads(asked.arguments)
    (approval,) = told.approvals.entries
    (said,) = [each for each in inputs if isinstance(each, ApprovalAnswered)]
    assert (approval.answered_by, approval.words, approval.status) == (said.by, said.reason, "approved")
    assert [(word.kind, word.by) for word in told.words.entries] == [("ApprovalAnswered", said.by)]
    assert {step.path for step in told.steps.entries} == {step.name for step in spec.steps}
    for text in (json.loads(start.input)["question"], said.by, told.integrity.head, *(step.name for step in spec.steps)):
        assert str(text) in html
    assert json.loads(start.input)["question"] in told.summary[0]
    assert "intact" in told.summary[-1]


@pytest.mark.parametrize("name", ["failed", "fork", "people", "saga", "calls", "steps_of_steps"])
def test_recorded_runs_of_all_kinds_have_a_report(tmp_path: Path, name: str) -> None:
    """Given a recorded history of each kind, then its report is intact, its page one file, its JSON reads back as it was."""
    run, spec, records = recorded(name)
    with known(tmp_path, records, spec) as found:
        told, html = found.report(run), found.page(run)
    adapter = TypeAdapter(Report)
    assert adapter.validate_json(adapter.dump_json(told)) == told
    assert (told.integrity.verdict, told.integrity.again) == ("intact", len(records))
    tags = Tags(html)
    assert not {tag for tag, _ in tags.tags} & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert all(address.startswith("#") for address in tags.addresses)
    assert not re.search(r"@import|url\(", html)
    assert all(f'id="{address[1:]}"' in html for address in tags.addresses)


def test_any_history_has_a_report(tmp_path: Path) -> None:
    """Given a random log with losers, repetitions and every kind of step, each run whose chain is whole is reported as intact."""
    log = logs(5, 14, 0.15, BOTH)
    seen = Counter[str]()
    with known(tmp_path, log.records(), *SPECS.values()) as found:
        for run, state in log.states.items():
            told = found.report(run)
            seen[told.run.status] += 1
            assert sum(told.statuses.values()) >= told.steps.total
            assert sum(each.cost_usd for each in told.cost.by_step) == pytest.approx(told.cost.total.cost_usd)
            if run in log.broken:
                assert told.integrity.verdict == "damaged"
                continue
            assert told.integrity.verdict == "intact", told.integrity.problems
            assert (told.integrity.decisions, told.integrity.head) == (state.seq, state.head.hex())
            assert len(page(told, "<svg/>")) < 5_000_000
    assert len(seen) >= 3
    assert log.broken


def test_it_says_how_a_run_ended_and_who_said_so(tmp_path: Path) -> None:
    """Given a run in which somebody set an output, somebody rejected, somebody cancelled: the sentences say who and why."""
    story = Told(
        {
            "look": {"tool": {"name": "echo"}},
            "ask": {"needs": ["look"], "approval": {"message": "ok?", "on_reject": "continue"}},
            "wait": {"needs": ["ask"], "wait_for": {"signal": "go"}},
        }
    )
    story.start()
    story.take(
        ChangeOutput("look", '"mine"', "carol", "the site is down"),
        ApprovalAnswered("ask", False, "bob", "asked twice", None),
        SignalReceived("1", "other", None, '"?"', "eve"),
        ApprovalAnswered("ask", True, "ann", "too late", None),
        CancelRun("dora", "called off", False),
    )
    with known(tmp_path, story.log.records(), story.run.spec) as found:
        told = found.report(story.run.id)
    text = " ".join(told.summary)
    assert "was cancelled by dora" in text
    assert "“called off”" in text
    assert "bob rejected what step “ask” showed (“asked twice”)" in text
    assert "carol set the output of step “look” by hand (“the site is down”)" in text
    assert [(each.by, each.ignored is None) for each in told.words.entries] == [
        ("carol", True),
        ("bob", True),
        ("eve", True),
        ("ann", False),
        ("dora", True),
    ]
    assert {step.path: step.status for step in told.steps.entries}["wait"] == "cancelled"
    assert "set by a person" in " ".join(told.steps.entries[0].remarks)


def test_attempts_and_their_failures_are_told(tmp_path: Path) -> None:
    """Given a model that is busy once, then both attempts stand with their reasons, and what the failed one cost is in vain."""
    story = Told({"ask": {"llm": {"model": "big", "prompt": "Say {{ input.n }}"}, "retry": {"attempts": 2, "initial": "10ms"}}})
    story.start('{"n":1}')
    story.take(
        LlmCallFailed(story.awaits("ask"), "ask", Failure(FailureKind.RATE_LIMITED, "busy"), "big-1", Usage(9, 0), 0.5, 7, "p1")
    )
    story.log._at += 1000
    story.take(TimerFired(story.awaits("ask"), "ask"))
    story.take(
        LlmCallCompleted(story.awaits("ask"), "ask", '"yes"', "big-2", "maker", "stop", Usage(10, 5, 4, 0, 2), 0.25, 12, "p2")
    )
    with known(tmp_path, story.log.records(), story.run.spec) as found:
        told = found.report(story.run.id)
    (step,) = told.steps.entries
    assert [(each.number, each.outcome, each.failure_message) for each in step.attempts] == [
        (1, "failed", "busy"),
        (2, "completed", None),
    ]
    assert [(call.asked, call.model, call.prices) for call in told.model_calls.entries] == [
        ("big", "big-1", "p1"),
        ("big", "big-2", "p2"),
    ]
    assert (told.cost.total.cost_usd, told.cost.total.wasted_usd) == (0.75, 0.5)
    assert {each.name: each.cost_usd for each in told.cost.by_prices} == {"p1": 0.5, "p2": 0.25}


# --- What it must not do ---

HOSTILE = (
    "</pre></td></style></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover='alert(3) "
    "{{ 7*7 }} \u202egnp &amp;"
)
HARMLESS = "plain"


def hostile(text: str) -> Told:
    """Return a run with a text wherever somebody may put one."""
    steps = {
        "ask": {
            "llm": {"system": "{{ input.t }}", "prompt": "{{ input.t }}"},
            "retry": {"attempts": 1},
            "on_failure": "continue",
        },
        "look": {"tool": {"name": "echo", "arguments": {"t": "=input.t"}}},
        "bad": {"tool": {"name": "echo"}, "on_failure": "continue", "retry": {"attempts": 1}},
        "ok": {"needs": ["look"], "approval": {"message": "{{ input.t }}", "show": "=input.t", "editable": True}},
        "word": {"needs": ["ok"], "wait_for": {"signal": "word"}},
    }
    story = Told(steps, description=text)
    value = to_json(text)
    story.start(to_json({"t": text}), labels={text[:50]: text})
    story.take(
        LlmCallCompleted(story.awaits("ask"), "ask", value, text, text, text, Usage(1, 1), 0.1, 5, text),
        ToolCallCompleted(story.awaits("look"), "look", value, text, 5, 0.1, text),
        ToolCallFailed(story.awaits("bad"), "bad", Failure(FailureKind.TOOL_TERMINAL, text), text, 5),
        ApprovalAnswered("ok", True, text, text, to_json([text])),
        SignalReceived("1", "word", None, value, text),
    )
    return story


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    """Given markup in inputs, labels, prompts, outputs, names, reasons and errors, the page has the same tags as without it."""
    pages = {}
    for number, text in enumerate((HOSTILE, HARMLESS)):
        story, folder = hostile(text), tmp_path / str(number)
        folder.mkdir()
        with known(folder, story.log.records(), story.run.spec) as found:
            pages[text] = found.page(story.run.id)
    body = pages[HOSTILE]
    assert body.count("&lt;script&gt;alert(1)") >= 12
    assert "<script" not in body
    assert "onerror=alert(2)>" not in body
    assert "{{ 7*7 }}" in body
    assert "\u202e" not in body
    # The picture wraps what is long, and texts are folded by their length: neither makes or closes a tag that is not ours.
    ours = {(tag, names) for tag, names in Tags(pages[HARMLESS]).tags}
    for tag, names in Tags(body).tags:
        assert (tag, names) in ours or tag in {"details", "summary", "text"}, (tag, names)
        assert not any(name.startswith("on") for name in names)


def test_a_file_is_only_looked_at_in_the_runs_own_folder(tmp_path: Path) -> None:
    """Given files that are as they were, changed since, and elsewhere: those are told apart, and the last is not read."""
    folder = tmp_path / "artifacts" / run_id("told")
    folder.mkdir(parents=True)
    (folder / "same.txt").write_bytes(b"same")
    (folder / "other.txt").write_bytes(b"changed")
    (folder / "link.txt").symlink_to("/etc/hostname")
    sums = {"same.txt": "0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5", "other.txt": "0" * 64}
    story = Told({"write": {"tool": {"name": "write"}}})
    story.start()
    names = [str(folder / each) for each in ("same.txt", "other.txt", "link.txt")]
    output = {"files": names, "sha256s": sums, "source": "/etc/hostname", "sha256": "1" * 64}
    story.take(ToolCallCompleted(story.awaits("write"), "write", to_json(output), "1", 5))
    with known(tmp_path, story.log.records(), story.run.spec) as found:
        told, html = found.report(story.run.id), found.page(story.run.id)
    seen = {Path(each.path).name: each for each in told.files.entries}
    assert seen["same.txt"].sha256 == seen["same.txt"].recorded_sha256 == sums["same.txt"]
    assert seen["other.txt"].size == 7
    assert seen["other.txt"].sha256 != seen["other.txt"].recorded_sha256
    assert (seen["link.txt"].sha256, seen["hostname"].sha256, seen["hostname"].size) == (None, None, None)
    assert seen["hostname"].read_by == ["write"]
    assert html.count("the file is still the same") == html.count("the file was changed since") == 1


def many(count: int) -> Told:
    """Return a run with so many items, of which one fails, each with a long answer."""
    story = Told(
        {
            "each": {
                "for_each": {"items": "=input.items", "concurrency": count, "tolerate": 1},
                "retry": {"attempts": 1},
                "tool": {"name": "echo", "arguments": {"n": "=item"}},
            }
        }
    )
    story.start(to_json({"items": list(range(count))}))
    for number in range(count):
        path = f"each[{number}]"
        if number == count // 2:
            story.take(ToolCallFailed(story.awaits(path), path, Failure(FailureKind.TOOL_TERMINAL, "no such thing"), "1", 5))
        else:
            story.take(ToolCallCompleted(story.awaits(path), path, to_json("x" * 1000), "1", 5))
    return story


def test_a_large_run_is_shortened_and_says_so(tmp_path: Path) -> None:
    """Given 250 items, then what failed, the first and the last are shown, the rest is counted, and it says what is left out."""
    story = many(250)
    with known(tmp_path, story.log.records(), story.run.spec) as found:
        told, html = found.report(story.run.id), found.page(story.run.id)
    assert told.integrity.verdict == "intact"
    assert told.integrity.again == 251
    assert (told.steps.total, told.statuses) == (251, {"completed": 250, "failed": 1})
    assert {step.path for step in told.steps.entries} == {"each", "each[125]"}
    assert "249 of 251 steps are left out" in told.steps.left_out
    shown = [call.step for call in told.tool_calls.entries]
    assert (told.tool_calls.total, len(shown)) == (250, FIRST + LAST + 1)
    assert {"each[0]", "each[125]", "each[249]"} <= set(shown)
    assert all(call.arguments is not None for call in told.tool_calls.entries)
    assert f"the first {FIRST} and the last {LAST}" in told.tool_calls.left_out
    assert str(BAD) in told.tool_calls.left_out
    assert told.tool_calls.left_out in unescape(html)
    assert len(html) < 500_000


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    """Given a prompt and an answer of a million characters, then as many as may be are shown, and how many are not."""
    text = "word " * 40_000
    story = Told({"ask": {"llm": {"prompt": "{{ input.t }}"}}})
    story.start(to_json({"t": text}))
    story.take(LlmCallCompleted(story.awaits("ask"), "ask", to_json(text), "m", "p", "stop", Usage(1, 1), None, 5))
    with known(tmp_path, story.log.records(), story.run.spec) as found:
        told, html = found.report(story.run.id), found.page(story.run.id)
    (call,) = told.model_calls.entries
    (message,) = call.prompt
    assert call.answer is not None
    for part in (message.content, call.answer):
        assert (len(part.text), part.characters, part.left_out) == (PROMPT, len(text), len(text) - PROMPT)
    assert f"{len(text) - PROMPT:,} of {len(text):,} characters are left out" in html


# --- Whether the record is intact ---


def test_a_changed_byte_is_told_with_its_place(tmp_path: Path) -> None:
    """Given a byte of one record of the log changed after the views read it, the report says which decision isn't as written."""
    run, spec, records = recorded("market_analysis-1")
    changed = list(records)
    value = bytearray(changed[5].value or b"")
    at = value.index(b"running") if b"running" in value else len(value) - 20
    value[at] ^= 1
    changed[5] = Record(changed[5].partition, 5, bytes(value))
    with known(tmp_path, records, spec, log=changed) as found:
        told, html = found.report(run), found.page(run)
    assert told.integrity.verdict == "damaged"
    assert {each.place.offset for each in told.integrity.problems} & {5, 6}
    assert "not intact" in told.summary[-1]
    assert "record not intact" in html


def test_a_rewritten_decision_is_found_by_deciding_again(tmp_path: Path) -> None:
    """Given an output that was rewritten, and views of that log, the field is told, as recorded and as decided again."""
    run, spec, records = recorded("market_analysis-1")
    last = codec.decode(records[-1].value, Decision)
    forged = tuple(
        dataclasses.replace(each, output='{"html":"mine"}') if isinstance(each, RunCompleted) else each for each in last.effects
    )
    records[-1] = Record(records[-1].partition, records[-1].offset, codec.encode(dataclasses.replace(last, effects=forged)))
    with known(tmp_path, records, spec) as found:
        told = found.report(run)
    (problem,) = told.integrity.problems
    assert (told.integrity.verdict, problem.kind, problem.seq) == ("damaged", "rewritten", last.seq)
    assert problem.field is not None
    assert "output" in problem.field
    assert "mine" in (problem.recorded or "")


def test_what_could_not_be_checked_is_said(tmp_path: Path) -> None:
    """Given that the workflow's version isn't known, the chain is checked all the same, and the report doesn't say intact."""
    run, _, records = recorded("market_analysis-1")
    with known(tmp_path, records) as found:
        told, html = found.report(run), found.page(run)
    assert (told.integrity.verdict, told.integrity.again, told.integrity.decisions) == ("partly", 0, len(records))
    assert "not all of it could be checked" in told.summary[-1]
    assert "record checked in part" in html
    assert ">record intact<" not in html


def test_what_was_fetched_for_one_reader_serves_the_other_unless_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's records are kept from one reading to the next, those of others not; of a large run, or half a reading, nothing."""
    own, other = (run_id(name) for name in ("own", "other"))
    fetched = list[int]()

    def records(self: KafkaLog, partition: int, span: Span) -> Iterator[replay_sources.Record]:
        del self, partition
        for offset in range(*span):
            fetched.append(offset)
            yield replay_sources.Record(offset, b"\0\0\0\0\1\x48" + (own if offset % 2 else other).encode() + bytes(60))

    monkeypatch.setattr(KafkaLog, "records", records)
    span = Span(0, 10)
    log = RunLog(Settings(), 1, {0: span}, run=own.encode())
    next(log.records(0, span))
    read_by = [[record.offset for record in log.records(0, span)] for _ in range(3)]
    assert read_by == [[1, 3, 5, 7, 9]] * 3
    assert fetched == [0, 1, *range(10)]
    monkeypatch.setattr(audit_check, "_MOST_KEPT", 200)
    large = RunLog(Settings(), 1, {0: span}, run=own.encode())
    assert [[record.offset for record in large.records(0, span)] for _ in range(2)] == [[1, 3, 5, 7, 9]] * 2
    assert not large.kept
