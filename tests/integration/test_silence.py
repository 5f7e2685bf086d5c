"""What commands that wait say when Kafka goes away under them."""

import os
import subprocess
import sys
from pathlib import Path

from infra.embedded.supervisor import Supervisor
from streams import kafka, registry
from streams.workflow.spec import WorkflowSpec

ROOT = Path(__file__).parents[2]


def test_commands_that_wait_say_that_kafka_has_gone(mortal: Supervisor) -> None:
    """Given `tail`, and a `run` that nobody works on; when Kafka ends; then both say so, and `run` ends by the code for that."""
    settings = mortal.settings
    kafka.connect(settings)
    registry.publish(settings, [WorkflowSpec.model_validate({"name": "idle", "steps": {"nap": {"sleep": "1s"}}})])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= {"FOLDFLOW_BOOTSTRAP_SERVERS": settings.bootstrap_servers, "FOLDFLOW_DATA_DIR": str(settings.data_dir)}

    def started(*line: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "infra.cli.main", *line]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    tail, run = started("tail", "requests", "--last", "5", "--json"), started("run", "idle", "--wait", "--timeout", "12s")
    try:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert run.stdout is not None
        assert run.stdout.readline().strip()
        assert "WorkflowRequest" in tail.stdout.readline()
        mortal.down()
        assert "can't be reached; waiting for it" in tail.stderr.readline()
        _, said = run.communicate(timeout=60)
        assert run.returncode == 4
        assert "Kafka can't be reached any more" in said
    finally:
        for process in (tail, run):
            process.kill()
            process.communicate()
