import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from events import codec
from events.calls import CancelCall, LlmCall, ToolCall
from events.topics import DEADLETTER, TOOL_CALLS
from streams import kafka
from streams.envelope import Incoming, Outgoing, dead_letter
from streams.processors.cancellations import Cancellations
from streams.processors.llm_worker import LlmCalls
from streams.processors.tool_worker import ToolCalls
from streams.processors.worker import Worker, _Flight
from streams.settings import Settings
from streams.topology import TOPOLOGY
from tools.context import ToolContext
from tools.registry import load

NOWHERE = Settings(bootstrap_servers="127.0.0.1:1")
CALL = Incoming("foldflow.tool.calls", 0, 0, 0, b"call", b"value")


class Calls:
    """A handler that waits for ever, and notes what happens to it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def __call__(self, record: Incoming) -> Outgoing:
        """Make a call, without end."""
        self.log.append("made")
        await asyncio.Event().wait()
        raise AssertionError(record)

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Return any record."""
        self.log.append(f"{reason} {'never made' if latency_ms is None else 'given up'}")
        return dead_letter(record, "any", "", "test")


class Here:
    """A worker without its thread: `log` is its handler's, `worker._flights` what it has in hand."""

    def __init__(self, cancellations: Cancellations) -> None:
        calls = Calls()
        self.worker = Worker(NOWHERE, TOOL_CALLS, calls, 8, asyncio.get_running_loop())
        self.worker.producer, self.worker.cancellations = kafka.producer(NOWHERE), cancellations
        self.log = calls.log

    def take(self) -> None:
        """Take a call from the queue."""
        self.worker._flying += 1
        self.worker._start([_Flight(CALL, b"digest")])

    async def land(self) -> None:
        """Wait until nothing is in flight; what would be sent stays in the producer."""
        tasks = [flight.task for flight in self.worker._flights if flight.task is not None]
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    @property
    def sent(self) -> bool:
        """Whether a result was sent: if so, the producer reports that it goes nowhere."""
        self.worker.producer.purge()
        self.worker.producer.flush(5)
        return self.worker._failure is not None


@pytest.fixture
def cancellations() -> Iterator[Cancellations]:
    found = Cancellations(NOWHERE, most=2)
    yield found
    found.close()


def cancelled(call: str, reason: str = "why") -> bytes:
    return codec.encode(CancelCall(call, "run", "step", reason))


def test_a_call_can_be_cancelled_between_its_taking_and_its_start(cancellations: Cancellations) -> None:
    """It isn't made, and has its result: a task that is cancelled before it has run would never run."""

    async def check() -> None:
        here = Here(cancellations)
        here.take()
        here.worker._give_up({b"call": "why"})
        await here.land()
        assert (here.log, here.sent, here.worker._flying) == (["why never made"], True, 0)

    asyncio.run(check())


def test_a_call_is_given_up_once(cancellations: Cancellations) -> None:
    """One result, after the handler was told; other calls' cancellations don't touch it."""

    async def check() -> None:
        here = Here(cancellations)
        here.take()
        await asyncio.sleep(0)
        here.worker._give_up({b"other": "no"})
        await asyncio.sleep(0)
        assert here.log == ["made"]
        here.worker._give_up({b"call": "why"})
        await here.land()
        assert (here.log, here.sent, here.worker._flying) == (["made", "why given up"], True, 0)

    asyncio.run(check())


def test_the_end_of_the_worker_sends_nothing(cancellations: Cancellations) -> None:
    """Neither for a call in flight nor for one that was being given up just then: both are made again, or not, by the next."""

    async def check() -> None:
        here = Here(cancellations)
        here.take()
        await asyncio.sleep(0)
        here.worker._cancel()
        await here.land()
        here.take()
        await asyncio.sleep(0)
        here.worker._give_up({b"call": "why"})
        here.worker._cancel()
        await here.land()
        assert (here.log, here.sent) == (["made", "made"], False)

    asyncio.run(check())


def test_the_newest_are_remembered(cancellations: Cancellations) -> None:
    """As many as were asked for; each is news once; what can't be read is passed over."""
    assert cancellations._take(cancelled("a")) == (b"a", "why")
    assert cancellations._take(cancelled("b")) == (b"b", "why")
    assert cancellations._take(cancelled("b", "again")) is None
    assert cancellations._take(b"nonsense") is None
    assert cancellations._take(None) is None
    assert cancellations._take(cancelled("c")) == (b"c", "why")
    assert [cancellations.reason(call) for call in (b"a", b"b", b"c", None)] == [None, "why", "why", None]


def test_a_long_reason_is_cut(cancellations: Cancellations) -> None:
    """So that what is remembered is bounded."""
    cancellations._take(cancelled("a", "x" * 1_000_000))
    assert cancellations.reason(b"a") == "x" * 500


@pytest.mark.parametrize("handler", [ToolCalls(NOWHERE, {}), LlmCalls(NOWHERE)])
def test_what_is_no_call_is_a_dead_letter_when_it_is_cancelled_too(handler: ToolCalls | LlmCalls) -> None:
    """Its bytes are kept, as at any other time."""
    assert handler.cancelled(CALL, "why", None).topic is DEADLETTER


def test_both_workers_read_cancellations() -> None:
    """And the orchestrator writes them."""
    names = {processor.name for processor in TOPOLOGY if "cancellations" in {topic.name for topic in processor.views}}
    assert names == {processor.name for processor in TOPOLOGY if processor.source.kind in {ToolCall, LlmCall}}
    writers = {processor.name for processor in TOPOLOGY if "cancellations" in {topic.name for topic in processor.sinks}}
    assert writers == {"orchestrator"}


TOOLS = """
import asyncio, threading, time
from tools.context import ToolContext

BEGUN, ENDED = threading.Event(), []

def sync(context: ToolContext) -> None:
    BEGUN.set()
    end = time.monotonic() + 10
    while not context.cancelled() and time.monotonic() < end:
        time.sleep(0.001)
    ENDED.append(context.cancelled())

async def on_the_loop(context: ToolContext) -> None:
    BEGUN.set()
    try:
        await asyncio.sleep(10)
    finally:
        ENDED.append(True)
"""


@pytest.mark.parametrize("name", ["sync", "on_the_loop"])
def test_a_tool_sees_in_its_context_that_nobody_waits(name: str, tmp_path: Path) -> None:
    """Not before its call is cancelled; a thread sees it too, and can end."""
    path = tmp_path / "waiting.py"
    path.write_text(TOOLS)
    tool = load([path])[name]
    context = ToolContext("c", "r", "s", 1, tmp_path)

    async def check() -> None:
        task = asyncio.create_task(tool.call({}, context))
        assert await asyncio.to_thread(tool._function.__globals__["BEGUN"].wait, 10)
        assert not context.cancelled()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert context.cancelled()

    asyncio.run(check())  # waits for the tool's thread
    assert tool._function.__globals__["ENDED"] == [True]
