"""Circuit breakers: an endpoint (a model, a tool) that mostly fails is left alone for a while, then tried with one call.

    closed     a share of the last calls failed                     → open
    open       its time is over and a call comes: that is let in    → half open
    half open  that call is answered                                → closed
               that call fails                                      → open, for twice as long

While a circuit is open, and while the one call of a half-open circuit is under way, other calls are refused: failures of kind
`unavailable` that say when to come back. The orchestrator waits that long, so a refusal costs an attempt but not its time.

An attempt says how it went: `answered` (whatever the answer was), `failed`, or nothing, which counts as nothing: it was
cancelled, or never came as far as the endpoint. What it says counts only in the state that let it in: calls that were under way
when the circuit opened neither open it again nor close it.

State is this process's own and disposable. For one thread; others may read.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, Self
from zlib import crc32

import structlog

from events.failure import Failure, FailureKind
from events.frozen import frozen
from events.workers import CircuitReported
from streams.settings import Settings
from streams.workflow.expressions import clean_text

log = structlog.get_logger()

_ERROR_CHARS: Final = 300
"""How much of the last error is kept: it is repeated in each refusal."""
FRESH_S: Final = 300.0
"""How old an outcome may be that counts: an endpoint that is called once an hour isn't judged by yesterday's calls."""
LONGEST_S: Final = 60.0
"""Each time that the one call fails, the next is waited for twice as long, up to this (or the first wait, if that is longer)."""
LONGEST_PROBE_S: Final = 300.0
"""How long the others are told to wait for the one call, where calls take very long."""
SPREAD: Final = 0.25
"""Up to which part of the wait later the refused come back: at once, they would all meet the one call again."""


class State(StrEnum):
    """States of a circuit."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@frozen
class Policy:
    """When a circuit opens: `share` of the last `calls` failed (0 calls: never); and for how long at first, in seconds."""

    calls: int
    share: float
    open_s: float

    @property
    def failures(self) -> int:
        """How many failures among the last `calls` open the circuit."""
        return max(1, math.ceil(self.calls * self.share))


class Breaker:
    """The circuit of one endpoint. `changed` is called after each change of state, with the breaker."""

    __slots__ = (
        "_changed", "_clock", "_generation", "_least", "_outcomes", "_policy", "_probing", "_reopened", "_took",
        "endpoint", "last_error", "opened", "retry_at", "since", "state",
    )  # fmt: skip

    def __init__(
        self, endpoint: str, policy: Policy, clock: Callable[[], float], changed: Callable[["Breaker"], None] = lambda _: None
    ) -> None:
        self.endpoint = endpoint
        self.state = State.CLOSED
        self.since = clock()
        """Since when it is in this state."""
        self.opened: float | None = None
        """Since when it isn't closed."""
        self.retry_at: float | None = None
        """When the next call is let in, while it is open; when the one call should be over, while it is half open."""
        self.last_error: str | None = None
        self._policy, self._clock, self._changed = policy, clock, changed
        self._least = policy.failures
        self._outcomes: deque[tuple[float, bool]] = deque()
        self._generation = 0
        self._probing = False
        self._reopened = 0
        self._took = 0.0

    @property
    def calls(self) -> int:
        """How many calls it judges by, now."""
        return len(self._outcomes)

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return sum(1 for _, failed in [*self._outcomes] if failed)

    def admit(self) -> "Attempt | None":
        """Let a call in, or not. Whoever is let in must end the attempt (it is a context manager)."""
        now = self._clock()
        if self.state is not State.CLOSED:
            if self.state is State.OPEN and self.retry_at is not None and now >= self.retry_at:
                self._turn(State.HALF_OPEN, now)
            if self.state is State.OPEN or self._probing:
                return None
            self._probing = True
            self.retry_at = now + max(self._wait_s, min(self._took, LONGEST_PROBE_S))
        return Attempt(self, self._generation, now)

    def retry_after_s(self, call_id: str) -> float:
        """Return after how many seconds a refused call should come back; each call has its own, around the same time."""
        left = max(0.0, (self.retry_at or 0.0) - self._clock()) or self._wait_s  # the one call may be overdue
        return left + self._wait_s * SPREAD * crc32(call_id.encode()) / 0xFFFFFFFF

    @property
    def _wait_s(self) -> float:
        first = self._policy.open_s
        return min(first * 2.0 ** min(self._reopened, 16), max(first, LONGEST_S))

    def _end(self, attempt: "Attempt", error: str | None, *, counts: bool) -> None:
        """Take what an attempt said when it ended."""
        if attempt.generation != self._generation:
            return
        self._probing = False
        if not counts:
            return
        now = self._clock()
        if error is None:
            self._took = now - attempt.began
        else:
            self.last_error = clean_text(" ".join(error.split()))[:_ERROR_CHARS]
        if self.state is State.HALF_OPEN:
            self._turn(State.CLOSED if error is None else State.OPEN, now)
        else:
            self._count(now, error)

    def _count(self, now: float, error: str | None) -> None:
        """Take the outcome of a call of a closed circuit."""
        outcomes = self._outcomes
        outcomes.append((now, error is not None))
        while outcomes and (len(outcomes) > self._policy.calls or outcomes[0][0] < now - FRESH_S):
            outcomes.popleft()
        if error is not None and self.failed >= self._least:
            self._turn(State.OPEN, now)

    def _turn(self, state: State, now: float) -> None:
        if state is State.OPEN and self.state is State.HALF_OPEN:
            self._reopened += 1
        self.state, self.since = state, now
        self._generation += 1
        self._probing = False
        if state is State.OPEN:
            self.opened = now if self.opened is None else self.opened
            self.retry_at = now + self._wait_s
        elif state is State.CLOSED:
            self.opened = self.retry_at = None
            self._reopened = 0
            self._outcomes.clear()
        self._changed(self)


