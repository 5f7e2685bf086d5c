"""Puts computed figures into plain English sentences, each with its number."""

from collections.abc import Callable
from datetime import date

from tools.builtin.insight_types import Correlation, Fact, ShareInsight
from tools.builtin.known_shares import name_of
from tools.builtin.parse_question import Topic
from tools.builtin.periods import in_words

_KEY_FACTS = 5

# Which facts answer which topic, by the end of their id, most telling first.
_KEYS: dict[Topic, tuple[str, ...]] = {
    "growth": ("most.growth", "least.growth", ".growth", ".cagr"),
    "volatility": ("most.volatility", "least.volatility", ".volatility", ".worst"),
    "drawdown": ("most.drawdown", "least.drawdown", ".drawdown", ".worst"),
    "correlation": ("most.correlation", "least.correlation", ".correlation", ".growth"),
    "overview": (
        "most.growth",
        "least.growth",
        "most.volatility",
        "most.drawdown",
        "most.correlation",
        ".growth",
        ".volatility",
        ".drawdown",
    ),
}


def share_facts(share: ShareInsight) -> list[Fact]:
    """Return what can be said of one share alone."""
    name, ticker = name_of(share.ticker), share.ticker
    rose = "rose" if share.growth_pct >= 0 else "fell"
    facts = [
        Fact(
            f"{ticker}.growth",
            f"{name} {rose} by {abs(share.growth_pct):,.1f}% from {_month(share.first_day)} ({share.first_price:,.2f}) "
            f"to {_month(share.last_day)} ({share.last_price:,.2f}).",
            share.growth_pct,
            "%",
            ticker,
        )
    ]
    if share.cagr_pct is not None:
        text = f"{name} {'gained' if share.cagr_pct >= 0 else 'lost'} {abs(share.cagr_pct):,.1f}% a year on average."
        facts.append(Fact(f"{ticker}.cagr", text, share.cagr_pct, "%", ticker))
    if share.volatility_pct is not None:
        text = f"{name} had a volatility of {share.volatility_pct:.1f}% a year."
        facts.append(Fact(f"{ticker}.volatility", text, share.volatility_pct, "%", ticker))
    if share.peak_day is not None and share.trough_day is not None:
        text = (
            f"The worst fall of {name} was {abs(share.drawdown_pct):.1f}%, "
            f"from {_month(share.peak_day)} to {_month(share.trough_day)}."
        )
        facts.append(Fact(f"{ticker}.drawdown", text, share.drawdown_pct, "%", ticker))
    for kind, day, percent in (("best", share.best_day, share.best_pct), ("worst", share.worst_day, share.worst_pct)):
        if day is not None and percent is not None:
            facts.append(
                Fact(f"{ticker}.{kind}", f"The {kind} month of {name} was {_month(day)} ({percent:+.1f}%).", percent, "%", ticker)
            )
    return facts


def whole_facts(shares: list[ShareInsight], correlations: list[Correlation]) -> list[Fact]:
    """Return what can be said of several shares compared: nothing if there is only one."""
    facts: list[Fact] = []
    if len(shares) > 1:
        facts += _extremes(shares, "growth", lambda share: share.growth_pct, _grew)
        volatile = [share for share in shares if share.volatility_pct is not None]
        facts += _extremes(volatile, "volatility", lambda share: share.volatility_pct or 0.0, _swung)
        facts += _extremes(shares, "drawdown", lambda share: -share.drawdown_pct, _fell)
    known = [(pair.value, pair) for pair in correlations if pair.value is not None]
    if known:
        ordered = sorted(known, key=lambda item: (-item[0], item[1].a, item[1].b))
        value, pair = ordered[0]
        text = f"{name_of(pair.a)} and {name_of(pair.b)} moved together most closely, with a correlation of {value:.2f}."
        if len(ordered) == 1:
            text = f"The monthly returns of {name_of(pair.a)} and {name_of(pair.b)} had a correlation of {value:.2f}."
        facts.append(Fact("most.correlation", text, value, "correlation", None))
        if len(ordered) > 1:
            value, pair = ordered[-1]
            text = f"{name_of(pair.a)} and {name_of(pair.b)} moved together least, with a correlation of {value:.2f}."
            facts.append(Fact("least.correlation", text, value, "correlation", None))
    return facts


def key_facts(facts: list[Fact], topic: Topic) -> list[Fact]:
    """Return the few facts that answer the topic, the most telling first."""
    chosen: dict[str, Fact] = {}
    for ending in _KEYS[topic]:
        for fact in facts:
            if fact.id.endswith(ending):
                chosen.setdefault(fact.id, fact)
    # A share that the comparison has already told of needn't be told of again in the same respect.
    return [fact for fact in chosen.values() if not _is_told(fact, chosen)][:_KEY_FACTS] or facts[:_KEY_FACTS]


def headline(facts: list[Fact]) -> str:
    """Return the first fact's sentence: the shortest honest answer."""
    return facts[0].text if facts else "There is too little data to say anything."


def _is_told(fact: Fact, chosen: dict[str, Fact]) -> bool:
    kind = fact.id.rpartition(".")[2]
    return fact.ticker is not None and any(
        other.id in {f"most.{kind}", f"least.{kind}"} and other.ticker == fact.ticker and other is not fact
        for other in chosen.values()
    )


def _extremes(
    shares: list[ShareInsight], kind: str, value: Callable[[ShareInsight], float], say: Callable[[ShareInsight, bool], str]
) -> list[Fact]:
    if len(shares) < 2:  # noqa: PLR2004  (nothing to compare)
        return []
    ordered = sorted(shares, key=lambda share: (-value(share), share.ticker))
    signed = -1 if kind == "drawdown" else 1
    return [
        Fact(f"{which}.{kind}", say(share, which == "most"), signed * value(share) + 0.0, "%", share.ticker)
        for which, share in (("most", ordered[0]), ("least", ordered[-1]))
    ]


def _grew(share: ShareInsight, most: bool) -> str:
    name, by = name_of(share.ticker), f"{abs(share.growth_pct):,.1f}%"
    since = f"from {_month(share.first_day)} to {_month(share.last_day)}"
    match share.growth_pct >= 0, most:
        case True, True:
            return f"{name} did best: it rose by {by} {since}."
        case True, False:
            return f"{name} rose least, by {by} {since}."
        case False, True:
            return f"{name} fell least, by {by} {since}."
        case _:
            return f"{name} did worst: it fell by {by} {since}."


def _swung(share: ShareInsight, most: bool) -> str:
    return (
        f"{name_of(share.ticker)} was the {'most' if most else 'least'} volatile share, with {share.volatility_pct:.1f}% a year."
    )


def _fell(share: ShareInsight, most: bool) -> str:
    name = name_of(share.ticker)
    if share.peak_day is None or share.trough_day is None:
        return f"{name} never closed a month below an earlier one ({abs(share.drawdown_pct):.1f}%)."
    which = "deepest" if most else "mildest"
    return (
        f"{name} had the {which} fall of all: {abs(share.drawdown_pct):.1f}%, "
        f"from {_month(share.peak_day)} to {_month(share.trough_day)}."
    )


def _month(day: date) -> str:
    return in_words(day.year * 12 + day.month - 1)
