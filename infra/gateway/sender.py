"""Puts requests on Kafka's topic, and knows which workflows there are. Has a thread of its own, which waits for Kafka."""

import threading
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

import structlog

from events.errors import NewerCodeError
from streams import kafka, schemas
from streams.envelope import Outgoing
from streams.processors.requests import RefusedError, nearest
from streams.registry import SpecRegistry
from streams.settings import Settings
from streams.workflow.expressions import EvaluationError

log = structlog.get_logger()

DELIVERY_S: Final = 10
"""How long a record may wait for its acknowledgement: whoever asks over HTTP doesn't wait for ever."""
_POLL_S: Final = 0.05
_CONNECT_S: Final = 2.0
_SHOWN: Final = 10


class NotSentError(Exception):
    """The broker has not acknowledged it. It may stand on the topic all the same, if only its answer was lost."""


class Sent(NamedTuple):
    """Where a record stands."""

    topic: str
    partition: int
    offset: int


class Sender:
    """A producer, and the registered workflows. `ready` is set once Kafka has answered. For any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.ready = threading.Event()
        self._stop = threading.Event()
        self._specs: SpecRegistry | None = None
        self._lock = threading.Lock()
        """Holds the registry, which is for one thread at a time."""
        # Whoever asks hears when it fails, and asks again: unlike those of a processor, these records may be given up.
        self._producer = kafka.producer(settings, **{"message.timeout.ms": DELIVERY_S * 1000, "enable.gapless.guarantee": False})
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Hand in what was taken, and end."""
        self._producer.flush(DELIVERY_S)
        self._stop.set()
        self._thread.join()
        if self._specs is not None:
            self._specs.close()

    def check(self, workflow: str, digest: str | None, text: str) -> None:
        """Judge a request as intake will. Raises RefusedError, NotSentError while that is not known, and NewerCodeError."""
        spec = self._find(workflow, digest)
        if spec is None or spec.name != workflow:
            if digest:
                raise RefusedError("unknown_workflow", f"workflow `{workflow}` has no version {digest}")
            with self._lock:
                names = self._specs.names() if self._specs else []
            raise RefusedError("unknown_workflow", nearest("no workflow is called", workflow, names))
        try:
            _, problems = spec.check_input(text)
        except EvaluationError as error:
            raise RefusedError("invalid_input", f"input: {error}") from error
        if problems:
            raise RefusedError("invalid_input", "; ".join(problems[:_SHOWN]))

    def _find(self, workflow: str, digest: str | None) -> Any:
        with self._lock:
            if self._specs is None:
                raise NotSentError(f"Kafka at {self._settings.bootstrap_servers} has not answered yet")
            found = self._specs.get(digest) if digest else self._specs.newest(workflow)
            if found is None:  # it may have been registered a moment ago
                try:
                    self._specs.refresh(_CONNECT_S)
                except kafka.KafkaUnreachableError as error:
                    raise NotSentError(str(error)) from error
                found = self._specs.get(digest) if digest else self._specs.newest(workflow)
            return found

    def send(self, record: Outgoing) -> "Future[Sent]":
        """Send a record; the future has where it stands once the broker has acknowledged that, or NotSentError."""
        future: Future[Sent] = Future()
        future.set_running_or_notify_cancel()  # whoever waits may give up; what is on the way can't be taken back

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                future.set_exception(NotSentError(f"{error.str()}: is Kafka at {self._settings.bootstrap_servers} reachable?"))
            else:
                future.set_result(Sent(message.topic(), message.partition(), message.offset()))

        if self.ready.is_set():
            kafka.produce(self._producer, self._settings, record, delivered)
        else:  # topics may be missing still, and what this code writes may not be published
            future.set_exception(NotSentError(f"Kafka at {self._settings.bootstrap_servers} has not answered yet"))
        return future

    def _run(self) -> None:
        said = ""
        while not self._stop.is_set():
            try:
                if self.ready.is_set():
                    self._producer.poll(_POLL_S)
                    with self._lock:
                        assert self._specs is not None
                        self._specs.drain()
                else:
                    self._connect()
            except (kafka.KafkaUnreachableError, kafka.TopicMismatchError, kafka.DeliveryFailedError, NewerCodeError) as error:
                if str(error) != said:
                    said = str(error)
                    log.error("gateway.hindered", problem=said)  # noqa: TRY400 - nothing is wrong with this code
                self._stop.wait(1.0)

    def _connect(self) -> None:
        kafka.connect(self._settings, _CONNECT_S)
        schemas.publish(self._settings)  # before the first record, as every process does
        specs = SpecRegistry(self._settings)
        specs.refresh()
        self._specs = specs
        self.ready.set()
