"""What a workflow can do, each capability with real processes on a real Kafka: asked for as JSON, observed in `decisions`."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

from events import topics
from events.calls import ToolCallRequested
from events.commands import Origin, Parent, StartRun
from events.decisions import (
    CallCancelled,
    ChildRunRequested,
    Decision,
    InputIgnored,
    LoopAdvanced,
    RetryScheduled,
    RunCancelled,
    RunFailed,
    StepCompleted,
    StepCopied,
    StepFailed,
    StepSkipped,
    TimerSet,
)
from events.ids import position_request_id, run_id
from infra.cli.history import History
from infra.embedded.services import environment_of
from infra.embedded.supervisor import Supervisor
from streams import kafka as clients
from streams import registry
from streams.envelope import Incoming, Outgoing
from streams.processors.orchestrator import GROUP
from streams.settings import Settings
from streams.workflow.definition import parse
from streams.workflow.payloads import MAX_PAYLOAD_BYTES, is_reference
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunState, RunStatus, StepStatus

PATIENCE_S = 60.0
LATE_MS = 250
"""How late a timer may be; the median of some is looked at, so that one pause of a busy machine is no failure."""

TOOLS = '''
"""Tools that note what happens to them in a file, outside of all our books."""
import asyncio, json, pathlib
from typing import Any

from tools.context import ToolContext
from tools.errors import RetryableError, TerminalError

_NOTES = pathlib.Path(__file__).with_name("notes")
_inside = 0


def _note(context: ToolContext, what: Any = "called") -> int:
    """Note something, and return how often it was noted before."""
    line = json.dumps([context.run_id, context.step, what]) + "\\n"
    before = _NOTES.read_text().count(line) if _NOTES.exists() else 0
    with _NOTES.open("a") as notes:
        notes.write(line)
    return before


async def work(context: ToolContext, value: Any = None) -> Any:
    """Return the value."""
    _note(context)
    return value


async def fail(context: ToolContext, times: int, after_s: float | None = None, terminal: bool = False) -> int:
    """Fail so many times."""
    before = _note(context)
    if before < times:
        raise TerminalError("never") if terminal else RetryableError("not yet", retry_after_s=after_s)
    return before


async def hang(context: ToolContext, times: int) -> str:
    """Not return so many times."""
    try:
        if _note(context) < times:
            await asyncio.sleep(3600)
    except asyncio.CancelledError:
        _note(context, "let go")
        raise
    return "at last"


async def crowd(context: ToolContext, number: int) -> int:
    """Note how many are here at once; later ones may return sooner."""
    global _inside
    _inside += 1
    _note(context, _inside)
    try:
        await asyncio.sleep(number * 7 % 13 / 1000)
        if number in (13, 250, 499):
            raise TerminalError("unlucky")
        return number * number
    finally:
        _inside -= 1


def large(megabytes: int) -> str:
    """Return a large text."""
    return "x" * (megabytes * 1_000_000)


async def measure(text: str) -> int:
    """Return how long a text is."""
    return len(text)
'''

WORKFLOWS = """
name: retries
steps:
  page: {tool: {name: fail, arguments: {times: 2}}, retry: {attempts: 4, initial: 200ms, factor: 2}}
  asked: {tool: {name: fail, arguments: {times: 1, after_s: 0.7}}, retry: {initial: 10s}}
  hopeless: {tool: {name: fail, arguments: {times: 9}}, retry: {attempts: 2, initial: 100ms}, on_failure: continue}
  wrong: {tool: {name: fail, arguments: {times: 9, terminal: true}}, on_failure: continue}
output: {page: "=steps.page.output", hopeless: "=steps.hopeless.error.kind", wrong: "=steps.wrong.error.kind"}
---
name: limits
steps:
  once: {tool: {name: hang, arguments: {times: 1}}, timeout: 500ms, retry: {initial: 100ms}}
  ever:
    tool: {name: hang, arguments: {times: 99}}
    timeout: 400ms
    time_limit: 1s
    retry: {attempts: 50, initial: 100ms, factor: 1}
    on_failure: continue
output: {once: "=steps.once.output", ever: "=steps.ever.error.kind"}
---
name: limited
time_limit: 1s
steps: {ever: {tool: {name: hang, arguments: {times: 1}}, on_failure: continue}}
---
name: timers
input: {type: object, properties: {due: {type: string}, wait: {type: string}}}
steps: {fixed: {sleep: 1s}, computed: {sleep: "=input.wait"}, instant: {sleep_until: "=input.due"}}
---
name: sleeper
input: {type: object, properties: {wait: {type: string}}}
steps: {pause: {sleep: "=input.wait"}, after: {needs: [pause], tool: {name: work, arguments: {value: awake}}}}
---
name: forked
steps:
  a: {tool: {name: work, arguments: {value: 1}}}
  b: {needs: [a], tool: {name: work, arguments: {value: "=steps.a.output + 1"}}}
  c: {needs: [b], tool: {name: work, arguments: {value: "=steps.b.output + 1"}}}
