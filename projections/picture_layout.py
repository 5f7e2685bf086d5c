"""Where cards and lines of a picture go: in layers from top to bottom, as Sugiyama's method says.

Lines of one card share a lane through the layers between, so that what many cards use is one line with branches. Lanes are kept
straight and crossings few; nothing overlaps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

SPACE: Final = 26.0
"""Between cards side by side."""
LANE: Final = 14.0
GAP: Final = 44.0
"""Between layers: room for lines to bend."""
_SWEEPS: Final = 24
_SETTLINGS: Final = 60
_STRAIGHTENINGS: Final = 6
_STRAIGHT, _BENT, _FREE = 8.0, 3.0, 2.0
"""How strongly lines pull: within a lane, at its ends, between two cards."""


@dataclass(slots=True)
class Box:
    """A card, or where a lane goes through a layer. `x` is its middle, `y` its top; `ports`: where lines end, by source."""

    key: str
    width: float
    height: float
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    ports: dict[str, float] = field(default_factory=dict)
    is_lane: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line from a card (or a lane of it) to the next layer; `of`: the card that it comes from."""

    source: str
    target: str
    of: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Boxes by key, the lines between them, where each layer begins and ends, and the size of it all."""

    boxes: Mapping[str, Box]
    lines: Sequence[Line]
    layers: Sequence[tuple[float, float]]
    width: float
    height: float


def layered(cards: Mapping[str, tuple[float, float]], edges: Iterable[tuple[str, str]]) -> Layout:
    """Return where cards (width and height by key, in the order in which they came about) and the lines between them go."""
    boxes = {key: Box(key, width, height) for key, (width, height) in cards.items()}
    wanted = _forward(list(cards), list(dict.fromkeys(edges)))
    for key, layer in _layers(list(cards), wanted).items():
        boxes[key].layer = layer
    lines = _lanes(boxes, wanted)
    rows = _ordered(boxes, lines)
    _place(boxes, rows, lines)
    tops, y = [], 0.0
    for row in rows:
        height = max((boxes[key].height for key in row), default=0.0)
        for key in row:
            boxes[key].y = y
            if boxes[key].is_lane:
                boxes[key].height = height
        tops.append((y, y + height))
        y += height + GAP
    left = min(box.x - box.width / 2 for box in boxes.values())
    for box in boxes.values():
        box.x -= left
    width = max(box.x + box.width / 2 for box in boxes.values())
    return Layout(boxes, lines, tops, width, y - GAP)


def _forward(order: list[str], edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the edges without those that would close a circle."""
    after: dict[str, list[str]] = {}
    for source, target in edges:
        after.setdefault(source, []).append(target)
    kept: list[tuple[str, str]] = []
    state: dict[str, int] = {}
    for start in order:
        if start in state:
            continue
        state[start] = 1
        todo = [(start, iter(after.get(start, ())))]
        while todo:
            key, rest = todo[-1]
            target = next(rest, "")
            if not target:
                state[key] = 2
                todo.pop()
            elif state.get(target) != 1:
                kept.append((key, target))
                if target not in state:
                    state[target] = 1
                    todo.append((target, iter(after.get(target, ()))))
    return kept


def _layers(order: list[str], edges: list[tuple[str, str]]) -> dict[str, int]:
    """Return each card's layer: below all that it uses; what uses nothing stands just above what uses it."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    for source, target in edges:
        before.setdefault(target, []).append(source)
        after.setdefault(source, []).append(target)
    layer = dict.fromkeys(order, 0)
    left = {key: len(before.get(key, ())) for key in order}
    ready = [key for key in order if not left[key]]
    for key in ready:
        for target in after.get(key, ()):
            layer[target] = max(layer[target], layer[key] + 1)
            left[target] -= 1
            if not left[target]:
                ready.append(target)
    first = order[0] if order else ""
    for key in order:
        if key != first and not before.get(key) and after.get(key):
            layer[key] = min(layer[target] for target in after[key]) - 1
    lowest = min(layer.values(), default=0)
    return {key: number - lowest for key, number in layer.items()}


def _lanes(boxes: dict[str, Box], edges: list[tuple[str, str]]) -> list[Line]:
    """Add a lane's places in the layers that edges go through, and return the lines between neighbouring layers."""
    lines: dict[Line, None] = {}
    for source, target in edges:
        above = source
        for layer in range(boxes[source].layer + 1, boxes[target].layer):
            key = f"{source}\n{layer}"
            boxes.setdefault(key, Box(key, LANE, 0.0, layer, is_lane=True))
            lines[Line(above, key, source)] = None
            above = key
        lines[Line(above, target, source)] = None
    return list(lines)


