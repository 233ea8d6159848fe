"""How much memory is left to this process, and arrays that need not be in it.

::

    array   up to a quarter of what is free   memory
            larger                            a file without a name, mapped: the system writes what
                                              it has no memory for, and reads it when it is needed
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["free_bytes", "roomy"]

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
# Of what is free, the part that one array may take: a scan, its labels and their confidence are
# alive at a time, beside the next scan.
_SHARE = 4


def roomy(shape: tuple[int, ...], dtype: DTypeLike, order: str = "C") -> NDArray[Any]:
    """Zeros, in memory where there is plenty of it, else in a file that nobody sees.

    The file is in the folder that ``TMPDIR`` names, else in ``/var/tmp``, which unlike ``/tmp`` is
    on a disk everywhere. Its blocks are taken at once, and are free again when the array is gone.

    Parameters
    ----------
    shape : tuple of int
        Of the array.
    dtype : dtype
        Of the array.
    order : {"C", "F"}
        Which axis lies closest in memory.

    Raises
    ------
    MemoryError
        There is too little memory, and too little room for a file.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    free = free_bytes()
    if free is None or n_bytes * _SHARE <= free:
        return np.zeros(shape, dtype, order)  # type: ignore[call-overload,no-any-return]
    try:
        with tempfile.TemporaryFile(dir=_spill_folder()) as file:
            # A map of blocks that are not there ends the process when the disk is full.
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            mapped = np.memmap(file, dtype, "r+", 0, shape, order)  # type: ignore[call-overload]
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes are neither free in memory nor on disk") from error
    array: NDArray[Any] = np.asarray(mapped)
    return array


def _spill_folder() -> str | None:
    if os.environ.get("TMPDIR") or not os.access("/var/tmp", os.W_OK):
        return None  # tempfile's own choice
    return "/var/tmp"


def free_bytes() -> int | None:
    """Memory that may still be taken: what the machine has free, and the control group allows.

    Of a group (a container, a job of a cluster) what it only keeps of files counts as free, as it
    does for the machine. None where the system does not tell.
    """
    machine = _row(_SYSTEM, "MemAvailable:")
    if machine is None:
        return None
    free = machine * 1024
    limit, used = _number("memory.max"), _number("memory.current")
    if limit is not None and used is not None:
        files = _row(_GROUP / "memory.stat", "inactive_file") or 0
        free = min(free, max(0, limit - used + files))
    return free


def _row(path: Path, name: str) -> int | None:
    try:
        rows = (line.split() for line in path.read_text("ascii").splitlines())
        return next((int(row[1]) for row in rows if row[0] == name), None)
    except (OSError, ValueError, IndexError):
        return None


def _number(name: str) -> int | None:
    try:
        return int((_GROUP / name).read_text("ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None
