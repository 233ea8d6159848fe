"""Coarse to fine: a classifier is asked only where its neighbours' answers leave a doubt.

::

    C . C . C .     C  every second position along each axis of the block grid: asked first
    . . . . . .     .  the others get the mean of the 2, 4 or 8 nearest C (beyond the last C: its
    C . C . C .        own), and are asked where two of these C have different labels or where the
    . . . . . .        mean's best class leads the second by less than a margin

Positions outside the body are background with probability 1, as on the full grid, C or not. With
a margin above 1 every position is asked, and the full grid's probabilities come out bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.probability import BACKGROUND, Slab, SliceClassifier
from organfast.workers import Workers

__all__ = ["Refine", "Visits", "refined_slabs"]

_MIXED = -1  # no label: the neighbours' differ


@dataclass(frozen=True)
class Refine:
    """When a position between those of the coarse grid is asked.

    Parameters
    ----------
    margin : float
        Asked where the best class leads the second by less; 0 never, above 1 everywhere. On a
        phantom patient 0.1 moved 1.1 % of the organs' voxels, 0.2 0.2 % and 0.3 0.02 %.
    disagreement : bool
        Asked where the labels of the coarse neighbours differ.

    Raises
    ------
    ValueError
        The margin is negative or no number.
    """

    margin: float = 0.2
    disagreement: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ValueError(
                f"margin is {self.margin!r}; give a difference of probabilities, 0 to 1, or more "
                "to ask everywhere"
            )


@dataclass
class Visits:
    """At how many positions a classifier was asked; counted while slabs are made.

    Parameters
    ----------
    n_inside : int
        Positions inside the body.
    n_asked : int
        Those of them that were asked.
    """

    n_inside: int = 0
    n_asked: int = 0

    @property
    def share(self) -> float | None:
        """Of the positions inside the body; None where there are none."""
        return self.n_asked / self.n_inside if self.n_inside else None


@dataclass(frozen=True, eq=False)
class _Coarse:
    """Answers at every second row and column of a slice.

    probabilities : (n, m, classes) float32; labels : (n, m) int32, the most probable classes.
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int32]


def refined_slabs(
    slices: SliceClassifier,
    body_mask: NDArray[np.bool_] | None,
    refine: Refine,
    workers: Workers,
    visits: Visits,
) -> Iterator[Slab]:
    """Probabilities at the positions of a block grid, most of them from their neighbours'.

    Parameters
    ----------
    slices : SliceClassifier
        What is asked.
    body_mask : (n_k, n_i, n_j) bool or None
        Positions that may be asked; the others are background with probability 1. None is all.
    refine : Refine
        Where to ask beyond the coarse grid.
    workers : Workers
        Threads that compute; the result depends neither on them nor on how the runs are cut.
    visits : Visits
        Added to.

    Yields
    ------
    n : int
        Slice of the block grid, 0, 1, 2, ...
    probabilities : (n_i, n_j, classes) float32
        C-contiguous; the consumer's to keep.

    Raises
    ------
    ValueError
        The mask has another shape than the block grid.
    """
    masks = np.broadcast_to(np.True_, slices.shape) if body_mask is None else body_mask
    if masks.shape != slices.shape or masks.dtype != np.bool_:
        raise ValueError(
            f"body_mask is {masks.dtype} of shape {masks.shape}; give bool of the block grid's "
            f"shape {slices.shape}"
        )
    coarse: dict[int, _Coarse] = {}

    def ask_coarse(n: int) -> _Coarse:
        return _asked_coarsely(slices, n, masks[n])

    def refined(n: int) -> tuple[NDArray[np.float32], int]:
        before = coarse[n - n % 2]
        return _refined(slices, n, masks[n], (before, coarse.get(n + n % 2, before)), refine)

    for part in _parts(slices.runs(), 2 * workers.window):
        # A slice of odd number lies between two coarse ones: the last of a part needs one more.
        ends = range(part.start, min(part.stop + 1, slices.shape[0]), 2)
        new = [n for n in ends if n not in coarse]
        coarse.update(zip(new, workers.in_order(ask_coarse, new), strict=True))
        visits.n_asked += sum(int(masks[n, ::2, ::2].sum()) for n in new)
        slabs = workers.in_order(refined, part)
        for n, (slab, n_asked) in zip(part, slabs, strict=True):
            visits.n_inside += int(masks[n].sum())
            visits.n_asked += n_asked
            yield n, slab
        coarse = {n: answers for n, answers in coarse.items() if n >= part.stop}


