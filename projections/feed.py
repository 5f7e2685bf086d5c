"""Accepted decisions in the order of the log, from any place in it on: what a live stream shows.

The shared filter has judged them already. Where a reader is stands in one text (`Place`), so that it can go on exactly behind the
last decision that it has seen, also after the views were made anew, and with another process: the same log has the same decisions
at the same offsets everywhere.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from events import topics
from events.topics import partition_for
from projections.table import Connection, rows
from projections.views import Views

_WINDOW: Final = 2_000
"""How many offsets of a partition are looked at at once: bounds what one reader holds in memory."""
_WIDE_WINDOW: Final = 50_000
"""The same where a single run's decisions are looked for."""
_FEW: Final = 100
_PLACE: Final = re.compile(r"v1:([0-9a-f]{8}):((?:[0-9]{1,4}=[0-9]{1,18}(?:,|$))*)", re.ASCII)


class OtherLogError(Exception):
    """The place belongs to a log that is gone: the topic was made anew."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reader is: the next offset of each partition; a partition that isn't there begins at 0."""

    log: str
    offsets: Mapping[int, int]

    def __str__(self) -> str:
        return f"v1:{self.log}:{','.join(f'{partition}={at}' for partition, at in sorted(self.offsets.items()))}"

    @classmethod
    def read(cls, text: str) -> "Place":
        """Return what a text says. Raises ValueError when it is none of ours."""
        match = _PLACE.fullmatch(text.strip())
        if not match:
            raise ValueError(f"`{text[:100]}` is no place in the log")
        pairs = (each.split("=") for each in match[2].split(",") if each)
        return cls(match[1], {int(partition): int(at) for partition, at in pairs})


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which decisions a reader wants: of one run, of a workflow's runs, of runs with all of these labels."""

    run_id: str | None = None
    workflow: str | None = None
    labels: tuple[tuple[str, str], ...] = ()

    def takes(self, workflow: str, labels: Mapping[str, str]) -> bool:
        """Whether it wants the decisions of such a run."""
        return self.workflow in {None, workflow} and all(labels.get(key) == value for key, value in self.labels)


@dataclass(slots=True)
class Feed:
    """A reader. `place`: behind what it has been given; it goes on from there. For one thread at a time."""

    place: Place
    wanted: Wanted
    partitions: tuple[int, ...] = field(default=())

    @classmethod
    def open(cls, views: Views, wanted: Wanted, after: Place | None, *, history: bool) -> "Feed":
        """Return a reader that goes on behind `after`; without it, from now on or (`history`) from the beginning.

        Raises OtherLogError, and ViewsError as reading does.
        """
        count = views.ledger.partitions
        partitions = tuple(range(count)) if wanted.run_id is None else (partition_for(wanted.run_id.encode(), count),)
        if after is None:
            now = {} if history else views.positions
            after = Place(views.log_id, {each: now.get((topics.DECISIONS.name, each), 0) for each in partitions})
        if after.log != views.log_id:
            raise OtherLogError(f"{after} is a place in a log that is gone; this one is {views.log_id}")
        offsets = {each: after.offsets.get(each, 0) for each in partitions}
        return cls(Place(after.log, offsets), wanted, partitions)

    def behind(self, positions: Mapping[tuple[str, int], int]) -> bool:
        """Whether views at these positions hold something that it has not looked at."""
        return any(positions.get((topics.DECISIONS.name, each), 0) > self.place.offsets[each] for each in self.partitions)

    def read(self, views: Views) -> list[tuple[Place, dict[str, Any]]]:
        """Return the next decisions, each with the place behind it; those of a run are in order.

        Nothing where the views have nothing (yet). Raises OtherLogError and ViewsError; then it can be asked again.
        """
        if views.log_id != self.place.log:
            raise OtherLogError(f"the log {self.place.log} is gone; this one is {views.log_id}")
        with views.snapshot() as (db, positions):
            ends: dict[int, int] = {}
            parts = []
            for partition in self.partitions:
                low, known = self.place.offsets[partition], positions.get((topics.DECISIONS.name, partition), 0)
                if low < known:
                    ends[partition] = min(known, low + (_WINDOW if self.wanted.run_id is None else _WIDE_WINDOW))
                    parts.append(_window(db, self.wanted.run_id, partition, low, ends[partition]))
            found = list(heapq.merge(*parts, key=lambda row: row["decided"]))
            runs = _runs(db, {row["run_id"] for row in found})
        given = list(self._given(found, runs))
        self.place = Place(self.place.log, {**self.place.offsets, **ends})
        return given

    def _given(
        self, found: list[dict[str, Any]], runs: Mapping[str, tuple[str, dict[str, str]]]
    ) -> Iterator[tuple[Place, dict[str, Any]]]:
        offsets = dict(self.place.offsets)
        for row in found:
            offsets[row["partition"]] = row["offset"] + 1
            workflow, labels = runs[row["run_id"]]
            if self.wanted.takes(workflow, labels):
                yield Place(self.place.log, dict(offsets)), {**row, "workflow": workflow, "labels": labels}


def _window(db: Connection, run_id: str | None, partition: int, low: int, high: int) -> list[dict[str, Any]]:
    # Rows lie in the log's order: by partition and offsets DuckDB passes over all row groups but one or two.
    query = f"""
        SELECT "partition", "offset", run_id, seq, decided, input_offset, input, step, "by", effects, ignored,
               lower(hex(hash)) AS hash, size
        FROM decisions
        WHERE "partition" = ? AND "offset" >= ? AND "offset" < ? {"" if run_id is None else "AND run_id = ?"}
        ORDER BY "offset"
    """  # noqa: S608 - our own text
    return rows(db, query, [partition, low, high, *([] if run_id is None else [run_id])])


def _runs(db: Connection, run_ids: set[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the workflows and labels of runs."""
    some = sorted(run_ids)
    where = f"run_id IN ({', '.join('?' * len(some))})" if len(some) <= _FEW else "run_id IN (SELECT unnest(?))"
    found = rows(
        db,
        f"SELECT run_id, workflow, labels FROM runs WHERE {where}",  # noqa: S608 - no values in it
        some if len(some) <= _FEW else [some],
    )
    return {row["run_id"]: (row["workflow"], row["labels"] or {}) for row in found}
