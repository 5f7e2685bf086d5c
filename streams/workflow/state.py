"""The state of a run; how accepted decisions change it is in evolve.py.

Theory. A run begins with the decision on a StartRun and is open until a decision says RunCompleted, RunFailed or RunCancelled. In
between each step goes its own way:

    (unknown) ──call or child run requested──▶ RUNNING ──answer──▶ COMPLETED
        │                                      │    ▲ └─failure for good─▶ FAILED
        │                                   failure │
        │                                      ▼    │ timer
        │                                     WAITING (for the next attempt)
        ├──signal, approval or time awaited──▶ AWAITING_SIGNAL, AWAITING_APPROVAL, SLEEPING ──▶ COMPLETED or FAILED
        ├──it has steps, items, iterations───▶ ENTERED ──all of them settled──▶ COMPLETED or FAILED
        ├──paused, or a breakpoint───────────▶ HELD ──released──▶ as if it had just become ready
        ├──condition not met─────────────────▶ SKIPPED
        └──transform, or copied by a fork────▶ COMPLETED

From every state but the settled ones (COMPLETED, SKIPPED, FAILED, CANCELLED) a step can become CANCELLED, and COMPLETED by an
output that somebody sets. A step is ready when all that it needs is settled. What moves a step is always an effect in a decision;
an input alone changes nothing. Who waits, waits for one certain call or timer, named by the id that derives from its decision's
hash, so the answer to a call of a decision that nobody accepted finds no step.

A run that fails, is cancelled, or has clean-up steps closes first (RunClosing): what was done is undone, latest first, then the
clean-up steps run, then it ends.

Steps are kept by path (see plan.py). Those of a step's own are forgotten when that is settled, and those of an item or iteration
with it, so that a long loop takes no more memory than a short one.
"""

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Final

from immutables import Map

from events.commands import Parent, SignalReceived
from events.decisions import ApprovalRequested, ChildRunRequested, Decision, RunClosing, SignalAwaited, UndoPlanned
from events.failure import Failure
from events.frozen import frozen
from events.ids import FIRST_PREV
from streams.workflow.expressions import EvaluationError, from_json


class RunStatus(Enum):
    """Where a run is."""

    NEW = auto()
    OPEN = auto()
    COMPLETED = auto()
    FAILED = auto()
    CANCELLED = auto()


class StepStatus(Enum):
    """Where a step is; one that isn't ready has no status."""

    RUNNING = "running"
    WAITING = "waiting"
    SLEEPING = "sleeping"
    AWAITING_SIGNAL = "awaiting_signal"
    AWAITING_APPROVAL = "awaiting_approval"
    ENTERED = "entered"
    HELD = "held"
    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"
    CANCELLED = "cancelled"


# Tuples: a set would ask each member for its hash, which is slow, and this is asked often.
SETTLED: Final = (StepStatus.COMPLETED, StepStatus.SKIPPED, StepStatus.FAILED, StepStatus.CANCELLED)
OVER: Final = (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED)
_INDEX: Final = re.compile(r"\[\d+\]")
MOST_PAST: Final = 8
"""How many earlier calls of a step are known as its own."""
MOST_SEEN: Final = 256
"""How many signals a run remembers, so that the same one counts once."""
MOST_FAILURES: Final = 100
"""How many failures of items a step lists."""


@frozen
class StepState:
    """One step.

    `awaits`: id of the call or timer; `due`: when that timer or time limit is up, milliseconds since the epoch, 0: never.
    `output` is JSON; `past` holds the ids of earlier attempts; `began`: when the first attempt was requested. `asked`: the effect
    that says what is awaited. Of a step with steps, items or iterations: `inner` names its steps so far, `next` is the number of
    the next item, `done` and `failed` count what is settled; `items` (JSON) are the `total` items, `shared` (JSON) what their
    arguments have in common. Of a compensation `shared` is all its arguments.
    """

    status: StepStatus
    attempt: int = 0
    awaits: str = ""
    due: int = 0
    output: str | None = None
    failure: Failure | None = None
    past: tuple[str, ...] = ()
    began: int = 0
    asked: SignalAwaited | ApprovalRequested | ChildRunRequested | None = None
    inner: tuple[str, ...] = ()
    next: int = 0
    done: int = 0
    failed: int = 0
    total: int = 0
    items: str | None = None
    shared: str | None = None
    failures: tuple[tuple[int, Failure], ...] = ()

    @property
    def settled(self) -> bool:
        """Whether steps that need this one may go on."""
        return self.status in SETTLED


