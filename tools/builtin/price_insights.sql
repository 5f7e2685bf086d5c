-- Prices → one row per share. Input: table prices(ticker, day, price), cleaned. Every output is rounded here, once,
-- so that the report, the facts and the check of the prose all see the same digits.

-- A month's price is its last one, so daily sources give the same kind of figures as monthly ones.
CREATE TABLE monthly AS
SELECT ticker, year(day) * 12 + month(day) - 1 AS month, max(day) AS day, arg_max(price, day) AS price
FROM prices GROUP BY ALL;

-- A change is one from a month to the very next: across a gap it would be no monthly change.
CREATE TABLE changes AS
SELECT ticker, month, day, price / previous - 1 AS change, ln(price / previous) AS log_change
FROM (
  SELECT *, lag(price) OVER share AS previous, lag(month) OVER share AS previous_month
  FROM monthly WINDOW share AS (PARTITION BY ticker ORDER BY month)
)
WHERE month = previous_month + 1;

CREATE TABLE drawdowns AS
SELECT ticker, day, month, price / peak - 1 AS drawdown,
  max(CASE WHEN price = peak THEN day END) OVER (PARTITION BY ticker ORDER BY month) AS peak_day
FROM (
  SELECT *, max(price) OVER (PARTITION BY ticker ORDER BY month) AS peak FROM monthly
);

CREATE TABLE insights AS
WITH ends AS (
  SELECT ticker, count(*) AS months,
    min(day) AS first_day, arg_min(price, month) AS first_price,
    max(day) AS last_day, arg_max(price, month) AS last_price,
    (max(month) - min(month)) / 12 AS years
  FROM monthly GROUP BY ticker
), risk AS (
  -- sqrt(12) turns a monthly into a yearly deviation; two changes make no deviation worth printing.
  SELECT ticker, CASE WHEN count(*) >= 3 THEN round(100 * stddev_samp(log_change) * sqrt(12), 1) END AS volatility_pct
  FROM changes GROUP BY ticker
), extremes AS (
  SELECT ticker,
    arg_max(day, (change, -month)) AS best_day, round(100 * max(change), 1) AS best_pct,
    arg_min(day, (change, month)) AS worst_day, round(100 * min(change), 1) AS worst_pct
  FROM changes GROUP BY ticker
), falls AS (
  SELECT ticker, arg_min({'peak': peak_day, 'trough': day}, (drawdown, month)) AS days, round(100 * min(drawdown), 1) AS drawdown_pct
  FROM drawdowns GROUP BY ticker
)
SELECT ticker, months, first_day, round(first_price, 2) AS first_price, last_day, round(last_price, 2) AS last_price,
  round(100 * (last_price / first_price - 1), 1) AS growth_pct,
  -- A rate per year from less than a year would be a forecast, not a measurement.
  CASE WHEN years >= 1 THEN round(100 * (pow(last_price / first_price, 1 / years) - 1), 1) END AS cagr_pct,
  volatility_pct, drawdown_pct,
  CASE WHEN drawdown_pct < 0 THEN days.peak END AS peak_day, CASE WHEN drawdown_pct < 0 THEN days.trough END AS trough_day,
  best_day, best_pct, worst_day, worst_pct
FROM ends LEFT JOIN risk USING (ticker) LEFT JOIN extremes USING (ticker) LEFT JOIN falls USING (ticker)
ORDER BY ticker;

-- Three common changes are the least for which a correlation says anything at all.
CREATE TABLE correlations AS
SELECT a.ticker AS a, b.ticker AS b, count(*) AS months,
  CASE WHEN count(*) >= 3 AND NOT isnan(corr(a.log_change, b.log_change)) THEN round(corr(a.log_change, b.log_change), 2) END AS value
FROM changes a JOIN changes b ON a.month = b.month AND a.ticker < b.ticker
GROUP BY ALL ORDER BY a.ticker, b.ticker;
