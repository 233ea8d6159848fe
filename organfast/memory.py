"""How much memory segmenting a scan takes, told from its header."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

import numpy as np

from organfast.errors import InputError
from organfast.models.classifier import Model
from organfast.models.forest import Forest
from organfast.nifti import Geometry, is_mapped, read_geometry
from organfast.pipeline import Settings

__all__ = ["LIBRARIES", "resident_bytes", "scan_bytes"]

LIBRARIES = 64 << 20
"""Bytes of what a process loads with its first scan (nibabel, SciPy) and of its buffers. With two
forests, on the working grid and native, and 256 x 256 x 120 and 512 x 512 x 200 voxels, this and
``scan_bytes`` were 4 to 26 % above what the process grew by."""

# Most slices of positions in a window of levels, and what making levels takes, in levels.
_RUN = 16
_SUMS = 2
# Slices of an adapted scan that are there at once, of all classes: two threads' runs of 16 with
# what they are corrected by, and those that wait to be taken.
_ADAPTED = 80
# To weigh organs up: of one at a time, its probabilities, their sum over all, parts and the like.
_WEIGHING = 11
# Of an atlas: itself, with the share of no organ beside it, and what the file holds of it.
_ATLAS = 3
# A network keeps maps of its own beside the levels.
_NETWORK = 8


def scan_bytes(path: str | PathLike[str], model: Model, settings: Settings) -> int | None:
    """Memory that segmenting a scan takes beside the program and the model, roughly.

    ::

        scan voxels      int16 HU, label, confidence, and a byte for each map that is written
                         (no HU of a .nii that is mapped: the system drops what it needs room for)
        model's grid     int16 HU; levels of as many slices as the pattern reaches, thrice
        positions        float32 for each map that is kept; adapted, for each class, and some slices
                         of each class on the model's grid
        atlas            three bytes for each of its voxels: as it is, for the fit, as in the file

    Parameters
    ----------
    path : str or PathLike
        Its header is read.
    model : Model
        What it is segmented by.
    settings : Settings
        How.

    Returns
    -------
    int or None
        Bytes; None where no header can be read that tells the size.
    """
    try:
        geometry, voxel = read_geometry(path), 0 if is_mapped(path) else 2
    except InputError:
        return None
    n = math.prod(geometry.shape)
    label = 1 if len(model.classes) <= 256 else 2
    n_maps = len(settings.probabilities)
    n_cols, n_rows, n_slices = _grid_shape(geometry, model)
    n_grid = n_cols * n_rows * n_slices
    reach_k, reach_i, reach_j = model.pattern.reach
    window = min(n_slices, _RUN) + 2 * reach_k
    level = 2 * (n_cols + 2 * reach_j) * (n_rows + 2 * reach_i) * window
    levels = level * (len(model.pattern.widths) + _SUMS)
    if not isinstance(model.classifier, Forest):
        levels *= _NETWORK
    n_positions = n_grid // math.prod(_stride(model, settings))
    of_maps, adapted = n_maps * n_positions, 0
    if settings.adapts(model) is not None:
        slices = n_cols * n_rows * min(n_slices, _ADAPTED)
        of_maps = n_maps * n_grid
        adapted = len(model.classes) * (n_positions + slices) + _WEIGHING * n_positions
    atlas = 0 if model.atlas is None else _ATLAS * model.atlas.shares.size
    return (
        n * (voxel + label + bool(settings.confidence) + bool(n_maps))
        + n_grid * (0 if model.grid.spacing_mm is None else 2)
        + levels
        + 4 * (of_maps + adapted)
        + atlas
    )


def _stride(model: Model, settings: Settings) -> tuple[int, ...]:
    """Voxels between positions, in any order."""
    if settings.stride is None:
        return model.stride
    return settings.stride if isinstance(settings.stride, tuple) else (settings.stride,) * 2


def resident_bytes() -> int:
    """Memory that this process holds now, where the system tells; else 0."""
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return 0
    rows = (row.split() for row in status.splitlines() if row.startswith("VmRSS:"))
    return next((int(row[1]) * 1024 for row in rows), 0)


def _grid_shape(geometry: Geometry, model: Model) -> tuple[int, int, int]:
    """Voxels of the model's grid, as columns, rows and slices."""
    columns = geometry.affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0) * geometry.shape
    counts = [1, 1, 1]
    # The stored axis nearest to x, y and z; of an oblique scan two may be nearest to one.
    order = np.abs(columns / np.linalg.norm(columns, axis=0)).argmax(axis=0)
    if sorted(order) != [0, 1, 2]:
        order = np.arange(3)
    for n, length, axis in zip(geometry.shape, lengths, order, strict=True):
        spacing = model.grid.spacing_mm
        counts[axis] = n if spacing is None else max(1, round(float(length) / spacing[axis]))
    return counts[0], counts[1], counts[2]
