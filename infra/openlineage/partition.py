"""One partition of `decisions` on its way to OpenLineage: what counts, what is to be told, what must be read again."""

from dataclasses import dataclass, field

from events import codec, topics
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from streams.processors.finished import FinishedIndex, Place
from streams.workflow.chain import Chain, Verdict

_PACK_AT = 10_000


@dataclass(slots=True)
class Partition:
    """`position`: up to where decisions are told; `next`: up to where they are read, from `mark` on.

    The mark lies at or before the first decision of each run that is open: who begins there knows all that matters of it.
    """

    place: Place
    position: int = 0
    mark: int = 0
    index: FinishedIndex = field(init=False)
    next: int = field(init=False)
    _chain: Chain = field(init=False)
    _breaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index, self.next = FinishedIndex(self.place), self.mark
        self._chain = Chain(self.index)

    def take(self, offset: int, value: bytes | None) -> tuple[Decision, bytes, bool] | None:
        """Take the partition's next record: return the decision, its hash and whether to tell it; None: it doesn't count."""
        self.next = offset + 1
        is_new = offset >= self.position
        self.position = max(self.position, self.next)
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            return None
        if topics.partition_for(decision.run_id.encode(), self.place.partitions) != self.place.partition:
            return None
        decision_hash = chain_hash(codec.unframed(value or b""))
        verdict = self._chain.judge(offset, decision, decision_hash)
        if verdict is Verdict.BROKEN:
            self._breaks.append(offset)
        return (decision, decision_hash, is_new) if verdict is Verdict.ACCEPTED else None

    def move_mark(self) -> list[str]:
        """Move the mark up to what is still needed; return the runs that are forgotten, as the index says that they are over."""
        heads = self._chain.heads
        over = [run_id for run_id, head in heads.items() if head.over and run_id in self.index]
        for run_id in over:
            del heads[run_id]
        holds = [head.first for head in heads.values() if head.first is not None]
        self.mark = min([self.next, self.position, *holds, *self._breaks])
        if self.index.worth_packing(_PACK_AT):
            self.index.pack()  # in memory only: less of it
        return over
