"""What the tests of zombies stand on: processes that are stopped and wake up, and the ledger with the times of its records."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ports import free_port

from events import codec, topics
from events.decisions import Decision, RunCompleted
from events.ids import chain_hash
from events.results import InboxMessage, Input
from projections import ledger
from projections.projector import Projector
from streams import kafka
from streams.envelope import envelope
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict

HERE = Path(__file__).parent
OTHER_VERSION = HERE / "zombie_other_version.py"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

TOOLS = '''
import asyncio, json, os, time

from tools.context import ToolContext
from tools.errors import RetryableError


async def work(context: ToolContext, seconds: float, fails: int = 0) -> int:
    """Note the call outside of all our books, take a while, and say which process this is."""
    call = {"call_id": context.call_id, "run_id": context.run_id, "step": context.step, "attempt": context.attempt}
    with open(os.environ["ZOMBIE_WITNESS"], "a") as witness:
        witness.write(json.dumps({"at_ms": round(time.time() * 1000), **call, "tool": "work", "pid": os.getpid()}) + chr(10))
    await asyncio.sleep(seconds)
    if context.attempt <= fails:
        raise RetryableError("not yet")
    return os.getpid()
'''


def until(condition: Callable[[], bool], patience_s: float, explain: Callable[[], str]) -> float:
    """Wait until a condition is true and return the seconds that took; fail with an explanation when it doesn't come true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience_s, explain()
        time.sleep(0.02)
    return time.monotonic() - began


def now_ms() -> int:
    """Return the time as records have it."""
    return time.time_ns() // 1_000_000


def own_settings(folder: Path) -> Settings:
    """Return settings with a port for a broker of its own."""
    return Settings(bootstrap_servers=f"127.0.0.1:{free_port()}", data_dir=folder)


@dataclass
class Process:
    """A role's process that can be stopped in the middle of anything, and go on as if nothing had been."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Its id."""
        return self.process.pid

    def stop(self) -> None:
        """Stop it where it is. It notices nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def said(self, event: str, since: int = 0) -> list[str]:
        """Return its log lines about an event, from a length of the log on."""
        text = COLOURS.sub("", self.log.read_bytes()[since:].decode())
        return [line for line in text.splitlines() if event in line]

    def logged(self) -> int:
        """Return the length of its log."""
        return self.log.stat().st_size


class Installation:
    """Role processes on the topics of one prefix."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder, self.running = folder, dict[str, Process]()
        (tools := folder / "zombie_tools.py").write_text(TOOLS)
        self.settings = settings.model_copy(update={"tool_paths": (tools,)})
        values = self.settings.model_dump(mode="json", exclude_none=True, exclude={"ready_file"})
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        self.environment |= {
            f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
        }
        self._admin = kafka.admin(settings)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.witness = folder / "witness.jsonl"
        self.witness.touch()
        self.environment["ZOMBIE_WITNESS"] = str(self.witness)

    def start(self, roles: dict[str, tuple[str, bool]]) -> None:
        """Start processes by name, each a role and whether its code is another version; wait until all are ready."""
        ready = {name: self.folder / f"{name}.ready" for name in roles}
        for name, (role, other) in roles.items():
            program = [str(OTHER_VERSION)] if other else ["-m", "infra.cli.main"]
            log = self.folder / f"{name}.log"
            with log.open("ab") as out:
                # By its client's name the group's members can be told apart.
                own = {"FOLDFLOW_READY_FILE": str(ready[name]), "FOLDFLOW_KAFKA": json.dumps({"client.id": name})}
                command = [sys.executable, *program, "worker", role]
                process = subprocess.Popen(command, env=self.environment | own, stdout=out, stderr=out)
            self.running[name] = Process(name, log, process)

        def up() -> bool:
            assert all(self.running[name].process.poll() is None for name in roles), self.logs(*roles)
            return all(path.exists() for path in ready.values())

        until(up, 120, lambda: self.logs(*roles))

    def end(self) -> None:
        """End all, whatever state they are in."""
        for each in self.running.values():
            each.wake()
            each.process.terminate()
        for each in self.running.values():
            try:
                each.process.wait(45)
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    def logs(self, *names: str) -> str:
        """Return the ends of logs."""
        return "\n".join(f"--- {name}\n{self.running[name].log.read_text()[-3000:]}" for name in names or self.running)

    def members(self, group: str) -> dict[str, set[int]]:
        """Return the processes that the broker counts as members of a consumer group, and the partitions of each."""
        name = self.settings.topic_prefix + group
        (description,) = self._admin.describe_consumer_groups([name]).values()
        return {
            member.client_id: {place.partition for place in member.assignment.topic_partitions}
            for member in description.result().members
        }

    def shared(self, group: str, *names: str) -> bool:
        """Say whether the group's partitions are shared evenly by these processes and nobody else."""
        members = self.members(group)
        return members.keys() == set(names) and len({len(each) for each in members.values()}) == 1 and all(members.values())

    def calls(self) -> list[dict[str, Any]]:
        """Return the tool calls that were made, as the tool itself noted them."""
        return [json.loads(line) for line in self.witness.read_text().splitlines()]

    def send(self, inputs: Iterable[tuple[str, Input]]) -> None:
        """Put inputs for runs into the inbox."""
        records = [envelope(topics.INBOX, run, InboxMessage(run, each), source="test", identity=run) for run, each in inputs]
        kafka.send(self.settings, records)


