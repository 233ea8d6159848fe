# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Separable resampling, one slice at a time; checked by ``organfast.grid``."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, int32_t


cdef extern from "resample.h" nogil:
    ctypedef struct resample_axis:
        const int32_t *starts
        const float *weights
        ptrdiff_t n_out
        ptrdiff_t n_taps

    void resample_slice(const char *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, const int16_t *,
                        resample_axis, resample_axis, ptrdiff_t, ptrdiff_t, float *, float *,
                        float *)
    void resample_blend(const float *, const int32_t *, const float *, ptrdiff_t, ptrdiff_t,
                        ptrdiff_t, int16_t *)


def slice_resampled(
    const int16_t[:, :] hu,
    const int16_t[::1] table,
    tuple down,
    tuple along,
    float[::1] work,
    float[:, ::1] out,
):
    """A slice (R, C) through the table (65536,), then along its two axes, into ``out`` (R', C').

    ``down`` and ``along``: (starts (n_out,) int32, weights (n_taps, n_out) float32), so that
    output o is the sum over t of ``weights[t, o] * voxel[starts[o] + t]``; voxels beyond the ends
    repeat the end; starts ascend. ``work`` (R * C + C + lead + tail), where lead and tail are the
    voxels that ``along`` reads before the first and beyond the last.
    """
    cdef const int32_t[::1] down_starts = down[0], along_starts = along[0]
    cdef const float[:, ::1] down_weights = down[1], along_weights = along[1]
    cdef ptrdiff_t rows = hu.shape[0], cols = hu.shape[1]
    cdef resample_axis down_axis, along_axis
    cdef ptrdiff_t lead, tail
    down_axis.starts, down_axis.weights = &down_starts[0], &down_weights[0, 0]
    down_axis.n_taps, down_axis.n_out = down_weights.shape[0], down_weights.shape[1]
    along_axis.starts, along_axis.weights = &along_starts[0], &along_weights[0, 0]
    along_axis.n_taps, along_axis.n_out = along_weights.shape[0], along_weights.shape[1]
    lead = max(0, -along_starts[0])
    tail = max(0, along_starts[along_axis.n_out - 1] + along_axis.n_taps - cols)
    with nogil:
        resample_slice(<const char *>&hu[0, 0], hu.strides[0], hu.strides[1], rows, cols,
                       &table[32768], down_axis, along_axis, lead, tail, &work[0],
                       &work[rows * cols], &out[0, 0])


def slices_blended(
    const float[:, :, ::1] ring,
    const int32_t[::1] slots,
    const float[:] weights,
    int16_t[:, ::1] out,
):
    """``out`` (R, C) = sum over t of ``weights[t] * ring[slots[t]]``, rounded half up."""
    cdef ptrdiff_t pitch = weights.strides[0] // <ptrdiff_t>sizeof(float)
    with nogil:
        resample_blend(&ring[0, 0, 0], &slots[0], &weights[0], pitch, slots.shape[0],
                       out.shape[0] * out.shape[1], &out[0, 0])
