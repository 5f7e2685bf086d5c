import asyncio
import hashlib
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tools.builtin.check_numbers import check_numbers
from tools.builtin.clean_prices import Cleaned, clean_prices
from tools.builtin.fetch_prices import fetch_prices
from tools.builtin.price_insights import Insights, price_insights
from tools.builtin.write_report import Comment, Reading, Review, Source, write_report
from tools.context import ToolContext
from tools.errors import TerminalError
from tools.registry import load

PRICES = fetch_prices()
CLEANED = clean_prices(PRICES.rows)
INSIGHTS = price_insights(CLEANED.rows)
SOURCE = Source(PRICES.source, PRICES.sha256, PRICES.count, PRICES.notes)
READING = Reading(by="rule", start="2000-01", end="2010-03", assumptions=["No share is named."], problems=["It was wrong."])
BY_FACTS = Comment(text=INSIGHTS.summary, by="facts", reason="It states none of the computed figures.")
DEFINITION = Path(__file__).parents[2] / "streams" / "workflows" / "market_analysis.yaml"


class Outline(HTMLParser):
    """Collects what a browser would load or run, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element and its addresses."""
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in {"src", "href"} and value]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Elements close in the order in which they were opened."""
        assert self.open.pop() == tag


def context(folder: Path) -> ToolContext:
    """Give a call of the step `report`."""
    return ToolContext(call_id="c1", run_id="run-1", step="report", attempt=1, artifacts=folder)


@pytest.mark.parametrize(
    "text",
    [
        "Apple rose by 759.8%, Microsoft fell by 27.7%.",
        "Apple rose by about 760% between 2000 and 2010.",
        "AAPL closed at 223.02 in March 2010.",
        "Amazon was volatile. It had a volatility of 59.2% a year.",
        "1. Apple did best: 759.8%\n2. IBM was the least volatile share, with 29.1%.",
        "Of the 5 shares, the 1st was Apple with 759.8%.",
        "Apple and Google moved together with a correlation of 0.56.",
        INSIGHTS.summary,
    ],
)
def test_computed_figures_pass(text: str) -> None:
    """As printed or rounded; years, ordinals and list numbers are no figures."""
    checked = check_numbers(text, INSIGHTS.facts)
    assert (checked.ok, checked.unknown, checked.reason) == (True, [], "")


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("Apple rose by 761%.", "761"),
        ("Apple rose by 759.85%.", "759.85"),
        ("IBM rose by 759.8%.", "759.8"),
        ("Amazon had a volatility of 54.7%, while Apple had one of 59.2%.", "54.7, 59.2"),
        ("Microsoft rose by 27.7%.", "27.7"),
        ("Apple was the most volatile share, with 54.7%.", '"most volatile"'),
        ("Apple rose by 759.8% until 2022.", "2022"),
        ("On 2015-01-01 Apple stood at 223.02.", "2015-01-01"),
        ("Apple rose by 759.8% by October 2001.", "October 2001"),
        ("", ""),
        ("Apple is a brilliant company.", ""),
    ],
)
def test_anything_else_fails_with_its_sentence(text: str, unknown: str) -> None:
    """Wrong number, wrong share, wrong direction, wrong date, or no figure at all."""
    checked = check_numbers(text, INSIGHTS.facts)
    assert not checked.ok
    assert checked.reason
    assert unknown in "".join(checked.unknown)


@given(st.text(max_size=200))
def test_any_text_is_judged(text: str) -> None:
    """A model may write anything; the check itself never fails."""
    checked = check_numbers(text, INSIGHTS.facts)
    assert checked.ok == (not checked.reason)


@given(st.sampled_from(INSIGHTS.facts))
def test_every_fact_passes_its_own_check(fact: Any) -> None:
    """Else the stand-in text would be no better than the model's."""
    assert check_numbers(fact.text, INSIGHTS.facts).ok


def test_the_report_is_one_html_file_and_markdown_with_plots(tmp_path: Path) -> None:
    """Nothing is loaded from elsewhere, and sums are those of the files."""
    report = write_report(context(tmp_path / "run"), "Which grew most?", READING, SOURCE, CLEANED, INSIGHTS, BY_FACTS)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "run").iterdir()}
    assert report.sha256s == files
    assert files.keys() == {"report.html", "report.md", "report-indexed.svg", "report-drawdown.svg", "report-correlation.svg"}
    outline = Outline(Path(report.html).read_text())
    assert outline.open == []
    assert len(outline.links) == 3
    assert all(link.startswith("data:image/svg+xml;base64,") for link in outline.links)
    assert "script" not in outline.tags
    markdown = Path(report.markdown).read_text()
    assert all(f"]({name})" in markdown for name in files if name.endswith(".svg"))
    for text in (markdown, Path(report.html).read_text()):
        for part in (
            "Which grew most?",
            "759.8%",
            "run-1",
            "No share is named.",
            "It was wrong.",
            PRICES.sha256,
            INSIGHTS.headline,
        ):
            assert part in text.replace("\\", "")
    assert report.summary == INSIGHTS.headline


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    """A repeated call leaves the same files, so a duplicate does no harm."""
    reports = [
        write_report(context(tmp_path / name), "Q", READING, SOURCE, CLEANED, INSIGHTS, BY_FACTS) for name in ("first", "again")
    ]
    assert reports[0].sha256s == reports[1].sha256s


