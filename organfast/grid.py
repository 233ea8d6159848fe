"""The model's working grid: where its voxels lie, and what HU become on it.

::

    scan voxels --(HU table, anti-aliased resampling)--> GridVolume --(levels.py)--> what is read
    native: the scan's own pixels, no copy

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

from organfast.kernels.resample import slice_resampled, slices_blended
from organfast.room import roomy
from organfast.volume import AIR_HU, Volume
from organfast.workers import Workers

__all__ = [
    "HU_TABLES",
    "BlockGrid",
    "GridVolume",
    "ModelGrid",
    "Pattern",
    "hu_lookup",
    "resample_labels",
    "to_model_grid",
]

HU_TABLES = ("identity", "piecewise")
FINEST_MM, COARSEST_MM = 0.1, 100.0
MOST_VOXELS = 2**31
Taps = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Along one axis: first input voxel (n_out,) and weights (n_taps, n_out) of each output voxel."""


class Pattern(Protocol):
    """What a classifier reads around a position, see ``blocks``."""

    @property
    def offsets(self) -> NDArray[np.int32]:
        """(n_features, 4): rows (level index, dk, di, dj)."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Box width of each level in the slice, voxels."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Box height of each level, slices; 1 averages within the slice."""

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

        Parameters
        ----------
        content : mapping
            As read from JSON.

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

    Raises
    ------
    ValueError
        ``hu`` is not a non-empty 3-D int16 array, or ``table`` is not the one named.
    """

    hu: NDArray[np.int16]
    step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    table: NDArray[np.int16] | None = None
    hu_table: str = "identity"
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        check_hu("hu", self.hu, 3)
        named = hu_lookup(self.hu_table)
        if self.table is not None and not np.array_equal(self.table, named):
            raise ValueError(f"table is not the HU table {self.hu_table!r}; use hu_lookup")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (k, i, j)."""
        k, i, j = self.hu.shape
        return k, i, j

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

    def __post_init__(self) -> None:
        for name, given in (("volume_shape", self.volume_shape), ("stride", self.stride)):
            values = tuple(given) if isinstance(given, (tuple, list)) else ()
            whole = [v for v in values if isinstance(v, (int, np.integer)) and v >= 1]
            if len(whole) != 3 or len(values) != 3:
                raise ValueError(f"{name} is {given!r}; give three integers (k, i, j) from 1")
            object.__setattr__(self, name, tuple(int(v) for v in whole))

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
    """The HU table of that name, monotone; everything below -1024 (padding) is air, -1024.

    ::

        identity    hu
        piecewise   hu + 160 - 1280   below -160      slope 1/8
                    8 hu              -160 .. 240     slope 1
                    2 hu + 1440       above 240       slope 1/4, at most 32767 (from 15,664 HU)

    The piecewise table is the compression that long-range context works best on (soft tissue 400
    wide, while lung stays apart from the air around the patient), times 8, so that no two HU of
    -1024 .. 15,663 become one and int16 averages keep an eighth of a HU.

    Parameters
    ----------
    name : str
        "identity" or "piecewise".

    Returns
    -------
    (65536,) int16
        Read-only; the entry of ``hu`` is at ``hu + 32768``.

    >>> table = hu_lookup("piecewise")
    >>> [int(table[hu + 32768]) for hu in (-3024, -1024, -160, 240, 3071)]
    [-2144, -2144, -1280, 1920, 7582]
    """
    hu = np.maximum(np.arange(-32768, 32768), AIR_HU)
    if name == "piecewise":
        below, above = hu + 160 - 1280, 2 * hu + 1440
        hu = np.where(hu < -160, below, np.where(hu <= 240, 8 * hu, above))
    elif name != "identity":
        raise ValueError(f"hu_table is {name!r}; use one of {', '.join(HU_TABLES)}")
    table = np.minimum(hu, 32767).astype(np.int16)
    table.flags.writeable = False
    return table


def to_model_grid(volume: Volume, grid: ModelGrid, workers: Workers | None = None) -> GridVolume:
    """Bring a scan to the model grid.

    The scan's own pixels (``spacing_mm`` None, or a spacing that differs from the scan's by less
    than a hundredth of a voxel over the whole axis) are taken as they are, without a copy. For a
    working grid the HU table comes first, for averages over the edge of lung or patient must not
    depend on how dark the dark side is; then each axis is resampled with a triangle of half-width
    ``max(1, step)`` voxels, edge voxels repeated, and the result is rounded half up. Outer edges
    of both grids coincide at the first voxel: ``offset = (step - 1) / 2``.

    Parameters
    ----------
    volume : Volume
        The scan.
    grid : ModelGrid
        The grid to bring it to.
    workers : Workers, optional
        Threads to share the slices; the result does not depend on them.

    Returns
    -------
    GridVolume
        ``hu`` is a view of the volume, or a new C-contiguous array.

    Raises
    ------
    ValueError
        The grid would have more than 2^31 voxels.
    """
    hu, spacing, table = volume.working, volume.working_spacing_mm, hu_lookup(grid.hu_table)
    target = spacing if grid.spacing_mm is None else grid.spacing_mm[::-1]
    step = _three(
        1.0 if abs(t / s - 1) * n < 0.01 else t / s
        for t, s, n in zip(target, spacing, hu.shape, strict=True)
    )
    if step == (1.0, 1.0, 1.0):
        return GridVolume(hu, table=table, hu_table=grid.hu_table, spacing_mm=spacing)
    return GridVolume(
        resampled(hu, table, step, workers),
        step,
        _three((s - 1) / 2 for s in step),
        None,
        grid.hu_table,
        _three(t if s != 1 else own for t, s, own in zip(target, step, spacing, strict=True)),
    )


