"""One run, folded from its partition's records through the shared filter. Pure."""

from dataclasses import dataclass, field

from events import codec
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from streams.workflow.chain import Chain, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.state import INITIAL, RunEvent, RunState


@dataclass
class History:
    """A run as far as its decisions were read. `last`: the last one that counts."""

    run_id: str
    state: RunState = INITIAL
    before: RunState = INITIAL
    last: Decision | None = None
    _chain: Chain = field(default_factory=Chain)

    def take(self, offset: int, value: bytes | None) -> bool:
        """Take a record of the run's partition; say whether it is a decision of this run that counts."""
        # Records of other runs are passed over before they are decoded. A run's id stands in its records as it is.
        if not value or self.run_id.encode() not in value:
            return False
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            return False
        if decision.run_id != self.run_id:
            return False
        hashed = chain_hash(codec.unframed(value))
        if self._chain.judge(offset, decision, hashed) is not Verdict.ACCEPTED:
            return False
        self.before, self.state, self.last = self.state, evolve(self.state, RunEvent(decision, hashed)), decision
        return True
