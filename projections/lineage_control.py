"""Control lineage of one run: which event led to which.

Ids say it exactly: those of calls, child runs and timers derive from the hash of the decision that asked for them, and each
decision knows what its input answers. So what a decision follows from is found by deriving the ids again. Signals and people's
answers bear no such id: they name a step, and that is known to have waited since a certain decision. All else that is said to a
run from outside (to cancel, pause, resume it, to set an output, a signal that nothing waits for yet) follows from no decision.
"""

from collections.abc import Mapping
from typing import Any, Final

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ApprovalAnswered, ResumeRun, ResumeStep
from events.decisions import (
    ApprovalRequested,
    ChildRunRequested,
    RetryScheduled,
    SignalAwaited,
    SignalKept,
    SignalTaken,
    TimerSet,
)
from events.ids import effect_id
from events.ids import run_id as run_id_of
from projections.extent import Extent, in_extent
from projections.lineage_graph import CAUSES, Edge, Graph, Node, node_id
from projections.table import Connection, rows

_CALLS: Final = frozenset({LlmCallRequested.__name__, ToolCallRequested.__name__})
_CHILD: Final = ChildRunRequested.__name__
_AWAITED: Final = SignalAwaited.__name__
_TIMERS: Final = frozenset({RetryScheduled.__name__, TimerSet.__name__, ApprovalRequested.__name__, _AWAITED})
_RELEASES: Final = (ResumeRun.__name__, ResumeStep.__name__)


