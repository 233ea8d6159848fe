"""The model's working grid: where its voxels lie, what HU become on it, and its box averages.

::

    scan voxels --(HU table, anti-aliased resampling)--> GridVolume --(levels_slab)--> what is read
    native: the scan's own pixels, no copy                          air beyond the sides,
                                                                    end slices repeated

Axis order is (k, i, j) everywhere but in ``ModelGrid.spacing_mm``, which a user gives as (x, y, z).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from organfast.volume import AIR_HU, Volume

__all__ = [
    "HU_TABLES",
    "BlockGrid",
    "GridVolume",
    "ModelGrid",
    "Pattern",
    "hu_lookup",
    "levels_slab",
    "resample_labels",
    "to_model_grid",
]

HU_TABLES = ("identity", "piecewise")
FINEST_MM, COARSEST_MM = 0.1, 100.0


class Pattern(Protocol):
    """What a classifier reads around a position, see ``blocks``."""

    @property
    def offsets(self) -> NDArray[np.int32]:
        """(n_features, 4): rows (level index, dk, di, dj)."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Box width of each level, voxels."""

    @property
    def reach(self) -> tuple[int, int, int]:
        """Largest |offset| along (k, i, j)."""

    @property
    def n_features(self) -> int:
        """Rows of ``offsets``."""


@dataclass(frozen=True)
class ModelGrid:
    """The grid that a model works on.

    Parameters
    ----------
    spacing_mm : (x, y, z) float or None
        Voxel size along columns, rows and slices; None is the scan's own pixels.
    hu_table : str
        "identity" or "piecewise", see :func:`hu_lookup`.

    Raises
    ------
    ValueError
        The spacing is not three lengths from 0.1 to 100 mm, or the table has no such name.
    """

    spacing_mm: tuple[float, float, float] | None = None
    hu_table: str = "identity"

    def __post_init__(self) -> None:
        if self.hu_table not in HU_TABLES:
            raise ValueError(f"hu_table is {self.hu_table!r}; use one of {', '.join(HU_TABLES)}")
        if self.spacing_mm is None:
            return
        try:
            spacing = tuple(float(s) for s in self.spacing_mm)
        except (TypeError, ValueError):
            spacing = ()
        if len(spacing) != 3 or not all(FINEST_MM <= s <= COARSEST_MM for s in spacing):
            raise ValueError(
                f"spacing_mm is {self.spacing_mm!r}; give three lengths (x, y, z) "
                f"from {FINEST_MM:g} to {COARSEST_MM:g} mm, or None"
            )
        object.__setattr__(self, "spacing_mm", spacing)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "hu_table": self.hu_table,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> ModelGrid:
        """The grid that :meth:`to_dict` described.

        Raises
        ------
        ValueError
            The content, which may come from a tampered file, describes no grid.
        """
        if not isinstance(content, Mapping) or set(content) != {"spacing_mm", "hu_table"}:
            raise ValueError("a model grid is described by spacing_mm and hu_table")
        spacing, name = content["spacing_mm"], content["hu_table"]
        if not isinstance(name, str) or not (spacing is None or isinstance(spacing, list)):
            raise ValueError("a model grid is described by a list of lengths and a table's name")
        return ModelGrid(None if spacing is None else tuple(spacing), name)


@dataclass(frozen=True, eq=False)
class GridVolume:
    """A scan on the model grid.

    Parameters
    ----------
    hu : (K, R, C) int16
        Voxels in working order, any strides.
    step : (k, i, j) float
        Scan voxels per grid voxel.
    offset : (k, i, j) float
        Scan coordinate = offset + step * grid index.
    table : (65536,) int16 or None
        HU table still to be applied, index ``hu + 32768``; None where ``hu`` has passed it.
    hu_table : str
        Name of the table that is to be, or has been, applied.
    spacing_mm : (k, i, j) float
        Voxel size of this grid.
    """

    hu: NDArray[np.int16]
    step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    table: NDArray[np.int16] | None = None
    hu_table: str = "identity"
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (k, i, j)."""
        return self.hu.shape

    @property
    def air(self) -> int:
        """What air becomes in the table: the value beyond the sides."""
        return int(hu_lookup(self.hu_table)[AIR_HU + 32768])


@dataclass(frozen=True)
class BlockGrid:
    """Positions at which a classifier is asked, ``stride`` voxels of the model grid apart.

    Along each axis the centres stand at ``stride // 2 + n * stride``; where none of these lies
    inside, at the middle voxel. In 512x512 pixels stride 33 gives 16x16, stride 63 8x8 positions.

    Parameters
    ----------
    volume_shape : (K, R, C) int
        Voxels of the model grid.
    stride : (k, i, j) int
        Voxels between centres.

    Raises
    ------
    ValueError
        A shape or stride is not three integers of at least 1.
    """

    volume_shape: tuple[int, int, int]
    stride: tuple[int, int, int]

    @cached_property
    def centres(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Centres along (k, i, j), ascending int32 voxel indices."""
        k, i, j = (_centres(n, s) for n, s in zip(self.volume_shape, self.stride, strict=True))
        return k, i, j

    @property
    def shape(self) -> tuple[int, int, int]:
        """Positions along (k, i, j)."""
        k, i, j = self.centres
        return len(k), len(i), len(j)


