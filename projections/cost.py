"""What was spent: tokens of each kind and money, of all calls or those of one run, by what they are for.

It is summed from `calls`, where each call stands once with what its own answer says it cost; nothing is priced here, so the past
keeps its price. Counted is every call that is over, late answers and those of losing decisions too, each for its run. A run that
started others has a family, itself and all those below it; in a family each call is counted once. What a fork copied was paid by
its origin. Pending calls cost nothing yet.

Money is summed in exact decimals, so groups add up to their total in any order. `input_tokens` includes the cached tokens,
`cache_write_tokens` those that are kept for an hour, `output_tokens` the reasoning.
"""

from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from typing import Any, Final

from projections.table import Connection, rows

GROUPS: Final[dict[str, dict[str, str]]] = {
    "workflow": {"workflow": "workflow"},
    "model": {"kind": "kind", "model": "model"},
    "tool": {"kind": "kind", "tool": "tool"},
    # Items and iterations of a step are one: `check[3].ask` is told as `check[*].ask`.
    "step": {
        "workflow": "workflow",
        "step": r"CASE WHEN contains(step, '[') THEN regexp_replace(step, '\[\d+\]', '[*]', 'g') ELSE step END",
    },
    "run": {"run_id": "run_id", "workflow": "workflow"},
    "day": {"day": "ended::DATE"},
    "prices": {"kind": "kind", "prices": "prices"},
    "call": {
        "call_id": "call_id",
        "run_id": "run_id",
        "step": "step",
        "kind": "kind",
        "name": "coalesce(model, tool)",
        "outcome": "outcome",
        "prices": "prices",
        "paid_for": "paid_for",
    },
}
"""By what costs can be grouped: the columns of a group's key, and what they are made from."""

_MOST_USD: Final = 1_000_000_000
"""No call costs as much: such an amount is somebody's error, and counts as an unknown price rather than spoil all sums."""
_MONEY: Final = frozenset({"cost_usd", "wasted_usd"})
_SUMS: Final[dict[str, str]] = {
    "calls": "count(*)",
    "llm_calls": "count(*) FILTER (kind = 'llm')",
    "tool_calls": "count(*) FILTER (kind = 'tool')",
    **{
        name: f"coalesce(sum({name}), 0)::BIGINT"
        for name in (
            *("input_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"),
            *("output_tokens", "reasoning_tokens"),
        )
    },
    "cost_usd": "coalesce(sum(paid), 0)",
    "wasted_usd": "coalesce(sum(paid) FILTER (outcome <> 'completed'), 0)",
    "unpriced_calls": "count(*) FILTER (kind = 'llm' AND paid IS NULL AND input_tokens IS NOT NULL)",
    # Given up while the model worked on it, and no answer has told what that took: the provider's invoice may.
    "unmetered_calls": (
        "count(*) FILTER (kind = 'llm' AND paid IS NULL AND input_tokens IS NULL AND coalesce(latency_ms, 1) > 0 AND "
        "(outcome IN ('timed_out', 'cancelled', 'abandoned') OR failure_kind IN ('timeout', 'cancelled')))"
    ),
}
"""What is told of calls: names and how they are summed. `paid`: their price in exact decimals."""

SUMS: Final = tuple(_SUMS)
_DEAREST: Final = """
    SELECT * FROM chosen
    ORDER BY coalesce(paid, 0) DESC, coalesce(input_tokens, 0) + coalesce(output_tokens, 0) DESC, call_id
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which calls are counted: those that ended from `since` on and before `until` (milliseconds since the epoch).

    `labels`: of families whose first run has all of them, for runs that others start bear none. `runs`: of these.
    """

    since: int | None = None
    until: int | None = None
    workflow: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    runs: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """Sums of all calls, of groups of them, most expensive first, and of the groups that are left out (None: none are).

    `left_out`: how many. Each is a dictionary with the names in `SUMS`; a group has its key as `key`.
    """

    total: dict[str, Any]
    groups: list[dict[str, Any]]
    rest: dict[str, Any] | None
    left_out: int


def costs(db: Connection, wanted: Filter, by: str, limit: int) -> Costs:
    """Return what the calls that are wanted cost, the first `limit` groups of them one by one. `by`: one of `GROUPS`."""
    calls, parameters = _chosen(wanted)
    key = GROUPS[by]
    order = "key.day DESC" if by == "day" else "cost_usd DESC, input_tokens + output_tokens DESC, calls DESC, key"
    packed = ", ".join(f"{name} := {made}" for name, made in key.items())
    # Every call is a group of its own: only those that are shown are made into one, which takes a tenth of the time.
    source, summed, again = (
        (f"({_DEAREST} LIMIT {limit:d})", "chosen", _SUMS) if by == "call" else ("chosen", "grouped", _again())
    )
    query = f"""
        WITH {calls},
        grouped AS MATERIALIZED (SELECT struct_pack({packed}) AS key, {_selected(_SUMS)} FROM {source} GROUP BY key),
        first AS (SELECT * FROM grouped ORDER BY {order} LIMIT {limit:d})
        SELECT key, 1 AS groups, row_number() OVER (ORDER BY {order}) AS place, {", ".join(SUMS)} FROM first
        UNION ALL SELECT NULL, count(*), NULL, {_selected(again)} FROM {summed}
        ORDER BY place NULLS LAST
    """  # noqa: S608 - our own names
    *groups, all_ = rows(db, query, parameters)
    total, shown = _told(all_), [{"key": _in_words(group["key"]), **_told(group)} for group in groups]
    left_out = all_["groups"] - len(shown)
    rest = {name: total[name] - sum(group[name] for group in shown) for name in SUMS}
    return Costs(total, shown, rest if left_out else None, left_out)


