"""What is measured: one function a figure, each yields lines for JSON. The table is at the end; bench.py runs it.

All but the first two share one cluster, so that what is measured late runs on a log that is not empty.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import footprint
from cluster import Client, Cluster, command, configured, ends, running, until
from rebuild import rebuilt
from workload import STEPS, fan_out, loop, six_steps

from events import codec, topics
from events.decisions import Decision
from events.ids import run_id
from streams import kafka, registry

Line = dict[str, Any]
SHORT: Final = 10
"""Steps of the runs that a long one is compared with."""
SLOW_MS: Final = 100
SLOWEST: Final = 10


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `loads`: how many runs with so many in flight."""

    loads: dict[int, int] = field(default_factory=lambda: {20: 1500, 200: 4000, 1000: 6000})
    warm_up: int = 50
    latency_runs: int = 500
    cold_starts: int = 3
    idle_s: float = 10.0
    items: int = 10_000
    at_once: int = 200
    long_steps: int = 10_000
    short_runs: int = 200
    scaling_rounds: int = 3
    scaling_runs: int = 3000


QUICK: Final = Sizes({20: 60, 200: 400}, 50, 50, 1, 1.0, 500, 200, 500, 20, 1, 300)
"""To see in less than a minute that everything works; its figures say nothing."""


@dataclass
class Bench:
    """The cluster that most figures share, started when the first of them asks for it. Close it."""

    sizes: Sizes
    stack: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def cluster(self) -> Cluster:
        """The processes."""
        cluster = self.stack.enter_context(running())
        registry.publish(cluster.settings, [six_steps()])
        return cluster

    @cached_property
    def client(self) -> Client:
        """Who asks, after some runs that nobody measures."""
        client = Client(self.cluster.settings)
        self.stack.callback(client.close)
        client.many(self.sizes.warm_up, min(self.sizes.warm_up, 200))
        return client

    def load(self, runs: int, inflight: int, also: dict[str, int] | None = None) -> Line:
        """Do so many runs, and say what that took. `also`: further processes that take part."""
        client, cluster = self.client, self.cluster
        pids, steps = cluster.pids | (also or {}), runs * len(STEPS)
        size, used, busy, own = cluster.log_bytes(), footprint.cpu_s(pids), footprint.machine_cpu_s(), time.process_time()
        took = client.many(runs, inflight)
        ended, own, busy = time.perf_counter(), time.process_time() - own, footprint.machine_cpu_s() - busy
        used = {name: now - used[name] for name, now in footprint.cpu_s(pids).items()}
        held, last = cluster.held(), client.seen()
        behind = sum(max(0, end - held.get(each, 0)) for each, end in last.items())
        if behind:
            until(lambda: _holds(cluster.held(), last), "the views to hold all decisions")
        caught_up_s = time.perf_counter() - ended  # with what asking takes: no less than it was
        return {
            "inflight": inflight,
            "runs": runs,
            "runs_per_s": round(runs / took, 1),
            "steps_per_s": round(steps / took),
            "views_behind_at_end": behind,
            "views_caught_up_s": round(caught_up_s, 2),
            "cpu_us_a_step": {name: round(1e6 * each / steps) for name, each in (used | {"client": own}).items()},
            "busy_cores": round(busy / took, 2),
            "foreign_cpu_cores": round((busy - own - sum(used.values())) / took, 2),
            "log_bytes_a_step": {
                topic: round((now - size.get(topic, 0)) / steps, 1)
                for topic, now in cluster.log_bytes().items()
                if now > size.get(topic, 0)
            },
            "memory_mb": footprint.memory_mb(pids),
        }


def _holds(held: dict[int, int], ends_: dict[int, int]) -> bool:
    return all(held.get(partition, 0) >= end for partition, end in ends_.items())


