"""The README can't leave out what there is."""

from pathlib import Path

import pytest

from events.catalog import TYPES
from events.topics import TOPICS
from infra.cli.main import COMMANDS
from streams.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_event_type_is_documented(name: str) -> None:
    """Each type of the catalogue stands in the README."""
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", sorted(TOPICS))
def test_every_topic_is_documented(name: str) -> None:
    """Each topic stands in the README."""
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented_as_it_is(name: str) -> None:
    """Each setting stands in the README's table with its description."""
    row = next((line for line in README.splitlines() if line.startswith(f"| `FOLDFLOW_{name.upper()}` |")), "")
    assert row.endswith(f"| {Settings.model_fields[name].description} |")


def test_where_the_command_is_stands_before_its_first_use() -> None:
    """Whoever has only cloned this has no `foldflow` on the path of their shell."""
    begin = README.index("## Using it")
    before = README[begin : README.index("\nfoldflow ", begin)]
    assert "make install" in before
    assert '\nexport PATH="$PWD/.venv/bin:$PATH"' in before


@pytest.mark.parametrize("name", sorted(command.name for command in COMMANDS))
def test_every_command_is_documented(name: str) -> None:
    """Each command stands in the README."""
    assert f"foldflow {name}" in README
