"""Dead letters on a real Kafka, from being one to being redriven or discarded, by the command and by the read API."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from events import ids, topics
from events.decisions import DeadLetterSettled
from events.topics import MAX_VALUE_BYTES
from infra.cli.letters import Letters, Settler, source_topic
from projections import deadletters
from projections.projector import Projector
from streams import kafka
from streams.envelope import Incoming, dead_letter, envelope
from streams.kafka import Cluster
from streams.settings import Settings


@pytest.fixture
def cluster(settings: Settings) -> Cluster:
    """Make topics of this test's own."""
    return kafka.connect(settings)


@pytest.fixture
def letters(settings: Settings, cluster: Cluster) -> Iterator[Letters]:
    """Connect to them."""
    found = Letters(settings, cluster)
    yield found
    found.close()


def died(settings: Settings, topic: topics.Topic, offset: int, reason: str = "unknown_workflow", **record: Any) -> str:
    """Write a dead letter as processors do, and return its place."""
    name = kafka.name(settings, topic)
    message = Incoming(name, 0, offset, 1_700_000_000_000, **{"key": b"key", "value": b"{}", "headers": {}, **record})
    kafka.send(settings, [dead_letter(message, reason, "what was wrong", "test", request_id="q", run_id=ids.run_id("q"))])
    return f"{name}/0/{offset}"


