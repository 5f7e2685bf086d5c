"""The projector: reads the topics into the views. Runs in a thread of the api's process; it consumes and never produces.

It belongs to no consumer group: where it goes on stands in the views themselves, in the same transaction as what they say.

What hinders it (Kafka away, topics not there yet, no room, a file that another process holds or that is damaged, a record that
newer code wrote) it says once, and tries again with pauses, for as long as it takes; a damaged file it puts aside and makes anew
from Kafka. Questions are answered from views that held all that was in Kafka when they were opened: half of a rebuild would be
rows that are wrong.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from events import topics
from events.errors import NewerCodeError
from projections.database import (
    LittleRoomError,
    NoRoomError,
    Positions,
    StaleViewsError,
    ViewsDamagedError,
    ViewsError,
    check_room,
    make_room,
)
from projections.rebuild import Building
from projections.source import Source, TopicsChangedError, found, reachable
from projections.views import Views
from streams.kafka import Cluster, KafkaUnreachableError, TopicsMissingError
from streams.settings import Settings

log = structlog.get_logger()

_FILE: Final = "views.duckdb"
_EVERY_S: Final = (0.1, 0.5)
"""How soon a transaction follows another while the views are up to date: each costs as much as hundreds of rows."""
_SHARE: Final = 5
"""The views take a fifth of the time for transactions, as long as that is within these bounds: what is busy goes on meanwhile."""
_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
"""How long to wait after the first, the second … hindrance without progress between them; then always the last."""
_MANY: Final = 100_000
"""From how many decisions on empty views are filled by several processes: to start them takes a second or two."""
_HINDRANCES: Final = (
    ViewsError,
    StaleViewsError,
    KafkaUnreachableError,
    TopicsMissingError,
    TopicsChangedError,
    NewerCodeError,
)


class NotReadyError(Exception):
    """The views can't be asked yet: Kafka has not answered so far, or they are being made anew."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Views that are made anew: why, and how many of the records that were in Kafka at its beginning are read."""

    reason: str
    position: int
    end: int


