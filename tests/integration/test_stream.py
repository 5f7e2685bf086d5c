"""The live stream over HTTP and WebSocket, on real Kafka, while decisions are written."""

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served_api import histories, served, until, write
from websockets.sync.client import connect

from events import ids, topics
from streams import kafka
from streams.registry import publish
from streams.settings import Settings

_RECONNECTS = 100


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made and a workflow registered."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS, "api_rate": 0})
    kafka.connect(made)
    publish(made, [histories.SPEC, histories.RICH])
    return made


def events(answer: httpx.Response, most_bytes: float = float("inf")) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield ids and decisions of a stream, as far as they arrived whole within so many bytes."""
    held = b""
    for chunk in answer.iter_raw():
        held += chunk[: int(min(len(chunk), most_bytes))]
        most_bytes -= len(chunk)
        while b"\n\n" in held:
            block, held = held.split(b"\n\n", 1)
            fields = dict(line.split(b": ", 1) for line in block.splitlines() if not line.startswith(b":"))
            if b"id" in fields:
                yield fields[b"id"].decode(), json.loads(fields[b"data"]) if b"data" in fields else None
        if most_bytes <= 0:
            return


def keys(seen: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Return what tells decisions apart: run, number and hash."""
    return [(each["run_id"], each["seq"], each["hash"]) for each in seen]


def accepted(log: Any, *run_ids: str) -> list[tuple[str, int, str]]:
    """Return what a perfect reader accepts of a log, of some runs or of all."""
    wanted = [event for event in log.accepted if not run_ids or event.decision.run_id in run_ids]
    return [(event.decision.run_id, event.decision.seq, event.hash.hex()) for event in wanted]


def test_a_client_that_reconnects_a_hundred_times_sees_each_decision_once(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, nothing comes twice.

    Given decisions, losers and rubbish written all the while, when a client is cut off 100 times at any byte and goes on by
    `Last-Event-ID`, then it has seen each accepted decision exactly once, and those of each run in order.
    """
    monkeypatch.setattr("api.streams.HEARTBEAT_S", 0.05)
    log = histories.logs(71, 90, 0.15, histories.BOTH)
    chance = random.Random(71)  # noqa: S311 - reproducible
    records = len(log.records())
    connected, producer = threading.Semaphore(0), kafka.producer(own)

    def keep_writing() -> None:
        done = 0
        for number in range(1, _RECONNECTS + 1):
            assert connected.acquire(timeout=60)
            done, start = records * number // _RECONNECTS, done
            for each in log.records()[start:done]:
                producer.produce(kafka.name(own, topics.DECISIONS), each.value, partition=each.partition)
            producer.poll(0)
        producer.flush()

    writer = threading.Thread(target=keep_writing)
    seen: list[dict[str, Any]] = []
    with served(own) as client:
        writer.start()
        place = "start"
        for _ in range(_RECONNECTS):
            with client.stream("GET", "/stream", headers={"Last-Event-ID": place}, timeout=30) as answer:
                assert answer.status_code == 200
                connected.release()
                quiet = 0
                for at, decision in events(answer, chance.choice([0, 100, 2_000, 6_000, chance.randrange(20_000)])):
                    place = at
                    seen += [decision] if decision else []
                    quiet += decision is None
                    if quiet > 1:  # it has seen all there is: the next part is written when it connects again
                        break
        writer.join(60)
        with client.stream("GET", "/stream", params={"after": place}, timeout=30) as answer:
            for _, decision in events(answer):
                seen += [decision] if decision else []
                if len(seen) >= len(log.accepted):
                    break
        until(lambda: client.app.state.streams.open == 0)  # type: ignore[attr-defined] # a client that has gone holds nothing
    assert len(seen) > 500
    assert sorted(keys(seen)) == sorted(accepted(log))
    for run_id in log.states:
        assert [each["seq"] for each in seen if each["run_id"] == run_id] == list(range(1, log.states[run_id].seq + 1))


def test_a_stream_of_some_runs_skips_the_others(own: Settings) -> None:
    """Given runs of two workflows and two teams, a stream by run, workflow or label has theirs, history first."""
    log = histories.logs(72, 12, 0.1, histories.BOTH)
    half = len(log.records()) // 2
    write(own, log, 0, half)
    one = ids.run_id("request 3")
    orders = [ids.run_id(f"request {number}") for number in range(1, 12, 2)]
    with served(own) as client:
        for parameters, runs in (({"run_id": one}, [one]), ({"workflow": "order"}, orders), ({"label": "team=b"}, orders)):
            expected = sorted(accepted(log, *runs))
            seen: list[dict[str, Any]] = []
            with client.stream("GET", "/stream", params={**parameters, "after": "start"}, timeout=30) as answer:
                for number, (_, decision) in enumerate(events(answer)):
                    if number == 0 and runs == [one]:
                        write(own, log, half)  # while it is followed; the other two find all of it
                    seen += [decision] if decision else []
                    if len(seen) == len(expected):
                        break
            assert sorted(keys(seen)) == expected != []
            assert {each["workflow"] for each in seen} == {"order"}


def test_a_websocket_gets_the_same_and_goes_on_where_it_was(own: Settings) -> None:
    """Given a history, when a WebSocket is closed in the middle and opened again behind the last id, then nothing is missing."""
    log = histories.logs(73, 10, 0.1)
    write(own, log)
    seen: list[dict[str, Any]] = []
    with served(own) as client:
        address = f"ws://127.0.0.1:{own.api_port}/stream/ws?after="
        place = "start"
        while len(seen) < len(log.accepted):
            with connect(address + place, proxy=None, max_queue=None) as socket:
                for _ in range(7):
                    message = json.loads(socket.recv(timeout=30))
                    place = message["id"]
                    seen += [message["decision"]] if "decision" in message else []
                    if len(seen) == len(log.accepted):
                        break
        until(lambda: client.app.state.streams.open == 0)  # type: ignore[attr-defined]
        with connect(f"ws://127.0.0.1:{own.api_port}/stream/ws", proxy=None) as live:  # from now on: nothing of what was
            assert "decision" not in json.loads(live.recv(timeout=30))
            until(lambda: client.app.state.streams.open == 1)  # type: ignore[attr-defined]
    assert sorted(keys(seen)) == sorted(accepted(log))


def test_what_can_not_be_streamed_is_a_problem(own: Settings) -> None:
    """A wrong place, a place in a log that is gone, and one stream too many are refused before anything is sent."""
    with served(own.model_copy(update={"api_streams": 1})) as client:
        for parameters, status, kind in (
            ({"after": "7"}, 400, "invalid-place"),
            ({"after": "v1:00000000:0=5"}, 410, "other-log"),
            ({"label": "x"}, 400, "invalid-label"),
        ):
            answer = client.get("/stream", params=parameters)
            assert (answer.status_code, answer.json()["type"]) == (status, f"urn:foldflow:{kind}")
        with client.stream("GET", "/stream") as answer:
            chunks = answer.iter_raw()  # thrown away, it would close the connection
            next(chunks)
            second = client.get("/stream")
            assert (second.status_code, second.headers["Retry-After"]) == (429, "5")
        until(lambda: client.app.state.streams.open == 0)  # type: ignore[attr-defined]
        with client.stream("GET", "/stream") as answer:
            assert answer.status_code == 200
