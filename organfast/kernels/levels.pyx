# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Levels of a slice: table, sums over slices, box averages; checked by ``organfast.levels``."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, uint32_t


cdef extern from "levels.h" nogil:
    void levels_plane(const char *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, const int16_t *,
                      int16_t, int16_t *, ptrdiff_t)
    void levels_add_plane(uint32_t *, const int16_t *, ptrdiff_t, ptrdiff_t, ptrdiff_t, int, int)
    void levels_box(const uint32_t *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, int16_t,
                    uint32_t *, uint32_t *, int16_t *, ptrdiff_t)


cdef inline ptrdiff_t pitch_of(const int16_t[:, :] plane) noexcept nogil:
    return plane.strides[0] // <ptrdiff_t>sizeof(int16_t)


def plane_level(const int16_t[:, :] hu, const int16_t[::1] table, int floor, int16_t[:, :] out):
    """A slice (R, C) through the table (65536,), or None: raised to ``floor``.

    ``out`` (R, C): contiguous rows.
    """
    cdef const int16_t *zero_hu = NULL
    if table is not None:
        zero_hu = &table[32768]
    with nogil:
        levels_plane(<const char *>&hu[0, 0], hu.strides[0], hu.strides[1], hu.shape[0],
                     hu.shape[1], zero_hu, <int16_t>floor, &out[0, 0], pitch_of(out))


def add_plane(uint32_t[:, ::1] sums, const int16_t[:, :] plane, int air, int sign):
    """``sums`` (R, C) += ``sign`` * (``plane`` (R, C) - ``air``). Contiguous rows."""
    with nogil:
        levels_add_plane(&sums[0, 0], &plane[0, 0], pitch_of(plane), plane.shape[0],
                         plane.shape[1], air, sign)


def box_level(
    const uint32_t[:, ::1] sums, int width, int depth, int air, uint32_t[::1] work,
    int16_t[:, :] out,
):
    """Averages over ``depth x width x width`` voxels, air beyond the sides.

    ``sums`` (R, C): (value - air), none below 0, summed over ``depth`` slices; ``out``
    (R + width - 1, C + width - 1): contiguous rows, every box that touches the slice;
    ``work`` (2 C + 2 width).
    """
    cdef ptrdiff_t rows = sums.shape[0], cols = sums.shape[1], w = width
    with nogil:
        levels_box(&sums[0, 0], rows, cols, w, depth * w * w, <int16_t>air, &work[0], &work[cols],
                   &out[0, 0], pitch_of(out))
