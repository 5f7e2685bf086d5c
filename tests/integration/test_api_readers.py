"""What the role `reader` is shown: how things stand, and nothing of what runs work with."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_api import histories, served, write

from api.models import WITHHELD, WITHHELD_TEXT
from api.tokens import AUDITOR, READER, Tokens
from api.tokens import create as create_token
from events import codec, ids, topics
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ApprovalAnswered, SignalReceived, StartRun
from events.decisions import DeadLetter
from events.failure import Failure, FailureKind
from events.ids import chain_hash, effect_id
from events.results import Input, LlmCallFailed, ToolCallFailed
from streams import kafka
from streams.envelope import envelope
from streams.registry import publish
from streams.settings import Settings
from streams.workflow.evolve import evolve
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import RunEvent

SECRET = "SECRET-4711"  # noqa: S105 - it only looks like one
REQUEST = "order-17"
ON = {"on_failure": "continue"}
SPEC = WorkflowSpec.model_validate(
    {
        "name": "mail",
        "steps": {
            "look": {"tool": {"name": "echo", "arguments": {"text": "=input.name"}}, "retry": {"attempts": 1}, **ON},
            "ask": {"llm": {"prompt": "{{ input.name }}"}, "retry": {"attempts": 1}},
            "odd": {"transform": "=int(input.name)", **ON},
            "open": {"approval": {"message": "Send it to {{ input.name }}?", "show": "=input.name"}, **ON},
            "shut": {"approval": {"message": "And to {{ input.name }}?", "show": "=input.name"}, **ON},
            "paid": {"wait_for": {"signal": "payment", "correlation": "=input.name"}},
            "came": {"wait_for": {"signal": "parcel", "correlation": "=input.name"}},
        },
    }
)
"""A workflow whose messages, correlations and failures all quote its input."""
HIDDEN = {"input", "output", "value", "answer", "payload", "message", "correlation", "failure_message", "detail"}
"""Fields that readers are not shown, besides `reason` of an approval: what people said of its value."""


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made and a workflow registered."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS, "api_rate": 0})
    kafka.connect(made)
    publish(made, [SPEC])
    return made


def story(settings: Settings, *, over: bool) -> str:
    """Write the decisions of a run, up to where it waits or to where it has failed, and return its id."""
    log, run = histories.logs(0, 0, 0.0), histories.Run(ids.run_id(REQUEST), spec=SPEC)
    calls: dict[str, str] = {}

    def happens(cause: Input) -> None:
        decision = log._decided(run, run.state, cause)
        log.append(run.id, codec.encode(decision))
        event = RunEvent(decision, chain_hash(codec.body(decision)))
        run.state = evolve(run.state, event)
        for index, effect in enumerate(decision.effects):
            if isinstance(effect, LlmCallRequested | ToolCallRequested):
                calls[effect.step] = effect_id(event.hash, index)

    failure = Failure(FailureKind.UNAUTHORIZED, f"{SECRET} may not do that")
    happens(StartRun(REQUEST, SPEC.name, SPEC.digest, json.dumps({"name": SECRET}), {"team": "a"}))
    happens(ToolCallFailed(calls["look"], "look", failure, None, 3))
    happens(ApprovalAnswered("shut", False, "ann", f"{SECRET} has not paid", None))
    happens(SignalReceived("s-1", "parcel", SECRET, json.dumps(SECRET), "bob"))
    happens(SignalReceived("s-2", "letter", SECRET, json.dumps(SECRET), "bob"))
    if over:
        happens(LlmCallFailed(calls["ask"], "ask", failure, "m", None, None, 12))
    write(settings, log)
    return str(run.id)


def refusal(settings: Settings) -> None:
    """Write the dead letter of a request whose input doesn't fit."""
    detail = f"input.name: ['{SECRET}'] is not of type 'string'"
    value = json.dumps({"workflow": "mail", "input": {"name": [SECRET]}}).encode()
    letter = DeadLetter(
        "requests", 2, 5, 1_700_000_000_000, "invalid_input", detail, "order-18", ids.run_id("order-18"), b"k", value
    )
    kafka.send(settings, [envelope(topics.DEADLETTER, "requests/2/5", letter, source="test", identity="x")])


