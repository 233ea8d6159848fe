"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from organfast.errors import InputError

__all__ = ["written_whole"]


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
