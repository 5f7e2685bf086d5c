"""Calls that are made though no commit says so: their results are on the inbox.

A worker commits a moment after its results are acknowledged. When it crashes in between, or Kafka loses its commit, those calls
are taken again; so whoever takes them looks on the inbox first, as far back as results can lie that no commit covers. A commit's
metadata says how far: `MS:BITS`, where all results of that worker that the broker appended before MS are covered.
"""

from typing import Final

from events import codec, topics
from events.errors import NotDecodableError
from events.topics import Topic, partition_for
from streams import kafka
from streams.envelope import Incoming
from streams.kafka import TIMESTAMP_LOG_APPEND_TIME, Consumer, Message
from streams.processors.inputs import readable
from streams.settings import Settings

_BROKERS_MS: Final = 5_000
"""How far the clocks of brokers, which append to partitions of their own, may differ."""
_CLOCKS_MS: Final = 60_000
"""How far the clock of who puts a call on the queue may be ahead of a broker's."""
_MOST: Final = 20_000
"""How many of the last records of each partition of the inbox are looked at; a second of reading for eight partitions."""


class Answered:
    """What a look at the inbox has found, for the partitions in hand of one queue. `partitions`: how many the inbox has."""

    def __init__(self, settings: Settings, topic: Topic) -> None:
        self.partitions = settings.partitions
        self._inbox, self._kind = kafka.name(settings, topics.INBOX), topic.kind
        self._runs: dict[str, str] = {}
        self._unpassed: dict[int, tuple[int, int | None]] = {}
        self._acknowledged_ms: int | None = None

    def look(self, source: Consumer, calls: dict[int, tuple[int, int, int]], covered: dict[int, int | None]) -> None:
        """Read the results that no commit covers.

        `calls`: by partition with calls that aren't done, the first of these, its milliseconds since the epoch, and the end;
        `covered`: by partition, up to when its last commit covers results. Raises KafkaUnreachableError.
        """
        if not calls:
            return
        self._unpassed |= {partition: (end, covered[partition]) for partition, (_, _, end) in calls.items()}
        since = min(
            max(queued_ms - _CLOCKS_MS, (covered[partition] or 0) - _BROKERS_MS) for partition, (_, queued_ms, _) in calls.items()
        )
        ends = {each: kafka.watermarks(source, self._inbox, each)[1] for each in range(self.partitions)}
        starts = kafka.first_since(source, self._inbox, ends, since)
        starts = {partition: max(start, ends[partition] - _MOST) for partition, start in starts.items()}
        for message in kafka.read_partitions(source, self._inbox, starts, ends):
            self._note(kafka.incoming(message))

    def _note(self, record: Incoming) -> None:
        if not (record.headers.get("ce_id") or b"").endswith(b"/result"):
            return
        key = record.key or b""
        message, _ = readable(record, key.decode("utf-8", "replace"))
        call_id = getattr(message.input, "call_id", None) if message else None
        # What stands in the wrong partition or under another key reaches no run: it answers nothing.
        if message is not None and call_id is not None and partition_for(key, self.partitions) == record.partition:
            self._runs[call_id] = message.run_id

    def has(self, record: Incoming) -> bool:
        """Say whether a call that was taken has its result on the inbox."""
        run_id = self._runs.get((record.key or b"").decode("utf-8", "replace")) if self._runs else None
        if run_id is None:
            return False
        try:
            return bool(codec.decode(record.value, self._kind).run_id == run_id)
        except NotDecodableError:
            return False

    def acknowledged(self, result: Message) -> None:
        """Note that the broker has appended a result of this worker."""
        kind, at_ms = result.timestamp()
        if kind == TIMESTAMP_LOG_APPEND_TIME:
            self._acknowledged_ms = max(at_ms, self._acknowledged_ms or 0)

    def covered(self, partition: int, position: int) -> int | None:
        """Return up to when a commit covers results; `position`: the partition's first call that wasn't taken."""
        end, inherited = self._unpassed.get(partition, (0, None))
        if position < end:  # what was found is known here only: the next owner must look as far back
            return inherited
        if self._unpassed.pop(partition, None) is not None and not self._unpassed:
            self._runs.clear()
        return self._acknowledged_ms

    def lost(self, partition: int) -> None:
        """Forget a partition that another worker has now."""
        self._unpassed.pop(partition, None)
