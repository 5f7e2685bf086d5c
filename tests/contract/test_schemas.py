"""Schemas evolve, and every version that was ever released stays readable.

Released is what stood on main. After a change of a schema, `python tests/contract/release_schemas.py` writes the new version to
`events/schemas/history/` and its id to `events/schemas/released.json`; the versions before are there already, and stay.
"""

import copy
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from compatibility import named, problems
from fastavro import parse_schema, schemaless_writer
from release_schemas import SCHEMAS, release

from events import catalog, codec

ROOT = Path(__file__).parents[2]
RELEASED: dict[str, list[int]] = json.loads((SCHEMAS / "released.json").read_text("utf-8"))
VERSIONS = [(name, version) for name, ids in RELEASED.items() for version in ids]
KINDS = {kind.__name__: kind for kind in catalog.RECORDS}
PUBLISHED = 2119492432
versions = pytest.mark.parametrize(("name", "version"), VERSIONS, ids=str)


@cache
def kept(name: str, version: int) -> Any:
    """Return a released schema."""
    return json.loads((SCHEMAS / "history" / f"{name}-{version}.avsc").read_text("utf-8"))


# --- Nothing is forgotten ---


def test_today_s_schemas_are_released() -> None:
    """Who changes a schema says so; the version that it had before stands in the history already."""
    today = {kind.__name__: entry.id for kind, entry in catalog.ENTRIES.items()}
    missing = [name for name, version in today.items() if version not in RELEASED.get(name, [])]
    assert not missing, f"{missing} changed or are new: run `python tests/contract/release_schemas.py` and commit what it writes"
    assert RELEASED.keys() <= today.keys(), "a record that stood on a topic once is still to be read"


def test_the_history_holds_what_was_released_unchanged() -> None:
    """A file for each id in the manifest and no other; what is in it has that name and that id."""
    files = {path.name for path in (SCHEMAS / "history").iterdir()}
    assert files == {f"{name}-{version}.avsc" for name, version in VERSIONS}
    for name, version in VERSIONS:
        assert (kept(name, version)["name"], catalog.fingerprint(kept(name, version))) == (name, version)
    assert len({version for _, version in VERSIONS}) == len(VERSIONS), "an id stands for one schema"


def test_the_schema_that_tells_of_schemas_never_changes() -> None:
    """Old code must be able to read it, to know newer code's records from garbage: it has one version, for ever."""
    assert catalog.ENTRIES[KINDS["SchemaPublished"]].id == PUBLISHED
    assert RELEASED.get("SchemaPublished", [PUBLISHED]) == [PUBLISHED]


def test_releasing_keeps_what_was_there(tmp_path: Path) -> None:
    """Given a release before the last change, then releasing adds today's version beside the old one; a second time, nothing."""
    (tmp_path / "history").mkdir()
    (tmp_path / "released.json").write_text(json.dumps({"Decision": [1]}))
    assert len(release(tmp_path)) == len(catalog.RECORDS)
    assert json.loads((tmp_path / "released.json").read_text())["Decision"] == [1, catalog.ENTRIES[KINDS["Decision"]].id]
    assert release(tmp_path) == []


IDS = "import json; from events.catalog import ENTRIES; print(json.dumps({k.__name__: e.id for k, e in ENTRIES.items()}))"


def test_every_schema_that_stood_on_main_is_kept(tmp_path: Path) -> None:
    """The catalogue of each commit that changed one, asked for its ids: all of them are in the manifest."""
    for commit in _commits("events/schemas", "events/catalog.py"):
        folder = tmp_path / commit
        folder.mkdir()
        with subprocess.Popen(["git", "archive", commit, "events"], cwd=ROOT, stdout=subprocess.PIPE) as archive:
            subprocess.run(["tar", "x", "-C", folder], stdin=archive.stdout, check=True)
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); {IDS}"
        done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        missing = {name: version for name, version in json.loads(done.stdout).items() if version not in RELEASED.get(name, [])}
        assert not missing, f"{commit} wrote {missing}, and nobody could read that any more"


def _commits(*paths: str) -> list[str]:
    """Return the commits that changed these paths. Skips where that can't be known."""
    shallow = _git("rev-parse", "--is-shallow-repository")
    if shallow.strip() != "false":
        pytest.skip("no git history here: an archive or a shallow clone (`git fetch --unshallow`)")
    return _git("rev-list", "HEAD", "--", *paths).split()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


# --- By Avro's rules ---


@versions
def test_today_s_schema_reads_every_released_one(name: str, version: int) -> None:
    """No branch is gone or renamed, no type changed, no field new without a default, none dropped."""
    assert problems(kept(name, version), catalog.ENTRIES[KINDS[name]].schema) == []


def _in(record: str, change: Callable[[dict[str, Any]], None]) -> Any:
    """Return today's schema of decisions with a change in one of its records."""
    schema = copy.deepcopy(catalog.ENTRIES[KINDS["Decision"]].schema)
    change(named(schema)[f"foldflow.{record}"])
    return schema


