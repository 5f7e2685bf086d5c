"""Snapshots on a real Kafka are what the log says; one that isn't is found."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from snapshot_fold import Compared, compare_all

from events import codec, topics
from events.commands import SignalReceived, StartRun
from events.decisions import Decision
from events.ids import chain_hash, run_id
from events.results import InboxMessage, Input
from events.snapshots import RunSnapshot
from streams import kafka, registry
from streams.envelope import Outgoing, envelope
from streams.processors.open_runs import DUE
from streams.processors.orchestrator import Orchestrator
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict
from streams.workflow.spec import WorkflowSpec

pytestmark = pytest.mark.timeout(600)

RUNS = 24
SPEC = WorkflowSpec.model_validate(
    {
        "name": "snapshot-test",
        "time_limit": "30d",
        "steps": {
            "order": {"transform": {"id": "=input.i", "text": "x"}},
            "nap": {"needs": ["order"], "sleep": "20d"},
            "many": {
                "needs": ["order"],
                "for_each": {"items": [1, 2, 3], "as": "x"},
                "wait_for": {"signal": "='many' + string(x)"},
            },
            "paid": {"needs": ["order"], "wait_for": {"signal": "paid", "timeout": "3d"}},
            "sent": {"needs": ["paid"], "wait_for": {"signal": "sent"}},
            "done": {"needs": ["sent"], "transform": "=steps.order.output.id"},
        },
        "output": "=steps.done.output",
    }
)
RUN_IDS = [run_id(f"snapshot-{number}") for number in range(RUNS)]


def send(settings: Settings, inputs: list[tuple[str, Input]]) -> None:
    """Put inputs into the inbox."""
    kafka.send(
        settings,
        [envelope(topics.INBOX, run, InboxMessage(run, each), source="test", identity=run, run_id=run) for run, each in inputs],
    )


def starts() -> list[tuple[str, Input]]:
    """Return what starts all runs."""
    values = [(f"snapshot-{number}", json.dumps({"i": number})) for number in range(RUNS)]
    return [(run_id(request), StartRun(request, SPEC.name, SPEC.digest, given)) for request, given in values]


def signals(name: str, runs: list[str]) -> list[tuple[str, Input]]:
    """Return a signal for each run."""
    return [(run, SignalReceived(f"{run}/{name}", name, None, "5", "test")) for run in runs]


@contextmanager
def orchestrator(settings: Settings) -> Iterator[None]:
    """Run an orchestrator, and let it settle at the end."""
    stop, owner = threading.Event(), Orchestrator(settings)
    thread = threading.Thread(target=owner.run, args=(stop,))
    thread.start()
    try:
        assert owner.ready.wait(60)
        yield
    finally:
        stop.set()
        thread.join(60)


def wait_for(condition: Callable[[], bool], patience_s: float = 120) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.1)


def kept(settings: Settings) -> dict[str, RunSnapshot]:
    """Return the newest snapshot of each run that is not deleted."""
    cluster, source = kafka.connect(settings), kafka.reader(settings)
    found: dict[bytes, bytes | None] = {}
    with closing(source):
        for partition in range(cluster.partitions[topics.SNAPSHOTS.name]):
            for message in kafka.read_partition(source, kafka.name(settings, topics.SNAPSHOTS), partition, 0):
                found[message.key() or b""] = message.value()
    snapshots = [codec.decode(value, RunSnapshot) for value in found.values() if value is not None]
    return {each.run_id: each for each in sorted(snapshots, key=lambda each: each.seq)}


def history(settings: Settings) -> tuple[dict[str, list[Decision]], dict[str, str]]:
    """Return the decisions that count by run, and the breaks that a reader from offset 0 on finds."""
    cluster, source = kafka.connect(settings), kafka.reader(settings)
    accepted: dict[str, list[Decision]] = {}
    breaks: dict[str, str] = {}
    with closing(source):
        for partition in range(cluster.partitions[topics.DECISIONS.name]):
            chain = Chain()
            for message in kafka.read_partition(source, kafka.name(settings, topics.DECISIONS), partition, 0):
                decision = codec.decode(message.value(), Decision)
                real = chain_hash(codec.unframed(message.value() or b""))
                if chain.judge(message.offset() or 0, decision, real) is Verdict.ACCEPTED:
                    accepted.setdefault(decision.run_id, []).append(decision)
            breaks |= chain.broken
    return accepted, breaks


@pytest.fixture
def waiting(settings: Settings) -> Settings:
    """Return the settings of a cluster on which runs wait out of memory; nothing runs any more."""
    found = settings.model_copy(update={"idle_after_s": 0.3})
    kafka.connect(found)
    registry.publish(found, [SPEC])
    with orchestrator(found):
        send(found, starts())
        wait_for(lambda: len(kept(found)) == RUNS)
        send(
            found,
            [*signals("paid", RUN_IDS[: RUNS // 2]), *signals("many2", RUN_IDS[RUNS // 4 :]), *signals("odd", RUN_IDS[::3])],
        )
        # Everybody has more than its first decision by then, but for a few.
        wait_for(lambda: sum(each.seq > 1 for each in kept(found).values()) > RUNS * 3 // 4)
    return found


def test_every_snapshot_is_the_fold_of_its_decisions(waiting: Settings) -> None:
    """Whatever stands on `snapshots` is what the decisions up to there lead to, byte for byte; after a takeover as well."""
    first = compare_all(waiting)
    assert (first.wrong, first.same >= RUNS) == ({}, True)
    with orchestrator(waiting):
        send(waiting, signals("many1", RUN_IDS))
        wait_for(lambda: all(each.seq > 2 for each in kept(waiting).values()))
    second = compare_all(waiting)
    assert (second.wrong, second.same >= RUNS) == ({}, True)
    print(f"{first.same} and {second.same} snapshots are the fold")  # noqa: T201 - shown with -s


def changed(kept_: RunSnapshot) -> RunSnapshot:
    """Return a snapshot in which a step's output is another one."""
    steps = tuple(replace(step, output='{"id":77,"text":"x"}') if step.step == "order" else step for step in kept_.steps)
    return replace(kept_, steps=steps)


