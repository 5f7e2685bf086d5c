"""The store of payloads: a folder, or a bucket of S3, Google Cloud or Azure. The only module that knows obstore.

A payload's object is named by its digest (`ab/cdef…`), so writing it again changes nothing, and whoever reads it checks it.
obstore writes a local object beside its place as `…#1` and renames it, so nobody sees a half-written one; buckets do the like.
Nothing is deleted here, and nothing compressed: any tool can read what stands there.
"""

import asyncio
import errno
import re
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Final, TypeVar

import obstore
import structlog
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, from_url

from events.failure import Failure, FailureKind
from streams.settings import Settings
from streams.workflow.expressions import Json
from streams.workflow.payloads import (
    MAX_PAYLOAD_BYTES,
    PayloadDamagedError,
    PayloadError,
    PayloadMissingError,
    PayloadTooLargeError,
    digest_of,
    inlined,
    is_digest,
    reference_to,
    resolve,
)

log = structlog.get_logger()

T = TypeVar("T")
_CACHE_BYTES: Final = 64 * 1024 * 1024
_REMEMBERED: Final = 10_000
"""How many digests are known to be stored without asking; 150 bytes each."""
_THREADS: Final = 4
_HOLD_S: Final = 30.0
"""How long a result that a store can't take is held: the call was made, and may have cost money."""
_HOLD_BYTES: Final = 4 * MAX_PAYLOAD_BYTES
"""How much is held so at once; what would be more is given up at once, and its step is tried again."""
_HOLD_PAUSE_S: Final = 1.0

_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_ERRNO: Final = re.compile(r"\(os error (\d+)\)")
"""obstore tells the system's error by its text only."""


class PayloadStoreError(PayloadError):
    """The store can't be reached, is full or refuses. Trying again can help, once somebody has done what the message says.

    `passing`: whether that may be soon, and without other settings.
    """

    def __init__(self, message: str, *, passing: bool = True) -> None:
        super().__init__(message)
        self.passing = passing


def failure(error: PayloadError) -> Failure:
    """Return what a payload's error means for a call."""
    match error:
        case PayloadStoreError():
            kind = FailureKind.UNAVAILABLE
        case PayloadTooLargeError():
            kind = FailureKind.TOO_LARGE
        case _:
            kind = FailureKind.INVALID_ARGUMENTS
    return Failure(kind, str(error))


