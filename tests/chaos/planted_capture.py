"""A recorded history, and how to change a copy of it so that offsets, headers and the index stay right."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from checking.records import Arrival, Disruption, Record, Wanted
from checking.views import Views

from events import codec, ids
from events.decisions import Decision, FinishedRun

NOISE: Final = b"nobody"
"""The key of inbox records that are for no run."""


@dataclass
class Capture:
    """A history as it stood on the topics, and what was known outside. `folder`: for files of a fault."""

    records: dict[str, list[Record]]
    topic_ids: dict[str, bytes]
    wanted: list[Wanted]
    witnessed: list[Arrival]
    views: Views
    folder: Path
    disruptions: list[Disruption] = field(default_factory=list)

    @property
    def partitions(self) -> int:
        """How many partitions `decisions` has."""
        return 1 + max(each.partition for each in self.records["decisions"])

    def copy(self, folder: Path) -> "Capture":
        """Return a copy that can be changed."""
        records = {topic: list(each) for topic, each in self.records.items()}
        return replace(
            self, records=records, wanted=list(self.wanted), witnessed=list(self.witnessed), disruptions=[], folder=folder
        )

    # --- Finding ---

    def chain(self, request: str) -> list[tuple[Record, Decision]]:
        """Return the decisions of a request's run, one for each number."""
        run, found = ids.run_id(request), {}
        for record in self.records["decisions"]:
            if record.key == run.encode():
                decision = codec.decode(record.value, Decision)
                found.setdefault(decision.seq, (record, decision))
        return list(found.values())

    def input_of(self, record: Record, decision: Decision) -> Record:
        """Return the inbox record that a decision is about."""
        inbox = self.records["inbox"]
        return next(each for each in inbox if (each.partition, each.offset) == (record.partition, decision.input_offset))

    # --- Changing ---

    def put(self, old: Record, new: Record) -> None:
        """Put a record in another one's place."""
        self.records[old.topic] = [new if each is old else each for each in self.records[old.topic]]

    def drop(self, topic: str, which: Callable[[Record], bool]) -> None:
        """Take records away."""
        before = self.records[topic]
        self.records[topic] = [each for each in before if not which(each)]
        assert len(self.records[topic]) < len(before)

    def append(self, topic: str, partition: int, key: bytes | None, value: bytes | None) -> Record:
        """Append a record to a partition."""
        offset = 1 + max((each.offset for each in self.records[topic] if each.partition == partition), default=-1)
        time = max(each.timestamp for each in self.records["inbox"])
        record = Record(topic, partition, offset, time, key, value)
        self.records[topic].append(record)
        return record

    def insert(self, where: Record, value: bytes) -> None:
        """Insert a decision before another one of the same run; offsets move, and so does the index of finished runs."""
        partition, offset = where.partition, where.offset

        def moved(at: int) -> int:
            return at + (at >= offset)

        found = []
        for each in self.records["decisions"]:
            if each is where:
                found.append(Record("decisions", partition, offset, each.timestamp, each.key, value, identity(value)))
            found.append(each._replace(offset=moved(each.offset)) if each.partition == partition else each)
        self.records["decisions"] = found
        for each in list(self.records["finished"]):
            if each.partition == partition:
                entry = codec.decode(each.value, FinishedRun)
                self.put(each, each._replace(value=codec.encode(replace(entry, first_offset=moved(entry.first_offset)))))

    def rewrite(self, record: Record, decision: Decision) -> None:
        """Write a decision anew, with its header put right."""
        value = codec.encode(decision)
        self.put(record, record._replace(value=value, identity=identity(value)))


def identity(value: bytes) -> bytes:
    """Return the header `ce_id` of a decision."""
    return hash_of(value).hex().encode()


def hash_of(value: bytes) -> bytes:
    """Return a decision's place in the chain."""
    return ids.chain_hash(codec.unframed(value))
