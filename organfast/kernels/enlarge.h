/* Inner loops of enlarge.pyx: block probabilities of one slice to voxels, fused with the choice of
   the label.

   Voxels between the same four block positions form a cell. Within it each class is a bilinear
   blend of its four corner values, in float32 and in this order, without fused multiply-adds, so
   that every machine gives the same bits:

       p00 ------ p01        left  = p00 + row_weight * (p10 - p00)
        |    v     |         right = p01 + row_weight * (p11 - p01)
       p10 ------ p11        v     = left + col_weight * (right - left)

   Before that, the classes that can win nowhere in the cell are left out of it. */
#ifndef ORGANFAST_ENLARGE_H
#define ORGANFAST_ENLARGE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "clones.h"

#define INLINE static inline __attribute__((always_inline)) /* into each clone */

enum {
    LANES = 8, /* columns, rows or classes computed together */
    BAND = 16, /* most output rows computed together: they stay in the first-level cache */
};

/* Six roundings of at most 2^-25 each move a blend of values in 0..1 by less than 2e-7: a class
   that lies this far below another neither wins nor ties. */
#define MARGIN 2e-6f

/* Every function that passes vectors is inlined, so that how they would be passed is no matter. */
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

typedef struct {
    const float *probabilities; /* (rows, cols, classes), C-contiguous */
    ptrdiff_t rows, cols, classes;
    const int32_t *row_lower, *col_lower; /* block before each output row and column */
    const float *row_weight, *col_weight; /* weight of the block after it */
    ptrdiff_t out_rows, out_cols;
} coarse_slice;

typedef struct {
    char *data; /* NULL: not wanted */
    ptrdiff_t row_stride, col_stride; /* bytes, any sign */
    int itemsize;
} output;

/* Everything the kernel needs beside its arguments, carved out of the caller's scratch. */
typedef struct {
    ptrdiff_t pitch;        /* out_cols and what whole vectors store past them */
    float *col_weight;      /* (pitch,) */
    float *most;            /* (classes,) greatest corner value of each class */
    float *corners[4];      /* (classes + LANES,) each, of the candidates */
    float *left, *step;     /* (classes, BAND): at the left side, and from there to the right */
    float *best;            /* (BAND, pitch) */
    int32_t *candidates;    /* (classes + LANES,) */
    int32_t *beaten;        /* (classes + LANES,) */
    uint16_t *labels;       /* (BAND, pitch) */
} workspace;

static ptrdiff_t carve(workspace *w, float *scratch, ptrdiff_t classes, ptrdiff_t out_cols)
{
    ptrdiff_t pitch = (out_cols + 2 * LANES - 1) / LANES * LANES, whole = classes + LANES;
    float *next = scratch;
    w->pitch = pitch;
    w->col_weight = next, next += pitch;
    w->most = next, next += classes;
    for (int corner = 0; corner < 4; corner++)
        w->corners[corner] = next, next += whole;
    w->left = next, next += classes * BAND;
    w->step = next, next += classes * BAND;
    w->best = next, next += BAND * pitch;
    w->candidates = (int32_t *)next, next += whole;
    w->beaten = (int32_t *)next, next += whole;
    w->labels = (uint16_t *)next, next += BAND * pitch / 2;
    return next - scratch;
}

static ptrdiff_t workspace_floats(ptrdiff_t classes, ptrdiff_t out_cols)
{
    workspace w;
    return carve(&w, NULL, classes, out_cols);
}

INLINE float lesser(float a, float b) { return a < b ? a : b; }
INLINE float greater(float a, float b) { return a > b ? a : b; }
INLINE floats pick(ints mask, floats a, floats b)
{
    return (floats)(((ints)a & mask) | ((ints)b & ~mask));
}
INLINE floats load(const float *from) { return *(const floats *)from; }

/* Greatest corner value of each class, and the greatest of the least corner values: the class that
   has it is at least that everywhere in the cell. */
