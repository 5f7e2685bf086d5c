"""The JSON mirror: what counts of `decisions`, as JSON on `decisions.json`, for tools that know no Avro.

    position and mark fetched ──▶ index read ──▶ take* (from the mark; produced from the position on) ──▶ commit ──▶ take* …

Each accepted decision has the same partition, key, time and headers there as on `decisions`, and its offset in one more header.
Delivery is at least once: after a crash what came last comes again, the same bytes, and goes on from there. Like every reader it
goes through the shared filter, which must know each open run from its first decision on: so the commit carries a mark, at or
before all of those. A run that is over holds the mark until the index of finished runs has it: then the filter needs no more.
"""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from confluent_kafka import Consumer, KafkaException, TopicPartition

from events import codec, topics
from events.as_json import as_json, as_line
from events.decisions import Decision, FinishedRun, FinishedRuns
from events.errors import NewerCodeError, NotDecodableError
from events.ids import chain_hash
from streams import commits, kafka, patience
from streams.envelope import Headers, Incoming, Outgoing
from streams.kafka import Cluster
from streams.processors.finished import FinishedIndex, Place
from streams.processors.watchdog import Progress
from streams.schemas import Schemas
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict

log = structlog.get_logger()

GROUP: Final = "mirror"
OFFSET: Final = "foldflow_offset"
"""Header of a mirrored decision: its offset on `decisions`."""
_POLL_S: Final = 0.2
_COMMIT_EVERY_S: Final = 0.5
_MARK_EVERY_S: Final = 5.0
_COMMIT_S: Final = 5.0


@dataclass(slots=True)
class Copy:
    """One partition. `position`: up to where decisions are mirrored; `next`: up to where they are read, from the mark on."""

    place: Place
    position: int
    mark: int
    index: FinishedIndex = field(init=False)
    next: int = field(init=False)
    _chain: Chain = field(init=False)
    _breaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index, self.next = FinishedIndex(self.place), self.mark
        self._chain = Chain(self.index)

    def take(self, record: Incoming) -> Outgoing | None:
        """Take the next record of the partition; return its mirror if it counts, and isn't mirrored yet."""
        self.next = record.offset + 1
        mirrored = record.offset < self.position
        self.position = max(self.position, self.next)
        try:
            decision = codec.decode(record.value, Decision)
        except NotDecodableError:
            return None
        if topics.partition_for(decision.run_id.encode(), self.place.partitions) != self.place.partition:
            return None
        verdict = self._chain.judge(record.offset, decision, chain_hash(codec.unframed(record.value or b"")))
        if verdict is Verdict.BROKEN:
            self._breaks.append(record.offset)
        return mirror(record, decision) if verdict is Verdict.ACCEPTED and not mirrored else None

    def move_mark(self) -> None:
        """Forget the runs that the index says are over, and move the mark up to what is still needed."""
        heads = self._chain.heads
        for run_id in [each for each, head in heads.items() if head.over and each in self.index]:
            del heads[run_id]
        holds = [head.first for head in heads.values() if head.first is not None]
        self.mark = min([self.next, self.position, *holds, *self._breaks])
        if self.index.worth_packing(10_000):
            self.index.pack()  # in memory only: less of it


def mirror(record: Incoming, decision: Decision) -> Outgoing:
    """Return a decision's mirror."""
    value = as_line(decision)
    if len(value) > topics.MAX_VALUE_BYTES:
        names = {
            "input": {"type": type(decision.input).__name__},
            "effects": [{"type": type(e).__name__} for e in decision.effects],
        }
        value = json.dumps({**_outline(decision), **names, "too_large": len(value)}, separators=(",", ":")).encode()
    headers: Headers = [(name, each) for name, each in record.headers.items() if each is not None and name != "content-type"]
    headers += [("content-type", b"application/json"), (OFFSET, str(record.offset).encode())]
    return Outgoing(topics.DECISIONS_JSON, record.key, value, headers, record.partition, record.timestamp)


def _outline(decision: Decision) -> dict[str, Any]:
    """Return what a decision is, without what its input and effects say."""
    found = as_json(decision, str)
    return found | {"input": {"type": found["input"]["type"]}, "effects": [{"type": each["type"]} for each in found["effects"]]}


