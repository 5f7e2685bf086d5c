"""The projector: reads the topics into the views. Runs in a thread of the api's process; it consumes and never produces.

It belongs to no consumer group: where it goes on stands in the views themselves, in the same transaction as what they say.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from confluent_kafka import Consumer, KafkaException, Message
from confluent_kafka.admin import AdminClient

from events import topics
from projections.database import Positions
from projections.ledger import Record
from projections.views import SOURCES, Batch, Views
from streams import kafka
from streams.kafka import Cluster, TopicPartition
from streams.settings import Settings

log = structlog.get_logger()

BATCH: Final = 10_000
"""Most records of one transaction: larger ones gain little (measured: 1,000 → 10,000 doubles the speed, 50,000 adds a tenth)."""
_PATIENCE_S: Final = 0.2
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
        self.failure: str | None = None
        self.ends: Positions = {}
        """Ends of all partitions, as last heard from Kafka."""
        self._rebuild = rebuild
        self._on_failure = on_failure
        self._views: Views | None = None
        self._asks: AdminClient | None = None
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
        """Ask Kafka whether it answers, for up to two seconds."""
        if self._asks is None:
            self._asks = kafka.admin(self.settings)
        try:
            self._asks.list_topics(timeout=2.0)
        except KafkaException:
            return False
        return True

    def lag(self, positions: Positions) -> Positions:
        """Return how many records of each partition the views at these positions don't hold yet."""
        return {place: max(0, end - positions.get(place, 0)) for place, end in self.ends.items()}

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:  # the thread's end must be known, whatever ends it: the process can't go on without it
            self.failure = f"{type(error).__name__}: {error}"
            log.exception("projector.failed")
            self._on_failure()

    def _run(self) -> None:
        cluster = kafka.connect(self.settings)
        with kafka.closing(kafka.reader(self.settings)) as source:
            self._views = views = self._opened(source, cluster)
            targets = dict(self.ends)
            starts = [
                TopicPartition(
                    kafka.name(self.settings, topics.TOPICS[topic]), partition, views.positions.get((topic, partition), 0)
                )
                for topic, partition in self.ends
            ]
            source.assign(starts)
            log.info("projector.started", path=str(self.path), behind=sum(self.lag(views.positions).values()))
            while not self._stop.is_set():
                messages = kafka.poll(source, _PATIENCE_S, BATCH)
                if messages:
                    views.apply(self._batch(views, messages))
                self._look_at_ends(source)
                if not self.caught_up.is_set() and all(views.positions.get(at, 0) >= end for at, end in targets.items()):
                    self.caught_up.set()
                    log.info("projector.caught_up", records=sum(targets.values()))

    def _opened(self, source: Consumer, cluster: Cluster) -> Views:
        """Open the views; those that claim to hold more than the log does are built anew."""
        began = time.monotonic()
        partitions = cluster.partitions[topics.DECISIONS.name]
        views = Views(self.path, cluster.ids, partitions, rebuild=self._rebuild)
        for topic in SOURCES:
            for partition in range(cluster.partitions[topic.name]):
                low, high = kafka.watermarks(source, kafka.name(self.settings, topic), partition)
                self.ends[topic.name, partition] = high
                if low > views.positions.get((topic.name, partition), 0) and topic is topics.DECISIONS:
                    log.error(
                        "projector.history_cut",
                        partition=partition,
                        first=low,
                        problem="records were deleted before they were read",
                    )
        beyond = [place for place, position in views.positions.items() if position > self.ends.get(place, 0)]
        if beyond:
            log.warning("views.rebuilt", path=str(self.path), reason=f"the log is shorter than what was read: {beyond}")
            views.close()
            views = Views(self.path, cluster.ids, partitions, rebuild=True)
        log.info("views.opened", open_runs=len(views.runs.open), seconds=round(time.monotonic() - began, 3))
        return views

    def _batch(self, views: Views, messages: list[Message]) -> Batch:
        batch: dict[str, list[Record]] = {topic.name: [] for topic in SOURCES}
        prefix = len(self.settings.topic_prefix)
        for message in messages:
            topic = (message.topic() or "")[prefix:]
            record = Record(message.partition() or 0, message.offset() or 0, message.value())
            # After a broker's "offset out of range" librdkafka starts from the beginning: what was read isn't read again.
            if record.offset >= views.positions.get((topic, record.partition), 0):
                batch[topic].append(record)
        return Batch(batch[topics.DECISIONS.name], batch[topics.DEADLETTER.name], batch[topics.SPECS.name])

    def _look_at_ends(self, source: Consumer) -> None:
        """Take the partitions' ends that came with the last fetches: no question to the broker."""
        for topic, partition in self.ends:
            full = kafka.name(self.settings, topics.TOPICS[topic])
            low_high = source.get_watermark_offsets(TopicPartition(full, partition), cached=True)
            if low_high is not None and low_high[1] >= 0:
                self.ends[topic, partition] = low_high[1]
