"""What a role's process says last when it can't work with what it was given: whoever looks at its log finds it there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

from infra.embedded.services import environment_of
from streams.settings import Settings

ROOT = Path(__file__).parents[2]
WRONG = {
    "llm": ("prices", "prices: cheap", "FOLDFLOW_PRICES"),
    "tool": (
        "tool_paths",
        "import os\n\nimport nothing_of_that_name\n",
        "wrong.py, line 3: ModuleNotFoundError: No module named 'nothing_of_that_name'",
    ),
    "intake": ("workflow_paths", "name: [", "wrong"),
}


def started(role: str, settings: Settings) -> subprocess.Popen[str]:
    """Start a role by its command."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= environment_of(settings)
    line = [sys.executable, "-m", "infra.cli.main", "worker", role]
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("role", WRONG)
def test_the_last_line_says_what_is_wrong(settings: Settings, tmp_path: Path, role: str) -> None:
    """Given a file that can't be used; then the process ends by 1, and behind all that its libraries say is why."""
    setting, text, said = WRONG[role]
    file = tmp_path / ("wrong.py" if role == "tool" else "wrong.yaml")
    file.write_text(text)
    given = file if setting == "prices" else (file,)
    process = started(role, settings.model_copy(update={setting: given}))
    told, _ = process.communicate(timeout=60)
    last = told.rstrip().splitlines()[-1]
    assert process.returncode == 1
    assert "ended" in last
    assert said in last


@pytest.mark.parametrize("line", [("up",), ("up", "--detach", "--only", "model"), ("down",), ("api",), ("worker", "tool")])
@pytest.mark.parametrize("inside", [False, True])
def test_a_data_folder_that_cannot_be_used_is_said_in_a_line(tmp_path: Path, line: tuple[str, ...], inside: bool) -> None:
    """Given a plain file in its place, or above it; then the command says which folder, why, and by what it is set."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "inside" if inside else tmp_path / "file"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")}
    environment |= {"FOLDFLOW_DATA_DIR": str(folder), "FOLDFLOW_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "infra.cli.main", *line]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    (told,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1
    assert f"{folder} can't be used: {'Not a directory' if inside else 'it is no folder'}" in told
    assert "FOLDFLOW_DATA_DIR" in told
    assert (tmp_path / "file").is_file()


def test_who_waits_for_kafka_says_so(settings: Settings, tmp_path: Path) -> None:
    """Given no Kafka where it should be; then the process says so soon, and goes on to wait."""
    nowhere = f"127.0.0.1:{free_port()}"
    process = started("tool", settings.model_copy(update={"bootstrap_servers": nowhere, "data_dir": tmp_path / "d"}))
    try:
        assert process.stdout is not None
        line = next(each for each in process.stdout if "kafka.waiting" in each)
        assert f"no Kafka at {nowhere}" in line
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
