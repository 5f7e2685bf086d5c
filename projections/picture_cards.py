"""What a picture of a run says: a card for the question, each step, each file and the result, in words for anybody."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath
from typing import Any, Final, Literal

from events.as_json import payload
from projections import approvals
from projections.extent import Extent, in_extent
from projections.lineage_data import DataOfRun, status_of
from projections.lineage_graph import GATES, Edge, Graph, node_id, run_of
from projections.table import Connection, rows
from streams.workflow.plan import FINALLY, Place
from streams.workflow.state import owner_path, undone

Style = Literal["data", "condition", "order"]
Tone = Literal["plain", "quiet", "bad", "code"]
MOST_CARDS: Final = 150
"""More steps than these are not drawn apart."""
_LARGEST: Final = 300_000
_LONG: Final = 300
_KEYS: Final = 5
_FEW: Final = 20
_WORDS: Final = {
    "transform": "computed from what came before",
    "approval": "asked a person",
    "wait_for": "waited for a signal",
    "sleep": "waited for a time",
    "steps": "a group of steps",
    "for_each": "once for each item of a list",
    "repeat": "again and again",
    "switch": "chose a way",
}
_ANSWERS: Final = {
    "waiting": "waits for an answer",
    "approved": "approved by",
    "rejected": "rejected by",
    "expired": "nobody answered in time",
    "replaced": "answered by setting the output:",
    "cancelled": "cancelled before anybody answered",
}


@dataclass(frozen=True, slots=True)
class Text:
    """A line on a card."""

    text: str
    tone: Tone = "plain"


@dataclass(slots=True)
class Card:
    """One card. `shape`: what it stands for; `status`: of a step or the run; `began`, `took` in milliseconds."""

    key: str
    shape: Literal["question", "step", "file", "result"]
    title: str
    status: str = ""
    began: float | None = None
    took: float | None = None
    texts: list[Text] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Arrow:
    """What a card uses of another one; `uses`: for which of its arguments, by name."""

    source: str
    target: str
    style: Style
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Story:
    """All that a picture shows. `run`: the run's row of `runs`; `left_out`: how many steps are not drawn."""

    run: Mapping[str, Any]
    description: str
    cards: list[Card]
    arrows: list[Arrow]
    left_out: int = 0


def story(db: Connection, run: Mapping[str, Any], *, payloads: bool = True) -> Story:
    """Return what a picture of a run shows. `run`: its row of `runs`; without `payloads` no values are told."""
    graph = Graph()
    data = DataOfRun(db, run, graph, files=payloads, many=0)
    data.add()
    teller = _Teller(db, run, data, payloads=payloads)
    cards = list(teller.cards(graph))
    known = {card.key for card in cards}
    arrows = list(_arrows(graph, data, known))
    description = data.known.spec.description if data.known is not None else ""
    return Story(run, description, cards, [*arrows, *_order(data, known, arrows)], max(0, len(data.steps) - MOST_CARDS))


