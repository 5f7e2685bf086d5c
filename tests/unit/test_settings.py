"""Settings as people give them, right and wrong, and what every command says of wrong ones."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.cli.main import main
from streams.settings import Settings

Told = tuple[int, list[str]]
Foldflow = Callable[..., Told]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, and with no setting of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("FOLDFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def foldflow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Foldflow:
    """Run a command as the shell does; return its exit code and the lines on standard error."""

    def run(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["foldflow", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return code, capfd.readouterr().err.splitlines()

    return run


WRONG = {
    "PARTITIONS": ("many", '"many"; it must be a whole number, at least 1 and at most 1000'),
    "API_PORT": ("99999", '"99999"; it must be a whole number, at least 1 and at most 65535'),
    "BREAKER_SHARE": ("0", '"0"; it must be a number, above 0 and at most 1'),
    "LOG_LEVEL": ("loud", '"loud"; it must be debug, info, warning or error'),
    "JSON_MIRROR": ("perhaps", '"perhaps"; it must be true or false'),
    "TOPIC_PREFIX": ("a b", '"a b"; it must be a text that matches ^[A-Za-z0-9._-]*$'),
    "PAYLOAD_STORE": ("here", '"here"; it must be a text that matches ^(s3|gs|az|file)://'),
    "TOOL_PATHS": ('["a.py"', '"[\\"a.py\\""; it must be paths with : between them, or a JSON list of paths'),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_variable_is_said_in_a_line(foldflow: Foldflow, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Which one, what it is, what it may be; exit code 2."""
    value, said = WRONG[name]
    monkeypatch.setenv(f"FOLDFLOW_{name}", value)
    assert foldflow("status") == (2, [f"FOLDFLOW_{name} is {said}"])


@pytest.mark.parametrize("name", ["KAFKA", "SCHEMA_REGISTRY"])
def test_a_setting_that_may_hold_a_secret_is_not_shown(foldflow: Foldflow, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Only what is wrong with it."""
    must = 'it must be a JSON object of texts, such as {"name": "value"}'
    for value, said in (
        ("hunter2", "is no JSON (Expecting value, at character 1)"),
        ('{"sasl.password": "hunter2"', "is no JSON (Expecting ',' delimiter, at character 28)"),
        ('["hunter2"]', "is wrong"),
    ):
        monkeypatch.setenv(f"FOLDFLOW_{name}", value)
        assert foldflow("status") == (2, [f"FOLDFLOW_{name} {said}; {must}"])
    monkeypatch.setenv(f"FOLDFLOW_{name}", '{"sasl.password": 271828, "b": "c"}')
    assert foldflow("status") == (2, [f'FOLDFLOW_{name}["sasl.password"] is wrong; it must be a text'])


def test_all_wrong_settings_are_said_at_once(foldflow: Foldflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the environment and of the file, a line each; the value of a token isn't shown."""
    monkeypatch.setenv("FOLDFLOW_PARTITIONS", "many")
    monkeypatch.setenv("foldflow_kafka", "{bad")
    (tmp_path / "foldflow.toml").write_text(
        'api_port = "none"\napi_token = 271828\ndata_dir = 3\ntool_paths = ["a.py", 7]\npartition = 4\nno_such_thing = 1\n'
        "[schema_registry]\nurl = 271828\n"
    )
    code, lines = foldflow("status")
    assert code == 2
    assert sorted(lines) == [
        (
            "FOLDFLOW_KAFKA is no JSON (Expecting property name enclosed in double quotes, at character 2); "
            'it must be a JSON object of texts, such as {"name": "value"}'
        ),
        'FOLDFLOW_PARTITIONS is "many"; it must be a whole number, at least 1 and at most 1000',
        'foldflow.toml: api_port is "none"; it must be a whole number, at least 1 and at most 65535',
        "foldflow.toml: api_token is wrong; it must be a text",
        "foldflow.toml: data_dir is 3; it must be a path",
        "foldflow.toml: no_such_thing is no setting",
        "foldflow.toml: partition is no setting; did you mean partitions?",
        'foldflow.toml: schema_registry["url"] is wrong; it must be a text',
        "foldflow.toml: tool_paths[1] is 7; it must be a path",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"partitions = 4\nmodel == 3\n", "foldflow.toml is no TOML: Invalid value (at line 2, column 8)"),
        (b"model = '\xff'\n", "foldflow.toml is no TOML: 'utf-8' codec can't decode byte 0xff in position 9: invalid start byte"),
    ],
)
def test_a_file_that_is_no_toml_is_said_in_a_line(foldflow: Foldflow, tmp_path: Path, content: bytes, said: str) -> None:
    """With the place."""
    (tmp_path / "foldflow.toml").write_bytes(content)
    assert foldflow("status") == (2, [said])