---
name: saga
compensations:
  cancel_flight: {tool: {name: fail, arguments: {times: 1}}, retry: {initial: 100ms}}
  cancel_hotel: {tool: {name: work, arguments: {value: "=output"}}}
steps:
  flight: {tool: {name: work, arguments: {value: f-1}}, compensation: cancel_flight}
  hotel: {needs: [flight], tool: {name: work, arguments: {value: h-1}}, compensation: cancel_hotel}
  car: {needs: [hotel], tool: {name: fail, arguments: {times: 9, terminal: true}}}
finally:
  tidy: {tool: {name: work, arguments: {value: "=outcome + ' ' + error.kind"}}}
---
name: branches
steps:
  count: {repeat: {until: last >= 3, at_most: 10}, tool: {name: work, arguments: {value: "=last == null ? 1 : last + 1"}}}
  both:
    needs: [count]
    steps:
      double: {tool: {name: work, arguments: {value: "=steps.count.output * 2"}}}
      plus: {needs: [double], transform: "=steps.double.output + 1"}
    output: ["=steps.double.output", "=steps.plus.output"]
  way:
    needs: [both]
    switch:
      large: {when: "steps.both.output[1] > 100", tool: {name: work, arguments: {value: large}}}
      small: {when: "steps.both.output[1] > 5", tool: {name: work, arguments: {value: small}}}
      other: {tool: {name: work, arguments: {value: other}}}
  never: {needs: [way], when: "steps.way.output == 'large'", tool: {name: work, arguments: {}}}
output: ["=steps.count.output", "=steps.both.output", "=steps.way.output", "=steps.never.status"]
---
name: bounded
steps: {count: {repeat: {until: last > 9, at_most: 2}, tool: {name: work, arguments: {value: "=index"}}}}
---
name: mapped
input: {type: object, properties: {numbers: {type: array, items: {type: integer}}}}
steps:
  each:
    for_each: {items: "=input.numbers", as: number, concurrency: 20, tolerate: 3}
    tool: {name: crowd, arguments: {number: "=number"}}
output: {squares: "=steps.each.output", failed: "=steps.each.failures.map(f, f.index)"}
---
name: double
input: {type: object, properties: {number: {type: integer}}}
steps: {twice: {transform: "=input.number * 2"}}
---
name: broken
steps: {break: {tool: {name: fail, arguments: {times: 9, terminal: true}}}}
---
name: family
steps:
  good: {run: {workflow: double, input: {number: 21}}}
  bad: {run: {workflow: broken}, on_failure: continue}
  lost: {run: {workflow: nowhere}, on_failure: continue}
output: {good: "=steps.good.output", bad: "=steps.bad.error", lost: "=steps.lost.error"}
---
name: strict
steps: {bad: {run: {workflow: broken}}}
---
name: guardian
steps: {child: {run: {workflow: listener}}}
---
name: listener
steps: {before: {tool: {name: work, arguments: {}}}, heard: {needs: [before], wait_for: {signal: go}}}
---
name: small
steps: {one: {transform: 1}}
---
name: payload
input: {type: object, properties: {megabytes: {type: integer}}}
steps:
  fetch: {tool: {name: large, arguments: {megabytes: "=input.megabytes"}}}
  count: {needs: [fetch], tool: {name: measure, arguments: {text: "=steps.fetch.output"}}}
"""

SECOND_FORKED = """
name: forked
steps:
  a: {tool: {name: work, arguments: {value: 1}}}
  b: {needs: [a], tool: {name: work, arguments: {value: "=steps.a.output + 1"}}}
  c: {needs: [b], tool: {name: work, arguments: {value: "=steps.b.output * 10"}}}