class _Teller:
    """Tells about one run's cards."""

    def __init__(self, db: Connection, run: Mapping[str, Any], data: DataOfRun, *, payloads: bool) -> None:
        self._run, self._data, self._payloads = run, data, payloads
        self._id: str = run["run_id"]
        self._outputs: dict[str, str] = {}
        extent = Extent.of(run)
        if payloads:
            own = f"{in_extent('steps')} AND NOT contains(step, '[') AND strlen(output) < $most"
            found = rows(db, f"SELECT step, output FROM steps WHERE {own}", extent.given(most=_LARGEST))  # noqa: S608 - our own text
            self._outputs = {row["step"]: row["output"] for row in found}
        self._asked = {row["step"]: row for row in approvals.of_run(db, extent)}

    def cards(self, graph: Graph) -> Iterator[Card]:
        """Yield the cards in the order in which they came about."""
        yield self._question()
        for row in self._data.steps[:MOST_CARDS]:
            if not row["path"].endswith("]"):
                yield self._step(self._with_items(row))
        if self._data.known is not None and self._run["ended"] is None:
            begun = {row["path"] for row in self._data.steps}
            for step in self._data.known.spec.steps:
                if step.name not in begun:
                    yield Card(self._key(step.name), "step", step.name, "pending", texts=[Text("not begun yet", "quiet")])
        yield from self._files(graph)
        yield self._result()

    def _key(self, path: str) -> str:
        return node_id("step", self._id, path)

    def _question(self) -> Card:
        run = self._run
        card = Card(node_id("input", self._id), "question", "What was asked", began=0.0)
        if self._payloads:
            card.texts += _facts(payload(run["input"]))
        if run["parent_run_id"]:
            card.texts.append(Text(f"by step {run['parent_step']} of run {run['parent_run_id'][:8]}", "quiet"))
        elif run["request_id"]:
            card.texts.append(Text(f"request {run['request_id']}", "quiet"))
        return card

    def _with_items(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a step's row with what its items have spent, and how they are."""
        items = [each for each in self._data.steps if each["path"].endswith("]") and owner_path(each["path"]) == row["path"]]
        statuses: dict[str, int] = {}
        for each in items:
            for status, count in each["statuses"].items():
                statuses[status] = statuses.get(status, 0) + count
        used = {
            name: row[name] or next((each[name] for each in items if each[name]), None) for name in ("model", "tool", "workflow")
        }
        spent = {
            name: (row[name] or 0) + sum(each[name] or 0 for each in items)
            for name in ("cost_usd", "input_tokens", "output_tokens")
        }
        return {**row, **used, **spent, "items": statuses}

    def _step(self, row: dict[str, Any]) -> Card:
        status = status_of(row)
        card = Card(self._key(row["path"]), "step", row["path"].replace("[]", "[…]"), status)
        if row["started"] is not None and status != "skipped":
            card.began = _ms(self._run["started"], row["started"])
            if row["ended"] is not None:
                card.took = _ms(row["started"], row["ended"])
        card.texts += [Text(self._what(row, status)), *self._about(row, status)]
        return card

    def _what(self, row: dict[str, Any], status: str) -> str:
        """Say what a step did."""
        if status == "skipped":
            return "skipped: its condition did not hold"
        if row["copied"]:
            return "taken over from the run that this one was forked from"
        times = sum(row["items"].values())
        each = f" for each of {times:,} items" if row["kind"] == "for_each" and times else ""
        if row["model"]:
            return f"asked the model {row['model']}{each}"
        if row["tool"]:
            return f"used the tool {row['tool']}{each}"
        if row["workflow"]:
            started = "started" if row["detached"] else "ran"
            return f"{started} the workflow {row['workflow']}{each}"
        if row["kind"] == "repeat" and times:
            return f"{times:,} times until its condition held" if status == "completed" else f"{times:,} times so far"
        if row["kind"] == "for_each" and times:
            return f"once{each}"
        return _WORDS.get(row["kind"] or "", "a step")

    def _about(self, row: dict[str, Any], status: str) -> Iterator[Text]:
        """Yield what is special about a step: who answered, what came out, what it cost, what went wrong."""
        asked = self._asked.get(row["path"])
        if asked is not None:
            who = asked["answered_by"] or ("the workflow, as nobody answered in time" if asked["answered"] else "")
            named = asked["status"] in ("approved", "rejected", "replaced")
            yield Text(
                f"{_ANSWERS[asked['status']]} {who if named else ''}".strip() + (" (with changes)" if asked["edited"] else "")
            )
            if self._payloads and asked["reason"] and asked["reason"] != "deadline":
                yield Text(f"“{asked['reason']}”", "quiet")
        counts = row["statuses"] if row["times"] > 1 else row["items"]
        if len(counts) > 1 or row["times"] > 1:
            yield Text(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(counts.items())))
        output = self._outputs.get(row["path"])
        if output is not None and status == "completed" and asked is None:
            yield from _gist(payload(output))
        if row["changed"]:
            yield Text("its output was set by a person")
        if row["failure_kind"] and status not in ("completed", "skipped"):
            yield Text(self._why(row["failure_kind"].replace("_", " "), row), "bad")
        if row["attempt"] and row["attempt"] > 1:
            yield Text(f"{row['attempt']} attempts", "quiet")
        tokens = (row["input_tokens"] or 0) + (row["output_tokens"] or 0)
        if tokens:
            yield Text(f"{tokens:,} tokens · {money(row['cost_usd'])}", "quiet")

    def _files(self, graph: Graph) -> Iterator[Card]:
        """Yield a card for each file that was read, and one for those that a step wrote."""
        written: dict[str, list[str]] = {}
        for edge in graph.edges:
            if edge.source.startswith("file/"):
                checksum = graph.nodes[edge.source].detail.get("sha256")
                texts = [Text(f"SHA-256 {checksum[:16]}…", "code")] if checksum else []
                name = edge.source.removeprefix("file/")
                yield Card(edge.source, "file", name, texts=[Text("data that was read"), *texts])
            elif edge.target.startswith("file/") and run_of(edge.source) == self._id:
                written.setdefault(edge.source, []).append(edge.target.removeprefix("file/"))
        for step, paths in written.items():
            names = [PurePath(path).name for path in paths]
            title = " and ".join(names[:2]) if len(names) <= 2 else f"{len(names)} files"  # noqa: PLR2004 - as many as fit
            more = [Text(", ".join(names))] if len(names) > 2 else []  # noqa: PLR2004
            yield Card(f"written by {step}", "file", title, texts=[Text("written"), *more])

    def _result(self) -> Card:
        run = self._run
        card = Card(node_id("output", self._id), "result", "Result", run["status"])
        if run["ended"] is not None:
            card.took = _ms(run["started"], run["ended"])
        if run["status"] == "completed":
            card.texts += _facts(payload(run["output"]), f"/{self._id}/") if self._payloads else [Text("completed")]
        elif run["ended"] is None:
            waits = ", ".join(f"{count} for {_waited(kind)}" for kind, count in run["waiting"].items())
            card.texts.append(Text(f"not there yet: the run is {run['status']}" + (f"; waits: {waits}" if waits else "")))
        else:
            where = f": step {run['failure_step']}" if run["failure_step"] else ""
            by = f" by {run['cancelled_by']}" if run["cancelled_by"] else ""
            card.texts.append(Text(self._why(f"{run['status']}{by}{where}", run), "bad"))
        return card

    def _why(self, what: str, row: Mapping[str, Any]) -> str:
        """Say what went wrong, and what the failure says: that may quote values."""
        return f"{what}: {row['failure_message'] or ''}"[:_LONG] if self._payloads else what


