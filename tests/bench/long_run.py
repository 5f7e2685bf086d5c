"""Measure whether a long run stays as cheap as a short one: a loop of many iterations and a map of many items.

    python tests/bench/long_run.py [--loop 100000] [--items 100000] [--window 5000]

Each answer is decided, folded and encoded, as a tenure does it; one JSON line for each says what a decision costs (CPU, in µs,
medians of the first and the last ones), how large the records are, and what the state takes in memory.
"""

import argparse
import gc
import json
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from typing import Any

from events import codec
from events.commands import StartRun
from events.decisions import Decision
from events.ids import chain_hash
from events.results import Input, ToolCallCompleted
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.payloads import Memory
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import INITIAL, RunEvent, StepStatus

TOOL = {"name": "echo", "arguments": {"n": "=index"}}


class Long:
    """A run whose calls are answered one after the other, and what that costs."""

    def __init__(self, step: dict[str, Any]) -> None:
        self.spec = WorkflowSpec.model_validate({"name": "long", "steps": {"s": step}})
        self.state, self.payloads = INITIAL, Memory()
        self.costs: list[int] = []
        self.sizes: list[int] = []

    def take(self, cause: Input) -> tuple[Any, ...]:
        """Decide, fold and encode."""
        began = time.process_time_ns()
        effects = decide(self.spec, self.state, cause, 1, self.payloads)
        decision = Decision("r", self.state.seq + 1, self.state.head, b"i" * 16, self.state.seq, 1, cause, effects)
        body = codec.body(decision)
        self.state = evolve(self.state, RunEvent(decision, chain_hash(body)))
        self.costs.append(time.process_time_ns() - began)
        self.sizes.append(len(body))
        return effects

    def answers(self, text: str = "{}") -> Iterator[int]:
        """Answer every call in the order of requests; yield how many were."""
        under_way = deque(_asked(self.take(StartRun("q", "long", self.spec.digest, text))))
        count = 0
        while under_way:
            path = under_way.popleft()
            step = self.state.steps[path]
            assert step.status is StepStatus.RUNNING
            under_way.extend(_asked(self.take(ToolCallCompleted(step.awaits, path, "1", "1", 1))))
            count += 1
            yield count
        assert self.state.over


def _asked(effects: tuple[Any, ...]) -> list[str]:
    return [effect.step for effect in effects if type(effect).__name__ == "ToolCallRequested"]


def loop(times: int) -> tuple[dict[str, Any], str]:
    """Return a loop of so many calls, and the run's input."""
    return {"repeat": {"until": f"index == {times - 1}", "at_most": times}, "tool": TOOL}, "{}"


def items(total: int) -> tuple[dict[str, Any], str]:
    """Return so many items with a call each, a hundred at a time, and the run's input."""
    return {"for_each": {"items": "=input", "concurrency": 100}, "tool": TOOL}, f"[{','.join(['1'] * total)}]"


def measured(made: tuple[dict[str, Any], str], window: int) -> dict[str, Any]:
    """Run it, and return the costs of its first and last decisions (without the very first and last)."""
    step, text = made
    run = Long(step)
    gc.collect()
    gc.disable()
    try:
        answered = deque(run.answers(text), maxlen=1)[0]
    finally:
        gc.enable()
    middle = run.costs[100:-100]
    first, last = (statistics.median(part) / 1000 for part in (middle[:window], middle[-window:]))
    return {
        "answers": answered,
        "decisions": len(run.costs),
        "first_us": round(first, 1),
        "last_us": round(last, 1),
        "ratio": round(last / first, 3),
        "ends_ms": [round(run.costs[0] / 1e6, 1), round(run.costs[-1] / 1e6, 1)],
        "record_bytes_median": statistics.median(run.sizes[100:-100]),
        "record_bytes_max": max(run.sizes),
    }


def remembered(made: tuple[dict[str, Any], str], window: int) -> dict[str, Any]:
    """Run it once more, and return how much memory it takes after the first answers and at most after that, in KB."""
    step, text = made
    tracemalloc.start()
    try:
        run = Long(step)
        first = last = 0
        for count in run.answers(text):
            run.costs.clear()
            run.sizes.clear()
            if count == window:
                gc.collect()
                first = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
            elif count % window == 0 and not run.state.over:
                last = tracemalloc.get_traced_memory()[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return {"first_kb": first // 1024, "last_kb": last // 1024, "peak_kb": peak // 1024}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure whether a long run stays as cheap as a short one.")
    parser.add_argument("--loop", type=int, default=100_000, help="iterations of the loop")
    parser.add_argument("--items", type=int, default=100_000, help="items of the map")
    parser.add_argument("--window", type=int, default=5_000, help="how many decisions are compared")
    options = parser.parse_args()
    for name, made in (("loop", loop(options.loop)), ("for_each", items(options.items))):
        window = min(options.window, (options.loop if name == "loop" else options.items) // 3)
        print(json.dumps({"run": name, **measured(made, window), **remembered(made, window)}), flush=True)


if __name__ == "__main__":
    main()
