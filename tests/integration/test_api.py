"""The read API over HTTP, on real Kafka, with histories that the real core decided."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from served_api import histories, served, until, write

from api.app import create
from api.models import WITHHELD
from api.tokens import Tokens
from api.tokens import create as create_token
from events import codec, ids, topics
from events.decisions import DeadLetter
from events.ids import chain_hash
from streams import kafka
from streams.envelope import Outgoing, envelope
from streams.registry import publish
from streams.settings import Settings
from streams.workflow.state import StepStatus


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made and a workflow registered."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(made)
    publish(made, [histories.SPEC, histories.RICH])
    return made


def test_runs_steps_calls_and_decisions_are_those_of_the_log(own: Settings) -> None:
    """What the API says of each run is what its decisions in Kafka say; lists and details agree."""
    log = histories.logs(21, 12, 0.3, histories.BOTH)
    write(own, log)
    with served(own) as client:
        page = client.get("/runs", params={"limit": 1000})
        assert page.headers["Foldflow-Lag"] == "0"
        ends = {f"{number}:{len(records)}" for number, records in enumerate(log.partitions) if records}
        assert set(page.headers["Foldflow-Positions"].split(",")) == ends
        listed = {run["run_id"]: run for run in page.json()["runs"]}
        assert listed.keys() == log.states.keys()
        for run_id, state in log.states.items():
            run = client.get(f"/runs/{run_id[:13]}").json()
            under_way = "closing" if state.closing else "paused" if state.paused else "running"
            assert run["status"] == (state.status.name.lower() if state.over else under_way)
            assert {key: run[key] for key in listed[run_id]} == listed[run_id]
            names = {step.name for step in histories.SPECS[state.digest].steps}
            assert (run["seq"], run["head"], run["steps_total"]) == (state.seq, state.head.hex(), len(names))
            assert run["request_id"]
            assert client.get(f"/requests/{run['request_id']}").json()["run"] == listed[run_id]
            assert client.get(f"/runs/{run['request_id']}").json() == run
            assert {step["step"] for step in run["steps"]} >= names | set(state.steps)
            assert run["steps_known"] == sum(step["status"] != "pending" for step in run["steps"])
            everything = client.get(f"/runs/{run_id}/steps", params={"limit": 1000}).json()["steps"]
            assert everything == [step for step in run["steps"] if step["status"] != "pending"]
            waits = [wait["kind"] for wait in run["waits_for"] if wait["kind"] != "pause"]
            assert {kind: waits.count(kind) for kind in waits} == run["waiting"]
            assert sum(call["cost_usd"] or 0 for call in run["calls_made"]) == run["cost_usd"]
            decided = client.get(f"/runs/{run_id}/decisions").json()["decisions"]
            assert [each["hash"] for each in decided] == [e.hash.hex() for e in log.accepted if e.decision.run_id == run_id]
        last = log.accepted[-1]
        full = client.get(f"/runs/{last.decision.run_id}/decisions/{last.decision.seq}").json()
        assert full["record"]["prev"] == last.decision.prev.hex()
        assert full["hash"] == chain_hash(codec.body(last.decision)).hex()
        health = client.get("/health").json()
        assert {each["run_id"] for each in health["breaks"]} == log.broken
        assert health["status"] == ("degraded" if log.broken else "ok")


def test_filters_and_pages(own: Settings) -> None:
    """Pages by cursor hold each run once; filters leave out what doesn't fit."""
    write(own, histories.logs(22, 9, 0.0))
    with served(own) as client:
        seen: list[str] = []
        cursor = None
        while True:
            page = client.get("/runs", params={"limit": 4} | ({"cursor": cursor} if cursor else {})).json()
            seen += [run["run_id"] for run in page["runs"]]
            if (cursor := page["next"]) is None:
                break
        assert len(seen) == len(set(seen)) == 9
        assert len(client.get("/runs", params={"label": "team=a"}).json()["runs"]) == 5
        assert client.get("/runs", params={"label": ["team=a", "team=b"]}).json()["runs"] == []
        assert client.get("/runs", params={"workflow": "other"}).json()["runs"] == []
        assert len(client.get("/runs", params={"request_id": "request 3"}).json()["runs"]) == 1
        assert client.get("/runs", params={"status": "failed"}).json()["runs"] == []
        assert client.get("/runs", params={"status": "done"}).status_code == 422


