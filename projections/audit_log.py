"""What an audit report takes from the log itself: prompts, arguments and answers, and what people said, which no view holds.

A run's records are read once, in order, through the shared filter; only what the report shows is kept of them.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import Command, RequestPlace
from events.decisions import Decision, InputIgnored
from events.errors import NewerCodeError
from events.ids import effect_id
from events.results import LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from projections.replay import FitsNoStateError, moments
from projections.replay_sources import Source, Span

Request = LlmCallRequested | ToolCallRequested
Answer = LlmCallCompleted | LlmCallFailed | ToolCallCompleted | ToolCallFailed
FIRST, LAST = 100, 50
"""How many of the things that were said to a run are kept from its beginning and from its end."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Something that was said to a run. `at`: milliseconds since the epoch; `ignored`: why it changed nothing."""

    seq: int
    at: int
    command: Command
    ignored: str | None
    said: RequestPlace | None


@dataclass(slots=True)
class Told:
    """What the log told. `first`: the run's first decision; `stopped`: why it could not be read to its end.

    `heard` of all things said to the run, of which the first and the last are in `early` and `late`.
    """

    first: Decision | None = None
    head: str = ""
    seq: int = 0
    requests: dict[str, Request] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    heard: int = 0
    early: list[Heard] = field(default_factory=list)
    late: deque[Heard] = field(default_factory=lambda: deque(maxlen=LAST))
    stopped: str | None = None


def told(source: Source, run_id: str, spans: Mapping[int, Span], calls: Collection[str]) -> Told:
    """Read a run. `spans`: where it stands; `calls`: ids of those whose contents are wanted. Raises what reading raises."""
    found = Told()
    try:
        for moment in moments(source, run_id, spans):
            _take(found, moment.decision, moment.hash, calls)
    except (FitsNoStateError, NewerCodeError) as error:
        found.stopped = str(error)
    return found


_COMMANDS: Final[tuple[type[Any], ...]] = Command.__args__


def _take(found: Told, decision: Decision, hashed: bytes, calls: Collection[str]) -> None:
    found.first = found.first or decision
    found.head, found.seq = hashed.hex(), decision.seq
    for index, effect in enumerate(decision.effects):
        if isinstance(effect, Request) and (identity := effect_id(hashed, index)) in calls:
            found.requests[identity] = effect
    cause = decision.input
    if isinstance(cause, Answer):
        if cause.call_id in calls:
            found.answers.setdefault(cause.call_id, cause)
    elif isinstance(cause, _COMMANDS):
        ignored = next((effect.reason for effect in decision.effects if isinstance(effect, InputIgnored)), None)
        heard = Heard(decision.seq, decision.at, cause, ignored, decision.said)
        found.heard += 1
        if len(found.early) < FIRST:
            found.early.append(heard)
        else:
            found.late.append(heard)
