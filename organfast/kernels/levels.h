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

LEVELS_INLINE void levels_fill(int16_t *out, ptrdiff_t n, int16_t value)
{
    for (ptrdiff_t x = 0; x < n; x++) out[x] = value;
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

/* A slice through the table into out (rows + 2 pad_rows, cols + 2 pad_cols), air around it.
   row, col: strides, bytes. */
CLONES
static void levels_plane(const char *hu, ptrdiff_t row, ptrdiff_t col, ptrdiff_t rows,
                         ptrdiff_t cols, const int16_t *table, int16_t floor, int16_t air,
                         ptrdiff_t pad_rows, ptrdiff_t pad_cols, int16_t *out)
{
    const ptrdiff_t pitch = cols + 2 * pad_cols;
    levels_fill(out, pad_rows * pitch, air);
    out += pad_rows * pitch;
    for (ptrdiff_t y = 0; y < rows; y++, hu += row, out += pitch) {
        levels_fill(out, pad_cols, air);
        if (table)
            levels_row(hu, col, cols, table, floor, out + pad_cols);
        else
            levels_row(hu, col, cols, NULL, floor, out + pad_cols);
        levels_fill(out + pad_cols + cols, pad_cols, air);
    }
    levels_fill(out, pad_rows * pitch, air);
}

/* sums[x] += or -= plane row - air, modulo 2^32 */
LEVELS_INLINE void levels_add(uint32_t *sums, const int16_t *row, ptrdiff_t n, int32_t air, int sign)
{
    for (ptrdiff_t x = 0; x < n; x++) sums[x] += (uint32_t)(sign * ((int32_t)row[x] - air));
}

/* Box averages, w x w with w <= 127, of a slice of values >= air into
   out (rows + 2 pad_rows, cols + 2 pad_cols).

       plane - air --running sums down--> columns --sums along--> before[x] = sum of columns < x
       level = air + (before[x + w] - before[x]) / w^2, rounded half up

   All sums are exact: they wrap modulo 2^32 and their differences are below 65536 * 127^2 < 2^31.
   (s + 1/2 w^2) / w^2 is a multiple of 1 / (2 w^2), so a quarter of w^-2 on top keeps the product
   by a reciprocal on the right side of every integer.
   columns: (cols), before: (cols + 2 pad_cols + w) */
CLONES
static void levels_box(const int16_t *plane, ptrdiff_t plane_pitch, ptrdiff_t rows, ptrdiff_t cols,
                       int w, int16_t air, ptrdiff_t pad_rows, ptrdiff_t pad_cols,
                       uint32_t *columns, uint32_t *before, int16_t *out)
{
    const ptrdiff_t pitch = cols + 2 * pad_cols, lead = w / 2, lag = w - 1 - w / 2;
    const double per_voxel = 1.0 / (w * w), half = 0.5 + 0.25 / (w * w);
    ptrdiff_t top = 0, bottom = 0; /* rows top .. bottom are in the sums */
    memset(columns, 0, cols * sizeof *columns);
    memset(before, 0, (pad_cols + lead) * sizeof *before);
    for (ptrdiff_t y = -pad_rows; y < rows + pad_rows; y++, out += pitch) {
        for (; bottom < rows && bottom <= y + lag; bottom++)
            levels_add(columns, plane + bottom * plane_pitch, cols, air, 1);
        for (; top < bottom && top < y - lead; top++)
            levels_add(columns, plane + top * plane_pitch, cols, air, -1);
        if (top == bottom) {
            levels_fill(out, pitch, air);
            continue;
        }
        uint32_t total = 0, *sum = before + pad_cols + lead;
        for (ptrdiff_t x = 0; x < cols; x++) {
            *sum++ = total;
            total += columns[x];
        }
        for (ptrdiff_t x = 0; x < pad_cols + w - lead; x++) sum[x] = total;
        for (ptrdiff_t x = 0; x < pitch; x++) {
            const int32_t box = (int32_t)(before[x + w] - before[x]);
            out[x] = (int16_t)(air + (int32_t)((double)box * per_voxel + half));
        }
    }
}

#endif
