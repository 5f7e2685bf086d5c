import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_wheel_has_what_is_read_at_run_time(tmp_path: Path) -> None:
    """A wheel, built and installed into an empty folder, reads its schemas, definitions and templates from there."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import events.catalog, streams.workflow.definition, tools.builtin, pathlib, sys;"
        "assert events.catalog.__file__.startswith(sys.argv[1]), events.catalog.__file__;"
        "assert 'market-analysis' in streams.workflow.definition.builtin();"
        "found = {path.suffix for path in pathlib.Path(tools.builtin.__file__).parent.iterdir()};"
        "assert {'.sql', '.j2'} <= found, found;"
        "import api.examples, projections.audit_page;"
        "print(len(events.catalog.ENTRIES))"
    )
    # -S would hide the dependencies; the wheel's folder goes first, the checkout is not on the path.
    run = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); " + code, str(site)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
