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

/* Rows of a block whose voxels, and those up to the next whole chunk to its right, lie inside the
   slice. Rows are written in whole chunks, which become vectors without a remainder loop; what is
   written beyond a row's end is overwritten by the next row. Hence size >= CHUNK - 1, and the last
   row is written to its end only. step: 1 or -1 voxels, a constant. */
GATHER_INLINE void gather_whole(const char *from, ptrdiff_t row, ptrdiff_t step, ptrdiff_t n_rows,
                                ptrdiff_t size, gather_window w, float *out)
{
    for (ptrdiff_t y = 0; y + 1 < n_rows; y++, from += row, out += size)
        for (ptrdiff_t x = 0; x < size; x += CHUNK)
            for (int c = 0; c < CHUNK; c++)
                out[x + c] = gather_value(((const int16_t *)from)[step * (x + c)], w);
    for (ptrdiff_t x = 0; x < size; x++)
        out[x] = gather_value(((const int16_t *)from)[step * x], w);
}

/* Columns begin .. end of n_rows rows of a block, which may stick out to the sides, into air. The
   last chunk of a row overlaps the one before. step: 1 or -1 voxels, a constant, or 0 for any
   stride col. */
GATHER_INLINE void gather_clipped(const char *from, ptrdiff_t row, ptrdiff_t col, ptrdiff_t step,
                                  ptrdiff_t n_rows, ptrdiff_t size, ptrdiff_t begin, ptrdiff_t end,
                                  gather_window w, float *out)
{
    const ptrdiff_t width = end - begin;
    if (width < size)
        for (ptrdiff_t x = 0; x < n_rows * size; x++) out[x] = w.air;
    from += begin * col;
    out += begin;
    for (ptrdiff_t y = 0; y < n_rows; y++, from += row, out += size) {
        const int16_t *voxel = (const int16_t *)from;
        if (step == 0)
            for (ptrdiff_t x = 0; x < width; x++)
                out[x] = gather_value(*(const int16_t *)(from + x * col), w);
        else if (width < CHUNK)
            for (ptrdiff_t x = 0; x < width; x++) out[x] = gather_value(voxel[step * x], w);
        else
            for (ptrdiff_t x = 0; x < width; x += CHUNK) {
                const ptrdiff_t at = x + CHUNK < width ? x : width - CHUNK;
                for (int c = 0; c < CHUNK; c++)
                    out[at + c] = gather_value(voxel[step * (at + c)], w);
            }
    }
}

/* Blocks of size x size around (k, i, j) centres into out (n, size, size). */
CLONES
static void gather_squares(gather_source s, const int64_t *centres, ptrdiff_t n, ptrdiff_t size,
                           gather_window w, float *out)
{
    const ptrdiff_t half = size / 2, in_chunks = (size + CHUNK - 1) / CHUNK * CHUNK;
    const ptrdiff_t voxel = sizeof(int16_t);
    for (ptrdiff_t b = 0; b < n; b++, centres += 3, out += size * size) {
        const ptrdiff_t top = centres[1] - half, left = centres[2] - half;
        const ptrdiff_t first = top < 0 ? -top : 0;
        const ptrdiff_t last = top + size > s.n_rows ? s.n_rows - top : size;
        const ptrdiff_t begin = left < 0 ? -left : 0;
        const ptrdiff_t end = left + size > s.n_cols ? s.n_cols - left : size;
        const char *from =
            s.data + centres[0] * s.slice + (top + first) * s.row + left * s.col;
        const int whole = left >= 0 && left + in_chunks <= s.n_cols && size >= CHUNK - 1;
        float *rows = out + first * size;
        for (ptrdiff_t x = 0; x < first * size; x++) out[x] = w.air;
        for (ptrdiff_t x = last * size; x < size * size; x++) out[x] = w.air;
        if (s.col == voxel && whole)
            gather_whole(from, s.row, 1, last - first, size, w, rows);
        else if (s.col == -voxel && whole)
            gather_whole(from, s.row, -1, last - first, size, w, rows);
        else if (s.col == voxel)
            gather_clipped(from, s.row, s.col, 1, last - first, size, begin, end, w, rows);
        else if (s.col == -voxel)
            gather_clipped(from, s.row, s.col, -1, last - first, size, begin, end, w, rows);
        else
            gather_clipped(from, s.row, s.col, 0, last - first, size, begin, end, w, rows);
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
