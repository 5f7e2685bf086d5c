"""Where a run that is followed asks a person: each approval once, at the terminal, or in the login name when told so."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from events.commands import ApprovalAnswered
from infra.cli import asking, outcome, talk
from infra.cli.history import History
from infra.cli.terminal import say
from streams import kafka
from streams.kafka import Cluster
from streams.settings import Settings

REASON = "--yes"
"""What stands in the history as the reason of an approval that nobody looked at."""


class Desk:
    """Answers approvals. `yes`: with yes; `silent`: without asking or saying anything."""

    def __init__(self, settings: Settings, cluster: Cluster, *, yes: bool, silent: bool) -> None:
        self._settings, self._cluster, self._yes, self._silent = settings, cluster, yes, silent
        self._asks = not yes and not silent and asking.at_terminal()
        self._seen: set[str] = set()
        self._sent: list[ApprovalAnswered] = []

    def answer(self, history: History, aside: Callable[[], AbstractContextManager[None]]) -> None:
        """Answer what has not been answered yet, and say so when an answer did not count."""
        self._look_back(history, aside)
        if not (self._yes or self._asks):
            return
        state = history.state
        for step, asked in outcome.approvals(state).items():
            which = state.steps[step].awaits  # of its own for each time that it asks
            if which in self._seen:
                continue
            self._seen.add(which)
            by = asking.login()
            if self._yes:
                self._send(history.run_id, ApprovalAnswered(step, True, by, REASON, None))
                continue
            with aside():
                given = asking.ask(step, asked, asking.resolved(self._settings, asked.value), by)
            if given is not None:
                self._send(history.run_id, given)

    def _send(self, run_id: str, given: ApprovalAnswered) -> None:
        self._sent.append(given)
        try:
            talk.send(self._settings, self._cluster, run_id, given)
        except kafka.DeliveryFailedError as error:
            say(f"The answer was not sent: {error}")

    def _look_back(self, history: History, aside: Callable[[], AbstractContextManager[None]]) -> None:
        """Say what came of an answer that changed nothing."""
        last = history.last
        if last is None or not isinstance(last.input, ApprovalAnswered) or last.input not in self._sent:
            return
        self._sent.remove(last.input)
        found = outcome.decided(last, history.before)
        if not found.effective and not self._silent:
            with aside():
                say(found.text)
