"""Test workflows in memory: a run by a virtual clock, with scripted models and tools, in the words given, when and then.

    from streams.testing import Failure, answers, given, partly

    def test_a_report_needs_a_release() -> None:
        run = given(
            "report.yaml",
            input={"url": "https://example.org"},
            tools={"fetch_page": answers(Failure("unavailable", "down"), {"text": "Hello"})},
            models={"summary": {"title": "A greeting", "points": ["It greets."]}},
        )
        run.then_step("fetch", status="waiting")
        run.when_time_passes("10s").then_called("fetch_page", times=2).then_waits_for(approval="release")
        run.when_approved(by="ann").then_completed(partly(title="A greeting"))

An assertion that fails shows the run, a line for each decision. `run.save(path)` records it; `replay(path)` decides it again, by
today's code or by another version of the workflow, and compares each decision byte for byte.
"""

from events.failure import Failure, FailureKind
from events.results import Usage
from streams.testing.histories import Difference, HistoryError, Replay, replay
from streams.testing.matching import ANYTHING, partly
from streams.testing.run import Run, given
from streams.testing.script import NEVER, UnscriptedCallError, answer, answers
from streams.testing.then import Then

__all__ = [
    "ANYTHING",
    "NEVER",
    "Difference",
    "Failure",
    "FailureKind",
    "HistoryError",
    "Replay",
    "Run",
    "Then",
    "UnscriptedCallError",
    "Usage",
    "answer",
    "answers",
    "given",
    "partly",
    "replay",
]
