"""Recorded histories: a run's decisions in a file, decided again by today's code, or by another version of the workflow.

A file is one JSON document: `spec` (the definition in its canonical form; null if nobody knew it), `decisions` (each a Kafka
value, Confluent's framing and Avro, in base64), `payloads` (the large values that they refer to, by digest), and `head` (the
last decision's hash). It holds all the run's data, secrets too if there were some.
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from events import codec
from events.commands import StartRun
from events.decisions import Decision, Effect, InputIgnored, RunFailed, UnreadableInput
from events.errors import NotDecodableError
from events.failure import FailureKind
from events.frozen import frozen
from events.ids import chain_hash
from streams.testing.matching import difference, short
from streams.testing.timeline import effects_in_words, input_in_words
from streams.workflow.decider import decide
from streams.workflow.evolve import evolve
from streams.workflow.expressions import DefinitionError, EvaluationError, from_json, to_json
from streams.workflow.payloads import MARK, Memory, PayloadError, Payloads, inlined, references, resolve
from streams.workflow.spec import WorkflowSpec, from_canonical
from streams.workflow.state import INITIAL, RunEvent, RunState

FORMAT: Final = "foldflow-history-1"


class HistoryError(ValueError):
    """A file is no recorded history, or one that can't be read."""


@frozen
class Recorded:
    """A recorded run: its decisions as Kafka values. `spec` None: nobody knew that version."""

    run_id: str
    spec: WorkflowSpec | None
    values: tuple[bytes, ...]
    payloads: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None


@frozen
class Difference:
    """The first decision that comes out differently. `field` is where: `effects[1].arguments.url`, `input`, `prev`, `bytes`."""

    seq: int
    field: str
    problem: str
    input: str
    recorded: str
    now: str


@frozen
class Replay:
    """What came of deciding a recorded run again. `workflow`, `digest`: the version that decided; `decisions`: how many."""

    path: str
    run_id: str
    workflow: str
    digest: str
    decisions: int
    difference: Difference | None

    @property
    def same(self) -> bool:
        """Whether every decision came out as it is recorded."""
        return self.difference is None

    def __str__(self) -> str:
        name = f"{self.path}: {self.workflow} {self.digest[:12]}"
        if self.difference is None:
            return f"{name}: all {self.decisions} decisions come out as recorded"
        found = self.difference
        lines = [f"{name}: decision {found.seq} of {self.decisions} comes out differently: {found.field}: {found.problem}"]
        shown = (("input", found.input), ("recorded", found.recorded), ("now", found.now))
        return "\n".join([*lines, *(f"  {title:9} {text}" for title, text in shown if text)])

    def then_the_same(self) -> "Replay":
        """Check that nothing came out differently. Raises AssertionError with the first difference."""
        if not self.same:
            raise AssertionError(str(self))
        return self


def replay(path: str | Path, spec: WorkflowSpec | None = None) -> Replay:
    """Decide a recorded run again, and compare each decision byte for byte with what is recorded.

    `spec`: another version of the workflow; then the difference is where the run would have gone another way. What calls answered
    is what they answered then. Raises HistoryError.

        for file in Path("histories").glob("*.json"):
            replay(file).then_the_same()
    """
    recorded = read(Path(path))
    found = first_difference(recorded, spec)
    used = spec if spec is not None else recorded.spec
    name, version = (used.name, used.digest) if used else ("", "")
    return Replay(str(path), recorded.run_id, name, version, len(recorded.values), found)


# --- Files ---


def write(path: Path, recorded: Recorded, payloads: Payloads) -> None:
    """Write a recorded run to a file, with the payloads that it refers to. Raises PayloadError, OSError."""
    path.write_text(text_of(recorded, payloads), "utf-8")


