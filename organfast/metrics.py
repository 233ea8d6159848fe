"""How well labels agree with the truth: of blocks, of voxels, of places.

The truth comes first in every signature, and rows are truth in every matrix. NaN stands for what is
not scored. Of a class that neither map has, nothing is; of one that only one of them has, overlap
is 0 and no distance is known: it was missed, or is false.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.surfaces import surface_gaps
from organfast.workers import Workers

__all__ = [
    "SCORES",
    "BlockScores",
    "LabelPair",
    "LabelScores",
    "accuracy",
    "block_scores",
    "centroid_error_mm",
    "confidence_histogram",
    "confusion",
    "dice_from_confusion",
    "dice_per_class",
    "label_pair",
    "row_shares",
    "score_labels",
]

Integers = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
Point = Sequence[float] | Floats

# Voxels that are copied at a time where a map does not lie in memory as the kernels read it.
_SLAB = 1 << 20


def confusion(truth: Integers, predicted: Integers, n_classes: int) -> NDArray[np.int64]:
    """Count how often each pair of labels meets, in one pass.

    Parameters
    ----------
    truth : integer array, at most 3-D
        Labels that are right: of blocks or of voxels.
    predicted : integer array, same shape
        Labels to judge. uint8 or uint16 maps, both alike, are read where they lie.
    n_classes : int
        Labels are below this.

    Returns
    -------
    (n_classes, n_classes) int64
        ``counts[t, p]``: how often ``t`` was predicted as ``p``, in label order, as scikit-learn's
        ``confusion_matrix(truth, predicted, labels=range(n_classes))``.

    Raises
    ------
    ValueError
        The arrays differ in shape, are not integer, have more than three axes, or hold a label
        that is negative or not below ``n_classes``.
    """
    from organfast.kernels.overlap import overlap

    counts = np.zeros((n_classes, n_classes), np.int64)
    n_beyond = 0
    for _, part in _slabs(_memory_order(_checked(truth, predicted))):
        n_beyond += overlap(part[0].reshape(-1), part[1].reshape(-1), counts)
    _refuse_beyond(n_beyond, n_classes)
    return counts


def dice_per_class(truth: Integers, predicted: Integers, n_classes: int) -> NDArray[np.float64]:
    """Dice coefficient of every class.

    Parameters
    ----------
    truth, predicted, n_classes
        As for :func:`confusion`.

    Returns
    -------
    (n_classes,) float64
        NaN where a class occurs in neither array (not scored), 0 where it occurs in one.

    Raises
    ------
    ValueError
        As for :func:`confusion`.
    """
    return dice_from_confusion(confusion(truth, predicted, n_classes))


def dice_from_confusion(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Dice coefficient of every class from a confusion matrix.

    Parameters
    ----------
    counts : (n_classes, n_classes) int64
        As :func:`confusion` gives them; sums over patients are allowed.

    Returns
    -------
    (n_classes,) float64
        ``2 |T and P| / (|T| + |P|)``; NaN where both are empty.
    """
    both = counts.sum(axis=0) + counts.sum(axis=1)
    dice = np.full(len(counts), np.nan)
    np.divide(2 * counts.diagonal(), both, out=dice, where=both > 0)
    return dice


def accuracy(counts: NDArray[np.int64]) -> float:
    """Share of labels that are right, from a confusion matrix; NaN when it is empty.

    Parameters
    ----------
    counts : (n_classes, n_classes) int64
        As :func:`confusion` gives them.
    """
    total = int(counts.sum())
    return int(counts.trace()) / total if total else float("nan")


def centroid_error_mm(truth_mm: Point, predicted_mm: Point) -> float:
    """Distance between two centres, mm.

    Parameters
    ----------
    truth_mm, predicted_mm : (3,) float, mm
        Points in one coordinate system.

    Raises
    ------
    ValueError
        A point does not have three finite coordinates.
    """
    points = np.array([truth_mm, predicted_mm], np.float64)
    if points.shape != (2, 3) or not np.isfinite(points).all():
        raise ValueError(
            f"{truth_mm} and {predicted_mm} are not two points; give three finite mm for each"
        )
    return float(np.linalg.norm(points[1] - points[0]))


