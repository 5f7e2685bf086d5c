import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.context import ToolContext
from tools.errors import TerminalError
from tools.registry import ToolFileError, load
from tools.tool import Tool

SOURCE = '''
from dataclasses import dataclass
from datetime import date
from os.path import join
import threading
from tools.context import ToolContext
from tools.errors import RetryableError

@dataclass
class Point:
    x: int
    y: float = 0.0

def shift(point: Point, by: int = 1) -> Point:
    """Move a point to the right."""
    return Point(point.x + by, point.y)

async def later(day: date, context: ToolContext) -> dict[str, str]:
    return {"day": day.isoformat(), "run": context.run_id, "thread": threading.current_thread().name}

def thread() -> str:
    return threading.current_thread().name

def infinite() -> float:
    return float("inf")

def nested() -> dict[str, list[float]]:
    return {"a": [float("nan")]}

def wrong_type() -> int:
    return "no number"  # type: ignore

def schema(copy: str, json: str) -> str:
    return copy + json

def busy() -> None:
    raise RetryableError("try later", retry_after_s=2.5)

def untyped(a, b):
    return a

def _private() -> int:
    return 1
'''
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def tools(tmp_path: Path) -> Mapping[str, Tool]:
    """Tools of a file as a user would write it, and the built-in ones."""
    return load([write(tmp_path / "mine.py", SOURCE)])


@pytest.fixture
def context(tmp_path: Path) -> ToolContext:
    """Give a call whose run has written nothing yet."""
    return ToolContext(call_id="c1", run_id="r1", step="s", attempt=1, artifacts=tmp_path / "artifacts" / "r1")


def write(path: Path, source: str) -> Path:
    """Write a source file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(source))
    return path


def call(tool: Tool, arguments: dict[str, Any], context: ToolContext) -> Any:
    """Call a tool as a worker does."""
    return asyncio.run(tool.call(arguments, context))


def test_public_typed_functions_of_a_file_are_tools(tools: Mapping[str, Tool]) -> None:
    """Imported, private and untyped functions are not; built-in tools come along."""
    mine = {"shift", "later", "thread", "infinite", "nested", "wrong_type", "schema", "busy"}
    assert tools.keys() - load().keys() == mine
    assert {"echo", "parse_question", "check_plan", "fetch_prices", "clean_prices"} <= tools.keys()
    assert {"price_insights", "check_numbers", "write_report"} <= tools.keys()


def test_schemas_and_description_come_from_the_function(tools: Mapping[str, Tool]) -> None:
    """A default is shown in the schema, and its argument isn't required."""
    tool = tools["shift"]
    assert tool.description == "Move a point to the right."
    assert tool.arguments_schema["required"] == ["point"]
    assert tool.arguments_schema["properties"]["by"]["default"] == 1
    assert tool.arguments_schema["additionalProperties"] is False
    assert set(tool.result_schema["properties"]) == {"x", "y"}


def test_a_call_takes_and_gives_json(tools: Mapping[str, Tool], context: ToolContext) -> None:
    """Arguments become the annotated types; the result becomes JSON values again."""
    assert call(tools["shift"], {"point": {"x": 2}}, context) == {"x": 3, "y": 0.0}
    assert call(tools["schema"], {"copy": "a", "json": "b"}, context) == "ab"


def test_the_context_is_given_and_not_asked_for(tools: Mapping[str, Tool], context: ToolContext) -> None:
    """Its parameter is absent from the schema and can't be passed as an argument."""
    assert set(tools["later"].arguments_schema["properties"]) == {"day"}
    assert call(tools["later"], {"day": "2004-08-01"}, context)["run"] == "r1"
    with pytest.raises(TerminalError, match="context"):
        call(tools["later"], {"day": "2004-08-01", "context": {}}, context)


def test_sync_functions_run_in_the_executor_and_async_ones_on_the_loop(tools: Mapping[str, Tool], context: ToolContext) -> None:
    """A slow sync tool must not hold up the loop."""
    with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
        assert asyncio.run(tools["thread"].call({}, context, pool)).startswith("pool")
    assert call(tools["later"], {"day": "2004-08-01"}, context)["thread"] == threading.main_thread().name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "point: Field required"),
        ({"point": {"x": "many"}}, "point.x: Input should be a valid integer"),
        ({"point": {"x": 1}, "far": True}, "far: Extra inputs are not permitted"),
    ],
)
def test_wrong_arguments_are_terminal_and_say_why_in_a_line(
    tools: Mapping[str, Tool], context: ToolContext, arguments: dict[str, Any], reason: str
) -> None:
    """The message names the tool, the place and pydantic's reason."""
    with pytest.raises(TerminalError) as error:
        call(tools["shift"], arguments, context)
    assert str(error.value).startswith("wrong arguments for shift: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["infinite", "nested", "wrong_type"])
def test_a_result_that_json_cannot_hold_is_terminal(tools: Mapping[str, Tool], context: ToolContext, name: str) -> None:
    """NaN, Infinity and values of another type than annotated are refused, not silently changed."""
    with pytest.raises(TerminalError, match=f"{name} returned"):
        call(tools[name], {}, context)


def test_what_a_tool_raises_passes_through(tools: Mapping[str, Tool], context: ToolContext) -> None:
    """The worker needs the delay that the tool was told."""
    with pytest.raises(Exception, match="try later") as error:
        call(tools["busy"], {}, context)
    assert getattr(error.value, "retry_after_s", None) == 2.5


@given(value=JSON_VALUES)
def test_echo_returns_any_json_unchanged(value: Any) -> None:
    """Also through the registry's checks."""
    context = ToolContext(call_id="c", run_id="r", step="s", attempt=1, artifacts=Path("unused"))
    result = call(load()["echo"], {"value": value}, context)
    assert json.dumps(result) == json.dumps(value)


def test_two_tools_of_one_name_are_refused_with_both_places(tmp_path: Path) -> None:
    """Which one runs must never depend on the order of loading."""
    first = write(tmp_path / "a" / "mine.py", "def twice() -> int:\n    return 1\n")
    second = write(tmp_path / "b" / "mine.py", "def twice() -> int:\n    return 2\n")
    with pytest.raises(ValueError, match="twice") as error:
        load([first, second])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)
    with pytest.raises(ValueError, match=r"tools\.builtin\.echo"):
        load([write(tmp_path / "echo.py", "def echo() -> int:\n    return 1\n")])


