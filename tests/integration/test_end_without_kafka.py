"""Processes that are told to end while Kafka is away: they end soon, whatever they were waiting for."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Producer

from events import topics
from infra.embedded.supervisor import Supervisor
from streams import commits, kafka, patience
from streams.app import Loop
from streams.envelope import Outgoing
from streams.processors import intake
from streams.processors.intake_loop import IntakeLoop
from streams.processors.mirror import Mirror
from streams.processors.orchestrator import Orchestrator
from streams.processors.tool_worker import ToolCalls
from streams.processors.worker import Worker
from streams.registry import SpecRegistry
from streams.settings import Settings

RECORD = Outgoing(topics.DEADLETTER, b"k", b"v", [], 0)
SOON_S = 20.0
"""A question that was asked just before may take half of it; `streams/app.py` waits 30 s."""


def loops(settings: Settings) -> dict[str, Loop]:
    """Return the loop of each role."""
    cluster = kafka.connect(settings)

    def prepare() -> tuple[intake.Intake, SpecRegistry]:
        registry = SpecRegistry(settings)
        return intake.Intake(registry, cluster.ids[topics.REQUESTS.name]), registry

    tools = ToolCalls(settings, {})
    return {
        "intake": IntakeLoop(settings, prepare),
        "orchestrator": Orchestrator(settings),
        "tool": Worker(settings, topics.TOOL_CALLS, tools, 8, asyncio.new_event_loop()),
        "mirror": Mirror(settings),
    }


def ended(threads: dict[str, threading.Thread], within_s: float) -> list[str]:
    """Wait for threads and return the names of those that are alive even then."""
    deadline = time.monotonic() + within_s
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    return [name for name, thread in threads.items() if thread.is_alive()]


def kill(kafka_: Supervisor) -> None:
    """Let the broker die."""
    (broker,) = kafka_.status()
    process = broker.started.process()
    assert process is not None
    process.kill()


def test_who_waits_for_kafka_to_begin_ends_when_told(mortal: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given processes that just got partitions when Kafka died; when they are told to end; then none waits for Kafka."""
    asking, dead, real = threading.Barrier(5), threading.Event(), commits.committed

    def ask(*question: Any) -> Any:
        asking.wait(60)
        dead.wait(60)
        return real(*question)

    monkeypatch.setattr(commits, "committed", ask)
    stop, whole = threading.Event(), list[Loop]()

    def work(loop: Loop) -> None:
        with patience.until(stop, 60.0):
            loop.run(stop)
        whole.append(loop)

    threads = {name: threading.Thread(target=work, args=(loop,), daemon=True) for name, loop in loops(mortal.settings).items()}
    for thread in threads.values():
        thread.start()
    asking.wait(60)
    kill(mortal)
    dead.set()
    stop.set()
    assert ended(threads, SOON_S) == []
    assert len(whole) == len(threads), "all ended in order, none by an error"


def test_what_kafka_does_not_take_holds_nobody_up(mortal: Supervisor) -> None:
    """Given records that a dead Kafka did not take, and room for no more; when their process is told to end; then it does."""
    settings, stop = mortal.settings, threading.Event()
    kafka.connect(settings)
    said = dict[str, float]()

    def work(name: str, wait: Callable[[Producer], None], most: int) -> None:
        target = kafka.producer(settings, **{"queue.buffering.max.messages": most})
        with patience.until(stop, 1.0):
            kafka.produce(target, settings, RECORD, kafka.Acks())
            with pytest.raises(patience.EndingError):
                wait(target)
        target.purge()
        said[name] = time.monotonic()

    waits: dict[str, tuple[Callable[[Producer], None], int]] = {
        "acknowledgement": (kafka.flush, 10),
        "room": (lambda target: kafka.produce(target, settings, RECORD, kafka.Acks()), 1),
    }
    kill(mortal)
    threads = {name: threading.Thread(target=work, args=(name, *each), daemon=True) for name, each in waits.items()}
    for thread in threads.values():
        thread.start()
    assert ended(threads, 2) == ["acknowledgement", "room"], "nobody gives up while nobody says so"
    stop.set()
    assert ended(threads, SOON_S) == []
    assert set(said) == set(waits)
