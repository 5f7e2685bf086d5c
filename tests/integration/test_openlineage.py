"""`foldflow openlineage` as a real process on real Kafka: to a real HTTP server, and to a topic."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from ports import free_port
from served_api import histories, until, write

from events import topics
from events.commands import StartRun
from infra.openlineage.ledger import Ledger
from infra.openlineage.receivers import KafkaTopic
from projections.lineage_data import Definition
from projections.openlineage import Event, Family, OpenLineage, family_of
from streams import kafka, registry
from streams.settings import Settings

ROOT = Path(__file__).parents[2]


class Receiver:
    """An HTTP server that takes events; `refuses`: the eventType that it answers 422 to."""

    def __init__(self, port: int, refuses: str = "") -> None:
        self.bodies: list[bytes] = []
        self.keys: set[str | None] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                is_wrong = self.path != "/api/v1/lineage" or json.loads(body)["eventType"] == refuses
                if not is_wrong:
                    receiver.keys.add(self.headers["authorization"])
                    receiver.bodies.append(body)
                self.send_response(422 if is_wrong else 201)
                self.send_header("content-length", "7" if is_wrong else "0")
                self.end_headers()
                self.wfile.write(b"not so!" if is_wrong else b"")

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made and the histories' workflows registered."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(made)
    registry.publish(made, list(histories.SPECS.values()))
    return made


@pytest.fixture
def tell(own: Settings, tmp_path: Path) -> Iterator[Any]:
    """Start the command with options; what is left of it is ended."""
    running: list[subprocess.Popen[str]] = []
    values = own.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= {
        f"FOLDFLOW_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in values.items()
    }

    def start(*options: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "infra.cli.main", "openlineage", "--namespace", "space", *options]
        errors = (tmp_path / f"{len(running)}.err").open("w")
        running.append(
            subprocess.Popen(
                line, cwd=ROOT, env=environment | {"OPENLINEAGE_API_KEY": "k"}, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        )
        return running[-1]

    start.said = lambda: "".join(path.read_text() for path in sorted(tmp_path.glob("*.err")))  # type: ignore[attr-defined]
    yield start
    for process in running:
        process.kill()
        process.wait()


def expected(log: Any) -> list[Event]:
    """Return what is to be told of a log."""
    starts = {each.decision.run_id: each.decision.input for each in log.accepted if isinstance(each.decision.input, StartRun)}

    def parent(run_id: str, levels: int = 0) -> Family:
        start = starts[run_id]
        above = parent(start.parent.run_id, levels + 1) if start.parent and levels < 100 else None
        return family_of(run_id, start.workflow, above)

    telling = OpenLineage("space", {digest: Definition(spec) for digest, spec in histories.SPECS.items()}.get, parent)
    return [event for each in log.accepted for event in telling.take(each.decision, each.hash)]


def in_order(bodies: list[bytes], run_id: str) -> list[bytes]:
    """Return what was told of a run, each once, as it came first."""
    of = lambda body: json.loads(body)["run"]["facets"]["foldflow_ledger"]["runId"]  # noqa: E731
    return list(dict.fromkeys(body for body in bodies if of(body) == run_id))


def committed(settings: Settings, said: str) -> dict[int, int]:
    """Return how far it is told by the consumer group that the command has named, by partition."""
    if not (named := re.findall(r"consumer group (\S+)\.\n", said)):
        return {}
    with closing(kafka.consumer(settings, named[-1].removeprefix(settings.topic_prefix))) as member:
        places = [kafka.TopicPartition(kafka.name(settings, topics.DECISIONS), each) for each in range(histories.PARTITIONS)]
        return {each.partition: each.offset for each in member.committed(places, timeout=10)}


def kill(process: subprocess.Popen[str]) -> None:
    """End a process as `kill -9` does."""
    process.kill()
    process.wait()


@pytest.mark.timeout(200)
def test_a_receiver_that_comes_late_and_a_process_that_is_killed_lose_nothing(own: Settings, tell: Any) -> None:
    """Given a receiver that is down at first, and the process killed with -9 in the middle, then every event arrives.

    What comes twice is the same to the byte, the events of each run are in order, and nothing else is there.
    """
    log = histories.logs(5, 30, 0.2, histories.BOTH)
    wanted = expected(log)
    assert any(b'"parent"' in each.value and b'.input"' in each.value for each in wanted)
    port, count = free_port(), len(log.records())
    half = count // 2
    options = ("--to", f"http://127.0.0.1:{port}", "--follow")
    write(own, log, 0, half)
    process = tell(*options)
    until(lambda: "can't be reached" in tell.said(), 60)
    receiver = Receiver(port)
    until(lambda: len(receiver.bodies) > 20, 60)
    kill(process)  # before anything was committed
    process = tell(*options)
    lengths = {partition: len(values) for partition, values in enumerate(log.partitions)}
    ends = {partition: sum(1 for of, _ in log.order[:half] if of == partition) for partition in lengths}
    until(lambda: committed(own, tell.said()) == ends, 60)
    kill(process)  # in the middle of many runs, of which nothing more is told that was told
    process = tell(*options)
    write(own, log, half, count)
    everything = {each.value for each in wanted}
    until(lambda: set(receiver.bodies) >= everything, 60)
    assert set(receiver.bodies) == everything
    for run_id in {each.run_id for each in wanted}:
        assert in_order(receiver.bodies, run_id) == [each.value for each in wanted if each.run_id == run_id]
    assert receiver.keys == {"Bearer k"}
    assert tell.said().count("can't be reached") == 1
    process.terminate()
    assert process.wait(60) == 0
    assert committed(own, tell.said()) == lengths
    receiver.close()


@pytest.mark.timeout(120)
def test_a_topic_gets_the_same(own: Settings, tell: Any) -> None:
    """Given a topic, then it gets all that is there, by the runs' ids. One run alone is told the same."""
    log = histories.logs(6, 8, 0.1, histories.BOTH)
    write(own, log)
    wanted = expected(log)
    name = f"{own.topic_prefix}lineage"
    with pytest.raises(kafka.TopicsMissingError):
        KafkaTopic(own, name)
    admin = AdminClient(kafka.client(own))
    admin.create_topics([NewTopic(name, 2, 1)])[name].result()
    process = tell("--topic", name, "--json")
    assert json.loads(process.communicate(timeout=60)[0]) == {"to": f"topic {name}", "namespace": "space", "events": len(wanted)}
    with closing(kafka.reader(own)) as source:
        found = [kafka.incoming(each) for each in kafka.read_partitions(source, name, {0: 0, 1: 0})]
    run_id = wanted[0].run_id
    assert sorted(each.value for each in found) == sorted(each.value for each in wanted)
    assert [each.value for each in found if each.key == run_id.encode()] == [
        each.value for each in wanted if each.run_id == run_id
    ]
    with Ledger(own, "space", run=run_id) as ledger:
        alone = [event for events, _ in ledger.stored(ledger.ends()) for event in events]
    assert alone == [each for each in wanted if each.run_id == run_id]
    with Ledger(own, "space", since=int(time.time() * 1000) + 60_000) as ledger:
        assert not any(events for events, _ in ledger.stored(ledger.ends())), "nothing was decided since then"


@pytest.mark.timeout(120)
def test_a_receiver_that_refuses_is_named_with_the_event(own: Settings, tell: Any) -> None:
    """Given a receiver that refuses an event, then the command ends with 1, and says which one of which run."""
    log = histories.logs(6, 4, 0.1, histories.BOTH)
    write(own, log)
    receiver = Receiver(free := free_port(), refuses="COMPLETE")
    process = tell("--to", f"http://127.0.0.1:{free}")
    process.communicate(timeout=60)
    receiver.close()
    assert process.returncode == 1
    said = tell.said()
    assert "refuses COMPLETE of " in said
    assert "422 not so!" in said
    assert any(f"of run {each.run_id}" in said for each in expected(log))
