"""Where the patient is: the table, sheets and clothes are not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from organfast.grid import BlockGrid, GridVolume, hu_lookup

__all__ = ["body_mask", "body_voxels"]

SKIN_HU = -300


def body_voxels(grid_volume: GridVolume) -> NDArray[np.bool_]:
    """(K, R, C) bool: voxels of the model grid that lie in the patient."""
    from scipy import ndimage

    hu = grid_volume.hu
    if grid_volume.table is None:
        level = int(hu_lookup(grid_volume.hu_table)[SKIN_HU + 32768])
    else:
        level = SKIN_HU
    labels, n = ndimage.label(hu > level)
    if n == 0:
        return np.zeros(hu.shape, bool)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    body = labels == largest
    return np.stack([ndimage.binary_fill_holes(plane) for plane in body])


def body_mask(grid_volume: GridVolume, block_grid: BlockGrid) -> NDArray[np.bool_]:
    """Which positions of a block grid lie in the patient, shape ``block_grid.shape``."""
    mask: NDArray[np.bool_] = body_voxels(grid_volume)[np.ix_(*block_grid.centres)]
    return mask
