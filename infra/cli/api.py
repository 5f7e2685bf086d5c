"""`foldflow api`: the read API in the foreground."""

import threading
from typing import Annotated

import typer

from infra.cli.listening import NOT_STARTED, serve
from infra.cli.terminal import fail
from streams import data_folder, memory
from streams.settings import Settings

_POLL_S = 0.02


def api(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Throw the views away first and make them anew from Kafka.")] = False,
) -> None:
    """Serve the read API in the foreground, and keep its views up to date.

    `foldflow up` runs this by itself. It listens on FOLDFLOW_API_HOST and FOLDFLOW_API_PORT; its views (DuckDB) are in
    FOLDFLOW_DATA_DIR and are made anew by themselves when they are damaged or the topics are others. Without Kafka, its topics,
    room on the disk or the file (another process holds it) it waits, and says so in its log and at GET /health; who asks gets
    what it has read so far, or 503 while the views are not open or are being made anew. This process can't write to Kafka.

    With FOLDFLOW_API_TOKENS it asks for tokens (`foldflow token`); without, it answers and listens on this machine only.

    For example:

        foldflow api

        curl http://127.0.0.1:29094/health

        curl 'http://127.0.0.1:29094/runs?status=failed&since=7d'

        curl -N 'http://127.0.0.1:29094/stream?workflow=market-analysis&after=start'

    Exit codes: 0 stopped, 1 it could not start or go on (the last lines say why).
    """
    import uvicorn  # noqa: PLC0415 - not needed for --help

    from api.app import create  # noqa: PLC0415
    from api.tokens import TokensError, configured  # noqa: PLC0415
    from infra.cli.read_only import forbid_writing  # noqa: PLC0415
    from projections.projector import Projector  # noqa: PLC0415

    settings = Settings()
    forbid_writing()
    try:
        tokens = configured(settings, settings.api_host)
        data_folder.make(settings)
    except (TokensError, data_folder.DataFolderError) as error:
        fail(str(error), NOT_STARTED)
    ended = threading.Event()

    def stop() -> None:
        server.should_exit = True

    app = create(settings, rebuild=rebuild, tokens=tokens, on_failure=stop, stopping=lambda: server.should_exit)
    projector: Projector = app.state.projector
    server = uvicorn.Server(
        uvicorn.Config(app, settings.api_host, settings.api_port, log_level=settings.log_level, access_log=False)
    )
    announcer = threading.Thread(target=_announce, args=(settings, server, projector.caught_up, ended), daemon=True)
    announcer.start()
    try:
        serve(server, "FOLDFLOW_API_PORT")
    finally:
        ended.set()
        announcer.join()
    if projector.failure is not None or not server.started:
        raise typer.Exit(NOT_STARTED)


def _announce(settings: Settings, server: "uvicorn.Server", caught_up: threading.Event, ended: threading.Event) -> None:  # type: ignore[name-defined] # noqa: F821
    """Create the ready file once requests are answered from views that hold all that was in Kafka at the start."""
    while not (server.started and caught_up.is_set()):
        if ended.wait(_POLL_S):
            return
    if settings.ready_file is not None:
        settings.ready_file.write_text("ready\n")
    memory.give_back()