def resampled(
    hu: NDArray[np.int16],
    table: NDArray[np.int16],
    step: tuple[float, float, float],
    workers: Workers | None = None,
) -> NDArray[np.int16]:
    """HU through a table, then averaged to every ``step``-th voxel; see :func:`to_model_grid`.

    Parameters
    ----------
    hu : (K, R, C) int16
        Any strides.
    table : (65536,) int16
        Index ``hu + 32768``.
    step : (k, i, j) float
        Input voxels per output voxel.
    workers : Workers, optional
        Threads to share the slices.

    Returns
    -------
    (K', R', C') int16
        C-contiguous, ``max(1, round(n / step))`` voxels per axis.

    Raises
    ------
    ValueError
        ``hu`` is not a non-empty int16 volume, or the result would have more than 2^31 voxels.
    """
    check_hu("hu", hu, 3)
    shape = [_n_voxels(n, s) for n, s in zip(hu.shape, step, strict=True)]
    if math.prod(shape) > MOST_VOXELS:
        raise ValueError(
            f"the model grid would have {' x '.join(map(str, shape))} voxels (k, i, j); "
            "check the spacing of the scan, or use a coarser grid"
        )
    through, down, along = (_taps(s, n) for s, n in zip(step, shape, strict=True))
    out: NDArray[np.int16] = roomy((shape[0], shape[1], shape[2]), np.int16)

    def resample(begin: int, end: int) -> None:
        _resample_slices(hu, table, (through, down, along), out, range(begin, end))

    if workers is None:
        resample(0, len(out))
    else:
        edges = [len(out) * part // workers.threads for part in range(workers.threads + 1)]
        list(workers.map(resample, edges[:-1], edges[1:]))
    return out


def _n_voxels(n_scan: int, step: float) -> int:
    return max(1, round(n_scan / step))


def _taps(step: float, n_out: int) -> Taps:
    """First input voxel and normalised weights of each output voxel along an axis.

    Inputs strictly within ``half`` of the output's centre weigh ``1 - distance / half``.
    """
    half = max(1.0, step)
    centre = (step - 1) / 2 + step * np.arange(n_out)
    starts = np.floor(centre - half).astype(np.int32) + 1
    n_taps = int((np.ceil(centre + half).astype(np.int32) - starts).max())
    voxels = starts + np.arange(n_taps)[:, None]
    weights = np.maximum(0.0, 1 - np.abs(voxels - centre) / half)
    weights /= weights.sum(axis=0)
    return starts, weights.astype(np.float32)


def _resample_slices(
    hu: NDArray[np.int16],
    table: NDArray[np.int16],
    taps: tuple[Taps, Taps, Taps],
    out: NDArray[np.int16],
    chosen: range,
) -> None:
    """Write the chosen slices of ``out``.

    Each input slice is resampled in its plane once, into a ring as long as an output slice reaches.
    """
    (starts, weights), down, along = taps
    n_slices, n_rows, n_cols = hu.shape
    n_taps = len(weights)
    lead = max(0, -int(along[0][0]))
    tail = max(0, int(along[0][-1]) + len(along[1]) - n_cols)
    work = np.empty(n_rows * n_cols + lead + n_cols + tail, np.float32)
    ring = np.empty((n_taps, *out.shape[1:]), np.float32)
    in_ring = np.full(n_taps, -1)
    for o in chosen:
        sources = np.clip(starts[o] + np.arange(n_taps), 0, n_slices - 1)
        slots = (sources % n_taps).astype(np.int32)
        for k, slot in zip(sources, slots, strict=True):
            if in_ring[slot] != k:
                slice_resampled(hu[k], table, down, along, work, ring[slot])
                in_ring[slot] = k
        slices_blended(ring, slots, weights[:, o], out[o])


def resample_labels(
    labels: NDArray[np.unsignedinteger], grid_volume: GridVolume
) -> NDArray[np.unsignedinteger]:
    """Labels on the model grid: each of its voxels takes the label of the nearest scan voxel.

    Parameters
    ----------
    labels : (K, R, C) unsigned int
        Label map of the scan in working order.
    grid_volume : GridVolume
        The scan on the model grid.

    Returns
    -------
    (K', R', C') unsigned int
        ``labels`` itself where the grid is the scan's own.

    Raises
    ------
    ValueError
        The labels are not on the scan's grid.
    """
    if labels.ndim != 3 or grid_volume.shape != tuple(
        _n_voxels(n, step) for n, step in zip(labels.shape, grid_volume.step, strict=True)
    ):
        raise ValueError(f"labels of shape {labels.shape} are not on the grid of their scan")
    if grid_volume.step == (1.0, 1.0, 1.0):
        return labels
    nearest = [
        np.clip(np.floor(offset + 0.5 + step * np.arange(n)).astype(np.intp), 0, n_scan - 1)
        for offset, step, n, n_scan in zip(
            grid_volume.offset, grid_volume.step, grid_volume.shape, labels.shape, strict=True
        )
    ]
    return labels[np.ix_(*nearest)]


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    k, i, j = values
    return k, i, j


def check_hu(name: str, hu: NDArray[np.int16], ndim: int) -> None:
    """Raise ValueError unless ``hu`` is what the kernels read: non-empty, aligned int16."""
    if hu.ndim != ndim or hu.dtype != np.int16 or 0 in hu.shape or not hu.flags.aligned:
        raise ValueError(
            f"{name} is {hu.dtype} of shape {hu.shape}; give non-empty, aligned int16 with "
            f"{ndim} axes"
        )
