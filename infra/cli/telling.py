"""Sends a command to a run that a person names, and says what came of it."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import typer

from infra.cli.naming import is_beginning, is_id, whole_id
from infra.cli.requests import REFUSED, UNREACHABLE, seconds
from infra.cli.terminal import fail, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from events.commands import Command
    from events.decisions import ApprovalRequested
    from infra.cli.talk import Line
    from streams.kafka import Cluster

DONE, NOTHING, TIMED_OUT = 0, 1, 3
_CONNECT_S: Final = 10.0
_APPEARS_S: Final = 2.0
"""How long a run may take to appear that was asked for a moment ago."""


def who(by: str) -> str:
    """Return who says something: the name that was given, or the login name."""
    from infra.cli.asking import login  # noqa: PLC0415

    return by or login()


def tell(run: str, said: "Command | Callable[[Line], Command]", wait: bool, timeout: str, *, as_json: bool) -> None:
    """Send a command, or what it is made of by looking at the run, and say what came of it."""
    patience = seconds(timeout)
    from infra.cli import talk  # noqa: PLC0415 - Kafka and Avro are not needed for mistakes in the options
    from streams import kafka  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        cluster = kafka.connect(settings, timeout_s=_CONNECT_S)
        if not wait and not callable(said) and is_id(run):
            _sent(run, said, talk.send(settings, cluster, run, said), as_json=as_json)
            return
        with _line(settings, cluster, run) as line:
            command = said(line) if callable(said) else said
            run_id = line.history.run_id
            if not wait:
                _sent(run_id, command, talk.send(settings, cluster, run_id, command), as_json=as_json)
                return
            found = line.say(command, patience)
    except talk.TooLargeError as error:
        fail(f"Nothing was sent: {error}", REFUSED)
    except (kafka.KafkaUnreachableError, kafka.DeliveryFailedError, kafka.TopicMismatchError) as error:
        fail(f"Nothing was sent: {error}", UNREACHABLE)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    print(json.dumps(found.as_json(run_id, command), ensure_ascii=False) if as_json else found.text)
    raise typer.Exit(DONE if found.effective else TIMED_OUT if found.status == "timeout" else NOTHING)


def _sent(run_id: str, command: "Command", place: tuple[int, int], *, as_json: bool) -> None:
    from events.as_json import as_json as event_json  # noqa: PLC0415

    found = {"run_id": run_id, "command": event_json(command), "outcome": "sent", "partition": place[0], "offset": place[1]}
    print(json.dumps(found, ensure_ascii=False) if as_json else "Sent.")


@contextlib.contextmanager
def _line(settings: Settings, cluster: "Cluster", run: str) -> "Iterator[Line]":
    """Connect to a run, named by its id, its request's id, or the beginning of its id. Ends the command if there is none."""
    from events.ids import run_id  # noqa: PLC0415
    from infra.cli.talk import Line  # noqa: PLC0415

    line = Line(settings, cluster, run if is_id(run) else run_id(run))
    try:
        line.catch_up()
        if line.history.state.seq == 0 and is_beginning(run) and (whole := whole_id(run)) is not None:
            line.close()
            line = Line(settings, cluster, whole)
        deadline = time.monotonic() + _APPEARS_S
        while line.catch_up().seq == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        if line.history.state.seq == 0:
            fail(f"There is no run `{run}`: nothing was sent. `foldflow runs` lists them.", NOTHING)
        yield line
    finally:
        line.close()


def approval(line: "Line", step: str) -> "tuple[str, ApprovalRequested | None]":
    """Return the approval that is meant; without STEP the only one. Ends the command if that is none or several."""
    from infra.cli.outcome import approvals, waiting  # noqa: PLC0415

    state, run_id = line.history.state, line.history.run_id
    waits = approvals(state)
    if step:
        return step, waits.get(step)
    if len(waits) == 1:
        return next(iter(waits.items()))
    if not waits:
        status = f"it is {state.status.name.lower()}" if state.over else "no step of it does now"
        fail("\n".join([f"Run {run_id} waits for no approval: {status}.", *waiting(state, run_id)]), NOTHING)
    lines = [f"  {path}: {asked.message}" for path, asked in waits.items()]
    return fail("\n".join([f"Run {run_id} waits for {len(waits)} approvals: say which STEP.", *lines]), NOTHING)


def approved(asked: "ApprovalRequested | None", step: str, given: str | None, *, edit: bool, ask: bool) -> str | None:
    """Show what is approved, let it be edited, and ask; return the value that it becomes, None: as it is shown."""
    if asked is None:
        return given  # the run's decision says that there is nothing to approve
    from infra.cli import asking  # noqa: PLC0415

    value = asking.resolved(Settings(), asked.value)
    if ask:
        asking.show(step, asked, value)
    if edit:
        try:
            given = asking.edited(value)
        except asking.NotEditedError as error:
            fail(str(error), NOTHING)
        if given is None:
            say("Unchanged.")
    if ask and asking.at_terminal() and not typer.confirm("Approve?", err=True):
        fail("Nothing was sent.", NOTHING)
    return given