class ControlOfRun:
    """Adds what one run's control lineage says to a graph."""

    def __init__(self, db: Connection, run: Mapping[str, Any], graph: Graph) -> None:
        self._run, self._graph = run, graph
        self.run_id: str = run["run_id"]
        extent = Extent.of(run)

        def found(columns: str, table: str, more: str = "") -> list[dict[str, Any]]:
            return rows(db, f"SELECT {columns} FROM {table} WHERE {in_extent(table)} {more}", extent.given())  # noqa: S608 - our own text

        self._decisions = found(
            'seq, "offset", decided, input, step, "by", cause, effects, ignored, hash', "decisions", "ORDER BY seq"
        )
        self._calls = found("*", "calls")
        self._begun = found('step, "offset", position, status, kind, started, ended', "steps", 'ORDER BY "offset", position')
        self._asked = found('step, "offset"', "approvals")
        self._taken = found("seq, step, taken", "signals", "AND taken IS NOT NULL")

    def add(self) -> None:
        """Add the run's nodes and edges."""
        self._add_start()
        asked: dict[str, tuple[int, str]] = {}
        at = {row["offset"]: row["seq"] for row in self._decisions}
        self._graph.add(self._call(call) for call in self._calls)
        for row in self._decisions:
            decision = self._id(row["seq"])
            self._graph.add([self._decision(row)])
            for index, effect in enumerate(row["effects"]):
                if effect in _CALLS or effect == _CHILD or effect in _TIMERS:
                    identity = effect_id(row["hash"], index)
                    asked[identity] = row["seq"], effect
                    if effect in _CALLS:
                        self._edge(decision, node_id("call", identity), effect)
                    elif effect == _CHILD:
                        child = run_id_of(identity)
                        self._edge(decision, node_id("decision", child, 1), effect)
                        self._edge(decision, node_id("run", child), effect)  # also one that was refused, and has no decision
            if row["cause"] is not None:
                self._add_cause(row, asked)
        self._add_people(at)
        for step in self._begun:
            if step["offset"] in at:
                path = node_id("step", self.run_id, step["step"])
                detail = {"kind": step["kind"]} if step["kind"] else {}
                node = Node(path, "step", step["step"], self.run_id, step["status"], step["started"], step["ended"], detail)
                self._graph.add([node])
                self._edge(self._id(at[step["offset"]]), path, "begins")

    def _add_start(self) -> None:
        run, first = self._run, self._id(1)
        if run["origin_run_id"] is not None:
            self._edge(node_id("decision", run["origin_run_id"], run["origin_seq"]), first, "fork")
        if run["parent_run_id"] is not None:
            self._edge(node_id("step", run["parent_run_id"], run["parent_step"]), first, _CHILD)
        elif run["request_id"]:
            request = node_id("request", run["request_id"])
            self._graph.add([Node(request, "request", run["request_id"], None, None, run["started"])])
            self._edge(request, first, "StartRun")
        if run["ended"] is not None:
            whole = node_id("run", self.run_id)
            self._graph.add([Node(whole, "run", run["workflow"], self.run_id, run["status"], run["started"], run["ended"])])
            self._edge(self._id(run["seq"]), whole, "ends")

    def _add_cause(self, row: dict[str, Any], asked: dict[str, tuple[int, str]]) -> None:
        """Add what a decision's input answers. Of an answer to a call that nobody asked for, the call is all that is known."""
        decision, cause = self._id(row["seq"]), row["cause"]
        seq, effect = asked.get(cause, (0, ""))
        if row["input"] == "TimerFired":  # an attempt's time limit has the call's id
            if seq:
                self._edge(self._id(seq), decision, "time is over" if effect in _CALLS else "timer")
        elif row["input"].startswith("ChildRun"):
            self._edge(node_id("run", run_id_of(cause)), decision, row["input"])
        else:
            self._edge(node_id("call", cause), decision, row["input"])

    def _add_people(self, at: dict[int, int]) -> None:
        """Add what led to answers of people and to signals, and what signals led to later. `at`: decisions by offset."""
        asked = {row["step"]: at[row["offset"]] for row in self._asked if row["offset"] in at}
        for row in self._decisions:
            seq = asked.get(row["step"] or "", 0)
            if row["input"] == ApprovalAnswered.__name__ and 0 < seq < row["seq"]:
                self._edge(self._id(seq), self._id(row["seq"]), ApprovalRequested.__name__)
        if not self._taken:
            return
        by_seq = {row["seq"]: row for row in self._decisions}
        begun = {row["step"]: (by_seq[at[row["offset"]]], row["position"]) for row in self._begun if row["offset"] in at}
        taking = [row for row in self._decisions if SignalTaken.__name__ in row["effects"]]
        for signal in self._taken:
            if SignalKept.__name__ not in by_seq[signal["seq"]]["effects"]:
                since = self._awaited(*begun[signal["step"]], signal["seq"]) if signal["step"] in begun else None
                if since is not None:
                    self._edge(self._id(since), self._id(signal["seq"]), _AWAITED)
                continue
            takers = [row["seq"] for row in taking if row["decided"] == signal["taken"] and row["seq"] > signal["seq"]]
            if len(takers) == 1:
                self._edge(self._id(signal["seq"]), self._id(takers[0]), SignalTaken.__name__)

    def _awaited(self, first: dict[str, Any], position: int, taken: int) -> int | None:
        """Return the decision since which a step waited for the signal of decision `taken`; None: that isn't certain.

        `first`: the decision by which the step is known, and the place of its effect there. If the step was held then, it waits
        since it was released.
        """
        if first["effects"][position] == _AWAITED:
            return int(first["seq"])
        released = [
            row["seq"]
            for row in self._decisions[first["seq"] : taken - 1]
            if row["input"] in _RELEASES and _AWAITED in row["effects"]
        ]
        return released[0] if len(released) == 1 else None

    def _decision(self, row: dict[str, Any]) -> Node:
        name = " ".join(filter(None, (row["input"], row["step"]))) + (f" by {row['by']}" if row["by"] else "")
        detail = {"effects": list(row["effects"])} | ({"ignored": row["ignored"]} if row["ignored"] else {})
        return Node(self._id(row["seq"]), "decision", name, self.run_id, None, row["decided"], None, detail)

    def _call(self, call: dict[str, Any]) -> Node:
        shown = ("kind", "model", "tool", "tool_version", "attempt", "latency_ms", "cost_usd", "failure_kind", "failure_message")
        detail = {name: call[name] for name in (*shown, "step") if call[name] is not None}
        name = f"{call['model'] or call['tool']} for {call['step']}"
        return Node(
            node_id("call", call["call_id"]), "call", name, self.run_id, call["outcome"], call["requested"], call["ended"], detail
        )

    def _id(self, seq: int) -> str:
        return node_id("decision", self.run_id, seq)

    def _edge(self, source: str, target: str, into: str) -> None:
        self._graph.add(edges=[Edge(source, target, CAUSES, "", into)])
