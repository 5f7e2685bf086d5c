"""`foldflow history`: a real run's decisions, from Kafka to a file that is decided again."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.embedded.supervisor import Supervisor
from streams.settings import Settings
from streams.testing import replay

FLOW = """
name: large
steps:
  a: {tool: {name: echo, arguments: {value: "=[input, input, input]"}}}
  b: {needs: [a], transform: "=size(steps.a.output)"}
"""


@pytest.fixture
def stack(settings: Settings, embedded: Supervisor) -> Iterator[Settings]:
    """Start what a run of tools needs."""
    del embedded
    settings = Settings(**settings.model_dump(exclude={"ready_file"}, exclude_none=True))
    supervisor = Supervisor(settings)
    supervisor.up(frozenset({"intake", "orchestrator", "tool"}))
    yield settings
    supervisor.down()


def test_a_run_s_history_is_decided_again_as_it_was(stack: Settings, tmp_path: Path) -> None:
    """It holds every decision and every payload; a run that there isn't is said to be none."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
        "FOLDFLOW_BOOTSTRAP_SERVERS": stack.bootstrap_servers,
        "FOLDFLOW_TOPIC_PREFIX": stack.topic_prefix,
        "FOLDFLOW_DATA_DIR": str(stack.data_dir),
    }

    def foldflow(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=90, check=False)

    flow, file, given, request = tmp_path / "large.yaml", tmp_path / "run.json", tmp_path / "input.json", str(uuid.uuid4())
    flow.write_text(FLOW)
    given.write_text(json.dumps({"text": "x" * 150_000}))
    assert foldflow("deploy", str(flow)).returncode == 0
    ran = foldflow("run", "large", "--wait", "--input", f"@{given}", "--request-id", request, "--json")
    assert ran.returncode == 0, ran.stderr
    written = foldflow("history", request, "--output", str(file))
    assert written.returncode == 0, written.stderr
    found = replay(file).then_the_same()
    assert (found.run_id, found.decisions) == (json.loads(ran.stdout.splitlines()[-1])["run_id"], 2)
    assert json.loads(file.read_text())["payloads"]
    assert foldflow("verify", "--file", str(file)).returncode == 0
    assert json.loads(foldflow("history", found.run_id).stdout) == json.loads(file.read_text())
    missing = foldflow("history", "no such run")
    assert missing.returncode == 2, missing.stderr
    assert "There is no run `no such run`" in missing.stderr
