"""How well labels agree with the truth: confusion, Dice, accuracy, distance of centres.

The truth comes first in every signature, and rows are truth in every matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["accuracy", "centroid_error_mm", "confusion", "dice_from_confusion", "dice_per_class"]

Integers = NDArray[np.integer[Any]]
Point = Sequence[float] | NDArray[np.float64]


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

    if truth.shape != predicted.shape or truth.ndim > 3:
        raise ValueError(
            f"truth of shape {truth.shape} and predicted of shape {predicted.shape} are no pair; "
            "give two label arrays of one shape and at most three axes"
        )
    dtype = np.result_type(truth.dtype, predicted.dtype)
    if dtype not in (np.uint8, np.uint16):
        dtype = np.dtype(np.uint16)
    counts = np.zeros((n_classes, n_classes), np.int64)
    if not truth.size:
        return counts
    pair = [
        _as_labels(labels, name, dtype).reshape((1,) * (3 - labels.ndim) + labels.shape)
        for labels, name in ((truth, "truth"), (predicted, "predicted"))
    ]
    # The axis whose voxels lie closest together comes last.
    along_memory = np.argsort([-abs(stride) for stride in pair[0].strides], kind="stable")
    n_beyond = overlap(*(labels.transpose(along_memory) for labels in pair), counts)
    if n_beyond:
        raise ValueError(
            f"{n_beyond} pairs hold a label of {n_classes} or more; n_classes is {n_classes}"
        )
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


def _as_labels(labels: Integers, name: str, dtype: np.dtype[Any]) -> Integers:
    """The labels as uint8 or uint16; copied only where they are something else."""
    if labels.dtype == dtype:
        return labels
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} is {labels.dtype}; give integer labels")
    if labels.min() < 0 or labels.max() > np.iinfo(dtype).max:
        raise ValueError(
            f"{name} holds labels from {labels.min()} to {labels.max()}; labels begin at 0 and "
            f"end at {np.iinfo(dtype).max}"
        )
    return labels.astype(dtype)