def test_the_report_says_who_wrote_the_comment(tmp_path: Path) -> None:
    """And why the model's text was not used."""
    by_model = Comment(text="Apple rose by 759.8%.", by="model", reason="")
    review = Review(answers_question="partly")
    html = Path(write_report(context(tmp_path), "Q", READING, SOURCE, CLEANED, INSIGHTS, BY_FACTS).html).read_text()
    assert "The model&#39;s text was not used" in html.replace("'", "&#39;")
    assert BY_FACTS.reason in html
    html = Path(write_report(context(tmp_path), "Q", READING, SOURCE, CLEANED, INSIGHTS, by_model, review).html).read_text()
    assert "written by the language model" in html
    assert "not used. " not in html
    assert "<b>partly</b>" in html


def test_what_others_wrote_stays_text(tmp_path: Path) -> None:
    """A question or a model can put neither elements nor links into the report."""
    nasty = "<script>alert(1)</script> [a](http://x) | ![i](http://y)"
    comment = Comment(text=nasty + "\n\n# Title", by="model", reason="")
    report = write_report(context(tmp_path), nasty, READING, SOURCE, CLEANED, INSIGHTS, comment)
    outline = Outline(Path(report.html).read_text())
    assert "script" not in outline.tags
    assert all(link.startswith("data:") for link in outline.links)
    markdown = Path(report.markdown).read_text()
    assert "<script" not in markdown.replace("\\<", "")
    assert "[a](" not in markdown.replace("\\[", "").replace("\\]", "")
    assert "\n# Title" not in markdown


def analysis(rows: list[tuple[str, date, float]]) -> tuple[Cleaned, Insights]:
    """Clean and compute."""
    cleaned = clean_prices(list(rows))
    return cleaned, price_insights(cleaned.rows)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_one_share_and_few_prices_make_a_report_too(tmp_path: Path, count: int) -> None:
    """Without a correlation there is no plot of it."""
    cleaned, insights = analysis([("A_B|C", date(2000 + i // 12, i % 12 + 1, 1), 10.0 + i) for i in range(count)])
    report = write_report(context(tmp_path), "Q", READING, SOURCE, cleaned, insights, BY_FACTS)
    assert "report-correlation.svg" not in report.sha256s
    assert "A\\_B\\|C" in Path(report.markdown).read_text()


def test_no_prices_make_no_report(tmp_path: Path) -> None:
    """Nothing is written."""
    with pytest.raises(TerminalError, match="no prices"):
        write_report(context(tmp_path / "run"), "Q", READING, SOURCE, clean_prices([]), INSIGHTS, BY_FACTS)
    assert not (tmp_path / "run").exists()


def test_results_fit_the_next_tools_arguments(tmp_path: Path) -> None:
    """Through JSON, as in a workflow: every result can be given on as it is."""
    tools, run = load(), context(tmp_path)

    def call(name: str, **arguments: Any) -> Any:
        return asyncio.run(tools[name].call(arguments, run))

    plan = call("parse_question", question="Which share fell most in the 2008 crisis?")
    fetched = call("fetch_prices", tickers=plan["tickers"], start=plan["start"], end=plan["end"])
    cleaned = call("clean_prices", rows=fetched["rows"])
    insights = call("price_insights", rows=cleaned["rows"], topic=plan["topic"])
    assert call("check_numbers", text=insights["summary"], facts=insights["facts"])["ok"]
    report = call(
        "write_report",
        question="Which share fell most in the 2008 crisis?",
        reading={"by": "rule", "start": plan["start"], "end": plan["end"], "assumptions": plan["assumptions"], "problems": []},
        source={name: fetched[name] for name in ("source", "sha256", "count", "notes")},
        cleaned=cleaned,
        insights=insights,
        comment={"text": insights["summary"], "by": "facts", "reason": "The model was not asked."},
        review=None,
    )
    assert report["summary"] == insights["headline"]


def test_the_workflow_names_tools_and_arguments_that_exist() -> None:
    """The built-in definition and the tools change together."""
    steps = YAML(typ="safe").load(DEFINITION.read_text())["steps"]
    tools = load()
    called = {name: step["tool"] for name, step in steps.items() if "tool" in step}
    assert {call["name"] for call in called.values()} == tools.keys() - {"echo"}
    for call in called.values():
        schema = tools[call["name"]].arguments_schema
        assert call["arguments"].keys() <= schema["properties"].keys()
        assert set(schema.get("required", [])) <= call["arguments"].keys()
