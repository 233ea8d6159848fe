"""What a classifier sees around a position: a pattern of offsets, and the few copies of blocks.

A feature is one read at a fixed offset (level, dk, di, dj) from a position; a pattern is the list
of its offsets. The forest reads them where they lie. Blocks are copied only for training and for
convolutions, into the caller's buffer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.errors import is_whole
from organfast.grid import FINEST_MM, BlockGrid, ModelGrid, check_hu
from organfast.kernels import gather as kernels
from organfast.levels import MAX_BOX, MAX_WIDTH

__all__ = [
    "Block",
    "BlockGrid",
    "Context",
    "block_views",
    "gather_blocks",
    "gather_features",
    "pattern_from_dict",
    "pattern_on",
]

MAX_FEATURES = 65_536
MOST_REACH_MM = 1000.0


@dataclass(frozen=True)
class Block:
    """A square of voxels around a position, once per level and slice.

    Parameters
    ----------
    size : int
        Voxels along each side, odd.
    levels : tuple of int
        Box widths: level ``w`` is the same square, ``w`` times as wide, read every ``w``-th voxel
        from the averages over ``w x w`` voxels. 1 is the voxels themselves.
    slices : int
        Neighbouring slices, odd: ``dk = -(slices // 2) .. slices // 2`` at every level.

    Raises
    ------
    ValueError
        A parameter is out of range, or the block has more than 65,536 features.
    """

    size: int = 33
    levels: tuple[int, ...] = (1,)
    slices: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _odd("block size", self.size))
        object.__setattr__(self, "slices", _odd("slices", self.slices))
        object.__setattr__(self, "levels", _widths("levels", self.levels))
        if self.n_features > MAX_FEATURES:
            raise ValueError(
                f"a block of size {self.size} with {len(self.levels)} level(s) and {self.slices} "
                f"slice(s) has {self.n_features} features; the forest's nodes hold {MAX_FEATURES}: "
                "use a smaller size, fewer levels or fewer slices"
            )

    @property
    def n_features(self) -> int:
        """Reads per position."""
        return len(self.levels) * self.slices * self.size**2

    @property
    def widths(self) -> tuple[int, ...]:
        """Box width of each level, voxels."""
        return self.levels

    @property
    def depths(self) -> tuple[int, ...]:
        """Box height of each level: a block averages within the slice."""
        return (1,) * len(self.levels)

    @property
    def reach(self) -> tuple[int, int, int]:
        """Largest |offset| along (k, i, j)."""
        side = max(self.levels) * (self.size // 2)
        return self.slices // 2, side, side

    @cached_property
    def offsets(self) -> NDArray[np.int32]:
        """(n_features, 4) int32: (level index, dk, di, dj), by level, slice, row, column."""
        level, dk, di, dj = np.indices(
            (len(self.levels), self.slices, self.size, self.size), np.int32
        ).reshape(4, -1)
        width = np.array(self.levels, np.int32)[level]
        half = self.size // 2
        offsets = np.stack(
            [level, dk - self.slices // 2, width * (di - half), width * (dj - half)], axis=1
        ).astype(np.int32)
        offsets.flags.writeable = False
        return offsets

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "kind": "block",
            "size": self.size,
            "levels": list(self.levels),
            "slices": self.slices,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Block:
        """The block that :meth:`to_dict` described.

        Parameters
        ----------
        content : mapping
            As read from JSON.

        Raises
        ------
        ValueError
            The content, which may come from a tampered file, describes no block.
        """
        if not isinstance(content, Mapping) or set(content) != {"kind", "size", "levels", "slices"}:
            raise ValueError("a block is described by kind, size, levels and slices")
        return Block(content["size"], content["levels"], content["slices"])


@dataclass(frozen=True)
class Context:
    """Averages of boxes scattered far around a position: what few scans teach most from.

    After Criminisi et al. (2013, Medical Image Analysis 17(8), section 3), who compare the means of
    displaced boxes; here each feature is one mean. A box of level ``w`` is ``w`` voxels wide and
    about as high in mm. As in the eye, detail is for what is near: the widest boxes lie within
    the whole reach, narrower ones within a reach in proportion to their width, and along each axis
    an offset is ``u ** 1.5`` of it, to either side, with ``u`` uniform in 0 .. 1.

    Parameters
    ----------
    n : int
        Features.
    widths : tuple of int
        Box widths, voxels of the working grid; each feature reads one of them, at random.
    reach_mm : (x, y, z) float
        Largest offset along columns, rows and slices.
    seed : int
        Seed of the offsets.
    spacing_mm : (x, y, z) float
        The working grid that the offsets are for.

    Raises
    ------
    ValueError
        A parameter is out of range.
    """

    n: int = 700
    widths: tuple[int, ...] = (1, 3, 7, 13, 25)
    reach_mm: tuple[float, float, float] = (165.0, 165.0, 120.0)
    seed: int = 0
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 3.0)

    def __post_init__(self) -> None:
        if not is_whole(self.n, 1) or self.n > MAX_FEATURES:
            raise ValueError(f"n is {self.n!r}; give 1 to {MAX_FEATURES} features")
        if not is_whole(self.seed, 0) or self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed!r}; give a whole number from 0 to 2^32 - 1")
        object.__setattr__(self, "widths", _widths("widths", self.widths))
        for name, least in (("reach_mm", 0.0), ("spacing_mm", FINEST_MM)):
            given = getattr(self, name)
            lengths = tuple(given) if isinstance(given, (tuple, list)) else ()
            if len(lengths) != 3 or not all(
                isinstance(mm, (int, float)) and least <= mm <= MOST_REACH_MM for mm in lengths
            ):
                raise ValueError(
                    f"{name} is {given!r}; give three lengths (x, y, z) from {least:g} to "
                    f"{MOST_REACH_MM:g} mm"
                )
            object.__setattr__(self, name, tuple(float(mm) for mm in lengths))
        for width, depth in zip(self.widths, self.depths, strict=True):
            if depth > MAX_WIDTH or width * width * depth > MAX_BOX:
                raise ValueError(
                    f"a box {width} voxels wide and {depth} slices high is too large; use a "
                    "narrower one"
                )
        if self._n_places < 2 * self.n:
            raise ValueError(f"reach_mm is {self.reach_mm}; too near for {self.n} features")

    @property
    def n_features(self) -> int:
        """Reads per position."""
        return self.n

    @property
    def depths(self) -> tuple[int, ...]:
        """Box height of each level, slices: odd, and as near to the width in mm as that allows."""
        x, y, z = self.spacing_mm
        in_slices = (x + y) / 2 / z
        return tuple(2 * round((w * in_slices - 1) / 2) + 1 if w > 1 else 1 for w in self.widths)

    @property
    def _reach(self) -> tuple[int, int, int]:
        x, y, z = (int(r / s) for r, s in zip(self.reach_mm, self.spacing_mm, strict=True))
        return z, y, x

    @property
    def _n_places(self) -> int:
        """Different offsets that could be drawn."""
        shares = (w / max(self.widths) for w in self.widths)
        return sum(math.prod(2 * int(s * r) + 1 for r in self._reach) for s in shares)

    @cached_property
    def reach(self) -> tuple[int, int, int]:
        """Largest |offset| along (k, i, j)."""
        k, i, j = (int(most) for most in np.abs(self.offsets[:, 1:]).max(axis=0))
        return k, i, j

    @cached_property
    def offsets(self) -> NDArray[np.int32]:
        """(n_features, 4) int32: (level index, dk, di, dj), all different."""
        # RandomState: its numbers are promised to stay the same in every version of NumPy.
        random = np.random.RandomState(self.seed)
        chosen: dict[tuple[int, ...], None] = {}
        while len(chosen) < self.n:
            which, *along = random.random_sample(4).tolist()
            level = int(which * len(self.widths))
            share = self.widths[level] / max(self.widths)
            signed = [2 * u - 1 for u in along]
            offset = (
                round(math.copysign(abs(u) ** 1.5, u) * share * r)
                for u, r in zip(signed, self._reach, strict=True)
            )
            chosen.setdefault((level, *offset))
        offsets = np.array(list(chosen), np.int32)
        offsets.flags.writeable = False
        return offsets

    @property
    def _crc32(self) -> int:
        """Of the offsets, which a model file leaves out: they follow from the rest."""
        return zlib.crc32(self.offsets.astype("<i4").tobytes())

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "kind": "context",
            "n": self.n,
            "widths": list(self.widths),
            "reach_mm": list(self.reach_mm),
            "seed": self.seed,
            "spacing_mm": list(self.spacing_mm),
            "offsets_crc32": self._crc32,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Context:
        """The context that :meth:`to_dict` described.

        Parameters
        ----------
        content : mapping
            As read from JSON.

        Raises
        ------
        ValueError
            The content, which may come from a tampered file, describes no context.
        """
        fields = ("n", "widths", "reach_mm", "seed", "spacing_mm")
        if not isinstance(content, Mapping) or set(content) != {"kind", "offsets_crc32", *fields}:
            raise ValueError(f"a context is described by kind, {', '.join(fields)}, offsets_crc32")
        context = Context(*(content[name] for name in fields))
        if content["offsets_crc32"] != context._crc32:
            raise ValueError("this version draws a context's offsets otherwise; train again")
        return context


def _widths(name: str, given: Any) -> tuple[int, ...]:
    widths = tuple(given) if isinstance(given, (tuple, list)) else ()
    if (
        not widths
        or not all(is_whole(w, 1) and w <= MAX_WIDTH for w in widths)
        or len(set(widths)) != len(widths)
    ):
        raise ValueError(
            f"{name} is {given!r}; give different widths from 1 to {MAX_WIDTH}, such as (1, 9)"
        )
    return tuple(int(w) for w in widths)


def _odd(name: str, value: int) -> int:
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name} is {value!r}; give an odd number such as 1, 33 or 63")
    if value % 2 == 0:
        raise ValueError(
            f"{name} {value} is even and has no centre; use {value - 1} or {value + 1}"
        )
    return int(value)


def pattern_on(grid: ModelGrid, pattern: Block | Context | None = None) -> Block | Context:
    """The pattern to use on a grid.

    Parameters
    ----------
    grid : ModelGrid
        The grid that a model works on.
    pattern : Block or Context, optional
        By default a context on a working grid and the seed's block, ``Block(33)``, on native
        pixels, whose size in mm differs from scan to scan.

    Raises
    ------
    ValueError
        A context's offsets are for another grid.
    """
    if pattern is None:
        return Block(33) if grid.spacing_mm is None else Context(spacing_mm=grid.spacing_mm)
    if isinstance(pattern, Context) and pattern.spacing_mm != grid.spacing_mm:
        found = "native pixels" if grid.spacing_mm is None else f"voxels of {grid.spacing_mm} mm"
        raise ValueError(
            f"the context's offsets are for voxels of {pattern.spacing_mm} mm, the model works on "
            f"{found}; give both the same spacing_mm, or use a Block"
        )
    return pattern


def pattern_from_dict(content: Mapping[str, Any]) -> Block | Context:
    """The pattern whose ``to_dict`` gave this, checked as if it came from a tampered file.

    Parameters
    ----------
    content : mapping
        As read from JSON.

    Returns
    -------
    Block or Context

    Raises
    ------
    ValueError
        The content describes no pattern.

    >>> pattern_from_dict(Block(63).to_dict()) == Block(63)
    True
    >>> pattern_from_dict(Context(seed=5).to_dict()) == Context(seed=5)
    True
    """
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if kind == "block":
        return Block.from_dict(content)
    if kind == "context":
        return Context.from_dict(content)
    raise ValueError(f"pattern kind is {kind!r}; this version reads 'block' and 'context'")


def block_views(array: NDArray[Any], size: int, stride: int | tuple[int, ...]) -> NDArray[Any]:
    """Blocks of a slice or of every slice of a volume, without a copy.

    They stand about those centres of the :class:`BlockGrid` of this shape and stride whose blocks
    lie wholly inside. A centre nearer than ``size // 2`` to a side has no view;
    :func:`gather_blocks` reads air there. ::

        512 pixels, size = stride = 33:   centres 16, 49, .. 478, 511    views of the first 15
        512 pixels, size = stride = 63:   centres 31, 94, .. 472         views of all 8

    Parameters
    ----------
    array : (R, C) or (K, R, C)
        Any memory order.
    size : int
        Voxels along each side of a block, odd.
    stride : int or tuple of int
        Voxels between centres, one number per axis of ``array``; an int is for rows and columns,
        with every slice visited.

    Returns
    -------
    (n_rows, n_cols, size, size) or (n_k, n_rows, n_cols, size, size)
        A read-only view.

    Raises
    ------
    ValueError
        The array has another number of axes, the size is even, or the stride does not fit.

    >>> block_views(np.zeros((512, 512), np.int16), 63, 63).shape
    (8, 8, 63, 63)
    """
    size = _odd("block size", size)
    if array.ndim not in (2, 3):
        raise ValueError(f"array has {array.ndim} axes; give a slice (R, C) or a volume (K, R, C)")
    grid = _block_grid(array.shape, stride)
    if size > min(array.shape[-2:]):
        n_inside = grid.shape[3 - array.ndim : 1]
        return np.empty((*n_inside, 0, 0, size, size), array.dtype)
    windows = np.lib.stride_tricks.sliding_window_view(array, (size, size), axis=(-2, -1))
    half = size // 2
    chosen = [
        _as_slice(centres[(centres >= margin) & (centres < n - margin)] - margin, step)
        for centres, n, step, margin in zip(
            grid.centres, grid.volume_shape, grid.stride, (0, half, half), strict=True
        )
    ]
    return windows[tuple(chosen[3 - array.ndim :])]


def _block_grid(shape: tuple[int, ...], stride: int | tuple[int, ...]) -> BlockGrid:
    """The block grid of a slice (as a volume of one) or a volume."""
    missing = (1,) * (3 - len(shape))
    if is_whole(stride):
        strides: tuple[int, ...] = (1, stride, stride)  # type: ignore[assignment]  # an int
    else:
        strides = missing + tuple(stride)  # type: ignore[arg-type]  # a tuple
    return BlockGrid(missing + shape, strides)  # type: ignore[arg-type]  # checked there


def _as_slice(starts: NDArray[np.int32], step: int) -> slice:
    if len(starts) == 0:
        return slice(0, 0)
    return slice(int(starts[0]), int(starts[-1]) + 1, step)


def gather_blocks(
    array: NDArray[np.int16],
    centres: int | NDArray[np.integer],
    size: int,
    window: tuple[float, float] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Blocks of a slice or a volume copied as float32: the one place where HU become inputs.

    Training and inference both come through here, so that they cannot scale differently. HU below
    -1024 are air, and so is everything beyond the sides of the slice. Chunks whose ``out`` is at
    most 2 MB stay in the processor's cache: reuse such a buffer.

    Parameters
    ----------
    array : (R, C) or (K, R, C) int16, HU
        Any memory order.
    centres : int or (n, 2) or (n, 3) int
        Positions in the array, (i, j) or (k, i, j), inside it; or a stride: all positions of the
        :class:`BlockGrid`, in memory order.
    size : int
        Voxels along each side of a block, odd.
    window : (low, high) float, HU, optional
        ``clip((hu - low) / (high - low), 0, 1)`` is given instead of HU.
    out : (n, size, size) float32, optional
        C-contiguous buffer to write and return.

    Returns
    -------
    (n, size, size) float32

    Raises
    ------
    ValueError
        An argument does not fit the others.

    >>> gather_blocks(np.full((512, 512), 40, np.int16), 33, 33, window=(-160, 240)).shape
    (256, 33, 33)
    """
    size = _odd("block size", size)
    if array.ndim not in (2, 3):
        raise ValueError(f"array has {array.ndim} axes; give a slice (R, C) or a volume (K, R, C)")
    check_hu("array", array, array.ndim)
    volume = array[None] if array.ndim == 2 else array
    positions = _positions(array.shape, centres)
    out = _buffer(out, (len(positions), size, size))
    kernels.gather_blocks(volume, positions, *_scaling(window), out)
    return out


def _scaling(window: tuple[float, float] | None) -> tuple[float, float, float, float]:
    """(low, scale, least, most) of ``clip((hu - low) * scale, least, most)``."""
    if window is None:
        return 0.0, 1.0, -math.inf, math.inf
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"window is {window!r}; give (low, high) HU with low < high")
    return float(low), 1 / (high - low), 0.0, 1.0


