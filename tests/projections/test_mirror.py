"""The JSON mirror in memory: what it writes, whatever the log holds and wherever it is killed."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from projection_histories import BOTH, INBOX_ID, PARTITIONS, TOPIC_IDS, Logs, logs

from events import codec, topics
from events.as_json import as_json, as_line
from events.commands import StartRun
from events.decisions import Decision, FinishedRun, RunCompleted
from events.ids import FIRST_PREV, chain_hash, run_id
from streams.envelope import Incoming, Outgoing
from streams.processors.finished import Place
from streams.processors.mirror import OFFSET, Copy, mirror
from streams.workflow.chain import ends_run


class Reader:
    """One partition's mirror, with what its process loses when it is killed and what it has committed."""

    def __init__(self, partition: int) -> None:
        self.place = Place(INBOX_ID, TOPIC_IDS["decisions"], partition, PARTITIONS)
        self.committed = (0, 0)
        self.index: list[tuple[bytes, bytes]] = []
        self.start()

    def start(self) -> None:
        """Begin where it was committed, as a new process does."""
        self.copy = Copy(self.place, *self.committed)
        self.drain()

    def drain(self) -> None:
        """Read the index on."""
        for offset in range(self.copy.index.end, len(self.index)):
            self.copy.index.read(offset, *self.index[offset])

    def commit(self) -> None:
        """Commit what is mirrored."""
        self.drain()
        self.copy.move_mark()
        self.committed = (self.copy.position, self.copy.mark)


def mirrored(log: Logs, partition: int, rng: random.Random) -> tuple[list[Outgoing], Reader]:
    """Mirror a partition with kills, commits and entries of the index at random moments; return all that was written."""
    reader, written, entries, firsts = Reader(partition), list[Outgoing](), list[tuple[bytes, bytes]](), dict[str, int]()
    accepted = {event.hash for event in log.accepted}
    records = log.partitions[partition]
    known, kills = 0, set(rng.sample(range(1, max(2, len(records))), min(8, max(1, len(records) - 1))))
    while reader.copy.next < len(records):
        offset = reader.copy.next
        value = records[offset]
        record = Incoming(
            "decisions", partition, offset, offset, b"key", value, {"ce_type": b"x", "content-type": b"application/avro"}
        )
        if (made := reader.copy.take(record)) is not None:
            assert offset >= reader.committed[0], "what is committed isn't written again"
            written.append(made)
        if offset >= known and value is not None and chain_hash(codec.unframed(value)) in accepted:
            decision = codec.decode(value, Decision)
            firsts.setdefault(decision.run_id, offset)
            if ends_run(decision):
                entry = FinishedRun(TOPIC_IDS["decisions"], firsts[decision.run_id])
                entries.append((decision.run_id.encode(), codec.encode(entry)))
        known = max(known, offset + 1)
        chance = rng.random()
        if chance < 0.2 and entries:  # the orchestrator indexes it some time later
            reader.index.append(entries.pop(0))
        elif chance < 0.5:
            reader.commit()
        if reader.copy.next in kills:
            kills.remove(reader.copy.next)
            reader.start()
    return written, reader


@pytest.mark.parametrize("seed", range(8))
def test_each_accepted_decision_is_there_in_order_wherever_it_is_killed(seed: int) -> None:
    """Given losers, repetitions, garbage and old decisions in the log, then what counts is mirrored, each once or more.

    The first ones are in the log's order, what is repeated was not committed and is the same byte for byte, and nothing else is
    there.
    """
    log, rng = logs(seed, 14, 0.3, BOTH), random.Random(seed)  # noqa: S311 - reproducible
    for partition in range(PARTITIONS):
        written, reader = mirrored(log, partition, rng)
        first: dict[int, Outgoing] = {}
        for each in written:
            offset = int(dict(each.headers)[OFFSET])
            assert first.setdefault(offset, each) == each, "a repetition is the same"
        expected = [each for each in log.accepted if topics.partition_for(each.decision.run_id.encode(), PARTITIONS) == partition]
        assert list(first) == sorted(first)
        assert [json.loads(each.value or b"") for each in first.values()] == [as_json(each.decision) for each in expected]
        assert reader.committed[1] <= reader.committed[0]


