"""What the API answers about a run read again from its log. Times are UTC, payloads JSON values."""

from typing import Any, Final

from pydantic import ConfigDict, Field

from api.models import Answer, Time

_RUN: Final = "8f6a3a7e-6d0b-5f0e-9c56-0a5a3c1b7d42"
_CHANGE: Final[dict[str, Any]] = {"what": "steps.ask.status", "before": "running", "after": "completed"}
_STATE: Final[dict[str, Any]] = {
    "run_id": _RUN,
    "seq": 2,
    "at": "2026-11-21T09:30:01Z",
    "partition": 3,
    "offset": 118,
    "hash": "9d4e1c7a5b20f3886e1f0a4c2b7d9e35",
    "state": {"status": "open", "steps": {"ask": {"status": "completed", "attempt": 1, "output": "yes"}}},
    "changes": [_CHANGE],
}
_FINDING: Final[dict[str, Any]] = {
    "kind": "rewritten",
    "problem": "effects[0].output: recorded is 2, decided again it is 1",
    "cause": "the record was rewritten and the chain behind it recomputed",
    "partition": 3,
    "offset": 118,
    "seq": 2,
    "field": "effects[0].output",
    "recorded": "2",
    "again": "1",
}
_VERIFICATION: Final[dict[str, Any]] = {
    "run_id": _RUN,
    "whole": True,
    "complete": True,
    "decisions": 14,
    "decided_again": 14,
    "passed_over": {},
    "lacking": {},
    "findings": [],
}


def _like(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="ignore", json_schema_extra={"examples": [example]})


class Change(Answer):
    """A part of the state that the decision changed; null: it was not there before, or is no more."""

    model_config = _like(_CHANGE)

    what: str = Field(description="`status`, `output`, `steps.PATH.status`, …")
    before: Any
    after: Any


class RunState(Answer):
    """A run as one of its decisions left it, folded from the topic now."""

    model_config = _like(_STATE)

    run_id: str
    seq: int
    at: Time
    partition: int
    offset: int
    hash: str
    state: dict[str, Any] = Field(description="The run's parts, and under `steps` its steps by path.")
    changes: list[Change] = Field(description="What this decision changed.")


class VerificationFinding(Answer):
    """Something that no honest writer can cause, and what has probably happened."""

    model_config = _like(_FINDING)

    kind: str
    problem: str
    cause: str
    partition: int
    offset: int
    seq: int | None
    field: str | None
    recorded: str | None
    again: str | None


class Verification(Answer):
    """Whether a run is what was decided, checked now from the topic. `whole`: nothing was found.

    `complete`: all of it could be decided again; else `lacking` says what is missing.
    """

    model_config = _like(_VERIFICATION)

    run_id: str
    whole: bool
    complete: bool
    decisions: int
    decided_again: int
    passed_over: dict[str, int]
    lacking: dict[str, str]
    findings: list[VerificationFinding]
