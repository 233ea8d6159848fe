/* The walk of a forest whose features lie far apart in memory, as a context's do.

   Positions are walked in tiles of up to 64 that lie close together, four rows of a slice by sixteen
   columns where there are so many. What a tile reads is copied side by side first (staged), feature
   by feature, 128 bytes each: each line of memory is fetched once per tile instead of once per visit,
   and all trees read the copy from the second cache. A set of positions is one word, bit by bit:

        slab  . . a b c . .         staged   feature 0   a b c d e f        64 voxels of each
              . . d e f . .                  feature 1   . . . . . .

        node: feature 0, threshold 4        a b c d e f
        set that stands at it               1 1 1 0 1 1
        voxel > 4, all 64 at once           0 1 0 1 1 0
        goes right                          0 1 0 0 1 0
        goes left                           1 0 1 0 0 1

   Neighbours go the same way for long: a tile of 4 x 16 positions 4.5 mm apart makes 0.9 visits per
   position and tree of a forest of context, where each position by itself would make twelve. All
   sets of a group of trees go down by one level per round: no branch depends on a voxel, and the
   nodes of the next round are fetched meanwhile. */
#ifndef ORGANFAST_FOREST_TILE_H
#define ORGANFAST_FOREST_TILE_H

#include "forest.h"

enum {
    FOREST_TILE = 64,
    FOREST_BAND = 4,                        /* rows of a tile */
    FOREST_RUN = FOREST_TILE / FOREST_BAND, /* positions of one row in it */
    FOREST_SPARSE = 32,                     /* bands of fewer positions are taken as they come */
    FOREST_AHEAD = 3,                       /* features between what is fetched and what is copied */
    FOREST_MOST_SETS = FOREST_GROUP * FOREST_TILE + 2 /* two are written before they count */
};

/* Sets of positions, one bit each, and the nodes they stand at: which tree of the group in the upper
   32 bits, which node of the tree in the lower ones. */
typedef struct {
    uint64_t sets[FOREST_MOST_SETS], stops[FOREST_MOST_SETS];
} forest_sets;

/* Rows that are being cut into tiles: of each, the positions from `at` to `end` are left. */
typedef struct {
    ptrdiff_t at[FOREST_BAND], end[FOREST_BAND], next;
    int n_rows;
} forest_band;

/* Positions of a call, (n, 3) int32 in any layout: (k, i, j), and bytes between voxels. */
typedef struct {
    const char *first;
    ptrdiff_t n, step, axis;
    ptrdiff_t strides[3];
} forest_positions;

typedef struct {
    ptrdiff_t places[FOREST_TILE]; /* by slot: bytes from the slab's first voxel */
    ptrdiff_t rows[FOREST_TILE];   /* by slot: which position of the call it is */
    uint64_t live;                 /* slots that hold a position */
    forest_band band;
    forest_sets rounds[2]; /* this round's, and the next one's */
    forest_sets leaves;    /* sets that have come to one, with its code for the node */
    int32_t codes[FOREST_GROUP][FOREST_TILE];
} forest_tile;

/* Walk a tile through `n` trees from `first` on; `staged` holds FOREST_TILE voxels per feature. */
typedef void forest_tile_walk(forest_tile *, const forest_trees *, const int16_t *staged,
                              ptrdiff_t first, int32_t n);

/* --- tiles ------------------------------------------------------------------------------------ */

static inline int32_t forest_index(const forest_positions *positions, ptrdiff_t p, int axis)
{
    int32_t index;
    memcpy(&index, positions->first + p * positions->step + axis * positions->axis, sizeof index);
    return index;
}

static inline void forest_fill_slot(forest_tile *tile, const forest_positions *positions,
                                    ptrdiff_t p, int slot)
{
    tile->places[slot] = forest_index(positions, p, 0) * positions->strides[0]
                         + forest_index(positions, p, 1) * positions->strides[1]
                         + forest_index(positions, p, 2) * positions->strides[2];
    tile->rows[slot] = p;
    tile->live |= (uint64_t)1 << slot;
}

/* One beyond the last of the positions from p on that follow each other along a row. */
static inline ptrdiff_t forest_row_end(const forest_positions *positions, ptrdiff_t p)
{
    int32_t k = forest_index(positions, p, 0), i = forest_index(positions, p, 1);
    int32_t j = forest_index(positions, p, 2);
    while (++p < positions->n) {
        int32_t next = forest_index(positions, p, 2);
        if (forest_index(positions, p, 1) != i || forest_index(positions, p, 0) != k || next <= j)
            break;
        j = next;
    }
    return p;
}

