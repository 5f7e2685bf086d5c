"""What stands on `requests`, read: a request for a run, or something that is said to one. Avro, or JSON as people write it.

A JSON object with `command` speaks to a run, any other one asks for a run. Either way what comes out is checked as far as that is
possible without knowing workflows and runs: the right keys, valid Unicode, payloads that are JSON, sizes. Pure.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from events import codec
from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    Command,
    Origin,
    Parent,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    RunRequest,
    SignalReceived,
    WorkflowRequest,
)
from events.errors import NotDecodableError
from events.ids import run_id
from streams.workflow.expressions import EvaluationError, clean_text, from_json, to_json
from streams.workflow.payloads import MAX_PAYLOAD_BYTES, utf8_size
from streams.workflow.state import SETTLED

MAX_TEXTS_BYTES: Final = 64 * 1024
"""The most that a request's texts may have together: ids, labels, names, reasons; payloads have limits of their own."""
MAX_PATH_CHARS: Final = 1000
"""The longest path of a step: steps stand in steps at most 8 deep."""
MAX_COPIED_BYTES: Final = 1024 * 1024
"""The most that a fork may bring of another run's results."""
PAYLOADS: Final = frozenset({"input", "payload", "value", "output"})
"""Fields that hold JSON."""
_RESULT: Final = ("status", "output", "error")
"""What a fork's copied result says of a step."""
_SETTLED: Final = tuple(sorted(status.value for status in SETTLED))


class RefusedError(Exception):
    """A request can't be taken; `reason` is one of the dead letters' reasons.

    As far as they could be read: the request's id, the run that it speaks to, and who waits for the run that it asks for.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(clean_text(detail))
        self.reason = reason
        self.request_id: str | None = None
        self.run_id: str | None = None
        self.parent: Parent | None = None

    def about(self, request: WorkflowRequest | RunRequest) -> None:
        """Note what it was about, as far as that can be written down."""
        if isinstance(request, WorkflowRequest):
            self.request_id = _writable(request.request_id)
            self.parent = request.parent if request.parent and all(map(_writable, dataclasses.astuple(request.parent))) else None
        else:
            asked = _writable(request.request_id)
            self.run_id = _writable(request.run_id) or (run_id(asked) if asked else None)


class Word(NamedTuple):
    """What a JSON `command` stands for: what it says to a run, and what to a step, when `step` is given."""

    run: type[Command] | None
    step: type[Command] | None
    required: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = {}


WORDS: Final[Mapping[str, Word]] = {
    "signal": Word(SignalReceived, None, ("name",)),
    "approve": Word(None, ApprovalAnswered, ("step", "by"), {"approved": True}),
    "reject": Word(None, ApprovalAnswered, ("step", "by"), {"approved": False}),
    "cancel": Word(CancelRun, CancelStep),
    "pause": Word(PauseRun, PauseStep),
    "resume": Word(ResumeRun, ResumeStep),
    "change_output": Word(None, ChangeOutput, ("step", "output", "by")),
}
_SIGNED: Final = (ApprovalAnswered, ChangeOutput)
"""Commands that say who gives them, whatever the form."""
_UNSAID: Final[Mapping[str, Any]] = {
    "signal_id": "",
    "correlation": None,
    "payload": "null",
    "value": None,
    "by": "",
    "reason": "",
    "force": False,
    "single": False,
}
"""What a command means that doesn't say it. Without `signal_id`, where it stands is its identity; intake knows that."""
_ASKS: Final = tuple(WorkflowRequest.__dataclass_fields__)


