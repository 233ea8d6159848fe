"""Learning an atlas: labelled scans laid over one another.

::

    the scan with most organs --> a first atlas
    each scan --(laid over the atlas so far)--> counted where it then lies --> the next atlas, twice
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from organfast.atlas import MOST_SIDE, MOST_VOXELS, VOXEL_MM, Atlas, Place, thinned
from organfast.workers import Workers

__all__ = ["Lattice", "learned_atlas", "rows_of"]

_BLUR = 1.2  # voxels: people differ more than the few that were seen
_N_ROUNDS = 2
_LEAST_SHARE, _LEAST_PART = 1e-3, 0.01
"""Less is nothing, of all scans and of an organ's greatest share: it would make boxes large."""
_FEW = 0.1
"""Where a smaller share of the scans shows a body, they do not tell all of what lies there."""


@dataclass(frozen=True, eq=False)
class Lattice:
    """A label map on an even lattice of 8 mm, the organs only.

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
            What each label is here, see :func:`rows_of`; labels beyond it are outside.
        """
        nearest = [
            np.rint(np.arange(0, n * mm, VOXEL_MM) / mm).astype(np.intp).clip(0, n - 1)
            for n, mm in zip(labels.shape, spacing_mm, strict=True)
        ]
        known = np.zeros(np.iinfo(labels.dtype).max + 1, np.uint16)
        known[: len(row_of_label)] = row_of_label
        return Lattice(known[labels[np.ix_(*nearest)]])

    def place_in(self, atlas: Atlas) -> Place | None:
        """Where it lies in an atlas, see ``Atlas.place``.

        Parameters
        ----------
        atlas : Atlas
            Of the same organs.
        """
        inside = np.flatnonzero(self.labels)
        at = np.unravel_index(inside[thinned(len(inside))], self.labels.shape)
        points = (np.stack(at, axis=1) * VOXEL_MM).astype(np.float32)
        rows = np.minimum(self.labels[at].astype(np.int64) - 1, len(atlas.shares))
        return atlas.place(points, rows, np.ones(len(points), np.float32))


def rows_of(organs: Iterable[int], n_labels: int, outside: int = 0) -> NDArray[np.uint16]:
    """(n_labels,) uint16: what each label is in a :class:`Lattice`.

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


def learned_atlas(lattices: Sequence[Lattice], n_organs: int, workers: Workers) -> Atlas | None:
    """Lay labelled scans over one another; None where they show no organ.

    Parameters
    ----------
    lattices : sequence of Lattice
        Of the scans; rows from ``n_organs`` on are no organ.
    n_organs : int
        Organs that they may show.
    workers : Workers
        Threads to share the scans; the atlas does not depend on them.
    """
    shown = [_shown(lattice, n_organs) for lattice in lattices]
    if not any(n for n, _ in shown):
        return None
    first = lattices[shown.index(max(shown))]
    atlas = _Sums.of([(first, Place((1 / VOXEL_MM,) * 3, (0.0,) * 3))], n_organs).atlas()
    for _ in range(_N_ROUNDS):
        places = workers.in_order(partial(Lattice.place_in, atlas=atlas), lattices)
        placed = [(x, p) for x, p in zip(lattices, places, strict=True) if p is not None]
        atlas = _Sums.of(placed, n_organs).atlas()
    return atlas


def _shown(lattice: Lattice, n_organs: int) -> tuple[int, int]:
    """Organs, and points of the body."""
    rows = np.unique(lattice.labels)
    return int(((rows > 0) & (rows <= n_organs)).sum()), int(np.count_nonzero(lattice.labels))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Scans that show each organ, any of the body, and the place itself.

    organs : (n_organs, K, I, J) uint16
    body, covered : (K, I, J) uint16
    """

    organs: NDArray[np.uint16]
    body: NDArray[np.uint16]
    covered: NDArray[np.uint16]

    @staticmethod
    def of(placed: Sequence[tuple[Lattice, Place]], n_organs: int) -> _Sums:
        """In the smallest box that holds the organs of all scans."""
        corners = [c for c in (_corners(*one, n_organs) for one in placed) if c is not None]
        low = np.min([low for low, _ in corners], axis=0)
        high = np.max([high for _, high in corners], axis=0)
        shape = np.minimum(high - low + 1, MOST_SIDE).tolist()
        while n_organs * math.prod(shape) > MOST_VOXELS:
            shape[shape.index(max(shape))] -= 1
        sums = _Sums(
            np.zeros((n_organs, *shape), np.uint16),
            np.zeros(shape, np.uint16),
            np.zeros(shape, np.uint16),
        )
        for lattice, place in placed:
            k, i, j = (np.array(place.shift) - low).tolist()
            sums._add(lattice, Place(place.scale, (k, i, j)))
        return sums

    def _add(self, lattice: Lattice, place: Place) -> None:
        here, there = [], []
        for axis, n in enumerate(lattice.labels.shape):
            voxel = np.arange(self.covered.shape[axis])
            mm = (voxel - place.shift[axis]) / place.scale[axis]
            nearest = np.rint(mm / VOXEL_MM).astype(np.intp)
            is_seen = (nearest >= 0) & (nearest < n)
            here.append(voxel[is_seen])
            there.append(nearest[is_seen])
        found = lattice.labels[np.ix_(*there)]
        self.covered[np.ix_(*here)] += 1
        self.body[np.ix_(*here)] += found > 0
        k, i, j = np.nonzero((found > 0) & (found <= len(self.organs)))
        self.organs[found[k, i, j] - 1, here[0][k], here[1][i], here[2][j]] += 1

    def atlas(self) -> Atlas:
        total = np.maximum(_blurred(self.body), _FEW * _blurred(self.covered)) + np.float32(1e-3)
        shares = np.zeros(self.organs.shape, np.uint8)
        for organ, share in zip(self.organs, shares, strict=True):
            p = np.clip(_blurred(organ) / total, 0, 1)
            p[p < min(_LEAST_SHARE, _LEAST_PART * float(p.max()))] = 0
            share[:] = np.rint(255 * np.sqrt(p))
        return Atlas(shares)


def _corners(
    lattice: Lattice, place: Place, n_organs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """First and last atlas voxel that a scan's organs may reach, blurred."""
    where = np.argwhere((lattice.labels > 0) & (lattice.labels <= n_organs))
    if not len(where):
        return None
    room = int(np.ceil(4 * _BLUR))
    ends = np.array([where.min(axis=0), where.max(axis=0)]) * VOXEL_MM * place.scale + place.shift
    return (
        np.floor(ends[0]).astype(np.int64) - room,
        np.ceil(ends[1]).astype(np.int64) + room,
    )


def _blurred(counts: NDArray[np.uint16]) -> NDArray[np.float32]:
    from scipy.ndimage import gaussian_filter

    blurred: NDArray[np.float32] = gaussian_filter(
        counts.astype(np.float32), _BLUR, mode="constant"
    )
    return blurred