def _waited(kind: str) -> str:
    return {"approval": "an approval", "signal": "a signal", "sleep": "a time", "breakpoint": "a breakpoint"}.get(kind, kind)


def _arrows(graph: Graph, data: DataOfRun, known: set[str]) -> Iterator[Arrow]:
    """Yield one arrow for all that a card uses of another one."""
    children = {
        node_id(word, row["child_run_id"]): node_id("step", data.run_id, row["path"])
        for row in data.steps
        if row["child_run_id"] and row["times"] == 1
        for word in ("input", "output")
    }
    found: dict[tuple[str, str], tuple[set[str], dict[str, None]]] = {}
    for edge in graph.edges:
        source, target = (_shown(children.get(each, each), known) for each in (edge.source, edge.target))
        if edge.target.startswith("file/"):
            target = f"written by {edge.source}"
        if source == target or source not in known or target not in known:
            continue
        kinds, uses = found.setdefault((source, target), (set(), {}))
        kinds.add(edge.kind)
        if edge.kind != GATES or edge.into != "when":
            uses[_use(edge)] = None
    for (source, target), (kinds, uses) in found.items():
        style: Style = "condition" if kinds == {GATES} else "data"
        names = tuple(name for name in uses if name) or (("condition",) if style == "condition" else ())
        yield Arrow(source, target, style, names)


def _shown(node: str, known: set[str]) -> str:
    """Return the card that a node is on: an item is on its step's, what isn't drawn on that of the step around it."""
    while node not in known and node.startswith("step/"):
        owner = owner_path(node)
        if owner is None or owner.count("/") < 2:  # noqa: PLR2004 - step/RUN/PATH
            break
        node = owner
    return node


def _use(edge: Edge) -> str:
    """Return for what something is used, as short as can be."""
    if edge.source.startswith("file/"):
        return "data"
    head, _, rest = edge.into.partition(".")
    name = rest.partition(".")[0] if head in ("arguments", "transform", "input", "for_each") and rest else head
    return {"output": "result", "show": "what to approve"}.get(name, name).partition("[")[0]