/* Take the next rows; how many positions they hold is returned. */
static inline ptrdiff_t forest_next_band(forest_band *band, const forest_positions *positions)
{
    ptrdiff_t first = band->next;
    for (band->n_rows = 0; band->n_rows < FOREST_BAND && band->next < positions->n; band->n_rows++) {
        band->at[band->n_rows] = band->next;
        band->end[band->n_rows] = band->next = forest_row_end(positions, band->next);
    }
    return band->next - first;
}

/* The last column of a tile: up to it no row has more than its share. */
static inline int32_t forest_last_column(const forest_band *band, const forest_positions *positions)
{
    int32_t last = INT32_MAX;
    for (int r = 0; r < band->n_rows; r++) {
        if (band->end[r] - band->at[r] < FOREST_RUN) continue;
        int32_t column = forest_index(positions, band->at[r] + FOREST_RUN - 1, 2);
        if (column < last) last = column;
    }
    return last;
}

/* What is left of the rows of the band, from the left; nothing, if nothing is left. */
static inline void forest_cut_band(forest_tile *tile, const forest_positions *positions)
{
    forest_band *band = &tile->band;
    int32_t last = forest_last_column(band, positions);
    for (int r = 0; r < band->n_rows; r++) {
        int slot = r * FOREST_RUN, end = slot + FOREST_RUN;
        for (; band->at[r] < band->end[r] && slot < end; band->at[r]++, slot++) {
            if (forest_index(positions, band->at[r], 2) > last) break;
            forest_fill_slot(tile, positions, band->at[r], slot);
        }
    }
}

/* Empty slots read what the first position reads. */
static inline void forest_fill_gaps(forest_tile *tile)
{
    ptrdiff_t place = tile->places[__builtin_ctzll(tile->live)];
    for (uint64_t gaps = ~tile->live; gaps; gaps &= gaps - 1)
        tile->places[__builtin_ctzll(gaps)] = place;
}

/* Put the next positions into the slots; 0 at the end of the call. */
static inline int forest_next_tile(forest_tile *tile, const forest_positions *positions)
{
    tile->live = 0;
    forest_cut_band(tile, positions);
    if (!tile->live) {
        ptrdiff_t first = tile->band.next;
        if (first == positions->n) return 0;
        if (forest_next_band(&tile->band, positions) >= FOREST_SPARSE) {
            forest_cut_band(tile, positions);
        } else {
            tile->band.n_rows = 0;
            for (tile->band.next = first;
                 tile->band.next < positions->n && tile->band.next - first < FOREST_TILE;
                 tile->band.next++)
                forest_fill_slot(tile, positions, tile->band.next, (int)(tile->band.next - first));
        }
    }
    forest_fill_gaps(tile);
    return 1;
}

/* --- staging ---------------------------------------------------------------------------------- */

/* Copy what the tile reads. Meanwhile the lines of a later feature are fetched, which the processor
   does not see coming by itself: features lie far apart. */
static inline void forest_stage(const forest_tile *tile, const forest_trees *trees,
                                ptrdiff_t n_features, int16_t *staged)
{
    const ptrdiff_t *places = tile->places, *reads = trees->offsets;
    ptrdiff_t lines[FOREST_TILE]; /* places that begin another line of 64 bytes */
    int n_lines = 0;
    for (int p = 0; p < FOREST_TILE; p++)
        if (p == 0 || places[p] >> 6 != places[p - 1] >> 6) lines[n_lines++] = places[p];
    for (ptrdiff_t f = 0; f < n_features; f++, staged += FOREST_TILE) {
        const char *base = trees->voxels + reads[f];
        const char *later = trees->voxels
                            + reads[f + FOREST_AHEAD < n_features ? f + FOREST_AHEAD : f];
        for (int l = 0; l < n_lines; l++) __builtin_prefetch(later + lines[l]);
        for (int p = 0; p < FOREST_TILE; p++) staged[p] = forest_voxel(base + places[p]);
    }
}

/* --- walking ---------------------------------------------------------------------------------- */

/* Which of 64 voxels are above a threshold, voxel n in bit n: eight comparisons at a time become
   eight bytes of 0 or 1, which a multiplication gathers into one byte. */
