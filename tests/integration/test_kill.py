"""Real processes on a real Kafka, killed in the middle of their work."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from events import codec, topics
from events.commands import WorkflowRequest
from events.decisions import Decision, RunCompleted, RunFailed
from events.ids import chain_hash, run_id
from events.results import InboxMessage, ToolCallCompleted
from streams import kafka, registry
from streams.envelope import Outgoing, envelope
from streams.processors.orchestrator import Orchestrator
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict
from streams.workflow.spec import WorkflowSpec

TOOLS = '''
import asyncio, os, pathlib


async def work(value: int, name: str) -> int:
    """Note the call in a file, outside of all our books, and add one."""
    with open(pathlib.Path(os.environ["CALLS_FILE"]), "a") as calls:
        calls.write(name + "\\n")
    await asyncio.sleep(0.02)
    return value + 1
'''

SPEC = WorkflowSpec.model_validate(
    {
        "name": "kill-test",
        "steps": {
            "one": {"tool": {"name": "work", "arguments": {"value": "=input.i", "name": "='one-' + string(input.i)"}}},
            "two": {
                "tool": {"name": "work", "arguments": {"value": "=steps.one.output", "name": "='two-' + string(input.i)"}},
                "needs": ["one"],
            },
            "beside": {
                "tool": {"name": "work", "arguments": {"value": "=steps.one.output", "name": "='beside-' + string(input.i)"}},
                "needs": ["one"],
            },
            "ask": {
                "llm": {"prompt": "Say yes.", "max_tokens": 3},
                "needs": ["two", "beside"],
                "when": "input.ask",
                "timeout": "60s",
            },
            "sum": {"transform": "=steps.two.output + steps.beside.output", "needs": ["ask", "two", "beside"]},
            "last": {
                "tool": {"name": "work", "arguments": {"value": "=steps.sum.output", "name": "='last-' + string(input.i)"}},
                "needs": ["sum"],
            },
        },
    }
)


class Processes:
    """Role processes of one installation; each can be killed and started again."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder = folder
        tools = folder / "kill_tools.py"
        tools.write_text(TOOLS)
        own = settings.model_copy(update={"tool_paths": (tools,)})
        values = own.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        self.environment |= {
            f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
        }
        self.environment["CALLS_FILE"] = str(folder / "calls")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.starts = 0

    def start(self, *roles: str) -> None:
        """Start roles and wait until they are ready."""
        ready = {role: self._spawn(role) for role in roles}
        until(lambda: all(path.exists() for path in ready.values()), 60, lambda: self.logs(roles))

    def _spawn(self, role: str) -> Path:
        self.starts += 1
        ready = self.folder / f"{role}-{self.starts}.ready"
        with (self.folder / f"{role}.log").open("ab") as log:
            self.running[role] = subprocess.Popen(
                [sys.executable, "-m", "infra.cli.main", "worker", role],
                env=self.environment | {"FOLDFLOW_READY_FILE": str(ready)},
                stdout=log,
                stderr=log,
            )
        return ready

    def kill(self, role: str) -> None:
        """Kill a role's process: it gets no chance to do anything more."""
        self.running[role].send_signal(signal.SIGKILL)
        self.running.pop(role).wait()

    def stop(self) -> None:
        """End all."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(40)

    def calls(self) -> Counter[str]:
        """Return how often each call was made."""
        path = self.folder / "calls"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    def logs(self, roles: tuple[str, ...]) -> str:
        """Return the ends of the roles' logs."""
        return "\n".join(f"--- {role}\n{(self.folder / f'{role}.log').read_text()[-3000:]}" for role in roles)


