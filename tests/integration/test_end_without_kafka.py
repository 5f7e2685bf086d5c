"""Processes that are told to end while they wait for Kafka: they end soon, whatever for, and what they began is others'."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from confluent_kafka import Producer
from one_worker import tool_call
from served_api import histories, until, write

from events import topics
from infra.embedded.supervisor import Supervisor
from streams import commits, kafka, patience
from streams.app import Loop
from streams.envelope import Incoming, Outgoing
from streams.processors import intake
from streams.processors.intake_loop import IntakeLoop, judged
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


def interrupted(loop: Any, reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a processor run, and tell it to end while it reads what it must know of the partitions that it just got."""
    stop, real = threading.Event(), getattr(loop, reads)

    def told(*arguments: Any) -> Any:
        stop.set()
        patience.check("a test")
        return real(*arguments)

    monkeypatch.setattr(loop, reads, told)
    with patience.until(stop, 60.0):
        loop.run(stop)
    assert stop.is_set()


@pytest.mark.usefixtures("kafka")
def test_a_mirror_told_to_end_while_it_takes_over_leaves_out_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given runs half mirrored; when one takes over, is told to end meanwhile, and another follows; then nothing lacks."""
    own = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(own, also=(topics.DECISIONS_JSON,))
    log = histories.logs(5, 30, 0.2, histories.BOTH)
    half = len(log.records()) // 2
    places = range(histories.PARTITIONS)

    def mirrored() -> set[tuple[int, bytes | None]]:
        with closing(kafka.reader(own)) as source:
            name = kafka.name(own, topics.DECISIONS_JSON)
            found = kafka.read_partitions(source, name, dict.fromkeys(places, 0))
            return {(each.partition() or 0, each.value()) for each in found}

    def mirror_until(count: int) -> None:
        loop, stop = Mirror(own), threading.Event()
        thread = threading.Thread(target=loop.run, args=(stop,))
        thread.start()
        try:
            until(lambda: sum(copy.position for copy in [*loop.copies.values()]) == count, 60)
        finally:
            stop.set()
            thread.join(60)

    write(own, log, 0, half)
    mirror_until(half)
    write(own, log, half)
    interrupted(Mirror(own), "_read_index", monkeypatch)
    mirror_until(len(log.records()))
    assert len(mirrored()) == len(log.accepted)


@pytest.mark.usefixtures("kafka")
def test_a_worker_told_to_end_while_it_looks_back_makes_no_call(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given calls that wait; when a worker that gets them is told to end before it knows what is answered; then it makes none."""
    kafka.connect(settings)
    kafka.send(settings, [tool_call(f"call {number}", "echo", call=str(number)) for number in range(20)])
    event_loop = asyncio.new_event_loop()
    worker = Worker(settings, topics.TOOL_CALLS, ToolCalls(settings, {}), 8, event_loop)
    started, known, leave = list[Any](), list[tuple[int, ...]](), worker._leave
    monkeypatch.setattr(worker, "_start", started.append)
    monkeypatch.setattr(worker, "_leave", lambda: (known.append(worker.partitions), leave()))
    interrupted(worker, "_look_back", monkeypatch)
    event_loop.run_until_complete(asyncio.sleep(0.1))
    event_loop.close()
    assert started == []
    assert known == [()], "records of partitions that aren't known are passed over"


def test_a_request_in_hand_is_no_dead_letter_because_its_judge_is_told_to_end() -> None:
    """Whoever takes it next judges it."""

    class Told:
        """Asks Kafka for what it doesn't know, when it is told to end."""

        def refuse_newer(self, *_: Any) -> None:
            """Find nothing newer."""

        def check(self, _: Any) -> Any:
            """Wait for Kafka."""
            patience.check("a workflow")

    stop = threading.Event()
    stop.set()
    with patience.until(stop, 0.0), pytest.raises(patience.EndingError):
        judged(Told(), Told(), Incoming("requests", 0, 0, 1, b"k", b"v", {}))  # type: ignore[arg-type]
