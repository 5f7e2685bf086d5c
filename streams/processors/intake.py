"""Intake: checks requests and turns them into what runs receive, or into dead letters that say why not.

`Intake.check` is the whole judgement; its only I/O is that large payloads go to the store. The Faust agent around it produces
what it returns and acknowledges a request when the broker has acknowledged that. No error is left to Faust: it would start the
agent anew behind the request, which would be lost, and wait for that one for ever when the process is to end.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import faust
import structlog

from events import codec, topics
from events.commands import Command, RequestPlace, RunRequest, SignalReceived, StartRun, WorkflowRequest
from events.errors import NewerCodeError
from events.failure import Failure, FailureKind
from events.ids import position_request_id, run_id
from events.results import ChildRunFailed, InboxMessage, Input
from streams import header_names, kafka
from streams.envelope import Incoming, Outgoing, dead_letter, envelope, redriven_from
from streams.payloads import PayloadStore, PayloadStoreError
from streams.processors.requests import PAYLOADS, RefusedError, decode, nearest
from streams.processors.watchdog import Progress
from streams.schemas import Schemas
from streams.settings import Settings
from streams.workflow.expressions import EvaluationError, clean_text
from streams.workflow.payloads import NoPayloads, Payloads, PayloadTooLargeError, inlined
from streams.workflow.plan import Frame
from streams.workflow.spec import WorkflowSpec

log = structlog.get_logger()

SOURCE: Final = "intake"
_SAID_CHARS: Final = 2000
"""How much of a refusal the run hears that asked for another one; the dead letter has all of it."""
_LARGE_BYTES: Final = 64 * 1024
"""From which size on a request is judged in a thread: storing its payload takes long."""
_RETRY_S: Final = 1.0
_LOOK_S: Final = 0.005
"""How often to look for acknowledgements under load. Nothing waits for that but the committed offset."""


class Specs(Protocol):
    """Where intake finds workflow versions."""

    def get(self, version: str) -> WorkflowSpec | None: ...  # noqa: D102
    def newest(self, workflow: str) -> WorkflowSpec | None: ...  # noqa: D102
    def names(self) -> list[str]: ...  # noqa: D102
    def refresh(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
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


# --- The Faust agent ---


@dataclass(slots=True)
class _Pending:
    """A request whose results are not acknowledged yet; `records`: how many there are."""

    event: Any
    acks: kafka.Acks
    records: int


@dataclass(slots=True)
class _Taken:
    """How far the agent has come: the next offset by partition, and whether it waits for the payload store or Kafka."""

    offsets: dict[int, int] = field(default_factory=dict)
    begun: bool = False
    waits: bool = False


def attach(
    app: faust.App, settings: Settings, prepare: Callable[[], tuple[Intake, Callable[[], None], Any]]
) -> Callable[[], Progress]:
    """Add the intake agent to a Faust app; return what says how far it has come.

    `prepare` connects and returns the judge, what takes in new workflow versions, and a producer.
    """
    taken = _Taken()
    header_names.accept_any()  # one consumer reads for all agents of the app
    source = app.topic(kafka.name(settings, topics.REQUESTS), key_serializer="raw", value_serializer="raw", value_type=bytes)

    @app.agent(source, name="intake", concurrency=1)
    async def intake(stream: Any) -> None:
        pending: deque[_Pending] = deque()
        try:
            judge, look, producer = await asyncio.to_thread(prepare)
            judge, schemas = replace(judge, payloads=PayloadStore(settings)), Schemas(settings)
            taken.begun = True
            # Supervised by the app: when a delivery fails, the process ends and the requests are read again.
            app.add_future(_acknowledge(producer, pending))
            async for event in stream.noack().events():
                outgoing = await _judged(judge, look, schemas, _incoming(event.message), taken)
                taken.offsets[event.message.partition] = event.message.offset + 1
                entry = _Pending(event, kafka.Acks(), len(outgoing))
                pending.append(entry)
                for record in outgoing:
                    kafka.produce(producer, settings, record, entry.acks)
                    if record.topic is topics.DEADLETTER:
                        log.warning("intake.refused", partition=event.message.partition, offset=event.message.offset)
        except Exception as error:  # noqa: BLE001 - not swallowed: the process ends by it
            while pending:  # noqa: ASYNC110 - what came before counts; who acknowledges it looks as often
                await asyncio.sleep(_LOOK_S)
            await app.crash(error)
            await asyncio.Event().wait()  # an agent that ends is started anew

    def progress() -> Progress:
        held = app.consumer.assignment() if taken.begun else ()
        positions = {each.partition: taken.offsets.get(each.partition) for each in held if each.topic in source.topics}
        return Progress(positions, taken.waits)

    return progress


async def _judged(judge: Intake, look: Callable[[], None], schemas: Schemas, record: Incoming, taken: _Taken) -> list[Outgoing]:
    """Return what a request becomes; `look` takes in new workflow versions. What nobody foresaw is a dead letter too.

    While its payload can't be stored, or Kafka can't be asked, it waits, and so do those behind it: nothing is lost. Raises
    NewerCodeError.
    """
    while True:
        try:
            look()
            if codec.unknown_schema(record.value) is not None:
                where = f"request {record.topic}/{record.partition}/{record.offset}"
                await asyncio.to_thread(schemas.refuse_newer, where, record.value, WorkflowRequest, RunRequest)
            if len(record.value or b"") > _LARGE_BYTES:
                return await asyncio.to_thread(judge.check, record)
            return judge.check(record)
        except NewerCodeError:
            raise
        except (PayloadStoreError, kafka.KafkaUnreachableError) as error:
            log.warning("intake.waits", partition=record.partition, offset=record.offset, problem=str(error))
            taken.waits = True
            await asyncio.sleep(_RETRY_S)
            taken.waits = False
        except Exception as error:
            log.exception("intake.fault", partition=record.partition, offset=record.offset)
            return [dead_letter(record, "internal", f"a fault of intake, see its log: {clean_text(repr(error))}", SOURCE)]


async def _acknowledge(producer: Any, pending: deque[_Pending]) -> None:
    """Acknowledge requests in order as their results are: out of order, Faust would commit past an open one."""
    while True:
        producer.poll(0)
        while pending and (len(pending[0].acks.offsets) == pending[0].records or pending[0].acks.failure):
            entry = pending.popleft()
            entry.acks.check()
            entry.event.ack()
        await asyncio.sleep(_LOOK_S if pending else 10 * _LOOK_S)


def _incoming(message: Any) -> Incoming:
    headers = message.headers or {}
    pairs = headers.items() if isinstance(headers, dict) else headers
    return Incoming(
        message.topic,
        message.partition,
        message.offset,
        round(message.timestamp * 1000),
        message.key,
        message.value,
        dict(pairs),
    )
