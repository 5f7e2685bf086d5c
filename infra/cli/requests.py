"""`foldflow run`: sends a request, and follows its run if told to."""

import json
import math
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import console, fail, pairs, quiet, say, took
from streams.settings import Settings

if TYPE_CHECKING:
    from events.commands import WorkflowRequest
    from infra.cli.desk import Desk
    from infra.cli.follow import Follower

COMPLETED, FAILED, REFUSED, TIMED_OUT, UNREACHABLE = 0, 1, 2, 3, 4
_CONNECT_S: Final = 10.0


def run(  # noqa: PLR0913, PLR0917 - a command's options
    workflow: Annotated[str, typer.Argument(help="Name of a registered workflow (`foldflow workflows` lists them).")],
    input_: Annotated[str, typer.Option("--input", "-i", help="The run's input: JSON, @FILE, or - for standard input.")] = "{}",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter", "-p", help="KEY=VALUE to put into the input; a VALUE that is no JSON is a text; may be repeated."
        ),
    ] = None,
    request_id: Annotated[str, typer.Option(help="Identity of the request; the same one twice is one run.")] = "",
    digest: Annotated[str, typer.Option(help="Version of the workflow; without it the newest.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE to find the run by; may be repeated.")
    ] = None,
    break_at: Annotated[
        list[str] | None, typer.Option("--break-at", help="A step before which the run stops; may be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow the run until it ends.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="With --wait: approve whatever the run asks for, in your name.")
    ] = False,
    timeout: Annotated[str, typer.Option(help="How long --wait waits: 90s, 10m, 2h; 0 for ever.")] = "10m",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")] = False,
) -> None:
    """Start a run: put a request on the topic, and print the run's id.

    With --wait the run is followed from Kafka itself, step by step, until it ends. On a terminal you are asked what it asks a
    person; elsewhere the command that answers is shown.

    For example:

        foldflow run market-analysis -p question="Which share was most volatile in 2005?" --wait

        foldflow run market-analysis --input @question.json --request-id order-17 --label team=research

        echo '{"question": "How did Apple do?"}' | foldflow run market-analysis --input - --wait --json

        foldflow run send-mails --wait --break-at send

    Exit codes: 0 completed (without --wait: sent), 1 the run failed or was cancelled, 2 refused (or a wrong option), 3 not over
    within --timeout, 4 Kafka can't be reached.
    """
    text = _with_parameters(json_text(input_, "--input"), pairs(parameter or [], "--parameter"))
    labels = pairs(label or [])
    patience = seconds(timeout)

    from events.commands import WorkflowRequest  # noqa: PLC0415 - not needed for mistakes in the options

    identity = request_id or str(uuid.uuid4())
    request = WorkflowRequest(workflow, text, identity, digest or None, labels, break_at=tuple(break_at or ()))
    send(request, wait=wait, yes=yes, patience=patience, as_json=as_json, again=bool(request_id))


def send(request: "WorkflowRequest", *, wait: bool, yes: bool, patience: float, as_json: bool, again: bool = False) -> None:
    """Send a request and follow its run if told to; ends the command. `again`: its run may be there already."""
    from events import ids, topics  # noqa: PLC0415 - Kafka and Avro
    from infra.cli.follow import Follower, Sent, as_line  # noqa: PLC0415
    from streams import kafka, schemas  # noqa: PLC0415
    from streams.envelope import Outgoing, envelope  # noqa: PLC0415

    settings = quiet(Settings())
    identity = request.request_id or ""
    run_id = ids.run_id(identity)
    record = envelope(topics.REQUESTS, identity, request, source="cli", identity=identity, run_id=run_id)
    if (size := len(record.value or b"")) > topics.MAX_VALUE_BYTES:
        fail(f"the input is too large: {size:,} bytes; the limit is {topics.MAX_VALUE_BYTES:,}", REFUSED)
    try:
        cluster = kafka.connect(settings, timeout_s=_CONNECT_S)
        partition = topics.partition_for(identity.encode(), cluster.partitions[topics.REQUESTS.name])
        sent = Sent(identity, run_id, kafka.name(settings, topics.REQUESTS), partition, again=again)
        follower = Follower(settings, cluster, sent) if wait else None
        schemas.publish(settings)  # before the first record, as every process does
        (offset,) = kafka.send(settings, [Outgoing(record.topic, record.key, record.value, record.headers, partition)])
    except (kafka.KafkaUnreachableError, kafka.DeliveryFailedError, kafka.TopicMismatchError) as error:
        fail(f"The request was not sent: {error}", UNREACHABLE)
    if follower is None:
        place = {"status": "sent", "topic": sent.topic, "partition": partition, "offset": offset}
        print(as_line({"run_id": run_id, "request_id": identity, **place}) if as_json else run_id)
        return
    from infra.cli.desk import Desk  # noqa: PLC0415

    follower.followed.offset = offset
    raise typer.Exit(_follow(follower, Desk(settings, cluster, yes=yes, silent=as_json), patience, as_json=as_json))


