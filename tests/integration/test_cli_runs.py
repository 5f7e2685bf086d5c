"""`foldflow run`, `runs`, `show`, `tail`, `deploy` and `workflows` as a user types them, against real processes."""

import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from events import topics
from events.ids import run_id
from infra.embedded.supervisor import Supervisor
from streams import kafka as clients
from streams.envelope import Outgoing
from streams.settings import Settings

WORKFLOWS = {
    "hello": """
        name: hello
        input: {type: object, required: [name], properties: {name: {type: string}}}
        steps:
          greet: {tool: {name: echo, arguments: {value: "='Hello ' + input.name"}}}
          twice: {needs: [greet], transform: {text: "=steps.greet.output"}}
    """,
    "fails": """
        name: fails
        steps:
          bad: {tool: {name: no_such_tool}}
    """,
    "waits": """
        name: waits
        steps:
          ask: {llm: {prompt: "Nobody answers: no LLM worker runs here."}}
    """,
    "asks": """
        name: asks
        steps:
          each: {for_each: {items: "=[1, 2, 3, 4, 5]"}, tool: {name: echo, arguments: {value: "=item"}}}
          ok: {needs: [each], approval: {message: "All well?", by: [ann]}}
    """,
}

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def stack(kafka: str, embedded: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Start intake, orchestrator, a tool worker and the API, and stop them at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = embedded.settings.model_copy(
        update={
            "bootstrap_servers": kafka,
            "topic_prefix": f"c{uuid.uuid4().hex[:12]}.",
            "data_dir": tmp_path_factory.mktemp("cli"),
            "api_port": port,
            "partitions": 2,
        }
    )
    settings = Settings(**{name: value for name, value in settings if value is not None})
    supervisor = Supervisor(settings)
    supervisor.up(frozenset({"intake", "orchestrator", "tool", "api"}))
    yield settings
    supervisor.down()


@pytest.fixture(scope="module")
def cli(stack: Settings, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Return a function that runs `foldflow`, after the workflows were deployed."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
        "FOLDFLOW_BOOTSTRAP_SERVERS": stack.bootstrap_servers,
        "FOLDFLOW_TOPIC_PREFIX": stack.topic_prefix,
        "FOLDFLOW_DATA_DIR": str(stack.data_dir),
        "FOLDFLOW_API_PORT": str(stack.api_port),
        "FOLDFLOW_PARTITIONS": "2",
    }

    def run(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(line, env=environment | more, input=stdin, capture_output=True, text=True, timeout=90, check=False)

    folder = tmp_path_factory.mktemp("workflows")
    for name, text in WORKFLOWS.items():
        (folder / f"{name}.yaml").write_text("\n".join(each[8:] for each in text.strip("\n").splitlines()))
    deployed = run("deploy", str(folder))
    assert deployed.returncode == 0, deployed.stderr
    assert deployed.stderr.count("registered") == len(WORKFLOWS)
    assert "no_such_tool" in deployed.stderr, "it may be there where the workers are"
    assert "already" in run("deploy", str(folder / "hello.yaml")).stderr
    return run


def test_a_run_is_followed_to_its_output(cli: Cli) -> None:
    """--wait shows each step as it goes and ends with the output on standard output; exit code 0."""
    done = cli("run", "hello", "--input", '{"name": "Ada"}', "--wait", "--label", "team=a")
    assert done.returncode == 0, done.stderr
    identity, output = done.stdout.split("\n", 1)
    assert json.loads(output) == {"text": "Hello Ada"}
    assert [line for line in done.stderr.splitlines() if ":" in line][:3] == [
        "greet: running echo",
        "greet: completed echo",
        "twice: completed",
    ]
    listed = cli("runs", "--workflow", "hello", "--label", "team=a", "--json")
    assert identity in [run["run_id"] for run in json.loads(listed.stdout)["runs"]]
    shown = cli("show", identity[:18])
    assert (shown.returncode, "twice" in shown.stdout, "Hello Ada" in shown.stdout) == (0, True, True)


def test_the_same_request_twice_is_one_run(cli: Cli, tmp_path: Path) -> None:
    """The second time it shows the run that is there; input from a file and from standard input is the same."""
    (tmp_path / "input.json").write_text('{"name": "Bob"}')
    first = cli("run", "hello", "-i", f"@{tmp_path}/input.json", "--request-id", "order 17", "--wait", "--json")
    again = cli("run", "hello", "-i", "-", "--request-id", "order 17", "--wait", "--json", stdin='{"name": "Bob"}')
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert json.loads(first.stdout)["run_id"] == run_id("order 17")
    assert json.loads(cli("show", "order 17", "--json").stdout)["run_id"] == run_id("order 17")


def test_a_failed_run_says_where_and_why(cli: Cli) -> None:
    """Exit code 1, the step and the failure."""
    done = cli("run", "fails", "--wait")
    assert done.returncode == 1
    assert "step `bad`: unknown_tool" in done.stderr
    assert cli("show", done.stdout.strip()).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("hallo",), "did you mean `hello`"), (("hello", "-i", '{"nam": 1}'), "'name' is a required property")],
)
def test_a_refused_request_says_why(cli: Cli, arguments: tuple[str, ...], reason: str) -> None:
    """Exit code 2, the reason of its dead letter, and what to do."""
    request = f"refused {uuid.uuid4()}"
    done = cli("run", *arguments, "--wait", "--request-id", request)
    assert (done.returncode, reason in done.stderr) == (2, True), done.stderr
    assert "put that right" in done.stderr
    shown = cli("show", request)
    for _ in range(10):  # the view follows the topic within milliseconds, a busy machine aside
        if shown.returncode == 1:
            break
        shown = cli("show", request)
    assert (shown.returncode, reason in shown.stdout) == (1, True)
    by_run = cli("show", run_id(request))  # the id that `run` has printed
    assert (by_run.returncode, by_run.stdout) == (1, shown.stdout)
    other = cli("cost", run_id(request))
    assert (other.returncode, f"foldflow show '{request}'" in other.stderr) == (2, True), other.stderr


