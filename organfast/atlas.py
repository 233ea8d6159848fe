"""Where organs lie in a body: an atlas, learned from labelled scans and laid over a new one.

::

    labelled scans --(laid over one another)--> share of them that show an organ, at each place
    a new scan     --(its labels so far)--> the place, and the size, at which they agree best
                   --(an organ where no labelled scan has it)--> is none

A classifier sees a few centimetres along the body: a muscle of the pelvis may look to it like the
lower end of a kidney, gas in the stomach like the foot of a lung. All of its answers together tell
which part of a body a scan shows, even where organs are cut off, and so where an organ cannot be.

A scan is laid over the atlas by a shift and a stretch along each axis, found by a pattern search
(Hooke and Jeeves 1961, J. ACM 8 (2)) for the greatest mean log probability of its labels, started
at all heights of the body. No turn: a scan in working order lies straight to some degrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.grid import BlockGrid, GridVolume
from organfast.workers import Workers

__all__ = ["Atlas", "Lattice", "Place", "learned_atlas"]

VOXEL_MM = 8.0
_SIDE_MM = 160.0, 80.0, 80.0
"""Beyond the body that the others are laid over first: taller and larger patients."""
_BLUR = 1.2  # voxels
_LEAST_SHARE = 1e-3
_N_ROUNDS = 2
_LEAST_P = 2e-3
"""Probability of an organ where no scan has it: a wrong label must not decide alone."""
_BEYOND_P = 0.9
"""Probability of no organ beyond the atlas."""
_ROOM = 3  # voxels
_FULL_SHARE = 0.02
"""From this share of the scans on an organ is at home at a place, after the room around it; of a
small or seldom labelled organ, from this part of its greatest share on:"""
_FULL_PART = 0.1
_HARDLY = 0.05
"""What is left of a probability where an organ is not at home."""
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
_MOST_VOXELS = 1 << 25


@dataclass(frozen=True, eq=False)
class Lattice:
    """A label map on an even lattice, the organs only.

    Parameters
    ----------
    labels : (K, I, J) uint16
        0 outside the body, then the organs from 1 on; whatever lies between them is the last.
    """

    labels: NDArray[np.uint16]

    @staticmethod
    def of(
        labels: NDArray[np.unsignedinteger],
        spacing_mm: Sequence[float],
        row_of_label: NDArray[np.uint16],
    ) -> Lattice:
        """A label map on the model grid, the nearest voxel of each point of the lattice.

        Parameters
        ----------
        labels : (K, R, C) unsigned
            In working order.
        spacing_mm : (k, i, j) float, mm
            Its voxels.
        row_of_label : (n,) uint16
            What each label is here; labels beyond it are outside.
        """
        nearest = [
            np.rint(np.arange(0, n * mm, VOXEL_MM) / mm).astype(np.intp).clip(0, n - 1)
            for n, mm in zip(labels.shape, spacing_mm, strict=True)
        ]
        found = labels[np.ix_(*nearest)]
        known = np.zeros(np.iinfo(labels.dtype).max + 1, np.uint16)
        known[: len(row_of_label)] = row_of_label
        return Lattice(known[found])

    @cached_property
    def points(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Where the body is, mm, and the row of each of these points."""
        inside = np.argwhere(self.labels > 0)
        rows = self.labels[tuple(inside.T)].astype(np.int64) - 1
        return (inside * VOXEL_MM).astype(np.float32), rows


