"""Measure how long taking over lasts as histories grow: many decisions of finished runs, few or many active runs.

    python tests/bench/takeover.py measure [--sizes 10000,100000,1000000] [--active 1000] [--waiting 100000] >> points.jsonl
    python tests/bench/takeover.py show points.jsonl [--plot docs/takeover.svg]

`measure` prints one JSON line for each size: so many decisions of finished runs (six calls each) are in the log, and `--active`
runs are under way; with `--waiting`, so many wait for a signal besides, first in memory, then with snapshots. The ledger is what
orchestrators would have left: real tenures judge each input in this process, and their records, positions and marks go to a real
Kafka. What is measured is a real process, `foldflow worker orchestrator`: how long it takes over all partitions, its CPU time and
memory, and when it has decided its first inputs. `show` prints a table, and draws.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

sys.path.insert(0, str(Path(__file__).parent))
from cluster import free_port
from waiting import SIGNALS, Log, Orchestrator
from workload import STEPS

from events import codec, topics
from events.calls import ToolCall
from events.commands import SignalReceived, StartRun
from events.ids import run_id
from events.results import InboxMessage, Input, ToolCallCompleted
from streams import kafka, registry
from streams.envelope import Incoming, Outgoing, envelope
from streams.kafka import Acks, Cluster
from streams.processors.orchestrator import GROUP, committed_base
from streams.processors.tenure import Commit, Place, Tenure
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec

CALL = {"tool": {"name": "echo", "arguments": {"value": {"ticker": "ACME", "text": "x" * 64}}}, "timeout": "30d"}
WORK = WorkflowSpec.model_validate(
    {
        "name": "bench-takeover",
        "steps": {step: CALL | {"needs": [before] if before else []} for before, step in zip(("", *STEPS), STEPS, strict=False)},
    }
)
"""As the bench's six steps, with time limits that no measurement reaches: nothing happens by itself."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
AT_ONCE = 25
"""Runs of one partition under way at the same time while history is made."""
SETTLE_AT = 2000
LATER_MS = 86_400_000