INLINE float corner_bounds(const float *const p[4], ptrdiff_t classes, float *most)
{
    float bound = 0;
    if (classes < LANES) {
        for (ptrdiff_t c = 0; c < classes; c++) {
            bound = greater(bound, lesser(lesser(p[0][c], p[1][c]), lesser(p[2][c], p[3][c])));
            most[c] = greater(greater(p[0][c], p[1][c]), greater(p[2][c], p[3][c]));
        }
        return bound;
    }
    floats bounds = {0};
    for (ptrdiff_t start = 0; start < classes; start += LANES) {
        ptrdiff_t c = start + LANES <= classes ? start : classes - LANES;
        floats a = load(p[0] + c), b = load(p[1] + c), d = load(p[2] + c), e = load(p[3] + c);
        floats least = pick(a < b, a, b), least_below = pick(d < e, d, e);
        least = pick(least < least_below, least, least_below);
        bounds = pick(bounds > least, bounds, least);
        floats greatest = pick(a > b, a, b), greatest_below = pick(d > e, d, e);
        *(floats *)(most + c) = pick(greatest > greatest_below, greatest, greatest_below);
    }
    for (int lane = 0; lane < LANES; lane++)
        bound = greater(bound, bounds[lane]);
    return bound;
}

/* At every voxel the winner is at least the mean of any set of classes, and the mean of a set is
   a blend of its corner means. The set here: the winners of the corners. */
INLINE float mean_of_corner_winners(const float *const p[4], int n, const int32_t *candidates)
{
    int32_t winners[4];
    int n_winners = 0;
    for (int corner = 0; corner < 4; corner++) {
        int32_t winner = candidates[0], known = 0;
        float value = p[corner][winner];
        for (int c = 1; c < n; c++) {
            float other = p[corner][candidates[c]];
            winner = other > value ? candidates[c] : winner;
            value = greater(other, value);
        }
        for (int other = 0; other < n_winners; other++)
            known |= winners[other] == winner;
        winners[n_winners] = winner;
        n_winners += !known;
    }
    float bound = 4;
    for (int corner = 0; corner < 4; corner++) {
        float sum = 0;
        for (int w = 0; w < n_winners; w++)
            sum += p[corner][winners[w]];
        bound = lesser(bound, sum);
    }
    return bound / (float)n_winners;
}

/* Drop each candidate that one other beats at all four corners. */
INLINE int drop_beaten(int n, const workspace *w)
{
    float *const *q = w->corners;
    for (int c = 0; c < n; c += LANES) {
        floats a = load(q[0] + c) + MARGIN, b = load(q[1] + c) + MARGIN;
        floats d = load(q[2] + c) + MARGIN, e = load(q[3] + c) + MARGIN;
        ints beaten = {0};
        for (int i = 0; i < n; i++)
            beaten |= (q[0][i] >= a) & (q[1][i] >= b) & (q[2][i] >= d) & (q[3][i] >= e);
        *(ints *)(w->beaten + c) = beaten;
    }
    int kept = 0;
    for (int c = 0; c < n; c++) {
        w->candidates[kept] = w->candidates[c];
        for (int corner = 0; corner < 4; corner++)
            q[corner][kept] = q[corner][c];
        kept += !w->beaten[c];
    }
    return kept;
}

/* The classes that can win somewhere in a cell, ascending, and their corner values. */
INLINE int find_candidates(const float *const p[4], ptrdiff_t classes, const workspace *w)
{
    float bound = corner_bounds(p, classes, w->most);
    int n = 0;
    for (ptrdiff_t c = 0; c < classes; c++) { /* no branch: which stay is not predictable */
        w->candidates[n] = (int32_t)c;
        n += !(w->most[c] + MARGIN <= bound);
    }
    if (n > 2) {
        int before = n;
        bound = mean_of_corner_winners(p, n, w->candidates);
        n = 0;
        for (int c = 0; c < before; c++) {
            w->candidates[n] = w->candidates[c];
            n += !(w->most[w->candidates[c]] + MARGIN <= bound);
        }
    }
    for (int c = 0; c < n; c++)
        for (int corner = 0; corner < 4; corner++)
            w->corners[corner][c] = p[corner][w->candidates[c]];
    return n > 2 ? drop_beaten(n, w) : n;
}

/* Best value and label of the voxels of one cell: n_rows rows times columns [start, stop).
   Whole vectors are stored; what lies past the cell is overwritten by the next one. */
