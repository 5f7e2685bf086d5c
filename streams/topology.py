"""Every processor, what it reads and what it writes. Data only; `app.py` makes the processes."""

from typing import Final

from events.frozen import frozen
from events.topics import (
    CANCELLATIONS,
    DEADLETTER,
    DECISIONS,
    DECISIONS_JSON,
    FINISHED,
    INBOX,
    LLM_CALLS,
    REQUESTS,
    SNAPSHOTS,
    SPECS,
    TOOL_CALLS,
    WORKERS,
    Topic,
)


@frozen
class Processor:
    """A processor. `role`: the process it runs in; `views`: topics it keeps a view of."""

    name: str
    role: str
    source: Topic
    sinks: tuple[Topic, ...]
    views: tuple[Topic, ...] = ()


TOPOLOGY: Final = (
    Processor("intake", "intake", REQUESTS, (INBOX, DEADLETTER, SPECS, WORKERS), views=(SPECS,)),
    Processor(
        "orchestrator",
        "orchestrator",
        INBOX,
        (DECISIONS, LLM_CALLS, TOOL_CALLS, CANCELLATIONS, REQUESTS, INBOX, FINISHED, SNAPSHOTS, WORKERS, DEADLETTER),
        views=(SPECS,),
    ),
    Processor("llm_worker", "llm", LLM_CALLS, (INBOX, DEADLETTER, WORKERS), views=(CANCELLATIONS,)),
    Processor("tool_worker", "tool", TOOL_CALLS, (INBOX, DEADLETTER, WORKERS), views=(CANCELLATIONS,)),
    Processor("mirror", "mirror", DECISIONS, (DECISIONS_JSON, WORKERS), views=(FINISHED,)),
)

ROLES: Final = tuple(dict.fromkeys(processor.role for processor in TOPOLOGY))
"""What `foldflow worker` starts, one process each. Nothing depends on `mirror`: it runs where somebody wants it."""
