"""`foldflow deadletters`: what couldn't be processed; put on its topic again, or discarded."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import clock, console, fail, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from events.decisions import DeadLetter, DeadLetterSettled
    from infra.cli.letters import Entry, Letters

NOT_DONE, UNUSABLE, UNREACHABLE = 1, 2, 4
_CONNECT_S: Final = 10.0
_DUMPED: Final = 512
"""How many bytes of a value are shown that is neither JSON nor Avro of ours."""

deadletters = typer.Typer(help="Dead letters: messages that couldn't be processed.", no_args_is_help=True)

_PLACE_HELP: Final = (
    "Where the message was: TOPIC/PARTITION/OFFSET; the topic with or without prefix; its end, if that is the only one."
)
Place = Annotated[str, typer.Argument(metavar="PLACE", help=_PLACE_HELP, show_default=False)]
Reason = Annotated[str, typer.Option("--reason", help="Only those with this reason: unknown_workflow, …", show_default=False)]
Topic = Annotated[str, typer.Option("--topic", help="Only those of this topic.", show_default=False)]
Since = Annotated[str, typer.Option("--since", help="Only those that came within this time: 2h, 3d.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
By = Annotated[str, typer.Option("--by", help="Who does it; without it your login name.", show_default=False)]
Why = Annotated[str, typer.Option("--why", help="Why: it stands in the letter's history.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@deadletters.command("list")
def list_(
    open_: Annotated[
        bool, typer.Option("--open", help="Those about which nothing was done yet (if nothing else is said).")
    ] = False,
    settled: Annotated[bool, typer.Option("--settled", help="Those that were redriven or discarded.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    reason: Reason = "",
    topic: Topic = "",
    since: Since = "",
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first, and what was done about them.

    For example:

        foldflow deadletters list --since 2h

        foldflow deadletters list --all --reason unknown_workflow --json

    Exit codes: 0 listed, 2 a wrong option, 4 Kafka can't be reached.
    """
    if open_ + settled + all_ > 1:
        fail("Say one of --open, --settled and --all.", UNUSABLE)
    with _letters() as (settings, letters):
        chosen = _filtered(settings, letters.read(), reason, topic, since)
    if not all_:
        chosen = [entry for entry in chosen if (entry.status != "open") == settled]
    if as_json:
        print(json.dumps([_as_json(entry) for entry in chosen], indent=2, ensure_ascii=False))
        return
    _print_table(chosen)


@deadletters.command()
def show(place: Place, as_json: AsJson = False) -> None:
    """Show a dead letter: why it is one, the message as far as it can be read, what was done about it, and what can be.

    For example:

        foldflow deadletters show requests/3/17

        foldflow deadletters show foldflow.inbox/0/4711 --json | jq .value

    Exit codes: 0 shown, 2 there is no such dead letter, 4 Kafka can't be reached.
    """
    from infra.cli.letters import NotRedrivableError, source_topic  # noqa: PLC0415 - Kafka and Avro

    with _letters() as (settings, letters):
        entry = _found(letters.read(), settings, place)
        whole = letters.whole(entry)
    try:
        source_topic(settings, entry)
        then = _NEXT.get(entry.letter.reason, _NEXT[""])
    except NotRedrivableError as error:
        then = str(error)
    if as_json:
        print(json.dumps(_as_json(entry) | _contents(whole) | {"next": then}, indent=2, ensure_ascii=False))
        return
    _print_one(entry, whole, then)


