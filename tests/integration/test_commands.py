"""The commands that say something to a run, as a user types them, against real processes."""

import getpass
import json
import os
import pty
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from events import topics
from events.ids import run_id
from infra.cli import outcome
from infra.cli.talk import Line
from infra.embedded.supervisor import Supervisor
from streams import kafka as clients
from streams.envelope import Outgoing
from streams.settings import Settings
from streams.workflow.payloads import INLINE_BYTES, is_reference
from streams.workflow.state import RunState, RunStatus

WORKFLOWS = {
    "sale": """
        name: sale
        steps:
          pay: {wait_for: {signal: payment, correlation: "=input.order"}}
          ask:
            needs: [pay]
            approval: {message: "Send to {{ input.order }}?", show: "=steps.pay.output", by: [ann, ME], editable: true}
          send: {needs: [ask], tool: {name: echo, arguments: {value: "=steps.ask.output.value"}}}
    """,
    "two": """
        name: two
        steps:
          one: {approval: {message: "First?"}}
          other: {approval: {message: "Second?"}}
          both: {needs: [one, other], transform: {one: "=steps.one.output.by", other: "=steps.other.output.approved"}}
    """,
    "parent": """
        name: parent
        steps:
          child: {run: {workflow: nowhere}}
    """,
}
PATIENCE_S = 30.0

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
            "topic_prefix": f"m{uuid.uuid4().hex[:12]}.",
            "data_dir": tmp_path_factory.mktemp("commands"),
            "api_port": port,
            "partitions": 2,
        }
    )
    settings = Settings(**settings.model_dump(exclude={"ready_file"}, exclude_none=True))
    supervisor = Supervisor(settings)
    supervisor.up(frozenset({"intake", "orchestrator", "tool", "api"}))
    yield settings
    supervisor.down()


