"""The orchestrator: drives a tenure for each inbox partition that the consumer group gives it.

One thread, one consumer, one producer: poll, take, produce at once; every so often settle (wait for all acknowledgements, compare
offsets, index what finished) and then commit. How a tenure judges is in tenure.py; here is only what touches Kafka.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from events import topics
from events.errors import NewerCodeError, NotDecodableError
from streams import commits, kafka, patience
from streams.envelope import Incoming, Outgoing
from streams.kafka import Acks, Cluster
from streams.payloads import PayloadStore, PayloadStoreError
from streams.processors.tenure import Commit, Place, SnapshotDamagedError, SpecUnknownError, Tenure
from streams.processors.watchdog import Progress
from streams.registry import SpecRegistry
from streams.schemas import Schemas
from streams.settings import Settings
from streams.workflow.payloads import PayloadMissingError

log = structlog.get_logger()

GROUP: Final = "orchestrator"
SETTLE_EVERY_S: Final = 0.5
"""How long inputs may stay uncommitted; what is uncommitted at a crash is looked at again."""
SETTLE_AT_MOST: Final = 20_000
"""Own decisions at which a batch is settled even sooner."""
PATIENCE_S: Final = 30.0
"""How long an input waits for a workflow version that nobody has registered, or a payload that nobody has stored."""
COMMIT_WITHIN_S: Final = 10.0
"""How long a tenure's last commit is tried while Kafka is away."""
BURST_S: Final = 0.02
"""How long decisions are gathered under load before they are produced: one by one, each would be a request of its own."""
GIVEN_UP_S: Final = 300.0
"""How long no other input waits for a version that was given up."""


@dataclass(slots=True)
class Holding:
    """A partition in hand: its tenure, the acknowledgements of its records, and since when it waits for a spec or payload."""

    tenure: Tenure
    decisions: Acks = field(default_factory=Acks)
    others: Acks = field(default_factory=Acks)
    waits_since: float | None = None


