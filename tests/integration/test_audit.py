"""The audit report over HTTP and on the command line, on real Kafka, with histories that the real core decided."""

import json
import re
from pathlib import Path

import pytest
from served_api import histories, served
from typer.testing import CliRunner, Result

from events import ids, topics
from infra.cli.main import command_line
from projections.replay_sources import run_of
from streams import kafka
from streams.envelope import Outgoing
from streams.registry import publish
from streams.settings import Settings


def foldflow(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(arguments), list(arguments))


def test_a_report_is_asked_for_over_http_and_on_the_command_line(
    few: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given runs on Kafka, whole and broken, then page, JSON and exit codes say which is which, and a wrong id is a problem."""
    own = few.model_copy(update={"partitions": histories.PARTITIONS, "topic_prefix": f"{few.topic_prefix}audit."})
    kafka.connect(own)
    publish(own, [histories.SPEC, histories.RICH])
    log = histories.logs(21, 12, 0.3, histories.BOTH)
    # With their keys and headers, as the orchestrator writes them: who checks looks at those too.
    kafka.send(
        own,
        [
            Outgoing(topics.DECISIONS, run_of(each.value) or b"", each.value, histories.claim(each.value), each.partition)
            for each in log.records()
        ],
    )
    monkeypatch.setenv("FOLDFLOW_API_PORT", str(own.api_port))
    whole = next(run for run in log.states if run not in log.broken)
    broken = next(iter(log.broken & log.states.keys()))
    with served(own) as client:
        answer = client.get(f"/runs/{whole[:13]}/audit")
        told = answer.json()
        assert (answer.status_code, answer.headers["Foldflow-Integrity"]) == (200, "intact")
        assert (told["version"], told["run"]["run_id"], told["integrity"]["head"]) == (1, whole, log.states[whole].head.hex())
        assert told["integrity"]["again"] == told["integrity"]["decisions"] == log.states[whole].seq
        assert told["integrity"]["verify"][0] == f"foldflow verify {whole}"
        assert told["run"]["ledger"][0]["topic"] == f"{own.topic_prefix}decisions"
        page = client.get(f"/runs/{whole}/audit.html")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert whole in page.text
        assert client.get("/runs/00000000/audit").status_code == client.get("/runs/00000000/audit.html").status_code == 404

        file = tmp_path / "audit.html"
        done = foldflow("audit", whole, "-o", str(file))
        assert (done.exit_code, "the record is intact" in done.stderr) == (0, True), done.output
        made = re.compile(r"\d+ \w+ \d{4}, [\d:]+ UTC|, in [^<]*<|\d+\.?\d* m?s\b")
        assert made.sub("", file.read_text()) == made.sub("", page.text)
        done = foldflow("audit", broken, "--json")
        assert (done.exit_code, json.loads(done.stdout)["integrity"]["verdict"]) == (1, "damaged")
        assert foldflow("audit", ids.run_id("nobody")).exit_code == 2
        assert foldflow("audit", whole, "-o", str(tmp_path / "no" / "folder.html")).exit_code == 2
    assert foldflow("audit", whole).exit_code == 4
