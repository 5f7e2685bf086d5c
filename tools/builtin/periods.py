"""Reads a period of time from English text: a grammar of spans, joined or limited by words before them.

A month is an int, counted from year 0: 2005-03 is 2005 * 12 + 2. That makes "three years before" plain arithmetic.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MONTH_NAMES = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SHORT = tuple(name[:3].lower() for name in MONTH_NAMES)
_NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_UNITS = {"month": 1, "quarter": 3, "year": 12, "decade": 120}

# Months of the events that people name instead of dates: from the market's high to its low.
_CRISIS = (2007 * 12 + 9, 2009 * 12 + 2)  # S&P 500: high of October 2007, low of March 2009
_DOTCOM = (2000 * 12 + 2, 2002 * 12 + 9)  # Nasdaq: high of March 2000, low of October 2002
_DECADES = {"": (0, 9), "early": (0, 3), "mid": (3, 6), "late": (7, 9)}  # first and last year within the decade

_SPAN = re.compile(
    r"""
      (?P<crisis> (?:20(?:07|08|09)\s+)? (?:(?:global\s+)?financial\s+(?:crisis|crash)|credit\s+crunch|great\s+recession)
                | 2008\s+(?:crisis|crash) | (?:crisis|crash)\s+of\s+2008 )
    | (?P<dotcom> dot[-\s]?com \s+ (?:crash|bust|bubble|crisis) | (?:crash|bust)\s+of\s+2000 )
    | (?: (?P<part>early|mid|late) [-\s]+ (?:the\s+)? )? (?P<decade> (?:19|20)\d0 (?='?s\b) ) '?s
    | (?: \b (?P<month> jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec ) [a-z]*\.? ,? \s+ (?:of\s+)? )?
      (?<![\d.,$€£]) (?P<year> (?:19|20)\d\d ) (?: -(?P<number>0[1-9]|1[0-2]) (?!\d) )? (?![\d]|[.,]\d|\s*(?:dollars|shares|%))
    """,
    re.IGNORECASE | re.VERBOSE,
)
_RELATIVE = re.compile(
    rf"\b(?:last|past|previous|latest)\s+(?:(?P<count>\d{{1,3}}|{'|'.join(_NUMBERS)})\s+)?(?P<unit>{'|'.join(_UNITS)})s?\b",
    re.IGNORECASE,
)
_JOIN = re.compile(r"\s*(?:[-–—]|to|until|till|through|and(?=.)|up\s+to)\s*(?:the\s+)?", re.IGNORECASE)  # noqa: RUF001
_BEFORE = re.compile(
    r"\b(?P<word>from|between|since|starting(?:\s+(?:in|from))?|after|before|prior\s+to|until|till|through|up\s+to)\s+(?:the\s+)?$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Period:
    """A period that a text names: its words, and its first and last month (None: open on that side).

    `covers_several`: the text names several periods and this is the smallest one that holds them all.
    """

    words: str
    start: int | None
    end: int | None
    covers_several: bool = False


@dataclass(frozen=True, slots=True)
class _Span:
    at: int
    to: int
    start: int
    end: int


def find_period(text: str, last: int | None) -> Period | None:
    """Return the period that `text` names, or None.

    `last` is the data's last month, from which "the last 3 years" is counted back; None if it isn't known: then
    such words name no period.
    """
    spans = list(_spans(text))
    if not spans:
        return _relative(text, last)
    first, final = spans[0], spans[-1]
    before = _BEFORE.search(text[: first.at])
    word = " ".join(before["word"].lower().split()) if before else ""
    words = text[before.start() if before else first.at : final.to]
    joined = _JOIN.fullmatch(text[first.to : final.at]) if len(spans) == 2 else None  # noqa: PLR2004
    # "2003 and 2005" lists two years; only "between" makes "and" a range.
    if joined and (word == "between" or not joined.group().strip().lower().startswith("and")):
        return Period(words, first.start, final.end)
    if len(spans) > 1:
        return Period(words, min(span.start for span in spans), max(span.end for span in spans), covers_several=True)
    match word.split():
        case ["since" | "from" | "starting", *_]:
            return Period(words, first.start, None)
        case ["after"]:
            return Period(words, first.end + 1, None)
        case ["before"] | ["prior", _]:
            return Period(words, None, first.start - 1)
        case ["until" | "till" | "through"] | ["up", _]:
            return Period(words, None, first.end)
        case _:
            return Period(text[first.at : first.to], first.start, first.end)


def month_of(text: str) -> int:
    """Return the month of "YYYY-MM"; raises ValueError for anything else."""
    matched = re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", text)
    if not matched:
        raise ValueError(f"{text!r} is no month like 2004-08")
    return int(matched[1]) * 12 + int(matched[2]) - 1


def iso(month: int) -> str:
    """Return the month as "YYYY-MM"."""
    return f"{month // 12:04d}-{month % 12 + 1:02d}"


def in_words(month: int) -> str:
    """Return the month as a report writes it: "August 2004"."""
    return f"{MONTH_NAMES[month % 12]} {month // 12}"


def _spans(text: str) -> Iterator[_Span]:
    for matched in _SPAN.finditer(text):
        if matched["crisis"]:
            start, end = _CRISIS
        elif matched["dotcom"]:
            start, end = _DOTCOM
        elif matched["decade"]:
            first, last = _DECADES[(matched["part"] or "").lower()]
            start, end = (int(matched["decade"]) + first) * 12, (int(matched["decade"]) + last) * 12 + 11
        else:
            start = int(matched["year"]) * 12
            end = start + 11
            if matched["month"]:
                start = end = start + _SHORT.index(matched["month"][:3].lower())
            elif matched["number"]:
                start = end = start + int(matched["number"]) - 1
        yield _Span(matched.start(), matched.end(), start, end)


def _relative(text: str, last: int | None) -> Period | None:
    matched = _RELATIVE.search(text)
    if matched is None or last is None:
        return None
    count = matched["count"] or "1"
    months = (_NUMBERS.get(count.lower()) or int(count)) * _UNITS[matched["unit"].lower()]
    # A period of n months has n monthly changes and so n + 1 prices.
    return Period(matched.group(), last - months, last)
