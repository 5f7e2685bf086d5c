"""Asks a person at a terminal: what to say to an approval, and how a value should be instead."""

import getpass
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from events.commands import ApprovalAnswered
from events.decisions import ApprovalRequested
from infra.cli import outcome
from infra.cli.terminal import clock, say
from streams.settings import Settings
from streams.workflow.expressions import EvaluationError, from_json, to_json
from streams.workflow.payloads import MARK, PayloadError, resolve


class NotEditedError(Exception):
    """The value can't be edited, or was not."""


def login() -> str:
    """Return who is logged in here, "" if nobody has a name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def at_terminal() -> bool:
    """Whether a person can be asked here."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def typed(prompt: str) -> str:
    """Ask for a line. `input` would put its prompt into the output when that goes to a file. Raises EOFError."""
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def resolved(settings: Settings, text: str) -> Any:
    """Return the value of a JSON text, with the large payloads in it if they can be had here."""
    if MARK in text:
        from streams.payloads import PayloadStore  # noqa: PLC0415 - obstore

        try:
            return resolve(text, PayloadStore(settings))
        except PayloadError as error:
            say(str(error))
    return from_json(text)


def show(step: str, asked: ApprovalRequested, value: Any) -> None:
    """Show what is to be approved."""
    say(f"Step `{step}` asks: {asked.message}")
    if asked.value != "null":
        say(outcome.shown(value))
    if asked.by:
        say(f"Who may answer: {', '.join(asked.by)}")
    if asked.due:
        say(f"Until: {clock(asked.due)}")


def edited(value: Any) -> str | None:
    """Open the editor on a value and return what became of it as canonical JSON; None: nothing. Raises NotEditedError."""
    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        while True:
            try:
                code = subprocess.run([*editor, str(path)], check=False).returncode  # noqa: S603 - the user's own editor
            except OSError as error:
                raise NotEditedError(f"`{editor[0]}` can't be started ({error}): set EDITOR") from error
            if code:
                raise NotEditedError(f"`{editor[0]}` ended with code {code}: nothing was sent")
            text = path.read_text("utf-8", "replace")
            if not text.strip():
                raise NotEditedError("the file is empty: nothing was sent")
            try:
                changed = to_json(from_json(text))
            except EvaluationError as error:
                if not at_terminal():
                    raise NotEditedError(f"{error}: nothing was sent") from error
                typed(f"{error}. Press Enter to edit it again, Ctrl-C to leave. ")
                continue
            return None if changed == to_json(value) else changed


def ask(step: str, asked: ApprovalRequested, value: Any, by: str, read: Callable[[str], str] = typed) -> ApprovalAnswered | None:
    """Show an approval and ask for the answer; None: later."""
    show(step, asked, value)
    changed: str | None = None
    options = "[a]pprove, [e]dit, [r]eject, [l]ater" if asked.editable else "[a]pprove, [r]eject, [l]ater"
    try:
        while True:
            match read(f"{options}? ").strip().lower():
                case "a" | "approve":
                    return ApprovalAnswered(step, True, by, "", changed)
                case "r" | "reject":
                    return ApprovalAnswered(step, False, by, read("Why? ").strip(), None)
                case "l" | "later":
                    return None
                case "e" | "edit" if asked.editable:
                    changed = _edited_again(value, changed)
    except EOFError:
        return None


def _edited_again(value: Any, changed: str | None) -> str | None:
    try:
        again = edited(value if changed is None else from_json(changed))
    except NotEditedError as error:
        say(str(error))
        return changed
    if again is None:
        say("Unchanged.")
        return changed
    say(outcome.shown(from_json(again)))
    return again
