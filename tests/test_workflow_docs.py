"""The examples in docs/workflows.md run, its table names tests that there are, and the reference is what the models say."""

import re
from pathlib import Path
from typing import Any

import pytest

from infra.cli.reference import markdown
from streams.testing import ANYTHING, NEVER, Failure, answer, answers, given, partly, replay
from streams.workflow.check import check
from streams.workflow.definition import parse
from tools.errors import RetryableError, TerminalError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXT = (DOCS / "workflows.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
EXAMPLES = {title: part for title, part in SECTIONS.items() if title != "Tests"}
WORDS = {
    "ANYTHING": ANYTHING,
    "NEVER": NEVER,
    "Failure": Failure,
    "answer": answer,
    "answers": answers,
    "given": given,
    "partly": partly,
    "replay": replay,
    "RetryableError": RetryableError,
    "TerminalError": TerminalError,
}


def blocks(part: str, language: str) -> list[str]:
    """Return the blocks of a language in a section."""
    return re.findall(rf"^```{language}\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("title", EXAMPLES)
def test_each_example_does_what_its_test_says(title: str, tmp_path: Path) -> None:
    """Each section has a definition in which nothing is wrong, and a test of it that passes."""
    (definition,) = blocks(EXAMPLES[title], "yaml")
    (test,) = blocks(EXAMPLES[title], "python")
    flow = parse(definition.encode(), f"{title}.yaml")
    assert check(flow, None) == []
    names: dict[str, Any] = {**WORDS, "flow": flow, "folder": tmp_path}
    exec(compile(test, f"docs/workflows.md: {title}", "exec"), names)  # noqa: S102 - our own page
    assert "given(" in test


def test_the_table_has_a_row_for_each_section() -> None:
    """What is described is named in the table, with its tests."""
    rows = re.findall(r"^\| \[([^]]+)\]", SECTIONS["Tests"], re.MULTILINE)
    assert sorted(rows) == sorted(EXAMPLES)


def test_the_table_names_tests_that_there_are() -> None:
    """Each file and each test in the table exists."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", SECTIONS["Tests"])
    assert named
    for file, test in named:
        source = (ROOT / file).read_text()
        assert not test or re.search(rf"def {test}\b", source), f"{file}::{test}"


def test_the_reference_says_what_the_models_say() -> None:
    """`foldflow reference > docs/workflow-reference.md` brings it up to date."""
    assert (DOCS / "workflow-reference.md").read_text() == markdown()
