"""The words of lineage: nodes with ids that never change, and edges between them.

request/order-17                  what somebody asked for
run/RUN                           a run
input/RUN, output/RUN             what it was given, what came out
step/RUN/check[3].ask             a step, item or iteration, by path; `check[]` stands for all items of a long list
call/ID                           a call to a model or a tool
decision/RUN/7                    a decision, by number
file/PATH-OR-ADDRESS              a file or address that a tool says it has read or written
payload/DIGEST                    a large value that is kept outside of the log
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

CAUSES: Final = "causes"
"""An event led to another one."""
FEEDS: Final = "feeds"
"""A value went into another one."""
GATES: Final = "gates"
"""A value decided whether a step happens, and put nothing into it."""
COPIES: Final = "copies"
"""A fork took a result over."""
Kind = Literal["causes", "feeds", "gates", "copies"]
CONTROL: Final = frozenset({CAUSES})
DATA: Final = frozenset({FEEDS, GATES, COPIES})


@dataclass(frozen=True, slots=True)
class Node:
    """One thing. `kind`: the first word of its id; `run_id`: the run that it is part of, None if of none.

    `detail`: what else is known, as JSON values; of a step that stands for many (`times` of them) how many are how (`statuses`).
    """

    id: str
    kind: str
    name: str
    run_id: str | None = None
    status: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    detail: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Edge:
    """From `source` to `target`. `of`: the part of the source (`output.rows`); `into`: that of the target (`arguments.rows`)."""

    source: str
    target: str
    kind: Kind
    of: str = ""
    into: str = ""


class Graph:
    """Nodes and the edges between them; an edge may lead to a node of another run, which isn't one of `nodes`."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: dict[Edge, None] = {}
        self._above: dict[str, list[Edge]] = {}
        self._below: dict[str, list[Edge]] = {}

    def add(self, nodes: Iterable[Node] = (), edges: Iterable[Edge] = ()) -> None:
        """Add what isn't there yet; of a node that is there, the first stays."""
        for node in nodes:
            self.nodes.setdefault(node.id, node)
        for edge in edges:
            if edge not in self.edges and edge.source != edge.target:
                self.edges[edge] = None
                self._above.setdefault(edge.target, []).append(edge)
                self._below.setdefault(edge.source, []).append(edge)

    def above(self, node: str) -> list[Edge]:
        """Return the edges that lead to a node."""
        return self._above.get(node, [])

    def below(self, node: str) -> list[Edge]:
        """Return the edges that lead away from a node."""
        return self._below.get(node, [])


def node_id(kind: str, *parts: str | int) -> str:
    """Return the id of a node."""
    return "/".join((kind, *map(str, parts)))


def run_of(node: str) -> str | None:
    """Return the run that a node's id names, None if it names none."""
    kind, _, rest = node.partition("/")
    return rest.partition("/")[0] if kind in ("run", "input", "output", "step", "decision") else None


def path_of(node: str) -> str | None:
    """Return the path of the step that a node's id names, None if it names none."""
    kind, _, rest = node.partition("/")
    return rest.partition("/")[2] if kind == "step" else None


def ancestors(graphs: Iterable[Graph], node: str) -> Iterator[Edge]:
    """Yield the edges that lead to a node, in any of these graphs."""
    for graph in graphs:
        yield from graph.above(node)


def descendants(graphs: Iterable[Graph], node: str) -> Iterator[Edge]:
    """Yield the edges that lead away from a node, in any of these graphs."""
    for graph in graphs:
        yield from graph.below(node)
