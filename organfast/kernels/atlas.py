"""How well labelled points agree with an atlas (Numba, cached). Arrays and numbers only."""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def log_likelihood(shares, logs, beyond, points, rows, weights, scale, shift):
    """The sum over points of their weight times the log probability of their row.

    A point is looked up in the nearest voxel of the atlas; what lies beyond the atlas is told by
    ``beyond``. A row that the atlas does not have counts for nothing.

    shares : (n_rows, K, I, J) uint8
    logs : (256,) float32, the log probability of each share
    beyond : (n_rows,) float32
    points : (n, 3) float32, along (k, i, j)
    rows : (n,) int64
    weights : (n,) float32
    scale, shift : (3,) float64; ``scale * point + shift`` is the atlas voxel of a point
    """
    n_rows, n_k, n_i, n_j = shares.shape
    total = 0.0
    for n in range(points.shape[0]):
        row = rows[n]
        if row < 0 or row >= n_rows:
            continue
        k = np.rint(points[n, 0] * scale[0] + shift[0])
        i = np.rint(points[n, 1] * scale[1] + shift[1])
        j = np.rint(points[n, 2] * scale[2] + shift[2])
        if 0 <= k < n_k and 0 <= i < n_i and 0 <= j < n_j:
            total += weights[n] * logs[shares[row, int(k), int(i), int(j)]]
        else:
            total += weights[n] * beyond[row]
    return total
