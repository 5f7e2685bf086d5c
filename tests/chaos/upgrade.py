"""Two versions of the code on one installation: processes of an older one beside a newer one's, and a load that both understand.

Code that isn't today's lies in a folder of its own and runs in today's virtual environment; its folder goes first on the path,
and each process says where its modules came from. Older code is taken out of git; the next version is today's with a field more
in what stands on the queues.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from confluent_kafka import KafkaError, Message, Producer

from events import codec, topics
from events.catalog import ENTRIES
from events.commands import StartRun
from events.decisions import DeadLetter, Decision, RunCompleted
from events.errors import NotDecodableError
from events.ids import chain_hash, run_id
from streams import kafka
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("events", "streams", "tools", "projections", "api", "infra")
NEWER: Final = 78
START_S: Final = 180.0
END_S: Final = 45.0
"""How long a process may take to start, and to end in order; it has 30 s for what it holds, see `streams/app.py`."""

WORKFLOWS: Final = (
    """
name: roll
steps:
  one: {tool: {name: work, arguments: {value: "=input.i"}}}
  two: {needs: [one], tool: {name: work, arguments: {value: "=steps.one.output"}}}
  beside: {needs: [one], tool: {name: work, arguments: {value: "=steps.one.output"}}}
  sum: {needs: [two, beside], transform: "=steps.two.output + steps.beside.output"}
  last: {needs: [sum], tool: {name: work, arguments: {value: "=steps.sum.output"}}}
output: "=steps.last.output"
""",
)
"""What every released version understands."""

WITH_CHILDREN: Final = (
    """
name: part
steps:
  two: {tool: {name: work, arguments: {value: "=input.i"}}}
output: "=steps.two.output"
""",
    """
name: roll
steps:
  one: {tool: {name: work, arguments: {value: "=input.i"}}}
  two: {needs: [one], run: {workflow: part, input: {i: "=steps.one.output"}}}
  beside: {needs: [one], tool: {name: work, arguments: {value: "=steps.one.output"}}}
  sum: {needs: [two, beside], transform: "=steps.two.output + steps.beside.output"}
  last: {needs: [sum], tool: {name: work, arguments: {value: "=steps.sum.output"}}}
output: "=steps.last.output"
""",
)
"""The same, but that a run asks for another one: so orchestrators write every topic that others read."""

CHANGED: Final = {
    "WorkflowRequest": ("commands.py", "    copied: str | None = None\n\n\n@dataclass(frozen=True, slots=True)\nclass StartRun:"),
    "InboxMessage": ("results.py", "    said: RequestPlace | None = None\n"),
    "ToolCall": ("calls.py", "    request: ToolCallRequested\n"),
}
"""The records that the next version changes, and where its field goes: before the first empty line, or at the end of this."""

TOOLS: Final = '''
import asyncio, json, os, time

from tools.context import ToolContext


async def work(value: int, context: ToolContext) -> int:
    """Note the call in a file, outside of all our books, and add one."""
    call = {"call_id": context.call_id, "run_id": context.run_id, "step": context.step, "attempt": context.attempt}
    with open(os.environ["WITNESS"], "a") as witness:
        witness.write(json.dumps({"at_ms": time.time_ns() // 1_000_000, **call, "tool": "work"}) + "\\n")
    await asyncio.sleep(0.1)
    return value + 1
'''


def output(number: int) -> int:
    """Return what a run of the workflow says in the end."""
    return 2 * (number + 2) + 1


class NoHistoryError(Exception):
    """There is no git history here, or it doesn't reach back to the commit."""


