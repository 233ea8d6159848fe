"""Where organs lie among each other: what a scan shows of some says where the others can be.

::

    labelled scans   voxels of each organ, seen from the middle of each other organ: a box in mm
    a new scan       organs the classifier is sure of vote, each by its box, on where the others may
                     be; where most are against it, an organ's probability goes to the context class

So a bladder in the chest, a trachea in the pelvis and the right kidney on the left find no votes,
and an organ whose place is outside the field of view leaves nothing behind. One that is cut off
by the field of view has no middle along that axis, and does not vote along it. A box holds what was
seen in all labelled scans, and more room for patients who were not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label

from organfast.anatomy import ClassTable

__all__ = ["Places", "in_place"]

_LEAST_VOXELS = 20
_LEAST_POSITIONS = 12
_SURE = 0.5
_ROOM_MM = 15.0
"""Around each box, where a vote is still whole."""
_FADE_MM = 25.0
"""Beyond that, over which it fades."""
_AGAINST, _FOR = 0.25, 0.5
"""Share of the votes up to which a position is ruled out, and from which on nothing changes."""
_ENDS = (1.0, 99.0)
"""Percentiles of an organ's voxels along an axis that count as its ends."""


@dataclass(frozen=True, eq=False)
class Places:
    """Boxes around organs, seen from the middles of others.

    Parameters
    ----------
    low, high : (n_classes, n_classes, 3) float32, mm
        Of class [0], from the middle of class [1], along (k, i, j) in working order; NaN where the
        two were never seen together, or never with this end in view: there the box is open.

    Raises
    ------
    ValueError
        The arrays do not fit each other, or a box ends before it begins.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def __post_init__(self) -> None:
        n = len(self.low)
        if self.low.shape != (n, n, 3) or self.high.shape != (n, n, 3):
            raise ValueError(
                f"low is {self.low.shape} and high {self.high.shape}; give (n_classes, n_classes, "
                "3) for both"
            )
        if (self.low > self.high).any() or np.isinf(self.low).any() or np.isinf(self.high).any():
            raise ValueError("a box of the places ends before it begins, or nowhere")

    @property
    def known(self) -> NDArray[np.bool_]:
        """(n_classes, n_classes) whether class [1] tells anything of where class [0] is."""
        known = np.isfinite(self.low).any(axis=2) | np.isfinite(self.high).any(axis=2)
        return known

    @staticmethod
    def of(
        labels: NDArray[np.unsignedinteger],
        spacing_mm: tuple[float, float, float],
        classes: ClassTable,
    ) -> Places:
        """The boxes of one labelled scan.

        Parameters
        ----------
        labels : (K, R, C) unsigned int
            Label map in working order.
        spacing_mm : (k, i, j) float, mm
            Its voxel size.
        classes : ClassTable
            Which labels are organs; others do not count.
        """
        n = len(classes)
        low, high = np.full((2, n, n, 3), np.nan, np.float32)
        found = _extents(labels, np.array(spacing_mm), classes)
        for one, (begin, end, _, _) in found.items():
            for other, (_, _, middle, is_whole) in found.items():
                if one != other and is_whole:
                    low[one, other], high[one, other] = begin - middle, end - middle
        return Places(low, high)

    def __or__(self, other: Places) -> Places:
        """Boxes that hold those of both."""
        return Places(np.fmin(self.low, other.low), np.fmax(self.high, other.high))

    def to_list(self) -> list[list[int | None]]:
        """Rows (class, seen from, low k, i, j, high k, i, j) in whole mm, for JSON."""
        pairs = np.argwhere(self.known)
        ends = np.concatenate([self.low, self.high], axis=2)[tuple(pairs.T)]
        return [
            [*pair, *(None if np.isnan(mm) else round(float(mm)) for mm in row)]
            for pair, row in zip(pairs.tolist(), ends, strict=True)
        ]

    @staticmethod
    def from_list(rows: Iterable[Any], n_classes: int) -> Places:
        """The places that :meth:`to_list` described.

        Parameters
        ----------
        rows : iterable
            As read from JSON.
        n_classes : int
            Of the model.

        Raises
        ------
        ValueError
            The content, which may come from a tampered file, describes no places.
        """
        low, high = np.full((2, n_classes, n_classes, 3), np.nan, np.float32)
        for row in rows:
            is_row = isinstance(row, list) and len(row) == 8
            if not is_row or not all(type(v) is int and 0 <= v < n_classes for v in row[:2]):
                raise ValueError("places are rows of two classes and six lengths in mm")
            if not all(v is None or (type(v) is int and abs(v) < 100_000) for v in row[2:]):
                raise ValueError("lengths of places are whole mm, or missing")
            ends = np.array([np.nan if v is None else v for v in row[2:]], np.float32)
            low[row[0], row[1]], high[row[0], row[1]] = ends[:3], ends[3:]
        return Places(low, high)


def in_place(
    coarse: NDArray[np.float32],
    centres_mm: tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]],
    places: Places,
    classes: ClassTable,
) -> dict[str, float]:
    """Take probability from where an organ cannot be, seen from the others; the rest stays.

    Parameters
    ----------
    coarse : (n_k, n_i, n_j, n_classes) float32
        Probabilities at the positions of a block grid; changed in place.
    centres_mm : three of (n,) float, mm
        Where the positions are along k, i and j, from anywhere.
    places : Places
        Where organs lie.
    classes : ClassTable
        What the classes are. What is taken goes to the context class, or to the background.

    Returns
    -------
    dict of str to float
        By organ, the share of its probability that was taken, where it is a hundredth or more.
    """
    middles = _middles(coarse, centres_mm, classes)
    rest = 0 if classes.context is None else classes.context
    taken = {}
    for organ in classes.organs:
        votes = _votes(organ, middles, centres_mm, places)
        if votes is None:
            continue
        share = np.clip((votes - _AGAINST) / (_FOR - _AGAINST), 0, 1).astype(np.float32)
        before = coarse[..., organ]
        lost = before * (1 - share)
        total = float(before.sum())
        coarse[..., organ] = before - lost
        coarse[..., rest] += lost
        if total > 0 and float(lost.sum()) >= 0.01 * total:
            taken[classes.names[organ]] = round(float(lost.sum()) / total, 3)
    return taken


_Extent = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], bool]


def _extents(
    labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64], classes: ClassTable
) -> dict[int, _Extent]:
    """Of each organ that is there: its ends, its middle (mm), and whether it is wholly in view.

    An end at a side of the scan is NaN: who knows how far it goes on.
    """
    found = {}
    organs = np.where(labels < len(classes), labels, 0)
    for organ, box in enumerate(find_objects(organs, max_label=len(classes) - 1), start=1):
        if box is None or organ not in classes.organs:
            continue
        here = organs[box] == organ
        if here.sum() < _LEAST_VOXELS:
            continue
        is_whole = all(s.start > 0 and s.stop < n for s, n in zip(box, labels.shape, strict=True))
        along = [here.sum(axis=rest) for rest in ((1, 2), (0, 2), (0, 1))]
        rows = [_ends_and_middle(n, s.start) for n, s in zip(along, box, strict=True)]
        begin, end, middle = np.array(rows).T * spacing_mm
        for axis, (side, n) in enumerate(zip(box, labels.shape, strict=True)):
            if side.start == 0:
                begin[axis] = np.nan
            if side.stop == n:
                end[axis] = np.nan
        found[organ] = begin, end, middle, is_whole
    return found


def _ends_and_middle(n_voxels: NDArray[np.int64], first: int) -> tuple[float, float, float]:
    """Along an axis, from how many voxels an organ has at each coordinate from ``first`` on."""
    share = np.cumsum(n_voxels) / n_voxels.sum()
    begin, end = np.searchsorted(share, np.array(_ENDS) / 100)
    middle = float(n_voxels @ np.arange(len(n_voxels))) / float(n_voxels.sum())
    return first + float(begin), first + float(end), first + middle


_Middle = tuple[NDArray[np.float64], NDArray[np.bool_], float]


def _middles(
    coarse: NDArray[np.float32],
    centres_mm: tuple[NDArray[np.floating], ...],
    classes: ClassTable,
) -> dict[int, _Middle]:
    """Of each organ the classifier is sure of: its middle, the axes it has one on, its weight."""
    best = coarse.argmax(axis=-1)
    middles = {}
    for organ in classes.organs:
        sure = (best == organ) & (coarse[..., organ] >= _SURE)
        pieces, _ = label(sure, np.ones((3, 3, 3), bool))
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        if sizes.max() < _LEAST_POSITIONS:
            continue
        at = np.argwhere(pieces == sizes.argmax())
        whole = (at.min(axis=0) > 0) & (at.max(axis=0) < np.array(best.shape) - 1)
        if whole.any():
            middle = [c[at[:, axis]].mean() for axis, c in enumerate(centres_mm)]
            middles[organ] = np.array(middle), whole, float(np.sqrt(len(at)))
    return middles


def _votes(
    organ: int,
    middles: dict[int, _Middle],
    centres_mm: tuple[NDArray[np.floating], ...],
    places: Places,
) -> NDArray[np.float64] | None:
    """(n_k, n_i, n_j) share of the votes for an organ at each position; None where nobody votes."""
    total, weights = None, 0.0
    for other, (middle, axes, weight) in middles.items():
        if other == organ or not places.known[organ, other]:
            continue
        along = [
            _vote(
                c - middle[axis], *(ends[organ, other, axis] for ends in (places.low, places.high))
            )
            if axes[axis]
            else np.ones(len(c))
            for axis, c in enumerate(centres_mm)
        ]
        vote = weight * along[0][:, None, None] * along[1][:, None] * along[2]
        total = vote if total is None else total + vote
        weights += weight
    return None if total is None else total / weights


def _vote(offset: NDArray[np.floating], low: float, high: float) -> NDArray[np.float64]:
    beyond = np.fmax(low - offset, offset - high) - _ROOM_MM
    beyond[np.isnan(beyond)] = 0  # open at both ends
    faded: NDArray[np.float64] = np.clip(1 - beyond / _FADE_MM, 0, 1)
    return faded
