"""`foldflow sql`: asks the views in SQL, through the API that holds them, or in their file where nobody does."""

import contextlib
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import typer

from infra.cli.terminal import console, fail, say
from streams.settings import Settings

if TYPE_CHECKING:
    from infra.cli.sql_prompt import Prompt

WRONG, UNREACHABLE = 2, 4
_FILE: Final = "views.duckdb"
_CELL: Final = 200
"""Longest text in a table that is shown whole."""


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT; without it: a prompt, or what standard input says.")] = "",
    tables: Annotated[bool, typer.Option("--tables", help="Print what can be asked: all tables and columns, Markdown.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1_000_000, help="Most rows that are shown.")] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a row.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with a line of names.")] = False,
    file: Annotated[
        Path | None, typer.Option("--file", help="A file of views that no process holds, instead of the API.", show_default=False)
    ] = None,
) -> None:
    """Ask the views in SQL (DuckDB's dialect): runs, steps, calls, decisions and all else that --tables lists.

    It only reads, within 30 s: only SELECT, DESCRIBE, SUMMARIZE and SHOW TABLES are answered, and no file can be reached.
    The API answers, as far as it has read; where it doesn't run, its file in FOLDFLOW_DATA_DIR does. The prompt ends a query
    at its `;`, completes names with Tab, and knows .tables, .schema TABLE and .quit.

    For example:

        foldflow sql "SELECT workflow, status, count(*) AS runs, sum(cost_usd) AS usd FROM runs GROUP BY ALL ORDER BY ALL"

        foldflow sql --csv --limit 1000000 "SELECT * FROM calls WHERE requested > current_date - 7" > calls.csv

        foldflow sql --json < question.sql | jq .run_id

        foldflow sql

    Exit codes: 0 answered, 2 the question is refused, has a mistake or takes too much, 4 neither API nor file can be asked.
    """
    if as_json and as_csv:
        raise typer.BadParameter("either --json or --csv", param_hint="--csv")
    if tables:
        from projections.table_docs import markdown  # noqa: PLC0415 - DuckDB

        print(markdown(), end="")
        return
    source = _File(file) if file is not None else _Api(Settings())
    show = _as_json if as_json else _as_csv if as_csv else _as_table
    if not query and sys.stdin.isatty():
        _prompted(source, limit).run()
        return
    try:
        with source.asked(query or sys.stdin.read(), limit) as got:
            show(got)
            _say_more(got, limit)
    except NotAnsweredError as error:
        fail(str(error), error.code)
    except BrokenPipeError:
        sys.stdout = None  # whoever read the output has seen enough


class NotAnsweredError(Exception):
    """A question that got no answer: why, and what to do. `code`: the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Got:
    """An answer. `columns`: name and SQL type; `complete`: there are no more rows."""

    columns: list[tuple[str, str]]
    complete: bool
    rows: Iterable[dict[str, Any]]


class Source(Protocol):
    """Where the views are."""

    def asked(self, query: str, limit: int) -> AbstractContextManager[Got]:
        """Give the answer to a question. Raises NotAnsweredError."""


class _File:
    """A file of views, opened for each question, so that its process can have it in between."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def asked(self, query: str, limit: int) -> Iterator[Got]:
        """Give the answer to a question. Raises NotAnsweredError."""
        from projections.database import ViewsError  # noqa: PLC0415 - DuckDB
        from projections.sql import QueryError, answer, opened  # noqa: PLC0415

        try:
            with opened(self._path) as db:
                found = answer(db, query, limit)
        except QueryError as error:
            raise NotAnsweredError(f"{error}\n{error.hint}", WRONG) from error
        except FileNotFoundError as error:
            raise NotAnsweredError(f"There is no file {self._path}: leave --file out to ask the API", UNREACHABLE) from error
        except ViewsError as error:
            raise NotAnsweredError(f"{error}: ask the API that holds it, without --file", UNREACHABLE) from error
        with found.lines as lines:
            yield Got(found.columns, found.complete, map(json.loads, lines))