FAULTS: dict[str, Callable[[RunSnapshot], RunSnapshot]] = {
    "steps": changed,
    "head": lambda each: replace(each, head=bytes(32)),
    "first_offset": lambda each: replace(each, first_offset=each.first_offset + 1),
    "limit_due": lambda each: replace(each, limit_due=each.limit_due + 1),
}


def plant(settings: Settings, snapshot: RunSnapshot, *, instead: bool = False) -> str:
    """Write a snapshot as an orchestrator does, beside the one that is there or instead of it; return its key."""
    key = f"{snapshot.run_id}/{snapshot.seq}"
    partitions = kafka.connect(settings).partitions[topics.DECISIONS.name]
    where = topics.partition_for(snapshot.run_id.encode(), partitions)
    headers = [(DUE, str(snapshot.due).encode())]
    values = [None, codec.encode(snapshot)] if instead else [codec.encode(snapshot)]
    kafka.send(settings, [Outgoing(topics.SNAPSHOTS, key.encode(), value, headers, where) for value in values])
    return key


def test_a_snapshot_that_is_not_the_fold_is_found(waiting: Settings) -> None:
    """Given snapshots with a changed field each, and one of a decision that doesn't exist, then the comparison names them."""
    honest = kept(waiting)
    expected = {}
    for run, (field, fault) in zip(RUN_IDS, FAULTS.items(), strict=False):
        expected[plant(waiting, fault(honest[run]))] = f"differs from the fold in {field}"
    ahead = honest[RUN_IDS[-1]]
    expected[plant(waiting, replace(ahead, seq=ahead.seq + 5))] = "there is no such decision that counts"
    found: Compared = compare_all(waiting)
    assert found.wrong == expected
    assert found.same >= RUNS - len(FAULTS)


def test_readers_notice_who_goes_on_from_a_foreign_head(waiting: Settings) -> None:
    """Given a snapshot with another head, when its run goes on, then each reader finds a break and sets aside that run alone."""
    honest = kept(waiting)
    forged = RUN_IDS[0]
    plant(waiting, replace(honest[forged], head=b"f" * 32), instead=True)
    with orchestrator(waiting):
        send(waiting, [*signals("many3", RUN_IDS), *signals("sent", RUN_IDS)])
        wait_for(lambda: all(each[-1].seq >= honest[run].seq + 2 for run, each in history(waiting)[0].items() if run != forged))
        wait_for(lambda: bool(history(waiting)[1]))
    accepted, breaks = history(waiting)
    assert set(breaks) == {forged}
    assert accepted[forged][-1].seq == honest[forged].seq