def family(db: Connection, run_id: str) -> tuple[str, ...]:
    """Return a run and all that it started, and those started, and so on; the run comes first."""
    found, last = {run_id: None}, [run_id]
    while last:  # a generation a question: in one recursive question each would join all runs there are
        children = rows(db, "SELECT run_id FROM runs WHERE parent_run_id IN (SELECT unnest($1))", [last])
        last = [row["run_id"] for row in children if row["run_id"] not in found]
        found |= dict.fromkeys(last)
    return tuple(found)


def in_family(db: Connection, wanted: Filter, total: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the first of `wanted.runs` itself cost, and what the others did; `total`: what all of them cost."""
    first, *others = wanted.runs or ()
    own = total
    if others:
        calls, parameters = _chosen(replace(wanted, runs=(first,)))
        (found,) = rows(db, f"WITH {calls} SELECT {_selected(_SUMS)} FROM chosen", parameters)  # noqa: S608 - our own names
        own = _told(found)
    return own, {name: total[name] - own[name] for name in SUMS}


def _chosen(wanted: Filter) -> tuple[str, list[Any]]:
    """Return the common tables that end with `chosen`, the calls that are wanted, and their parameters."""
    parameters = list[Any]()

    def given(value: Any) -> str:
        parameters.append(value)
        return f"${len(parameters)}"

    conditions, of_runs = ["calls.outcome <> 'pending'"], ""
    if wanted.since is not None:
        conditions.append(f"calls.ended >= make_timestamp_ms({given(wanted.since)})::TIMESTAMP_MS")
    if wanted.until is not None:
        conditions.append(f"calls.ended < make_timestamp_ms({given(wanted.until)})::TIMESTAMP_MS")
    if wanted.workflow is not None:
        conditions.append(f"calls.workflow = {given(wanted.workflow)}")
    if wanted.runs is not None:
        # Where a run's decisions are lets DuckDB skip all row groups in which its calls can't be.
        of_runs = f"""JOIN (
            SELECT run_id, "partition", first_offset, last_offset FROM runs
            WHERE run_id IN (SELECT unnest({given(list(wanted.runs))}))
        ) AS runs USING (run_id)"""  # noqa: S608 - our own names
        conditions.append('calls."partition" = runs."partition"')
        conditions.append('calls."offset" BETWEEN runs.first_offset AND runs.last_offset')
    labelled = [f"labels[{given(key)}] = {given(value)}" for key, value in wanted.labels]
    if labelled:
        conditions.append("calls.run_id IN (SELECT run_id FROM family)")
    chosen = f"""chosen AS NOT MATERIALIZED (
        SELECT calls.*, CASE WHEN calls.cost_usd BETWEEN 0 AND {_MOST_USD} THEN calls.cost_usd::DECIMAL(38, 12) END AS paid
        FROM calls {of_runs} WHERE {" AND ".join(conditions)}
    )"""  # noqa: S608 - our own names
    return (f"{_family(' AND '.join(labelled))}, " if labelled else "") + chosen, parameters


def _family(first: str) -> str:
    """Return the common table of the runs that meet a condition, and of all below them."""
    return f"""RECURSIVE family AS (
        SELECT run_id FROM runs WHERE {first}
        UNION SELECT runs.run_id FROM runs JOIN family ON runs.parent_run_id = family.run_id
    )"""  # noqa: S608 - our own names


def _in_words(key: dict[str, Any]) -> dict[str, Any]:
    """Return a group's key as it is told: a day in words, for it is days that are grouped, which takes a third of the time."""
    return {name: value.isoformat() if isinstance(value, date) else value for name, value in key.items()}


def _selected(sums: dict[str, str]) -> str:
    return ", ".join(f"{made} AS {name}" for name, made in sums.items())


def _again() -> dict[str, str]:
    """Return how sums of groups are summed."""
    return {name: f"coalesce(sum({name}), 0)" + ("" if name in _MONEY else "::BIGINT") for name in SUMS}


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """Return the sums in a row, money as Decimal."""
    return {name: Decimal(row[name]).normalize() if name in _MONEY else int(row[name]) for name in SUMS}
