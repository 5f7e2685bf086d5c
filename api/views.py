"""What a route needs to answer: a snapshot of the views, and in the answer's headers how fresh it is."""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request, Response

from api.problems import ProblemError
from projections.database import Positions
from projections.projector import Projector
from projections.table import Connection

LAG, POSITIONS = "Foldflow-Lag", "Foldflow-Positions"


@dataclass(frozen=True, slots=True)
class View:
    """One state of the views. `lag`: records that are in Kafka and not in it yet."""

    db: Connection
    positions: Positions
    lag: int

    @property
    def catching_up(self) -> str:
        """A sentence about records that may still hold what was not found; empty if there are none."""
        return f" The views are {self.lag:,} records behind Kafka: it may just not be there yet." if self.lag else ""


def projector_of(request: Request) -> Projector:
    """Return the app's projector."""
    return cast("Projector", request.app.state.projector)


def _snapshot(request: Request, response: Response) -> Iterator[View]:
    projector = projector_of(request)
    with projector.views.snapshot() as (db, positions):
        view = View(db, positions, sum(projector.lag(positions).values()))
        ledger = ",".join(f"{partition}:{at}" for (topic, partition), at in sorted(positions.items()) if topic == "decisions")
        request.state.freshness = {LAG: str(view.lag), POSITIONS: ledger}
        response.headers.update(request.state.freshness)
        yield view


TheView = Annotated[View, Depends(_snapshot)]
TheProjector = Annotated[Projector, Depends(projector_of)]


def cursor(*values: Any) -> str:
    """Return where a page ended, as text for a URL."""
    return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode().rstrip("=")


def from_cursor(text: str, *kinds: type) -> tuple[Any, ...]:
    """Return what a cursor says. Raises ProblemError when it isn't one of ours."""
    try:
        values = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError):
        values = None
    if not isinstance(values, list) or [type(value) for value in values] != list(kinds):
        raise ProblemError(
            400,
            "invalid-cursor",
            "This is no cursor",
            f"cursor={text}",
            "Take `next` of the page before as it is, or leave `cursor` out to begin with the newest.",
        )
    return tuple(values)
