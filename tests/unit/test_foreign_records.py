"""What others write on an owner's topics: nothing of it stops a partition, and nothing that newer code wrote is passed over."""

import struct
from dataclasses import replace

import pytest

from events import catalog, codec
from events.commands import StartRun
from events.decisions import Decision, FinishedRun, OutputChanged, RetryScheduled, RunCompleted
from events.errors import NewerCodeError, NotDecodableError
from events.failure import Failure
from events.ids import FIRST_PREV, run_id
from events.results import InboxMessage
from events.snapshots import RunSnapshot
from streams.envelope import Incoming
from streams.processors.open_runs import SnapshotDamagedError
from streams.processors.tenure import Commit, Place, Tenure
from streams.workflow.chain import Verdict
from streams.workflow.snapshot import keep
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL

RUN = run_id("q")
SPEC = WorkflowSpec.model_validate({"name": "w", "steps": {"a": {"tool": {"name": "echo"}}}})
START = StartRun("q", SPEC.name, SPEC.digest, "{}")
UNKNOWN = struct.pack(">bI", 0, 7) + b"\x00"
"""Six bytes, well framed, in a schema that nobody here knows."""
SNAPSHOT = codec.encode(keep(RUN, replace(INITIAL, seq=2, head=b"h" * 16), b"d" * 16, 0))


def tenure(*, newer: bool = False) -> Tenure:
    """Return a tenure at its beginning. `newer`: whether newer code is known to write what is unknown here."""
    place = Place(b"i" * 16, b"d" * 16, 0, 1)
    return Tenure(place, {SPEC.digest: SPEC}.get, Commit(0, 0), newer=lambda schema_id, *_: newer and schema_id == 7)


def asked(offset: int = 0) -> Incoming:
    return Incoming("inbox", 0, offset, 1000, RUN.encode(), codec.encode(InboxMessage(RUN, START)))


def test_what_newer_code_wrote_is_never_passed_over() -> None:
    """Decisions, their index, snapshots and inputs: the owner stops in front of each."""
    with pytest.raises(NewerCodeError, match=r"decision 4 .*upgrade this process"):
        tenure(newer=True).read(4, UNKNOWN)
    with pytest.raises(NewerCodeError, match="offset 4 of the index"):
        tenure(newer=True).index_read(4, RUN.encode(), UNKNOWN)
    with pytest.raises(NewerCodeError, match="snapshot"):
        tenure(newer=True).snapshot_read(f"{RUN}/3".encode(), UNKNOWN, {})
    owner = tenure(newer=True)
    owner.begin(0)
    with pytest.raises(NewerCodeError, match="input 0"):
        owner.take(Incoming("inbox", 0, 0, 1000, RUN.encode(), UNKNOWN))
    assert (owner.position, owner.runs) == (0, {})


def test_six_bytes_of_anybody_stop_nothing() -> None:
    """A schema id that nobody published is garbage like any other."""
    owner = tenure()
    owner.snapshot_read(f"{RUN}/3".encode(), UNKNOWN, {})
    with pytest.raises(NotDecodableError):
        owner.index_read(0, RUN.encode(), UNKNOWN)
    assert owner.read(0, UNKNOWN) is Verdict.BROKEN
    owner.begin(1)
    assert len(owner.take(asked())) == 2
    assert (owner.finished.end, owner.ignored, len(owner.shelf)) == (1, 1, 0)


@pytest.mark.parametrize("key", ["x/²", f"x/{'9' * 5000}", "x/99999999999999999999", "x/-1", "/", "", "x"])
def test_keys_that_are_none_of_a_snapshot(key: str) -> None:
    """What is no number, or none that a database can hold, names no decision."""
    owner = tenure()
    owner.snapshot_read(key.encode(), SNAPSHOT, {})
    owner.snapshot_read(key.encode(), None, {})
    assert len(owner.shelf) == 0


@pytest.mark.parametrize("due", [b"\xff", b"soon", b"9" * 30, b"-5", None])
def test_a_header_that_is_no_time_means_never(due: bytes | None) -> None:
    """The run has no timer then, but it is there."""
    owner = tenure()
    owner.snapshot_read(f"{RUN}/2".encode(), SNAPSHOT, {"foldflow_due": due})
    assert (len(owner.shelf), owner.shelf.next_due()) == (1, None)


DAMAGED = {
    "cut": SNAPSHOT[:40],
    "nonsense": SNAPSHOT[:5] + b"\xff" * 60,
    "of another decision": codec.encode(keep(RUN, replace(INITIAL, seq=9), b"d" * 16, 0)),
    "of another run": codec.encode(keep("another", replace(INITIAL, seq=2), b"d" * 16, 0)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_snapshot_is_told_and_can_be_done_without(name: str) -> None:
    """Whoever needs it is told which run's it is; another tenure that distrusts it deletes it, once it has the decisions."""
    owner = tenure()
    owner.snapshot_read(f"{RUN}/2".encode(), DAMAGED[name], {})
    owner.begin(0)
    with pytest.raises(SnapshotDamagedError) as caught:
        owner.take(asked())
    assert caught.value.run_id == RUN
    again = replace(tenure(), distrusted=frozenset({RUN}))
    again.snapshot_read(f"{RUN}/2".encode(), DAMAGED[name], {})
    again.begin(0)
    decision, _ = again.take(asked())
    again.settle([0])
    assert decision.key == RUN.encode()
    again.index_entries()
    assert again.keep_idle(0) == [], "not before the decisions are read and committed"
    again.commit()
    assert [(each.key, each.value) for each in again.keep_idle(0)] == [(f"{RUN}/2".encode(), None)]


FORGED = (
    RetryScheduled("none", 1, Failure("timeout", ""), 5),
    OutputChanged("none"),
    RunCompleted("[" * 100_000),
)


@pytest.mark.parametrize("effect", FORGED, ids=lambda each: type(each).__name__)
def test_a_forged_decision_sets_its_run_aside_and_nothing_else(effect: object) -> None:
    """It extends its run's empty chain, so it counts; what fits no state must not end whoever takes over."""
    decision = Decision(RUN, 1, FIRST_PREV, b"i" * 16, 0, 1000, START, (effect,))  # type: ignore[arg-type]
    owner = tenure()
    owner.read(0, codec.encode(decision))
    owner.begin(1)
    other = InboxMessage(run_id("p"), replace(START, request_id="p"))
    assert len(owner.take(Incoming("inbox", 0, 1, 1000, run_id("p").encode(), codec.encode(other)))) == 2


def test_every_schema_of_this_code_is_its_own() -> None:
    """No published schema of ours is unknown to us: `newer` is asked for nothing that we write."""
    assert all(codec.unknown_schema(codec.FRAME.pack(0, entry.id) + b"x") is None for entry in catalog.ENTRIES.values())
    assert codec.unknown_schema(SNAPSHOT) is None
    assert codec.kind_of(SNAPSHOT) is RunSnapshot
    assert codec.encode(FinishedRun(b"d" * 16, 1))[0] == 0
