import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from infra.embedded import nursery
from streams.settings import Settings

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def foldflow(cli_environment: dict[str, str], tmp_path: Path) -> Iterator[Cli]:
    """Run `foldflow …` as its own process; whatever it left running is stopped at the end."""

    def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(
            command, env=cli_environment, cwd=tmp_path, input=stdin, capture_output=True, text=True, check=False, timeout=300
        )

    yield run
    run("down")


def status_of(foldflow: Cli) -> dict[str, dict[str, Any]]:
    """Return what `status` says of each process, by name."""
    return {item["name"]: item for item in json.loads(foldflow("status", "--json").stdout)}


def pids(foldflow: Cli) -> dict[str, int]:
    """Return the pid of each process, by name."""
    return {name: item["pid"] for name, item in status_of(foldflow).items()}


def keeper_pid(environment: dict[str, str]) -> int:
    """Return the pid of the process that starts again what dies."""
    supervisor, _ = json.loads(Path(environment["FOLDFLOW_DATA_DIR"], "run", "state.json").read_text())["supervisor"]
    return int(supervisor)


def told(environment: dict[str, str]) -> str:
    """Return what the keeper has said."""
    return Path(environment["FOLDFLOW_DATA_DIR"], "logs", "up.log").read_text()


def lives(pid: int) -> bool:
    """Say whether a process still runs."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def until(condition: Callable[[], bool], explain: Callable[[], object], patience_s: float = 60) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def test_up_and_down_twice_keeps_the_data(foldflow: Cli) -> None:
    """What `up --detach` started outlives it; `down` ends it; a second start finds the records of the first."""
    first = foldflow("up", "--only", "kafka,model", "--detach")
    assert first.returncode == 0, first.stderr
    status = foldflow("status", "--json")
    assert status.returncode == 0
    assert {item["name"]: item["condition"] for item in json.loads(status.stdout)} == {"kafka": "ready", "model": "ready"}
    assert foldflow("kafka", "topics", "--create", "--topic", "kept").returncode == 0
    assert foldflow("kafka", "console-producer", "--topic", "kept", stdin="a record\n").returncode == 0

    again = foldflow("up", "--only", "kafka,model", "--detach")
    assert again.returncode == 0
    assert "Already up" in again.stderr

    before = pids(foldflow)
    assert foldflow("down").returncode == 0
    assert foldflow("status").returncode == 3

    second = foldflow("up", "--only", "kafka", "--detach")
    assert second.returncode == 0, second.stderr
    assert pids(foldflow)["kafka"] != before["kafka"]
    read = foldflow("kafka", "console-consumer", "--topic", "kept", "--from-beginning", "--max-messages", "1")
    assert read.stdout == "a record\n", read.stderr


def test_a_taken_port_is_named_with_its_holder_and_its_setting(foldflow: Cli, cli_environment: dict[str, str]) -> None:
    """Nothing is started, and the message says what to change."""
    host, _, port = cli_environment["FOLDFLOW_BOOTSTRAP_SERVERS"].rpartition(":")
    with socket.create_server((host, int(port))):
        done = foldflow("up", "--only", "kafka", "--detach")
    assert done.returncode == 1
    assert f"Port {port}" in done.stderr
    assert f"process {os.getpid()} " in done.stderr
    assert "FOLDFLOW_BOOTSTRAP_SERVERS" in done.stderr
    assert foldflow("status").returncode == 3


def test_what_is_killed_is_back_within_seconds(foldflow: Cli, cli_environment: dict[str, str]) -> None:
    """It is told with its last lines, has a new pid and is counted; the others stay; `down` leaves nothing, nor the keeper."""
    assert foldflow("up", "--only", "kafka,model", "--detach").returncode == 0
    before = pids(foldflow)
    os.kill(before["model"], signal.SIGKILL)
    until(lambda: pids(foldflow)["model"] != before["model"], lambda: told(cli_environment))
    until(lambda: foldflow("status").returncode == 0, lambda: told(cli_environment))
    after = status_of(foldflow)
    assert (after["model"]["restarts"], after["kafka"]["restarts"]) == (1, 0)
    assert after["kafka"]["pid"] == before["kafka"]
    assert f"model (pid {before['model']}) has died" in told(cli_environment)
    assert "model ready at" in told(cli_environment)
    assert "ready (restart 1)" in foldflow("status").stdout
    everything = {*before.values(), after["model"]["pid"], keeper_pid(cli_environment)}
    assert foldflow("down").returncode == 0
    assert {pid for pid in everything if lives(pid)} == set()


def test_a_killed_keeper_takes_nothing_with_it(foldflow: Cli, cli_environment: dict[str, str]) -> None:
    """The others live on, `status` says that nobody watches, and the next `up` brings a new one, which keeps."""
    assert foldflow("up", "--only", "model", "--detach").returncode == 0
    before, keeper = pids(foldflow), keeper_pid(cli_environment)
    again = foldflow("up", "--only", "model", "--detach")
    assert "Already up" in again.stderr
    assert keeper_pid(cli_environment) == keeper, "one that lives stays"
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not lives(keeper), lambda: "the keeper lives")
    status = foldflow("status")
    assert status.returncode == 0
    assert "not started again by itself" in status.stderr
    again = foldflow("up", "--only", "model", "--detach")
    assert again.returncode == 0
    assert "Already up" in again.stderr
    assert pids(foldflow) == before
    assert lives(keeper_pid(cli_environment))
    os.kill(before["model"], signal.SIGKILL)
    until(lambda: pids(foldflow)["model"] != before["model"], lambda: told(cli_environment))


def test_up_starts_more_and_keeps_all_of_it(foldflow: Cli, cli_environment: dict[str, str]) -> None:
    """A second `up` has one keeper for what both started, each with the settings that it was started with."""
    assert foldflow("up", "--only", "model", "--detach").returncode == 0
    first = keeper_pid(cli_environment)
    own = cli_environment["FOLDFLOW_LOCAL_MODEL_URL"]
    cli_environment["FOLDFLOW_LOCAL_MODEL_URL"] = "http://127.0.0.1:9"  # of another terminal, say
    assert foldflow("up", "--only", "kafka", "--detach").returncode == 0
    until(lambda: not lives(first), lambda: "two keepers")
    before = pids(foldflow)
    for name in ("model", "kafka"):
        os.kill(before[name], signal.SIGKILL)
    until(lambda: not set(pids(foldflow).values()) & set(before.values()), lambda: told(cli_environment))
    until(lambda: foldflow("status").returncode == 0, lambda: told(cli_environment))
    assert httpx.get(f"{own}/health").status_code == 200


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each begins by itself")
def test_processes_of_ours_share_what_they_import(foldflow: Cli) -> None:
    """Two that are started together are forks: each has its name, session and log, and half its memory is not its own."""
    assert foldflow("up", "--only", "kafka,intake,tool", "--detach").returncode == 0
    for name in ("intake", "tool"):
        process = psutil.Process(pids(foldflow)[name])
        assert process.cmdline()[0].endswith(f"-m infra.cli.main worker {name}")
        assert os.getsid(process.pid) == process.pid
        (log,) = status_of(foldflow)[name]["logs"]
        assert {Path(f"/proc/{process.pid}/fd/{each}").readlink() for each in (1, 2)} == {Path(log)}
        memory = process.memory_full_info()
        assert memory.uss < memory.rss / 2, memory
    left = [each for each in psutil.process_iter() if set(nursery.COMMAND) <= set(cmdline(each))]
    assert left == [], "who started them ends with `up`"


def test_a_nursery_has_no_thread_when_it_forks() -> None:
    """A fork takes one thread along: what others hold at that moment, a lock of an allocator say, would stay held for ever."""
    look = "from infra.embedded import nursery; nursery.prepare(); import os; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-P", "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def cmdline(process: psutil.Process) -> list[str]:
    """Return a process's command line; that of one that is gone is empty."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