# --- blocks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockScores:
    """How many blocks are named rightly. What has no block is None.

    Parameters
    ----------
    n_blocks : int
        Blocks judged.
    accuracy : float or None
        Share that is right.
    macro_f1 : float or None
        Mean over the classes of F1, the harmonic mean of precision and recall; classes that are
        neither true nor predicted are left out.
    accuracy_organs : float or None
        Share of right ones among the blocks that are an organ.
    macro_f1_organs : float or None
        Mean F1 over the organs; a context block taken for an organ counts against it.
    """

    n_blocks: int
    accuracy: float | None
    macro_f1: float | None
    accuracy_organs: float | None
    macro_f1_organs: float | None


def block_scores(counts: NDArray[np.int64], organs: Sequence[int]) -> BlockScores:
    """Judge blocks by their confusion matrix.

    Parameters
    ----------
    counts : (n_classes, n_classes) int64
        As :func:`confusion` gives them; sums over patients are allowed.
    organs : sequence of int
        Which of the classes are organs.
    """
    chosen = list(organs)
    f1 = dice_from_confusion(counts)
    n_organs = int(counts[chosen].sum())
    return BlockScores(
        n_blocks=int(counts.sum()),
        accuracy=_known(accuracy(counts)),
        macro_f1=_mean(f1),
        accuracy_organs=int(counts[chosen, chosen].sum()) / n_organs if n_organs else None,
        macro_f1_organs=_mean(f1[chosen]),
    )


def row_shares(counts: NDArray[np.int64]) -> Floats:
    """A confusion matrix with rows that add up to 1: what became of each class.

    Parameters
    ----------
    counts : (n_rows, n_classes) int64
        Rows are truth.

    Returns
    -------
    (n_rows, n_classes) float64
        NaN in the rows of classes that do not occur.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.full(counts.shape, np.nan)
    np.divide(counts, totals, out=shares, where=totals > 0)
    return shares


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _mean(values: Floats) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else None


# --- voxels ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelPair:
    """What one pass over two label maps tells of them.

    Parameters
    ----------
    counts : (n_classes, n_classes) int64
        How often each pair of labels meets; rows are truth.
    sums : (2, n_classes, 3) int64
        Sums of the voxel indices of each label, in truth and in predicted.
    boxes : (2, n_classes, 3, 2) int64
        Half-open bounding boxes; zeros where a label does not occur.
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.int64]
    boxes: NDArray[np.int64]

    @property
    def n_voxels(self) -> NDArray[np.int64]:
        """(2, n_classes) int64: voxels of each label in truth and in predicted."""
        return np.stack([self.counts.sum(axis=1), self.counts.sum(axis=0)])

    @property
    def centroids(self) -> Floats:
        """(2, n_classes, 3) float64: mean voxel indices; NaN where a label does not occur."""
        n = self.n_voxels[..., None]
        found = np.full(self.sums.shape, np.nan)
        np.divide(self.sums, n, out=found, where=n > 0)
        return found


def label_pair(truth: Integers, predicted: Integers, n_classes: int) -> LabelPair:
    """Confusion, centres and boxes of all labels of two maps, in one pass.

    Parameters
    ----------
    truth : (n_a, n_b, n_c) integer
        Labels that are right.
    predicted : (n_a, n_b, n_c) integer
        Labels to judge.
    n_classes : int
        Labels are below this.

    Raises
    ------
    ValueError
        As for :func:`confusion`, or the maps are not 3-D.
    """
    from organfast.kernels.overlap import pair_statistics

    if truth.ndim != 3:
        raise ValueError(f"truth has {truth.ndim} axes; give label maps with three")
    pair = _checked(truth, predicted)
    axes = _along_memory(pair[0])
    counts = np.zeros((n_classes, n_classes), np.int64)
    sums = np.zeros((2, n_classes, 3), np.int64)
    boxes = np.zeros((2, n_classes, 3, 2), np.int64)
    boxes[..., 0] = np.iinfo(np.int64).max
    n_beyond = 0
    for first, part in _slabs(_memory_order(pair)):
        n_beyond += pair_statistics(*part, first, counts, sums, boxes)
    _refuse_beyond(n_beyond, n_classes)
    boxes[boxes[..., 1] == 0] = 0
    back = np.argsort(axes)
    return LabelPair(counts, sums[:, :, back], boxes[:, :, back])