@dataclass(frozen=True)
class Place:
    """How a scan lies in the atlas.

    Parameters
    ----------
    scale : (k, i, j) float
        Atlas voxels per mm of the scan.
    shift : (k, i, j) float
        Atlas voxel of the scan's first voxel.
    agreement : float
        Mean log probability of its labels there, less what the stretch costs.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    agreement: float

    @property
    def stretch(self) -> tuple[float, float, float]:
        """How much larger than the scan the atlas is, along (k, i, j)."""
        k, i, j = (scale * VOXEL_MM for scale in self.scale)
        return k, i, j


@dataclass(frozen=True, eq=False)
class Atlas:
    """Share of the labelled scans that show an organ, at each place of a body.

    Parameters
    ----------
    shares : (n_organs, K, I, J) uint8
        255 times the square root of the share, of the organs of a class table in their order;
        voxels of 8 mm in working order.

    Raises
    ------
    ValueError
        The array is not of that kind, or empty, or has more than 2^25 voxels.
    """

    shares: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.shares.dtype != np.uint8 or self.shares.ndim != 4 or not self.shares.size:
            raise ValueError(
                f"an atlas is a 4-D uint8 array with voxels, not {self.shares.ndim}-D "
                f"{self.shares.dtype} of shape {self.shares.shape}"
            )
        if self.shares.size > _MOST_VOXELS:
            raise ValueError(f"an atlas of {self.shares.size} voxels is no atlas of a body")

    @cached_property
    def _p(self) -> NDArray[np.float32]:
        """(n_organs, K, I, J)"""
        p: NDArray[np.float32] = np.square(self.shares.astype(np.float32) / 255)
        return p

    @cached_property
    def _logs(self) -> NDArray[np.float32]:
        """(K, I, J, n_organs + 1): log probability of each organ inside the body, and of none."""
        none = np.clip(1 - self._p.sum(axis=0), 0, 1)[None]
        p = np.moveaxis(np.concatenate([self._p, none]), 0, -1)
        return np.ascontiguousarray(np.log(p + _LEAST_P), np.float32)

    @cached_property
    def _at_home(self) -> NDArray[np.float32]:
        """(n_organs, K, I, J): 1 where an organ may be, with some room around it; else little."""
        from scipy.ndimage import gaussian_filter, maximum_filter

        def at_home(p: NDArray[np.float32]) -> NDArray[np.float32]:
            room = gaussian_filter(maximum_filter(p, _ROOM), 1.0, mode="nearest")
            full = max(min(_FULL_SHARE, _FULL_PART * float(room.max())), 1e-6)
            home: NDArray[np.float32] = np.clip(room / np.float32(full), _HARDLY, 1)
            return home

        return np.stack([at_home(p) for p in self._p])

    @cached_property
    def _beyond(self) -> NDArray[np.float32]:
        """(n_organs + 1,): the same beyond the atlas."""
        p = np.full(len(self.shares) + 1, _LEAST_P, np.float32)
        p[-1] = _BEYOND_P
        logs: NDArray[np.float32] = np.log(p)
        return logs

    @cached_property
    def _middle(self) -> NDArray[np.float64]:
        """Of all organs, atlas voxels."""
        mass = self._p.sum(axis=0)
        where = np.argwhere(mass > 0)
        if not len(where):
            return (np.array(mass.shape) - 1) / 2
        middle: NDArray[np.float64] = np.average(where, axis=0, weights=mass[tuple(where.T)])
        return middle

    # --- a scan laid over it ----------------------------------------------------------------------

    def place(
        self,
        points: NDArray[np.float32],
        rows: NDArray[np.int64],
        weights: NDArray[np.float32] | None = None,
    ) -> Place | None:
        """Where a scan lies in the atlas, or None where it shows no organ at all.

        Parameters
        ----------
        points : (n, 3) float32, mm
            Positions inside the body, along (k, i, j) from the scan's first voxel.
        rows : (n,) int64
            The organ at each of them; ``n_organs`` is none.
        weights : (n,) float32, optional
            How sure that is.
        """
        none = len(self.shares)
        if not (rows < none).any():
            return None
        if weights is None:
            weights = np.ones(len(points), np.float32)
        every = max(1, math.ceil(len(points) / _N_POINTS))
        fine = _Seen(self, points[::every], rows[::every], weights[::every])
        every = max(1, math.ceil(len(points) / _N_ROUGHLY))
        rough = _Seen(self, points[::every], rows[::every], weights[::every])
        starts = sorted(rough.starts(), key=rough.agreement, reverse=True)[:_N_STARTS]
        found = max((rough.climbed(start, 1) for start in starts), key=rough.agreement)
        best = fine.climbed(found, _N_HALVINGS)
        scale, shift = fine.laid(best)
        return Place(tuple(scale.tolist()), tuple(shift.tolist()), fine.agreement(best))

    def place_of(self, lattice: Lattice) -> Place | None:
        """Where a labelled scan lies in the atlas, or None where it shows no organ at all.

        Parameters
        ----------
        lattice : Lattice
            Of the scan.
        """
        return self.place(*lattice.points)

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
        """
        row_of_class = np.full(coarse.shape[-1], len(self.shares), np.int64)
        row_of_class[list(organs)] = np.arange(len(self.shares))
        best = coarse.argmax(axis=-1)
        inside = np.argwhere(best != outside)
        classes = best[tuple(inside.T)]
        mm = np.stack(
            [
                centres[index] * spacing
                for centres, index, spacing in zip(
                    block_grid.centres, inside.T, grid_volume.spacing_mm, strict=True
                )
            ],
            axis=1,
        )
        sure = coarse[(*inside.T, classes)]
        return self.place(mm.astype(np.float32), row_of_class[classes], sure)

    def rule_out(
        self,
        coarse: NDArray[np.float32],
        place: Place,
        block_grid: BlockGrid,
        grid_volume: GridVolume,
        organs: Sequence[int],
        rest: int = 0,
    ) -> dict[int, float]:
        """Organs where none of their kind was ever seen become what lies between organs, in place.

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
        gone, best = {}, coarse.argmax(axis=-1)
        for organ, label in enumerate(organs):
            p = coarse[..., label]
            kept = p * self._at_home_in(organ, place, block_grid, grid_volume)
            coarse[..., rest] += p - kept
            won = best == label
            total = float(p[won].sum(dtype=np.float64))
            gone[label] = 1 - float(kept[won].sum(dtype=np.float64)) / total if total else 0.0
            coarse[..., label] = kept
        return gone

    def _at_home_in(
        self, organ: int, place: Place, block_grid: BlockGrid, grid_volume: GridVolume
    ) -> NDArray[np.float32]:
        """(n_k, n_i, n_j): 1 where an organ may be, and less where it is not at home."""
        found: NDArray[np.float32] = self._at_home[organ]
        for axis, centres in enumerate(block_grid.centres):
            mm = centres * grid_volume.spacing_mm[axis]
            voxel = np.rint(mm * place.scale[axis] + place.shift[axis]).astype(np.intp)
            n = found.shape[axis]
            found = found.take(voxel.clip(0, n - 1), axis)
            beyond: list[Any] = [slice(None)] * 3
            beyond[axis] = (voxel < 0) | (voxel >= n)
            found[tuple(beyond)] = _HARDLY
        return found

    # --- in a model's file ------------------------------------------------------------------------

    @cached_property
    def packed(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The shape and the box of each organ, for JSON, and what is in the boxes, one by one."""
        boxes, parts = [], []
        for organ in self.shares:
            box = _box(organ)
            boxes.append([[side.start, side.stop] for side in box])
            parts.append(organ[box].ravel())
        header = {"shape": list(self.shares.shape), "boxes": boxes}
        return header, np.concatenate(parts)

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
        if len(shape) != 4 or min(shape) < 1 or math.prod(shape) > _MOST_VOXELS:
            raise ValueError("its atlas has no shape of one")
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


