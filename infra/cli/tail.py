"""`foldflow tail`: the events on the topics, decoded."""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.terminal import clock, fail, quiet
from streams.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from infra.cli.records import Shown

_CONNECT_S: Final = 10.0
_CUT: Final = 300
"""Longest text within an event that is shown whole."""
_EFFECTS: Final = 50
"""How many effects of one decision are shown."""


def tail(
    topics: Annotated[list[str] | None, typer.Argument(help="Topics, with or without prefix; without any: all of ours.")] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f/-F", help="Go on as events come, until Ctrl-C.")] = True,
    beginning: Annotated[bool, typer.Option("--from-beginning", help="Begin with the first event that is kept.")] = False,
    last: Annotated[int, typer.Option("--last", "-n", min=0, help="Begin with the last so many events.")] = 10,
    run: Annotated[str, typer.Option(help="Only what belongs to this run (id, or its beginning), from its first event.")] = "",
    whole: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Show the events on our topics, decoded: where, when, key, headers and what they say.

    What can't be decoded is shown as such, with its bytes. For decisions that were read from their beginning (--run,
    --from-beginning) it says whether they count: the verdict of the filter that every reader goes through. A decision is told
    in words, a line for its input and one for each effect; --full and --json show all of it.

    For example:

        foldflow tail decisions deadletter

        foldflow tail --run 8f6a3a7e --no-follow

        foldflow tail requests --from-beginning --no-follow --json | jq .event

    Exit codes: 0 done, 2 there is no such topic, 4 Kafka can't be reached.
    """
    from infra.cli.records import Tail  # noqa: PLC0415 - Kafka and Avro
    from streams import kafka  # noqa: PLC0415

    settings = quiet(Settings())
    try:
        with Tail(settings, kafka.connect(settings, timeout_s=_CONNECT_S), chosen(settings, topics or []), run) as source:
            write = _as_json if as_json else _for_people(whole=whole)
            for shown in source.stored(None if beginning or run else last):
                write(shown)
            for shown in source.new() if follow else ():
                write(shown)
    except (kafka.KafkaUnreachableError, kafka.TopicMismatchError) as error:
        fail(str(error), 4)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered must not complain when the process ends.
        sys.stdout = None
        raise typer.Exit(0) from None


def chosen(settings: Settings, names: list[str]) -> list[str]:
    """Return our names of the topics that were asked for."""
    import difflib  # noqa: PLC0415

    from events.topics import TOPICS  # noqa: PLC0415

    chosen = [name if name in TOPICS else name.removeprefix(settings.topic_prefix) for name in names]
    for name in chosen:
        if name not in TOPICS:
            near = difflib.get_close_matches(name, TOPICS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TOPICS)}"
            fail(f"There is no topic {name}; {hint}", 2)
    return chosen or list(TOPICS)


def _as_json(shown: "Shown") -> None:
    record = shown.record
    line = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key": shown.key,
        "headers": shown.headers,
        "verdict": shown.verdict,
        "event": shown.event,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _for_people(*, whole: bool) -> Callable[["Shown"], None]:
    from rich.console import Console  # noqa: PLC0415

    console = Console(highlight=False, soft_wrap=True)
    return lambda shown: _print(console, shown, whole=whole)


def _print(console: "Console", shown: "Shown", *, whole: bool) -> None:
    from rich.json import JSON  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    record = shown.record
    event = dict(shown.event)
    title = Text.assemble(
        (clock(record.timestamp), "dim"),
        "  ",
        (record.topic, "bold cyan"),
        f"/{record.partition}@{record.offset}  ",
        (str(event.pop("type", "tombstone")), "bold"),
        f"  key {shown.key}",
    )
    if shown.verdict is not None:
        title.append(f"  {shown.verdict}", "green" if shown.verdict == "accepted" else "red")
    console.print(title)
    if shown.headers:
        console.print(Text("  " + "  ".join(f"{key}={value}" for key, value in shown.headers.items()), "dim"))
    if shown.event.get("type") == "Decision" and not whole:
        for line in decision_lines(event):
            console.print(Text(f"  {line}"))
        return
    text = json.dumps(event if whole else _cut(event), ensure_ascii=False)
    console.print(JSON(text, indent=2) if console.is_terminal else Text(f"  {text}"))


def decision_lines(event: dict[str, Any]) -> list[str]:
    """Return a decision in words: a line for its input, and one for each effect."""
    cause = dict(event["input"])
    kind = cause.pop("type")
    lines = [f"{event['seq']:>4} ← {kind} {_brief(cause)}"]
    lines += [f"     → {in_words(effect)}" for effect in event["effects"][:_EFFECTS]]
    if (more := len(event["effects"]) - _EFFECTS) > 0:
        lines.append(f"     … and {more:,} effects more; --full shows all")
    return lines


def in_words(effect: dict[str, Any]) -> str:
    """Return an effect in one line: its type, what it means, and what it brought."""
    from infra.cli.outcome import WORDS  # noqa: PLC0415 - Avro

    words = {kind.__name__: say for kind, say in WORDS.items()}.get(effect["type"])
    if words is None:  # a later version's
        return f"{effect['type']}  {_brief({key: value for key, value in effect.items() if key != 'type'})}"
    said = words(json.loads(json.dumps(effect), object_hook=lambda each: SimpleNamespace(**each)))
    brought = {key: effect[key] for key in _BROUGHT if effect.get(key) not in (None, "", [])}
    return " ".join(f"{effect['type']}  {said}{'  ' if brought else ''}{_brief(brought) if brought else ''}".splitlines())


_BROUGHT: Final = (
    *("output", "source", "arguments", "input", "value", "message", "by", "reason", "correlation", "call_id", "run_id"),
    *("outcome", "not_undone"),
)
"""Fields that say more than the words for an effect do."""


def _brief(event: dict[str, Any]) -> str:
    text = " ".join(json.dumps(event, ensure_ascii=False).split())
    return text if len(text) <= _CUT else f"{text[:_CUT]} …"


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _CUT:
        return f"{value[:_CUT]} … ({len(value):,} characters; --full shows all)"
    if isinstance(value, dict):
        return {key: _cut(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_cut(each) for each in value]
    return value