class Mirror:
    """Copies the partitions that its group gives it. `run` is for a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.copies: dict[int, Copy] = {}
        self.ready = threading.Event()
        self._decisions = kafka.name(settings, topics.DECISIONS)
        self._reading = False
        self._committed_at = self._marked_at = 0.0

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set.

        Raises DeliveryFailedError: then a new start takes over; and NewerCodeError: then only newer code may go on.
        """
        self.cluster: Cluster = kafka.connect(self.settings, also=(topics.DECISIONS_JSON,))
        self.schemas = Schemas(self.settings)
        self.log_reader = kafka.reader(self.settings)
        self.producer = kafka.producer(self.settings, **{"compression.type": topics.DECISIONS_JSON.compression})
        self.consumer = kafka.consumer(self.settings, GROUP)
        self.consumer.subscribe([self._decisions], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)
        try:
            while not stop.is_set():
                self._round()
            self._commit(wait=True)
        except NewerCodeError:
            self._commit(wait=True)  # what stands before it is mirrored
            raise
        finally:
            self.copies.clear()  # what is committed is committed; what failed may not be
            self.consumer.close()
            self.log_reader.close()
            self.schemas.close()

    def progress(self) -> Progress:
        """Return how far it has come; for the watchdog."""
        return Progress({partition: copy.next for partition, copy in list(self.copies.items())}, self._reading)

    def _round(self) -> None:
        acks = kafka.Acks()
        try:
            for message in kafka.poll(self.consumer, _POLL_S):
                record = kafka.incoming(message)
                copy = self.copies.get(record.partition)
                if copy is None or record.offset < copy.next:
                    continue
                self.schemas.refuse_newer(f"decision {record.partition}/{record.offset}", record.value, Decision)
                if (made := copy.take(record)) is not None:
                    kafka.produce(self.producer, self.settings, made, acks)
        finally:
            kafka.flush(self.producer, acks)  # before anything is committed, whatever ends this round
        if time.monotonic() - self._committed_at >= _COMMIT_EVERY_S:
            self._commit()

    def _commit(self, *, wait: bool = False) -> None:
        """Commit what is mirrored: all of it is acknowledged."""
        self._committed_at = time.monotonic()
        if wait or self._committed_at - self._marked_at >= _MARK_EVERY_S:
            self._marked_at = self._committed_at
            self._read_index(self.copies)
            for copy in self.copies.values():
                copy.move_mark()
        offsets = [
            TopicPartition(self._decisions, partition, copy.position, metadata=self._metadata(copy))
            for partition, copy in self.copies.items()
        ]
        if not offsets:
            return
        try:
            if wait:
                commits.commit(self.consumer, offsets, _COMMIT_S)
            else:
                self.consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:  # the group moved on: the next owner mirrors the last ones again
            log.info("mirror.not_committed", error=str(error))

    def _metadata(self, copy: Copy) -> str:
        ids = self.cluster.ids
        of = {topic.name: ids[topic.name].hex() for topic in (topics.DECISIONS, topics.DECISIONS_JSON)}
        return json.dumps({**of, "mark": copy.mark})

    # --- Partitions come and go ---

    @patience.unless_ending()
    def _assigned(self, member: Consumer, partitions: list[TopicPartition]) -> None:
        self._reading = True
        begun = {each.partition: self._begin(each) for each in commits.committed(member, partitions)} if partitions else {}
        self._read_index(begun)
        for partition, copy in begun.items():
            log.info("mirror.took_over", partition=partition, position=copy.position)
        self.copies |= begun
        member.incremental_assign([TopicPartition(self._decisions, partition, copy.mark) for partition, copy in begun.items()])
        self._reading = False
        self.ready.set()

    def _begin(self, committed: TopicPartition) -> Copy:
        """Return a partition's copy where it was committed, or from the beginning: of topics made anew, or without a mark."""
        ids, partition = self.cluster.ids, committed.partition
        place = Place(
            ids[topics.INBOX.name], ids[topics.DECISIONS.name], partition, self.cluster.partitions[topics.DECISIONS.name]
        )
        copy = Copy(place, max(0, committed.offset), 0)
        try:
            said = json.loads(committed.metadata or "{}")
            mark = int(said.pop("mark"))
        except (ValueError, AttributeError, TypeError, KeyError):
            return copy
        same = json.loads(self._metadata(copy)) == {**said, "mark": copy.mark}
        return Copy(place, committed.offset, min(mark, committed.offset)) if same else Copy(place, 0, 0)

    def _read_index(self, copies: Mapping[int, Copy]) -> None:
        """Read the index of finished runs on to its end."""
        starts = {partition: copy.index.end for partition, copy in copies.items()}
        for message in kafka.read_partitions(self.log_reader, kafka.name(self.settings, topics.FINISHED), starts):
            self.schemas.refuse_newer("an entry of the index", message.value(), FinishedRun, FinishedRuns)
            try:
                copies[message.partition() or 0].index.read(message.offset() or 0, message.key(), message.value())
            except NotDecodableError as error:
                log.warning("mirror.index_unreadable", partition=message.partition(), problem=str(error))

    def _revoked(self, member: Consumer, partitions: list[TopicPartition]) -> None:
        self._commit(wait=True)
        self._lost(member, partitions)

    def _lost(self, _member: Consumer, partitions: list[TopicPartition]) -> None:
        for each in partitions:
            self.copies.pop(each.partition, None)
