"""The files and large payloads that a step's output names.

A tool says what it has read by an object with `source` and `sha256` (a path or an address, and the sum of its bytes), and what it
has written by a path in its run's own folder; `sha256s` may give the sums by file name.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

from streams.workflow.payloads import references

_SUM: Final = re.compile(r"[0-9a-f]{64}")
_LONGEST: Final = 1024


@dataclass(frozen=True, slots=True)
class File:
    """A file that a tool has read or `written`. `at`: where the output says so; `sha256`: of its bytes, if it says that."""

    path: str
    sha256: str | None
    written: bool
    at: str


def files(output: str, run_id: str) -> list[File]:
    """Return the files that an output (JSON) of a tool in this run names, each once."""
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):  # whoever has set it can write anything
        return []
    found: dict[str, File] = {}
    for each in _found(value, "output", f"/{run_id}/", {}):
        found.setdefault(each.path, each)
    return list(found.values())


def payloads(output: str) -> tuple[str, ...]:
    """Return the digests of the payloads that an output (JSON) refers to."""
    try:
        return references(json.loads(output))
    except (ValueError, RecursionError):
        return ()


def _found(value: Any, at: str, own_folder: str, sums: dict[str, str]) -> Iterator[File]:
    match value:
        case dict():
            sums = value["sha256s"] if isinstance(value.get("sha256s"), dict) else sums
            source, checksum = value.get("source"), value.get("sha256")
            if isinstance(source, str) and len(source) <= _LONGEST and isinstance(checksum, str) and _SUM.fullmatch(checksum):
                yield File(source, checksum, False, f"{at}.source")
            for key, each in value.items():
                yield from _found(each, f"{at}.{key}", own_folder, sums)
        case list():
            for index, each in enumerate(value):
                yield from _found(each, f"{at}[{index}]", own_folder, sums)
        case str() if len(value) <= _LONGEST and own_folder in value and "\n" not in value:
            known = sums.get(PurePath(value).name)
            yield File(value, known if isinstance(known, str) else None, True, at)
        case _:
            pass
