"""The read model `specs`: the registered versions of workflows, by digest."""

import json
from dataclasses import dataclass, field
from typing import Final

from events.commands import WorkflowRegistered
from projections.table import Connection, Table, rows
from streams.workflow.spec import digest


@dataclass(slots=True)
class SpecRow:
    """One version. `steps`: names in order; `position`: offset of its last registration, the highest of a name is the newest.

    `spec`: the definition in its canonical form, JSON.
    """

    digest: str
    name: str
    description: str
    steps: list[str]
    position: int
    spec: str


TABLE: Final = Table(
    "specs",
    {
        "digest": "VARCHAR",
        "name": "VARCHAR",
        "description": "VARCHAR",
        "steps": "VARCHAR[]",
        "position": "BIGINT",
        "spec": "VARCHAR",
    },
    key=("digest",),
)


@dataclass(slots=True)
class Specs:
    """Versions on their way to the table."""

    _new: dict[str, SpecRow] = field(default_factory=dict)

    def load(self, db: Connection) -> None:
        """Forget what was not written."""
        del db
        self._new.clear()

    def apply(self, registered: WorkflowRegistered, offset: int) -> bool:
        """Take a registration; False: it doesn't count, as its digest is not that of the definition, or there is none."""
        if digest(registered.spec) != registered.digest:
            return False
        try:
            definition = json.loads(registered.spec)
            steps = [str(step["name"]) for step in definition["steps"]]
        except (ValueError, KeyError, TypeError, RecursionError):  # anybody may write to the topic
            return False
        self._new[registered.digest] = SpecRow(
            registered.digest, registered.name, str(definition.get("description", "")), steps, offset, registered.spec
        )
        return True

    def write(self, db: Connection) -> None:
        """Write what came since the last time."""
        TABLE.upsert(db, list(self._new.values()))
        self._new.clear()


def steps_of(db: Connection, version: str) -> list[str]:
    """Return the names of a version's steps in their order; none if the version isn't known."""
    found = rows(db, "SELECT steps FROM specs WHERE digest = ?", [version])
    return list(found[0]["steps"]) if found else []


def definition_of(db: Connection, version: str) -> str | None:
    """Return a version's canonical form (JSON); None if the version isn't known."""
    found = rows(db, "SELECT spec FROM specs WHERE digest = ?", [version])
    return found[0]["spec"] if found else None
