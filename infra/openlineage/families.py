"""Who started a run that another run started: the parents' names, which only the parents' own decisions say.

A parent's first decision stands on the log before any of its children's, but maybe in another partition, of which less was read.
Then it is looked for there, so that what is told of a child doesn't depend on who was read first. It is read ahead of the others
for a while, so that many children cost one look.
"""

from collections.abc import Mapping
from typing import Final

from events import codec, topics
from events.commands import StartRun
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import FIRST_PREV
from infra.openlineage.partition import Partition
from projections.openlineage import Family, family_of
from streams import kafka
from streams.kafka import Consumer

_AHEAD: Final = 5_000
"""How many records are read at once when a parent is looked for."""
_MOST_LEVELS: Final = 100
"""How deep runs may stand in runs; only what somebody forged stands deeper."""


class Families:
    """Finds families. `known`: those of runs that were read and aren't forgotten; `source`: a reader of its own."""

    def __init__(self, source: Consumer, topic: str, partitions: Mapping[int, Partition], known: Mapping[str, Family]) -> None:
        self._source, self._topic, self._partitions, self._known = source, topic, partitions, known
        self._begun: dict[str, tuple[str, str | None]] = {}  # of runs ahead: workflow, and who started it
        self._looked: dict[int, int] = {}

    def find(self, run_id: str, levels: int = 0) -> Family | None:
        """Return a run's family; None if its beginning is on the log no more. Raises KafkaUnreachableError."""
        if run_id in self._known:
            return self._known[run_id]
        begun = self._begun.get(run_id) or self._look(run_id)
        if begun is None:
            return None
        workflow, above = begun
        parent = self.find(above, levels + 1) if above is not None and levels < _MOST_LEVELS else None
        return family_of(run_id, workflow, parent)

    def passed(self, run_id: str) -> None:
        """Forget what was read ahead of a run: it is known now."""
        self._begun.pop(run_id, None)

    def _look(self, run_id: str) -> tuple[str, str | None] | None:
        number = topics.partition_for(run_id.encode(), len(self._partitions))
        partition = self._partitions[number]
        if (first := partition.index.get(run_id)) is not None:
            self._read(number, first, first + 1)
            return self._begun.get(run_id)
        low, high = kafka.watermarks(self._source, self._topic, number)
        at = max(low, partition.next, self._looked.get(number, 0))
        while run_id not in self._begun and at < high:
            end = min(at + _AHEAD, high)
            self._read(number, at, end)
            at = self._looked[number] = end
        return self._begun.get(run_id)

    def _read(self, number: int, start: int, end: int) -> None:
        """Note the runs that begin between two offsets."""
        for message in kafka.read_partition(self._source, self._topic, number, start, end):
            try:
                decision = codec.decode(message.value(), Decision)
            except NotDecodableError:
                continue
            asked = decision.input
            if isinstance(asked, StartRun) and decision.seq == 1 and decision.prev == FIRST_PREV:
                above = asked.parent.run_id if asked.parent else None
                self._begun.setdefault(decision.run_id, (asked.workflow, above))
