"""Measure Foldflow and other workflow systems side by side, in turn: `make bench-peers`.

    python tests/bench/peers.py --kit ../shared/peers [--peers restate,langgraph,dbos] [--rounds 5] [--inflight 200,1000]

The kit (README.md there) starts each system on empty state and gives it the same work as `cluster.Client` gives us: six trivial
durable steps a run. So does each of our rounds: a start, warm-up runs, many runs at once, then runs one after another. A system
that isn't installed yet is set up first, into $PEERS_HOME. One JSON line for each round of each system goes to stderr, one with
the medians and the least and most of each system to stdout, then one with the ratios, and a table for people to stderr.

Exit codes: 0 measured (whether targets are met or not), 1 something failed, 2 a wrong option, or there is no kit.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
import footprint
import targets
from bench import about
from cluster import LOADED, Client, interruptible, lines_alone, running
from workload import STEPS, six_steps

from streams import registry

Line = dict[str, Any]
OURS: Final = "foldflow"
SERVERS: Final = frozenset({"restate", "temporal", "temporal-local"})
"""Peers that are a service of their own, as we are; the others run inside the client."""
KEYS: Final = ("runs_per_s", "steps_per_s", "p50_ms", "p95_ms", "p99_ms", "cold_start_s", "pss_mb", "foreign_cpu_cores")
_SETUP: Final = "is missing"
_NO_KIT: Final = 2


def ours(options: argparse.Namespace) -> Line:
    """Do one round of ours: a start on empty data, many runs at once at each load, then single ones."""
    began = time.perf_counter()
    with running(LOADED) as cluster:
        registry.publish(cluster.settings, [six_steps()])
        client = Client(cluster.settings)
        client.one()
        cold = time.perf_counter() - began
        client.many(options.warm_up, options.warm_up)
        since, busy, pids = time.perf_counter(), footprint.machine_cpu_s(), cluster.pids
        used, own = footprint.cpu_s(pids), time.process_time()
        rates = {inflight: options.runs / client.many(options.runs, inflight) for inflight in options.inflight}
        single = [1000 * client.one() for _ in range(options.latency_runs)]
        own = time.process_time() - own + sum(footprint.cpu_s(pids).values()) - sum(used.values())
        foreign = (footprint.machine_cpu_s() - busy - own) / (time.perf_counter() - since)
        memory = footprint.memory_mb(pids)
        client.close()
    cuts = statistics.quantiles(single, n=100, method="inclusive")
    best = max(rates.values())
    found = (best, best * len(STEPS), cuts[49], cuts[94], cuts[98], cold, sum(memory.values()), foreign)
    more = {"max_ms": round(max(single), 2), "by_inflight": {inflight: round(rate, 1) for inflight, rate in rates.items()}}
    return dict(zip(KEYS, (round(each, 2) for each in found), strict=True)) | more


def theirs(kit: Path, name: str) -> Line:
    """Do one round of a peer, after setting it up if that has to be."""
    line = [str(kit / "peers"), "bench", name, "--reps", "1"]
    done = _run(line, kit)
    if done.returncode and _SETUP in done.stderr:
        print(f"setting up {name} …", file=sys.stderr, flush=True)
        if (setup := _run([line[0], "setup", name], kit)).returncode:
            sys.exit(f"{name} can't be set up:\n{setup.stderr[-3000:]}")
        done = _run(line, kit)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _run(line: list[str], kit: Path) -> subprocess.CompletedProcess[str]:
    # In a session of its own: it and what measures for it hear of an interruption once, and stop their servers themselves.
    process = subprocess.Popen(line, cwd=kit, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise
    return subprocess.CompletedProcess(line, process.returncode, out, errors)


def summed_up(name: str, rounds: list[Line]) -> Line:
    """Return the medians, and the least and the most."""
    found: Line = {"figure": "system", "system": name, "version": rounds[-1].get("version", ""), "rounds": len(rounds)}
    for key in KEYS:
        values = [each[key] for each in rounds]
        found[key] = round(statistics.median(values), 2)
        found[f"{key}_range"] = [min(values), max(values)]
    if "by_inflight" in rounds[0]:
        loads = rounds[0]["by_inflight"]
        found["by_inflight"] = {load: statistics.median(each["by_inflight"][load] for each in rounds) for load in loads}
        found["max_ms"] = max(each["max_ms"] for each in rounds)
    return found


def ratios(systems: dict[str, Line]) -> Line:
    """Return how ours stands against the best of the others, by medians."""
    mine = systems[OURS]
    peers = {name: each for name, each in systems.items() if name != OURS}
    fastest = max(peers, key=lambda name: peers[name]["runs_per_s"])
    quickest = min(peers, key=lambda name: peers[name]["p50_ms"])
    found: Line = {
        "figure": "peers",
        "runs_per_s_ratio": round(mine["runs_per_s"] / peers[fastest]["runs_per_s"], 2),
        "runs_per_s_of": fastest,
        "p99_to_p50_ratio": round(mine["p99_ms"] / peers[quickest]["p50_ms"], 2),
        "p99_to_p50_of": quickest,
    }
    if servers := [name for name in peers if name in SERVERS]:
        server = min(servers, key=lambda name: peers[name]["p50_ms"])
        found |= {"p50_ratio": round(mine["p50_ms"] / peers[server]["p50_ms"], 2), "p50_of": server}
    return found


def table(systems: dict[str, Line]) -> list[str]:
    """Return the medians for people, with least and most."""
    lines = [f"{'':<14}" + "".join(f"{key:>26}" for key in KEYS)]
    for name, each in systems.items():
        cells = (f"{each[key]} ({each[f'{key}_range'][0]} to {each[f'{key}_range'][1]})" for key in KEYS)
        lines.append(f"{name:<14}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, help="folder of the kit")
    parser.add_argument("--peers", default="restate,langgraph,dbos", help="which; the kit's README has their names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=4000, help="runs of ours at each load; the peers have their own numbers")
    parser.add_argument("--inflight", default="200,1000", help="loads of ours, the best counts; the peers have their own")
    parser.add_argument("--latency-runs", type=int, default=300, help="single runs of ours; the peers have their own numbers")
    parser.add_argument("--warm-up", type=int, default=50, help="runs of ours that aren't measured; the kit has 50")
    parser.add_argument("--out", type=Path, help="write the lines of stdout into this file as well")
    parser.add_argument("--record", action="store_true", help="put the ratios into RESULTS.md")
    options = parser.parse_args()
    if not (options.kit / "peers").is_file():
        print(f"There is no comparison kit in {options.kit}: name its folder, make bench-peers PEERS=…", file=sys.stderr)
        sys.exit(_NO_KIT)
    options.inflight = [int(each) for each in options.inflight.split(",")]
    names = [name.strip() for name in options.peers.split(",") if name.strip()]
    interruptible()
    out = lines_alone()
    rounds: dict[str, list[Line]] = {OURS: [], **{name: [] for name in names}}
    for number in range(1, options.rounds + 1):
        # ours, peer A, ours, peer B …: who comes after whom doesn't matter then
        for name in names:
            for each, found in ((OURS, ours(options)), (name, theirs(options.kit.resolve(), name))):
                rounds[each].append(found)
                print(f"{number}/{options.rounds}", json.dumps({"system": each, **found}), file=sys.stderr, flush=True)
    systems = {name: summed_up(name, found) for name, found in rounds.items()}
    lines = [about(), *systems.values(), ratios(systems)]
    for line in lines:
        print(json.dumps(line), file=out, flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(*table(systems), *targets.told(lines), sep="\n", file=sys.stderr)
    if options.record:
        targets.record(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