"""

VERSIONED = """
name: versioned
steps: {{gate: {{wait_for: {{signal: go}}}}, said: {{needs: [gate], transform: {said}}}}}
"""

E = TypeVar("E")


class Foldflow:
    """An installation: its processes, what is said to it, its ledger (read once for all runs), and the tools' notes."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.supervisor = settings, Supervisor(settings)
        self.cluster = clients.connect(settings)
        self._source, self._producer = clients.reader(settings), clients.producer(settings)
        self._records: dict[int, list[Incoming]] = {each: [] for each in range(settings.partitions)}

    def close(self) -> None:
        """Stop it."""
        self._source.close()
        self.supervisor.down()

    def log(self, role: str) -> str:
        """Return what a process has logged."""
        return (self.settings.data_dir / "logs" / f"{role}.log").read_text()

    def kill(self, role: str) -> None:
        """Kill a process: it gets no chance to do anything more."""
        (process,) = (each.started.process() for each in self.supervisor.status() if each.started.name == role)
        assert process is not None
        process.send_signal(signal.SIGKILL)
        until(lambda: all(each.condition == "dead" for each in self.supervisor.status() if each.started.name == role))

    def deploy(self, *definitions: str) -> list[WorkflowSpec]:
        """Register workflows."""
        specs = [parse(each.encode(), "test.yaml") for each in definitions]
        registry.publish(self.settings, specs)
        return specs

    def begin(self, *arguments: str) -> "subprocess.Popen[str]":
        """Run a `foldflow` command."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
        return subprocess.Popen(
            [sys.executable, "-m", "infra.cli.main", *arguments],
            env=environment | environment_of(self.settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def say(self, request: dict[str, Any], key: str = "", partition: int | None = None) -> int:
        """Put JSON on `requests`, as a console producer does, and return its offset."""
        acks = clients.Acks()
        record = Outgoing(topics.REQUESTS, key.encode(), json.dumps(request).encode(), [], partition)
        clients.produce(self._producer, self.settings, record, acks)
        clients.flush(self._producer, acks)
        return acks.offsets[0]

    def ask(self, workflow: str, request_id: str = "", key: str = "", **more: Any) -> "Run":
        """Ask for a run."""
        request_id = request_id or f"{workflow} {uuid.uuid4()}"
        self.say({"workflow": workflow, "request_id": request_id, **more}, key)
        return Run(self, run_id(request_id), request_id)

    def partition(self, run: str) -> int:
        """Return where a run stands."""
        return topics.partition_for(run.encode(), self.settings.partitions)

    def records(self, partition: int) -> list[Incoming]:
        """Return the decisions of a partition."""
        known = self._records[partition]
        start = known[-1].offset + 1 if known else 0
        name = clients.name(self.settings, topics.DECISIONS)
        known.extend(map(clients.incoming, clients.read_partition(self._source, name, partition, start)))
        return known

    def snapshots(self, partition: int) -> dict[str, bytes | None]:
        """Return the last record of each key on `snapshots`; None: deleted."""
        name = clients.name(self.settings, topics.SNAPSHOTS)
        read = map(clients.incoming, clients.read_partition(self._source, name, partition, 0))
        return {(each.key or b"").decode(): each.value for each in read}

    def mark_is_at_the_end(self) -> bool:
        """Whether whoever takes over reads no decisions: every run is over or on the shelf, and that is committed."""
        name = clients.name(self.settings, topics.DECISIONS)
        places = [clients.TopicPartition(clients.name(self.settings, topics.INBOX), each) for each in self._records]
        with closing(clients.consumer(self.settings, GROUP)) as member:
            committed = member.committed(places, timeout=10)
        marks = {each.partition: json.loads(each.metadata or "{}").get("mark") for each in committed}
        return all(marks[each] == clients.watermarks(self._source, name, each)[1] for each in self._records)

    def payloads(self) -> set[Path]:
        """Return the objects in the payload store."""
        return {each for each in (self.settings.data_dir / "payloads").rglob("*") if each.is_file()}

    def notes(self, run: "Run", step: str = "") -> list[Any]:
        """Return what the tools noted of a run: steps and what happened there; of one step what happened."""
        path = self.settings.tool_paths[0].with_name("notes")
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        found = [(at, what) for of, at, what in lines if of == run.run_id]
        return [what for at, what in found if at == step] if step else found

    def pass_by(self, run: "Run", key: str) -> None:
        """Wait until everything that was said before, under this key, has come to a run."""
        while self.partition(run_id(request_id := f"small {uuid.uuid4()}")) != self.partition(run.run_id):
            pass
        self.ask("small", request_id, key).until_over()


class Run:
    """A run, looked at in the ledger through the filter."""

    def __init__(self, here: Foldflow, identity: str, request_id: str = "") -> None:
        self.here, self.run_id, self.request_id = here, identity, request_id
        self.decisions: list[Decision] = []
        self.sizes: list[int] = []
        self._history, self._seen = History(identity), 0

    def look(self) -> RunState:
        """Return what the run has come to."""
        records = self.here.records(self.here.partition(self.run_id))
        for record in records[self._seen :]:
            if self._history.take(record.offset, record.value):
                assert self._history.last is not None
                self.decisions.append(self._history.last)
                self.sizes.append(len(record.value or b""))
        self._seen = len(records)
        return self._history.state

    def until(self, holds: Callable[[RunState], Any]) -> RunState:
        """Wait until something holds of the run."""
        until(lambda: holds(self.look()), lambda: f"{self.look()}\n{self.here.log('orchestrator')[-3000:]}")
        return self._history.state

    def until_at(self, step: str, status: StepStatus) -> RunState:
        """Wait until a step is there."""
        return self.until(lambda state: step in state.steps and state.steps[step].status is status)

    def until_over(self, status: RunStatus = RunStatus.COMPLETED) -> RunState:
        """Wait until the run has ended, as expected."""
        state = self.until(lambda state: state.over)
        assert state.status is status, state
        return state

    def output(self) -> Any:
        """Wait until the run has completed, and return its output."""
        return json.loads(self.until_over().output or "")

    def signal(self) -> None:
        """Say what it waits for."""
        self.here.say({"run_id": self.run_id, "command": "signal", "name": "go", "payload": "heard"})

    def effects(self, kind: type[E], step: str | None = None) -> list[tuple[Decision, E]]:
        """Return effects of a kind (of a step) with their decisions."""
        self.look()
        found = [(each, effect) for each in self.decisions for effect in each.effects if isinstance(effect, kind)]
        return [pair for pair in found if step is None or getattr(pair[1], "step", None) == step]

    def child(self, step: str) -> "Run":
        """Return the run that a step has started."""
        return Run(self.here, run_id(self.until(lambda state: step in state.steps).steps[step].awaits))

    def snapshots(self) -> list[bytes | None]:
        """Return the run's snapshots; None: deleted."""
        found = self.here.snapshots(self.here.partition(self.run_id))
        return [value for key, value in found.items() if key.startswith(self.run_id)]

    def until_kept(self) -> None:
        """Wait until there is a snapshot of the run."""
        until(lambda: any(self.snapshots()), self.look)

    def until_forgotten(self) -> None:
        """Wait until the run has no snapshot any more, but has had one, while other runs come and go."""

        def forgotten() -> bool:
            self.here.pass_by(self, "")
            return not any(self.snapshots())

        until(forgotten, self.look)
        assert self.snapshots()

    def late(self, step: str) -> int:
        """Return by how many milliseconds a sleeping step ended too late."""
        ((_, timer),) = self.effects(TimerSet, step)
        ((fired, _),) = self.effects(StepCompleted, step)
        return fired.at - timer.due


