"""Follows one run from the topics themselves: its decisions through the shared filter, and dead letters about its request.

The rows are those of the read models, folded in memory, so the terminal shows what the API shows.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Message

from events import codec, topics
from events.decisions import DeadLetter, Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from projections.as_json import payload
from projections.calls import Calls
from projections.entry import Entry
from projections.runs import OPEN, RunRow, Runs
from projections.steps import StepRow, Steps
from streams import kafka
from streams.kafka import Cluster, TopicPartition
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict


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
    """What is known of the run so far."""

    sent: Sent
    offset: int = -1
    run: RunRow | None = None
    steps: dict[str, StepRow] = field(default_factory=dict)
    refusal: DeadLetter | None = None
    _chain: Chain = field(default_factory=Chain)
    _runs: Runs = field(default_factory=Runs)
    _steps: Steps = field(default_factory=Steps)
    _calls: Calls = field(default_factory=Calls)

    def __post_init__(self) -> None:
        self._steps.open[self.sent.run_id] = self.steps

    @property
    def over(self) -> bool:
        """Whether nothing more can come."""
        return self.refusal is not None or (self.run is not None and self.run.status != OPEN)

    def decision(self, message: Message) -> bool:
        """Take a record of `decisions`; say whether something has changed."""
        value = message.value()
        # Records of other runs are passed over before they are decoded. A run's id stands in its records as it is.
        if self.over or not value or self.sent.run_id.encode() not in value:
            return False
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            return False
        if decision.run_id != self.sent.run_id:
            return False
        body = codec.unframed(value)
        entry = Entry(message.partition() or 0, message.offset() or 0, decision, chain_hash(body), len(body))
        if self._chain.judge(entry.offset, decision, entry.hash) is not Verdict.ACCEPTED:
            return False
        spent = self._calls.apply(entry)
        settled = self._steps.apply(entry, spent)
        self.run = self._runs.apply(entry, spent, settled)
        return True

    def letter(self, message: Message) -> bool:
        """Take a record of `deadletter`; say whether it refuses this request."""
        try:
            letter = codec.decode(message.value(), DeadLetter)
        except NotDecodableError:
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
        }


class Follower:
    """Reads on in the topics from where they were when it was made; make it before the request is sent."""

    def __init__(self, settings: Settings, cluster: Cluster, sent: Sent) -> None:
        self.followed = Followed(sent)
        self._source = kafka.reader(settings)
        self._decisions = kafka.name(settings, topics.DECISIONS)
        letters = kafka.name(settings, topics.DEADLETTER)
        partition = topics.partition_for(sent.run_id.encode(), cluster.partitions[topics.DECISIONS.name])
        low, high = kafka.watermarks(self._source, self._decisions, partition)
        places = [TopicPartition(self._decisions, partition, low if sent.again else high)]
        places += [
            TopicPartition(letters, each, kafka.watermarks(self._source, letters, each)[1])
            for each in range(cluster.partitions[topics.DEADLETTER.name])
        ]
        self._source.assign(places)

    def changes(self, timeout_s: float) -> Iterator[Followed]:
        """Yield what is known whenever it has changed, and at least every 0.2 s, until it is over or the time is up."""
        deadline = time.monotonic() + timeout_s
        while not self.followed.over and time.monotonic() < deadline:
            for message in kafka.poll(self._source, max(0.0, min(0.2, deadline - time.monotonic()))):
                take = self.followed.decision if message.topic() == self._decisions else self.followed.letter
                if take(message):
                    yield self.followed
            if not self.followed.over:
                yield self.followed

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


def as_line(result: dict[str, Any]) -> str:
    """Return a result as one line of JSON."""
    return json.dumps(result, ensure_ascii=False)
