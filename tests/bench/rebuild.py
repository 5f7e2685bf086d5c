"""Measure a full rebuild of the views from a long log: decisions a second, the microseconds of each stage, the size of the file.

    python tests/bench/rebuild.py [--decisions 1000000] [--inflight 200] [--log FOLDER]

It decides a few runs with the real core, and repeats them under other ids and at other times, each with its own hash chain,
until there are enough. The log is produced to a Kafka of its own, whose data stay in FOLDER for the next time. One JSON line is
the result; microseconds are of CPU time, those of the stages measured in one process on the first records.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
from cluster import free_port
from workload import six_steps

from events import codec, topics
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import Decision
from events.ids import chain_hash, effect_id, run_id
from events.results import Input, LlmCallCompleted, ToolCallCompleted, Usage
from events.topics import partition_for
from projections.ledger import Record
from projections.projector import Projector
from projections.source import Source
from projections.views import Views
from streams import kafka, registry
from streams.settings import Settings
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.expressions import to_json
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, RunState, RunStatus

BEGAN: Final = 1_780_000_000_000
APART_MS: Final = 20
"""How much later each run starts than the one before: 50 a second."""
ANALYSIS: Final = WorkflowSpec.model_validate(
    {
        "name": "bench-analysis",
        "input": {"type": "object"},
        "steps": {
            "plan": {"llm": {"prompt": "Plan how to answer: {{ input.question }}"}},
            "each": {
                "needs": ["plan"],
                "for_each": {"items": "=input.tickers", "concurrency": 2},
                "steps": {"prices": {"tool": {"name": "echo", "arguments": {"ticker": "=item", "text": "x" * 200}}}},
                "output": "=steps.prices.output",
            },
            "write": {"needs": ["each"], "llm": {"prompt": "Write about {{ input.question }}"}},
        },
        "output": "=steps.write.output",
    }
)
SPECS: Final = (six_steps(), six_steps(), ANALYSIS)
"""The mix: two runs of six tool calls, then one with two LLM calls and three items."""


@dataclass(frozen=True)
class Template:
    """A decided run: its decisions' bodies, and what must differ in its copies, as the bytes that stand there."""

    request_id: str
    run_id: str
    bodies: list[bytes]
    hashes: list[bytes]
    times: set[int]
    calls: list[list[str]]


def template(number: int, spec: WorkflowSpec) -> Template:
    """Decide one run from its start to its end."""
    request_id = f"bench-{number:010}"
    value = {"i": number, "question": "How did ACME do last year, and why? " * 4, "tickers": ["ACME", "EMCA", "MACE"]}
    waiting: list[Input] = [StartRun(request_id, spec.name, spec.digest, to_json(value), {"team": "ab"[number % 2]})]
    state: RunState = INITIAL
    made = Template(request_id, run_id(request_id), [], [], set(), [])
    at = BEGAN
    while waiting:
        at += 5
        cause = waiting.pop(0)
        effects = decide(spec, state, cause, at)
        decision = Decision(made.run_id, state.seq + 1, state.head, b"i" * 16, 1000 + at - BEGAN, at, cause, effects)
        body = codec.body(decision)
        event = RunEvent(decision, chain_hash(body))
        state = evolve(state, event)
        ids = [effect_id(event.hash, index) for index in range(len(effects))]
        waiting += [_answer(effect, call) for effect, call in zip(effects, ids, strict=True) if _is_call(effect)]
        made.bodies.append(body)
        made.hashes.append(event.hash)
        made.times.update({at, *(effect.deadline for effect in effects if _is_call(effect))})
        made.calls.append(ids)
    if state.status is not RunStatus.COMPLETED:
        raise RuntimeError(f"the run of {spec.name} is {state.status}: {state.failure}")
    return made


def _is_call(effect: Any) -> bool:
    return isinstance(effect, LlmCallRequested | ToolCallRequested)


