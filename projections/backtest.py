"""Recorded history decided by another version of its workflow: which runs would have gone another way, and where.

Each decision of a run is decided by the other version, from the state and the input that are recorded, up to the first one that
comes out differently: behind it nothing is known, as other calls would have had other answers. Nothing is called.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from events import codec
from events.commands import StartRun
from events.decisions import Decision, Effect
from events.errors import NotDecodableError
from events.ids import chain_hash
from projections.replay_again import (
    Aside,
    CannotDecideError,
    Kept,
    decided_again,
    first_difference,
    shown,
    stands_in,
    with_defaults,
)
from projections.replay_parquet import DamagedError
from projections.replay_sources import Record, Source, Span, run_of
from streams.workflow.chain import Chain, Verdict
from streams.workflow.evolve import evolve
from streams.workflow.spec import WorkflowSpec, from_canonical
from streams.workflow.state import INITIAL, RunEvent, RunState

_TICK = 500
_MOST = 10_000


@dataclass(frozen=True, slots=True)
class OtherWay:
    """A run that would have gone another way. `seq`: its first decision that differs; `steps`: those that it is about.

    `field`, `recorded`, `now`: the first field that differs; `effects`: what would have followed, in order, by its type and step.
    """

    run_id: str
    digest: str
    partition: int
    offset: int
    seq: int
    field: str
    recorded: str
    now: str
    steps: tuple[str, ...]
    effects: tuple[str, ...]
    recorded_effects: tuple[str, ...]


@dataclass(slots=True)
class Outcome:
    """What came of it. `runs` were decided; `same` of them went the same way as far as they are recorded.

    `refused`: the version refuses their input; `unknown`: what they need can't be had, with an example in `lacking`; `differ`:
    how many would have gone another way, listed in `others`, and in `where` at which step.
    """

    runs: int = 0
    decisions: int = 0
    same: int = 0
    refused: int = 0
    unknown: int = 0
    lacking: str = ""
    differ: int = 0
    others: list[OtherWay] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        """Take another partition's outcome in."""
        for name in ("runs", "decisions", "same", "refused", "unknown", "differ"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lacking = self.lacking or other.lacking
        self.others += other.others
        self.where += other.where
        self.damage += [each for each in other.damage if each not in self.damage]

    def found(self, other: OtherWay) -> None:
        """Note a run that would have gone another way."""
        self.differ += 1
        self.where.update(other.steps or ("the run",))
        if len(self.others) < _MOST:
            self.others.append(other)


@dataclass(frozen=True, slots=True)
class Backtest:
    """What is to be decided, for any process. `canonical`: the other version; `since`: runs that started since then (ms)."""

    source: Source
    canonical: str
    workflow: str
    kept: Callable[[], Kept]
    since: int | None = None

    def __call__(self, partition: int, tick: Callable[[int], None]) -> Outcome:
        """Decide a partition's runs. Raises KafkaUnreachableError and NewerCodeError."""
        span = self.source.spans()[partition]
        if self.since is not None:
            span = Span(self.source.since(self.since).get(partition, span.end), span.end)
        decider = _Decider(self, partition, from_canonical(self.canonical), Aside(self.kept()))
        read = 0
        try:
            for record in self.source.records(partition, span):
                read += 1
                if read % _TICK == 0:
                    tick(_TICK)
                decider.take(record)
        except DamagedError as error:
            decider.outcome.damage.append(f"{error}; what stands behind it in partition {partition} was not decided")
        tick(read % _TICK)
        return decider.finish()


class _Decider:
    """One partition under another version."""

    def __init__(self, job: Backtest, partition: int, spec: WorkflowSpec, payloads: Aside) -> None:
        self.outcome = Outcome()
        self._job, self._partition, self._spec, self._payloads = job, partition, spec, payloads
        self._chain, self._runs = Chain(), dict[str, tuple[RunState, str]]()
        self._done: set[int] = set()

    def take(self, record: Record) -> None:
        """Take the partition's next record."""
        run = run_of(record.value)
        if run is not None and hash(run.decode("utf-8", "replace")) in self._done:
            return
        value = record.value or b""
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError:
            self._job.source.refuse_newer(f"decision {self._partition}/{record.offset}", value)
            return
        run_id, cause = decision.run_id, decision.input
        if run_id not in self._runs and not (
            decision.seq == 1 and isinstance(cause, StartRun) and cause.workflow == self._job.workflow
        ):
            self._done.add(hash(run_id))  # another workflow's, or one that began before
            return
        hashed = chain_hash(codec.unframed(value))
        if self._chain.judge(record.offset, decision, hashed) is not Verdict.ACCEPTED:
            return
        if run_id not in self._runs:
            self.outcome.runs += 1
            self._runs[run_id] = INITIAL, cause.digest if isinstance(cause, StartRun) else ""
        state = self._decide(record, decision, hashed, *self._runs[run_id])
        if state is not None and not state.over:
            self._runs[run_id] = state, self._runs[run_id][1]
            return
        self.outcome.same += state is not None
        del self._runs[run_id]
        self._chain.heads.pop(run_id, None)
        self._done.add(hash(run_id))

    def _decide(self, record: Record, decision: Decision, hashed: bytes, state: RunState, digest: str) -> RunState | None:
        """Return the state after a decision that this version decides alike; None: it doesn't, or can't."""
        self.outcome.decisions += 1
        effects: tuple[Effect, ...] = ()
        try:
            decision = with_defaults(self._spec, decision, self._payloads)
            effects = decision.effects if stands_in(decision) else decided_again(self._spec, state, decision, self._payloads)
            found = first_difference(decision.effects, effects, "effects")
            if found is None:
                return evolve(state, RunEvent(decision, hashed))
            told = found.field, found.recorded, found.again
        except CannotDecideError as error:
            self.outcome.unknown += 1
            self.outcome.lacking = self.outcome.lacking or f"run {decision.run_id}, decision {decision.seq}: {error}"
            return None
        except ValueError as error:
            self.outcome.refused += 1
            told = "input", shown(getattr(decision.input, "input", "")), f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - a state that only the recorded version leads to may fit no plan of the other
            told = "effects", _brief(decision.effects)[0], f"it can't be decided: {type(error).__name__}: {error}"
        finally:
            self._payloads.clear()
        now, then = _brief(effects), _brief(decision.effects)
        about = (
            Counter(_about(effects))
            - Counter(_about(decision.effects))
            + (Counter(_about(decision.effects)) - Counter(_about(effects)))
        )
        steps = tuple(dict.fromkeys(step for _, step in about if step)) or _steps_that_differ(decision.effects, effects)
        place = self._partition, record.offset, decision.seq
        self.outcome.found(OtherWay(decision.run_id, digest, *place, *told, steps, now, then))
        return None

    def finish(self) -> Outcome:
        """Return what came of it; runs that are open went the same way so far."""
        self.outcome.same += len(self._runs)
        self.outcome.damage += [each for each in self._job.source.damage if each not in self.outcome.damage]
        return self.outcome


def _about(effects: Iterable[Effect]) -> list[tuple[str, str]]:
    return [(type(effect).__name__, getattr(effect, "step", None) or "") for effect in effects]


def _steps_that_differ(recorded: tuple[Effect, ...], now: tuple[Effect, ...]) -> tuple[str, ...]:
    """Return the steps of effects of the same kinds that say something else."""
    pairs = zip(recorded, now, strict=False)
    return tuple(dict.fromkeys(step for one, other in pairs if one != other and (step := getattr(one, "step", None))))


def _brief(effects: Iterable[Effect]) -> tuple[str, ...]:
    return tuple(f"{kind} {step}".strip() for kind, step in _about(effects))


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of all partitions, the runs that differ in the order of their decisions' places."""
    whole = Outcome()
    for each in outcomes:
        whole.add(each)
    whole.others.sort(key=lambda each: (each.partition, each.offset))
    return whole


__all__ = ["Backtest", "OtherWay", "Outcome", "together"]
