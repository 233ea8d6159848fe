# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Levels of a slice: table, air around the sides, box averages; checked by ``organfast.grid``."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, uint32_t


cdef extern from "levels.h" nogil:
    void levels_plane(const char *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, const int16_t *,
                      int16_t, int16_t, ptrdiff_t, ptrdiff_t, int16_t *)
    void levels_box(const int16_t *, ptrdiff_t, ptrdiff_t, ptrdiff_t, int, int16_t, ptrdiff_t,
                    ptrdiff_t, uint32_t *, uint32_t *, int16_t *)


def plane_level(
    const int16_t[:, :] hu, const int16_t[::1] table, int floor, int air, int16_t[:, ::1] out
):
    """A slice (R, C) through the table (65536,), or None: raised to ``floor``, with air around it.

    ``out`` (R + 2 pr, C + 2 pc).
    """
    cdef ptrdiff_t pad_rows = (out.shape[0] - hu.shape[0]) // 2
    cdef ptrdiff_t pad_cols = (out.shape[1] - hu.shape[1]) // 2
    cdef const int16_t *zero_hu = NULL
    if table is not None:
        zero_hu = &table[32768]
    with nogil:
        levels_plane(<const char *>&hu[0, 0], hu.strides[0], hu.strides[1], hu.shape[0],
                     hu.shape[1], zero_hu, <int16_t>floor, <int16_t>air, pad_rows, pad_cols,
                     &out[0, 0])


def box_level(const int16_t[:, :] plane, int width, int air, uint32_t[::1] work, int16_t[:, ::1] out):
    """Averages over ``width x width`` voxels of a slice (R, C), read as air beyond its sides.

    ``plane``: contiguous rows, values >= air; ``out`` (R + 2 pr, C + 2 pc);
    ``work`` (C + C + 2 pc + width).
    """
    cdef ptrdiff_t rows = plane.shape[0], cols = plane.shape[1]
    cdef ptrdiff_t pad_rows = (out.shape[0] - rows) // 2, pad_cols = (out.shape[1] - cols) // 2
    with nogil:
        levels_box(&plane[0, 0], plane.strides[0] // <ptrdiff_t>sizeof(int16_t), rows, cols, width,
                   <int16_t>air, pad_rows, pad_cols, &work[0], &work[cols], &out[0, 0])
