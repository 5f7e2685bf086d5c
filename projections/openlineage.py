"""The ledger as OpenLineage events (spec 2-0-2), for Marquez, DataHub, OpenMetadata and whatever else reads those.

    run                     run of the job `market-analysis`; its runId is the run's id
    attempt of a step       run of the job `market-analysis.fetch`, whose parent is the run; items are the job `check[].ask`
    effect that begins one  START; its runId is the effect's id, so that of a call is the call's id
    effect that ends one    COMPLETE, FAIL (with `errorMessage`) or ABORT (cancelled, or left behind by a run that is over)

An attempt is a run of its own, not the step: OpenLineage gives a run one end, and an attempt that is tried again has failed.
(Airflow does the same with its tries.) A step that needs nothing from outside begins and ends in one decision, and is told all
the same: else what goes through it would be cut in two. Steps that were skipped or taken over by a fork never ran, so there is
nothing to tell.

Everything follows from the run's decisions up to there, its definition, and who its parents are: no clock, no chance. The same
decision makes the same bytes, whoever tells it and how often. Nothing of what was asked or answered is in them: names, times,
sizes, models, tokens, costs and error messages are. Files and addresses are named as lineage does, without passwords and queries.
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    JobFacet,
    RunFacet,
    documentation_job,
    error_message_run,
    job_type_job,
    parent_run,
    source_code_job,
    tags_run,
)
from openlineage.client.serde import Serde

from events.calls import LlmCallRequested, ToolCallRequested
from events.commands import ApprovalAnswered, ChangeOutput, StartRun
from events.decisions import (
    ApprovalRequested,
    BlockEntered,
    ChildRunRequested,
    Decision,
    Effect,
    LoopAdvanced,
    MapStarted,
    OutputChanged,
    RetryScheduled,
    RunCancelled,
    RunCompleted,
    RunFailed,
    SignalAwaited,
    SignalTaken,
    StepCancelled,
    StepCompleted,
    StepCopied,
    StepFailed,
    StepSkipped,
    TimerSet,
)
from events.failure import Failure
from events.ids import RUNS, effect_id
from events.results import LlmCallCompleted, LlmCallFailed, ToolCallCompleted, ToolCallFailed
from projections.lineage_data import Definition
from projections.openlineage_datasets import Flow, inputs, output, read_and_written
from projections.openlineage_facets import PRODUCER, FoldflowCallRunFacet, FoldflowLedgerRunFacet, FoldflowRunRunFacet
from streams.workflow.state import StepStatus, copied_results

_BEGINS: Final[dict[type[Any], tuple[str, str | None]]] = {
    LlmCallRequested: ("LLM", "model"),
    ToolCallRequested: ("TOOL", "tool"),
    ChildRunRequested: ("RUN", "workflow"),
    ApprovalRequested: ("APPROVAL", None),
    SignalAwaited: ("SIGNAL", "signal"),
    TimerSet: ("SLEEP", None),
    BlockEntered: ("STEPS", None),
    MapStarted: ("FOR_EACH", None),
    LoopAdvanced: ("REPEAT", None),
}
"""Effects that begin something: the job's type, and the field that says with what."""
_ENDS: Final[dict[type[Any], tuple[RunState, StepStatus | None]]] = {
    StepCompleted: (RunState.COMPLETE, StepStatus.COMPLETED),
    SignalTaken: (RunState.COMPLETE, StepStatus.COMPLETED),
    OutputChanged: (RunState.COMPLETE, StepStatus.COMPLETED),
    StepFailed: (RunState.FAIL, StepStatus.FAILED),
    RetryScheduled: (RunState.FAIL, None),
    StepCancelled: (RunState.ABORT, StepStatus.CANCELLED),
}
"""Effects that end it, and what they make of the step."""
_OVER: Final[dict[type[Any], RunState]] = {
    RunCompleted: RunState.COMPLETE,
    RunFailed: RunState.FAIL,
    RunCancelled: RunState.ABORT,
}
_AT_ONCE: Final = {SignalTaken: "SIGNAL", OutputChanged: "SET_OUTPUT", StepCompleted: "TRANSFORM"}
"""What a step is that ends without having begun; the definition may know better."""
_LATEST_MS: Final = 253_402_300_799_999


@dataclass(frozen=True, slots=True)
class Family:
    """A run's name, and the run at the root of those that started it; None: nobody did."""

    run_id: str
    workflow: str
    root: "Family | None" = None


