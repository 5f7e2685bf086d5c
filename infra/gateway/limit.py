"""Refuses bodies that are too large, before they are read whole."""

from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ProblemError, answer

_TOO_LARGE: Final = 413


def too_large(detail: str) -> ProblemError:
    """Return the problem of what is too large."""
    hint = "Put large data where the workflow's tools find it, and send where that is."
    return ProblemError(_TOO_LARGE, "too-large", "This is too large", detail, hint)


class BodyLimit:
    """Takes bodies of at most `most` bytes."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        said = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if said.isdecimal() and int(said) > self._most:
            problem = too_large(f"the body has {int(said):,} bytes; the limit is {self._most:,}").problem
            await answer(HTTPConnection(scope), problem)(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:  # its length was not said
                raise HTTPException(_TOO_LARGE, f"The limit is {self._most:,} bytes")
            return message

        await self._app(scope, counted, send)
