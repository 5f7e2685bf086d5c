"""The views: all read models together. A batch of records goes in whole, with its positions, or not at all."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb

from events import codec, topics
from events.commands import WorkflowRegistered
from events.decisions import DeadLetter, DeadLetterSettled
from events.errors import NotDecodableError
from events.workers import WorkerReported
from projections.approvals import Approvals
from projections.calls import Calls
from projections.database import (
    Positions,
    Seal,
    StaleViewsError,
    ViewsDamagedError,
    ViewsError,
    open_views,
    read_positions,
    told,
    write_positions,
)
from projections.deadletters import DeadLetters
from projections.decisions import Decisions
from projections.ledger import NOT_DECODABLE, Ledger, Record
from projections.runs import Runs
from projections.signals import Signals
from projections.specs import Specs
from projections.steps import Steps
from projections.table import Connection
from projections.workers import Workers

SOURCES: Final = (topics.DECISIONS, topics.DEADLETTER, topics.SPECS, topics.WORKERS)
"""The topics that the views are made from."""
_INTERRUPT_AGAIN_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Batch:
    """Records in the order of their partitions, by topic."""

    decisions: Sequence[Record] = ()
    deadletters: Sequence[Record] = ()
    specs: Sequence[Record] = ()
    workers: Sequence[Record] = ()

    def __bool__(self) -> bool:
        """Say whether there is a record."""
        return any(records for _, records in self._by_topic())

    def positions(self) -> Positions:
        """Return the offsets behind these records."""
        return {(topic, record.partition): record.offset + 1 for topic, records in self._by_topic() for record in records}

    def _by_topic(self) -> Iterator[tuple[str, Sequence[Record]]]:
        records = (self.decisions, self.deadletters, self.specs, self.workers)
        return ((topic.name, each) for topic, each in zip(SOURCES, records, strict=True))


class Views:
    """The read models on one DuckDB file. `apply` from one thread; `snapshot` from any.

    `topic_ids` and `partitions` (of `decisions`): what the views are a view of; `part`: of some partitions, to be merged with
    others. `made_anew`: why they were, or None. What goes wrong with the file is a ViewsError (of opening: ViewsInUseError or
    ViewsRefusedError); `trouble`: the first a reader met.
    """

    def __init__(
        self,
        path: Path,
        topic_ids: Mapping[str, bytes],
        partitions: int,
        *,
        rebuild: StaleViewsError | ViewsDamagedError | None = None,
        part: bool = False,
    ) -> None:
        self._topic_ids = {topic.name: topic_ids[topic.name] for topic in SOURCES if topic.name in topic_ids}
        self.path = path
        self.trouble: ViewsError | None = None
        self._db, self.made_anew = open_views(path, self._topic_ids, rebuild=rebuild, part=part)
        self._seal = Seal.of(path)
        self._cursors = threading.Condition()
        self._open: set[Connection] = set()
        self._closed = False
        self.ledger, self.runs, self.steps, self.calls = Ledger(partitions), Runs(), Steps(), Calls()
        self.approvals, self.signals = Approvals(), Signals()
        self.decisions, self.deadletters, self.specs, self.workers = Decisions(), DeadLetters(), Specs(), Workers()
        self._models = (
            *(self.ledger, self.runs, self.steps, self.calls, self.approvals, self.signals),
            *(self.decisions, self.deadletters, self.specs, self.workers),
        )
        try:
            self._load()
        except BaseException:
            self._db.close()
            raise

    def _load(self) -> None:
        with told(self.path):
            for model in self._models:
                model.load(self._db)
            self.positions = read_positions(self._db)

    @property
    def log_id(self) -> str:
        """Which log the offsets of decisions belong to: the beginning of its topic's id, in hexadecimal."""
        return self._topic_ids[topics.DECISIONS.name].hex()[:8]

    def check(self) -> None:
        """Look whether the file is still the one that was written, and what readers met. Costs nothing; raises ViewsError."""
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise trouble
        self._seal.check(self.path)

    def alive(self) -> bool:
        """Whether they can still be asked, after an error; what was taken in stands."""
        try:
            self._load()
        except ViewsError:
            return False
        return True

    def tidy(self) -> None:
        """Put the file in order now: what its changes take besides is free then. Raises ViewsError."""
        with told(self.path):
            self._db.execute("CHECKPOINT")
        self._seal = Seal.of(self.path)

    def apply(self, batch: Batch) -> None:
        """Take a batch in one transaction. After an error nothing of it was taken. Raises ViewsError: the file is at fault."""
        with told(self.path):
            self._apply(batch)
        self._seal = Seal.of(self.path)

    def _apply(self, batch: Batch) -> None:
        self._db.begin()
        try:
            accepted = self.ledger.judge(self._db, list(batch.decisions), self.runs)
            self.calls.fetch(self._db, accepted, self.runs)
            self.steps.fetch(self._db, accepted, self.runs)
            for entry in accepted:
                spent = self.calls.apply(entry, self.runs.workflow_of(entry.decision))
                moved = self.steps.apply(entry, spent)
                self.runs.apply(entry, spent, moved)
                self.approvals.apply(entry)
                self.signals.apply(entry)
                self.decisions.apply(entry)
            self._take_letters(batch.deadletters)
            self._take_specs(batch.specs)
            self._take_reports(batch.workers)
            for model in self._models:
                model.write(self._db)
            write_positions(self._db, batch.positions(), self._topic_ids)
            self._db.commit()
        except BaseException:
            with suppress(duckdb.Error):  # a commit that fails has ended its transaction
                self._db.rollback()
            with suppress(ViewsError):  # of a file that can't be read either, the first error says more
                self._load()
            raise
        self.positions = self.positions | batch.positions()

    def _take_letters(self, records: Sequence[Record]) -> None:
        for record in records:
            try:
                counts, problem = self._take_letter(record), "nothing that can be done about a dead letter"
            except NotDecodableError as error:
                counts, problem = False, str(error)
            if not counts:
                self.ledger.ignore(topics.DEADLETTER.name, record.partition, record.offset, NOT_DECODABLE, detail=problem)

    def _take_letter(self, record: Record) -> bool:
        if codec.kind_of(record.value) is DeadLetterSettled:
            return self.deadletters.settle(codec.decode(record.value, DeadLetterSettled), record.partition, record.offset)
        self.deadletters.apply(codec.decode(record.value, DeadLetter))
        return True

    def _take_specs(self, records: Sequence[Record]) -> None:
        for record in records:
            try:
                counts = self.specs.apply(codec.decode(record.value, WorkflowRegistered), record.offset)
                problem = "the digest is not that of the definition"
            except NotDecodableError as error:
                counts, problem = False, str(error)
            if not counts:
                self.ledger.ignore(topics.SPECS.name, record.partition, record.offset, NOT_DECODABLE, detail=problem)

    def _take_reports(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.value is None and record.key is not None:
                self.workers.stop(self._db, record.key.decode(errors="replace"))
                continue
            try:
                self.workers.apply(codec.decode(record.value, WorkerReported))
            except NotDecodableError as error:  # of newer code, too: to stop for that would be worse
                self.ledger.ignore(topics.WORKERS.name, record.partition, record.offset, NOT_DECODABLE, detail=str(error))

    @contextmanager
    def snapshot(self) -> Iterator[tuple[Connection, Positions]]:
        """Give a connection that sees one state of the views, and the positions of that state. Raises ViewsError."""
        try:
            with told(self.path), self._reader() as db:
                db.execute("BEGIN TRANSACTION READ ONLY")
                yield db, read_positions(db)
        except ViewsError as error:
            self.trouble = self.trouble or error
            raise

    @contextmanager
    def _reader(self) -> Iterator[Connection]:
        with self._cursors:
            if self._closed:
                raise ViewsError("the views are being closed")
            db = self._db.cursor()
            self._open.add(db)
        try:
            yield db
        finally:
            with self._cursors:
                with suppress(duckdb.Error):
                    db.close()  # ends its transaction
                self._open.discard(db)
                self._cursors.notify_all()

    def close(self) -> None:
        """End what readers ask, and close the file: DuckDB would give who opens it again the same one while it is open."""
        with self._cursors:
            self._closed = True
            while self._open:
                for each in self._open:
                    each.interrupt()
                self._cursors.wait(_INTERRUPT_AGAIN_S)
        with suppress(duckdb.Error):  # of a damaged file
            self._db.close()
