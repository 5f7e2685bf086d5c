"""Commands: what outsiders and intake ask for. Payloads are JSON; `by` is who says so, as they name themselves."""

from collections.abc import Mapping
from dataclasses import field

from events.frozen import frozen


@frozen
class RequestPlace:
    """Where a command was said: a place on the topic `requests` (its id has 16 bytes)."""

    topic_id: bytes
    partition: int
    offset: int


@frozen
class Parent:
    """The step of another run that waits for this run's result."""

    run_id: str
    step: str
    call_id: str


@frozen
class Origin:
    """Where a fork comes from: another run as its decision number `seq` left it; `head` is that decision's hash, hexadecimal."""

    run_id: str
    seq: int
    head: str


@frozen
class WorkflowRequest:
    """Asks for one run; `input` is JSON. Topic `requests`.

    `break_at`: steps before which it stops; `copied`: a fork's results so far, JSON by step (`output`, `status`, `error`).
    """

    workflow: str
    input: str = "{}"
    request_id: str | None = None
    digest: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    parent: Parent | None = None
    break_at: tuple[str, ...] = ()
    origin: Origin | None = None
    copied: str | None = None


@frozen
class StartRun:
    """Start a run of exactly this version of a workflow; `input` is JSON, defaults filled in. The rest as in WorkflowRequest."""

    request_id: str
    workflow: str
    digest: str
    input: str
    labels: Mapping[str, str] = field(default_factory=dict)
    parent: Parent | None = None
    break_at: tuple[str, ...] = ()
    origin: Origin | None = None
    copied: str | None = None


@frozen
class SignalReceived:
    """Somebody tells a run something; it is kept until a step waits for it. The same `signal_id` counts once."""

    signal_id: str
    name: str
    correlation: str | None
    payload: str
    by: str


@frozen
class ApprovalAnswered:
    """Somebody approved or rejected what a step shows; `value`: what they made of it (JSON), None: as it was shown."""

    step: str
    approved: bool
    by: str
    reason: str
    value: str | None


@frozen
class CancelRun:
    """End a run: cancel what is under way, undo what can be undone, clean up. `force`: only the first of these."""

    by: str
    reason: str
    force: bool


@frozen
class CancelStep:
    """Let a step that is under way fail as cancelled."""

    step: str
    by: str
    reason: str


@frozen
class PauseRun:
    """Start nothing more; what is under way goes on, and its results are taken."""

    by: str
    reason: str


@frozen
class PauseStep:
    """Stop before a step's next attempt; the rest of the run goes on."""

    step: str
    by: str
    reason: str


@frozen
class ResumeRun:
    """Start all that was held. `single`: and hold what comes next."""

    by: str
    single: bool


@frozen
class ResumeStep:
    """Start a step that was held, and hold it no more."""

    step: str
    by: str


@frozen
class ChangeOutput:
    """Replace a step's output (JSON). A step that is not settled is completed by it, without its call."""

    step: str
    output: str
    by: str
    reason: str


Command = (
    SignalReceived | ApprovalAnswered | CancelRun | CancelStep | PauseRun | PauseStep | ResumeRun | ResumeStep | ChangeOutput
)
"""What people and other systems say to a run that exists."""


@frozen
class RunRequest:
    """Says something to a run, named by its id or by its request's. Topic `requests`."""

    run_id: str | None
    request_id: str | None
    command: Command


@frozen
class WorkflowRegistered:
    """A version of a workflow; `spec` is its canonical JSON. Topic `specs`, key `digest`.

    `current` False: for those who name it by its digest (a fork's changed prompt), never the newest of its name.
    """

    name: str
    digest: str
    spec: str
    current: bool = True
