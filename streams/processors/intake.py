"""Intake: checks requests and turns them into what runs receive, or into dead letters that say why not.

`Intake.check` is the whole judgement; its only I/O is that large payloads go to the store. What reads and writes Kafka around it
is in intake_loop.py.
"""

from collections.abc import Iterator
from dataclasses import field, replace
from typing import Any, Final, Protocol

from events import topics
from events.commands import Command, RequestPlace, RunRequest, SignalReceived, StartRun, WorkflowRequest
from events.failure import Failure, FailureKind
from events.frozen import frozen
from events.ids import position_request_id, run_id
from events.results import ChildRunFailed, InboxMessage, Input
from streams.envelope import Incoming, Outgoing, dead_letter, envelope, redriven_from
from streams.processors.requests import PAYLOADS, RefusedError, decode, nearest
from streams.workflow.expressions import EvaluationError
from streams.workflow.payloads import NoPayloads, Payloads, PayloadTooLargeError, inlined
from streams.workflow.plan import Frame
from streams.workflow.spec import WorkflowSpec

SOURCE: Final = "intake"
_SAID_CHARS: Final = 2000
"""How much of a refusal the run hears that asked for another one; the dead letter has all of it."""


class Specs(Protocol):
    """Where intake finds workflow versions."""

    def get(self, version: str) -> WorkflowSpec | None: ...  # noqa: D102
    def newest(self, workflow: str) -> WorkflowSpec | None: ...  # noqa: D102
    def names(self) -> list[str]: ...  # noqa: D102
    def refresh(self) -> None: ...  # noqa: D102


@frozen
class Intake:
    """Judges requests of one topic, whose id (16 bytes) names requests that bring no id. `payloads`: where large ones go."""

    specs: Specs
    topic_id: bytes
    payloads: Payloads = field(default_factory=NoPayloads)

    def check(self, record: Incoming) -> list[Outgoing]:
        """Return what a request becomes: a run's StartRun, a command for one, or the dead letter that says why neither.

        Raises what storing a payload raises when the store can't be used.
        """
        # Redriven twice, it is still one request. Who writes such a header could as well choose the request's id.
        first = redriven_from(record.topic, record.headers)
        place = position_request_id(self.topic_id, *(first or (record.partition, record.offset)))
        request: WorkflowRequest | RunRequest | None = None
        try:
            request = decode(record.value)
            if isinstance(request, RunRequest):
                run = request.run_id or run_id(request.request_id or "")
                said = RequestPlace(self.topic_id, record.partition, record.offset)
                return [_inbox(run, self._command(request.command, place), place, said)]
            start = self._start(request, request.request_id or place)
            run = run_id(start.request_id)
            return [_inbox(run, start, f"{run}/start")]
        except RefusedError as refused:
            if request is not None:
                refused.about(request)
            return _refused(record, refused, place)

    def _command(self, command: Command, place: str) -> Command:
        """Return a command as its run receives it."""
        if isinstance(command, SignalReceived) and not command.signal_id:
            command = replace(command, signal_id=place)
        payloads: dict[str, Any] = {
            name: self._kept(name, text)
            for name in PAYLOADS & set(command.__dataclass_fields__)
            if (text := getattr(command, name)) is not None
        }
        return replace(command, **payloads)

    def _start(self, request: WorkflowRequest, identity: str) -> StartRun:
        spec = self._spec(request)
        for step in request.break_at:
            if spec.plan.place(step) is None and step not in (paths := tuple(_paths(spec.plan.root))):
                raise RefusedError("unknown_step", nearest("break_at: there is no step", step, paths))
        return StartRun(
            identity,
            spec.name,
            spec.digest,
            self._input(spec, request.input),
            request.labels,
            request.parent,
            tuple(dict.fromkeys(request.break_at)),
            request.origin,
            request.copied,
        )

    def _spec(self, request: WorkflowRequest) -> WorkflowSpec:
        if (self.specs.get(request.digest) if request.digest else self.specs.newest(request.workflow)) is None:
            self.specs.refresh()  # it may have been registered a moment ago
        if request.digest:
            spec = self.specs.get(request.digest)
            if spec is None or spec.name != request.workflow:
                raise RefusedError("unknown_workflow", f"workflow `{request.workflow}` has no version {request.digest}")
            return spec
        spec = self.specs.newest(request.workflow)
        if spec is None:
            raise RefusedError("unknown_workflow", nearest("no workflow is called", request.workflow, self.specs.names()))
        return spec

    def _input(self, spec: WorkflowSpec, text: str) -> str:
        try:
            value, problems = spec.check_input(text)
        except EvaluationError as error:
            raise RefusedError("invalid_input", f"input: {error}") from error
        if problems:
            raise RefusedError("invalid_input", "; ".join(problems[:10]))
        return self._kept("input", value)

    def _kept(self, what: str, text: str) -> str:
        """Return a payload, or the reference to it where it is too large for an event."""
        try:
            return inlined(text, self.payloads)
        except PayloadTooLargeError as error:
            raise RefusedError("too_large", f"`{what}`: {error}") from error


def _inbox(run: str, cause: Input, identity: str, said: RequestPlace | None = None) -> Outgoing:
    return envelope(topics.INBOX, run, InboxMessage(run, cause, said), source=SOURCE, identity=identity, run_id=run)


def _refused(record: Incoming, refused: RefusedError, place: str) -> list[Outgoing]:
    """Return the dead letter, and what the run hears that waits for the one that was asked for."""
    run = refused.run_id or run_id(refused.request_id or place)
    letter = dead_letter(record, refused.reason, str(refused), SOURCE, request_id=refused.request_id, run_id=run)
    parent = refused.parent
    if parent is None:
        return [letter]
    unknown = refused.reason == "unknown_workflow"
    kind = FailureKind.UNKNOWN_WORKFLOW if unknown else FailureKind.INVALID_ARGUMENTS
    failed = ChildRunFailed(parent.call_id, parent.step, run, Failure(kind, str(refused)[:_SAID_CHARS]))
    return [letter, _inbox(parent.run_id, failed, f"{run}/refused")]


def _paths(frame: Frame, around: str = "") -> Iterator[str]:
    """Yield the paths of all steps; without a number they stand for what is done for each item."""
    for name, plan in frame.steps.items():
        yield f"{around}{name}"
        if plan.frame is not None:
            yield from _paths(plan.frame, f"{around}{name}.")
