"""How far apart the surfaces of two masks are.

Surface points are the corners of voxels where the eight voxels around are neither all inside nor
all outside, and each counts with the area that marching cubes give the surface there (Lorensen and
Cline 1987, SIGGRAPH 21(4)), as in DeepMind's ``surface-distance``, with which the results agree.
A mask ends at the border of its map.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

__all__ = ["SurfaceGaps", "surface_areas", "surface_gaps"]

Floats = NDArray[np.float64]
Spacing = tuple[float, float, float]

# A distance that equals the tolerance but for float32's rounding is within it.
_ROUNDING = 1e-6
# Corners of a cube by the bit of the code that stands for their voxel.
_CORNERS = np.array(list(product((0, 1), repeat=3)))


@dataclass(frozen=True, eq=False)
class SurfaceGaps:
    """Two surfaces, each corner with its distance to the other surface.

    Parameters
    ----------
    truth_mm, truth_area : (n_t,) float32, mm and mm2
        From each corner of the true surface to the nearest of the other, and the area of the
        surface at that corner.
    predicted_mm, predicted_area : (n_p,) float32, mm and mm2
        The same of the predicted surface.
    """

    truth_mm: NDArray[np.float32]
    truth_area: NDArray[np.float32]
    predicted_mm: NDArray[np.float32]
    predicted_area: NDArray[np.float32]

    def nsd(self, tolerance_mm: float) -> float:
        """Share of both surfaces' area that is no farther than the tolerance from the other."""
        from organfast.kernels.surfaces import gap_sums

        within = np.float32(tolerance_mm * (1 + _ROUNDING))
        sums = np.array([gap_sums(*side, within) for side in self._sides])
        return float(sums[:, 2].sum() / sums[:, 0].sum())

    def hausdorff_mm(self, percent: float) -> float:
        """The distance that this share of either surface's area does not exceed."""
        from organfast.kernels.surfaces import weighted_percentile

        return max(float(weighted_percentile(*side, percent / 100)) for side in self._sides)

    @property
    def directed_mean_mm(self) -> tuple[float, float]:
        """Mean distance of the true surface, and of the predicted one."""
        from organfast.kernels.surfaces import gap_sums

        (n, along, _), (m, back, _) = (gap_sums(*side, np.float32(0)) for side in self._sides)
        return along / n, back / m

    @property
    def mean_mm(self) -> float:
        """Mean distance over the area of both surfaces."""
        from organfast.kernels.surfaces import gap_sums

        (n, along, _), (m, back, _) = (gap_sums(*side, np.float32(0)) for side in self._sides)
        return float((along + back) / (n + m))

    @property
    def _sides(self) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]:
        return (self.truth_mm, self.truth_area), (self.predicted_mm, self.predicted_area)


def surface_gaps(
    truth: NDArray[np.bool_], predicted: NDArray[np.bool_], spacing_mm: Spacing
) -> SurfaceGaps:
    """Measure how far the surfaces of two masks are apart.

    Both are held whole, with four bytes a voxel beside them: give the box around them.

    Parameters
    ----------
    truth, predicted : (n_a, n_b, n_c) bool
        Masks of one shape, neither empty.
    spacing_mm : (float, float, float), mm
        Voxel size along the three axes.

    Raises
    ------
    ValueError
        The masks are not such a pair.
    """
    from organfast.kernels.surfaces import corner_codes, gaps_to, squared_in_planes

    if truth.ndim != 3 or truth.shape != predicted.shape:
        raise ValueError(f"masks of shapes {truth.shape} and {predicted.shape} are no pair in 3-D")
    if not (truth.any() and predicted.any()):
        raise ValueError("a mask is empty and has no surface; score it without distances")
    areas = surface_areas(spacing_mm)
    step_k, step_i, step_j = (float(step) for step in spacing_mm)
    corners = tuple(n + 1 for n in truth.shape)
    codes, sizes = [], []
    for mask in (truth, predicted):
        codes.append(np.empty(corners, np.uint8))
        sizes.append(corner_codes(np.ascontiguousarray(mask, bool).view(np.uint8), codes[-1]))
    squared, passed = np.empty(corners, np.float32), np.empty(corners[0], bool)
    found = []
    for here, there in ((0, 1), (1, 0)):
        squared_in_planes(codes[there], step_i, step_j, squared, passed)
        gaps, weights = np.empty(sizes[here], np.float32), np.empty(sizes[here], np.float32)
        gaps_to(codes[here], squared, passed, step_k, areas, gaps, weights)
        found += [gaps, weights]
    return SurfaceGaps(*found)


