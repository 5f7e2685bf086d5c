"""The gateway: requests and signals over HTTP, for those who can't write to Kafka themselves.

It judges a request by the code that intake uses, puts the same record on the same topic as everybody else, and answers when the
broker has it: what is accepted here is as safe as what is written there. It reads no views, and nothing can be asked.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from api import access, described, problems
from api.problems import ProblemError
from api.tokens import REQUESTER, Tokens
from events import ids, topics
from events.commands import RunRequest, WorkflowRequest
from events.errors import NewerCodeError
from infra.gateway.limit import BodyLimit, too_large
from infra.gateway.sender import NotSentError, Sender, Sent
from streams.envelope import envelope
from streams.processors.requests import RefusedError, decode
from streams.settings import Settings

FREE: Final = frozenset({"/health", "/openapi.json"})
_MOST_BODY: Final = topics.MAX_VALUE_BYTES
_TOO_LARGE: Final = "too_large"
_ONLY: Final = "The gateway takes POST /requests and POST /signals; the read API answers questions."
_WAIT_S: Final = 12.0
"""A little longer than the producer tries."""

Text = Annotated[str, Field(max_length=64 * 1024)]


class RunWanted(BaseModel):
    """A run to be started."""

    model_config = ConfigDict(extra="forbid")

    workflow: Text = Field(description="Name of a registered workflow.")
    input: Any = Field(default_factory=dict, description="The run's input, as the workflow's JSON Schema wants it.")
    request_id: Annotated[str, Field(min_length=1, max_length=64 * 1024)] | None = Field(
        None, description="Identity of the request: the same one twice is one run. Without it each request is another run."
    )
    digest: Text | None = Field(None, description="Version of the workflow; without it the newest.")
    labels: dict[str, str] = Field({}, description="To find the run by.")
    break_at: list[str] = Field([], description="Steps before which the run stops.")


class SignalWanted(BaseModel):
    """A signal to a run, which is named by either `run_id` or `request_id`."""

    model_config = ConfigDict(extra="forbid")

    run_id: Text | None = Field(None, description="The run's whole id.")
    request_id: Text | None = Field(None, description="The id of the request that started the run.")
    name: Annotated[str, Field(min_length=1, max_length=64 * 1024)] = Field(description="As the step's `wait_for` says it.")
    payload: Any = Field(None, description="The waiting step's output.")
    correlation: Text | None = Field(None, description="Which of several waiting steps it is for.")
    signal_id: Annotated[str, Field(min_length=1, max_length=64 * 1024)] | None = Field(
        None, description="Identity of the signal: the same one twice counts once."
    )


class Accepted(BaseModel):
    """The broker has it: where it stands, and which run it is about; GET /runs/{run_id} of the API tells the rest."""

    run_id: str
    topic: str
    partition: int
    offset: int


class RunAccepted(Accepted):
    """A request that the broker has."""

    request_id: str


class SignalAccepted(Accepted):
    """A signal that the broker has."""

    signal_id: str


class GatewayHealth(BaseModel):
    """Whether requests can be taken: `starting` until Kafka has answered."""

    status: Literal["ok", "starting"]
    kafka: str


_PLACE: Final = {"topic": "foldflow.requests", "partition": 3, "offset": 42}
_RUN: Final = "8f6a3a7e-6d0b-5f0e-9c56-0a5a3c1b7d42"
EXAMPLES: Final[dict[str, Any]] = {
    "RunWanted": {
        "workflow": "market-analysis",
        "input": {"question": "How did Apple and Microsoft compare between 2005 and 2009?"},
        "request_id": "order-17",
        "labels": {"team": "research"},
    },
    "SignalWanted": {"request_id": "order-17", "name": "document", "payload": {"pages": 3}, "signal_id": "scan-4711"},
    "RunAccepted": {"run_id": _RUN, "request_id": "order-17", **_PLACE},
    "SignalAccepted": {"run_id": _RUN, "signal_id": "scan-4711", **_PLACE},
    "GatewayHealth": {"status": "ok", "kafka": "127.0.0.1:29092"},
}

router = APIRouter()


@router.get("/health", tags=["health"], responses={503: {"model": GatewayHealth, "description": "Kafka has not answered yet."}})
def show_health(request: Request, response: Response) -> GatewayHealth:
    """Say whether requests can be taken; 503 when they can't."""
    ready = _sender(request).ready.is_set()
    response.status_code = 200 if ready else 503
    return GatewayHealth(status="ok" if ready else "starting", kafka=request.app.state.settings.bootstrap_servers)