def _order(data: DataOfRun, known: set[str], arrows: list[Arrow]) -> Iterator[Arrow]:
    """Yield arrows that say only what comes before what: for cards that use no step's result, or whose result nothing uses."""
    told, fed = {(arrow.source, arrow.target) for arrow in arrows}, {arrow.target for arrow in arrows}
    used, fed_by_steps = {arrow.source for arrow in arrows}, {target for source, target in told if source.startswith("step/")}
    plan = data.known.plan if data.known is not None else None
    places = {row["path"]: plan.place(row["path"].replace("[]", "[0]")) if plan is not None else None for row in data.steps}
    key = {path: each for path in places if (each := node_id("step", data.run_id, path)) in known}
    question, result = node_id("input", data.run_id), node_id("output", data.run_id)
    before: dict[str, list[str]] = {}
    for path, each in key.items():
        place, holds = places[path], any(inner.startswith((f"{path}.", f"{path}[")) for inner in key)
        if each not in fed_by_steps and not holds and undone(path) is None:
            before[path] = _before(data, place, known) if place is not None else []
            used.update(before[path])

    def ends(*, undo: bool) -> list[str]:
        own = [path for path in key if owner_path(path) is None and path != FINALLY and (undo or undone(path) is None)]
        return [key[path] for path in own if key[path] not in used]

    # When all else has ended, one step is undone after the other, and then comes what cleans up.
    previous = ends(undo=False)
    for path, each in key.items():
        if (step := undone(path)) is not None:
            before[path] = [*previous, _shown(node_id("step", data.run_id, step), known)]
            previous = [each]
            used.update(before[path])
    last = ends(undo=True)
    for path, given in before.items():
        cards = given or (last if path.startswith(f"{FINALLY}.") else []) or ([question] if key[path] not in fed else [])
        for each in dict.fromkeys(cards):
            if each in known and (each, key[path]) not in told:
                yield Arrow(each, key[path], "order")
    if any(path.startswith(f"{FINALLY}.") for path in places):
        used.update(last)
    for path, each in key.items():
        if each not in used:
            owner = owner_path(path)
            around = _shown(node_id("step", data.run_id, owner), known) if owner is not None else result
            yield Arrow(each, around if around in known else result, "order")
    if result not in fed and not places:
        yield Arrow(question, result, "order")


def _before(data: DataOfRun, place: Place, known: set[str]) -> list[str]:
    """Return the cards of what a step needs, or of what the step around it needs if it needs nothing itself."""
    around: Place | None = place
    while around is not None:
        within = f"{around.around.path}." if around.around is not None else ""
        needed = [node_id("step", data.run_id, data.folded(f"{within}{need}")) for need in around.plan.needs]
        if found := [each for each in needed if each in known]:
            return found
        around = around.around
    return []


def _facts(value: Any, own_folder: str = "\n") -> Iterator[Text]:
    """Yield what was given or came out, a line for each of its parts; of files in the run's own folder the names."""
    if not isinstance(value, dict):
        yield Text(_short(value, _LONG))
        return
    plain = {key: each for key, each in value.items() if each is not None}
    for key, each in list(plain.items())[:_KEYS]:
        if isinstance(each, dict):
            yield Text(f"{key}: {len(each)} parts")
        elif isinstance(each, str) and own_folder in each:
            yield Text(f"{key}: {PurePath(each).name}")
        else:
            yield Text(f"{key}: {_short(each, _LONG)}")
    if len(plain) > _KEYS:
        yield Text(f"and {len(plain) - _KEYS} more", "quiet")


def _gist(value: Any) -> Iterator[Text]:
    """Yield what came out of a step, in a line."""
    if isinstance(value, dict):
        parts = [f"{key}: {_short(each, 40)}" if _is_short(each) else key for key, each in value.items() if each is not None]
        text = ", ".join(parts[:_KEYS]) + (" …" if len(parts) > _KEYS else "")
    else:
        text = _short(value, 160)
    if text:
        yield Text(f"→ {text}", "quiet")


def _is_short(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= _KEYS and all(isinstance(each, str) and len(each) < _FEW for each in value)
    return isinstance(value, bool | int | float) or (isinstance(value, str) and 0 < len(value) <= 2 * _FEW)


def _short(value: Any, most: int) -> str:
    if isinstance(value, list):
        text = ", ".join(map(str, value)) if value and all(_is_short(each) for each in value) else f"{len(value):,} entries"
    elif isinstance(value, str):
        text = " ".join(value.split())
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _ms(since: datetime, until: datetime) -> float:
    return (until - since).total_seconds() * 1000


def money(usd: float | None) -> str:
    """Write an amount in US dollars, small ones with more digits."""
    usd = usd or 0.0
    return f"${usd:.2f}" if usd == 0 or usd >= 1 else f"${usd:.6f}".rstrip("0")


__all__ = ["Arrow", "Card", "Story", "Text", "money", "story"]