def surface_areas(spacing_mm: Spacing) -> Floats:
    """Area of the surface at a corner, by the corner's code.

    Marching cubes between the eight voxels around the corner: where the surface crosses an edge it
    does so in the middle. On a face with both diagonals it cuts off the voxels that are fewer in
    the cube, so that a mask and its complement have one surface. A polygon that is not flat is cut
    into a fan of triangles from the vertex that gives it most area in a cube of side 1, or the mean
    of such fans.

    Parameters
    ----------
    spacing_mm : (float, float, float), mm
        Voxel size along the three axes.

    Returns
    -------
    (256,) float64, mm2
        0 where all voxels around are inside, or none.

    Raises
    ------
    ValueError
        A spacing is not above 0.
    """
    if len(spacing_mm) != 3 or not all(step > 0 for step in spacing_mm):
        raise ValueError(f"spacing {spacing_mm} is not three lengths above 0 mm")
    return _areas((float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))).copy()


@lru_cache(maxsize=16)
def _areas(spacing_mm: Spacing) -> Floats:
    areas = np.zeros(256)
    for code, polygons in enumerate(_polygons()):
        for polygon in polygons:
            on_unit = _fans(polygon)
            fans = _fans(polygon * spacing_mm)
            areas[code] += fans[on_unit > on_unit.max() - 1e-9].mean()
    return areas


@cache
def _polygons() -> tuple[tuple[Floats, ...], ...]:
    """By code, the polygons of the surface in a cube of side 1: (n, 3) vertices, in order."""
    return tuple(tuple(_loops(code)) for code in range(256))


def _loops(code: int) -> list[Floats]:
    beside: dict[frozenset[int], list[frozenset[int]]] = {}
    for one, other in _segments(code):
        beside.setdefault(one, []).append(other)
        beside.setdefault(other, []).append(one)
    loops = []
    while beside:
        edge: frozenset[int] | None = next(iter(beside))
        loop = []
        while edge is not None:
            loop.append(_CORNERS[list(edge)].mean(axis=0))
            edge = next((near for near in beside.pop(edge) if near in beside), None)
        loops.append(np.array(loop))
    return loops


def _segments(code: int) -> list[tuple[frozenset[int], frozenset[int]]]:
    """Where the surface crosses the faces of the cube, each time from edge to edge."""
    inside = [bool(code >> corner & 1) for corner in range(8)]
    fewer = sum(inside) <= 4
    segments = []
    for axis, side in product(range(3), (0, 1)):
        ring = _face(axis, side)
        edges = [frozenset((ring[n], ring[(n + 1) % 4])) for n in range(4)]
        crossed = [n for n in range(4) if inside[ring[n]] != inside[ring[(n + 1) % 4]]]
        if len(crossed) == 2:
            segments.append((edges[crossed[0]], edges[crossed[1]]))
        elif len(crossed) == 4:
            cut_off = [n for n in range(4) if inside[ring[n]] == fewer]
            segments += [(edges[n - 1], edges[n]) for n in cut_off]
    return segments


def _face(axis: int, side: int) -> list[int]:
    """The four corners of a face, in turn."""
    ring = []
    for place in ((0, 0), (0, 1), (1, 1), (1, 0)):
        corner = list(place)
        corner.insert(axis, side)
        ring.append(4 * corner[0] + 2 * corner[1] + corner[2])
    return ring


def _fans(polygon: Floats) -> Floats:
    """Area of the fan of triangles from each of the vertices."""
    areas = []
    for first in range(len(polygon)):
        turned = np.roll(polygon, -first, axis=0)
        one, other = turned[1:-1] - turned[0], turned[2:] - turned[0]
        areas.append(np.linalg.norm(np.cross(one, other), axis=1).sum() / 2)
    return np.array(areas)