SCORES = (
    "dice",
    "iou",
    "nsd",
    "hd95_mm",
    "surface_mm",
    "volume_error_ml",
    "volume_error_percent",
    "centroid_mm",
    "box_iou",
    "wall_mm",
)
"""Names of the scores of a class; of the first three and ``box_iou`` more is better."""


@dataclass(frozen=True, eq=False)
class LabelScores:
    """How well a label map agrees with the truth, class by class; NaN is not scored.

    Parameters
    ----------
    counts : (n_classes, n_classes) int64
        How often each pair of labels meets; rows are truth.
    truth_ml, predicted_ml : (n_classes,) float64, ml
        Volumes; NaN where the class was not to be scored.
    dice, iou : (n_classes,) float64
        ``2 |T and P| / (|T| + |P|)`` and ``|T and P| / |T or P|``.
    nsd : (n_classes,) float64
        Normalised surface Dice: share of both surfaces that lies no farther than the tolerance
        from the other (Nikolov et al. 2018, arXiv:1809.04430).
    hd95_mm : (n_classes,) float64, mm
        95 % of each surface is no farther from the other.
    surface_mm : (n_classes,) float64, mm
        Mean distance of both surfaces, each piece weighted with its area.
    volume_error_ml : (n_classes,) float64, ml
        Predicted less true.
    volume_error_percent : (n_classes,) float64, %
        The same of the true volume; NaN where that is 0.
    centroid_mm : (n_classes,) float64, mm
        Distance between the centres.
    box_iou : (n_classes,) float64
        Of the bounding boxes along the axes of the scan.
    wall_mm : (n_classes,) float64, mm
        Mean distance of the six walls of the boxes from where they should be.
    """

    counts: NDArray[np.int64]
    truth_ml: Floats
    predicted_ml: Floats
    dice: Floats
    iou: Floats
    nsd: Floats
    hd95_mm: Floats
    surface_mm: Floats
    volume_error_ml: Floats
    volume_error_percent: Floats
    centroid_mm: Floats
    box_iou: Floats
    wall_mm: Floats


