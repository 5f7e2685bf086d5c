"""Kafka's jars: downloaded once, each checked against its pinned SHA-256, then kept in the user's cache folder.

The pins (`jars.txt`) name every jar, so nothing is resolved at run time: no POM is read and what runs is what was tested.
A jar is moved to its final place only after its sum was right, so a download that was cut off leaves nothing half done and
running it again takes up where it ended.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.embedded.errors import EmbeddedError

PINS = Path(__file__).with_name("jars.txt")
DOWNLOADS_AT_ONCE = 6


@dataclass(frozen=True, slots=True)
class Pin:
    """One jar: Maven coordinates and the SHA-256 (hex) that it must have."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the jar on disk."""
        return f"{self.artifact}-{self.version}.jar"


def read_pins(text: str) -> tuple[Pin, ...]:
    """Parse `group:artifact:version sha256` lines; `#` starts a comment line."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    # Group, artifact, version, sum: no part may hold a separator.
    return tuple(Pin(*re.split("[: ]", line)) for line in lines)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/foldflow`, else `~/.cache/foldflow`: shared by all projects of this user, safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foldflow"


def jars(
    folder: Path, pins: Sequence[Pin], progress: Callable[[int, int, str], None] = lambda _done, _total, _name: None
) -> list[Path]:
    """Return the paths of all pinned jars below `folder`, in the order of the pins, after fetching those that are missing.

    `progress(done, total, name)` is called after each jar that had to be fetched. Raises `EmbeddedError` when a download
    fails or a jar isn't the pinned one.
    """
    stamp, expected = folder / "verified", _digest_of(pins)
    paths = [folder / pin.file_name for pin in pins]
    if _read(stamp) == expected and all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        stamp.unlink(missing_ok=True)
        missing = [pin for pin in pins if not _is_right(folder / pin.file_name, pin)]
        if missing:
            _fetch_all(folder, missing, len(pins), progress)
        stamp.write_text(expected)
    return paths


def _fetch_all(folder: Path, missing: Sequence[Pin], total: int, progress: Callable[[int, int, str], None]) -> None:
    done, failed = total - len(missing), list[tuple[Pin, BaseException]]()
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        futures = {pool.submit(_fetch, folder, pin): pin for pin in missing}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                failed.append((futures[future], error))
                continue
            done += 1
            progress(done, total, futures[future].file_name)
    wrong = [error for _, error in failed if isinstance(error, EmbeddedError)]
    if wrong:
        raise wrong[0]
    if failed:
        pin, error = failed[0]
        raise EmbeddedError(
            f"{len(failed)} of Kafka's {total} jars could not be downloaded; the first was {pin.file_name}: {error}\n"
            f"The others are kept in {folder}. Check the connection to Maven Central (or the proxy in HTTPS_PROXY) and run the "
            "same command again: it goes on where it stopped. To use a Kafka that already runs, set FOLDFLOW_BOOTSTRAP_SERVERS."
        )
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def _fetch(folder: Path, pin: Pin) -> None:
    # Imported here: jgo is needed once per machine, and takes longer to import than the whole check of a later start.
    from jgo.maven import MavenContext  # noqa: PLC0415

    local = Path(os.environ.get("M2_REPO") or Path.home() / ".m2" / "repository")
    context: Any = MavenContext(repo_cache=folder / "downloads", local_repos=[local], timeout=60)
    artifact = context.project(pin.group, pin.artifact).at_version(pin.version).artifact()
    # jgo takes any file in this place for a finished download, also one that was cut off.
    artifact.cached_path.unlink(missing_ok=True)
    found = Path(artifact.resolve())
    if not _is_right(found, pin) and local in found.parents:
        context.local_repos.clear()
        found = Path(artifact.resolve())
    if not _is_right(found, pin):
        artifact.cached_path.unlink(missing_ok=True)
        raise EmbeddedError(
            f"{pin.file_name} does not have the SHA-256 that Foldflow was tested with ({pin.sha256}), so it was removed.\n"
            "Something between here and Maven Central changed it, or the download was cut off. Run the same command again; if it "
            "stays so, do not use this network for downloads."
        )
    target = folder / pin.file_name
    if local in found.parents:
        part = target.with_suffix(".part")
        shutil.copyfile(found, part)
        found = part
    found.replace(target)


def _is_right(path: Path, pin: Pin) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == pin.sha256


def _digest_of(pins: Sequence[Pin]) -> str:
    return hashlib.sha256("\n".join(f"{pin.file_name} {pin.sha256}" for pin in pins).encode()).hexdigest()


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait while another process fetches into the same folder."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