def until(
    condition: Callable[[], Any], explain: Callable[[], Any] = lambda: "it did not come true", patience_s: float = PATIENCE_S
) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def here(kafka: str, embedded: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foldflow]:
    """Start intake, orchestrator and a tool worker, and deploy the workflows."""
    folder = tmp_path_factory.mktemp("capabilities")
    (folder / "noting_tools.py").write_text(TOOLS)
    settings = embedded.settings.model_copy(
        update={
            "bootstrap_servers": kafka,
            "topic_prefix": f"w{uuid.uuid4().hex[:12]}.",
            "data_dir": folder,
            "partitions": 2,
            "session_timeout_ms": 3_000,
            "idle_after_s": 1.0,
            "tool_paths": (folder / "noting_tools.py",),
        }
    )
    found = Foldflow(Settings(**settings.model_dump(exclude={"ready_file"}, exclude_none=True)))
    found.deploy(*WORKFLOWS.split("---\n"))
    found.supervisor.up(frozenset({"intake", "orchestrator", "tool"}))
    yield found
    found.close()


# --- Retries and time ---


def test_a_call_that_fails_is_tried_again(here: Foldflow) -> None:
    """Twice it fails, then it works; attempts, reasons and growing waits are in the ledger, and no attempt comes early."""
    run = here.ask("retries")
    assert run.output() == {"page": 2, "hopeless": "tool_retryable", "wrong": "tool_terminal"}
    attempts = run.effects(ToolCallRequested, "page")
    waits = run.effects(RetryScheduled, "page")
    assert [call.attempt for _, call in attempts] == [1, 2, 3]
    assert [(wait.attempt, wait.failure.kind, wait.failure.message) for _, wait in waits] == [
        (2, "tool_retryable", "not yet"),
        (3, "tool_retryable", "not yet"),
    ]
    first, second = (wait.due - decision.at for decision, wait in waits)
    assert 100 <= first <= 200 <= second <= 400
    assert all(decision.at >= wait.due for (decision, _), (_, wait) in zip(attempts[1:], waits, strict=True))
    ((decision, asked),) = run.effects(RetryScheduled, "asked")
    assert asked.due - decision.at == 700, "what the failure itself asks for wins"
    calls = {step: here.notes(run, step).count("called") for step in ("page", "asked", "hopeless", "wrong")}
    assert calls == {"page": 3, "asked": 2, "hopeless": 2, "wrong": 1}