def _box(organ: NDArray[np.uint8]) -> tuple[slice, slice, slice]:
    sides = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        occupied = np.flatnonzero(organ.any(axis=others))
        sides.append(slice(int(occupied[0]), int(occupied[-1]) + 1) if occupied.size else slice(0))
    k, i, j = (slice(side.start or 0, side.stop) for side in sides)
    return k, i, j


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a scan shows, to be laid over an atlas.

    How it is laid is six numbers: the logarithm of the stretch along each axis, and where in the
    atlas, mm, its middle comes to lie.
    """

    atlas: Atlas
    points: NDArray[np.float32]
    rows: NDArray[np.int64]
    weights: NDArray[np.float32]

    @cached_property
    def middle(self) -> NDArray[np.float64]:
        total = max(float(self.weights.sum()), 1e-6)
        middle: NDArray[np.float64] = (self.points * self.weights[:, None]).sum(axis=0) / total
        return middle

    def laid(self, how: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scale and shift from mm to atlas voxels."""
        scale = np.exp(how[:3]) / VOXEL_MM
        return scale, how[3:] / VOXEL_MM - scale * self.middle

    def agreement(self, how: NDArray[np.float64]) -> float:
        from organfast.kernels.atlas import agreement

        logs, beyond = self.atlas._logs, self.atlas._beyond
        found = agreement(logs, beyond, self.points, self.rows, self.weights, *self.laid(how))
        cost = _STIFFNESS * float(np.square(how[:3]).sum()) / _STRETCH**2
        return float(found) / max(float(self.weights.sum()), 1e-6) - cost

    def starts(self) -> Iterator[NDArray[np.float64]]:
        """At all heights of the atlas, in the middle of it."""
        _, i, j = self.atlas._middle * VOXEL_MM
        for k in np.arange(0.0, self.atlas.shares.shape[1] * VOXEL_MM, _START_MM):
            yield np.array([0.0, 0.0, 0.0, k, i, j])

    def climbed(self, how: NDArray[np.float64], n_halvings: int) -> NDArray[np.float64]:
        """The best that steps along each number reach, each half as long as those before."""
        stretch, mm = _FIRST_STEP
        best = self.agreement(how)
        for _ in range(n_halvings + 1):
            for _ in range(_MOST_SWEEPS):
                before = best
                for n in (3, 4, 5, 0, 1, 2):
                    for step in (stretch, -stretch) if n < 3 else (mm, -mm):
                        moved = how.copy()
                        moved[n] += step
                        found = self.agreement(moved)
                        if found > best:
                            how, best = moved, found
                if best == before:
                    break
            stretch, mm = stretch / 2, mm / 2
        return how


