"""Real processes that live and do nothing: each notices by itself, ends, and whoever is started instead goes on."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_kill import SPEC, Ledger, Processes, requests, until

from events.ids import run_id
from streams import kafka, registry
from streams.processors.watchdog import EXIT_STUCK
from streams.settings import Settings

STUCK = {
    "orchestrator": """
from streams.processors.orchestrator import Orchestrator
Orchestrator._round = lambda self: time.sleep(3600) if there() else ROUND(self)
""",
    "tool": """
from streams.processors.worker import Worker
Worker._free = lambda self: 0 if there() else FREE(self)
""",
    "intake": """
from streams.processors import intake_loop
def judged(*arguments):
    while there():
        time.sleep(1)
    return JUDGED(*arguments)
intake_loop.judged = judged
""",
    "blocked": """
from streams.processors.tool_worker import ToolCalls
async def blocked(self, record):
    if there():
        time.sleep(3600)
    return await CALL(self, record)
ToolCalls.__call__ = blocked
""",
}
MAIN = """
import os, pathlib, sys, time
from streams.processors import intake_loop
from streams.processors.orchestrator import Orchestrator
from streams.processors.tool_worker import ToolCalls
from streams.processors.worker import Worker
ROUND, FREE, JUDGED, CALL = Orchestrator._round, Worker._free, intake_loop.judged, ToolCalls.__call__
there = pathlib.Path({stuck!r}).exists
{patch}
from infra.cli.main import main
sys.argv = ["foldflow", "worker", {role!r}]
main()
"""


@pytest.mark.parametrize(
    "how", [each if each == "orchestrator" else pytest.param(each, marks=pytest.mark.thorough) for each in STUCK]
)
def test_a_process_that_stands_still_ends_by_itself(settings: Settings, tmp_path: Path, how: str) -> None:
    """Its exit code says so, its log says where each thread is; started anew, every run ends."""
    own = settings.model_copy(update={"stuck_after_s": 6.0, "partitions": 2})
    kafka.connect(own)
    registry.publish(own, [SPEC])
    role = "tool" if how == "blocked" else how
    processes, stuck = Processes(own, tmp_path), tmp_path / "stuck"
    try:
        processes.start(*({"intake", "orchestrator", "tool"} - {role}))
        with (tmp_path / "stuck.log").open("wb") as log:
            code = MAIN.format(stuck=str(stuck), patch=STUCK[how], role=role)
            ready = tmp_path / "stuck.ready"
            environment = processes.environment | {"FOLDFLOW_READY_FILE": str(ready)}
            process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)
            processes.running["stuck"] = process
        until(ready.exists, 60, _tail(tmp_path))
        ledger = Ledger(own)
        kafka.send(own, requests(10, asking=0))
        until(lambda: ledger.has_ended({run_id(f"kill-{i}") for i in range(10)}), 60, _tail(tmp_path))
        stuck.touch()
        kafka.send(own, requests(30, asking=0)[10:])
        began = time.monotonic()
        until(lambda: process.poll() is not None, 90, _tail(tmp_path))
        assert process.returncode == EXIT_STUCK, _tail(tmp_path)()
        assert time.monotonic() - began > 4, "it has its time"
        told = (tmp_path / "stuck.log").read_text()
        assert "watchdog.stuck" in told
        assert "Current thread" in told
        del processes.running["stuck"]
        processes.start(role)
        until(lambda: ledger.has_ended({run_id(f"kill-{i}") for i in range(30)}), 90, lambda: processes.logs((role,)))
    finally:
        processes.stop()


def _tail(folder: Path) -> Callable[[], str]:
    return lambda: (folder / "stuck.log").read_text()[-4000:]