def test_the_version_follows_the_source(tmp_path: Path) -> None:
    """Equal sources have equal versions wherever they lie; a change anywhere in the file makes another."""
    first = load([write(tmp_path / "a.py", "def f(x: int) -> int:\n    return x\n")])["f"].version
    same = load([write(tmp_path / "b.py", "def f(x: int) -> int:\n    return x\n")])["f"].version
    other = load([write(tmp_path / "c.py", "ONE = 1\ndef f(x: int) -> int:\n    return x\n")])["f"].version
    assert first == same != other
    assert len(first) == 16


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(x) -> int:\n    return x\n", "'x' has no type hint"),
        ("def f(*x: int) -> int:\n    return 1\n", "'x' can't be given by name"),
        ("def f(x: int, /) -> int:\n    return 1\n", "'x' can't be given by name"),
        ("class Odd: ...\ndef f(x: Odd) -> int:\n    return 1\n", "tool f: "),
    ],
)
def test_a_function_without_usable_types_is_refused_at_loading(tmp_path: Path, source: str, reason: str) -> None:
    """Not at the first call."""
    with pytest.raises(TypeError, match=reason):
        load([write(tmp_path / "mine.py", source)])


def test_a_path_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    """So is one that isn't there, and a folder."""
    (tmp_path / "folder.py").mkdir()
    for path, said in (
        (write(tmp_path / "tools.txt", ""), "no Python file"),
        (tmp_path / "folder.py", "no Python file"),
        (tmp_path / "absent.py", "no such file"),
    ):
        with pytest.raises(ToolFileError) as error:
            load([path])
        assert str(error.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\n\nimport absent_of_all\n", ", line 3: ModuleNotFoundError: No module named 'absent_of_all'"),
        ("from os import absent_of_all\n", ", line 1: ImportError: cannot import name 'absent_of_all' from 'os'"),
        ("\ndef f(:\n", ", line 2: SyntaxError: invalid syntax"),
        ("def f() -> int:\n  return 1\n   return 2\n", ", line 3: IndentationError: unexpected indent"),
        ("def f() -> None:\n    raise OSError('gone')\n\nf()\n", ", line 2: OSError: gone"),
        ("import sys\nsys.exit(3)\n", ", line 2: SystemExit: 3"),
        ("import json\njson.loads('[')\n", ", line 2: JSONDecodeError: Expecting value: line 1 column 2 (char 1)"),
        ("assert False\n", ", line 1: AssertionError"),
        ("x = '\0'\n", ": SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_an_error_in_a_file_is_said_with_its_line(tmp_path: Path, source: str, said: str) -> None:
    """The file's own line, wherever below it was raised."""
    path = write(tmp_path / "mine.py", source)
    with pytest.raises(ToolFileError) as error:
        load([path])
    assert str(error.value).startswith(f"{path}{said}")


def test_an_error_in_an_imported_file_is_said_with_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is imported, and where Python says that it is."""
    write(tmp_path / "imported_by_mine.py", "\n\ndef f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ToolFileError, match=r"mine\.py, line 2: SyntaxError: invalid syntax \(imported_by_mine\.py, line 3\)"):
        load([write(tmp_path / "mine.py", "\nimport imported_by_mine\n")])


def test_a_relative_path_is_said_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may work in another folder than whoever set it thinks."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.py", "import absent_of_all\n")
    for name in ("mine.py", "absent.py"):
        with pytest.raises(ToolFileError) as error:
            load([Path(name)])
        assert str(error.value).startswith(str(tmp_path / name))


def test_loading_imports_nothing_heavy() -> None:
    """The worker's start must not wait for libraries that only some calls need."""
    heavy = ["matplotlib", "duckdb", "pyarrow", "pandas", "numpy", "httpx", "jinja2", "vega_datasets"]
    code = f"import sys; from tools.registry import load; load(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_is_written_whole_and_replaced_by_a_repeat(context: ToolContext) -> None:
    """The folder is made when the first file comes; no temporary file is left."""
    assert not context.artifacts.exists()
    first = context.write("report.md", b"one")
    second = context.write("report.md", b"two")
    assert first.path == second.path
    assert Path(second.path).read_bytes() == b"two"
    assert [file.name for file in context.artifacts.iterdir()] == ["report.md"]
    assert second.sha256 == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"


@pytest.mark.parametrize("name", ["", "../up.md", "a/b.md", ".hidden", "/etc/passwd", ".."])
def test_a_file_name_cannot_leave_the_folder(context: ToolContext, name: str) -> None:
    """Names may come from a workflow."""
    with pytest.raises(ValueError, match="plain file name"):
        context.write(name, b"")
