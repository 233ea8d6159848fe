"""Scans on the device: their levels as int16 in one buffer, blocks cut by index arithmetic.

::

    buffer (n_lines, 4096) int16
      [ case 0, level 1 | case 0, level 3 | case 1, level 1 | ... ]     each begins a line
          |
          K slices of (R + 2 p) x (C + 2 p),  p = width // 2 + 1:
              a a a a a a     the outermost ring of voxels is air: a read from beyond it is moved
              a b b b b a     there, and a read beyond the first or last slice to that slice;
              a b v v b a     b are boxes that stick out of the scan
              a b b b b a
              a a a a a a

What is read is what ``levels`` says, voxel for voxel. A position is a line and a column, both
int32, so that the buffer may be larger than 2^31 voxels, which a single index could not count.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from organfast.blocks import Block, Context
from organfast.grid import GridVolume
from organfast.levels import LevelWindow

__all__ = ["DeviceVolumes", "Room", "blocks_at", "put"]

GIB = 1 << 30
LINE_BITS = 12
LINE = 1 << LINE_BITS
MOST_OF_A_LEVEL = 2**31
_SLICES_AT_A_TIME = 16
_ALIGNMENT = 64  # bytes: the CPU backend then takes NumPy's memory as it is, without a copy


@dataclass(frozen=True)
class Room:
    """How much of a device's memory the scans may take.

    Parameters
    ----------
    max_memory_gb : float or None
        GiB on each device. None is half of the machine's memory, shared by its devices, or three
        quarters of what a GPU says it has.

    Raises
    ------
    ValueError
        The number is not above 0.
    """

    max_memory_gb: float | None = None

    def __post_init__(self) -> None:
        if self.max_memory_gb is not None and not self.max_memory_gb > 0:
            raise ValueError(f"max_memory_gb is {self.max_memory_gb!r}; give GiB above 0, or None")

    def allowed_gb(self, device: jax.Device, n_devices: int) -> float:
        """GiB on a device that shares its machine with others.

        Parameters
        ----------
        device : jax.Device
            The device.
        n_devices : int
            Devices of this machine that each hold the scans.
        """
        if self.max_memory_gb is not None:
            return self.max_memory_gb
        if device.platform == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB / 2 / n_devices
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        return float(limit) * 0.75 / GIB


@partial(
    jax.tree_util.register_dataclass, data_fields=["buffer", "places"], meta_fields=["pattern"]
)
@dataclass(frozen=True, eq=False)
class DeviceVolumes:
    """Levels of some scans on the device; a pytree.

    Parameters
    ----------
    buffer : (n_lines, 4096) int16
        All levels of all scans, in units of the HU table.
    places : (n_cases, n_levels, 4) int32
        Of each level of each scan: its first line, and its slices, rows and columns with the
        rings around them.
    pattern : Block
        What is cut.
    """

    buffer: jax.Array | NDArray[np.int16]
    places: jax.Array | NDArray[np.int32]
    pattern: Block

    @staticmethod
    def of(
        grid_volumes: Sequence[GridVolume],
        pattern: Block | Context,
        where: jax.sharding.Sharding,
        room: Room | None = None,
    ) -> DeviceVolumes:
        """Make the levels of some scans and put them on the device.

        Parameters
        ----------
        grid_volumes : sequence of GridVolume
            Scans on the model grid; a scan that is given twice is held once.
        pattern : Block
            What will be cut.
        where : Sharding
            Devices that hold the scans, each of them all.
        room : Room, optional
            How much memory they may take.

        Returns
        -------
        DeviceVolumes

        Raises
        ------
        ValueError
            There is no scan, the pattern is no block, a scan is too large to be counted, or all
            together are too large for the device.
        """
        if not isinstance(pattern, Block):
            raise ValueError(
                f"the pattern is a {type(pattern).__name__.lower()}, whose reads lie scattered; a "
                "CNN sees blocks: give a Block"
            )
        if not grid_volumes:
            raise ValueError("no scan was given; give at least one")
        different = list({id(volume.hu): volume for volume in grid_volumes}.values())
        places, n_lines = _places([volume.shape for volume in different], pattern)
        _check_memory(n_lines, len(different), where, room or Room())
        flat = _aligned(n_lines * LINE)
        for volume, of_scan in zip(different, places, strict=True):
            for width, (line, *shape) in zip(pattern.levels, of_scan.tolist(), strict=True):
                start = line * LINE
                size = shape[0] * shape[1] * shape[2]
                _write_level(volume, width, flat[start : start + size].reshape(shape))
        number = {id(volume.hu): n for n, volume in enumerate(different)}
        of_case = places[[number[id(volume.hu)] for volume in grid_volumes]]
        return put(DeviceVolumes(flat.reshape(n_lines, LINE), of_case, pattern), where)

    @staticmethod
    def n_bytes(shapes: Sequence[tuple[int, int, int]], pattern: Block) -> int:
        """Memory that scans of these shapes will take, bytes.

        Parameters
        ----------
        shapes : sequence of (K, R, C)
            Voxels of each scan on the model grid.
        pattern : Block
            What will be cut.
        """
        return 2 * LINE * _places(shapes, pattern)[1]


def blocks_at(
    volumes: DeviceVolumes, cases: jax.Array, positions: jax.Array, turn: jax.Array | None = None
) -> jax.Array:
    """Blocks around positions, cut inside jit.

    Parameters
    ----------
    volumes : DeviceVolumes
        The scans.
    cases : (n,) int32
        Which of the scans.
    positions : (n, 3) int32
        (k, i, j) voxels of the model grid, inside the scan.
    turn : (n, 2) or (n, 2, 2) float32, optional
        What each block's offsets (di, dj) are multiplied by before they are rounded to the nearest
        voxel: a factor for each, or a matrix. None leaves them as they are.

    Returns
    -------
    (n, n_levels, slices, size, size) int16
        In the order of ``pattern.offsets``.
    """
    block = volumes.pattern
    half = block.size // 2
    widths = np.array(block.levels, np.int32)
    side = np.outer(widths, np.arange(-half, half + 1, dtype=np.int32))  # (L, size)
    beside = np.arange(block.slices, dtype=np.int32) - block.slices // 2
    di, dj = _turned(side[:, :, None], side[:, None, :], turn)
    places = jnp.asarray(volumes.places)[cases]  # (n, L, 4)
    line, n_slices, n_rows, n_cols = (places[:, :, axis] for axis in range(4))
    ring = (widths // 2 + 1)[:, None, None]
    k, i, j = (positions[:, axis, None, None, None] for axis in range(3))
    row = jnp.clip(i + di + ring, 0, n_rows[:, :, None, None] - 1)
    col = jnp.clip(j + dj + ring, 0, n_cols[:, :, None, None] - 1)
    plane = jnp.clip(k[..., 0] + beside, 0, n_slices[:, :, None] - 1)  # (n, L, slices)
    first = plane * (n_rows * n_cols)[:, :, None]
    at = first[..., None, None] + (row * n_cols[:, :, None, None] + col)[:, :, None]
    lines = line[:, :, None, None, None] + (at >> LINE_BITS)
    return jnp.asarray(volumes.buffer).at[lines, at & (LINE - 1)].get(mode="promise_in_bounds")


Tree = TypeVar("Tree")


def put(tree: Tree, where: jax.sharding.Sharding) -> Tree:
    """Arrays of the host on the devices, also where some are another machine's.

    Parameters
    ----------
    tree : pytree of ndarray
        The same on every machine; not to be written to any more.
    where : Sharding
        Where its arrays go.
    """
    if where.is_fully_addressable:
        placed: Tree = jax.device_put(tree, where)
        return placed

    def global_array(array: NDArray[Any]) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    spread: Tree = jax.tree.map(global_array, tree)
    return spread


def _turned(
    di: NDArray[np.signedinteger], dj: NDArray[np.signedinteger], turn: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Offsets (L, size, 1) and (L, 1, size), turned for each position; int32."""
    if turn is None:
        return jnp.asarray(di), jnp.asarray(dj)
    down, along = di.astype(np.float32), dj.astype(np.float32)
    if turn.ndim == 2:
        rows, cols = (turn[:, axis, None, None, None] for axis in (0, 1))
        moved = rows * down, cols * along
    else:
        a, b, c, d = (turn[:, m, n, None, None, None] for m in (0, 1) for n in (0, 1))
        moved = a * down + b * along, c * down + d * along
    return jnp.rint(moved[0]).astype(jnp.int32), jnp.rint(moved[1]).astype(jnp.int32)