def _centres(n: int, stride: int) -> NDArray[np.int32]:
    if stride // 2 >= n:
        return np.array([(n - 1) // 2], np.int32)
    return np.arange(stride // 2, n, stride, dtype=np.int32)


@cache
def hu_lookup(name: str) -> NDArray[np.int16]:
    """The monotone HU table of that name, (65536,) int16, read at ``hu + 32768``; read-only."""
    hu = np.maximum(np.arange(-32768, 32768), AIR_HU)
    if name == "piecewise":
        scaled = np.where(hu < -160, hu + 160 - 1280, np.where(hu <= 240, 8 * hu, 2 * hu + 1440))
        hu = np.minimum(scaled, 32767)
    elif name != "identity":
        raise ValueError(f"hu_table is {name!r}; use one of {', '.join(HU_TABLES)}")
    table = hu.astype(np.int16)
    table.flags.writeable = False
    return table


def to_model_grid(volume: Volume, grid: ModelGrid, threads: int = 1) -> GridVolume:
    """Bring a scan to the model grid."""
    hu, table = volume.working, hu_lookup(grid.hu_table)
    spacing = volume.working_spacing_mm
    if grid.spacing_mm is None:
        return GridVolume(hu, table=table, hu_table=grid.hu_table, spacing_mm=spacing)
    target = grid.spacing_mm[::-1]
    step = _three(
        1.0 if abs(t / s - 1) * n < 0.01 else t / s
        for t, s, n in zip(target, spacing, hu.shape, strict=True)
    )
    if step == (1.0, 1.0, 1.0):
        return GridVolume(hu, table=table, hu_table=grid.hu_table, spacing_mm=spacing)
    value = table[hu.astype(np.int32) + 32768].astype(np.float32)
    for axis, s in enumerate(step):
        n = hu.shape[axis]
        if s == 1.0:
            continue
        n_out = max(1, math.floor(n / s + 0.5))
        x = (s - 1) / 2 + s * np.arange(n_out)
        half = max(1.0, s)
        first = np.ceil(x - half).astype(int)
        taps = first[:, None] + np.arange(int(np.ceil(2 * half)) + 1)
        weights = np.maximum(0, 1 - np.abs(taps - x[:, None]) / half)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        moved = np.moveaxis(value, axis, -1)
        total = sum(
            moved[..., np.clip(taps[:, t], 0, n - 1)] * weights[:, t] for t in range(taps.shape[1])
        )
        value = np.moveaxis(total, -1, axis)
    out = np.ascontiguousarray(np.floor(value + np.float32(0.5)).astype(np.int16))
    offset = _three((s - 1) / 2 for s in step)
    return GridVolume(out, step, offset, None, grid.hu_table, target)


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    k, i, j = values
    return k, i, j


def resample_labels(
    labels: NDArray[np.unsignedinteger], grid_volume: GridVolume
) -> NDArray[np.unsignedinteger]:
    """Labels of the scan's voxels at the voxels of the model grid: the nearest voxel's."""
    index = [
        np.clip(np.floor(o + 0.5 + s * np.arange(n)).astype(np.intp), 0, m - 1)
        for o, s, n, m in zip(
            grid_volume.offset, grid_volume.step, grid_volume.shape, labels.shape, strict=True
        )
    ]
    if grid_volume.step == (1.0, 1.0, 1.0):
        return labels
    return labels[np.ix_(*index)]


def levels_slab(
    grid_volume: GridVolume,
    pattern: Pattern,
    k0: int,
    k1: int,
    out: NDArray[np.int16] | None = None,
) -> NDArray[np.int16]:
    """Levels of the slices k0..k1 of a grid volume, padded by what the pattern reaches."""
    pk, pr, pc = pattern.reach
    n_k, n_r, n_c = grid_volume.shape
    shape = (len(pattern.widths), k1 - k0 + 2 * pk, n_r + 2 * pr, n_c + 2 * pc)
    slab = np.empty(shape, np.int16) if out is None else out
    for m in range(shape[1]):
        plane = grid_volume.hu[min(max(k0 - pk + m, 0), n_k - 1)]
        if grid_volume.table is not None:
            plane = grid_volume.table[plane.astype(np.int32) + 32768]
        for level, w in enumerate(pattern.widths):
            before, after = w // 2, w - 1 - w // 2
            padded = np.pad(
                plane,
                ((pr + before, pr + after), (pc + before, pc + after)),
                constant_values=grid_volume.air,
            )
            sums = np.zeros((padded.shape[0] + 1, padded.shape[1] + 1), np.int64)
            sums[1:, 1:] = padded.astype(np.int64).cumsum(0).cumsum(1)
            box = sums[w:, w:] - sums[:-w, w:] - sums[w:, :-w] + sums[:-w, :-w]
            slab[level, m] = (2 * box + w * w) // (2 * w * w)
    return slab
