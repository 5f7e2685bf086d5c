"""What can be asked about steps: those of a run, as far as they can be shown, in pages, and those that wait."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from projections.extent import Extent, in_extent
from projections.steps import WAITS
from projections.table import Connection, rows
from streams.workflow.state import StepStatus

_FINE: Final = (StepStatus.COMPLETED.value, StepStatus.SKIPPED.value)
_OF_RUN: Final = f"FROM steps WHERE {in_extent('steps')}"
_WITH_PAYLOADS: Final = f"""
    SELECT steps.* REPLACE (coalesce(steps.output, taken.payload) AS output)
    FROM steps
         LEFT JOIN (SELECT step, payload FROM signals WHERE {in_extent("signals")} AND step IS NOT NULL) AS taken USING (step)
    WHERE {in_extent("steps")}
"""  # noqa: S608 - our own text
"""The output of a step that took a signal is the signal's payload."""


def of_run(db: Connection, extent: Extent, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Return a run's steps in the order in which they were first decided about, and how many there are.

    If there are more than `most`, only those that stand in no item or iteration, and of the others the first that are not fine.
    """
    order = 'ORDER BY "offset", position'
    found = rows(db, f"{_WITH_PAYLOADS} {order} LIMIT $most", extent.given(most=None if most is None else most + 1))
    known = len(found)
    if most is not None and known > most:
        count = f"SELECT count(*) AS n, count(*) FILTER (contains(step, '[')) AS parts {_OF_RUN}"
        known, parts = rows(db, count, extent.given())[0].values()
        fine = ", ".join(f"'{status}'" for status in _FINE)
        room = max(0, most - (known - parts))
        part = f"contains(step, '[') AND status NOT IN ({fine})"
        first = f"SELECT step {_OF_RUN} AND {part} {order} LIMIT {room}"
        which = f"AND (NOT contains(step, '[') OR step IN ({first}))"
        found = rows(db, f"{_WITH_PAYLOADS} {which} {order}", extent.given())
    return _with_outputs(db, extent, found), known


@dataclass(frozen=True, slots=True)
class Part:
    """Which steps of a run are listed. `below`: only this step and all within it; `after`: place of the last one shown before."""

    below: str | None = None
    status: str | None = None
    after: tuple[int, int] | None = None


def page(db: Connection, extent: Extent, part: Part, limit: int) -> list[dict[str, Any]]:
    """Return steps of a run in the order in which they were first decided about."""
    conditions, parameters = "", extent.given()
    if part.below is not None:
        conditions += " AND (step = $below OR starts_with(step, $below || '[') OR starts_with(step, $below || '.'))"
        parameters["below"] = part.below
    if part.status is not None:
        conditions += " AND status = $status"
        parameters["status"] = part.status
    if part.after is not None:
        conditions += ' AND ("offset", position) > ($after_offset, $after_position)'
        parameters["after_offset"], parameters["after_position"] = part.after
    query = f'{_WITH_PAYLOADS} {conditions} ORDER BY "offset", position LIMIT {limit}'
    return _with_outputs(db, extent, rows(db, query, parameters))


def waiting(db: Connection, extent: Extent, limit: int) -> list[dict[str, Any]]:
    """Return the steps that wait for something but calls, or are held, those first that must be first."""
    statuses = ", ".join(f"'{status}'" for status in (*WAITS, StepStatus.HELD.value))
    order = f'ORDER BY due NULLS LAST, "offset", position LIMIT {limit}'
    return rows(db, f"SELECT * {_OF_RUN} AND status IN ({statuses}) {order}", extent.given())


def statuses(db: Connection, extent: Extent, names: Sequence[str]) -> dict[str, int]:
    """Return how many steps of a run are how. `names`: its version's steps, pending if nothing was decided about them."""
    query = f"SELECT status, count(*) AS n, count(*) FILTER (step IN (SELECT unnest($names))) AS named {_OF_RUN} GROUP BY status"
    found = rows(db, f"{query} ORDER BY n DESC, status", extent.given(names=list(names)))
    pending = len(names) - sum(row["named"] for row in found)
    return {row["status"]: row["n"] for row in found} | ({"pending": pending} if pending > 0 else {})


def _with_outputs(db: Connection, extent: Extent, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give steps whose output is another's that output: a step with steps has the last one's, a loop its last iteration's."""
    known = {row["step"]: (row["output"], row["source"]) for row in found}
    missing = {source for _, source in known.values() if source is not None} - known.keys()
    while missing:
        wanted = rows(db, f"{_WITH_PAYLOADS} AND step IN (SELECT unnest($steps))", extent.given(steps=sorted(missing)))
        more = {row["step"]: (row["output"], row["source"]) for row in wanted}
        known |= dict.fromkeys(missing, (None, None)) | more
        missing = {source for _, source in more.values() if source is not None} - known.keys()
    for row in found:
        output, source = row["output"], row["source"]
        while output is None and source is not None:
            output, source = known[source]
        row["output"] = output
    return found
