"""The orchestrator: drives a tenure for each inbox partition that the consumer group gives it.

One thread, one consumer, one producer: poll, take, produce at once; every so often settle (wait for all acknowledgements, compare
offsets, index what finished) and then commit. How a tenure judges is in tenure.py; here is only what touches Kafka.
"""

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Final

import structlog
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from events import codec, topics
from events.decisions import FinishedRun
from events.errors import NotDecodableError
from streams import kafka
from streams.envelope import Incoming, Outgoing
from streams.kafka import Acks, Cluster
from streams.payloads import PayloadStore, PayloadStoreError
from streams.processors.tenure import Commit, Place, SpecUnknownError, Tenure
from streams.registry import SpecRegistry
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

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set.

        Raises DeliveryFailedError: then nothing more may be committed, and a new start takes over.
        """
        self.cluster: Cluster = kafka.connect(self.settings)
        self.specs = SpecRegistry(self.settings)
        self.specs.refresh()
        self.payloads = PayloadStore(self.settings)
        self.log_reader = kafka.reader(self.settings)
        # As the topic `decisions` has it: another codec would make the broker compress every decision anew.
        self.producer = kafka.producer(self.settings, **{"compression.type": topics.DECISIONS.compression})
        self.consumer = kafka.consumer(self.settings, self.group)
        self.consumer.subscribe([self.inbox], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)
        try:
            while not stop.is_set():
                self._round()
            self._settle(wait=True)
        finally:
            self.holdings.clear()
            self.consumer.close()
            self.log_reader.close()
            self.specs.close()

    # --- One round: inputs, timers, settling ---

    def _round(self) -> None:
        messages = kafka.poll(self.consumer, self._patience_s())
        skipped: set[int] = set()
        for message in messages:
            partition = message.partition() or 0
            holding = self.holdings.get(partition)
            if holding is not None and partition not in skipped and not self._take(holding, message):
                skipped.add(partition)
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
        """Let the tenure judge an input and produce what follows; False: the partition has to wait here."""
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
        for each in reversed(outgoing):  # calls first: somebody waits for them, and the broker takes one request after the other
            acks = holding.decisions if each.topic is topics.DECISIONS else holding.others
            kafka.produce(self.producer, self.settings, each, acks)
        return True

    def _judged(self, tenure: Tenure, record: Incoming, *, give_up: bool) -> list[Outgoing]:
        """Return what follows from an input, after a look for its workflow version if that isn't known yet."""
        try:
            return tenure.take(record)
        except SpecUnknownError:
            self.specs.refresh()
        except PayloadMissingError:
            if not give_up:
                raise
        return tenure.take(record, give_up=give_up)

    def _resume_waiting(self) -> None:
        waiting = [TopicPartition(self.inbox, p) for p, holding in self.holdings.items() if holding.waits_since is not None]
        if waiting:
            self.consumer.resume(waiting)

    # --- Settling and committing ---

    def _settle(self, *, wait: bool = False) -> None:
        """Wait for all acknowledgements, check the offsets, index what finished, and only then commit."""
        self._settled_at = time.monotonic()
        if not any(h.tenure.unfinished for h in self.holdings.values()):
            return
        acks = [each for holding in self.holdings.values() for each in (holding.decisions, holding.others)]
        kafka.flush(self.producer, *acks)
        index = Acks()
        for partition, holding in list(self.holdings.items()):
            if not self._check(partition, holding):
                log.warning("orchestrator.overtaken", partition=partition)
                self._take_over([partition], seek=True)
            tenure = self.holdings[partition].tenure
            for entry in (*tenure.index_entries(), *tenure.keep_idle(time.time_ns() // 1_000_000)):
                kafka.produce(self.producer, self.settings, entry, index)
        kafka.flush(self.producer, index)
        offsets = [offset for p, holding in self.holdings.items() if (offset := self._committable(p, holding))]
        if not offsets:
            return
        try:
            self.consumer.commit(offsets=offsets, asynchronous=not wait)  # type: ignore[call-overload]
        except KafkaException as error:  # the group moved on; a lost commit costs time only
            log.info("orchestrator.not_committed", error=str(error))

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
        if commit == before:
            return None
        ids = self.cluster.ids
        metadata = json.dumps(
            {"mark": commit.mark, "inbox": ids[topics.INBOX.name].hex(), "decisions": ids[topics.DECISIONS.name].hex()}
        )
        return TopicPartition(self.inbox, partition, commit.position, metadata)

    # --- Tenures begin and end ---

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
        places = [TopicPartition(self.inbox, partition) for partition in partitions]
        committed = {each.partition: each for each in self.consumer.committed(places, timeout=30.0)}
        starts = []
        for partition in partitions:
            began = time.monotonic()
            tenure = self._new_tenure(partition, committed[partition])
            self.holdings[partition] = Holding(tenure)
            starts.append(TopicPartition(self.inbox, partition, tenure.position))
            log.info(
                "orchestrator.took_over",
                partition=partition,
                position=tenure.position,
                mark=tenure.base.mark,
                end=tenure.end,
                open_runs=len(tenure.runs),
                shelved_runs=len(tenure.shelf),
                seconds=round(time.monotonic() - began, 3),
            )
            for run_id, problem in tenure.broken.items():
                log.error("orchestrator.integrity", run_id=run_id, problem=problem)
        if seek:
            for start in starts:
                self.consumer.seek(start)
        else:
            self.consumer.incremental_assign(starts)

    def _new_tenure(self, partition: int, committed: TopicPartition) -> Tenure:
        ids = self.cluster.ids
        inbox_id, decisions_id = ids[topics.INBOX.name], ids[topics.DECISIONS.name]
        place = Place(inbox_id, decisions_id, partition, self.cluster.partitions[topics.INBOX.name])
        base, idle_ms = committed_base(committed, inbox_id, decisions_id), round(self.settings.idle_after_s * 1000)
        tenure = Tenure(place, self.specs.get, base, self.payloads, idle_ms=idle_ms)
        for message in kafka.read_partition(self.log_reader, self.snapshots, partition, 0):
            record = kafka.incoming(message)
            tenure.snapshot_read(record.key, record.value, record.headers)
        for message in kafka.read_partition(self.log_reader, self.finished, partition, 0):
            try:
                tenure.index_read((message.key() or b"").decode("utf-8", "replace"), codec.decode(message.value(), FinishedRun))
            except NotDecodableError as error:
                log.warning("finished.unreadable", partition=partition, offset=message.offset(), problem=str(error))
        for message in kafka.read_partition(self.log_reader, self.decisions, partition, tenure.base.mark):
            tenure.read(message.offset() or 0, message.value())
        tenure.begin(tenure.end)
        return tenure


def committed_base(committed: TopicPartition, inbox_id: bytes, decisions_id: bytes) -> Commit:
    """Return the committed position and mark; without metadata, or of topics made anew since, offset 0 is always safe."""
    if committed.offset < 0:
        return Commit(0, 0)
    try:
        metadata = json.loads(committed.metadata or "{}")
        position = committed.offset if metadata.get("inbox", inbox_id.hex()) == inbox_id.hex() else 0
        mark = int(metadata.get("mark", 0)) if metadata.get("decisions") == decisions_id.hex() else 0
    except (ValueError, AttributeError, TypeError):  # somebody else's commit: an offset, but no mark of ours
        return Commit(committed.offset, 0)
    return Commit(position, mark)


__all__ = ["GROUP", "Orchestrator", "committed_base"]
