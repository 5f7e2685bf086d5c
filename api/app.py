"""The read API, put together. It answers questions and changes nothing: there is no way from here to a producer."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Final

import anyio.to_thread
from fastapi import FastAPI

from api import access, described, problems, views
from api.examples import EXAMPLES
from api.routes import approvals, audit, cost, deadletters, health, lineage, registry, replay, runs, sql, stream
from api.streams import Streams
from api.tokens import AUDITOR, READER, Tokens
from projections.projector import Projector
from streams.settings import Settings

READS: Final = (health, runs, lineage, cost, approvals, deadletters, stream)
"""Routes for readers and auditors."""
AUDITS: Final = (sql, replay, audit)
"""Routes for auditors only: their answers hold records or payloads, or say what verification found."""
FREE: Final = frozenset({"/health", "/openapi.json"})
"""What may be asked without a token: whoever watches over the process, and what there is."""


def create(
    settings: Settings,
    *,
    rebuild: bool = False,
    tokens: Tokens | None = None,
    on_failure: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Return the app; while it runs, `app.state.projector` keeps the views up to date.

    `rebuild`: throw the views away and make them anew; `tokens`: those that requests must show (None: whoever reaches it may
    ask); `on_failure`: called when the projector can't go on (from its thread); `stopping`: whether the server is to end, so that
    live streams do.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        projector: Projector = app.state.projector
        projector.start()
        yield
        await anyio.to_thread.run_sync(projector.stop)

    projector = Projector(settings, rebuild=rebuild, on_failure=on_failure)
    app = FastAPI(
        title="Foldflow",
        version=version("foldflow"),
        description="Runs, calls, costs, approvals and dead letters, as the decisions in Kafka say them. Read-only.",
        lifespan=lifespan,
        # The pages behind these load their scripts from elsewhere; /openapi.json is there.
        docs_url=None,
        redoc_url=None,
    )
    app.state.projector = projector
    app.state.streams = Streams(settings.api_streams, stopping)
    problems.install(app, wrong_method=_READ_ONLY, told=views.TOLD)
    views.answer_unchanged(app)
    app.add_middleware(access.Access, tokens=tokens, roles={READER, AUDITOR}, rate=settings.api_rate, free=FREE)
    app.add_middleware(views.Freshness, projector=projector)
    for routes in READS:
        app.include_router(routes.router)
    for routes in AUDITS:
        app.include_router(routes.router, dependencies=[access.AuditorsOnly])
    app.mount(registry.PATH, registry.create(settings))
    described.describe(app, EXAMPLES)
    return app


_READ_ONLY: Final = (
    "This API only answers questions (GET); runs are started by a record on the topic `requests`: `foldflow run`, "
    "or POST /requests at the gateway (`foldflow gateway`)."
)
