"""Measure runs that last: memory, takeover and finishing of many waiting runs, the precision of many timers, a very long run.

    python tests/bench/waiting.py signals [--runs 100000] [--idle 5]       one JSON line
    python tests/bench/waiting.py timers [--runs 1000000] [--soon 20000]   one JSON line
    python tests/bench/waiting.py loop [--steps 100000]                    one JSON line
    python tests/bench/waiting.py map [--steps 100000]                     one JSON line

`signals`: runs wait for a signal; the orchestrator is killed and takes over; then all are signalled and finish. `--idle 100000`
keeps them in memory: nothing is snapshotted. `timers`: runs sleep, some of them only so long that they wake while all the others
still sleep, and the orchestrator is killed meanwhile. `loop`, `map`: one run calls a tool so often, one after another or 100 at a
time; what a step costs at the beginning and at the end. Kafka and the orchestrator are real; inputs go straight to the inbox.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from cluster import free_port

from events import codec, topics
from events.commands import SignalReceived, StartRun
from events.decisions import Decision, RunCompleted, TimerSet
from events.ids import run_id
from events.results import InboxMessage, Input, TimerFired
from streams import kafka, registry
from streams.envelope import envelope
from streams.kafka import Acks
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec

SIGNALS = WorkflowSpec.model_validate(
    {"name": "bench-waits", "steps": {"order": {"transform": {"id": "=input.i"}}, "paid": {"wait_for": {"signal": "paid"}}}}
)
TIMERS = WorkflowSpec.model_validate({"name": "bench-sleeps", "steps": {"nap": {"sleep_until": "=input.until"}}})
CALL = {"tool": {"name": "echo", "arguments": {"value": "=index"}}}
FAR_MS = 86_400_000


class Orchestrator:
    """The orchestrator's process, to be killed and started again."""

    def __init__(self, settings: Settings, folder: str, environment: dict[str, str]) -> None:
        self.settings, self.folder, self.environment = settings, folder, environment
        self.starts = 0

    def start(self) -> float:
        """Start it and return the seconds until it has taken over all partitions."""
        self.starts += 1
        ready, log = Path(self.folder) / f"ready-{self.starts}", Path(self.folder) / f"orchestrator-{self.starts}.log"
        environment = self.environment | {"FOLDFLOW_READY_FILE": str(ready)}
        began = time.monotonic()
        with log.open("wb") as out:
            command = [sys.executable, "-m", "infra.cli.main", "worker", "orchestrator"]
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while not ready.exists():
            if self.process.poll() is not None:
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.02)
        return time.monotonic() - began

    def took_over(self) -> float:
        """Return the seconds that taking over took, of all partitions together."""
        log = (Path(self.folder) / f"orchestrator-{self.starts}.log").read_text()
        return round(sum(float(line.split("seconds")[1].split("=")[1].split()[0]) for line in _lines(log)), 2)

    def kill(self) -> None:
        """Kill it with -9."""
        self.process.kill()
        self.process.wait()

    def memory_mb(self) -> float:
        """Return its memory (PSS)."""
        return round(psutil.Process(self.process.pid).memory_full_info().pss / 1e6)


