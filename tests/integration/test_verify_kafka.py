"""`foldflow verify`, `replay`, `show --at` and `backtest` on real Kafka, and the same questions asked of the API."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served_api import histories, served
from typer.testing import CliRunner, Result

from events import codec, ids, topics
from events.decisions import Decision
from infra.cli.main import command_line
from projections.replay_sources import KCAT, run_of
from streams import kafka
from streams.envelope import Outgoing
from streams.registry import publish
from streams.settings import Settings
from streams.workflow.state import RunStatus


@pytest.fixture
def own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return this test's settings, also in the environment, with topics made and workflows registered."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(made)
    publish(made, [histories.SPEC, histories.RICH])
    for name in ("bootstrap_servers", "topic_prefix", "data_dir"):
        monkeypatch.setenv(f"FOLDFLOW_{name.upper()}", str(getattr(made, name)))
    return made


def write(settings: Settings, log: Any) -> None:
    """Write a log as the orchestrator does: by run, with the decision's hash in a header."""
    kafka.send(
        settings,
        [
            Outgoing(
                topics.DECISIONS,
                run_of(each.value) or b"",
                each.value,
                [("ce_specversion", b"1.0"), ("ce_id", ids.chain_hash(codec.unframed(each.value or b"")).hex().encode())],
                each.partition,
            )
            for each in log.records()
        ],
    )


def foldflow(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(arguments), list(arguments))


def test_runs_on_the_topics_are_verified_and_stepped_through(own: Settings, tmp_path: Path) -> None:
    """All of them, one, the recent ones: whole. The API and the commands show the same states."""
    log = histories.logs(2, 8, 0.0, histories.BOTH)
    write(own, log)
    told = json.loads(foldflow("verify", "--all", "--processes", "1", "--json").output)
    assert (told["whole"], told["runs"], told["decided_again"]) == (True, 8, len(log.accepted))
    one = foldflow("verify", "request 1")
    assert (one.exit_code, "1 run (" in one.output) == (0, True), one.output
    recent = json.loads(foldflow("verify", "--since", "1h", "--json", "--processes", "1").output)
    assert recent["runs"] == 8
    run_id = ids.run_id("request 1")
    replayed = json.loads(foldflow("replay", run_id, "--json").output)
    assert [step["hash"] for step in replayed["steps"]] == [
        event.hash.hex() for event in log.accepted if event.decision.run_id == run_id
    ]
    shown = json.loads(foldflow("show", run_id, "--at", "2", "--json").output)
    with served(own) as client:
        state = client.get(f"/runs/{run_id}/state", params={"seq": 2}).json()
        assert state["state"] == {key: shown[key] for key in state["state"]}
        assert state["changes"] == replayed["steps"][1]["changes"]
        assert client.get(f"/runs/{run_id}/state").json()["hash"] == log.states[run_id].head.hex()
        assert client.get(f"/runs/{run_id}/state", params={"seq": 999}).status_code == 404
        checked = client.get(f"/runs/{run_id}/verification").json()
        assert (checked["whole"], checked["complete"], checked["decisions"]) == (True, True, len(replayed["steps"]))
    other = tmp_path / "report.yaml"
    data = json.loads(histories.SPEC.canonical)
    other.write_text(json.dumps(data | {"steps": {step.pop("name"): step for step in data["steps"]}}))
    same = foldflow("backtest", "--spec", str(other), "--processes", "1")
    assert (same.exit_code, "the same way   4" in same.output) == (0, True), same.output


def test_a_run_that_was_rewritten_on_the_topic_is_found(own: Settings) -> None:
    """Its last decision says another output, and its hash is right: the command and the API name the record and the field."""
    log = histories.logs(1, 3, 0.0)
    run_id, partition, offset = next(
        (decision.run_id, partition, offset)
        for partition, offset in log.order
        if log.states[(decision := codec.decode(log.partitions[partition][offset], Decision)).run_id].status
        is RunStatus.COMPLETED
        and decision.seq == log.states[decision.run_id].seq
    )
    decision = codec.decode(log.partitions[partition][offset], Decision)
    forged = replace(decision.effects[-1], output='{"n":77}')  # type: ignore[call-arg]
    log.partitions[partition][offset] = codec.encode(replace(decision, effects=(*decision.effects[:-1], forged)))
    write(own, log)
    result = foldflow("verify", "--all", "--processes", "1", "--json")
    assert result.exit_code == 1, result.output
    (finding,) = json.loads(result.output)["findings"]
    assert (finding["partition"], finding["offset"], finding["run_id"]) == (partition, offset, run_id)
    with served(own) as client:
        told = client.get(f"/runs/{run_id}/verification").json()
        assert (told["whole"], told["findings"][0]["field"]) == (False, finding["field"])
        assert told["findings"][0]["recorded"] == "77"


