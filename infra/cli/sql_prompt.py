"""The prompt of `foldflow sql`: queries of several lines, with a history and completion."""

import contextlib
import readline
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from infra.cli.terminal import console, say
from projections.table_docs import described

_PROMPT, _MORE = "foldflow> ", "     ...> "
_HISTORY: Final = 1000
_WORDS: Final = (
    *("SELECT", "FROM", "WHERE", "GROUP BY", "ORDER BY", "LIMIT", "JOIN", "USING", "DESCRIBE", "SUMMARIZE", "count(*)"),
    *(".tables", ".schema", ".quit", ".help"),
)
_HELP: Final = ".tables lists the tables, .schema TABLE its columns; a query ends with `;`; .quit or Ctrl-D leaves."


class Prompt:
    """Reads queries and commands until its end. `answer`: shows the answer to a query."""

    def __init__(self, answer: Callable[[str], None], history: Path, read: Callable[[str], str] = input) -> None:
        self._answer, self._history, self._read = answer, history, read
        self._tables = {name: (says, columns) for name, says, columns in described()}

    def run(self) -> None:
        """Answer until .quit or Ctrl-D; Ctrl-C gives up what was typed."""
        say(_HELP)
        with self._remembered():
            while (query := self._query()) is not None:
                with contextlib.suppress(KeyboardInterrupt):
                    self._take(query)

    def _query(self) -> str | None:
        """Return what is typed, up to its `;`; None: nothing more comes."""
        lines: list[str] = []
        while True:
            try:
                line = self._read(_MORE if lines else _PROMPT)
            except EOFError:
                say("")
                return None
            except KeyboardInterrupt:
                say("")
                lines.clear()
                continue
            if not lines and not line.strip():
                continue
            lines.append(line)
            text = "\n".join(lines).strip()
            if text.startswith(".") or text.endswith(";"):
                return None if text.rstrip(";") in {".quit", ".exit"} else text

    def _take(self, text: str) -> None:
        if not text.startswith("."):
            self._answer(text)
            return
        match text.rstrip(";").split():
            case [".tables"]:
                self._show({name: says for name, (says, _) in self._tables.items()})
            case [".schema", name] if name in self._tables:
                self._show({f"{column}  {kind}": says for column, kind, says in self._tables[name][1]})
            case [".schema", *_]:
                say(f".schema TABLE, where TABLE is one of: {', '.join(self._tables)}")
            case _:
                say(_HELP)

    def _show(self, lines: dict[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, says in lines.items():
            table.add_row(Text(name, no_wrap=True), Text(says))
        console().print(table)

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        """Let lines be edited, completed, and remembered for the next time."""
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n,;()=<>")
        readline.parse_and_bind("tab: complete")
        with contextlib.suppress(OSError):
            readline.read_history_file(self._history)
        readline.set_history_length(_HISTORY)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                readline.write_history_file(self._history)

    def _complete(self, text: str, number: int) -> str | None:
        columns = {column for _, each in self._tables.values() for column, _, _ in each}
        words = [*self._tables, *sorted(columns), *_WORDS]
        found = [word for word in dict.fromkeys(words) if word.lower().startswith(text.lower())]
        return found[number] if number < len(found) else None
