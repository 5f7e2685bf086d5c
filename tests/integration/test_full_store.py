"""Intake as a real process, its payload store on a file system that is full: it waits, says so, and goes on."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from events import codec, topics
from events.commands import StartRun, WorkflowRequest
from events.results import InboxMessage
from streams import kafka
from streams.envelope import envelope
from streams.payloads import PayloadStore
from streams.registry import publish
from streams.settings import Settings
from streams.workflow.expressions import from_json, to_json
from streams.workflow.spec import WorkflowSpec

SPEC = WorkflowSpec.model_validate({"name": "holding", "steps": {"all": {"transform": "=size(input.text)"}}})
LARGE = "x" * 1_000_000
_FULL = "it is full: make room there ("


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Give a file system of 2 MB, or skip where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def intake(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `foldflow worker intake`, and end it with SIGKILL."""
    values = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"ready_file"})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= {
        f"FOLDFLOW_{key.upper()}": value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.cli.main", "worker", "intake"], env=environment, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any], log: Path) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.05)


def starts(settings: Settings) -> dict[str, str]:
    """Return the inputs of the runs that the orchestrator is asked for, by request, in order."""
    with contextlib.closing(kafka.reader(settings)) as reader:
        records = list(kafka.read_partition(reader, kafka.name(settings, topics.INBOX), 0, 0))
    causes = [codec.decode(record.value() or b"", InboxMessage).input for record in records]
    return {cause.request_id: cause.input for cause in causes if isinstance(cause, StartRun)}


def test_a_full_store_holds_requests_and_loses_none(settings: Settings, tmp_path: Path) -> None:
    """What is before the large request goes on; it and what is behind it wait, also over a kill, and come once there is room."""
    with small_disk(tmp_path / "disk") as disk:
        own = settings.model_copy(update={"partitions": 1, "data_dir": disk})
        kafka.connect(own)
        publish(own, [SPEC])
        filler = disk / "filler"
        filler.write_bytes(b"x" * 1_500_000)
        texts = {"before": "small", "large": LARGE, "behind": "small"}
        requests = [WorkflowRequest(SPEC.name, to_json({"text": text}), name, SPEC.digest) for name, text in texts.items()]
        records = [envelope(topics.REQUESTS, "one key", each, source="test", identity=each.request_id or "") for each in requests]
        kafka.send(own, records)
        log = tmp_path / "intake.log"
        with intake(own, log):
            until(lambda: _FULL in log.read_text(), log)
            until(lambda: list(starts(own)) == ["before"], log)
        with intake(own, log):
            filler.unlink()
            until(lambda: list(starts(own)) == list(texts), log)
        stored = PayloadStore(own).get(from_json(starts(own)["large"])["$payload"])
        assert from_json(stored) == {"text": LARGE}
