"""What each table and column of the views says, for people who ask them in SQL: printed by `foldflow sql --tables`.

To describe a column, add a line: a test demands one for each. What `ANYWHERE` says needs no repetition.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from projections.database import open_views
from projections.table import rows

ANYWHERE: Final = {
    "run_id": "The run",
    "partition": "Partition of `decisions` in which it stands",
    "offset": "Offset there",
    "step": "Path of the step: `ask`, `check[3].ask`",
    "input_tokens": "Tokens that went in, cached ones included",
    "output_tokens": "Tokens that came out, reasoning included",
    "failure_kind": "Kind of the failure, one of a closed set",
    "failure_message": "What the failure says",
}
"""Columns that mean the same in every table that has them, unless the table says otherwise."""

TABLES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "runs": (
        "Runs, as their last accepted decision left them",
        {
            "run_id": "The run: a UUID that derives from its request",
            "first_offset": "Offset of its first decision",
            "started": "When its first decision was made",
            "last_offset": "Offset of its last decision",
            "head": "Hash of its last decision",
            "seq": "Number of its last decision, which is how many it has",
            "status": "`running`, `paused`, `closing` (it undoes and cleans up), `completed`, `failed` or `cancelled`",
            "workflow": "Name of its workflow",
            "digest": "Version of its workflow: `specs.digest`",
            "request_id": "Id of the request that started it, if it had one",
            "labels": "Its labels: `labels['team'] = 'research'`",
            "input": "Its input, JSON",
            "copied": "What a fork took over from its origin, JSON",
            "output": "Its output, JSON",
            "outcome": "How a run that is closing will end",
            "failure_step": "The step that it failed at",
            "cancelled_by": "Who cancelled it",
            "not_undone": "Steps that were done and could not be undone, or were not to be, a JSON list",
            "breakpoints": "Steps before which it stops, a JSON list",
            "parent_run_id": "The run one of whose steps started it",
            "parent_step": "That step",
            "origin_run_id": "The run that it was forked from",
            "origin_seq": "Number of the decision that it was forked at",
            "origin_head": "Hash of that decision, hexadecimal",
            "updated": "When its last decision was made",
            "due": "When its time limit is over",
            "ended": "When it ended",
            "waiting_approval": "How many of its steps wait for an approval",
            "waiting_signal": "How many wait for a signal",
            "waiting_sleep": "How many wait for a time",
            "waiting_breakpoint": "How many stand at a breakpoint",
            "steps_settled": "How many of the workflow's own steps are over, not those within them",
            "calls": "LLM and tool calls that were requested",
            "child_runs": "Runs that its steps started",
            "retries": "Attempts beyond the first",
            "cost_usd": "Sum of the known costs of its calls, US dollars; exact sums: `calls`",
            "unpriced_calls": "LLM answers whose price is unknown",
        },
    ),
    "steps": (
        "Steps of runs, items and iterations included; a step that nothing was decided about yet has no row",
        {
            "position": "Which effect of the decision at `partition` and `offset` first was about it",
            "partition": "Partition of the decision that first was about it",
            "offset": "Offset of that decision",
            "status": "`running`, `waiting` (for a retry), `sleeping`, `awaiting_signal`, `awaiting_approval`, `entered`, "
            "`held`, `completed`, `skipped`, `failed`, `cancelled` or `abandoned` (its run ended before)",
            "attempt": "Number of its last attempt",
            "kind": "`llm`, `tool`, `run`, `transform`, `sleep`, `wait_for`, `approval`, `steps`, `for_each` or `repeat`",
            "model": "Model of its last attempt",
            "tool": "Tool of its last attempt",
            "workflow": "Workflow of the run that it starts",
            "child_run_id": "The run that it started",
            "detached": "It doesn't wait for that run",
            "signal": "Name of the signal that it waits for",
            "correlation": "Which of several such signals",
            "started": "When it was first requested",
            "due": "When its attempt is out of time or starts, or its wait is over",
            "ended": "When it was settled",
            "output": "Its output, JSON; of a signal's see `signals.payload`",
            "source": "The step whose output is its own",
            "tolerated": "It failed, and the run goes on all the same",
            "reason": "Why it was skipped, is held or was cancelled",
            "copied": "It has the result of the run that this one was forked from",
            "changed": "Somebody replaced its output",
            "compensation": "The step that undoes it, if need be",
            "total": "How many items it has",
            "begun": "How many items, iterations or steps within it have begun",
            "done": "How many of these are settled",
            "failed": "How many of these failed or were cancelled",
            "input_tokens": "Sum over its attempts",
            "output_tokens": "Sum over its attempts",
            "cost_usd": "Sum of the known costs of its attempts, US dollars",
        },
    ),
    "calls": (
        "LLM and tool calls, each attempt a row",
        {
            "call_id": "The call; derived from the decision that requested it",
            "workflow": "Workflow of its run",
            "attempt": "Which attempt of its step it is",
            "kind": "`llm` or `tool`",
            "partition": "Partition of the decision that requested it (of a stray one: that answered it)",
            "offset": "Offset of that decision",
            "outcome": "`pending`, `completed`, `failed`, `timed_out`, `cancelled`, `abandoned` (its run ended before) or "
            "`stray` (an answer to a call that no accepted decision requested)",
            "late": "Its answer came when nobody waited for it any more; it is paid all the same",
            "model": "Model that was asked, or that says it has answered",
            "provider": "Who served the model",
            "tool": "Name of the tool",
            "tool_version": "Version of the tool that answered",
            "requested": "When it was requested",
            "deadline": "Until when its answer counts",
            "ended": "When its answer was accepted, or it was given up",
            "cache_read_tokens": "Input tokens that the provider had cached",
            "cache_write_tokens": "Input tokens that it cached, those for an hour included",
            "cache_write_1h_tokens": "Input tokens that it cached for an hour",
            "reasoning_tokens": "Output tokens that were reasoning",
            "cost_usd": "What it cost, US dollars; nothing where the price is unknown",
            "prices": "The price list that it was priced by",
            "paid_for": "What a tool says that it paid for",
            "latency_ms": "How long the worker waited, milliseconds",
            "finish_reason": "Why the model stopped",
        },
    ),
    "approvals": (
        "What steps asked people, and what they answered",
        {
            "partition": "Partition of the decision that asked",
            "offset": "Offset of that decision",
            "requested": "When it was asked",
            "message": "What was asked",
            "value": "What was shown, JSON",
            "may_answer": "Who may answer, a JSON list; empty: anybody",
            "editable": "Who answers may change the value",
            "due": "How long it waits",
            "status": "`waiting`, `approved`, `rejected`, `expired`, `replaced` (somebody set the output instead) or `cancelled`",
            "answered": "When it was answered, or its time was over",
            "answered_by": "Who answered; empty where the time was over",
            "reason": "What they gave as a reason; `deadline` where the time was over",
            "edited": "They changed the value",
            "answer": "What they made of the value, JSON",
        },
    ),
    "signals": (
        "Signals that runs took notice of",
        {
            "seq": "Number of the decision that received it",
            "partition": "Partition of that decision",
            "offset": "Offset of that decision",
            "signal_id": "Its identity: the same one twice counts once",
            "name": "Its name",
            "correlation": "Which of several waiting steps it is for",
            "payload": "What it says, JSON",
            "sent_by": "Who sent it",
            "received": "When it was received",
            "status": "`kept` (no step has waited for it yet), `taken` or `unused`",
            "step": "The step that took it",
            "taken": "When that was",
        },
    ),
    "decisions": (
        "The index of the log: decisions that count. What one says in full stands in Kafka, at its partition and offset",
        {
            "seq": "Its number within its run: 1, 2, 3 …",
            "decided": "The broker's time of its input",
            "input_offset": "Offset of its input in `inbox`",
            "input": "Type of its input: `StartRun`, `LlmCallCompleted` …",
            "step": "The step that the input is about, if it is about one",
            "by": "Who said so, if the input is a command",
            "cause": "Id of the effect that the input answers: a call, a child run, a timer",
            "effects": "Types of its effects, in order",
            "ignored": "Why the input was ignored, if it was",
            "hash": "Its hash: what the next decision of its run carries as `prev`",
            "size": "Bytes of Avro",
        },
    ),
    "deadletters": (
        "Messages that couldn't be processed",
        {
            "topic": "Full name of the topic on which it stood",
            "partition": "Partition there",
            "offset": "Offset there",
            "received": "When it stood there",
            "reason": "Why, one of a closed set",
            "detail": "What exactly is wrong",
            "request_id": "The request that it is about, if that is known",
            "run_id": "The run that it is about, if that is known",
            "key": "Its key, as it was",
            "value": "Its value, as it was",
        },
    ),
    "settlements": (
        "What was done about dead letters",
        {
            "log_partition": "Where that stands on `deadletter`: partition",
            "log_offset": "Offset",
            "topic": "The dead letter: full name of the topic on which it stood",
            "partition": "Partition there",
            "offset": "Offset there",
            "action": "`redriven` or `discarded`",
            "at": "When",
            "by": "Who",
            "reason": "Why",
            "to_partition": "Where the message stands again: partition",
            "to_offset": "Offset",
        },
    ),
    "specs": (
        "Registered versions of workflows",
        {
            "digest": "The version: a hash of its canonical form",
            "name": "Name of the workflow",
            "description": "What it says of itself",
            "steps": "Names of its steps, in order",
            "position": "Offset of its last registration: the highest of a name is the newest",
            "spec": "The definition in its canonical form, JSON",
        },
    ),
    "ignored": (
        "Records that don't count, and why",
        {
            "topic": "The topic, without prefix",
            "partition": "Partition there",
            "offset": "Offset there",
            "verdict": "`overtaken` (another decision was first), `finished_before`, `set_aside`, `broken`, `misplaced` or "
            "`not_decodable`",
            "run_id": "The run, if it could be read",
            "seq": "The decision's number, if it could be read",
            "detail": "What exactly is wrong",
        },
    ),
    "workers": (
        "Processes of the processors, as they last reported; those that stopped or fell silent stay",
        {
            "worker_id": "Its name: role and a random part",
            "role": "What it does",
            "host": "The machine that it runs on",
            "pid": "Its process id there",
            "version": "Version of Foldflow",
            "started": "When it began",
            "reported": "When it reported last: one that works does so every 30 s",
            "in_flight": "Calls that it was making then",
            "concurrency": "How many it makes at once",
            "partitions": "Partitions that it had, a JSON list",
            "circuits": "Circuits of the endpoints that it calls, a JSON list",
            "stopped": "Whether it said that it stopped",
        },
    ),
    "attempts": (
        "Each attempt of a step that asks somebody: its calls, and the runs that it started (a view)",
        {
            "attempt": "1, 2, 3 …",
            "kind": "`llm`, `tool` or `run`",
            "name": "Model, tool or workflow",
            "status": "As `calls.outcome`, or as `runs.status` of the run that it started",
            "started": "When it was requested",
            "due": "When its time is over",
            "ended": "When it was",
            "call_id": "The call",
            "child_run_id": "The run that it started",
        },
    ),
    "timers": (
        "What runs wait for by the clock, and which timers have fired (a view)",
        {
            "step": "Path of the step; none: the run's own time limit",
            "kind": "What ends then, while it is pending: `retry` (the wait before it), `sleep`, `approval`, `signal`, "
            "`attempt`, `step` or `time_limit`",
            "status": "`pending`, `fired`, or `ignored` (it fired too late to matter)",
            "due": "When it fires, while it is pending",
            "fired": "When it did",
        },
    ),
    "labels": ("Labels of runs, one a row (a view)", {"key": "Name of the label", "value": "What it says"}),
    "usage": (
        "What each call that is over used: sum it by what you like (a view)",
        {
            "day": "The day on which it ended, UTC",
            "workflow": "Workflow of its run",
            "call_id": "The call",
            "kind": "`llm` or `tool`",
            "model": "Its model",
            "tool": "Its tool",
            "provider": "Who served the model",
            "outcome": "As `calls.outcome`",
            "cache_read_tokens": "Tokens that the provider had in its cache, part of those that went in",
            "cache_write_tokens": "Tokens that it put there, part of those that went in",
            "cache_write_1h_tokens": "Those of them that it keeps for an hour",
            "reasoning_tokens": "Tokens of reasoning, part of those that came out",
            "cost_usd": "What it cost, US dollars; none: unknown",
            "prices": "The price list by which",
        },
    ),
    "losers": (
        "Decisions of open runs that were overtaken: what is written on top of them has lost as well",
        {"hash": "Hash of the decision"},
    ),
    "breaks": (
        "Runs that were set aside: their chain is broken as no honest writer can do it",
        {"partition": "Where it breaks: partition of `decisions`", "problem": "What is wrong there"},
    ),
    "positions": (
        "Up to where the views have read",
        {
            "topic": "The topic, without prefix",
            "topic_id": "Kafka's id of the topic: another one is another topic",
            "partition": "Partition",
            "position": "The offset that is read next",
        },
    ),
    "about": ("The file itself", {"version": "Version of these tables"}),
}

_HEAD: Final = """# The tables

