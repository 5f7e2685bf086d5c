"""Lineage: where something comes from and what became of it, within a run and across runs.

A run's graph is made when it is asked for, from the views and the definition; what parent, children, origin and forks say of it
is fetched besides. Nothing here is stored.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from projections import runs
from projections.lineage_control import ControlOfRun
from projections.lineage_data import DataOfRun
from projections.lineage_graph import CONTROL, DATA, Edge, Graph, Node, node_id, path_of, run_of
from projections.table import Connection, rows

Direction = Literal["up", "down", "both"]
About = Literal["data", "control", "all"]
_KINDS: Final = {"data": DATA, "control": CONTROL, "all": DATA | CONTROL}
MOST_NODES: Final = 2000
MOST_RUNS: Final = 50
"""How many nodes an answer has at most, and how many runs are looked into for it."""
MOST_DEPTH: Final = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """A question. `node` None: all of the run; `depth`: how many edges away at most.

    `files`: whether files and payloads are told that outputs name.
    """

    run_id: str
    node: str | None = None
    direction: Direction = "both"
    about: About = "data"
    depth: int = MOST_DEPTH
    files: bool = True


@dataclass(slots=True)
class Found:
    """An answer. `truncated`: there is more than it may hold."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[Edge, None] = field(default_factory=dict)
    truncated: bool = False


class UnknownNodeError(LookupError):
    """There is no such node in the run's lineage. The text names some that there are."""


def node_of(run_id: str, text: str) -> str:
    """Return the id of a node that is named within a run: `output`, `step/plan`, `decision/7`, or as it is if it is whole."""
    kind, _, rest = text.partition("/")
    if kind in ("run", "input", "output"):
        return node_id(kind, rest or run_id)
    if kind in ("step", "decision") and rest and "/" not in rest:
        return node_id(kind, run_id, rest)
    return text


def lineage(db: Connection, asked: Asked, run: Mapping[str, Any] | None = None) -> Found:
    """Answer a question about a run that there is. `run`: its row of `runs`, if it is at hand. Raises UnknownNodeError."""
    walk = _Walk(db, asked, {} if run is None else {asked.run_id: run})
    if asked.node is None:
        graph = walk.graph(asked.run_id)
        found = Found()
        walk.take(found, graph.edges, (*graph.nodes, *(end for edge in graph.edges for end in (edge.source, edge.target))))
        return found
    return walk.go(asked.node)


class _Walk:
    """Goes from node to node, and fetches the graphs of runs as it comes to them."""

    def __init__(self, db: Connection, asked: Asked, runs_: Mapping[str, Mapping[str, Any]]) -> None:
        self._db, self._asked = db, asked
        self._graphs: dict[tuple[str, str | None], Graph] = {}
        self._runs: dict[str, Mapping[str, Any] | None] = {**runs_}
        self._forks: dict[str, list[str]] = {}
        self._full = False

    def graph(self, run_id: str, focus: str | None = None) -> Graph:
        """Return a run's graph; an empty one if there is no such run, or too many were looked into."""
        key = run_id, focus
        if key not in self._graphs:
            run = self._run(run_id)
            if run is not None and len(self._graphs) >= MOST_RUNS:
                self._full, run = True, None
            self._graphs[key] = graph = Graph()
            if run is not None and self._asked.about != "control":
                DataOfRun(self._db, run, graph, focus, files=self._asked.files).add()
            if run is not None and self._asked.about != "data":
                ControlOfRun(self._db, run, graph).add()
        return self._graphs[key]

    def _run(self, run_id: str) -> Mapping[str, Any] | None:
        if run_id not in self._runs:
            self._runs[run_id] = runs.one(self._db, run_id)
        return self._runs[run_id]

    def go(self, start: str) -> Found:
        """Return what is above or below a node, or both."""
        self._fetch(start)
        if not any(start in graph.nodes for graph in self._graphs.values()):
            names = [node for graph in self._graphs.values() for node in graph.nodes][:5]
            raise UnknownNodeError(f"there is no {start}; there are {', '.join(names)} …")
        found = Found()
        self.take(found, (), [start])
        if self._asked.direction != "down":
            self._follow(found, start, up=True)
        if self._asked.direction != "up":
            self._follow(found, start, up=False)
        found.truncated |= self._full
        return found

    def _follow(self, found: Found, start: str, *, up: bool) -> None:
        seen, frontier = {start}, [start]
        for _ in range(self._asked.depth):
            following: list[str] = []
            for node in frontier:
                self._fetch(node)
                edges = list(self._edges(node, up=up))
                ends = [edge.source if up else edge.target for edge in edges]
                self.take(found, edges, ends)
                for end in ends:
                    if end not in seen and end in found.nodes:
                        seen.add(end)
                        following.append(end)
            frontier = following

    def _edges(self, node: str, *, up: bool) -> Iterator[Edge]:
        kinds = _KINDS[self._asked.about]
        for graph in self._graphs.values():
            for edge in graph.above(node) if up else graph.below(node):
                if edge.kind in kinds:
                    yield edge

    def _fetch(self, node: str) -> None:
        """Fetch the graphs that say something about a node: its own run's, its parent's, and those of forks."""
        run_id, path = run_of(node), path_of(node)
        if run_id is None:
            self.graph(self._asked.run_id)
            return
        focus = path[: path.index("]") + 1] if path and "[" in path and "[]" not in path else None
        self.graph(run_id, focus)
        run = self._run(run_id)
        if run is None:
            return
        if run["parent_run_id"] is not None and path is None:
            step = run["parent_step"] or ""
            self.graph(run["parent_run_id"], step[: step.index("]") + 1] if "[" in step else None)
        if self._asked.direction != "up" and run_id not in self._forks:
            query = "SELECT run_id FROM runs WHERE origin_run_id = ? ORDER BY started LIMIT ?"
            self._forks[run_id] = [row["run_id"] for row in rows(self._db, query, [run_id, MOST_RUNS])]
            for fork in self._forks[run_id]:
                self.graph(fork)

    def take(self, found: Found, edges: Iterable[Edge], nodes: Iterable[str]) -> None:
        """Add edges and nodes to an answer, as far as there is room."""
        for node in nodes:
            if node not in found.nodes:
                if len(found.nodes) >= MOST_NODES:
                    found.truncated = True
                    continue
                found.nodes[node] = self._node(node)
        for edge in edges:
            if edge.source in found.nodes and edge.target in found.nodes:
                found.edges[edge] = None

    def _node(self, node: str) -> Node:
        for graph in self._graphs.values():
            if node in graph.nodes:
                return graph.nodes[node]
        kind, _, rest = node.partition("/")
        return Node(node, kind, path_of(node) or rest, run_of(node))