def score_labels(
    truth: Integers,
    predicted: Integers,
    affine: Floats,
    classes: tuple[int, Collection[int]],
    tolerance_mm: float = 2.0,
    *,
    threads: int = 1,
) -> LabelScores:
    """Score a label map: everything that a boundary is not needed for from one pass over it.

    Parameters
    ----------
    truth : (n_a, n_b, n_c) integer
        Labels that are right; what is not labelled may have a label of its own that is not scored.
    predicted : (n_a, n_b, n_c) integer
        Labels to judge.
    affine : (4, 4) float64
        Voxel index -> mm.
    classes : (int, collection of int)
        Labels are below the first; those of the second are scored.
    tolerance_mm : float, mm
        For ``nsd``. A distance that exceeds it by no more than rounding does not.
    threads : int
        Threads; the scores do not depend on them.

    Raises
    ------
    ValueError
        As for :func:`label_pair`; a class is not below the first number, or the tolerance is
        negative.
    """
    n_classes, scored = classes[0], sorted(classes[1])
    if scored and not 0 <= scored[0] <= scored[-1] < n_classes:
        raise ValueError(f"classes {scored} are to be scored, but there are only {n_classes}")
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm is {tolerance_mm}; give 0 mm or more")
    pair = label_pair(truth, predicted, n_classes)
    axes = np.asarray(affine, np.float64)[:3, :3]
    is_scored = np.isin(np.arange(n_classes), scored)
    n_true, n_found = np.where(is_scored, pair.n_voxels, 0)
    shared = pair.counts.diagonal()
    ml = abs(float(np.linalg.det(axes))) / 1000
    either, both = n_true + n_found > 0, (n_true > 0) & (n_found > 0)
    steps = np.linalg.norm(axes, axis=0)
    centroids = pair.centroids
    nsd, hd95, surface = _boundary_scores(
        (truth, predicted), pair.boxes, (either, both), steps, tolerance_mm, threads
    )
    walls = np.abs(pair.boxes[0] - pair.boxes[1]) * steps[:, None]
    return LabelScores(
        counts=pair.counts,
        truth_ml=np.where(is_scored, n_true * ml, np.nan),
        predicted_ml=np.where(is_scored, n_found * ml, np.nan),
        dice=_ratio(2 * shared, n_true + n_found, either),
        iou=_ratio(shared, n_true + n_found - shared, either),
        nsd=nsd,
        hd95_mm=hd95,
        surface_mm=surface,
        volume_error_ml=np.where(either, (n_found - n_true) * ml, np.nan),
        volume_error_percent=_ratio(100 * (n_found - n_true), n_true, n_true > 0),
        centroid_mm=np.linalg.norm((centroids[0] - centroids[1]) @ axes.T, axis=1)
        * np.where(both, 1, np.nan),
        box_iou=_box_iou(pair.boxes, either),
        wall_mm=np.where(both, walls.mean(axis=(1, 2)), np.nan),
    )


