"""`foldflow sql`: real views of decisions on real Kafka, asked through the API, at a prompt, and in their file."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served_api import histories, served

from events import topics
from infra.cli.sql_prompt import Prompt
from streams import kafka as clients
from streams.envelope import Outgoing
from streams.settings import Settings


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return settings with topics that hold decisions of some runs."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    clients.connect(made)
    log = histories.logs(31, 8, 0.0, histories.BOTH)
    clients.send(made, [Outgoing(topics.DECISIONS, b"", each.value, [], each.partition) for each in log.records()])
    return made


def foldflow(settings: Settings, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `foldflow sql` as a user types it."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
        "FOLDFLOW_API_PORT": str(settings.api_port),
        "FOLDFLOW_DATA_DIR": str(settings.data_dir),
    }
    line = [sys.executable, "-m", "infra.cli.main", "sql", *arguments]
    return subprocess.run(line, env=environment, input=given, capture_output=True, text=True, timeout=60, check=False)


def test_a_question_is_answered_live_and_afterwards_from_the_file(own: Settings) -> None:
    """Given an API on decisions in Kafka; when asked as JSON, CSV and a table; then all say the same, as its file does later."""
    question = "SELECT workflow, count(*) AS runs FROM runs GROUP BY 1 ORDER BY 1"
    with served(own) as client:
        client.timeout = 30  # a question may take that long
        asked = client.get("/sql", params={"query": question}).raise_for_status()
        rows = [json.loads(line) for line in asked.text.splitlines()]
        assert sum(row["runs"] for row in rows) >= 8
        assert asked.headers["foldflow-complete"] == "true"
        assert asked.headers["foldflow-lag"] == "0"
        assert "etag" not in asked.headers
        said = foldflow(own, "--json", given=question)
        assert [json.loads(line) for line in said.stdout.splitlines()] == rows, said.stderr
        table = list(csv.DictReader(io.StringIO(foldflow(own, question, "--csv").stdout)))
        assert [{**row, "runs": int(row["runs"])} for row in table] == rows
        cut = foldflow(own, "FROM decisions", "--limit", "3", "--json")
        assert (len(cut.stdout.splitlines()), "only the first 3 rows" in cut.stderr, cut.returncode) == (3, True, 0)
        held = foldflow(own, question, "--file", str(own.data_dir / "views.duckdb"))
        assert (held.returncode, "held by another process" in held.stderr) == (4, True)
    afterwards = foldflow(own, question, "--json")
    assert [json.loads(line) for line in afterwards.stdout.splitlines()] == rows, afterwards.stderr
    assert "as it lies" in afterwards.stderr


def test_what_is_refused_or_wrong_is_a_problem_with_a_hint(own: Settings) -> None:
    """Given an API; when it is asked to change, to read files, or for what isn't there; then it says why not, and goes on."""
    with served(own) as client:
        client.timeout = 30  # a question may take that long
        for query, status, kind in (
            ("DELETE FROM runs", 422, "sql-refused"),
            ("SELECT * FROM read_text('/etc/passwd')", 422, "sql-refused"),
            ("SELECT runid FROM runs", 400, "sql-wrong"),
        ):
            problem = client.get("/sql", params={"query": query})
            assert (problem.status_code, problem.headers["content-type"]) == (status, "application/problem+json"), problem.text
            assert problem.json()["type"] == f"urn:foldflow:{kind}"
            assert problem.json()["hint"]
        wrong = foldflow(own, "SELECT runid FROM runs")
        assert (wrong.returncode, "run_id" in wrong.stderr, wrong.stdout) == (2, True, "")
        assert client.get("/health").json()["status"] == "ok"


def test_large_answers_stream_and_nobody_waits_for_a_slow_reader(own: Settings) -> None:
    """Given somebody who reads a large answer slowly; when others ask and the API stops; then neither waits for them."""
    with served(own) as client:
        client.timeout = 30  # a question may take that long
        query = "SELECT i, hash(i) AS h FROM range(200000) t(i)"
        with client.stream("GET", "/sql", params={"query": query, "limit": 200_000}) as slow:
            lines = slow.iter_lines()
            assert json.loads(next(lines))["i"] == 0
            assert client.get("/sql", params={"query": "SELECT 1 AS n"}).text == '{"n":1}\n'
            assert sum(1 for _ in lines) == 199_999


def test_the_prompt_reads_queries_of_several_lines_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given lines typed at the prompt; when they are queries or commands; then each whole query is asked, and tables are told."""
    typed = iter(["", ".tables", ".schema runs", ".schema nothing", "SELECT 1", "AS n;", "SELECT 2;", ".quit", "SELECT 3;"])
    asked: list[str] = []
    Prompt(asked.append, tmp_path / "history", lambda _prompt: next(typed)).run()
    assert asked == ["SELECT 1\nAS n;", "SELECT 2;"]
    said = capsys.readouterr()
    assert "decisions" in said.out
    assert "labels  MAP(VARCHAR, VARCHAR)" in said.out
    assert "TABLE is one of" in said.err
