"""docs/console-tools.md, to the letter: a run from request to result with Kafka's own tools and kcat."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from served_api import until

from events import ids, topics
from infra.embedded import console, java
from infra.embedded.supervisor import Supervisor
from streams import kafka
from streams.settings import Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "console-tools.md").read_text("utf-8")
HELLO = """
name: hello
input: {type: object, required: [name]}
steps:
  greet:
    tool: {name: echo, arguments: {value: "=input.name"}}
  answer:
    needs: [greet]
    transform: {said: "='Hello, ' + steps.greet.output"}
output: "=steps.answer.output"
"""
RUN = ids.run_id("q-42")

Shell = Callable[[str], str]


def blocks(heading: str) -> list[str]:
    """Return the examples below a heading of the document; those before the first one without."""
    section = TEXT.partition(f"## {heading}\n")[2] if heading else TEXT
    return re.findall(r"```sh\n(.*?)```", re.split(r"^## ", section, flags=re.MULTILINE)[0], re.DOTALL)


@pytest.fixture(scope="module")
def own(embedded: Supervisor, kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Start what a run of tools needs, and the mirror, on topics of their own."""
    folder = tmp_path_factory.mktemp("console")
    (folder / "hello.yaml").write_text(HELLO)
    made = Settings(
        **embedded.settings.model_dump(exclude={"ready_file"}, exclude_none=True)
        | {"bootstrap_servers": kafka, "topic_prefix": f"c{folder.stat().st_ino}.", "data_dir": folder, "partitions": 2}
        | {"workflow_paths": (folder / "hello.yaml",), "json_mirror": True}
    )
    supervisor = Supervisor(made)
    supervisor.up(frozenset({"intake", "orchestrator", "tool", "mirror"}))
    yield made
    supervisor.down()


@pytest.fixture(scope="module")
def shell(own: Settings) -> Shell:
    """Return what runs an example as a person would, with Kafka's tools and `foldflow` on the path, and a broker of ours."""
    tools = own.data_dir / "bin"
    tools.mkdir()
    for name in ("console-producer", "console-consumer", "get-offsets"):
        line = console.command_line(name, ["--bootstrap-server"], "", None)[:-1]
        environment = f"CLASSPATH={shlex.quote(java.environment(java.ensure_jars())['CLASSPATH'])}"
        (tools / f"kafka-{name}").write_text(f'#!/bin/sh\n{environment} exec {shlex.join(line)} "$@"\n')
    (tools / "foldflow").write_text(f'#!/bin/sh\nexec {sys.executable} -m infra.cli.main "$@"\n')
    for each in tools.iterdir():
        each.chmod(0o755)
    (first,), (asked, again, identity) = blocks(""), blocks("Ask for a run")
    del asked, again

    def run(example: str) -> str:
        if "kcat" in example and shutil.which("kcat") is None:
            pytest.skip("kcat is not installed: apt-get install kcat")
        script = f"set -eu\nexport PATH={tools}:$PATH PYTHONPATH={ROOT}\n{first}{identity}{example}"
        script = re.sub(r"\bfoldflow\.(?=requests|decisions|specs)", own.topic_prefix, script)
        script = script.replace("127.0.0.1:29092", own.bootstrap_servers)
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(own.data_dir), "FOLDFLOW_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
        done = subprocess.run(
            ["bash", "-c", script], cwd=own.data_dir, env=environment, capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, (example, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    return run


@pytest.fixture(scope="module")
def asked(own: Settings, shell: Shell) -> str:
    """Ask for the run as the document says, by Kafka's console producer, and wait for its result."""
    shell(blocks("Ask for a run")[0])

    def over() -> bool:
        name = kafka.name(own, topics.DECISIONS_JSON)
        with closing(kafka.reader(own)) as source:
            return any(b'"RunCompleted"' in (each.value() or b"") for each in kafka.read_partitions(source, name, {0: 0, 1: 0}))

    until(over, 60)
    return RUN


@pytest.mark.timeout(300)
def test_a_run_from_request_to_result_by_kafka_s_own_tools(asked: str, shell: Shell) -> None:
    """Given a request by the console producer, then the console consumer shows the run's way and its result."""
    watched = shell(blocks("Watch one run")[0]).splitlines()
    assert [re.findall(r"foldflow_seq:(\d+)", each) for each in watched] == [["1"], ["2"]]
    assert all(asked in each for each in watched)
    (result,) = shell(blocks("The result")[0]).splitlines()
    decision = json.loads(result.partition("\t")[2])
    assert decision["effects"][-1] == {"type": "RunCompleted", "output": {"said": "Hello, you"}}
    counted = dict(reversed(each.split()) for each in shell(blocks("Count events by type")[1]).splitlines())
    assert counted == {"foldflow_input:StartRun": "1", "foldflow_input:ToolCallCompleted": "1"}


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_time_range_by_kafka_s_own_tools(asked: str, shell: Shell) -> None:
    """Given a run of just now, then the range of the last hour holds its decisions."""
    replayed = [json.loads(each) for each in shell(blocks("Replay a time range")[1]).splitlines()]
    assert [(each["run_id"], each["seq"]) for each in replayed] == [(asked, 1), (asked, 2)]


@pytest.mark.timeout(300)
def test_a_run_from_request_to_result_by_kcat(own: Settings, asked: str, shell: Shell) -> None:
    """Given the same request by kcat, then it is the same run; kcat shows its way, its result, a range, counts, and copies it.

    The copy is whole, without Kafka.
    """
    shell(blocks("Ask for a run")[1])
    with closing(kafka.reader(own)) as source:
        name = kafka.name(own, topics.REQUESTS)
        assert len(list(kafka.read_partitions(source, name, {0: 0, 1: 0}))) == 2
    watched = shell(blocks("Watch one run")[1]).splitlines()
    assert [re.findall(r"foldflow_seq=(\d+)", each) for each in watched] == [["1"], ["2"]]
    (result,) = shell(blocks("The result")[1]).splitlines()
    assert json.loads(result.partition(" ")[2])["effects"][-1]["output"] == {"said": "Hello, you"}
    ranged = shell(blocks("Replay a time range")[0]).splitlines()
    assert [each.split()[3] for each in ranged] == [asked, asked]
    counted = dict(reversed(each.split()) for each in shell(blocks("Count events by type")[0]).splitlines())
    assert counted == {"ToolCallRequested": "1", "StepCompleted": "2", "RunCompleted": "1"}
    copy, verify = blocks("Copy a history to a file and verify it offline")
    shell(copy)
    assert "2 decisions" in (said := shell(verify)), said
    whole = (own.data_dir / "history.bin").read_bytes()
    at = whole.index(b"Hello, you")
    (own.data_dir / "history.bin").write_bytes(whole[:at] + b"J" + whole[at + 1 :])
    with pytest.raises(AssertionError):
        shell(verify)