class _Api:
    """The API; where it doesn't run, its file."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = f"http://{settings.api_host}:{settings.api_port}"

    @contextlib.contextmanager
    def asked(self, query: str, limit: int) -> Iterator[Got]:
        """Give the answer to a question. Raises NotAnsweredError."""
        import httpx  # noqa: PLC0415 - 0.1 s

        token = self._settings.api_token
        headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}
        parameters: dict[str, str | int] = {"query": query, "limit": limit}
        with contextlib.ExitStack() as stack:
            try:
                client = stack.enter_context(httpx.Client(base_url=self._address, headers=headers, timeout=60, trust_env=False))
                response = stack.enter_context(client.stream("GET", "/sql", params=parameters))
            except httpx.ConnectError as error:
                yield stack.enter_context(self._instead(query, limit, error))
                return
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise NotAnsweredError(f"The API at {self._address} can't be asked ({error}).", UNREACHABLE) from error
            if not response.is_success:
                raise self._problem(response.read(), response.status_code)
            columns = [(str(name), str(kind)) for name, kind in json.loads(response.headers["Foldflow-Columns"])]
            yield Got(columns, response.headers["Foldflow-Complete"] == "true", map(json.loads, response.iter_lines()))

    def _instead(self, query: str, limit: int, error: Exception) -> AbstractContextManager[Got]:
        path = self._settings.data_dir / _FILE
        if not path.exists():
            raise NotAnsweredError(
                f"The API at {self._address} can't be reached ({error}), and there is no {path}. Start it with `foldflow up` or "
                "`foldflow api`, or set FOLDFLOW_API_HOST and FOLDFLOW_API_PORT.",
                UNREACHABLE,
            ) from error
        say(f"The API at {self._address} doesn't run: {path} is asked, as it lies.")
        return _File(path).asked(query, limit)

    def _problem(self, content: bytes, status: int) -> NotAnsweredError:
        try:
            problem = json.loads(content)
            text = f"{problem['detail']}\n{problem['hint']}"
        except (ValueError, KeyError, TypeError):
            text = f"{self._address} answers, but not as Foldflow's API: is FOLDFLOW_API_PORT right? (HTTP {status})"
            return NotAnsweredError(text, UNREACHABLE)
        return NotAnsweredError(text, UNREACHABLE if status >= 500 else WRONG)  # noqa: PLR2004 - HTTP's own numbers


def _prompted(source: Source, limit: int) -> "Prompt":
    from infra.cli.sql_prompt import Prompt  # noqa: PLC0415 - DuckDB, readline

    def answered(query: str) -> None:
        try:
            with source.asked(query, limit) as got:
                _as_table(got)
                _say_more(got, limit)
        except NotAnsweredError as error:
            say(str(error))

    return Prompt(answered, Settings().data_dir / "sql_history")


# --- How answers are shown ---


def _as_json(got: Got) -> None:
    for row in got.rows:
        print(json.dumps(row, ensure_ascii=False))


def _as_csv(got: Got) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([name for name, _ in got.columns])
    writer.writerows([_cell(value) for value in row.values()] for row in got.rows)


def _as_table(got: Got) -> None:
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    numbers = ("INT", "DOUBLE", "FLOAT", "DECIMAL", "HUGE")
    table = Table(
        *(
            Column(Text(name), justify="right" if kind.endswith(numbers) or kind.startswith(numbers) else "left")
            for name, kind in got.columns
        ),
        box=None,
        pad_edge=False,
    )
    count = 0
    for row in got.rows:
        count += 1
        table.add_row(*(Text(_cut(_cell(value))) for value in row.values()))
    console().print(table)
    say(f"{count:,} row{'' if count == 1 else 's'}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[:_CELL]} …"


def _say_more(got: Got, limit: int) -> None:
    if not got.complete:
        more = f"--limit {min(1_000_000, limit * 10)} shows more; better" if limit < 1_000_000 else "Better"  # noqa: PLR2004
        say(f"These are only the first {limit:,} rows. {more}, ask for sums, or filter.")
