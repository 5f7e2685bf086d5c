"""What the processes that listen say when they can't."""

import os
import socket
import subprocess
import sys

import pytest

from api.tokens import AUDITOR, create
from streams.settings import Settings


@pytest.mark.parametrize(("command", "setting"), [("api", "FOLDFLOW_API_PORT"), ("gateway", "FOLDFLOW_GATEWAY_PORT")])
@pytest.mark.parametrize(
    ("host", "said"),
    [("127.0.0.1", "another process listens there"), ("192.0.2.1", "FOLDFLOW_API_HOST to one of this machine's")],
)
def test_who_cannot_listen_says_so_last(settings: Settings, command: str, setting: str, host: str, said: str) -> None:
    """Given a port that is taken, or a foreign address; then the process ends by 1, and its last line says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
            "FOLDFLOW_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
            "FOLDFLOW_TOPIC_PREFIX": settings.topic_prefix,
            "FOLDFLOW_DATA_DIR": str(settings.data_dir),
            "FOLDFLOW_API_HOST": host,
            setting: str(port),
        }
        if host != "127.0.0.1":
            environment["FOLDFLOW_API_TOKENS"] = str(settings.data_dir / "tokens")
            create(settings.data_dir / "tokens", AUDITOR, "ann")
        line = [sys.executable, "-m", "infra.cli.main", command]
        done = subprocess.run(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
        )
    last = done.stdout.rstrip().splitlines()[-1]
    assert done.returncode == 1, done.stdout
    assert f"{host}:{port}" in last
    assert setting in last
    assert said in last
