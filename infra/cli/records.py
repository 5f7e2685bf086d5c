"""Reads the topics for `foldflow tail`: what is stored in the order of time, then what comes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import Message

from events import codec, ids, topics
from events.as_json import as_json, readable
from events.commands import RunRequest
from events.decisions import DeadLetterSettled, Decision
from events.errors import NewerCodeError, NotDecodableError
from events.ids import chain_hash
from events.topics import Topic, partition_for
from infra.cli.silence import Silence
from infra.cli.terminal import say
from streams import kafka
from streams.envelope import Incoming
from streams.kafka import Cluster, TopicPartition
from streams.schemas import Schemas
from streams.settings import Settings
from streams.workflow.chain import Chain

_BY_RUN: Final = frozenset({topics.INBOX.name, topics.DECISIONS.name, topics.FINISHED.name})
"""Topics whose key is the run's id, so that a run is in one partition."""
_SECOND: Final[dict[str, type[Any]]] = {topics.REQUESTS.name: RunRequest, topics.DEADLETTER.name: DeadLetterSettled}
"""What stands on a topic beside its own kind of event."""
_WHOLE_ID: Final = 36


@dataclass(frozen=True, slots=True)
class Shown:
    """A record as it is shown. `event`: as JSON, with its `type`; `verdict`: what the filter says of a decision, if known."""

    record: Incoming
    key: str | None
    headers: dict[str, str | None]
    event: dict[str, Any]
    verdict: str | None


class Tail:
    """A reader of some of our topics; `run`: only what belongs to the run whose id begins like that."""

    def __init__(self, settings: Settings, cluster: Cluster, names: list[str], run: str) -> None:
        self._settings, self._run, self._schemas = settings, run, Schemas(settings)
        self._source = kafka.reader(settings)
        self._topics = {kafka.name(settings, topics.TOPICS[name]): topics.TOPICS[name] for name in names}
        self._ends: dict[tuple[str, int], int] = {}
        self._chains: dict[int, Chain] = {}
        for full, topic in self._topics.items():
            for partition in self._partitions(topic, cluster.partitions[topic.name]):
                self._ends[full, partition] = -1

    def _partitions(self, topic: Topic, count: int) -> list[int]:
        if topic.name in _BY_RUN and len(self._run) == _WHOLE_ID:
            return [partition_for(self._run.encode(), count)]
        return list(range(count))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._source.close()

    def stored(self, last: int | None) -> Iterator[Shown]:
        """Yield what is there now, by time: the last so many, or everything (None)."""
        found: list[Shown] = []
        for full, partition in self._ends:
            low, high = kafka.watermarks(self._source, full, partition)
            self._ends[full, partition] = high
            start = low if last is None else max(low, high - last)
            if self._topics[full] is topics.DECISIONS and start == 0:
                self._chains[partition] = Chain()  # from the first record on, every verdict is certain
            if last != 0:
                found += filter(None, map(self._shown, kafka.read_partition(self._source, full, partition, start, high)))
        found.sort(key=lambda shown: (shown.record.timestamp, shown.record.topic, shown.record.partition, shown.record.offset))
        yield from found if last is None else found[len(found) - min(last, len(found)) :]

    def new(self) -> Iterator[Shown]:
        """Yield what comes, for ever; while Kafka is away, that is said."""
        silence = Silence(self._settings, say)
        self._source.assign([TopicPartition(full, partition, end) for (full, partition), end in self._ends.items()])
        while True:
            messages = kafka.poll(self._source, 0.5)
            silence.heard(anything=bool(messages))
            yield from filter(None, map(self._shown, messages))

    def _shown(self, message: Message) -> Shown | None:
        """Return a record as it is shown; None if it doesn't belong to the run that was asked for."""
        record = kafka.incoming(message)
        topic = self._topics[record.topic]
        event, run_id, verdict = self._decoded(record, topic)
        if self._run and not (run_id or "").startswith(self._run):
            return None
        headers = {key: readable(value) for key, value in record.headers.items()}
        return Shown(record, readable(record.key), headers, event, verdict)

    def _decoded(self, record: Incoming, topic: Topic) -> tuple[dict[str, Any], str | None, str | None]:
        """Return the event as JSON, the run that it belongs to, and the filter's verdict."""
        key = readable(record.key) if topic.name in _BY_RUN else None
        if record.value is None:
            return {"type": "tombstone"}, key, None
        if topic is topics.REQUESTS and record.value[:1] != b"\0":
            return self._request(record.value)
        try:
            second = _SECOND.get(topic.name)
            event: Any = codec.decode(record.value, second if second and codec.kind_of(record.value) is second else topic.kind)
        except NotDecodableError as error:
            return _undecodable(record.value, self._problem(record, topic, error)), key, None
        run_id = getattr(event, "run_id", key)
        if topic is topics.REQUESTS and event.request_id and run_id is None:
            run_id = ids.run_id(event.request_id)
        verdict = None
        if isinstance(event, Decision) and (chain := self._chains.get(record.partition)) is not None:
            verdict = chain.judge(record.offset, event, chain_hash(codec.unframed(record.value))).value
        return as_json(event), run_id, verdict

    def _problem(self, record: Incoming, topic: Topic, error: NotDecodableError) -> str:
        """Return why a record can't be shown. Behind one that newer code wrote no verdict is certain."""
        try:
            self._schemas.refuse_newer("this", record.value, *filter(None, (topic.kind, _SECOND.get(topic.name))))
        except NewerCodeError as newer:
            if topic is topics.DECISIONS:
                self._chains.pop(record.partition, None)
            return str(newer)
        return str(error)

    def _request(self, value: bytes) -> tuple[dict[str, Any], str | None, str | None]:
        """Return a request that somebody wrote as JSON."""
        try:
            data = json.loads(value)
        except (ValueError, RecursionError) as error:
            return _undecodable(value, f"neither Avro nor JSON: {error}"), None, None
        if not isinstance(data, dict):
            return _undecodable(value, "a request is a JSON object"), None, None
        asked, run_id = data.get("request_id"), data.get("run_id")
        if isinstance(asked, str):
            run_id = ids.run_id(asked)
        kind = "RunRequest" if "command" in data else "WorkflowRequest"
        return {"type": f"{kind} (JSON)", **data}, run_id if isinstance(run_id, str) else None, None


def _undecodable(value: bytes, problem: str) -> dict[str, Any]:
    return {"type": "not decodable", "problem": problem, "size": len(value), "hex": value.hex()}
