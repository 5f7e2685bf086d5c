"""A picture of a run, as SVG: what was asked, what each step did with what, and what came of it.

It is read from top to bottom by somebody who knows nothing of the system. All text is escaped, nothing is loaded from elsewhere.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from xml.sax.saxutils import escape

from projections.picture_cards import Arrow, Card, Story, Text, money, story
from projections.picture_layout import Layout, layered
from projections.table import Connection

_FONT: Final = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
_INK, _QUIET, _RULE, _PAPER = "#1f2933", "#66707d", "#cbd2d9", "#ffffff"
_STATUS: Final = {
    "completed": ("#2f855a", "done"),
    "skipped": ("#a0aec0", "skipped"),
    "failed": ("#c53030", "failed"),
    "cancelled": ("#b7791f", "cancelled"),
    "abandoned": ("#b7791f", "given up"),
    "pending": ("#cbd5e0", "not begun"),
    "mixed": ("#b7791f", "some failed"),
}
_UNDER_WAY: Final = ("#2b6cb0", "under way")
_HUES: Final = (
    "#2b6cb0",
    "#b83280",
    "#2c7a7b",
    "#c05621",
    "#6b46c1",
    "#4a5568",
    "#97266d",
    "#276749",
    "#9c4221",
    "#2a4365",
    "#702459",
    "#22543d",
    "#744210",
)
"""One for each card that others use: its lines, and its name where they end."""
_PAPERS: Final = {"question": "#ebf4ff", "file": "#fffaf0", "result": "#e6fffa", "step": _PAPER}
_TITLE, _BODY, _SMALL = 14.0, 11.5, 10.0
_LINE: Final = 15.5
_INSET: Final = 14.0
_NARROWEST, _WIDEST = 210.0, 300.0
_MOST_LINES: Final = 3
_PORTS: Final = 30.0
"""Room at the top of a card for what its lines bring; `_PORT`: the widest text there."""
_PORT: Final = 135.0
_MARGIN: Final = 36.0
_HEAD, _FOOT = 106.0, 70.0
_LEAST_WIDTH: Final = 860.0
_FOLD: Final = 14


def picture(db: Connection, run: Mapping[str, Any], *, payloads: bool = True) -> str:
    """Return the picture of a run as SVG. `run`: its row of `runs`; without `payloads` it tells no values."""
    return "\n".join(_drawn(story(db, run, payloads=payloads)))


def _drawn(told: Story) -> Iterator[str]:
    cards = {card.key: _Face(card, [arrow for arrow in told.arrows if arrow.target == card.key], told) for card in told.cards}
    layout = layered({key: (face.width, face.height) for key, face in cards.items()}, [(a.source, a.target) for a in told.arrows])
    width = max(layout.width, _LEAST_WIDTH) + 2 * _MARGIN
    about = _wrapped(told.description, width - 2 * _MARGIN, 2, 13)
    head = _HEAD + 18 * len(about)
    height = layout.height + head + _FOOT + _MARGIN
    left = (width - layout.width) / 2
    title = f"{told.run['workflow']}, run {told.run['run_id']}"
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="{_FONT}" role="img" aria-label={_quoted(f"Picture of {title}")}>'
    )
    yield f"<title>{_safe(title)}</title>"
    yield f'<rect width="{width:.0f}" height="{height:.0f}" fill="{_PAPER}"/>'
    yield from _head(told, width, about)
    yield f'<g transform="translate({left:.1f} {head:.1f})">'
    hues = _hues(told)
    yield from _lines(told, layout, hues)
    for face in cards.values():
        yield from face.drawn(layout, hues)
    yield "</g>"
    yield from _legend(width, height)
    yield "</svg>"


def _hues(told: Story) -> dict[str, str]:
    sources = list(dict.fromkeys(arrow.source for card in told.cards for arrow in told.arrows if arrow.source == card.key))
    return {key: _HUES[number % len(_HUES)] for number, key in enumerate(sources)}


class _Face:
    """How one card looks."""

    def __init__(self, card: Card, arrows: list[Arrow], told: Story) -> None:
        self.card = card
        names = {each.key: each.title if each.shape != "question" else "the question" for each in told.cards}
        self.ports = {
            arrow.source: (
                _cut(", ".join(arrow.uses), _PORT),
                _cut(f"{'after' if arrow.style == 'order' else 'from'} {names[arrow.source]}", _PORT),
            )
            for arrow in arrows
        }
        widest = (max(1.1 * _wide(uses, _SMALL), _wide(source, _SMALL)) for uses, source in self.ports.values())
        top = max(widest, default=0.0) + 12
        own = max((_wide(text.text, _BODY) for text in card.texts), default=0.0) + 2 * _INSET + 4
        title = _wide(card.title, _TITLE) * 1.08 + _wide(self._time(), _SMALL) + 2 * _INSET + 34
        self.width = max(_NARROWEST, min(own, _WIDEST), title, top * len(self.ports))
        room = self.width - 2 * _INSET
        self.texts = [Text(line, text.tone) for text in card.texts for line in _wrapped(text.text, room, _MOST_LINES)]
        self.band = _PORTS if self.ports else 0.0
        self.height = self.band + 30 + _LINE * len(self.texts) + 8

    def _time(self) -> str:
        if self.card.took is None:
            return ""
        return took(self.card.took)

    def drawn(self, layout: Layout, hues: Mapping[str, str]) -> Iterator[str]:
        """Yield the card's SVG."""
        box, card = layout.boxes[self.card.key], self.card
        x, y = box.x - self.width / 2, box.y
        colour, word = _STATUS.get(card.status, _UNDER_WAY)
        faint = card.status in ("skipped", "pending")
        dash = ' stroke-dasharray="4 3"' if faint else ""
        paper = "#f7fafc" if faint else _PAPERS[card.shape]
        edge = {"question": "#4299e1", "result": colour, "file": "#d69e2e"}.get(card.shape, _RULE)
        yield f'<g transform="translate({x:.1f} {y:.1f})">'
        wide, high = f"{self.width:.1f}", f"{self.height:.1f}"
        if card.shape == "file":
            yield f'<path d="M0 0H{self.width - _FOLD:.1f}L{wide} {_FOLD}V{high}H0Z" fill="{paper}" stroke="{edge}"/>'
            yield f'<path d="M{self.width - _FOLD:.1f} 0V{_FOLD}H{wide}" fill="none" stroke="{edge}"/>'
        else:
            yield f'<rect width="{wide}" height="{high}" rx="8" fill="{paper}" stroke="{edge}"{dash}/>'
        if card.shape == "step":
            down, end = f"{self.height - 8:.1f}", f"{self.height - 0.5:.1f}"
            yield f'<path d="M8 0.5A7.5 7.5 0 0 0 0.5 8V{down}A7.5 7.5 0 0 0 8 {end}H5V0.5Z" fill="{colour}"/>'
        yield from self._ports(box.ports, hues)
        base = self.band + 21
        ink = _QUIET if faint else _INK
        yield _text(_INSET, base, card.title, _TITLE, ink, bold=True)
        right = self.width - _INSET
        if card.shape in ("step", "result") and card.status:
            time = self._time() or (word if not faint else "")
            yield _text(right, base, time, _SMALL, colour if card.status != "skipped" else _QUIET, anchor="end", bold=True)
        for number, text in enumerate(self.texts, 1):
            tone = {"bad": "#c53030", "quiet": _QUIET, "code": _QUIET}.get(text.tone, ink)
            yield _text(_INSET, base + 3 + _LINE * number, text.text, _BODY, tone)
        yield "</g>"

    def _ports(self, ports: Mapping[str, float], hues: Mapping[str, str]) -> Iterator[str]:
        """Yield what the lines bring, below the place where each ends."""
        if not self.ports:
            return
        left = 6 if self.card.shape == "step" else 0
        yield f'<path d="M{left} {self.band:.1f}H{self.width:.1f}" stroke="{_RULE}" stroke-width="0.7"/>'
        for source, (uses, name) in self.ports.items():
            if source in ports:
                x = self.width / 2 + ports[source]
                yield _text(x, 13, uses, _SMALL, _INK, anchor="middle", bold=True)
                yield _text(x, 25 if uses else 19, name, _SMALL, hues.get(source, _QUIET), anchor="middle")


