"""Who may ask, and how often: bearer tokens, roles, a rate for each, and no web page of another site.

Without tokens (this machine only) a page in the user's browser could still ask: it may point a name of its own at 127.0.0.1, or
open a WebSocket, which browsers let any page do. So then the names in `Host` and `Origin` must be this machine's.
"""

import base64
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Final
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import ProblemError, answer
from api.tokens import AUDITOR, Token, Tokens, TokensError, is_loopback

SECURITY: Final = {"bearer": {"type": "http", "scheme": "bearer", "description": "From `foldflow token create`."}}
_MOST_CALLERS: Final = 10_000
"""How many callers' rates are remembered; of the others, those who have not asked for longest start with a full bucket."""
_BURST_S: Final = 2.0

payloads_shown: ContextVar[bool] = ContextVar("payloads_shown", default=True)
"""Whether the caller may see payloads."""


class Rates:
    """Token buckets: `rate` requests a second for each caller, for a moment twice as many; 0: no limit. For any thread."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = rate, max(1.0, rate * _BURST_S), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, caller: str) -> float:
        """Count a request of a caller; return 0.0, or in how many seconds it may be made."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = self._clock()
            left, since = self._buckets.pop(caller, (self._most, now))
            left = min(self._most, left + (now - since) * self._rate)
            allowed = left >= 1.0
            self._buckets[caller] = (left - allowed, now)
            if len(self._buckets) > _MOST_CALLERS:
                self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._rate


class Access:
    """Lets through, or answers with a problem: 401, 403 or 429. `roles`: who may ask here; `free`: paths that anybody may ask.

    `request.state` gets `role` (None without tokens) and `caller`, the token's name.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None, roles: Collection[str], rate: float, free: Collection[str]) -> None:
        self._app, self._tokens, self._roles, self._free = app, tokens, roles, free
        self._rates = Rates(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] in {"http", "websocket"} and scope["path"] not in self._free:
            connection = HTTPConnection(scope)
            try:
                role, name = self._admit(connection)
            except ProblemError as error:
                await answer(connection, error.problem, error.headers)(scope, receive, send)
                return
            connection.state.role, connection.state.caller = role, name
            payloads_shown.set(role in {None, AUDITOR})
        await self._app(scope, receive, send)

    def _admit(self, connection: HTTPConnection) -> tuple[str | None, str]:
        """Return the caller's role and name. Raises ProblemError."""
        address = connection.client.host if connection.client else ""
        if self._tokens is None:
            _check_here(connection)
            self._check_rate(f"address {address}")
            return None, ""
        shown = _shown(connection)
        try:
            token = self._tokens.find(shown) if shown else None
        except TokensError as error:
            raise ProblemError(503, "no-tokens", "Tokens can't be checked", str(error), "Put the file right.") from error
        # Who shows none that counts is held back by address, so that nobody tries them out at full speed.
        self._check_rate(f"token {token.name}" if token else f"address {address}")
        if token is None:
            raise _unauthorized("this token is not known, or was revoked" if shown else "a token is needed")
        if token.role not in self._roles:
            raise _forbidden(token, self._roles)
        return token.role, token.name

    def _check_rate(self, caller: str) -> None:
        if wait := self._rates.wait(caller):
            raise ProblemError(
                429,
                "too-many-requests",
                "Too many requests",
                f"{caller}: the next one in {wait:.2f} s",
                "Wait as long as Retry-After says; FOLDFLOW_API_RATE is how many a second are answered.",
                headers={"Retry-After": str(math.ceil(wait))},
            )


def _shown(connection: HTTPConnection) -> str | None:
    """Return the token in a request: `Bearer TOKEN`, or as the password of `Basic`, which is all that some clients can do."""
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return given.strip() or None
        case "basic":
            try:
                return base64.b64decode(given, validate=True).decode().partition(":")[2] or None
            except ValueError:
                return None
    return None


def _check_here(connection: HTTPConnection) -> None:
    host, origin = connection.headers.get("host", ""), connection.headers.get("origin")
    for header, url in (("Host", f"//{host}"), ("Origin", origin)):
        if url is not None and not is_loopback(_name(url)):
            raise ProblemError(
                403,
                "not-from-here",
                "This address only answers this machine",
                f"{header}: {url.removeprefix('//')}",
                "Ask at 127.0.0.1 or localhost; for other machines and pages set FOLDFLOW_API_TOKENS and make tokens.",
            )


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _unauthorized(detail: str) -> ProblemError:
    hint = "Send `Authorization: Bearer TOKEN`; `foldflow token create` makes one."
    return ProblemError(401, "unauthorized", "Who asks?", detail, hint, headers={"WWW-Authenticate": 'Bearer realm="foldflow"'})


def _forbidden(token: Token, roles: Collection[str]) -> ProblemError:
    detail = f"token `{token.name}` has the role {token.role}; needed: {' or '.join(sorted(roles))}"
    return ProblemError(403, "forbidden", "This token may not do that", detail, "Ask with a token of such a role.")


def _audit(connection: HTTPConnection) -> None:
    if not payloads_shown.get():
        detail = f"token `{connection.state.caller}` has the role {connection.state.role}; needed: {AUDITOR}"
        raise ProblemError(403, "forbidden", "Only auditors see this", detail, "Ask with a token of the role `auditor`.")


AuditorsOnly = Depends(_audit)
"""Put it into a route's (or router's) `dependencies` when its answer holds records, payloads or what verification says."""