@dataclass(frozen=True, slots=True)
class Event:
    """An OpenLineage event. `run_id`: of the whole run; `at`: milliseconds since the epoch; `name`: for people; `value`: JSON."""

    run_id: str
    at: int
    name: str
    value: bytes


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What is under way. `id`: of the effect that began it; `number`: of the attempt; `what`: the model, tool … by name."""

    id: str
    kind: str
    number: int | None = None
    what: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Moment:
    """Something to tell. `path` None: of the run; `why`: it failed or was cancelled."""

    state: RunState
    path: str | None = None
    attempt: _Attempt | None = None
    why: str | None = None


@dataclass(slots=True)
class _Told:
    """A run that is under way. `copied`: how the steps were that a fork took over; `open`: its attempts by path.

    `retried`: steps whose last attempt has ended, and another comes.
    """

    start: StartRun
    copied: dict[str, StepStatus]
    known: Definition | None
    parent: Family | None
    family: Family
    flow: Flow
    open: dict[str, _Attempt] = field(default_factory=dict)
    retried: set[str] = field(default_factory=set)


class OpenLineage:
    """Tells decisions that count, in the order of each run. What it knows of a run is forgotten at the run's end.

    `definition` finds a version by digest; `parent` tells the family of a run that started another one; `families`: of runs that
    are under way, or ended lately (see `forget`).
    """

    def __init__(
        self, namespace: str, definition: Callable[[str], Definition | None], parent: Callable[[str], Family | None]
    ) -> None:
        self._namespace, self._definition, self._parent = namespace, definition, parent
        self._runs: dict[str, _Told] = {}
        self.families: dict[str, Family] = {}

    def take(self, decision: Decision, decision_hash: bytes, *, wanted: bool = True) -> list[Event]:
        """Return what is to be told of a decision; nothing if that isn't `wanted`, as it was told before."""
        moments = []
        if decision.seq == 1 and isinstance(decision.input, StartRun):
            self._begin(decision.run_id, decision.input)
            moments.append(_Moment(RunState.START))
        run = self._runs.get(decision.run_id)
        if run is None:  # its beginning is no longer on the log
            return []
        for index, effect in enumerate(decision.effects):
            moments += _moments(run, effect, effect_id(decision_hash, index))
        events = [self._event(run, decision, decision_hash, moment) for moment in moments] if wanted else []
        if any(type(effect) in _OVER for effect in decision.effects):
            del self._runs[decision.run_id]
        return events

    def forget(self, run_id: str) -> None:
        """Forget a run that is over: who asks for its family finds it on the log."""
        self.families.pop(run_id, None)

    def _begin(self, run_id: str, start: StartRun) -> None:
        known = self._definition(start.digest)
        parent = self._parent(start.parent.run_id) if start.parent else None
        self.families[run_id] = family = family_of(run_id, start.workflow, parent)
        copied = {path: each[0] for path, each in copied_results(start.copied).items()} if start.copied else {}
        flow = Flow(run_id, start.workflow, known)
        self._runs[run_id] = _Told(replace(start, input="", copied=None), copied, known, parent, family, flow)

    def _event(self, run: _Told, decision: Decision, decision_hash: bytes, moment: _Moment) -> Event:
        path = None if moment.path is None else run.flow.folded(moment.path)
        name = run.start.workflow if path is None else f"{run.start.workflow}.{path}"
        read, written = self._datasets(run, decision, moment)
        event = RunEvent(
            eventTime=_time(decision.at),
            eventType=moment.state,
            run=Run(
                str(_uuid(decision.run_id)) if moment.attempt is None else str(uuid.UUID(moment.attempt.id)),
                facets=self._run_facets(run, decision, decision_hash, moment),
            ),
            job=Job(self._namespace, name, facets=_job_facets(run, moment)),
            inputs=read,
            outputs=written,
            producer=PRODUCER,
        )
        said = f"{moment.state.value} of {name} (decision {decision.seq})"
        return Event(decision.run_id, decision.at, said, Serde.to_json(event).encode())

    # --- Facets ---

    def _run_facets(self, run: _Told, decision: Decision, decision_hash: bytes, moment: _Moment) -> dict[str, RunFacet]:
        facets: dict[str, RunFacet] = {}
        above = run.parent if moment.path is None else run.family
        if above is not None:
            facets["parent"] = self._parent_facet(above)
        number = moment.attempt.number if moment.attempt else None
        facets["foldflow_ledger"] = FoldflowLedgerRunFacet(
            decision.run_id, decision.seq, decision_hash.hex(), moment.path, number, producer=PRODUCER
        )
        if moment.attempt is not None and (call := _call(decision, moment.attempt, moment.path or "")):
            facets["foldflow_call"] = FoldflowCallRunFacet(**call, producer=PRODUCER)
        if moment.why is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(moment.why, "python", producer=PRODUCER)
        if moment.path is None and moment.state is RunState.START:
            facets |= _start_facets(run.start)
        return facets

    def _parent_facet(self, above: Family) -> parent_run.ParentRunFacet:
        root = above.root or above
        return parent_run.ParentRunFacet(
            parent_run.Run(str(_uuid(above.run_id))),
            parent_run.Job(self._namespace, above.workflow),
            parent_run.Root(parent_run.RootRun(str(_uuid(root.run_id))), parent_run.RootJob(self._namespace, root.workflow)),
            producer=PRODUCER,
        )

    # --- Datasets ---

    def _datasets(self, run: _Told, decision: Decision, moment: _Moment) -> tuple[list[InputDataset], list[OutputDataset]]:
        flow, namespace = run.flow, self._namespace
        if moment.path is None:
            edges = flow.read_by_output() if moment.state is RunState.COMPLETE else []
            given = InputDataset(namespace, f"{run.start.workflow}.input")
            read = [given, *(each for each in inputs(namespace, flow, edges) if each.name != given.name)]
            return read, [output(namespace, f"{run.start.workflow}.output", flow, edges)]
        path, kind = flow.folded(moment.path), moment.attempt.kind if moment.attempt else ""
        edges = [] if kind == "SET_OUTPUT" else flow.read(path)  # what somebody set comes from nothing else
        read, written = inputs(namespace, flow, edges), [output(namespace, flow.written(path), flow, edges)]
        answer = decision.input
        if isinstance(answer, ToolCallCompleted) and moment.attempt and answer.call_id == moment.attempt.id:
            more, files = read_and_written(answer.output, decision.run_id)
            read, written = [*read, *more], [*written, *files]
        return read, written


