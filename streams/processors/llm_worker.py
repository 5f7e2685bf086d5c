"""The LLM worker: takes calls from `llm.calls`, asks the model once, sends the result to the run's inbox.

Each model is an endpoint with a circuit of its own (breaker.py). What counts against it: no connection, no answer in time, and
what the provider itself is to blame for. A rate limit doesn't: who says that is there, and says when to come back.
"""

import time
from typing import Final

from events import topics
from events.calls import LlmCall
from events.failure import Failure, FailureKind
from events.results import InboxMessage, LlmCallCompleted, LlmCallFailed
from streams.envelope import Incoming, Outgoing, envelope
from streams.payloads import PayloadStore
from streams.processors import prices
from streams.processors.breaker import Breakers, had_time
from streams.processors.calls import read
from streams.processors.llm_call import ask, endpoint
from streams.settings import Settings
from streams.workflow.expressions import clean_text

SOURCE: Final = "llm-worker"
_AGAINST_IT: Final = frozenset({FailureKind.TIMEOUT, FailureKind.UNAVAILABLE})


class LlmCalls:
    """The handler of `llm.calls`. `in_flight`: how many are being made now."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._payloads = settings, PayloadStore(settings)
        self._prices = prices.load(settings.prices)
        self.breakers = Breakers(settings)
        self.in_flight = 0

    async def __call__(self, record: Incoming) -> Outgoing:
        """Make one call's attempt and return its result for the inbox, or a dead letter for what is no call."""
        call = read(record, LlmCall, SOURCE)
        if isinstance(call, Outgoing):
            return call
        self.in_flight += 1
        try:
            result = await self._made(call, record.timestamp)
        finally:
            self.in_flight -= 1
        message = InboxMessage(call.run_id, result)
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)

    async def _made(self, call: LlmCall, queued: int) -> LlmCallCompleted | LlmCallFailed:
        """Return a call's result; `queued`: when it was put on the queue, milliseconds since the epoch."""
        model = call.request.model or self.settings.model
        attempt = self.breakers.attempt(endpoint(model, self.settings), call.call_id)
        if isinstance(attempt, Failure):
            return LlmCallFailed(call.call_id, call.request.step, attempt, clean_text(model), None, None, 0)
        in_time = had_time(time.time(), queued, call.request.deadline)

        def told(failure: Failure | None) -> None:
            if failure is None or failure.kind not in _AGAINST_IT:
                attempt.answered()
            elif failure.kind != FailureKind.TIMEOUT or in_time:
                attempt.failed(failure.message)

        with attempt:
            return await ask(call, self.settings, self._payloads, told, self._prices)

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Return the result of a call that was given up, or (`latency_ms` None) never made; what it cost nobody says."""
        call = read(record, LlmCall, SOURCE)
        if isinstance(call, Outgoing):
            return call
        failure, model = Failure(FailureKind.CANCELLED, reason), clean_text(call.request.model or self.settings.model)
        message = InboxMessage(
            call.run_id, LlmCallFailed(call.call_id, call.request.step, failure, model, None, None, latency_ms or 0)
        )
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)