def _lines(told: Story, layout: Layout, hues: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines between cards; what goes the same way is one line."""
    style_of = {(arrow.source, arrow.target): arrow.style for arrow in told.arrows}
    lanes: dict[str, set[str]] = {}
    for line in reversed(layout.lines):
        styles = lanes.setdefault(line.source, set()) if layout.boxes[line.source].is_lane else set()
        styles |= lanes.get(line.target, set()) if layout.boxes[line.target].is_lane else {style_of[line.of, line.target]}
    for line in layout.lines:
        upper, lower = layout.boxes[line.source], layout.boxes[line.target]
        styles = lanes.get(line.target, set()) if lower.is_lane else {style_of[line.of, line.target]}
        style = "data" if "data" in styles else "condition" if "condition" in styles else "order"
        dash = {"data": "", "condition": ' stroke-dasharray="6 4"', "order": ' stroke-dasharray="1.5 4"'}[style]
        x, end_x = upper.x, lower.x + lower.ports.get(line.of, 0.0)
        start, bottom, end = upper.y + upper.height, layout.layers[upper.layer][1], lower.y
        middle = (bottom + end) / 2
        tip = end if lower.is_lane else end - 6
        path = f"M{x:.1f} {start:.1f}V{bottom:.1f}C{x:.1f} {middle:.1f} {end_x:.1f} {middle:.1f} {end_x:.1f} {tip:.1f}"
        if lower.is_lane:
            path += f"V{end + lower.height:.1f}"
        colour = hues.get(line.of, _QUIET)
        yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-opacity="0.75"{dash}/>'
        if not lower.is_lane:
            left, right, top = f"{end_x - 4.5:.1f}", f"{end_x + 4.5:.1f}", f"{end - 7:.1f}"
            yield f'<path d="M{left} {top}L{end_x:.1f} {end:.1f}L{right} {top}Z" fill="{colour}"/>'


def _head(told: Story, width: float, about: list[str]) -> Iterator[str]:
    run = told.run
    colour, word = _STATUS.get(run["status"], _UNDER_WAY)
    yield _text(_MARGIN, 40, f"What happened in this run of “{run['workflow']}”", 22, _INK, bold=True)
    label = run["status"] if run["ended"] is not None else word
    pill = _wide(label, 12) + 24
    yield f'<rect x="{width - _MARGIN - pill:.1f}" y="20" width="{pill:.1f}" height="25" rx="12.5" fill="{colour}"/>'
    yield _text(width - _MARGIN - pill / 2, 37, label, 12, _PAPER, anchor="middle", bold=True)
    y = 61.0
    for line in about:
        yield _text(_MARGIN, y, line, 13, _INK)
        y += 18
    lasted = took(_lasted(run["started"], run["ended"])) if run["ended"] is not None else "not over yet"
    tokens = run["input_tokens"] + run["output_tokens"]
    unpriced = f" and {run['unpriced_calls']} calls of unknown price" if run["unpriced_calls"] else ""
    facts = (
        f"began {run['started'].replace(tzinfo=UTC):%-d %B %Y, %H:%M:%S} UTC",
        f"took {lasted}",
        f"{run['calls']} calls to models and tools",
        f"{tokens:,} tokens, {money(run['cost_usd'])}{unpriced}",
        *([f"{told.left_out} steps are not drawn"] if told.left_out else []),
    )
    yield _text(_MARGIN, y, " · ".join(facts), 12, _QUIET)
    yield _text(_MARGIN, y + 17, f"run {run['run_id']} · version {run['digest'][:12]} of the definition", 11, _QUIET)


_STROKES: Final = (
    ("", "a result that goes into the next step"),
    ("6 4", "it only decides whether or how the next step happens"),
    ("1.5 4", "it only comes before"),
)


def _legend(width: float, height: float) -> Iterator[str]:
    y = height - _FOOT + 18
    yield f'<path d="M{_MARGIN} {y - 22:.1f}H{width - _MARGIN:.1f}" stroke="{_RULE}"/>'
    words = "each card is a step; at its top stands what it used and from where, at its right how long it took"
    yield _text(_MARGIN, y, "How to read this:", 11.5, _INK, bold=True)
    yield _text(_MARGIN + _wide("How to read this:", 11.5) + 14, y, words, 11, _QUIET)
    x = _MARGIN
    for dash, text in _STROKES:
        drawn = f' stroke-dasharray="{dash}"' if dash else ""
        yield f'<path d="M{x:.1f} {y + 17:.1f}h34" stroke="{_INK}" stroke-width="1.6"{drawn}/>'
        yield _text(x + 42, y + 21, text, 11, _QUIET)
        x += 42 + _wide(text, 11) + 18
    x = _MARGIN
    for colour, text in (*(_STATUS[each] for each in ("completed", "skipped", "failed", "cancelled")), _UNDER_WAY):
        yield f'<rect x="{x:.1f}" y="{y + 30:.1f}" width="6" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 12, y + 40, text, 11, _QUIET)
        x += 12 + _wide(text, 11) + 18


# --- Text ---
_THIN: Final = frozenset("ijltfI.,:;'|!()[]{}/\\ `\"·-")
_BROAD: Final = frozenset("mwMW@%…→—")


def _wide(text: str, size: float) -> float:
    """Return about how wide a text is: nobody knows the reader's font, so a little too much."""
    return size * sum(
        0.32 if c in _THIN else 0.9 if c in _BROAD else 1.0 if c > "\u2e80" else 0.7 if c.isupper() else 0.56 for c in text
    )


def _cut(text: str, room: float, size: float = _SMALL) -> str:
    """Return a text that fits."""
    if _wide(text, size) <= room:
        return text
    while text and _wide(text, size) > room - size:
        text = text[:-1]
    return f"{text.rstrip(' ,')}…"


def _wrapped(text: str, room: float, most: int, size: float = _BODY) -> list[str]:
    """Return a text in lines that fit, at most so many."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if _wide(longer, size) <= room:
            line = longer
            continue
        if line:
            lines.append(line)
        line = _cut(word, room, size)
    if line:
        lines.append(line)
    return lines if len(lines) <= most else [*lines[: most - 1], _cut(f"{lines[most - 1]} {lines[most]}", room, size)]


def _text(x: float, y: float, text: str, size: float, colour: str, *, anchor: str = "", bold: bool = False) -> str:
    more = (f' text-anchor="{anchor}"' if anchor else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{more}>{_safe(text)}</text>'


def _safe(text: str) -> str:
    """Return a text for XML: escaped, and without characters that XML does not know."""
    return escape("".join(c if c.isprintable() or c == " " else "\ufffd" for c in text))


def _quoted(text: str) -> str:
    return '"' + _safe(text).replace('"', "&quot;") + '"'


def took(ms: float) -> str:
    """Write a duration in milliseconds as people say it."""
    if ms < 1000:  # noqa: PLR2004 - a second
        return f"{ms:.0f} ms"
    if ms < 60_000:  # noqa: PLR2004 - a minute
        return f"{ms / 1000:.1f} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _lasted(since: datetime, until: datetime) -> float:
    return (until - since).total_seconds() * 1000