def text_of(recorded: Recorded, payloads: Payloads) -> str:
    """Return a recorded run as such a file holds it. Raises PayloadError for a payload that can't be had."""
    kept: dict[str, str] = {}
    for value in recorded.values:
        for text in _texts(codec.decode(value, Decision)):
            _collect(text, payloads, kept)
    document = {
        "format": FORMAT,
        "run_id": recorded.run_id,
        "workflow": recorded.spec.name if recorded.spec else None,
        "digest": recorded.spec.digest if recorded.spec else None,
        "head": chain_hash(codec.unframed(recorded.values[-1])).hex() if recorded.values else None,
        "spec": from_json(recorded.spec.canonical) if recorded.spec else None,
        "decisions": [base64.b64encode(value).decode() for value in recorded.values],
        "payloads": dict(sorted(kept.items())),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _texts(part: Any) -> Iterator[str]:
    """Yield all texts of an event."""
    if isinstance(part, str):
        yield part
    elif dataclasses.is_dataclass(part):
        for each in dataclasses.fields(part):
            yield from _texts(getattr(part, each.name))
    elif isinstance(part, tuple):
        for each in part:
            yield from _texts(each)


def _collect(text: str, payloads: Payloads, kept: dict[str, str]) -> None:
    try:
        named = references(text) if MARK in text else ()
    except EvaluationError:  # a failure's message may be any text
        return
    for digest in named:
        if digest not in kept:
            kept[digest] = payloads.get(digest)
            _collect(kept[digest], payloads, kept)


def read(path: Path) -> Recorded:
    """Return the recorded run in a file. Raises HistoryError."""
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["format"] != FORMAT:
            raise HistoryError(f"{path}: its format is {document['format']!r}; this version reads {FORMAT!r}")  # noqa: TRY301
        spec = from_canonical(to_json(document["spec"])) if document["spec"] is not None else None
        values = tuple(base64.b64decode(each, validate=True) for each in document["decisions"])
        recorded = Recorded(document["run_id"], spec, values, dict(document["payloads"]), document["head"])
    except HistoryError:
        raise
    except OSError as error:
        raise HistoryError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, EvaluationError, DefinitionError) as error:
        raise HistoryError(f"{path}: no recorded history: {type(error).__name__}: {error}") from error
    if not recorded.values:
        raise HistoryError(f"{path}: it holds no decision")
    return recorded


# --- Deciding again ---


def first_difference(recorded: Recorded, spec: WorkflowSpec | None = None) -> Difference | None:
    """Return the first decision that comes out differently; None: none does. `spec` as in `replay`."""
    payloads = Memory()
    for text in recorded.payloads.values():
        payloads.put(text)
    again = _Again(recorded, payloads, spec if spec is not None else recorded.spec)
    for number, value in enumerate(recorded.values, 1):
        if found := again.take(number, value):
            return found
    if recorded.head is not None and recorded.head != again.state.head.hex():
        problem = (
            f"its hash is {again.state.head.hex()}, recorded is {recorded.head}: a byte was changed, or decisions are missing"
        )
        return Difference(len(recorded.values), "head", problem, "", "", "")
    return None