@pytest.fixture(scope="module")
def environment(stack: Settings) -> dict[str, str]:
    """Return the environment of a `foldflow` command."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
        "FOLDFLOW_BOOTSTRAP_SERVERS": stack.bootstrap_servers,
        "FOLDFLOW_TOPIC_PREFIX": stack.topic_prefix,
        "FOLDFLOW_DATA_DIR": str(stack.data_dir),
        "FOLDFLOW_API_PORT": str(stack.api_port),
        "FOLDFLOW_PARTITIONS": "2",
    }


@pytest.fixture(scope="module")
def cli(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Return a function that runs `foldflow`, after the workflows were deployed."""

    def run(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(line, env=environment | more, input=stdin, capture_output=True, text=True, timeout=90, check=False)

    folder = tmp_path_factory.mktemp("workflows")
    for name, text in WORKFLOWS.items():
        lines = (each[8:] for each in text.replace("ME", getpass.getuser()).strip("\n").splitlines())
        (folder / f"{name}.yaml").write_text("\n".join(lines))
    deployed = run("deploy", str(folder))
    assert deployed.returncode == 0, deployed.stderr
    return run


class Run:
    """A run, asked for as JSON, and looked at in the ledger."""

    def __init__(self, settings: Settings, cluster: clients.Cluster, workflow: str, **more: Any) -> None:
        self.settings, self.request = settings, f"request {uuid.uuid4()}"
        self.run_id = run_id(self.request)
        self.line = Line(settings, cluster, self.run_id)
        self.send({"workflow": workflow, "request_id": self.request, "input": {"order": "o 7"}, **more})

    def send(self, request: dict[str, Any]) -> None:
        """Put JSON on the topic, as a console producer does."""
        clients.send(self.settings, [Outgoing(topics.REQUESTS, self.request.encode(), json.dumps(request).encode(), [])])

    def until(self, holds: Callable[[RunState], Any]) -> RunState:
        """Wait until something holds of the run."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(state := self.line.catch_up()):
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        return state

    def until_over(self) -> RunState:
        """Wait until the run has ended."""
        return self.until(lambda state: state.over)


@pytest.fixture(scope="module")
def cluster(stack: Settings, cli: Cli) -> clients.Cluster:
    """Return what is known of the topics, once the workflows are there."""
    del cli
    return clients.connect(stack)


Start = Callable[..., Run]


@pytest.fixture
def start(stack: Settings, cluster: clients.Cluster) -> Iterator[Start]:
    """Return what starts a run."""
    begun: list[Run] = []

    def begin(workflow: str, **more: Any) -> Run:
        begun.append(Run(stack, cluster, workflow, **more))
        return begun[-1]

    yield begin
    for each in begun:
        each.line.close()


def said(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    """Check a command's exit code and what it says."""
    assert done.returncode == code, done.stdout + done.stderr
    for text in texts:
        assert text in done.stdout + done.stderr


def asks(state: RunState) -> bool:
    """Whether a run waits for an approval."""
    return bool(outcome.approvals(state))


def test_a_signal_and_an_approval_move_a_run_to_its_end(cli: Cli, start: Start) -> None:
    """Each command says what came of it; who may not approve is told so, and what was approved is what goes on."""
    run = start("sale")
    run.until(outcome.signals)
    said(cli("approve", run.request), 1, "waits for no approval", f"foldflow signal {run.run_id} payment --correlation 'o 7'")
    said(cli("signal", run.request, "payment", "--correlation", "o 8"), 0, "Kept: no step waits for it yet")
    paid = ("signal", run.request, "payment", "--correlation", "o 7", "--payload", '{"paid": 1}', "--id", "p1")
    said(cli(*paid), 0, "Done: step `pay` takes the signal", "step `ask` waits for an approval")
    said(cli(*paid), 1, "Ignored: the run has had this signal already")
    said(cli("approve", run.run_id, "--by", "eve", "--yes"), 1, "`eve` may not answer this, only ann")
    said(cli("approve", run.run_id, "pay", "--by", "ann", "--yes"), 1, "that step is settled already")
    done = cli("approve", run.run_id, "--by", "ann", "--reason", "fine", "--value", '{"paid": 2}')
    said(done, 0, "Step `ask` asks: Send to o 7?", '"paid": 1', "Done: step `ask` completed; step `send` calls `echo`")
    state = run.until_over()
    assert (state.status, json.loads(state.output or "")) == (RunStatus.COMPLETED, {"paid": 2})
    said(cli("pause", run.run_id), 1, "Ignored: the run is over: it is completed.")


def test_a_signal_that_comes_before_its_step_is_kept_for_it(cli: Cli, start: Start) -> None:
    """A run stops before a step, the signal comes, the step is resumed and takes it."""
    run = start("sale", break_at=["pay"])
    run.until(lambda state: "pay" in state.held)
    said(cli("signal", run.run_id, "payment", "--correlation", "o 7", "--payload", "@-nothing"), 2, "can't be read")
    said(cli("signal", run.run_id, "payment", "--correlation", "o 7", "--payload", "-", stdin='{"paid": 3}'), 0, "Kept")
    said(cli("resume", run.run_id, "pay"), 0, "stops before step `pay` no more", "step `pay` takes the signal")
    said(cli("resume", run.run_id, "pay"), 1, "nothing is held there")
    assert run.until(asks).steps["pay"].output == '{"paid":3}'


def test_what_is_rejected_fails_with_the_reason(cli: Cli, start: Start) -> None:
    """Who rejected it, and why, stands in the run's failure."""
    run = start("two")
    run.until(lambda state: len(outcome.approvals(state)) == 2)
    said(
        cli("reject", run.run_id, "--reason", "no"), 1, "waits for 2 approvals: say which STEP.", "one: First?", "other: Second?"
    )
    said(cli("reject", run.run_id, "other", "--reason", "too dear", "--by", "bo"), 0, "not_approved: rejected by bo: too dear")
    state = run.until_over()
    assert (state.status, state.failure.kind if state.failure else None) == (RunStatus.FAILED, "not_approved")


def test_a_run_is_cancelled(cli: Cli, start: Start) -> None:
    """A step first, which fails; then the whole run, which says who and why; then nothing more."""
    run = start("two")
    run.until(asks)
    done = cli("cancel", run.request, "--reason", "asked twice", "--by", "bo", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["outcome"], found["run_id"]) == (0, "taken", run.run_id)
    assert found["effects"][-1] | {"not_undone": []} == {
        "type": "RunCancelled",
        "by": "bo",
        "reason": "asked twice",
        "not_undone": [],
    }
    assert run.until_over().status is RunStatus.CANCELLED
    again = cli("cancel", run.request, "--json")
    assert (again.returncode, json.loads(again.stdout)["outcome"]) == (1, "over")
    other = start("two")
    other.until(asks)
    said(cli("cancel", other.run_id, "one", "--by", "bo"), 0, "step `one` failed: cancelled: cancelled by bo")


def test_a_paused_run_takes_what_comes_and_starts_nothing(cli: Cli, start: Start) -> None:
    """Pause, a signal, resume step by step."""
    run = start("sale")
    run.until(outcome.signals)
    said(cli("pause", run.run_id), 0, "the run starts nothing more")
    said(cli("pause", run.run_id), 1, "it is paused already")
    said(cli("signal", run.run_id, "payment", "--correlation", "o 7"), 0, "takes the signal", "step `ask` is held (paused)")
    said(cli("resume", run.run_id, "--step"), 0, "goes on with one step", "step `ask` waits for an approval")
    said(cli("approve", run.run_id, "--by", "ann", "--yes"), 0, "step `send` is held (paused)")
    said(cli("resume", run.run_id), 0, "Done: the run goes on; step `send` calls `echo`")
    assert run.until_over().status is RunStatus.COMPLETED


def test_an_output_is_set_at_a_breakpoint(cli: Cli, start: Start) -> None:
    """A run stops before its last step; the output before it is changed; what goes on has the new one."""
    run = start("sale", break_at=["send"])
    run.until(outcome.signals)
    said(cli("set-output", run.run_id, "send", "1", "--reason", "early"), 1, "that step has not begun")
    said(cli("set-output", run.run_id, "pay", '{"paid": 0}', "--reason", "cash"), 0, "step `pay` has the new output")
    said(cli("approve", run.run_id, "--by", "ann"), 0, "step `send` is held (breakpoint)")
    new = '{"approved": true, "value": "changed"}'
    said(cli("set-output", run.run_id, "ask", new, "--reason", "wrong"), 0, "Done: step `ask` has the new output.")
    said(cli("set-output", run.run_id, "ask", new, "--reason", "wrong"), 1, "that is the step's output already")
    said(cli("resume", run.run_id, "send"), 0, "step `send` calls `echo`")
    assert run.until_over().output == '"changed"'


def test_a_command_in_json_is_as_good(start: Start) -> None:
    """What a console producer says to a run, by its request's id, is decided on like the commands."""
    run = start("sale")
    run.until(outcome.signals)
    run.send({"request_id": run.request, "command": "signal", "name": "payment", "correlation": "o 7", "payload": [1]})
    run.until(asks)
    run.send({"run_id": run.run_id, "command": "approve", "step": "ask", "by": "ann"})
    assert run.until_over().output == "[1]"


def test_a_large_payload_goes_through_the_store(cli: Cli, start: Start, tmp_path: Path) -> None:
    """The history has a reference; who approves it is shown the whole, and the tool gets it."""
    run = start("sale")
    run.until(outcome.signals)
    large = {"text": "x" * INLINE_BYTES}
    (tmp_path / "large.json").write_text(json.dumps(large))
    said(
        cli("signal", run.run_id, "payment", "--correlation", "o 7", "--payload", f"@{tmp_path}/large.json"),
        0,
        "takes the signal",
    )
    assert is_reference(json.loads(run.until(asks).steps["pay"].output or ""))
    shown = cli("approve", run.run_id, "--by", "ann")
    said(shown, 0, "step `ask` completed")
    assert json.dumps(large, indent=2) in shown.stderr
    assert run.until_over().status is RunStatus.COMPLETED


def test_a_run_hears_that_its_child_cannot_start(start: Start) -> None:
    """Intake refuses the request, and the step that waits fails with the reason, instead of waiting for ever."""
    state = start("parent").until_over()
    assert state.failure is not None
    assert (state.failure.kind, "no workflow is called `nowhere`" in state.failure.message) == ("unknown_workflow", True)


def test_an_unknown_run_is_said_and_nothing_is_sent(cli: Cli, stack: Settings, cluster: clients.Cluster) -> None:
    """Exit code 1; where the beginning of an id can't be looked up, that is said."""
    source = clients.reader(stack)
    name = clients.name(stack, topics.REQUESTS)
    places = range(cluster.partitions["requests"])

    def ends() -> list[int]:
        return [clients.watermarks(source, name, each)[1] for each in places]

    before = ends()
    said(cli("pause", "no such request"), 1, "There is no run `no such request`: nothing was sent")
    said(cli("pause", str(uuid.uuid4())), 1, "There is no run")
    said(cli("pause", "00000000"), 1, "There is no run `00000000`")
    said(cli("pause", "00000000", FOLDFLOW_API_PORT="9"), 4, "The API at", "can't be reached")
    said(cli("pause", "x", FOLDFLOW_BOOTSTRAP_SERVERS="127.0.0.1:9"), 4, "foldflow up")
    assert ends() == before
    source.close()


def test_the_beginning_of_an_id_will_do(cli: Cli, start: Start) -> None:
    """As `show` does: the read API knows which run it is."""
    run = start("two")
    run.until(asks)
    done = cli("pause", run.run_id[:13])
    for _ in range(10):  # the view follows the topic within milliseconds, a busy machine aside
        if done.returncode == 0:
            break
        done = cli("pause", run.run_id[:13])
    said(done, 0, "the run starts nothing more")
    assert run.until(lambda state: state.paused)


def test_who_does_not_wait_is_told_where_it_was_sent(cli: Cli, start: Start) -> None:
    """--no-wait sends and ends with 0; for a run that is not there the ledger's answer is a dead letter."""
    run = start("two")
    run.until(asks)
    done = cli("pause", run.run_id, "--no-wait", "--json")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (0, "sent")
    run.until(lambda state: state.paused)
    said(cli("pause", str(uuid.uuid4()), "--no-wait"), 0, "Sent.")


# --- `foldflow run --wait` ---

Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(environment: dict[str, str], cluster: clients.Cluster) -> Iterator[Begin]:
    """Return what starts `foldflow run` in the background, and end at the end what didn't."""
    del cluster
    begun: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **more: Any) -> subprocess.Popen[str]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        line = [sys.executable, "-m", "infra.cli.main", "run", *arguments]
        begun.append(subprocess.Popen(line, env=environment, text=True, **streams))
        return begun[-1]

    yield run
    for each in begun:
        each.kill()
        each.wait()