def decode(value: bytes | None) -> WorkflowRequest | RunRequest:
    """Return the request in a record's value: Avro when it starts with a zero byte, else JSON. Raises RefusedError."""
    request = _from_avro(value) if value and value[0] == 0 else _from_json(value)
    try:
        return _checked_command(request) if isinstance(request, RunRequest) else _checked_request(request)
    except RefusedError as refused:
        refused.about(request)
        raise


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """Return what to say about a name that isn't there."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known) or 'none yet'}"
    return f"{what} `{name[:100]}`; {hint}"


# --- The forms ---


def _from_avro(value: bytes) -> WorkflowRequest | RunRequest:
    try:
        if codec.kind_of(value) is RunRequest:
            return codec.decode(value, RunRequest)
        return codec.decode(value, WorkflowRequest)
    except NotDecodableError as error:
        raise _unreadable(str(error)) from error


def _from_json(value: bytes | None) -> WorkflowRequest | RunRequest:
    try:
        data = from_json((value or b"").decode())
    except (UnicodeDecodeError, EvaluationError) as error:
        raise _unreadable(f"neither Avro nor JSON: {error}") from error
    if not isinstance(data, dict):
        raise _unreadable('a request is a JSON object: {"workflow": …, "input": {…}}, or {"run_id": …, "command": …}')
    try:
        return _command(data) if "command" in data else _request(data)
    except RefusedError as refused:
        refused.about(_glimpse(data))
        raise


def _request(data: dict[str, Any]) -> WorkflowRequest:
    """Return what a JSON object asks for."""
    _known("key", data, _ASKS)
    if not isinstance(data.get("workflow"), str):
        raise _unreadable("`workflow` must be given, and is a text")
    labels, copied = data.get("labels") or {}, data.get("copied")
    if not isinstance(labels, dict) or not all(isinstance(each, str) for each in labels.values()):
        raise _unreadable("`labels` is an object of strings")
    breaks = data.get("break_at") or []
    if not isinstance(breaks, list) or not all(isinstance(each, str) for each in breaks):
        raise _unreadable("`break_at` is a list of steps")
    return WorkflowRequest(
        data["workflow"],
        to_json(data.get("input", {})),
        _text(data, "request_id"),
        _text(data, "digest"),
        labels,
        _record(data, "parent", Parent),
        tuple(breaks),
        _record(data, "origin", Origin),
        copied if copied is None or isinstance(copied, str) else to_json(copied),
    )


def _command(data: dict[str, Any]) -> RunRequest:
    """Return what a JSON object says to a run."""
    said = data["command"]
    if not isinstance(said, str) or said not in WORDS:
        raise _unreadable(nearest("unknown command", said if isinstance(said, str) else to_json(said), WORDS))
    word = WORDS[said]
    kind = word.step if word.run is None or (word.step is not None and data.get("step") is not None) else word.run
    assert kind is not None
    fields = [name for name in kind.__dataclass_fields__ if name not in word.fixed]
    optional = () if word.run is None or word.step is None else ("step",)
    _known(f"key of `{said}`", data, dict.fromkeys(("run_id", "request_id", "command", *fields, *optional)))
    for name in word.required:
        if name not in data:
            raise _unreadable(f"`{said}` needs `{name}`")
    values = {name: _given(data, name) for name in fields}
    made: Command = kind(**values, **word.fixed)
    return RunRequest(_text(data, "run_id"), _text(data, "request_id"), made)


def _given(data: dict[str, Any], name: str) -> Any:
    """Return what a command says under a name, or what it means by saying nothing."""
    given = data.get(name)
    if name in PAYLOADS and name in data and (name != "value" or given is not None):
        return to_json(given)
    if given is None:
        return _UNSAID.get(name, "")
    wanted = bool if isinstance(_UNSAID.get(name), bool) else str
    if not isinstance(given, wanted):
        raise _unreadable(f"`{name}` is {'true or false' if wanted is bool else 'a text'}")
    return given


def _text(data: dict[str, Any], name: str) -> str | None:
    given = data.get(name)
    if given is not None and not isinstance(given, str):
        raise _unreadable(f"`{name}` is a text")
    return given


def _record(data: dict[str, Any], name: str, kind: type[Any]) -> Any:
    """Return a part of a request that is a record of texts and whole numbers; None: it isn't there."""
    given = data.get(name)
    if given is None:
        return None
    fields = {each.name: each.type for each in dataclasses.fields(kind)}
    if not isinstance(given, dict) or given.keys() != fields.keys():
        raise _unreadable(f"`{name}` is an object with {', '.join(f'`{each}`' for each in fields)}")
    for key, wanted in fields.items():
        if type(given[key]) is not wanted:
            raise _unreadable(f"`{name}.{key}` is {'a text' if wanted is str else 'a whole number'}")
    return kind(**given)


