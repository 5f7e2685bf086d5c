"""A decision in the making: its effects so far, the state that they lead to, and what expressions give on that state."""

from typing import Final

from events.decisions import Effect, InputIgnored, UnreadableInput
from events.failure import Failure, FailureKind
from events.results import Input
from streams.workflow.evolve import Draft
from streams.workflow.expressions import EvaluationError, Expression, Json, Value, from_json
from streams.workflow.payloads import INLINE_BYTES, Payloads, utf8_size
from streams.workflow.plan import Place, Plan
from streams.workflow.scopes import scope
from streams.workflow.state import RunState, StepState
from streams.workflow.templates import Template

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""Largest JSON text in an input. What is larger goes through the payload store."""
SHARED_BYTES: Final = 1024
"""An argument that is the same for all items, and larger than this, is kept once, as a payload."""
FULL_BYTES: Final = 512 * 1024
FULL_EFFECTS: Final = 1000
"""What one decision holds before a loop goes on in the next one; and before whatever is larger than SHARED_BYTES is a payload."""
NO_HASH: Final = bytes(32)


class Making:
    """One decision in the making: the effects so far, the state that they lead to, and what expressions give on it."""

    def __init__(self, plan: Plan, state: RunState, cause: Input | UnreadableInput, at: int, payloads: Payloads) -> None:
        self.plan, self.before, self.at, self.payloads = plan, state, at, payloads
        self.state = Draft(state, cause, at)
        self.found: list[Effect] = []
        self.bytes = 0  # of JSON in the effects so far
        self.requested: set[str] = set()  # steps whose call this decision requests: its id is not known yet

    def add(self, effect: Effect) -> None:
        """Record an effect and advance the state by it."""
        self.state.apply(effect, NO_HASH, len(self.found))
        self.found.append(effect)

    def ignore(self, reason: str) -> None:
        """Record that the input changes nothing."""
        self.add(InputIgnored(reason))

    @property
    def full(self) -> bool:
        """Whether the decision holds so much that a loop should go on in the next one."""
        return len(self.found) > FULL_EFFECTS or self.bytes > FULL_BYTES

    def step(self, path: str) -> StepState | None:
        """Return the state of a step."""
        return self.state.steps.get(path)

    def settled(self, path: str) -> bool:
        """Whether a step has settled."""
        step = self.state.steps.get(path)
        return step is not None and step.settled

    # --- What expressions give ---

    def evaluate(self, place: Place, part: Value, **extra: Json) -> str:
        """Return a value as JSON: itself, or the reference to it. Raises EvaluationError, PayloadError."""
        return self.inlined(part.evaluate(scope(self.state, place, part, self.payloads, extra)))

    def holds(self, place: Place, part: Expression, **extra: Json) -> bool:
        """Return whether a condition is met. Raises EvaluationError, PayloadError."""
        return part.holds(scope(self.state, place, part, self.payloads, extra))

    def render(self, place: Place, part: Template) -> str:
        """Return a text. Raises EvaluationError, PayloadError."""
        return part.render(scope(self.state, place, part, self.payloads, {}))

    def inlined(self, text: str) -> str:
        """Return a JSON text itself, or the reference to it when the text, or the decision so far, is large."""
        size = utf8_size(text)
        if size > (SHARED_BYTES if self.bytes > FULL_BYTES else INLINE_BYTES):
            return self.payloads.put(text)
        self.bytes += size
        return text


def unusable(text: str, what: str = "the output") -> Failure | None:
    """Return what is wrong with a JSON text that somebody sent; None if nothing is."""
    if (size := utf8_size(text)) > MAX_PAYLOAD_BYTES:
        return too_large(what, size)
    try:
        from_json(text)
    except EvaluationError as error:
        return Failure(FailureKind.INVALID_OUTPUT, str(error))
    return None


def too_large(what: str, size: int) -> Failure:
    """Return the failure of what is larger than an input may be."""
    return Failure(FailureKind.TOO_LARGE, f"{what} is too large: {size:,} bytes; the limit is {MAX_PAYLOAD_BYTES:,}")


__all__ = ["MAX_PAYLOAD_BYTES", "SHARED_BYTES", "Making", "too_large", "unusable"]
