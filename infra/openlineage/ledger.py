"""Reads the ledger as OpenLineage events: all that is there, one run, or on and on from where it was told before.

    position and mark fetched ──▶ rounds (read from the mark, told from the position on) ──▶ receiver has it ──▶ commit ──▶ …

One process reads all partitions, and takes them itself instead of being given them: one that is started anew after it was killed
goes on at once. Should two run, both tell, the same bytes: nothing is lost, and for receivers the same event twice is one.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Final, Self

import structlog
from confluent_kafka import KafkaException

from events import topics
from events.decisions import Decision, FinishedRun, FinishedRuns
from events.errors import NewerCodeError, NotDecodableError
from infra.openlineage.families import Families
from infra.openlineage.partition import Partition
from projections.lineage_data import Definition
from projections.openlineage import Event, Family, OpenLineage
from projections.replay_sources import run_of
from streams import commits, kafka
from streams.kafka import Message, TopicPartition
from streams.processors.finished import Place
from streams.registry import SpecRegistry
from streams.schemas import Schemas
from streams.settings import Settings

log = structlog.get_logger()

_READ: Final = (topics.INBOX, topics.DECISIONS, topics.FINISHED, topics.SPECS)
_FIND_S: Final = 5.0
_POLL_S: Final = 0.2
_COMMIT_EVERY_S: Final = 0.5
_TIDY_EVERY_S: Final = 5.0
_COMMIT_S: Final = 5.0


class Ledger:
    """The decisions that count, as OpenLineage events. For one thread.

    `group`: the consumer group that keeps how far they are told; without one everything is told. `since` (milliseconds since the
    epoch): what is told first where no group says it; `run`: only this run. Raises KafkaUnreachableError and TopicsMissingError.
    """

    def __init__(
        self, settings: Settings, namespace: str, *, group: str | None = None, since: int | None = None, run: str | None = None
    ) -> None:
        self._settings, self._group, self._run = settings, group, run
        self._topic, self._finished = kafka.name(settings, topics.DECISIONS), kafka.name(settings, topics.FINISHED)
        self._cluster = kafka.find(kafka.admin(settings), settings, _READ, _FIND_S)
        self._source = kafka.reader(settings) if group is None else kafka.consumer(settings, group)
        self._aside = kafka.reader(settings)
        self._schemas = Schemas(settings)
        self._specs = SpecRegistry(settings, self._schemas)
        self._definitions: dict[str, Definition] = {}
        self._partitions = self._begin(since)
        self._lineage = OpenLineage(namespace, self._definition, self._parent)
        self._families = Families(self._aside, self._topic, self._partitions, self._lineage.families)
        self._read_index()
        self._newer: NewerCodeError | None = None
        self._committed_at = self._tidied_at = time.monotonic()
        self._committed: list[tuple[int, str | None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each in (self._source, self._aside, self._schemas, self._specs):
            each.close()

    # --- Rounds: what each yields must be with the receiver before the next one ---

    def ends(self) -> dict[int, int]:
        """Return where the partitions that are read end now. Raises KafkaUnreachableError."""
        count = len(self._partitions)
        read = range(count) if self._run is None else (topics.partition_for(self._run.encode(), count),)
        return {each: kafka.watermarks(self._aside, self._topic, each)[1] for each in read}

    def behind(self, ends: dict[int, int]) -> int:
        """Return how many records there are up to these ends, at most."""
        return sum(max(0, end - self._partitions[each].next) for each, end in ends.items())

    def stored(self, ends: dict[int, int]) -> Iterator[tuple[list[Event], int]]:
        """Yield what is there up to these ends, each round with how many records that were.

        Raises KafkaUnreachableError and NewerCodeError.
        """
        starts = {each: self._partitions[each].next for each in ends}
        messages = kafka.read_partitions(self._source, self._topic, starts, ends)
        while batch := list(islice(messages, kafka.BATCH)):
            for events in self._round(batch):
                yield events, len(batch)

    def coming(self, stop: threading.Event) -> Iterator[list[Event]]:
        """Yield what is there and what comes, until `stop` is set. Raises KafkaUnreachableError and NewerCodeError."""
        self._source.assign([TopicPartition(self._topic, each, found.next) for each, found in self._partitions.items()])
        while not stop.is_set():
            yield from self._round(kafka.poll(self._source, _POLL_S))

    def _round(self, messages: Iterable[Message]) -> Iterator[list[Event]]:
        """Yield a round, maybe an empty one; of records of newer code, and what stands behind them, nothing."""
        events: list[Event] = []
        for message in messages:
            partition, offset = self._partitions[message.partition() or 0], message.offset() or 0
            if offset < partition.next:
                continue
            try:
                events += self._take(partition, offset, message.value())
            except NewerCodeError as error:
                self._newer = error
                break
        if time.monotonic() - self._tidied_at >= _TIDY_EVERY_S:
            self._tidy()
        yield events
        if self._newer is not None:
            raise self._newer

    def _take(self, partition: Partition, offset: int, value: bytes | None) -> list[Event]:
        if self._run is not None and run_of(value) not in (None, self._run.encode()):
            return []
        self._schemas.refuse_newer(f"decision {partition.place.partition}/{offset}", value, Decision)
        taken = partition.take(offset, value)
        if taken is None or (self._run is not None and taken[0].run_id != self._run):
            return []
        decision, decision_hash, is_new = taken
        events = self._lineage.take(decision, decision_hash, wanted=is_new)
        self._families.passed(decision.run_id)
        return events

    # --- What is asked of the log besides ---

    def _definition(self, digest: str) -> Definition | None:
        if digest not in self._definitions:
            spec = self._specs.get(digest)
            if spec is None:  # it was registered before the run began: it is there by now
                self._specs.refresh()
                spec = self._specs.get(digest)
            if spec is None:
                return None
            self._definitions[digest] = Definition(spec)
        return self._definitions[digest]

    def _parent(self, run_id: str) -> Family | None:
        return self._families.find(run_id)

    def _read_index(self) -> None:
        """Read the index of finished runs on to its end."""
        starts = {number: partition.index.end for number, partition in self._partitions.items()}
        for message in kafka.read_partitions(self._aside, self._finished, starts):
            self._schemas.refuse_newer("an entry of the index", message.value(), FinishedRun, FinishedRuns)
            try:
                self._partitions[message.partition() or 0].index.read(message.offset() or 0, message.key(), message.value())
            except NotDecodableError as error:
                log.warning("openlineage.index_unreadable", partition=message.partition(), problem=str(error))

    def _tidy(self) -> None:
        """Forget the runs that the index says are over, and move the marks up."""
        self._tidied_at = time.monotonic()
        self._read_index()
        for partition in self._partitions.values():
            for run_id in partition.move_mark():
                self._lineage.forget(run_id)

    # --- How far it is told ---

    def _begin(self, since: int | None) -> dict[int, Partition]:
        count, ids = self._cluster.partitions[topics.DECISIONS.name], self._cluster.ids
        found = {each: Partition(Place(ids[topics.INBOX.name], ids[topics.DECISIONS.name], each, count)) for each in range(count)}
        if since is not None:
            ends = {each: kafka.watermarks(self._aside, self._topic, each)[1] for each in found}
            for each, first in kafka.first_since(self._aside, self._topic, ends, since).items():
                found[each].position = first
        if self._group is not None:
            places = [TopicPartition(self._topic, each) for each in found]
            for place in commits.committed(self._source, places):
                if place.offset >= 0:
                    found[place.partition] = self._continued(found[place.partition].place, place)
        return found

    def _continued(self, place: Place, committed: TopicPartition) -> Partition:
        """Return a partition as it was committed; from the beginning if the topic was made anew since."""
        try:
            said = json.loads(committed.metadata or "{}")
            decisions, mark = str(said["decisions"]), int(said["mark"])
        except (ValueError, AttributeError, TypeError, KeyError):  # somebody has set the offset by hand
            return Partition(place, committed.offset)
        if decisions != place.decisions_id.hex():
            return Partition(place)
        return Partition(place, committed.offset, min(mark, committed.offset))

    def commit(self, *, now: bool = False) -> None:
        """Keep how far it is told, now and then or `now`: call it when the receiver has all of the rounds so far."""
        if self._group is None or not (now or time.monotonic() - self._committed_at >= _COMMIT_EVERY_S):
            return
        self._committed_at = time.monotonic()
        if now:
            self._tidy()
        offsets = [
            TopicPartition(self._topic, each, partition.position, metadata=self._metadata(partition))
            for each, partition in self._partitions.items()
        ]
        told = [(each.offset, each.metadata) for each in offsets]
        if told == self._committed:
            return
        try:
            commits.commit(self._source, offsets, _COMMIT_S)
            self._committed = told
        except KafkaException as error:  # what came last is told again after a restart
            log.warning("openlineage.not_committed", problem=str(error))

    def _metadata(self, partition: Partition) -> str:
        return json.dumps({"decisions": partition.place.decisions_id.hex(), "mark": partition.mark})