def test_wrong_settings_are_not_taken_for_wrong_tools(
    foldflow: Foldflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`validate` reads them for its tools; without those, and for help, it needs none."""
    (tmp_path / "w.yaml").write_text("name: w\nsteps:\n  a: {transform: 1}\n")
    monkeypatch.setenv("FOLDFLOW_PARTITIONS", "many")
    code, lines = foldflow("validate", "w.yaml")
    assert (code, [line.partition(" ")[0] for line in lines]) == (2, ["FOLDFLOW_PARTITIONS"])
    assert foldflow("validate", "--no-tools", "w.yaml")[0] == 0
    assert foldflow("status", "--help") == (0, [])


PATHS = {
    "a plain path": ("a/tools.py", ("a/tools.py",)),
    "several": (f"a.py{os.pathsep}/b/c.py{os.pathsep}", ("a.py", "/b/c.py")),
    "a JSON list": (' ["a.py", "b:c.py"]', ("a.py", "b:c.py")),
    "what JSON would take for something else": ("17", ("17",)),
    "nothing": ("", ()),
}


@pytest.mark.parametrize("name", ["tool_paths", "workflow_paths"])
@pytest.mark.parametrize("case", PATHS)
def test_paths_in_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, case: str) -> None:
    """One as it is, several as in PATH, or a JSON list."""
    given, expected = PATHS[case]
    monkeypatch.setenv(f"FOLDFLOW_{name.upper()}", given)
    assert getattr(Settings(), name) == tuple(Path(path) for path in expected)


@pytest.mark.parametrize("name", ["tool_paths", "workflow_paths"])
@pytest.mark.parametrize(
    ("given", "expected"), [("a.py", ["a.py"]), (f"a.py{os.pathsep}b.py", ["a.py", "b.py"]), (["a.py", "b:c.py"],) * 2]
)
def test_paths_in_the_file(tmp_path: Path, name: str, given: object, expected: list[str]) -> None:
    """A text or a list."""
    (tmp_path / "foldflow.toml").write_text(f"{name} = {json.dumps(given)}\n")
    assert getattr(Settings(), name) == tuple(Path(path) for path in expected)


def test_an_empty_variable_without_a_default_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So the file's value holds, if it has one; an empty prefix of the topics is a prefix."""
    for name in ("PRICES", "API_TOKENS", "API_TOKEN", "PAYLOAD_STORE", "READY_FILE", "TOPIC_PREFIX"):
        monkeypatch.setenv(f"FOLDFLOW_{name}", "")
    (tmp_path / "foldflow.toml").write_text('api_tokens = "tokens"\n')
    settings = Settings()
    assert settings.api_tokens == Path("tokens")
    assert (settings.prices, settings.api_token, settings.payload_store, settings.ready_file) == (None,) * 4
    assert settings.topic_prefix == ""


def test_json_in_the_environment_is_added_to_the_files_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment comes first."""
    monkeypatch.setenv("FOLDFLOW_KAFKA", '{"a": "1", "b": "1"}')
    (tmp_path / "foldflow.toml").write_text('[kafka]\nb = "2"\nc = "2"\n')
    assert Settings().kafka == {"a": "1", "b": "1", "c": "2"}


def test_a_variable_that_is_no_setting_is_said_and_nothing_more(foldflow: Foldflow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each, without its value, by a command that needs no settings too; the command goes on."""
    nothing_runs = foldflow("status")
    monkeypatch.setenv("FOLDFLOW_PARTITION", "hunter2")
    monkeypatch.setenv("foldflow_bootstrap_server", "hunter2")
    monkeypatch.setenv("FOLDFLOW_QQQ", "hunter2")
    said = [
        "FOLDFLOW_PARTITION is no setting; did you mean FOLDFLOW_PARTITIONS?",
        "FOLDFLOW_QQQ is no setting",
        "foldflow_bootstrap_server is no setting; did you mean FOLDFLOW_BOOTSTRAP_SERVERS?",
    ]
    assert nothing_runs[0] == 3
    assert foldflow("status") == (3, [*said, *nothing_runs[1]])
    assert foldflow("reference") == (0, said)


def test_every_setting_is_known(foldflow: Foldflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In capitals or not: no warning."""
    for number, (name, field) in enumerate(Settings.model_fields.items()):
        variable = f"FOLDFLOW_{name.upper()}" if number % 2 else f"foldflow_{name}"
        default = field.get_default()
        monkeypatch.setenv(
            variable, default if isinstance(default, str) else "" if default is None else json.dumps(default, default=str)
        )
    monkeypatch.setenv("FOLDFLOW_DATA_DIR", str(tmp_path))
    assert foldflow("status") == (3, ["Nothing is running. Start it with: foldflow up"])
