"""Recorded histories, decided again by today's code: every decision, byte for byte.

Together they have every input and every effect that there is. A change that is meant to change decisions records them anew by
`python tests/histories/record.py`, and the market analysis's by `python tests/unit/test_market_analysis.py`.
"""

import base64
import importlib.util
import io
import json
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from fastavro import parse_schema, schemaless_writer
from typer.testing import CliRunner, Result

from events import catalog, codec, ids
from events.decisions import Decision, UnreadableInput
from infra.cli.main import command_line
from streams.testing import given, replay
from streams.testing.histories import read

FOLDER = Path(__file__).parents[1] / "histories"
HISTORIES = sorted(FOLDER.glob("*.json"))
MARKET = FOLDER / "market_analysis-1.json"


def test_there_are_histories() -> None:
    """The folder is found."""
    assert HISTORIES


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_history_comes_out_the_same(path: Path) -> None:
    """What was decided once is decided so for ever: runs that are open go on, whoever takes them over."""
    replay(path).then_the_same()


def test_the_histories_have_every_input_and_every_effect() -> None:
    """No type of the catalogue is left out, so no change of what a decision says goes by unseen."""
    decisions = [codec.decode(value, Decision) for path in HISTORIES for value in read(path).values]
    inputs = {type(decision.input) for decision in decisions}
    effects = {type(effect) for decision in decisions for effect in decision.effects}
    assert {*catalog.INPUTS, UnreadableInput} - inputs == set()
    assert set(catalog.EFFECTS) - effects == set()


def _recorder() -> Callable[[Path], list[Path]]:
    path = FOLDER / "record.py"
    spec = importlib.util.spec_from_file_location("record_histories", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return typing.cast("Callable[[Path], list[Path]]", module.record)


def test_recording_anew_changes_nothing(tmp_path: Path) -> None:
    """The files are what `tests/histories/record.py` writes; with no change in decisions it writes them as they are."""
    for made in _recorder()(tmp_path):
        assert made.read_text() == (FOLDER / made.name).read_text(), made.name


# --- A history of older code ---

OLD = Path(__file__).parents[2] / "events/schemas/history/Decision-70387487.avsc"


def test_a_history_in_an_older_schema_is_decided_by_today_s_code(tmp_path: Path) -> None:
    """The bytes are other ones, the chain is theirs, and the decisions are the same."""
    path = tmp_path / "old.json"
    flow = {"name": "w", "steps": {"a": {"tool": {"name": "echo", "arguments": {"n": "=input.n"}}}}}
    given(flow, input={"n": 1}, tools={"echo": 2}).then_completed(2).save(path)
    document, schema, prev = json.loads(path.read_text()), parse_schema(json.loads(OLD.read_text())), ids.FIRST_PREV
    # An answer names its call by the hash of the decision in its old bytes.
    for number, value in enumerate(read(path).values):
        datum = codec.datum(codec.decode(value, Decision)) | {"prev": prev}
        if number:
            datum["input"][1]["call_id"] = ids.effect_id(prev, 0)
        out = io.BytesIO()
        schemaless_writer(out, schema, datum)
        prev = ids.chain_hash(out.getvalue())
        document["decisions"][number] = base64.b64encode(codec.FRAME.pack(0, 70387487) + out.getvalue()).decode()
    path.write_text(json.dumps(document | {"head": prev.hex()}))
    replay(path).then_the_same()


# --- The command ---


def foldflow(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(arguments), list(arguments))


def test_the_command_says_that_all_is_the_same() -> None:
    """A folder's histories, each with a line."""
    result = foldflow("verify", "--file", str(FOLDER))
    assert result.exit_code == 0, result.output
    assert result.output.count("decisions come out as recorded") == len(HISTORIES)


def test_the_command_says_where_a_run_would_go_another_way(tmp_path: Path) -> None:
    """Exit code 1, and the first difference, for people and for programs."""
    spec = read(MARKET).spec
    assert spec is not None
    data = json.loads(spec.canonical)
    next(step for step in data["steps"] if step["name"] == "release")["approval"]["message"] = "Out with it?"
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(data | {"steps": {step.pop("name"): step for step in data["steps"]}}))
    result = foldflow("backtest", "--file", str(MARKET), "--spec", str(other))
    assert result.exit_code == 1, result.output
    assert "comes out differently: effects[1].message: recorded is" in result.output
    (found,) = json.loads(foldflow("backtest", "--file", str(MARKET), "--spec", str(other), "--json").output)
    assert (found["same"], found["difference"]["field"]) == (False, "effects[1].message")
    assert "Out with it?" in found["difference"]["problem"]


def test_the_command_refuses_what_it_can_t_use(tmp_path: Path) -> None:
    """Exit code 2 for a file that is no history, a folder without one, a wrong definition."""
    (tmp_path / "x.json").write_text("no")
    for file in (tmp_path / "x.json", Path(__file__).parent):
        assert foldflow("verify", "--file", str(file)).exit_code == 2, file
    assert foldflow("backtest", "--file", str(MARKET), "--spec", "no.yaml").exit_code == 2
