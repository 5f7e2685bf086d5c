"""Where the time of a process goes under load, by py-spy: its functions by their own samples.

    python tests/bench/profiler.py orchestrator [--seconds 15] [--top 40] [--inflight 200] [--native] [--keep FILE]

ROLE: intake, orchestrator, tool or api. Only the thread counts that runs Python just then (holds the GIL), so who waits isn't
seen, nor librdkafka's own threads (stages.py has those). `--keep` keeps the stacks, one a line, for speedscope or flamegraph.pl.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))
from cluster import LOADED, Client, interruptible, running
from workload import six_steps

from streams import registry

ROLES: Final = tuple(role for role in LOADED.split(",") if role != "kafka")
PY_SPY: Final = Path(sys.executable).with_name("py-spy")
_RATE: Final = 200


def sampled(role: str, seconds: int, inflight: int, more: list[str], path: Path) -> float:
    """Sample a role's process under load into a file; return the runs a second meanwhile."""
    with running() as cluster:
        registry.publish(cluster.settings, [six_steps()])
        client = Client(cluster.settings)
        client.many(200, inflight)
        command = [str(PY_SPY), "record", "--pid", str(cluster.pids[role]), "--duration", str(seconds), "--rate", str(_RATE)]
        command += ["--format", "raw", "--gil", "--function", "--threads", *more, "--output", str(path)]
        runs, took = 0, 0.0
        process = subprocess.Popen(command, stdout=sys.stderr)
        try:
            while process.poll() is None:
                took += client.many(inflight, inflight)
                runs += inflight
        finally:
            process.terminate()
            process.wait()
        client.close()
        if not path.exists():
            sys.exit("profiler.py: py-spy could not look into the process: see what it says above; it may need root")
        return runs / took


def table(stacks: list[str], top: int) -> list[str]:
    """Return functions by the samples in which they ran themselves, with those in which they, or what they called, ran."""
    own, inside, threads = Counter[str](), Counter[str](), Counter[str]()
    for line in stacks:
        stack, _, text = line.rpartition(" ")
        count, (thread, *frames) = int(text), stack.split(";")
        threads[thread] += count
        own[frames[-1] if frames else thread] += count
        inside.update(dict.fromkeys(frames, count))
    total = own.total() or 1
    lines = [f"{100 * count / total:6.1f} %          {name}" for name, count in threads.most_common(8)]
    lines += ["", "    own   inside"]
    lines += [f"{100 * count / total:6.1f} %{100 * inside[name] / total:7.1f} %  {name}" for name, count in own.most_common(top)]
    return lines


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--seconds", type=int, default=15)
    parser.add_argument("--top", type=int, default=40)
    parser.add_argument("--inflight", type=int, default=200)
    parser.add_argument("--native", action="store_true", help="look into libraries' C code as well")
    parser.add_argument("--keep", type=Path, help="file for the stacks")
    options = parser.parse_args()
    if not PY_SPY.exists():
        sys.exit(f"profiler.py: there is no {PY_SPY}; install it: pip install py-spy")
    interruptible()
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "stacks"
        rate = sampled(options.role, options.seconds, options.inflight, ["--native"] if options.native else [], path)
        stacks = path.read_text().splitlines()
    print(f"{options.role}: {rate:.0f} runs/s while it was looked at", *table(stacks, options.top), sep="\n")


if __name__ == "__main__":
    main()
