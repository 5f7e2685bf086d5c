"""Deciding again: whether a recorded decision is what follows from its input, and if not, the first field that differs.

Nothing is done: what a decision asks for is only compared, and the payloads that it would keep are held in memory.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from events import codec
from events.commands import StartRun
from events.decisions import Decision, Effect, InputIgnored, RunFailed, UnreadableInput
from events.failure import FailureKind
from streams.workflow.decider import decide
from streams.workflow.expressions import EvaluationError, from_json, to_json
from streams.workflow.payloads import PayloadError, digest_of, inlined, reference, resolve
from streams.workflow.spec import WorkflowSpec, from_canonical
from streams.workflow.state import RunState

_SHOWN: Final = 300


class CannotDecideError(Exception):
    """A decision can't be made again here. `lacks`: `spec` or `payload`."""

    def __init__(self, lacks: str, message: str) -> None:
        super().__init__(message)
        self.lacks = lacks


class Kept(Protocol):
    """What holds payloads, to be read only."""

    def get(self, digest: str) -> str:
        """Return a payload. Raises PayloadError."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first field in which two versions of a decision differ: `effects[1].arguments.url`. `recorded`, `again`: its values."""

    field: str
    recorded: str
    again: str


@dataclass(eq=False, slots=True)
class Aside:
    """The payloads that are kept, and beside them those that deciding again would keep: nothing is written."""

    kept: Kept
    _put: dict[str, str] = field(default_factory=dict)

    def get(self, digest: str) -> str:
        """Return a payload. Raises PayloadError."""
        text = self._put.get(digest)
        return self.kept.get(digest) if text is None else text

    def put(self, text: str) -> str:
        """Hold a payload until `clear` and return the reference to it. Raises PayloadTooLargeError."""
        named = reference(text)
        self._put[digest_of(text.encode())] = text
        return named

    def clear(self) -> None:
        """Forget what was put."""
        self._put.clear()


@dataclass(slots=True)
class Specs:
    """Versions of workflows by digest, each compiled when it is first needed."""

    canonical: Mapping[str, str]
    _compiled: dict[str, WorkflowSpec | None] = field(default_factory=dict)

    def get(self, digest: str) -> WorkflowSpec | None:
        """Return a version; None: it isn't known, or is no definition to this code."""
        if digest not in self._compiled:
            try:
                self._compiled[digest] = from_canonical(self.canonical[digest])
            except Exception:  # noqa: BLE001 - what stands on a topic may be anything
                self._compiled[digest] = None
        return self._compiled[digest]


def stands_in(decision: Decision) -> bool:
    """Say whether a decision stands for one that could not be made or written: that it was so can't be decided again."""
    if not decision.effects or type(decision.effects[-1]) is not RunFailed:
        return False
    match decision.input, decision.effects:
        case UnreadableInput(), (InputIgnored(), RunFailed()):
            return True
        case _, (RunFailed(step=None, failure=failure),) if failure.kind == FailureKind.UNKNOWN_WORKFLOW:
            return True
        case _:
            return False


def decided_again(spec: WorkflowSpec | None, state: RunState, decision: Decision, payloads: Aside) -> tuple[Effect, ...]:
    """Return what follows from a decision's input. Raises CannotDecideError, and whatever `decide` raises for a forged state."""
    if stands_in(decision):
        if isinstance(decision.input, UnreadableInput):
            return decision.effects
        spec = None
    elif spec is None:
        digest = decision.input.digest if isinstance(decision.input, StartRun) else state.digest
        raise CannotDecideError("spec", f"version {digest[:12]} of the workflow isn't known here")
    try:
        return decide(spec, state, decision.input, decision.at, payloads, decision.said)
    except PayloadError as error:
        raise CannotDecideError("payload", str(error)) from error


def with_defaults(spec: WorkflowSpec, decision: Decision, payloads: Aside) -> Decision:
    """Return a decision as another version would have it: that version's defaults are filled into the run's input.

    Raises ValueError if it refuses the input, and CannotDecideError.
    """
    cause = decision.input
    if not isinstance(cause, StartRun) or cause.digest == spec.digest:
        return decision
    try:
        text, problems = spec.check_input(to_json(resolve(cause.input, payloads)))
    except PayloadError as error:
        raise CannotDecideError("payload", str(error)) from error
    if problems:
        raise ValueError("; ".join(problems[:5]))
    return replace(decision, input=replace(cause, input=inlined(text, payloads)))


def difference(decision: Decision, value: bytes, effects: tuple[Effect, ...]) -> Difference | None:
    """Compare a recorded decision with what was decided again, byte for byte; None: they are the same.

    `value`: the record's, in whatever schema it was written; in an older one the contents are compared.
    """
    again = decision if effects == decision.effects else replace(decision, effects=effects)
    if codec.is_current(value, Decision):
        if codec.body(again) == codec.unframed(value):
            return None
    elif again is decision:
        return None
    return first_difference(decision.effects, effects, "effects") or Difference(
        "bytes", "the same contents, in bytes that no encoder writes", ""
    )


def first_difference(recorded: Any, again: Any, where: str) -> Difference | None:
    """Return where two values differ first, inside of events and of JSON texts; None: they don't."""
    if recorded == again:
        return None
    if isinstance(recorded, tuple | list) and isinstance(again, tuple | list):
        for index, (one, other) in enumerate(zip(recorded, again, strict=False)):
            if found := first_difference(one, other, f"{where}[{index}]"):
                return found
        more = f"{where}[{min(len(recorded), len(again))}]"
        return Difference(more, _ended(recorded, again), _ended(again, recorded))
    if isinstance(recorded, dict) and isinstance(again, dict):
        for key in dict.fromkeys((*recorded, *again)):
            if key not in recorded or key not in again:
                return Difference(f"{where}.{key}", _item(recorded, key), _item(again, key))
            if found := first_difference(recorded[key], again[key], f"{where}.{key}"):
                return found
    if dataclasses.is_dataclass(recorded) and type(recorded) is type(again):
        for each in dataclasses.fields(recorded):
            one, other = getattr(recorded, each.name), getattr(again, each.name)
            if found := first_difference(one, other, f"{where}.{each.name}"):
                return found
    if isinstance(recorded, str) and isinstance(again, str):
        one, other = _parsed(recorded), _parsed(again)
        if one != other and type(one) is type(other) and isinstance(one, dict | list):
            return first_difference(one, other, where)
    return Difference(where, shown(recorded), shown(again))


def shown(value: Any) -> str:
    """Return a value on one line, not too long: an event as its type with its fields, anything else as JSON or its text."""
    if dataclasses.is_dataclass(value):
        told = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
        fields = ", ".join(f"{name}={shown(part)}" for name, part in told if part not in (None, (), ""))
        text = f"{type(value).__name__}({fields})"
    elif isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = to_json(value)
        except Exception:  # noqa: BLE001 - parts of an event
            text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _parsed(text: str) -> Any:
    try:
        return from_json(text)
    except EvaluationError:
        return None


def _ended(these: Any, others: Any) -> str:
    return shown(these[len(others)]) if len(these) > len(others) else "nothing"


def _item(found: dict[str, Any], key: str) -> str:
    return shown(found[key]) if key in found else "nothing"
