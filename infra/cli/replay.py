"""`foldflow replay`: steps through a run as it stands on the log: the state after each decision, and what each changed."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra.cli.naming import is_beginning, is_id, whole_id
from infra.cli.terminal import clock, console, fail, quiet, took
from infra.cli.verify import From, opened, unusable
from streams.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from projections.replay import Change, Moment
    from projections.replay_sources import Source, Span

FOUND, UNUSABLE = 1, 2
_VALUE: Final = 90
_CHANGES: Final = 12
_STEPS: Final = 40
_KEYS: Final = {
    **dict.fromkeys(("\x1b[C", "\x1b[B", "n", " ", "\r", "\n", "l", "j"), "next"),
    **dict.fromkeys(("\x1b[D", "\x1b[A", "p", "\x7f", "h", "k"), "back"),
    **dict.fromkeys(("\x1b[H", "g"), "first"),
    **dict.fromkeys(("\x1b[F", "G"), "last"),
    **dict.fromkeys(("q", "\x1b", "\x03", "\x04", ""), "quit"),
    "s": "state",
    ":": "jump",
    "/": "jump",
}
_HELP: Final = "→ n next   ← p back   g first   G last   : jump to a decision or a time   s all values   q quit"


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or the beginning of it, or a request's id.")],
    at: Annotated[
        str, typer.Option("--at", metavar="SEQ|TIME", help="Only the state after this decision, or at this time (ISO 8601).")
    ] = "",
    from_: From = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Step through a run: the state after each decision, and what the decision changed. Nothing is called and nothing written.

    At a terminal by keys: forwards, backwards, to a decision's number or a time. Elsewhere all steps are printed.

    For example:

        foldflow replay 8f6a3a7e

        foldflow replay order-17 --at 12

        foldflow replay 8f6a3a7e --at 2026-03-01T09:30 --json

        foldflow replay 8f6a3a7e --from archive/ | less

    Recorded histories are decided again by `foldflow verify --file` and `foldflow backtest --file`.

    Exit codes: 0 shown, 1 a decision fits no state of its run (`foldflow verify` says why), 2 a wrong option, no such run,
    decision or archive, 4 Kafka can't be reached.
    """
    steps = read_run(from_, run)
    if at:
        show_state(at_place(steps, at), as_json=as_json)
    elif as_json:
        found = {"run_id": steps[0].decision.run_id, "steps": [step_json(each) for each in steps]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif sys.stdin.isatty() and sys.stdout.isatty():
        _by_keys(steps)
    else:
        for each in steps:
            print("\n".join(_lines(each, steps[0].decision.at)))


def read_run(archive: Path | None, run: str) -> "list[Moment]":
    """Return all that is recorded of a run; ends the command if there is none."""
    from projections.replay import FitsNoStateError, moments  # noqa: PLC0415 - Kafka, Avro, Arrow

    settings = quiet(Settings())
    with unusable():
        source = opened(settings, archive)
        try:
            for run_id in ids_of(source, run):
                if steps := list(moments(source, run_id, spans_of(source, run_id))):
                    return steps
        except FitsNoStateError as error:
            fail(f"{error}; `foldflow verify {run}` says why.", FOUND)
    return fail(f"There is no run `{run}` in {source.name}. `foldflow runs` lists them.", UNUSABLE)


def ids_of(source: "Source", run: str) -> Iterator[str]:
    """Yield the ids that a person may mean: a run's, a request's, the beginning of a run's."""
    from events.ids import run_id  # noqa: PLC0415
    from projections.replay_sources import KafkaLog, run_of  # noqa: PLC0415

    if is_id(run):
        yield run
    yield run_id(run)
    if not is_beginning(run):
        return
    if isinstance(source, KafkaLog):
        whole = whole_id(run)
        yield from () if whole is None else (whole,)
        return
    there = {
        named
        for partition, span in source.spans().items()
        for record in source.records(partition, span)
        if (named := run_of(record.value)) is not None and named.startswith(run.encode())
    }
    if len(there) > 1:
        fail(f"{len(there)} runs in {source.name} begin with {run}: give more digits of the id.", UNUSABLE)
    yield from (each.decode() for each in there)


def spans_of(source: "Source", run_id: str) -> "Mapping[int, Span]":
    """Return where a run can be: in one partition, if it is known how many there are."""
    from events.topics import partition_for  # noqa: PLC0415

    spans, count = source.spans(), source.whole_topic
    if count is None:
        return spans
    mine = partition_for(run_id.encode(), count)
    return {mine: spans[mine]}


def at_place(steps: "Sequence[Moment]", place: str) -> "Moment":
    """Return the step that a decision's number, or a time, names; ends the command if there is none."""
    index = found_at(steps, place)
    if isinstance(index, str):
        fail(index, UNUSABLE)
    return steps[index]


def found_at(steps: "Sequence[Moment]", place: str) -> int | str:
    """Return the index of the step that a decision's number, or a time, names; a text says why there is none."""
    last = steps[-1].decision.seq
    if place.isdigit():
        first = steps[0].decision.seq
        return int(place) - first if first <= int(place) <= last else f"There is no decision {place}: they are {first} to {last}."
    try:
        ms = datetime.fromisoformat(place).timestamp() * 1000
    except ValueError:
        return f"`{place}` is neither a decision's number nor a time: 12, 2026-03-01T09:30, 2026-03-01T09:30:00Z."
    before = [index for index, each in enumerate(steps) if each.decision.at <= ms]
    return before[-1] if before else f"The run began at {clock(steps[0].decision.at)}, after that."


# --- One state, and one step ---


def step_json(step: "Moment") -> dict[str, Any]:
    """Return a step as JSON: the decision, where it stands, and what it changed."""
    from events.as_json import as_json  # noqa: PLC0415
    from projections.replay import changes, moment  # noqa: PLC0415

    decision = step.decision
    return {
        "seq": decision.seq,
        "at": moment(decision.at),
        "partition": step.partition,
        "offset": step.offset,
        "hash": step.hash.hex(),
        "input": as_json(decision.input),
        "effects": [as_json(effect) for effect in decision.effects],
        "changes": [{"what": each.what, "before": each.before, "after": each.after} for each in changes(step.before, step.after)],
    }


def show_state(step: "Moment", *, as_json: bool) -> None:
    """Print the state that a decision left."""
    from projections.replay import moment, state_json  # noqa: PLC0415

    if as_json:
        place = {"partition": step.partition, "offset": step.offset, "at": moment(step.decision.at)}
        found = {"run_id": step.decision.run_id, **place, **state_json(step.after)}
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    terminal = console()
    terminal.print(_state(step, whole=True))


def _lines(step: "Moment", began: int) -> list[str]:
    """Return a step as lines of text."""
    from projections.replay import changes  # noqa: PLC0415
    from streams.testing.timeline import input_in_words  # noqa: PLC0415

    decision = step.decision
    title = f"{decision.seq:>4}  {clock(decision.at)}  +{took(decision.at - began)}  {input_in_words(decision.input)}"
    return [
        title,
        *(f"      → {each}" for each in _effects(step)),
        *(f"        {_told(each)}" for each in changes(step.before, step.after)),
    ]


def _effects(step: "Moment") -> list[str]:
    from streams.testing.timeline import effects_in_words  # noqa: PLC0415

    return [effects_in_words([effect], step.decision.at) for effect in step.decision.effects]


def _told(change: "Change") -> str:
    if change.before in (None, "", []):
        return f"{change.what} = {_short(change.after)}"
    if change.after is None:
        return f"{change.what} is gone (was {_short(change.before)})"
    return f"{change.what}: {_short(change.before)} → {_short(change.after)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= _VALUE else f"{text[: _VALUE - 1]}…"


def _value(value: Any, *, whole: bool) -> str:
    """Return a value as it is, or cut; a text as a text."""
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) if whole else _short(value)


