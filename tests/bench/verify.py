"""How fast is a ledger verified? Makes an archive of N decisions of six-step runs and checks it; prints one JSON line.

    python tests/bench/verify.py --decisions 1000000 --processes 2 --folder /tmp/archive

The archive is made by the core itself (about 100 µs a decision) and kept in the folder, to be measured again.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))

from workload import six_steps

from events import codec
from events.commands import StartRun, WorkflowRegistered
from events.decisions import Decision
from events.ids import chain_hash, run_id
from events.results import ToolCallCompleted
from events.topics import partition_for
from projections.replay_parallel import each_partition
from projections.replay_sources import Folder
from projections.verify import Check, together
from streams.processors.consequences import decision_record
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.expressions import from_json, to_json
from streams.workflow.payloads import NoPayloads
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent

START = 1_750_000_000_000
TOGETHER = 100
"""How many runs are under way at once, so that their decisions alternate as they do on a topic."""
ROWS = 50_000
HEADERS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))
SCHEMA = pa.schema(
    [
        *(("partition", pa.int32()), ("offset", pa.int64()), ("timestamp", pa.timestamp("ms", "UTC"))),
        *(("key", pa.binary()), ("value", pa.binary()), ("headers", HEADERS)),
    ]
)


def run(spec: WorkflowSpec, number: int) -> Iterator[tuple[Decision, bytes, bytes]]:
    """Yield a run's decisions, their bodies and hashes."""
    request, state, offset = f"request {number}", INITIAL, 0
    cause: StartRun | ToolCallCompleted = StartRun(request, spec.name, spec.digest, to_json({"i": number}))
    while not state.over:
        at = START + number + offset
        effects = decide(spec, state, cause, at)
        decision = Decision(run_id(request), state.seq + 1, state.head, b"i" * 16, number * 100 + offset, at, cause, effects)
        body = codec.body(decision)
        hashed = chain_hash(body)
        yield decision, body, hashed
        state, offset = evolve(state, RunEvent(decision, hashed)), offset + 1
        path, step = next(((path, step) for path, step in state.steps.items() if not step.settled), ("", None))
        if step is not None:
            output = to_json(from_json(effects[-1].arguments)["value"])  # type: ignore[union-attr]
            cause = ToolCallCompleted(step.awaits, path, output, "1", 5)


def log(
    spec: WorkflowSpec, decisions: int, partitions: int
) -> Iterator[tuple[int, int, int, bytes, bytes, list[tuple[str, bytes]]]]:
    """Yield records: partition, offset, time (ms), key, value, headers."""
    offsets, made, number = [0] * partitions, 0, 0
    under_way: list[Iterator[tuple[Decision, bytes, bytes]]] = []
    while under_way or made < decisions:
        while len(under_way) < TOGETHER and made < decisions:
            under_way.append(run(spec, number))
            number += 1
        for each in list(under_way):
            found = next(each, None)
            if found is None:
                under_way.remove(each)
                continue
            decision, body, hashed = found
            partition = partition_for(decision.run_id.encode(), partitions)
            record = decision_record(RunEvent(decision, hashed), body, partition)
            yield partition, offsets[partition], decision.at, record.key or b"", record.value or b"", list(record.headers)
            offsets[partition] += 1
            made += 1


def write(folder: Path, name: str, records: Iterator[tuple[int, int, int, bytes, bytes, list[tuple[str, bytes]]]]) -> int:
    """Write records as `foldflow export` does, a file a partition; return the bytes of the values."""
    writers: dict[int, pq.ParquetWriter] = {}
    waiting: dict[int, list[tuple[int, int, int, bytes, bytes, list[tuple[str, bytes]]]]] = {}
    size = 0

    def flush(partition: int) -> None:
        if partition not in writers:
            path = folder / name / "day=2025-06-15" / f"p{partition}-0.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[partition] = pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True)
        columns = zip(*waiting.pop(partition), strict=True)
        arrays = [pa.array(column, each.type) for column, each in zip(columns, SCHEMA, strict=True)]
        writers[partition].write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))

    for record in records:
        size += len(record[4])
        waiting.setdefault(record[0], []).append(record)
        if len(waiting[record[0]]) >= ROWS:
            flush(record[0])
    for partition in list(waiting):
        flush(partition)
    for writer in writers.values():
        writer.close()
    return size


def make(folder: Path, decisions: int, partitions: int) -> int:
    """Make an archive; return the bytes of its decisions."""
    spec = six_steps()
    value = codec.encode(WorkflowRegistered(spec.name, spec.digest, spec.canonical, current=True))
    write(folder, "specs", iter([(0, 0, START, spec.digest.encode(), value, [])]))
    return write(folder, "decisions", log(spec, decisions, partitions))


def cpu_s() -> float:
    """Return this process's CPU seconds, with those of its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    """Make the log if it isn't there, check it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=100_000)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the archive is kept; else it is made and thrown away")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = options.folder or Path(thrown_away)
        if not (folder / "decisions").is_dir():
            make(folder, options.decisions, options.partitions)
        source = Folder.open(folder)
        check = Check(source, source.specs(), NoPayloads)
        began, used = time.monotonic(), cpu_s()
        result = together(each_partition(check, source.spans(), options.processes, lambda _: None))
        took, used = time.monotonic() - began, cpu_s() - used
        memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {
                "decisions": result.decisions,
                "decided_again": result.again,
                "runs": result.runs,
                "whole": result.whole,
                "processes": options.processes,
                "cpu_us_per_decision": round(used / result.decisions * 1e6, 1),
                "decisions_per_cpu_second": round(result.decisions / used),
                "decisions_per_second": round(result.decisions / took),
                "most_memory_mb": round(memory / 1024),
            }
        )
    )


if __name__ == "__main__":
    main()
