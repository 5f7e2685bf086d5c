from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.builtin.check_plan import check_plan
from tools.builtin.known_shares import FIRST, LAST, NAMES
from tools.builtin.parse_question import parse_question
from tools.builtin.periods import iso, month_of

WHOLE = (FIRST, LAST)
ALL = sorted(NAMES)


@pytest.mark.parametrize(
    ("question", "tickers"),
    [
        ("How did Microsoft do?", ["MSFT"]),
        ("msft and Apple's shares", ["AAPL", "MSFT"]),
        ("GOOGL vs ibm", ["GOOG", "IBM"]),
        ("Alphabet; amazon!", ["AMZN", "GOOG"]),
        ("pineapples and ibmers", ALL),
        ("", ALL),
    ],
)
def test_shares_are_found_by_whole_names_and_symbols(question: str, tickers: list[str]) -> None:
    """Case and possessives don't matter; parts of other words do."""
    assert parse_question(question).tickers == tickers


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        ("in 2005", "2005-01", "2005-12"),
        ("from 2003 to 2006", "2003-01", "2006-12"),
        ("between 2003 and 2006", "2003-01", "2006-12"),
        ("between March 2003 and June 2006", "2003-03", "2006-06"),
        ("2003-2006", "2003-01", "2006-12"),
        ("2003 – 2006", "2003-01", "2006-12"),  # noqa: RUF001
        ("from 2004-08 to 2005-02", "2004-08", "2005-02"),
        ("since 2004", "2004-01", LAST),
        ("since Sept. 2004", "2004-09", LAST),
        ("after 2004", "2005-01", LAST),
        ("before 2004", FIRST, "2003-12"),
        ("until 2004", FIRST, "2004-12"),
        ("up to May 2004", FIRST, "2004-05"),
        ("in the 2000s", FIRST, "2009-12"),
        ("in the early 2000s", FIRST, "2003-12"),
        ("over the last 3 years", "2007-03", LAST),
        ("in the past two quarters", "2009-09", LAST),
        ("last year", "2009-03", LAST),
        ("during the 2008 crisis", "2007-10", "2009-03"),
        ("in the financial crisis", "2007-10", "2009-03"),
        ("after the 2008 crisis", "2009-04", LAST),
        ("in the dot-com crash", "2000-03", "2002-10"),
        ("compare 2003 and 2006", "2003-01", "2006-12"),
        ("from 1995 to 2003", FIRST, "2003-12"),
        ("from 2006 to 2003", "2003-01", "2006-12"),
    ],
)
def test_periods_are_read(words: str, start: str, end: str) -> None:
    """Months are included on both sides and cut to the data."""
    plan = parse_question(f"How did IBM do {words}?")
    assert (plan.start, plan.end) == (start, end)
    assert plan.matched.period is not None


@pytest.mark.parametrize("question", ["I have $2000", "2,005 shares", "version 2.2005", "20055", "2005 dollars", "2003%"])
def test_numbers_that_are_no_years_name_no_period(question: str) -> None:
    """An amount of money is not a year."""
    assert parse_question(question).matched.period is None


@pytest.mark.parametrize(
    ("question", "assumed"),
    [
        ("from 1995 to 2003", "goes beyond the data"),
        ("in 2015", "lies outside the data"),
        ("from 2006 to 2003", "runs backwards"),
        ("2003 and 2006", "Several periods"),
        ("IBM", "No period is named"),
        ("in 2005", "No share is named"),
        ("Tell me about bananas on the moon", "names no share and no period"),
    ],
)
def test_what_was_assumed_is_said(question: str, assumed: str) -> None:
    """A reader can tell what the question said from what was filled in."""
    assert any(assumed in assumption for assumption in parse_question(question).assumptions)


def test_a_full_question_assumes_nothing() -> None:
    """And shows the words that it was read from."""
    plan = parse_question("How much did Apple grow from 2003 to 2006?")
    assert (plan.topic, plan.assumptions, plan.matched.tickers) == ("growth", [], {"AAPL": "Apple"})
    assert plan.matched.period == "from 2003 to 2006"


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("Which was most volatile?", "volatility"),
        ("What was the worst fall?", "drawdown"),
        ("Which did best, and how risky was it?", "growth"),
        ("Do they move together?", "correlation"),
        ("Tell me something", "overview"),
    ],
)
def test_the_topic_is_what_comes_first(question: str, topic: str) -> None:
    """It decides which figures lead the report."""
    assert parse_question(question).topic == topic


