"""Copies topics into an archive of Parquet files, and goes on where it ended: nothing is left out and nothing is there twice.

The files (`export_files`) hold each record as it stands on Kafka, those too that no reader counts: who reads an archive goes
through the same filter as who reads Kafka. Memory is bounded by what one partition has open, however long the log is.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from events.topics import Topic
from projections.export_files import ArchiveError, Manifest, Part, Row, Written, held, leftovers
from streams import kafka
from streams.kafka import Cluster, Consumer
from streams.settings import Settings

PART_RECORDS: Final = 1_000_000
_PART_BYTES: Final = 1024 * 1024 * 1024
_PART_DAYS: Final = 32
"""When a part's files are finished and noted, though there is more: that much is written again after a crash at most."""

Tick = Callable[[int], None]
"""Is told how many more offsets are passed."""


@dataclass(slots=True)
class Exported:
    """What one export has written of a topic."""

    topic: str
    records: int = 0
    files: int = 0
    bytes: int = 0
    gaps: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    """Offsets of a partition that are to be written."""

    topic: Topic
    partition: int
    start: int
    end: int


class Export:
    """One export. `since_ms`: what a new archive begins with (milliseconds since the epoch); `until_ms`: records before then.

    Raises KafkaUnreachableError, TopicsMissingError and ArchiveError.
    """

    def __init__(
        self, settings: Settings, folder: Path, wanted: Sequence[Topic], since_ms: int | None = None, until_ms: int | None = None
    ) -> None:
        self._settings, self._folder, self._wanted = settings, folder, wanted
        self._since_ms, self._until_ms = since_ms, until_ms
        self._cluster: Cluster = kafka.find(kafka.admin(settings), settings, wanted, timeout_s=10.0)

    def run(self, planned: Callable[[int], Tick]) -> list[Exported]:
        """Write what is there now and not in the archive yet. `planned`: is told how many offsets that are."""
        with held(self._folder), closing(kafka.reader(self._settings)) as source:
            manifest = Manifest.load(self._folder, self._settings.topic_prefix)
            for topic in self._wanted:
                self._begin(manifest, topic)
            spans = [span for topic in self._wanted for span in self._spans(source, manifest.topics[topic.name], topic)]
            manifest.save(self._folder)
            tick = planned(sum(span.end - span.start for span in spans))
            found = {topic.name: Exported(topic.name) for topic in self._wanted}
            for name, one in found.items():
                one.gaps = sum(high - low for _, low, high in manifest.topics[name].gaps)
            for span in spans:
                self._copy(source, manifest, span, found[span.topic.name], tick)
        return list(found.values())

    def _begin(self, manifest: Manifest, topic: Topic) -> None:
        """Check that the archive can be gone on with, and remove what an earlier export left behind."""
        topic_id = self._cluster.ids[topic.name].hex()
        written = manifest.topics.setdefault(topic.name, Written(topic_id, self._since_ms))
        if written.topic_id != topic_id:
            raise ArchiveError(f"{topic.name} was made anew since {self._folder} was written: export into another folder")
        if written.since_ms is not None and self._since_ms is not None and self._since_ms < written.since_ms:
            raise ArchiveError(f"{self._folder} begins later than --since says: export what is earlier into another folder")
        for path in leftovers(self._folder, topic, written.partitions.items()):
            path.unlink()

    def _spans(self, source: Consumer, written: Written, topic: Topic) -> list[_Span]:
        name = kafka.name(self._settings, topic)
        marks = {each: kafka.watermarks(source, name, each) for each in range(self._cluster.partitions[topic.name])}
        ends = {partition: high for partition, (_, high) in marks.items()}
        if self._until_ms is not None:
            ends = kafka.first_since(source, name, ends, self._until_ms)
        firsts = {partition: low for partition, (low, _) in marks.items()}
        if written.since_ms is not None:
            firsts = kafka.first_since(source, name, {each: high for each, (_, high) in marks.items()}, written.since_ms)
        spans = []
        for partition, end in ends.items():
            start = written.partitions.get(partition)
            if start is not None and start < marks[partition][0]:
                written.gaps.append((partition, start, marks[partition][0]))
            start = max(marks[partition][0], firsts[partition] if start is None else start)
            written.partitions[partition] = start
            if start < end:
                spans.append(_Span(topic, partition, start, end))
        return spans

    def _copy(self, source: Consumer, manifest: Manifest, span: _Span, found: Exported, tick: Tick) -> None:
        written = manifest.topics[span.topic.name]
        at, part = span.start, Part(self._folder, span.topic)
        try:
            for message in kafka.read_partition(source, kafka.name(self._settings, span.topic), span.partition, at, span.end):
                offset = message.offset() or 0
                headers = kafka.headers_of(message)
                part.add(Row(span.partition, offset, message.timestamp()[1], message.key(), message.value(), headers))
                tick(offset + 1 - at)
                at = offset + 1
                if part.rows >= PART_RECORDS or part.bytes >= _PART_BYTES or part.days >= _PART_DAYS:
                    self._note(manifest, written, span.partition, at, part, found)
                    part = Part(self._folder, span.topic)
            self._note(manifest, written, span.partition, span.end, part, found)  # where compaction has been, the end is empty
            tick(span.end - at)
        except BaseException:
            part.give_up()
            raise

    def _note(self, manifest: Manifest, written: Written, partition: int, end: int, part: Part, found: Exported) -> None:
        """Finish a part's files, then note that they are there."""
        files, size = part.finish()
        written.partitions[partition] = end
        written.records += part.rows
        manifest.save(self._folder)
        found.records, found.files, found.bytes = found.records + part.rows, found.files + files, found.bytes + size