static inline uint64_t forest_tile_above_scalar(const int16_t *voxels, int16_t threshold)
{
    uint8_t are_above[FOREST_TILE];
    uint64_t above = 0;
    for (int p = 0; p < FOREST_TILE; p++) are_above[p] = voxels[p] > threshold;
    for (int p = 0; p < FOREST_TILE; p += 8) {
        uint64_t eight = 0;
        for (int b = 0; b < 8; b++) eight |= (uint64_t)are_above[p + b] << 8 * b;
        above |= (eight * 0x0102040810204080) >> 56 << p;
    }
    return above;
}

#define FOREST_WALK forest_tile_walk_scalar
#define FOREST_ABOVE forest_tile_above_scalar
#define FOREST_TARGET
#include "forest_tile_walk.h"

#if defined(__x86_64__) && defined(__GNUC__)

FOREST_V3 static inline uint64_t forest_tile_above_v3(const int16_t *voxels, int16_t threshold)
{
    const __m256i limit = _mm256_set1_epi16(threshold), *at = (const __m256i *)voxels;
    uint64_t above = 0;
    for (int half = 0; half < 2; half++) {
        __m256i a = _mm256_cmpgt_epi16(_mm256_loadu_si256(at + 2 * half), limit);
        __m256i b = _mm256_cmpgt_epi16(_mm256_loadu_si256(at + 2 * half + 1), limit);
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); /* a, then b */
        above |= (uint64_t)(uint32_t)_mm256_movemask_epi8(bytes) << 32 * half;
    }
    return above;
}

#define FOREST_WALK forest_tile_walk_v3
#define FOREST_ABOVE forest_tile_above_v3
#define FOREST_TARGET FOREST_V3
#include "forest_tile_walk.h"

FOREST_V4 static inline uint64_t forest_tile_above_v4(const int16_t *voxels, int16_t threshold)
{
    const __m512i limit = _mm512_set1_epi16(threshold);
    uint64_t low = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(voxels), limit);
    uint64_t high = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(voxels + 32), limit);
    return low | high << 32;
}

#define FOREST_WALK forest_tile_walk_v4
#define FOREST_ABOVE forest_tile_above_v4
#define FOREST_TARGET FOREST_V4
#include "forest_tile_walk.h"

static forest_tile_walk *forest_tile_path_at(int path)
{
    return path == 2 ? forest_tile_walk_v4 : path == 1 ? forest_tile_walk_v3
                                                       : forest_tile_walk_scalar;
}

#else

static forest_tile_walk *forest_tile_path_at(int path)
{
    (void)path;
    return forest_tile_walk_scalar;
}

#endif

/* --- leaves ----------------------------------------------------------------------------------- */

/* Add the leaves of trees first..last, in this order, to the sums of all positions of the tile. */
static inline void forest_tile_add_trees(forest_tile *tile, const forest_trees *trees,
                                         const int16_t *staged, forest_tile_walk *walk,
                                         ptrdiff_t first, ptrdiff_t last, double *sums)
{
    for (ptrdiff_t done = first; done < last;) {
        ptrdiff_t n_trees = last - done < FOREST_GROUP ? last - done : FOREST_GROUP;
        walk(tile, trees, staged, done, (int32_t)n_trees);
        for (uint64_t live = tile->live; live; live &= live - 1) {
            int slot = __builtin_ctzll(live);
            for (ptrdiff_t t = 0; t < n_trees; t++)
                forest_add_leaves(&tile->codes[t][slot], 1, trees->leaf_table, trees->n_classes,
                                  sums + slot * trees->n_classes);
        }
        done += n_trees;
    }
}

/* Label the positions whose margin exceeds `enough`, and take them from the tile. `labels` has a
   stride in bytes. */
static inline void forest_tile_leave(forest_tile *tile, const forest_trees *trees, double enough,
                                     double n_trees, const double *sums, char *labels,
                                     ptrdiff_t stride)
{
    for (uint64_t live = tile->live; live; live &= live - 1) {
        int slot = __builtin_ctzll(live);
        const double *of_slot = sums + slot * trees->n_classes;
        if (!(forest_margin(of_slot, trees->n_classes) > enough)) continue;
        uint16_t label = forest_label(of_slot, trees->n_classes, n_trees);
        memcpy(labels + tile->rows[slot] * stride, &label, sizeof label);
        tile->live &= ~((uint64_t)1 << slot);
    }
}

#endif