def _answer(effect: Any, call_id: str) -> Input:
    if isinstance(effect, LlmCallRequested):
        text = to_json("It went up, then down, and nobody knows why. " * 12)
        usage = Usage(812, 143, 256, 0, 31)
        return LlmCallCompleted(call_id, effect.step, text, "gpt-x", "openai", "stop", usage, 0.00125, 1234)
    arguments = json.loads(effect.arguments)
    return ToolCallCompleted(call_id, effect.step, to_json(arguments.get("value", arguments)), "1", 3)


def copies(templates: list[Template], decisions: int, inflight: int) -> Iterator[tuple[str, bytes]]:
    """Return run ids and framed values of at least so many decisions: `inflight` runs at a time, in turn."""
    number, made = 0, 0
    while made < decisions:
        group = []
        for _ in range(inflight):
            group.append(_copy(templates[number % len(templates)], number))
            number += 1
        for turn in range(max(len(bodies) for _, bodies in group)):
            for identity, bodies in group:
                if turn < len(bodies):
                    made += 1
                    yield identity, codec.framed(Decision, bodies[turn])


def _copy(of: Template, number: int) -> tuple[str, list[bytes]]:
    """Return a run like another one, `number` places later: whatever has to differ takes as many bytes as before."""
    request_id = f"bench-{number:010}"
    identity, later = run_id(request_id), number * APART_MS
    changes = [(of.request_id, request_id), (of.run_id, identity)]
    swaps = [(old.encode(), new.encode()) for old, new in changes]
    # Later ones first: else one that was moved could be moved again.
    swaps += [(_long(at), _long(at + later)) for at in sorted(of.times, reverse=True)]
    bodies: list[bytes] = []
    for body, old_hash, old_calls in zip(of.bodies, of.hashes, of.calls, strict=True):
        changed = body
        for old, new in swaps:
            changed = changed.replace(old, new)
        bodies.append(changed)
        digest = chain_hash(changed)
        swaps.append((old_hash, digest))
        swaps += [(call.encode(), effect_id(digest, index).encode()) for index, call in enumerate(old_calls)]
    return identity, bodies


def _long(value: int) -> bytes:
    """Return Avro's form of a whole number that isn't negative."""
    rest, out = value << 1, bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


@contextmanager
def cluster(folder: Path) -> Iterator[Settings]:
    """Start a Kafka on this folder and stop it at the end."""
    settings = Settings(bootstrap_servers=f"127.0.0.1:{free_port()}", data_dir=folder, topic_prefix="bench.")
    environment = os.environ | {
        f"FOLDFLOW_{key.upper()}": str(getattr(settings, key)) for key in ("bootstrap_servers", "data_dir", "topic_prefix")
    }
    foldflow = [sys.executable, "-m", "infra.cli.main"]
    try:
        subprocess.run([*foldflow, "up", "--only", "kafka", "--detach"], env=environment, check=True, stdout=sys.stderr)
        yield settings
    finally:
        subprocess.run([*foldflow, "down"], env=environment, check=False, stdout=sys.stderr)


def produce(settings: Settings, decisions: int, inflight: int) -> None:
    """Write the log, unless it is there."""
    there = kafka.connect(settings)
    name, partitions = kafka.name(settings, topics.DECISIONS), there.partitions[topics.DECISIONS.name]
    with closing(kafka.reader(settings)) as source:
        if sum(kafka.watermarks(source, name, each)[1] for each in range(partitions)) >= decisions:
            return
    registry.publish(settings, list({spec.name: spec for spec in SPECS}.values()))
    target, acks = kafka.producer(settings), kafka.Acks()
    templates = [template(number, spec) for number, spec in enumerate(SPECS)]
    for count, (identity, value) in enumerate(copies(templates, decisions, inflight)):
        key = identity.encode()
        while True:
            try:
                target.produce(name, value, key, partition_for(key, partitions), acks)
            except BufferError:
                target.poll(0.1)
            else:
                break
        if count % 1000 == 0:
            target.poll(0)
    kafka.flush(target, acks, timeout_s=600)


