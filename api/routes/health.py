"""Health: whether Kafka answers, how far the views are behind, and what is wrong with the ledger."""

import contextlib
from dataclasses import asdict

from fastapi import APIRouter, Response

from api import models
from api.views import LAG, TheProjector
from projections import ledger
from projections.database import ViewsError
from projections.projector import NotReadyError, Projector, Rebuild

router = APIRouter(tags=["health"])


@router.get("/health", responses={503: {"model": models.Health, "description": "Nothing can be asked (yet)."}})
def show_health(projector: TheProjector, response: Response) -> models.Health:
    """Say how things stand; 503 when nothing can be asked."""
    positions, asked = projector.positions, False
    ignored: list[models.Ignored] = []
    breaks: list[models.Break] = []
    with contextlib.suppress(NotReadyError, ViewsError), projector.views.snapshot() as (db, at):
        ignored = [models.Ignored(**row) for row in ledger.ignored(db)]
        breaks = [models.Break(**row) for row in ledger.breaks(db)]
        positions, asked = at, True
    lag = projector.lag(positions)
    reachable = projector.reachable()
    rebuild = projector.rebuild
    status = _status(projector, rebuild, healthy=asked and reachable and not breaks and projector.problem is None)
    if status == "failed" or not asked:
        response.status_code = 503
    response.headers[LAG] = str(sum(lag.values()))
    partitions = [
        models.PartitionHealth(topic=topic, partition=partition, position=positions.get((topic, partition), 0), lag=behind)
        for (topic, partition), behind in sorted(lag.items())
    ]
    return models.Health(
        status=status,
        kafka=projector.settings.bootstrap_servers,
        kafka_reachable=reachable,
        failure=projector.failure,
        problem=projector.problem,
        rebuild=None if rebuild is None else models.Rebuild(**asdict(rebuild)),
        lag=sum(lag.values()),
        partitions=partitions,
        ignored=ignored,
        breaks=breaks,
    )


def _status(projector: Projector, rebuild: Rebuild | None, *, healthy: bool) -> models.Status:
    if projector.failure is not None:
        return "failed"
    if rebuild is not None:
        return "rebuilding"
    if not projector.caught_up.is_set():
        return "starting"
    return "ok" if healthy else "degraded"
