"""Health: whether Kafka answers, how far the views are behind, and what is wrong with the ledger."""

from fastapi import APIRouter, Response

from api import models
from api.views import LAG, TheProjector
from projections import ledger
from projections.database import Positions
from projections.projector import Projector

router = APIRouter(tags=["health"])


@router.get("/health")
def show_health(projector: TheProjector, response: Response) -> models.Health:
    """Say how things stand; 503 when nothing can be asked."""
    positions: Positions = {}
    ignored: list[models.Ignored] = []
    breaks: list[models.Break] = []
    if projector.opened:
        with projector.views.snapshot() as (db, at):
            positions = at
            ignored = [models.Ignored(**row) for row in ledger.ignored(db)]
            breaks = [models.Break(**row) for row in ledger.breaks(db)]
    lag = projector.lag(positions)
    reachable = projector.reachable()
    status = _status(projector, healthy=reachable and not breaks)
    if status == "failed" or not projector.opened:
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
        lag=sum(lag.values()),
        partitions=partitions,
        ignored=ignored,
        breaks=breaks,
    )


def _status(projector: Projector, *, healthy: bool) -> models.Status:
    if projector.failure is not None:
        return "failed"
    if not projector.caught_up.is_set():
        return "starting"
    return "ok" if healthy else "degraded"