def reads(process: subprocess.Popen[str], text: str) -> str:
    """Read what a command says up to a line with this text in it."""
    assert process.stderr
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"it ended without saying {text}")


def test_whoever_follows_a_run_is_shown_the_command_that_answers(cli: Cli, begin: Begin) -> None:
    """Without a terminal each thing that is waited for is said once, ready to be run; the run goes on by it, to its output."""
    process = begin("two", "--wait", "--break-at", "both")
    for text in ("First?", "Second?", "step `both` is held"):
        command = reads(process, text).split(": foldflow ")[1]
        said(cli(*shlex.split(command), "--by", "bo", *(["--yes"] if command.startswith("approve") else [])), 0, "Done")
    output, rest = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert json.loads(output.split("\n", 1)[1]) == {"one": "bo", "other": True}
    assert "foldflow approve" not in rest


def test_whoever_says_yes_is_not_asked(cli: Cli, cluster: clients.Cluster, stack: Settings) -> None:
    """--yes approves in the login name, and the history says so; one that names other people stays open."""
    done = cli("run", "two", "--wait", "--yes", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["output"]) == (0, {"one": getpass.getuser(), "other": True}), done.stderr
    line = Line(stack, cluster, found["run_id"])
    answers = [json.loads(each.output or "") for name, each in line.catch_up().steps.items() if name != "both"]
    assert [answer["reason"] for answer in answers] == ["--yes", "--yes"]
    line.close()


