"""`foldflow lineage`: where a result comes from, and what became of it, asked of the read API."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import typer

from infra.cli.runs import Json, ask
from infra.cli.terminal import console, say

if TYPE_CHECKING:
    from rich.tree import Tree

_MOST_USES: Final = 3
_SHORT: Final = 8


def lineage(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN[/STEP]",
            help="A run's id or the beginning of it, or its request's id; behind a slash a step of it, by path.",
        ),
    ],
    up: Annotated[bool, typer.Option("--up", help="Only what it comes from.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Only what became of it.")] = False,
    control: Annotated[
        bool, typer.Option("--control", help="Which event led to which, instead of which value went where.")
    ] = False,
    depth: Annotated[int, typer.Option(min=1, max=1000, help="How many steps away at most; --control alone shows all.")] = 5,
    as_json: Json = False,
) -> None:
    """Show where a run's result comes from, or what became of its input, or both for one of its steps, as trees.

    It is read off the workflow's expressions and the ledger, never guessed from values that look alike. Behind each name stands
    what was used for what: `output.rows → arguments.rows`; in brackets what only decided whether or how it happens.

    With --control alone all of the run is shown, decision by decision: what its request led to, and what was said to it later.

    For example:

        foldflow lineage 8f6a3a7e

        foldflow lineage 8f6a3a7e --down

        foldflow lineage 8f6a3a7e/report --up --depth 2

        foldflow lineage 8f6a3a7e/check[3].ask --json

        foldflow lineage 8f6a3a7e --control

    Exit codes: 0 shown, 2 there is no such run or step, or an option is wrong, 4 the API can't be reached.
    """
    if up and down:
        raise typer.BadParameter("--up and --down exclude each other; leave both out to see both for a step")
    run_id, _, step = run.partition("/")
    direction = "down" if down else "up" if up or not step else "both"
    parameters: dict[str, Any] = {"about": "control" if control else "data"}
    if step or up or down or not control:
        first, last = ("decision/1", "run") if control else ("input", "output")
        node = f"step/{step}" if step else first if down else last
        parameters |= {"node": node, "direction": direction, "depth": depth}
    answer = ask(f"/runs/{quote(run_id, safe='')}/lineage", parameters)
    if as_json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    _print(answer, direction, depth)


def _print(answer: dict[str, Any], direction: str, depth: int) -> None:
    terminal = console()
    drawn = _Drawn(answer)
    if answer["node"] is None:
        terminal.print(*drawn.whole(), sep="\n")
        direction = ""
    for word, is_up in (("comes from", True), ("goes into", False)):
        if direction in ("both", "up" if is_up else "down"):
            terminal.print(drawn.tree(word, is_up=is_up))
    if not answer["edges"]:
        say("Nothing is known to be connected with it (yet).")
    if drawn.deepest >= depth:
        say(f"… and maybe more: --depth {depth * 2}")
    if answer["truncated"]:
        say("There is more than one answer holds: begin at a step, RUN/STEP.")


class _Drawn:
    """An answer on its way to trees. `deepest`: how deep they are."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._run, self._start = answer["run_id"], answer["node"]
        self._nodes = {node["id"]: node for node in answer["nodes"]}
        self._edges = answer["edges"]
        self.deepest = 0

    def tree(self, word: str, *, is_up: bool) -> "Tree":
        """Return the tree of what is above or below the node that was asked about; each node's branches stand once."""
        from rich.tree import Tree  # noqa: PLC0415 - 0.1 s

        around = self._around(is_up=is_up)
        level = {self._start: 0}
        queue = [self._start]
        for node in queue:
            for other in around.get(node, ()):
                if other not in level:
                    level[other] = level[node] + 1
                    queue.append(other)
        self.deepest = max(self.deepest, *level.values())
        root = Tree(f"{self._name(self._start)} [dim]{word}[/]", guide_style="dim")
        # Each node's branches are drawn where it is nearest to the root: what is far away comes last.
        branches = {self._start: root}
        for node in queue:
            for other, edges in around.get(node, {}).items():
                first = other not in branches and level[other] == level[node] + 1
                more = "" if first or other not in around else " [dim]…[/]"
                branch = branches[node].add(f"{self._name(other)}{_uses(edges)}{more}")
                if first:
                    branches[other] = branch
        return root

    def whole(self) -> "list[Tree]":
        """Return a tree for each decision, in their order, as far as the next ones; so no tree is deep, however long the run.

        What follows from nothing that is told here, the request above all, has a tree as well.
        """
        from rich.tree import Tree  # noqa: PLC0415

        around, led_to = self._around(is_up=False), self._around(is_up=True)
        own = f"decision/{self._run}/"
        starts = [node for node in self._nodes if node not in led_to or (node in around and node.startswith(own))]
        starts.sort(key=lambda node: node.startswith(own))
        trees = [Tree(f"{self._name(node)}{' [dim]leads to[/]' * (node in around)}", guide_style="dim") for node in starts]
        queue = list(zip(starts, trees, strict=True))
        for node, tree in queue:
            for other, edges in around.get(node, {}).items():
                branch = tree.add(f"{self._name(other)}{_uses(edges)}")
                if not other.startswith(own):
                    queue.append((other, branch))
        return trees

    def _around(self, *, is_up: bool) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Return for each node those above it, or below it, with the edges between them."""
        near, far = ("target", "source") if is_up else ("source", "target")
        around: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for edge in self._edges:
            around.setdefault(edge[near], {}).setdefault(edge[far], []).append(edge)
        return around

    def _name(self, node: str) -> str:
        from rich.markup import escape  # noqa: PLC0415

        known = self._nodes[node]
        kind, run_id, detail = known["kind"], known["run_id"], known["detail"]
        name = known["name"] if kind not in ("input", "output") else f"the run's {kind}"
        elsewhere = f" of run {run_id[:_SHORT]}" if run_id and run_id != self._run else ""
        word = kind if kind in ("request", "file", "payload", "call", "run") else ""
        if kind == "decision":
            word = f"decision {node.rpartition('/')[2]}"
        told = [known["status"], detail.get("model") or detail.get("tool") or detail.get("workflow")] if kind == "step" else []
        if times := detail.get("times"):
            told.append(f"{times:,} of them")
        about = ", ".join(each for each in told if each)
        word = f"{word} " if word else ""
        return f"{word}[bold]{escape(name)}[/]{elsewhere}" + (f" [dim]({escape(about)})[/]" if about else "")


def _uses(edges: list[dict[str, Any]]) -> str:
    """Say what was used for what."""
    from rich.markup import escape  # noqa: PLC0415

    texts = dict.fromkeys(_use(edge) for edge in edges)
    shown = [each for each in texts if each][:_MOST_USES]
    rest = f" and {len(texts) - len(shown)} more" if len(texts) > len(shown) and shown else ""
    return f"  [cyan]{escape(', '.join(shown))}{rest}[/]" if shown else ""


def _use(edge: dict[str, Any]) -> str:
    if edge["kind"] == "causes":
        return str(edge["into"])
    if edge["kind"] == "copies":
        return "copied"
    text = " → ".join(filter(None, (edge["of"], edge["into"]))) if edge["of"] != edge["into"] else edge["of"]
    return f"({text})" if edge["kind"] == "gates" else str(text)
