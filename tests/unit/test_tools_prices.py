import http.server
import math
import threading
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tools.builtin.clean_prices import CleanRow, clean_prices
from tools.builtin.download import download
from tools.builtin.fetch_prices import MAX_ROWS, fetch_prices
from tools.builtin.price_insights import price_insights
from tools.errors import RetryableError, TerminalError

CSV = b"Ticker,Date,Close\nibm,2004-01-31,10\nIBM,Feb 29 2004,12.5\nIBM,2004/03/31,NA\n"


class Prices(http.server.BaseHTTPRequestHandler):
    """Answers by path: data, a status, a redirect, something endless, or nothing in time."""

    def do_GET(self) -> None:
        """Serve one of the cases below."""
        match self.path.strip("/").split("?")[0].split("/"):
            case ["prices.csv"]:
                self._answer(200, CSV)
            case ["moved"]:
                self._answer(302, b"", {"location": "/prices.csv"})
            case ["status", status]:
                self._answer(int(status), b"")
            case ["busy"]:
                self._answer(429, b"", {"retry-after": "7"})
            case ["busy-until"]:
                self._answer(503, b"", {"retry-after": "Wed, 01 Jan 2020 00:01:00 GMT", "date": "Wed, 01 Jan 2020 00:00:00 GMT"})
            case ["large"]:
                self._answer(200, b"x" * 4096)
            case _:
                self.server.released.wait(10)  # type: ignore[attr-defined]
                self.close_connection = True

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Start a web server on the loopback address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Prices)
    server.released = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_built_in_data_is_all_there() -> None:
    """560 monthly prices of five shares; Google's begin later, which is said."""
    prices = fetch_prices()
    assert prices.tickers == {"AAPL": 123, "AMZN": 123, "GOOG": 68, "IBM": 123, "MSFT": 123}
    assert (prices.count, prices.first, prices.last) == (560, date(2000, 1, 1), date(2010, 3, 1))
    assert prices.rows[0] == ("AAPL", date(2000, 1, 1), 25.94)
    assert prices.notes == ["Prices of Google begin in August 2004, later than January 2000."]


def test_shares_and_months_are_selected() -> None:
    """Both ends are included; a share without prices then is reported with 0."""
    prices = fetch_prices(tickers=("ibm", "GOOG"), start="2003-02", end="2003-03")
    assert [row[1] for row in prices.rows] == [date(2003, 2, 1), date(2003, 3, 1)]
    assert prices.tickers == {"GOOG": 0, "IBM": 2}
    assert prices.notes == ["Google has no prices in this period."]


def test_a_csv_file_is_read_whatever_its_columns_are_called(tmp_path: Path) -> None:
    """Symbols come out in capitals, dates in ISO, and a missing price as none."""
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbf" + CSV)
    prices = fetch_prices(str(path))
    assert prices.rows == [("IBM", date(2004, 1, 31), 10.0), ("IBM", date(2004, 2, 29), 12.5), ("IBM", date(2004, 3, 31), None)]


def test_an_adjusted_price_is_preferred(tmp_path: Path) -> None:
    """It knows about splits; currency signs and separators are understood."""
    path = tmp_path / "p.csv"
    path.write_text('symbol,date,Close,Adj Close\nA,2004-01-31 16:00:00,1,"$1,234.50"\n')
    assert fetch_prices(str(path)).rows == [("A", date(2004, 1, 31), 1234.5)]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    """It is recognised by its first bytes, not by the name."""
    table = pa.table({"ticker": ["IBM"], "date": [date(2004, 1, 31)], "close": [10.0]})
    parquet.write_table(table, tmp_path / "prices")
    assert fetch_prices(str(tmp_path / "prices")).rows == [("IBM", date(2004, 1, 31), 10.0)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"name,when\n1,2\n", r"no column symbol .*its columns are: name, when"),
        (b"", "its columns are: none"),
        (b"\xff\xfe\x00", "neither Parquet nor CSV"),
        (b"PAR1 and nothing more", "begins like Parquet"),
        (b"symbol,date,price\nA,soon,1\n", "line 2: 'soon' is no date"),
        (b"symbol,date,price\nA,2004-01-01\n", "line 2: 2 fields where the header has 3"),
        (b"symbol,date,price\n", "no rows at all"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, data: bytes, reason: str) -> None:
    """Trying again wouldn't help."""
    path = tmp_path / "p.csv"
    path.write_bytes(data)
    with pytest.raises(TerminalError, match=reason):
        fetch_prices(str(path))