def family_of(run_id: str, workflow: str, parent: Family | None) -> Family:
    """Return the family of a run that `parent` started; None: nobody did, or nobody knows any more who."""
    return Family(run_id, workflow, parent and (parent.root or parent))


# --- What effects mean ---


def _moments(run: _Told, effect: Effect, identity: str) -> Iterator[_Moment]:
    """Yield what an effect begins and ends, and note it."""
    kind = type(effect)
    path: str = getattr(effect, "step", None) or ""
    if kind in _BEGINS and path:
        yield from _begun(run, effect, path, identity)
    if kind in _ENDS or (isinstance(effect, ChildRunRequested) and effect.detached):
        yield from _ended(run, effect, path, identity)
    elif isinstance(effect, StepSkipped):
        run.flow.saw(path, StepStatus.SKIPPED)
    elif isinstance(effect, StepCopied):
        run.flow.saw(path, run.copied.get(path))
    elif kind in _OVER:
        for left, attempt in run.open.items():
            yield _Moment(RunState.ABORT, left, attempt, "the run is over")
        run.open.clear()
        yield _Moment(_OVER[kind], why=_why(effect))


def _begun(run: _Told, effect: Effect, path: str, identity: str) -> Iterator[_Moment]:
    if path in run.open:  # a loop's next iteration, or the time limit of what is under way
        return
    kind, names = _BEGINS[type(effect)]
    what = getattr(effect, names) if names else None
    if kind == "STEPS" and run.flow.kind(run.flow.folded(path)) == "switch":
        kind = "SWITCH"
    attempt = _Attempt(identity, kind, getattr(effect, "attempt", None), (names, what) if names and what else None)
    run.open[path] = attempt
    run.retried.discard(path)
    run.flow.saw(path)
    yield _Moment(RunState.START, path, attempt)