def _parts(runs: Iterable[range], n_most: int) -> Iterator[range]:
    """Runs cut into parts of at most ``n_most`` slices, an even number: few stay in memory."""
    for run in runs:
        for first in range(run.start, run.stop, n_most):
            yield range(first, min(first + n_most, run.stop))


def _asked_coarsely(slices: SliceClassifier, n: int, inside: NDArray[np.bool_]) -> _Coarse:
    at_coarse = np.zeros(inside.shape, bool)
    at_coarse[::2, ::2] = inside[::2, ::2]
    found = slices.ask(n, at_coarse)
    probabilities = np.zeros((*inside[::2, ::2].shape, found.shape[1]), np.float32)
    probabilities[..., BACKGROUND] = 1
    probabilities[inside[::2, ::2]] = found
    return _Coarse(probabilities, probabilities.argmax(axis=2).astype(np.int32))


def _refined(
    slices: SliceClassifier,
    n: int,
    inside: NDArray[np.bool_],
    around: tuple[_Coarse, _Coarse],
    refine: Refine,
) -> tuple[NDArray[np.float32], int]:
    """Slab n, between two coarse slices, and at how many positions it was asked for."""
    before, after = around
    probabilities, labels = before.probabilities, before.labels
    if after is not before:
        probabilities = _mean(probabilities, after.probabilities)
        labels = _agreed(labels, after.labels)
    slab = _between(_between(probabilities, inside.shape[0], 0, _mean), inside.shape[1], 1, _mean)
    label = _between(_between(labels, inside.shape[0], 0, _agreed), inside.shape[1], 1, _agreed)
    is_open = inside.copy()
    if n % 2 == 0:
        is_open[::2, ::2] = False
    doubtful = _doubtful(slab, label, is_open, refine)
    slab[~inside] = 0
    slab[~inside, BACKGROUND] = 1
    n_asked = int(doubtful.sum())
    if n_asked:
        slab[doubtful] = slices.ask(n, doubtful)
    return slab, n_asked


def _mean(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = one + other
    mean *= np.float32(0.5)
    return mean


def _agreed(one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.where(one == other, one, np.int32(_MIXED))


def _between(coarse: NDArray[Any], n: int, axis: int, combine: Any) -> NDArray[Any]:
    """From every second to all n positions along an axis.

    ::

        coarse   a   b   c           n = 5: a ab b bc c        n = 6: a ab b bc c c
    """
    shape = list(coarse.shape)
    shape[axis] = n
    out = np.empty(shape, coarse.dtype)
    along, given = np.moveaxis(out, axis, 0), np.moveaxis(coarse, axis, 0)
    along[::2] = given
    along[1 : n - 1 : 2] = combine(given[:-1], given[1:])
    if n % 2 == 0:
        along[-1] = given[-1]
    return out


def _doubtful(
    slab: NDArray[np.float32],
    label: NDArray[np.int32],
    is_open: NDArray[np.bool_],
    refine: Refine,
) -> NDArray[np.bool_]:
    """Where the open positions of a slab are to be asked."""
    if refine.margin > 1:
        return is_open
    doubtful = is_open & (label == _MIXED) if refine.disagreement else np.zeros_like(is_open)
    if refine.margin > 0:
        left = is_open & ~doubtful
        doubtful[left] = _lead(slab[left]) < np.float32(refine.margin)
    return doubtful


def _lead(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Best minus second probability: (m, classes) -> (m,). The argument is spoilt."""
    rows, best = np.arange(len(probabilities)), probabilities.argmax(axis=1)
    lead: NDArray[np.float32] = probabilities[rows, best]
    probabilities[rows, best] = 0
    lead -= probabilities.max(axis=1)
    return lead
