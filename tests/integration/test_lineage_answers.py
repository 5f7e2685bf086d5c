"""Lineage and pictures over HTTP and on the command line, of a run in real Kafka."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from served_api import served
from typer.testing import CliRunner

from events import topics
from infra.cli.main import command_line
from streams import kafka
from streams.envelope import Outgoing
from streams.registry import publish
from streams.settings import Settings
from streams.testing.histories import Recorded, read

HISTORY = Path(__file__).parents[1] / "histories" / "market_analysis-1.json"


@pytest.fixture
def recorded(few: Settings) -> tuple[Settings, Recorded]:
    """Put a recorded market analysis into Kafka; return settings with a port of their own, and the history."""
    found = read(HISTORY)
    assert found.spec is not None
    publish(few, [found.spec])
    partition = topics.partition_for(found.run_id.encode(), few.partitions)
    kafka.send(few, [Outgoing(topics.DECISIONS, b"", value, [], partition) for value in found.values])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return few.model_copy(update={"api_port": port}), found


def test_lineage_and_a_picture_are_answered(
    recorded: tuple[Settings, Recorded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Given a run in Kafka, then the API and the commands tell where its result comes from, draw it, and say what isn't there."""
    settings, history = recorded
    monkeypatch.setenv("FOLDFLOW_API_PORT", str(settings.api_port))
    run = history.run_id

    def called(*arguments: str) -> Any:
        return CliRunner().invoke(command_line(arguments), arguments)

    with served(settings) as client:
        up = client.get(f"/runs/{run[:8]}/lineage", params={"node": "step/clean", "direction": "up", "depth": 1}).json()
        assert [(each["source"], each["of"], each["into"]) for each in up["edges"]] == [
            (f"step/{run}/fetch", "output.rows", "arguments.rows")
        ]
        whole = client.get(f"/runs/{run}/lineage", params={"about": "all"}).json()
        assert {each["kind"] for each in whole["edges"]} == {"causes", "feeds", "gates"}
        assert {end for each in whole["edges"] for end in (each["source"], each["target"])} <= {
            each["id"] for each in whole["nodes"]
        }
        missing = client.get(f"/runs/{run}/lineage", params={"node": "step/nope"})
        assert (missing.status_code, missing.json()["type"]) == (404, "urn:foldflow:unknown-node")
        picture = client.get(f"/runs/{run}/lineage.svg")
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/svg+xml")

        shown = called("lineage", run[:8])
        assert shown.exit_code == 0
        assert "fetch (completed, fetch_prices)  output.rows → arguments.rows" in shown.output
        assert json.loads(called("lineage", f"{run}/clean", "--up", "--json", "--depth", "1").stdout) == up
        assert "ToolCallCompleted" in called("lineage", run, "--control", "--depth", "20").output
        assert called("lineage", f"{run}/nope").exit_code == 2
        assert called("lineage", run, "--up", "--down").exit_code == 2
        target = tmp_path / "run.svg"
        assert called("picture", run, "-o", str(target)).exit_code == 0
        assert target.read_text("utf-8") == picture.text
        assert called("picture", "ffffffff").exit_code == 2
    assert called("picture", run).exit_code == 4
