"""The read model `workers`: what each process of the processors said last. A worker that has stopped, or fell silent, stays.

Its topic keeps a day: what it has forgotten, and nobody repeats, is gone after a rebuild.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Final

from events.workers import SILENT_AFTER_MS, WorkerReported
from projections.table import Connection, Table, rows


@dataclass(slots=True)
class WorkerRow:
    """One process. Times in milliseconds since the epoch; `partitions` and `circuits` are JSON lists; `stopped`: it said so."""

    worker_id: str
    role: str | None = None
    host: str | None = None
    pid: int | None = None
    version: str | None = None
    started: int | None = None
    reported: int | None = None
    in_flight: int | None = None
    concurrency: int | None = None
    partitions: str | None = None
    circuits: str | None = None
    stopped: bool = False


TABLE: Final = Table(
    "workers",
    {
        "worker_id": "VARCHAR",
        "role": "VARCHAR",
        "host": "VARCHAR",
        "pid": "BIGINT",
        "version": "VARCHAR",
        "started": "TIMESTAMP_MS",
        "reported": "TIMESTAMP_MS",
        "in_flight": "BIGINT",
        "concurrency": "BIGINT",
        "partitions": "VARCHAR",
        "circuits": "VARCHAR",
        "stopped": "BOOLEAN",
    },
    key=("worker_id",),
)


@dataclass(slots=True)
class Workers:
    """Reports on their way to the table."""

    _changed: dict[str, WorkerRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Forget what was not written."""
        del db
        self._changed.clear()

    def apply(self, report: WorkerReported) -> None:
        """Take a report."""
        self._changed[report.worker_id] = WorkerRow(
            *(report.worker_id, report.role, report.host, report.pid, report.version, report.started_at, report.reported_at),
            *(report.in_flight, report.concurrency, json.dumps(report.partitions)),
            json.dumps([dataclasses.asdict(each) for each in report.breakers], ensure_ascii=False),
        )

    def stop(self, db: Connection, worker_id: str) -> None:
        """Take a worker's last word: what it said before stays."""
        row = self._changed.get(worker_id)
        if row is None:
            found = TABLE.load_keys(db, [worker_id])
            row = self._changed[worker_id] = WorkerRow(**found[0]) if found else WorkerRow(worker_id)
        row.stopped = True

    def write(self, db: Connection) -> None:
        """Write what has changed since the last time."""
        TABLE.upsert(db, list(self._changed.values()))
        self._changed.clear()


def newest(db: Connection, now_ms: int, limit: int) -> list[dict[str, Any]]:
    """Return workers, those that reported last first, with `status`: `working`, `silent` (for 90 s and more) or `stopped`."""
    query = """
        SELECT *, CASE WHEN stopped THEN 'stopped' WHEN reported < make_timestamp_ms(?)::TIMESTAMP_MS THEN 'silent'
                       ELSE 'working' END AS status
        FROM workers ORDER BY reported DESC NULLS LAST, worker_id LIMIT ?
    """
    return rows(db, query, [now_ms - SILENT_AFTER_MS, limit])