@pytest.mark.timeout(600)  # the pauses alone are 31 s
def test_what_never_comes_up_again_is_given_up(foldflow: Cli, cli_environment: dict[str, str], tmp_path: Path) -> None:
    """After five starts that failed it is left dead and says why; the rest goes on, and `up` tries again once it is mended."""
    tools = tmp_path / "tools.py"
    right = 'def twice(value: int) -> int:\n    """Double it."""\n    return 2 * value\n'
    tools.write_text(right)
    cli_environment["FOLDFLOW_TOOL_PATHS"] = json.dumps([str(tools)])
    up = foldflow("up", "--only", "kafka,tool", "--detach")
    assert up.returncode == 0, up.stderr
    before = pids(foldflow)
    tools.write_text("def twice(\n")
    os.kill(before["tool"], signal.SIGKILL)
    until(lambda: "is given up" in told(cli_environment), lambda: told(cli_environment), 400)
    found = status_of(foldflow)
    assert (found["tool"]["condition"], found["tool"]["restarts"]) == ("given up", 5)
    assert found["kafka"]["condition"] == "ready"
    assert found["kafka"]["pid"] == before["kafka"]
    status = foldflow("status")
    assert status.returncode == 1
    assert "given up" in status.stdout
    assert "tool is given up: 5 starts in a row failed" in told(cli_environment)
    assert "SyntaxError" in status.stderr
    tools.write_text(right)
    mended = foldflow("up", "--only", "kafka,tool", "--detach")
    assert mended.returncode == 0, mended.stderr
    assert foldflow("status").returncode == 0


