"""Follows one run from the topics themselves: its decisions through the shared filter, and dead letters about its request.

The rows are those of the read models, folded in memory, so the terminal shows what the API shows.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from confluent_kafka import Message

from events import codec, topics
from events.as_json import payload
from events.decisions import DeadLetter, RunCancelled
from events.errors import NotDecodableError
from infra.cli.history import History
from infra.cli.outcome import waiting
from infra.cli.silence import Silence
from projections.calls import Calls
from projections.entry import Entry
from projections.runs import RunRow, Runs
from projections.steps import StepRow, Steps
from streams import kafka
from streams.kafka import Cluster, TopicPartition
from streams.schemas import Schemas
from streams.settings import Settings

_FINE: Final = ("completed", "skipped")
_MOST_WITHIN: Final = 20


@dataclass(frozen=True, slots=True)
class Sent:
    """A request, and where it will stand. `again`: its id was given, so its run may be there already."""

    request_id: str
    run_id: str
    topic: str
    partition: int
    again: bool


@dataclass
class Followed:
    """What is known of the run so far. `behind`: what is read now happened before, so nobody must be asked about it.

    `schemas`: who knows what newer code writes; its decisions, and its letters about this run, raise NewerCodeError.
    """

    sent: Sent
    schemas: Schemas | None = None
    offset: int = -1
    behind: bool = False
    run: RunRow | None = None
    steps: dict[str, StepRow] = field(default_factory=dict)
    refusal: DeadLetter | None = None
    history: History = field(init=False)
    _runs: Runs = field(default_factory=Runs)
    _steps: Steps = field(default_factory=Steps)
    _calls: Calls = field(default_factory=Calls)

    def __post_init__(self) -> None:
        self._steps.open[self.sent.run_id] = self.steps
        self.history = History(self.sent.run_id, self.schemas)

    @property
    def over(self) -> bool:
        """Whether nothing more can come."""
        return self.refusal is not None or self.history.state.over

    @property
    def listed(self) -> dict[str, StepRow]:
        """The steps that are shown: of those in items and iterations only what is under way or went wrong, the latest of it."""
        within = [name for name, step in self.steps.items() if "[" in name and step.status not in _FINE]
        shown = set(within[-_MOST_WITHIN:])
        return {name: step for name, step in self.steps.items() if "[" not in name or name in shown}

    @property
    def waiting(self) -> list[str]:
        """What the run waits for that somebody must do, each with the command that does it."""
        return [] if self.behind else waiting(self.history.state, self.sent.run_id)

    def decision(self, message: Message) -> bool:
        """Take a record of `decisions`; say whether something has changed."""
        value = message.value()
        if self.over or not self.history.take(message.offset() or 0, value):
            return False
        decision, state = self.history.last, self.history.state
        assert decision is not None
        entry = Entry(message.partition() or 0, message.offset() or 0, decision, state.head, len(codec.unframed(value or b"")))
        spent = self._calls.apply(entry, self._runs.workflow_of(decision))
        moved = self._steps.apply(entry, spent)
        self.run = self._runs.apply(entry, spent, moved)
        return True

    def letter(self, message: Message) -> bool:
        """Take a record of `deadletter`; say whether it refuses this request."""
        try:
            letter = codec.decode(message.value(), DeadLetter)
        except NotDecodableError:
            if self.schemas is not None and self.sent.run_id.encode() in (value := message.value() or b""):
                self.schemas.refuse_newer(f"a dead letter about run {self.sent.run_id}", value, DeadLetter)
            return False
        ours = (letter.topic, letter.partition, letter.offset) == (self.sent.topic, self.sent.partition, self.offset)
        # Intake may have taken the request and the orchestrator refused it: then only the run is named.
        if ours or (letter.run_id == self.sent.run_id and letter.topic != self.sent.topic and self.run is None):
            self.refusal = letter
        return self.refusal is letter

    def result(self, status: str) -> dict[str, Any]:
        """Return the end as one JSON object."""
        found: dict[str, Any] = {"run_id": self.sent.run_id, "request_id": self.sent.request_id, "status": status}
        if self.refusal is not None:
            return found | {"reason": self.refusal.reason, "detail": self.refusal.detail}
        if self.run is None:
            return found
        run = self.run
        failure = (
            {"kind": run.failure_kind, "message": run.failure_message, "step": run.failure_step} if run.failure_kind else None
        )
        return found | {
            "workflow": run.workflow,
            "output": payload(run.output),
            "failure": failure,
            "steps": {name: step.status for name, step in self.steps.items()},
            "calls": run.calls,
            "retries": run.retries,
            "input_tokens": run.input_tokens,
            "output_tokens": run.output_tokens,
            "cost_usd": run.cost_usd,
            "unpriced_calls": run.unpriced_calls,
            "duration_ms": run.updated - run.started,
            "cancelled": self._cancelled(),
            "waiting": self.waiting,
        }

    def _cancelled(self) -> dict[str, str] | None:
        """Return who cancelled the run, and why."""
        last = self.history.last
        ended = [each for each in last.effects if isinstance(each, RunCancelled)] if last else []
        return {"by": ended[0].by, "reason": ended[0].reason} if ended else None


class Follower:
    """Reads on in the topics from where they were when it was made; make it before the request is sent."""

    def __init__(self, settings: Settings, cluster: Cluster, sent: Sent) -> None:
        self.followed = Followed(sent, Schemas(settings))
        self._silence = Silence(settings)
        self._source = kafka.reader(settings)
        self._decisions = kafka.name(settings, topics.DECISIONS)
        letters = kafka.name(settings, topics.DEADLETTER)
        partition = topics.partition_for(sent.run_id.encode(), cluster.partitions[topics.DECISIONS.name])
        low, high = kafka.watermarks(self._source, self._decisions, partition)
        self._end = high
        self.followed.behind = sent.again and low < high
        places = [TopicPartition(self._decisions, partition, low if sent.again else high)]
        places += [
            TopicPartition(letters, each, kafka.watermarks(self._source, letters, each)[1])
            for each in range(cluster.partitions[topics.DEADLETTER.name])
        ]
        self._source.assign(places)

    def changes(self, timeout_s: float) -> Iterator[Followed]:
        """Yield what is known whenever it has changed, and at least every 0.2 s, until it is over or the time is up.

        Raises NewerCodeError.
        """
        deadline = time.monotonic() + timeout_s
        while not self.followed.over and time.monotonic() < deadline:
            messages = kafka.poll(self._source, max(0.0, min(0.2, deadline - time.monotonic())))
            self._silence.heard(anything=bool(messages))
            for message in messages:
                take = self.followed.letter
                if message.topic() == self._decisions:
                    take = self.followed.decision
                    self.followed.behind = (message.offset() or 0) + 1 < self._end
                if take(message):
                    yield self.followed
            if not self.followed.over:
                yield self.followed

    @property
    def away(self) -> bool:
        """Whether Kafka was away when it was asked last."""
        return self._silence.away

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


def as_line(result: dict[str, Any]) -> str:
    """Return a result as one line of JSON."""
    return json.dumps(result, ensure_ascii=False)
