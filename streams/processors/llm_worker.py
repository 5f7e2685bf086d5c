"""The LLM worker: takes calls from `llm.calls`, asks the model once, sends the result to the run's inbox."""

from typing import Final

from events import codec, topics
from events.calls import LlmCall
from events.errors import NotDecodableError
from events.results import InboxMessage
from streams.envelope import Incoming, Outgoing, dead_letter, envelope
from streams.processors.llm_call import ask
from streams.settings import Settings

SOURCE: Final = "llm-worker"


class LlmCalls:
    """The handler of `llm.calls`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def __call__(self, record: Incoming) -> Outgoing:
        """Make one call's attempt and return its result for the inbox, or a dead letter for what is no call."""
        try:
            call = codec.decode(record.value, LlmCall)
        except NotDecodableError as error:
            return dead_letter(record, "not_decodable", str(error), SOURCE)
        message = InboxMessage(call.run_id, await ask(call, self.settings))
        return envelope(topics.INBOX, call.run_id, message, source=SOURCE, identity=f"{call.call_id}/result", run_id=call.run_id)
