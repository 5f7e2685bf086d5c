"""What runs cost, over HTTP and at the command line, on real Kafka, with histories that the real core decided."""

import json
from decimal import Decimal
from typing import Any

import pytest
from served_api import histories, served
from typer.testing import CliRunner, Result

from events import topics
from infra.cli.main import command_line
from streams import kafka
from streams.envelope import Outgoing
from streams.registry import publish
from streams.settings import Settings


def cost(monkeypatch: pytest.MonkeyPatch, settings: Settings, *arguments: str) -> Result:
    """Run `foldflow cost`."""
    monkeypatch.setenv("FOLDFLOW_API_PORT", str(settings.api_port))
    return CliRunner().invoke(command_line(["cost"]), ["cost", *arguments])


def usd(sums: list[dict[str, Any]]) -> Decimal:
    """Return the sum of JSON numbers as a client would add them, exactly."""
    return sum((Decimal(str(each["cost_usd"])) for each in sums), Decimal(0))


def test_costs_are_the_same_in_lists_in_details_and_at_the_command_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given runs with faults of every kind, then groups, single runs and the command tell the runs' sums."""
    own = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(own)
    publish(own, [histories.SPEC, histories.RICH])
    log = histories.logs(21, 8, 0.3, histories.BOTH)
    kafka.send(own, [Outgoing(topics.DECISIONS, b"", each.value, [], each.partition) for each in log.records()])
    with served(own) as client:
        listed = client.get("/runs", params={"limit": 1000}).json()["runs"]
        for by in ("workflow", "model", "tool", "step", "run", "day", "prices", "call"):
            found = client.get("/cost", params={"by": by, "limit": 2}).json()
            assert usd([found["total"]]) == usd(listed) > 0
            assert usd([*found["groups"], *([found["rest"]] if found["rest"] else [])]) == usd(listed)
        for run in listed:
            of_run = client.get(f"/runs/{run['run_id'][:13]}/cost").json()
            assert (of_run["run_id"], of_run["by"], of_run["own"]["cost_usd"]) == (run["run_id"], "step", run["cost_usd"])
            assert usd([of_run["own"], of_run["children"]]) == usd([of_run["total"]])
        assert client.get("/cost", params={"since": "2h"}).json()["total"]["calls"] == 0  # these histories are of 2023
        assert client.get("/cost", params={"until": "2h"}).json()["total"] == client.get("/cost").json()["total"]
        assert client.get("/cost", params={"label": "nobody=has"}).json()["total"]["calls"] == 0

        # The command says what the API says, and what its sums lack.
        said = cost(monkeypatch, own, "--by", "run", "--json")
        assert (said.exit_code, json.loads(said.stdout)) == (0, client.get("/cost", params={"by": "run", "limit": 20}).json())
        shown = cost(monkeypatch, own, "--by", "tool", "--limit", "1")
        assert shown.exit_code == 0
        assert all(
            word in shown.output for word in ("(models)", "cached", "others", "total", "price is unknown", "more: --limit")
        )
        costly = max(listed, key=lambda run: run["cost_usd"])
        one = cost(monkeypatch, own, costly["run_id"][:13])
        assert f"run {costly['run_id']}: ${costly['cost_usd']:.2f}"[:-1] in one.output
        assert cost(monkeypatch, own, "--since", "2h").output == "There are no such calls.\n"

        # What is wrong is said, with what to do.
        for arguments in (("ffffffffffff",), ("--since", "May"), ("--label", "x"), ("--by", "moon"), ("x", "--workflow", "w")):
            assert cost(monkeypatch, own, *arguments).exit_code == 2, arguments
        assert client.get("/cost", params={"by": "moon"}).headers["content-type"].startswith("application/problem+json")
    assert cost(monkeypatch, own).exit_code == 4
