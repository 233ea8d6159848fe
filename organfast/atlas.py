"""Where organs lie in a body: an atlas of labelled scans, laid over a new one.

::

    a new scan  --(what a classifier says of it)--> the place and the size at which the atlas fits
                --(an organ where hardly any labelled scan has it)--> is none

A classifier sees a few centimetres along the body: a muscle of the pelvis may look to it like the
lower end of a kidney, gas in the stomach like the foot of a lung. All of its answers together tell
which part of a body a scan shows, even where organs are cut off, and so where an organ cannot be.

A scan is laid over the atlas by a shift and a stretch along each axis, found by a pattern search
(Hooke and Jeeves 1961, J. ACM 8 (2)) for the greatest mean log probability of its labels, started
at all heights of the atlas. No turn: a scan in working order lies straight to some degrees. How an
atlas is learned is told in ``atlaslearning``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.grid import BlockGrid, GridVolume

__all__ = ["VOXEL_MM", "Atlas", "Place", "thinned"]

VOXEL_MM = 8.0
MOST_SIDE = 512
"""Voxels along a side of an atlas: four metres."""
MOST_VOXELS = 1 << 28
_LEAST_P = 2e-3
"""Probability of an organ where no scan has it: a wrong label must not decide alone."""
_BEYOND_P = 0.9
"""Probability of no organ beyond the atlas."""
_ROOM = 3  # voxels
_BLUR = 1.0  # voxels
_FULL_SHARE = 0.02
"""From this share of the scans on an organ is at home at a place, after the room around it; of a
small or seldom labelled organ, from this part of its greatest share on:"""
_FULL_PART = 0.1
_HARDLY = 0.05
"""What is left of a probability where an organ is not at home at all."""
_STRETCH = 0.15
"""Usual deviation of the logarithm of a stretch from none."""
_STIFFNESS = 0.02
_N_POINTS = 6000
_N_ROUGHLY = 1200
_START_MM = 24.0
_N_STARTS = 4
_FIRST_STEP = 0.12, 24.0  # of the logarithm of a stretch; mm
_N_HALVINGS = 5
_MOST_SWEEPS = 6

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Place:
    """How a scan lies in the atlas.

    Parameters
    ----------
    scale : (k, i, j) float
        Atlas voxels per mm of the scan.
    shift : (k, i, j) float
        Atlas voxel of the scan's first voxel.
    log_p : float
        Mean log probability of its labels there, less what the stretch costs.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    log_p: float = 0.0

    @property
    def stretch(self) -> tuple[float, float, float]:
        """How much larger than the scan the atlas is, along (k, i, j)."""
        k, i, j = (scale * VOXEL_MM for scale in self.scale)
        return k, i, j


def thinned(n: int) -> NDArray[np.intp]:
    """As many of ``n`` points as are looked at, ascending; the same ones each time.

    Parameters
    ----------
    n : int
        Points that there are.
    """
    if n <= _N_POINTS:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, _N_POINTS, replace=False))