INLINE void fill_cell(const workspace *w, int n, const float *row_weight, int n_rows,
                      ptrdiff_t start, ptrdiff_t stop)
{
    for (int c = 0; c < n; c++) {
        float p00 = w->corners[0][c], p01 = w->corners[1][c];
        float p10 = w->corners[2][c], p11 = w->corners[3][c];
        for (int row = 0; row < n_rows; row += LANES) {
            floats left = p00 + load(row_weight + row) * (p10 - p00);
            floats right = p01 + load(row_weight + row) * (p11 - p01);
            *(floats *)(w->left + c * BAND + row) = left;
            *(floats *)(w->step + c * BAND + row) = right - left;
        }
    }
    for (int row = 0; row < n_rows; row++)
        for (ptrdiff_t x = start; x < stop; x += LANES) {
            const float *left = w->left + row, *step = w->step + row;
            floats weight = load(w->col_weight + x);
            floats best = left[0] + weight * step[0];
            ints label = w->candidates[0] + (ints){0};
            for (int c = 1; c < n; c++) {
                floats v = left[c * BAND] + weight * step[c * BAND];
                ints wins = v > best; /* a tie leaves the lower class */
                best = pick(wins, v, best);
                label = (w->candidates[c] & wins) | (label & ~wins);
            }
            *(floats *)(w->best + row * w->pitch + x) = best;
            *(shorts *)(w->labels + row * w->pitch + x) = __builtin_convertvector(label, shorts);
        }
}

/* Copy a band to the output, along whichever of its axes lies closer together in memory. The steps
   are constants where a whole row is contiguous, forwards or (left-right flipped scans) backwards,
   so that these become vectors. */
#define STORE(name, source_t, out_t, expression)                                                   \
    INLINE void name##_line(const source_t *restrict from, ptrdiff_t from_step, ptrdiff_t n,       \
                            char *restrict to, ptrdiff_t to_step)                                  \
    {                                                                                              \
        for (ptrdiff_t i = 0; i < n; i++) {                                                        \
            source_t value = from[i * from_step];                                                  \
            *(out_t *)(to + i * to_step) = (out_t)(expression);                                    \
        }                                                                                          \
    }                                                                                              \
    INLINE void name(const source_t *band, ptrdiff_t pitch, ptrdiff_t n_rows, ptrdiff_t n_cols,    \
                     const output *out, ptrdiff_t first_row)                                       \
    {                                                                                              \
        const ptrdiff_t size = sizeof(out_t), row_stride = out->row_stride;                        \
        const ptrdiff_t col_stride = out->col_stride;                                              \
        char *data = out->data + first_row * row_stride;                                           \
        if (labs(row_stride) < labs(col_stride)) {                                                 \
            for (ptrdiff_t col = 0; col < n_cols; col++)                                           \
                name##_line(band + col, pitch, n_rows, data + col * col_stride, row_stride);       \
            return;                                                                                \
        }                                                                                          \
        for (ptrdiff_t row = 0; row < n_rows; row++, band += pitch, data += row_stride)            \
            if (col_stride == size)                                                                \
                name##_line(band, 1, n_cols, data, size);                                          \
            else if (col_stride == -size)                                                          \
                name##_line(band, 1, n_cols, data, -size);                                         \
            else                                                                                   \
                name##_line(band, 1, n_cols, data, col_stride);                                    \
    }

STORE(store_labels_8, uint16_t, uint8_t, value)
STORE(store_labels_16, uint16_t, uint16_t, value)
STORE(store_float, float, float, value)
STORE(store_quantised, float, uint8_t, (int)(value * 255.0f + 0.5f)) /* half rounds up */

INLINE void store_values(const float *band, ptrdiff_t pitch, ptrdiff_t n_rows, ptrdiff_t n_cols,
                         const output *out, ptrdiff_t first_row)
{
    if (out->itemsize == sizeof(float))
        store_float(band, pitch, n_rows, n_cols, out, first_row);
    else
        store_quantised(band, pitch, n_rows, n_cols, out, first_row);
}

/* Rows (or columns) from start on that lie after the same block, at most `most` of them. */
INLINE ptrdiff_t run_end(const int32_t *lower, ptrdiff_t start, ptrdiff_t n, ptrdiff_t most)
{
    ptrdiff_t end = start + 1, limit = n - start < most ? n : start + most;
    while (end < limit && lower[end] == lower[start])
        end++;
    return end;
}