class Orchestrator:
    """Consumes `inbox`, writes `decisions` and what follows from them. Runs in a thread of its own.

    Two that share no `group` both own every partition: wasteful, and harmless to the ledger.
    """

    def __init__(self, settings: Settings, group: str = GROUP) -> None:
        self.settings, self.group = settings, group
        self.inbox = kafka.name(settings, topics.INBOX)
        self.decisions = kafka.name(settings, topics.DECISIONS)
        self.finished = kafka.name(settings, topics.FINISHED)
        self.snapshots = kafka.name(settings, topics.SNAPSHOTS)
        self.holdings: dict[int, Holding] = {}
        self.ready = threading.Event()
        self._settled_at = 0.0
        self._gathered: list[tuple[Outgoing, Acks]] = []  # what was decided and isn't produced yet
        self._reading = False
        self._uncommitted: set[int] = set()  # partitions whose last commit failed
        self._distrusted: set[str] = set()  # runs whose snapshots are damaged
        self._given_up: dict[str, float] = {}  # versions that nobody registered, and when that was given up

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set.

        Raises DeliveryFailedError: then nothing more may be committed, and a new start takes over; and NewerCodeError: then
        only newer code may go on.
        """
        self.cluster: Cluster = kafka.connect(self.settings)
        self.specs = SpecRegistry(self.settings)
        self.specs.refresh()
        self.schemas = Schemas(self.settings)
        self.payloads = PayloadStore(self.settings)
        self.log_reader = kafka.reader(self.settings)
        # As the topic `decisions` has it: another codec would make the broker compress every decision anew.
        self.producer = kafka.producer(self.settings, **{"compression.type": topics.DECISIONS.compression})
        self.consumer = kafka.consumer(self.settings, self.group, on_commit=self._reported)
        self.consumer.subscribe([self.inbox], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)
        try:
            while not stop.is_set():
                try:
                    self._round()
                except SnapshotDamagedError as damaged:
                    self._distrust(damaged)
            self._settle(wait=True)
        except NewerCodeError:
            self._settle(wait=True)  # what was decided before counts
            raise
        finally:
            self.holdings.clear()
            self.consumer.close()
            self.log_reader.close()
            self.specs.close()

    def progress(self) -> Progress:
        """Return how far it has come; for the watchdog. While it takes over there is nothing to say."""
        return Progress({partition: holding.tenure.position for partition, holding in list(self.holdings.items())}, self._reading)

    # --- One round: inputs, timers, settling ---

    def _round(self) -> None:
        messages = kafka.poll(self.consumer, self._patience_s())
        skipped: set[int] = set()
        burst_ends = time.monotonic() + BURST_S
        for message in messages:
            partition = message.partition() or 0
            holding = self.holdings.get(partition)
            if holding is not None and partition not in skipped and not self._take(holding, message):
                skipped.add(partition)
            if (at := time.monotonic()) >= burst_ends:
                self._produce()
                burst_ends = at + BURST_S
        self._produce()
        now = time.time_ns() // 1_000_000
        for holding in self.holdings.values():
            for record in holding.tenure.due(now):
                kafka.produce(self.producer, self.settings, record, holding.others)
        self.producer.poll(0)
        unsettled = sum(holding.tenure.unsettled for holding in self.holdings.values())
        urgent = any(holding.tenure.urgent for holding in self.holdings.values())
        if urgent or unsettled >= SETTLE_AT_MOST or time.monotonic() - self._settled_at >= SETTLE_EVERY_S:
            self._settle()
            self._resume_waiting()

    def _patience_s(self) -> float:
        """Return how long to wait for inputs: until a timer or the next settlement is due."""
        timers = [due for holding in self.holdings.values() if (due := holding.tenure.next_timer()) is not None]
        until_timer = (min(timers) - time.time_ns() // 1_000_000) / 1000 if timers else SETTLE_EVERY_S
        until_settled = SETTLE_EVERY_S - (time.monotonic() - self._settled_at)
        return max(0.0, min(until_timer, until_settled))

    def _take(self, holding: Holding, message: Message) -> bool:
        """Let the tenure judge an input and gather what follows; False: the partition has to wait here."""
        record = kafka.incoming(message)
        patience = holding.waits_since is None or time.monotonic() - holding.waits_since <= PATIENCE_S
        try:
            outgoing = self._judged(holding.tenure, record, give_up=not patience)
        except (SpecUnknownError, PayloadMissingError, PayloadStoreError) as missing:
            holding.waits_since = holding.waits_since or time.monotonic()
            log.warning("orchestrator.waits", missing=str(missing), partition=record.partition, offset=record.offset)
            here = TopicPartition(self.inbox, record.partition, record.offset)
            self.consumer.pause([here])
            self.consumer.seek(here)
            return False
        holding.waits_since = None
        for each in outgoing:
            self._gathered.append((each, holding.decisions if each.topic is topics.DECISIONS else holding.others))
        return True

    def _produce(self) -> None:
        """Produce what was gathered, calls first: somebody waits for them, and the broker takes one request after the other."""
        for each, acks in sorted(self._gathered, key=lambda gathered: gathered[0].topic is topics.DECISIONS):
            kafka.produce(self.producer, self.settings, each, acks)
        self._gathered.clear()

    def _judged(self, tenure: Tenure, record: Incoming, *, give_up: bool) -> list[Outgoing]:
        """Return what follows from an input, after a look for its workflow version if that isn't known yet."""
        try:
            return tenure.take(record)
        except SpecUnknownError as unknown:
            self.specs.refresh()
            # Once is enough: requests that name what nobody registered must not hold a partition up one by one.
            give_up = give_up or time.monotonic() - self._given_up.get(unknown.digest, -math.inf) <= GIVEN_UP_S
            if give_up and self.specs.get(unknown.digest) is None:
                self._given_up[unknown.digest] = time.monotonic()
        except PayloadMissingError:
            if not give_up:
                raise
        return tenure.take(record, give_up=give_up)

    def _distrust(self, damaged: SnapshotDamagedError) -> None:
        """Begin again without a run's snapshots: its decisions hold all that they did."""
        self._note_damaged(damaged)
        self._produce()
        kafka.flush(self.producer, *(acks for holding in self.holdings.values() for acks in (holding.decisions, holding.others)))
        self._take_over(list(self.holdings), seek=True)

    def _resume_waiting(self) -> None:
        waiting = [TopicPartition(self.inbox, p) for p, holding in self.holdings.items() if holding.waits_since is not None]
        if waiting:
            self.consumer.resume(waiting)

    def _note_damaged(self, damaged: SnapshotDamagedError) -> None:
        log.error("orchestrator.snapshot_damaged", run_id=damaged.run_id, problem=str(damaged))
        self._distrusted.add(damaged.run_id)

    # --- Settling and committing ---

    def _settle(self, *, wait: bool = False) -> None:
        """Wait for all acknowledgements, check the offsets, index what finished, and only then commit."""
        self._settled_at = time.monotonic()
        self._produce()
        if not self._uncommitted and not any(h.tenure.unfinished for h in self.holdings.values()):
            return
        acks = [each for holding in self.holdings.values() for each in (holding.decisions, holding.others)]
        kafka.flush(self.producer, *acks)
        for partition, holding in list(self.holdings.items()):
            if not self._check(partition, holding):
                log.warning("orchestrator.overtaken", partition=partition)
                self._take_over([partition], seek=True)
        self._deliver([record for holding in self.holdings.values() for record in holding.tenure.follows()])
        entries = []
        for partition, holding in self.holdings.items():
            tenure = holding.tenure
            entries += tenure.index_entries()
            entries += self._packed(partition, tenure)
            entries += tenure.keep_idle(time.time_ns() // 1_000_000)
        self._deliver(entries)
        offsets = [offset for p, holding in self.holdings.items() if (offset := self._committable(p, holding))]
        self._uncommitted.clear()
        if not offsets:
            return
        try:
            if wait:
                commits.commit(self.consumer, offsets, COMMIT_WITHIN_S)
            else:
                self.consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:  # the group moved on; a lost commit costs time only
            log.info("orchestrator.not_committed", error=str(error))

    def _reported(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Commit again what could not be committed: who takes over would else look at all of it again."""
        self._uncommitted |= {each.partition for each in partitions if error is not None or each.error is not None}

    def _deliver(self, records: list[Outgoing]) -> None:
        """Produce records and wait until all are acknowledged."""
        acks = Acks()
        for record in records:
            kafka.produce(self.producer, self.settings, record, acks)
        if records:
            kafka.flush(self.producer, acks)

    def _packed(self, partition: int, tenure: Tenure) -> list[Outgoing]:
        """Return the index, packed, if that is due: all that stands in its partition, whoever wrote it."""
        if not tenure.pack_due:
            return []
        self._read_index({partition: tenure})
        return tenure.pack()

    def _check(self, partition: int, holding: Holding) -> bool:
        """Compare the offsets of the own decisions with what was read; False: somebody else's decisions count."""
        tenure, offsets = holding.tenure, holding.decisions.offsets
        holding.decisions, holding.others = Acks(), Acks()
        if not tenure.gap(offsets):
            tenure.settle(offsets)
            return True
        between = kafka.read_partition(self.log_reader, self.decisions, partition, tenure.end, offsets[-1] + 1)
        return tenure.reconcile([(message.offset() or 0, message.value()) for message in between], offsets)

    def _committable(self, partition: int, holding: Holding) -> TopicPartition | None:
        before = holding.tenure.base
        commit = holding.tenure.commit()
        if commit == before and partition not in self._uncommitted:
            return None
        ids = {topic.name: self.cluster.ids[topic.name].hex() for topic in (topics.INBOX, topics.DECISIONS, topics.FINISHED)}
        metadata = json.dumps({"mark": commit.mark, "index": commit.index, **ids})
        return TopicPartition(self.inbox, partition, commit.position, metadata)

    # --- Tenures begin and end ---

    @patience.unless_ending()
    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        del consumer
        self._take_over([each.partition for each in partitions], seek=False)
        self.ready.set()

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._settle(wait=True)
        self._drop(consumer, partitions)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Drop partitions that already belong to somebody else; what is in flight may land or not."""
        log.warning("orchestrator.lost", partitions=[each.partition for each in partitions])
        self._drop(consumer, partitions)

    def _drop(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for each in partitions:
            if holding := self.holdings.pop(each.partition, None):
                holding.tenure.shelf.close()
        consumer.incremental_unassign(partitions)

    def _take_over(self, partitions: list[int], *, seek: bool) -> None:
        """Fetch position and mark, then read the index and the decisions, and go on from the position."""
        began, self._reading = time.monotonic(), True
        committed = commits.committed(self.consumer, [TopicPartition(self.inbox, partition) for partition in partitions])
        while True:
            tenures = {each.partition: self._new_tenure(each) for each in committed}
            try:
                self._read_all(tenures)
            except SnapshotDamagedError as damaged:
                self._note_damaged(damaged)
            else:
                break
        self._reading = False
        for partition, tenure in tenures.items():
            self.holdings[partition] = Holding(tenure)
            log.info(
                "orchestrator.took_over",
                partition=partition,
                position=tenure.position,
                mark=tenure.base.mark,
                end=tenure.end,
                open_runs=len(tenure.runs),
                shelved_runs=len(tenure.shelf),
                finished_runs=len(tenure.finished),
                seconds=round(time.monotonic() - began, 3),
            )
            for run_id, problem in tenure.broken.items():
                log.error("orchestrator.integrity", run_id=run_id, problem=problem)
        starts = [TopicPartition(self.inbox, partition, tenure.position) for partition, tenure in tenures.items()]
        if seek:
            for start in starts:
                self.consumer.seek(start)
        else:
            self.consumer.incremental_assign(starts)

    def _new_tenure(self, committed: TopicPartition) -> Tenure:
        ids, count, partition = self.cluster.ids, self.cluster.partitions[topics.INBOX.name], committed.partition
        place = Place(ids[topics.INBOX.name], ids[topics.DECISIONS.name], partition, count)
        base, idle_ms = committed_base(committed, ids), round(self.settings.idle_after_s * 1000)
        distrusted = frozenset(run for run in self._distrusted if topics.partition_for(run.encode(), count) == partition)
        if distrusted:
            base = replace(base, mark=0)
        newer = self.schemas.newer
        return Tenure(place, self.specs.get, base, self.payloads, idle_ms=idle_ms, distrusted=distrusted, newer=newer)

    def _read_all(self, tenures: dict[int, Tenure]) -> None:
        """Let new tenures read snapshots, index and decisions, in this order, and look at the inputs to come."""
        for message in self._read(self.snapshots, dict.fromkeys(tenures, 0)):
            record = kafka.incoming(message)
            tenures[record.partition].snapshot_read(record.key, record.value, record.headers)
        self._read_index(tenures)
        for message in self._read(self.decisions, {partition: tenure.base.mark for partition, tenure in tenures.items()}):
            tenures[message.partition() or 0].read(message.offset() or 0, message.value())
        for partition, tenure in tenures.items():
            tenure.begin(tenure.end, kafka.watermarks(self.log_reader, self.inbox, partition)[1])
        ahead = {partition: tenure.position for partition, tenure in tenures.items() if tenure.awaits_answers()}
        for message in self._read(self.inbox, ahead):
            tenures[message.partition() or 0].look_ahead(kafka.incoming(message))

    def _read(self, topic: str, starts: dict[int, int]) -> Iterator[Message]:
        """Yield the records of these partitions up to their ends, all of them fetched together."""
        return kafka.read_partitions(self.log_reader, topic, starts)

    def _read_index(self, tenures: dict[int, Tenure]) -> None:
        """Let tenures read the index of finished runs, from where they have read it to its end."""
        for message in self._read(self.finished, {partition: tenure.finished.end for partition, tenure in tenures.items()}):
            tenure, offset = tenures[message.partition() or 0], message.offset() or 0
            try:
                tenure.index_read(offset, message.key(), message.value())
            except NotDecodableError as error:
                log.warning("finished.unreadable", partition=message.partition(), offset=offset, problem=str(error))


def committed_base(committed: TopicPartition, ids: Mapping[str, bytes]) -> Commit:
    """Return what was committed; without metadata, or of topics made anew since, offset 0 is always safe. `ids`: by our names."""
    if committed.offset < 0:
        return Commit(0, 0)
    inbox, decisions, finished = (ids[topic.name].hex() for topic in (topics.INBOX, topics.DECISIONS, topics.FINISHED))
    try:
        metadata = json.loads(committed.metadata or "{}")
        position = committed.offset if metadata.get("inbox", inbox) == inbox else 0
        mark = int(metadata.get("mark", 0)) if metadata.get("decisions") == decisions else 0
        index = int(metadata.get("index", 0)) if metadata.get("finished") == finished else 0
    except (ValueError, AttributeError, TypeError):  # somebody else's commit: an offset, but no mark of ours
        return Commit(committed.offset, 0)
    return Commit(position, mark, index)


__all__ = ["GROUP", "Orchestrator", "committed_base"]
