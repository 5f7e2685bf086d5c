"""The shelf: runs of one partition that wait for long, out of memory and quickly at hand.

It is a cache of the topic `snapshots`, in a temporary database that SQLite keeps in memory as long as it is small and in an
unnamed file beyond that; it goes with the process. What counts is on the topic.
"""

import sqlite3

_CACHE_KB = 4096


class Shelf:
    """Snapshots of one partition's runs, by run and by when their next timer is due."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KB}"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute("CREATE TABLE runs (run_id TEXT PRIMARY KEY, seq INTEGER, due INTEGER, value BLOB) WITHOUT ROWID")
        self._db.execute("CREATE INDEX by_due ON runs (due) WHERE due > 0")
        # One transaction for good: nothing of it is ever read by anybody else, or after the end of the process.
        self._db.execute("BEGIN")
        self._count = 0
        self._next_due: int | None = None

    def __len__(self) -> int:
        return self._count

    def put(self, run_id: str, seq: int, due: int, value: bytes) -> None:
        """Keep a run's snapshot, unless there is one of a later decision. `due`: milliseconds since the epoch, 0: never."""
        before = self._db.execute("SELECT seq, due FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if before is not None and before[0] >= seq:
            return
        if before is not None:
            self._remove(run_id, before[1])
        self._db.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", (run_id, seq, due, value))
        self._count += 1
        if due and (self._next_due is None or due < self._next_due):
            self._next_due = due

    def take(self, run_id: str) -> tuple[int, bytes] | None:
        """Return a run's snapshot and the number of its decision, and keep it no longer; None: there is none."""
        if not self._count:
            return None
        found = self._db.execute("SELECT seq, value, due FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if found is None:
            return None
        self._remove(run_id, found[2])
        return found[0], found[1]

    def drop(self, run_id: str, seq: int) -> None:
        """Keep the snapshot of a certain decision no longer."""
        found = self._db.execute("SELECT due FROM runs WHERE run_id = ? AND seq = ?", (run_id, seq)).fetchone()
        if found is not None:
            self._remove(run_id, found[0])

    def _remove(self, run_id: str, due: int) -> None:
        self._db.execute("DELETE FROM runs WHERE run_id = ?", (run_id,))
        self._count -= 1
        if due and due == self._next_due:
            self._next_due = self._db.execute("SELECT min(due) FROM runs WHERE due > 0").fetchone()[0]

    def due(self, before: int, most: int) -> list[str]:
        """Return runs whose next timer is due before a time (milliseconds since the epoch), the earliest first."""
        if self._next_due is None or self._next_due >= before:
            return []
        found = self._db.execute("SELECT run_id FROM runs WHERE due > 0 AND due < ? ORDER BY due LIMIT ?", (before, most))
        return [run_id for (run_id,) in found.fetchall()]

    def next_due(self) -> int | None:
        """Return when the next timer may be due, milliseconds since the epoch; None: there is none."""
        return self._next_due

    def close(self) -> None:
        """Forget everything."""
        self._db.close()


__all__ = ["Shelf"]