class PayloadStore:
    """Keeps payloads where the settings say; opened at first use. Any thread may use it; on an event loop: the async methods."""

    def __init__(self, settings: Settings) -> None:
        self._url, self._folder = settings.payload_store, settings.data_dir.absolute() / "payloads"
        self.place: Final = self._url or str(self._folder)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._cached_bytes = 0
        self._stored: OrderedDict[str, None] = OrderedDict()
        self._held_bytes = 0
        # Of its own: in the loop's threads tools run, and may take all of them for long.
        self._threads = ThreadPoolExecutor(_THREADS, "payloads")

    def get(self, digest: str) -> str:
        """Return a payload. Raises PayloadMissingError, PayloadDamagedError or PayloadStoreError."""
        with self._lock:
            if (cached := self._cache.get(digest)) is not None:
                self._cache.move_to_end(digest)
                return cached[0]
        text = self._read(digest)
        self._remember(digest, text)
        return text

    def put(self, text: str) -> str:
        """Store a canonical JSON text, unless it is stored, and return the reference to it.

        Raises PayloadTooLargeError or PayloadStoreError.
        """
        data = text.encode()
        digest = digest_of(data)
        reference = reference_to(digest, len(data))
        with self._lock:
            known = digest in self._stored
        if not known:
            with self._explained("stored"):
                if self._size(digest) != len(data):  # another size: a disk lost its end when the power went
                    # In one piece: obstore's multipart upload would leave parts behind when this process ends.
                    obstore.put(self._store, _path(digest), data, use_multipart=False)
        self._remember(digest, text)
        return reference

    async def resolve(self, text: str) -> Json:
        """Return the value of a JSON text, with what its references refer to in their place. Raises as `resolve` and `get` do."""
        return await self._in_thread(resolve, text)

    async def inlined(self, text: str) -> str:
        """Return a JSON text, or the reference to it where it is large. Raises as `put` does.

        While the store is full or away it tries again, for 30 s at most: who has to give up here has to make the call again.
        """
        until, told, size = time.monotonic() + _HOLD_S, False, sys.getsizeof(text)
        self._held_bytes += size
        try:
            while True:
                try:
                    return await self._in_thread(inlined, text)
                except PayloadStoreError as error:
                    if not error.passing or self._held_bytes > _HOLD_BYTES or time.monotonic() > until:
                        raise
                    if not told:
                        log.warning("payloads.held", bytes=size, seconds=_HOLD_S, problem=str(error))
                        told = True
                await asyncio.sleep(_HOLD_PAUSE_S)
        finally:
            self._held_bytes -= size

    async def _in_thread(self, function: Callable[[str, "PayloadStore"], T], text: str) -> T:
        # Not obstore's own async functions: hashing and parsing megabytes would hold up the loop as well.
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, text, self)

    @cached_property
    def _store(self) -> ObjectStore:
        if self._url is None:
            return LocalStore(self._folder, mkdir=True)
        if self._url.startswith("file:"):
            return from_url(self._url, mkdir=True)
        # That a store can't be reached fails the attempt, and the orchestrator decides what follows: only blips are hidden here.
        # (Its timeouts are obstore's, 30 s: with client options given, those of the environment would count no more.)
        return from_url(self._url, retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)})

    def _read(self, digest: str) -> str:
        if not is_digest(digest):
            raise PayloadMissingError(digest, f"{digest[:100]!r} is no payload's digest")
        with self._explained("read"):
            store = self._store
            try:
                result = obstore.get(store, _path(digest))
                size = result.meta["size"]
                data = result.bytes() if size <= MAX_PAYLOAD_BYTES else b""
            except FileNotFoundError as error:
                where = f"payload {digest} is not in {self.place}"
                todo = "was it deleted, or has this process another FOLDFLOW_PAYLOAD_STORE than the one that stored it?"
                raise PayloadMissingError(digest, f"{where}: {todo}") from error
        if digest_of(data) != digest:
            what = f"payload {digest} in {self.place} is damaged: its {size:,} bytes are not what was stored"
            raise PayloadDamagedError(digest, f"{what}; delete {_path(digest)} so that it can be stored again")
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise PayloadDamagedError(digest, f"payload {digest} in {self.place} is no text") from error

    def _size(self, digest: str) -> int | None:
        try:
            return obstore.head(self._store, _path(digest))["size"]
        except FileNotFoundError:
            return None

    def _remember(self, digest: str, text: str) -> None:
        """Keep what was read or stored, the least recently used not for ever."""
        with self._lock:
            self._stored[digest] = None
            self._stored.move_to_end(digest)
            if len(self._stored) > _REMEMBERED:
                self._stored.popitem(last=False)
            if digest in self._cache:
                return
            size = sys.getsizeof(text)  # kept beside it: Python may add to a text later
            self._cache[digest] = (text, size)
            self._cached_bytes += size
            while self._cached_bytes > _CACHE_BYTES:
                self._cached_bytes -= self._cache.popitem(last=False)[1][1]

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """Turn what obstore raises into PayloadStoreError, saying what to do next."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            found = _ERRNO.search(str(error))
            number = int(found[1]) if found else None
            if number in _NO_ROOM:
                why = f"it is full: make room there{self._free()}, or let FOLDFLOW_PAYLOAD_STORE name another place"
            elif number in _NO_RIGHT or isinstance(error, PermissionDeniedError | UnauthenticatedError):
                why = "access is refused: give this process the right (or the credentials) to read and write there"
            else:
                why = "it can't be used: check FOLDFLOW_PAYLOAD_STORE, a bucket's credentials, and that the place can be reached"
            reason = str(error).split("\n", 1)[0][:300]
            # A file where the folder should be stays wrong for longer than a result is worth holding.
            passing = number in _NO_ROOM | _NO_RIGHT or (number is None and isinstance(error, BaseError))
            raise PayloadStoreError(f"a payload can't be {done} in {self.place}; {why} ({reason})", passing=passing) from error

    def _free(self) -> str:
        """Return how much room a folder has, for people."""
        if self._url is not None:
            return ""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            return ""
        return f" ({usage.free:,} of {usage.total:,} bytes are free)"


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest[2:]}"