def test_a_run_that_takes_longer_goes_on(cli: Cli) -> None:
    """Exit code 3 after --timeout."""
    done = cli("run", "waits", "--wait", "--timeout", "2s", "--json")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (3, "timeout")
    assert json.loads(done.stdout)["steps"] == {"ask": "running"}


@pytest.mark.parametrize(
    ("given", "said"),
    [('{"a": 1,\n "b": tru}', "line 2, column 7"), ("NaN", "NaN is no JSON number"), ("@/nowhere.json", "can't be read")],
)
def test_mistakes_in_the_input_are_said_before_anything_is_sent(cli: Cli, given: str, said: str) -> None:
    """Exit code 2, with the place of the mistake."""
    done = cli("run", "hello", "--input", given)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_what_is_not_there_is_said_with_what_to_do(cli: Cli) -> None:
    """No Kafka, no API, no such run, no such topic: an exit code of its own kind and a way on."""
    no_kafka = cli("run", "hello", FOLDFLOW_BOOTSTRAP_SERVERS="127.0.0.1:9")
    assert (no_kafka.returncode, "foldflow up" in no_kafka.stderr) == (4, True)
    no_api = cli("runs", FOLDFLOW_API_PORT="9")
    assert (no_api.returncode, "foldflow up" in no_api.stderr) == (4, True)
    for command in ("show", "cost", "lineage", "picture", "audit"):
        unknown = cli(command, "nothing")
        assert (unknown.returncode, "foldflow runs" in unknown.stderr, "GET " in unknown.stderr) == (2, True, False), (
            unknown.stderr
        )
    typo = cli("tail", "decision")
    assert (typo.returncode, "did you mean decisions" in typo.stderr) == (2, True)