def test_what_takes_too_long_is_given_up(here: Foldflow) -> None:
    """An attempt, after which the next one works; a step with all its attempts; a run. The worker lets go of what it does."""
    run, limited = here.ask("limits"), here.ask("limited")
    assert run.output() == {"once": "at last", "ever": "timeout"}
    ((_, again),) = run.effects(RetryScheduled, "once")
    assert (again.attempt, again.failure.kind) == (2, "timeout")
    assert [here.notes(run, "once").count(each) for each in ("called", "let go")] == [2, 1]

    attempts = run.effects(ToolCallRequested, "ever")
    ((failed, _),) = run.effects(StepFailed, "ever")
    began = attempts[0][0].at
    assert len(attempts) > 1
    assert max(call.deadline for _, call in attempts) <= began + 1000 <= failed.at < began + 5000

    state = limited.until_over(RunStatus.FAILED)
    ((ended, failure),) = limited.effects(RunFailed)
    assert state.limit is not None
    assert (failure.step, failure.failure.kind, ended.at >= limited.decisions[0].at + 1000) == (None, "timeout", True)
    assert len(limited.effects(CallCancelled, "ever")) == 1
    until(lambda: here.notes(limited, "ever") == ["called", "let go"])


def test_timers_fire_in_time(here: Foldflow) -> None:
    """Never early, and little later than a sleep of 1 s, a computed one, or a point in time says."""
    due = datetime.fromtimestamp(time.time() + 1.5, UTC).isoformat(timespec="milliseconds")
    runs = [here.ask("timers", input={"due": due, "wait": f"{1000 + 50 * i}ms"}) for i in range(5)]
    late = []
    for i, run in enumerate(runs):
        run.until_over()
        began = run.decisions[0].at
        dues = [timer.due for step in ("fixed", "computed", "instant") for _, timer in run.effects(TimerSet, step)]
        assert dues == [began + 1000, began + 1000 + 50 * i, round(datetime.fromisoformat(due).timestamp() * 1000)]
        late += [run.late(step) for step in ("fixed", "computed", "instant")]
    assert min(late) >= 0
    assert statistics.median(late) <= LATE_MS


# --- Forks ---


def test_a_fork_runs_only_what_is_asked_to_run_again(here: Foldflow, tmp_path: Path) -> None:
    """By step, by another output, by another definition: what is before is copied and not called, and the origin recorded."""
    first = here.ask("forked")
    assert first.output() == 3
    state = first.look()
    (tmp_path / "second.yaml").write_text(SECOND_FORKED)
    ways = {
        ("--from", "b"): (["a"], ["b", "c"], 3),
        ("--set", "a=5"): (["a"], ["b", "c"], 7),
        ("--spec", str(tmp_path / "second.yaml")): (["a", "b"], ["c"], 20),
        ("--at", "2", "--from", "b"): (["a"], ["b", "c"], 3),
    }
    commands = {way: here.begin("fork", first.run_id, *way, "--wait", "--json", "--timeout", "60s") for way in ways}
    for way, (copied, called, output) in ways.items():
        out, err = commands[way].communicate(timeout=120)
        assert commands[way].returncode == 0, err
        run = Run(here, json.loads(out.splitlines()[-1])["run_id"])
        assert run.output() == output
        assert [effect.step for _, effect in run.effects(StepCopied)] == copied
        assert [step for step, _ in here.notes(run)] == called
        start = run.decisions[0].input
        assert isinstance(start, StartRun)
        assert start.origin is not None
        if "--at" in way:
            assert (start.origin.run_id, start.origin.seq) == (first.run_id, 2)
        else:
            assert start.origin == Origin(first.run_id, state.seq, state.head.hex())
        assert (start.digest == state.digest) is ("--spec" not in way)
    assert [step for step, _ in here.notes(first)] == ["a", "b", "c"]
    again = here.ask("forked")
    assert (again.output(), again.look().digest) == (3, state.digest), "a fork's definition is nobody else's"


