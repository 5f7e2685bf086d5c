"""What was spent: tokens of each kind and money, of all calls or those of one run, by what they are for.

It is summed from `calls`, where each call stands once with what its own answer says it cost; nothing is priced here, so the past
keeps its price. Counted is every call that is over, late answers and those of losing decisions too, each for its run. A run that
started others has a family, itself and all those below it; in a family each call is counted once. What a fork copied was paid by
its origin. Pending calls cost nothing yet.

Money is summed in exact decimals, so groups add up to their total in any order. `input_tokens` includes the cached tokens,
`cache_write_tokens` those that are kept for an hour, `output_tokens` the reasoning.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    # `CASE`: the words are compared for those few calls only, which takes half as long for all.
    "unmetered_calls": (
        "count(CASE WHEN kind = 'llm' AND paid IS NULL AND input_tokens IS NULL THEN CASE WHEN coalesce(latency_ms, 1) > 0 AND "
        "(outcome IN ('timed_out', 'cancelled', 'abandoned') OR failure_kind IN ('timeout', 'cancelled')) THEN 1 END END)"
    ),
}
"""What is told of calls: names and how they are summed. `paid`: their price in exact decimals."""

SUMS: Final = tuple(_SUMS)
_ORDER: Final = "cost_usd DESC, input_tokens + output_tokens DESC, calls DESC, key"
_RANK: Final = ("calls", "cost_usd", "input_tokens", "output_tokens")
"""Most expensive groups first; and the sums that this order needs."""


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
    calls, parameters = _chosen(db, wanted)
    order = "key.day DESC" if by == "day" else _ORDER
    before, source, sums = _source(by, limit)
    # Where only what is shown is grouped, the total and the number of groups are those of what there was before.
    number, summed, again = {
        "call": ("count(*)", "chosen", _SUMS),
        "run": ("(SELECT count(*) FROM ranked)", "chosen", _SUMS),
    }.get(by, ("count(*)", "grouped", _again()))
    query = f"""
        WITH {", ".join((calls, *before))},
        grouped AS MATERIALIZED (SELECT {_packed(by)} AS key, {_selected(sums)} FROM {source} GROUP BY key),
        first AS (SELECT * FROM grouped ORDER BY {order} LIMIT {limit:d})
        SELECT key, 1 AS groups, row_number() OVER (ORDER BY {order}) AS place, {", ".join(SUMS)} FROM first
        UNION ALL SELECT NULL, {number}, NULL, {_selected(again)} FROM {summed}
        ORDER BY place NULLS LAST
    """  # noqa: S608 - our own names
    *groups, all_ = rows(db, query, parameters)
    total, shown = _told(all_), [{"key": _in_words(group["key"]), **_told(group)} for group in groups]
    left_out = all_["groups"] - len(shown)
    return Costs(total, shown, _less(total, shown) if left_out else None, left_out)


def _source(by: str, limit: int) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """Return further common tables, the one of them that is grouped, and how it is summed.

    Of calls and runs there may be as many as calls: only those that are shown are summed, which takes half as long.
    """
    match by:
        case "call":
            dearest = "coalesce(paid, 0) DESC, coalesce(input_tokens, 0) + coalesce(output_tokens, 0) DESC, call_id"
            first = f"SELECT row FROM chosen ORDER BY {dearest} LIMIT {limit:d}"  # noqa: S608 - our own names
            return (f"shown AS (SELECT * FROM chosen WHERE row IN ({first}))",), "shown", _SUMS  # noqa: S608
        case "run":
            ranked = f"SELECT run_id AS key, {_selected({name: _SUMS[name] for name in _RANK})} FROM chosen GROUP BY key"  # noqa: S608
            first = f"SELECT key FROM ranked ORDER BY {_ORDER} LIMIT {limit:d}"  # noqa: S608 - our own names
            shown = f"shown AS (SELECT * FROM chosen WHERE run_id IN ({first}))"  # noqa: S608 - our own names
            return (f"ranked AS MATERIALIZED ({ranked})", shown), "shown", _SUMS
        case "step":
            # A path is read once for all calls of that path, not once for each.
            paths = f"SELECT workflow, step, {_selected(_SUMS)} FROM chosen GROUP BY workflow, step"  # noqa: S608 - our own names
            return (f"paths AS ({paths})",), "paths", _again()
        case _:
            return (), "chosen", _SUMS


def _packed(by: str) -> str:
    """Return what makes a group's key."""
    return f"struct_pack({', '.join(f'{name} := {made}' for name, made in GROUPS[by].items())})"