def _state(step: "Moment", *, whole: bool) -> "RenderableType":
    """Return the state after a decision: the run, its steps, and what it waits for."""
    from rich.console import Group  # noqa: PLC0415 - 0.1 s
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from infra.cli.progress import look  # noqa: PLC0415
    from projections.replay import state_json  # noqa: PLC0415
    from streams.testing.timeline import waits  # noqa: PLC0415

    state, decision = step.after, step.decision
    found = state_json(state)
    sign, style = look(found["status"])
    head = Text.assemble(
        *((f"run {decision.run_id}  ", "bold"), (f"{sign} {found['status']}", style)),
        f"  after decision {decision.seq}, {clock(decision.at)}  ({state.workflow} {state.digest[:12]})",
    )
    said_ = Column("output, or why not", no_wrap=not whole, overflow="fold" if whole else "ellipsis")
    table = Table("step", "", "attempt", said_, box=None)
    shown = list(found["steps"].items())[: None if whole else _STEPS]
    for path, each in shown:
        sign, style = look(each["status"])
        said = each.get("output") if each.get("failure") is None else f"{each['failure']['kind']}: {each['failure']['message']}"
        text = "" if said is None else _value(said, whole=whole)
        table.add_row(Text(path), Text(f"{sign} {each['status']}", style), str(each.get("attempt", "")), Text(text))
    rest = [Text(f"waits for {line}", "yellow") for line in waits(state, decision.at)] if not state.over else []
    if (left := len(found["steps"]) - len(shown)) > 0:
        table.add_row(f"… and {left:,} more")
    given = [Text(f"input   {_value(found['input'], whole=whole)}")] if whole else []
    ended = [Text(f"output  {_value(found['output'], whole=whole)}")] if state.output else []
    return Group(head, *given, *ended, table, *rest)


