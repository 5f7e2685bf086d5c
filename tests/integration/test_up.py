import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from streams.settings import Settings

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def foldflow(cli_environment: dict[str, str], tmp_path: Path) -> Iterator[Cli]:
    """Run `foldflow …` as its own process; whatever it left running is stopped at the end."""

    def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(
            command, env=cli_environment, cwd=tmp_path, input=stdin, capture_output=True, text=True, check=False, timeout=120
        )

    yield run
    run("down")


def pids(foldflow: Cli) -> dict[str, int]:
    """Return the pid of each process, by name."""
    return {item["name"]: item["pid"] for item in json.loads(foldflow("status", "--json").stdout)}


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


def test_a_killed_process_is_noticed_and_started_again(foldflow: Cli) -> None:
    """`status` says which one died and exits with 1; `up` starts that one alone."""
    assert foldflow("up", "--only", "kafka,model", "--detach").returncode == 0
    before = pids(foldflow)
    os.kill(before["model"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (status := foldflow("status")).returncode == 0 and time.monotonic() < deadline:
        pass
    assert status.returncode == 1
    assert f"model (pid {before['model']}) has died" in status.stderr
    assert foldflow("up", "--only", "kafka,model", "--detach").returncode == 0
    after = pids(foldflow)
    assert after["kafka"] == before["kafka"]
    assert after["model"] != before["model"]


def test_in_the_foreground_a_death_stops_everything(foldflow: Cli, cli_environment: dict[str, str], tmp_path: Path) -> None:
    """The rest is stopped, the dead one is named, the exit code isn't 0."""
    command = [sys.executable, "-m", "infra.cli.main", "up", "--only", "kafka,model"]
    up = subprocess.Popen(
        command, env=cli_environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert up.stderr is not None
    assert any("Ready." in line for line in up.stderr)
    os.kill(pids(foldflow)["model"], signal.SIGKILL)
    _, told = up.communicate(timeout=30)
    assert up.returncode == 1
    assert "model (pid" in told
    assert "Stopped: kafka." in told
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
    _, told = up.communicate(timeout=30)
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
    answer = httpx.post(f"{model}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    assert json.loads(answer["choices"][0]["message"]["content"])["rating"] in {"buy", "hold", "sell"}


def test_each_test_has_topics_of_its_own(settings: Settings, kafka: str) -> None:
    """Tests share a broker, not topics."""
    assert settings.bootstrap_servers == kafka
    assert settings.topic_prefix != "foldflow."
