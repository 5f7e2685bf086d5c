"""The live stream: decisions as they are accepted, by Server-Sent Events and by WebSocket."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, cast

import anyio
from fastapi import APIRouter, Depends, Header, Query, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from starlette.requests import HTTPConnection

from api import models
from api.examples import EXAMPLES
from api.labels import Labels, pairs
from api.problems import ProblemError
from api.streams import Streams
from api.views import TheProjector, projector_of
from projections.feed import Feed, OtherLogError, Place, Wanted

router = APIRouter(tags=["stream"])


async def _held(connection: HTTPConnection) -> AsyncIterator[Streams]:
    streams = cast("Streams", connection.app.state.streams)
    with streams.place():
        yield streams


TheStreams = Annotated[Streams, Depends(_held)]
"""Held until the last byte is sent, or the client has gone."""


def _wanted(
    run_id: Annotated[str | None, Query(description="Only this run's, by its whole id; it need not have begun.")] = None,
    workflow: Annotated[str | None, Query(description="Only of runs of this workflow.")] = None,
    label: Labels = None,
) -> Wanted:
    return Wanted(run_id, workflow, pairs(label))


def _feed(
    connection: HTTPConnection,
    wanted: Annotated[Wanted, Depends(_wanted)],
    after: Annotated[
        str | None,
        Query(
            description="Where to go on: the `id` of the last event seen, or `start` for all there is. Without it: from now on.",
            examples=["v1:5b1f00aa:0=123,1=88", "start"],
        ),
    ] = None,
    last_event_id: Annotated[str | None, Header(description="The same; browsers send it when they connect again.")] = None,
) -> Feed:
    given = last_event_id or after
    try:
        place = None if given in {None, "", "start"} else Place.read(given or "")
    except ValueError as error:
        hint = "Take the `id` of the last event as it is, `start` for all there is, or leave it out to begin now."
        raise ProblemError(400, "invalid-place", "This is no place to go on from", str(error), hint) from error
    try:
        return Feed.open(projector_of(connection).views, wanted, place, history=given == "start")
    except OtherLogError as error:
        hint = "Its topic was made anew: begin again with after=start."
        raise ProblemError(410, "other-log", "This log is gone", str(error), hint) from error


TheFeed = Annotated[Feed, Depends(_feed)]


def _json(row: dict[str, Any]) -> str:
    return models.StreamedDecision(**row).model_dump_json()


def _event(place: Place | str, row: dict[str, Any] | None) -> str:
    """Return a decision as an event; without one, a comment that says where the stream is."""
    return f": here\nid: {place}\n\n" if row is None else f"event: decision\nid: {place}\ndata: {_json(row)}\n\n"


_RETRY: Final = "retry: 1000\n\n"
_EXAMPLE: Final = (
    _RETRY + _event("v1:5b1f00aa:3=130", None) + _event("v1:5b1f00aa:3=131", EXAMPLES[models.StreamedDecision.__name__])
)


@router.get(
    "/stream",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}}}},
)
async def stream_decisions(streams: TheStreams, feed: TheFeed, projector: TheProjector) -> StreamingResponse:
    """Stream decisions as they are accepted (Server-Sent Events): first those there are behind `after`, then those that come.

    Each event has the type `decision`, a decision as data and an `id`: with it (`Last-Event-ID`, `after`) another connection goes
    on exactly behind that decision. Nothing is lost and nothing comes twice; decisions of one run come in order. At first, and
    every ten quiet seconds, there is a comment with the `id` of where the stream is.
    """

    async def events() -> AsyncIterator[str]:
        yield _RETRY
        async for place, row in streams.follow(feed, projector):
            yield _event(place, row)

    # Proxies that buffer would hold back what is to be seen at once.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), headers=headers, media_type="text/event-stream")


@router.websocket("/stream/ws")
async def stream_decisions_to_socket(socket: WebSocket, streams: TheStreams, feed: TheFeed) -> None:
    """Send what /stream sends as messages: `{"id": …, "decision": {…}}`.

    At first, and after quiet seconds, there is `{"id": …}` without `decision`: only where the stream is.
    """
    await socket.accept()
    async with anyio.create_task_group() as tasks:

        async def until_gone() -> None:
            while (await socket.receive())["type"] != "websocket.disconnect":
                pass  # whatever a client says, there is nothing to answer
            tasks.cancel_scope.cancel()

        tasks.start_soon(until_gone)
        with contextlib.suppress(WebSocketDisconnect):
            async for place, row in streams.follow(feed, projector_of(socket)):
                head = f'{{"id": {json.dumps(str(place))}'
                await socket.send_text(head + "}" if row is None else f'{head}, "decision": {_json(row)}}}')
            await socket.close(1001)
        tasks.cancel_scope.cancel()
