"""The figures that are computed of share prices: the shapes that several tools exchange."""

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True)
class ShareInsight:
    """One share over its period: prices as in the source, `…_pct` in percent, days of the prices concerned.

    `months` counts months with a price. A figure is null where there are too few months for it.
    """

    ticker: str
    months: int
    first_day: date
    first_price: float
    last_day: date
    last_price: float
    growth_pct: float
    cagr_pct: float | None
    volatility_pct: float | None
    drawdown_pct: float
    peak_day: date | None
    trough_day: date | None
    best_day: date | None
    best_pct: float | None
    worst_day: date | None
    worst_pct: float | None


@dataclass(frozen=True, slots=True)
class Correlation:
    """How closely the monthly log returns of two shares moved together: -1 to 1, over `months` common months."""

    a: str
    b: str
    months: int
    value: float | None


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence with its number: `value` in `unit` ("%", "correlation"); `ticker` is null if it is about several."""

    id: str
    text: str
    value: float
    unit: str
    ticker: str | None
