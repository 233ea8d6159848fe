"""How well labelled points agree with an atlas (Numba, cached). Arrays and numbers only."""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def agreement(logs, beyond, points, labels, weights, scale, shift):
    """The sum over points of their weight times the log probability of their label.

    A point is looked up in the nearest voxel of the atlas; what lies beyond the atlas is told by
    ``beyond``. A label that is no row of the table counts for nothing.

    logs : (K, I, J, n_labels) float32
    beyond : (n_labels,) float32
    points : (n, 3) float32, along (k, i, j)
    labels : (n,) int64
    weights : (n,) float32
    scale, shift : (3,) float64; ``scale * point + shift`` is the atlas voxel of a point
    """
    n_k, n_i, n_j, n_labels = logs.shape
    total = 0.0
    for n in range(points.shape[0]):
        label = labels[n]
        if label < 0 or label >= n_labels:
            continue
        k = np.rint(points[n, 0] * scale[0] + shift[0])
        i = np.rint(points[n, 1] * scale[1] + shift[1])
        j = np.rint(points[n, 2] * scale[2] + shift[2])
        if 0 <= k < n_k and 0 <= i < n_i and 0 <= j < n_j:
            total += weights[n] * logs[int(k), int(i), int(j), label]
        else:
            total += weights[n] * beyond[label]
    return total
