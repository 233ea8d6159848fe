"""The copy of a scan that lesions and metal are painted into, and the regions of its labels.

Places are voxels [k, i, j] in working order: slices feet to head, rows back to front, columns left
to right. Lengths are mm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_HU", "Box", "DiseasedScan", "Point", "Range", "Region"]

Range = tuple[float, float]
Box = tuple[slice, slice, slice]
Point = NDArray[np.float64]

MOST_HU = 3071
"""The top of the 12-bit scale of scanners (-1024..3071)."""


@dataclass(frozen=True, eq=False)
class DiseasedScan:
    """The copy that is altered, and where its labels lie.

    Parameters
    ----------
    hu : (n_k, n_i, n_j) int16
        HU, altered in place.
    labels : (n_k, n_i, n_j) uint8
        Label map on the same grid.
    names : mapping of int to str
        Name of each label.
    steps : (3,) float64
        Voxel size along k, i, j, mm.
    boxes : sequence of Box or None
        Bounding box of each label from 1, half-open; None where there is none of it.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    names: Mapping[int, str]
    steps: Point
    boxes: Sequence[Box | None]

    def numbers(self, patterns: Sequence[str]) -> list[int]:
        """Labels present whose names match."""
        return [
            n
            for n, name in self.names.items()
            if 0 < n <= len(self.boxes)
            and self.boxes[n - 1] is not None
            and any(fnmatchcase(name, p) for p in patterns)
        ]

    def around(self, centre: Point, reach_mm: float | Point) -> Box:
        """The part of the scan within a distance of a voxel along each axis, or each its own."""
        spans = zip(centre, reach_mm / self.steps, self.hu.shape, strict=True)
        a, b, c = (slice(max(0, int(m - r)), max(0, min(n, int(m + r) + 2))) for m, r, n in spans)
        return a, b, c

    def away_mm(self, box: Box, centre: Point) -> list[NDArray[np.float32]]:
        """Distances (mm, signed) of a box's voxels from a voxel, one open grid per axis."""
        axes = zip(box, centre, self.steps, strict=True)
        open_grid = np.ix_(*((np.arange(s.start, s.stop) - c) * step for s, c, step in axes))
        return [g.astype(np.float32) for g in open_grid]


@dataclass(frozen=True, eq=False)
class Region:
    """The voxels of some labels that belong together.

    Parameters
    ----------
    belongs : (256,) bool
        By label.
    corner : (3,) float64
        First voxel of the box around them.
    mask : (n_k, n_i, n_j) bool
        Which voxels of the box are theirs.
    inside : (n,) intp
        Their flat indices into the mask.
    """

    belongs: NDArray[np.bool_]
    corner: Point
    mask: NDArray[np.bool_]
    inside: NDArray[np.intp]

    @staticmethod
    def of(scan: DiseasedScan, numbers: Sequence[int]) -> Region | None:
        """The voxels of labels by number; None if the scan has none of them."""
        boxes = [box for n in numbers if (box := scan.boxes[n - 1]) is not None]
        if not boxes:
            return None
        k, i, j = (
            slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3)
        )
        belongs = np.zeros(256, bool)
        belongs[list(numbers)] = True
        mask = belongs[scan.labels[k, i, j]]
        corner = np.array([k.start, i.start, j.start], float)
        return Region(belongs, corner, mask, np.flatnonzero(mask))

    def voxel(self, random: np.random.Generator) -> Point:
        """Any of its voxels."""
        flat = self.inside[int(random.integers(self.inside.size))]
        place: Point = self.corner + np.array(np.unravel_index(flat, self.mask.shape), float)
        return place

    def voxel_at_wall(self, random: np.random.Generator) -> Point:
        """Its last voxel in a direction within the slice, from any of its voxels."""
        start = self.voxel(random) - self.corner
        turn = random.uniform(0, 2 * np.pi)
        ray = start + np.arange(60)[:, None] * np.array([0, np.sin(turn), np.cos(turn)])
        index = np.rint(ray).astype(int)
        fits = ((index >= 0) & (index < self.mask.shape)).all(axis=1)
        fits[fits] = self.mask[tuple(index[fits].T)]
        last = fits.size if fits.all() else int(np.argmin(fits))
        wall: Point = self.corner + index[max(last - 1, 0)]
        return wall

    def voxels(self) -> NDArray[np.float64]:
        """(n, 3) all of its voxels."""
        return self.corner + np.stack(np.unravel_index(self.inside, self.mask.shape), 1)

    def radius_mm(self, steps: Point) -> float:
        """Radius of a ball as large."""
        return float((self.inside.size * steps.prod() * 3 / (4 * np.pi)) ** (1 / 3))
