"""Bearer tokens: a file with a line for each, which holds the token's SHA-256 and never the token.

A token is 256 random bits, so a plain hash can't be guessed back. The file is read again when it has changed: a token that is
made or revoked counts from the next request on.
"""

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from streams.settings import Settings

READER, AUDITOR, REQUESTER = "reader", "auditor", "requester"
ROLES: Final = {
    READER: "sees runs, steps, calls, costs and how things stand; no inputs, outputs or other payloads",
    AUDITOR: "sees all that a reader sees, payloads, whole records and what verification says",
    REQUESTER: "starts runs and sends signals through the gateway; sees nothing",
}
NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PREFIX: Final = "foldflow_"
"""So that whoever finds one, a scanner of repositories too, knows what it is."""
_HEAD: Final = "# Foldflow's tokens: SHA-256 of the token, role, when it was made, name. `foldflow token` writes this file.\n"


class TokensError(Exception):
    """The file of tokens can't be used, or doesn't allow what was asked. The text says what to do."""


class Token(NamedTuple):
    """One token as it is kept: `digest` is the SHA-256 of what its holder shows, in hexadecimal; `made`: when, in UTC."""

    digest: str
    role: str
    made: str
    name: str


class Tokens:
    """The tokens of a file, as it is now. For any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._held: tuple[Token, ...] = ()

    def find(self, shown: str) -> Token | None:
        """Return the token that somebody shows. Without a file there is none; raises TokensError when it can't be read."""
        digest = _digest(shown)
        found = None
        for each in self._now():  # all of them, and each in constant time: how long it takes says nothing
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found

    def _now(self) -> tuple[Token, ...]:
        try:
            state = self._path.stat()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise TokensError(f"{self._path} can't be read ({error})") from error
        seen = state.st_ino, state.st_size, state.st_mtime_ns
        if seen != self._seen:
            self._held, self._seen = tuple(read(self._path)), seen
        return self._held


def configured(settings: Settings, host: str) -> Tokens | None:
    """Return the tokens that requests must show; None: whoever reaches `host` may ask, since that is this machine only.

    Raises TokensError when others could reach it without a token, and when the file can't be read.
    """
    if settings.api_tokens is not None:
        read(settings.api_tokens)
        return Tokens(settings.api_tokens)
    if not is_loopback(host):
        raise TokensError(
            f"FOLDFLOW_API_HOST is {host}, where other machines can ask, and there are no tokens: set FOLDFLOW_API_TOKENS to a "
            "file and make one with `foldflow token create`, or listen on 127.0.0.1"
        )
    return None


def is_loopback(host: str) -> bool:
    """Say whether an address or name is this machine's own and nobody else's."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read(path: Path) -> list[Token]:
    """Return a file's tokens, none if there is no file. Raises TokensError."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise TokensError(f"{path} can't be read ({error})") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != len(Token._fields) or parts[1] not in ROLES or not re.fullmatch("[0-9a-f]{64}", parts[0]):
            raise TokensError(f"{path}, line {number} is no token: put it right or take it out, `foldflow token` writes the file")
        found.append(Token(*parts))
    return found


def create(path: Path, role: str, name: str) -> str:
    """Make a token, add it to the file, and return it: it can't be had again. Raises TokensError."""
    if not NAME.fullmatch(name):
        raise TokensError(f"`{name}` is no name: up to 64 letters, digits, `.`, `_` and `-`")
    held = read(path)
    if any(each.name == name for each in held):
        raise TokensError(f"there is a token `{name}` already: choose another name, or revoke that one first")
    shown = _PREFIX + secrets.token_urlsafe(32)
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    _write(path, [*held, Token(_digest(shown), role, made, name)])
    return shown


def revoke(path: Path, name: str) -> None:
    """Take a token out of the file. Raises TokensError when there is none of this name."""
    held = read(path)
    left = [each for each in held if each.name != name]
    if len(left) == len(held):
        raise TokensError(f"there is no token `{name}` in {path}: `foldflow token list` shows them")
    _write(path, left)


def _digest(shown: str) -> str:
    return hashlib.sha256(shown.encode("utf-8", "surrogateescape")).hexdigest()


def _write(path: Path, held: Sequence[Token]) -> None:
    """Put a new file in the old one's place: who reads meanwhile sees one of the two, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, made = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # nobody else may read it
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(_HEAD + "".join(" ".join(each) + "\n" for each in held))
            file.flush()
            os.fsync(file.fileno())
        Path(made).replace(path)
    except OSError as error:
        raise TokensError(f"{path} can't be written ({error})") from error
