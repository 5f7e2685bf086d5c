"""A run is stepped through as it stands on the log: its state after each decision, and what each changed."""

import itertools
import json
from pathlib import Path

import pytest
from projection_histories import BOTH, SPEC, Logs, as_kcat, logs
from typer.testing import CliRunner, Result

from events import codec, ids
from events.commands import WorkflowRegistered
from infra.cli.main import command_line
from infra.cli.replay import Place, found_at, pressed
from projections.replay import Moment, changes, moments, state_json
from projections.replay_sources import archive
from streams.workflow.state import INITIAL


def dump(path: Path, made: Logs) -> Path:
    """Write what kcat writes, definitions and all."""
    rows = [(partition, offset, made.partitions[partition][offset]) for partition, offset in made.order]
    rows.append((0, 0, codec.encode(WorkflowRegistered(SPEC.name, SPEC.digest, SPEC.canonical, current=True))))
    path.write_bytes(as_kcat(rows))
    return path


@pytest.fixture
def made() -> Logs:
    return logs(4, 6, 0.1, BOTH)


@pytest.fixture
def file(tmp_path: Path, made: Logs) -> Path:
    return dump(tmp_path / "run.bin", made)


def steps_of(file: Path, run_id: str) -> list[Moment]:
    return list(moments(archive(file), run_id))


def foldflow(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(arguments), list(arguments))


def test_the_states_are_those_of_the_run(made: Logs, file: Path) -> None:
    """Given a log with losers, each accepted decision is a step, in order, and the last state is the run's."""
    for run_id, state in made.states.items():
        steps = steps_of(file, run_id)
        assert [step.hash for step in steps] == [event.hash for event in made.accepted if event.decision.run_id == run_id]
        assert (steps[0].before, steps[-1].after) == (INITIAL, state)
        assert all(one.after == other.before for one, other in itertools.pairwise(steps))


def test_what_changed_leads_from_one_state_to_the_next(made: Logs, file: Path) -> None:
    """Each change, put into the state before, gives the state after; nothing else differs. States are JSON."""
    for run_id in made.states:
        for step in steps_of(file, run_id):
            before, after = (json.loads(json.dumps(state_json(state))) for state in (step.before, step.after))
            for change in changes(step.before, step.after):
                parts = change.what.removeprefix("steps.")
                path, _, name = parts.rpartition(".") if parts != change.what else ("", "", change.what)
                part = before["steps"].setdefault(path, {}) if path else before
                if name not in (after["steps"].get(path, {}) if path else after):
                    part.pop(name, None)
                else:
                    part[name] = json.loads(json.dumps(change.after))
            before["steps"] = {path: each for path, each in before["steps"].items() if each}
            assert {**before, "seq": 0, "head": ""} == {**after, "seq": 0, "head": ""}


def test_one_goes_forwards_backwards_and_to_a_place(file: Path) -> None:
    """Keys move within the run; a number or a time jumps; what is no place is said and changes nothing."""
    steps = steps_of(file, ids.run_id("request 1"))
    last = len(steps) - 1
    assert pressed(steps, Place(), "\x1b[C").index == 1
    assert pressed(steps, Place(1), "p").index == 0
    assert pressed(steps, Place(0), "p") == Place(0, said="that was the first decision")
    assert pressed(steps, Place(last), "n").index == last
    assert (pressed(steps, Place(1), "G").index, pressed(steps, Place(last), "g").index) == (last, 0)
    assert pressed(steps, Place(), "s").whole
    assert pressed(steps, Place(), "q").over
    place = Place()
    for key in ("3", "9", "\x7f", "\r"):
        place = pressed(steps, place, key)
    assert (place.index, place.typed) == (2, None)
    wrong = pressed(steps, Place(1, typed="999"), "\r")
    assert (wrong.index, wrong.said) == (1, f"There is no decision 999: they are 1 to {last + 1}.")
    assert pressed(steps, Place(1, typed="9"), "\x1b") == Place(1)


def test_a_time_names_the_last_decision_before_it(file: Path) -> None:
    """Given ISO 8601 with a zone; a time before the run is none."""
    steps = steps_of(file, ids.run_id("request 1"))
    times = [f"{step.decision.at / 1000:.3f}" for step in steps]
    assert times == sorted(times)
    assert found_at(steps, "2100-01-01T00:00Z") == len(steps) - 1
    assert str(found_at(steps, "2000-01-01")).startswith("The run began at")
    assert "neither" in str(found_at(steps, "noon"))


def test_the_command_prints_all_steps_where_there_is_no_terminal(file: Path) -> None:
    """A line for each decision, what followed and what changed; the same as JSON."""
    result = foldflow("replay", "request 0", "--from", str(file))
    assert result.exit_code == 0, result.output
    assert "started with" in result.output
    assert "status: new → " in result.output
    told = json.loads(foldflow("replay", "request 0", "--from", str(file), "--json").output)
    assert [step["seq"] for step in told["steps"]] == list(range(1, len(told["steps"]) + 1))
    assert told["steps"][0]["input"]["type"] == "StartRun"
    assert {"what": "status", "before": "new", "after": "open"} in told["steps"][0]["changes"]


def test_the_command_shows_one_state(file: Path) -> None:
    """--at a decision: the run as that left it; exit code 2 for one that there isn't."""
    run_id = ids.run_id("request 0")
    third = steps_of(file, run_id)[2]
    told = json.loads(foldflow("replay", run_id, "--at", "3", "--from", str(file), "--json").output)
    assert told == {**told, **json.loads(json.dumps(state_json(third.after)))}
    shown = foldflow("replay", run_id, "--at", "3", "--from", str(file))
    assert shown.exit_code == 0, shown.output
    assert "after decision 3" in shown.output
    missing = foldflow("replay", run_id, "--at", "300", "--from", str(file))
    assert (missing.exit_code, "There is no decision 300" in missing.output) == (2, True)
    assert foldflow("replay", "request 77", "--from", str(file)).exit_code == 2
