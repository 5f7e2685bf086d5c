"""What the API answers about lineage."""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from api.models import Answer, Time, withheld

_RUN: Final = "8f6a3a7e-6d0b-5f0e-9c56-0a5a3c1b7d42"
_NODE: Final[dict[str, Any]] = {
    "id": f"step/{_RUN}/clean",
    "kind": "step",
    "name": "clean",
    "run_id": _RUN,
    "status": "completed",
    "started": "2026-11-21T09:30:01.310Z",
    "ended": "2026-11-21T09:30:01.342Z",
    "detail": {"kind": "tool", "tool": "clean_prices", "attempt": 1},
}
_EDGE: Final[dict[str, Any]] = {
    "source": f"step/{_RUN}/fetch",
    "target": f"step/{_RUN}/clean",
    "kind": "feeds",
    "of": "output.rows",
    "into": "arguments.rows",
}
_LINEAGE: Final[dict[str, Any]] = {
    "run_id": _RUN,
    "node": f"step/{_RUN}/clean",
    "truncated": False,
    "nodes": [_NODE, _NODE | {"id": f"step/{_RUN}/fetch", "name": "fetch"}],
    "edges": [_EDGE],
}


def _detail(value: dict[str, Any]) -> dict[str, Any]:
    return {name: withheld(each) if name == "failure_message" else each for name, each in value.items()}


NodeKind = Literal["request", "run", "input", "output", "step", "call", "decision", "file", "payload"]


class LineageNode(Answer):
    """One thing. Its id never changes: it is made of its kind and where it is, as in `step/RUN/PATH`."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_NODE]})

    id: str
    kind: NodeKind
    name: str
    run_id: str | None
    status: str | None
    started: Time | None
    ended: Time | None
    detail: Annotated[dict[str, Any], BeforeValidator(_detail)] = Field(
        description="What else is known. `times`: it stands for so many items or iterations; only auditors see `failure_message`."
    )


class LineageEdge(Answer):
    """From `source` to `target`. `of`: which part of the source; `into`: what of the target it is used for."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_EDGE]})

    source: str
    target: str
    kind: Literal["causes", "feeds", "gates", "copies"] = Field(
        description="`causes`: an event led to another one; `feeds`: a value went into another one; `gates`: it decided "
        "whether or how  the target happens, and put nothing into it; `copies`: a fork took a result over."
    )
    of: str = Field(examples=["output.rows"])
    into: str = Field(examples=["arguments.rows"])


class Lineage(Answer):
    """Nodes and the edges between them. `truncated`: there is more than an answer holds."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_LINEAGE]})

    run_id: str
    node: str | None
    truncated: bool
    nodes: list[LineageNode]
    edges: list[LineageEdge]
