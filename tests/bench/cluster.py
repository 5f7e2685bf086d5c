"""Real processes to measure, and a client that gives them work and sees it done.

`cluster` starts them as `foldflow up` does, on free ports and fresh data, and stops every one of them at the end, also when the
measurement is interrupted. `Client` asks for runs and sees them end, as any user of the topics could.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from ports import free_port
from workload import SIX_STEPS, STEPS

from events import codec, topics
from events.commands import WorkflowRequest
from events.decisions import Decision, RunCompleted, RunFailed
from events.ids import run_id
from infra.embedded.processes import read_state
from infra.embedded.services import run_folder
from streams import kafka
from streams.envelope import envelope
from streams.kafka import Acks, TopicPartition
from streams.settings import Settings

LOADED: Final = "kafka,intake,orchestrator,tool,api"
"""What takes part in the runs that are measured, and the projection beside them."""
_READY_S: Final = 60


def interruptible() -> None:
    """End by SIGTERM as by Ctrl-C, also where a shell has started this with `&`: what was started is stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def lines_alone() -> TextIO:
    """Return stdout for the lines that are measured, and send to stderr whatever else this process and its children print."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


@dataclass(frozen=True)
class Cluster:
    """Processes that run: their settings, the environment that gives a process these very settings, and pids by name."""

    settings: Settings
    environment: dict[str, str]

    @property
    def pids(self) -> dict[str, int]:
        """The processes, and the keeper that would start them again."""
        state = read_state(run_folder(self.settings) / "state.json")
        keeper = {"keeper": state.supervisor[0]} if state.supervisor else {}
        return {each.name: each.pid for each in state.started} | keeper

    @contextmanager
    def also(self, *roles: str) -> Iterator[dict[str, int]]:
        """Run one more process of each of these roles; yield their pids once they are ready."""
        processes: dict[str, subprocess.Popen[bytes]] = {}
        with tempfile.TemporaryDirectory(prefix="foldflow-bench-") as folder:
            try:
                for role in roles:
                    ready = Path(folder) / role
                    environment = self.environment | {"FOLDFLOW_READY_FILE": str(ready)}
                    with Path(folder, f"{role}.log").open("wb") as out:
                        command = [sys.executable, "-m", "infra.cli.main", "worker", role]
                        processes[role] = subprocess.Popen(
                            command, env=environment, stdout=out, stderr=out, start_new_session=True
                        )
                for role in roles:
                    until(Path(folder, role).exists, f"a second {role} to be ready")
                yield {f"{role}-2": process.pid for role, process in processes.items()}
            finally:
                for process in processes.values():
                    process.terminate()
                for process in processes.values():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(40)
                    process.kill()
                    process.wait()

    def held(self) -> dict[int, int]:
        """Return up to which offset the views hold each partition of `decisions`."""
        health = httpx.get(f"http://127.0.0.1:{self.settings.api_port}/health", timeout=30).json()
        return {each["partition"]: each["position"] for each in health["partitions"] if each["topic"] == topics.DECISIONS.name}

    def log_bytes(self) -> dict[str, int]:
        """Return how many bytes each topic takes in the broker's log, Kafka's own topics among them."""
        found: dict[str, int] = {}
        for segment in self.settings.data_dir.glob("kafka/data/*/*.log"):
            topic = segment.parent.name.rpartition("-")[0].removeprefix(self.settings.topic_prefix)
            found[topic] = found.get(topic, 0) + segment.stat().st_size
        return found


def ends(settings: Settings, topic: topics.Topic) -> dict[int, int]:
    """Return the end of each partition."""
    count = kafka.connect(settings).partitions[topic.name]
    with closing(kafka.reader(settings)) as source:
        return {each: kafka.watermarks(source, kafka.name(settings, topic), each)[1] for each in range(count)}


def until(condition: Callable[[], bool], what: str, patience_s: float = _READY_S) -> float:
    """Wait for a condition, looking every 20 ms; return the seconds that took. Raises TimeoutError."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > patience_s:
            raise TimeoutError(f"waited {patience_s:.0f} s for {what}")
        time.sleep(0.02)
    return time.perf_counter() - began


