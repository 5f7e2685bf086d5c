"""Sees what happens on `decisions` while it happens, as any user of the topic could.

Which runs are open, which ended and how, how long each took, how long a partition stood still. What must hold of every history is
for the checker to judge, which shares no code with Foldflow; this one only watches.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from events import codec, topics
from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import StartRun
from events.decisions import CallCancelled, Decision, Effect, RunCancelled, RunCompleted, RunFailed
from events.ids import chain_hash, effect_id
from events.results import LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from streams import kafka
from streams.kafka import TopicPartition
from streams.settings import Settings
from streams.workflow.chain import Chain, Verdict

ENDS: Final = {RunCompleted: "completed", RunFailed: "failed", RunCancelled: "cancelled"}
LAST_KEPT: Final = 5
SILENT_S: Final = 10.0
"""After how long without a record the watch begins anew where it stands."""


@dataclass(slots=True)
class Run:
    """What is seen of one run. Times in milliseconds since the epoch; `last`: its last decisions, for whoever must explain it."""

    began_ms: int
    ended_ms: int | None = None
    outcome: str | None = None
    last: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Standstill:
    """A partition had no decision that counts for `ms` milliseconds, from `from_ms` on."""

    partition: int
    from_ms: int
    ms: int


class LedgerWatch:
    """Reads `decisions` from their beginning, in a thread of its own. `on_effect` hears each effect of a decision that counts."""

    def __init__(self, settings: Settings, partitions: int, on_effect: Callable[[str, Effect], None]) -> None:
        self.runs: dict[str, Run] = {}
        self.verdicts: Counter[str] = Counter()
        self.calls_requested: Counter[str] = Counter()
        self.calls_open: dict[str, str] = {}
        self.standstills: list[Standstill] = []
        self.broken: dict[str, str] = {}
        self.failure: BaseException | None = None
        self._settings, self._on_effect = settings, on_effect
        self._chains = {partition: Chain() for partition in range(partitions)}
        self._next = dict.fromkeys(range(partitions), 0)
        self._moved_ms: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._guarded, daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Read no more."""
        self._stop.set()
        self._thread.join(30)

    def open_runs(self) -> dict[str, Run]:
        """Return the runs that have begun and not ended."""
        return {name: run for name, run in list(self.runs.items()) if run.outcome is None}

    def _guarded(self) -> None:
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001 - whoever waits for runs must hear that nobody looks any more
            self.failure = error

    def _read(self) -> None:
        while not self._stop.is_set():
            self._read_on()

    def _read_on(self) -> None:
        """Read until nothing has come for a while: after a broker's restart a client may hear nothing more for minutes."""
        name = kafka.name(self._settings, topics.DECISIONS)
        with closing(kafka.reader(self._settings)) as source:
            source.assign([TopicPartition(name, partition, self._next[partition]) for partition in self._chains])
            heard = time.monotonic()
            while not self._stop.is_set() and time.monotonic() - heard < SILENT_S:
                for message in kafka.poll(source, 0.2):
                    heard = time.monotonic()
                    partition, offset = message.partition() or 0, message.offset() or 0
                    if offset < self._next[partition]:
                        continue  # a client that a restarted broker sent back to the beginning
                    self._next[partition] = offset + 1
                    self._see(partition, offset, message.timestamp()[1], message.value() or b"")

    def _see(self, partition: int, offset: int, written_ms: int, value: bytes) -> None:
        decision, hashed = codec.decode(value, Decision), chain_hash(codec.unframed(value))
        chain = self._chains[partition]
        verdict = chain.judge(offset, decision, hashed)
        self.verdicts[verdict.value] += 1
        self.broken |= chain.broken
        if verdict is not Verdict.ACCEPTED:
            return
        moved_ms = self._moved_ms.get(partition, written_ms)
        if written_ms - moved_ms >= 1000:
            self.standstills.append(Standstill(partition, moved_ms, written_ms - moved_ms))
        self._moved_ms[partition] = max(moved_ms, written_ms)
        run = self.runs.setdefault(decision.run_id, Run(decision.at))
        effects = " ".join(type(effect).__name__ for effect in decision.effects)
        run.last = [*run.last, f"{partition}@{offset} #{decision.seq} {type(decision.input).__name__} -> {effects}"][-LAST_KEPT:]
        self._results(decision)
        for index, effect in enumerate(decision.effects):
            if isinstance(effect, ToolCallRequested | LlmCallRequested):
                kind = "tool" if isinstance(effect, ToolCallRequested) else "llm"
                self.calls_requested[kind] += 1
                self.calls_open[effect_id(hashed, index)] = kind
            elif isinstance(effect, CallCancelled):
                self.calls_open.pop(effect.call_id, None)
            elif (outcome := ENDS.get(type(effect))) is not None:  # type: ignore[call-overload]
                run.outcome, run.ended_ms = outcome, written_ms
            self._on_effect(decision.run_id, effect)

    def _results(self, decision: Decision) -> None:
        if isinstance(decision.input, ToolCallCompleted | ToolCallFailed | LlmCallCompleted | LlmCallFailed):
            self.calls_open.pop(decision.input.call_id, None)
        assert decision.seq > 1 or isinstance(decision.input, StartRun), "a run begins with its start"
