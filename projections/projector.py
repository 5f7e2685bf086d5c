"""The projector: reads the topics into the views. Runs in a thread of the api's process; it consumes and never produces.

It belongs to no consumer group: where it goes on stands in the views themselves, in the same transaction as what they say.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from events import topics
from projections.database import Positions
from projections.source import Source, reachable
from projections.views import Batch, Views
from streams import kafka
from streams.kafka import Cluster, KafkaUnreachableError
from streams.settings import Settings

log = structlog.get_logger()

_CONNECT_S: Final = 120.0
_FILE: Final = "views.duckdb"


class NotReadyError(Exception):
    """The views can't be asked yet: Kafka has not answered so far."""


class Projector:
    """Keeps the views up to date. `on_failure` is called from its thread when it can't go on; `failure` then says why."""

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
        self._rebuild = rebuild
        self._on_failure = on_failure
        self._views: Views | None = None
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
        if self._views is not None:
            self._views.close()
            self._views = None

    @property
    def views(self) -> Views:
        """The views. Raises NotReadyError before Kafka has answered for the first time."""
        if self._views is None:
            raise NotReadyError(self.failure or f"Kafka at {self.settings.bootstrap_servers} has not answered yet")
        return self._views

    @property
    def opened(self) -> bool:
        """Whether the views can be asked."""
        return self._views is not None

    def reachable(self) -> bool:
        """Ask Kafka whether it answers (two seconds if it doesn't)."""
        return reachable(self.settings)

    def lag(self, positions: Positions) -> Positions:
        """Return how many records of each partition the views at these positions don't hold yet."""
        return {place: max(0, end - positions.get(place, 0)) for place, end in self._ends.items()}

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:  # the thread's end must be known, whatever ends it: the process can't go on without it
            self.failure = f"{type(error).__name__}: {error}"
            log.exception("projector.failed")
            self._on_failure()

    def _run(self) -> None:
        cluster = self._connected()
        if cluster is None:
            return
        with contextlib.closing(Source(self.settings, cluster)) as source:
            views = self._opened(source, cluster)
            targets = dict(source.ends)
            self._ends, self._views = targets, views
            source.begin(views.positions)
            log.info("projector.started", path=str(self.path), behind=sum(self.lag(views.positions).values()))
            while not self._stop.is_set():
                if not self.caught_up.is_set() and all(views.positions.get(at, 0) >= end for at, end in targets.items()):
                    self.caught_up.set()
                    log.info("projector.caught_up", records=sum(targets.values()))
                batch = source.poll()
                self._ends = dict(source.ends)
                if batch != _NOTHING:
                    views.apply(batch)

    def _connected(self) -> Cluster | None:
        """Wait for Kafka, as long as it may take to start; None when told to stop meanwhile. Raises KafkaUnreachableError."""
        deadline = time.monotonic() + _CONNECT_S
        while not self._stop.is_set():
            try:
                return kafka.connect(self.settings, timeout_s=1.0)
            except KafkaUnreachableError:
                if time.monotonic() > deadline:
                    raise
        return None

    def _opened(self, source: Source, cluster: Cluster) -> Views:
        """Open the views; those that claim to hold more than the log does are built anew."""
        began = time.monotonic()
        partitions = cluster.partitions[topics.DECISIONS.name]
        views = Views(self.path, cluster.ids, partitions, rebuild=self._rebuild)
        firsts = source.look()
        beyond = [place for place, position in views.positions.items() if position > source.ends.get(place, 0)]
        if beyond:
            log.warning("views.rebuilt", path=str(self.path), reason=f"the log is shorter than what was read: {beyond}")
            views.close()
            views = Views(self.path, cluster.ids, partitions, rebuild=True)
        cut = {place: first for place, first in firsts.items() if place[0] == topics.DECISIONS.name}
        for (_, partition), first in cut.items():
            if first > views.positions.get((topics.DECISIONS.name, partition), 0):
                log.error("projector.history_cut", partition=partition, first=first, problem="records before it were deleted")
        log.info("views.opened", open_runs=len(views.runs.open), seconds=round(time.monotonic() - began, 3))
        return views


_NOTHING: Final = Batch([], [], [])