def test_runs_are_found_by_where_they_are_and_where_they_come_from(own: Settings) -> None:
    """Each status, `open` and `waiting` give the runs that are there; parents have their children, origins their forks."""
    log = histories.logs(29, 60, 0.2, (histories.RICH,))
    write(own, log)
    with served(own) as client:
        everything = client.get("/runs", params={"limit": 1000}).json()["runs"]

        def found(**parameters: str) -> set[str]:
            return {run["run_id"] for run in client.get("/runs", params={"limit": 1000, **parameters}).json()["runs"]}

        statuses = {run["status"] for run in everything}
        assert statuses >= {"running", "paused", "closing", "failed", "cancelled"}
        for status in statuses:
            assert found(status=status) == {run["run_id"] for run in everything if run["status"] == status}
        assert found(status="open") == {run["run_id"] for run in everything if run["ended"] is None}
        assert found(status="waiting") == {run["run_id"] for run in everything if run["waiting"]}
        first = ids.run_id("request 1")
        children = {run["run_id"] for run in everything if run["parent_run_id"] == first}
        assert found(parent=first) == children != set()
        assert {child["run_id"] for child in client.get(f"/runs/{first}").json()["children"]} == children
        assert found(origin=first) == {run["run_id"] for run in everything if run["origin_run_id"] == first} != set()


def test_approvals_and_signals(own: Settings) -> None:
    """What waits for people is listed for all runs and for one, in pages, for whoever may answer; signals with their takers."""
    log = histories.logs(30, 12, 0.1, (histories.RICH,))
    write(own, log)
    with served(own) as client:
        waiting = client.get("/approvals", params={"waiting": True, "limit": 1000}).json()["approvals"]
        expected = {
            (run_id, path)
            for run_id, state in log.states.items()
            for path, step in state.steps.items()
            if step.status is StepStatus.AWAITING_APPROVAL
        }
        assert {(each["run_id"], each["step"]) for each in waiting} == expected != set()
        assert {each["workflow"] for each in waiting} == {"order"}
        anybody = client.get("/approvals", params={"waiting": True, "by": "eve", "limit": 1000}).json()["approvals"]
        assert anybody == [each for each in waiting if not each["may_answer"]]
        seen: list[dict[str, Any]] = []
        parameters: dict[str, Any] = {"limit": 3}
        while "cursor" not in parameters or parameters["cursor"]:
            page = client.get("/approvals", params=parameters).json()
            seen += page["approvals"]
            parameters["cursor"] = page["next"]
        assert [each for each in seen if each["status"] == "waiting"] == waiting
        assert len(seen) == len({(each["run_id"], each["step"]) for each in seen})
        assert any(each["status"] == "approved" and each["answered_by"] == "ann" for each in seen)
        for run_id in log.states:
            own_ones = client.get(f"/runs/{run_id[:13]}/approvals").json()["approvals"]
            assert {each["step"] for each in own_ones} == {each["step"] for each in seen if each["run_id"] == run_id}
            told = client.get(f"/runs/{run_id}/signals").json()["signals"]
            outputs = {step["step"]: step for step in client.get(f"/runs/{run_id}").json()["steps"]}
            assert all(outputs[each["step"]]["output"] == each["payload"] for each in told if each["status"] == "taken")
        assert client.get("/runs/nothing/approvals").status_code == 404


def test_problems_say_what_to_do(own: Settings) -> None:
    """Each problem is `application/problem+json`, with its status and a hint."""
    write(own, histories.logs(23, 40, 0.0))
    with served(own) as client:
        for path, status, kind in (
            ("/runs/nothing", 404, "unknown-run"),
            ("/requests/nothing", 404, "unknown-request"),
            ("/deadletters/t/0/0", 404, "unknown-deadletter"),
            ("/runs?cursor=x", 400, "invalid-cursor"),
            ("/runs?label=x", 400, "invalid-label"),
            ("/runs?limit=0", 422, "invalid-request"),
        ):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["type"]) == (status, f"urn:foldflow:{kind}"), path
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["hint"]
        firsts = [run["run_id"][0] for run in client.get("/runs").json()["runs"]]
        twice = next(digit for digit in firsts if firsts.count(digit) > 1)
        ambiguous = client.get(f"/runs/{twice}")
        assert (ambiguous.status_code, len(ambiguous.json()["runs"]) > 1) == (409, True)
        run_id = client.get("/runs").json()["runs"][0]["run_id"]
        assert client.get(f"/runs/{run_id}/decisions/999").status_code == 404
        refused = client.post("/runs")
        assert (refused.status_code, "foldflow run" in refused.json()["hint"]) == (405, True)


