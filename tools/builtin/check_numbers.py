"""Checks that the numbers in a text are those that were computed, said of the right share."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from tools.builtin.insight_types import Fact
from tools.builtin.known_shares import NAMES
from tools.builtin.periods import MONTH_NAMES

# A date, or a number with the sign and the separators that English uses. Words ("five", "doubled") aren't read.
_NUMBER = re.compile(
    r"(?P<date>\b\d{4}-\d\d(?:-\d\d)?\b)|(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?P<ordinal>st|nd|rd|th)?"
)
_LIST_MARK = re.compile(r"^\s*\d{1,2}[.)]\s", re.MULTILINE)
# A full stop within "59.2" or "U.S." ends no sentence; one before a space does.
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_MONTH = re.compile(rf"\b(?:{'|'.join(MONTH_NAMES)}) \d{{4}}\b")
_YEAR = re.compile(r"(?:19|20)\d\d")
_UP = re.compile(r"\b(?:rose|ris(?:e|es|en|ing)|gain\w*|gr[eo]w\w*|increas\w*|climb\w*)\b", re.IGNORECASE)
_DOWN = re.compile(r"\b(?:f[ae]ll\w*|los[est]\w*|losing|declin\w*|drop\w*|decreas\w*|drawdown\w*)\b", re.IGNORECASE)
_VOLATILE = re.compile(r"\bvolatil", re.IGNORECASE)
_PRONOUN = re.compile(r"\s*Its?\b")
# Fact that tells which share it is true of → the words that claim it.
_SUPERLATIVES = {
    "most.growth": re.compile(
        r"\b(?:did|performed|grew|gained|rose) (?:the )?(?:best|most)\b|\b(?:highest growth|fell least)\b", re.IGNORECASE
    ),
    "least.growth": re.compile(r"\b(?:did|performed) (?:the )?worst\b|\b(?:lowest growth|rose least)\b", re.IGNORECASE),
    "most.volatility": re.compile(r"\bmost volatile\b|\bhighest volatility\b", re.IGNORECASE),
    "least.volatility": re.compile(r"\bleast volatile\b|\blowest volatility\b", re.IGNORECASE),
    "most.drawdown": re.compile(r"\bdeepest (?:fall|drawdown)\b", re.IGNORECASE),
    "least.drawdown": re.compile(r"\bmildest (?:fall|drawdown)\b", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class NumberCheck:
    """`checked`: numbers found in the text; `unknown`: per sentence, the numbers, months and superlatives that no fact bears out.

    `reason` says in one English sentence why the text fails, and is empty if it doesn't.
    """

    ok: bool
    checked: list[str]
    unknown: list[str]
    reason: str


def check_numbers(text: str, facts: list[Fact]) -> NumberCheck:
    """Check that `text` states figures of `facts` and no others, each of the right share and in the right direction.

    A number may be rounded: "760%" stands for 759.8. A month with its year must be one of the share's facts. Allowed
    besides: years within those of the facts, ordinals ("1st"), numbers of list items, and the count of the shares. A
    number belongs to the share named last before it; among words for a rise, a fall or volatility only such facts
    count; "the most volatile" and the like must be said of the right share. A text without a single figure fails:
    nothing in it rests on the data. What else the words say isn't judged, and a muddled but true sentence may fail.
    """
    if not text.strip():
        return NumberCheck(ok=False, checked=[], unknown=[], reason="It is empty.")
    years = {int(year) for fact in facts for year in _YEAR.findall(fact.text)}
    span = range(min(years), max(years) + 1) if years else range(0)
    shares = {fact.ticker for fact in facts if fact.ticker}
    names = {name.lower(): ticker for ticker in shares | NAMES.keys() for name in (ticker, *NAMES.get(ticker, ()))}
    name = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b", re.IGNORECASE)
    checked: list[str] = []
    unknown: list[str] = []
    before: set[str] = set()
    for sentence in _SENTENCE_END.split(_LIST_MARK.sub(" ", text)):
        places = [(matched.start(), names[matched.group().lower()]) for matched in name.finditer(sentence)]
        named = {ticker for _, ticker in places} or (before if _PRONOUN.match(sentence) else set())
        wrong = [f'"{claim}"' for claim in _wrong_superlatives(sentence, named, facts)]
        for piece, about in _pieces(sentence, places, named):
            allowed = {number for fact in facts if _is_about(fact, about, piece) for number in _numbers_of(fact)}
            told = " ".join(fact.text for fact in facts if not about or fact.ticker is None or fact.ticker in about)
            wrong += [month for month in _MONTH.findall(piece) if month not in told]
            for printed in _numbers(piece, span):
                checked.append(printed)
                if not _is_known(printed, allowed) and printed != str(len(shares)):
                    wrong.append(printed)
        if wrong:
            unknown.append(f"{', '.join(wrong)} in “{_short(sentence)}”")
        before = named
    reason = f"It says what the computed figures don't: {'; '.join(unknown[:3])}." if unknown else ""
    if not checked:
        reason = "It states none of the computed figures."
    return NumberCheck(ok=not reason, checked=checked, unknown=unknown, reason=reason)


def _pieces(sentence: str, places: list[tuple[int, str]], named: set[str]) -> Iterator[tuple[str, set[str]]]:
    """Cut a sentence before each share that it names: a number belongs to the share named last before it.

    What stands before the first name is about any of them.
    """
    ends = [start for start, _ in places[1:]] + [len(sentence)]
    yield sentence[: places[0][0] if places else None], named
    for (start, ticker), end in zip(places, ends if places else [], strict=True):
        yield sentence[start:end], {ticker}


def _wrong_superlatives(sentence: str, named: set[str], facts: list[Fact]) -> Iterator[str]:
    """Yield what a sentence about one share says of it that is true of another."""
    holders = {fact.id: fact.ticker for fact in facts}
    for id_, words in _SUPERLATIVES.items():
        claim = words.search(sentence)
        if claim and id_ in holders and len(named) == 1 and named != {holders[id_]}:
            yield claim.group()


def _is_about(fact: Fact, about: set[str], piece: str) -> bool:
    """Say whether `piece`, which is about the shares `about` (empty: any), can be speaking of `fact`."""
    if about and fact.ticker is not None and fact.ticker not in about:
        return False
    if fact.unit != "%":
        return True
    up, down, volatile = (bool(words.search(piece)) for words in (_UP, _DOWN, _VOLATILE))
    is_volatility = fact.id.endswith(".volatility")
    if up + down + volatile != 1:  # it speaks of none or of several: which number is which can't be told
        return True
    return is_volatility if volatile else not is_volatility and (fact.value >= 0 if up else fact.value <= 0)


def _numbers(sentence: str, span: range) -> Iterator[str]:
    """Yield the numbers that must be known: as printed, without thousands' separators, sign and unit."""
    for matched in _NUMBER.finditer(sentence):
        if matched["date"]:
            if int(matched["date"][:4]) not in span:
                yield matched["date"]
        elif not matched["ordinal"] and not (_YEAR.fullmatch(matched["number"]) and int(matched["number"]) in span):
            yield matched["number"].replace(",", "")


def _numbers_of(fact: Fact) -> Iterator[Decimal]:
    yield abs(Decimal(str(fact.value)))
    for matched in _NUMBER.finditer(fact.text):
        if matched["number"]:
            yield Decimal(matched["number"].replace(",", ""))


def _is_known(printed: str, allowed: set[Decimal]) -> bool:
    """Say whether some allowed number, rounded to as many decimals as are printed, is the printed one.

    Both ways of rounding a half count: "0.24" and "0.25" are both fair for 0.245.
    """
    try:
        number = Decimal(printed)
    except ArithmeticError:  # a date outside the data
        return False
    step = Decimal(1).scaleb(-len(printed.partition(".")[2]))
    return any(
        number in {(value / step + half).to_integral_value(ROUND_FLOOR) * step for half in (Decimal("0.5"), Decimal("0.4999999"))}
        for value in allowed
    )


def _short(sentence: str) -> str:
    words = " ".join(sentence.split())
    return words if len(words) <= 100 else words[:99] + "…"  # noqa: PLR2004