def test_what_a_run_waits_for_is_shown_with_the_command_that_answers(cli: Cli) -> None:
    """`show` has the items folded and the approval with its command; `runs` finds it by what it is; that command ends it."""
    identity = cli("run", "asks", "--request-id", f"asks {uuid.uuid4()}").stdout.strip()
    shown = cli("show", identity)
    for _ in range(40):  # a busy machine takes a while until it gets there
        if "waits for an approval" in shown.stdout:
            break
        shown = cli("show", identity)
    assert "running, waits for 1 approval" in shown.stdout
    assert "each  [5 items: 5 ✓]" in shown.stdout
    assert "? step ok waits for an approval by ann: All well?" in shown.stdout
    assert f"foldflow approve {identity} ok" in shown.stdout
    asked = json.loads(cli("show", identity, "--json").stdout)
    assert [(wait["kind"], wait["step"], wait["may_answer"]) for wait in asked["waits_for"]] == [("approval", "ok", ["ann"])]
    listed = json.loads(cli("runs", "--status", "waiting", "--json").stdout)
    assert identity in [run["run_id"] for run in listed["runs"]]
    assert "waits for 1 approval" in cli("runs", "--status", "waiting", "--since", "1h").stdout
    assert identity not in cli("runs", "--until", "1h").stdout
    (line,) = [each for each in cli("approvals", "--by", "ann").stdout.splitlines() if identity in each]
    assert all(part in line for part in ("asks", "All well?", "ann", f"foldflow approve {identity} ok"))
    assert "Nothing waits" in cli("approvals", "--by", "eve").stderr
    assert cli("approvals", "--since", "yesterday").returncode == 2
    cancelled = cli("cancel", identity, "--reason", "enough", "--by", "bob")
    assert cancelled.returncode == 0, cancelled.stderr
    over = cli("show", identity)
    for _ in range(40):
        if over.returncode == 1:
            break
        over = cli("show", identity)
    assert "cancelled by bob: enough" in over.stdout
    (asked,) = [
        each for each in json.loads(cli("approvals", "--all", "--json").stdout)["approvals"] if each["run_id"] == identity
    ]
    assert asked["status"] == "cancelled"
    assert "cancelled" in cli("approvals", "--all").stdout
    assert identity not in cli("approvals").stdout
    assert identity in cli("runs", "--status", "cancelled").stdout
    assert cli("runs", "--status", "gone").returncode == 2
    told = cli("tail", "decisions", "--run", identity, "--no-follow").stdout
    assert "→ MapStarted  step `each` begins with 5 items" in told
    assert '→ RunCancelled  the run is cancelled  {"by": "bob", "reason": "enough"}' in told


def test_tail_shows_a_run_from_its_request_to_its_end(cli: Cli) -> None:
    """All events of a run, in order, with the filter's verdict on its decisions."""
    identity = json.loads(cli("run", "hello", "-i", '{"name": "Eve"}', "--wait", "--json").stdout)["run_id"]
    lines = [json.loads(line) for line in cli("tail", "--run", identity, "--no-follow", "--json").stdout.splitlines()]
    assert [line["event"]["type"] for line in lines if line["verdict"]] == ["Decision", "Decision"]
    assert {line["verdict"] for line in lines} == {None, "accepted"}
    kinds: list[Any] = [line["event"]["type"] for line in lines]
    assert kinds[:2] == ["WorkflowRequest", "InboxMessage"]
    assert set(kinds[2:4]) == {"Decision", "ToolCall"}  # a call is sent just before the decision that requests it
    assert {"InboxMessage", "FinishedRun"} <= set(kinds[4:])
    assert all(line["headers"]["ce_id"] for line in lines)


def test_tail_shows_what_cannot_be_decoded(cli: Cli, stack: Settings) -> None:
    """Foreign bytes are shown as such, JSON requests as what they say; --last takes the newest."""
    values = [b'{"workflow": "hello", "input": {"name": "J"}}', b"\xff\xfe"]
    clients.send(stack, [Outgoing(topics.REQUESTS, b"k", value, [], 0) for value in values])
    done = cli("tail", "requests", "--no-follow", "--last", "2", "--json")
    json_request, foreign = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert (json_request["type"], json_request["input"]) == ("WorkflowRequest (JSON)", {"name": "J"})
    assert (foreign["type"], foreign["hex"]) == ("not decodable", "fffe")
    for_people = cli("tail", "requests", "--no-follow", "--from-beginning")
    assert "fffe" in for_people.stdout


def test_workflows_are_listed(cli: Cli, tmp_path: Path) -> None:
    """The newest version of each; a wrong definition is refused with its place and nothing is registered."""
    assert {each["name"] for each in json.loads(cli("workflows", "--json").stdout)} >= {"hello", "fails", "waits"}
    assert "hello" in cli("workflows").stdout
    (tmp_path / "wrong.yaml").write_text("name: wrong\nsteps:\n  a: {tol: {name: echo}}\n")
    wrong = cli("deploy", str(tmp_path / "wrong.yaml"))
    assert (wrong.returncode, "wrong.yaml:3" in wrong.stderr) == (2, True), wrong.stderr