def test_a_fork_of_what_was_undone_must_say_what_becomes_of_it(here: Foldflow) -> None:
    """Given a run that failed and undid two steps, forking it is refused, at an earlier decision too, until both are named."""
    first = here.ask("saga")
    first.until_over(RunStatus.FAILED)
    for way in ((), ("--at", "3"), ("--from", "hotel")):
        refused = here.begin("fork", first.run_id, *way)
        _, err = refused.communicate(timeout=120)
        assert refused.returncode == 2, err
        said = " ".join(err.split())
        assert "`flight`" in said
        assert "--from flight" in said
        assert "--set flight=JSON" in said
        assert ("`hotel`" in said) is ("hotel" not in way)
    told = here.begin("fork", first.run_id, "--set", 'flight="f-2"', "--wait", "--json", "--timeout", "60s")
    out, err = told.communicate(timeout=120)
    run = Run(here, json.loads(out.splitlines()[-1])["run_id"])
    assert [effect.step for _, effect in run.effects(StepCopied)] == ["flight"], err
    assert [step for step, _ in here.notes(run)] == ["hotel", "car", "undo(hotel)", "finally.tidy"], "flight was copied: it stays"
    ((_, ended),) = run.effects(RunFailed)
    assert ended.not_undone == ()


# --- Structure ---


def test_what_is_done_is_undone_when_the_run_fails(here: Foldflow) -> None:
    """Compensations are really called, latest first, with attempts of their own; then the clean-up, which knows the outcome."""
    run = here.ask("saga")
    run.until_over(RunStatus.FAILED)
    ((_, ended),) = run.effects(RunFailed)
    assert (ended.step, ended.failure.kind, ended.not_undone) == ("car", "tool_terminal", ())
    undone = ["undo(hotel)", "undo(flight)", "undo(flight)"]
    assert [step for step, _ in here.notes(run)] == ["flight", "hotel", "car", *undone, "finally.tidy"]
    ((_, hotel),) = run.effects(ToolCallRequested, "undo(hotel)")
    ((_, tidy),) = run.effects(ToolCallRequested, "finally.tidy")
    assert json.loads(hotel.arguments) == {"value": "h-1"}
    assert json.loads(tidy.arguments) == {"value": "failed tool_terminal"}


def test_a_run_branches_and_loops(here: Foldflow) -> None:
    """A loop goes on until its condition holds, or fails at its bound; steps have steps; one case of a switch is taken."""
    run, bounded = here.ask("branches"), here.ask("bounded")
    assert run.output() == [3, [6, 7], "small", "skipped"]
    assert [step for step, _ in here.notes(run)] == ["count[0]", "count[1]", "count[2]", "both.double", "way.small"]
    assert [effect.index for _, effect in run.effects(LoopAdvanced)] == [0, 1, 2]
    ((_, skipped),) = run.effects(StepSkipped, "never")
    assert "steps.way.output == 'large'" in skipped.reason
    state = bounded.until_over(RunStatus.FAILED)
    assert state.failure is not None
    assert (state.failure.kind, len(here.notes(bounded))) == ("loop_bound", 2)


def test_a_step_is_done_for_each_of_many_items(here: Foldflow) -> None:
    """500 items, never more than 20 at once, each called once, results in the items' order, three failures tolerated."""
    unlucky = {13, 250, 499}
    run = here.ask("mapped", input={"numbers": list(range(500))})
    assert run.output() == {
        "squares": [None if number in unlucky else number * number for number in range(500)],
        "failed": sorted(unlucky),
    }
    inside = here.notes(run)
    assert sorted(step for step, _ in inside) == sorted(f"each[{i}]" for i in range(500))
    under_way = most = 0
    for decision in run.decisions:
        for effect in decision.effects:
            if isinstance(effect, StepCompleted | StepFailed) and effect.step != "each":
                under_way -= 1
            under_way += isinstance(effect, ToolCallRequested)
            most = max(most, under_way)
    assert (most, under_way) == (20, 0)
    assert 1 < max(count for _, count in inside) <= 20

    failing = here.ask("mapped", input={"numbers": [13, 13, 250, 499, 1]})
    failing.until_over(RunStatus.FAILED)
    ((_, failure),) = failing.effects(RunFailed)
    assert (failure.step or "").startswith("each[")
    assert (failure.failure.kind, failure.failure.message) == ("tool_terminal", "unlucky"), "one more than is tolerated"


# --- Other runs ---


def test_a_run_waits_for_its_child_runs(here: Foldflow) -> None:
    """It takes their outputs; a child that fails, or that can't start, is a failure of the step; the child names its parent."""
    family, strict = here.ask("family"), here.ask("strict")
    output = family.output()
    assert (output["good"], output["bad"]["kind"], output["lost"]["kind"]) == (42, "child_failed", "unknown_workflow")
    assert "tool_terminal: never" in output["bad"]["message"]
    assert "no workflow is called `nowhere`" in output["lost"]["message"]
    assert [each.workflow for _, each in family.effects(ChildRunRequested)] == ["double", "broken", "nowhere"]
    good, bad = family.child("good"), family.child("bad")
    assert good.output() == 42
    bad.until_over(RunStatus.FAILED)
    start = good.decisions[0].input
    assert isinstance(start, StartRun)
    assert start.parent == Parent(family.run_id, "good", family.look().steps["good"].awaits)
    state = strict.until_over(RunStatus.FAILED)
    assert state.failure is not None
    assert (strict.effects(RunFailed)[0][1].step, state.failure.kind) == ("bad", "child_failed")


