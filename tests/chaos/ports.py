"""Ports that nobody listens on now."""

import socket
from contextlib import ExitStack

from infra.embedded.kafka import CONTROLLER_PORT_DISTANCE


def free_port() -> int:
    """Return one."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return some, each of whose neighbours at the distance of a broker's controller is free as well."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            second = held.enter_context(socket.socket())
            try:
                second.bind(("127.0.0.1", port + CONTROLLER_PORT_DISTANCE))
            except (OSError, OverflowError):
                continue
            found.append(port)
    return found
