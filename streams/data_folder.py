"""The data folder: made, and tried, before anything is started that needs it."""

import errno
import tempfile
from typing import Final

from streams.settings import Settings

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class DataFolderError(Exception):
    """The data folder can't be used; the message names it, and says why and what to set."""


def make(settings: Settings) -> None:
    """Make the data folder if it isn't there. Raises DataFolderError if it can't be, or nothing can be written in it.

    A full disk is no reason, as long as the folder is there: whatever needs room waits for it.
    """
    folder = settings.data_dir.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # rights alone don't tell: the disk may be mounted to be read
    except OSError as error:
        if error.errno in _FULL and folder.is_dir():
            return
        why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        hint = "Set FOLDFLOW_DATA_DIR to a folder that can be written to."
        raise DataFolderError(f"The data folder {folder} can't be used: {why}. {hint}") from error
