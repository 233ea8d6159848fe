"""Levels: what a classifier reads of a scan. Box averages at several widths, on the model grid.

Level (w, d) holds at (k, i, j) the average of the box of d x w x w voxels

    [k - d // 2, k - d // 2 + d) x [i - w // 2, i - w // 2 + w) x the same columns,

rounded half up; w = d = 1 is the voxels themselves. Beyond the sides is air, beyond the first and
last slice the end slice is repeated; boxes that stick out average that in. Training and inference
read the same integers.

A window of slices slides along the scan; each slice of a level is made once. Air is stored once
where two rows, or two slices, would each need it::

    row r     . . a a [ row r of the scan ] a a a a | a a          [ ]  voxels
    row r+1                                     a a a a [ row r+1 of the scan ] a a ...
              what is read of row r ends in the air that row r+1 begins with

so that a reach of 110 voxels to all sides costs half the memory that padding would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from organfast.grid import GridVolume, Pattern
from organfast.kernels.levels import add_plane, box_level, plane_level
from organfast.room import roomy

__all__ = ["MAX_BOX", "MAX_WIDTH", "LevelWindow", "levels_slab"]

MAX_WIDTH = 127
MAX_BOX = 65_536
"""Most voxels in a box: 16-bit values then sum to less than 2^32."""

_CHUNK = 8  # slices that one thread makes in a row; a deeper box is summed anew for each chunk


@dataclass(frozen=True)
class _Layout:
    """Where the voxels of one level lie in its memory, in voxels.

    Row r of slice p, from column c on, is at ``first + p * plane + r * row + c``; r and c run from
    ``-reach`` to ``size + reach``.
    """

    row: int
    plane: int
    first: int
    n_total: int
    low: int

    def owned(self, p: int) -> int:
        """Where slice p begins, the boxes before its first row and column included."""
        return self.first + p * self.plane - self.low * (self.row + 1)

    @staticmethod
    def of(n_planes: int, volume: GridVolume, pattern: Pattern) -> _Layout:
        """For so many slices of a volume; ``low`` and ``high`` are how far beyond its sides the
        widest box still touches it."""
        _, n_rows, n_cols = volume.shape
        _, reach_r, reach_c = pattern.reach
        high = max(pattern.widths) // 2
        low = max(pattern.widths) - 1 - high
        row = low + n_cols + high + max(0, reach_c - low, reach_c - high)
        plane = (low + n_rows + high + max(0, reach_r - low, reach_r - high)) * row
        first = max(reach_r, low) * row + max(reach_c, low)
        last = (n_planes - 1) * plane + (n_rows - 1 + max(reach_r, high)) * row
        n_total = first + last + n_cols + max(reach_c, high)
        return _Layout(row, plane, first, max(n_total, first + n_planes * plane), low)


class LevelWindow:
    """Levels of a run of slices, made as the run moves along the scan.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    pattern : Pattern
        What will be read: its ``widths``, ``depths`` and ``reach`` (pk, pr, pc).
    n_slices : int
        Most slices of positions in the window at a time.

    Raises
    ------
    ValueError
        A width or depth is out of range, or ``n_slices`` is below 1.
    """

    def __init__(self, grid_volume: GridVolume, pattern: Pattern, n_slices: int) -> None:
        self.boxes = tuple(zip(pattern.widths, pattern.depths, strict=True))
        _check_boxes(self.boxes)
        if n_slices < 1:
            raise ValueError(f"n_slices is {n_slices}; a window holds at least one")
        self.n_slices = min(n_slices, grid_volume.shape[0])
        self.reach = pattern.reach
        self.air = grid_volume.air
        self._volume = _through_table(grid_volume) if self._is_deep else grid_volume
        n_planes = self.n_slices + 2 * pattern.reach[0]
        self._layout = _Layout.of(n_planes, grid_volume, pattern)
        # Air is written with the slices, by the threads that make them: new memory is slow.
        self._memory = np.empty((len(self.boxes), self._layout.n_total), np.int16)
        self._memory[:, : self._layout.owned(0)] = self.air
        self._memory[:, self._layout.owned(n_planes) :] = self.air
        self._begin, self._end = 0, 0  # slices in memory, counted with those beyond the ends

    @staticmethod
    def bytes_per_slice(grid_volume: GridVolume, pattern: Pattern) -> int:
        """Memory that one more slice in a window takes.

        Parameters
        ----------
        grid_volume : GridVolume
            The scan on the model grid.
        pattern : Pattern
            What will be read.
        """
        return 2 * len(pattern.widths) * _Layout.of(1, grid_volume, pattern).plane

    @property
    def _is_deep(self) -> bool:
        return any(depth > 1 for _, depth in self.boxes)

    def move(self, k0: int, k1: int) -> list[tuple[int, int]]:
        """Make room for the levels around slices k0 .. k1 - 1.

        Parameters
        ----------
        k0, k1 : int
            Slices of positions: ``0 <= k0 < k1 <= K``, at most ``n_slices`` of them, ``k0`` not
            before that of the last move.

        Returns
        -------
        list of (int, int)
            Runs of slices still to be made, each by :meth:`fill`, in any order and thread.

        Raises
        ------
        ValueError
            The slices are not in the volume, too many, or before the window.
        """
        n_k, pk = self._volume.shape[0], self.reach[0]
        if not 0 <= k0 < k1 <= n_k or k1 - k0 > self.n_slices:
            raise ValueError(
                f"slices {k0} to {k1} are not in a volume of {n_k} slices, or more than the "
                f"window's {self.n_slices}"
            )
        begin, end = k0 - pk, k1 + pk
        if begin < self._begin and self._end > self._begin:
            raise ValueError(f"slice {k0} is before the window, which only moves on")
        kept = max(0, self._end - begin) if self._end > self._begin else 0
        plane, shift = self._layout.plane, begin - self._begin
        if kept and shift:
            size = self._layout.n_total - shift * plane
            used = min(size, self._layout.first + kept * plane)
            for level in self._memory:
                level[:used] = level[shift * plane : shift * plane + used]
        first, self._begin, self._end = begin + kept, begin, max(end, begin + kept)
        return [(k, min(k + _CHUNK, end)) for k in range(first, end, _CHUNK)]

    def fill(self, run: tuple[int, int]) -> None:
        """Make the levels of a run of slices that :meth:`move` asked for.

        Parameters
        ----------
        run : (int, int)
            First slice and one beyond the last, which may lie beyond the ends of the scan.
        """
        begin, end = run
        n_k, n_r, n_c = self._volume.shape
        sums = {d: np.zeros((n_r, n_c), np.uint32) for w, d in self.boxes if (w, d) != (1, 1)}
        work = np.empty(2 * n_c + 2 * max(w for w, _ in self.boxes), np.uint32)
        scratch = np.empty((n_r, n_c), np.int16)
        done: dict[int, range] = {}
        for k in range(begin, end):
            for depth, total in sums.items():
                first = k - depth // 2
                done[depth] = self._slide(
                    total, done.get(depth, range(0)), range(first, first + depth), scratch
                )
            p = k - self._begin
            self._memory[:, self._layout.owned(p) : self._layout.owned(p + 1)] = self.air
            for level, (width, depth) in enumerate(self.boxes):
                out = self._plane(level, k, width)
                if (width, depth) == (1, 1):
                    self._voxels(min(max(k, 0), n_k - 1), out)
                else:
                    box_level(sums[depth], width, depth, self.air, work, out)

    def slab(self, k0: int, k1: int) -> NDArray[np.int16]:
        """Levels around slices k0 .. k1 - 1, once they are made.

        Parameters
        ----------
        k0, k1 : int
            Slices of positions within the last move.

        Returns
        -------
        (L, k1 - k0 + 2 pk, R + 2 pr, C + 2 pc) int16
            Read-only view; its rows share their padding. Voxel (k, i, j) of the volume is at
            ``[:, k - k0 + pk, i + pr, j + pc]``.
        """
        _, n_r, n_c = self._volume.shape
        pk, pr, pc = self.reach
        layout, first = self._layout, k0 - pk - self._begin
        if first < 0 or k1 + pk > self._end:
            raise ValueError(f"slices {k0} to {k1} are not in the window; move it there first")
        start = layout.first + first * layout.plane - pr * layout.row - pc
        return np.lib.stride_tricks.as_strided(
            self._memory[:, start:],
            (len(self.boxes), k1 - k0 + 2 * pk, n_r + 2 * pr, n_c + 2 * pc),
            (2 * layout.n_total, 2 * layout.plane, 2 * layout.row, 2),
            writeable=False,
        )

    def _plane(self, level: int, k: int, width: int) -> NDArray[np.int16]:
        """Where slice k of a level is written, its boxes beyond the sides included."""
        layout, low = self._layout, width - 1 - width // 2
        _, n_r, n_c = self._volume.shape
        start = layout.first + (k - self._begin) * layout.plane - low * (layout.row + 1)
        return np.lib.stride_tricks.as_strided(
            self._memory[level, start:],
            (n_r + width - 1, n_c + width - 1),
            (2 * layout.row, 2),
        )

    def _voxels(self, k: int, out: NDArray[np.int16]) -> None:
        volume = self._volume
        table = None if volume.hu_table == "identity" else volume.table
        plane_level(volume.hu[k], table, self.air, out)

    def _slide(
        self, total: NDArray[np.uint32], done: range, wanted: range, scratch: NDArray[np.int16]
    ) -> range:
        """Change the slices that are summed; those beyond the ends are the end slices."""
        last = self._volume.shape[0] - 1
        if not done or wanted.start >= done.stop:
            total.fill(0)
            added, removed = wanted, range(0)
        else:
            added, removed = range(done.stop, wanted.stop), range(done.start, wanted.start)
        for sign, slices in ((1, added), (-1, removed)):
            for k in slices:
                self._add(total, min(max(k, 0), last), sign, scratch)
        return wanted

    def _add(
        self, total: NDArray[np.uint32], k: int, sign: int, scratch: NDArray[np.int16]
    ) -> None:
        plane = self._volume.hu[k]
        if self._volume.table is not None or plane.strides[1] != 2:
            self._voxels(k, scratch)
            plane = scratch
        add_plane(total, plane, self.air, sign)


def levels_slab(grid_volume: GridVolume, pattern: Pattern, k0: int, k1: int) -> NDArray[np.int16]:
    """Levels of slices k0 .. k1 - 1, padded by what the pattern reaches.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    pattern : Pattern
        What will be read: its ``widths``, ``depths`` and ``reach`` (pk, pr, pc).
    k0 : int
        First slice.
    k1 : int
        One beyond the last slice: ``0 <= k0 < k1 <= K``.

    Returns
    -------
    (L, k1 - k0 + 2 pk, R + 2 pr, C + 2 pc) int16
        Read-only view; its rows share their padding. Voxel (k, i, j) of the volume is at
        ``[:, k - k0 + pk, i + pr, j + pc]``.

    Raises
    ------
    ValueError
        The slices are not in the volume, or a level's box is out of range.
    """
    n_k = grid_volume.shape[0]
    if not 0 <= k0 < k1 <= n_k:
        raise ValueError(f"slices {k0} to {k1} are not in a volume of {n_k} slices")
    window = LevelWindow(grid_volume, pattern, k1 - k0)
    for run in window.move(k0, k1):
        window.fill(run)
    return window.slab(k0, k1)


def _check_boxes(boxes: Iterable[tuple[int, int]]) -> None:
    for width, depth in boxes:
        if not (1 <= width <= MAX_WIDTH and 1 <= depth <= MAX_WIDTH):
            raise ValueError(
                f"a level is {width} voxels wide and {depth} slices high; use 1 to {MAX_WIDTH}"
            )
        if width * width * depth > MAX_BOX:
            raise ValueError(
                f"a level's box of {depth} x {width} x {width} voxels holds more than {MAX_BOX}; "
                "use a narrower one"
            )


def _through_table(volume: GridVolume) -> GridVolume:
    """The volume with its table applied once, where boxes reach over many slices."""
    if volume.table is None:
        return volume
    hu: NDArray[np.int16] = roomy(volume.shape, np.int16)
    table = None if volume.hu_table == "identity" else volume.table
    for plane, out in zip(volume.hu, hu, strict=True):
        plane_level(plane, table, volume.air, out)
    return replace(volume, hu=hu, table=None)
