"""A scan, its labels and its probability maps made small enough for a page to carry.

Everything is in working order (k, i, j) on one coarser grid::

    voxels of the scan     | 0 1 2 | 3 4 5 | 6 7 |      factor 3, the last cell is smaller
    display cell               0       1      2         image: mean; labels: the middle voxel
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.nifti import encode_nifti
from organfast.volume import Volume

__all__ = ["Display", "displayed", "reduce_image", "reduce_labels", "reduction"]

Factors = tuple[int, int, int]
Labels = NDArray[np.uint8] | NDArray[np.uint16]

# 512 x 512 x 400 becomes 171 x 171 x 200, some 4 MB as the page holds it: what a browser without a
# graphics card still draws, which 14 million voxels were too many for.
MOST_VOXELS = 8_000_000
# Of the compressed image; base64 makes a third more of it. Noise compresses badly.
MOST_IMAGE_BYTES = 12_000_000
# Probabilities lie 4 mm apart and more; all maps of a page share what they may take.
MAP_FACTOR = 2
MOST_MAP_BYTES = 4_000_000
HU_RANGE = (-1024, 2000)
HU_STEP = 4


@dataclass(frozen=True, eq=False)
class Display:
    """What a page shows of a scan, each part a ``.nii.gz`` in RAS+ order.

    Parameters
    ----------
    image : bytes
        int16 HU, in steps of 4; zeros where there is no scan to show.
    labels : bytes
        On the same grid.
    maps : mapping of str to bytes
        Organ -> uint8 probability, 255 for certain, on a grid half as fine.
    left_out : tuple of str
        Organs whose maps would have made the page too large.
    factors : (k, i, j)
        Voxels of the scan along a voxel of the display.
    shape : (k, i, j)
        Of image and labels.
    """

    image: bytes
    labels: bytes
    maps: Mapping[str, bytes]
    left_out: tuple[str, ...]
    factors: Factors
    shape: tuple[int, int, int]


def displayed(
    volume: Volume, labels: Labels, maps: Mapping[str, NDArray[np.uint8]], has_image: bool = True
) -> Display:
    """Reduce a scan for display.

    Parameters
    ----------
    volume : Volume
        The scan.
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order.
    maps : mapping of str to (n_k, n_i, n_j) uint8
        Probability maps in working order.
    has_image : bool
        Whether the voxels are a scan's; without, an empty image carries the labels.
    """
    factors = reduction(volume.working.shape, volume.working_spacing_mm)
    affine = volume.working_affine
    while True:
        image = (
            reduce_image(volume.working, factors)
            if has_image
            else np.zeros(_reduced_shape(labels.shape, factors), np.int16)
        )
        encoded = _encoded(image, affine, factors)
        if len(encoded) <= MOST_IMAGE_BYTES:
            break
        factors = _coarser(factors, volume.working_spacing_mm, volume.working.shape)
    of_maps = (factors[0] * MAP_FACTOR, factors[1] * MAP_FACTOR, factors[2] * MAP_FACTOR)
    kept: dict[str, bytes] = {}
    for name, values in maps.items():
        small = _encoded(_mean(values, of_maps).astype(np.uint8), affine, of_maps)
        if sum(map(len, kept.values())) + len(small) <= MOST_MAP_BYTES:
            kept[name] = small
    return Display(
        encoded,
        _encoded(reduce_labels(labels, factors), affine, factors),
        kept,
        tuple(name for name in maps if name not in kept),
        factors,
        image.shape,
    )


def reduction(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> Factors:
    """How many voxels become one along each axis, the finest axis first.

    Parameters
    ----------
    shape : (k, i, j)
        Of the scan.
    spacing_mm : (k, i, j)
        Of its voxels.

    >>> reduction((400, 512, 512), (1.0, 0.7, 0.7))
    (2, 3, 3)
    >>> reduction((100, 256, 256), (5.0, 1.5, 1.5))
    (1, 1, 1)
    """
    factors: Factors = (1, 1, 1)
    while math.prod(_reduced_shape(shape, factors)) > MOST_VOXELS:
        factors = _coarser(factors, spacing_mm, shape)
    return factors


def reduce_image(hu: NDArray[np.int16], factors: Factors) -> NDArray[np.int16]:
    """Means of the cells in steps of 4 HU, clipped to -1024..2000.

    Parameters
    ----------
    hu : (n_k, n_i, n_j) int16, HU
        The scan in working order.
    factors : (k, i, j)
        Voxels along a cell.
    """
    means = _mean(hu, factors, HU_RANGE)
    return (np.rint(means / HU_STEP) * HU_STEP).astype(np.int16)


def reduce_labels(labels: Labels, factors: Factors) -> Labels:
    """The label in the middle of each cell; a label that none has takes all cells it is in.

    Parameters
    ----------
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order.
    factors : (k, i, j)
        Voxels along a cell.
    """
    if factors == (1, 1, 1):
        return labels
    shape = _reduced_shape(labels.shape, factors)
    middles = [
        np.minimum(np.arange(n) * f + f // 2, size - 1)
        for n, f, size in zip(shape, factors, labels.shape, strict=True)
    ]
    small: Labels = labels[np.ix_(*middles)]
    for label in set(np.unique(labels).tolist()) - set(np.unique(small).tolist()):
        small[tuple(np.argwhere(labels == label).T // np.array(factors)[:, None])] = label
    return small


def _reduced_shape(shape: tuple[int, ...], factors: Factors) -> tuple[int, int, int]:
    k, i, j = (-(-n // f) for n, f in zip(shape, factors, strict=True))
    return k, i, j


def _coarser(
    factors: Factors, spacing_mm: tuple[float, float, float], shape: tuple[int, ...]
) -> Factors:
    """One voxel more along the axis with the finest cells; both in-plane axes go together."""
    k, i, j = factors
    if shape[0] > 1 and k * spacing_mm[0] < min(i * spacing_mm[1], j * spacing_mm[2]):
        return k + 1, i, j
    return k, i + 1, j + 1


def _mean(
    values: NDArray[Any], factors: Factors, limits: tuple[int, int] = (0, 255)
) -> NDArray[np.float32]:
    """Mean of each cell, cells at the far ends being smaller; one layer of cells at a time."""
    shape = _reduced_shape(values.shape, factors)
    starts = [np.arange(n) * f for n, f in zip(shape, factors, strict=True)]
    out = np.empty(shape, np.float32)
    n_rows = np.diff([*starts[1], values.shape[1]])[:, None]
    n_columns = np.diff([*starts[2], values.shape[2]])
    for layer, start in enumerate(starts[0]):
        slab = np.clip(values[start : start + factors[0]], *limits)
        total = slab.sum(axis=0, dtype=np.int32)
        total = np.add.reduceat(np.add.reduceat(total, starts[1], axis=0), starts[2], axis=1)
        out[layer] = total / (n_rows * n_columns * len(slab))
    return out


def _encoded(values: NDArray[Any], affine: NDArray[np.float64], factors: Factors) -> bytes:
    """A NIfTI whose axes are x, y, z; cells lie where their voxels' middle lies."""
    to_scan = np.diag([*map(float, factors), 1.0])
    to_scan[:3, 3] = (np.array(factors) - 1) / 2
    columns_first = (affine @ to_scan)[:, [2, 1, 0, 3]]
    return encode_nifti(values.transpose(2, 1, 0), columns_first)