Undo = tuple[UndoPlanned, Any] | None
"""What can be undone, latest first: the plan for one step, and the rest."""
_NO_STEPS: Final[Map[str, StepState]] = Map()
_NOBODY: Final[Map[tuple[str, str | None], tuple[str, ...]]] = Map()
_NONE_HELD: Final[Map[str, None]] = Map()
_NOTHING_HEARD: Final[Map[tuple[bytes, int], int]] = Map()


@frozen
class RunState:
    """What a run's decisions amount to. `head` is the hash of the last one; `input` and `output` are JSON.

    `limit`: the timer of the run's time limit and when it is due. `listening`: paths that wait for a signal, by its name and
    correlation; `signals`: those that nobody has taken yet; `seen`: ids of the last ones. `stops`: steps with a breakpoint.
    `heard`: the offset of the last command from each partition of `requests` (by the topic's id and the partition).
    """

    status: RunStatus = RunStatus.NEW
    workflow: str = ""
    digest: str = ""
    input: str = "null"
    steps: Map[str, StepState] = _NO_STEPS
    settled: int = 0
    output: str | None = None
    failure: Failure | None = None
    seq: int = 0
    head: bytes = FIRST_PREV
    last_topic_id: bytes = b""
    last_offset: int = -1
    parent: Parent | None = None
    limit: tuple[str, int] | None = None
    paused: bool = False
    stops: frozenset[str] = frozenset()
    held: Map[str, None] = _NONE_HELD
    listening: Map[tuple[str, str | None], tuple[str, ...]] = _NOBODY
    signals: tuple[SignalReceived, ...] = ()
    seen: tuple[str, ...] = ()
    copied: Mapping[str, Any] | None = None
    undo: Undo = None
    closing: RunClosing | None = None
    not_undone: tuple[str, ...] = ()
    heard: Map[tuple[bytes, int], int] = _NOTHING_HEARD

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.status in OVER


INITIAL: Final = RunState()


@frozen
class RunEvent:
    """A decision that its run's chain accepts, with its hash."""

    decision: Decision
    hash: bytes


def owner_path(path: str) -> str | None:
    """Return the path of the step that this is an item or one of the steps of; None: it stands in the workflow itself."""
    if path[-1] == "]":
        return path[: path.rindex("[")]
    if path[-1] == ")":
        return None
    dot = path.rfind(".")
    return path[:dot] if dot >= 0 else None


def unnumbered(path: str) -> str:
    """Return a path without the numbers of items and iterations."""
    return _INDEX.sub("", path)


def undo_path(path: str) -> str:
    """Return the path of what undoes a step."""
    return f"undo({path})"


def undone(path: str) -> str | None:
    """Return the path of the step that this undoes; None: it undoes none."""
    return path[5:-1] if path.startswith("undo(") and path[-1] == ")" else None


def children(steps: Any, path: str) -> list[str]:
    """Return the paths of the steps, items and iterations of a step that are known, in their order."""
    step = steps.get(path)
    if step is None:
        return []
    found = [f"{path}.{name}" for name in step.inner]
    return found + [child for index in range(step.next) if (child := f"{path}[{index}]") in steps]


Copied = tuple[StepStatus, str | None, Failure | None]


def copied_results(text: str) -> dict[str, Copied]:
    """Return the results that a fork brings, by path; what can't be read is left out, so its steps run."""
    try:
        given = from_json(text)
    except EvaluationError:
        return {}
    found: dict[str, Copied] = {}
    for path, each in given.items() if isinstance(given, dict) else ():
        if not isinstance(each, dict) or each.get("status") not in [status.value for status in SETTLED]:
            continue
        error, output = each.get("error"), each.get("output")
        failure = Failure(str(error.get("kind")), str(error.get("message"))) if isinstance(error, dict) else None
        try:
            from_json("null" if output is None else output if isinstance(output, str) else "")
        except EvaluationError:
            continue
        found[path] = StepStatus(each["status"]), output, failure
    return found
