"""What each stage of a step costs: decode, fold, decide, encode, hash, produce … in microseconds of CPU, for each role.

    python tests/bench/stages.py [--runs 2000] [--in-memory] [--json]

The stages are the real functions where they stand, on events of real runs that go their way in memory (way.py), in one thread.
Then real processes do the same work with a real Kafka, and what their CPU has beyond the stages is shown by thread, if not
`--in-memory`.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
import footprint
import way
from cluster import Client, Cluster, interruptible, running
from parts import PARTS, SETTLE_AT, Part, forget, watched
from workload import STEPS, six_steps

from events import topics
from streams import kafka, registry
from streams.envelope import Outgoing
from streams.kafka import Acks

ROUNDS: Final = 7
"""What others do on the machine costs CPU time as well (caches, a core's other half): the median of so many counts."""


def cpu_us(work: Callable[[], Any]) -> float:
    """Return the CPU microseconds of this thread that something takes."""
    began = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - began) / 1000


def cost(work: Callable[[], Any]) -> float:
    """Return the CPU microseconds of something, garbage collected apart, and with nothing remembered of the records."""
    forget()
    gc.collect()
    gc.disable()
    try:
        return cpu_us(work)
    finally:
        gc.enable()


class Timer:
    """Notes the nanoseconds of each call, by stage. Two readings of the clock cost 0.15 µs."""

    def __init__(self) -> None:
        self.took: dict[str, list[int]] = {}

    def __call__(self, stage: str, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Make a call."""
        began = time.perf_counter_ns()
        try:
            return function(*arguments, **named)
        finally:
            self.took.setdefault(stage, []).append(time.perf_counter_ns() - began)


def in_memory(part: Part, log: way.Log) -> tuple[float, dict[str, tuple[int, float]]]:
    """Return the microseconds of the whole part, and of each stage the number of its calls and their microseconds."""
    wholes, rounds, found = [], [], {}
    for _ in range(ROUNDS):
        wholes.append(cost(part.whole(log)))
        rounds.append(Timer())
        with watched(part.stages, rounds[-1]):
            cost(part.whole(log))
    for stage in part.stages:
        # The same calls each time: of each the median, so that one that was interrupted doesn't count.
        each = [statistics.median(took) for took in zip(*(timer.took.get(stage, []) for timer in rounds), strict=True)]
        found[stage] = len(each), sum(each) / 1000
    return statistics.median(wholes), found


def settled(log: way.Log) -> float:
    """Return the microseconds of settling all inputs."""
    found = []
    for _ in range(ROUNDS):
        owner, took = way.tenure(), 0.0
        forget()
        for number, each in enumerate(log.inbox, 1):
            owner.take(each)
            if number % SETTLE_AT == 0 or number == len(log.inbox):
                took += cpu_us(lambda owner=owner: way.settle(owner))
        found.append(took)
    return statistics.median(found)


# --- Stages around it: what touches librdkafka, in this thread; its own threads are in the process's CPU only ---


def read(cluster: Cluster, topic: topics.Topic) -> tuple[int, float, float]:
    """Read a whole topic: return the number of records, and the microseconds of taking them and of making them ours."""
    settings, took, messages = cluster.settings, 0.0, []
    name, partitions = kafka.name(settings, topic), kafka.connect(settings).partitions[topic.name]
    with closing(kafka.reader(settings)) as source:
        total = sum(kafka.watermarks(source, name, each)[1] for each in range(partitions))
        source.assign([kafka.TopicPartition(name, each, 0) for each in range(partitions)])
        while len(messages) < total:
            began = time.thread_time_ns()
            messages += kafka.poll(source, 0.2)
            took += (time.thread_time_ns() - began) / 1000
    return total, took, cpu_us(lambda: [kafka.incoming(each) for each in messages])


def written(cluster: Cluster, records: list[Outgoing]) -> tuple[float, float]:
    """Produce records to topics of their own: return the microseconds of queueing them and of their acknowledgements."""
    settings = cluster.settings.model_copy(update={"topic_prefix": "stages."})
    kafka.connect(settings)
    target, queued, acknowledged = kafka.producer(settings), 0.0, 0.0
    for at in range(0, len(records), 1000):
        acks, part = Acks(), records[at : at + 1000]
        queued += cpu_us(lambda part=part, acks=acks: [kafka.produce(target, settings, each, acks) for each in part])
        acknowledged += cpu_us(lambda acks=acks: kafka.flush(target, acks))
    return queued, acknowledged


def processes(cluster: Cluster, runs: int) -> dict[str, dict[str, float]]:
    """Let the real processes do so many runs; return the CPU microseconds a step of each of their threads, and `all`."""
    registry.publish(cluster.settings, [six_steps()])
    client = Client(cluster.settings)
    client.many(100, 100)
    pids = cluster.pids
    before, threads = footprint.cpu_s(pids), {name: footprint.threads_s(pid) for name, pid in pids.items()}
    took = client.many(runs, 200)
    after = footprint.cpu_s(pids)
    steps = runs * len(STEPS)
    print(f"{runs / took:.0f} runs/s", file=sys.stderr)
    found = {}
    for name, pid in pids.items():
        now = footprint.threads_s(pid)
        found[name] = {each: 1e6 * (now[each] - threads[name].get(each, 0)) / steps for each in now}
        found[name]["all"] = 1e6 * (after[name] - before[name]) / steps
    client.close()
    return found


# --- The table ---


@dataclass(frozen=True)
class Row:
    """A line of the table: how often a step, microseconds each time and a step. `calls` None: it isn't counted."""

    role: str
    stage: str
    calls: float | None
    us_a_step: float

    def line(self) -> str:
        """Return it for people."""
        often = "" if not self.calls else f"{self.calls:8.2f} {self.us_a_step / self.calls:10.1f}"
        return f"  {self.stage:<44} {often:<19} {self.us_a_step:10.1f}"


def rows(role: str, part: Part, log: way.Log, cluster: Cluster | None, cpu: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Yield the lines of a role."""
    steps = len(log.calls)
    whole, stages = in_memory(part, log)
    known, count = whole, len(getattr(log, part.reads))

    def row(stage: str, calls: float | None, took: float) -> Row:
        return Row(role, stage, None if calls is None else calls / steps, took / steps)

    for stage, (calls, took) in stages.items():
        yield row(stage, calls, took)
    rest = whole - sum(took for _, took in stages.values())
    if role == "orchestrator":
        took = settled(log)
        rest -= took
        yield row("settle (without Kafka)", count, took)
    yield row(part.rest, count, rest)
    if cluster is None:
        yield row("all of that", None, known)
        return
    total, taking, making = read(cluster, part.source)
    scale = count / total  # what was read are the records of the real runs
    mine = [each for each in log.written if dict(each.headers).get("ce_source") == part.ce_source]
    queued, acknowledged = written(cluster, mine)
    for stage, calls, took in (
        ("poll", count, taking * scale),
        ("make it ours (headers, key, value)", count, making * scale),
        ("produce", len(mine), queued),
        ("acknowledgements", len(mine), acknowledged),
    ):
        known += took
        yield row(stage, calls, took)
    yield row("all of that", None, known)
    threads = dict(cpu[role])
    everything = threads.pop("all")
    python = sum(took for name, took in threads.items() if not name.startswith("rdk:"))
    yield Row(role, "Python's threads beyond that", None, python - known / steps)
    for name, took in sorted(threads.items()):
        if name.startswith("rdk:"):
            yield Row(role, f"librdkafka's threads {name}", None, took)
    yield Row(role, "the process, all in all", None, everything)


def main() -> None:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="runs of the real processes; a tenth of them in memory")
    parser.add_argument("--in-memory", action="store_true", help="only what needs no Kafka (half a minute)")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each row")
    options = parser.parse_args()
    interruptible()
    log = way.walk(options.runs // 10)
    if options.in_memory:
        show(log, None, {}, as_json=options.json)
        return
    with running() as cluster:
        show(log, cluster, processes(cluster, options.runs), as_json=options.json)


def show(log: way.Log, cluster: Cluster | None, cpu: dict[str, dict[str, float]], *, as_json: bool) -> None:
    """Measure and print."""
    for role, part in PARTS.items():
        if not as_json:
            print(f"\n{role:<46} {'a step':>8} {'µs each':>10} {'µs a step':>10}")
        for each in rows(role, part, log, cluster, cpu):
            print(json.dumps(vars(each)) if as_json else each.line(), flush=True)
    for name in sorted(cpu.keys() - PARTS.keys()):
        each = Row(name, "the process, all in all", None, cpu[name]["all"])
        print(json.dumps(vars(each)) if as_json else f"\n{name}\n{each.line()}")


if __name__ == "__main__":
    main()
