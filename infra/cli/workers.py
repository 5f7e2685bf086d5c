"""`foldflow workers`: who works where, which circuits aren't closed, and how much waits."""

import base64
import binascii
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition

from events import codec, topics
from events.errors import NotDecodableError
from events.topics import Topic
from events.workers import SILENT_AFTER_MS, CircuitReported, WorkerReported
from infra.cli.terminal import clock, console, fail, quiet, say, took
from streams import commits, kafka
from streams.ends import ends, firsts
from streams.processors.intake_loop import GROUP as INTAKE
from streams.processors.orchestrator import GROUP
from streams.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

_CONNECT_S: Final = 10.0
_ASK_S: Final = 10.0
_OLDEST_S: Final = 3.0
"""How long the oldest records that wait are looked for; those that aren't found by then have no age."""
_CALM_MS: Final = 2_000
"""What waits for less than this is under way, not behind."""

_QUEUES: Final[tuple[tuple[Topic, str, str], ...]] = (
    (topics.REQUESTS, INTAKE, "intake"),
    (topics.INBOX, GROUP, "orchestrator"),
    (topics.LLM_CALLS, topics.LLM_CALLS.name, "llm"),
    (topics.TOOL_CALLS, topics.TOOL_CALLS.name, "tool"),
)
"""What waits on which topic, in which consumer group (without prefix), for which role."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits on a topic for a role: records, those of the worst partition, and the age of the oldest (None: not known)."""

    topic: str
    group: str
    role: str
    records: int
    worst_partition: int | None
    worst_records: int
    oldest_ms: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker as it said it is. `age_ms`: how long ago that was; `silent`: too long."""

    report: WorkerReported
    age_ms: int

    @property
    def silent(self) -> bool:
        """Whether it must be taken for dead, or cut off."""
        return self.age_ms > SILENT_AFTER_MS


def workers(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False) -> None:
    """Show the processes that work on this installation, wherever they run, and what waits for them.

    A process reports at least every 30 seconds. One that hasn't for 90 is silent: it died without a word, or can't reach Kafka;
    it is listed for a day. A circuit that isn't closed belongs to a model or tool that failed too often: its calls are refused,
    and tried again later, until one is answered.

    What waits are records that are not done: calls in flight count. The age is that of the oldest.

    For example:

        foldflow workers

        foldflow workers --json | jq '.waiting[] | {topic, records}'

        watch --interval 5 foldflow workers

    Exit codes: 0 all is well, 1 a worker is silent, a circuit is not closed, or something waits for a role that nobody has,
    4 Kafka can't be reached.
    """
    settings = quiet(Settings())
    try:
        cluster = kafka.connect(settings, timeout_s=_CONNECT_S)
        seen = reports(settings)
        waiting = [_waiting(settings, cluster.partitions[topic.name], topic, group, role) for topic, group, role in _QUEUES]
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        fail(str(error), 4)
    except KafkaException as error:
        fail(f"Kafka at {settings.bootstrap_servers} did not answer: {error.args[0]}", 4)
    amiss = problems(seen, waiting)
    if as_json:
        print(json.dumps(_as_json(seen, waiting, amiss), indent=2, ensure_ascii=False))
    else:
        _show(seen, waiting, amiss)
    if amiss:
        raise typer.Exit(1)


# --- Who works ---


def reports(settings: Settings) -> list[Seen]:
    """Return what each process that hasn't stopped said last, by role and start. Raises KafkaUnreachableError."""
    newest: dict[bytes, WorkerReported] = {}
    with closing(kafka.reader(settings)) as source:
        for message in kafka.read_partition(source, kafka.name(settings, topics.WORKERS), 0, 0):
            key, value = message.key() or b"", message.value()
            newest.pop(key, None)
            if value is not None and (report := _decoded(value)) is not None:
                newest[key] = report
    now = time.time_ns() // 1_000_000
    order = {role: place for place, (_, _, role) in enumerate(_QUEUES)}
    ordered = sorted(newest.values(), key=lambda each: (order.get(each.role, len(order)), each.started_at, each.worker_id))
    return [Seen(report, max(0, now - report.reported_at)) for report in ordered]


def _decoded(value: bytes) -> WorkerReported | None:
    try:
        return codec.decode(value, WorkerReported)
    except NotDecodableError:  # a later version's, or somebody else's: nothing that could be shown
        return None


def problems(seen: list[Seen], waiting: list[Waiting]) -> list[str]:
    """Return what somebody should look at."""
    found = [f"{each.report.worker_id} has been silent for {took(each.age_ms)}" for each in seen if each.silent]
    found += [
        f"circuit of {circuit.endpoint} in {worker.worker_id} is {circuit.state.replace('_', ' ')}"
        for worker, circuit in _circuits(seen)
    ]
    here = {each.report.role for each in seen if not each.silent}
    found += [
        f"{each.records:,} records wait on {each.topic}, and nobody works as {each.role}"
        for each in waiting
        if each.records and each.role not in here
    ]
    return found


def _circuits(seen: Iterable[Seen]) -> Iterator[tuple[WorkerReported, CircuitReported]]:
    """Yield the circuits that aren't closed, of those who still say so."""
    for each in seen:
        for circuit in each.report.breakers:
            if circuit.state != "closed" and not each.silent:
                yield each.report, circuit


# --- What waits ---


