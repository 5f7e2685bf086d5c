"""Finds tools and makes plain typed functions callable with JSON.

A tool is any typed function, sync or async. Its schemas come from its type hints, its description from its
docstring, its version from its source. Entry points of the group `foldflow.tools` are found by themselves;
Python files are given by path.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType

from tools.tool import Tool, describe

GROUP = "foldflow.tools"


class ToolFileError(Exception):
    """A file of tools can't be loaded; the message names it and, if something was raised in it, the line and what."""


def load(paths: Iterable[Path] = ()) -> Mapping[str, Tool]:
    """Return every tool by its name: those of installed distributions, then those of the files `paths`.

    Raises ToolFileError if a path is no Python file or importing it raises anything (naming file and line), ValueError if
    two tools have one name (naming both places), TypeError if something found is no function with type hints, and
    whatever importing the module of an installed tool raises.
    """
    tools: dict[str, Tool] = {}
    places: dict[str, str] = {}
    for place, tool in (*_installed(), *_in_files(paths)):
        if tool.name in tools:
            raise ValueError(f"two tools are named {tool.name!r}: {places[tool.name]} and {place}")
        tools[tool.name] = tool
        places[tool.name] = place
    return dict(sorted(tools.items()))


def _installed() -> Iterator[tuple[str, Tool]]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        function = point.load()
        place = f"entry point {point.value!r} of {_distribution(point)}"
        if not isinstance(function, FunctionType):
            raise TypeError(f"{place} is no plain function")
        yield place, describe(function, name=point.name, version_of=_source(sys.modules[function.__module__], point))


def _in_files(paths: Iterable[Path]) -> Iterator[tuple[str, Tool]]:
    for path in paths:
        module = _import_file(path)
        for name, value in vars(module).items():
            # Imported functions are somebody else's; untyped and private ones are the file's own business.
            if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_"):
                if "return" not in value.__annotations__:
                    continue
                yield f"{path}:{name}", describe(value, name=name, version_of=_source(module))


def _import_file(path: Path) -> ModuleType:
    # The whole path goes into the name: two files `prices.py` in different folders must not replace each other.
    name = f"foldflow_tools_{path.stem}_{blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.exists():
        raise ToolFileError(f"{path.absolute()}: no such file")
    if spec is None or spec.loader is None or not path.is_file():
        raise ToolFileError(f"{path.absolute()}: no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # type hints are resolved through it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):  # a script that ends by itself would end a worker without a word
            raise ToolFileError(_told(error, path, module.__file__)) from error
        raise
    return module


def _told(error: BaseException, path: Path, file: str | None) -> str:
    """Say what importing `path` raised, and at which of its lines; `file` is what Python calls it."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    what = str(error)
    if isinstance(error, SyntaxError) and error.filename == file and error.lineno is not None:
        lines, what = [error.lineno], error.msg
    where = f"{path.absolute()}, line {lines[-1]}" if lines else str(path.absolute())
    return f"{where}: {type(error).__name__}{f': {what}' if what else ''}"


def _source(module: ModuleType, point: EntryPoint | None = None) -> bytes:
    """Return what a tool's version depends on besides its schemas.

    The whole module counts, not only the function: what it calls is usually beside it. A module without source
    is identified by its distribution's version.
    """
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        source = module.__name__
    return f"{_distribution(point) if point else ''}\0{source}".encode()


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "no distribution"
