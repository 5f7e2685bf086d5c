"""One run, folded from its partition's records through the shared filter."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from events import codec
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from streams.workflow.chain import Chain, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.state import INITIAL, RunEvent, RunState

if TYPE_CHECKING:
    from streams.schemas import Schemas


@dataclass
class History:
    """A run as far as its decisions were read. `last`: the last one that counts.

    `schemas`: who knows what newer code writes; without it nothing does.
    """

    run_id: str
    schemas: "Schemas | None" = None
    state: RunState = INITIAL
    before: RunState = INITIAL
    last: Decision | None = None
    _chain: Chain = field(default_factory=Chain)

    def take(self, offset: int, value: bytes | None) -> bool:
        """Take a record of the run's partition; say whether it is a decision of this run that counts.

        Raises NewerCodeError: without that decision the run would be shown, or forked, as it isn't.
        """
        # Records of other runs are passed over before they are decoded. A run's id stands in its records as it is.
        if not value or self.run_id.encode() not in value:
            return False
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            if self.schemas is not None:
                self.schemas.refuse_newer(f"decision {offset} (run {self.run_id})", value, Decision)
            return False
        if decision.run_id != self.run_id:
            return False
        hashed = chain_hash(codec.unframed(value))
        if self._chain.judge(offset, decision, hashed) is not Verdict.ACCEPTED:
            return False
        self.before, self.state, self.last = self.state, evolve(self.state, RunEvent(decision, hashed)), decision
        return True