def foldflow(settings: Settings, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Call the command as people do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= {"FOLDFLOW_BOOTSTRAP_SERVERS": settings.bootstrap_servers, "FOLDFLOW_TOPIC_PREFIX": settings.topic_prefix}
    command = [sys.executable, "-m", "infra.cli.main", "deadletters", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def stored(settings: Settings, cluster: Cluster, topic: topics.Topic) -> list[Incoming]:
    """Return all that stands on a topic."""
    with closing(kafka.reader(settings)) as source:
        return [
            kafka.incoming(message)
            for partition in range(cluster.partitions[topic.name])
            for message in kafka.read_partition(source, kafka.name(settings, topic), partition, 0)
        ]


def test_redriven_by_the_command(settings: Settings, cluster: Cluster) -> None:
    """The same bytes, key and headers on the key's partition; who did it and why is an event; a second time it is refused."""
    value, headers = b'{"workflow": "x", "request_id": "q"}', {"a": None, "b": b"\xff", "traceparent": b"00"}
    place = died(settings, topics.REQUESTS, 5, key=b"somebody", value=value, headers=headers)
    dry = foldflow(settings, "redrive", "requests/0/5", "--dry-run")
    assert (dry.returncode, "would be redriven" in dry.stderr) == (0, True), dry.stderr
    assert stored(settings, cluster, topics.REQUESTS) == []
    done = foldflow(settings, "redrive", "requests/0/5", "--by", "ann", "--why", "deployed", "--json")
    assert done.returncode == 0, done.stderr
    (record,) = stored(settings, cluster, topics.REQUESTS)
    assert (record.key, record.value) == (b"somebody", value)
    assert record.headers == headers | {"foldflow_redriven": place.encode()}
    assert record.partition == topics.partition_for(b"somebody", cluster.partitions["requests"])
    assert json.loads(done.stdout) == [
        {"place": place, "redriven_to": f"{record.topic}/{record.partition}/{record.offset}", "problem": None}
    ]
    again = foldflow(settings, "redrive", "requests/0/5")
    assert (again.returncode, "was redriven by ann" in again.stderr) == (1, True)
    assert len(stored(settings, cluster, topics.REQUESTS)) == 1
    shown = json.loads(foldflow(settings, "show", "requests/0/5", "--json").stdout)
    assert (shown["status"], shown["form"], shown["value"], shown["key"]) == ("redriven", "json", json.loads(value), "somebody")
    (event,) = shown["history"]
    assert (event["by"], event["reason"], event["to_offset"]) == ("ann", "deployed", record.offset)


def test_listed_and_discarded_by_the_command(settings: Settings, cluster: Cluster) -> None:
    """What is discarded stays on the topic, is no longer open, and nothing is put anywhere."""
    for offset, reason in enumerate(("unknown_workflow", "invalid_input", "invalid_input")):
        died(settings, topics.REQUESTS, offset, reason)
    done = foldflow(settings, "discard", "--reason", "invalid_input", "--since", "2h", "--why", "old")
    assert (done.returncode, done.stderr.count("discarded")) == (0, 2), done.stderr
    listed = {
        option: [each["reason"] for each in json.loads(foldflow(settings, "list", option, "--json").stdout)]
        for option in ("--open", "--settled", "--all")
    }
    assert {option: len(found) for option, found in listed.items()} == {"--open": 1, "--settled": 2, "--all": 3}
    assert listed["--open"] == ["unknown_workflow"]
    assert stored(settings, cluster, topics.REQUESTS) == []
    assert len(stored(settings, cluster, topics.DEADLETTER)) == 5
    assert foldflow(settings, "redrive").returncode == 2
    assert foldflow(settings, "show", "requests/0/99").returncode == 2


def test_what_must_not_be_redriven_is_refused_and_the_rest_is_done(
    settings: Settings, cluster: Cluster, letters: Letters
) -> None:
    """`decisions` is never written to, and half a message never sent, however many others are redriven with them."""
    died(settings, topics.DECISIONS, 1)
    died(settings, topics.INBOX, 2, value=b"v" * (MAX_VALUE_BYTES + 1))
    died(settings, topics.TOOL_CALLS, 3, key=None)
    done = Settler(settings, letters, "ann", "").redrive(letters.read())
    results = {entry.letter.offset: type(result).__name__ for entry, result in done}
    assert results == {1: "NotRedrivableError", 2: "NotRedrivableError", 3: "DeadLetterSettled"}
    assert stored(settings, cluster, topics.DECISIONS) == stored(settings, cluster, topics.INBOX) == []
    (sent,) = stored(settings, cluster, topics.TOOL_CALLS)
    assert (sent.key, sent.value) == (None, b"{}")
    assert [entry.letter.offset for entry in letters.read() if entry.status == "open"] == [1, 2]


def test_a_crash_between_sending_and_noting_leaves_it_open(
    settings: Settings, cluster: Cluster, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is redriven twice, never lost: the message is on its topic before anything says that it is."""
    died(settings, topics.REQUESTS, 5)

    def crash(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Settler, "_write", crash)
        with pytest.raises(SystemExit):
            list(Settler(settings, letters, "ann", "").redrive(letters.read()))
    (entry,) = letters.read()
    assert entry.status == "open"
    assert len(stored(settings, cluster, topics.REQUESTS)) == 1
    assert source_topic(settings, entry) is topics.REQUESTS
    list(Settler(settings, letters, "ann", "").redrive([entry]))
    assert len(stored(settings, cluster, topics.REQUESTS)) == 2
    assert letters.read()[0].status == "redriven"


def test_many_are_redriven_in_batches(settings: Settings, cluster: Cluster, letters: Letters) -> None:
    """Every one of more than a batch is on its topic once, and noted with where it stands."""
    name = kafka.name(settings, topics.REQUESTS)
    made = [Incoming(name, 0, i, 1, f"k{i}".encode(), b"{}", {}) for i in range(250)]
    kafka.send(settings, [dead_letter(record, "not_decodable", "", "test") for record in made])
    done = [(entry, result) for entry, result in Settler(settings, letters, "ann", "").redrive(letters.read())]
    assert all(isinstance(result, DeadLetterSettled) for _, result in done)
    places = {(record.partition, record.offset): record for record in stored(settings, cluster, topics.REQUESTS)}
    assert len(places) == len(done) == 250
    for entry, result in done:
        assert isinstance(result, DeadLetterSettled)
        assert places[result.to_partition or 0, result.to_offset or 0].key == entry.letter.key


def test_the_views_say_how_each_stands(settings: Settings, letters: Letters) -> None:
    """Open, redriven and discarded, with who and why; the last settlement counts, and forged ones are passed over."""
    for offset in range(4):
        died(settings, topics.REQUESTS, offset)
    entries = {entry.letter.offset: entry for entry in letters.read()}
    Settler(settings, letters, "ann", "").discard([entries[1], entries[2]])
    list(Settler(settings, letters, "bo", "deployed").redrive([entries[2]]))
    forged = DeadLetterSettled(*entries[3].place, "vanished", 1 << 62, "eve", "")
    kafka.send(settings, [envelope(topics.DEADLETTER, "x", forged, source="test", identity="x")])
    projector = Projector(settings)
    projector.start()
    try:
        assert projector.caught_up.wait(120), projector.failure
        with projector.views.snapshot() as (db, _):
            found = {row["offset"]: (row["status"], row["settled_by"]) for row in deadletters.newest(db, 10)}
            assert found == {0: ("open", None), 1: ("discarded", "ann"), 2: ("redriven", "bo"), 3: ("open", None)}
            assert [row["offset"] for row in deadletters.newest(db, 10, status="discarded")] == [1]
            whole = deadletters.one(db, *entries[2].place)
            assert whole is not None
            assert [(each["action"], each["by"]) for each in whole["history"]] == [("discarded", "ann"), ("redriven", "bo")]
            assert len(deadletters.about(db, "q", "-")) == 4
    finally:
        projector.stop()
