import errno
import os
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from streams import data_folder
from streams.settings import Settings


def test_it_is_made_and_left_empty(tmp_path: Path) -> None:
    """With what is above it; again is no mistake."""
    settings = Settings(data_dir=tmp_path / "a" / "b")
    for _ in range(2):
        data_folder.make(settings)
        assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_relative_folder_is_said_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may work in another folder than whoever set it thinks."""
    monkeypatch.chdir(tmp_path)
    Path("data").touch()
    with pytest.raises(data_folder.DataFolderError) as error:
        data_folder.make(Settings(data_dir=Path("data")))
    said = "Set FOLDFLOW_DATA_DIR to a folder that can be written to."
    assert str(error.value) == f"The data folder {tmp_path / 'data'} can't be used: it is no folder. {said}"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Though it is there."""
    _refuse(monkeypatch, number)
    with pytest.raises(data_folder.DataFolderError, match=f"can't be used: {os.strerror(number)}\\. Set FOLDFLOW_DATA_DIR"):
        data_folder.make(Settings(data_dir=tmp_path))


def test_a_full_disk_is_no_wrong_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs room there waits for it."""
    _refuse(monkeypatch, errno.ENOSPC)
    data_folder.make(Settings(data_dir=tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else_is_said(tmp_path: Path) -> None:
    """Given no right to write in it."""
    tmp_path.chmod(0o500)
    with pytest.raises(data_folder.DataFolderError, match="Permission denied"):
        data_folder.make(Settings(data_dir=tmp_path))


def _refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(**_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