def _places(
    shapes: Sequence[tuple[int, int, int]], pattern: Block
) -> tuple[NDArray[np.int32], int]:
    """Where each level of each scan lies (n_cases, n_levels, 4), and lines in all."""
    places = np.empty((len(shapes), len(pattern.levels), 4), np.int64)
    n_lines = 0
    for case, (n_k, n_r, n_c) in enumerate(shapes):
        for level, width in enumerate(pattern.levels):
            ring = 2 * (width // 2 + 1)
            size = n_k * (n_r + ring) * (n_c + ring)
            if size > MOST_OF_A_LEVEL:
                raise ValueError(
                    f"a scan of {n_k} x {n_r} x {n_c} voxels (k, i, j) has more than 2^31 of them "
                    "with the air around it; use a coarser grid"
                )
            places[case, level] = n_lines, n_k, n_r + ring, n_c + ring
            n_lines += -(-size // LINE)
    return places.astype(np.int32), n_lines


def _check_memory(n_lines: int, n_scans: int, where: jax.sharding.Sharding, room: Room) -> None:
    devices = sorted(where.addressable_devices, key=lambda device: device.id)
    allowed = room.allowed_gb(devices[0], len(devices))
    needed = 2 * LINE * n_lines / GIB
    if needed > allowed:
        raise ValueError(
            f"the levels of {n_scans} scan(s) take {needed:.3g} GiB on each device, and "
            f"{allowed:.3g} GiB are allowed; use a coarser grid (spacing_mm), fewer levels or "
            "fewer scans or copies of them, or allow more (max_memory_gb)"
        )


def _aligned(n: int) -> NDArray[np.int16]:
    raw = np.empty(2 * n + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + 2 * n].view(np.int16)


@dataclass(frozen=True)
class _Boxes:
    """A pattern that reads one level out to the ring of air around its boxes."""

    width: int

    @property
    def offsets(self) -> NDArray[np.int32]:
        return np.zeros((1, 4), np.int32)

    @property
    def n_features(self) -> int:
        return 1

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def depths(self) -> tuple[int, ...]:
        return (1,)

    @property
    def reach(self) -> tuple[int, int, int]:
        ring = self.width // 2 + 1
        return 0, ring, ring


def _write_level(volume: GridVolume, width: int, out: NDArray[np.int16]) -> None:
    """One level of a scan with its ring, (K, R + 2 p, C + 2 p)."""
    window = LevelWindow(volume, _Boxes(width), _SLICES_AT_A_TIME)
    for k in range(0, len(out), window.n_slices):
        end = min(k + window.n_slices, len(out))
        for run in window.move(k, end):
            window.fill(run)
        out[k:end] = window.slab(k, end)[0]