def cold_start(bench: Bench) -> Iterator[Line]:
    """Measure `foldflow up` of everything in an empty folder: until the first run is finished, and until the command returns."""
    first, up = [], []
    for _ in range(bench.sizes.cold_starts):
        with configured() as cluster:
            began = time.perf_counter()
            with command(cluster, "up", "--detach"):
                registry.publish(cluster.settings, [six_steps()])  # waits for Kafka
                client = Client(cluster.settings)
                client.one()
                first.append(round(time.perf_counter() - began, 2))
                client.close()
            up.append(round(time.perf_counter() - began, 2))
    yield {"first_run_s": statistics.median(first), "up_s": statistics.median(up), "each_first_run_s": first, "each_up_s": up}


def idle(bench: Bench) -> Iterator[Line]:
    """Measure memory and CPU of everything that `foldflow up` starts, when a few runs are over and nothing happens."""
    with running(only="") as cluster:
        registry.publish(cluster.settings, [six_steps()])
        client = Client(cluster.settings)
        client.many(bench.sizes.warm_up, bench.sizes.warm_up)
        client.close()
        time.sleep(bench.sizes.idle_s)
        pids = cluster.pids
        memory, used = footprint.memory_mb(pids), footprint.cpu_s(pids)
        time.sleep(bench.sizes.idle_s)
        cores = {name: round((now - used[name]) / bench.sizes.idle_s, 3) for name, now in footprint.cpu_s(pids).items()}
    ours = sum(mb for name, mb in memory.items() if name not in {"kafka", "model"})
    yield {"memory_mb": memory, "ours_mb": round(ours), "cpu_cores": cores}


def throughput(bench: Bench) -> Iterator[Line]:
    """Measure runs and steps a second with many in flight, what each process takes for them, and how far the views are behind."""
    for inflight, runs in bench.sizes.loads.items():
        yield bench.load(runs, inflight)


