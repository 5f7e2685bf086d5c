"""Ports that nobody listens on now."""

import random
import socket
from contextlib import ExitStack
from typing import Final

from infra.embedded.kafka import CONTROLLER_PORT_DISTANCE

_PORTS: Final = range(20_000, 32_000)
"""Below those that the system gives to connections going out: while a server is away, one of these could take its port."""


def free_port() -> int:
    """Return one."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return some, each of whose neighbours at the distance of a broker's controller is free as well."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = random.choice(_PORTS)  # noqa: S311 - two that start at once must not choose alike
            first = held.enter_context(socket.socket())
            second = held.enter_context(socket.socket())
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + CONTROLLER_PORT_DISTANCE))
            except OSError:
                continue
            found.append(port)
    return found