@dataclass(frozen=True, slots=True)
class FamilyCosts:
    """What a run and those below it cost: in all, the run itself, the others, and by groups of each kind that was asked for."""

    total: dict[str, Any]
    own: dict[str, Any]
    children: dict[str, Any]
    by: dict[str, Costs]


def of_family(db: Connection, run_id: str, by: Sequence[str], limit: int) -> FamilyCosts:
    """Return what a run and all below it cost, grouped in several ways at once. `by`: of `GROUPS`, not run, day or call."""
    runs = family(db, run_id)
    calls, parameters = _chosen(db, Filter(runs=runs))
    keys = [f"{_packed(each)} AS by_{each}" for each in by]
    query = f"WITH {calls} SELECT run_id = $run AS own, {', '.join(keys)}, {_selected(_SUMS)} FROM chosen GROUP BY ALL"  # noqa: S608 - our own names
    found = [(row, _told(row)) for row in rows(db, query, parameters | {"run": run_id})]
    total, own = _added(sums for _, sums in found), _added(sums for row, sums in found if row["own"])
    groups = dict[str, Costs]()
    for each in by:
        parts = dict[tuple[Any, ...], list[dict[str, Any]]]()
        for row, sums in found:
            parts.setdefault(tuple(row[f"by_{each}"].items()), []).append(sums)
        told = sorted(({"key": _in_words(dict(key)), **_added(sums)} for key, sums in parts.items()), key=_dearest_first)
        groups[each] = Costs(total, told[:limit], _added(told[limit:]) if told[limit:] else None, len(told[limit:]))
    return FamilyCosts(total, own, _less(total, [own]), groups)


def _dearest_first(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what groups are sorted by, as SQL does it in `costs`."""
    tokens = group["input_tokens"] + group["output_tokens"]
    return -group["cost_usd"], -tokens, -group["calls"], [(value is None, value or "") for value in group["key"].values()]


def _added(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    there = list(sums)
    return {name: sum((each[name] for each in there), Decimal(0) if name in _MONEY else 0) for name in SUMS}


def _less(total: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: total[name] - sum(part[name] for part in parts) for name in SUMS}


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
        calls, parameters = _chosen(db, replace(wanted, runs=(first,)))
        (found,) = rows(db, f"WITH {calls} SELECT {_selected(_SUMS)} FROM chosen", parameters)  # noqa: S608 - our own names
        own = _told(found)
    return own, _less(total, [own])


def _chosen(db: Connection, wanted: Filter) -> tuple[str, dict[str, Any]]:
    """Return the common tables that end with `chosen`, the calls that are wanted, and their parameters."""
    parameters = dict[str, Any]()

    def given(value: Any) -> str:
        parameters[name := f"p{len(parameters)}"] = value
        return f"${name}"

    conditions = ["calls.outcome <> 'pending'"]
    if wanted.since is not None:
        conditions.append(f"calls.ended >= make_timestamp_ms({given(wanted.since)})::TIMESTAMP_MS")
    if wanted.until is not None:
        conditions.append(f"calls.ended < make_timestamp_ms({given(wanted.until)})::TIMESTAMP_MS")
    if wanted.workflow is not None:
        conditions.append(f"calls.workflow = {given(wanted.workflow)}")
    if wanted.runs is not None:
        # Where the runs' decisions are lets DuckDB skip all row groups in which their calls can't be.
        query = "SELECT min(first_offset) AS first, max(last_offset) AS last FROM runs WHERE run_id IN (SELECT unnest($1))"
        (place,) = rows(db, query, [list(wanted.runs)])
        conditions.append(f"calls.run_id IN (SELECT unnest({given(list(wanted.runs))}))")
        conditions.append(f'calls."offset" BETWEEN {given(place["first"])} AND {given(place["last"])}')
    labelled = [f"labels[{given(key)}] = {given(value)}" for key, value in wanted.labels]
    if labelled:
        conditions.append("calls.run_id IN (SELECT run_id FROM family)")
    chosen = f"""chosen AS NOT MATERIALIZED (
        SELECT calls.*, calls.rowid AS row,
               CASE WHEN calls.cost_usd BETWEEN 0 AND {_MOST_USD} THEN calls.cost_usd::DECIMAL(38, 12) END AS paid
        FROM calls WHERE {" AND ".join(conditions)}
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
