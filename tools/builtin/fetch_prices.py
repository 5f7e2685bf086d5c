"""Fetches share prices from the built-in data, a file or an address."""

import calendar
import hashlib
import importlib.util
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tools.builtin import known_shares
from tools.builtin.download import MAX_BYTES, download, without_secrets
from tools.builtin.periods import in_words, month_of
from tools.builtin.price_file import Row, read_prices
from tools.errors import TerminalError

# Rows travel inside the result, so that whoever reads the history sees what a number was made from. 8,000 of them
# are 240 KB of JSON; a result should stay below 256 KB, because the history keeps it for ever.
MAX_ROWS = 8_000


@dataclass(frozen=True, slots=True)
class Prices:
    """Rows `[symbol, "YYYY-MM-DD", price or null]`, by symbol and day, and where they are from.

    `sha256` is that of the source's bytes. `tickers` counts rows by symbol, also 0 for one that was asked for.
    `first` and `last` are the days of the first and the last row. `notes` says in English what is missing.
    """

    source: str
    sha256: str
    count: int
    first: date
    last: date
    tickers: dict[str, int]
    notes: list[str]
    rows: list[Row]


def fetch_prices(
    source: str = known_shares.SOURCE, tickers: tuple[str, ...] = (), start: str | None = None, end: str | None = None
) -> Prices:
    """Fetch the prices of `tickers` (none given: of all) from month `start` to month `end` ("YYYY-MM", both included).

    `source` is `vega_datasets` (built in: monthly prices of five US shares, 2000 to 2010), the path of a CSV or
    Parquet file, or an http(s) address of one, at most 50 MB, with columns symbol (or ticker), date and price (or
    adj close, close). Raises TerminalError if the source can't be read, has no such rows, or has more than 8,000.
    """
    is_address = source.lower().startswith(("http://", "https://"))
    # An address may hold a password or a signature; the history must not.
    shown = without_secrets(source) if is_address else source
    data = download(source) if is_address else _read(source)
    wanted = {ticker.upper() for ticker in tickers}
    first_day, last_day = _day(start, is_end=False), _day(end, is_end=True)
    everything = read_prices(data, shown)
    rows = [
        row for row in everything if (not wanted or row[0] in wanted) and first_day <= row[1] <= last_day
    ]  # fmt: skip
    if not rows:
        raise TerminalError(f"{shown} has no prices for {_asked(wanted, start, end)}; it has {_has(everything)}")
    if len(rows) > MAX_ROWS:
        raise TerminalError(
            f"{shown} has {len(rows):,} prices for {_asked(wanted, start, end)}, more than {MAX_ROWS:,}: "
            "name fewer shares, a shorter period, or give a source with monthly prices"
        )
    # Stable: rows of one share and day keep the source's order, which cleaning relies on.
    rows.sort(key=lambda row: row[:2])
    counts = Counter(row[0] for row in rows)
    counted = {ticker: counts[ticker] for ticker in sorted(wanted | counts.keys())}
    return Prices(
        source=shown,
        sha256=hashlib.sha256(data).hexdigest(),
        count=len(rows),
        first=min(row[1] for row in rows),
        last=max(row[1] for row in rows),
        tickers=counted,
        notes=_notes(rows, counted, start),
        rows=rows,
    )


def _read(source: str) -> bytes:
    if source == known_shares.SOURCE:
        # Found, not imported: the package imports pandas, which takes a second.
        spec = importlib.util.find_spec(known_shares.SOURCE)
        if spec is None or spec.origin is None:
            raise TerminalError("the package vega_datasets isn't installed here: pip install vega-datasets")
        path = Path(spec.origin).parent / "_data" / "stocks.csv"
    else:
        path = Path(source)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TerminalError(f"{source} is larger than {MAX_BYTES // 1024 // 1024} MB")
        return path.read_bytes()
    except OSError as error:
        raise TerminalError(f"{source} can't be read: {error.strerror}") from error


def _day(month: str | None, *, is_end: bool) -> date:
    if month is None:
        return date.max if is_end else date.min
    try:
        year, number = divmod(month_of(month), 12)
        return date(year, number + 1, calendar.monthrange(year, number + 1)[1] if is_end else 1)
    except ValueError as error:
        raise TerminalError(f"wrong arguments for fetch_prices: {error}") from error


def _asked(wanted: set[str], start: str | None, end: str | None) -> str:
    shares = ", ".join(sorted(wanted)) or "any share"
    return f"{shares} from {start or 'the beginning'} to {end or 'the end'}"


def _has(rows: list[Row]) -> str:
    if not rows:
        return "no rows at all"
    symbols = sorted({row[0] for row in rows})
    more = f" and {len(symbols) - 20} more" if len(symbols) > 20 else ""  # noqa: PLR2004
    days = [row[1] for row in rows]
    return f"{', '.join(symbols[:20])}{more} from {min(days)} to {max(days)}"


def _notes(rows: list[Row], counted: dict[str, int], start: str | None) -> list[str]:
    """Say which shares have no prices at all and which begin later than what was asked for."""
    notes = [f"{known_shares.name_of(ticker)} has no prices in this period." for ticker, count in counted.items() if not count]
    earliest: dict[str, date] = {}
    for ticker, day, _ in rows:
        earliest.setdefault(ticker, day)
    begin = min(earliest.values())
    if start is not None:
        begin = min(begin, _day(start, is_end=False))
    wanted_from = in_words(begin.year * 12 + begin.month - 1)
    for ticker, day in earliest.items():
        if (day.year, day.month) > (begin.year, begin.month):
            month = in_words(day.year * 12 + day.month - 1)
            notes.append(f"Prices of {known_shares.name_of(ticker)} begin in {month}, later than {wanted_from}.")
    return notes
