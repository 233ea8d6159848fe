/* Runs of equal labels along the rows of a label map: what runs.pyx and label_statistics.pyx share.

   A row of voxels  0 0 0 4 4 0 0 0  has runs that stop at  3 5 8  with labels  0 4 0;  a run starts
   where the one before it stops. Rows are numbered plane by plane; all have the same length, so
   that two rows are walked side by side until both stop. */
#ifndef ORGANFAST_RUNS_H
#define ORGANFAST_RUNS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define RUNS_INLINE static inline __attribute__((always_inline))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define RUNS_FIRST_BIT __builtin_ctzll
#else
#define RUNS_FIRST_BIT __builtin_clzll
#endif

RUNS_INLINE uint64_t runs_word(const char *at)
{
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

/* Where the run that covers voxel c of a row of n stops. step: bytes from voxel to voxel. Eight
   bytes at a time are compared with the eight that lie one voxel further on. */
#define RUNS_STOP(NAME, LABEL)                                                                     \
    RUNS_INLINE ptrdiff_t NAME(const char *row, ptrdiff_t step, ptrdiff_t c, ptrdiff_t n)          \
    {                                                                                              \
        const ptrdiff_t size = sizeof(LABEL), many = 8 / size;                                     \
        if (step == size) {                                                                        \
            for (; c + many < n; c += many) {                                                      \
                const char *at = row + c * size;                                                   \
                const uint64_t change = runs_word(at) ^ runs_word(at + size);                      \
                if (change) return c + 1 + RUNS_FIRST_BIT(change) / (8 * size);                    \
            }                                                                                      \
        }                                                                                          \
        const LABEL label = *(const LABEL *)(row + c * step);                                      \
        do c++;                                                                                    \
        while (c < n && *(const LABEL *)(row + c * step) == label);                                \
        return c;                                                                                  \
    }
RUNS_STOP(runs_stop_8, uint8_t)
RUNS_STOP(runs_stop_16, uint16_t)

RUNS_INLINE ptrdiff_t runs_stop(const char *row, ptrdiff_t step, ptrdiff_t size, ptrdiff_t c,
                                ptrdiff_t n)
{
    return size == 1 ? runs_stop_8(row, step, c, n) : runs_stop_16(row, step, c, n);
}

typedef struct {
    const int32_t *stops;    /* (n_runs) */
    const uint16_t *labels;  /* (n_runs) */
    const int32_t *rows;     /* (n_planes * n_rows + 1) first run of each row */
    ptrdiff_t n_planes, n_rows;
} runs_map;

/* --- one piece of what touches ---------------------------------------------------------------- */

RUNS_INLINE int32_t runs_root(int32_t *parents, int32_t run)
{
    while (parents[run] != run) {
        parents[run] = parents[parents[run]];
        run = parents[run];
    }
    return run;
}

/* Pairs of runs that are one. They are noted without a branch, which noise would mislead. */
enum { RUNS_PAIRS = 256 };
typedef struct {
    int32_t n, one[RUNS_PAIRS], other[RUNS_PAIRS];
} runs_pairs;

RUNS_INLINE void runs_note(const runs_map *map, const uint8_t *sought, runs_pairs *pairs,
                           int32_t one, int32_t other)
{
    const uint16_t label = map->labels[one];
    pairs->one[pairs->n] = one;
    pairs->other[pairs->n] = other;
    pairs->n += (label == map->labels[other]) & sought[label];
}

RUNS_INLINE void runs_join(runs_pairs *pairs, int32_t *parents)
{
    for (int32_t n = 0; n < pairs->n; n++) {
        int32_t one = pairs->one[n], other = pairs->other[n];
        if (parents[one] == parents[other]) continue;
        one = runs_root(parents, one);
        other = runs_root(parents, other);
        if (one < other)
            parents[other] = one;
        else
            parents[one] = other;
    }
    pairs->n = 0;
}

/* Two rows: runs that share a column; with corners also those of which one stops where the other
   starts. */
RUNS_INLINE void runs_join_rows(const runs_map *map, const uint8_t *sought, int32_t *parents,
                                ptrdiff_t row, ptrdiff_t other, int corners)
{
    int32_t a = map->rows[row], b = map->rows[other];
    const int32_t end = map->rows[row + 1];
    runs_pairs pairs;
    pairs.n = 0;
    for (;;) {
        runs_note(map, sought, &pairs, a, b);
        const int32_t stop_a = map->stops[a], stop_b = map->stops[b];
        a += stop_a <= stop_b;
        b += stop_b <= stop_a;
        if (a == end) break;
        if (corners && stop_a == stop_b) {
            runs_note(map, sought, &pairs, a - 1, b);
            runs_note(map, sought, &pairs, a, b - 1);
        }
        if (pairs.n > RUNS_PAIRS - 3) runs_join(&pairs, parents);
    }
    runs_join(&pairs, parents);
}

/* pieces (n_runs): the piece of each run, numbered by their first runs; -1 where its label is not
   sought. Returns the number of pieces. The lowest run of a tree is its root, so that one
   ascending sweep numbers them. */
RUNS_INLINE int32_t runs_pieces_of(const runs_map *map, const uint8_t *sought, int32_t *pieces,
                                   int corners)
{
    const ptrdiff_t n_rows = map->n_rows, n = map->n_planes * n_rows;
    for (int32_t run = 0; run < map->rows[n]; run++) pieces[run] = run;
    for (ptrdiff_t row = 0; row < n; row++) {
        const ptrdiff_t i = row % n_rows;
        if (i > 0) runs_join_rows(map, sought, pieces, row, row - 1, corners);
        if (row < n_rows) continue;
        runs_join_rows(map, sought, pieces, row, row - n_rows, corners);
        if (!corners) continue;
        if (i > 0) runs_join_rows(map, sought, pieces, row, row - n_rows - 1, 1);
        if (i + 1 < n_rows) runs_join_rows(map, sought, pieces, row, row - n_rows + 1, 1);
    }
    int32_t n_pieces = 0;
    for (int32_t run = 0; run < map->rows[n]; run++) {
        if (!sought[map->labels[run]])
            pieces[run] = -1;
        else
            pieces[run] = pieces[run] == run ? n_pieces++ : pieces[pieces[run]];
    }
    return n_pieces;
}

static inline int32_t runs_pieces(const runs_map *map, const uint8_t *sought, int32_t *pieces, int corners)
{
    return corners ? runs_pieces_of(map, sought, pieces, 1) : runs_pieces_of(map, sought, pieces, 0);
}

/* --- what touches what ------------------------------------------------------------------------ */

typedef void runs_visitor(void *state, const runs_map *map, int32_t one, int32_t other,
                          int64_t n_faces);

RUNS_INLINE void runs_row_faces(const runs_map *map, ptrdiff_t row, ptrdiff_t other,
                                runs_visitor *visit, void *state)
{
    int32_t a = map->rows[row], b = map->rows[other], from = 0;
    const int32_t end = map->rows[row + 1];
    while (a < end) {
        const int32_t stop_a = map->stops[a], stop_b = map->stops[b];
        const int32_t stop = stop_a < stop_b ? stop_a : stop_b;
        visit(state, map, a, b, stop - from);
        from = stop;
        a += stop_a == stop;
        b += stop_b == stop;
    }
}

/* Every pair of touching runs of the planes from ``first`` on, and of the plane before them. */
RUNS_INLINE void runs_faces(const runs_map *map, ptrdiff_t first, runs_visitor *visit, void *state)
{
    const ptrdiff_t n_rows = map->n_rows;
    for (ptrdiff_t row = first * n_rows; row < map->n_planes * n_rows; row++) {
        for (int32_t run = map->rows[row] + 1; run < map->rows[row + 1]; run++)
            visit(state, map, run, run - 1, 1);
        if (row % n_rows) runs_row_faces(map, row, row - 1, visit, state);
        if (row >= n_rows) runs_row_faces(map, row, row - n_rows, visit, state);
    }
}

typedef struct {
    const int32_t *pieces, *column_of_label;
    int64_t *votes;
    ptrdiff_t n_columns;
} runs_votes;

RUNS_INLINE void runs_vote(void *state, const runs_map *map, int32_t one, int32_t other,
                           int64_t n_faces)
{
    const runs_votes *s = state;
    const int32_t p = s->pieces[one], q = s->pieces[other];
    if ((p < 0) == (q < 0)) return;
    const int32_t piece = p < 0 ? q : p;
    const int32_t column = s->column_of_label[map->labels[p < 0 ? one : other]];
    if (column >= 0) s->votes[piece * s->n_columns + column] += n_faces;
}

static inline void runs_count_votes(const runs_map *map, ptrdiff_t first, runs_votes *state)
{
    runs_faces(map, first, runs_vote, state);
}

typedef struct {
    const int32_t *pieces;
    uint16_t *lowest, *highest;
} runs_enclosure;

RUNS_INLINE void runs_enclose(void *state, const runs_map *map, int32_t one, int32_t other,
                              int64_t n_faces)
{
    (void)n_faces;
    const runs_enclosure *s = state;
    const int32_t p = s->pieces[one], q = s->pieces[other];
    if ((p < 0) == (q < 0)) return;
    const int32_t piece = p < 0 ? q : p;
    const uint16_t label = map->labels[p < 0 ? one : other];
    if (label < s->lowest[piece]) s->lowest[piece] = label;
    if (label > s->highest[piece]) s->highest[piece] = label;
}

static inline void runs_find_enclosing(const runs_map *map, runs_enclosure *state)
{
    runs_faces(map, 0, runs_enclose, state);
}

#endif