def _lines(log: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    return [line for line in plain.splitlines() if "orchestrator.took_over" in line]


@contextmanager
def cluster(idle_s: float) -> Iterator[tuple[Settings, Orchestrator]]:
    """Start Kafka and the orchestrator on free ports with fresh data, and stop them at the end."""
    with tempfile.TemporaryDirectory(prefix="foldflow-bench-") as folder:
        values: dict[str, Any] = {"bootstrap_servers": f"127.0.0.1:{free_port()}", "data_dir": folder, "topic_prefix": "bench."}
        values |= {"idle_after_s": idle_s, "session_timeout_ms": 6000}
        environment = dict(os.environ) | {f"FOLDFLOW_{key.upper()}": str(value) for key, value in values.items()}
        foldflow = [sys.executable, "-m", "infra.cli.main"]
        subprocess.run([*foldflow, "up", "--only", "kafka", "--detach"], env=environment, check=True, stdout=sys.stderr)
        settings = Settings(**values)
        kafka.connect(settings)
        registry.publish(settings, [SIGNALS, TIMERS])
        orchestrator = Orchestrator(settings, folder, environment)
        try:
            orchestrator.start()
            yield settings, orchestrator
        finally:
            orchestrator.kill()
            subprocess.run([*foldflow, "down"], env=environment, check=False, stdout=sys.stderr)


class Log:
    """What stands on a topic: how many records, and their decisions when asked for."""

    def __init__(self, settings: Settings, topic: topics.Topic) -> None:
        self.settings, self.name = settings, kafka.name(settings, topic)
        self.source = kafka.reader(settings)
        self.partitions = kafka.connect(settings).partitions[topic.name]

    def ends(self) -> list[int]:
        """Return the end of each partition."""
        return [kafka.watermarks(self.source, self.name, p)[1] for p in range(self.partitions)]

    def wait(self, count: int, patience_s: float) -> float:
        """Wait until there are so many records; return the seconds that took."""
        began = time.monotonic()
        while sum(self.ends()) < count:
            if time.monotonic() - began > patience_s:
                raise TimeoutError(f"{self.name}: {sum(self.ends()):,} of {count:,} records after {patience_s} s")
            time.sleep(0.25)
        return round(time.monotonic() - began, 1)

    def decisions(self, start: list[int]) -> Iterator[tuple[Decision, int]]:
        """Yield what stands from there on, with the time of the record."""
        for partition in range(self.partitions):
            for message in kafka.read_partition(self.source, self.name, partition, start[partition]):
                yield codec.decode(message.value(), Decision), message.timestamp()[1]


def send(settings: Settings, inputs: Iterator[tuple[str, Input]]) -> None:
    """Put inputs into the inboxes of runs."""
    producer, acks = kafka.producer(settings, **{"linger.ms": 20}), Acks()
    for count, (run, each) in enumerate(inputs):
        record = envelope(topics.INBOX, run, InboxMessage(run, each), source="bench", identity=f"{run}/{count}", run_id=run)
        kafka.produce(producer, settings, record, acks)
        if count % 10_000 == 0:
            producer.poll(0)
    kafka.flush(producer, acks)


def starts(spec: WorkflowSpec, inputs: Iterator[Any]) -> Iterator[tuple[str, Input]]:
    """Yield the beginnings of runs."""
    for number, value in enumerate(inputs):
        request_id = f"bench-{number}"
        yield run_id(request_id), StartRun(request_id, spec.name, spec.digest, json.dumps(value))


def signals(runs: int, idle_s: float) -> dict[str, Any]:
    """Measure runs that wait for a signal."""
    with cluster(idle_s) as (settings, orchestrator):
        decisions, finished, snapshots = (Log(settings, t) for t in (topics.DECISIONS, topics.FINISHED, topics.SNAPSHOTS))
        empty = orchestrator.memory_mb()
        began = time.monotonic()
        send(settings, starts(SIGNALS, ({"i": number} for number in range(runs))))
        decisions.wait(runs, 600)
        found: dict[str, Any] = {"runs": runs, "idle_after_s": idle_s, "started_s": round(time.monotonic() - began, 1)}
        kept = idle_s < 3600
        if kept:
            found["kept_after_s"] = snapshots.wait(runs, 600)
        time.sleep(2)
        found |= {"memory_empty_mb": empty, "memory_mb": orchestrator.memory_mb()}
        orchestrator.kill()
        found["restart_s"] = round(orchestrator.start(), 1)
        found["takeover_s"] = orchestrator.took_over()
        time.sleep(2)
        found["memory_after_takeover_mb"] = orchestrator.memory_mb()
        began = time.monotonic()
        ids = (run_id(f"bench-{number}") for number in range(runs))
        send(settings, ((run, SignalReceived(f"{run}/paid", "paid", None, '{"eur":5}', "bench")) for run in ids))
        finished.wait(runs, 900)
        found["all_finished_s"] = round(time.monotonic() - began, 1)
        ended = Counter(type(decision.effects[-1]).__name__ for decision, _ in decisions.decisions([0] * decisions.partitions))
        found["decisions"] = dict(ended)
        assert ended[RunCompleted.__name__] == runs, ended
        return found


def timers(runs: int, soon: int, spread_s: float) -> dict[str, Any]:
    """Measure timers: most of them far away, `soon` of them due within `spread_s` once all are set."""
    with cluster(5) as (settings, orchestrator):
        decisions = Log(settings, topics.DECISIONS)
        began = time.monotonic()
        now = time.time_ns() // 1_000_000
        send(settings, starts(TIMERS, ({"until": now + FAR_MS + number} for number in range(runs - soon))))
        decisions.wait(runs - soon, 3600)
        Log(settings, topics.SNAPSHOTS).wait(runs - soon, 1200)
        found: dict[str, Any] = {"timers": runs, "set_s": round(time.monotonic() - began, 1)}
        time.sleep(2)
        found["memory_mb"] = orchestrator.memory_mb()
        before = decisions.ends()
        first = time.time_ns() // 1_000_000 + round(soon / 500) * 1000 + 15_000
        step = spread_s * 1000 / soon
        request = ((number, {"until": round(first + number * step)}) for number in range(soon))
        pairs = ((f"soon-{number}", value) for number, value in request)
        inputs = ((run_id(r), StartRun(r, TIMERS.name, TIMERS.digest, json.dumps(value))) for r, value in pairs)
        send(settings, inputs)
        while time.time_ns() // 1_000_000 < first + spread_s * 400:
            time.sleep(0.1)
        killed = time.time_ns() // 1_000_000
        orchestrator.kill()
        found["restart_s"] = round(orchestrator.start(), 1)
        back = time.time_ns() // 1_000_000
        found["takeover_s"] = orchestrator.took_over()
        found["memory_after_takeover_mb"] = orchestrator.memory_mb()
        decisions.wait(sum(before) + 2 * soon, 600)
        time.sleep(3)
        due: dict[str, int] = {}
        late: list[int] = []
        fired = Counter[str]()
        early = 0
        for decision, _ in decisions.decisions(before):
            for effect in decision.effects:
                if isinstance(effect, TimerSet):
                    due[decision.run_id] = effect.due
            if isinstance(decision.input, TimerFired) and isinstance(decision.effects[-1], RunCompleted):
                fired[decision.run_id] += 1
                early += decision.at < due[decision.run_id]
                if not killed - 1000 < due[decision.run_id] < back + 5000:
                    late.append(decision.at - due[decision.run_id])
        cuts = statistics.quantiles(late, n=100)
        found |= {"soon": soon, "fired": len(fired), "fired_twice": sum(count > 1 for count in fired.values()), "early": early}
        found |= {"late_ms_p50": cuts[49], "late_ms_p99": cuts[98], "late_ms_max": max(late), "measured": len(late)}
        return found


def long(kind: str, steps: int) -> dict[str, Any]:
    """Measure one run of so many calls."""
    many = {"repeat": {"until": f"index == {steps - 1}", "at_most": steps}}
    if kind == "map":
        many = {"for_each": {"items": "=input.items", "concurrency": 100}}
    spec = WorkflowSpec.model_validate({"name": f"bench-{kind}", "steps": {"a": many | CALL}, "output": "=size(steps.a.status)"})
    with cluster(30) as (settings, orchestrator):
        registry.publish(settings, [spec])
        log = Path(orchestrator.folder) / "tool.log"
        with log.open("wb") as out:
            command = [sys.executable, "-m", "infra.cli.main", "worker", "tool"]
            worker = subprocess.Popen(command, env=orchestrator.environment, stdout=out, stderr=out)
        try:
            decisions = Log(settings, topics.DECISIONS)
            before = orchestrator.memory_mb()
            run, given = run_id("bench-long"), json.dumps({"items": list(range(steps))} if kind == "map" else {})
            send(settings, iter([(run, StartRun("bench-long", spec.name, spec.digest, given))]))
            decisions.wait(steps // 10, 600)
            early = orchestrator.memory_mb()
            Log(settings, topics.FINISHED).wait(1, 3600)
            late = orchestrator.memory_mb()
        finally:
            worker.kill()
            worker.wait()
        times = [decision.at for decision, _ in decisions.decisions([0] * decisions.partitions) if decision.run_id == run]
        tenth = len(times) // 10
        first = (times[2 * tenth] - times[tenth]) / tenth  # the first tenth is warming up
        last = (times[-1 - tenth // 10] - times[-1 - tenth - tenth // 10]) / tenth
        found = {"kind": kind, "steps": steps, "decisions": len(times), "took_s": round((times[-1] - times[0]) / 1000, 1)}
        found |= {"ms_a_step_early": round(first, 3), "ms_a_step_late": round(last, 3), "ratio": round(last / first, 3)}
        return found | {"memory_before_mb": before, "memory_at_a_tenth_mb": early, "memory_at_the_end_mb": late}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    waits = kinds.add_parser("signals")
    waits.add_argument("--runs", type=int, default=100_000)
    waits.add_argument("--idle", type=float, default=5)
    sleeps = kinds.add_parser("timers")
    sleeps.add_argument("--runs", type=int, default=1_000_000)
    sleeps.add_argument("--soon", type=int, default=20_000)
    sleeps.add_argument("--spread", type=float, default=100)
    for kind in ("loop", "map"):
        kinds.add_parser(kind).add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    if options.kind in ("loop", "map"):
        print(json.dumps(long(options.kind, options.steps)))
    elif options.kind == "signals":
        print(json.dumps(signals(options.runs, options.idle)))
    else:
        print(json.dumps(timers(options.runs, options.soon, options.spread)))


if __name__ == "__main__":
    main()