@dataclass
class _Again:
    """A recorded run in the making again."""

    recorded: Recorded
    payloads: Memory
    spec: WorkflowSpec | None
    state: RunState = INITIAL

    def take(self, number: int, value: bytes) -> Difference | None:
        try:
            decision = codec.decode(value, Decision)
        except NotDecodableError as error:
            return Difference(number, "bytes", str(error), "", "", "")
        if (broken := self._broken(number, decision)) or (broken := self._unlike(value, decision)):
            return Difference(number, *broken, input_in_words(decision.input), "", "")
        try:
            decision = self._started(decision)
            effects = self._decided(decision)
        except (PayloadError, _RefusedError) as error:
            recorded = effects_in_words(decision.effects, decision.at)
            return Difference(number, "input", str(error), input_in_words(decision.input), recorded, "")
        except Exception as error:  # noqa: BLE001 - whatever it is: today's code can't decide what it could once
            recorded = effects_in_words(decision.effects, decision.at)
            return Difference(number, "effects", f"it can't be decided: {error!r}", input_in_words(decision.input), recorded, "")
        if codec.body(replace(decision, effects=effects)) != codec.body(decision):
            where, problem = _where(decision.effects, effects)
            told = (effects_in_words(each, decision.at) for each in (decision.effects, effects))
            return Difference(number, where, problem, input_in_words(decision.input), *told)
        self.state = evolve(self.state, RunEvent(decision, chain_hash(codec.unframed(value))))
        return None

    def _broken(self, number: int, decision: Decision) -> tuple[str, str] | None:
        """Say where a decision doesn't extend the one before."""
        if decision.run_id != self.recorded.run_id:
            return "run_id", f"it belongs to run {decision.run_id}, the file to run {self.recorded.run_id}"
        if decision.seq != number:
            return "seq", f"it is decision {decision.seq}: decisions are missing, or in another order"
        if decision.prev != self.state.head:
            return "prev", "it doesn't extend the one before: a byte of that was changed, or it is another one"
        return None

    def _unlike(self, value: bytes, decision: Decision) -> tuple[str, str] | None:
        """Say if today's schema would write the same decision in other bytes."""
        same = codec.body(decision) == codec.unframed(value)
        current = codec.is_current(value, Decision)
        return ("bytes", "today's code writes the same decision in other bytes") if current and not same else None

    def _started(self, decision: Decision) -> Decision:
        """Return a decision as it would be by another version of the workflow: its defaults are filled in as well."""
        cause = decision.input
        if self.spec is None or not isinstance(cause, StartRun) or cause.digest == self.spec.digest:
            return decision
        text, problems = self.spec.check_input(to_json(resolve(cause.input, self.payloads)))
        if problems:
            raise _RefusedError(f"this version refuses the run's input: {'; '.join(problems[:5])}")
        return replace(decision, input=replace(cause, input=inlined(text, self.payloads)))

    def _decided(self, decision: Decision) -> tuple[Effect, ...]:
        match decision.input, decision.effects:
            case UnreadableInput(), (InputIgnored(), RunFailed()):
                return decision.effects  # not decided: it stands for one that could not be written
            case _, (RunFailed(step=None, failure=failure),) if failure.kind == FailureKind.UNKNOWN_WORKFLOW:
                return decide(None, self.state, decision.input, decision.at, self.payloads, decision.said)
            case _:
                return decide(self.spec, self.state, decision.input, decision.at, self.payloads, decision.said)


class _RefusedError(Exception):
    pass


def _where(recorded: tuple[Effect, ...], now: tuple[Effect, ...]) -> tuple[str, str]:
    """Return the first field of the effects that differs, and how."""
    for index, (then, again) in enumerate(zip(recorded, now, strict=False)):
        if then == again:
            continue
        at = f"effects[{index}]"
        if type(then) is not type(again):
            return at, f"recorded is {type(then).__name__} of {_step(then)}, now it is {type(again).__name__} of {_step(again)}"
        for each in dataclasses.fields(then):
            one, other = getattr(then, each.name), getattr(again, each.name)
            if one != other:
                return _inside(f"{at}.{each.name}", one, other)
    one, other = len(recorded), len(now)
    more = (recorded if one > other else now)[min(one, other)]
    return "effects", f"recorded are {one}, now there are {other}; {type(more).__name__} of {_step(more)} is one more"


def _step(effect: Effect) -> str:
    step = getattr(effect, "step", None)
    return f"step {step}" if step else "the run"


def _inside(where: str, one: Any, other: Any) -> tuple[str, str]:
    """Return where two values of a field differ, inside of JSON too."""
    try:
        then, again = from_json(one), from_json(other)
    except (EvaluationError, TypeError, AttributeError):
        then, again = one, other
    if not isinstance(then, dict | list):
        return where, f"recorded is {short(then, 300)}, now it is {short(again, 300)}"
    return where, f"recorded is {short(then, 300)}, now {difference(then, again, where.rpartition('.')[2])}"


__all__ = ["FORMAT", "Difference", "HistoryError", "Recorded", "Replay", "first_difference", "read", "replay", "text_of", "write"]
