"""Gets a file over HTTP within bounds of size and time, and tells errors worth a retry from those that are not."""

import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from tools.errors import RetryableError, TerminalError

if TYPE_CHECKING:
    import httpx

MAX_BYTES = 50 * 1024 * 1024
_RETRYABLE = {408, 425, 429}


def download(url: str, *, timeout_s: float = 30.0, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the body at `url`, following redirects.

    `timeout_s` bounds each wait for the network and the whole transfer. Raises RetryableError for timeouts, broken
    connections, status 408, 425, 429 and 5xx (with the server's Retry-After), TerminalError for other statuses, a
    bad address or a body larger than `max_bytes`.
    """
    import httpx  # noqa: PLC0415  (200 ms that a worker need not pay at its start)

    shown = without_secrets(url)
    deadline = time.monotonic() + timeout_s
    body = bytearray()
    try:
        with (
            httpx.Client(follow_redirects=True, timeout=timeout_s) as client,
            client.stream("GET", url, headers={"accept": "text/csv, application/vnd.apache.parquet, */*"}) as response,
        ):
            _check(response, shown)
            for part in response.iter_bytes():
                body += part
                if len(body) > max_bytes:
                    raise TerminalError(f"{shown} is larger than {max_bytes / 1024 / 1024:g} MB")
                # A server that drips a byte a second never runs into a timeout between two bytes.
                if time.monotonic() > deadline:
                    raise RetryableError(f"{shown} was not there whole after {timeout_s:g} s")
    except httpx.TimeoutException as error:
        raise RetryableError(f"{shown} did not answer within {timeout_s:g} s") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.DecodingError) as error:
        raise TerminalError(f"{shown}: {error}") from error
    except httpx.TransportError as error:
        raise RetryableError(f"{shown} can't be reached: {error}") from error
    return bytes(body)


def without_secrets(url: str) -> str:
    """Return `url` without user, password, query and fragment: what may stand in a history for ever.

    Raises TerminalError if it is no address.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise TerminalError(f"the source is no address: {error}") from error
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "…" if parts.query else "", ""))


def _check(response: "httpx.Response", shown: str) -> None:
    status = response.status_code
    if status in _RETRYABLE or response.is_server_error:
        raise RetryableError(f"{shown} answered {status}", retry_after_s=_retry_after(response))
    if not response.is_success:
        raise TerminalError(f"{shown} answered {status}")


def _retry_after(response: "httpx.Response") -> float | None:
    """Return the header's seconds; a date there is taken relative to the server's own clock."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(response.headers["date"])
    except (ValueError, KeyError, TypeError):  # TypeError: one has a zone and the other hasn't
        return None
    return max(wait.total_seconds(), 0.0)