def code_of(commit: str, folder: Path) -> Path:
    """Return a folder with the packages of a commit. Raises NoHistoryError."""
    made = folder / f"code-{commit.replace('~', '-')}"
    made.mkdir()
    with subprocess.Popen(["git", "archive", commit, *PACKAGES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as git:
        done = subprocess.run(["tar", "x", "-C", made], stdin=git.stdout, check=False, capture_output=True)
        problem = git.communicate()[1].decode()
    if git.returncode or done.returncode:
        raise NoHistoryError(f"git archive {commit}: {problem.strip() or done.stderr.decode().strip()}")
    return made


def next_code(folder: Path) -> Path:
    """Return a folder with today's packages as the next release would be: one field more in the records of all queues."""
    made = folder / "code-next"
    for package in (*PACKAGES, "tests/chaos"):
        shutil.copytree(ROOT / package, made / package, ignore=shutil.ignore_patterns("__pycache__"))
    schemas = made / "events" / "schemas"
    for kind, entry in ENTRIES.items():  # today's version is released before it changes
        (schemas / "history" / f"{kind.__name__}-{entry.id}.avsc").write_text(json.dumps(entry.schema))
    for name, (module, before) in CHANGED.items():
        path, code = schemas / f"{name}.avsc", made / "events" / module
        schema = json.loads(path.read_text("utf-8"))
        schema["fields"].append({"name": "novelty", "type": "string", "default": "", "doc": "What is new."})
        path.write_text(json.dumps(schema))
        last, rest = before.split("\n", 1)
        text = code.read_text("utf-8")
        assert text.count(before) == 1, f"{name} has changed: say in CHANGED where its fields end"
        code.write_text(text.replace(before, f'{last}\n    novelty: str = "new"\n{rest}'))
    return made


def schemas_of(code: Path) -> dict[str, int]:
    """Return the schema ids of the code in a folder, by record; proof that it is that code which runs with this path."""
    ask = "import events, json; from events.catalog import ENTRIES; "
    ask += "print(json.dumps([events.__file__, {k.__name__: e.id for k, e in ENTRIES.items()}]))"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, ids = json.loads(done.stdout)
    assert Path(file).is_relative_to(code), f"{file} isn't in {code}"
    return ids  # type: ignore[no-any-return]


@dataclass
class Process:
    """One process of a role. `old`: it runs the older code."""

    name: str
    role: str
    old: bool
    popen: subprocess.Popen[bytes]
    ready: Path
    log: Path
    ended: int | None = None

    def begun(self) -> bool:
        """Say whether it is ready, or has ended before."""
        return self.ready.exists() or self.popen.poll() is not None

    def tail(self) -> str:
        """Return the end of its log."""
        return f"--- {self.name} (exit code {self.popen.poll()})\n{self.log.read_text(errors='replace')[-3000:]}"

    @property
    def asks_for_newer_code(self) -> bool:
        """Whether it ended because only newer code can go on."""
        return self.popen.poll() not in (None, 0) and "NewerCodeError" in self.log.read_text(errors="replace")


@dataclass
class Roles:
    """The processes of one installation, by name. `old_code`, `new_code`: where the older and the newer code are."""

    settings: Settings
    folder: Path
    old_code: Path
    new_code: Path = ROOT
    workflows: Sequence[str] = WORKFLOWS
    running: dict[str, Process] = field(default_factory=dict)
    all: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "roll_tools.py").write_text(TOOLS)
        paths = tuple(self.folder / f"roll-{number}.yaml" for number in range(len(self.workflows)))
        for path, text in zip(paths, self.workflows, strict=True):
            path.write_text(text)
        own = self.settings.model_copy(update={"tool_paths": (self.folder / "roll_tools.py",), "workflow_paths": paths})
        values = own.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        self._environment |= {
            f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
        }
        self._environment["WITNESS"] = str(self.folder / "witness.jsonl")

    def start(self, *names: str, old: bool) -> None:
        """Start processes (`tool-1`: one of the role `tool`) and wait until they are ready."""
        started = [self._spawn(name, old=old) for name in names]
        for process in started:
            until(process.begun, START_S, process.tail)
            assert process.ready.exists(), process.tail()

    def _spawn(self, name: str, *, old: bool) -> Process:
        code, number = self.old_code if old else self.new_code, len(self.all)
        ready, log = self.folder / f"{name}-{number}.ready", self.folder / f"{name}-{number}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-m", "infra.cli.main", "worker", name.partition("-")[0]],
                cwd=code,  # `-m` puts the working directory first on the path
                env=self._environment | {"PYTHONPATH": str(code), "FOLDFLOW_READY_FILE": str(ready)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        process = self.running[name] = Process(name, name.partition("-")[0], old, popen, ready, log)
        self.all.append(process)
        return process

    def replace(self, *names: str) -> None:
        """End processes in order, or find that they have ended, and start the newer code in their place."""
        processes, at = [self.running.pop(name) for name in names], _now()
        for process in processes:
            self._terminate(process)
        for process in processes:
            self._wait(process)
        self.start(*names, old=False)
        for process in processes:
            self._note(process, "terminate", at)

    def until_they_ask_for_newer_code(self, *names: str, during: Callable[[], object]) -> None:
        """Wait until each of these has ended by itself because only newer code can go on."""
        at = _now()

        def ended() -> bool:
            during()
            return all(self.running[name].asks_for_newer_code for name in names)

        until(ended, 120, self.logs)
        for name in names:
            assert self.running[name].popen.returncode == NEWER, self.running[name].tail()
            self._note(self.running[name], "newer", at)

    def _note(self, process: Process, kind: str, at: int) -> None:
        disruption = {"at_ms": at, "until_ms": _now(), "kind": kind, "role": process.role, "name": process.name}
        with (self.folder / "disruptions.jsonl").open("a") as file:
            file.write(json.dumps(disruption) + "\n")

    def calls(self) -> Counter[tuple[str, str]]:
        """Return how often each step's tool was called, by run and step."""
        arrivals = map(json.loads, (self.folder / "witness.jsonl").read_text().splitlines())
        return Counter((each["run_id"], each["step"]) for each in arrivals)

    def stop(self) -> None:
        """End all, in order."""
        for process in self.running.values():
            self._terminate(process)
        for process in self.running.values():
            self._wait(process)
        self.running.clear()

    def _terminate(self, process: Process) -> None:
        if process.popen.poll() is None:  # once: a second signal would be the end at once
            process.popen.send_signal(signal.SIGTERM)

    def _wait(self, process: Process) -> None:
        try:
            process.ended = process.popen.wait(END_S)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.ended = process.popen.wait()

    def logs(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(process.tail() for process in self.all)


def _now() -> int:
    return time.time_ns() // 1_000_000


def until(condition: Callable[[], bool], patience_s: float, explain: Callable[[], str]) -> None:
    """Wait until a condition is true; fail with an explanation when it doesn't come true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


class Load:
    """Requests as JSON, so that they belong to no version of the code; each is acknowledged by the broker before it counts."""

    def __init__(self, settings: Settings, folder: Path, per_second: float) -> None:
        self._producer = Producer({**kafka.client(settings), "acks": "all", "partitioner": "murmur2_random"})
        self._topic, self._pause_s = kafka.name(settings, topics.REQUESTS), 1 / per_second
        self._stop, self._one_at_a_time = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._noted = folder / "requests.jsonl"
        self.runs: dict[str, int] = {}
        """The number of each run that was asked for."""

    def send(self, some: int) -> None:
        """Ask for some more runs."""
        with self._one_at_a_time:
            numbers = range(len(self.runs), len(self.runs) + some)
            self._ask(numbers)
            self.runs |= {run_id(f"roll-{number}"): number for number in numbers}

    def _ask(self, numbers: Iterable[int]) -> None:
        sent: list[Message] = []

        def acknowledged(error: KafkaError | None, message: Message) -> None:
            assert error is None, error
            sent.append(message)

        for number in numbers:
            request = {"workflow": "roll", "input": {"i": number}, "request_id": f"roll-{number}"}
            value, key = json.dumps(request).encode(), f"roll-{number}".encode()
            self._producer.produce(self._topic, value, key, on_delivery=acknowledged)
        assert self._producer.flush(60) == 0
        with self._noted.open("a") as file:
            for message in sent:
                place = {"topic": "requests", "partition": message.partition(), "offset": message.offset()}
                name = (message.key() or b"").decode()
                file.write(json.dumps({"request_id": name, **place, "expect": "completed"}) + "\n")

    def __enter__(self) -> Self:
        """Go on asking until the end of the block."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._stop.wait(self._pause_s):
            self.send(1)


def judged(settings: Settings, folder: Path, code: Path = ROOT) -> dict[str, Any]:
    """Return what the checker, a program beside `code`, says of the topics and of what stands in the folder."""
    where = ("--bootstrap-servers", settings.bootstrap_servers, "--topic-prefix", settings.topic_prefix, "--folder", str(folder))
    done = subprocess.run(
        [sys.executable, str(code / "tests" / "chaos" / "checker.py"), "--json", *where],
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@dataclass
class Ledger:
    """What stands on `decisions` and `deadletter`, read record by record."""

    settings: Settings
    records: dict[int, list[tuple[int, Decision, bytes]]] = field(default_factory=lambda: defaultdict(list))
    letters: list[DeadLetter] = field(default_factory=list)
    ended: dict[str, Decision] = field(default_factory=dict)
    unreadable: int = 0
    _read_to: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._partitions = kafka.connect(self.settings).partitions
        self._reader = kafka.reader(self.settings)

    def read_on(self) -> None:
        """Take what was appended since."""
        for topic in (topics.DECISIONS, topics.DEADLETTER):
            for partition in range(self._partitions[topic.name]):
                start = self._read_to[topic.name, partition]
                for message in kafka.read_partition(self._reader, kafka.name(self.settings, topic), partition, start):
                    self._read_to[topic.name, partition] = (message.offset() or 0) + 1
                    self._take(partition, message.offset() or 0, message.value() or b"") if topic is topics.DECISIONS else (
                        self.letters.append(codec.decode(message.value(), DeadLetter))
                    )

    def _take(self, partition: int, offset: int, value: bytes) -> None:
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            self.unreadable += 1
            return
        self.records[partition].append((offset, decision, value))
        if decision.effects and type(decision.effects[-1]).__name__ in ("RunCompleted", "RunFailed", "RunCancelled"):
            self.ended.setdefault(decision.run_id, decision)

    def all(self) -> Iterator[tuple[int, Decision, bytes]]:
        """Yield all decisions that were read, whether they count or not: offset, decision, value."""
        for records in self.records.values():
            yield from records

    def has_ended(self, runs: Mapping[str, int]) -> bool:
        """Say whether all these runs have ended."""
        self.read_on()
        return runs.keys() <= self.ended.keys()

    def check(self, runs: Mapping[str, int], *, children: bool = False) -> Counter[str]:
        """Assert that nothing was lost or doubled; return figures: verdicts, schemas of what counts, and runs of two schemas.

        `children`: whether each run has one of its own.
        """
        self.read_on()
        figures: Counter[str] = Counter()
        accepted: dict[str, list[Decision]] = defaultdict(list)
        schemas: dict[str, set[int]] = defaultdict(set)
        for records in self.records.values():
            chain = Chain()
            for offset, decision, value in records:
                verdict = chain.judge(offset, decision, chain_hash(codec.unframed(value)))
                figures[verdict.value] += 1
                if verdict is Verdict.ACCEPTED:
                    accepted[decision.run_id].append(decision)
                    schemas[decision.run_id].add(codec.FRAME.unpack_from(value)[1])
            assert not chain.broken, chain.broken
        starts = [history[0].input for history in accepted.values()]
        parents = Counter(start.parent.run_id for start in starts if isinstance(start, StartRun) and start.parent)
        assert parents == dict.fromkeys(runs, 1) if children else not parents, "each run asked once for a child run, and has it"
        assert len(accepted) == len(runs) * (1 + children)
        assert set(accepted) >= set(runs), "a run for each request, and no other"
        assert not self.letters, self.letters[:3]
        assert self.unreadable == 0
        for run, history in accepted.items():
            assert [decision.seq for decision in history] == list(range(1, len(history) + 1))
            inputs = [decision.input_offset for decision in history]
            assert len(set(inputs)) == len(inputs), "an input was decided twice"
            end = history[-1].effects[-1]
            assert isinstance(end, RunCompleted), history[-1]
            assert run not in runs or json.loads(end.output) == output(runs[run])
        for each in schemas.values():
            figures["runs_of_two_schemas"] += len(each) > 1
        for schema in set().union(*schemas.values()):
            figures[f"schema_{schema}"] = sum(schema in each for each in schemas.values())
        return figures