def _known(what: str, data: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in data:
        if key not in known:
            raise _unreadable(nearest(f"unknown {what}", key, known))


def _glimpse(data: dict[str, Any]) -> WorkflowRequest | RunRequest:
    """Return what can be read of a request that is refused."""
    named = {key: each for key in ("run_id", "request_id") if isinstance(each := data.get(key), str)}
    if "command" in data:
        return RunRequest(named.get("run_id"), named.get("request_id"), PauseRun("", ""))
    parent = None
    with contextlib.suppress(RefusedError):
        parent = _record(data, "parent", Parent)
    return WorkflowRequest("", request_id=named.get("request_id"), parent=parent)


# --- What holds for both forms ---


def _checked_request(request: WorkflowRequest) -> WorkflowRequest:
    _check_texts(request)
    for step in request.break_at:
        _check_path(step)
    _check_size("input", request.input, MAX_PAYLOAD_BYTES)
    if request.origin is not None and not 0 < request.origin.seq < 2**63:
        raise _unreadable("`origin.seq` is the number of a decision: 1, 2, 3 …")
    if request.copied is not None:
        _check_copied(request.copied)
    return request


def _check_copied(text: str) -> None:
    if clean_text(text) != text:
        raise _unreadable("`copied` is not valid Unicode")
    _check_size("copied", text, MAX_COPIED_BYTES)
    try:
        copied = from_json(text)
    except EvaluationError as error:
        raise _unreadable(f"copied: {error}") from error
    if not isinstance(copied, dict):
        raise _unreadable("`copied` is an object of results by step")
    for step, result in copied.items():
        _check_result(f"copied.{step[:100]}", result)


def _check_result(where: str, result: Any) -> None:
    """Refuse a copied result that its run would leave out."""
    if not isinstance(result, dict) or result.get("status") not in _SETTLED:
        raise _unreadable(f"{where}: a result is an object with `status` ({', '.join(_SETTLED)}), and `output` or `error`")
    _known(f"key of {where}", result, _RESULT)
    output, error = result.get("output"), result.get("error")
    try:
        if output is not None:
            from_json(output if isinstance(output, str) else "")
    except EvaluationError as problem:
        raise _unreadable(f"{where}.output is the text of an output's JSON: {problem}") from problem
    texts = [error.get("kind"), error.get("message")] if isinstance(error, dict) else [None]
    if error is not None and not all(isinstance(each, str) for each in texts):
        raise _unreadable(f"{where}.error is an object with `kind` and `message`")


def _checked_command(request: RunRequest) -> RunRequest:
    """Return what is said, its payload in canonical form."""
    if bool(request.run_id) == bool(request.request_id):
        raise _unreadable("a command names its run: by either `run_id` or `request_id`")
    command = request.command
    _check_texts(request)
    for name in ("name", "step"):
        if getattr(command, name, "?") == "":
            raise _unreadable(f"`{name}` is empty")
    _check_path(getattr(command, "step", ""))
    if isinstance(command, _SIGNED) and not command.by:
        raise _unreadable("`by` is missing: who says so?")
    changed: dict[str, Any] = {}
    for name in PAYLOADS & set(command.__dataclass_fields__):
        text = getattr(command, name)
        if text is not None:
            _check_size(name, text, MAX_PAYLOAD_BYTES)
            try:
                changed[name] = to_json(from_json(text))
            except EvaluationError as error:
                raise _unreadable(f"{name}: {error}") from error
    return dataclasses.replace(request, command=dataclasses.replace(command, **changed)) if changed else request


def _check_path(step: str) -> None:
    if len(step) > MAX_PATH_CHARS:
        raise RefusedError("too_large", f"the name of a step has {len(step):,} characters; the limit is {MAX_PATH_CHARS:,}")


def _check_texts(request: WorkflowRequest | RunRequest) -> None:
    texts = tuple(_texts(request))
    for text in texts:
        if clean_text(text) != text:
            raise _unreadable(f"`{text[:100]}` is not valid Unicode")
    if (size := sum(map(utf8_size, texts))) > MAX_TEXTS_BYTES:
        raise RefusedError("too_large", f"ids, labels, names and reasons have {size:,} bytes; the limit is {MAX_TEXTS_BYTES:,}")


def _writable(text: str | None) -> str | None:
    """Return a text of a request that is refused, if a dead letter can hold it."""
    return text if text and clean_text(text) == text and utf8_size(text) <= MAX_TEXTS_BYTES else None


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a request; its payloads are looked at for themselves."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (each for pair in value.items() for each in pair)
    elif isinstance(value, tuple):
        yield from value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in PAYLOADS and field.name != "copied":
                yield from _texts(getattr(value, field.name))


def _check_size(what: str, text: str, limit: int) -> None:
    if (size := utf8_size(text)) > limit:
        raise RefusedError("too_large", f"`{what}` has {size:,} bytes; the limit is {limit:,}")


def _unreadable(detail: str) -> RefusedError:
    return RefusedError("not_decodable", detail)
