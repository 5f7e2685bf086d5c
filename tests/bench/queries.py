"""Measure each list and detail query of the read API over HTTP, on views of a long log: one JSON line for each, in milliseconds.

    python tests/bench/queries.py [--decisions 1000000] [--log FOLDER] [--times 100]

The log is that of rebuild.py, made when it isn't there. Kafka and the api are real processes; one client asks one question after
the other on one connection, each time about another run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

import httpx

sys.path.insert(0, str(Path(__file__).parent))
import rebuild
from cluster import free_port, interruptible, until

from streams.settings import Settings

TARGET_MS: Final = 50.0
_REBUILD_S: Final = 900
QUERIES: Final = (
    "/runs",
    "/runs?status=completed&limit=100",
    "/runs?workflow=bench-analysis&limit=100",
    "/runs?label=team%3Da&limit=100",
    "/requests/{request}",
    "/runs/{run}",
    "/runs/{run}/steps",
    "/runs/{run}/decisions",
    "/runs/{run}/decisions/3",
    "/runs/{run}/approvals",
    "/runs/{run}/signals",
    "/runs/{run}/cost",
    "/runs/{run}/lineage",
    "/runs/{run}/state?seq=3",
    "/runs/{run}/verification",
    "/runs/{run}/audit",
    "/runs/{run}/audit.html",
    "/runs/{run}/lineage.svg",
    "/approvals",
    "/deadletters",
    "/cost?by=workflow",
    "/cost?by=model",
    "/cost?by=day",
    "/cost?by=step",
    "/cost?by=run",
    "/cost?by=call",
)


def measure(client: httpx.Client, path: str, runs: list[dict[str, str]], times: int) -> dict[str, object]:
    """Ask one question so often, each time about another run."""
    took = []
    status = 0
    for number in range(times):
        run = runs[number % len(runs)]
        began = time.perf_counter()
        answer = client.get(path.format(run=run["run_id"], request=run["request_id"]))
        took.append(1000 * (time.perf_counter() - began))
        status = answer.status_code
        if not answer.is_success:
            break
    cuts = statistics.quantiles(took, n=20, method="inclusive") if len(took) > 1 else took * 19
    return {
        "query": path,
        "status": status,
        "p50_ms": round(cuts[9], 1),
        "p95_ms": round(cuts[18], 1),
        "max_ms": round(max(took), 1),
        "met": status == httpx.codes.OK and cuts[18] < TARGET_MS,
    }


def main() -> None:
    """Print one JSON line for each query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=1_000_000)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "foldflow-long-log")
    parser.add_argument("--times", type=int, default=100)
    options = parser.parse_args()
    interruptible()
    with rebuild.cluster(options.log) as settings:
        rebuild.produce(settings, options.decisions, 200)
        port = free_port()
        values = Settings(**(settings.model_dump(exclude_none=True) | {"api_port": port, "api_rate": 1_000_000.0}))
        environment = os.environ | {
            f"FOLDFLOW_{key.upper()}": str(getattr(values, key))
            for key in ("bootstrap_servers", "data_dir", "topic_prefix", "api_port", "api_rate")
        }
        api = subprocess.Popen([sys.executable, "-m", "infra.cli.main", "api"], env=environment, stdout=sys.stderr)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=300) as client:
                until(partial(_complete, client), "the views", _REBUILD_S)
                runs = client.get("/runs?limit=100").raise_for_status().json()["runs"]
                for path in QUERIES:
                    print(json.dumps(measure(client, path, runs, options.times)), flush=True)
        finally:
            api.terminate()
            api.wait(60)


def _complete(client: httpx.Client) -> bool:
    """Say whether the views have all of the log."""
    try:
        health = client.get("/health").json()
    except httpx.TransportError:
        return False
    return health.get("lag") == 0 and health.get("status") == "ok"


if __name__ == "__main__":
    main()
