"""What a route needs to answer: a snapshot of the views; and in every answer's headers how fresh it is.

An answer from the views bears an ETag made of the positions that it was read at: as long as the views have taken in nothing, who
shows it again (`If-None-Match`) gets 304, and no question is asked at all.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, Final, cast

from fastapi import Depends, FastAPI, Request, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import payloads_shown
from api.problems import ProblemError
from api.times import RELATIVE
from projections.database import Positions, ViewsError
from projections.log import RecordGoneError
from projections.projector import NotReadyError, Projector
from projections.table import Connection
from streams.kafka import KafkaUnreachableError

LAG, POSITIONS = "Foldflow-Lag", "Foldflow-Positions"
MOST: Final = 2**53 - 1
"""No offset, no number of a decision and no time in milliseconds is larger; JSON's numbers are exact up to here."""
_VERSION: Final = version("foldflow")


@dataclass(frozen=True, slots=True)
class View:
    """One state of the views. `lag`: records that are in Kafka and not in it yet."""

    db: Connection
    positions: Positions
    lag: int

    @property
    def catching_up(self) -> str:
        """A sentence about records that may still hold what was not found; empty if there are none."""
        return f" The views are {self.lag:,} records behind Kafka: it may just not be there yet." if self.lag else ""


class NotModifiedError(Exception):
    """Who asks has the answer already."""


def projector_of(connection: HTTPConnection) -> Projector:
    """Return the app's projector."""
    return cast("Projector", connection.app.state.projector)


def _of_views(request: Request, response: Response) -> Iterator[View]:
    yield from _snapshot(request, response, tagged=True)


def _of_log_too(request: Request, response: Response) -> Iterator[View]:
    yield from _snapshot(request, response, tagged=False)


def _snapshot(request: Request, response: Response, *, tagged: bool) -> Iterator[View]:
    projector = projector_of(request)
    with projector.views.snapshot() as (db, positions):
        view = View(db, positions, sum(projector.lag(positions).values()))
        request.state.freshness = freshness(projector, positions)
        if tagged and (tag := _tag(request, projector, positions)) is not None:
            request.state.freshness |= {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
            if tag.removeprefix("W/") in request.headers.get("if-none-match", ""):
                raise NotModifiedError
        response.headers.update(request.state.freshness)
        yield view


def _tag(request: Request, projector: Projector, positions: Positions) -> str | None:
    """Return the ETag of what is read at these positions; None where the answer depends on what time it is."""
    times = [request.query_params.get(name, "") for name in ("since", "until")]
    if request.method != "GET" or any(RELATIVE.fullmatch(each) for each in times):
        return None
    state = _VERSION, projector.views.log_id, sorted(positions.items()), payloads_shown.get()
    return f'W/"{hashlib.blake2b(repr(state).encode(), digest_size=9).hexdigest()}"'


def freshness(projector: Projector, positions: Positions) -> dict[str, str]:
    """Return the headers that say up to which offsets of `decisions` views are read, and how many records they are behind."""
    ledger = ",".join(f"{partition}:{at}" for (topic, partition), at in sorted(positions.items()) if topic == "decisions")
    return {LAG: str(sum(projector.lag(positions).values())), POSITIONS: ledger}


class Freshness:
    """Puts into every answer, problems too, how fresh it is: as its route has read the views, or else as they are now."""

    def __init__(self, app: ASGIApp, projector: Projector) -> None:
        self._app, self._projector = app, projector

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def told(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                headers = MutableHeaders(scope=message)
                found = scope.get("state", {}).get("freshness") or freshness(self._projector, self._projector.positions)
                for name, value in found.items():
                    if name in {LAG, POSITIONS}:
                        headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, told)


TheView = Annotated[View, Depends(_of_views)]
TheViewBesideTheLog = Annotated[View, Depends(_of_log_too)]
"""For answers that are made from Kafka too: without ETag, since somebody could have tampered with that meanwhile."""
TheProjector = Annotated[Projector, Depends(projector_of)]


# --- What goes wrong with them ---


def _not_ready(error: Exception) -> ProblemError:
    hint = (
        "Try again: it goes on by itself, and GET /health says how far it is. "
        "Without progress, check that Kafka runs (`foldflow status`) and that there is room in FOLDFLOW_DATA_DIR."
    )
    return ProblemError(503, "not-ready", "The views can't be asked yet", str(error), hint, headers={"Retry-After": "2"})


def _gone(error: Exception) -> ProblemError:
    hint = "Records of `decisions` are kept for ever unless a retention was set or the topic was made anew."
    return ProblemError(410, "record-gone", "The record is no longer in the log", str(error), hint)


TOLD: Final = {NotReadyError: _not_ready, KafkaUnreachableError: _not_ready, ViewsError: _not_ready, RecordGoneError: _gone}
"""What errors of the projections mean to who asks."""


def answer_unchanged(app: FastAPI) -> None:
    """Answer 304 where nothing has changed."""

    async def unchanged(request: Request, error: Exception) -> Response:
        del error
        return Response(status_code=304, headers=request.state.freshness)

    app.add_exception_handler(NotModifiedError, unchanged)


# --- Pages ---


def cursor(*values: Any) -> str:
    """Return where a page ended, as text for a URL."""
    return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode().rstrip("=")


def from_cursor(text: str, *kinds: type) -> tuple[Any, ...]:
    """Return what a cursor says. Raises ProblemError when it isn't one of ours."""
    try:
        values = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError):
        values = None
    if (
        not isinstance(values, list)
        or [type(value) for value in values] != list(kinds)
        or not all(abs(value) <= MOST for value in values if isinstance(value, int))
    ):
        raise ProblemError(
            400,
            "invalid-cursor",
            "This is no cursor",
            f"cursor={text}",
            "Take `next` of the page before as it is, or leave `cursor` out to begin with the newest.",
        )
    return tuple(values)
