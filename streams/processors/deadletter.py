"""Dead letters: watched, so that none goes by unseen. What they are for a user is a view of the projections."""

from collections import Counter
from typing import Any

import faust
import structlog

from events import codec, topics
from events.decisions import DeadLetter, DeadLetterSettled
from events.errors import NotDecodableError
from streams import header_names, kafka
from streams.settings import Settings

log = structlog.get_logger()


def attach(app: faust.App, settings: Settings) -> None:
    """Add the agent that logs each dead letter and counts them by reason."""
    header_names.accept_any()
    source = app.topic(kafka.name(settings, topics.DEADLETTER), key_serializer="raw", value_serializer="raw", value_type=bytes)
    counts: Counter[str] = Counter()

    @app.agent(source, name="deadletter", concurrency=1)
    async def deadletter(stream: Any) -> None:
        async for event in stream.events():
            value = event.message.value
            try:
                if codec.kind_of(value) is DeadLetterSettled:
                    settled = codec.decode(value, DeadLetterSettled)
                    where = f"{settled.topic}/{settled.partition}/{settled.offset}"
                    log.info("deadletter.settled", action=settled.action, by=settled.by, reason=settled.reason, where=where)
                    continue
                letter = codec.decode(value, DeadLetter)
            except NotDecodableError as error:
                # Somebody else's record on our topic: there is no place further back to put it.
                log.warning("deadletter.unreadable", offset=event.message.offset, problem=str(error))
                continue
            counts[letter.reason] += 1
            log.warning(
                "deadletter",
                reason=letter.reason,
                detail=letter.detail,
                where=f"{letter.topic}/{letter.partition}/{letter.offset}",
                run_id=letter.run_id,
                of_this_reason=counts[letter.reason],
            )
