"""`foldflow fork`: a new run from another one, as it was at any of its decisions."""

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.requests import UNREACHABLE, json_text, seconds, send, text_of
from infra.cli.terminal import fail, pairs, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.workflow.spec import WorkflowSpec
    from streams.workflow.state import RunState

NOTHING: Final = 2
_CONNECT_S: Final = 10.0
_UNDONE: Final = (("--from", ""), ("--set", "=JSON"))


def fork(  # noqa: PLR0913, PLR0917 - a command's options
    run: Annotated[str, typer.Argument(help="The run: its id, or its request's.")],
    at: Annotated[int, typer.Option("--at", help="Number of the decision to start from; without it the last one.")] = 0,
    from_: Annotated[
        list[str] | None, typer.Option("--from", help="A step to run again, with all that need it; may be repeated.")
    ] = None,
    input_: Annotated[str, typer.Option("--input", "-i", help="Another input: JSON, @FILE, or - for standard input.")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="STEP=JSON: another output for a step, and what needs it runs again; may be repeated."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="STEP=TEXT or STEP=@FILE: another prompt; may be repeated.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="STEP=MODEL: another model; may be repeated.")] = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="Another definition of the workflow.")] = None,
    request_id: Annotated[str, typer.Option(help="Identity of the request; the same one twice is one run.")] = "",
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow the run until it ends.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --wait: approve whatever the run asks for.")] = False,
    timeout: Annotated[str, typer.Option(help="How long --wait waits: 90s, 10m, 2h; 0 for ever.")] = "10m",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")] = False,
) -> None:
    """Start a new run from another one, as it was after any of its decisions.

    What both have in common is copied, marked, and costs nothing; the rest runs. The new run's StartRun names its origin.

    A step that the run has undone, also after the decision that is forked, must be named: --from does it again, --set tells its
    result. When the new run fails or is cancelled, no step that it copied is undone.

    For example:

        foldflow fork RUN --from draft --wait                 run a step again, and all that needs it

        foldflow fork RUN --at 12                             go on from decision 12

        foldflow fork RUN --prompt draft=@prompt.txt --model draft=anthropic/claude-sonnet-4-5

        foldflow fork RUN --set fetch='{"rows": []}' --input '{"question": "What if?"}'

        foldflow fork RUN --spec new.yaml                     with another definition; steps that it changes run again

    Exit codes: as of `foldflow run`; 2 also when there is no such run, decision or step, or one was undone and isn't named.
    """
    patience = seconds(timeout)
    text = json_text(input_, "--input") if input_ else None
    outputs = {step: json_text(value, "--set") for step, value in pairs(set_ or [], "--set").items()}
    prompts = {step: text_of(value, "--prompt")[0] for step, value in pairs(prompt or [], "--prompt").items()}
    models = pairs(model or [], "--model")

    from streams import kafka  # noqa: PLC0415 - Kafka and Avro are not needed for mistakes in the options
    from streams.registry import publish  # noqa: PLC0415
    from streams.workflow import fork as core  # noqa: PLC0415
    from streams.workflow.definition import DefinitionFileError, load  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        run_id, state, now, before = _states(settings, run, at)
        version = load(spec) if spec else before
        if prompts or models:
            version = core.with_changes(version, prompts, models)
        rerun = {*(from_ or ()), *_changed(before, version), *_behind(version, outputs)}
        request = core.fork(
            run_id,
            state,
            version,
            now=now,
            rerun=sorted(rerun),
            outputs=outputs,
            input_text=text,
            request_id=request_id or str(uuid.uuid4()),
        )
        publish(settings, [version], current=False)
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        fail(f"Nothing was started: {error}", UNREACHABLE)
    except core.UndoneError as error:
        again, told = (" ".join(f"{option} {step}{value}" for step in error.steps) for option, value in _UNDONE)
        fail(f"Nothing was started: {error}. Say {again} to do what was undone again, or {told} to tell its result.", NOTHING)
    except (DefinitionFileError, ValueError) as error:
        fail(f"Nothing was started: {error}", NOTHING)
    if not as_json:
        copied = len(json.loads(request.copied or "{}"))
        say(f"Forked from {run_id} at decision {state.seq}; {copied} results are copied.")
    send(request, wait=wait, yes=yes, patience=patience, as_json=as_json, again=bool(request_id))


def _states(settings: Settings, run: str, at: int) -> "tuple[str, RunState, RunState, WorkflowSpec]":
    """Return a run's id, its state after one of its decisions and its last one, and its version.

    Ends the command if there is none such.
    """
    from events import codec  # noqa: PLC0415
    from events.decisions import Decision  # noqa: PLC0415
    from events.ids import chain_hash  # noqa: PLC0415
    from infra.cli.histories import recorded  # noqa: PLC0415
    from streams import kafka  # noqa: PLC0415
    from streams.workflow.evolve import evolve  # noqa: PLC0415
    from streams.workflow.state import INITIAL, RunEvent  # noqa: PLC0415

    found = recorded(settings, kafka.connect(settings, timeout_s=_CONNECT_S), run)
    state = now = INITIAL
    for value in found.values:
        now = evolve(now, RunEvent(codec.decode(value, Decision), chain_hash(codec.unframed(value))))
        if not at or now.seq == at:
            state = now
    if at and state.seq != at:
        fail(f"Run {found.run_id} has {now.seq} decisions; there is no number {at}.", NOTHING)
    if found.spec is None:
        fail(f"Nobody has registered version {state.digest[:12]} of {state.workflow}.", NOTHING)
    return found.run_id, state, now, found.spec


def _changed(before: "WorkflowSpec", after: "WorkflowSpec") -> set[str]:
    """Return the steps that both versions have, and that the later one tells otherwise: their results are not its own."""
    old = {step.name: step for step in before.steps}
    return {step.name for step in after.steps if step.name in old and old[step.name] != step}


def _behind(spec: "WorkflowSpec", outputs: dict[str, Any]) -> set[str]:
    """Return the steps that need one whose output is given."""
    return {name for step in outputs for name in spec.plan.root.dependents.get(step, ())}


__all__ = ["fork"]
