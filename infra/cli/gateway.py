"""`foldflow gateway`: takes requests and signals over HTTP, in the foreground."""

import threading

import typer

from infra.cli.listening import NOT_STARTED, serve
from infra.cli.terminal import fail
from streams.settings import Settings

_POLL_S = 0.02


def gateway() -> None:
    """Take requests and signals over HTTP, in the foreground, and put them on Kafka's topic.

    It listens on FOLDFLOW_API_HOST and FOLDFLOW_GATEWAY_PORT, and answers 202 with the run's id once the broker has
    acknowledged the request. The same request_id twice is one run, so whoever got no answer can ask again. With
    FOLDFLOW_API_TOKENS it asks for tokens of the role `requester` (`foldflow token`); without, it answers and listens on this
    machine only. Without Kafka it answers 503, and goes on by itself.

    For example:

        foldflow gateway

        curl http://127.0.0.1:29095/requests --json '{"workflow": "market-analysis", "input": {"question": "…"}}'

        curl http://127.0.0.1:29095/signals --json '{"run_id": "8f6a3a7e-…", "name": "payment", "payload": {"paid": true}}'

    Exit codes: 0 stopped, 1 it could not start (the last lines say why).
    """
    import uvicorn  # noqa: PLC0415 - not needed for --help

    from api.tokens import TokensError, configured  # noqa: PLC0415
    from infra.gateway.app import create  # noqa: PLC0415

    settings = Settings()
    try:
        tokens = configured(settings, settings.api_host)
    except TokensError as error:
        fail(str(error), NOT_STARTED)
    app = create(settings, tokens)
    server = uvicorn.Server(
        uvicorn.Config(app, settings.api_host, settings.gateway_port, log_level=settings.log_level, access_log=False)
    )
    ended = threading.Event()

    def announce() -> None:
        while not (server.started and app.state.sender.ready.is_set()):
            if ended.wait(_POLL_S):
                return
        if settings.ready_file is not None:
            settings.ready_file.write_text("ready\n")

    announcer = threading.Thread(target=announce, daemon=True)
    announcer.start()
    try:
        serve(server, "FOLDFLOW_GATEWAY_PORT")
    finally:
        ended.set()
        announcer.join()
    if not server.started:
        raise typer.Exit(NOT_STARTED)
