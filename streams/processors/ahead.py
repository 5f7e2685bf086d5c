"""What former owners of a partition decided on inputs that are still to come: when they come, what follows is said again."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from events.commands import Parent
from streams.envelope import Incoming
from streams.processors.inputs import readable
from streams.workflow.state import RunEvent


@dataclass(slots=True)
class Ahead:
    """Decisions by the offset of their input, and the runs that they ended: by which input, and who waits for its result.

    `answered`: calls that follow from them and needn't be made again, since their results are on the inbox.
    """

    decided: dict[int, RunEvent] = field(default_factory=dict)
    ended: dict[str, tuple[int, Parent | None]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    _awaited: frozenset[str] = frozenset()

    def parent(self, run_id: str) -> Parent | None:
        """Return who waits for the result of a run that ended ahead."""
        return self.ended.get(run_id, (0, None))[1]

    def ends(self, run_id: str, position: int) -> bool:
        """Say whether an input at or after a position ended a run."""
        return self.ended.get(run_id, (-1, None))[0] >= position

    def passed(self, position: int) -> None:
        """Forget what was decided on inputs before a position."""
        self.ended = {run_id: end for run_id, end in self.ended.items() if end[0] >= position}
        self.decided = {offset: event for offset, event in self.decided.items() if offset >= position}

    def await_answers(self, calls: Iterable[str]) -> bool:
        """Look for the results of calls; False: there are none to look for."""
        self._awaited = frozenset(calls)
        return bool(self._awaited)

    def look(self, record: Incoming) -> None:
        """Take note of an input to come: a call that it answers was made."""
        named = record.headers.get("ce_id")
        if named is not None and named.decode("utf-8", "replace").removesuffix("/result") not in self._awaited:
            return
        message, _ = readable(record, (record.key or b"").decode("utf-8", "replace"))
        call = getattr(message.input, "call_id", None) if message else None
        if call in self._awaited:
            self.answered.add(call)