class Projector:
    """Keeps the views up to date. `on_failure` is called from its thread when it can't go on; `failure` then says why.

    `problem`: what hinders it now, which it tries again by itself; None while nothing does.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path | None = None,
        *,
        rebuild: bool = False,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.path = path or settings.data_dir / _FILE
        self.caught_up = threading.Event()
        """Set once the views hold all that was in Kafka at the start."""
        self.failure: str | None = None
        self.problem: str | None = None
        self._rebuild: StaleViewsError | ViewsDamagedError | None = (
            StaleViewsError("they are to be made anew") if rebuild else None
        )
        self._on_failure = on_failure
        self._views: Views | None = None
        self._building: Building | None = None
        self._made_anew: str | None = None
        """Why the views were made anew, until they hold what they must hold."""
        self._answering = False
        self._hindrances = 0
        self._targets: Positions = {}
        """Up to where the views must have read before they are asked."""
        self._ends: Positions = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._guarded, name="projector", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, wait for it, and close the views."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._drop()

    @property
    def views(self) -> Views:
        """The views. Raises NotReadyError while they can't be asked."""
        views = self._views
        if views is None or not self._answering:
            raise NotReadyError(self._why_not())
        return views

    @property
    def rebuild(self) -> Rebuild | None:
        """The rebuild that is under way, if there is one."""
        reason, positions = self._made_anew, self.positions
        if self._answering or reason is None:
            return None
        done = sum(min(positions.get(place, 0), end) for place, end in self._targets.items())
        return Rebuild(reason, done, sum(self._targets.values()))

    @property
    def positions(self) -> Positions:
        """Where reading goes on, also while the views can't be asked."""
        views, building = self._views, self._building
        if building is not None:
            return building.positions()
        return {} if views is None else dict(views.positions)

    def reachable(self) -> bool:
        """Ask Kafka whether it answers (two seconds if it doesn't)."""
        return reachable(self.settings)

    def lag(self, positions: Positions) -> Positions:
        """Return how many records of each partition the views at these positions don't hold yet."""
        return {place: max(0, end - positions.get(place, 0)) for place, end in _lasting(self._ends).items()}

    def _why_not(self) -> str:
        if self.failure or self.problem:
            return str(self.failure or self.problem)
        if rebuild := self.rebuild:
            return f"The views are being made anew ({rebuild.reason}): {rebuild.position:,} of {rebuild.end:,} records are read."
        if self._views is not None or self._building is not None:
            return f"The views are still {sum(self.lag(self.positions).values()):,} records behind Kafka."
        return f"Kafka at {self.settings.bootstrap_servers} has not answered yet"

    # --- The thread ---

    def _guarded(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._follow()
                except _HINDRANCES as error:
                    self._hindered(error)
        except Exception as error:  # the thread's end must be known, whatever ends it: the process can't go on without it
            self.failure = f"{type(error).__name__}: {error}"
            log.exception("projector.failed")
            self._on_failure()

    def _hindered(self, error: Exception) -> None:
        """Say what is wrong, once; take the views out of use where they can't serve; and wait a little."""
        if str(error) != self.problem:
            log.error("projector.hindered", problem=str(error))
            self.problem = str(error)
        match error:
            case ViewsDamagedError() | StaleViewsError():
                self._rebuild = error
                self._drop()
            case TopicsChangedError():
                self._drop()
            case ViewsError():
                if isinstance(error, NoRoomError | LittleRoomError):
                    make_room(self.path)
                if isinstance(error, NoRoomError) or (self._views is not None and not self._views.alive()):
                    self._drop()
        # What is still open can be asked: its rows are old ones, and each answer says how old.
        self._stop.wait(_PAUSES_S[min(self._hindrances, len(_PAUSES_S) - 1)])
        self._hindrances += 1

    def _drop(self) -> None:
        views, self._views, self._answering = self._views, None, False
        if views is not None:
            views.close()

    def _follow(self) -> None:
        """Read until told to stop. Raises what hinders that."""
        cluster = found(self.settings)
        with contextlib.closing(Source(self.settings, cluster)) as source:
            views = self._opened(source, cluster)
            self._ends = dict(source.ends)
            source.begin(views.positions)
            log.info("projector.started", path=str(self.path), behind=sum(self.lag(views.positions).values()))
            while not self._stop.is_set():
                views.check()
                source.check()
                if not self._answering and all(views.positions.get(place, 0) >= end for place, end in self._targets.items()):
                    self._answering, self._made_anew = True, None
                    self.caught_up.set()
                    log.info("projector.caught_up", records=sum(self._targets.values()))
                batch = source.poll()
                self._ends = dict(source.ends)
                if batch:
                    check_room(self.path)
                    began = time.monotonic()
                    views.apply(batch)
                    took = time.monotonic() - began
                    if not source.far_behind:
                        self._stop.wait(min(max(_EVERY_S[0], _SHARE * took), _EVERY_S[1]) - took)
                source.refuse_newer()
                if self.problem is not None and (batch or not any(self.lag(views.positions).values())):
                    log.info("projector.goes_on", after=self.problem)
                    self.problem, self._hindrances = None, 0

    def _opened(self, source: Source, cluster: Cluster) -> Views:
        """Return the views: those that are open, or the file's, or new ones. Raises ViewsError and StaleViewsError."""
        firsts = source.look()
        if self._views is None:
            began = time.monotonic()
            self._targets, self._ends = _lasting(source.ends), dict(source.ends)
            views = Views(self.path, cluster.ids, cluster.partitions[topics.DECISIONS.name], rebuild=self._rebuild)
            self._rebuild, self._made_anew = None, views.made_anew or self._made_anew
            if not views.positions and _decisions(source.ends) - _decisions(firsts) >= _MANY:
                views = self._built(views, cluster, firsts)
            self._views = views
            log.info("views.opened", open_runs=len(views.runs.open), seconds=round(time.monotonic() - began, 3))
        views = self._views
        # Only these ends count, which were asked for: those that come with fetches can go back when a partition's leader changes.
        if beyond := [place for place, position in views.positions.items() if position > source.ends.get(place, 0)]:
            raise StaleViewsError(f"the log is shorter than what was read: {beyond}")
        for (topic, partition), first in firsts.items():
            if topic == topics.DECISIONS.name and first > views.positions.get((topic, partition), 0):
                log.error("projector.history_cut", partition=partition, first=first, problem="records before it were deleted")
        return views

    def _built(self, empty: Views, cluster: Cluster, firsts: Positions) -> Views:
        """Return views that several processes have filled, as far as Kafka went, for empty ones. Raises what hinders that."""
        empty.close()
        building = self._building = Building(self.settings, self.path, cluster, firsts, self._targets)
        try:
            building.run(self._stop)
        finally:
            self._building = None
        return Views(self.path, cluster.ids, cluster.partitions[topics.DECISIONS.name])


def _lasting(ends: Positions) -> Positions:
    """Return the ends without those of a topic whose last records may have been forgotten: nobody can read up to them."""
    return {place: end for place, end in ends.items() if place[0] != topics.WORKERS.name}


def _decisions(positions: Positions) -> int:
    return sum(position for (topic, _), position in positions.items() if topic == topics.DECISIONS.name)
