"""What can be asked about steps: those of a run, as far as they can be shown, in pages, and those that wait."""

from dataclasses import dataclass
from typing import Any, Final

from projections.steps import WAITS
from projections.table import Connection, rows
from streams.workflow.state import StepStatus

_FINE: Final = (StepStatus.COMPLETED.value, StepStatus.SKIPPED.value)
_OF_RUN: Final = """
    FROM steps LEFT JOIN (SELECT step, payload FROM signals WHERE run_id = $1 AND step IS NOT NULL) AS taken USING (step),
         (SELECT "partition" AS p, first_offset AS low, last_offset AS high FROM runs WHERE run_id = $1)
    WHERE steps.run_id = $1 AND steps."partition" = p AND "offset" BETWEEN low AND high
"""
_COLUMNS: Final = "steps.* REPLACE (coalesce(steps.output, taken.payload) AS output)"


def of_run(db: Connection, run_id: str, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Return a run's steps in the order in which they were first decided about, and how many there are.

    If there are more than `most`, only those that stand in no item or iteration, and of the others the first that are not fine.
    """
    count = f"SELECT count(*) AS n, count(*) FILTER (contains(step, '[')) AS parts {_OF_RUN}"
    known = rows(db, count, [run_id])[0]
    which = ""
    if most is not None and known["n"] > most:
        fine = ", ".join(f"'{status}'" for status in _FINE)
        room = max(0, most - (known["n"] - known["parts"]))
        part = f"contains(step, '[') AND status NOT IN ({fine})"
        first = f'SELECT step {_OF_RUN} AND {part} ORDER BY "offset", position LIMIT {room}'
        which = f"AND (NOT contains(step, '[') OR step IN ({first}))"
    query = f'SELECT {_COLUMNS} {_OF_RUN} {which} ORDER BY "offset", position'
    return _with_outputs(db, run_id, rows(db, query, [run_id])), known["n"]


@dataclass(frozen=True, slots=True)
class Part:
    """Which steps of a run are listed. `below`: only this step and all within it; `after`: place of the last one shown before."""

    below: str | None = None
    status: str | None = None
    after: tuple[int, int] | None = None


def page(db: Connection, run_id: str, part: Part, limit: int) -> list[dict[str, Any]]:
    """Return steps of a run in the order in which they were first decided about."""
    conditions, parameters = "", list[Any]([run_id])
    if part.below is not None:
        conditions += " AND (step = $2 OR starts_with(step, $2 || '[') OR starts_with(step, $2 || '.'))"
        parameters.append(part.below)
    if part.status is not None:
        parameters.append(part.status)
        conditions += f" AND status = ${len(parameters)}"
    if part.after is not None:
        parameters += part.after
        conditions += f' AND ("offset", position) > (${len(parameters) - 1}, ${len(parameters)})'
    query = f'SELECT {_COLUMNS} {_OF_RUN} {conditions} ORDER BY "offset", position LIMIT {limit}'
    return _with_outputs(db, run_id, rows(db, query, parameters))


def waiting(db: Connection, run_id: str, limit: int) -> list[dict[str, Any]]:
    """Return the steps that wait for something but calls, or are held, those first that must be first."""
    statuses = ", ".join(f"'{status}'" for status in (*WAITS, StepStatus.HELD.value))
    order = f'ORDER BY due NULLS LAST, "offset", position LIMIT {limit}'
    return rows(db, f"SELECT steps.* {_OF_RUN} AND status IN ({statuses}) {order}", [run_id])


def _with_outputs(db: Connection, run_id: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give steps whose output is another's that output: a step with steps has the last one's, a loop its last iteration's."""
    known = {row["step"]: (row["output"], row["source"]) for row in found}
    missing = {source for _, source in known.values() if source is not None} - known.keys()
    while missing:
        wanted = f"SELECT {_COLUMNS} {_OF_RUN} AND step IN (SELECT unnest($2))"
        more = {row["step"]: (row["output"], row["source"]) for row in rows(db, wanted, [run_id, sorted(missing)])}
        known |= dict.fromkeys(missing, (None, None)) | more
        missing = {source for _, source in more.values() if source is not None} - known.keys()
    for row in found:
        output, source = row["output"], row["source"]
        while output is None and source is not None:
            output, source = known[source]
        row["output"] = output
    return found
