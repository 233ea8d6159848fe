"""From the classifier's probabilities at block positions to a label for every voxel of the scan.

::

    grid slice n   n+1  ...      probability_slabs: (rows, cols, classes) float32 per grid slice
          |         |
          +--blend--+            label_volume: scan slices between n and n + 1 are written as soon
              |                  as both exist, then slab n is dropped
       (rows, cols, classes)
              |
          enlarge + argmax       cell by cell, see kernels/enlarge.h
              |
       labels, confidence        one slice of the scan, in the order the file stores it

Enlargement is linear between block centres (not between the corners of the image, where the seed
put the outermost blocks: an error of half a stride) and constant outside their hull. Along an axis,

    b = clip((g - first_centre) / stride, 0, n_blocks - 1),     g = (voxel - offset) / step

is a voxel's coordinate in blocks, ``floor(b)`` the block before it and the rest the weight of the
block after it. Classes x volume is never held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from organfast.calibration import Calibration
from organfast.grid import BlockGrid, GridVolume, Pattern
from organfast.kernels.enlarge import (
    blend_slices,
    enlarge_labels,
    enlarge_map,
    scratch_floats,
    weigh_slice,
)
from organfast.levels import LevelWindow, levels_slab
from organfast.workers import Workers

__all__ = [
    "AxisWeights",
    "Classifier",
    "Enlargement",
    "Evidence",
    "SliceClassifier",
    "axis_weights",
    "enlarge",
    "label_volume",
    "organ_map",
    "probability_slabs",
]

Labels = NDArray[np.uint8] | NDArray[np.uint16]
Confidence = NDArray[np.uint8] | NDArray[np.float32]
Slab = tuple[int, NDArray[np.float32]]

BACKGROUND = 0
_WINDOW_BYTES = 200 << 20
# Share of a slice's positions from which on it is asked for as a whole, if the classifier can.
_WHOLE_GRID_FROM = 0.05
_MOST = 1.0001  # a softmax may be a little more than one
_NOT_WANTED = np.empty((0, 0), np.uint8)

# --- where voxels lie between blocks --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AxisWeights:
    """The blocks that each voxel along one axis lies between.

    Parameters
    ----------
    lower : (n_out,) int32
        Block at or before the voxel, ascending.
    weight : (n_out,) float32
        Weight of the block after it, 0 <= weight < 1; 0 outside the hull of the blocks.
    centres : (n_blocks,) float64
        Voxel coordinates of the blocks.
    """

    lower: NDArray[np.int32]
    weight: NDArray[np.float32]
    centres: NDArray[np.float64]


def axis_weights(
    n_out: int, first: float, stride: float, n_blocks: int, step: float = 1.0, offset: float = 0.0
) -> AxisWeights:
    """Weights of the blocks along one axis, for every voxel.

    Parameters
    ----------
    n_out : int
        Voxels along the axis.
    first, stride : float
        Centre of the first block and distance between blocks, in voxels of the model grid.
    n_blocks : int
        Blocks along the axis.
    step, offset : float
        Voxel coordinate = offset + step * coordinate on the model grid.

    Raises
    ------
    ValueError
        There is no block, or a stride or step is not positive.

    >>> weights = axis_weights(8, first=1, stride=4, n_blocks=2)
    >>> weights.lower.tolist(), weights.weight.tolist()
    ([0, 0, 0, 0, 0, 1, 1, 1], [0.0, 0.0, 0.25, 0.5, 0.75, 0.0, 0.0, 0.0])
    """
    if n_blocks < 1:
        raise ValueError(f"n_blocks is {n_blocks}; enlarging needs at least one block")
    if not (stride > 0 and step > 0):
        raise ValueError(f"stride {stride} and step {step} must both be above 0")
    on_grid = (np.arange(n_out) - offset) / step
    blocks = np.clip((on_grid - first) / stride, 0, n_blocks - 1)
    lower = np.floor(blocks)
    weight = (blocks - lower).astype(np.float32)
    at_next = weight >= 1  # a block's own voxel, a rounding error before it
    lower[at_next] += 1
    weight[at_next] = 0
    centres = offset + step * (first + stride * np.arange(n_blocks, dtype=np.float64))
    return AxisWeights(lower.astype(np.int32), weight, centres)


@dataclass(frozen=True)
class Enlargement:
    """How a block grid is enlarged to a scan: the weights along each working axis.

    Parameters
    ----------
    k, i, j : AxisWeights
        Slices, rows, columns.
    """

    k: AxisWeights
    i: AxisWeights
    j: AxisWeights

    @staticmethod
    def to_scan(
        block_grid: BlockGrid, grid_volume: GridVolume, shape: tuple[int, int, int]
    ) -> Enlargement:
        """From the positions of a block grid on a model grid to the voxels of the scan.

        Parameters
        ----------
        block_grid : BlockGrid
            Positions on the model grid.
        grid_volume : GridVolume
            Its ``step`` and ``offset`` lead to the scan.
        shape : (n_k, n_i, n_j)
            Voxels of the scan in working order.
        """
        k, i, j = (
            axis_weights(n, int(centres[0]), stride, len(centres), step, offset)
            for n, centres, stride, step, offset in zip(
                shape,
                block_grid.centres,
                block_grid.stride,
                grid_volume.step,
                grid_volume.offset,
                strict=True,
            )
        )
        return Enlargement(k, i, j)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (k, i, j)."""
        return len(self.k.lower), len(self.i.lower), len(self.j.lower)

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Block positions along (k, i, j)."""
        return len(self.k.centres), len(self.i.centres), len(self.j.centres)


def enlarge(
    probabilities: NDArray[np.float32],
    shape: tuple[int, int],
    stride: int | tuple[int, int],
    *,
    first: tuple[int, int] | None = None,
) -> tuple[Labels, NDArray[np.float32]]:
    """Label every pixel of a slice from probabilities at block positions.

    Parameters
    ----------
    probabilities : (rows, cols, classes) float32, 0..1
        One distribution per block. Any memory order; other than C-contiguous costs a copy of it.
    shape : (int, int)
        Rows and columns of the slice.
    stride : int or (int, int)
        Pixels between block centres, along rows and columns.
    first : (int, int), optional
        Row and column of the first block's centre; ``stride // 2`` by default.

    Returns
    -------
    labels : (rows, cols) uint8, or uint16 for more than 256 classes
        The most probable class; of equally probable ones the lowest.
    confidence : (rows, cols) float32
        Its probability: linear between block centres, constant outside their hull.

    Raises
    ------
    ValueError
        The probabilities are not a 3-D float32 array of numbers within 0..1, or the blocks do not
        fit the shape.

    >>> import numpy as np
    >>> two_blocks = np.array([[[1, 0], [0, 1]]], np.float32)
    >>> labels, confidence = enlarge(two_blocks, (1, 8), 4)
    >>> labels.tolist()
    [[0, 0, 0, 0, 0, 1, 1, 1]]
    >>> confidence.tolist()
    [[1.0, 1.0, 1.0, 0.75, 0.5, 0.75, 1.0, 1.0]]
    """
    _check_probabilities(probabilities)
    n_rows, n_cols = _pair("shape", shape)
    strides = _pair("stride", stride)
    firsts = (strides[0] // 2, strides[1] // 2) if first is None else (int(first[0]), int(first[1]))
    for axis, name in enumerate(("rows", "columns")):
        n, size = probabilities.shape[axis], (n_rows, n_cols)[axis]
        last = firsts[axis] + (n - 1) * strides[axis]
        if n > 1 and not 0 <= firsts[axis] <= last < size:
            raise ValueError(
                f"{n} blocks {strides[axis]} apart from {firsts[axis]} on end at {last}, outside "
                f"the {size} {name} of shape; give the stride and first centre of the block grid"
            )
    i = axis_weights(n_rows, firsts[0], strides[0], probabilities.shape[0])
    j = axis_weights(n_cols, firsts[1], strides[1], probabilities.shape[1])
    n_classes = probabilities.shape[2]
    labels = np.empty((n_rows, n_cols), np.uint8 if n_classes <= 256 else np.uint16)
    confidence = np.empty((n_rows, n_cols), np.float32)
    enlarge_labels(
        np.ascontiguousarray(probabilities),
        i.lower,
        i.weight,
        j.lower,
        j.weight,
        labels,
        confidence,
        np.empty(scratch_floats(n_classes, n_cols), np.float32),
    )
    return labels, confidence


def _check_probabilities(probabilities: NDArray[np.float32]) -> None:
    if probabilities.ndim != 3 or probabilities.dtype != np.float32 or 0 in probabilities.shape:
        raise ValueError(
            "probabilities must be a non-empty (rows, cols, classes) float32 array, not "
            f"{probabilities.dtype} of shape {probabilities.shape}"
        )
    if probabilities.shape[2] > 65_536:
        raise ValueError(f"{probabilities.shape[2]} classes do not fit a uint16 label map")
    least, most = float(probabilities.min()), float(probabilities.max())
    if not (least >= 0 and most <= _MOST):
        raise ValueError(f"probabilities run from {least:g} to {most:g}; give numbers within 0..1")


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in pair):
        raise ValueError(f"{name} is {value!r}; give positive integers for rows and columns")
    return int(pair[0]), int(pair[1])


# --- slabs of probabilities -----------------------------------------------------------------------


class Classifier(Protocol):
    """What tells classes from the voxels around a position. Stateless; several threads may ask."""

    @property
    def n_classes(self) -> int:
        """Columns of the probabilities."""

    def probabilities(
        self,
        slab: NDArray[np.int16],
        positions: NDArray[np.int32],
        out: NDArray[np.float32] | NDArray[np.float64],
    ) -> None:
        """Class probabilities at positions of a slab.

        Parameters
        ----------
        slab : (L, K, R, C) int16, HU
            Levels around the positions, from ``levels_slab``.
        positions : (n, 3) int32
            (k, i, j) in the slab, its padding included.
        out : (n, n_classes) float32 or float64
            Receives the probabilities.
        """


class SliceClassifier:
    """A classifier asked about positions of one slice of a block grid after the other.

    Levels are made as it moves along the scan, a run of slices at a time::

        for run in slices.runs():
            for n in run:                    # in any order, from any thread
                slices.ask(n, inside)

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    classifier : Classifier
        Asked from several threads at once.
    pattern : Pattern
        What the classifier reads around a position.
    block_grid : BlockGrid
        Positions on ``grid_volume``.
    workers : Workers
        Threads that make levels.
    calibration : Calibration, optional
        Brings the probabilities to how often they are right.

    Raises
    ------
    ValueError
        The block grid is another volume's.
    """

    def __init__(
        self,
        grid_volume: GridVolume,
        classifier: Classifier,
        pattern: Pattern,
        block_grid: BlockGrid,
        workers: Workers,
        calibration: Calibration | None = None,
    ) -> None:
        if block_grid.volume_shape != grid_volume.shape:
            raise ValueError(
                f"the block grid is for {block_grid.volume_shape} voxels, the volume has "
                f"{grid_volume.shape}; build it from the volume's shape"
            )
        self.shape = block_grid.shape
        self.n_classes = classifier.n_classes
        self._volume, self._pattern, self._classifier = grid_volume, pattern, classifier
        self._workers, self._calibration = workers, calibration
        self._centres_k, centres_i, centres_j = block_grid.centres
        reach_k, reach_i, reach_j = pattern.reach
        self._positions = np.empty((*block_grid.shape[1:], 3), np.int32)
        self._positions[..., 0] = reach_k
        self._positions[..., 1] = (centres_i + reach_i)[:, None]
        self._positions[..., 2] = centres_j + reach_j
        self._window: LevelWindow | None = None
        self._first = (reach_k, int(centres_i[0]) + reach_i, int(centres_j[0]) + reach_j)
        self._stride = block_grid.stride[1:]

    def runs(self) -> Iterator[range]:
        """Runs of slices of the block grid, of even length but the last.

        Yields
        ------
        range
            While it is the last that came, its slices and the one after them may be asked about.
        """
        n_all, reach_k = len(self._centres_k), self._pattern.reach[0]
        if reach_k == 0:  # each slice is made for itself, by who asks
            yield range(n_all)
            return
        stride = int(self._centres_k[1] - self._centres_k[0]) if n_all > 1 else 1
        per_slice = LevelWindow.bytes_per_slice(self._volume, self._pattern)
        room = _WINDOW_BYTES // per_slice - 2 * reach_k
        n_run = 2 * max(1, room // (2 * stride))
        self._window = LevelWindow(self._volume, self._pattern, n_run * stride + 1)
        for first in range(0, n_all, n_run):
            last = min(first + n_run, n_all - 1)
            k0, k1 = int(self._centres_k[first]), int(self._centres_k[last]) + 1
            for _ in self._workers.in_order(self._window.fill, self._window.move(k0, k1)):
                pass
            yield range(first, min(first + n_run, n_all))

    def ask(self, n: int, inside: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Class probabilities at positions of a slice.

        A classifier that has a ``grid_probabilities``, as a network whose neighbouring positions
        share their convolutions, is asked for the whole grid where the positions are many of it.

        Parameters
        ----------
        n : int
            Slice of the block grid.
        inside : (n_i, n_j) bool
            The positions.

        Returns
        -------
        (m, n_classes) float32
            In the order of ``positions[inside]``.
        """
        found = self._answered(n, inside)
        if self._calibration is not None:
            self._calibration.apply(found, found)
        return found

    def _answered(self, n: int, inside: NDArray[np.bool_]) -> NDArray[np.float32]:
        if hasattr(self._classifier, "grid_probabilities") and inside.mean() > _WHOLE_GRID_FROM:
            grid = np.empty((*inside.shape, self.n_classes), np.float32)
            self._classifier.grid_probabilities(self._levels(n), self._first, self._stride, grid)
            return grid[inside]
        visited = self._positions[inside]
        found = np.empty((len(visited), self.n_classes), np.float32)
        if len(visited):
            self._classifier.probabilities(self._levels(n), visited, found)
        return found

    def labels(self, n: int, inside: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """Most probable classes at positions of a slice; of equally probable ones the lowest.

        For a classifier that has a ``labels`` of its own, as a forest: it need not count all trees.
        No calibration is asked: one that keeps the order of the classes changes nothing.

        Parameters
        ----------
        n : int
            Slice of the block grid.
        inside : (n_i, n_j) bool
            The positions.

        Returns
        -------
        (m,) uint16
            In the order of ``positions[inside]``.
        """
        visited = self._positions[inside]
        found = np.empty(len(visited), np.uint16)
        if len(visited):
            forest: Any = self._classifier  # the protocol asks for probabilities only
            forest.labels(self._levels(n), visited, found)
        return found

    def _levels(self, n: int) -> NDArray[np.int16]:
        k = int(self._centres_k[n])
        if self._window is None:
            return levels_slab(self._volume, self._pattern, k, k + 1)
        return self._window.slab(k, k + 1)


def probability_slabs(
    slices: SliceClassifier, body_mask: NDArray[np.bool_] | None, workers: Workers
) -> Iterator[Slab]:
    """Probabilities at the positions of a block grid, slice after slice.

    Parameters
    ----------
    slices : SliceClassifier
        What is asked.
    body_mask : (n_k, n_i, n_j) bool or None
        Positions to visit; the others are background with probability 1. None visits all.
    workers : Workers
        Threads that compute; a few slabs are alive at a time.

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
    if body_mask is not None and (body_mask.shape != slices.shape or body_mask.dtype != np.bool_):
        raise ValueError(
            f"body_mask is {body_mask.dtype} of shape {body_mask.shape}; give bool of the block "
            f"grid's shape {slices.shape}"
        )

    def slab_of(n: int) -> Slab:
        inside = np.ones(slices.shape[1:], bool) if body_mask is None else body_mask[n]
        probabilities = np.zeros((*inside.shape, slices.n_classes), np.float32)
        probabilities[..., BACKGROUND] = 1
        if inside.any():
            probabilities[inside] = slices.ask(n, inside)
        return n, probabilities

    return chain.from_iterable(workers.in_order(slab_of, run) for run in slices.runs())


# --- voxels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the probabilities say of each class as a whole, before any voxel is labelled.

    Parameters
    ----------
    weight : (n_classes,) float64
        Sum of p squared over the block positions.
    position : (n_classes, 3) float64
        Mean (k, i, j) of the block positions weighted by p squared (the seed's way to locate an
        organ), in voxels of the scan in working order; NaN where the weight is 0.
    peak : (n_classes,) float32
        Greatest probability.
    maps : dict of int to (n_k, n_i, n_j) float32
        Probabilities at the block positions, for the classes that were to be kept.
    """

    weight: NDArray[np.float64]
    position: NDArray[np.float64]
    peak: NDArray[np.float32]
    maps: dict[int, NDArray[np.float32]]


def label_volume(
    slabs: Iterable[Slab],
    enlargement: Enlargement,
    labels: Labels,
    workers: Workers,
    *,
    confidence: Confidence | None = None,
    keep: Sequence[int] = (),
) -> Evidence:
    """Write the label of every voxel of a scan.

    Parameters
    ----------
    slabs : iterable of (int, (n_i, n_j, classes) float32)
        Every slice of the block grid in order, from :func:`probability_slabs`; each is dropped as
        soon as the voxels that need it are written.
    enlargement : Enlargement
        From the block grid to the scan.
    labels : (n_k, n_i, n_j) uint8 or uint16
        Written. In working order but of any strides: the working view of an array in the order
        of the file. Cheapest where a slice lies together in memory, as in NIfTI files.
    workers : Workers
        Threads that enlarge, one slice each; they may be those that compute the slabs.
    confidence : (n_k, n_i, n_j) uint8 or float32, optional
        Written: probability of the label, as uint8 ``floor(255 p + 1/2)``. Any strides.
    keep : sequence of int
        Classes whose probabilities at the block positions are wanted, for :func:`organ_map`.

    Returns
    -------
    Evidence
        Identical for any number of threads, as are the written arrays.

    Raises
    ------
    ValueError
        An array does not fit the enlargement, a slab is missing, or the classifier gave something
        other than probabilities.
    """
    _check_output("labels", labels, enlargement, (np.uint8, np.uint16))
    if confidence is not None:
        _check_output("confidence", confidence, enlargement, (np.uint8, np.float32))
    n_blocks = enlargement.blocks[0]
    maps = {c: np.empty(enlargement.blocks, np.float32) for c in keep}
    ready = enlargement.k.lower + (enlargement.k.weight > 0)  # the slab that a slice waits for
    write = partial(_write_slice, enlargement, labels, confidence)
    writing: deque[Future[None]] = deque()
    weighing: list[Future[_Weighed]] = []
    before: NDArray[np.float32] | None = None
    for due, (n, slab) in enumerate(slabs):
        if n != due or n >= n_blocks:
            raise ValueError(f"slab {n} came where slab {due} of {n_blocks} was due")
        _check_slab(slab, enlargement, labels, keep)
        weighing.append(workers.submit(_weigh, enlargement, slab))
        for c, kept in maps.items():
            kept[n] = slab[..., c]
        first, end = np.searchsorted(ready, (n, n + 1))
        for k in range(int(first), int(end)):
            writing.append(workers.submit(write, k, before, slab))
        while len(writing) > workers.window:
            writing.popleft().result()
        before = slab
    if len(weighing) != n_blocks:
        raise ValueError(f"{len(weighing)} slabs came, {n_blocks} were due")
    for future in writing:
        future.result()
    return _evidence([future.result() for future in weighing], enlargement, maps)


def organ_map(
    coarse: NDArray[np.float32],
    enlargement: Enlargement,
    out: NDArray[np.uint8],
    workers: Workers,
) -> None:
    """Write one class's probability at every voxel of a scan.

    Parameters
    ----------
    coarse : (n_k, n_i, n_j) float32, 0..1
        Its probabilities at the block positions, from ``Evidence.maps``.
    enlargement : Enlargement
        From the block grid to the scan.
    out : (n_k, n_i, n_j) uint8
        Written: ``floor(255 p + 1/2)``. In working order but of any strides.
    workers : Workers
        Threads, one slice each.

    Raises
    ------
    ValueError
        An array does not fit the enlargement.
    """
    _check_output("out", out, enlargement, (np.uint8,))
    if coarse.shape != enlargement.blocks or coarse.dtype != np.float32:
        raise ValueError(
            f"coarse is {coarse.dtype} of shape {coarse.shape}; give float32 of the block grid's "
            f"shape {enlargement.blocks}"
        )
    coarse = np.ascontiguousarray(coarse)
    k, i, j = enlargement.k, enlargement.i, enlargement.j

    def write(slice_k: int) -> None:
        n, weight = int(k.lower[slice_k]), float(k.weight[slice_k])
        plane = _blended(coarse[n], coarse[n + 1], weight) if weight else coarse[n]
        scratch = np.empty(2 * plane.shape[1] + out.shape[2], np.float32)
        enlarge_map(plane, i.lower, i.weight, j.lower, j.weight, out[slice_k], scratch)

    for _ in workers.in_order(write, range(len(out))):
        pass


def _write_slice(
    enlargement: Enlargement,
    labels: Labels,
    confidence: Confidence | None,
    k: int,
    before: NDArray[np.float32] | None,
    after: NDArray[np.float32],
) -> None:
    """Labels of scan slice k, which lies at slab ``after`` or between the two slabs."""
    weight = float(enlargement.k.weight[k])
    slab = after if before is None or not weight else _blended(before, after, weight)
    i, j = enlargement.i, enlargement.j
    enlarge_labels(
        slab,
        i.lower,
        i.weight,
        j.lower,
        j.weight,
        labels[k],
        _NOT_WANTED if confidence is None else confidence[k],
        np.empty(scratch_floats(slab.shape[2], labels.shape[2]), np.float32),
    )


def _blended(
    before: NDArray[np.float32], after: NDArray[np.float32], weight: float
) -> NDArray[np.float32]:
    out = np.empty_like(after)
    blend_slices(before.reshape(-1), after.reshape(-1), weight, out.reshape(-1))
    return out


_Weighed = tuple[NDArray[np.float64], NDArray[np.float32]]


def _weigh(enlargement: Enlargement, slab: NDArray[np.float32]) -> _Weighed:
    n_classes = slab.shape[2]
    sums, extremes = np.empty((4, n_classes)), np.empty((2, n_classes), np.float32)
    weigh_slice(slab, enlargement.i.centres, enlargement.j.centres, sums, extremes)
    return sums, extremes


def _evidence(
    weighed: Sequence[_Weighed], enlargement: Enlargement, maps: dict[int, NDArray[np.float32]]
) -> Evidence:
    """Slab after slab, so that the sums are the same for any number of threads."""
    sums = np.stack([s for s, _ in weighed])
    extremes = np.stack([e for _, e in weighed])
    if not (np.isfinite(sums[:, 0]).all() and extremes.min() >= 0 and extremes.max() <= _MOST):
        raise ValueError(
            f"the classifier's probabilities run from {extremes.min():g} to {extremes.max():g}; "
            "they must be numbers within 0..1"
        )
    weight = np.zeros(sums.shape[2])
    moment = np.zeros((sums.shape[2], 3))
    for at_k, (in_slab, by_i, by_j, _) in zip(enlargement.k.centres, sums, strict=True):
        weight += in_slab
        moment += np.stack([at_k * in_slab, by_i, by_j], axis=1)
    position = np.full_like(moment, np.nan)
    np.divide(moment, weight[:, None], out=position, where=weight[:, None] > 0)
    return Evidence(weight, position, extremes[:, 1].max(axis=0), maps)


def _check_output(
    name: str, array: NDArray[Any], enlargement: Enlargement, dtypes: tuple[type, ...]
) -> None:
    if array.shape != enlargement.shape or array.dtype not in dtypes:
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; give {wanted} of the scan's working "
            f"shape {enlargement.shape}"
        )
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only; give an array that can be written")


def _check_slab(
    slab: NDArray[np.float32], enlargement: Enlargement, labels: Labels, keep: Sequence[int]
) -> None:
    if slab.dtype != np.float32 or slab.ndim != 3 or slab.shape[:2] != enlargement.blocks[1:]:
        raise ValueError(
            f"a slab is {slab.dtype} of shape {slab.shape}; give float32 (rows, cols, classes) "
            f"with {enlargement.blocks[1:]} positions"
        )
    if not slab.flags.c_contiguous:
        raise ValueError("a slab is not C-contiguous; give np.ascontiguousarray of it")
    n_classes = slab.shape[2]
    if n_classes > 2 ** (8 * labels.itemsize):
        raise ValueError(f"{n_classes} classes do not fit {labels.dtype} labels; use uint16")
    if not all(0 <= c < n_classes for c in keep):
        raise ValueError(f"keep is {list(keep)}; classes run from 0 to {n_classes - 1}")
