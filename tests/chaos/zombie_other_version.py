"""`foldflow`, but as a version of the code that decides differently: calls have other deadlines, retries other waits.

For tests only: `python zombie_other_version.py worker orchestrator` in the place of `foldflow worker orchestrator`.
"""

from dataclasses import replace
from typing import Any

from events.calls import ToolCallRequested
from events.decisions import Effect, RetryScheduled
from infra.cli.main import main
from streams.processors import tenure
from streams.workflow.decider import decide

LATER_MS = 7


def decide_differently(*arguments: Any) -> tuple[Effect, ...]:
    """Decide as ever, but give calls a little more time, and wait a little longer before trying again."""
    return tuple(_later(effect) for effect in decide(*arguments))


def _later(effect: Effect) -> Effect:
    if isinstance(effect, ToolCallRequested):
        return replace(effect, deadline=effect.deadline + LATER_MS)
    if isinstance(effect, RetryScheduled):
        return replace(effect, due=effect.due + LATER_MS)
    return effect


if __name__ == "__main__":
    tenure.decide = decide_differently  # type: ignore[attr-defined]
    main()
