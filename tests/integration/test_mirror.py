"""The role `mirror` as a real process on real Kafka."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from served_api import histories, until, write

from events import codec, topics
from events.as_json import as_json
from events.decisions import Decision
from streams import kafka
from streams.processors.mirror import OFFSET
from streams.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(made, also=(topics.DECISIONS_JSON,))
    return made


@pytest.fixture
def mirrors(own: Settings, tmp_path: Path) -> Iterator[Any]:
    """Start processes of the role; what is left of them is ended."""
    running: list[subprocess.Popen[bytes]] = []
    values = own.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= {
        f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
    }

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "mirror.log").open("ab") as log:
            line = [sys.executable, "-m", "infra.cli.main", "worker", "mirror"]
            running.append(subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def records(settings: Settings, topic: topics.Topic) -> dict[int, list[Any]]:
    """Return what stands on a topic, by partition."""
    found = defaultdict(list)
    with closing(kafka.reader(settings)) as source:
        for message in kafka.read_partitions(source, kafka.name(settings, topic), dict.fromkeys(range(histories.PARTITIONS), 0)):
            found[message.partition() or 0].append(kafka.incoming(message))
    return found


@pytest.mark.timeout(200)
def test_killed_in_the_middle_it_leaves_out_nothing(own: Settings, mirrors: Any) -> None:
    """Given decisions that come while its process is killed with -9 and started again, then each that counts is there, in order.

    What stands there twice is the same, and nothing else is there.
    """
    log = histories.logs(5, 30, 0.2, histories.BOTH)
    count = len(log.records())
    expected = {each.hash: as_json(each.decision) for each in log.accepted}

    def mirrored() -> set[str]:
        return {json.dumps(json.loads(each.value)) for part in records(own, topics.DECISIONS_JSON).values() for each in part}

    for start, end in ((0, count // 3), (count // 3, count // 2), (count // 2, count)):
        process = mirrors()
        before = len(mirrored())
        write(own, log, start, end)
        until(lambda before=before: len(mirrored()) > before, 60)  # in the middle, or at its end
        if end < count:
            process.kill()
            process.wait()
    wanted = {json.dumps(each) for each in expected.values()}
    until(lambda: mirrored() >= wanted, 60)
    assert mirrored() == wanted
    originals = records(own, topics.DECISIONS)
    for partition, part in records(own, topics.DECISIONS_JSON).items():
        first: dict[int, Any] = {}
        for each in part:
            offset = int(each.headers[OFFSET])
            same = first.setdefault(offset, each)
            assert (each.key, each.value, each.headers, each.timestamp) == (same.key, same.value, same.headers, same.timestamp)
            original = originals[partition][offset]
            assert (each.key, each.timestamp) == (original.key, original.timestamp)
            assert json.loads(each.value) == as_json(codec.decode(original.value, Decision))
        assert list(first) == sorted(first)
    process.terminate()
    assert process.wait(60) == 0
    with closing(kafka.consumer(own, "mirror")) as member:
        places = [kafka.TopicPartition(kafka.name(own, topics.DECISIONS), each) for each in range(histories.PARTITIONS)]
        committed = {each.partition: each.offset for each in member.committed(places, timeout=10)}
    assert committed == {partition: len(part) for partition, part in originals.items()}