def test_the_mark_waits_for_the_index_of_finished_runs() -> None:
    """Given runs that are all over, then the mark stands at the first of which the index doesn't say so, then at the end."""
    log = logs(3, 12, 0.0)
    assert all(state.over for state in log.states.values())
    for partition, records in enumerate(log.partitions):
        reader, firsts = Reader(partition), dict[str, int]()
        for offset, value in enumerate(records):
            firsts.setdefault(codec.decode(value, Decision).run_id, offset)
            reader.copy.take(Incoming("decisions", partition, offset, offset, b"key", value))
        for run, first in sorted(firsts.items(), key=lambda item: item[1]):
            reader.commit()
            assert reader.committed == (len(records), first)
            reader.index.append((run.encode(), codec.encode(FinishedRun(TOPIC_IDS["decisions"], first))))
        reader.commit()
        assert reader.committed == (len(records), len(records))
        assert not reader.copy._chain.heads


def decision(**more: Any) -> Decision:
    given = StartRun("a request", "w", "digest", more.pop("text", "{}"))
    effects = (RunCompleted(more.pop("output", "1")),)
    return Decision(run_id("a"), 1, FIRST_PREV, INBOX_ID, 0, 5, given, effects)


def test_a_broken_run_stays_set_aside_after_a_start() -> None:
    """Given a decision that extends nothing, then nothing of its run is mirrored, also by who starts anew behind it."""
    reader, partition = Reader(0), topics.partition_for(run_id("a").encode(), PARTITIONS)
    reader.place = replace(reader.place, partition=partition)
    reader.start()
    broken = replace(decision(), seq=5, prev=b"p" * 32)
    assert reader.copy.take(replace(incoming(broken), partition=partition, offset=0)) is None
    reader.commit()
    reader.start()
    behind = [broken, decision()]
    for offset in range(reader.copy.next, 2):  # as it is read from the mark on
        assert reader.copy.take(replace(incoming(behind[offset]), partition=partition, offset=offset)) is None


def incoming(of: Decision) -> Incoming:
    headers = {"ce_id": b"1", "content-type": b"application/avro", "foldflow_seq": b"1"}
    return Incoming("decisions", 1, 17, 1234, b"run", codec.encode(of), headers)


def test_place_key_time_and_headers_are_the_decision_s() -> None:
    """Given a decision, then its mirror is in the same partition, with key, time and headers, and says where it comes from."""
    made = mirror(incoming(decision(output='{"a": [1]}')), decision(output='{"a": [1]}'))
    assert (made.topic, made.partition, made.key, made.at_ms) == (topics.DECISIONS_JSON, 1, b"run", 1234)
    assert dict(made.headers) == {
        "ce_id": b"1",
        "foldflow_seq": b"1",
        "content-type": b"application/json",
        "foldflow_offset": b"17",
    }
    assert json.loads(made.value or b"")["effects"] == [{"type": "RunCompleted", "output": {"a": [1]}}]


@pytest.mark.parametrize(
    "text", ["NaN", '{"a": Infinity}', "1e999", '"\\ud800"', "[" * 980 + "]" * 980, "[" * 5000, "no JSON", '"é"']
)
def test_any_payload_has_a_line_of_json(text: str) -> None:
    """What anybody can write as a payload never stops the mirror: it is one line of JSON by its standard."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = as_line(decision(output=text))
    assert b"\n" not in line
    said = json.loads(line.decode("utf-8"), parse_constant=refuse)["effects"][0]["output"]
    assert said == text if text != '"é"' else "é"


def test_what_would_be_too_large_as_json_says_so() -> None:
    """Given a decision that is larger as JSON than a record may be, then its mirror says what it is, without what it holds."""
    large = decision(output='"' + "\\u0001" * 1_600_000 + '"')
    made = mirror(incoming(large), large)
    said = json.loads(made.value or b"")
    assert len(made.value or b"") < 1000
    assert said["too_large"] > topics.MAX_VALUE_BYTES
    assert (said["seq"], said["input"], said["effects"]) == (1, {"type": "StartRun"}, [{"type": "RunCompleted"}])
