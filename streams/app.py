"""The composition root of the processors: one Faust app for each role, with its agents or its service.

Faust gives the worker, its life cycle and its agents. The three hot processors are services of the app: a blocking loop in a
thread, whose end by an error ends the process, so that whoever supervises it starts it anew and it takes over from the log.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import faust
import faust.app.base
import mode
import structlog

from events import topics
from streams import kafka
from streams.processors import deadletter, intake
from streams.processors.orchestrator import Orchestrator
from streams.processors.worker import Worker
from streams.registry import SpecRegistry, publish
from streams.settings import Settings
from streams.topology import ROLES, TOPOLOGY

log = structlog.get_logger()


class Loop(Protocol):
    """A processor with a loop of its own."""

    ready: threading.Event

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""


class LoopApp(faust.App):
    """An app without agents: its service brings its own Kafka clients, so Faust starts none."""

    class BootStrategy(faust.app.base.BootStrategy):
        """Starts no Kafka clients."""

        enable_kafka = False


def build(role: str, settings: Settings) -> faust.App:
    """Return the app of a role; nothing is connected yet."""
    agents = any(processor.role == role and processor.agent for processor in TOPOLOGY)
    app = (faust.App if agents else LoopApp)(
        f"{settings.topic_prefix}{role}",
        broker=[f"kafka://{address}" for address in settings.bootstrap_servers.split(",")],
        store="memory://",
        datadir=settings.data_dir / "faust",  # it makes an empty folder, whatever is kept there
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        topic_replication_factor=settings.replication_factor,
        broker_session_timeout=settings.session_timeout_ms / 1000,
        broker_heartbeat_interval=max(0.3, settings.session_timeout_ms / 5000),
        broker_commit_interval=0.5,
        broker_max_poll_records=500,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=topics.MAX_VALUE_BYTES + 1024 * 1024,
    )
    _ROLES[role](app, settings)
    return app


def _intake(app: faust.App, settings: Settings) -> None:
    def prepare() -> tuple[intake.Intake, Callable[[], None], Any]:
        from streams.workflow import definition  # noqa: PLC0415 - YAML is read by this role only

        cluster = kafka.connect(settings)
        specs = [*definition.builtin().values(), *definition.load_all(settings.workflow_paths).values()]
        for spec in publish(settings, specs):
            log.info("intake.registered", workflow=spec.name, digest=spec.digest)
        registry = SpecRegistry(settings)
        registry.refresh()
        judge = intake.Intake(registry, cluster.ids[topics.REQUESTS.name])
        _say_ready(settings)
        return judge, registry.drain, kafka.producer(settings)

    intake.attach(app, settings, prepare)
    deadletter.attach(app, settings)


def _orchestrator(app: faust.App, settings: Settings) -> None:
    _serve(app, settings, lambda: Orchestrator(settings))


def _llm(app: faust.App, settings: Settings) -> None:
    def make() -> Loop:
        from streams.processors import llm_call, llm_worker  # noqa: PLC0415 - litellm takes seconds: for this role only

        llm_call.load()
        handler = llm_worker.LlmCalls(settings)
        return Worker(settings, topics.LLM_CALLS, handler, settings.llm_concurrency, app.loop)

    async def close() -> None:
        from streams.processors import llm_call  # noqa: PLC0415 - as above

        await llm_call.close()

    _serve(app, settings, make, close)


def _tool(app: faust.App, settings: Settings) -> None:
    def make() -> Loop:
        from streams.processors import tool_worker  # noqa: PLC0415 - users' code: for this role only
        from tools import registry  # noqa: PLC0415

        handler = tool_worker.ToolCalls(settings, registry.load(settings.tool_paths))
        return Worker(settings, topics.TOOL_CALLS, handler, settings.tool_concurrency, app.loop)

    _serve(app, settings, make)


_ROLES: dict[str, Callable[[faust.App, Settings], None]] = {
    "intake": _intake,
    "orchestrator": _orchestrator,
    "llm": _llm,
    "tool": _tool,
}
assert tuple(_ROLES) == ROLES


async def _nothing() -> None:
    """Close nothing."""


def _serve(app: faust.App, settings: Settings, make: Callable[[], Loop], close: Callable[[], Awaitable[None]] = _nothing) -> None:
    """Add a processor's loop to the app, as a service; `close` is awaited when it has ended."""

    class LoopService(mode.Service):
        """Runs the loop in a thread; when it ends by an error, so does the app."""

        async def on_start(self) -> None:
            self.stop_loop, self.ended = threading.Event(), asyncio.Event()
            self.add_future(self._run())

        async def _run(self) -> None:
            try:
                loop = await asyncio.to_thread(make)
                threading.Thread(target=self._tell, args=(loop,), daemon=True).start()
                await asyncio.to_thread(loop.run, self.stop_loop)
            finally:
                self.ended.set()

        def _tell(self, loop: Loop) -> None:
            loop.ready.wait()
            _say_ready(settings)

        async def on_stop(self) -> None:
            self.stop_loop.set()
            # What is in hand is settled and committed first; a thread can't be cancelled, so waiting is bounded.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), 30)
            await close()

    app.service(LoopService)


def _say_ready(settings: Settings) -> None:
    log.info("ready")
    if settings.ready_file is not None:
        settings.ready_file.parent.mkdir(parents=True, exist_ok=True)
        settings.ready_file.touch()


def run(role: str, settings: Settings) -> None:
    """Run a role's process until it is told to stop; raises SystemExit with its exit code."""
    logging.basicConfig(level=settings.log_level.upper())
    kafka.connect(settings)  # Faust's consumer gives up on topics that don't exist
    app = build(role, settings)
    worker = faust.Worker(app, loglevel=settings.log_level, quiet=True, redirect_stdouts=False)
    worker.execute_from_commandline()
