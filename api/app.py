"""The read API, put together. It answers questions and changes nothing: there is no way from here to a producer."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

import anyio.to_thread
from fastapi import FastAPI

from api import problems
from api.routes import approvals, deadletters, health, runs
from projections.projector import Projector
from streams.settings import Settings


def create(settings: Settings, *, rebuild: bool = False, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the app; while it runs, `app.state.projector` keeps the views up to date.

    `rebuild`: throw the views away and make them anew; `on_failure`: called when the projector can't go on (from its thread).
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        projector: Projector = app.state.projector
        projector.start()
        yield
        await anyio.to_thread.run_sync(projector.stop)

    app = FastAPI(
        title="Foldflow",
        version=version("foldflow"),
        description="Runs, calls, costs, approvals and dead letters, as the decisions in Kafka say them. Read-only.",
        lifespan=lifespan,
        # The pages behind these load their scripts from elsewhere; /openapi.json is there.
        docs_url=None,
        redoc_url=None,
    )
    app.state.projector = Projector(settings, rebuild=rebuild, on_failure=on_failure)
    problems.install(app)
    for routes in (health, runs, approvals, deadletters):
        app.include_router(routes.router)
    return app
