# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics of a label map, and labels cleared from it, run by run in one pass."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.string cimport memset

ctypedef fused label_t:
    uint8_t
    uint16_t


cdef extern from "runs.h" nogil:
    ptrdiff_t runs_stop(const char *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t)

cdef extern from "label_statistics.h" nogil:
    int64_t statistics_sum(const uint8_t *, ptrdiff_t)


cdef enum:
    MANY = 16  # voxels; fewer are summed before wide vectors are set up


def label_statistics(
    const label_t[:, :, :] labels,
    const uint8_t[:, :, :] confidence,
    int64_t[::1] counts,
    int64_t[:, ::1] sums,
    int64_t[:, :, ::1] boxes,
    int64_t[::1] confidence_sums,
    int64_t[::1] n_runs,
):
    """Count, sum and bound the voxels of each label, run by run along the last axis.

    labels          : (n_0, n_1, n_2) uint8 or uint16, any strides
    confidence      : same shape, uint8, any strides, or None
    counts          : (n_classes,) int64, added to
    sums            : (n_classes, 3) int64, sums of the three indices, added to
    boxes           : (n_classes, 3, 2) int64, half-open, widened; start at (large, 0)
    confidence_sums : (n_classes,) int64, added to where confidence is given
    n_runs          : (n_0,) int64, runs of each plane, added to
    returns the number of voxels whose label is beyond n_classes; these are left out
    """
    cdef Py_ssize_t n_0 = labels.shape[0], n_1 = labels.shape[1], n_2 = labels.shape[2]
    cdef Py_ssize_t n_classes = counts.shape[0]
    cdef Py_ssize_t a, b, c, start, label, length, n_beyond = 0
    cdef int64_t total
    cdef bint confident = confidence is not None
    cdef bint packed = confident and confidence.strides[2] == 1
    with nogil:
        for a in range(n_0):
            for b in range(n_1):
                c = 0
                while c < n_2:
                    start = c
                    label = labels[a, b, c]
                    c = runs_stop(
                        <const char *>&labels[a, b, 0], labels.strides[2], sizeof(label_t), c, n_2
                    )
                    length = c - start
                    n_runs[a] += 1
                    if label >= n_classes:
                        n_beyond += length
                        continue
                    counts[label] += length
                    sums[label, 0] += a * length
                    sums[label, 1] += b * length
                    sums[label, 2] += (start + c - 1) * length // 2
                    boxes[label, 0, 0] = min(boxes[label, 0, 0], a)
                    boxes[label, 0, 1] = max(boxes[label, 0, 1], a + 1)
                    boxes[label, 1, 0] = min(boxes[label, 1, 0], b)
                    boxes[label, 1, 1] = max(boxes[label, 1, 1], b + 1)
                    boxes[label, 2, 0] = min(boxes[label, 2, 0], start)
                    boxes[label, 2, 1] = max(boxes[label, 2, 1], c)
                    if packed and length >= MANY:
                        confidence_sums[label] += statistics_sum(&confidence[a, b, start], length)
                    elif confident:
                        total = 0
                        for start in range(start, c):
                            total += confidence[a, b, start]
                        confidence_sums[label] += total
    return n_beyond


def clear_labels(label_t[:, :, :] labels, const uint8_t[::1] kept):
    """Set to 0 every voxel whose label n has ``kept[n] == 0``.

    labels : (n_0, n_1, n_2) uint8 or uint16, any strides, written
    kept   : an entry for every value of that type
    """
    cdef Py_ssize_t n_0 = labels.shape[0], n_1 = labels.shape[1], n_2 = labels.shape[2]
    cdef Py_ssize_t a, b, c, start
    cdef bint packed = labels.strides[2] == sizeof(label_t)
    with nogil:
        for a in range(n_0):
            for b in range(n_1):
                c = 0
                while c < n_2:
                    start = c
                    c = runs_stop(
                        <const char *>&labels[a, b, 0], labels.strides[2], sizeof(label_t), c, n_2
                    )
                    if kept[labels[a, b, start]]:
                        continue
                    if packed:
                        memset(&labels[a, b, start], 0, (c - start) * sizeof(label_t))
                    else:
                        for start in range(start, c):
                            labels[a, b, start] = 0
