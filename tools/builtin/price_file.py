"""Reads prices out of the bytes of a CSV or Parquet file, whatever such files usually call their columns."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from typing import Any

from tools.errors import TerminalError

Row = tuple[str, date, float | None]  # symbol, day, price; no price where the source has none

# What we need → what files call it, best first: an adjusted price knows about splits, a closing price doesn't.
_COLUMNS = {
    "symbol": ("symbol", "ticker"),
    "date": ("date", "day", "timestamp"),
    "price": ("price", "adj close", "adj_close", "adjclose", "adjusted close", "close"),
}
_DATE_FORMATS = ("%Y-%m-%d", "%b %d %Y", "%B %d %Y", "%Y/%m/%d", "%Y%m%d", "%Y-%m")


def read_prices(data: bytes, source: str) -> list[Row]:
    """Return the rows in the file's order; `source` is how errors call it.

    Prices that are missing, "NA" or no number become None. Raises TerminalError if the bytes are neither UTF-8 CSV
    with a header nor Parquet, if a column can't be found (listing those that are there), or at a date that can't be
    read (naming its line).
    """
    header, records = _parquet(data, source) if data.startswith(b"PAR1") else _csv(data, source)
    symbol, day, price = _find_columns(header, source)
    rows: list[Row] = []
    for number, record in enumerate(records, start=2):  # line 1 is the header
        if len(record) <= max(symbol, day, price):
            raise TerminalError(f"{source}, line {number}: {len(record)} fields where the header has {len(header)}")
        read = _date(record[day])
        if read is None:
            raise TerminalError(f"{source}, line {number}: {record[day]!r} is no date such as 2004-08-01 or Aug 1 2004")
        rows.append((str(record[symbol]).strip().upper(), read, _price(record[price])))
    return rows


def _csv(data: bytes, source: str) -> tuple[list[str], Iterator[Sequence[Any]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TerminalError(f"{source} is neither Parquet nor CSV in UTF-8") from error
    records = csv.reader(io.StringIO(text, newline=""))
    try:
        return next(records, []), (record for record in list(records) if record)
    except csv.Error as error:
        raise TerminalError(f"{source} is no CSV: {error}") from error


def _parquet(data: bytes, source: str) -> tuple[list[str], Iterator[Sequence[Any]]]:
    import pyarrow as pa  # noqa: PLC0415  (heavy: only when such a file comes)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        table = parquet.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise TerminalError(f"{source} begins like Parquet but can't be read: {error}") from error
    return list(table.column_names), iter(list(zip(*(column.to_pylist() for column in table.columns), strict=True)))


def _find_columns(header: Sequence[str], source: str) -> tuple[int, int, int]:
    found = [str(name).strip().lower() for name in header]
    places = {need: next((found.index(name) for name in names if name in found), None) for need, names in _COLUMNS.items()}
    match places["symbol"], places["date"], places["price"]:
        case int(symbol), int(day), int(price):
            return symbol, day, price
    missing = ", ".join(f"{need} ({' or '.join(_COLUMNS[need])})" for need, place in places.items() if place is None)
    columns = ", ".join(name[:40] for name in found[:30]) or "none"
    raise TerminalError(f"{source} has no column {missing}; its columns are: {columns}")


def _date(value: Any) -> date | None:
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, date):
        return value
    text = " ".join(re.sub(r"[,.]", " ", str(value)).split())
    text = re.sub(r"^(\d{4}-\d\d-\d\d)[T ].*$", r"\1", text)  # the time of day doesn't matter
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(text, form).date()  # noqa: DTZ007  (a day has no zone)
        except ValueError:
            continue
    return None


def _price(value: Any) -> float | None:
    if isinstance(value, str):
        value = value.strip().lstrip("$").replace(",", "")
    try:
        price = float(value)
    except (TypeError, ValueError):
        return None
    return price if math.isfinite(price) else None