def test_another_source_leaves_open_what_the_question_leaves_open() -> None:
    """Its shares and its range aren't known before it is read."""
    plan = parse_question("How did they do?", source="mine.csv")
    assert (plan.tickers, plan.start, plan.end) == ([], None, None)
    plan = parse_question("How did they do from 2015 to 2020?", source="mine.csv")
    assert (plan.start, plan.end) == ("2015-01", "2020-12")


@given(
    st.text(max_size=80)
    | st.lists(
        st.sampled_from(
            ["since", "2004", "to", "from", "Apple", "1999", "2008", "crisis", "last", "3", "years", "and", "May", "00s"]
        )
    ).map(" ".join)
)
def test_any_text_gives_a_plan_within_the_data(text: str) -> None:
    """Whatever is asked, the plan can be carried out."""
    plan = parse_question(text)
    assert plan.start is not None
    assert plan.end is not None
    assert FIRST <= plan.start <= plan.end <= LAST
    assert plan.tickers
    assert set(plan.tickers) <= NAMES.keys()


@given(st.integers(0, 9999 * 12 + 11))
def test_a_month_survives_being_written(month: int) -> None:
    """`month_of` and `iso` are inverse."""
    assert month_of(iso(month)) == month


QUESTION = "Compare Apple and IBM from 2003 to 2006"


def test_an_answer_that_fits_is_accepted_with_its_plan() -> None:
    """The plan is the same as by rule, so that all later steps see one shape."""
    checked = check_plan(QUESTION, {"tickers": ["IBM", "AAPL"], "start": "2003", "end": "2006-12"})
    assert (checked.ok, checked.problems) == (True, [])
    assert checked.plan == parse_question(QUESTION)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "no JSON object"),
        ("text", "no JSON object"),
        ({}, "no list of shares"),
        ({"tickers": "AAPL", "start": "2003", "end": "2006"}, "no list of shares"),
        ({"tickers": ["AAPL", "IBM", "ORCL"], "start": "2003", "end": "2006"}, "ORCL is no share"),
        ({"tickers": ["AAPL"], "start": "2003", "end": "2006"}, "leaves out IBM"),
        ({"tickers": ["AAPL", "IBM", "MSFT"], "start": "2003", "end": "2006"}, "adds MSFT"),
        ({"tickers": ["AAPL", "IBM"], "start": "soon", "end": "2006"}, "neither a year nor a month"),
        ({"tickers": ["AAPL", "IBM"], "start": "2003"}, "neither a year nor a month"),
        ({"tickers": ["AAPL", "IBM"], "start": "2006", "end": "2003"}, "before it starts"),
        ({"tickers": ["AAPL", "IBM"], "start": "1990", "end": "2003"}, "outside the data"),
        ({"tickers": ["AAPL", "IBM"], "start": "2003", "end": "2005"}, "is 2003-01 to 2006-12"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_with_the_reason(answer: Any, problem: str) -> None:
    """The report prints the reason, and the rule takes over."""
    checked = check_plan(QUESTION, answer)
    assert not checked.ok
    assert checked.plan is None
    assert any(problem in found for found in checked.problems)


def test_a_question_without_shares_means_all_of_them() -> None:
    """A model that picks some has made them up; the same for a period."""
    whole = {"start": "2000", "end": "2010"}
    assert check_plan("Which grew most?", {"tickers": ALL, **whole}).ok
    assert not check_plan("Which grew most?", {"tickers": ["AAPL"], **whole}).ok
    assert not check_plan("Which grew most?", {"tickers": ALL, "start": "2002", "end": "2002"}).ok


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["tickers", "start", "end"]), inner),
    )
)
def test_any_json_is_judged(answer: Any) -> None:
    """A model may answer anything; the check itself never fails."""
    checked = check_plan(QUESTION, answer)
    assert checked.ok == (not checked.problems) == (checked.plan is not None)
