"""Where the patient is: the table, sheets and clothes are not.

::

    HU --(every n-th voxel, about 4 mm)--> raster --(> -300 HU)--> patient, table, clothes
       --(opened in each slice)--> thin sheets break off
       --(large components)--> patient --(holes of each slice filled)--> with lungs and bowel gas
       --(one voxel wider)--> with skin
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from organfast.grid import BlockGrid, GridVolume, hu_lookup

__all__ = ["body_mask", "body_voxels"]

RASTER_MM = 4.0
EDGE_HU = -300
"""Between air and lung (below -500) on one side and fat (above -150) on the other."""
SHEET_MM = 8.0
"""Thinner things are not the patient: table tops, sheets, cables, clothes."""
LIMB_SHARE = 0.02
"""Components this large, relative to the largest, are the patient too: arms (an arm is 3-6 % of a
trunk; what is left of tables, after opening, was at most 0.1 % in five real scans)."""
EDGE_VOXELS = 2
"""Raster voxels of thin tissue that stay with the thick tissue beside them: chest wall, nose."""


def body_mask(grid_volume: GridVolume, block_grid: BlockGrid) -> NDArray[np.bool_]:
    """Which positions of a block grid lie in the patient.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    block_grid : BlockGrid
        Positions on that grid.

    Returns
    -------
    bool, of shape ``block_grid.shape``
        All False where no patient is found.

    Raises
    ------
    ValueError
        The block grid is for a volume of another shape.
    """
    if block_grid.volume_shape != grid_volume.shape:
        raise ValueError(
            f"block_grid is for {block_grid.volume_shape} voxels, the volume has "
            f"{grid_volume.shape}"
        )
    return _raster_at(grid_volume, block_grid.centres)


def body_voxels(grid_volume: GridVolume) -> NDArray[np.bool_]:
    """Which voxels of the model grid lie in the patient.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.

    Returns
    -------
    (K, R, C) bool
        All False where no patient is found.
    """
    k, i, j = (np.arange(n, dtype=np.int32) for n in grid_volume.shape)
    return _raster_at(grid_volume, (k, i, j))


def _raster_at(
    grid_volume: GridVolume,
    positions: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],
) -> NDArray[np.bool_]:
    """The raster of the body at positions of the model grid.

    A raster voxel is the middle one of ``n_k x n_i x n_j`` voxels of the model grid.
    """
    every = [max(1, round(RASTER_MM / s)) for s in grid_volume.spacing_mm]
    middles = tuple(
        slice(min(n // 2, size - 1), None, n)
        for n, size in zip(every, grid_volume.shape, strict=True)
    )
    edge = EDGE_HU
    if grid_volume.table is None:
        edge = int(hu_lookup(grid_volume.hu_table)[EDGE_HU + 32768])
    spacing = [n * s for n, s in zip(every, grid_volume.spacing_mm, strict=True)]
    mask = _patient(grid_volume.hu[middles] > edge, (spacing[1], spacing[2]))
    # Columns first: rows and slices are then copied whole.
    for axis in (2, 1, 0):
        nearest = np.minimum(positions[axis] // every[axis], mask.shape[axis] - 1)
        mask = mask.take(nearest, axis)
    return mask


def _patient(tissue: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> NDArray[np.bool_]:
    """Tissue without what is thin, small or apart; with its holes, and one voxel wider.

    ``tissue`` (K, R, C); ``spacing_mm`` of rows and columns.
    """
    import cc3d
    import fill_voids
    from scipy import ndimage

    disk = _disk(SHEET_MM / 2, spacing_mm)[None]
    # Beyond the border the patient goes on: a border is no edge.
    thick = ndimage.binary_dilation(ndimage.binary_erosion(tissue, disk, border_value=1), disk)
    if not (thick & tissue).any():
        thick = tissue  # nothing is that thick: an object of a few millimetres
    labels, n = cc3d.connected_components(thick & tissue, connectivity=6, return_N=True)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    sizes[0] = 0
    body = (sizes >= max(1.0, LIMB_SHARE * sizes.max()))[labels]
    near = ndimage.generate_binary_structure(2, 1)[None]
    body = ndimage.binary_dilation(body, near, iterations=EDGE_VOXELS, mask=tissue)
    for plane in body:
        plane[:] = fill_voids.fill(_closed_at_sides(plane))[1:-1, 1:-1]
    wider: NDArray[np.bool_] = ndimage.binary_dilation(body, near)
    return wider


def _closed_at_sides(plane: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A slice in a frame that joins what touches the same side: (R + 2, C + 2).

    Where the field of view cuts through a lung, the lung is open to the side; it becomes a hole.
    """
    framed = np.pad(plane, 1)
    for frame, side in (
        (framed[0, 1:-1], plane[0]),
        (framed[-1, 1:-1], plane[-1]),
        (framed[1:-1, 0], plane[:, 0]),
        (framed[1:-1, -1], plane[:, -1]),
    ):
        touching = np.flatnonzero(side)
        if len(touching):
            frame[touching[0] : touching[-1] + 1] = True
    return framed


def _disk(radius_mm: float, spacing_mm: tuple[float, float]) -> NDArray[np.bool_]:
    """An ellipse of voxels with half-axes of the radius, rounded to whole voxels."""
    reach = [round(radius_mm / s) for s in spacing_mm]
    i, j = np.meshgrid(*(np.arange(-n, n + 1) / max(n, 1) for n in reach), indexing="ij")
    disk: NDArray[np.bool_] = np.hypot(i, j) <= 1
    return disk