def _ordered(boxes: dict[str, Box], lines: list[Line]) -> list[list[str]]:
    """Return the layers, each in the order from left to right in which the fewest lines cross."""
    rows: list[list[str]] = [[] for _ in range(max((box.layer for box in boxes.values()), default=-1) + 1)]
    for key, box in boxes.items():
        rows[box.layer].append(key)
    above, below = _neighbours(lines)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for number in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            fixed = {key: place for place, key in enumerate(rows[number - 1 if down else number + 1])}
            near = above if down else below
            mean = {key: _mean([fixed[each] for each in near.get(key, ())], place) for place, key in enumerate(rows[number])}
            rows[number].sort(key=mean.__getitem__)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _neighbours(lines: list[Line]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for line in lines:
        above.setdefault(line.target, []).append(line.source)
        below.setdefault(line.source, []).append(line.target)
    return above, below


def _mean(places: Sequence[float], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise


def _crossings(rows: list[list[str]], below: dict[str, list[str]]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {key: number for number, key in enumerate(lower)}
        ends: list[int] = []
        for key in upper:
            mine = sorted(place[each] for each in below.get(key, ()))
            count += sum(other > end for end in mine for other in ends)
            ends += mine
    return count


def _place(boxes: dict[str, Box], rows: list[list[str]], lines: list[Line]) -> None:
    """Give each box its x: as near to its neighbours as order and widths allow, lanes straight."""
    for row in rows:
        x = 0.0
        for key in row:
            boxes[key].x = x + boxes[key].width / 2
            x += boxes[key].width + SPACE
    coming, going = _by_end(lines)
    for sweep in range(_SETTLINGS):
        _ports(boxes, coming)
        for row in rows if sweep % 2 == 0 else reversed(rows):
            _settle(boxes, row, coming, going)
    for _ in range(_STRAIGHTENINGS):
        _straighten(boxes, rows)
    _ports(boxes, coming)


def _by_end(lines: list[Line]) -> tuple[dict[str, list[Line]], dict[str, list[Line]]]:
    coming: dict[str, list[Line]] = {}
    going: dict[str, list[Line]] = {}
    for line in lines:
        coming.setdefault(line.target, []).append(line)
        going.setdefault(line.source, []).append(line)
    return coming, going


def _ports(boxes: dict[str, Box], coming: dict[str, list[Line]]) -> None:
    """Spread the ends of lines over each card's top, from left to right as they come in."""
    for key, lines in coming.items():
        box = boxes[key]
        if box.is_lane:
            box.ports = {lines[0].of: 0.0}
            continue
        step = box.width / len(lines)
        in_order = sorted(lines, key=lambda line: boxes[line.source].x)
        box.ports = {line.of: step * (number + 0.5) - box.width / 2 for number, line in enumerate(in_order)}


def _settle(boxes: dict[str, Box], row: list[str], coming: dict[str, list[Line]], going: dict[str, list[Line]]) -> None:
    """Put the boxes of a layer as near as can be to where their lines pull them."""
    wanted, weights, offsets = [], [], []
    offset = 0.0
    for number, key in enumerate(row):
        box = boxes[key]
        if number:
            offset += _apart(boxes[row[number - 1]], box)
        offsets.append(offset)
        pull = weight = 0.0
        for line in coming.get(key, ()):
            upper = boxes[line.source]
            strength = _strength(upper, box)
            pull += (upper.x - box.ports[line.of]) * strength
            weight += strength
        for line in going.get(key, ()):
            lower = boxes[line.target]
            strength = _strength(box, lower)
            pull += (lower.x + lower.ports[line.of]) * strength
            weight += strength
        wanted.append((pull / weight if weight else box.x) - offset)
        weights.append(weight or 0.1)
    for key, x, shift in zip(row, _rising(wanted, weights), offsets, strict=True):
        boxes[key].x = x + shift


def _strength(upper: Box, lower: Box) -> float:
    return _STRAIGHT if upper.is_lane and lower.is_lane else _BENT if upper.is_lane or lower.is_lane else _FREE


def _straighten(boxes: dict[str, Box], rows: list[list[str]]) -> None:
    """Put the places of each lane below each other, as far down as what stands beside them leaves room for."""
    beside = {
        key: (row[number - 1] if number else None, row[number + 1 : number + 2]) for row in rows for number, key in enumerate(row)
    }
    chains: dict[str, list[Box]] = {}
    for box in boxes.values():
        if box.is_lane:
            chains.setdefault(box.key.rpartition("\n")[0], []).append(box)
    for chain in chains.values():
        run: list[Box] = []
        low, high = -math.inf, math.inf
        for box in chain:
            left, right = beside[box.key]
            least = -math.inf if left is None else boxes[left].x + _apart(boxes[left], box)
            most = boxes[right[0]].x - _apart(box, boxes[right[0]]) if right else math.inf
            if max(low, least) > min(high, most):
                _align(run, low, high)
                run, low, high = [], -math.inf, math.inf
            run.append(box)
            low, high = max(low, least), min(high, most)
        _align(run, low, high)


def _align(run: list[Box], low: float, high: float) -> None:
    if run:
        x = min(max(sum(box.x for box in run) / len(run), low), high)
        for box in run:
            box.x = x


def _apart(left: Box, right: Box) -> float:
    """Return how far the middles of two neighbours must be apart."""
    return (left.width + right.width) / 2 + (LANE if left.is_lane and right.is_lane else SPACE)


def _rising(wanted: list[float], weights: list[float]) -> list[float]:
    """Return the values nearest to those wanted (least squares) of which none is smaller than the one before."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(wanted, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, one, m), (b, other, n) = pools[-2], pools[-1]
            pools[-2:] = [((a * one + b * other) / (one + other), one + other, m + n)]
    return [value for value, _, count in pools for _ in range(count)]