def test_a_cancelled_run_cancels_its_child_run(here: Foldflow) -> None:
    """The child ends as cancelled, and says by whom."""
    parent = here.ask("guardian")
    child = parent.child("child")
    child.until_at("heard", StepStatus.AWAITING_SIGNAL)
    here.say({"run_id": parent.run_id, "command": "cancel", "by": "ann", "reason": "enough"})
    parent.until_over(RunStatus.CANCELLED)
    child.until_over(RunStatus.CANCELLED)
    assert [(each.by, each.reason) for _, each in parent.effects(RunCancelled)] == [("ann", "enough")]
    assert child.effects(RunCancelled)[0][1].by == f"run {parent.run_id}"


# --- Identity and versions ---


def test_the_same_request_is_the_same_run(here: Foldflow) -> None:
    """Sent again while its run is under way it is ignored, and after the run's end too: nothing is called a second time."""
    run = here.ask("listener", key="same")
    run.until_at("heard", StepStatus.AWAITING_SIGNAL)
    here.ask("listener", run.request_id, "same")
    run.until(lambda _: run.effects(InputIgnored))
    assert [effect.reason for _, effect in run.effects(InputIgnored)] == ["already_started"]
    run.signal()
    run.until_over()
    decisions = len(run.decisions)
    here.ask("listener", run.request_id, "same")
    here.pass_by(run, "same")
    run.look()
    assert len(run.decisions) == decisions
    assert here.notes(run, "before") == ["called"]


def test_a_request_without_an_id_is_named_by_its_place(here: Foldflow) -> None:
    """Topic, partition and offset: the same text twice is two runs."""
    places = [(partition, here.say({"workflow": "small"}, partition=partition)) for partition in (0, 1, 1)]
    topic_id = here.cluster.ids[topics.REQUESTS.name]
    for partition, offset in places:
        identity = position_request_id(topic_id, partition, offset)
        assert identity == f"{uuid.UUID(bytes=topic_id)}/{partition}/{offset}"
        run = Run(here, run_id(identity))
        assert run.output() == 1
        start = run.decisions[0].input
        assert isinstance(start, StartRun)
        assert start.request_id == identity
    assert len(set(places)) == 3


def test_a_run_keeps_its_version(here: Foldflow) -> None:
    """One that waits goes on with the version that it has; a new run takes the new one, or the one that it names."""
    (one,) = here.deploy(VERSIONED.format(said="one"))
    old = here.ask("versioned")
    old.until_at("gate", StepStatus.AWAITING_SIGNAL)
    (two,) = here.deploy(VERSIONED.format(said="two"))
    later: list[Run] = []

    def takes_the_new_one() -> bool:  # intake hears of it a moment later
        later.append(here.ask("versioned"))
        return later[-1].until_at("gate", StepStatus.AWAITING_SIGNAL).digest == two.digest

    until(takes_the_new_one)
    named = here.ask("versioned", digest=one.digest)
    *between, new = later
    for run in (old, named, *between):
        run.until_at("gate", StepStatus.AWAITING_SIGNAL)
        run.signal()
        assert (run.output(), run.look().digest) == ("one", one.digest)
    new.signal()
    assert new.output() == "two"


# --- Payloads ---


def test_a_large_payload_is_kept_once_and_passed_on(here: Foldflow) -> None:
    """1 MB from a tool to the next: one object in the store, and a reference in small decisions. 70 MB fail, cleanly."""
    before = here.payloads()
    run = here.ask("payload", input={"megabytes": 1})
    assert run.output() == 1_000_000
    (kept,) = here.payloads() - before
    assert kept.stat().st_size == 1_000_002
    assert is_reference(json.loads(run.look().steps["fetch"].output or ""))
    assert max(run.sizes) < 1000
    again = here.ask("payload", input={"megabytes": 1})
    assert again.output() == 1_000_000
    assert here.payloads() - before == {kept}, "the same content is the same object"

    huge = here.ask("payload", input={"megabytes": 70})
    state = huge.until_over(RunStatus.FAILED)
    assert state.failure is not None
    assert (state.failure.kind, f"{MAX_PAYLOAD_BYTES:,}" in state.failure.message) == ("too_large", True)
    assert (len(huge.effects(ToolCallRequested)), max(huge.sizes) < 1000) == (1, True)
    assert here.payloads() - before == {kept}


