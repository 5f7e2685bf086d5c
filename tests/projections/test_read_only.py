"""The API changes nothing: nothing in `api/` or `projections/` can write to Kafka."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"producer", "Producer", "SerializingProducer", "AIOProducer", "produce", "send", "flush", "publish", "create_topics"}


def names(tree: ast.AST) -> set[str]:
    """Return all names and attributes that a module uses or imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name.rpartition(".")[2])
    return found


@pytest.mark.parametrize("path", sorted([*ROOT.glob("api/**/*.py"), *ROOT.glob("projections/**/*.py")]), ids=str)
def test_no_module_can_make_a_producer(path: Path) -> None:
    """No module names anything that writes to Kafka."""
    assert not names(ast.parse(path.read_text("utf-8"))) & FORBIDDEN