def _waiting(settings: Settings, partitions: int, topic: Topic, group: str, role: str) -> Waiting:
    """Return what waits on a topic: from the committed offsets to the ends. Raises KafkaException, KafkaUnreachableError."""
    full, name = settings.topic_prefix + group, kafka.name(settings, topic)
    places = [TopicPartition(name, partition) for partition in range(partitions)]
    admin = kafka.admin(settings)
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(full, places)], request_timeout=_ASK_S)
    committed = {each.partition: each for each in asked[full].result().topic_partitions or ()}
    named = [(name, partition) for partition in range(partitions)]
    first, end = firsts(admin, named, _ASK_S), ends(admin, named, _ASK_S)
    behind: dict[int, int] = {}
    starts: list[TopicPartition] = []
    for partition in range(partitions):
        place = committed.get(partition)
        # What was never committed waits from the first record on; so does what was committed before records were deleted.
        start = max(first[name, partition], place.offset if place else 0)
        ahead = done_ahead(place.metadata if place else None) if topic in (topics.LLM_CALLS, topics.TOOL_CALLS) else 0
        if (records := end[name, partition] - start - ahead) > 0:
            behind[partition] = records
            starts.append(TopicPartition(name, partition, start))
    worst = max(behind, key=lambda partition: behind[partition], default=None)
    oldest = _oldest_ms(settings, starts) if starts else None
    return Waiting(topic.name, full, role, sum(behind.values()), worst, behind.get(worst, 0) if worst is not None else 0, oldest)


def done_ahead(metadata: str | None) -> int:
    """Return how many calls behind the committed offset are done already (decision record 005)."""
    try:
        return sum(byte.bit_count() for byte in base64.b64decode(commits.covered(metadata or "")[1], validate=True))
    except binascii.Error:
        return 0


def _oldest_ms(settings: Settings, starts: list[TopicPartition]) -> int | None:
    """Return the age of the oldest of the records at these places; None if they don't come soon."""
    stamps: dict[int, int] = {}
    deadline = time.monotonic() + _OLDEST_S
    with closing(kafka.reader(settings)) as source:
        source.assign(starts)
        while len(stamps) < len(starts) and time.monotonic() < deadline:
            for message in kafka.poll(source, 0.1, 100):
                stamps.setdefault(message.partition() or 0, message.timestamp()[1])
    return max(0, time.time_ns() // 1_000_000 - min(stamps.values())) if stamps else None


# --- Showing ---


def _as_json(seen: list[Seen], waiting: list[Waiting], amiss: list[str]) -> dict[str, Any]:
    return {
        "workers": [asdict(each.report) | {"age_ms": each.age_ms, "silent": each.silent} for each in seen],
        "waiting": [asdict(each) for each in waiting],
        "problems": amiss,
    }


def _show(seen: list[Seen], waiting: list[Waiting], amiss: list[str]) -> None:
    if seen:
        console().print(_workers_table(seen))
    else:
        say("No process has reported. Start them with: foldflow up")
    circuits = [*_circuits(seen)]
    if circuits:
        console().print("")
        console().print(_circuits_table(circuits))
    console().print("")
    console().print(_waiting_table(waiting))
    for problem in amiss:
        say(problem)


def _workers_table(seen: list[Seen]) -> "Table":
    from rich.markup import escape  # noqa: PLC0415 - 0.1 s
    from rich.table import Table  # noqa: PLC0415

    table = Table("worker", "", "host", "pid", "version", "since", "in flight", "partitions", "reported", box=None)
    for each in seen:
        report = each.report
        flying = f"{report.in_flight} of {report.concurrency}" if report.concurrency else ""
        state = "[red]silent[/]" if each.silent else "[green]works[/]"
        table.add_row(
            escape(report.worker_id),
            state,
            escape(report.host),
            str(report.pid),
            escape(report.version),
            clock(report.started_at)[:-4],
            flying,
            " ".join(map(str, report.partitions)),
            f"{took(each.age_ms)} ago",
        )
    return table


def _circuits_table(circuits: list[tuple[WorkerReported, CircuitReported]]) -> "Table":
    from rich.markup import escape  # noqa: PLC0415 - 0.1 s
    from rich.table import Table  # noqa: PLC0415

    table = Table("circuit", "", "worker", "since", "next call", "failed", "last error", box=None)
    for worker, circuit in circuits:
        table.add_row(
            escape(circuit.endpoint),
            f"[yellow]{escape(circuit.state.replace('_', ' '))}[/]",
            escape(worker.worker_id),
            clock(circuit.since)[:-4],
            clock(circuit.retry_at)[11:-4] if circuit.retry_at else "",
            f"{circuit.failures} of {circuit.calls}",
            escape(circuit.last_error or ""),
        )
    return table


def _waiting_table(waiting: list[Waiting]) -> "Table":
    from rich.table import Table  # noqa: PLC0415 - 0.1 s

    table = Table("topic", "group", "waits", "worst partition", "oldest", box=None)
    for each in waiting:
        worst = f"{each.worst_partition}: {each.worst_records:,}" if each.worst_partition is not None else ""
        late = each.oldest_ms is not None and each.oldest_ms > _CALM_MS
        oldest = took(each.oldest_ms)
        table.add_row(each.topic, each.group, f"{each.records:,}", worst, f"[yellow]{oldest}[/]" if late else oldest)
    return table