# --- By keys ---


@dataclass(frozen=True, slots=True)
class Place:
    """Where somebody stands who steps through a run. `index`: of the step; `whole`: with all values; `typed`: a jump so far."""

    index: int = 0
    whole: bool = False
    typed: str | None = None
    said: str = ""
    over: bool = False


def pressed(steps: "Sequence[Moment]", place: Place, key: str) -> Place:
    """Return where one stands after a key."""
    place = replace(place, said="")
    if place.typed is not None:
        return _typed(steps, place, key)
    if key.isdigit():
        return replace(place, typed=key)
    match _KEYS.get(key):
        case "next" if place.index == len(steps) - 1:
            return replace(
                place, said="that was the last decision" if steps[-1].after.over else "that is the last decision so far"
            )
        case "next":
            return replace(place, index=place.index + 1)
        case "back" if place.index == 0:
            return replace(place, said="that was the first decision")
        case "back":
            return replace(place, index=place.index - 1)
        case "first":
            return replace(place, index=0)
        case "last":
            return replace(place, index=len(steps) - 1)
        case "state":
            return replace(place, whole=not place.whole)
        case "jump":
            return replace(place, typed="")
        case "quit":
            return replace(place, over=True)
        case _:
            return place


def _typed(steps: "Sequence[Moment]", place: Place, key: str) -> Place:
    assert place.typed is not None
    if key in ("\r", "\n"):
        found = found_at(steps, place.typed) if place.typed else place.index
        return replace(place, typed=None, said=found) if isinstance(found, str) else replace(place, typed=None, index=found)
    if key in ("\x1b", "\x03", ""):
        return replace(place, typed=None)
    if key == "\x7f":
        return replace(place, typed=place.typed[:-1])
    return replace(place, typed=place.typed + key if key.isprintable() else place.typed)


def _by_keys(steps: "Sequence[Moment]") -> None:
    from rich.live import Live  # noqa: PLC0415 - 0.1 s

    place = Place()
    with _unbuffered() as fd, Live(_screen(steps, place), screen=True, auto_refresh=False) as live:
        while not place.over:
            place = pressed(steps, place, os.read(fd, 16).decode("utf-8", "replace"))
            live.update(_screen(steps, place), refresh=True)


@contextmanager
def _unbuffered() -> Iterator[int]:
    """Let each key be read as it is pressed."""
    import termios  # noqa: PLC0415 - not everywhere
    import tty  # noqa: PLC0415

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        termios.tcsetattr(fd, termios.TCSADRAIN, [*_cooked_output(termios.tcgetattr(fd), before)])
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _cooked_output(raw: list[Any], before: list[Any]) -> list[Any]:
    """Return raw input with output as it was: lines still begin at the left."""
    return [raw[0], before[1], *raw[2:]]


def _screen(steps: "Sequence[Moment]", place: Place) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415 - 0.1 s
    from rich.panel import Panel  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from projections.replay import changes  # noqa: PLC0415
    from streams.testing.timeline import input_in_words  # noqa: PLC0415

    step, began = steps[place.index], steps[0].decision.at
    decision = step.decision
    told = changes(step.before, step.after)
    lines = [
        Text(f"+ {_told(each)}" if each.before is None else f"~ {_told(each)}", "green" if each.before is None else "yellow")
        for each in told[:_CHANGES]
    ]
    if len(told) > _CHANGES:
        lines.append(Text(f"… and {len(told) - _CHANGES:,} changes more", "dim"))
    place_ = f"partition {step.partition}, offset {step.offset}"
    title = f"decision {decision.seq} of {steps[-1].decision.seq}   +{took(decision.at - began)}   {place_}"
    came = Text.assemble(("← ", "bold cyan"), input_in_words(decision.input))
    follows = [Text.assemble(("→ ", "bold cyan"), each) for each in _effects(step)[:_CHANGES]]
    asked = Text(
        f"jump to: {place.typed}▏" if place.typed is not None else place.said or _HELP,
        "bold" if place.typed is not None else "dim",
    )
    return Group(
        asked,  # on top: what is too long for the terminal is cut below
        Panel(Group(came, *follows), title=title, title_align="left"),
        Panel(Group(*lines) if lines else Text("nothing", "dim"), title="what it changed", title_align="left"),
        _state(step, whole=place.whole),
    )