@dataclass(frozen=True)
class Written:
    """A decision record. `at_ms`: when its writer produced it; `verdict`: what the shared filter says of it."""

    partition: int
    offset: int
    at_ms: int
    decision: Decision
    value: bytes
    verdict: Verdict


@dataclass
class History:
    """The whole topic `decisions`, through the shared filter, read on by `read`."""

    settings: Settings
    written: list[Written] = field(default_factory=list)
    accepted: dict[str, list[Written]] = field(default_factory=lambda: defaultdict(list))
    ended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.partitions = kafka.connect(self.settings).partitions[topics.DECISIONS.name]
        self._reader, self._looker = kafka.reader(self.settings), kafka.reader(self.settings)
        self._read = [0] * self.partitions
        self._chains = [Chain() for _ in range(self.partitions)]

    def read(self) -> "History":
        """Take what was appended since."""
        name = kafka.name(self.settings, topics.DECISIONS)
        for partition, chain in enumerate(self._chains):
            for message in kafka.read_partition(self._reader, name, partition, self._read[partition]):
                value, offset = message.value() or b"", message.offset() or 0
                decision = codec.decode(value, Decision)
                verdict = chain.judge(offset, decision, chain_hash(codec.unframed(value)))
                record = Written(partition, offset, message.timestamp()[1], decision, value, verdict)
                self.written.append(record)
                self._read[partition] = offset + 1
                if verdict is Verdict.ACCEPTED:
                    self.accepted[decision.run_id].append(record)
                    if any(isinstance(effect, RunCompleted) for effect in decision.effects):
                        self.ended.add(decision.run_id)
        return self

    def end(self, partitions: Iterable[int]) -> int:
        """Return how many records there are in some partitions."""
        name = kafka.name(self.settings, topics.DECISIONS)
        return sum(kafka.watermarks(self._looker, name, partition)[1] for partition in partitions)

    def lost(self) -> list[Written]:
        """Return the records that don't count."""
        return [each for each in self.written if each.verdict is not Verdict.ACCEPTED]

    def twice(self) -> list[tuple[Written, Written]]:
        """Return each pair of records about one input of a run: first the one that counts."""
        won = {
            (each.decision.run_id, each.decision.input_offset): each for each in self.written if each.verdict is Verdict.ACCEPTED
        }
        return [(won[key], each) for each in self.lost() if (key := (each.decision.run_id, each.decision.input_offset)) in won]

    def check(self, runs: set[str]) -> Counter[str]:
        """Assert what must be true of every ledger; return how many records got which verdict."""
        assert not [chain.broken for chain in self._chains if chain.broken], "honest writers broke a chain"
        assert set(self.accepted) == runs
        assert self.ended == runs, f"{len(runs - self.ended)} of {len(runs)} runs have not ended"
        for records in self.accepted.values():
            assert [each.decision.seq for each in records] == list(range(1, len(records) + 1)), "a gap in a run's numbers"
            inputs = [each.decision.input_offset for each in records]
            assert len(set(inputs)) == len(inputs), "an input was decided twice"
            assert inputs == sorted(inputs), "inputs were decided out of order"
        return Counter(each.verdict.value for each in self.written)


def views_of(settings: Settings, file: Path) -> tuple[dict[str, int], dict[str, str], list[Any]]:
    """Build the views anew; return how many decision records they passed over by verdict, the runs' statuses, and the breaks."""
    projector = Projector(settings, file, rebuild=True)
    projector.start()
    try:
        assert projector.caught_up.wait(120), projector.failure
        with projector.views.snapshot() as (db, _):
            passed_over: Counter[str] = Counter()
            for row in ledger.ignored(db):
                if row["topic"] == topics.DECISIONS.name:
                    passed_over[row["verdict"]] += row["records"]
            statuses = dict(db.execute("SELECT run_id, status FROM runs").fetchall())
            return dict(passed_over), statuses, ledger.breaks(db)
    finally:
        projector.stop()


def checked(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """Let the checker of the topics judge; None where there is none. `folder`: that of the witness and the requests."""
    checker = HERE / "checker.py"
    if not checker.exists():
        return None
    place = ["--bootstrap-servers", settings.bootstrap_servers, "--topic-prefix", settings.topic_prefix, "--folder", str(folder)]
    done = subprocess.run([sys.executable, str(checker), *place, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
