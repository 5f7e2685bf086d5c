"""`foldflow validate` and `foldflow diff`, in this process; nothing here needs Kafka."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from infra.cli import diff as diff_command
from infra.cli.main import command_line
from streams.workflow.definition import load, parse

BUILT_IN = Path(__file__).parents[2] / "streams/workflows/market_analysis.yaml"
GOOD = "name: w\nsteps:\n  a: {transform: 1}\n  b: {needs: [a], transform: 2}\n  c: {transform: 3}\n"
WRONG = (
    "name: w\nsteps:\n  a:\n    tool: {name: ecko}\n  b:\n    needs: [a]\n    when: steps.a.status == 'done'\n    transform: 1\n"
)


def foldflow(*arguments: str) -> Result:
    """Run a command."""
    return CliRunner().invoke(command_line(arguments), list(arguments), prog_name="foldflow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a good and a wrong definition."""
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "wrong.yaml").write_text(WRONG)
    return tmp_path


def test_a_good_file_is_good(folder: Path) -> None:
    """Exit code 0, nothing on standard output, one line for a person."""
    done = foldflow("validate", str(folder / "good.yaml"), str(BUILT_IN))
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        f"{folder}/good.yaml: w {load(folder / 'good.yaml').digest[:12]}: nothing is wrong",
        f"{BUILT_IN}: market-analysis {load(BUILT_IN).digest[:12]}: nothing is wrong",
    ]


def test_mistakes_are_said_with_their_places(folder: Path) -> None:
    """On standard output, each with file, line, column and the nearest right spelling; exit code 1 if any file has some."""
    done = foldflow("validate", str(folder))
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        f"{folder}/wrong.yaml:4:12: steps.a.tool.name: there is no tool `ecko`; did you mean `echo`?",
        (
            f"{folder}/wrong.yaml:7:5: steps.b.when: `steps.a.status` is never 'done'; "
            "there are `cancelled`, `completed`, `failed`, `skipped`"
        ),
    ]


def test_tools_need_not_be_here(folder: Path) -> None:
    """--no-tools says nothing about them."""
    assert "ecko" not in foldflow("validate", "--no-tools", str(folder)).stdout


def test_tools_in_files_are_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that FOLDFLOW_TOOL_PATHS names; a file that can't be loaded ends with exit code 2 and says how to go on."""
    (folder / "mine.py").write_text("def ecko() -> str:\n    return ''\n")
    monkeypatch.setenv("FOLDFLOW_TOOL_PATHS", json.dumps([str(folder / "mine.py")]))
    assert "ecko" not in foldflow("validate", str(folder / "wrong.yaml")).stdout
    (folder / "mine.py").write_text("import nothing_of_this_name\n")
    broken = foldflow("validate", str(folder / "good.yaml"))
    assert (broken.exit_code, broken.stderr.splitlines()) == (
        2,
        [
            f"The tools can't be loaded: {folder}/mine.py, line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
            "To check without them: foldflow validate --no-tools …",
        ],
    )


def test_scripts_get_json(folder: Path) -> None:
    """--json: one entry a file, problems with numbers."""
    done = foldflow("validate", "--json", str(folder / "wrong.yaml"), str(folder / "good.yaml"), str(folder / "none.yaml"))
    wrong, good, none = json.loads(done.stdout)
    assert done.exit_code == 1
    assert wrong["problems"][0] == {
        "line": 4,
        "column": 12,
        "where": "steps.a.tool.name",
        "message": "there is no tool `ecko`; did you mean `echo`?",
    }
    assert (good["name"], good["digest"], good["problems"]) == ("w", load(folder / "good.yaml").digest, [])
    assert none["problems"][0]["message"] == "can't be read: No such file or directory"


@pytest.mark.parametrize(
    "arguments", [("validate",), ("validate", "--nope", "x"), ("diff", "a"), ("diff", "/nowhere.yaml", "/nowhere.yaml")]
)
def test_a_wrong_use_is_no_mistake_in_a_file(arguments: tuple[str, ...]) -> None:
    """Exit code 2."""
    assert foldflow(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["validate", "diff", "workflows"])
def test_help_has_examples_and_exit_codes(command: str) -> None:
    """--help shows how it is called."""
    done = foldflow(command, "--help")
    assert f"foldflow {command} " in done.output.split("For example:")[1]
    assert "Exit codes: 0" in done.output


def test_the_same_version_has_no_difference(folder: Path) -> None:
    """However it is spelled: exit code 0."""
    (folder / "same.yaml").write_text("steps: {a: {transform: 1}, b: {transform: 2, needs: [a]}, c: {transform: 3}}\nname: w\n")
    done = foldflow("diff", str(folder / "good.yaml"), str(folder / "same.yaml"))
    assert (done.exit_code, done.stdout, "are the same version: w" in done.stderr) == (0, "", True)


def test_differences_are_shown_step_by_step(folder: Path) -> None:
    """What was added, removed, changed and moved, and the lines that changed; exit code 1."""
    (folder / "new.yaml").write_text(
        "name: w\ndescription: new\nsteps:\n  c: {transform: 3}\n  a: {transform: 1, on_failure: continue}\n"
        "  d: {steps: {x: {transform: {k: [1]}}}}\n"
    )
    old, new = load(folder / "good.yaml"), load(folder / "new.yaml")
    done = foldflow("diff", str(folder / "good.yaml"), str(folder / "new.yaml"))
    assert done.exit_code == 1
    assert [line.rstrip() for line in done.stdout.splitlines()] == [
        f"w {old.digest[:12]} → w {new.digest[:12]}",
        "+ description added",
        "    +new",
        "~ steps.a changed",
        "    @@ -1 +1,2 @@",
        "    +on_failure: continue",
        "     transform: 1",
        "+ steps.d added",
        "    +steps:",
        "    +  x:",
        "    +    transform:",
        "    +      k:",
        "    +      - 1",
        "- steps.b removed",
        "    -needs:",
        "    -- a",
        "    -transform: 2",
        "~ steps moved",
        "    @@ -1,2 +1,2 @@",
        "    +- c",
        "     - a",
        "    -- c",
    ]
    as_json = json.loads(foldflow("diff", "--json", str(folder / "good.yaml"), str(folder / "new.yaml")).stdout)
    assert [(each["part"], each["change"]) for each in as_json["changes"]] == [
        ("description", "added"),
        ("steps.a", "changed"),
        ("steps.d", "added"),
        ("steps.b", "removed"),
        ("steps", "moved"),
    ]
    assert as_json["new"] == {"given": str(folder / "new.yaml"), "name": "w", "digest": new.digest}


def test_any_change_of_the_digest_is_shown() -> None:
    """Every part that a definition has, down to a case of a switch of a step of a step."""
    old = parse(GOOD.encode(), "f")
    for more in (
        "time_limit: 1h",
        "output: 1",
        "input: {type: object}",
        "compensations: {u: {tool: {name: echo}}}",
        "finally: {z: {transform: 1}}",
    ):
        assert len(diff_command.compare(old, parse(f"{GOOD}{more}\n".encode(), "f"))) == 1, more
    block = "name: w\nsteps:\n  a:\n    steps:\n      b: {switch: {c: {when: input.x, transform: 1}, d: {transform: %s}}}\n"
    (change,) = diff_command.compare(parse((block % 2).encode(), "f"), parse((block % 3).encode(), "f"))
    assert (change.part, change.change) == ("steps.a", "changed")
    assert [line for line in change.diff if line[0] in "+-"] == ["-        transform: 2", "+        transform: 3"]
