"""Workers: what each process of the processors says of itself, so that people can see who works where."""

from typing import Final

from events.frozen import frozen

SILENT_AFTER_MS: Final = 90_000
"""After how long without a report a worker counts as silent: three of them are missing."""


@frozen
class CircuitReported:
    """The circuit of an endpoint in one worker. `state`: closed, open or half_open; times are milliseconds since the epoch."""

    endpoint: str
    state: str
    since: int
    retry_at: int | None
    failures: int
    calls: int
    last_error: str | None


@frozen
class WorkerReported:
    """How a worker is. Topic `workers`, key `worker_id`; a tombstone: it has stopped. Times are milliseconds since the epoch."""

    worker_id: str
    role: str
    host: str
    pid: int
    version: str
    started_at: int
    reported_at: int
    in_flight: int
    concurrency: int
    partitions: tuple[int, ...]
    breakers: tuple[CircuitReported, ...]