def test_refused_requests_and_dead_letters(own: Settings) -> None:
    """A refused request is found by its id, with the reason; its bytes by where it was."""
    letter = DeadLetter(
        "requests", 2, 5, 1_700_000_000_000, "invalid_input", "no", "r/1 x", ids.run_id("r/1 x"), b"k", b"\xff\x00"
    )
    kafka.send(own, [envelope(topics.DEADLETTER, "requests/2/5", letter, source="test", identity="x")] * 2)
    with served(own) as client:
        answer = client.get("/requests/r/1%20x").json()
        assert (answer["status"], answer["run"], answer["deadletters"][0]["reason"]) == ("refused", None, "invalid_input")
        run_id = ids.run_id("r/1 x")
        assert client.get(f"/requests/{run_id}").json() == answer  # who was told the run's id finds it too
        unknown = client.get(f"/runs/{run_id}")
        assert (unknown.status_code, unknown.json()["request_id"]) == (404, "r/1 x")
        assert "GET /requests/r%2F1%20x" in unknown.json()["hint"]
        assert client.get(f"/requests/{ids.run_id('other')}").status_code == 404
        assert len(client.get("/deadletters").json()["deadletters"]) == 1
        assert client.get("/deadletters", params={"reason": "other"}).json()["deadletters"] == []
        whole = client.get("/deadletters/requests/2/5").json()
        assert (whole["key"], whole["value"], whole["size"]) == ("k", "0xff00", 2)


def test_it_goes_on_where_it_was_after_a_restart(own: Settings) -> None:
    """What was read isn't read again, what came meanwhile is, and a finished run stays as it was."""
    log = histories.logs(24, 6, 0.2)
    half = len(log.records()) // 2
    first = log.records()[:half]
    kafka.send(own, [Outgoing(topics.DECISIONS, b"", each.value, [], each.partition) for each in first])
    with served(own) as client:
        assert client.get("/runs").json()["runs"]
        write(own, log, half)  # while it runs
        until(lambda: sum(each["position"] for each in client.get("/health").json()["partitions"]) == len(log.records()) + 2)
    again = log.accepted[0].decision
    value = codec.encode(again)
    partition = topics.partition_for(again.run_id.encode(), histories.PARTITIONS)
    kafka.send(own, [Outgoing(topics.DECISIONS, b"", value, [], partition)])
    with served(own) as client:
        runs = {run["run_id"]: run["seq"] for run in client.get("/runs").json()["runs"]}
        assert runs == {run_id: state.seq for run_id, state in log.states.items()}
        verdicts = [each["verdict"] for each in client.get("/health").json()["ignored"]]
        assert "overtaken" in verdicts


def test_the_process_says_when_it_is_ready_and_stops_on_sigterm(own: Settings, tmp_path: Path) -> None:
    """`foldflow api` creates the ready file once it answers with everything that was there, and ends with 0."""
    log = histories.logs(25, 8, 0.0)
    write(own, log)
    ready = tmp_path / "ready"
    environment = {
        **os.environ,
        "FOLDFLOW_BOOTSTRAP_SERVERS": own.bootstrap_servers,
        "FOLDFLOW_TOPIC_PREFIX": own.topic_prefix,
        "FOLDFLOW_DATA_DIR": str(own.data_dir),
        "FOLDFLOW_API_PORT": str(own.api_port),
        "FOLDFLOW_READY_FILE": str(ready),
    }
    with subprocess.Popen([sys.executable, "-m", "infra.cli.main", "api"], env=environment) as process:
        until(lambda: ready.exists() or process.poll() is not None)
        answer = httpx.get(f"http://127.0.0.1:{own.api_port}/runs", trust_env=False)
        assert len(answer.json()["runs"]) == 8
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_without_kafka_it_says_so(tmp_path: Path, settings: Settings) -> None:
    """While Kafka has not answered, questions get 503 with what to check, and health says which Kafka."""
    alone = settings.model_copy(update={"bootstrap_servers": "127.0.0.1:9", "data_dir": tmp_path})
    app = create(alone)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", alone.api_port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    client = httpx.Client(base_url=f"http://127.0.0.1:{alone.api_port}", trust_env=False)
    answer = client.get("/runs")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:foldflow:not-ready")
    health = client.get("/health")
    assert (health.status_code, health.json()["kafka_reachable"], health.json()["kafka"]) == (503, False, "127.0.0.1:9")
    client.close()
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_lists_are_narrowed_by_time_and_text(own: Settings) -> None:
    """Given runs, `since`, `until` and `text` give those that they say, a time as text or as how long ago, and nothing else."""
    log = histories.logs(31, 10, 0.0)
    write(own, log)
    kafka.send(own, [envelope(topics.DEADLETTER, "a", _letter("Order-1"), source="test", identity="x")])
    with served(own) as client:
        runs = client.get("/runs", params={"limit": 1000}).json()["runs"]
        starts = sorted(run["started"] for run in runs)

        def found(path: str = "/runs", **parameters: Any) -> list[Any]:
            (entries,) = (each for each in client.get(path, params=parameters).json().values() if isinstance(each, list))
            return entries

        middle = starts[5]
        assert {run["run_id"] for run in found(since=middle)} == {run["run_id"] for run in runs if run["started"] >= middle}
        assert {run["run_id"] for run in found(until=middle)} == {run["run_id"] for run in runs if run["started"] < middle}
        assert len(found(since=middle, until=middle)) == 0
        assert (len(found(since="1d")), len(found(until="1d"))) == (0, len(runs))
        assert [run["request_id"] for run in found(text="REQUEST 7")] == ["request 7"]
        assert [run["run_id"] for run in found(text=runs[0]["run_id"][9:18])] == [runs[0]["run_id"]]
        assert found(text="%") == []
        assert [len(found("/deadletters", text=each)) for each in ("order-1", "order-2")] == [1, 0]
        assert [len(found("/deadletters", **{each: "2023-11-15"})) for each in ("since", "until")] == [0, 1]
        wrong = client.get("/approvals", params={"since": "yesterday"})
        assert (wrong.status_code, wrong.json()["type"]) == (400, "urn:foldflow:invalid-time")


