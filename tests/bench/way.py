"""The way of six-step runs in memory: requests, inbox, decisions, calls of one partition, by the real functions, without Kafka.

What stands on each topic is kept, so that each part of the way can be gone again: to say what it costs (stages.py), or how many
instructions it takes (instructions.py).
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from workload import SIX_STEPS, six_steps

from events import topics
from events.commands import WorkflowRequest
from streams.envelope import Incoming, Outgoing, envelope
from streams.processors.intake import Intake
from streams.processors.tenure import Commit, Place, Tenure
from streams.processors.tool_worker import ToolCalls
from streams.settings import Settings
from streams.workflow.expressions import to_json
from streams.workflow.payloads import NoPayloads
from streams.workflow.spec import WorkflowSpec
from tools.builtin.echo import echo
from tools.tool import describe

BEGAN: Final = 2_100_000_000_000
"""When all this happens (2036), so that no call is ever late and each number takes as many bytes as today's."""
SPEC: Final = six_steps()
SETTINGS: Final = Settings(data_dir=Path("/nowhere"))
PLACE: Final = Place(b"i" * 16, b"d" * 16, 0, 1)


class Specs:
    """The one workflow, as intake and tenures ask for it."""

    def get(self, version: str) -> WorkflowSpec | None:
        """Return it by its digest."""
        return SPEC if version == SPEC.digest else None

    def newest(self, workflow: str) -> WorkflowSpec | None:
        """Return it by its name."""
        return SPEC if workflow == SPEC.name else None

    def names(self) -> list[str]:
        """Return its name."""
        return [SPEC.name]

    def refresh(self) -> None:
        """Nothing comes."""


def intake() -> Intake:
    """Return who judges requests."""
    return Intake(Specs(), b"r" * 16)


def tenure() -> Tenure:
    """Return who has the partition from its beginning on."""
    made = Tenure(PLACE, Specs().get, Commit(0, 0), NoPayloads())
    made.begin(0)
    return made


def tools() -> ToolCalls:
    """Return who makes calls."""
    return ToolCalls(SETTINGS, {"echo": describe(echo, name="echo", version_of=b"")})


def settle(owner: Tenure) -> tuple[list[Outgoing], Commit]:
    """Settle what was taken, as if all of it stood on the log; return what is written then, and what is committed."""
    owner.settle(list(range(owner.end, owner.end + owner.unsettled)))
    records = [*owner.follows(), *owner.index_entries(), *owner.keep_idle(BEGAN)]
    return records, owner.commit()


async def made(calls: ToolCalls, records: Iterable[Incoming]) -> list[Outgoing]:
    """Return the results of these calls, each made by a task of its own."""
    return list(await asyncio.gather(*(asyncio.create_task(calls(each)) for each in records)))


@dataclass
class Log:
    """What stands on the topics when it is over. `written`: all that was produced, in its order."""

    requests: list[Incoming] = field(default_factory=list)
    inbox: list[Incoming] = field(default_factory=list)
    decisions: list[Incoming] = field(default_factory=list)
    calls: list[Incoming] = field(default_factory=list)
    written: list[Outgoing] = field(default_factory=list)

    def append(self, record: Outgoing) -> Incoming:
        """Write a record, and return it as it is read."""
        self.written.append(record)
        kept = {"requests": self.requests, "inbox": self.inbox, "decisions": self.decisions, "tool.calls": self.calls}
        log = kept.get(record.topic.name, [])
        at = BEGAN + len(log)
        log.append(Incoming(record.topic.name, 0, len(log), at, record.key, record.value, dict[str, Any](record.headers)))
        return log[-1]


def request(number: int) -> Outgoing:
    """Return the request for a run."""
    asked = WorkflowRequest(SIX_STEPS, to_json({"i": number}), f"bench-{number}")
    return envelope(topics.REQUESTS, f"bench-{number}", asked, source="bench", identity=f"bench-{number}", at_ms=BEGAN)


def walk(runs: int, inflight: int = 200) -> Log:
    """Do so many runs, `inflight` at a time, from their requests to their ends."""
    log, judge, owner, worker = Log(), intake(), tenure(), tools()
    asked = deque(request(number) for number in range(runs))
    waiting: list[Incoming] = []

    def ask() -> None:
        if asked:
            waiting.extend(log.append(each) for each in judge.check(log.append(asked.popleft())))

    for _ in range(inflight):
        ask()
    with asyncio.Runner() as runner:
        while waiting:
            batch, calls = waiting.copy(), []
            waiting.clear()
            for each in batch:
                written = [log.append(record) for record in owner.take(each)]
                calls += written[1:]
                if len(written) == 1:  # a decision and no call: the run is over
                    ask()
            waiting.extend(log.append(each) for each in runner.run(made(worker, calls)))
            for record in settle(owner)[0]:
                log.append(record)
    if owner.runs or len(log.decisions) != runs * (len(SPEC.steps) + 1):
        raise RuntimeError(f"{len(owner.runs)} runs did not end")
    return log