def _field(record: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (field for field in record["fields"] if field["name"] == name)
    return found  # type: ignore[no-any-return]


BREAKING: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "a field without a default": ("StepFailed", lambda r: r["fields"].append({"name": "x", "type": "int"}), "has no default"),
    "a renamed field": ("TimerSet", lambda r: _field(r, "due").update(name="at"), "TimerSet.due: is gone"),
    "a dropped field": ("Failure", lambda r: r["fields"].pop(), "is gone"),
    "a changed type": ("Decision", lambda r: _field(r, "seq").update(type="string"), "Decision.seq: was long, is string"),
    "a narrower type": ("Decision", lambda r: _field(r, "seq").update(type="int"), "Decision.seq: was long, is int"),
    "what may be missing no more": ("SignalAwaited", lambda r: _field(r, "due").update(type="long"), "was null, is long"),
    "a removed branch": ("Decision", lambda r: _field(r, "effects")["type"]["items"].pop(), "is no branch of the union any more"),
    "a renamed branch": ("RunPaused", lambda r: r.update(name="RunHeld"), "RunPaused is no branch of the union any more"),
}


@pytest.mark.parametrize("change", BREAKING)
def test_a_change_that_breaks_readers_is_found(change: str) -> None:
    """Each of them is named, with its place."""
    record, make, says = BREAKING[change]
    found = problems(catalog.ENTRIES[KINDS["Decision"]].schema, _in(record, make))
    assert any(says in each for each in found), found


def test_a_change_that_breaks_nobody_passes() -> None:
    """A field with a default, a branch more, a type that holds more, other documentation."""

    def grow(record: dict[str, Any]) -> None:
        record["fields"].append({"name": "x", "type": ["null", "string"], "default": None})
        record["doc"] = "Something else."
        _field(record, "step").update(type=["string", "null"])

    assert problems(catalog.ENTRIES[KINDS["Decision"]].schema, _in("StepFailed", grow)) == []
    with_more = _in("Decision", lambda r: _field(r, "effects")["type"]["items"].append({**r, "name": "New", "fields": []}))
    assert problems(catalog.ENTRIES[KINDS["Decision"]].schema, with_more) == []


# --- With real bytes ---


def _datum(schema: Any, names: dict[str, Any], rng: random.Random, *, all_items: bool = False) -> Any:
    """Return random data of a schema. `all_items`: each array of a union has an item of each branch."""
    if isinstance(schema, str) and schema in names:
        schema = names[schema]
    if isinstance(schema, list):
        return _branch(rng.choice(schema), names, rng)
    match schema["type"] if isinstance(schema, dict) else schema:
        case "record":
            return {f["name"]: _datum(f["type"], names, rng, all_items=all_items) for f in schema["fields"]}
        case "array":
            union = schema["items"] if isinstance(schema["items"], list) else [schema["items"]]
            return [_branch(each, names, rng) for each in (union if all_items else rng.choices(union, k=rng.randrange(3)))]
        case "map":
            return {f"k{i}": _datum(schema["values"], names, rng) for i in range(rng.randrange(3))}
        case "null":
            return None
        case "boolean":
            return rng.random() < 0.5
        case "int":
            return rng.randrange(-(2**31), 2**31)
        case "long":
            return rng.randrange(-(2**63), 2**63)
        case "double":
            return rng.random() * 1e9
        case "string":
            return rng.choice(("", "a", "Grüße 🙂", "x" * 300))
        case "bytes":
            return rng.randbytes(rng.choice((0, 32)))
        case other:
            raise AssertionError(other)


def _branch(schema: Any, names: dict[str, Any], rng: random.Random) -> Any:
    made = _datum(schema, names, rng)
    record = names.get(schema) if isinstance(schema, str) else schema
    return (f"foldflow.{record['name']}", made) if isinstance(record, dict) and record["type"] == "record" else made


def _written(schema: Any, datum: Any) -> bytes:
    out = io.BytesIO()
    schemaless_writer(out, parse_schema(catalog._without_logical_types(schema)), datum)
    return codec.FRAME.pack(0, catalog.fingerprint(schema)) + out.getvalue()


def _same(then: Any, now: Any) -> bool:
    """Say whether an event holds what was written: each field that there was has its value."""
    if isinstance(then, tuple):
        return then[0] == f"foldflow.{type(now).__name__}" and _same(then[1], now)
    if isinstance(then, dict) and hasattr(now, "__dataclass_fields__"):
        return all(_same(value, getattr(now, name)) for name, value in then.items())
    if isinstance(then, list):
        return len(then) == len(now) and all(map(_same, then, now))
    return bool(then == now)


@versions
def test_today_s_code_reads_the_bytes_of_every_released_schema(name: str, version: int) -> None:
    """Records of all branches, written with the old schema, come out of today's codec as today's events with what they said."""
    schema = kept(name, version)
    names, rng = named(schema), random.Random(version)  # noqa: S311 - test data
    for number in range(300):
        datum = _datum(schema, names, rng, all_items=number % 10 == 0)
        value = _written(schema, datum)
        event = codec.decode(value, KINDS[name])
        assert _same(datum, event)
        assert codec.kind_of(value) is KINDS[name]
        assert codec.decode(codec.encode(event), KINDS[name]) == event, "and today's code can write it"


def test_a_version_that_is_not_kept_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is the history that makes old records readable: without its file, a decision of old code has an unknown schema."""
    schema = kept("Decision", RELEASED["Decision"][0])
    rng = random.Random(1)  # noqa: S311 - test data
    value = _written(schema, _datum(schema, named(schema), rng))
    monkeypatch.setattr("events.catalog.resources.files", lambda package: tmp_path / package)
    catalog.schema.cache_clear()
    catalog.parsed.cache_clear()
    try:
        assert codec.kind_of(value) is None
    finally:
        monkeypatch.undo()
        catalog.schema.cache_clear()
        catalog.parsed.cache_clear()
    assert codec.kind_of(value) is KINDS["Decision"]
