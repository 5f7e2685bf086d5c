"""Calls that nobody waits for any more: a view of the topic `cancellations`, which each worker reads for itself, without a group.

A cancellation may be older than the taking of its call: the call waits in the queue, or the worker starts anew. So the newest
cancellations are remembered, and a start looks back for as many.
"""

from collections import OrderedDict
from typing import Final

import structlog

from events import codec, topics
from events.calls import CancelCall
from events.errors import NewerCodeError, NotDecodableError
from streams import kafka
from streams.schemas import Schemas
from streams.settings import Settings

log = structlog.get_logger()

MOST: Final = 100_000
"""How many cancellations are remembered; some 300 bytes each, and half a second of reading at the start of a worker."""
_MAX_REASON: Final = 500
"""Characters of a reason that are kept: what is remembered is bounded."""


class Cancellations:
    """The newest cancellations, by call. One thread reads on; `reason` is for any.

    Whoever makes calls must end when newer code cancels some: it can't know which.
    """

    def __init__(self, settings: Settings, schemas: Schemas | None = None, most: int = MOST) -> None:
        self._schemas = schemas or Schemas(settings)
        self._newer: NewerCodeError | None = None
        self._topic = kafka.name(settings, topics.CANCELLATIONS)
        self._most = most
        self._reasons: OrderedDict[bytes, str] = OrderedDict()
        self._source = kafka.reader(settings, **kafka.FOLLOWS)

    def open(self) -> None:
        """Read the newest up to the end as of now; `drain` goes on from there.

        Raises KafkaUnreachableError and NewerCodeError.
        """
        _, end = kafka.watermarks(self._source, self._topic, 0)
        # Not from a time on: after an outage of hours, calls that were cancelled early in it are still in the queue.
        for message in kafka.read_partition(self._source, self._topic, 0, max(0, end - self._most), end):
            self._take(message.value())
        self.refuse_newer()
        self._source.assign([kafka.TopicPartition(self._topic, 0, end)])

    def refuse_newer(self) -> None:
        """Raise NewerCodeError if newer code has cancelled a call."""
        if self._newer is not None:
            raise self._newer

    def drain(self) -> dict[bytes, str]:
        """Take what has come since the last look, without waiting; return the reasons of what is new, by call."""
        return dict(new for message in kafka.poll(self._source, 0) if (new := self._take(message.value())))

    def reason(self, call: bytes | None) -> str | None:
        """Return why a call is cancelled (its record's key), None if it isn't."""
        return None if call is None else self._reasons.get(call)

    def close(self) -> None:
        """Close the connection."""
        self._source.close()

    def _take(self, value: bytes | None) -> tuple[bytes, str] | None:
        """Remember a cancellation and return it; None if it is known already (a takeover sends it again) or can't be read."""
        try:
            cancel = codec.decode(value, CancelCall)
        except NotDecodableError as error:
            try:
                self._schemas.refuse_newer("a cancellation", value, CancelCall)
            except NewerCodeError as newer:
                self._newer = newer
            log.warning("cancellations.unreadable", problem=str(error))
            return None
        call = cancel.call_id.encode()
        if call in self._reasons:
            return None
        self._reasons[call] = reason = cancel.reason[:_MAX_REASON]
        if len(self._reasons) > self._most:
            self._reasons.popitem(last=False)
        return call, reason
