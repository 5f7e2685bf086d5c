"""Recorded history decided by another version: which runs would have gone another way, and where."""

import json
from pathlib import Path
from typing import Any

import pytest
from projection_histories import BOTH, SPEC, Logs, as_kcat, logs
from typer.testing import CliRunner, Result

from infra.cli.main import command_line
from projections.backtest import Backtest, Outcome, together
from projections.replay_parallel import each_partition
from projections.replay_sources import archive
from streams.workflow.payloads import NoPayloads
from streams.workflow.spec import WorkflowSpec


def dump(path: Path, made: Logs) -> Path:
    rows = [(partition, offset, made.partitions[partition][offset]) for partition, offset in made.order]
    path.write_bytes(as_kcat(rows))
    return path


@pytest.fixture
def made() -> Logs:
    return logs(2, 10, 0.1, BOTH)


@pytest.fixture
def file(tmp_path: Path, made: Logs) -> Path:
    return dump(tmp_path / "run.bin", made)


def other(spec: WorkflowSpec, **changed: Any) -> WorkflowSpec:
    """Return another version, in which these steps are told otherwise."""
    data = json.loads(spec.canonical)
    steps = {step["name"]: {key: value for key, value in step.items() if key != "name"} for step in data["steps"]}
    return WorkflowSpec.model_validate(data | {"steps": {name: step | changed.get(name, {}) for name, step in steps.items()}})


def outcome(file: Path, spec: WorkflowSpec) -> Outcome:
    source = archive(file)
    job = Backtest(source, spec.canonical, spec.name, NoPayloads)
    return together(each_partition(job, source.spans(), 1, lambda _: None))


def test_the_same_version_goes_the_same_way(file: Path, made: Logs) -> None:
    """Given losers and late inputs as well: all runs of the workflow are decided, whole, and none differs."""
    for spec in BOTH:
        found = outcome(file, spec)
        mine = [event for event in made.accepted if made.states[event.decision.run_id].workflow == spec.name]
        assert (found.runs, found.same, found.differ, found.unknown) == (5, 5, 0, 0)
        assert found.decisions == len(mine)


def test_another_version_differs_where_it_is_told_otherwise(file: Path, made: Logs) -> None:
    """A step's arguments change: each run that reached it differs at the decision that asked for it, and nowhere before."""
    found = outcome(file, other(SPEC, look={"tool": {"name": "echo", "arguments": {"text": "=input.n + 1"}}}))
    assert (found.runs, found.differ, found.same) == (5, 5, 0)
    assert found.where == {"look": 5}
    for each in found.others:
        assert (each.seq, each.steps) == (1, ("look",))
        assert each.field.endswith(".arguments.text")
        assert int(each.now) == int(each.recorded) + 1
    ended = outcome(file, other(SPEC, end={"tool": {"name": "print"}}))
    reached = {
        event.decision.run_id
        for event in made.accepted
        if any(getattr(effect, "step", "") == "end" and hasattr(effect, "tool") for effect in event.decision.effects)
    }
    assert {each.run_id for each in ended.others} == reached
    assert ended.same == 5 - len(reached)


def test_a_step_more_is_seen_and_the_steps_are_named(file: Path) -> None:
    """Another effect follows: it is listed beside what is recorded."""
    data = json.loads(SPEC.canonical)
    steps = {step["name"]: {key: value for key, value in step.items() if key != "name"} for step in data["steps"]}
    more = WorkflowSpec.model_validate(data | {"steps": steps | {"extra": {"tool": {"name": "echo", "arguments": {}}}}})
    found = outcome(file, more)
    assert found.differ == 5
    assert all(each.steps == ("extra",) and "ToolCallRequested extra" in each.effects for each in found.others)
    assert all("ToolCallRequested extra" not in each.recorded_effects for each in found.others)


def test_a_version_that_refuses_the_input_says_so(file: Path) -> None:
    """Its input's schema asks for what those runs don't have."""
    strict = WorkflowSpec.model_validate(
        json.loads(SPEC.canonical)
        | {"input": {"type": "object", "required": ["who"]}}
        | {
            "steps": {
                step["name"]: {k: v for k, v in step.items() if k != "name"} for step in json.loads(SPEC.canonical)["steps"]
            }
        }
    )
    found = outcome(file, strict)
    assert (found.refused, found.differ) == (5, 5)
    assert "'who' is a required property" in found.others[0].now


def foldflow(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(arguments), list(arguments))


def test_the_command_reports_runs_and_places(file: Path, tmp_path: Path) -> None:
    """Exit code 0 when none differs, 1 when some do, 2 when there are no such runs."""

    def written(spec: WorkflowSpec, name: str = "") -> str:
        data = json.loads(spec.canonical)
        path = tmp_path / f"{spec.digest[:8]}{name}.yaml"
        steps = {step.pop("name"): step for step in data["steps"]}
        path.write_text(json.dumps(data | {"steps": steps} | ({"name": name} if name else {})))
        return str(path)

    common = ("--from", str(file), "--processes", "1")
    same = foldflow("backtest", "--spec", written(SPEC), *common)
    assert same.exit_code == 0, same.output
    assert "the same way   5" in same.output
    changed = other(SPEC, look={"tool": {"name": "shout", "arguments": {}}})
    differs = foldflow("backtest", "--spec", written(changed), *common)
    assert differs.exit_code == 1, differs.output
    assert "where: look 5" in differs.output
    told = json.loads(foldflow("backtest", "--spec", written(changed), *common, "--json").output)
    assert (told["runs"], told["differ"], len(told["runs_that_differ"])) == (5, 5, 5)
    assert foldflow("backtest", "--spec", written(SPEC, "nobodys"), *common).exit_code == 2
    assert foldflow("backtest", "--spec", written(SPEC, "nobodys"), "--workflow", SPEC.name, *common).exit_code == 0