@router.post("/requests", tags=["requests"], status_code=202)
async def start_run(request: Request, wanted: RunWanted) -> RunAccepted:
    """Start a run. It is answered when the broker has the request; the same `request_id` again is the same run.

    What can be known now is judged now: an unknown workflow or an input that doesn't fit gets 422.
    """
    identity = wanted.request_id or str(uuid.uuid4())
    asked = _decoded({**wanted.model_dump(), "request_id": identity})
    assert isinstance(asked, WorkflowRequest)
    try:
        await run_in_threadpool(_sender(request).check, asked.workflow, asked.digest, asked.input)
    except RefusedError as error:
        raise _refused(error) from error
    except (NotSentError, NewerCodeError) as error:
        raise _not_sent(error, request_id=identity) from error
    run_id = ids.run_id(identity)
    sent = await _send(request, identity, asked, run_id, request_id=identity)
    return RunAccepted(run_id=run_id, request_id=identity, **sent._asdict())


@router.post("/signals", tags=["requests"], status_code=202)
async def send_signal(request: Request, wanted: SignalWanted) -> SignalAccepted:
    """Send a signal to a run. A step that waits for it takes it; until then it is kept. The token's name stands as its sender.

    The same `signal_id` again counts once. A run that isn't there, or is over, takes no notice of it.
    """
    identity = wanted.signal_id or str(uuid.uuid4())
    said = {**wanted.model_dump(), "signal_id": identity, "command": "signal", "by": request.state.caller}
    asked = _decoded(said)
    assert isinstance(asked, RunRequest)
    run_id = asked.run_id or ids.run_id(asked.request_id or "")
    sent = await _send(request, identity, asked, run_id, signal_id=identity)
    return SignalAccepted(run_id=run_id, signal_id=identity, **sent._asdict())


def create(settings: Settings, tokens: Tokens | None = None) -> FastAPI:
    """Return the app. `tokens`: those that requests must show; None: whoever reaches it may ask."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sender: Sender = app.state.sender
        sender.start()
        yield
        await run_in_threadpool(sender.stop)

    app = FastAPI(
        title="Foldflow gateway",
        version=version("foldflow"),
        description="Starts runs and sends signals. What became of them, the read API says.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings, app.state.sender = settings, Sender(settings)
    problems.install(app, wrong_method=_ONLY, told={})
    app.add_middleware(access.Access, tokens=tokens, roles={REQUESTER}, rate=settings.api_rate, free=FREE)
    app.add_middleware(BodyLimit, most=_MOST_BODY)  # outermost: nothing of it is read before
    app.include_router(router)
    described.describe(app, EXAMPLES, views=False)
    return app


def _sender(request: Request) -> Sender:
    found: Sender = request.app.state.sender
    return found


def _decoded(said: dict[str, Any]) -> WorkflowRequest | RunRequest:
    """Return what is asked for, read as intake reads JSON on the topic. Raises ProblemError."""
    try:
        return decode(json.dumps({key: value for key, value in said.items() if value is not None or key == "input"}).encode())
    except RefusedError as error:
        raise _refused(error) from error
    except RecursionError as error:
        raise _refused(RefusedError("not_decodable", "nested too deep")) from error


async def _send(request: Request, identity: str, asked: WorkflowRequest | RunRequest, run_id: str, **named: str) -> Sent:
    """Send it and wait for the broker. Raises ProblemError."""
    record = envelope(topics.REQUESTS, identity, asked, source="gateway", identity=identity, run_id=run_id)
    if (size := len(record.value or b"")) > topics.MAX_VALUE_BYTES:
        raise _refused(RefusedError(_TOO_LARGE, f"the request has {size:,} bytes; the limit is {topics.MAX_VALUE_BYTES:,}"))
    try:
        return await asyncio.wait_for(asyncio.wrap_future(_sender(request).send(record)), _WAIT_S)
    except (NotSentError, TimeoutError) as error:
        raise _not_sent(error, **named) from error


def _refused(error: RefusedError) -> ProblemError:
    if error.reason == _TOO_LARGE:
        return too_large(str(error))
    hint = "Put it right and ask again; nothing was sent. `foldflow workflows` lists workflows and what they take."
    return ProblemError(422, error.reason.replace("_", "-"), "This request can't be taken", str(error), hint)


def _not_sent(error: Exception, **named: str) -> ProblemError:
    ((key, identity),) = named.items()
    hint = f"Ask again with {key} `{identity}`: it may have arrived, and the same one twice counts once."
    detail = str(error) or "no acknowledgement in time"
    return ProblemError(503, "not-sent", "Kafka has not acknowledged it", detail, hint, headers={"Retry-After": "5"}, **named)
