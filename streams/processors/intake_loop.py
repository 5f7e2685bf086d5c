"""What touches Kafka around `Intake`: reads `requests`, produces what each becomes, and commits when that is acknowledged.

One thread, one consumer, one producer, as the orchestrator has them: through a Faust agent a request took three times as long
(decision record 022). While the payload store is full or Kafka can't be asked, a request's partition waits in front of it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from events import topics
from events.commands import RunRequest, WorkflowRequest
from events.errors import NewerCodeError
from streams import commits, kafka, patience
from streams.envelope import Incoming, Outgoing, dead_letter
from streams.kafka import Acks
from streams.payloads import PayloadStore, PayloadStoreError
from streams.processors.intake import SOURCE, Intake
from streams.processors.watchdog import Progress
from streams.schemas import Schemas
from streams.settings import Settings
from streams.workflow.expressions import clean_text

log = structlog.get_logger()

GROUP: Final = "intake"
_POLL_S: Final = 0.1
_SETTLE_EVERY_S: Final = 0.5
"""How long requests may stay uncommitted; a crash takes them again, and their runs know that they have them."""
_RETRY_S: Final = 1.0
_COMMIT_S: Final = 10.0
"""How long a last commit is tried while Kafka is away."""


class Versions(Protocol):
    """The workflow versions that the judge looks into."""

    def drain(self) -> None:
        """Take in what was registered meanwhile. Raises NewerCodeError and KafkaUnreachableError."""


class IntakeLoop:
    """Consumes `requests`, writes to `inbox` and `deadletter`. Runs in a thread of its own.

    `prepare` connects and returns the judge and the workflow versions that it looks into.
    """

    def __init__(self, settings: Settings, prepare: Callable[[], tuple[Intake, Versions]]) -> None:
        self.settings = settings
        self.ready = threading.Event()
        self._prepare = prepare
        self._requests = kafka.name(settings, topics.REQUESTS)
        self._positions: dict[int, int] = {}  # the next offset of each partition in hand
        self._committed: dict[int, int] = {}
        self._waiting: set[int] = set()  # partitions that wait in front of a request
        self._acks = Acks()
        self._settled_at = self._retry_at = 0.0

    @property
    def partitions(self) -> tuple[int, ...]:
        """The partitions in hand."""
        return tuple(sorted(self._positions))

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set.

        Raises DeliveryFailedError: then a new start takes the requests again; and NewerCodeError: then only newer code may go on.
        """
        judge, self.versions = self._prepare()
        self.judge = replace(judge, payloads=PayloadStore(self.settings))
        self.schemas = Schemas(self.settings)
        self.producer = kafka.producer(self.settings)
        self.consumer = kafka.consumer(self.settings, GROUP, on_commit=self._reported)
        self.consumer.subscribe([self._requests], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)
        self.ready.set()  # beside an old version, which assigns in another way, it gets partitions only when that has ended
        try:
            while not stop.is_set():
                self._round()
            self._settle(wait=True)
        except NewerCodeError:
            self._settle(wait=True)  # what came before it counts
            raise
        finally:
            self._positions.clear()
            self.consumer.close()
            self.schemas.close()

    def progress(self) -> Progress:
        """Return how far it has come; for the watchdog."""
        return Progress(dict(self._positions), bool(self._waiting))

    def _round(self) -> None:
        stopped: set[int] = set()
        drained = False
        for message in kafka.poll(self.consumer, _POLL_S):
            record = kafka.incoming(message)
            if record.partition in stopped or record.partition not in self._positions:
                continue
            try:
                if not drained:
                    self.versions.drain()
                    drained = True
                outgoing = judged(self.judge, self.schemas, record)
            except (PayloadStoreError, kafka.KafkaUnreachableError) as error:
                self._wait(record, error)
                stopped.add(record.partition)
                continue
            for each in outgoing:
                kafka.produce(self.producer, self.settings, each, self._acks)
            self._positions[record.partition] = record.offset + 1
        self.producer.poll(0)
        now = time.monotonic()
        if self._waiting and now >= self._retry_at:
            self.consumer.resume([TopicPartition(self._requests, each) for each in self._waiting])
            self._waiting.clear()
        if now - self._settled_at >= _SETTLE_EVERY_S:
            self._settle()

    def _wait(self, record: Incoming, error: Exception) -> None:
        log.warning("intake.waits", partition=record.partition, offset=record.offset, problem=str(error))
        here = TopicPartition(self._requests, record.partition, record.offset)
        self.consumer.pause([here])
        self.consumer.seek(here)
        self._waiting.add(record.partition)
        self._retry_at = time.monotonic() + _RETRY_S

    def _settle(self, *, wait: bool = False) -> None:
        """Wait for all acknowledgements, then commit."""
        self._settled_at = time.monotonic()
        moved = {partition: at for partition, at in self._positions.items() if self._committed.get(partition) != at}
        if not moved:
            return
        kafka.flush(self.producer, self._acks)
        self._acks = Acks()
        self._committed |= moved
        offsets = [TopicPartition(self._requests, partition, at) for partition, at in moved.items()]
        try:
            if wait:
                commits.commit(self.consumer, offsets, _COMMIT_S)
            else:
                self.consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:  # the group moved on: who has them now takes them again
            log.info("intake.not_committed", error=str(error))

    def _reported(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Commit again what could not be committed."""
        for each in partitions:
            if error is not None or each.error is not None:
                self._committed.pop(each.partition, None)

    # --- Partitions come and go ---

    @patience.unless_ending()
    def _assigned(self, member: Consumer, partitions: list[TopicPartition]) -> None:
        starts = [
            TopicPartition(self._requests, each.partition, max(0, each.offset))
            for each in (commits.committed(member, partitions) if partitions else ())
        ]
        at = {each.partition: each.offset for each in starts}
        self._positions |= at
        self._committed |= at
        member.incremental_assign(starts)
        member.resume(starts)  # one that was paused when it was lost would stay so

    def _revoked(self, member: Consumer, partitions: list[TopicPartition]) -> None:
        self._settle(wait=True)
        self._lost(member, partitions)

    def _lost(self, member: Consumer, partitions: list[TopicPartition]) -> None:
        for each in partitions:
            self._positions.pop(each.partition, None)
            self._committed.pop(each.partition, None)
            self._waiting.discard(each.partition)
        member.incremental_unassign(partitions)


def judged(judge: Intake, schemas: Schemas, record: Incoming) -> list[Outgoing]:
    """Return what a request becomes; what nobody foresaw is a dead letter too.

    Raises PayloadStoreError and KafkaUnreachableError: then the request has to wait; and NewerCodeError.
    """
    try:
        where = f"request {record.topic}/{record.partition}/{record.offset}"
        schemas.refuse_newer(where, record.value, WorkflowRequest, RunRequest)
        return judge.check(record)
    except (NewerCodeError, PayloadStoreError, kafka.KafkaUnreachableError):
        raise
    except Exception as error:
        log.exception("intake.fault", partition=record.partition, offset=record.offset)
        return [dead_letter(record, "internal", f"a fault of intake, see its log: {clean_text(repr(error))}", SOURCE)]


__all__ = ["GROUP", "IntakeLoop", "judged"]