def _letter(request: str) -> DeadLetter:
    return DeadLetter("requests", 0, 0, 1_700_000_000_000, "invalid_input", "no", request, ids.run_id(request), None, b"x")


def test_what_has_not_changed_is_not_sent_again(own: Settings) -> None:
    """Given an ETag, the same question gets 304 until the views take something in; what depends on the clock has none."""
    log = histories.logs(32, 6, 0.0)
    write(own, log, 0, 4)
    with served(own) as client:
        first = client.get("/runs")
        assert first.headers["ETag"].startswith('W/"')
        same = client.get("/runs", headers={"If-None-Match": first.headers["ETag"]})
        assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", first.headers["ETag"])
        assert same.headers["Foldflow-Positions"] == first.headers["Foldflow-Positions"]
        assert "ETag" not in client.get("/runs", params={"since": "7d"}).headers
        write(own, log, 4)
        until(lambda: client.get("/runs", headers={"If-None-Match": first.headers["ETag"]}).status_code == 200)


def test_every_answer_says_how_fresh_it_is(own: Settings) -> None:
    """Whatever is answered, problems too, bears lag and positions; each problem is one, whatever is wrong."""
    write(own, histories.logs(33, 4, 0.0))
    with served(own) as client:
        for method, path, status in (
            ("GET", "/runs", 200),
            ("GET", "/health", 200),
            ("GET", "/openapi.json", 200),
            ("GET", "/nowhere", 404),
            ("GET", "/runs/nothing", 404),
            ("DELETE", "/runs", 405),
            ("GET", "/runs?limit=x", 422),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status, path
            assert answer.headers["Foldflow-Lag"] == "0", path
            assert ":" in answer.headers["Foldflow-Positions"], path
            if status >= 400:
                assert answer.headers["content-type"] == "application/problem+json", path
                assert answer.json()["hint"], path


def test_readers_see_no_payloads(own: Settings, tmp_path: Path) -> None:
    """Given tokens, a reader gets the same answers as an auditor, without payloads, and no records; others get nothing."""
    write(own, histories.logs(34, 6, 0.0, histories.BOTH))
    tokens = {role: create_token(tmp_path / "tokens", role, role) for role in ("reader", "auditor")}
    with served(own, tokens=Tokens(tmp_path / "tokens")) as client:
        assert client.get("/runs").status_code == 401
        assert client.get("/health").status_code == 200

        def asked(role: str, path: str) -> httpx.Response:
            return client.get(path, headers={"Authorization": f"Bearer {tokens[role]}"})

        run = asked("reader", "/runs").json()["runs"][0]["run_id"]
        read, audited = (asked(role, f"/runs/{run}").json() for role in ("reader", "auditor"))
        assert audited["input"]["n"] is not None
        assert read["input"] == WITHHELD
        shown = {step["step"] for step in audited["steps"] if step["output"] is not None}
        assert shown
        assert all(step["output"] == WITHHELD for step in read["steps"] if step["step"] in shown)
        withheld = dict.fromkeys(("input", "output", "steps", "waits_for", "failure_message"))  # each: test_api_readers
        assert read | withheld == audited | withheld
        assert asked("reader", "/runs").headers["ETag"] != asked("auditor", "/runs").headers["ETag"]
        for path in (f"/runs/{run}/decisions/1", "/deadletters/requests/0/0"):
            assert asked("reader", path).status_code == 403
            assert asked("auditor", path).status_code in {200, 404}
