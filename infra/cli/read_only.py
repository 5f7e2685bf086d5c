"""Makes a process unable to write to Kafka: the api's, whatever code gets into it."""

import sys
from typing import Any, Final, NoReturn

from confluent_kafka import cimpl
from confluent_kafka.admin import AdminClient

_CHANGES: Final = ("create", "delete", "alter", "incremental_alter", "elect")
"""How the names of an admin client's methods begin that change something."""


class ReadOnlyProcessError(RuntimeError):
    """Something in this process wants to write to Kafka; it must not be able to."""


def refuse(*_arguments: Any, **_named: Any) -> NoReturn:
    """Stand in for what writes."""
    raise ReadOnlyProcessError("this process only reads: requests go to Kafka's topics, or to `foldflow gateway`")


def forbid_writing() -> None:
    """Take producers, and whatever changes topics, from this process, for good: from every module that holds one, and to come."""
    producer = cimpl.Producer
    for module in [*sys.modules.values()]:
        if module is None or module is sys.modules[__name__]:
            continue
        for name, found in [*vars(module).items()]:
            if isinstance(found, type) and issubclass(found, producer):
                setattr(module, name, refuse)
    for name in dir(AdminClient):
        if name.startswith(_CHANGES):
            setattr(AdminClient, name, refuse)