@dataclass
class Writer:
    """One partition's history, judged by a real tenure. What is produced goes to Kafka, and is taken as acknowledged."""

    settings: Settings
    producer: Producer
    tenure: Tenure
    calls: dict[str, ToolCall] = field(default_factory=dict)  # what open runs wait for, by run
    decided: int = 0
    acks: Acks = field(default_factory=Acks)

    @property
    def partition(self) -> int:
        """The partition's number."""
        return self.tenure.place.partition

    def send(self, run: str, said: Input, on_delivery: Callable[[Any, Any], None] | None = None) -> bytes:
        """Put an input into the inbox and return its bytes."""
        record = envelope(topics.INBOX, run, InboxMessage(run, said), source="bench", identity=run, run_id=run)
        where = Outgoing(record.topic, record.key, record.value, record.headers, self.partition)
        kafka.produce(self.producer, self.settings, where, on_delivery or self.acks)
        return record.value or b""

    def judge(self, run: str, value: bytes, at_ms: int, *, produce: bool = True) -> None:
        """Let the tenure judge the next input and produce the decision."""
        record = Incoming("inbox", self.partition, self.tenure.position, at_ms, run.encode(), value)
        for outgoing in self.tenure.take(record):
            if outgoing.topic is topics.DECISIONS:
                self.decided += 1
                if produce:
                    kafka.produce(self.producer, self.settings, outgoing, self.acks)
            elif outgoing.topic is topics.TOOL_CALLS:
                self.calls[run] = codec.decode(outgoing.value, ToolCall)
        if self.tenure.unsettled >= SETTLE_AT:
            self.settle()

    def say(self, run: str, said: Input) -> None:
        """Put an input into the inbox and judge it."""
        self.judge(run, self.send(run, said), time.time_ns() // 1_000_000)

    def answer(self, run: str) -> ToolCallCompleted:
        """Return the result of the call that a run waits for."""
        call = self.calls.pop(run)
        return ToolCallCompleted(call.call_id, call.request.step, call.request.arguments, "1", 1)

    def settle(self, now: int = 0) -> None:
        """Settle what was judged; `now` says which runs have been idle for long enough to go out of memory."""
        offsets = list(range(self.tenure.end, self.tenure.end + self.tenure.unsettled))
        self.tenure.settle(offsets)
        for entry in (*self.tenure.follows(), *self.tenure.index_entries(), *self.tenure.keep_idle(now)):
            kafka.produce(self.producer, self.settings, entry, self.acks)
        self.producer.poll(0)
        self.tenure.commit()

    def shelve(self) -> None:
        """Put all runs on the shelf."""
        while self.tenure.runs:
            self.settle(time.time_ns() // 1_000_000 + LATER_MS)


@dataclass
class Ledger:
    """All partitions and what runs on them."""

    settings: Settings
    cluster: Cluster
    producer: Producer
    writers: list[Writer]
    numbers: int = 0
    active: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def where(self, run: str) -> Writer:
        """Return the writer of a run's partition."""
        return self.writers[topics.partition_for(run.encode(), len(self.writers))]

    def start(self, spec: WorkflowSpec) -> str:
        """Start a run and return its id."""
        run, said = self.request(spec)
        self.where(run).say(run, said)
        return run

    def request(self, spec: WorkflowSpec) -> tuple[str, StartRun]:
        """Return a new run's id and the command that starts it."""
        self.numbers += 1
        request_id = f"bench-{self.numbers}"
        return run_id(request_id), StartRun(request_id, spec.name, spec.digest, json.dumps({"i": self.numbers}))

    def answered(self, run: str) -> bool:
        """Answer a run's call; False: it waits for none."""
        writer = self.where(run)
        if run not in writer.calls:
            return False
        writer.say(run, writer.answer(run))
        return True

    def history(self, decisions: int) -> None:
        """Go on with finished runs until there are so many decisions altogether."""
        under_way: deque[str] = deque()
        while under_way or self.decisions() < decisions:
            if self.decisions() + len(under_way) * len(STEPS) < decisions and len(under_way) < AT_ONCE * len(self.writers):
                under_way.append(self.start(WORK))
            elif self.answered(under_way[0]):
                under_way.rotate(-1)
            else:
                under_way.popleft()

    def finish(self) -> None:
        """Bring all open runs to their end."""
        while sum(self.answered(run) for run in self.active):
            pass
        for run in self.waiting:
            self.where(run).say(run, SignalReceived(f"{run}/paid", "paid", None, "5", "bench"))
        self.active, self.waiting = [], []

    def open_runs(self) -> int:
        """Return how many runs are open."""
        return sum(len(writer.tenure.runs) + len(writer.tenure.shelf) for writer in self.writers)

    def decisions(self) -> int:
        """Return how many decisions there are."""
        return sum(writer.decided for writer in self.writers)

    def commit(self) -> None:
        """Settle everything, pack the index where that is due, and commit as an orchestrator does: position, marks, topic ids."""
        for writer in self.writers:
            writer.settle()
        self.flush()
        for writer in self.writers:
            if writer.tenure.pack_due:
                self.pack(writer)
        self.flush()
        ids = {topic.name: self.cluster.ids[topic.name].hex() for topic in (topics.INBOX, topics.DECISIONS, topics.FINISHED)}
        places = []
        for writer in self.writers:
            commit = writer.tenure.commit()
            metadata = json.dumps({"mark": commit.mark, "index": commit.index, **ids})
            places.append(TopicPartition(kafka.name(self.settings, topics.INBOX), writer.partition, commit.position, metadata))
            if committed_base(places[-1], self.cluster.ids) != commit:
                raise RuntimeError(f"an orchestrator reads {commit} as {committed_base(places[-1], self.cluster.ids)}")
        with closing(kafka.consumer(self.settings, GROUP)) as member:
            _committed(member, places)

    def pack(self, writer: Writer) -> None:
        """Let a tenure read its partition of the index to the end, and write all of it into a pack."""
        name, tenure = kafka.name(self.settings, topics.FINISHED), writer.tenure
        with closing(kafka.reader(self.settings)) as source:
            for message in kafka.read_partition(source, name, writer.partition, tenure.finished.end):
                tenure.index_read(message.offset() or 0, message.key(), message.value())
        for record in tenure.pack():
            kafka.produce(self.producer, self.settings, record, writer.acks)

    def flush(self) -> None:
        """Wait until all that was produced is acknowledged."""
        kafka.flush(self.producer, *(writer.acks for writer in self.writers), timeout_s=600)
        for writer in self.writers:
            writer.acks = Acks()


def _committed(member: Consumer, places: list[TopicPartition], patience_s: float = 60) -> None:
    """Commit for a group that has no members, as soon as its last one is forgotten."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            member.commit(offsets=places, asynchronous=False)
        except KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


@contextmanager
def ledger() -> Iterator[tuple[Ledger, Orchestrator]]:
    """Start Kafka on a free port with fresh data; yield an empty ledger, and the orchestrator's process, not started."""
    with tempfile.TemporaryDirectory(prefix="foldflow-bench-") as folder:
        values: dict[str, Any] = {"bootstrap_servers": f"127.0.0.1:{free_port()}", "data_dir": folder, "topic_prefix": "bench."}
        values |= {"idle_after_s": 100_000, "session_timeout_ms": 6000}
        environment = dict(os.environ) | {f"FOLDFLOW_{key.upper()}": str(value) for key, value in values.items()}
        foldflow = [sys.executable, "-m", "infra.cli.main"]
        subprocess.run([*foldflow, "up", "--only", "kafka", "--detach"], env=environment, check=True, stdout=sys.stderr)
        try:
            settings = Settings(**values)
            cluster = kafka.connect(settings)
            registry.publish(settings, [WORK, SIGNALS])
            producer = kafka.producer(settings, **{"linger.ms": 20, "compression.type": topics.DECISIONS.compression})
            specs = {spec.digest: spec for spec in (WORK, SIGNALS)}
            inbox, decisions = cluster.ids[topics.INBOX.name], cluster.ids[topics.DECISIONS.name]
            partitions = cluster.partitions[topics.INBOX.name]
            places = [Place(inbox, decisions, partition, partitions) for partition in range(partitions)]
            writers = [Writer(settings, producer, Tenure(place, specs.get, Commit(0, 0))) for place in places]
            for writer in writers:
                writer.tenure.begin(0)
            yield Ledger(settings, cluster, producer, writers), Orchestrator(settings, folder, environment)
        finally:
            subprocess.run([*foldflow, "down"], env=environment, check=False, stdout=sys.stderr)


class Probe:
    """An input that stands in the inbox when the orchestrator starts; `at_ms` is the broker's time of it."""

    def __init__(self, writer: Writer, run: str, said: Input) -> None:
        self.writer, self.run, self.at_ms = writer, run, 0
        self.value = writer.send(run, said, self._delivered)

    def _delivered(self, error: Any, message: Any) -> None:
        self.writer.acks(error, message)
        self.at_ms = message.timestamp()[1]

    def judged(self) -> None:
        """Take the input as the orchestrator has: its decision, byte for byte, is in the log."""
        self.writer.judge(self.run, self.value, self.at_ms, produce=False)


def probes(found: Ledger) -> list[Probe]:
    """Let each partition have the next result of a run that is under way, and a new run."""
    asked: list[Probe] = []
    continued: set[int] = set()
    for run in found.active:
        writer = found.where(run)
        if writer.partition not in continued and run in writer.calls:
            continued.add(writer.partition)
            asked.append(Probe(writer, run, writer.answer(run)))
    new: set[int] = set()
    while len(new) < len(found.writers):
        run, said = found.request(WORK)
        writer = found.where(run)
        if writer.partition not in new:
            new.add(writer.partition)
            asked.append(Probe(writer, run, said))
            found.active.append(run)
    kafka.flush(found.producer)
    return asked


def measured(found: Ledger, orchestrator: Orchestrator, kept: str) -> dict[str, Any]:
    """Start the orchestrator on the ledger as it is and return what that took. `kept`: where the open runs are."""
    found.commit()
    point: dict[str, Any] = {"decisions": found.decisions(), "open_runs": found.open_runs(), "kept": kept}
    point["index_records"] = sum(Log(found.settings, topics.FINISHED).ends())
    asked = probes(found)
    log = Log(found.settings, topics.DECISIONS)
    ends = log.ends()
    if sum(ends) != point["decisions"]:
        raise RuntimeError(f"{sum(ends)} decisions are in the log, not {point['decisions']}")
    began = time.time()
    point["ready_s"] = round(orchestrator.start(), 2)
    times = psutil.Process(orchestrator.process.pid).cpu_times()
    log.wait(point["decisions"] + len(asked), 600)
    point |= {"takeover_s": took_over(orchestrator), "cpu_s": round(times.user + times.system, 2)}
    point["memory_mb"] = orchestrator.memory_mb()
    first = [at / 1000 - began for _, at in log.decisions(ends)]
    point |= {"first_decision_s": round(min(first), 2), "every_partition_decides_s": round(max(first), 2)}
    orchestrator.process.terminate()
    orchestrator.process.wait(120)
    for probe in asked:
        probe.judged()
    return point


def took_over(orchestrator: Orchestrator) -> float:
    """Return the seconds that taking over took: each partition's line in the log says how long all of them took together."""
    log = (Path(orchestrator.folder) / f"orchestrator-{orchestrator.starts}.log").read_text()
    return max(float(seconds) for seconds in re.findall(r"orchestrator\.took_over.* seconds=([0-9.]+)", COLOURS.sub("", log)))


def measure(sizes: list[int], active: int, waiting: int) -> Iterator[dict[str, Any]]:
    """Yield a point for each size, or with `waiting` two of them: so many runs wait, in memory and then with snapshots."""
    with ledger() as (found, orchestrator):
        yield measured(found, orchestrator, "memory") | {"active": 0}
        for size in sizes:
            found.finish()
            began = time.monotonic()
            found.history(size)
            found.active += [found.start(WORK) for _ in range(active)]
            for _ in range(len(STEPS) // 2):
                for run in found.active:
                    found.answered(run)
            found.waiting += [found.start(SIGNALS) for _ in range(waiting)]
            print(f"{found.decisions():,} decisions made, {time.monotonic() - began:.0f} s", file=sys.stderr)
            yield measured(found, orchestrator, "memory") | {"active": active + waiting}
            if waiting:
                for writer in found.writers:
                    writer.shelve()
                yield measured(found, orchestrator, "snapshots") | {"active": active + waiting}


def series(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the points that belong together, by what they have in common."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        if point["active"]:
            where = "in memory" if point["kept"] == "memory" else "with snapshots"
            found.setdefault(f"{point['active']:,} active runs, {where}", []).append(point)
    return {name: sorted(each, key=lambda point: point["decisions"]) for name, each in found.items()}


COLUMNS = ("decisions", "index_records", "takeover_s", "cpu_s", "memory_mb", "first_decision_s", "every_partition_decides_s")


def show(points: list[dict[str, Any]]) -> None:
    """Print a table of the points."""
    empty = [point for point in points if not point["active"]]
    for name, each in (({"nothing yet": empty} if empty else {}) | series(points)).items():
        print(f"\n{name}\n" + " | ".join(COLUMNS))
        for point in each:
            print(" | ".join(f"{point[column]:>{len(column)},}" for column in COLUMNS))


def plot(points: list[dict[str, Any]], file: Path) -> None:
    """Draw the points as an SVG."""
    import matplotlib as mpl  # noqa: PLC0415 - only for this

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    mpl.rcParams |= {"svg.hashsalt": "foldflow", "svg.fonttype": "none", "font.size": 11}
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for (name, each), marker in zip(series(points).items(), "osD^v", strict=False):
        axes.plot([p["decisions"] for p in each], [p["takeover_s"] for p in each], marker=marker, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decisions in the log")
    axes.set_ylabel("seconds to take over all 8 partitions")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    measuring = kinds.add_parser("measure")
    measuring.add_argument("--sizes", default="10000,100000,1000000", help="decisions in the log, one after the other")
    measuring.add_argument("--active", type=int, default=1000)
    measuring.add_argument("--waiting", type=int, default=0)
    showing = kinds.add_parser("show")
    showing.add_argument("points", type=Path)
    showing.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.kind == "measure":
        for point in measure([int(size) for size in options.sizes.split(",")], options.active, options.waiting):
            print(json.dumps(point), flush=True)
        return
    points = [json.loads(line) for line in options.points.read_text().splitlines()]
    show(points)
    if options.plot:
        plot(points, options.plot)


if __name__ == "__main__":
    main()
