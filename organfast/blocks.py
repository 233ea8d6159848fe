"""What a classifier sees around a position: a pattern of offsets, and the few copies of blocks.

A feature is one read at a fixed offset (level, dk, di, dj) from a position; a pattern is the list
of its offsets. The forest reads them where they lie. Blocks are copied only for training and for
convolutions, into the caller's buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.grid import BlockGrid

__all__ = [
    "Block",
    "BlockGrid",
    "block_views",
    "gather_blocks",
    "gather_features",
    "pattern_from_dict",
]

MAX_FEATURES = 65535
MAX_WIDTH = 127


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
        A parameter is out of range, or the block has more than 65,535 features.
    """

    size: int = 33
    levels: tuple[int, ...] = (1,)
    slices: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _odd("block size", self.size))
        object.__setattr__(self, "slices", _odd("slices", self.slices))
        levels = tuple(self.levels) if isinstance(self.levels, (tuple, list)) else ()
        if (
            not levels
            or len(set(levels)) != len(levels)
            or not all(_is_int(w) and 1 <= w <= MAX_WIDTH for w in levels)
        ):
            raise ValueError(
                f"levels is {self.levels!r}; give different widths from 1 to {MAX_WIDTH}, "
                "such as (1, 9)"
            )
        object.__setattr__(self, "levels", tuple(int(w) for w in levels))
        if self.n_features > MAX_FEATURES:
            raise ValueError(
                f"a block of size {self.size} with {len(levels)} level(s) and {self.slices} "
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
        """The block that :meth:`to_dict` described; ValueError on anything else."""
        if not isinstance(content, Mapping) or set(content) != {"kind", "size", "levels", "slices"}:
            raise ValueError("a block is described by kind, size, levels and slices")
        if content["kind"] != "block":
            raise ValueError(f"pattern kind {content['kind']!r} is not a block")
        return Block(content["size"], content["levels"], content["slices"])


def pattern_from_dict(content: Mapping[str, Any]) -> Block:
    """The pattern that ``to_dict`` described."""
    return Block.from_dict(content)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _odd(name: str, value: int) -> int:
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} is {value!r}; give an odd number such as 1, 33 or 63")
    if value % 2 == 0:
        raise ValueError(
            f"{name} {value} is even and has no centre; use {value - 1} or {value + 1}"
        )
    return int(value)


def block_views(
    array: NDArray[np.int16], size: int, stride: int | tuple[int, ...]
) -> NDArray[np.int16]:
    """Blocks of a slice or a volume, without a copy."""
    strides = (1,) * (array.ndim - 2) + (stride, stride) if isinstance(stride, int) else stride
    half = size // 2
    grid = BlockGrid((1,) * (3 - array.ndim) + array.shape, (1,) * (3 - array.ndim) + strides)
    at = []
    for n, centres in zip(array.shape[-2:], grid.centres[1:], strict=True):
        inside = centres[(centres >= half) & (centres < n - half)]
        start = int(inside[0]) - half if len(inside) else 0
        at.append((start, len(inside)))
    windows = np.lib.stride_tricks.sliding_window_view(array, (size, size), axis=(-2, -1))
    rows = slice(at[0][0], at[0][0] + max(0, (at[0][1] - 1) * strides[-2] + 1), strides[-2])
    cols = slice(at[1][0], at[1][0] + max(0, (at[1][1] - 1) * strides[-1] + 1), strides[-1])
    if array.ndim == 2:
        return windows[rows, cols]
    return windows[grid.centres[0][0] :: strides[0], rows, cols]


def gather_blocks(
    array: NDArray[np.int16],
    centres: int | NDArray[np.integer],
    size: int,
    window: tuple[float, float] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Blocks of a slice or a volume, copied as float32."""
    if isinstance(centres, int):
        grid = BlockGrid((1,) * (3 - array.ndim) + array.shape, (1, centres, centres))
        mesh = np.meshgrid(*grid.centres[3 - array.ndim :], indexing="ij")
        centres = np.stack(mesh, -1).reshape(-1, array.ndim)
    half = size // 2
    pad = [(0, 0)] * (array.ndim - 2) + [(half, half)] * 2
    padded = np.pad(np.maximum(array, -1024), pad, constant_values=-1024)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(-2, -1))
    found = windows[tuple(centres.T)].astype(np.float32)
    if window is not None:
        lo, hi = window
        found = np.clip((found - np.float32(lo)) / np.float32(hi - lo), 0, 1)
    if out is None:
        return found
    out[:] = found
    return out


def gather_features(
    slab: NDArray[np.int16],
    offsets: NDArray[np.int32],
    positions: NDArray[np.int32],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Features of a pattern at positions of a slab.

    Parameters
    ----------
    slab : (L, K, R, C) int16
        From ``levels_slab``, any strides.
    offsets : (n_features, 4) int32
        A pattern's.
    positions : (n, 3) int32
        (k, i, j) in the slab, its padding included.
    out : (n, n_features) float32, optional
        Written and returned.
    """
    found = np.empty((len(positions), len(offsets)), np.float32) if out is None else out
    at = positions[:, None, :] + offsets[None, :, 1:]
    found[:] = slab[offsets[:, 0], at[..., 0], at[..., 1], at[..., 2]]
    return found