def _ended(run: _Told, effect: Effect, path: str, identity: str) -> Iterator[_Moment]:
    state, status = _ENDS.get(type(effect), (RunState.COMPLETE, StepStatus.COMPLETED))
    attempt, was_retried = run.open.pop(path, None), path in run.retried
    run.flow.saw(path, status, getattr(effect, "source", None))
    if isinstance(effect, RetryScheduled):
        run.retried.add(path)
    else:
        run.retried.discard(path)
    if attempt is None:
        if state is RunState.ABORT or (state is RunState.FAIL and was_retried):
            return  # nothing ran, or its last attempt was told
        kind = _AT_ONCE.get(type(effect)) or (run.flow.kind(run.flow.folded(path)) or "STEP").upper()
        attempt = _Attempt(identity, kind)
        yield _Moment(RunState.START, path, attempt)
    yield _Moment(state, path, attempt, _why(effect))


def _why(effect: Effect) -> str | None:
    failure: Failure | None = getattr(effect, "failure", None)
    if failure is not None:
        return f"{failure.kind}: {failure.message}"
    if isinstance(effect, RunCancelled):
        by = f" by {effect.by}" if effect.by else ""
        return f"cancelled{by}{': ' if effect.reason else ''}{effect.reason}"
    return f"cancelled: {effect.reason}" if isinstance(effect, StepCancelled) else None


# --- Facets that need nothing but what they are about ---


def _start_facets(start: StartRun) -> dict[str, RunFacet]:
    origin, parent = start.origin, start.parent
    facets: dict[str, RunFacet] = {
        "foldflow_run": FoldflowRunRunFacet(
            *(start.digest, start.request_id, parent.step if parent else None),
            *((origin.run_id, origin.seq) if origin else (None, None)),
            producer=PRODUCER,
        )
    }
    if start.labels:
        tags = [tags_run.TagsRunFacetFields(key, value, "USER") for key, value in sorted(start.labels.items())]
        facets["tags"] = tags_run.TagsRunFacet(tags, producer=PRODUCER)
    return facets


def _job_facets(run: _Told, moment: _Moment) -> dict[str, JobFacet]:
    kind = "WORKFLOW" if moment.attempt is None else moment.attempt.kind
    facets: dict[str, JobFacet] = {"jobType": job_type_job.JobTypeJobFacet("BATCH", "FOLDFLOW", kind, producer=PRODUCER)}
    if moment.path is None and run.known is not None:
        if run.known.spec.description:
            text = run.known.spec.description
            facets["documentation"] = documentation_job.DocumentationJobFacet(text, "text/plain", producer=PRODUCER)
        if moment.state is RunState.START:
            code = run.known.spec.canonical
            facets["sourceCode"] = source_code_job.SourceCodeJobFacet("json", code, producer=PRODUCER)
    return facets


def _call(decision: Decision, attempt: _Attempt, path: str) -> dict[str, Any]:
    """Return what is known of an attempt's call: what it was asked with, and what its answer tells."""
    found: dict[str, Any] = dict([attempt.what]) if attempt.what else {}
    answer = decision.input
    if isinstance(answer, ApprovalAnswered | ChangeOutput) and answer.step == path and answer.by:
        found["by"] = answer.by
    if getattr(answer, "call_id", None) != attempt.id:
        return found
    if isinstance(answer, LlmCallCompleted | LlmCallFailed):
        usage = answer.usage
        found |= {"model": answer.model, "latencyMs": answer.latency_ms, "costUsd": answer.cost_usd, "prices": answer.prices}
        if usage is not None:
            found |= {"inputTokens": usage.input_tokens, "outputTokens": usage.output_tokens}
            found |= {"cacheReadTokens": usage.cache_read_tokens, "reasoningTokens": usage.reasoning_tokens}
            found["cacheWriteTokens"] = usage.cache_write_tokens
    if isinstance(answer, LlmCallCompleted):
        found |= {"provider": answer.provider, "finishReason": answer.finish_reason}
    if isinstance(answer, ToolCallCompleted | ToolCallFailed):
        found |= {"toolVersion": answer.tool_version, "latencyMs": answer.latency_ms}
        found |= {"costUsd": answer.cost_usd, "paidFor": answer.paid_for}
    return found


def _time(ms: int) -> str:
    """Return a time in UTC; what no calendar has (anybody can write it) as the nearest that one has."""
    found = datetime.fromtimestamp(min(max(ms, 0), _LATEST_MS) / 1000, UTC)
    return found.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _uuid(run_id: str) -> uuid.UUID:
    """Return a run's id, which is a UUID if intake made it."""
    try:
        return uuid.UUID(run_id)
    except ValueError:
        return uuid.uuid5(RUNS, run_id)


__all__ = ["Event", "Family", "OpenLineage", "family_of"]
