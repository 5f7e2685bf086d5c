"""The LLM worker: takes calls from `llm.calls`, asks the model once, sends the result to the run's inbox."""

from typing import Final

from events import codec, topics
from events.calls import LlmCall
from events.errors import NotDecodableError
from events.failure import Failure, FailureKind
from events.results import InboxMessage, LlmCallFailed
from streams.envelope import Incoming, Outgoing, dead_letter, envelope
from streams.payloads import PayloadStore
from streams.processors.llm_call import ask
from streams.settings import Settings
from streams.workflow.expressions import clean_text

SOURCE: Final = "llm-worker"


class LlmCalls:
    """The handler of `llm.calls`."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._payloads = settings, PayloadStore(settings)

    async def __call__(self, record: Incoming) -> Outgoing:
        """Make one call's attempt and return its result for the inbox, or a dead letter for what is no call."""
        try:
            call = codec.decode(record.value, LlmCall)
        except NotDecodableError as error:
            return dead_letter(record, "not_decodable", str(error), SOURCE)
        message = InboxMessage(call.run_id, await ask(call, self.settings, self._payloads))
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)

    def cancelled(self, record: Incoming, reason: str, latency_ms: int | None) -> Outgoing:
        """Return the result of a call that was given up, or (`latency_ms` None) never made; what it cost nobody says."""
        try:
            call = codec.decode(record.value, LlmCall)
        except NotDecodableError as error:
            return dead_letter(record, "not_decodable", str(error), SOURCE)
        failure, model = Failure(FailureKind.CANCELLED, reason), clean_text(call.request.model or self.settings.model)
        message = InboxMessage(
            call.run_id, LlmCallFailed(call.call_id, call.request.step, failure, model, None, None, latency_ms or 0)
        )
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)
