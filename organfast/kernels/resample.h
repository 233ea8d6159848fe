/* Inner loops of resample.pyx. */
#ifndef ORGANFAST_RESAMPLE_H
#define ORGANFAST_RESAMPLE_H

#include <stddef.h>
#include <stdint.h>

#include "clones.h"

#define RESAMPLE_INLINE static inline __attribute__((always_inline))

/* Weighted sums of neighbouring voxels along one axis: output o is the sum over t < n_taps of
   weights[t, o] * voxel[starts[o] + t], where voxels beyond the ends repeat the end. */
typedef struct {
    const int32_t *starts;
    const float *weights;
    ptrdiff_t n_out, n_taps;
} resample_axis;

RESAMPLE_INLINE ptrdiff_t resample_inside(ptrdiff_t index, ptrdiff_t n)
{
    return index < 0 ? 0 : index >= n ? n - 1 : index;
}

/* table: the entry of 0 HU. */
RESAMPLE_INLINE void resample_read(const char *from, ptrdiff_t col, ptrdiff_t n,
                                   const int16_t *table, float *out)
{
    const int16_t *voxel = (const int16_t *)from;
    if (col == (ptrdiff_t)sizeof(int16_t))
        for (ptrdiff_t x = 0; x < n; x++) out[x] = (float)table[voxel[x]];
    else if (col == -(ptrdiff_t)sizeof(int16_t))
        for (ptrdiff_t x = 0; x < n; x++) out[x] = (float)table[voxel[-x]];
    else
        for (ptrdiff_t x = 0; x < n; x++) out[x] = (float)table[*(const int16_t *)(from + x * col)];
}

/* A slice through the table, then down its rows, then along its columns, into
   out (down.n_out, along.n_out). row, col: strides, bytes.
   values: (rows, cols). line: (lead + cols + tail), a row with its ends repeated, where lead and
   tail are what the taps of `along` reach beyond the ends. */
CLONES
static void resample_slice(const char *hu, ptrdiff_t row, ptrdiff_t col, ptrdiff_t rows,
                           ptrdiff_t cols, const int16_t *table, resample_axis down,
                           resample_axis along, ptrdiff_t lead, ptrdiff_t tail, float *values,
                           float *line, float *out)
{
    float *sums = line + lead;
    for (ptrdiff_t y = 0; y < rows; y++)
        resample_read(hu + y * row, col, cols, table, values + y * cols);
    for (ptrdiff_t o = 0; o < down.n_out; o++, out += along.n_out) {
        for (ptrdiff_t t = 0; t < down.n_taps; t++) {
            const float *from = values + resample_inside(down.starts[o] + t, rows) * cols;
            const float w = down.weights[t * down.n_out + o];
            if (t == 0)
                for (ptrdiff_t x = 0; x < cols; x++) sums[x] = w * from[x];
            else
                for (ptrdiff_t x = 0; x < cols; x++) sums[x] += w * from[x];
        }
        for (ptrdiff_t x = 0; x < lead; x++) line[x] = sums[0];
        for (ptrdiff_t x = 0; x < tail; x++) sums[cols + x] = sums[cols - 1];
        for (ptrdiff_t t = 0; t < along.n_taps; t++) {
            const float *from = sums + t, *w = along.weights + t * along.n_out;
            if (t == 0)
                for (ptrdiff_t p = 0; p < along.n_out; p++) out[p] = w[p] * from[along.starts[p]];
            else
                for (ptrdiff_t p = 0; p < along.n_out; p++) out[p] += w[p] * from[along.starts[p]];
        }
    }
}

/* out = sum over t of weights[pitch t] * ring[slots[t]], slices of n voxels, rounded half up. */
CLONES
static void resample_blend(const float *ring, const int32_t *slots, const float *weights,
                           ptrdiff_t pitch, ptrdiff_t n_taps, ptrdiff_t n, int16_t *out)
{
    enum { RUN = 512 };
    float sums[RUN];
    for (ptrdiff_t begin = 0; begin < n; begin += RUN) {
        const ptrdiff_t run = n - begin < RUN ? n - begin : RUN;
        for (ptrdiff_t t = 0; t < n_taps; t++) {
            const float *from = ring + slots[t] * n + begin;
            const float w = weights[pitch * t];
            if (t == 0)
                for (ptrdiff_t x = 0; x < run; x++) sums[x] = w * from[x];
            else
                for (ptrdiff_t x = 0; x < run; x++) sums[x] += w * from[x];
        }
        for (ptrdiff_t x = 0; x < run; x++) {
            const float up = sums[x] + 0.5f;
            const int32_t whole = (int32_t)up;
            out[begin + x] = (int16_t)(whole - (up < (float)whole));
        }
    }
}

#endif