def _positions(shape: tuple[int, ...], centres: int | NDArray[np.integer]) -> NDArray[np.int64]:
    """(n, 3) int64 (k, i, j), C-contiguous, inside the shape."""
    if is_whole(centres):
        grid = _block_grid(shape, centres)  # type: ignore[arg-type]  # an int
        positions = np.empty((*grid.shape, 3), np.int64)
        for axis, along in enumerate(np.ix_(*grid.centres)):
            positions[..., axis] = along
        return positions.reshape(-1, 3)
    given = np.asarray(centres)
    if given.ndim != 2 or given.shape[1] != len(shape) or given.dtype.kind not in "iu":
        raise ValueError(
            f"centres is {given.dtype} of shape {given.shape}; give a stride, or integers "
            f"(n, {len(shape)})"
        )
    missing = 3 - len(shape)
    positions = np.zeros((len(given), 3), np.int64)
    positions[:, missing:] = given
    if not kernels.all_inside(positions, *(1,) * missing, *shape):
        outside = ((positions[:, missing:] < 0) | (positions[:, missing:] >= shape)).any(axis=1)
        raise ValueError(f"centre {given[outside][0].tolist()} is not inside shape {shape}")
    return positions


def _buffer(out: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if (
        out.shape != shape
        or out.dtype != np.float32
        or not (out.flags.c_contiguous and out.flags.writeable)
    ):
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}; give writeable, C-contiguous float32 of "
            f"shape {shape}"
        )
    return out


