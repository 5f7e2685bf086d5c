"""Snapshots against the log: what is kept of a run must be, byte for byte, what its decisions from offset 0 on lead to."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field

from events import codec, topics
from events.decisions import Decision
from events.errors import NotDecodableError
from events.ids import chain_hash
from events.snapshots import RunSnapshot
from streams import kafka
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.snapshot import keep
from streams.workflow.state import INITIAL, RunEvent, RunState


@dataclass
class Compared:
    """What came of the comparison: how many snapshots are what the fold says, and what is wrong with others, by key."""

    same: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


def compare(
    decisions: Iterable[tuple[int, bytes | None]], snapshots: dict[str, list[bytes]], decisions_topic_id: bytes, found: Compared
) -> None:
    """Compare the snapshots of one partition (by key, `run_id/seq`) with the fold of its decisions (with offsets, from 0 on).

    A key has several when it was written again: an owner takes the first one, or the last where the topic was compacted.
    """
    left = dict(snapshots)
    of_run: dict[str, set[int]] = defaultdict(set)
    for key in snapshots:
        run_id, _, seq = key.rpartition("/")
        of_run[run_id].add(int(seq))
    chain, states = Chain(), dict[str, RunState]()
    for offset, value in decisions:
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            continue
        event = RunEvent(decision, chain_hash(codec.unframed(value or b"")))
        if chain.judge(offset, decision, event.hash) is not Verdict.ACCEPTED or decision.run_id not in of_run:
            continue
        state = states[decision.run_id] = evolve(states.get(decision.run_id, INITIAL), event)
        if state.seq in of_run[decision.run_id]:
            key = f"{decision.run_id}/{state.seq}"
            first = chain.heads[decision.run_id].first
            problems = [difference(each, decision.run_id, state, decisions_topic_id, first) for each in left.pop(key)]
            if wrong := next((problem for problem in problems if problem), None):
                found.wrong[key] = wrong
            else:
                found.same += 1
    for key in left:
        found.wrong[key] = "there is no such decision that counts"


def difference(value: bytes, run_id: str, state: RunState, decisions_topic_id: bytes, first: int | None) -> str | None:
    """Say in what a snapshot's bytes are not those of the folded state; None: they are."""
    if state.over:
        return "the run is over with this decision"
    expected = codec.encode(keep(run_id, state, decisions_topic_id, -1 if first is None else first))
    if value == expected:
        return None
    try:
        kept, wanted = codec.decode(value, RunSnapshot), codec.decode(expected, RunSnapshot)
    except NotDecodableError as error:
        return str(error)
    names = [name for name in RunSnapshot.__dataclass_fields__ if getattr(kept, name) != getattr(wanted, name)]
    return f"differs from the fold in {', '.join(names) or 'its bytes'}"


def compare_all(settings: Settings) -> Compared:
    """Compare every snapshot that is not deleted with the decisions on a cluster."""
    cluster, source, found = kafka.connect(settings), kafka.reader(settings), Compared()
    with closing(source):
        for partition in range(cluster.partitions[topics.SNAPSHOTS.name]):
            snapshots: dict[str, list[bytes]] = {}
            for message in kafka.read_partition(source, kafka.name(settings, topics.SNAPSHOTS), partition, 0):
                key, value = (message.key() or b"").decode(), message.value()
                if value is None:
                    snapshots.pop(key, None)
                else:
                    snapshots.setdefault(key, []).append(value)
            records = kafka.read_partition(source, kafka.name(settings, topics.DECISIONS), partition, 0)
            decisions = ((message.offset() or 0, message.value()) for message in records)
            compare(decisions, snapshots, cluster.ids[topics.DECISIONS.name], found)
    return found
