/* Inner loops of gather.pyx. */
#ifndef ORGANFAST_GATHER_H
#define ORGANFAST_GATHER_H

#include <stddef.h>
#include <stdint.h>

#include "clones.h"

#define GATHER_INLINE static inline __attribute__((always_inline))

typedef struct {
    const char *data;          /* voxel (0, 0, 0) */
    ptrdiff_t slice, row, col; /* strides, bytes */
    ptrdiff_t n_rows, n_cols;
} gather_source;

typedef struct {
    float lo, scale, least, most; /* (hu - lo) * scale, clipped to least .. most */
    float air;
} gather_window;

GATHER_INLINE float gather_value(int16_t hu, gather_window w)
{
    float value = ((float)hu - w.lo) * w.scale;
    value = value < w.least ? w.least : value;
    return value > w.most ? w.most : value;
}

enum { CHUNK = 16 };

/* A block whose voxels, and those up to the next whole chunk to its right, lie inside the slice.
   Rows are written in whole chunks, which become vectors without a remainder loop; what is written
   beyond a row's end is overwritten by the next row. Hence size >= CHUNK - 1, and the last row is
   written to its end only. step: 1 or -1 voxels, a constant. */
GATHER_INLINE void gather_inside(const char *from, ptrdiff_t row, ptrdiff_t step, ptrdiff_t size,
                                 gather_window w, float *out)
{
    for (ptrdiff_t y = 0; y + 1 < size; y++, from += row, out += size)
        for (ptrdiff_t x = 0; x < size; x += CHUNK)
            for (int c = 0; c < CHUNK; c++)
                out[x + c] = gather_value(((const int16_t *)from)[step * (x + c)], w);
    for (ptrdiff_t x = 0; x < size; x++)
        out[x] = gather_value(((const int16_t *)from)[step * x], w);
}

/* Any stride along the row; parts beyond the sides of the slice are air. */
GATHER_INLINE void gather_anywhere(gather_source s, const char *plane, ptrdiff_t top,
                                   ptrdiff_t left, ptrdiff_t size, gather_window w, float *out)
{
    const ptrdiff_t begin = left < 0 ? -left : 0;
    const ptrdiff_t end = left + size > s.n_cols ? s.n_cols - left : size;
    for (ptrdiff_t y = 0; y < size; y++, out += size) {
        if (top + y < 0 || top + y >= s.n_rows) {
            for (ptrdiff_t x = 0; x < size; x++) out[x] = w.air;
            continue;
        }
        const char *from = plane + (top + y) * s.row + left * s.col;
        for (ptrdiff_t x = 0; x < begin; x++) out[x] = w.air;
        for (ptrdiff_t x = begin; x < end; x++)
            out[x] = gather_value(*(const int16_t *)(from + x * s.col), w);
        for (ptrdiff_t x = end; x < size; x++) out[x] = w.air;
    }
}

/* Blocks of size x size around (k, i, j) centres into out (n, size, size). */
CLONES
static void gather_squares(gather_source s, const int32_t *centres, ptrdiff_t n, ptrdiff_t size,
                           gather_window w, float *out)
{
    const ptrdiff_t half = size / 2, width = (size + CHUNK - 1) / CHUNK * CHUNK;
    const ptrdiff_t voxel = sizeof(int16_t);
    for (ptrdiff_t b = 0; b < n; b++, centres += 3, out += size * size) {
        const ptrdiff_t top = centres[1] - half, left = centres[2] - half;
        const char *plane = s.data + centres[0] * s.slice;
        const char *from = plane + top * s.row + left * s.col;
        const int inside = size >= CHUNK - 1 && top >= 0 && top + size <= s.n_rows && left >= 0
                           && left + width <= s.n_cols;
        if (inside && s.col == voxel)
            gather_inside(from, s.row, 1, size, w, out);
        else if (inside && s.col == -voxel)
            gather_inside(from, s.row, -1, size, w, out);
        else
            gather_anywhere(s, plane, top, left, size, w, out);
    }
}

/* out[p, f] = value at starts[p] + reads[f] bytes from data. */
static void gather_reads(const char *data, const int64_t *starts, ptrdiff_t n_starts,
                         const int64_t *reads, ptrdiff_t n_reads, float *out)
{
    for (ptrdiff_t p = 0; p < n_starts; p++, out += n_reads) {
        const char *at = data + starts[p];
        for (ptrdiff_t f = 0; f < n_reads; f++) out[f] = (float)*(const int16_t *)(at + reads[f]);
    }
}

#endif
