# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Copies of blocks and of features, checked by the functions of ``organfast.blocks``."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, int64_t


cdef extern from "gather.h" nogil:
    ctypedef struct gather_source:
        const char *data
        ptrdiff_t slice
        ptrdiff_t row
        ptrdiff_t col
        ptrdiff_t n_rows
        ptrdiff_t n_cols

    ctypedef struct gather_window:
        float lo
        float scale
        float least
        float most
        float air

    void gather_squares(gather_source, const int64_t *, ptrdiff_t, ptrdiff_t, gather_window,
                        float *)
    void gather_reads(const char *, const int64_t *, ptrdiff_t, const int64_t *, ptrdiff_t, float *)


def all_inside(const int64_t[:, ::1] centres, ptrdiff_t n_k, ptrdiff_t n_i, ptrdiff_t n_j):
    """Whether all (k, i, j) of ``centres`` (n, 3) are indices of a volume (n_k, n_i, n_j)."""
    cdef ptrdiff_t n
    cdef bint inside = True
    with nogil:
        for n in range(centres.shape[0]):
            inside &= 0 <= centres[n, 0] < n_k
            inside &= 0 <= centres[n, 1] < n_i
            inside &= 0 <= centres[n, 2] < n_j
    return inside


def gather_blocks(
    const int16_t[:, :, :] hu,
    const int64_t[:, ::1] centres,
    float lo,
    float scale,
    float least,
    float most,
    float[:, :, ::1] out,
):
    """Blocks around (k, i, j) centres: ``clip((max(hu, -1024) - lo) * scale, least, most)``.

    ``hu`` (K, R, C); ``centres`` (n, 3) inside it; ``out`` (n, size, size), size odd. Blocks may
    stick out of the slice and read -1024 there. ``scale`` > 0, ``least`` < ``most``.
    """
    cdef gather_source source
    cdef gather_window window
    if out.shape[0] == 0:
        return
    source.data = <const char *>&hu[0, 0, 0]
    source.slice, source.row, source.col = hu.strides[0], hu.strides[1], hu.strides[2]
    source.n_rows, source.n_cols = hu.shape[1], hu.shape[2]
    window.lo, window.scale, window.most = lo, scale, most
    # The scaling is monotone: no value may come out below that of air.
    window.air = (<float>-1024 - lo) * scale
    window.air = least if window.air < least else most if window.air > most else window.air
    window.least = window.air
    with nogil:
        gather_squares(source, &centres[0, 0], out.shape[0], out.shape[1], window, &out[0, 0, 0])


def gather_features(
    const int16_t[:, :, :, :] slab,
    const int64_t[::1] starts,
    const int64_t[::1] reads,
    float[:, ::1] out,
):
    """``out[p, f]`` = the voxel at ``starts[p] + reads[f]`` bytes from the first of the slab."""
    if out.shape[0] == 0 or out.shape[1] == 0:
        return
    with nogil:
        gather_reads(<const char *>&slab[0, 0, 0, 0], &starts[0], out.shape[0], &reads[0],
                     out.shape[1], &out[0, 0])
