"""Where OpenLineage events go: an HTTP endpoint, a Kafka topic, or standard output. `send` returns when the receiver has them."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol
from urllib.parse import urlsplit

import httpx

from events import topics
from projections.openlineage import Event
from streams import kafka
from streams.envelope import Outgoing
from streams.settings import Settings

ENDPOINT: Final = "/api/v1/lineage"
"""Where receivers take events, by OpenLineage's own client's default."""
_AT_ONCE: Final = 8
"""How many runs' events are under way at once; those of a run go one after the other."""
_ANSWER_S: Final = 30.0
_FIRST_WAIT_S: Final = 0.5
_LONGEST_WAIT_S: Final = 5.0
_LATER: Final = frozenset({408, 425, 429})
"""Answers besides 5xx that mean: not now."""
_SHOWN: Final = 300


class RefusedError(Exception):
    """A receiver doesn't want an event, and asking again would change nothing. The text names it, and its run."""


class StoppedError(Exception):
    """The process was told to stop before the receiver had all of a round: the next start tells it again."""


class Receiver(Protocol):
    """Takes events. `name`: for people."""

    name: str

    def send(self, events: Sequence[Event]) -> None:
        """Return when all of them are there, those of each run in their order."""


class Http:
    """An endpoint that takes events by POST. One that is away is waited for; `say` is told when it goes and comes.

    Raises ValueError for what is no address.
    """

    def __init__(self, address: str, key: str | None, say: Callable[[str], None], stop: threading.Event) -> None:
        self.name = endpoint(address)
        self._say, self._stop = say, stop
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._client = httpx.Client(headers=headers, timeout=_ANSWER_S)
        self._lock = threading.Lock()
        self._away = False
        self._refused = threading.Event()

    def send(self, events: Sequence[Event]) -> None:
        """Send events, some runs at once. Raises RefusedError and StoppedError."""
        runs: dict[str, list[Event]] = {}
        for event in events:
            runs.setdefault(event.run_id, []).append(event)
        if runs:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._in_order, runs.values()))

    def _in_order(self, events: list[Event]) -> None:
        for event in events:
            if self._stop.is_set():
                raise StoppedError
            wait = _FIRST_WAIT_S
            while not self._refused.is_set() and (problem := self._post(event)) is not None:
                self._note(problem)
                if self._stop.wait(wait):
                    raise StoppedError
                wait = min(wait * 2, _LONGEST_WAIT_S)

    def _post(self, event: Event) -> str | None:
        """Send an event; return why it isn't there yet, None if it is. Raises RefusedError."""
        try:
            answer = self._client.post(self.name, content=event.value)
        except httpx.TransportError as error:
            return f"{self.name} can't be reached ({str(error) or type(error).__name__})"
        if answer.is_success:
            self._note(None)
            return None
        said = f"{answer.status_code} {' '.join(answer.text.split())[:_SHOWN]}".rstrip()
        if answer.status_code in _LATER or answer.is_server_error:
            return f"{self.name} answers {said} to {event.name} of run {event.run_id}"
        self._refused.set()
        raise RefusedError(f"{self.name} refuses {event.name} of run {event.run_id}: {said}")

    def _note(self, problem: str | None) -> None:
        """Say that the receiver has gone, or is back."""
        with self._lock:
            was_away, self._away = self._away, problem is not None
        if problem is not None and not was_away:
            self._say(f"{problem}; waiting for it. Nothing is left out.")
        elif problem is None and was_away:
            self._say(f"{self.name} takes events again.")


def endpoint(address: str) -> str:
    """Return where to send to: an address that ends in `/lineage` as it is, else with the usual path behind it.

    Raises ValueError for what is no address, and for one with a password: those have a place that nobody else reads.
    """
    found = urlsplit(address)
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ValueError(f"`{address}` is no address of a receiver: write http://HOST:PORT")
    if found.username or found.password:
        raise ValueError("the address must not hold a password: say it by OPENLINEAGE_API_KEY")
    path = found.path.rstrip("/")
    return found._replace(path=path if path.endswith("/lineage") else path + ENDPOINT).geturl()


class KafkaTopic:
    """A topic of the configured cluster, by its whole name; the key is the run's id, so a run's events are in their order.

    Raises KafkaUnreachableError, and TopicsMissingError where there is no such topic: who owns it makes it.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = f"topic {name}"
        self._settings = settings.model_copy(update={"topic_prefix": ""})
        self._topic = topics.Topic(name, dict, "run_id")
        kafka.find(kafka.admin(settings), self._settings, [self._topic], timeout_s=5.0)
        self._producer = kafka.producer(settings)

    def send(self, events: Sequence[Event]) -> None:
        """Produce events and wait for the acknowledgements. Raises DeliveryFailedError."""
        acks = kafka.Acks()
        headers = [("content-type", b"application/json")]
        for event in events:
            record = Outgoing(self._topic, event.run_id.encode(), event.value, headers, at_ms=event.at)
            kafka.produce(self._producer, self._settings, record, acks)
        kafka.flush(self._producer, acks)


class Lines:
    """Standard output, an event a line."""

    name = "standard output"

    def send(self, events: Sequence[Event]) -> None:
        """Print events. Raises BrokenPipeError."""
        for event in events:
            sys.stdout.write(f"{event.value.decode()}\n")
        if events:
            sys.stdout.flush()
