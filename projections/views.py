"""The views: all read models together. A batch of records goes in whole, with its positions, or not at all."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from events import codec, topics
from events.commands import WorkflowRegistered
from events.decisions import DeadLetter
from events.errors import NotDecodableError
from projections.approvals import Approvals
from projections.calls import Calls
from projections.database import Positions, open_views, read_positions, write_positions
from projections.deadletters import DeadLetters
from projections.decisions import Decisions
from projections.ledger import NOT_DECODABLE, Ledger, Record
from projections.runs import Runs
from projections.signals import Signals
from projections.specs import Specs
from projections.steps import Steps
from projections.table import Connection

SOURCES: Final = (topics.DECISIONS, topics.DEADLETTER, topics.SPECS)
"""The topics that the views are made from."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records in the order of their partitions, by topic."""

    decisions: Sequence[Record] = ()
    deadletters: Sequence[Record] = ()
    specs: Sequence[Record] = ()

    def positions(self) -> Positions:
        """Return the offsets behind these records."""
        by_topic = ((topics.DECISIONS, self.decisions), (topics.DEADLETTER, self.deadletters), (topics.SPECS, self.specs))
        return {(topic.name, record.partition): record.offset + 1 for topic, records in by_topic for record in records}


class Views:
    """The read models on one DuckDB file. `apply` from one thread; `snapshot` from any.

    `topic_ids` and `partitions` (of `decisions`): what the views are a view of. Raises ViewsInUseError.
    """

    def __init__(self, path: Path, topic_ids: Mapping[str, bytes], partitions: int, *, rebuild: bool = False) -> None:
        self._topic_ids = {topic.name: topic_ids[topic.name] for topic in SOURCES}
        self._db = open_views(path, self._topic_ids, rebuild=rebuild)
        self._cursors = threading.Lock()
        self.ledger, self.runs, self.steps, self.calls = Ledger(partitions), Runs(), Steps(), Calls()
        self.approvals, self.signals = Approvals(), Signals()
        self.decisions, self.deadletters, self.specs = Decisions(), DeadLetters(), Specs()
        self._models = (
            *(self.ledger, self.runs, self.steps, self.calls, self.approvals, self.signals),
            *(self.decisions, self.deadletters, self.specs),
        )
        self._load()

    def _load(self) -> None:
        for model in self._models:
            model.load(self._db)
        self.positions = read_positions(self._db)

    def apply(self, batch: Batch) -> None:
        """Take a batch in one transaction. After an error nothing of it was taken."""
        self._db.begin()
        try:
            accepted = self.ledger.judge(self._db, list(batch.decisions), self.runs)
            self.calls.fetch(self._db, accepted)
            self.steps.fetch(self._db, accepted)
            for entry in accepted:
                spent = self.calls.apply(entry)
                moved = self.steps.apply(entry, spent)
                self.runs.apply(entry, spent, moved)
                self.approvals.apply(entry)
                self.signals.apply(entry)
                self.decisions.apply(entry)
            self._take_letters(batch.deadletters)
            self._take_specs(batch.specs)
            for model in self._models:
                model.write(self._db)
            write_positions(self._db, batch.positions(), self._topic_ids)
            self._db.commit()
        except BaseException:
            self._db.rollback()
            self._load()
            raise
        self.positions = self.positions | batch.positions()

    def _take_letters(self, records: Sequence[Record]) -> None:
        for record in records:
            try:
                self.deadletters.apply(codec.decode(record.value, DeadLetter))
            except NotDecodableError as error:
                self.ledger.ignore(topics.DEADLETTER.name, record.partition, record.offset, NOT_DECODABLE, detail=str(error))

    def _take_specs(self, records: Sequence[Record]) -> None:
        for record in records:
            try:
                counts = self.specs.apply(codec.decode(record.value, WorkflowRegistered), record.offset)
                problem = "the digest is not that of the definition"
            except NotDecodableError as error:
                counts, problem = False, str(error)
            if not counts:
                self.ledger.ignore(topics.SPECS.name, record.partition, record.offset, NOT_DECODABLE, detail=problem)

    @contextmanager
    def snapshot(self) -> Iterator[tuple[Connection, Positions]]:
        """Give a connection that sees one state of the views, and the positions of that state."""
        with self._cursors:
            db = self._db.cursor()
        try:
            db.begin()
            yield db, read_positions(db)
        finally:
            db.close()  # ends its transaction

    def close(self) -> None:
        """Close the file."""
        self._db.close()
