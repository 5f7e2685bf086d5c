"""Measure the whole thing: requests in, decisions out, every process real. `make bench` runs it; one JSON line is the result.

    python tests/bench/bench.py [--runs 1000] [--inflight 200] [--latency-runs 100] [--warm-up 50]

It starts Kafka, intake, one orchestrator and one tool worker on free ports with fresh data, and stops them at the end.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from workload import STEPS, six_steps

from events import codec, topics
from events.commands import WorkflowRequest
from events.decisions import Decision, RunCompleted, RunFailed
from events.ids import run_id
from streams import kafka, registry
from streams.envelope import Outgoing, envelope
from streams.kafka import Acks, TopicPartition
from streams.settings import Settings

PROCESSES = "kafka,intake,orchestrator,tool"


def free_port() -> int:
    """Return a loopback port that nobody listens on, below those that the system gives to connections going out."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 - two benches at once must not choose alike
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def cluster() -> Iterator[tuple[Settings, list[dict[str, Any]], float]]:
    """Start the processes; yield their settings, `foldflow status`, and the seconds that the start took."""
    with tempfile.TemporaryDirectory(prefix="foldflow-bench-") as folder:
        values = {"bootstrap_servers": f"127.0.0.1:{free_port()}", "data_dir": folder, "topic_prefix": "bench."}
        environment = os.environ | {f"FOLDFLOW_{key.upper()}": value for key, value in values.items()}
        foldflow = [sys.executable, "-m", "infra.cli.main"]
        began = time.monotonic()
        try:
            subprocess.run([*foldflow, "up", "--only", PROCESSES, "--detach"], env=environment, check=True, stdout=sys.stderr)
            took = time.monotonic() - began
            status = json.loads(subprocess.check_output([*foldflow, "status", "--json"], env=environment, text=True))
            yield Settings(**values), status, took
        finally:
            subprocess.run([*foldflow, "down"], env=environment, check=False, stdout=sys.stderr)


class Client:
    """Sends requests and sees runs end, as any user of the topics could."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.producer = kafka.producer(settings)
        self.acks = Acks()
        self.source = kafka.reader(settings)
        name = kafka.name(settings, topics.DECISIONS)
        partitions = kafka.connect(settings).partitions[topics.DECISIONS.name]
        # The ends as of now: OFFSET_END would be looked up at the first poll, after the first requests.
        ends = [kafka.watermarks(self.source, name, p)[1] for p in range(partitions)]
        self.source.assign([TopicPartition(name, p, end) for p, end in enumerate(ends)])
        self.open: dict[str, float] = {}
        self.took: list[float] = []
        self.number = 0

    def ask(self) -> None:
        """Produce a request."""
        self.number += 1
        request_id = f"bench-{self.number}"
        request = WorkflowRequest("bench-six-steps", json.dumps({"i": self.number}), request_id)
        record: Outgoing = envelope(topics.REQUESTS, request_id, request, source="bench", identity=request_id)
        self.open[run_id(request_id)] = time.perf_counter()
        kafka.produce(self.producer, self.settings, record, self.acks)

    def see(self, timeout_s: float = 0.1) -> int:
        """Take what came, and return how many runs ended."""
        ended = 0
        for message in kafka.poll(self.source, timeout_s):
            if b"Run" not in (dict(message.headers() or ()).get("foldflow_effects") or b""):
                continue
            decision = codec.decode(message.value(), Decision)
            last = decision.effects[-1]
            if isinstance(last, RunFailed):
                raise RuntimeError(f"run {decision.run_id} failed: {last.failure}")  # noqa: TRY004 - of the run, not of a type
            if isinstance(last, RunCompleted) and decision.run_id in self.open:
                self.took.append(time.perf_counter() - self.open.pop(decision.run_id))
                ended += 1
        self.producer.poll(0)
        return ended

    def many(self, runs: int, inflight: int, patience_s: float = 120) -> float:
        """Do `runs` runs with at most `inflight` at once; return the seconds that took."""
        began, asked, ended = time.perf_counter(), 0, 0
        deadline = time.monotonic() + patience_s
        while ended < runs:
            while asked < runs and len(self.open) < inflight:
                self.ask()
                asked += 1
            ended += self.see()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{ended} of {runs} runs ended within {patience_s} s")
        return time.perf_counter() - began


def memory(status: list[dict[str, Any]]) -> dict[str, float]:
    """Return the resident memory of each process with its children in MB (PSS: shared pages count once)."""
    found = {}
    for service in status:
        process = psutil.Process(service["pid"])
        family = [process, *process.children(recursive=True)]
        found[service["name"]] = round(sum(each.memory_full_info().pss for each in family) / 1e6)
    return found


def cpu(status: list[dict[str, Any]]) -> dict[str, float]:
    """Return the CPU seconds that each process has used."""
    times = {service["name"]: psutil.Process(service["pid"]).cpu_times() for service in status}
    return {name: each.user + each.system for name, each in times.items()}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--runs", 1000), ("--inflight", 200), ("--latency-runs", 100), ("--warm-up", 50)):
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    with cluster() as (settings, status, start_s):
        registry.publish(settings, [six_steps()])
        client = Client(settings)
        client.many(options.warm_up, options.inflight)
        before = cpu(status)
        many_s = client.many(options.runs, options.inflight)
        after = cpu(status)
        client.took.clear()
        for _ in range(options.latency_runs):
            client.many(1, 1)
        single = statistics.quantiles([1000 * each for each in client.took], n=100, method="inclusive")
        print(
            json.dumps(
                {
                    "runs": options.runs,
                    "inflight": options.inflight,
                    "runs_per_s": round(options.runs / many_s, 1),
                    "steps_per_s": round(options.runs * len(STEPS) / many_s),
                    "p50_ms": round(single[49], 2),
                    "p95_ms": round(single[94], 2),
                    "p99_ms": round(single[98], 2),
                    "start_s": round(start_s, 2),
                    "memory_mb": memory(status),
                    "cpu_us_per_step": {
                        name: round(1e6 * (after[name] - before[name]) / options.runs / len(STEPS)) for name in after
                    },
                }
            )
        )


if __name__ == "__main__":
    main()
