"""Whether Kafka is there while nothing comes: else a command that waits would be silent for ever, and nobody knew why."""

import time
from collections.abc import Callable
from typing import Final

from confluent_kafka import KafkaException

from streams import kafka
from streams.settings import Settings

_LOOK_EVERY_S: Final = 3.0
_WITHIN_S: Final = 2.0


class Silence:
    """Asks Kafka now and then, as long as nothing comes. `away`: it didn't answer; `tell`: gets a sentence when that changes."""

    def __init__(self, settings: Settings, tell: Callable[[str], None] = lambda _: None) -> None:
        self._where, self._admin, self._tell = settings.bootstrap_servers, kafka.admin(settings), tell
        self._at = time.monotonic()
        self.away = False

    def heard(self, *, anything: bool) -> None:
        """Note whether something came; call it again and again."""
        now = time.monotonic()
        if anything:
            self._at = now
            self._is(away=False)
        elif now - self._at >= _LOOK_EVERY_S:
            try:
                self._admin.list_topics(timeout=_WITHIN_S)
            except KafkaException:
                self._is(away=True)
            else:
                self._is(away=False)
            self._at = time.monotonic()

    def _is(self, *, away: bool) -> None:
        if away != self.away:
            self.away = away
            self._tell(f"Kafka at {self._where} can't be reached; waiting for it." if away else "Kafka is back.")