What `foldflow sql` can be asked: the views that the API keeps of the topics, in DuckDB. All of it can be made anew from Kafka at
any time; nothing here is the truth itself. Times are UTC. Payloads are JSON texts: `output ->> '$.title'`. This page is what
`foldflow sql --tables` prints.
"""


def described() -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """Yield each table there is: its name, what it holds, and name, type and text of its columns."""
    with tempfile.TemporaryDirectory() as folder:
        db, _ = open_views(Path(folder) / "views.duckdb", {})
        try:
            found = rows(
                db,
                "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'main' "
                "ORDER BY table_name, ordinal_position",
            )
        finally:
            db.close()
    there: dict[str, list[tuple[str, str]]] = {}
    for row in found:
        there.setdefault(row["table_name"], []).append((row["column_name"], row["data_type"]))
    for name in sorted(there, key=list(TABLES).index):
        says, texts = TABLES[name]
        yield name, says, [(column, kind, {**ANYWHERE, **texts}[column]) for column, kind in there[name]]


def markdown() -> str:
    """Return all tables as a page of Markdown."""
    parts = [_HEAD]
    for name, says, columns in described():
        lines = [f"| `{column}` | {kind} | {text} |" for column, kind, text in columns]
        parts.append("\n".join((f"## {name}\n\n{says}.\n", "| column | type | |", "|---|---|---|", *lines, "")))
    return "\n".join(parts)
