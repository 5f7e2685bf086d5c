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

HISTORIES = Path(__file__).parents[1] / "histories"


@pytest.fixture(params=["market_analysis-1"])
def recorded(few: Settings, request: pytest.FixtureRequest) -> tuple[Settings, Recorded]:
    """Put a recorded history into Kafka; return settings with a port of their own, and the history."""
    found = read(HISTORIES / f"{request.param}.json")
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


@pytest.mark.parametrize("recorded", ["people"], indirect=True)
def test_all_of_a_run_is_shown_from_its_request_on(recorded: tuple[Settings, Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a run that people spoke to, when control is asked for alone, then each decision stands there with what led to it."""
    settings, history = recorded
    monkeypatch.setenv("FOLDFLOW_API_PORT", str(settings.api_port))
    arguments = ("lineage", history.run_id, "--control")
    with served(settings):
        done = CliRunner().invoke(command_line(arguments), arguments, env={"COLUMNS": "150"})
    lines = done.output.splitlines()
    assert (done.exit_code, lines[0].startswith("request "), "StartRun" in lines[1]) == (0, True, True), done.output
    for seq in range(1, len(history.values) + 1):
        assert [line for line in lines if f"decision {seq} " in line], f"decision {seq} is missing:\n{done.output}"
    assert [line for line in lines if line.startswith("├── decision 4 SignalReceived") and line.endswith("SignalAwaited")]
    assert [line for line in lines if line.startswith("decision 2 SignalReceived")], "it comes from outside"
