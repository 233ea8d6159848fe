"""Files: what is none, and those that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOENT
from os import PathLike
from pathlib import Path

from organfast.errors import InputError

__all__ = ["check_is_file", "written_whole"]


def check_is_file(path: str | PathLike[str], remedy: str, kind: str = "a file") -> int:
    """Refuse what cannot be read to its end: a folder, and a pipe or a device, which has none.

    Parameters
    ----------
    path : str or PathLike
        What is to be read.
    remedy : str
        What would do instead.
    kind : str
        What was expected.

    Returns
    -------
    int
        Its size in bytes.

    Raises
    ------
    InputError
        It is no regular file.
    OSError
        It does not exist, or may not be looked at.
    """
    if "\0" in os.fspath(path):
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT))
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise InputError(path, f"is a folder, not {kind}", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(path, "is not a regular file", remedy)
    return status.st_size


@contextmanager
def written_whole(
    path: str | PathLike[str], remedy: str = "give a folder with room to write in"
) -> Iterator[Path]:
    """A path beside a file, to write to; renamed to it at the end, removed after an error.

    Parameters
    ----------
    path : str or PathLike
        The file; replaced if it is there.
    remedy : str
        What would do where it cannot be written.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    beside = Path(path).parent / f".organfast-{secrets.token_hex(8)}.part"
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be written ({reason})", remedy) from None
    finally:
        with suppress(OSError):
            beside.unlink()
