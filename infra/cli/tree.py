"""The steps of a run as a tree, with items and iterations folded: what is fine is counted, what is not is shown. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from streams.workflow.state import owner_path, undone

MOST: Final = 3
"""How many items or iterations of a step are shown."""
_FINE: Final = frozenset({"completed", "skipped"})
_FIRST: Final = ("awaiting_approval", "held", "awaiting_signal", "failed", "waiting", "running", "entered", "sleeping")
"""Which items or iterations are shown first: those that somebody must do something about, then those that are under way."""


class Item(NamedTuple):
    """What the tree needs to know of a step; `row` is whatever it is shown from."""

    path: str
    status: str
    kind: str | None
    total: int | None
    begun: int
    done: int
    failed: int
    row: Any


class Line(NamedTuple):
    """One line of the tree. `lead`: the branches before its name; `item` None: it only names or counts what is below."""

    lead: str
    name: str
    item: Item | None


@dataclass
class _Node:
    """A step and those within it. `item` None: only something within it is known."""

    path: str
    item: Item | None = None
    parts: list["_Node"] = field(default_factory=list)

    @property
    def name(self) -> str:
        owner = owner_path(self.path)
        return self.path if owner is None else self.path[len(owner) :].removeprefix(".")

    @property
    def status(self) -> str:
        return self.item.status if self.item else ""


def item_of(row: Any) -> Item:
    """Return what the tree needs of a step's row: a StepRow, or what the API says of a step."""
    if isinstance(row, dict):
        path, status, kind = row["step"], row["status"], row["kind"]
        return Item(path, status, kind, row["total"], row["begun"], row["done"], row["failed"], row)
    return Item(row.step, row.status, row.kind, row.total, row.begun, row.done, row.failed, row)


def lines(items: Iterable[Item]) -> Iterator[Line]:
    """Yield the tree's lines: the workflow's steps, then what undoes them, then the clean-up steps."""
    nodes: dict[str, _Node] = {}
    roots: list[_Node] = []
    for item in items:
        _node(item.path, nodes, roots).item = item
    for root in sorted(roots, key=lambda node: (node.path == "finally", undone(node.path) is not None)):
        yield Line("", root.name + summary(root.item), root.item)
        yield from _below(root, "")


def _node(path: str, nodes: dict[str, _Node], roots: list[_Node]) -> _Node:
    node = nodes.get(path)
    if node is None:
        node = nodes[path] = _Node(path)
        owner = owner_path(path)
        (roots if owner is None else _node(owner, nodes, roots).parts).append(node)
    return node


def _below(node: _Node, lead: str) -> Iterator[Line]:
    shown, hidden = _folded(node)
    for number, part in enumerate(shown, 1):
        last = number == len(shown) and not hidden
        yield Line(f"{lead}{'└─ ' if last else '├─ '}", part.name + summary(part.item), part.item)
        yield from _below(part, f"{lead}{'   ' if last else '│  '}")
    if hidden and shown:
        yield Line(f"{lead}└─ ", f"… {hidden:,} more", None)


def _folded(node: _Node) -> tuple[list[_Node], int]:
    """Return the parts of a step that are shown, and how many others there are."""
    if not any(part.path.endswith("]") for part in node.parts):
        return node.parts, 0
    known = max(len(node.parts), node.item.begun if node.item else 0)
    if known <= MOST and len(node.parts) == known and not (node.item and node.status in _FINE):
        return node.parts, 0
    picked = [part for part in node.parts if part.status not in _FINE]
    picked.sort(key=lambda part: _FIRST.index(part.status) if part.status in _FIRST else len(_FIRST))
    chosen = {id(part) for part in picked[:MOST]}
    return [part for part in node.parts if id(part) in chosen], known - len(chosen)


def summary(item: Item | None) -> str:
    """Return what a step's items or iterations come to, in brackets; nothing for other steps."""
    if item is None or item.kind not in ("for_each", "repeat") or (item.path.endswith("]")):
        return ""
    if item.kind == "repeat":
        return f"  [{item.begun:,} iteration{'s' if item.begun != 1 else ''}]"
    total = item.total or 0
    counts = ((item.done - item.failed, "✓"), (item.failed, "✗"), (total - item.done, "…"))
    parts = " ".join(f"{count:,} {sign}" for count, sign in counts if count)
    return f"  [{total:,} item{'s' if total != 1 else ''}{': ' if parts else ''}{parts}]"
