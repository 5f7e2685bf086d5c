"""The market analysis from question to released report: the real tools, models that say what a test wants.

`python tests/unit/test_market_analysis.py` records its histories anew; do that only when a change of them is meant.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from streams.testing import Failure, Run, answers, given, partly
from streams.workflow.definition import builtin
from tools.registry import load

HISTORIES = Path(__file__).parents[1] / "histories"
SPEC = builtin()["market-analysis"]
TOOLS = dict(load())
QUESTION = "How did Apple do in 2004?"
READING = {"tickers": ["AAPL"], "start": "2004", "end": "2004"}
DRAFT = "Apple rose by 185.5% from January 2004 (11.28) to December 2004 (32.2)."
MODELS: dict[str, Any] = {"understand": READING, "draft": DRAFT, "review": {"answers_question": "yes"}}
CLOSED = Failure("unavailable", "the exchange is closed")


def analysis(folder: Path, *, tools: dict[str, Any] | None = None, **models: Any) -> Run:
    """Start an analysis; `models`: what they say instead."""
    return given(SPEC, input={"question": QUESTION}, tools=TOOLS | (tools or {}), models=MODELS | models, artifacts=folder)


def report(run: Run) -> str:
    """Return the text of a finished run's report."""
    return Path(run.output["markdown"]).read_text("utf-8")


def test_a_good_answer_is_used_and_a_person_releases_the_report(tmp_path: Path) -> None:
    """The model's reading and prose hold against the question and the figures; nothing is out before somebody says so."""
    run = (
        analysis(tmp_path)
        .then_step("plan", output=partly(by="model"))
        .then_step("comment", output=partly(by="model", text=DRAFT))
    )
    run.then_step("parse_by_rule", status="skipped").then_called("fetch_prices", times=1, arguments=partly(tickers=["AAPL"]))
    run.then_asked_model("understand", contains=QUESTION).then_asked_model("draft", contains="185.5%")
    run.then_waits_for(approval="release", time="7d").then_called("write_report", times=1)
    run.when_approved(by="ann", reason="clear").then_completed(partly(summary=lambda text: "185.5%" in text))
    run.then_called("write_report", times=1, arguments=partly(release={"by": "ann", "reason": "clear"}))
    assert DRAFT.split("(", 1)[0] in report(run)


def test_nonsense_is_replaced_by_what_was_computed(tmp_path: Path) -> None:
    """A reading of another question is done by rule; prose with a figure that nobody computed is not what the report says."""
    run = analysis(tmp_path, understand={"tickers": ["IBM"], "start": "2001", "end": "2002"}, draft="Apple rose by 77%.")
    run.then_step("plan", output=partly(by="rule", problems=lambda problems: len(problems) > 0))
    run.then_called("fetch_prices", arguments=partly(tickers=["AAPL"], start="2004-01", end="2004-12"))
    run.then_step("check_draft", output=partly(ok=False)).then_step("comment", output=partly(by="facts"))
    run.when_approved().then_completed()
    assert "Apple rose by 185.5%" in report(run)


def test_an_answer_of_the_wrong_form_is_asked_for_again(tmp_path: Path) -> None:
    """What doesn't fit the schema is a failed attempt; after the last one, the rule stands in."""
    run = analysis(tmp_path, understand=answers("Apple, I think", READING)).then_step("understand", status="waiting")
    run.when_time_passes("1s").then_step("plan", output=partly(by="model"))
    run = analysis(tmp_path, understand="Apple, I think").when_time_passes("1m").then_asked_model("understand", times=2)
    run.then_step("understand", status="failed", failure="invalid_output").then_step("plan", output=partly(by="rule"))


def test_without_a_model_there_is_a_report_all_the_same(tmp_path: Path) -> None:
    """Everything that a model would do has a stand-in, and the report says so."""
    run = analysis(tmp_path, understand=CLOSED, draft=CLOSED, review=CLOSED).when_time_passes("1h")
    run.then_step("plan", output=partly(by="rule", problems=["The model gave no answer: the exchange is closed"]))
    run.then_step("comment", output=partly(by="facts", reason="The model gave no text: the exchange is closed"))
    run.then_step("review", status="failed", failure="unavailable").then_asked_model("review", times=2)
    run.when_approved().then_completed()


def test_fetching_is_tried_again_and_again(tmp_path: Path) -> None:
    """Two failures cost a few seconds; a fourth one ends the run."""
    run = analysis(tmp_path, tools={"fetch_prices": answers(CLOSED, CLOSED, TOOLS["fetch_prices"])})
    run.then_called("fetch_prices", times=1).then_step("fetch", status="waiting").when_time_passes("3s")
    run.then_called("fetch_prices", times=3).then_waits_for(approval="release")
    run = analysis(tmp_path, tools={"fetch_prices": CLOSED}).when_time_passes("1m")
    run.then_failed("unavailable", step="fetch").then_called("fetch_prices", times=4).then_not_called("write_report")


def test_another_source_is_read_without_a_model(tmp_path: Path) -> None:
    """What shares a source has, only its rows say; the model isn't asked."""
    source = tmp_path / "prices.csv"
    source.write_text("symbol,date,price\n" + "".join(f"ACME,2020-{month:02}-01,{100 + month}\n" for month in range(1, 13)))
    asked = {"question": "How did ACME do?", "source": str(source)}
    run = given(SPEC, input=asked, tools=TOOLS, models={"draft": "", "review": {"answers_question": "no"}}, artifacts=tmp_path)
    run.then_step("understand", status="skipped").then_asked_model("understand", times=0)
    run.when_approved().then_completed(partly(summary=lambda text: "ACME" in text))


def test_what_a_person_writes_is_what_is_released(tmp_path: Path) -> None:
    """An edited text is marked as a person's, and the model's review of the other one is left out."""
    run = analysis(tmp_path).when_approved(by="ann", value="Apple had a good year.").then_completed()
    comment = partly(text="Apple had a good year.", by="person")
    run.then_called("write_report", times=1, arguments=partly(comment=comment, review=None))
    assert "Apple had a good year." in report(run)


@pytest.mark.parametrize("late", [False, True])
def test_a_report_that_nobody_releases_stays_a_draft(tmp_path: Path, late: bool) -> None:
    """Rejected, or not answered within a week."""
    run = analysis(tmp_path)
    run = run.when_time_passes("7d") if late else run.when_rejected(by="ann", reason="too bold")
    run.then_failed("not_approved", step="release").then_called("write_report", times=1)


def test_another_text_needs_no_new_prices(tmp_path: Path) -> None:
    """A fork with another comment fetches and computes nothing again."""
    run = analysis(tmp_path).when_rejected(reason="too bold")
    fork = run.forked(outputs={"comment": {"text": "It rose.", "by": "facts", "reason": ""}}, rerun=["report"])
    fork.then_waits_for(approval="release").then_not_called("fetch_prices").then_called("write_report", times=1)
    fork.when_approved().then_completed()


def record(folder: Path) -> None:
    """Record the histories: a run that goes well, and one with about everything that can go wrong."""
    artifacts = Path("artifacts")
    analysis(artifacts).when_approved(by="ann", reason="clear").then_completed().save(folder / "market_analysis-1.json")
    tools = {"fetch_prices": answers(CLOSED, CLOSED, TOOLS["fetch_prices"])}
    run = analysis(artifacts, tools=tools, understand="Apple, I think", draft="It rose by 77%.", review=CLOSED).when_time_passes(
        "1h"
    )
    run.when_approved(by="bo", value="It rose.").then_completed().save(folder / "market_analysis-2.json")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        record(HISTORIES)