def latency(bench: Bench) -> Iterator[Line]:
    """Measure the milliseconds of a run from its request to its result, one run after the other."""
    client = bench.client
    client.took.clear()
    for _ in range(bench.sizes.latency_runs):
        client.many(1, 1)
    took = [1000 * each for each in client.took]
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    slow = [(round(each), number) for number, each in enumerate(took) if each > SLOW_MS]
    found = {"p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98], "max_ms": max(took)}
    slowest = {number: each for each, number in sorted(slow)[-SLOWEST:]}
    yield {
        "runs": len(took),
        **{name: round(each, 2) for name, each in found.items()},
        "above_100_ms": len(slow),
        "slowest_ms_by_number": slowest,
    }


def fanned_out(bench: Bench) -> Iterator[Line]:
    """Measure one run with a call for each of many items."""
    sizes, client = bench.sizes, bench.client
    spec = fan_out(sizes.at_once)
    registry.publish(bench.cluster.settings, [spec])
    took = client.one(spec.name, {"items": list(range(sizes.items))})
    yield {"items": sizes.items, "at_once": sizes.at_once, "seconds": round(took, 2), "items_per_s": round(sizes.items / took)}


def long_run(bench: Bench) -> Iterator[Line]:
    """Measure a step of one very long run against steps of runs of ten, before and after it: time, and CPU of who decides."""
    sizes, client, settings = bench.sizes, bench.client, bench.cluster.settings
    short, long = loop(SHORT), loop(sizes.long_steps)
    registry.publish(settings, [short, long])
    starts, decider = ends(settings, topics.DECISIONS), {"it": bench.cluster.pids["orchestrator"]}
    asked, cpu = [], []
    for spec, runs in ((short, sizes.short_runs // 2), (long, 1), (short, sizes.short_runs // 2)):
        before = footprint.cpu_s(decider)["it"]
        for _ in range(runs):
            client.one(spec.name)
            asked.append((run_id(f"bench-{client.number}"), spec is long))
        cpu.append(1e6 * (footprint.cpu_s(decider)["it"] - before) / runs / (SHORT if spec is short else sizes.long_steps))
    times = _times(bench, starts)
    spans = {is_long: [times[run] for run, which in asked if which is is_long] for is_long in (False, True)}
    # Without the first decision: what starts a run isn't a step. Of the long run the last tenth.
    ten = statistics.mean((each[-1] - each[1]) / (len(each) - 2) for each in spans[False])
    tail = spans[True][0][-sizes.long_steps // 10 :]
    last = (tail[-1] - tail[0]) / (len(tail) - 1)
    yield {
        "steps": sizes.long_steps,
        "ms_a_step_in_runs_of_10": round(ten, 3),
        "ms_a_step_at_the_end": round(last, 3),
        "ratio": round(last / ten, 3),
        "orchestrator_cpu_us_a_step_in_runs_of_10": round((cpu[0] + cpu[2]) / 2),
        "orchestrator_cpu_us_a_step": round(cpu[1]),
        "cpu_ratio": round(2 * cpu[1] / (cpu[0] + cpu[2]), 3),
    }


def _times(bench: Bench, starts: dict[int, int]) -> dict[str, list[int]]:
    """Return when the inputs of each run were on the inbox, in milliseconds, from these offsets of `decisions` on."""
    found: dict[str, list[int]] = {}
    settings = bench.cluster.settings
    with closing(kafka.reader(settings)) as source:
        for message in kafka.read_partitions(source, kafka.name(settings, topics.DECISIONS), starts):
            decision = codec.decode(message.value(), Decision)
            found.setdefault(decision.run_id, []).append(decision.at)
    return found


def scaling(bench: Bench) -> Iterator[Line]:
    """Measure the same load with one orchestrator and tool worker, and with two of each, in turn."""
    sizes = bench.sizes
    one, two = [], []
    for _ in range(sizes.scaling_rounds):
        one.append(bench.load(sizes.scaling_runs, 200))
        with bench.cluster.also("orchestrator", "tool") as more:
            bench.client.many(sizes.warm_up, sizes.warm_up)  # until the partitions are shared out
            two.append(bench.load(sizes.scaling_runs, 200, more))
        bench.client.many(sizes.warm_up, sizes.warm_up)
    rates = [statistics.median(each["runs_per_s"] for each in lines) for lines in (one, two)]
    yield {
        "runs_per_s_with_1": rates[0],
        "runs_per_s_with_2": rates[1],
        "ratio": round(rates[1] / rates[0], 2),
        "each_with_1": [each["runs_per_s"] for each in one],
        "each_with_2": [each["runs_per_s"] for each in two],
        "busy_cores_with_1": one[-1]["busy_cores"],
        "busy_cores_with_2": two[-1]["busy_cores"],
        "cores": len(os.sched_getaffinity(0)),
        "cpu_us_a_step_with_2": two[-1]["cpu_us_a_step"],
    }


def projection(bench: Bench) -> Iterator[Line]:
    """Measure how fast all views are made anew from the log that the other figures left."""
    bench.client.many(1, 1)
    settings = bench.cluster.settings
    decisions = sum(ends(settings, topics.DECISIONS).values())
    took = rebuilt(settings, settings.data_dir / "anew" / "views.duckdb")
    yield {
        "decisions": decisions,
        "decisions_per_s": round(decisions / took["seconds"]),
        "cpu_us_a_decision": round(1e6 * took["cpu_s"] / decisions, 1),
    }


def replay(bench: Bench) -> Iterator[Line]:
    """Measure how fast that log is verified: chains checked, each decision decided again and compared byte for byte."""
    bench.client.many(1, 1)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    line = [sys.executable, "-m", "infra.cli.main", "verify", "--all", "--json"]
    done = subprocess.run(line, env=bench.cluster.environment, check=True, stdout=subprocess.PIPE, start_new_session=True)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    yield {
        "decisions": found["decisions"],
        "whole": found["whole"],
        "decisions_per_s": round(found["decisions"] / took),
        "cpu_us_a_decision": round(1e6 * used / found["decisions"], 1),
    }


FIGURES: Final[dict[str, Callable[[Bench], Iterator[Line]]]] = {
    "cold_start": cold_start,
    "idle": idle,
    "latency": latency,
    "throughput": throughput,
    "fan_out": fanned_out,
    "long_run": long_run,
    "scaling": scaling,
    "projection": projection,
    "replay": replay,
}
"""In the order in which they are measured. A function's first line says what it measures."""