class Attempt:
    """A call that was let in. Its first word counts; one that ends without a word counts as nothing."""

    __slots__ = ("_breaker", "_ended", "began", "generation")

    def __init__(self, breaker: Breaker, generation: int, began: float) -> None:
        self.generation, self.began = generation, began
        self._breaker, self._ended = breaker, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._say(None, counts=False)

    def answered(self) -> None:
        """Say that the endpoint works, whatever it answered."""
        self._say(None, counts=True)

    def failed(self, error: str) -> None:
        """Say that the endpoint was not there, or not in time."""
        self._say(error or "no reason given", counts=True)

    def _say(self, error: str | None, *, counts: bool) -> None:
        if not self._ended:
            self._ended = True
            self._breaker._end(self, error, counts=counts)  # noqa: SLF001 - the two are one thing


def had_time(now: float, queued: int, deadline: int) -> bool:
    """Say whether a call that starts now has at least half of its time left: one that waited for us says nothing of the endpoint.

    `now` in seconds, `queued` and `deadline` in milliseconds since the epoch.
    """
    return 2 * (deadline - now * 1000) >= deadline - queued


class Breakers:
    """The circuits of a worker, by endpoint. `on_change` is called, on the worker's loop, after each change of a state."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._policy = Policy(settings.breaker_calls, settings.breaker_share, settings.breaker_open_s)
        self._clock = clock
        self._circuits: dict[str, Breaker] = {}

    def attempt(self, endpoint: str, call_id: str) -> Attempt | Failure:
        """Let a call to an endpoint in, or return the failure that it ends with."""
        circuit = self._circuits.get(endpoint)
        if circuit is None:
            circuit = self._circuits[endpoint] = Breaker(endpoint, self._policy, self._clock, self._changed)
        attempt = circuit.admit()
        if attempt is not None:
            return attempt
        since = datetime.fromtimestamp(self._at_ms(circuit.opened or circuit.since) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        message = f"circuit of {endpoint} is open since {since}: {circuit.last_error}"
        return Failure(FailureKind.UNAVAILABLE, clean_text(message), round(circuit.retry_after_s(call_id) * 1000))

    def report(self) -> tuple[CircuitReported, ...]:
        """Return how the circuits are that aren't simply closed and without failures."""
        return tuple(
            CircuitReported(
                circuit.endpoint,
                circuit.state.value,
                self._at_ms(circuit.since),
                None if (retry := circuit.retry_at) is None else self._at_ms(retry),
                circuit.failed,
                circuit.calls,
                circuit.last_error,
            )
            for circuit in [*self._circuits.values()]
            if circuit.state is not State.CLOSED or circuit.failed
        )

    def _changed(self, circuit: Breaker) -> None:
        say = log.info if circuit.state is State.CLOSED else log.warning
        name = "opened" if circuit.state is State.OPEN else circuit.state
        say(
            f"breaker.{name}",
            endpoint=circuit.endpoint,
            failed=circuit.failed,
            of=circuit.calls,
            last_error=circuit.last_error,
            retry_after_s=None if circuit.retry_at is None else round(circuit.retry_at - self._clock(), 3),
        )
        self.on_change()

    def _at_ms(self, at: float) -> int:
        """Return a time of our clock in milliseconds since the epoch."""
        return round((time.time() + at - self._clock()) * 1000)