def confidence_histogram(
    truth: Integers, predicted: Integers, confidence: NDArray[np.uint8], judged: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """How often each confidence was right.

    Parameters
    ----------
    truth : integer array, at most 3-D
        Labels that are right.
    predicted : integer array, same shape
        Labels to judge.
    confidence : uint8 array, same shape
        Probability of the predicted label, 255 = certain.
    judged : (n_classes,) bool
        Voxels count where this is true of their predicted label.

    Returns
    -------
    (2, 256) int64
        By confidence, all voxels and those that are right.

    Raises
    ------
    ValueError
        The arrays are no label maps, or differ in shape.
    """
    from organfast.kernels.overlap import confidence_counts

    pair = _checked(truth, predicted)
    if confidence.shape != truth.shape or confidence.dtype != np.uint8:
        raise ValueError(
            f"confidence of shape {confidence.shape}, {confidence.dtype}, does not fit labels of "
            f"shape {truth.shape}; give a uint8 array of that shape"
        )
    counts = np.zeros((2, 256), np.int64)
    judged = np.ascontiguousarray(judged, bool)
    beside = confidence.reshape((1,) * (3 - confidence.ndim) + confidence.shape)
    axes = _along_memory(pair[0])
    for first, part in _slabs(_memory_order(pair)):
        same = beside.transpose(axes)[first : first + len(part[0])]
        flat = [np.ascontiguousarray(array).reshape(-1) for array in (*part, same)]
        confidence_counts(*flat, judged, counts)
    return counts


def _boundary_scores(
    maps: tuple[Integers, Integers],
    boxes: NDArray[np.int64],
    there: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    steps: Floats,
    tolerance_mm: float,
    threads: int,
) -> tuple[Floats, Floats, Floats]:
    """NSD, 95 % Hausdorff distance and mean distance of the classes that both maps have."""
    either, both = there
    scores = np.full((3, len(both)), np.nan)
    scores[0, either] = 0

    def score(label: int) -> tuple[float, float, float]:
        lows, highs = boxes[:, label, :, 0].min(axis=0), boxes[:, label, :, 1].max(axis=0)
        box = tuple(slice(int(a), int(b)) for a, b in zip(lows, highs, strict=True))
        truth, predicted = (labels[box] == label for labels in maps)
        gaps = surface_gaps(truth, predicted, (steps[0], steps[1], steps[2]))
        return gaps.nsd(tolerance_mm), gaps.hausdorff_mm(95), gaps.mean_mm

    labels = np.flatnonzero(both).tolist()
    with Workers(threads) as workers:
        for label, found in zip(labels, workers.in_order(score, labels), strict=True):
            scores[:, label] = found
    return scores[0], scores[1], scores[2]


def _box_iou(boxes: NDArray[np.int64], either: NDArray[np.bool_]) -> Floats:
    sizes = (boxes[..., 1] - boxes[..., 0]).prod(axis=-1)
    low, high = boxes[..., 0].max(axis=0), boxes[..., 1].min(axis=0)
    shared = np.maximum(high - low, 0).prod(axis=-1)
    return _ratio(shared, sizes.sum(axis=0) - shared, either)


def _ratio(part: NDArray[Any], whole: NDArray[Any], where: NDArray[np.bool_]) -> Floats:
    found = np.full(len(part), np.nan)
    np.divide(part, whole, out=found, where=where)
    return found


# --- memory ---------------------------------------------------------------------------------------


def _checked(truth: Integers, predicted: Integers) -> tuple[Integers, Integers]:
    """A pair of 3-D maps, both uint8 or both uint16; read where they lie if they are that."""
    if truth.shape != predicted.shape or truth.ndim > 3:
        raise ValueError(
            f"truth of shape {truth.shape} and predicted of shape {predicted.shape} are no pair; "
            "give two label arrays of one shape and at most three axes"
        )
    dtype = np.result_type(truth.dtype, predicted.dtype)
    if dtype not in (np.uint8, np.uint16):
        dtype = np.dtype(np.uint16)
    shape = (1,) * (3 - truth.ndim) + truth.shape
    one, other = (
        _as_labels(labels, name, dtype).reshape(shape)
        for labels, name in ((truth, "truth"), (predicted, "predicted"))
    )
    return one, other


def _along_memory(labels: Integers) -> tuple[int, int, int]:
    """Axes with the one last whose voxels lie closest together."""
    a, b, c = np.argsort([-abs(stride) for stride in labels.strides], kind="stable").tolist()
    return a, b, c


def _memory_order(pair: tuple[Integers, Integers]) -> tuple[Integers, Integers]:
    axes = _along_memory(pair[0])
    return pair[0].transpose(axes), pair[1].transpose(axes)


def _slabs(pair: tuple[Integers, Integers]) -> Iterator[tuple[int, tuple[Integers, Integers]]]:
    """The pair as the kernels read it, with its first slice: whole, or copied slab by slab."""
    if not pair[0].size:
        return
    if all(map(_is_ready, pair)):
        yield 0, pair
        return
    n = max(1, _SLAB // pair[0][0].size)
    for first in range(0, len(pair[0]), n):
        parts = (labels[first : first + n] for labels in pair)
        one, other = (part if _is_ready(part) else part.copy(order="C") for part in parts)
        yield first, (one, other)


def _is_ready(labels: Integers) -> bool:
    return labels.flags.c_contiguous and labels.ctypes.data % 8 == 0


def _refuse_beyond(n_beyond: int, n_classes: int) -> None:
    if n_beyond:
        raise ValueError(
            f"{n_beyond} pairs hold a label of {n_classes} or more; n_classes is {n_classes}"
        )


def _as_labels(labels: Integers, name: str, dtype: np.dtype[Any]) -> Integers:
    """The labels as uint8 or uint16; copied only where they are something else."""
    if labels.dtype == dtype:
        return labels
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} is {labels.dtype}; give integer labels")
    if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(dtype).max):
        raise ValueError(
            f"{name} holds labels from {labels.min()} to {labels.max()}; labels begin at 0 and "
            f"end at {np.iinfo(dtype).max}"
        )
    return labels.astype(dtype)
