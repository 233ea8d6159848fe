"""Overlap of two label maps: how often each pair of labels meets. Compiled by Numba, cached."""

import numpy as np
from numba import njit, types

_ARGUMENTS = [
    (types.Array(label, 3, "A", readonly=True),) * 2 + (types.Array(types.int64, 2, "C"),)
    for label in (types.uint8, types.uint16)
]


@njit([types.int64(*arguments) for arguments in _ARGUMENTS], cache=True, nogil=True)
def overlap(truth, predicted, counts):  # type: ignore[no-untyped-def]  # compiled
    """Count the pairs of labels, run by run along the last axis.

    truth, predicted : (n_0, n_1, n_2) uint8 or uint16, both alike, any strides
    counts           : (n_classes, n_classes) int64, rows are truth; added to
    returns the number of voxels with a label beyond n_classes; these are left out
    """
    n_classes = counts.shape[0]
    n_beyond = 0
    for a in range(truth.shape[0]):
        for b in range(truth.shape[1]):
            truth_row = truth[a, b]
            predicted_row = predicted[a, b]
            start = 0
            while start < truth_row.size:
                t = truth_row[start]
                p = predicted_row[start]
                stop = start + 1
                while stop < truth_row.size and truth_row[stop] == t and predicted_row[stop] == p:
                    stop += 1
                if np.int64(t) < n_classes and np.int64(p) < n_classes:
                    counts[t, p] += stop - start
                else:
                    n_beyond += stop - start
                start = stop
    return n_beyond
