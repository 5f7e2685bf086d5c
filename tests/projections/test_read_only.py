"""The API changes nothing: nothing in `api/` or `projections/` can write to Kafka."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"producer", "Producer", "SerializingProducer", "AIOProducer", "produce", "send", "flush", "publish", "create_topics"}
ELSEWHERE = {"send", "flush"}
"""Words that others have too, ASGI and files: they count where `kafka` stands before them, or where they are imported."""


def names(tree: ast.AST) -> set[str]:
    """Return all names and attributes that a module uses or imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in ELSEWHERE:
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            if node.attr not in ELSEWHERE or (isinstance(node.value, ast.Name) and node.value.id == "kafka"):
                found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name.rpartition(".")[2])
    return found


@pytest.mark.parametrize("path", sorted([*ROOT.glob("api/**/*.py"), *ROOT.glob("projections/**/*.py")]), ids=str)
def test_no_module_can_make_a_producer(path: Path) -> None:
    """No module names anything that writes to Kafka."""
    assert not names(ast.parse(path.read_text("utf-8"))) & FORBIDDEN