def test_a_first_start_that_fails_leaves_nothing(foldflow: Cli, cli_environment: dict[str, str], tmp_path: Path) -> None:
    """`up --detach` says which process died and why, stops what it had started, and ends with 1."""
    tools = tmp_path / "tools.py"
    tools.write_text("def twice(\n")
    cli_environment["FOLDFLOW_TOOL_PATHS"] = json.dumps([str(tools)])
    up = foldflow("up", "--only", "kafka,tool", "--detach")
    assert up.returncode == 1
    assert "tool (pid" in up.stderr
    assert "SyntaxError" in up.stderr
    assert foldflow("status").returncode == 3


@pytest.mark.thorough
def test_in_the_foreground_too_what_dies_is_started_again(foldflow: Cli, cli_environment: dict[str, str], tmp_path: Path) -> None:
    """The terminal shows what died and that it is back; `down` elsewhere ends it in order."""
    command = [sys.executable, "-m", "infra.cli.main", "up", "--only", "kafka,model"]
    up = subprocess.Popen(
        command, env=cli_environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert up.stderr is not None
    assert any("Ready." in line for line in up.stderr)
    before = pids(foldflow)
    os.kill(before["model"], signal.SIGKILL)
    lines = list(iter(up.stderr.readline, "model is started again in 1 s.\n"))
    assert any(f"model (pid {before['model']}) has died" in line for line in lines)
    assert "restart 1" in up.stderr.readline()
    until(lambda: foldflow("status").returncode == 0, lambda: "not ready")
    assert pids(foldflow)["model"] != before["model"]
    assert foldflow("down").returncode == 0
    _, told_last = up.communicate(timeout=120)
    assert up.returncode == 0
    assert "Stopped: model, kafka." in told_last
    assert foldflow("status").returncode == 3


def test_ctrl_c_stops_everything(foldflow: Cli, cli_environment: dict[str, str], tmp_path: Path) -> None:
    """Kafka is stopped last, and nothing is left."""
    command = [sys.executable, "-m", "infra.cli.main", "up", "--only", "kafka,model"]
    up = subprocess.Popen(
        command, env=cli_environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert up.stderr is not None
    assert any("Ready." in line for line in up.stderr)
    up.send_signal(signal.SIGINT)
    _, told = up.communicate(timeout=120)
    assert up.returncode == 0
    assert "Stopped: model, kafka." in told
    assert foldflow("status").returncode == 3


def test_the_model_keeps_to_a_json_schema(model: str) -> None:
    """The constrained output parses, and has what the schema asks for."""
    schema = {
        "type": "object",
        "properties": {"rating": {"enum": ["buy", "hold", "sell"]}},
        "required": ["rating"],
        "additionalProperties": False,
    }
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Rate this share."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "rating", "strict": True, "schema": schema}},
        "max_tokens": 50,
        "temperature": 0,
        "seed": 1,
    }
    answer = httpx.post(f"{model}/v1/chat/completions", json=body, timeout=180).raise_for_status().json()
    assert json.loads(answer["choices"][0]["message"]["content"])["rating"] in {"buy", "hold", "sell"}


def test_each_test_has_topics_of_its_own(settings: Settings, kafka: str) -> None:
    """Tests share a broker, not topics."""
    assert settings.bootstrap_servers == kafka
    assert settings.topic_prefix != "foldflow."
