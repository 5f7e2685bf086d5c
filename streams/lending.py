"""Readers of the log that are lent and given back with their connections open: to open them takes about 50 ms."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

from streams import kafka
from streams.settings import Settings

_AGAIN_S: Final = 60.0
"""How long one that was given back may be lent again."""

_lock, _idle = threading.Lock(), list[tuple[object, float, kafka.Consumer]]()  # to which Kafka, given back when


@contextlib.contextmanager
def lent(settings: Settings) -> Iterator[kafka.Consumer]:
    """Lend a reader. One that something was wrong with isn't lent again."""
    key = settings.bootstrap_servers, settings.schema_registry, repr(settings.kafka)
    with _lock:
        lately = time.monotonic() - _AGAIN_S
        fitting = [each for each in _idle if each[0] == key and each[1] > lately][-1:]
        ended = [each for each in _idle if each[1] <= lately]
        _idle[:] = [each for each in _idle if each not in ended and each not in fitting]
    for _, _, each in ended:
        each.close()
    source = fitting[0][2] if fitting else kafka.reader(settings)
    try:
        yield source
    except BaseException:
        source.close()
        raise
    with _lock:
        _idle.append((key, time.monotonic(), source))