# --- learning -------------------------------------------------------------------------------------


def learned_atlas(lattices: Sequence[Lattice], n_organs: int, workers: Workers) -> Atlas | None:
    """Lay labelled scans over one another; None where they show no organ.

    The first atlas is the scan that shows most organs; then each is laid over what all of them made
    of it, twice.

    Parameters
    ----------
    lattices : sequence of Lattice
        Of the scans; rows from ``n_organs`` on are no organ.
    n_organs : int
        Organs that they may show.
    workers : Workers
        Threads to share the scans.
    """
    shown = [len(np.unique(rows[rows < n_organs])) for _, rows in (x.points for x in lattices)]
    if not any(shown):
        return None
    n_points = [len(x.points[0]) for x in lattices]
    first = lattices[max(range(len(lattices)), key=lambda n: (shown[n], n_points[n]))]
    sides = [round(mm / VOXEL_MM) for mm in _SIDE_MM]
    shape = [n + 2 * side for n, side in zip(first.labels.shape, sides, strict=True)]
    sums = _Sums.of(n_organs, shape)
    k, i, j = map(float, sides)
    unmoved = Place((1 / VOXEL_MM,) * 3, (k, i, j), 0.0)
    sums.add(first, unmoved)
    atlas = sums.atlas()
    for _ in range(_N_ROUNDS):
        sums = _Sums.of(n_organs, atlas.shares.shape[1:])
        places = workers.in_order(atlas.place_of, lattices)
        for lattice, place in zip(lattices, places, strict=True):
            if place is not None:
                sums.add(lattice, place)
        atlas = sums.atlas()
    return _trimmed(atlas)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Scans that show each row at each place, and scans that show the place."""

    rows: NDArray[np.float32]  # (n_organs + 1, K, I, J)
    covered: NDArray[np.float32]  # (K, I, J)

    @staticmethod
    def of(n_organs: int, shape: Sequence[int]) -> _Sums:
        return _Sums(np.zeros((n_organs + 1, *shape), np.float32), np.zeros(shape, np.float32))

    def add(self, lattice: Lattice, place: Place) -> None:
        here, there = [], []
        for axis, n in enumerate(lattice.labels.shape):
            voxel = np.arange(self.covered.shape[axis])
            mm = (voxel - place.shift[axis]) / place.scale[axis]
            nearest = np.rint(mm / VOXEL_MM).astype(np.intp)
            is_seen = (nearest >= 0) & (nearest < n)
            here.append(voxel[is_seen])
            there.append(nearest[is_seen])
        found = lattice.labels[np.ix_(*there)].astype(np.intp)
        self.covered[np.ix_(*here)] += 1
        k, i, j = np.nonzero(found)
        row = np.minimum(found[k, i, j] - 1, len(self.rows) - 1)
        np.add.at(self.rows, (row, here[0][k], here[1][i], here[2][j]), 1)

    def atlas(self) -> Atlas:
        """Blurred: people differ more than the few that were seen."""
        from scipy.ndimage import gaussian_filter

        rows = [gaussian_filter(row, _BLUR, mode="constant") for row in self.rows]
        inside = np.sum(rows, axis=0)
        covered = gaussian_filter(self.covered, _BLUR, mode="constant")
        # Where few of the scans show any body, these few do not tell all.
        total = np.maximum(inside, 0.1 * covered) + np.float32(1e-3)
        shares = np.clip(np.stack(rows[:-1]) / total, 0, 1)
        shares[shares < _LEAST_SHARE] = 0
        return Atlas(np.rint(255 * np.sqrt(shares)).astype(np.uint8))


def _trimmed(atlas: Atlas) -> Atlas:
    """Without the margin that no organ reached, but for some room."""
    room = 2
    k, i, j = (
        slice(max(0, side.start - room), side.stop + room)
        for side in _box(atlas.shares.max(axis=0))
    )
    return Atlas(np.ascontiguousarray(atlas.shares[:, k, i, j]))


def rows_of(organs: Iterable[int], n_labels: int, outside: int = 0) -> NDArray[np.uint16]:
    """(n_labels,) uint16, as :meth:`Lattice.of` wants it.

    Parameters
    ----------
    organs : iterable of int
        Labels of the organs.
    n_labels : int
        Labels that are known.
    outside : int
        The label of what is outside the body.
    """
    organs = list(organs)
    rows = np.full(n_labels, len(organs) + 1, np.uint16)
    rows[organs] = np.arange(1, len(organs) + 1)
    rows[outside] = 0
    return rows
