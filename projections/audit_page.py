"""The audit report as a page: one HTML file without scripts and without anything from elsewhere, to be read, kept and printed.

All that comes from outside is escaped, and characters that could turn the text around it are made visible.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from projections.audit_document import Content, Report
from projections.audit_words import ENDED, STATUSES, moment, record
from projections.picture import took
from projections.picture_cards import money

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do with the page (Content-Security-Policy): nothing but show it."""
_ODD: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Control characters, and those that reverse the direction of the text behind them."""
_NONE: Final = "\N{EN DASH}"
_FOLDED: Final = 600
"""From how many characters on a text is folded."""


def page(report: Report, picture: str) -> str:
    """Return the page. `picture`: of the run, as SVG."""
    return _PAGE.render(report=report, run=report.run, picture=Markup(picture), policy=POLICY)  # noqa: S704 - escaped there


def _visible(value: Any) -> Any:
    return _ODD.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _short(found: Content | None) -> bool:
    return found is not None and found.characters <= _FOLDED and found.text.count("\n") <= 8  # noqa: PLR2004 - lines


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], str]] = {
        "took": lambda ms: _NONE if ms is None else took(ms),
        "money": lambda usd: "not known" if usd is None else money(usd),
        "moment": lambda at: _NONE if at is None else moment(at),
        "clock": lambda at: _NONE if at is None else f"{at:%H:%M:%S}",
        "number": lambda count: _NONE if count is None else f"{count:,}",
        "ended": lambda status: ENDED.get(status, status),
        "status": lambda status: STATUSES.get(status, status),
        "record": record,
    }
    found.filters |= filters
    found.tests["short"] = _short
    return found


_PAGE: Final = _environment().get_template("audit.html.j2")
