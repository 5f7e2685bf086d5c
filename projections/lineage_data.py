"""Data lineage of one run: which output fed which argument, read off the definition's expressions, and what was recorded.

Nothing is guessed from values. An expression names steps; the step that ran by it is known by its path, and so are the steps that
it saw. A long list's items are one node, `check[]`, unless one of them is asked for.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from events.commands import ApprovalAnswered, ChangeOutput, SignalReceived
from projections.extent import Extent, in_extent
from projections.lineage_files import files, payloads
from projections.lineage_graph import COPIES, FEEDS, GATES, Edge, Graph, Node, node_id, path_of
from projections.specs import definition_of
from projections.table import Connection, rows
from streams.workflow.expressions import DefinitionError, EvaluationError
from streams.workflow.plan import Place, Plan
from streams.workflow.references import Reference, of_step, of_value
from streams.workflow.spec import Step, WorkflowSpec, from_canonical
from streams.workflow.state import StepStatus, owner_path, undone

MANY: Final = 300
"""From how many items and iterations on they are shown as one."""
_NUMBER: Final = re.compile(r"\[\d+\]")
_LARGEST_OUTPUT: Final = 300_000
_PEOPLE: Final = (ApprovalAnswered.__name__, ChangeOutput.__name__, SignalReceived.__name__)
_NOT_COMPUTED: Final = (StepStatus.SKIPPED.value, StepStatus.HELD.value)
_NAMES_FILES: Final = "contains(output, '$payload') OR (kind = 'tool' AND (contains(output, 'sha256') OR contains(output, $run)))"
_TOLD: Final[dict[str, tuple[str, str]]] = {
    "times": ("1", "count(*)"),
    "statuses": ("MAP {status: 1}", "histogram(status)"),
    **{name: (name, "any_value({})") for name in ("kind", "model", "tool", "workflow", "child_run_id", "source")},
    **{name: (name, "bool_or({})") for name in ("detached", "copied", "changed")},
    **{name: (name, "any_value({})") for name in ("reason", "failure_kind", "failure_message")},
    "attempt": ("attempt", "max({})"),
    "started": ("started", "min({})"),
    "ended": ("ended", "max({})"),
    "cost_usd": ("cost_usd", "sum({})"),
    **{name: (name, "sum({})::BIGINT") for name in ("input_tokens", "output_tokens")},
    "output": (f"CASE WHEN strlen(output) < {_LARGEST_OUTPUT} AND ({_NAMES_FILES}) THEN output END", "any_value({})"),
}
"""What is told of a step, and of all steps that one row stands for: to make groups of one takes three times as long."""
_WHOLE: Final = ("when", "for_each.items")
"""What a step that is done more than once computes once."""


class Definition:
    """A version of a workflow, with what each of its steps names."""

    def __init__(self, spec: WorkflowSpec) -> None:
        self.spec, self.plan = spec, spec.plan
        self._named: dict[int, tuple[Reference, ...]] = {}

    def named(self, place: Place) -> tuple[Reference, ...]:
        """Return what the step at a place names."""
        key = id(place.plan)  # a plan lives as long as this
        if key not in self._named:
            self._named[key] = of_step(place.plan.step)
        return self._named[key]


@lru_cache(maxsize=64)
def _definition(canonical: str) -> Definition | None:
    try:
        return Definition(from_canonical(canonical))
    except (ValueError, EvaluationError, DefinitionError):  # of newer code, or somebody else's
        return None


def definition(db: Connection, digest: str) -> Definition | None:
    """Return a version; None if it isn't registered here, or this code can't read it."""
    canonical = definition_of(db, digest)
    return _definition(canonical) if canonical is not None else None


def steps_of(db: Connection, extent: Extent, focus: str | None = None, many: int = MANY) -> list[dict[str, Any]]:
    """Return a run's steps in the order in which they began; more items than `many` as one, but not those in the item `focus`.

    `times`: how many a row stands for, `statuses`: how many of them are how; `output`: of steps that may name files or payloads.
    """
    parameters = extent.given()
    count = f"SELECT count(*) AS n FROM steps WHERE {in_extent('steps')} AND contains(step, '[')"  # noqa: S608 - our own text
    if rows(db, count, parameters)[0]["n"] <= many:
        told = ", ".join(f"{one} AS {name}" for name, (one, _) in _TOLD.items())
        query = f'SELECT step AS path, {told} FROM steps WHERE {in_extent("steps")} ORDER BY "offset", position, path'  # noqa: S608
        return rows(db, query, parameters)
    folded = r"regexp_replace(step, '\[\d+\]', '[]', 'g')"
    if focus is not None:
        parameters["focus"] = focus
        folded = f"CASE WHEN step = $focus OR starts_with(step, $focus || '.') THEN step ELSE {folded} END"
    told = ", ".join(f"{all_.format(one)} AS {name}" for name, (one, all_) in _TOLD.items())
    query = f"""
        SELECT {folded} AS path, {told} FROM steps WHERE {in_extent("steps")}
        GROUP BY path ORDER BY min("offset"), min(position), path
    """  # noqa: S608 - our own text
    return rows(db, query, parameters)


def status_of(row: dict[str, Any]) -> str:
    """Return how a step is, or that those that it stands for differ."""
    statuses: dict[str, int] = row["statuses"]
    return next(iter(statuses)) if len(statuses) == 1 else "mixed"


class DataOfRun:
    """Adds what one run's data lineage says to a graph.

    `run`: its row of `runs`; `focus`: an item that is shown apart from the others; `files`: whether files and
    payloads are told that outputs name; `many`: from how many items on they are one.
    """

    def __init__(
        self,
        db: Connection,
        run: Mapping[str, Any],
        graph: Graph,
        focus: str | None = None,
        *,
        files: bool = True,
        many: int = MANY,
    ) -> None:
        self._db, self._run, self._graph, self._files = db, run, graph, files
        self.run_id: str = run["run_id"]
        self.known = definition(db, run["digest"])
        self._extent = Extent.of(run)
        self.steps = steps_of(db, self._extent, focus, many)
        self._paths = {row["path"]: row for row in self.steps}
        self._many = False

    def add(self) -> None:
        """Add the run's nodes and edges."""
        self._add_ends()
        for row in self.steps:
            self._graph.add([self._node(row)])
            if row["copied"] and self._run["origin_run_id"]:
                origin = node_id("step", self._run["origin_run_id"], row["path"])
                self._graph.add(edges=[Edge(origin, self._id(row["path"]), COPIES, "output", "output")])
            elif self.known is not None:
                self._graph.add(edges=self._of_step(self.known.plan, row))
            self._add_kept(row)
        self._add_people()

    def _id(self, path: str) -> str:
        return node_id("step", self.run_id, path)

    def _add_ends(self) -> None:
        run, graph = self._run, self._graph
        given, result = node_id("input", self.run_id), node_id("output", self.run_id)
        graph.add(
            [
                Node(given, "input", "input", self.run_id, None, run["started"]),
                Node(result, "output", "output", self.run_id, run["status"], None, run["ended"]),
            ]
        )
        if run["parent_run_id"] is None and run["request_id"]:
            request = node_id("request", run["request_id"])
            graph.add([Node(request, "request", run["request_id"], None, None, run["started"])])
            graph.add(edges=[Edge(request, given, FEEDS, "input", "input")])
        if self.known is None or run["output"] is None:
            return
        spec = self.known.spec
        written = spec.output if spec.output is not None else f"=steps.{spec.steps[-1].name}.output"
        for ref in of_value("output", written):
            if ref.step is not None and ref.step in self._paths:
                graph.add(edges=[Edge(self._id(ref.step), result, FEEDS, ref.of, ref.into)])
            elif ref.root == "input":
                graph.add(edges=[Edge(given, result, FEEDS, ref.of, ref.into)])

    def _node(self, row: dict[str, Any]) -> Node:
        shown = ("kind", "model", "tool", "workflow", "child_run_id", "attempt", "reason", "failure_kind", "failure_message")
        detail = {name: row[name] for name in (*shown, "cost_usd", "input_tokens", "output_tokens") if row[name]}
        if row["times"] > 1:
            detail |= {"times": row["times"], "statuses": dict(row["statuses"])}
            detail.pop("child_run_id", None)
        for name in ("copied", "changed"):
            if row[name]:
                detail[name] = True
        return Node(self._id(row["path"]), "step", row["path"], self.run_id, status_of(row), row["started"], row["ended"], detail)

    # --- What the definition says ---

    def _of_step(self, plan: Plan, row: dict[str, Any]) -> Iterator[Edge]:
        path, self._many = row["path"], "[]" in row["path"]
        place = plan.place(path.replace("[]", "[0]"))
        if place is None or self.known is None:
            return
        own, computed = self._id(path), not set(row["statuses"]) <= set(_NOT_COMPUTED)
        child = row["child_run_id"] if row["times"] == 1 else None
        for ref in self.known.named(place):
            whole = ref.into.split("[")[0] in _WHOLE
            if ref.into == "repeat.until" or (whole and place.index is not None) or (place.repeats and not whole):
                continue
            if not computed and not ref.is_condition:
                continue
            target = node_id("input", child) if child and ref.into.startswith("run.input") else own
            into = ref.into.removeprefix("run.") if target != own else ref.into
            for source, of in self._sources(place, ref):
                yield Edge(source, target, GATES if ref.is_condition or not self._has(source, of) else FEEDS, of, into)
        if child and not row["detached"] and computed:
            yield Edge(node_id("output", child), own, FEEDS, "output", "output")
        yield from self._of_parts(place, row)

    def _has(self, source: str, of: str) -> bool:
        """Whether a node has the part that is named: a step that was skipped has no output, one that did not fail no error."""
        row = self._paths.get(path_of(source) or "")
        if row is None:
            return True
        wanted = {"output": StepStatus.COMPLETED.value, "error": StepStatus.FAILED.value}.get(
            of.partition(".")[0].partition("[")[0]
        )
        return wanted is None or wanted in row["statuses"]

    def _of_parts(self, place: Place, row: dict[str, Any]) -> Iterator[Edge]:
        """Yield what a step's own steps, items or iterations give it."""
        path, own = row["path"], self._id(row["path"])
        if row["source"] is not None:
            yield Edge(self._id(self.folded(row["source"])), own, FEEDS, "output", "output")
        elif place.repeats and isinstance(place.plan.step, Step) and place.plan.step.for_each:
            for part in self._paths:
                if part.endswith("]") and owner_path(part) == path:
                    yield Edge(self._id(part), own, FEEDS, "output", f"output{part[len(path) :]}")

    def _sources(self, place: Place, ref: Reference) -> Iterator[tuple[str, str]]:
        """Yield the nodes that a name stands for at a place, each with the part of it that is named."""
        if ref.root == "input":
            yield node_id("input", self.run_id), ref.of
        elif ref.root == "steps":
            result = place.plan.frame.result if ref.into.split(".")[0] == "output" and place.plan.frame else None
            refs = result.refs if result is not None else place.plan.refs
            level = refs.get(ref.step or "")
            if level is None or ref.step is None:
                return
            path = f"{place.path}.{ref.step}" if level > place.plan.level else place.path_of(ref.step, level)
            yield from self._if_there(path, ref.of)
        elif ref.root == "output" and (done := undone(place.path)) is not None:
            yield from self._if_there(done, f"output.{ref.of}".rstrip("."))
        elif ref.root in place.plan.bindings:
            yield from self._bound(place, ref)

    def _bound(self, place: Place, ref: Reference) -> Iterator[tuple[str, str]]:
        """Yield what a loop's variable stands for: the source of its items, or the iteration before."""
        what, level = place.plan.bindings[ref.root]
        around = place.at(level)
        loop = around.owner()
        if loop is None or around.index is None or self.known is None:
            return
        if what == "item":
            for items in self.known.named(loop):
                if items.into.startswith("for_each.items"):
                    for source, of in self._sources(loop, items):
                        number = "" if self._many else around.index
                        yield source, f"{of}[{number}].{ref.of}".rstrip(".")
        elif what == "last" and around.index > 0:
            yield from self._if_there(f"{loop.path}[{around.index - 1}]", f"output.{ref.of}".rstrip("."))

    def _if_there(self, path: str, of: str) -> Iterator[tuple[str, str]]:
        """Yield a step that something was decided about: a name may stand for one that never began."""
        folded = self.folded(path)
        if folded in self._paths:
            yield self._id(folded), of

    def folded(self, path: str) -> str:
        """Return a path as the steps are shown: by number, or many as one."""
        return path if path in self._paths else _NUMBER.sub("[]", path)

    # --- What was recorded ---

    def _add_kept(self, row: dict[str, Any]) -> None:
        """Add the files and payloads that a step's output names."""
        output, own = row["output"], self._id(row["path"])
        if not self._files or output is None or row["times"] > 1:
            return
        for file in files(output, self.run_id) if row["kind"] == "tool" else ():
            node = Node(node_id("file", file.path), "file", file.path, None, None, detail={"sha256": file.sha256})
            edge = Edge(own, node.id, FEEDS, file.at, "") if file.written else Edge(node.id, own, FEEDS, "", file.at)
            self._graph.add([node], [edge])
        for digest in payloads(output):
            node = Node(node_id("payload", digest), "payload", digest, None)
            self._graph.add([node], [Edge(own, node.id, FEEDS, "output", "")])

    def _add_people(self) -> None:
        """Add what people and other systems gave to steps: answers, signals, outputs that they have set."""
        query = f"""
            SELECT d.seq, decided, input, "by", coalesce(d.step, s.step) AS step, s.name
            FROM (SELECT * FROM decisions
                  WHERE {in_extent("decisions")} AND ignored IS NULL AND input IN (SELECT unnest($people))) AS d
                 LEFT JOIN (SELECT * FROM signals WHERE {in_extent("signals")}) AS s USING (seq)
            ORDER BY seq
        """  # noqa: S608 - our own text
        for row in rows(self._db, query, self._extent.given(people=list(_PEOPLE))):
            path = self.folded(row["step"] or "")
            if path not in self._paths:
                continue
            said = {ApprovalAnswered.__name__: "answer", ChangeOutput.__name__: "output"}.get(row["input"], "payload")
            decision = node_id("decision", self.run_id, row["seq"])
            name = f"{row['input']} {row['name'] or row['step']}" + (f" by {row['by']}" if row["by"] else "")
            node = Node(decision, "decision", name, self.run_id, None, row["decided"], detail={"by": row["by"]})
            self._graph.add([node], [Edge(decision, self._id(path), FEEDS, said, "output")])