# --- What a crash changes nothing of: one kill -9 of the orchestrator for all of these ---


@dataclass
class Crash:
    """Runs that were open when the orchestrator was killed, one that was over, and what the next one said when it began."""

    asleep: Run
    """On the shelf, due after the restart."""
    nap: Run
    """In memory, due while nobody was there."""
    listening: Run
    """On the shelf."""
    twice: Run
    over: Run
    log: str


@pytest.fixture(scope="module")
def crash(here: Foldflow) -> Crash:
    """Kill the orchestrator while runs wait, and start another one."""
    asleep = here.ask("sleeper", input={"wait": "9s"})
    listening, twice, over = (here.ask("listener", key="crash") for _ in range(3))
    over.until_at("heard", StepStatus.AWAITING_SIGNAL)
    over.signal()
    over.until_over()
    for run in (asleep, listening, twice):
        run.until_kept()
    until(here.mark_is_at_the_end)
    nap = here.ask("sleeper", input={"wait": "2s"})
    nap.until_at("pause", StepStatus.SLEEPING)
    logged = len(here.log("orchestrator"))
    here.kill("orchestrator")
    here.ask("listener", over.request_id, "crash")
    here.supervisor.up(frozenset({"orchestrator"}))
    return Crash(asleep, nap, listening, twice, over, here.log("orchestrator")[logged:])


def test_a_run_that_waits_is_on_the_shelf_and_comes_back(here: Foldflow, crash: Crash) -> None:
    """Its snapshot is on the topic, the next orchestrator has it on the shelf and not in memory, the signal finishes it."""
    run = crash.listening
    (snapshot,) = run.snapshots()
    assert snapshot
    begun = re.findall(r"orchestrator\.took_over.* open_runs=(\d+) .* shelved_runs=(\d+)", crash.log)
    assert len(begun) == here.settings.partitions, crash.log
    in_memory, shelved = (sum(map(int, counts)) for counts in zip(*begun, strict=True))
    assert (in_memory <= 1, shelved >= 3) == (True, True), "asleep, listening and twice were on the shelf, nap was perhaps not"
    run.signal()
    assert run.output() == "heard"
    assert here.notes(run) == [("before", "called")]


def test_the_same_request_is_the_same_run_after_a_restart(here: Foldflow, crash: Crash) -> None:
    """Of a run that was over, and of one that waits: one history, no second call."""
    decisions = len(crash.over.decisions)
    for run in (crash.over, crash.twice):
        here.ask("listener", run.request_id, "crash")
        here.pass_by(run, "crash")
    crash.over.look()
    assert len(crash.over.decisions) == decisions
    crash.twice.look()
    assert [effect.reason for _, effect in crash.twice.effects(InputIgnored)] == ["already_started"]
    crash.twice.signal()
    assert crash.twice.output() == "heard"
    assert [here.notes(run) for run in (crash.over, crash.twice)] == [[("before", "called")]] * 2


def test_a_shelved_run_wakes_in_time(here: Foldflow, crash: Crash) -> None:
    """And its snapshot is deleted after its end, as that of a run that a signal woke."""
    runs = [here.ask("sleeper", input={"wait": "4500ms"}) for _ in range(3)]
    for run in runs:
        run.until_kept()
        assert run.look().steps["pause"].status is StepStatus.SLEEPING
    assert [run.output() for run in runs] == ["awake"] * 3
    late = [run.late("pause") for run in runs]
    assert min(late) >= 0
    assert statistics.median(late) <= LATE_MS
    if not crash.listening.look().over:
        crash.listening.signal()
        crash.listening.until_over()
    for run in (*runs, crash.listening):
        run.until_forgotten()


def test_a_timer_survives_the_orchestrator_and_fires_once(here: Foldflow, crash: Crash) -> None:
    """One that was due while nobody was there, and one that is due later: what follows is called once."""
    for run in (crash.nap, crash.asleep):
        assert run.output() == "awake"
        assert run.late("pause") >= 0
        assert here.notes(run) == [("after", "called")]
        assert len(run.effects(TimerSet)) == 1


def test_a_snapshot_is_deleted_though_nothing_else_happens(here: Foldflow) -> None:
    """Else it stays for good when the process ends before something does."""
    run = here.ask("listener")
    run.until_kept()
    run.signal()
    run.until_over()
    until(lambda: not any(run.snapshots()), patience_s=3)