def test_what_export_copies_is_verified_and_a_changed_byte_in_it_named(
    own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an archive of `foldflow export`: whole without Kafka; with one byte of one value changed, that record is named."""
    log = histories.logs(2, 6, 0.0, histories.BOTH)
    write(own, log)
    folder = tmp_path / "archive"
    exported = foldflow("export", str(folder))
    assert exported.exit_code == 0, exported.output
    monkeypatch.setenv("FOLDFLOW_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    told = json.loads(foldflow("verify", "--from", str(folder), "--processes", "1", "--json").output)
    assert (told["whole"], told["decided_again"]) == (True, len(log.accepted))
    file = max((folder / "decisions").rglob("*.parquet"), key=lambda each: each.stat().st_size)
    table = pq.read_table(file, partitioning=None)
    values = table["value"].to_pylist()
    number = len(values) // 2
    values[number] = values[number][:-20] + bytes([values[number][-20] ^ 1]) + values[number][-19:]
    index = table.schema.get_field_index("value")
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type)), file)
    result = foldflow("verify", "--from", str(folder), "--processes", "1", "--json")
    assert result.exit_code == 1, result.output
    place = table["partition"][number].as_py(), table["offset"][number].as_py()
    assert place in {(each["partition"], each["offset"]) for each in json.loads(result.output)["findings"]}


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed (Debian: apt-get install kcat)")
def test_what_kcat_copies_is_verified_offline(own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both topics in one file; then Kafka is not asked any more. A byte of the copy is changed: its record is named."""
    log = histories.logs(5, 4, 0.1, histories.BOTH)
    write(own, log)
    file = tmp_path / "run.bin"
    with file.open("wb") as out:
        for topic in (topics.DECISIONS, topics.SPECS):
            line = ["kcat", "-b", own.bootstrap_servers, "-C", "-e", "-q", "-o", "beginning", "-t", kafka.name(own, topic)]
            subprocess.run([*line, "-f", KCAT], stdout=out, check=True, timeout=60)
    monkeypatch.setenv("FOLDFLOW_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    told = json.loads(foldflow("verify", "--from", str(file), "--processes", "1", "--json").output)
    assert told["decided_again"] == told["decisions"] == len(log.accepted)
    before = {(each["partition"], each["offset"]) for each in told["findings"]}
    data = file.read_bytes()
    at = data.index(b'"ok":true')
    file.write_bytes(data[:at] + b'"ok":tru3' + data[at + 9 :])
    after = json.loads(foldflow("verify", "--from", str(file), "--processes", "1", "--json").output)
    ((partition, offset),) = {(each["partition"], each["offset"]) for each in after["findings"]} - before
    assert b'"ok":true' in (log.partitions[partition][offset] or b"")


@pytest.mark.thorough
def test_what_the_console_consumer_copies_is_verified_offline(
    own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka's own tool has no Avro: it writes values as `Bytes`, which loses nothing."""
    log = histories.logs(5, 3, 0.0, histories.BOTH)
    write(own, log)
    formatted = [("print.partition", "true"), ("print.offset", "true"), ("print.headers", "true")]
    formatted.append(("value.deserializer", "org.apache.kafka.common.serialization.BytesDeserializer"))
    options = [part for name, value in formatted for part in ("--formatter-property", f"{name}={value}")]
    options += ["--from-beginning", "--max-messages", str(len(log.accepted)), "--topic", kafka.name(own, topics.DECISIONS)]
    line = [sys.executable, "-m", "infra.cli.main", "kafka", "console-consumer", *options]
    done = subprocess.run(line, capture_output=True, timeout=120, check=True)
    file = tmp_path / "run.txt"
    file.write_bytes(done.stdout)
    monkeypatch.setenv("FOLDFLOW_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    result = foldflow("verify", "--from", str(file), "--processes", "1", "--json")
    told = json.loads(result.output)
    assert (result.exit_code, told["whole"], told["decisions"]) == (3, True, len(log.accepted)), told  # it has no definitions