def until(condition: Callable[[], bool], patience_s: float, explain: Callable[[], str]) -> None:
    """Wait until a condition is true; fail with an explanation when it doesn't come true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


class Ledger:
    """What stands on the topics, read record by record."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.partitions = kafka.connect(settings).partitions[topics.DECISIONS.name]
        self.reader = kafka.reader(settings)
        self.read_to = dict.fromkeys(range(self.partitions), 0)
        self.records: dict[int, list[tuple[int, Decision, bytes]]] = defaultdict(list)
        self.ended: set[str] = set()

    def read_on(self) -> None:
        """Take what was appended since."""
        name = kafka.name(self.settings, topics.DECISIONS)
        for partition in range(self.partitions):
            for message in kafka.read_partition(self.reader, name, partition, self.read_to[partition]):
                decision = codec.decode(message.value(), Decision)
                self.records[partition].append((message.offset() or 0, decision, message.value() or b""))
                self.read_to[partition] = (message.offset() or 0) + 1
                if isinstance(decision.effects[-1], RunCompleted | RunFailed):
                    self.ended.add(decision.run_id)

    def has_ended(self, runs: set[str]) -> bool:
        """Say whether all these runs have ended."""
        self.read_on()
        return runs <= self.ended

    def answered(self) -> set[str]:
        """Return the calls whose results are on the inbox, as the tool names them."""
        numbers = {run_id(f"kill-{i}"): i for i in range(200)}
        name = kafka.name(self.settings, topics.INBOX)
        starts = dict.fromkeys(range(self.partitions), 0)
        inputs = [codec.decode(each.value(), InboxMessage) for each in kafka.read_partitions(self.reader, name, starts)]
        return {f"{each.input.step}-{numbers[each.run_id]}" for each in inputs if isinstance(each.input, ToolCallCompleted)}

    def check(self, runs: set[str]) -> Counter[str]:
        """Assert what must be true of every history; return how many records count and how many don't, and why."""
        self.read_on()
        verdicts: Counter[str] = Counter()
        accepted: dict[str, list[Decision]] = defaultdict(list)
        for partition, records in self.records.items():
            chain = Chain()
            values: dict[tuple[str, int, bytes], bytes] = {}
            for offset, decision, value in records:
                verdict = chain.judge(offset, decision, chain_hash(codec.unframed(value)))
                verdicts[verdict.value] += 1
                if verdict is Verdict.ACCEPTED:
                    accepted[decision.run_id].append(decision)
                # Whoever decided on the same state and input wrote the same bytes.
                same = values.setdefault((decision.run_id, decision.input_offset, decision.prev), value)
                assert same == value, f"two decisions on one input differ: partition {partition}, offset {offset}"
                verdicts["written_twice"] += same is not value
            assert not chain.broken
        assert set(accepted) == runs
        for history in accepted.values():
            assert [decision.seq for decision in history] == list(range(1, len(history) + 1))
            inputs = [decision.input_offset for decision in history]
            assert len(set(inputs)) == len(inputs), "an input was decided twice"
            assert isinstance(history[-1].effects[-1], RunCompleted), history[-1].effects
        return verdicts


def requests(runs: int, asking: int) -> list[Outgoing]:
    """Return requests, the first `asking` of which ask the model too."""
    records = []
    for i in range(runs):
        request = WorkflowRequest(SPEC.name, json.dumps({"i": i, "ask": i < asking}), f"kill-{i}")
        records.append(envelope(topics.REQUESTS, f"kill-{i}", request, source="test", identity=f"kill-{i}"))
    return records


@pytest.fixture
def processes(settings: Settings, model: str, tmp_path: Path) -> Iterator[Processes]:
    """Roles to be started, with the real model behind the LLM worker."""
    assert model == settings.local_model_url
    found = Processes(settings, tmp_path)
    yield found
    found.stop()


def test_every_run_finishes_though_each_process_is_killed(settings: Settings, processes: Processes) -> None:
    """Kill -9 of the orchestrator, then of each worker and intake, during 200 runs: all finish, nothing is decided twice."""
    kafka.connect(settings)
    registry.publish(settings, [SPEC])
    processes.start("intake", "orchestrator", "tool", "llm")
    ledger = Ledger(settings)
    runs = {run_id(f"kill-{i}") for i in range(200)}
    kafka.send(settings, requests(200, asking=20))
    in_flight = 0
    for role, some in (("orchestrator", 20), ("tool", 60), ("llm", 90), ("intake", 100), ("orchestrator", 140)):
        until(
            lambda some=some: ledger.has_ended(set()) or len(ledger.ended) >= some, 120, lambda: processes.logs(("orchestrator",))
        )
        processes.kill(role)
        if role == "tool":
            in_flight += len(processes.calls().keys() - ledger.answered())
        processes.start(role)
    until(lambda: ledger.has_ended(runs), 180, lambda: processes.logs(("orchestrator", "tool", "llm", "intake")))
    verdicts = ledger.check(runs)
    calls = processes.calls()
    repeated = sum(calls.values()) - len(calls)
    assert len(calls) == 200 * 4, "each step's tool was called"
    assert repeated <= in_flight, "a kill repeats at most what was in flight: begun, and its result not on the inbox"
    print(f"200 runs, {dict(verdicts)}, in flight at kills: {in_flight}, repeated: {repeated}")  # noqa: T201


def test_two_owners_of_every_partition_write_one_history(settings: Settings, processes: Processes) -> None:
    """Two orchestrators that both own everything write every decision twice, with the same bytes, and every run ends once."""
    kafka.connect(settings)
    registry.publish(settings, [SPEC])
    processes.start("intake", "tool")
    stop = threading.Event()
    owners = [Orchestrator(settings), Orchestrator(settings, group="another-group")]
    threads = [threading.Thread(target=owner.run, args=(stop,)) for owner in owners]
    for thread in threads:
        thread.start()
    try:
        until(lambda: all(owner.ready.is_set() for owner in owners), 60, lambda: "not ready")
        ledger = Ledger(settings)
        runs = {run_id(f"kill-{i}") for i in range(100)}
        kafka.send(settings, requests(100, asking=0))
        until(lambda: ledger.has_ended(runs), 120, lambda: processes.logs(("intake", "tool")))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    verdicts = ledger.check(runs)
    assert verdicts["written_twice"] > 100, "both wrote"
    print(f"100 runs, two owners: {dict(verdicts)}")  # noqa: T201