@dataclass(frozen=True, eq=False)
class Atlas:
    """How often each organ lies where in a body.

    Parameters
    ----------
    shares : (n_organs, K, I, J) uint8
        255 times the square root of the share of the labelled scans that show an organ, among those
        that show the body there; the organs of a class table in their order, voxels of 8 mm in
        working order.

    Raises
    ------
    ValueError
        The array is not of that kind, is empty or is larger than a body.
    """

    shares: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.shares.dtype != np.uint8 or self.shares.ndim != 4 or not self.shares.size:
            raise ValueError(
                f"an atlas is a 4-D uint8 array with voxels, not {self.shares.ndim}-D "
                f"{self.shares.dtype} of shape {self.shares.shape}"
            )
        _check_size(self.shares.shape)

    # --- a scan laid over it ----------------------------------------------------------------------

    def place(
        self, points: NDArray[np.float32], rows: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> Place | None:
        """Where a scan lies in the atlas.

        Parameters
        ----------
        points : (n, 3) float32, mm
            Positions inside the body, along (k, i, j) from the scan's first voxel; some thousands
            do, see :func:`thinned`.
        rows : (n,) int64
            The organ at each of them; ``n_organs`` is none.
        weights : (n,) float32
            How sure that is.

        Returns
        -------
        Place or None
            None where it shows no organ that the atlas has.

        Raises
        ------
        ValueError
            The arrays do not fit each other, or a row is not of the atlas.
        """
        n = len(points)
        if points.shape != (n, 3) or rows.shape != (n,) or weights.shape != (n,):
            raise ValueError(
                f"points of shape {points.shape}, rows of shape {rows.shape} and weights of shape "
                f"{weights.shape} do not fit; give (n, 3), (n,) and (n,)"
            )
        if n and not (rows.min() >= 0 and rows.max() <= len(self.shares)):
            raise ValueError(f"rows are {rows.min()} to {rows.max()}; give 0 to {len(self.shares)}")
        fine = _Fit.of(self, points, rows, weights)
        if fine is None:
            return None
        some = slice(None, None, max(1, n // _N_ROUGHLY))
        rough = _Fit(
            self, fine.points[some], fine.rows[some], fine.weights[some], fine.middle, fine.usual
        )
        starts = sorted(rough.starts(), key=rough.score, reverse=True)[:_N_STARTS]
        found = max((rough.climbed(start, 1) for start in starts), key=rough.score)
        best = fine.climbed(found, _N_HALVINGS)
        scale, shift = fine.laid(best)
        (a, b, c), (x, y, z) = scale.tolist(), shift.tolist()
        return Place((a, b, c), (x, y, z), fine.score(best))

    def of_scan(
        self,
        coarse: NDArray[np.float32],
        block_grid: BlockGrid,
        grid_volume: GridVolume,
        organs: Sequence[int],
        outside: int = 0,
    ) -> Place | None:
        """Where a scan lies in the atlas by what a classifier says of it.

        Parameters
        ----------
        coarse : (n_k, n_i, n_j, n_classes) float32
            Probabilities at the positions of the block grid.
        block_grid : BlockGrid
            Where these are.
        grid_volume : GridVolume
            The scan.
        organs : sequence of int
            The class of each organ of the atlas.
        outside : int
            The class of what is outside the body.

        Returns
        -------
        Place or None
            As :meth:`place` has it.
        """
        row_of_class = self._row_of_class(coarse.shape[-1], organs)
        best = coarse.argmax(axis=-1)
        inside = np.flatnonzero(best != outside)
        at = np.unravel_index(inside[thinned(len(inside))], best.shape)
        mm = [
            centres[index] * spacing
            for centres, index, spacing in zip(
                block_grid.centres, at, grid_volume.spacing_mm, strict=True
            )
        ]
        classes = best[at]
        points = np.stack(mm, axis=1).astype(np.float32)
        return self.place(points, row_of_class[classes], coarse[(*at, classes)])

    def rule_out(
        self,
        coarse: NDArray[np.float32],
        place: Place,
        block_grid: BlockGrid,
        grid_volume: GridVolume,
        organs: Sequence[int],
        rest: int = 0,
    ) -> dict[int, float]:
        """Organs where hardly any scan has them become what lies between organs, in place.

        Parameters
        ----------
        coarse : (n_k, n_i, n_j, n_classes) float32
            Probabilities at the positions of the block grid; written.
        place : Place
            Of the scan.
        block_grid : BlockGrid
            Where the probabilities are.
        grid_volume : GridVolume
            The scan.
        organs : sequence of int
            The class of each organ of the atlas.
        rest : int
            The class of what lies between organs.

        Returns
        -------
        dict of int to float
            Class -> share of its probability that went, where it was the most probable.
        """
        voxels = [
            np.rint(centres * mm * scale + shift).astype(np.intp)
            for centres, mm, scale, shift in zip(
                block_grid.centres, grid_volume.spacing_mm, place.scale, place.shift, strict=True
            )
        ]
        homes = [_Home.of(organ, voxels) for organ in self.shares]
        labels, n_organs = list(organs), len(homes)
        row_of_class = self._row_of_class(coarse.shape[-1], organs)
        before, after = np.zeros((2, n_organs))
        for n, slab in enumerate(coarse):  # one slice at a time stays in the cache
            p = slab[..., labels]
            kept = p * np.stack([home.slice(n) for home in homes], axis=-1)
            row = row_of_class[slab.argmax(axis=-1)]
            is_organ = row < n_organs
            won = (*np.nonzero(is_organ), row[is_organ])
            before += np.bincount(won[-1], p[won], n_organs)
            after += np.bincount(won[-1], kept[won], n_organs)
            slab[..., labels] = kept
            slab[..., rest] += (p - kept).sum(axis=-1)
        lost = 1 - np.divide(after, before, out=np.ones(n_organs), where=before > 0)
        return dict(zip(labels, lost.tolist(), strict=True))

    def _row_of_class(self, n_classes: int, organs: Sequence[int]) -> NDArray[np.int64]:
        """(n_classes,): the organ of the atlas that each class is; ``n_organs`` is none."""
        rows = np.full(n_classes, len(self.shares), np.int64)
        rows[list(organs)] = np.arange(len(self.shares))
        return rows

    @cached_property
    def _with_none(self) -> NDArray[np.uint8]:
        """(n_organs + 1, K, I, J): the shares, and that of no organ."""
        total = np.zeros(self.shares.shape[1:], np.float32)
        for organ in self.shares:
            total += np.square(organ / np.float32(255))
        none = np.rint(255 * np.sqrt(np.clip(1 - total, 0, 1))).astype(np.uint8)
        return np.concatenate([self.shares, none[None]])

    @cached_property
    def _middles(self) -> NDArray[np.float64]:
        """(n_organs, 3): of each organ, atlas voxels; NaN of one that it does not have."""
        middles = np.full((len(self.shares), 3), np.nan)
        for organ, middle in zip(self.shares, middles, strict=True):
            where = np.argwhere(organ > 0)
            if len(where):
                p = np.square(organ[tuple(where.T)].astype(np.float64))
                middle[:] = np.average(where, axis=0, weights=p)
        return middles

    # --- in a model's file ------------------------------------------------------------------------

    @cached_property
    def packed(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The shape and the box of each organ, for JSON, and what is in the boxes, one by one."""
        boxes = [_box(organ) for organ in self.shares]
        parts = [organ[box].ravel() for organ, box in zip(self.shares, boxes, strict=True)]
        sides = [[[side.start, side.stop] for side in box] for box in boxes]
        return {"shape": list(self.shares.shape), "boxes": sides}, np.concatenate(parts)

    @staticmethod
    def unpacked(header: Mapping[str, Any], content: NDArray[np.uint8]) -> Atlas:
        """An atlas as :attr:`packed` gives it.

        Parameters
        ----------
        header : mapping
            ``shape`` and ``boxes``.
        content : (n,) uint8
            What is in the boxes.

        Raises
        ------
        ValueError
            They do not fit each other.
        """
        shape, boxes = list(header["shape"]), header["boxes"]
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError("its atlas has no shape of one")
        _check_size(shape)
        if content.dtype != np.uint8 or content.ndim != 1 or len(boxes) != shape[0]:
            raise ValueError("its atlas is not of its kind")
        shares = np.zeros(shape, np.uint8)
        first = 0
        for organ, box in zip(shares, boxes, strict=True):
            if len(box) != 3 or not all(
                len(side) == 2 and 0 <= side[0] <= side[1] <= n
                for side, n in zip(box, shape[1:], strict=True)
            ):
                raise ValueError("a box of its atlas is beyond the atlas")
            part = organ[tuple(slice(*side) for side in box)]
            if first + part.size > len(content):
                raise ValueError("its atlas is cut off")
            part[:] = content[first : first + part.size].reshape(part.shape)
            first += part.size
        if first != len(content):
            raise ValueError("its atlas holds more than its boxes")
        return Atlas(shares)


def _check_size(shape: Sequence[int]) -> None:
    if max(shape[1:]) > MOST_SIDE or math.prod(shape) > MOST_VOXELS:
        raise ValueError(f"an atlas of shape {tuple(shape)} is larger than a body")


def _box(occupied: NDArray[np.uint8]) -> Box:
    """The smallest box around all that is not 0; an empty one where all is."""
    from scipy.ndimage import find_objects

    (box,) = find_objects((occupied > 0).astype(np.uint8)) or [None]
    return (slice(0, 0),) * 3 if box is None else box


@dataclass(frozen=True, eq=False)
class _Home:
    """Where an organ may be, at positions of a scan: 1, and less where it is not at home.

    An organ that no scan has shown may be anywhere.

    values : (k, i, j) float32, a box of the atlas
    local : along each axis the voxel of that box of each position; what is not in it is beyond
    beyond : what holds there
    """

    values: NDArray[np.float32]
    local: tuple[NDArray[np.intp], ...]
    beyond: float

    @staticmethod
    def of(organ: NDArray[np.uint8], voxels: Sequence[NDArray[np.intp]]) -> _Home:
        """Of an organ's (K, I, J) shares, at atlas voxels along (k, i, j)."""
        from scipy.ndimage import gaussian_filter, maximum_filter

        k, i, j = _box(organ)
        if k.start == k.stop:
            return _Home(np.zeros((0, 0, 0), np.float32), tuple(voxels), 1.0)
        margin = _ROOM // 2 + math.ceil(4 * _BLUR)
        padded = np.pad(np.square(organ[k, i, j] / np.float32(255)), margin)
        room = gaussian_filter(maximum_filter(padded, _ROOM), _BLUR, mode="constant")
        full = min(_FULL_SHARE, _FULL_PART * float(room.max()))
        values = np.clip(room / np.float32(full), _HARDLY, 1)
        local = tuple(
            along - (side.start - margin) for along, side in zip(voxels, (k, i, j), strict=True)
        )
        return _Home(values, local, _HARDLY)

    @cached_property
    def _near(self) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Along i and j, the positions in the box, and their voxels of it."""
        near = []
        for along, n in zip(self.local[1:], self.values.shape[1:], strict=True):
            is_near = (along >= 0) & (along < n)
            near.append((np.flatnonzero(is_near), along[is_near]))
        return near

    def slice(self, n: int) -> NDArray[np.float32]:
        """(n_i, n_j) at a slice of positions."""
        found = np.full([len(along) for along in self.local[1:]], self.beyond, np.float32)
        k = self.local[0][n]
        if 0 <= k < len(self.values):
            (i, of_i), (j, of_j) = self._near
            found[np.ix_(i, j)] = self.values[k][np.ix_(of_i, of_j)]
        return found


@dataclass(frozen=True, eq=False)
class _Fit:
    """What a scan shows, to be laid over an atlas.

    How it is laid is six numbers: the logarithm of the stretch along each axis, and where in the
    atlas, mm, the middle of its organs comes to lie.

    middle : (3,) of the organs, mm of the scan
    usual : (3,) where the same organs lie in the atlas, atlas voxels
    """

    atlas: Atlas
    points: NDArray[np.float32]
    rows: NDArray[np.int64]
    weights: NDArray[np.float32]
    middle: NDArray[np.float64]
    usual: NDArray[np.float64]

    @staticmethod
    def of(
        atlas: Atlas,
        points: NDArray[np.float32],
        rows: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> _Fit | None:
        """None where no point shows an organ that the atlas has."""
        is_known = np.append(np.isfinite(atlas._middles[:, 0]), False)
        shown = is_known[rows] & (weights > 0)
        if not shown.any():
            return None
        return _Fit(
            atlas,
            points,
            rows,
            weights,
            np.average(points[shown], axis=0, weights=weights[shown]),
            np.average(atlas._middles[rows[shown]], axis=0, weights=weights[shown]),
        )

    def laid(self, how: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scale and shift from mm to atlas voxels."""
        scale = np.exp(how[:3]) / VOXEL_MM
        return scale, how[3:] / VOXEL_MM - scale * self.middle

    @cached_property
    def _weight(self) -> float:
        return float(self.weights.sum())

    @cached_property
    def _of_rows(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Log probabilities of the 256 shares, and of each row beyond the atlas."""
        logs = np.log(np.square(np.arange(256) / 255) + _LEAST_P)
        beyond = np.full(len(self.atlas.shares) + 1, np.log(_LEAST_P))
        beyond[-1] = np.log(_BEYOND_P)
        return logs.astype(np.float32), beyond.astype(np.float32)

    def score(self, how: NDArray[np.float64]) -> float:
        """Mean log probability of what is shown, less what the stretch costs."""
        logs, beyond = self._of_rows
        shares = self.atlas._with_none
        scale, shift = self.laid(how)
        at = np.rint(self.points * scale + shift)
        is_within = ((at >= 0) & (at < shares.shape[1:])).all(axis=1)
        k, i, j = at[is_within].astype(np.intp).T
        found = beyond[self.rows]
        found[is_within] = logs[shares[self.rows[is_within], k, i, j]]
        mean = float((found * self.weights).sum(dtype=np.float64)) / self._weight
        return mean - _STIFFNESS * float(np.square(how[:3]).sum()) / _STRETCH**2

    def starts(self) -> Iterator[NDArray[np.float64]]:
        """Where the organs usually lie, and at all heights of the atlas above and below."""
        k, i, j = self.usual * VOXEL_MM
        heights = np.arange(0.0, self.atlas.shares.shape[1] * VOXEL_MM, _START_MM)
        for height in (k, *heights):
            yield np.array([0.0, 0.0, 0.0, height, i, j])

    def climbed(self, how: NDArray[np.float64], n_halvings: int) -> NDArray[np.float64]:
        """The best that steps along each number reach, each half as long as those before."""
        stretch, mm = _FIRST_STEP
        best = self.score(how)
        for _ in range(n_halvings + 1):
            for _ in range(_MOST_SWEEPS):
                before = best
                for n in (3, 4, 5, 0, 1, 2):
                    for step in (stretch, -stretch) if n < 3 else (mm, -mm):
                        moved = how.copy()
                        moved[n] += step
                        found = self.score(moved)
                        if found > best:
                            how, best = moved, found
                if best == before:
                    break
            stretch, mm = stretch / 2, mm / 2
        return how
