"""The composition root of the processors: one Faust app for each role, with its service.

Faust gives the worker and its life cycle. A processor is a service of the app: a blocking loop in a thread, whose end by an error
ends the process, so that whoever supervises it starts it anew and it takes over from the log.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, Protocol

import faust
import faust.app.base
import mode
import structlog

from events import topics
from events.errors import NewerCodeError
from events.topics import Topic
from streams import data_folder, kafka, memory, patience, schemas
from streams.ends import ends
from streams.processors import intake, intake_loop, mirror
from streams.processors.breaker import Breakers
from streams.processors.orchestrator import GROUP, Orchestrator
from streams.processors.reports import Condition, Reporter
from streams.processors.watchdog import Progress, Watchdog
from streams.processors.worker import Worker
from streams.registry import SpecRegistry, publish
from streams.settings import Settings
from streams.topology import ROLES

log = structlog.get_logger()


LEAVE_S: Final = 15.0
"""How long a process that is told to end waits for Kafka to take what it holds."""
END_S: Final = 35.0
"""How long a process that is told to end may take: what it holds is settled and committed first."""
_SAY_AFTER_S: Final = 3.0
"""After how long it is said that a process waits for Kafka."""
EXIT_NEWER: Final = 78
"""Exit code of a process that met a record of newer code (EX_CONFIG: starting it again doesn't help)."""


class Loop(Protocol):
    """A processor with a loop of its own."""

    ready: threading.Event

    def progress(self) -> Progress:
        """Return how far it has come."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""


class LoopWorker(faust.Worker):
    """A worker that is called in lists of processes as whoever started it called it: Faust would name a port that isn't open."""

    def _setproctitle(self, info: str, *, ident: str = "") -> None:
        """Leave the title alone."""


class LoopApp(faust.App):
    """An app without agents: its service brings its own Kafka clients, so Faust starts none."""

    class BootStrategy(faust.app.base.BootStrategy):
        """Starts no Kafka clients."""

        enable_kafka = False


def build(role: str, settings: Settings) -> faust.App:
    """Return the app of a role; nothing is connected yet."""
    app = LoopApp(
        f"{settings.topic_prefix}{role}",
        store="memory://",
        datadir=settings.data_dir / "faust",  # it makes an empty folder, whatever is kept there
        autodiscover=False,
        web_enabled=False,
    )
    reporter = Reporter(settings, role)
    _report(app, reporter)
    _ROLES[role](app, settings, reporter)
    return app


def _intake(app: faust.App, settings: Settings, reporter: Reporter) -> None:
    def prepare() -> tuple[intake.Intake, SpecRegistry]:
        from streams.workflow import definition  # noqa: PLC0415 - YAML is read by this role only

        cluster = kafka.connect(settings)
        specs = [*definition.builtin().values(), *definition.load_all(settings.workflow_paths).values()]
        for spec in publish(settings, specs):
            log.info("intake.registered", workflow=spec.name, digest=spec.digest)
        registry = SpecRegistry(settings)
        registry.refresh()
        return intake.Intake(registry, cluster.ids[topics.REQUESTS.name]), registry

    def make() -> Loop:
        loop = intake_loop.IntakeLoop(settings, prepare)
        reporter.look = lambda: Condition(partitions=loop.partitions)
        return loop

    _serve(app, settings, reporter, topics.REQUESTS, make)


def _orchestrator(app: faust.App, settings: Settings, reporter: Reporter) -> None:
    def make() -> Loop:
        orchestrator = Orchestrator(settings)
        reporter.look = lambda: Condition(partitions=tuple(sorted(orchestrator.holdings)))
        return orchestrator

    _serve(app, settings, reporter, topics.INBOX, make)


def _llm(app: faust.App, settings: Settings, reporter: Reporter) -> None:
    def make() -> Loop:
        from streams.processors import llm_call, llm_worker  # noqa: PLC0415 - for this role only

        if _asked_before(settings, topics.LLM_CALLS):
            llm_call.load()
        handler = llm_worker.LlmCalls(settings)
        worker = Worker(settings, topics.LLM_CALLS, handler, settings.llm_concurrency, app.loop)
        _watch(reporter, worker, handler, settings.llm_concurrency)
        return worker

    async def close() -> None:
        from streams.processors import llm_call  # noqa: PLC0415 - as above

        await llm_call.close()

    _serve(app, settings, reporter, topics.LLM_CALLS, make, close)


def _asked_before(settings: Settings, queue: Topic) -> bool:
    """Whether there have ever been calls here: who may get some any moment has what they need before they come."""
    places = [(kafka.name(settings, queue), each) for each in range(kafka.connect(settings).partitions[queue.name])]
    return any(ends(kafka.admin(settings), places, 10.0).values())


def _tool(app: faust.App, settings: Settings, reporter: Reporter) -> None:
    def make() -> Loop:
        from streams.processors import tool_worker  # noqa: PLC0415 - users' code: for this role only
        from tools import registry  # noqa: PLC0415

        handler = tool_worker.ToolCalls(settings, registry.load(settings.tool_paths))
        worker = Worker(settings, topics.TOOL_CALLS, handler, settings.tool_concurrency, app.loop)
        _watch(reporter, worker, handler, settings.tool_concurrency)
        return worker

    _serve(app, settings, reporter, topics.TOOL_CALLS, make)


def _mirror(app: faust.App, settings: Settings, reporter: Reporter) -> None:
    def make() -> Loop:
        copier = mirror.Mirror(settings)
        reporter.look = lambda: Condition(partitions=tuple(sorted(copier.copies)))
        return copier

    _serve(app, settings, reporter, topics.DECISIONS, make)


class Calls(Protocol):
    """A worker's handler, as far as it is reported."""

    breakers: Breakers
    in_flight: int


def _watch(reporter: Reporter, worker: Worker, calls: Calls, concurrency: int) -> None:
    """Report a worker that makes calls; a change of one of its circuits at once."""
    reporter.look = lambda: Condition(calls.in_flight, concurrency, worker.partitions, calls.breakers.report())
    calls.breakers.on_change = reporter.changed


def _report(app: faust.App, reporter: Reporter) -> None:
    """End the reports with the app. Services stop in reverse order, so what is added before the others ends after them."""

    class ReportService(mode.Service):
        """Stops the reports."""

        async def on_stop(self) -> None:
            await asyncio.to_thread(reporter.stop)

    app.service(ReportService)


_ROLES: dict[str, Callable[[faust.App, Settings, Reporter], None]] = {
    "intake": _intake,
    "orchestrator": _orchestrator,
    "llm": _llm,
    "tool": _tool,
    "mirror": _mirror,
}
assert tuple(_ROLES) == ROLES


async def _nothing() -> None:
    """Close nothing."""


def _serve(
    app: faust.App,
    settings: Settings,
    reporter: Reporter,
    source: Topic,
    make: Callable[[], Loop],
    close: Callable[[], Awaitable[None]] = _nothing,
) -> None:
    """Add a processor's loop to the app, as a service; `close` is awaited when it has ended. `source`: what it reads."""
    group = {topics.REQUESTS: intake_loop.GROUP, topics.INBOX: GROUP, topics.DECISIONS: mirror.GROUP}.get(source, source.name)

    class LoopService(mode.Service):
        """Runs the loop in a thread; when it ends by an error, so does the app."""

        watchdog: Watchdog | None = None

        async def on_start(self) -> None:
            self.stop_loop, self.ended = threading.Event(), asyncio.Event()
            self.add_future(self._run())

        async def _run(self) -> None:
            try:
                with patience.until(self.stop_loop, LEAVE_S):  # in the threads too: they inherit the context
                    loop = await asyncio.to_thread(make)
                    threading.Thread(target=self._tell, args=(loop,), daemon=True).start()
                    self.watchdog = Watchdog(settings, source, group, loop.progress, app.loop)
                    self.watchdog.start()
                    await asyncio.to_thread(loop.run, self.stop_loop)
            except patience.EndingError as unfinished:
                log.warning("end.unfinished", problem=str(unfinished), next="what it held is done again by others")
            finally:
                self.ended.set()

        def _tell(self, loop: Loop) -> None:
            loop.ready.wait()
            _say_ready(settings, reporter)

        async def on_stop(self) -> None:
            self.stop_loop.set()
            if self.watchdog is not None:
                self.watchdog.stop()
            # What is in hand is settled and committed first; a thread can't be cancelled, so waiting is bounded.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), 30)
            await close()

    app.service(LoopService)


def _say_ready(settings: Settings, reporter: Reporter) -> None:
    log.info("ready")
    reporter.start()
    if settings.ready_file is not None:
        settings.ready_file.parent.mkdir(parents=True, exist_ok=True)
        settings.ready_file.touch()
    memory.give_back()


def run(role: str, settings: Settings) -> None:
    """Run a role's process until it is told to stop; raises SystemExit with its exit code."""
    logging.basicConfig(level=settings.log_level.upper())
    _quiet()
    try:
        data_folder.make(settings)
    except data_folder.DataFolderError as error:
        _ended(error)
    _connect(settings)
    registered = None
    if settings.schema_registry:
        from streams import schema_registry  # noqa: PLC0415 - its client takes half a second

        registered = schema_registry.register(settings, kafka.PATIENCE_S)
    schemas.publish(settings, kafka.PATIENCE_S, registered)  # before the first record, so that older code knows it from garbage
    app = build(role, settings)
    worker = LoopWorker(app, loglevel=settings.log_level, quiet=True, redirect_stdouts=False)
    threading.Thread(target=_end_in_time, args=(worker,), daemon=True).start()
    try:
        worker.execute_from_commandline()
    finally:
        reason = app.crash_reason or worker.crash_reason
        if reason is not None:
            _ended(reason)


def _connect(settings: Settings) -> None:
    """Wait for Kafka, and say so if it takes long."""
    try:
        try:
            kafka.connect(settings, _SAY_AFTER_S)
        except kafka.KafkaUnreachableError as error:
            log.warning("kafka.waiting", problem=str(error), seconds=kafka.PATIENCE_S)
            kafka.connect(settings)
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        _ended(error)


def _ended(reason: BaseException) -> NoReturn:
    """End the process by SystemExit. What it ended by is the log's last line: Faust writes many behind what it was told."""
    if isinstance(reason, NewerCodeError):
        log.error("newer_code", problem=str(reason))
        raise SystemExit(EXIT_NEWER)
    log.error("ended", problem=str(reason) or repr(reason), error=type(reason).__name__)
    raise SystemExit(1)


def _end_in_time(worker: faust.Worker) -> None:
    """End the process when it was told to end and doesn't; its log then says what each thread waited for."""
    while not worker.should_stop:
        time.sleep(0.5)
    time.sleep(END_S)
    log.error("end.overdue", seconds=END_S, next="the process ends; what it held is done again by others")
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)


def _quiet() -> None:
    """Keep libraries from filling the logs."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line, with the whole URL, for each call of a tool or model
    logging.getLogger("LiteLLM").propagate = False  # it has a handler of its own, and records that Faust's can't format
