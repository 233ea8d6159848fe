# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Block probabilities of one slice, enlarged to voxels; the arithmetic is drawn in enlarge.h."""

from libc.stdint cimport int32_t, uint8_t, uint16_t

ctypedef fused label_t:
    uint8_t
    uint16_t

ctypedef fused value_t:
    uint8_t
    float

cdef extern from "enlarge.h" nogil:
    ctypedef struct coarse_slice:
        const float *probabilities
        Py_ssize_t rows, cols, classes
        const int32_t *row_lower
        const int32_t *col_lower
        const float *row_weight
        const float *col_weight
        Py_ssize_t out_rows, out_cols

    ctypedef struct output:
        char *data
        Py_ssize_t row_stride, col_stride
        int itemsize

    Py_ssize_t workspace_floats(Py_ssize_t classes, Py_ssize_t out_cols)
    void enlarge_slice_labels(
        const coarse_slice *s, const output *labels, const output *confidence, float *scratch
    )
    void enlarge_slice_map(const coarse_slice *s, const output *values, float *scratch)
    void weigh(
        const coarse_slice *s, const double *row_at, const double *col_at, double *sums,
        float *extremes,
    )
    void blend(const float *a, const float *b, float weight, float *out, Py_ssize_t n)


def scratch_floats(Py_ssize_t classes, Py_ssize_t out_cols):
    """Length of the scratch that ``enlarge_labels`` needs."""
    return workspace_floats(classes, out_cols)


def enlarge_labels(
    const float[:, :, ::1] probabilities,
    const int32_t[::1] row_lower,
    const float[::1] row_weight,
    const int32_t[::1] col_lower,
    const float[::1] col_weight,
    label_t[:, :] labels,
    value_t[:, :] confidence,
    float[::1] scratch,
):
    """The most probable class of each voxel (ties: the lowest) and its probability.

    probabilities : (rows, cols, classes) float32, finite, within 0..1
    *_lower       : block before each voxel row or column, ascending, below rows or cols
    *_weight      : weight of the block after it, in 0..1; 0 where there is none
    labels        : (out_rows, out_cols) uint8 or uint16, any strides, written
    confidence    : the same shape, float32 or uint8 (round half up of 255 p), any strides,
                    written; an empty array where it is not wanted
    scratch       : float32, ``scratch_floats(classes, out_cols)``
    """
    cdef coarse_slice s
    cdef output to_labels, to_confidence
    if labels.shape[0] == 0 or labels.shape[1] == 0:
        return
    with nogil:
        s.probabilities = &probabilities[0, 0, 0]
        s.rows = probabilities.shape[0]
        s.cols = probabilities.shape[1]
        s.classes = probabilities.shape[2]
        s.row_lower = &row_lower[0]
        s.col_lower = &col_lower[0]
        s.row_weight = &row_weight[0]
        s.col_weight = &col_weight[0]
        s.out_rows = labels.shape[0]
        s.out_cols = labels.shape[1]
        to_labels.data = <char *>&labels[0, 0]
        to_labels.row_stride = labels.strides[0]
        to_labels.col_stride = labels.strides[1]
        to_labels.itemsize = sizeof(label_t)
        to_confidence.data = NULL
        if confidence.shape[0] > 0:
            to_confidence.data = <char *>&confidence[0, 0]
            to_confidence.row_stride = confidence.strides[0]
            to_confidence.col_stride = confidence.strides[1]
            to_confidence.itemsize = sizeof(value_t)
        enlarge_slice_labels(&s, &to_labels, &to_confidence, &scratch[0])


def enlarge_map(
    const float[:, ::1] probabilities,
    const int32_t[::1] row_lower,
    const float[::1] row_weight,
    const int32_t[::1] col_lower,
    const float[::1] col_weight,
    value_t[:, :] values,
    float[::1] scratch,
):
    """One class's probability at each voxel; the same bits as the confidence where it wins.

    probabilities : (rows, cols) float32; ``*_lower`` and ``*_weight`` as above
    values        : (out_rows, out_cols) float32 or uint8 (round half up of 255 p), any strides,
                    written
    scratch       : float32, 2 cols + out_cols
    """
    cdef coarse_slice s
    cdef output to_values
    if values.shape[0] == 0 or values.shape[1] == 0:
        return
    with nogil:
        s.probabilities = &probabilities[0, 0]
        s.rows = probabilities.shape[0]
        s.cols = probabilities.shape[1]
        s.classes = 1
        s.row_lower = &row_lower[0]
        s.col_lower = &col_lower[0]
        s.row_weight = &row_weight[0]
        s.col_weight = &col_weight[0]
        s.out_rows = values.shape[0]
        s.out_cols = values.shape[1]
        to_values.data = <char *>&values[0, 0]
        to_values.row_stride = values.strides[0]
        to_values.col_stride = values.strides[1]
        to_values.itemsize = sizeof(value_t)
        enlarge_slice_map(&s, &to_values, &scratch[0])


def blend_slices(
    const float[::1] before, const float[::1] after, float weight, float[::1] out
):
    """``before + weight * (after - before)`` of two flattened slices, into ``out``."""
    with nogil:
        blend(&before[0], &after[0], weight, &out[0], out.shape[0])


def weigh_slice(
    const float[:, :, ::1] probabilities,
    const double[::1] row_at,
    const double[::1] col_at,
    double[:, ::1] sums,
    float[:, ::1] extremes,
):
    """Sums of p squared over a slice, and of p squared times where it stands; extremes of p.

    probabilities  : (rows, cols, classes) float32, not empty
    row_at, col_at : (rows,), (cols,) float64, coordinates
    sums           : (4, classes) float64, written: p^2, p^2 row_at, p^2 col_at, and scratch
    extremes       : (2, classes) float32, written: least and greatest p
    """
    cdef coarse_slice s
    with nogil:
        s.probabilities = &probabilities[0, 0, 0]
        s.rows = probabilities.shape[0]
        s.cols = probabilities.shape[1]
        s.classes = probabilities.shape[2]
        weigh(&s, &row_at[0], &col_at[0], &sums[0, 0], &extremes[0, 0])
