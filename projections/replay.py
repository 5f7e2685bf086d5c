"""One run, read again from its log: the state after each decision, and what each changed. Nothing is done and nothing written."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from events import codec
from events.as_json import as_json, payload
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from events.topics import partition_for
from projections.replay_sources import Source, Span
from streams.workflow.chain import Chain, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.state import INITIAL, RunEvent, RunState, StepState


@dataclass(frozen=True, slots=True)
class Moment:
    """A run as one of its decisions left it; `before`: as it found it."""

    partition: int
    offset: int
    decision: Decision
    hash: bytes
    before: RunState
    after: RunState


@dataclass(frozen=True, slots=True)
class Change:
    """A part of the state that a decision changed: `status`, `steps.ask.status`, … None: it was not there, or is no more."""

    what: str
    before: Any
    after: Any


class FitsNoStateError(Exception):
    """A decision that extends the chain, and can't have been decided in its run's state."""


def moments(source: Source, run_id: str, spans: Mapping[int, Span] | None = None) -> Iterator[Moment]:
    """Yield a run's decisions that count, in order, each with the state before and after it.

    `spans`: where to look, if less than everything. Raises FitsNoStateError, NewerCodeError, and what reading the source raises.
    """
    wanted, state = run_id.encode(), INITIAL
    for partition, span in _places(source, run_id, spans).items():
        chain = Chain()
        for record in source.records(partition, span):
            value = record.value
            if not value or wanted not in value:  # passed over before it is decoded: a run's id stands in its records as it is
                continue
            try:
                decision = codec.decode(value, Decision)
            except NotDecodableError:
                source.refuse_newer(f"decision {record.offset} (run {run_id})", value)
                continue
            hashed = chain_hash(codec.unframed(value))
            if decision.run_id != run_id or chain.judge(record.offset, decision, hashed) is not Verdict.ACCEPTED:
                continue
            try:
                after = evolve(state, RunEvent(decision, hashed))
            except Exception as error:
                raise FitsNoStateError(f"decision {decision.seq} (offset {record.offset}) fits no state: {error!r}") from error
            yield Moment(partition, record.offset, decision, hashed, state, after)
            state = after
            if state.over:
                return


def _places(source: Source, run_id: str, spans: Mapping[int, Span] | None) -> Mapping[int, Span]:
    if spans is not None:
        return spans
    found, count = source.spans(), source.whole_topic
    if count is None:
        return found
    mine = partition_for(run_id.encode(), count)
    return {mine: found[mine]} if mine in found else {}


_PARTS: Final = (
    *("status", "workflow", "digest", "input", "output", "failure", "paused", "stops", "closing", "limit", "parent"),
    *("listening", "signals", "not_undone"),
)
"""What of a run's state is shown beside its steps; the rest is its bookkeeping."""
_ABSENT: Final = object()
"""Not there: an output may be null."""
_STEP: Final = (
    *("status", "attempt", "awaits", "due", "output", "failure", "began", "asked", "next", "total", "done", "failed"),
    "items",
)


def state_json(state: RunState) -> dict[str, Any]:
    """Return a state as JSON: the run's parts, and its steps by path."""
    found = {name: _part(name, getattr(state, name)) for name in _PARTS}
    return {"seq": state.seq, "head": state.head.hex(), **found, "steps": steps_json(state)}


def steps_json(state: RunState) -> dict[str, Any]:
    """Return a state's steps as JSON, by path."""
    return {path: step_json(step) for path, step in sorted(state.steps.items())}


def step_json(step: StepState) -> dict[str, Any]:
    """Return a step as JSON; what it doesn't have is left out."""
    found = {name: getattr(step, name) for name in _STEP}
    return {name: _part(name, value) for name, value in found.items() if value not in (None, "", 0)}


def changes(before: RunState, after: RunState) -> list[Change]:
    """Return what differs between two states of a run: its parts first, then its steps in their order."""
    found = [
        Change(name, _part(name, getattr(before, name)), _part(name, getattr(after, name)))
        for name in _PARTS
        if getattr(before, name) != getattr(after, name)
    ]
    for path in sorted({*before.steps, *after.steps}):
        one, other = before.steps.get(path), after.steps.get(path)
        if one == other:
            continue
        then, now = step_json(one) if one else {}, step_json(other) if other else {}
        found += [
            Change(f"steps.{path}.{name}", then.get(name), now.get(name))
            for name in _STEP
            if then.get(name, _ABSENT) != now.get(name, _ABSENT)
        ]
    return found


def _part(name: str, value: Any) -> Any:
    """Return a part of a state as JSON."""
    match name, value:
        case "due" | "began", int() as at if at:
            return moment(at)
        case "limit", (timer, at):
            return {"timer": timer, "due": moment(at)}
        case "input" | "output" | "items", str() as text:
            return payload(text)
        case "listening", _:
            return [{"signal": signal, "correlation": key, "steps": list(paths)} for (signal, key), paths in value.items()]
        case _, frozenset():
            return sorted(value)
        case _, tuple():
            return [as_json(each) if dataclasses.is_dataclass(each) else each for each in value]
        case _, Enum():
            return value.name.lower()
        case _, None | bool() | int() | str():
            return value
        case _:
            return as_json(value)


def moment(ms: int) -> str:
    """Return a time as ISO 8601 in UTC; one that no calendar has, as it is."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"
