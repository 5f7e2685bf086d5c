"""Intake: checks requests and turns them into `StartRun`, or into dead letters that say why not.

`Intake.check` is the whole judgement, without I/O; the Faust agent around it produces what it returns and acknowledges a request
when the broker has acknowledged that.
"""

import asyncio
import difflib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import faust
import structlog

from events import codec, topics
from events.commands import StartRun, WorkflowRequest
from events.errors import NotDecodableError
from events.ids import position_request_id, run_id
from events.results import InboxMessage
from streams import kafka
from streams.envelope import Incoming, Outgoing, dead_letter, envelope
from streams.settings import Settings
from streams.workflow.decider import MAX_PAYLOAD_BYTES, utf8_size
from streams.workflow.expressions import EvaluationError, from_json, to_json
from streams.workflow.spec import WorkflowSpec

log = structlog.get_logger()

SOURCE: Final = "intake"
_FIELDS: Final = tuple(WorkflowRequest.__dataclass_fields__)


class Specs(Protocol):
    """Where intake finds workflow versions."""

    def get(self, version: str) -> WorkflowSpec | None: ...  # noqa: D102
    def newest(self, workflow: str) -> WorkflowSpec | None: ...  # noqa: D102
    def names(self) -> list[str]: ...  # noqa: D102


class RefusedError(Exception):
    """A request can't become a run; `reason` is one of the dead letters' reasons."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Intake:
    """Judges requests of one topic, whose id (16 bytes) names requests that bring no id."""

    specs: Specs
    topic_id: bytes

    def check(self, record: Incoming) -> Outgoing:
        """Return the StartRun of a request, or the dead letter that says why there is none."""
        request: WorkflowRequest | None = None
        try:
            request = decode(record.value)
            identity = request.request_id or position_request_id(self.topic_id, record.partition, record.offset)
            spec = self._spec(request)
            start = StartRun(identity, spec.name, spec.digest, self._input(spec, request.input), request.labels)
        except RefusedError as refused:
            request_id = request.request_id if request else None
            run = run_id(request_id or position_request_id(self.topic_id, record.partition, record.offset))
            return dead_letter(record, refused.reason, str(refused), SOURCE, request_id=request_id, run_id=run)
        run = run_id(identity)
        return envelope(topics.INBOX, run, InboxMessage(run, start), source=SOURCE, identity=f"{run}/start", run_id=run)

    def _spec(self, request: WorkflowRequest) -> WorkflowSpec:
        if request.digest:
            spec = self.specs.get(request.digest)
            if spec is None or spec.name != request.workflow:
                raise RefusedError("unknown_workflow", f"workflow `{request.workflow}` has no version {request.digest}")
            return spec
        spec = self.specs.newest(request.workflow)
        if spec is None:
            near = difflib.get_close_matches(request.workflow, self.specs.names(), 1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(self.specs.names()) or 'none yet'}"
            raise RefusedError("unknown_workflow", f"no workflow is called `{request.workflow}`; {hint}")
        return spec

    def _input(self, spec: WorkflowSpec, text: str) -> str:
        if (size := utf8_size(text)) > MAX_PAYLOAD_BYTES:
            raise RefusedError("too_large", f"the input has {size:,} bytes; the limit is {MAX_PAYLOAD_BYTES:,}")
        try:
            value, problems = spec.check_input(text)
        except EvaluationError as error:
            raise RefusedError("invalid_input", f"input: {error}") from error
        if problems:
            raise RefusedError("invalid_input", "; ".join(problems[:10]))
        return value


def decode(value: bytes | None) -> WorkflowRequest:
    """Return the request in a record's value: Avro when it starts with a zero byte, else JSON. Raises RefusedError."""
    if value and value[0] == 0:
        try:
            return codec.decode(value, WorkflowRequest)
        except NotDecodableError as error:
            raise RefusedError("not_decodable", str(error)) from error
    try:
        data = from_json((value or b"").decode())
    except (UnicodeDecodeError, EvaluationError) as error:
        raise RefusedError("not_decodable", f"neither Avro nor JSON: {error}") from error
    return _from_mapping(data)


def _from_mapping(data: Any) -> WorkflowRequest:
    if not isinstance(data, dict):
        raise RefusedError("not_decodable", 'a request is a JSON object: {"workflow": …, "input": {…}}')
    for key in data:
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(_FIELDS)}"
            raise RefusedError("not_decodable", f"unknown key `{key[:100]}`; {hint}")
    labels = data.get("labels") or {}
    texts = [data.get(key) for key in ("workflow", "request_id", "digest")]
    if not isinstance(data.get("workflow"), str) or not all(text is None or isinstance(text, str) for text in texts):
        raise RefusedError("not_decodable", "`workflow` must be given, and it, `request_id` and `digest` are strings")
    if not isinstance(labels, dict) or not all(isinstance(each, str) for each in labels.values()):
        raise RefusedError("not_decodable", "`labels` is an object of strings")
    try:
        text = to_json(data.get("input", {}))
        for each in (*filter(None, texts), *labels, *labels.values()):
            each.encode()
    except (EvaluationError, UnicodeEncodeError) as error:
        raise RefusedError("not_decodable", f"not valid Unicode or JSON: {error!r}"[:300]) from error
    return WorkflowRequest(data["workflow"], text, data.get("request_id"), data.get("digest"), labels)


# --- The Faust agent ---


@dataclass(slots=True)
class _Pending:
    """A request whose result is not acknowledged yet."""

    event: Any
    acks: kafka.Acks


def attach(app: faust.App, settings: Settings, prepare: Callable[[], tuple[Intake, Callable[[], None], Any]]) -> None:
    """Add the intake agent to a Faust app.

    `prepare` connects and returns the judge, what takes in new workflow versions, and a producer.
    """
    source = app.topic(kafka.name(settings, topics.REQUESTS), key_serializer="raw", value_serializer="raw", value_type=bytes)

    @app.agent(source, name="intake", concurrency=1)
    async def intake(stream: Any) -> None:
        judge, look, producer = await asyncio.to_thread(prepare)
        pending: deque[_Pending] = deque()
        # Supervised by the app: when a delivery fails, the process ends and the requests are read again.
        app.add_future(_acknowledge(producer, pending))
        async for event in stream.noack().events():
            look()
            entry = _Pending(event, kafka.Acks())
            pending.append(entry)
            outgoing = judge.check(_incoming(event.message))
            kafka.produce(producer, settings, outgoing, entry.acks)
            if outgoing.topic is topics.DEADLETTER:
                log.warning("intake.refused", partition=event.message.partition, offset=event.message.offset)


async def _acknowledge(producer: Any, pending: deque[_Pending]) -> None:
    """Acknowledge requests in order as their results are: out of order, Faust would commit past an open one."""
    while True:
        producer.poll(0)
        while pending and (pending[0].acks.offsets or pending[0].acks.failure):
            entry = pending.popleft()
            entry.acks.check()
            entry.event.ack()
        # Nothing waits for this but the committed offset: a look every 5 ms under load, every 50 ms without.
        await asyncio.sleep(0.005 if pending else 0.05)


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