def cpu_s() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def rebuilt(settings: Settings, path: Path) -> dict[str, float]:
    """Make the views anew, as `foldflow api --rebuild` does; return how long that took."""
    began, used = time.monotonic(), cpu_s()
    projector = Projector(settings, path, rebuild=True)
    projector.start()
    try:
        while not projector.caught_up.wait(1):
            done = projector.rebuild
            print(f"{done.position if done else 0:,}", end=" ", flush=True, file=sys.stderr)
            if projector.failure or projector.problem:
                raise RuntimeError(projector.failure or projector.problem)
        return {"seconds": time.monotonic() - began, "cpu_s": cpu_s() - used}
    finally:
        projector.stop()


def stages(settings: Settings, folder: Path, batches: int) -> dict[str, float]:
    """Return the CPU microseconds that each stage of a batch takes for a decision, in one process: the median of some batches."""
    shutil.rmtree(folder, ignore_errors=True)
    found = kafka.connect(settings)
    every = range(found.partitions[topics.DECISIONS.name])
    views = Views(folder / "views.duckdb", found.ids, len(every))
    took: dict[str, list[float]] = {}
    records: list[Record] = []
    gc.disable()  # as the processes of a rebuild do

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        took.setdefault(name, []).append(1e6 * (time.process_time() - began) / len(records))

    with closing(views), closing(Source(settings, found, every, 20_000)) as source:
        source.look()
        source.begin({})
        while len(took.get("commit", ())) < batches:
            began = time.process_time()
            records = list(source.poll().decisions)
            if not records:
                continue
            took.setdefault("fetch", []).append(1e6 * (time.process_time() - began) / len(records))
            with stage("decode, once more"):
                for record in records:
                    codec.decode(record.value, Decision)
            db = views._db
            db.begin()
            with stage("decode and filter"):
                accepted = views.ledger.judge(db, records, views.runs)
            with stage("look back"):
                views.calls.fetch(db, accepted, views.runs)
                views.steps.fetch(db, accepted, views.runs)
            with stage("calls"):
                spent = [views.calls.apply(entry, "bench-analysis") for entry in accepted]
            with stage("steps"):
                moved = [views.steps.apply(entry, each) for entry, each in zip(accepted, spent, strict=True)]
            with stage("runs"):
                for entry, each, did in zip(accepted, spent, moved, strict=True):
                    views.runs.apply(entry, each, did)
            for model in (views.approvals, views.signals, views.decisions):
                with stage(type(model).__name__.lower()):
                    for entry in accepted:
                        model.apply(entry)
            for written in views._models:
                with stage(f"write {type(written).__name__.lower()}"):
                    written.write(db)
            with stage("commit"):
                db.commit()
    return {name: round(statistics.median(each), 2) for name, each in took.items()}


def topic_bytes(folder: Path) -> int:
    """Return how many bytes the segments of `decisions` take on the broker's disk."""
    return sum(each.stat().st_size for each in folder.rglob("bench.decisions-*/*.log"))


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=1_000_000)
    parser.add_argument("--inflight", type=int, default=200)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "foldflow-long-log")
    options = parser.parse_args()
    with cluster(options.log) as settings:
        produce(settings, options.decisions, options.inflight)
        path = options.log / "rebuilt.duckdb"
        took = rebuilt(settings, path)
        with closing(kafka.reader(settings)) as source:
            partitions = kafka.connect(settings).partitions[topics.DECISIONS.name]
            name = kafka.name(settings, topics.DECISIONS)
            decisions = sum(kafka.watermarks(source, name, each)[1] for each in range(partitions))
        found = {
            "decisions": decisions,
            "processors": len(os.sched_getaffinity(0)),
            "decisions_per_s": round(decisions / took["seconds"]),
            "cpu_us_per_decision": round(1e6 * took["cpu_s"] / decisions, 1),
            "seconds": round(took["seconds"], 1),
            "file_bytes_per_decision": round(path.stat().st_size / decisions),
            "topic_bytes_per_decision": round(topic_bytes(options.log) / decisions),
            "us_per_decision": stages(settings, options.log / "stages", 8),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
