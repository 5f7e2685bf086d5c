"""The read API as tests of this folder serve it: in a thread, on real Kafka, with histories that the real core decided."""

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from api.app import create
from events import topics
from streams import kafka
from streams.envelope import Outgoing
from streams.settings import Settings

_SPEC = importlib.util.spec_from_file_location("projection_histories", Path(__file__).parents[1] / "projections" / "histories.py")
assert _SPEC
assert _SPEC.loader
histories: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["projection_histories"] = histories
_SPEC.loader.exec_module(histories)


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until a condition holds, and return what it said."""
    deadline = time.monotonic() + seconds
    while not (said := condition()):
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.02)
    return said


@contextmanager
def served(settings: Settings, **arguments: Any) -> Iterator[httpx.Client]:
    """Serve the API in a thread, until its views hold all that is in Kafka. `arguments`: of `create`."""
    app = create(settings, stopping=lambda: server.should_exit, **arguments)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", settings.api_port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started and (app.state.projector.caught_up.is_set() or app.state.projector.failure))
        assert app.state.projector.failure is None
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api_port}", trust_env=False) as client:
            client.app = app  # type: ignore[attr-defined] # what a test looks into
            yield client
    finally:
        server.should_exit = True
        thread.join()


def write(settings: Settings, log: Any, start: int = 0, end: int | None = None) -> None:
    """Write a log's records, from number `start` on (up to `end`), to the topic `decisions`."""
    records = log.records()[start:end]
    kafka.send(settings, [Outgoing(topics.DECISIONS, b"", each.value, [], each.partition) for each in records])
