"""The gateway over HTTP, on real Kafka: what it accepts stands on the topic, and intake judges as it does."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from served_api import until

from api.tokens import READER, REQUESTER, Tokens
from api.tokens import create as create_token
from events import codec, ids, topics
from events.commands import RunRequest, SignalReceived, WorkflowRequest
from infra.gateway.app import create
from streams import kafka
from streams.envelope import Incoming
from streams.processors.intake import Intake
from streams.registry import SpecRegistry, publish
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec

SPEC = WorkflowSpec.model_validate(
    {
        "name": "report",
        "input": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        "steps": {"look": {"tool": {"name": "echo", "arguments": {"text": "=input.n"}}}},
    }
)


@contextmanager
def gateway(settings: Settings, tokens: Tokens | None = None, *, ready: bool = True) -> Iterator[httpx.Client]:
    """Serve the gateway in a thread."""
    app = create(settings, tokens)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", settings.gateway_port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started and (app.state.sender.ready.is_set() or not ready))
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.gateway_port}", trust_env=False, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def own(few: Settings) -> Settings:
    """Return this test's settings, with a workflow registered; the API's free port serves the gateway."""
    publish(few, [SPEC])
    return few.model_copy(update={"gateway_port": few.api_port, "api_rate": 0})


def requests(settings: Settings) -> dict[tuple[int, int], Any]:
    """Return what stands on the topic, by partition and offset."""
    topic = kafka.name(settings, topics.REQUESTS)
    found = {}
    with closing(kafka.reader(settings)) as source:
        for message in kafka.read_partitions(source, topic, {0: 0, 1: 0}):
            value = message.value()
            kind = codec.kind_of(value)
            found[message.partition(), message.offset()] = codec.decode(value, kind)
    return found


def test_what_is_accepted_stands_on_the_topic(own: Settings, tmp_path: Path) -> None:
    """Given a requester's token, when a run and a signal are asked for, then 202 says where the broker has them, as they are."""
    token = create_token(tmp_path / "tokens", REQUESTER, "shop")
    reader = create_token(tmp_path / "tokens", READER, "ci")
    with gateway(own, Tokens(tmp_path / "tokens")) as client:
        run = {"workflow": "report", "input": {"n": 1}, "request_id": "order-1", "labels": {"team": "ä"}, "break_at": ["look"]}
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {reader}"}, 403)):
            assert client.post("/requests", json=run, headers=headers).status_code == status
        client.headers["Authorization"] = f"Bearer {token}"
        first, again = client.post("/requests", json=run), client.post("/requests", json=run)
        assert (first.status_code, first.json()["run_id"]) == (202, ids.run_id("order-1"))
        assert again.json()["run_id"] == first.json()["run_id"]
        nameless = client.post("/requests", json={"workflow": "report", "input": {"n": 2}}).json()
        assert nameless["run_id"] == ids.run_id(nameless["request_id"])
        said = {"request_id": "order-1", "name": "paid", "payload": {"by": "card"}, "signal_id": "s1"}
        signal = client.post("/signals", json=said).json()
        assert signal["run_id"] == ids.run_id("order-1")
    there = requests(own)
    assert len(there) == 4
    assert there[first.json()["partition"], first.json()["offset"]] == WorkflowRequest(
        "report", '{"n":1}', "order-1", None, {"team": "ä"}, break_at=("look",)
    )
    assert there[signal["partition"], signal["offset"]] == RunRequest(
        None, "order-1", SignalReceived("s1", "paid", None, '{"by":"card"}', "shop")
    )


def test_it_judges_as_intake_does(own: Settings) -> None:
    """Given wrong requests of every kind, each is refused with a problem, nothing is sent, and intake would refuse it too."""
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"workflow": "report"}, 422, "invalid-input"),
        ({"workflow": "report", "input": {"n": "x"}}, 422, "invalid-input"),
        ({"workflow": "report", "input": None}, 422, "invalid-input"),
        ({"workflow": "rapport", "input": {"n": 1}}, 422, "unknown-workflow"),
        ({"workflow": "report", "input": {"n": 1}, "digest": "x"}, 422, "unknown-workflow"),
        ({"workflow": "report", "input": {"n": 1}, "labels": {"a": "x" * 70_000}}, 413, "too-large"),
        ({"workflow": "report", "input": {"n": 1}, "break_at": ["x" * 2000]}, 413, "too-large"),
    ]
    specs = SpecRegistry(own)
    specs.refresh()
    with gateway(own) as client:
        for body, status, kind in wrong:
            answer = client.post("/requests", json=body)
            assert (answer.status_code, answer.json()["type"]) == (status, f"urn:foldflow:{kind}"), body
            assert answer.headers["content-type"] == "application/problem+json"
            (letter, *_) = Intake(specs, b"i" * 16).check(Incoming("requests", 0, 0, 0, b"", json.dumps(body).encode()))
            assert letter.topic is topics.DEADLETTER, body
        for content, status in (
            (b"{", 422),
            (b"[]", 422),
            (b"[" * 100_000, 400),
            (b'{"workflow": "report", "input": {"n": ' + b"[" * 500 + b"]" * 500 + b"}}", 422),
            (b'{"workflow": "report", "input": NaN}', 422),
            (b'{"workflow": "report", "surprise": 1}', 422),
            (b'{"workflow": "report", "command": "cancel"}', 422),
            (b'{"workflow": "report", "input": "' + b"x" * 9_000_000 + b'"}', 413),
        ):
            answer = client.post("/requests", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == status, content[:60]
            assert answer.headers["content-type"] == "application/problem+json", content[:60]
        chunked = client.post("/requests", content=iter([b'{"workflow": "'] + [b"x" * 1_000_000] * 9))
        assert (chunked.status_code, chunked.headers["content-type"]) == (413, "application/problem+json")
        form = client.post(
            "/requests", content=b'{"workflow": "report", "input": {"n": 1}}', headers={"content-type": "text/plain"}
        )
        assert form.status_code == 422  # what a page of another site can send without being asked first
        for signal in ({"name": "x"}, {"name": "", "run_id": "r"}, {"name": "x", "run_id": "r", "request_id": "q"}):
            assert client.post("/signals", json=signal).status_code == 422
        assert client.get("/requests").status_code == 405
    specs.close()
    assert requests(own) == {}


def test_without_kafka_it_says_so_and_goes_on_by_itself(own: Settings) -> None:
    """Given no Kafka, a request gets 503 with Retry-After, and the id to ask again with; health says so."""
    alone = own.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})
    with gateway(alone, ready=False) as client:
        for path, body, key in (
            ("/requests", {"workflow": "report", "input": {"n": 1}}, "request_id"),
            ("/signals", {"run_id": "r", "name": "x"}, "signal_id"),
        ):
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:foldflow:not-sent")
            assert answer.headers["Retry-After"]
            assert answer.json()[key]
        assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "starting")
