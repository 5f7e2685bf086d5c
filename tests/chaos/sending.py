"""Produces the load at its times, whatever becomes of it, and notes what the broker acknowledged in `requests.jsonl`."""

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from load import Message, Outcome

from events.ids import position_request_id, run_id
from streams import kafka
from streams.envelope import Outgoing
from streams.settings import Settings


class Sender:
    """A user of the topic `requests`, in a thread of its own.

    `asked`: runs that were asked for and how they must end; `sent_ms`: when they were first asked for.
    """

    def __init__(self, settings: Settings, requests_id: bytes, file: Path) -> None:
        self.asked: dict[str, Outcome] = {}
        self.sent_ms: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._settings, self._requests_id = settings, requests_id
        self._file = file.open("a")
        self._answers: queue.SimpleQueue[Outgoing] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._producer = kafka.producer(settings)

    def start(self, messages: list[Message]) -> None:
        """Begin with these messages, whose times count from now."""
        self._thread = threading.Thread(target=self._guarded, args=(messages,), daemon=True)
        self._thread.start()

    def answer(self, record: Outgoing) -> None:
        """Produce something as soon as possible. From any thread."""
        self._answers.put(record)

    def stop(self) -> None:
        """Send no more answers; the messages are all sent by then. Raises DeliveryFailedError."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join(150)
        self._file.close()
        if self.failure is not None:
            raise self.failure

    def _guarded(self, messages: list[Message]) -> None:
        try:
            self._send(messages)
            kafka.flush(self._producer)
        except BaseException as error:  # noqa: BLE001 - said by `stop`
            self.failure = error

    def _send(self, messages: list[Message]) -> None:
        began = time.monotonic()
        for message in messages:
            while (early := message.at_s - (time.monotonic() - began)) > 0:
                self._answer()
                time.sleep(min(early, 0.02))
            self._produce(message.record, partial(self._acknowledged, message, time.time_ns() // 1_000_000))
        self.counts["all_sent"] = 1
        while not self._stop.wait(0.02):
            self._answer()
        self._answer()

    def _answer(self) -> None:
        self._producer.poll(0)
        while not self._answers.empty():
            self._produce(self._answers.get(), self._counted)

    def _produce(self, record: Outgoing, heard: Callable[[Any, Any], None]) -> None:
        kafka.produce(self._producer, self._settings, record, heard)

    def _counted(self, error: Any, message: Any) -> None:
        del message
        self.counts["commands" if error is None else "not_delivered"] += 1

    def _acknowledged(self, sent: Message, at_ms: int, error: Any, message: Any) -> None:
        request = sent.request
        if error is not None or request is None:
            self._counted(error, message)
            return
        self.counts["requests"] += 1
        partition, offset = message.partition(), message.offset()
        identity = position_request_id(self._requests_id, partition, offset) if request.nameless else request.name
        run = run_id(identity)
        self.asked[run] = request.expect
        self.sent_ms.setdefault(run, at_ms)
        place = {"topic": message.topic(), "partition": partition, "offset": offset}
        self._file.write(json.dumps({"request_id": identity, **place, "expect": request.expect}) + "\n")