def _follow(follower: "Follower", desk: "Desk", patience: float, *, as_json: bool) -> int:
    """Show the run until it ends, and return the exit code."""
    from infra.cli.follow import as_line  # noqa: PLC0415
    from infra.cli.progress import display  # noqa: PLC0415

    followed = follower.followed
    sent = followed.sent
    if not as_json:
        print(sent.run_id, flush=True)
    try:
        with display(console(stderr=True), silent=as_json) as shown:
            for each in follower.changes(patience):
                shown.show(each)
                if not each.behind:
                    desk.answer(each.history, shown.aside)
            shown.show(followed)
    except KeyboardInterrupt:
        say(f"The run goes on. Look at it with: foldflow show {sent.run_id}")
        return 130
    finally:
        follower.close()
    if followed.refusal is not None:
        status, code = "refused", REFUSED
    elif not followed.over:
        status, code = ("unreachable", UNREACHABLE) if follower.away else ("timeout", TIMED_OUT)
    else:
        status = followed.history.state.status.name.lower()
        code = COMPLETED if status == "completed" else FAILED
    result = followed.result(status)
    if as_json:
        print(as_line(result))
    else:
        _tell(result, patience)
    return code


def _tell(result: dict[str, Any], patience: float) -> None:
    """Say how it ended; the output goes to standard output."""
    run_id = result["run_id"]
    match result["status"]:
        case "completed":
            output = result["output"]
            print(output if isinstance(output, str) else json.dumps(output, indent=2, ensure_ascii=False))
            say(f"Completed in {took(result['duration_ms'])}.")
            for kind in ("markdown", "html"):
                if isinstance(output, dict) and isinstance(output.get(kind), str) and Path(output[kind]).is_file():
                    say(f"Report ({kind}): {Path(output[kind]).absolute()}")
        case "failed":
            failure = result["failure"]
            where = f"step `{failure['step']}`: " if failure["step"] else ""
            say(f"Failed: {where}{failure['kind']}: {failure['message']}\nMore: foldflow show {run_id}")
        case "cancelled":
            by, reason = result["cancelled"]["by"], result["cancelled"]["reason"]
            say(f"Cancelled{f' by {by}' if by else ''}{f': {reason}' if reason else ''}.\nMore: foldflow show {run_id}")
        case "refused":
            say(f"Refused: {result['reason']}: {result['detail']}\nNo run was started: put that right and send it again.")
        case "unreachable":
            say(f"Not over after {took(patience * 1000)}, and Kafka can't be reached any more. Later: foldflow show {run_id}")
        case _:
            waiting = "it has no decision yet: are intake and orchestrator running (`foldflow status`)?"
            state = "it goes on." if "steps" in result else waiting
            say(f"Not over after {took(patience * 1000)}; {state} Look at it with: foldflow show {run_id}")
            for line in result.get("waiting", ()):
                say(line)


def seconds(text: str) -> float:
    """Return how long to wait, from what --timeout says. Raises typer.BadParameter."""
    from streams.workflow.times import milliseconds  # noqa: PLC0415 - pydantic

    if text.strip() == "0":
        return math.inf
    try:
        ms = milliseconds(f"{text}s" if text.isdigit() else text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--timeout") from error
    return float(ms) / 1000


def text_of(given: str, option: str) -> tuple[str, str]:
    """Return the text that an option gives, or that lies where it says (@FILE, -), and where that is.

    Raises typer.BadParameter when it can't be read.
    """
    if given == "-":
        return sys.stdin.read(), "standard input"
    if not given.startswith("@"):
        return given, option
    source = given[1:]
    try:
        return Path(source).read_text("utf-8"), source
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{source} can't be read: {error}", param_hint=option) from error


def json_text(given: str, option: str) -> str:
    """Return JSON text from where an option says. Raises typer.BadParameter that shows where it is no JSON."""
    given, source = text_of(given, option)
    try:
        json.loads(given, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        line = given.splitlines()[error.lineno - 1] if given.splitlines() else ""
        start = max(0, error.colno - 40)
        shown = f"\n  {line[start : error.colno + 40]}\n  {' ' * (error.colno - 1 - start)}^" if line else ""
        raise typer.BadParameter(f"{source} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}{shown}") from error
    except ValueError as error:
        raise typer.BadParameter(f"{source} is no JSON: {error}") from error
    return given


def _with_parameters(text: str, parameters: dict[str, str]) -> str:
    """Return the input's JSON text with single values put in. Raises typer.BadParameter when the input is no object."""
    if not parameters:
        return text
    given = json.loads(text)
    if not isinstance(given, dict):
        raise typer.BadParameter("--parameter goes into an object, but --input is none")
    for key, value in parameters.items():
        try:
            given[key] = json.loads(value, parse_constant=_no_constant)
        except ValueError:
            given[key] = value
    return json.dumps(given, ensure_ascii=False)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
