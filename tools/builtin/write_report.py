"""Writes a market analysis as Markdown and as one HTML file; the templates lie beside."""

import base64
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tools.builtin.clean_prices import Cleaned
from tools.builtin.known_shares import name_of
from tools.builtin.price_insights import Insights
from tools.builtin.report_plots import plot_all
from tools.context import ToolContext
from tools.errors import TerminalError

if TYPE_CHECKING:
    import jinja2

_CAPTIONS = {
    "indexed": ("Price, indexed", "Each share's price in relation to its own first month in the period (100)."),
    "drawdown": ("Below the last high", "How far each share stood below its highest earlier price in the period."),
    "correlation": ("Moving together", "Correlation of monthly returns: 1 in step, 0 unrelated, −1 opposite."),  # noqa: RUF001
}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


@dataclass(frozen=True, slots=True)
class Reading:
    """How the question was understood: by whom, what came out, and what was wrong with the model's answer, if anything."""

    by: Literal["model", "rule"]
    start: str | None
    end: str | None
    assumptions: list[str]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the prices are from: name or address, SHA-256 of its bytes, rows used, what is missing."""

    source: str
    sha256: str
    count: int
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Comment:
    """The report's prose: the model's, a person's, or put together from facts, in which case `reason` says why."""

    text: str
    by: Literal["model", "facts", "person"]
    reason: str


@dataclass(frozen=True, slots=True)
class Review:
    """What a model found on reading the report's prose; a remark, nothing depends on it."""

    answers_question: Literal["yes", "partly", "no"]


@dataclass(frozen=True, slots=True)
class Release:
    """Who released the report, and what they said about it."""

    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """The files' paths, the SHA-256 of each by file name, and the answer in a sentence."""

    markdown: str
    html: str
    sha256s: dict[str, str]
    summary: str


def write_report(  # noqa: PLR0913, PLR0917 - what stands in a report
    context: ToolContext,
    question: str,
    reading: Reading,
    source: Source,
    cleaned: Cleaned,
    insights: Insights,
    comment: Comment,
    review: Review | None = None,
    release: Release | None = None,
) -> Report:
    """Write the report of a market analysis: Markdown with plots beside it, and HTML with everything in one file.

    The files are named after the step and replace those of an earlier attempt; equal arguments give equal bytes. Without
    `release` the report is a draft, and says so.
    Raises TerminalError if there are no prices to plot.
    """
    if not cleaned.rows:
        raise TerminalError("there are no prices to report on")
    plots = plot_all(cleaned.rows, insights.correlations)
    names = {plot: f"{context.step}-{plot}.svg" for plot in plots}
    values: dict[str, Any] = {
        "question": " ".join(question.split()),
        "reading": reading,
        "source": source,
        "counts": cleaned.counts,
        "notes": [*source.notes, *cleaned.notes],
        "insights": insights,
        "shares": sorted(insights.shares, key=lambda share: insights.ranking.index(share.ticker)),
        "comment": comment,
        "review": review,
        "release": release,
        "run_id": context.run_id,
    }
    # Links between the files would break in HTML that is sent around; pictures go into it instead.
    inlined = {plot: f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}" for plot, data in plots.items()}
    markdown = _render("report.md.j2", values, names)
    html = _render("report.html.j2", values, inlined)
    files = {names[plot]: data for plot, data in plots.items()}
    files |= {f"{context.step}.md": markdown, f"{context.step}.html": html}
    written = {name: context.write(name, data) for name, data in files.items()}
    return Report(
        markdown=written[f"{context.step}.md"].path,
        html=written[f"{context.step}.html"].path,
        sha256s={name: artifact.sha256 for name, artifact in sorted(written.items())},
        summary=insights.headline,
    )


def _render(template: str, values: dict[str, Any], images: dict[str, str]) -> bytes:
    plots = [{"title": _CAPTIONS[plot][0], "caption": _CAPTIONS[plot][1], "image": image} for plot, image in images.items()]
    return _templates().get_template(template).render(**values, plots=plots).encode()


@cache
def _templates() -> "jinja2.Environment":
    import jinja2  # noqa: PLC0415  (only the worker that writes reports needs it)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and ".html" in name,  # noqa: S701  (Markdown has its own: the filter `md`)
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"name": name_of, "md": _markdown, "percent": _percent, "price": lambda price: f"{price:,.2f}"}
    environment.filters |= {"month": lambda day: f"{day:%b %Y}" if day else "–", "paragraphs": _paragraphs}  # noqa: RUF001
    return environment


def _markdown(text: str) -> str:
    """Escape what Markdown or HTML in it would read as more than text, and keep it in one paragraph."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+,.1f}%".replace("-", "−")  # noqa: RUF001