@contextmanager
def configured(**more: Any) -> Iterator[Cluster]:
    """Yield a cluster that isn't started, on free ports and an empty data folder, and stop at the end whatever was started."""
    folder = Path(tempfile.mkdtemp(prefix="foldflow-bench-"))
    values: dict[str, Any] = {
        "bootstrap_servers": f"127.0.0.1:{free_port()}",
        "local_model_url": f"http://127.0.0.1:{free_port()}",
        "api_port": free_port(),
        "data_dir": folder,
        "topic_prefix": "bench.",
        **more,
    }
    cluster = Cluster(Settings(**values), os.environ | {f"FOLDFLOW_{key.upper()}": str(value) for key, value in values.items()})
    try:
        yield cluster
    finally:
        foldflow(cluster, "down")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def command(cluster: Cluster, *arguments: str) -> Iterator[None]:
    """Run a command meanwhile, and wait for its end, also when this is interrupted: half of an `up` would leave processes.

    Raises CalledProcessError when it fails.
    """
    line = [sys.executable, "-m", "infra.cli.main", *arguments]
    # In a session of its own: the terminal's Ctrl-C reaches it from here, once.
    process = subprocess.Popen(line, env=cluster.environment, stdout=sys.stderr, start_new_session=True)
    try:
        yield
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, line)


def foldflow(cluster: Cluster, *arguments: str) -> None:
    """Run a command to its end. Raises CalledProcessError when it fails."""
    with command(cluster, *arguments):
        pass


@contextmanager
def running(only: str = LOADED, **more: Any) -> Iterator[Cluster]:
    """Yield a cluster whose processes are ready. `only`: their names, by commas; all of them if empty."""
    with configured(**more) as cluster:
        foldflow(cluster, "up", "--detach", *(("--only", only) if only else ()))
        yield cluster


class Client:
    """Sends requests and sees runs end. `took`: the seconds that each took, in the order of their ends."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.producer = kafka.producer(settings)
        self.acks = Acks()
        self.source = kafka.reader(settings)
        name = kafka.name(settings, topics.DECISIONS)
        # The ends as of now: OFFSET_END would be looked up at the first poll, after the first requests.
        self.places = [TopicPartition(name, p, end) for p, end in ends(settings, topics.DECISIONS).items()]
        self.source.assign(self.places)
        self.open: dict[str, tuple[int, float]] = {}
        self.took: list[float] = []
        self.number = 0

    def seen(self) -> dict[int, int]:
        """Return up to which offset each partition of `decisions` was seen: when all runs are over, that is its end."""
        now = {each.partition: each.offset for each in self.source.position(self.places)}
        return {each.partition: max(each.offset, now[each.partition]) for each in self.places}

    def close(self) -> None:
        """Leave Kafka."""
        self.source.close()

    def ask(self, workflow: str = SIX_STEPS, given: Any = None) -> None:
        """Produce a request. `given`: the run's input; by default its number."""
        self.number += 1
        request_id = f"bench-{self.number}"
        request = WorkflowRequest(workflow, json.dumps({"i": self.number} if given is None else given), request_id)
        record = envelope(topics.REQUESTS, request_id, request, source="bench", identity=request_id)
        self.open[run_id(request_id)] = self.number, time.perf_counter()
        kafka.produce(self.producer, self.settings, record, self.acks)

    def see(self, timeout_s: float = 0.1) -> int:
        """Take what came, and return how many runs ended. Raises RuntimeError for one that failed or gave something else."""
        ended = 0
        for message in kafka.poll(self.source, timeout_s):
            if b"Run" not in (dict(message.headers() or ()).get("foldflow_effects") or b""):
                continue
            decision = codec.decode(message.value(), Decision)
            if decision.run_id not in self.open:
                continue
            last = decision.effects[-1]
            if isinstance(last, RunFailed):
                raise RuntimeError(f"run {decision.run_id} failed: {last.failure}")  # noqa: TRY004 - of the run, not of a type
            if isinstance(last, RunCompleted):
                number, since = self.open.pop(decision.run_id)
                self._check(number, last.output)
                self.took.append(time.perf_counter() - since)
                ended += 1
        self.producer.poll(0)
        return ended

    def _check(self, number: int, output: str) -> None:
        given = json.loads(output)
        if isinstance(given, dict) and (given["i"], given["step"]) != (number, STEPS[-1]):
            raise RuntimeError(f"run {number} gave {output}")

    def many(self, runs: int, inflight: int, patience_s: float = 300) -> float:
        """Do `runs` runs with at most `inflight` at once; return the seconds that took."""
        began, asked, ended = time.perf_counter(), 0, 0
        while ended < runs:
            while asked < runs and len(self.open) < inflight:
                self.ask()
                asked += 1
            ended += self.see()
            if time.perf_counter() - began > patience_s:
                raise TimeoutError(f"{ended} of {runs} runs ended within {patience_s} s")
        return time.perf_counter() - began

    def one(self, workflow: str = SIX_STEPS, given: Any = None, patience_s: float = 600) -> float:
        """Do one run; return the seconds that took."""
        began = time.perf_counter()
        self.ask(workflow, given)
        while not self.see():
            if time.perf_counter() - began > patience_s:
                raise TimeoutError(f"a run of {workflow} did not end within {patience_s} s")
        return time.perf_counter() - began
