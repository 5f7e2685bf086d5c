"""Cleans share prices, and counts everything that it drops or finds odd."""

import math
from dataclasses import dataclass
from datetime import date
from itertools import groupby, pairwise
from statistics import median

from tools.builtin.known_shares import name_of
from tools.builtin.price_file import Row

CleanRow = tuple[str, date, float]  # symbol, day, price > 0

# A price five times both its neighbours (or a fifth), which agree within a factor of two, is a slipped decimal
# point or another unit: no share rises fivefold and gives all of it back by the next price.
_SPIKE = 5.0
_AGREE = 2.0
# Robust z-score above which a change is flagged, and the least number of changes for it to mean anything.
_ODD = 5.0
_ENOUGH = 12
_MAD_TO_SIGMA = 0.6745  # median absolute deviation of a standard normal distribution
_LISTED = 10  # notes name so many at most; the counts have them all


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows came in, were dropped for which reason, or were kept but flagged, and how many are left."""

    rows_in: int
    missing_price: int
    non_positive_price: int
    exact_duplicates: int
    conflicting_duplicates: int
    spikes_removed: int
    outliers_flagged: int
    months_missing: int
    rows_out: int


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Rows `[symbol, "YYYY-MM-DD", price]` by symbol and day, one a day at most; `notes` explains the counts in English."""

    rows: list[CleanRow]
    counts: Counts
    notes: list[str]


def clean_prices(rows: list[Row]) -> Cleaned:
    """Drop what can't be a price, flag what is odd, and count both.

    Dropped: rows without a price or with one that isn't positive; exact repeats; of several prices for one share
    and day all but the last listed (later lines are corrections); spikes that revert (five times both neighbours).
    Kept but flagged: monthly or daily changes with a robust z-score above 5 (median and MAD of log returns), because
    shares do jump. Months without a price are counted and stay empty: a filled-in price would be a return of 0 %
    that nobody had.
    """
    notes: list[str] = []
    priced = [(symbol, day, price) for symbol, day, price in rows if price is not None]
    positive = [row for row in priced if row[2] > 0]
    distinct = list(dict.fromkeys(positive))
    by_day: dict[tuple[str, date], float] = {}
    for symbol, day, price in positive:
        by_day[symbol, day] = price
    kept: list[CleanRow] = []
    spikes = outliers = missing_months = 0
    ordered: list[CleanRow] = [(symbol, day, price) for (symbol, day), price in sorted(by_day.items())]
    for symbol, group in groupby(ordered, key=lambda row: row[0]):
        series = list(group)
        clean = _without_spikes(series, notes)
        spikes += len(series) - len(clean)
        outliers += _flag_outliers(clean, notes)
        missing = _missing_months(clean)
        missing_months += missing
        if missing:
            notes.append(f"{name_of(symbol)}: {_count(missing, 'month')} without a price; nothing was filled in.")
        kept += clean
    if len(distinct) > len(by_day):
        notes.append("Several different prices for one share and day: the last one listed was kept.")
    counts = Counts(
        rows_in=len(rows),
        missing_price=len(rows) - len(priced),
        non_positive_price=len(priced) - len(positive),
        exact_duplicates=len(positive) - len(distinct),
        conflicting_duplicates=len(distinct) - len(by_day),
        spikes_removed=spikes,
        outliers_flagged=outliers,
        months_missing=missing_months,
        rows_out=len(kept),
    )
    return Cleaned(rows=kept, counts=counts, notes=notes)


def _without_spikes(series: list[CleanRow], notes: list[str]) -> list[CleanRow]:
    clean: list[CleanRow] = []
    for index, (symbol, day, price) in enumerate(series):
        if clean and index + 1 < len(series):
            before, after = clean[-1][2], series[index + 1][2]
            agree = max(before, after) / min(before, after) <= _AGREE
            if agree and (price >= _SPIKE * max(before, after) or price * _SPIKE <= min(before, after)):
                notes.append(f"{name_of(symbol)}: {price:g} on {day} was removed, between {before:g} and {after:g}.")
                continue
        clean.append((symbol, day, price))
    return clean


def _flag_outliers(series: list[CleanRow], notes: list[str]) -> int:
    changes = [(day, math.log(price) - math.log(previous)) for (_, _, previous), (_, day, price) in pairwise(series)]
    if len(changes) < _ENOUGH:
        return 0
    middle = median(change for _, change in changes)
    spread = median(abs(change - middle) for _, change in changes)
    if spread == 0:
        return 0
    odd = [(day, change) for day, change in changes if _MAD_TO_SIGMA * abs(change - middle) / spread > _ODD]
    for day, change in odd[:_LISTED]:
        notes.append(f"{name_of(series[0][0])}: a change of {math.expm1(change):+.1%} by {day} is unusual; it was kept.")
    return len(odd)


def _missing_months(series: list[CleanRow]) -> int:
    months = {day.year * 12 + day.month for _, day, _ in series}
    return max(months) - min(months) + 1 - len(months) if months else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