def test_what_is_long_answered_is_not_asked_again(cli: Cli, start: Start) -> None:
    """Whoever follows an old run from its beginning is shown only what it waits for now."""
    run = start("two")
    run.until(lambda state: len(outcome.approvals(state)) == 2)
    said(cli("approve", run.run_id, "one", "--yes"), 0)
    again = cli("run", "two", "-i", '{"order": "o 7"}', "--request-id", run.request, "--wait", "--timeout", "3s")
    said(again, 3, "step `other` waits for an approval")
    assert "step `one` waits" not in again.stderr
    done = cli("run", "two", "-i", '{"order": "o 7"}', "--request-id", run.request, "--wait", "--yes")
    said(done, 0, "Completed")
    assert "Ignored" not in done.stderr


def test_a_run_that_is_cancelled_ends_the_wait(cli: Cli, begin: Begin) -> None:
    """Exit code 1, who did it and why."""
    process = begin("two", "--wait")
    reads(process, "First?")
    assert process.stdout
    said(cli("cancel", process.stdout.readline().strip(), "--by", "bo", "--reason", "asked twice"), 0)
    _, rest = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, "Cancelled by bo: asked twice." in rest) == (1, True), rest


def test_a_step_that_is_not_there_is_no_breakpoint(cli: Cli) -> None:
    """The request is refused with the nearest right name."""
    said(cli("run", "two", "--wait", "--break-at", "bth"), 2, "unknown_step", "did you mean `both`?")


def test_a_person_at_a_terminal_is_asked(begin: Begin, tmp_path: Path, environment: dict[str, str], cli: Cli) -> None:
    """The approval is shown, edited in the editor, and approved; the run goes on with what it became."""
    editor = tmp_path / "editor"
    editor.write_text(f"#!{sys.executable}\nimport pathlib, sys\npathlib.Path(sys.argv[1]).write_text('[2]')\n")
    editor.chmod(0o755)
    ours, theirs = pty.openpty()
    environment["EDITOR"] = str(editor)
    process = begin("sale", "--wait", "-p", "order=o 7", stdin=theirs, stderr=theirs)
    del environment["EDITOR"]
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 10_000).decode()
        seen = seen.split(text, 1)[1]

    assert process.stdout
    identity = process.stdout.readline().strip()
    until("waits for a signal")
    said(cli("signal", identity, "payment", "--correlation", "o 7", "--payload", "[1]"), 0)
    until("Send to o 7?")
    until("[a]pprove, [e]dit, [r]eject, [l]ater? ")
    os.write(ours, b"e\n")
    until("[l]ater? ")
    os.write(ours, b"a\n")
    output, _ = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    assert (process.returncode, json.loads(output)) == (0, [2])
