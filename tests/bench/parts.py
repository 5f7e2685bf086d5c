"""The parts of a step: what each role does with a record, and the stages within it, as real functions by their names."""

import asyncio
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

import way

from events import topics
from streams.envelope import Incoming

SETTLE_AT: Final = 500
"""How many inputs a tenure takes until they are settled."""
OURS: Final = ("events.", "streams.", "tools.")


@dataclass(frozen=True)
class Part:
    """A role's work. `whole` goes through a log; `stages`: by name, functions within it; `rest`: what else is in the whole.

    A function that is called by another stage's counts there. `source`: the topic it reads, `reads`: what that is called in a
    log; `ce_source`: by what it writes is known.
    """

    whole: Callable[[way.Log], Callable[[], Any]]
    rest: str
    source: topics.Topic
    reads: str
    ce_source: bytes
    stages: dict[str, tuple[str, ...]]


def judged(log: way.Log) -> Callable[[], Any]:
    """Let intake judge all requests."""
    return partial(_each, way.intake().check, log.requests)


def taken(log: way.Log) -> Callable[[], Any]:
    """Let a tenure take all inputs, and settle them now and then."""
    owner = way.tenure()

    def all_of_them() -> None:
        for at in range(0, len(log.inbox), SETTLE_AT):
            _each(owner.take, log.inbox[at : at + SETTLE_AT])
            way.settle(owner)

    return all_of_them


def _each(work: Callable[[Incoming], Any], records: list[Incoming]) -> None:
    for record in records:  # what comes of it isn't kept: to find room for all of it would be part of the cost
        work(record)


def called(log: way.Log) -> Callable[[], Any]:
    """Let a tool worker make all calls, 128 at once."""
    worker = way.tools()

    async def all_of_them() -> None:
        for at in range(0, len(log.calls), 128):
            await way.made(worker, log.calls[at : at + 128])

    return lambda: asyncio.run(all_of_them())


HEADERS: Final = ("streams.envelope:cloud_event", "streams.envelope:traceparent")
PARTS: Final = {
    "intake": Part(
        judged,
        "the rest of Intake.check",
        topics.REQUESTS,
        "requests",
        b"/foldflow/intake",
        {
            "decode": ("streams.processors.requests:decode",),
            "check the input": ("streams.workflow.spec:WorkflowSpec.check_input",),
            "ids": ("events.ids:run_id", "events.ids:position_request_id"),
            "encode": ("events.codec:encode",),
            "headers": HEADERS,
        },
    ),
    "orchestrator": Part(
        taken,
        "the rest of Tenure",
        topics.INBOX,
        "inbox",
        b"/foldflow/orchestrator",
        {
            "decode": ("streams.processors.inputs:readable",),
            "decide": ("streams.workflow.decider:decide",),
            "encode": ("events.codec:body", "events.codec:framed"),
            "hash": ("events.ids:chain_hash", "events.ids:effect_id"),
            "fold": ("streams.workflow.evolve:evolve",),
            "headers": HEADERS,
        },
    ),
    "tool": Part(
        called,
        "the rest of ToolCalls, and its task",
        topics.TOOL_CALLS,
        "calls",
        b"/foldflow/tool-worker",
        {
            "decode": ("streams.processors.calls:read",),
            "arguments": ("streams.workflow.expressions:from_json",),
            "output": ("streams.workflow.expressions:to_json",),
            "circuit": ("streams.processors.breaker:Breakers.attempt", "streams.processors.breaker:Attempt.answered"),
            "encode": ("events.codec:encode",),
            "headers": HEADERS,
        },
    ),
}
"""By role. Where the code moves, mend the names here: one that is gone is an error."""


Watch = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Is given a stage, and a function of it with its arguments, calls it and returns what it returns."""


class Recorder:
    """Keeps what is called, by stage, to be called again."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Callable[[], Any]]] = {}

    def __call__(self, stage: str, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Keep a call, and make it."""
        self.calls.setdefault(stage, []).append(partial(function, *arguments, **named))
        return function(*arguments, **named)


def _ours() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(OURS)]


def forget() -> None:
    """Empty the caches of bounded size: they know the records of a log that is gone through again."""
    for module in _ours():
        for value in list(vars(module).values()):
            if hasattr(value, "cache_parameters") and value.cache_parameters()["maxsize"] is not None:
                value.cache_clear()


@contextmanager
def watched(stages: dict[str, tuple[str, ...]], watch: Watch) -> Iterator[None]:
    """Let `watch` make the calls of these functions, wherever they were imported to, but for those within another one of them."""
    undo, inside = list[Callable[[], None]](), False

    def wrapped(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*arguments, **named)
            inside = True
            try:
                return watch(stage, function, arguments, named)
            finally:
                inside = False

        return call

    for stage, names in stages.items():
        for name in names:
            module, _, path = name.partition(":")
            owner: Any = importlib.import_module(module)
            *around, last = path.split(".")
            for each in around:
                owner = getattr(owner, each)
            function = owner.__dict__.get(last)
            if not callable(function) or inspect.isclass(function) or inspect.isgeneratorfunction(function):
                sys.exit(f"parts.py: there is no plain function {name} (any more); mend PARTS there")
            for place in [owner] if around else _ours():
                for known, value in list(vars(place).items()):
                    if value is function:
                        undo.append(partial(setattr, place, known, function))
                        setattr(place, known, wrapped(stage, function))
    try:
        yield
    finally:
        for each in undo:
            each()
