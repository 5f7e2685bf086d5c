"""Commands: what outsiders and intake ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WorkflowRequest:
    """Asks for one run; `input` is JSON. Topic `requests`."""

    workflow: str
    input: str = "{}"
    request_id: str | None = None
    digest: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartRun:
    """Start a run of exactly this version of a workflow; `input` is JSON, defaults filled in."""

    request_id: str
    workflow: str
    digest: str
    input: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkflowRegistered:
    """A version of a workflow; `spec` is its canonical JSON. Topic `specs`, key `digest`."""

    name: str
    digest: str
    spec: str
