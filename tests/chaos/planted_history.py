"""A real history to plant faults into: what runs in it, and how it is made on a real Kafka."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checking.records import Arrival, Wanted, lines
from planted_capture import NOISE

from events import ids, topics
from streams import kafka
from streams.envelope import Outgoing
from streams.processors.orchestrator import Orchestrator
from streams.settings import Settings

PATIENCE_S = 120.0
TOOLS = '''
"""Tools of which all but `plain` note each call outside of the ledger before they return."""
import json, pathlib, time

from tools.context import ToolContext
from tools.errors import RetryableError, TerminalError


def _note(context: ToolContext, tool: str) -> None:
    line = {"at_ms": time.time_ns() // 1_000_000, "call_id": context.call_id, "run_id": context.run_id}
    line |= {"step": context.step, "attempt": context.attempt, "tool": tool}
    with pathlib.Path(__file__).with_name("witness.jsonl").open("a") as notes:
        notes.write(json.dumps(line) + "\\n")


async def note(context: ToolContext, value: int) -> int:
    """Return the value."""
    _note(context, "note")
    return value


async def plain(value: int) -> int:
    """Return the value."""
    return value


async def shaky(context: ToolContext) -> int:
    """Fail once."""
    _note(context, "shaky")
    if context.attempt == 1:
        raise RetryableError("not yet")
    return 1


async def hopeless(context: ToolContext) -> None:
    """Fail."""
    _note(context, "hopeless")
    raise TerminalError("never")
'''
WORKFLOWS = """
name: order
steps:
  first: {tool: {name: note, arguments: {value: 1}}}
  second: {needs: [first], tool: {name: note, arguments: {value: "=steps.first.output + 1"}}}
  last: {needs: [second], tool: {name: plain, arguments: {value: "=steps.second.output"}}}
---
name: shaky
steps: {try: {tool: {name: shaky, arguments: {}}, retry: {attempts: 3, initial: 100ms}}}
---
name: crowd
steps: {each: {for_each: {items: [1, 2, 3], as: number}, tool: {name: note, arguments: {value: "=number"}}}}
---
name: sleeper
steps: {before: {tool: {name: note, arguments: {value: 1}}}, pause: {needs: [before], sleep: 200ms}}
---
name: listener
steps: {before: {tool: {name: note, arguments: {value: 1}}}, heard: {needs: [before], wait_for: {signal: go}}}
---
name: hopeless
steps: {try: {tool: {name: hopeless, arguments: {}}}}
---
name: family
steps: {child: {run: {workflow: order}}}
"""
FIRST = {"order": 10, "shaky": 4, "crowd": 3, "sleeper": 3, "listener": 4, "hopeless": 2, "family": 2}
SECOND = {"order": 8, "crowd": 2, "shaky": 2}


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Recording:
    """An installation while its history is made."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.wanted: list[Wanted] = []
        self._stop = threading.Event()
        self._owners: list[threading.Thread] = []
        self._reader, self._producer = kafka.reader(settings), kafka.producer(settings)

    def owner(self, group: str) -> None:
        """Start an orchestrator that owns everything."""
        owner = Orchestrator(self.settings, group)
        self._owners.append(threading.Thread(target=owner.run, args=(self._stop,)))
        self._owners[-1].start()
        until(owner.ready.is_set, "the orchestrator is not ready")

    def end(self) -> None:
        """Stop the orchestrators."""
        self._stop.set()
        for owner in self._owners:
            owner.join(60)
        self._reader.close()

    def send(self, topic: topics.Topic, key: bytes, value: bytes, partition: int | None = None) -> tuple[int, int]:
        """Produce a record and return its partition and offset."""
        places: list[tuple[int, int]] = []

        def acknowledged(error: Any, message: Any) -> None:
            assert error is None
            places.append((message.partition(), message.offset()))

        kafka.produce(self._producer, self.settings, Outgoing(topic, key, value, [], partition), acknowledged)
        assert self._producer.flush(30) == 0
        return places[0]

    def ask(self, request: str, workflow: str, expect: str) -> None:
        """Ask for a run."""
        value = json.dumps({"workflow": workflow, "request_id": request}).encode()
        place = self.send(topics.REQUESTS, request.encode(), value)
        self.wanted.append(Wanted(request, self.settings.topic_prefix + "requests", *place, expect))

    def say(self, request: str, **command: str) -> None:
        """Say something to a run."""
        self.send(topics.REQUESTS, request.encode(), json.dumps({"request_id": request, **command}).encode())

    def finished(self, runs: int) -> bool:
        """Whether so many runs stand in the index."""
        name = kafka.name(self.settings, topics.FINISHED)
        found = {each.key() for at in range(self.settings.partitions) for each in kafka.read_partition(self._reader, name, at, 0)}
        return len(found) >= runs

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition is true, which it never will be once an orchestrator has ended."""

        def met() -> bool:
            assert all(owner.is_alive() for owner in self._owners), "an orchestrator has ended"
            return condition()

        until(met, what)

    def notes(self) -> list[Arrival]:
        """Return what the tools noted."""
        return lines(self.folder / "witness.jsonl", Arrival) or []


def ask_all(recording: Recording, runs: dict[str, int], begin: int = 0) -> None:
    """Ask for so many runs of each workflow."""
    for workflow, count in runs.items():
        for number in range(begin, begin + count):
            expect = {"hopeless": "failed", "listener": ("completed", "cancelled")[number % 2]}.get(workflow, "completed")
            recording.ask(f"{workflow}-{number}", workflow, expect)


def make_history(recording: Recording) -> None:
    """Let one owner do most runs, and two owners the rest; whatever else may come to the topics comes too."""
    recording.owner("orchestrator")
    ask_all(recording, FIRST)
    recording.ask("order-1", "order", "completed")  # asked for twice
    recording.ask("nowhere", "nowhere", "any")  # refused
    recording.send(topics.REQUESTS, b"", b"no request")
    listeners = {ids.run_id(f"listener-{number}") for number in range(FIRST["listener"])}
    recording.until(lambda: listeners <= {each.run_id for each in recording.notes()}, "the listeners have not begun")
    for partition in range(recording.settings.partitions):
        recording.send(topics.INBOX, NOISE, b"noise", partition)
    recording.send(topics.INBOX, ids.run_id("listener-0").encode(), b"noise")
    for number in range(FIRST["listener"]):
        cancelled = number % 2 == 1
        recording.say(f"listener-{number}", **({"command": "cancel"} if cancelled else {"command": "signal", "name": "go"}))
    runs = sum(FIRST.values()) + FIRST["family"]
    recording.until(lambda: recording.finished(runs), "not all runs have ended")
    recording.owner("another-group")
    ask_all(recording, SECOND, begin=100)
    recording.until(lambda: recording.finished(runs + sum(SECOND.values())), "not all runs of two owners have ended")
