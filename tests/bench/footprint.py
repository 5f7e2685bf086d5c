"""What processes and the machine take: CPU, memory, threads. Everything by pid; children count with their parents."""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from infra.embedded import java

LIBRARIES: Final = ("confluent-kafka", "fastavro", "duckdb")
"""Those whose versions change the figures."""


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the CPU seconds that each process and its living children have used so far."""
    times = {name: [each.cpu_times() for each in _family(pid)] for name, pid in pids.items()}
    return {name: sum(each.user + each.system for each in family) for name, family in times.items()}


def threads_s(pid: int) -> dict[str, float]:
    """Return the CPU seconds of a process's living threads, by what they are called: librdkafka and the JVM name theirs."""
    used: Counter[str] = Counter()
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # a thread may end meanwhile
            name = (folder / "comm").read_text().strip()
            used[name.rstrip("-0123456789")] += int((folder / "schedstat").read_text().split()[0]) / 1e9
    return dict(used)


def memory_mb(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the resident memory of each process with its children in MB (PSS: pages that several share count once)."""
    return {name: round(sum(each.memory_full_info().pss for each in _family(pid)) / 1e6, 1) for name, pid in pids.items()}


def machine_cpu_s() -> float:
    """Return the CPU seconds that the whole machine has been busy, whoever it was."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def machine() -> dict[str, Any]:
    """Return what the figures depend on; nothing that says whose machine it is."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "java": java.java_version(),
        "kafka": _kafka_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def commit() -> str:
    """Return the commit that is measured, with a `+` when files that are tracked differ from it."""
    return (_git("rev-parse", "--short=9", "HEAD") or "unknown") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*arguments: str) -> str:
    line = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def _kafka_version() -> str:
    text = Path(java.__file__).with_name("jars.txt").read_text()
    found = re.search(r"^org\.apache\.kafka:kafka-server:(\S+)", text, re.MULTILINE)
    assert found
    return found[1]


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
