"""Reads a question about share prices by rule: which shares, which period, what about them."""

import re
from dataclasses import dataclass
from typing import Literal

from tools.builtin import known_shares
from tools.builtin.periods import Period, find_period, in_words, iso, month_of

Topic = Literal["growth", "volatility", "drawdown", "correlation", "overview"]

# The topic whose words come first in the question is its own; of two that begin alike ("worst fall", "worst") the upper one.
_TOPICS: tuple[tuple[Topic, str], ...] = (
    ("correlation", r"correlat|move together|moved together|in step|diversif|co-?move"),
    ("drawdown", r"drawdown|worst (?:fall|loss|drop)|biggest (?:fall|loss|drop)|crash|fell|fall|drop|lost|lose|decline|crisis"),
    ("volatility", r"volatil|risk|stable|steady|swing|unstable|fluctuat"),
    ("growth", r"grow|grew|growth|perform|return|gain|rise|rose|best|worst|increase|profit|winner|invest|cagr|outperform"),
)


@dataclass(frozen=True, slots=True)
class Matched:
    """The question's own words: symbol → the name it used, and the words that name the period (None: none do)."""

    tickers: dict[str, str]
    period: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to look at: symbols (empty: all that the source has) and the first and last month, "YYYY-MM" (None: open).

    `assumptions` says in English what the question left open and how that was filled.
    """

    topic: Topic
    tickers: list[str]
    start: str | None
    end: str | None
    matched: Matched
    assumptions: list[str]


def parse_question(question: str, source: str = known_shares.SOURCE) -> Plan:
    """Read which shares, which period and which topic a question is about, by names and words that it contains.

    What the question leaves open is filled (all shares, the whole range) and listed under `assumptions`. For a
    source other than `vega_datasets` the shares and the range are unknown beforehand: left open, they stay open.
    """
    assumptions: list[str] = []
    is_known = source == known_shares.SOURCE
    named = find_shares(question)
    tickers = list(named)
    first, last = (month_of(known_shares.FIRST), month_of(known_shares.LAST)) if is_known else (None, None)
    period = find_period(question, last)
    if not named and period is None:
        assumptions.append("The question names no share and no period known to this analysis, so it covers all of the data.")
    if not named:
        tickers = list(known_shares.NAMES) if is_known else []
        names = ", ".join(known_shares.name_of(ticker) for ticker in tickers) or "all in the source"
        assumptions.append(f"No share is named, so all are used: {names}.")
    start, end = _limit(period, first, last, assumptions)
    return Plan(
        topic=_topic(question),
        tickers=tickers,
        start=None if start is None else iso(start),
        end=None if end is None else iso(end),
        matched=Matched(named, period.words if period else None),
        assumptions=assumptions,
    )


def find_shares(text: str) -> dict[str, str]:
    """Return the known shares that `text` names, by symbol in alphabetical order, each with the word it used."""
    found: dict[str, str] = {}
    for ticker, names in known_shares.NAMES.items():
        matched = re.search(rf"\b(?:{'|'.join(map(re.escape, names))})\b", text, re.IGNORECASE)
        if matched:
            found[ticker] = matched.group()
    return found


def _topic(question: str) -> Topic:
    found = [
        (matched.start(), order, topic)
        for order, (topic, words) in enumerate(_TOPICS)
        if (matched := re.search(rf"\b(?:{words})", question, re.IGNORECASE))
    ]
    return min(found)[2] if found else "overview"


def _limit(period: Period | None, first: int | None, last: int | None, assumptions: list[str]) -> tuple[int | None, int | None]:
    """Bring the period into the data's range; say in `assumptions` whatever that changed."""
    data = "" if first is None or last is None else f" ({in_words(first)} to {in_words(last)})"
    if period is None:
        assumptions.append(f"No period is named, so the whole range of the data is used{data}.")
        return first, last
    start, end = period.start, period.end
    if start is not None and end is not None and start > end:
        start, end = end // 12 * 12, start // 12 * 12 + 11
        assumptions.append(f'"{period.words}" runs backwards; it is read as {in_words(start)} to {in_words(end)}.')
    if period.covers_several:
        assumptions.append(f'Several periods are named ("{period.words}"); the analysis runs from the first to the last.')
    if first is None or last is None:
        return start, end
    if (start is not None and start > last) or (end is not None and end < first):
        assumptions.append(f'"{period.words}" lies outside the data{data}, so the whole range is used instead.')
        return first, last
    if (start is not None and start < first) or (end is not None and end > last):
        assumptions.append(f'"{period.words}" goes beyond the data{data}; it is cut to that range.')
    return max(start if start is not None else first, first), min(end if end is not None else last, last)
