"""What `foldflow api` and `foldflow gateway` share: they serve until they are told to stop, or say why they can't."""

import errno
import signal
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Final

from infra.cli.terminal import fail

if TYPE_CHECKING:
    import uvicorn

NOT_STARTED: Final = 1


def serve(server: "uvicorn.Server", setting: str) -> None:
    """Serve until the process is told to stop. `setting`: the one that names the port. Ends the command if it can't start."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn stops in order, and then raises the signal once more: being told to stop is no failure.
        signal.signal(number, lambda _number, _frame: None)
    try:
        server.run()
    except SystemExit:
        # When it can't start, Uvicorn ends the process by itself, with a code of its own and the reason lines above its last.
        fail(_why(server.config.host, server.config.port, setting), NOT_STARTED)


def _why(host: str, port: int, setting: str) -> str:
    """Say why nobody can listen there, by trying it once more."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            with closing(socket.socket(family, kind)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Uvicorn listens
                probe.bind(address)
                probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{host}:{port}: another process listens there. End it, or set {setting} to a port that is free."
        ways = f"Set FOLDFLOW_API_HOST to one of this machine's addresses and {setting} to a port that this user may take."
        return f"{host}:{port}: nobody can listen there ({error.strerror}). {ways}"
    return (
        f"{host}:{port}: it could not start; the lines above say why. If the port was taken then, set {setting} to another one."
    )
