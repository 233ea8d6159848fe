/* Inner loops of levels.pyx: one slice of one level at a time. */
#ifndef ORGANFAST_LEVELS_H
#define ORGANFAST_LEVELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "clones.h"

#define LEVELS_INLINE static inline __attribute__((always_inline))

/* table: NULL, or its entry of 0 HU. Values below the floor are the floor. */
LEVELS_INLINE int16_t levels_value(int16_t hu, const int16_t *table, int16_t floor)
{
    if (table) return table[hu];
    return hu < floor ? floor : hu;
}

LEVELS_INLINE void levels_row(const char *from, ptrdiff_t col, ptrdiff_t n, const int16_t *table,
                              int16_t floor, int16_t *out)
{
    const int16_t *voxel = (const int16_t *)from;
    if (col == (ptrdiff_t)sizeof(int16_t))
        for (ptrdiff_t x = 0; x < n; x++) out[x] = levels_value(voxel[x], table, floor);
    else if (col == -(ptrdiff_t)sizeof(int16_t))
        for (ptrdiff_t x = 0; x < n; x++) out[x] = levels_value(voxel[-x], table, floor);
    else
        for (ptrdiff_t x = 0; x < n; x++)
            out[x] = levels_value(*(const int16_t *)(from + x * col), table, floor);
}

/* A slice through the table into out. row, col: strides of hu, bytes; pitch: of out, voxels. */
CLONES
static void levels_plane(const char *hu, ptrdiff_t row, ptrdiff_t col, ptrdiff_t rows,
                         ptrdiff_t cols, const int16_t *table, int16_t floor, int16_t *out,
                         ptrdiff_t pitch)
{
    for (ptrdiff_t y = 0; y < rows; y++, hu += row, out += pitch) {
        if (table)
            levels_row(hu, col, cols, table, floor, out);
        else
            levels_row(hu, col, cols, NULL, floor, out);
    }
}

/* sums (rows, cols) += sign * (plane - air), modulo 2^32 */
CLONES
static void levels_add_plane(uint32_t *sums, const int16_t *plane, ptrdiff_t pitch, ptrdiff_t rows,
                             ptrdiff_t cols, int32_t air, int32_t sign)
{
    for (ptrdiff_t y = 0; y < rows; y++, sums += cols, plane += pitch)
        for (ptrdiff_t x = 0; x < cols; x++)
            sums[x] += (uint32_t)(sign * ((int32_t)plane[x] - air));
}

LEVELS_INLINE void levels_add_row(uint32_t *columns, const uint32_t *sums, ptrdiff_t n, uint32_t sign)
{
    for (ptrdiff_t x = 0; x < n; x++) columns[x] += sign * sums[x];
}

/* Box averages of depth x w x w voxels, at every place where a box touches the slice.
   sums (rows, cols): value - air, 0 or more, summed over the depth of the box.

       sums --running sums down--> columns --sums along--> before[x] = sum of columns < x
       level = air + (before[x + w] - before[x]) / n, rounded half up, n = depth w^2

   out (rows + w - 1, cols + w - 1): box [y - w // 2, y - w // 2 + w) of slice row y is in out's row
   y + (w - 1 - w // 2). All sums are exact: they wrap modulo 2^32 and their differences are below
   65536 n <= 2^32. (s + n / 2) / n is a multiple of 1 / (2 n), so a quarter of 1 / n on top keeps
   the product by a reciprocal on the right side of every integer.
   columns: (cols), before: (cols + 2 w) */
CLONES
static void levels_box(const uint32_t *sums, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t w,
                       ptrdiff_t n_voxels, int16_t air, uint32_t *columns, uint32_t *before,
                       int16_t *out, ptrdiff_t pitch)
{
    const ptrdiff_t width = cols + w - 1;
    const double per_voxel = 1.0 / (double)n_voxels, half = 0.5 + 0.25 / (double)n_voxels;
    memset(columns, 0, cols * sizeof *columns);
    memset(before, 0, (w - 1) * sizeof *before);
    for (ptrdiff_t y = 0; y < rows + w - 1; y++, out += pitch) {
        if (y < rows) levels_add_row(columns, sums + y * cols, cols, 1);
        if (y >= w) levels_add_row(columns, sums + (y - w) * cols, cols, (uint32_t)-1);
        uint32_t total = 0, *sum = before + w - 1;
        for (ptrdiff_t x = 0; x < cols; x++) {
            *sum++ = total;
            total += columns[x];
        }
        for (ptrdiff_t x = 0; x < w; x++) sum[x] = total;
        for (ptrdiff_t x = 0; x < width; x++) {
            const uint32_t box = before[x + w] - before[x];
            out[x] = (int16_t)(air + (int32_t)((double)box * per_voxel + half));
        }
    }
}

#endif