CLONES
static void enlarge_slice_labels(const coarse_slice *s, const output *labels,
                                 const output *confidence, float *scratch)
{
    workspace w;
    carve(&w, scratch, s->classes, s->out_cols);
    memset(w.col_weight, 0, (size_t)w.pitch * sizeof(float));
    memcpy(w.col_weight, s->col_weight, (size_t)s->out_cols * sizeof(float));
    for (ptrdiff_t y = 0, y_end; y < s->out_rows; y = y_end) {
        y_end = run_end(s->row_lower, y, s->out_rows, BAND);
        float row_weight[BAND] = {0};
        memcpy(row_weight, s->row_weight + y, (size_t)(y_end - y) * sizeof(float));
        ptrdiff_t row = s->row_lower[y], next_row = row + (row + 1 < s->rows);
        const float *upper = s->probabilities + row * s->cols * s->classes;
        const float *lower = s->probabilities + next_row * s->cols * s->classes;
        for (ptrdiff_t x = 0, x_end; x < s->out_cols; x = x_end) {
            x_end = run_end(s->col_lower, x, s->out_cols, s->out_cols);
            ptrdiff_t col = s->col_lower[x], next_col = col + (col + 1 < s->cols);
            const float *const p[4] = {upper + col * s->classes, upper + next_col * s->classes,
                                       lower + col * s->classes, lower + next_col * s->classes};
            int n = find_candidates(p, s->classes, &w);
            fill_cell(&w, n, row_weight, (int)(y_end - y), x, x_end);
        }
        if (labels->itemsize == 1)
            store_labels_8(w.labels, w.pitch, y_end - y, s->out_cols, labels, y);
        else
            store_labels_16(w.labels, w.pitch, y_end - y, s->out_cols, labels, y);
        if (confidence->data)
            store_values(w.best, w.pitch, y_end - y, s->out_cols, confidence, y);
    }
}

CLONES
static void enlarge_slice_map(const coarse_slice *s, const output *values, float *scratch)
{
    float *left = scratch, *step = left + s->cols, *values_of_row = step + s->cols;
    for (ptrdiff_t y = 0; y < s->out_rows; y++) {
        ptrdiff_t row = s->row_lower[y], next_row = row + (row + 1 < s->rows);
        const float *upper = s->probabilities + row * s->cols;
        const float *lower = s->probabilities + next_row * s->cols;
        for (ptrdiff_t col = 0; col < s->cols; col++)
            left[col] = upper[col] + s->row_weight[y] * (lower[col] - upper[col]);
        for (ptrdiff_t col = 0; col + 1 < s->cols; col++)
            step[col] = left[col + 1] - left[col];
        step[s->cols - 1] = 0;
        for (ptrdiff_t x = 0; x < s->out_cols; x++)
            values_of_row[x] = left[s->col_lower[x]] + s->col_weight[x] * step[s->col_lower[x]];
        store_values(values_of_row, s->out_cols, 1, s->out_cols, values, y);
    }
}

/* (1 - w) a + w b, written so that equal slices and w = 0 are reproduced exactly. */
CLONES
static void blend(const float *a, const float *b, float weight, float *restrict out, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = a[i] + weight * (b[i] - a[i]);
}

/* Per class, added up over block positions: p^2, p^2 row, p^2 col, and the extremes of p. */
CLONES
static void weigh(const coarse_slice *s, const double *row_at, const double *col_at, double *sums,
                  float *extremes)
{
    const ptrdiff_t n = s->classes;
    const float *p = s->probabilities;
    double *restrict weight = sums, *restrict by_row = sums + n, *restrict by_col = sums + 2 * n;
    double *restrict of_row = sums + 3 * n;
    float *restrict least = extremes, *restrict most = extremes + n;
    for (ptrdiff_t c = 0; c < n; c++) {
        weight[c] = by_row[c] = by_col[c] = 0;
        least[c] = most[c] = p[c];
    }
    for (ptrdiff_t row = 0; row < s->rows; row++) {
        for (ptrdiff_t c = 0; c < n; c++)
            of_row[c] = 0;
        for (ptrdiff_t col = 0; col < s->cols; col++, p += n)
            for (ptrdiff_t c = 0; c < n; c++) {
                double squared = (double)p[c] * p[c];
                of_row[c] += squared;
                by_col[c] += squared * col_at[col];
                least[c] = lesser(p[c], least[c]);
                most[c] = greater(p[c], most[c]);
            }
        for (ptrdiff_t c = 0; c < n; c++) {
            weight[c] += of_row[c];
            by_row[c] += of_row[c] * row_at[row];
        }
    }
}

#endif