def test_no_rows_or_too_many_say_what_to_do(tmp_path: Path) -> None:
    """The message has what the source does have."""
    with pytest.raises(TerminalError, match=r"no prices for ORCL .* it has AAPL, AMZN, GOOG, IBM, MSFT from 2000-01-01"):
        fetch_prices(tickers=("ORCL",))
    with pytest.raises(TerminalError, match="no month"):
        fetch_prices(start="soon")
    with pytest.raises(TerminalError, match="can't be read"):
        fetch_prices(str(tmp_path / "absent.csv"))
    path = tmp_path / "p.csv"
    path.write_text("symbol,date,price\n" + "A,2004-01-01,1\n" * (MAX_ROWS + 1))
    with pytest.raises(TerminalError, match="name fewer shares"):
        fetch_prices(str(path))


def test_an_address_is_read_and_its_secrets_are_not_shown(url: str) -> None:
    """Redirects are followed."""
    prices = fetch_prices(url.replace("//", "//user:secret@") + "/prices.csv?token=secret")
    assert prices.count == 3
    assert prices.source == f"{url}/prices.csv?…"
    assert fetch_prices(f"{url}/moved").count == 3


@pytest.mark.parametrize(("path", "wait"), [("busy", 7.0), ("busy-until", 60.0), ("status/500", None), ("status/408", None)])
def test_a_busy_server_is_worth_a_retry(url: str, path: str, wait: float | None) -> None:
    """After as long as it asks for, in seconds or as a date."""
    with pytest.raises(RetryableError) as error:
        fetch_prices(f"{url}/{path}")
    assert error.value.retry_after_s == wait


def test_no_answer_is_worth_a_retry(url: str) -> None:
    """Nobody listens, or nobody answers in time."""
    with pytest.raises(RetryableError, match="did not answer within"):
        download(f"{url}/silent", timeout_s=0.2)
    with pytest.raises(RetryableError, match="can't be reached"):
        download("http://127.0.0.1:9/prices.csv")


def test_a_refusal_or_too_much_is_final(url: str) -> None:
    """So is an address that is none."""
    with pytest.raises(TerminalError, match="answered 404"):
        fetch_prices(f"{url}/status/404")
    with pytest.raises(TerminalError, match="larger than"):
        download(f"{url}/large", max_bytes=100)
    with pytest.raises(TerminalError, match="no address"):
        fetch_prices("http://[bad")
    with pytest.raises(TerminalError) as error:
        fetch_prices(f"{url}/status/403?token=secret")
    assert "secret" not in str(error.value)