def gather_features(
    slab: NDArray[np.int16],
    offsets: NDArray[np.int32],
    positions: NDArray[np.int32],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Features of a pattern at positions of a slab: what a forest is trained on.

    Parameters
    ----------
    slab : (L, K, R, C) int16
        From ``levels_slab``; any strides.
    offsets : (n_features, 4) int
        A pattern's (level index, dk, di, dj).
    positions : (n, 3) int
        (k, i, j) in the slab, its padding included; each read must lie inside.
    out : (n, n_features) float32, optional
        C-contiguous buffer to write and return.

    Returns
    -------
    (n, n_features) float32
        ``slab[level, k + dk, i + di, j + dj]``.

    Raises
    ------
    ValueError
        An argument does not fit, or a read lies outside the slab.
    """
    check_hu("slab", slab, 4)
    reads, starts = np.asarray(offsets), np.asarray(positions)
    if reads.ndim != 2 or reads.shape[1] != 4 or reads.dtype.kind not in "iu":
        raise ValueError(f"offsets is {reads.dtype} of shape {reads.shape}; give int (n, 4)")
    if starts.ndim != 2 or starts.shape[1] != 3 or starts.dtype.kind not in "iu":
        raise ValueError(f"positions is {starts.dtype} of shape {starts.shape}; give int (n, 3)")
    reads, starts = reads.astype(np.int64), starts.astype(np.int64)
    out = _buffer(out, (len(starts), len(reads)))
    if out.size == 0:
        return out
    first, last = reads.min(axis=0), reads.max(axis=0)
    first[1:] += starts.min(axis=0)
    last[1:] += starts.max(axis=0)
    if (first < 0).any() or (last >= slab.shape).any():
        raise ValueError(
            f"positions and offsets read (level, k, i, j) from {first.tolist()} to "
            f"{last.tolist()}, outside a slab of shape {slab.shape}"
        )
    kernels.gather_features(slab, starts @ slab.strides[1:], reads @ slab.strides, out)
    return out