def paths(client: httpx.Client, run: str) -> list[str]:
    """Return everything that can be asked about this run and these letters, except the endless stream."""
    given = {"run_id": run, "seq": "1", "request_id": "order-18", "topic": "requests", "partition": "2", "offset": "5"}
    document = client.get("/openapi.json").json()
    found = [re.sub(r"\{(\w+)\}", lambda part: given[part[1]], path) for path in document["paths"] if path != "/stream"]
    assert len(found) > 15
    more = [f"/runs/{run}/lineage?about={about}" for about in ("data", "control", "all")]
    return [*found, *more, f"/runs/{run}/cost?by=call", f"/requests/{REQUEST}", f"/runs?origin={run}"]


def differences(read: Any, audited: Any, at: str = "") -> set[str]:
    """Return which fields a reader is shown otherwise than an auditor; each must be withheld."""
    if isinstance(read, dict) and isinstance(audited, dict) and read.keys() == audited.keys():
        return set().union(*(differences(read[name], audited[name], name) for name in read))
    if isinstance(read, list) and isinstance(audited, list) and len(read) == len(audited):
        return set().union(*(differences(*each, at) for each in zip(read, audited, strict=True)))
    if read != audited:
        assert read == (WITHHELD_TEXT if isinstance(audited, str) and read != WITHHELD else WITHHELD), (at, read, audited)
        return {at}
    return set()


@pytest.mark.parametrize("over", [False, True])
def test_readers_are_told_nothing_that_quotes_what_runs_work_with(own: Settings, tmp_path: Path, *, over: bool) -> None:
    """Given a run and a refusal full of a secret; when a reader asks everything, then it stands nowhere, and all else does."""
    run = story(own, over=over)
    refusal(own)
    tokens = {role: create_token(tmp_path / "tokens", role, role) for role in (READER, AUDITOR)}
    differing: set[str] = set()
    with served(own, tokens=Tokens(tmp_path / "tokens")) as client:

        def asked(role: str, path: str) -> httpx.Response:
            return client.get(path, headers={"Authorization": f"Bearer {tokens[role]}"})

        for path in paths(client, run):
            read, audited = (asked(role, path) for role in (READER, AUDITOR))
            assert SECRET not in read.text, path
            if read.status_code == 200 and "json" in read.headers["content-type"] and path != "/openapi.json":
                differing |= differences(read.json(), audited.json())
            else:
                assert read.status_code in {200, 403, 422}, path
        for path, shown in (
            (f"/runs/{run}", "failure_message" if over else "waits_for"),
            ("/approvals", f"And to {SECRET}?"),
            (f"/runs/{run}/signals", SECRET),
            ("/deadletters", SECRET),
            (f"/runs/{run}/lineage.svg", SECRET),
        ):
            assert shown in asked(AUDITOR, path).text, path
        client.headers["Authorization"] = f"Bearer {tokens[READER]}"
        with client.stream("GET", f"/stream?after=start&run_id={run}") as answer:
            events = b""
            for chunk in answer.iter_raw():
                events += chunk
                if events.count(b"event: decision") >= 5:
                    break
            assert SECRET.encode() not in events
        # Who may not see a text may not find out by asking for parts of it either.
        assert [len(asked(role, f"/deadletters?text={SECRET}").json()["deadletters"]) for role in (READER, AUDITOR)] == [0, 1]
        assert len(asked(READER, "/deadletters?text=order-18").json()["deadletters"]) == 1
        step = next(each for each in asked(READER, f"/runs/{run}/steps").json()["steps"] if each["step"] == "look")
        assert (step["failure_kind"], step["failure_message"]) == ("unauthorized", WITHHELD_TEXT)
        assert asked(READER, "/deadletters").json()["deadletters"][0]["reason"] == "invalid_input"
    assert differing <= HIDDEN | {"reason"}
    assert differing >= {"message", "correlation", "failure_message", "detail", "payload", "value", "input", "reason"}


def test_without_tokens_everything_is_shown(own: Settings) -> None:
    """Given no tokens, when anybody here asks, then nothing is withheld."""
    run = story(own, over=False)
    refusal(own)
    with served(own) as client:
        for path in (f"/runs/{run}", "/approvals", f"/runs/{run}/signals", "/deadletters", "/requests/order-18"):
            answer = client.get(path).text
            assert SECRET in answer, path
            assert "withheld" not in answer, path
