"""Computes from cleaned prices what a report can say: growth, risk, falls, correlation. The SQL lies beside."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.builtin.clean_prices import CleanRow
from tools.builtin.insight_facts import headline, key_facts, share_facts, whole_facts
from tools.builtin.insight_types import Correlation, Fact, ShareInsight
from tools.builtin.parse_question import Topic
from tools.errors import TerminalError

if TYPE_CHECKING:
    import duckdb

_SQL = Path(__file__).with_suffix(".sql")


@dataclass(frozen=True, slots=True)
class Insights:
    """All figures, rounded as printed: percentages to one decimal, prices and correlations to two.

    `ranking`: symbols by growth, the largest first. `facts`: every figure as a sentence; `key_facts`: the few that
    answer the topic, `headline` the first of them; `summary`: the key facts as one paragraph.
    """

    topic: Topic
    first: date
    last: date
    shares: list[ShareInsight]
    correlations: list[Correlation]
    ranking: list[str]
    headline: str
    key_facts: list[Fact]
    facts: list[Fact]
    summary: str


def price_insights(rows: list[CleanRow], topic: Topic = "overview") -> Insights:
    """Compute growth, yearly growth, volatility, worst fall, best and worst month of each share, and correlations.

    Months count from their last price. Volatility is the sample deviation of monthly log returns times sqrt(12);
    yearly growth (CAGR) is null below one year, volatility and correlation below three monthly changes. Raises
    TerminalError if there is no row.
    """
    if not rows:
        raise TerminalError("there are no prices left to compute anything from")
    shares, correlations = _compute(rows)
    facts = [*whole_facts(shares, correlations), *(fact for share in shares for fact in share_facts(share))]
    keys = key_facts(facts, topic)
    return Insights(
        topic=topic,
        first=min(share.first_day for share in shares),
        last=max(share.last_day for share in shares),
        shares=shares,
        correlations=correlations,
        ranking=[share.ticker for share in sorted(shares, key=lambda share: (-share.growth_pct, share.ticker))],
        headline=headline(keys),
        key_facts=keys,
        facts=facts,
        summary=" ".join(fact.text for fact in keys),
    )


def _compute(rows: list[CleanRow]) -> tuple[list[ShareInsight], list[Correlation]]:
    import duckdb  # noqa: PLC0415  (heavy: a worker that never computes needn't load it)

    # One thread: the order in which several add up floats could show in a rounded digit.
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        tickers, days, prices = (list(column) for column in zip(*rows, strict=True))
        connection.execute(
            "CREATE TABLE prices AS SELECT unnest($tickers::VARCHAR[]) AS ticker, unnest($days::DATE[]) AS day, "
            "unnest($prices::DOUBLE[]) AS price",
            {"tickers": tickers, "days": days, "prices": prices},
        )
        connection.execute(_SQL.read_text())
        shares = [ShareInsight(**row) for row in _rows(connection, "FROM insights ORDER BY ticker")]
        correlations = [Correlation(**row) for row in _rows(connection, "FROM correlations ORDER BY a, b")]
    return shares, correlations


def _rows(connection: "duckdb.DuckDBPyConnection", query: str) -> list[dict[str, Any]]:
    result = connection.execute(query)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