def month(number: int) -> date:
    """Return the first of the month `number` months after January 2000."""
    return date(2000 + number // 12, number % 12 + 1, 1)


def test_cleaning_counts_everything_that_it_drops() -> None:
    """One row of each kind."""
    rows: list[tuple[str, date, float | None]] = [
        ("A", month(0), 10.0),
        ("A", month(0), 10.0),  # the same again
        ("A", month(1), 11.0),
        ("A", month(1), 12.0),  # another price for that day
        ("A", month(2), None),
        ("A", month(3), 0.0),
        ("A", month(4), 120.0),  # a slipped decimal point
        ("A", month(5), 12.0),
    ]
    cleaned = clean_prices(rows)
    assert cleaned.rows == [("A", month(0), 10.0), ("A", month(1), 12.0), ("A", month(5), 12.0)]
    counts = cleaned.counts
    assert (counts.rows_in, counts.missing_price, counts.non_positive_price) == (8, 1, 1)
    assert (counts.exact_duplicates, counts.conflicting_duplicates, counts.spikes_removed) == (1, 1, 1)
    assert (counts.months_missing, counts.rows_out) == (3, 3)
    assert len(cleaned.notes) == 3


def test_an_unusual_change_is_flagged_and_kept() -> None:
    """Shares do jump; only a spike that reverts is an error."""
    prices = [100 + 10 * math.sin(i) for i in range(20)] + [40.0, 41.0]
    cleaned = clean_prices([("A", month(i), price) for i, price in enumerate(prices)])
    assert (cleaned.counts.outliers_flagged, cleaned.counts.rows_out) == (1, 22)
    assert "was removed" not in " ".join(cleaned.notes)


ROWS = st.lists(
    st.tuples(st.sampled_from("AB"), st.integers(0, 30).map(month), st.none() | st.floats(-5, 1e6, allow_nan=False)), max_size=40
)


@given(ROWS)
def test_cleaned_rows_add_up(rows: list[tuple[str, date, float | None]]) -> None:
    """Nothing vanishes uncounted, nothing is invented, and cleaning again changes no day twice."""
    cleaned = clean_prices(rows)
    c = cleaned.counts
    dropped = c.missing_price + c.non_positive_price + c.exact_duplicates + c.conflicting_duplicates + c.spikes_removed
    assert c.rows_in - dropped == c.rows_out == len(cleaned.rows)
    assert set(cleaned.rows) <= set(rows)
    keys = [row[:2] for row in cleaned.rows]
    assert keys == sorted(set(keys))


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=30))
def test_figures_agree_with_plain_arithmetic(prices: list[float]) -> None:
    """SQL and Python compute the same, to the printed digit (half a unit of it for rounding)."""
    (share,) = price_insights([("A", month(i), price) for i, price in enumerate(prices)]).shares
    assert share.growth_pct == pytest.approx(100 * (prices[-1] / prices[0] - 1), abs=0.051, rel=1e-9)
    falls = [100 * (price / max(prices[: i + 1]) - 1) for i, price in enumerate(prices)]
    assert share.drawdown_pct == pytest.approx(min(falls), abs=0.051, rel=1e-9)
    changes = [math.log(b / a) for a, b in pairwise(prices)]
    if len(changes) < 3:
        assert share.volatility_pct is None
    else:
        assert share.volatility_pct == pytest.approx(100 * stdev(changes) * math.sqrt(12), abs=0.051, rel=1e-9)
    if len(prices) <= 12:
        assert share.cagr_pct is None
    else:
        assert share.cagr_pct == pytest.approx(
            100 * ((prices[-1] / prices[0]) ** (12 / (len(prices) - 1)) - 1), abs=0.051, rel=1e-9
        )


def test_the_known_shares_have_the_known_figures() -> None:
    """Computed by hand from the file."""
    insights = price_insights(clean_prices(fetch_prices().rows).rows, "growth")
    apple = insights.shares[0]
    assert (apple.first_price, apple.last_price, apple.growth_pct, apple.cagr_pct) == (25.94, 223.02, 759.8, 23.6)
    amazon = insights.shares[1]
    assert (amazon.drawdown_pct, amazon.peak_day, amazon.trough_day) == (-91.3, date(2000, 2, 1), date(2001, 9, 1))
    assert insights.ranking == ["AAPL", "GOOG", "AMZN", "IBM", "MSFT"]
    assert insights.headline == "Apple did best: it rose by 759.8% from January 2000 to March 2010."
    assert [(pair.a, pair.b, pair.months) for pair in insights.correlations][:2] == [("AAPL", "AMZN", 122), ("AAPL", "GOOG", 67)]


def test_daily_prices_count_by_month_and_gaps_make_no_change() -> None:
    """A month's price is its last; a change across a missing month is none."""
    rows: list[CleanRow] = [("A", date(2004, 1, day), float(day)) for day in range(1, 11)]
    rows += [("A", date(2004, 2, 10), 20.0), ("A", date(2004, 4, 1), 40.0)]
    (share,) = price_insights(rows).shares
    assert (share.months, share.first_day, share.first_price) == (3, date(2004, 1, 10), 10.0)
    assert (share.best_pct, share.best_day) == (100.0, date(2004, 2, 10))
    assert share.worst_pct == 100.0


def test_one_price_or_none() -> None:
    """One price has no change and no fall; none at all is an error."""
    insights = price_insights([("A", month(0), 1.0)], "volatility")
    assert (insights.shares[0].best_pct, insights.shares[0].peak_day, insights.correlations) == (None, None, [])
    assert insights.headline
    with pytest.raises(TerminalError, match="no prices"):
        price_insights([])


@given(
    st.permutations(
        [("A", month(i), float(1 + i * i % 7)) for i in range(8)] + [("B", month(i), float(1 + i % 5)) for i in range(8)]
    )
)
def test_the_order_of_rows_does_not_matter(rows: list[CleanRow]) -> None:
    """Equal data, equal figures."""
    assert price_insights(rows) == price_insights(sorted(rows))
