import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # `instructions` is a module of the measurements only
import instructions


def test_a_step_takes_no_more_than_recorded() -> None:
    """Given what a step took when it was last recorded; when some runs go their way in memory; then no role takes 5 % more.

    Instructions, calls and bytes are counted, so a busy machine says the same as an idle one.
    """
    done = subprocess.run([sys.executable, instructions.__file__], capture_output=True, text=True, check=False)
    if done.returncode == instructions.UNKNOWN:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_takes_more_is_named_with_its_stages() -> None:
    """Given recorded figures; when a role takes 6 % more; then it is told, with those of its stages that do, and nothing else."""
    was = {
        "orchestrator": {"instructions": 1000.0, "calls": 100.0},
        "orchestrator: decide": {"instructions": 500.0},
        "orchestrator: fold": {"instructions": 100.0},
        "tool": {"instructions": 500.0},
        "tool: encode": {"instructions": 100.0},
    }
    now = was | {
        "orchestrator": {"instructions": 1060.0, "calls": 100.0},
        "orchestrator: decide": {"instructions": 560.0},
        "tool: encode": {"instructions": 150.0},
    }
    assert instructions.more(was, now) == [
        "orchestrator: 1060 instructions a step, 1000 recorded (+6%)",
        "orchestrator: decide: 560 instructions a step, 500 recorded (+12%)",
    ]


def test_what_takes_less_or_a_little_more_is_right() -> None:
    """Given recorded figures; when a role takes 4 % more, and another less; then nothing is told."""
    was = {"orchestrator": {"instructions": 1000.0}, "tool": {"instructions": 500.0}}
    assert instructions.more(was, {"orchestrator": {"instructions": 1040.0}, "tool": {"instructions": 100.0}}) == []


def test_what_is_new_has_to_be_recorded() -> None:
    """Given recorded figures; when something is measured that isn't among them; then it is told."""
    assert instructions.more({}, {"bytes": {"inbox": 5.0}}) == ["bytes: inbox are not recorded yet (5 a step)"]