@deadletters.command()
def redrive(  # noqa: PLR0913, PLR0917 - a command's options
    place: Place = "",
    reason: Reason = "",
    topic: Topic = "",
    since: Since = "",
    all_: Annotated[bool, typer.Option("--all", help="All that are open.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was redriven or discarded before.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    by: By = "",
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Put messages on their topics again: the same bytes, key and headers, on the partition that the key belongs to.

    Put right first what was wrong: deploy the workflow, upgrade the process. A message that is refused again is a new dead
    letter, whose header `foldflow_redriven` says where it was first. Nothing is ever put on `decisions`: history is written by
    its owner alone.

    The message is sent first and noted as redriven when Kafka has it. A crash in between leaves it open, and redriving it again
    sends it twice. That is harmless for what has an identity of its own: a request with a `request_id` is the same run, a result
    that its run has had is ignored, a worker's repeated call has the same `call_id`. A request without `request_id` keeps the
    identity of the place where it stood first. A signal without `signal_id`, and any other command, counts again.

    For example:

        foldflow deadletters redrive requests/3/17

        foldflow deadletters redrive --reason unknown_workflow --since 2h --dry-run

    Exit codes: 0 done, 1 not all could be redriven (or you said no), 2 there is no such dead letter, or a wrong option,
    4 Kafka can't be reached.
    """
    from infra.cli.letters import NotRedrivableError, Settler, source_topic, written  # noqa: PLC0415 - Kafka and Avro

    with _letters() as (settings, letters):
        chosen = _chosen(settings, letters, place, (reason, topic, since), all_=all_, again=again)
        report: list[dict[str, Any]] = []

        def tell(entry: "Entry", result: "DeadLetterSettled | NotRedrivableError | None") -> None:
            error = where = None
            if isinstance(result, NotRedrivableError):
                error = str(result)
            elif result is not None:
                where = f"{result.topic}/{result.to_partition}/{result.to_offset}"
            report.append({"place": written(entry.place), "redriven_to": where, "problem": error})
            if not as_json:
                say(error or f"{written(entry.place)}: {'redriven, now ' + where if where else 'would be redriven'}")

        if dry_run:
            for entry in chosen:
                try:
                    source_topic(settings, entry)
                    tell(entry, None)
                except NotRedrivableError as error:
                    tell(entry, error)
        elif chosen:
            _confirm(f"Redrive {_counted(chosen)}?", len(chosen), yes=yes or bool(place))
            settler = Settler(settings, letters, _who(by), why)
            _with_progress(settler.redrive(chosen), len(chosen), tell, as_json=as_json)
    _conclude(report, as_json=as_json)


@deadletters.command()
def discard(  # noqa: PLR0913, PLR0917 - a command's options
    place: Place = "",
    reason: Reason = "",
    topic: Topic = "",
    since: Since = "",
    all_: Annotated[bool, typer.Option("--all", help="All that are open.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    by: By = "",
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Note that nothing is to be done about dead letters any more. They stay on the topic, with who said so and why.

    For example:

        foldflow deadletters discard requests/3/17 --why "sent again, corrected"

        foldflow deadletters discard --reason not_decodable --since 2h --yes

    Exit codes: 0 done, 1 you said no, 2 there is no such dead letter, or a wrong option, 4 Kafka can't be reached.
    """
    from infra.cli.letters import Settler, written  # noqa: PLC0415 - Kafka and Avro

    with _letters() as (settings, letters):
        chosen = _chosen(settings, letters, place, (reason, topic, since), all_=all_, again=False)
        if not dry_run and chosen:
            _confirm(f"Discard {_counted(chosen)}?", len(chosen), yes=yes or bool(place))
            Settler(settings, letters, _who(by), why).discard(chosen)
    report = [{"place": written(entry.place), "problem": None} for entry in chosen]
    if not as_json:
        for each in report:
            say(f"{each['place']}: {'would be discarded' if dry_run else 'discarded'}")
    _conclude(report, as_json=as_json)


# --- Which ones ---


@contextmanager
def _letters() -> "Iterator[tuple[Settings, Letters]]":
    """Give a connection to the dead letters; ends the command when Kafka can't be reached."""
    from infra.cli.letters import Letters  # noqa: PLC0415 - Kafka and Avro
    from streams import kafka  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        letters = Letters(settings, kafka.connect(settings, timeout_s=_CONNECT_S))
        try:
            yield settings, letters
        finally:
            letters.close()
    except (kafka.KafkaUnreachableError, kafka.DeliveryFailedError, kafka.TopicMismatchError) as error:
        fail(str(error), UNREACHABLE)


def _chosen(
    settings: Settings, letters: "Letters", place: str, filters: tuple[str, str, str], *, all_: bool, again: bool
) -> "list[Entry]":
    """Return the dead letters that are meant; ends the command if that can't be said."""
    if bool(place) == (any(filters) or all_):
        fail("Which ones? Say either PLACE, or some of --reason, --topic, --since, or --all.", UNUSABLE)
    entries = letters.read()
    if place:
        entry = _found(entries, settings, place)
        if entry.status != "open" and not again:
            last = entry.settled[-1]
            fail(
                f"{place} was {last.action} by {last.by} at {clock(last.at)}; `redrive --again` puts it on its topic once more",
                NOT_DONE,
            )
        return [entry]
    chosen = _filtered(settings, entries, *filters)
    chosen = chosen if again else [entry for entry in chosen if entry.status == "open"]
    if not chosen:
        say("There are no such dead letters.")
    return chosen


def _filtered(settings: Settings, entries: "list[Entry]", reason: str, topic: str, since: str) -> "list[Entry]":
    import time  # noqa: PLC0415

    from streams.workflow.times import milliseconds  # noqa: PLC0415

    try:
        after = time.time() * 1000 - milliseconds(since) if since else None
    except ValueError as error:
        fail(f"--since: {error}", UNUSABLE)
    names = {topic, settings.topic_prefix + topic}
    return [
        entry
        for entry in entries
        if (not reason or entry.letter.reason == reason)
        and (not topic or entry.letter.topic in names)
        and (after is None or entry.at >= after)
    ]


def _found(entries: "list[Entry]", settings: Settings, place: str) -> "Entry":
    """Return the dead letter that a place, or the end of one, names; ends the command if there is none, or several."""
    from infra.cli.letters import written  # noqa: PLC0415 - Kafka and Avro

    exact = [entry for entry in entries if written(entry.place) in {place, settings.topic_prefix + place}]
    found = exact or [entry for entry in entries if written(entry.place).endswith(f"/{place}")]
    if not found:
        fail(f"There is no dead letter {place}. `foldflow deadletters list --all` lists them.", UNUSABLE)
    if len(found) > 1:
        fail(f"{place} may be {', '.join(written(entry.place) for entry in found[:10])}: say which.", UNUSABLE)
    return found[0]


def _who(by: str) -> str:
    from infra.cli.telling import who  # noqa: PLC0415 - Avro

    return who(by)


def _confirm(question: str, count: int, *, yes: bool) -> None:
    """Ask at a terminal; ends the command at a no."""
    from infra.cli.asking import at_terminal  # noqa: PLC0415

    if count and not yes and at_terminal() and not typer.confirm(question, err=True):
        fail("Nothing was done.", NOT_DONE)


def _counted(entries: "list[Entry]") -> str:
    from collections import Counter  # noqa: PLC0415

    reasons = Counter(entry.letter.reason for entry in entries)
    parts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
    return f"{len(entries):,} dead letter{'s' * (len(entries) > 1)} ({parts})"


# --- What is said ---

_NEXT: Final = {
    "unknown_workflow": "register the workflow (`foldflow deploy FILE`), then redrive it",
    "invalid_input": "send a corrected request and discard this; redriving helps only when the workflow has changed since",
    "unknown_step": "send a corrected request and discard this; redriving helps when a version with that step is deployed",
    "not_decodable": "send it anew as the topic's schema says and discard this; redriving helps when newer code can read it",
    "unreadable": "who wrote it must write it anew; redriving helps when newer code can read it",
    "unknown_run": "is its request refused, or still to come? Redriving helps once the run exists",
    "too_large": "send less, or a reference to it, and discard this",
    "internal": "a fault of intake: see its log; redrive it when that is mended",
    "set_aside": "the run's history is broken (`foldflow runs`); redriving helps once it is restored",
    "": "put right what its reason says, then redrive it; or discard it",
}
"""What to do next, by reason."""


def _as_json(entry: "Entry") -> dict[str, Any]:
    from events.as_json import as_json  # noqa: PLC0415
    from infra.cli.letters import written  # noqa: PLC0415 - Kafka and Avro

    letter = entry.letter
    return {
        "place": written(entry.place),
        "status": entry.status,
        "reason": letter.reason,
        "detail": letter.detail,
        "received": letter.timestamp,
        "dead_since": entry.at,
        "request_id": letter.request_id,
        "run_id": letter.run_id,
        "size": entry.size,
        "cut": [part for part in entry.cut.split(",") if part],
        "history": [as_json(settled) for settled in entry.settled],
    }


def _contents(letter: "DeadLetter") -> dict[str, Any]:
    from events.as_json import readable  # noqa: PLC0415

    form, value = decoded(letter.value)
    headers = {name: readable(header) for name, header in letter.headers.items()}
    return {"key": readable(letter.key), "headers": headers, "form": form, "value": value}


def decoded(value: bytes | None) -> tuple[str, Any]:
    """Return what form a value has (`none`, `json`, the name of an Avro type, or `bytes`), and it as JSON."""
    from events import codec  # noqa: PLC0415 - Avro
    from events.as_json import as_json  # noqa: PLC0415
    from events.errors import NotDecodableError  # noqa: PLC0415
    from streams.workflow.expressions import EvaluationError, from_json  # noqa: PLC0415

    if value is None:
        return "none", None
    if (kind := codec.kind_of(value)) is not None:
        try:
            return kind.__name__, as_json(codec.decode(value, kind))
        except (NotDecodableError, RecursionError):
            return "bytes", value.hex()
    try:
        return "json", from_json(value.decode())
    except (UnicodeDecodeError, EvaluationError):
        return "bytes", value.hex()


def _print_table(entries: "list[Entry]") -> None:
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from infra.cli.letters import written  # noqa: PLC0415 - Kafka and Avro

    table = Table("dead since", Column("message", no_wrap=True), "reason", "", "detail", box=None)
    for entry in entries:
        detail = " ".join(entry.letter.detail.split())[:200]
        table.add_row(_clock(entry.at), Text(written(entry.place)), Text(entry.letter.reason), entry.status, Text(detail))
    if entries:
        console().print(table)
    else:
        say("There are no such dead letters.")


def _print_one(entry: "Entry", whole: "DeadLetter", then: str) -> None:
    from infra.cli.letters import written  # noqa: PLC0415 - Kafka and Avro

    contents, letter = _contents(whole), entry.letter
    print(f"{written(entry.place)}  {entry.status}  {letter.reason}: {letter.detail}")
    print(f"written {_clock(letter.timestamp)}, a dead letter since {_clock(entry.at)}")
    for name, said in (("run", letter.run_id), ("request", letter.request_id), ("key", contents["key"])):
        if said is not None:
            print(f"{name}: {said}")
    for name, header in contents["headers"].items():
        print(f"header {name}: {header}")
    print("value: none, a tombstone" if whole.value is None else f"value: {len(whole.value):,} bytes, {contents['form']}")
    if contents["form"] == "bytes" and whole.value is not None:
        print("\n".join(hexdump(whole.value[:_DUMPED])))
        if len(whole.value) > _DUMPED:
            print(f"… and {len(whole.value) - _DUMPED:,} bytes more; --json shows all")
    elif whole.value is not None:
        print(json.dumps(contents["value"], indent=2, ensure_ascii=False))
    for settled in entry.settled:
        where = "" if settled.to_offset is None else f", now {letter.topic}/{settled.to_partition}/{settled.to_offset}"
        print(f"{_clock(settled.at)}  {settled.action} by {settled.by}{f': {settled.reason}' if settled.reason else ''}{where}")
    if entry.status == "open":
        print(f"next: {then}")


def hexdump(value: bytes) -> Iterator[str]:
    """Yield lines of 16 bytes: where, hexadecimal, and what is printable of them."""
    for at in range(0, len(value), 16):
        line = value[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)  # noqa: PLR2004 - printable ASCII
        yield f"{at:08x}  {line.hex(' '):<47}  {text}"


def _clock(ms: int) -> str:
    """Write a time; one that no calendar has (anybody can write any) as its number."""
    try:
        return clock(ms)
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"


def _with_progress(results: Any, total: int, tell: Callable[[Any, Any], None], *, as_json: bool) -> None:
    for number, (entry, result) in enumerate(results, 1):
        tell(entry, result)
        if not as_json and total > 100 and number % 100 == 0:  # noqa: PLR2004 - what is sent at once
            say(f"… {number:,} of {total:,}")


def _conclude(report: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    if any(each["problem"] for each in report):
        raise typer.Exit(NOT_DONE)
