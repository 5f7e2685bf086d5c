"""Draws a report's plots as SVG: the same prices give the same bytes."""

import io
import threading
from datetime import date
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tools.builtin.clean_prices import CleanRow
from tools.builtin.insight_types import Correlation
from tools.builtin.known_shares import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[date, float]]]  # symbol → (day, value), by day

# Okabe and Ito's palette: told apart with any kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_INK = "#24292f"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same
    "font.size": 9.5,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "foldflow",  # element ids are random without it
}
_WIDTH = 8.2  # inches
_LOG_ABOVE = 8.0  # a scale that spans more than this factor flattens everything small

# matplotlib's settings and fonts are shared by the whole process, and tools run in threads.
_lock = threading.Lock()


def plot_all(rows: list[CleanRow], correlations: list[Correlation]) -> dict[str, bytes]:
    """Return SVG files by name: "indexed", "drawdown", and "correlation" if there are several shares.

    `rows` must not be empty and be ordered by symbol and day, prices positive.
    """
    import matplotlib as mpl  # noqa: PLC0415  (heavy: only the worker that draws needs it)

    series = {ticker: [(day, price) for _, day, price in group] for ticker, group in groupby(rows, key=lambda row: row[0])}
    with _lock, mpl.rc_context(_STYLE):
        plots = {"indexed": _svg(_indexed(series)), "drawdown": _svg(_drawdown(series))}
        if any(pair.value is not None for pair in correlations):
            plots["correlation"] = _svg(_correlation(list(series), correlations))
    return plots


def _figure(height: float, right: float = 1.0) -> "Figure":
    """Return an empty figure; the part of its width beyond `right` stays free for labels."""
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    # Not pyplot: that keeps figures in global state and looks for a screen.
    return Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(rect=(0, 0, right, 1)))


def _svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _indexed(series: Series) -> "Figure":
    figure = _figure(3.9, right=0.86)
    axes = figure.subplots()
    lines = {ticker: [(day, 100 * price / points[0][1]) for day, price in points] for ticker, points in series.items()}
    values = [value for points in lines.values() for _, value in points]
    if max(values) / min(values) > _LOG_ABOVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if str(value)[0] in "25" else "")
    axes.axhline(100, color="#57606a", linewidth=0.8, zorder=1)
    for index, points in enumerate(lines.values()):
        axes.plot(*_columns(points), color=_colour(index), linewidth=1.7, marker="o" if len(points) < 15 else None, markersize=3)  # noqa: PLR2004
    _label_ends(axes, {ticker: points[-1] for ticker, points in lines.items()})
    axes.set_ylabel("first month = 100" + (" (log scale)" if axes.get_yscale() == "log" else ""))
    _dates(axes)
    return figure


def _drawdown(series: Series) -> "Figure":
    figure = _figure(0.75 + 0.85 * len(series))
    panels = figure.subplots(len(series), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for index, (axes, (ticker, points)) in enumerate(zip(panels, series.items(), strict=True)):
        peak, falls = 0.0, []
        for day, price in points:
            peak = max(peak, price)
            falls.append((day, 100 * (price / peak - 1)))
        axes.fill_between(*_columns(falls), 0, color=_colour(index), alpha=0.3, linewidth=0)
        axes.plot(*_columns(falls), color=_colour(index), linewidth=1.2)
        lowest = min(falls, key=lambda point: point[1])
        axes.set_title(f"{name_of(ticker)}: at worst {lowest[1]:.1f}%".replace("-", "−"), loc="left", fontsize=9.5)  # noqa: RUF001
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%".replace("-", "−"))  # noqa: RUF001
    panels[0].set_ylim(top=0)
    _dates(panels[-1])
    return figure


def _correlation(tickers: list[str], correlations: list[Correlation]) -> "Figure":
    figure = _figure(1.0 + 0.55 * len(tickers))
    axes = figure.subplots()
    places = {ticker: place for place, ticker in enumerate(tickers)}
    grid = [[1.0 if row == column else float("nan") for column in places] for row in places]
    for pair in correlations:
        if pair.value is not None:
            grid[places[pair.a]][places[pair.b]] = grid[places[pair.b]][places[pair.a]] = pair.value
    image = axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            text = "–" if value != value else f"{value:.2f}".replace("-", "−")  # noqa: PLR0124, RUF001
            axes.text(column, row, text, ha="center", va="center", color="white" if abs(value) > 0.65 else _INK)  # noqa: PLR2004
    names = [name_of(ticker) for ticker in tickers]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.9, ticks=[-1, -0.5, 0, 0.5, 1]).outline.set_visible(False)
    return figure


def _label_ends(axes: "Axes", ends: dict[str, tuple[date, float]]) -> None:
    """Write each share's name at the end of its line, spread so that no two names overlap."""
    axes.get_ylim()  # settles the scale, which matplotlib otherwise does only when drawing
    height = axes.get_window_extent().height
    least = 13 / height  # in parts of the axes' height: a line of text
    to_parts = axes.transData + axes.transAxes.inverted()
    wanted = {t: to_parts.transform((_number(day), value))[1] for t, (day, value) in ends.items()}
    at = -1.0
    for ticker in sorted(wanted, key=lambda ticker: wanted[ticker]):
        at = max(wanted[ticker], at + least)
        axes.annotate(
            f"{name_of(ticker)} {ends[ticker][1]:,.0f}",
            (1.01, at),
            xycoords="axes fraction",
            va="center",
            color=_colour(list(ends).index(ticker)),
            fontweight="bold",
            annotation_clip=False,
            in_layout=False,  # its room is reserved by the figure's margin
        )


def _dates(axes: "Axes") -> None:
    import matplotlib.dates as mdates  # noqa: PLC0415

    locator = mdates.AutoDateLocator(minticks=4, maxticks=12)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator, show_offset=False))  # type: ignore[no-untyped-call]
    axes.margins(x=0.01)


def _columns(points: list[tuple[date, float]]) -> tuple[list[float], list[float]]:
    return [_number(day) for day, _ in points], [value for _, value in points]


def _number(day: date) -> float:
    """Return matplotlib's number of a day: days since 1970."""
    return float(day.toordinal() - date(1970, 1, 1).toordinal())


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
