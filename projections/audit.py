"""The audit report of one run: who asked what, what was done with what, who decided, the cost, and whether the record is intact.

It is made when it is asked for: from the views, and from the run's decisions on the log, which are read and checked for it. A run
may have any number of items: what the report shows of them is bounded, and it says what it leaves out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

from events.as_json import payload
from events.commands import ApprovalAnswered, ChangeOutput, RequestPlace, SignalReceived
from events.topics import DECISIONS, INBOX, REQUESTS
from projections import approvals, calls, runs, specs, step_pages
from projections import cost as costs
from projections.audit_calls import chosen, model_call, of_kind, tool_call
from projections.audit_check import Ledger, integrity
from projections.audit_document import (
    Attempt,
    AuditedApproval,
    AuditedCost,
    AuditedRun,
    AuditedStep,
    File,
    Flow,
    Listed,
    Place,
    Relative,
    Report,
    Spent,
    Word,
)
from projections.audit_log import Heard, Told, told
from projections.audit_values import PROMPT, VALUE, between, clean, content, utc
from projections.audit_words import did, remarks, said, summary
from projections.extent import Extent
from projections.lineage import Asked, Found, lineage
from projections.table import Connection

STEPS, ATTEMPTS, APPROVALS, RELATIVES, FLOWS, FILES, GROUPS = 200, 10, 200, 20, 200, 200, 30
"""The most entries of each list."""
_LARGEST_FILE: Final = 256 * 1024 * 1024
T = TypeVar("T")
_Rows = Sequence[Mapping[str, Any]]


def report(db: Connection, run: Mapping[str, Any], ledger: Ledger) -> Report:
    """Return the audit report of a run. `run`: its row of `runs`. Raises what reading the ledger raises."""
    run_id: str = run["run_id"]
    extent = Extent.of(run)
    made = calls.of_run(db, extent)
    shown, left_out = chosen(made)
    log = told(ledger.source, run_id, ledger.source.spans(), frozenset(each["call_id"] for each in shown))
    canonical = specs.definition_of(db, run["digest"])
    found = lineage(db, Asked(run_id), run)
    steps, known = step_pages.of_run(db, extent, STEPS)
    finished = Report(
        made=datetime.now(UTC),
        foldflow=version("foldflow"),
        summary=[],
        run=_run(db, run, ledger, log, canonical),
        steps=Listed(_steps(steps, made), known, _steps_left_out(known, len(steps))),
        statuses=step_pages.statuses(db, extent, specs.steps_of(db, run["digest"])),
        approvals=_first([_approval(each) for each in approvals.of_run(db, extent)], APPROVALS, "approvals"),
        words=_words(log, ledger),
        model_calls=of_kind("llm", made, shown, left_out, lambda call: model_call(call, log)),
        tool_calls=of_kind("tool", made, shown, left_out, lambda call: tool_call(call, log)),
        files=_first(_files(found, ledger.artifacts / run_id), FILES, "files"),
        payloads=sorted(node.name for node in found.nodes.values() if node.kind == "payload"),
        flows=_first(_flows(found, run_id), FLOWS, "ways"),
        cost=_cost(db, run_id),
        integrity=integrity(ledger, run, log, canonical),
    )
    finished.summary.extend(summary(finished))
    return finished


# --- What is asked about the run as a whole ---


def _run(db: Connection, run: Mapping[str, Any], ledger: Ledger, log: Told, canonical: str | None) -> AuditedRun:
    run_id, first, topic = run["run_id"], log.first, ledger.name(DECISIONS)
    started, ended = utc(run["started"]), utc(run["ended"])
    assert started is not None
    definition = content(canonical, PROMPT)
    described = payload(canonical)
    children = runs.relatives(db, "parent_run_id", run_id, RELATIVES + 1)
    forks = runs.relatives(db, "origin_run_id", run_id, RELATIVES + 1)
    asked = content(run["input"], PROMPT)
    assert asked is not None
    return AuditedRun(
        **{name: run[name] for name in _COPIED},
        labels=dict(run["labels"] or {}),
        description=str(described.get("description") or "") if isinstance(described, dict) else "",
        definition=definition,
        started=started,
        ended=ended,
        took_ms=between(started, ended),
        asked=asked,
        answer=content(run["output"], PROMPT),
        not_undone=list(run["not_undone"]),
        requested_at=_place(first.said, ledger) if first else None,
        received_at=Place(ledger.name(INBOX), run["partition"], first.input_offset) if first else None,
        ledger=(Place(topic, run["partition"], run["first_offset"]), Place(topic, run["partition"], run["last_offset"])),
        parent=Relative(run["parent_run_id"], step=run["parent_step"]) if run["parent_run_id"] else None,
        origin=Relative(run["origin_run_id"], seq=run["origin_seq"]) if run["origin_run_id"] else None,
        children=_first([_relative(each) for each in children], RELATIVES, "runs", run["child_runs"]),
        forks=_first([_relative(each) for each in forks], RELATIVES, "forks"),
    )


_COPIED: Final = (
    *("run_id", "request_id", "workflow", "digest", "status", "failure_kind", "failure_message", "failure_step", "cancelled_by"),
    "seq",
)


def _relative(run: Mapping[str, Any]) -> Relative:
    return Relative(run["run_id"], run["workflow"], run["status"], run["parent_step"], run["origin_seq"])


# --- Steps ---


def _steps(found: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> list[AuditedStep]:
    tries: dict[str, list[Mapping[str, Any]]] = {each["step"]: [] for each in found}
    for call in made:
        if call["step"] in tries:
            tries[call["step"]].append(call)
    return [_step(each, tries[each["step"]]) for each in found]


def _step(row: Mapping[str, Any], tries: Sequence[Mapping[str, Any]]) -> AuditedStep:
    started, ended = utc(row["started"]), utc(row["ended"])
    return AuditedStep(
        path=row["step"],
        status=row["status"],
        did=did(row["kind"]),
        what=row["model"] or row["tool"] or row["workflow"] or row["signal"] or _asked_for(tries),
        started=started or ended,
        ended=ended,
        took_ms=between(started, ended),
        attempts=[_attempt(each) for each in tries[:ATTEMPTS]],
        attempts_left_out=max(0, len(tries) - ATTEMPTS),
        remarks=remarks(row),
        output=content(row["output"], VALUE),
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        cost_usd=row["cost_usd"],
    )


def _asked_for(tries: Sequence[Mapping[str, Any]]) -> str | None:
    return next((str(call["model"]) for call in tries if call["model"]), None)


def _attempt(call: Mapping[str, Any]) -> Attempt:
    requested, ended = utc(call["requested"]), utc(call["ended"])
    whole, worked = between(requested, ended), call["latency_ms"]
    # An answer that came late was not waited for: how long it was in the queue is not known.
    queued = None if whole is None or worked is None or call["late"] else max(0.0, whole - worked)
    return Attempt(
        number=call["attempt"],
        outcome=call["outcome"],
        late=call["late"],
        requested=requested,
        ended=ended,
        worked_ms=worked,
        queued_ms=queued,
        failure_kind=call["failure_kind"],
        failure_message=call["failure_message"],
    )


def _steps_left_out(known: int, shown: int) -> str:
    if known <= shown:
        return ""
    return (
        f"{known - shown:,} of {known:,} steps are left out: of those within items and iterations of lists and loops only the "
        f"first ones are shown that are not simply done"
    )


# --- People ---


def _approval(row: Mapping[str, Any]) -> AuditedApproval:
    requested, answered = utc(row["requested"]), utc(row["answered"])
    assert requested is not None
    return AuditedApproval(
        step=row["step"],
        status=row["status"],
        requested=requested,
        message=clean(row["message"] or ""),
        shown=content(row["value"], VALUE) if row["value"] != "null" else None,
        may_answer=list(row["may_answer"]),
        editable=row["editable"],
        due=utc(row["due"]),
        answered=answered,
        waited_ms=between(requested, answered),
        answered_by=row["answered_by"],
        words=row["reason"],
        answer=content(row["answer"], VALUE),
    )


def _words(log: Told, ledger: Ledger) -> Listed[Word]:
    shown = [*log.early, *log.late]
    left_out = f"{log.heard - len(shown):,} of {log.heard:,} are left out, after the first {len(log.early)}"
    return Listed([_word(each, ledger) for each in shown], log.heard, left_out if log.heard > len(shown) else "")


def _word(heard: Heard, ledger: Ledger) -> Word:
    command = heard.command
    match command:
        case SignalReceived(payload=text) | ApprovalAnswered(value=text) | ChangeOutput(output=text):
            pass
        case _:
            text = None
    return Word(
        seq=heard.seq,
        at=datetime.fromtimestamp(heard.at / 1000, UTC),
        kind=type(command).__name__,
        did=said(command),
        by=command.by,
        words=getattr(command, "reason", ""),
        content=content(text, VALUE),
        ignored=heard.ignored,
        said_at=_place(heard.said, ledger),
    )


def _place(said_at: RequestPlace | None, ledger: Ledger) -> Place | None:
    return None if said_at is None else Place(ledger.name(REQUESTS), said_at.partition, said_at.offset)


# --- Data ---


def _files(found: Found, folder: Path) -> list[File]:
    told: list[File] = []
    for node in found.nodes.values():
        if node.kind == "file":
            readers = sorted({_name(found, edge.target) for edge in found.edges if edge.source == node.id})
            writers = sorted({_name(found, edge.source) for edge in found.edges if edge.target == node.id})
            size, checksum = _looked_at(node.name, folder)
            told.append(File(clean(node.name), readers, writers, node.detail.get("sha256"), size, checksum))
    return told


def _looked_at(path: str, folder: Path) -> tuple[int | None, str | None]:
    """Return a file's size and SHA-256 as they are now. Only the run's own folder: a tool may name any file of this machine."""
    try:
        whole = Path(path).resolve()
        if not whole.is_relative_to(folder.resolve()) or not whole.is_file():
            return None, None
        size = whole.stat().st_size
        if size > _LARGEST_FILE:
            return size, None
        with whole.open("rb") as file:
            return size, hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None, None


def _flows(found: Found, run_id: str) -> list[Flow]:
    own = ("step", "input", "output", "decision")
    there = found.nodes
    return [
        Flow(_name(found, edge.source, run_id), edge.of, _name(found, edge.target, run_id), edge.into, edge.kind)
        for edge in found.edges
        if there[edge.source].kind in own and there[edge.target].kind in own
    ]


def _name(found: Found, node_id: str, run_id: str = "") -> str:
    """Return what a node is called in a report; one of another run with that run."""
    node = found.nodes[node_id]
    name = {"input": "what was asked", "output": "what came out"}.get(node.kind, node.name)
    return clean(name if not run_id or node.run_id in (run_id, None) else f"{name} of run {(node.run_id or '')[:8]}")


# --- Cost ---


def _cost(db: Connection, run_id: str) -> AuditedCost:
    found = costs.of_family(db, run_id, ("step", "model", "prices"), GROUPS)
    return AuditedCost(
        total=_spent("total", found.total),
        own=_spent("this run", found.own),
        children=_spent("runs that it started", found.children),
        by_step=_groups(found.by["step"]),
        by_model=_groups(found.by["model"]),
        by_prices=_groups(found.by["prices"]),
    )


def _groups(found: costs.Costs) -> list[Spent]:
    groups = [_spent(_key(each["key"]), each) for each in found.groups]
    return [*groups, _spent(f"{found.left_out:,} others", found.rest)] if found.rest else groups


def _key(key: Mapping[str, Any]) -> str:
    if "step" in key:
        return str(key["step"])
    if key["kind"] == "tool":
        return "tools"
    return str(key.get("model") or key.get("prices") or "not known")


def _spent(name: str, sums: Mapping[str, Any]) -> Spent:
    counts = ("calls", "input_tokens", "cache_read_tokens", "output_tokens", "reasoning_tokens")
    return Spent(
        name=name,
        **{each: int(sums[each]) for each in (*counts, "unpriced_calls", "unmetered_calls")},
        cost_usd=float(sums["cost_usd"]),
        wasted_usd=float(sums["wasted_usd"]),
    )


def _first(found: list[T], most: int, what: str, total: int | None = None) -> Listed[T]:
    total = max(len(found), total or 0)
    left_out = f"only {min(most, len(found)):,} of {'more' if total == most + 1 else f'{total:,}'} {what} are shown"
    return Listed(found[:most], total, left_out if total > min(most, len(found)) else "")
