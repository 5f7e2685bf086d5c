"""`foldflow signal`, `approve`, `reject`, `cancel`, `pause`, `resume`, `set-output`: say something to a run that exists."""

import uuid
from typing import TYPE_CHECKING, Annotated, Final

import typer

from infra.cli.requests import json_text
from infra.cli.telling import approval, approved, tell, who

if TYPE_CHECKING:
    from events.commands import Command
    from infra.cli.talk import Line

_ENDS: Final = """

    Exit codes: 0 it had an effect (with --no-wait: sent), 1 it had none, and why, 2 a wrong option, 3 not decided on within
    --timeout, 4 Kafka can't be reached.
"""

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id or the beginning of it, or a request's id.")]
Step = Annotated[str, typer.Argument(metavar="STEP", help="A step's path: `ask`, `check[3].ask`.", show_default=False)]
By = Annotated[str, typer.Option("--by", help="Who says so; without it your login name.", show_default=False)]
Reason = Annotated[str, typer.Option("--reason", help="Why: it stands in the run's history.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the run's decision on it, and say what came of it.")]
Timeout = Annotated[str, typer.Option("--timeout", help="How long to wait for that: 90s, 10m.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]


def signal(  # noqa: PLR0913, PLR0917 - a command's options
    run: Run,
    name: Annotated[str, typer.Argument(help="Name of the signal, as the step's `wait_for` says it.")],
    payload: Annotated[str, typer.Option("--payload", help="JSON, @FILE, or - for standard input: the step's output.")] = "null",
    correlation: Annotated[
        str | None, typer.Option("--correlation", help="Which of several waiting steps it is for.", show_default=False)
    ] = None,
    identity: Annotated[str, typer.Option("--id", help="Identity of the signal; the same one twice counts once.")] = "",
    by: By = "",
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Send a signal to a run. A step that waits for it takes it; until then it is kept.

    For example:

        foldflow signal 8f6a3a7e payment --payload '{"paid": true}' --correlation order-7

        foldflow signal order-17 document --payload @scan.json --id scan-4711
    """
    from events.commands import SignalReceived  # noqa: PLC0415 - not needed for mistakes in the options

    text = json_text(payload, "--payload")
    command = SignalReceived(identity or str(uuid.uuid4()), name, correlation, text, who(by))
    tell(run, command, wait, timeout, as_json=as_json)


def approve(  # noqa: PLR0913, PLR0917 - a command's options
    run: Run,
    step: Step = "",
    reason: Reason = "",
    edit: Annotated[bool, typer.Option("--edit", help="Open the value in $EDITOR first, and approve what it becomes.")] = False,
    value: Annotated[
        str | None, typer.Option("--value", help="Approve this instead: JSON, @FILE, or -.", show_default=False)
    ] = None,
    by: By = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Neither show it nor ask.")] = False,
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Approve what a step shows. Without STEP, the only approval that the run waits for.

    On a terminal it is shown first, and you are asked.

    For example:

        foldflow approve 8f6a3a7e

        foldflow approve order-17 send_mail --edit --reason "shorter"

        foldflow approve order-17 'check[3].ask' --value '{"limit": 100}' --yes --json
    """
    if edit and value is not None:
        raise typer.BadParameter("either --edit or --value", param_hint="--edit")
    given = None if value is None else json_text(value, "--value")

    def command(line: "Line") -> "Command":
        from events.commands import ApprovalAnswered  # noqa: PLC0415

        path, asked = approval(line, step)
        return ApprovalAnswered(path, True, who(by), reason, approved(asked, path, given, edit=edit, ask=not (yes or as_json)))

    tell(run, command, wait, timeout, as_json=as_json)


def reject(
    run: Run,
    reason: Reason,
    step: Step = "",
    by: By = "",
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Reject what a step shows. Without STEP, the only approval that the run waits for.

    For example:

        foldflow reject 8f6a3a7e send_mail --reason "wrong customer"
    """
    from events.commands import ApprovalAnswered  # noqa: PLC0415

    tell(
        run,
        lambda line: ApprovalAnswered(approval(line, step)[0], False, who(by), reason, None),
        wait,
        timeout,
        as_json=as_json,
    )


def cancel(
    run: Run,
    step: Step = "",
    reason: Reason = "",
    force: Annotated[bool, typer.Option("--force", help="End the run at once: undo nothing, clean up nothing.")] = False,
    by: By = "",
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Cancel a run: what is under way ends, what has a compensation is undone. With STEP, let only that step fail as cancelled.

    For example:

        foldflow cancel 8f6a3a7e --reason "asked twice"

        foldflow cancel order-17 slow_step
    """
    from events.commands import CancelRun, CancelStep  # noqa: PLC0415

    if step and force:
        raise typer.BadParameter("it is for a whole run", param_hint="--force")
    command = CancelStep(step, who(by), reason) if step else CancelRun(who(by), reason, force)
    tell(run, command, wait, timeout, as_json=as_json)


def pause(
    run: Run,
    step: Step = "",
    reason: Reason = "",
    by: By = "",
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Pause a run: nothing more is started, what is under way goes on. With STEP, stop only before that one.

    For example:

        foldflow pause 8f6a3a7e

        foldflow pause order-17 send_mail --reason "let me look first"
    """
    from events.commands import PauseRun, PauseStep  # noqa: PLC0415

    command = PauseStep(step, who(by), reason) if step else PauseRun(who(by), reason)
    tell(run, command, wait, timeout, as_json=as_json)


def resume(
    run: Run,
    step: Step = "",
    single: Annotated[bool, typer.Option("--step", help="Start what is held, and hold what comes next.")] = False,
    by: By = "",
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Go on with a run that is paused or stopped before a step. With STEP, start only that one.

    For example:

        foldflow resume 8f6a3a7e --step

        foldflow resume order-17 send_mail
    """
    from events.commands import ResumeRun, ResumeStep  # noqa: PLC0415

    if step and single:
        raise typer.BadParameter("either STEP or --step", param_hint="--step")
    command = ResumeStep(step, who(by)) if step else ResumeRun(who(by), single)
    tell(run, command, wait, timeout, as_json=as_json)


def set_output(
    run: Run,
    step: Annotated[str, typer.Argument(help="A step's path: `ask`, `check[3].ask`.")],
    output: Annotated[str, typer.Argument(help="The output: JSON, @FILE, or - for standard input.")],
    reason: Reason,
    by: By = "",
    wait: Wait = True,
    timeout: Timeout = "30s",
    as_json: AsJson = False,
) -> None:
    """Replace a step's output. A step that has begun and is not settled is completed by it, without its call.

    Steps that have used the old output keep what they made of it.

    For example:

        foldflow set-output 8f6a3a7e summary '{"title": "Better"}' --reason "the model's was wrong"

        foldflow set-output order-17 fetch @page.json --reason "the site is down"
    """
    from events.commands import ChangeOutput  # noqa: PLC0415

    command = ChangeOutput(step, json_text(output, "OUTPUT"), who(by), reason)
    tell(run, command, wait, timeout, as_json=as_json)


for _command in (signal, approve, reject, cancel, pause, resume, set_output):
    _command.__doc__ = (_command.__doc__ or "").rstrip() + _ENDS
