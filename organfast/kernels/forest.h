/* Inner loops of forest.pyx: which leaf of a tree each position falls into.

   A chunk of positions is walked together. A set of them that stands at a node is parted in two,
   so that the node is read once for all, and their voxels in memory order. Sets shrink on the way,
   and the cheapest way to part them changes:

        rows of positions -> marks ---------> lists ----------> interleaved
        (dense, or staged)   one bit each,    32 bits each,     each position by itself,
                             whole rows       their voxels      many at a time
                             are compared     are gathered           |
                             n / 8 or more    16 or more        fewer, or positions too far apart
                                                                for an item's 19 bits of distance

   With 8192 neighbours in trees of 5000 nodes 60 % of all visits are in sets of 512 and more, 3 % in
   sets under 16. Single positions are interleaved so that the loads of one hide behind those of the
   others. No loop branches on a voxel.

   Patterns that read far and wide miss the cache at nearly every visit: forest_tile.h is for these. */
#ifndef ORGANFAST_FOREST_H
#define ORGANFAST_FOREST_H

#include "forest_split.h"

enum {
    FOREST_REACH = 1 << (32 - FOREST_SLOT_BITS), /* bytes between positions of one chunk */
    FOREST_LANES = 256,
    FOREST_SMALL_SET = 16, /* smaller ones are not worth parting (8 to 32: within 4 %) */
    FOREST_BLOCKS = FOREST_CHUNK / 64,
    FOREST_MARKS_PER_BLOCK = 8, /* least number on average for which marks are kept */
    FOREST_MARKED_SETS = 64 / FOREST_MARKS_PER_BLOCK,
    FOREST_GROUP = 32,     /* trees whose leaves are summed together */
    FOREST_ROWS = 32,      /* positions whose sums stay in the first cache meanwhile */
    FOREST_FAR_BITS = 16,
    FOREST_ROOT = 2 /* side of the items that stand at the root */
};

/* As in the model file. A position whose voxel is at most the threshold goes to `left`, any other
   to `left + 1`; where `left` is negative the node is the leaf with the code `~left`. */
typedef struct {
    int16_t threshold;
    uint16_t feature;
    int32_t left;
} forest_node;

/* What is walked: trees, and where features are read, in bytes from a position's place. */
typedef struct {
    const forest_node *nodes;
    const int64_t *starts;
    const double *leaf_table;
    const char *voxels;
    const ptrdiff_t *offsets;
    ptrdiff_t n_classes;
} forest_trees;

/* An item whose 48 bits of distance are more than any machine's memory. */
typedef int64_t forest_far_item;

static inline forest_far_item forest_pack(ptrdiff_t place, uint32_t slot)
{
    return (forest_far_item)(((uint64_t)place << FOREST_FAR_BITS) | slot);
}

static inline ptrdiff_t forest_place(forest_far_item item)
{
    return (ptrdiff_t)(item >> FOREST_FAR_BITS); /* arithmetic: places may be negative */
}

/* Positions lo..hi of items[side] stand at a node. */
typedef struct {
    int32_t node, side, lo, hi;
} forest_set;

typedef struct {
    forest_item items[3][FOREST_CHUNK + FOREST_PAD]; /* two to part to and fro, and the root's */
    int16_t voxels[FOREST_CHUNK + FOREST_PAD];
    forest_set stack[FOREST_CHUNK / FOREST_SMALL_SET]; /* sets on it are disjoint, not small */
    forest_far_item singles[FOREST_CHUNK];
    int32_t nodes[FOREST_CHUNK];           /* where the singles stand */
    ptrdiff_t places[FOREST_CHUNK];        /* by slot: bytes from the first voxel */
    int32_t rows[FOREST_CHUNK];            /* by slot: which position of the chunk it is */
    int32_t codes[FOREST_GROUP][FOREST_CHUNK];
    /* Blocks of the root's items, if they are kept as marks: see forest_mark. Sets that are kept so
       are disjoint and large; there is room for both parts of one more. */
    ptrdiff_t block_places[FOREST_BLOCKS];
    uint64_t live[FOREST_BLOCKS];
    uint64_t marks[FOREST_MARKED_SETS + 1][FOREST_BLOCKS];
    forest_path path;
    ptrdiff_t least; /* of the places */
    int32_t n, n_sets, n_singles, are_near, n_blocks;
} forest_walk;

/* Where a set that has come to a node goes next: to its leaf, to the singles, or on the stack. */
static inline void forest_settle(forest_walk *walk, const forest_node *tree, forest_set set,
                                 int32_t *codes)
{
    const forest_item *items = walk->items[set.side];
    int32_t left = tree[set.node].left;
    if (left < 0) {
        for (int32_t i = set.lo; i < set.hi; i++) codes[items[i] % FOREST_CHUNK] = ~left;
    } else if (set.hi - set.lo < FOREST_SMALL_SET) {
        for (int32_t i = set.lo; i < set.hi; i++) {
            ptrdiff_t place = walk->least + (ptrdiff_t)(items[i] / FOREST_CHUNK);
            walk->nodes[walk->n_singles] = set.node;
            walk->singles[walk->n_singles++] = forest_pack(place, items[i] % FOREST_CHUNK);
        }
    } else {
        walk->stack[walk->n_sets++] = set;
    }
}

/* Part a set at its node into the other buffer. */
static inline void forest_part(forest_walk *walk, const forest_node *tree,
                               const forest_trees *trees, forest_set set, int32_t *codes)
{
    const forest_node node = tree[set.node];
    const char *base = trees->voxels + (walk->least + trees->offsets[node.feature]);
    int32_t middle = set.lo + (int32_t)walk->path.split(walk->items[set.side] + set.lo,
                                                   walk->items[!set.side] + set.lo,
                                                   set.hi - set.lo, base, node.threshold,
                                                   walk->voxels);
    forest_set right = {node.left + 1, !set.side, middle, set.hi};
    forest_set left = {node.left, !set.side, set.lo, middle};
    forest_settle(walk, tree, right, codes);
    forest_settle(walk, tree, left, codes);
}

/* Walk single positions to their leaves, one level of all of them per round. Those that are not at
   a leaf move up to the front; a code that is no leaf's is written over in a later round. */
static inline void forest_interleave(const forest_node *tree, const forest_trees *trees,
                                     forest_far_item *items, int32_t *nodes, ptrdiff_t n,
                                     int32_t *codes)
{
    while (n > 0) {
        ptrdiff_t n_inside = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            forest_far_item item = items[i];
            forest_node node = tree[nodes[i]];
            ptrdiff_t place = forest_place(item) + trees->offsets[node.feature];
            int32_t right = forest_voxel(trees->voxels + place) > node.threshold;
            codes[(uint16_t)item] = ~node.left;
            items[n_inside] = item;
            nodes[n_inside] = node.left + right;
            n_inside += node.left >= 0;
        }
        n = n_inside;
    }
}

/* From marks to a list at the end of side 0, if the set is small or at a leaf. */
static inline int forest_unmark(forest_walk *walk, const forest_node *tree, int32_t node,
                                const uint64_t *marks, int32_t n, int32_t *n_listed,
                                int32_t *codes)
{
    if (tree[node].left >= 0 && n >= FOREST_MARKS_PER_BLOCK * walk->n_blocks) return 0;
    forest_set set = {node, 0, *n_listed, *n_listed + n};
    walk->path.list(walk->items[FOREST_ROOT], marks, walk->n_blocks, walk->items[0] + set.lo);
    forest_settle(walk, tree, set, codes);
    *n_listed = set.hi;
    return 1;
}

/* Part marked sets until all are lists. */
static inline void forest_part_marks(forest_walk *walk, const forest_node *tree,
                                     const forest_trees *trees, int32_t *codes)
{
    int32_t at[FOREST_MARKED_SETS + 1] = {0}, count[FOREST_MARKED_SETS + 1] = {walk->n};
    int32_t n_listed = 0, n_marked = 1;
    const size_t n_bytes = (size_t)walk->n_blocks * sizeof *walk->live;
    memcpy(walk->marks[0], walk->live, n_bytes);
    if (forest_unmark(walk, tree, 0, walk->marks[0], walk->n, &n_listed, codes)) return;
    while (n_marked > 0) {
        int32_t m = n_marked - 1;
        uint64_t *left = walk->marks[m], *right = walk->marks[n_marked];
        const forest_node node = tree[at[m]];
        int32_t n_right = (int32_t)walk->path.mark(trees->voxels + trees->offsets[node.feature],
                                                   walk->block_places, walk->live, walk->n_blocks,
                                                   node.threshold, left, right);
        int32_t n_left = count[m] - n_right;
        n_marked--;
        if (!forest_unmark(walk, tree, node.left, left, n_left, &n_listed, codes)) {
            at[n_marked] = node.left;
            count[n_marked++] = n_left;
        }
        if (!forest_unmark(walk, tree, node.left + 1, right, n_right, &n_listed, codes)) {
            if (right != walk->marks[n_marked]) memcpy(walk->marks[n_marked], right, n_bytes);
            at[n_marked] = node.left + 1;
            count[n_marked++] = n_right;
        }
    }
}

/* codes[p] = the leaf of the position in slot p. */
static inline void forest_walk_tree(forest_walk *walk, const forest_node *tree,
                                    const forest_trees *trees, int32_t *codes)
{
    walk->n_sets = walk->n_singles = 0;
    if (walk->n_blocks) {
        forest_part_marks(walk, tree, trees, codes);
    } else if (walk->are_near) {
        forest_set all = {0, FOREST_ROOT, 0, walk->n};
        forest_settle(walk, tree, all, codes);
    } else {
        for (int32_t p = 0; p < walk->n; p++) {
            walk->nodes[p] = 0;
            walk->singles[p] = forest_pack(walk->places[p], (uint32_t)p);
        }
        walk->n_singles = walk->n;
    }
    while (walk->n_sets > 0) {
        forest_set set = walk->stack[--walk->n_sets];
        forest_part(walk, tree, trees, set, codes);
    }
    for (int32_t i = 0; i < walk->n_singles; i += FOREST_LANES) {
        int32_t n_lanes = walk->n_singles - i;
        forest_interleave(tree, trees, walk->singles + i, walk->nodes + i,
                          n_lanes < FOREST_LANES ? n_lanes : FOREST_LANES, codes);
    }
}

static inline forest_item forest_near_item(const forest_walk *walk, int32_t p)
{
    return (forest_item)(walk->places[p] - walk->least) * FOREST_CHUNK + (forest_item)p;
}

/* Put as many of the first n places at the root as lie in blocks side by side; how many, is
   returned, or 0 where blocks would be less than half full. */
static inline int32_t forest_start_blocks(forest_walk *walk, int32_t n)
{
    int32_t n_blocks = 0, lane = 64, p = 0;
    for (; p < n; p++, lane++) {
        if (lane == 64 || walk->places[p] != walk->places[p - 1] + (ptrdiff_t)sizeof(int16_t)) {
            if (n_blocks == FOREST_BLOCKS) break;
            walk->block_places[n_blocks] = walk->places[p];
            walk->live[n_blocks++] = lane = 0;
        }
        walk->live[n_blocks - 1] |= (uint64_t)1 << lane;
        walk->items[FOREST_ROOT][64 * (n_blocks - 1) + lane] = forest_near_item(walk, p);
    }
    if (p < 32 * n_blocks) return 0;
    walk->n_blocks = n_blocks;
    return p;
}

/* Put the first n places at the root, or fewer if that many are in blocks; how many, is returned. */
static inline int32_t forest_start(forest_walk *walk, int32_t n, int32_t least_in_blocks)
{
    walk->n_blocks = 0;
    if (walk->are_near) {
        int32_t n_in_blocks = walk->path.mark ? forest_start_blocks(walk, n) : 0;
        if (n_in_blocks >= least_in_blocks && n_in_blocks > 0) return walk->n = n_in_blocks;
        walk->n_blocks = 0;
        for (int32_t p = 0; p < n; p++)
            walk->items[FOREST_ROOT][p] = forest_near_item(walk, p);
    }
    return walk->n = n;
}

/* How many of the next n positions, whose places were written, are walked together: the longest run
   of neighbours, or if that is short, some by themselves. They are put at the root. */
static inline int32_t forest_gather_chunk(forest_walk *walk, int32_t n)
{
    ptrdiff_t least = walk->places[0], most = least;
    int32_t n_near = 0;
    for (; n_near < n; n_near++) {
        ptrdiff_t place = walk->places[n_near];
        ptrdiff_t low = place < least ? place : least, high = place > most ? place : most;
        if (high - low >= FOREST_REACH) break;
        least = low;
        most = high;
    }
    walk->are_near = n_near >= 2 * FOREST_SMALL_SET || n_near == n;
    walk->least = least;
    for (int32_t p = 0; p < n; p++) walk->rows[p] = p;
    int32_t n_here = walk->are_near ? n_near : n < FOREST_LANES ? n : FOREST_LANES;
    return forest_start(walk, n_here, FOREST_SMALL_SET);
}

/* sums[p, class] += the shares in leaf codes[p]. Codes below n_classes are pure leaves; adding the
   zeros of their other classes would change no bit. */
static inline void forest_add_leaves(const int32_t *codes, int32_t n, const double *leaf_table,
                                     ptrdiff_t n_classes, double *sums)
{
    for (int32_t p = 0; p < n; p++, sums += n_classes) {
        int32_t code = codes[p];
        if (code < n_classes) {
            sums[code] += 1.0;
        } else {
            const double *row = leaf_table + (code - n_classes) * n_classes;
            for (ptrdiff_t c = 0; c < n_classes; c++) sums[c] += row[c];
        }
    }
}

/* Add the leaves of trees first..last, in this order, to the sums of all positions at the root. */
static inline void forest_add_trees(forest_walk *walk, const forest_trees *trees, ptrdiff_t first,
                                    ptrdiff_t last, double *sums)
{
    for (ptrdiff_t n_done = first; n_done < last;) {
        ptrdiff_t n_trees = last - n_done < FOREST_GROUP ? last - n_done : FOREST_GROUP;
        for (ptrdiff_t t = 0; t < n_trees; t++)
            forest_walk_tree(walk, trees->nodes + trees->starts[n_done + t], trees,
                             walk->codes[t]);
        for (int32_t p = 0; p < walk->n; p += FOREST_ROWS) {
            int32_t n_rows = walk->n - p < FOREST_ROWS ? walk->n - p : FOREST_ROWS;
            for (ptrdiff_t t = 0; t < n_trees; t++)
                forest_add_leaves(walk->codes[t] + p, n_rows, trees->leaf_table, trees->n_classes,
                                  sums + p * trees->n_classes);
        }
        n_done += n_trees;
    }
}

/* The class of the greatest quotient, ties to the lowest: of quotients, as rounding may make two
   of them equal where the sums are not. */
static inline uint16_t forest_label(const double *sums, ptrdiff_t n_classes, double n_trees)
{
    ptrdiff_t best = 0;
    for (ptrdiff_t c = 1; c < n_classes; c++)
        if (sums[c] > sums[best] && sums[c] / n_trees > sums[best] / n_trees) best = c;
    return (uint16_t)best;
}

static inline double forest_lower(double a, double b) { return a < b ? a : b; }

static inline double forest_higher(double a, double b) { return a > b ? a : b; }

/* By how much the greatest sum exceeds the others: of the even and of the odd classes side by side,
   as each comparison waits for the one before. */
static inline double forest_margin(const double *sums, ptrdiff_t n_classes)
{
    double best = n_classes % 2 ? sums[n_classes - 1] : 0, second = 0, odd_best = 0, odd_second = 0;
    for (ptrdiff_t c = 0; c + 1 < n_classes; c += 2) {
        second = forest_higher(second, forest_lower(sums[c], best));
        best = forest_higher(sums[c], best);
        odd_second = forest_higher(odd_second, forest_lower(sums[c + 1], odd_best));
        odd_best = forest_higher(sums[c + 1], odd_best);
    }
    double other = forest_higher(second, odd_second);
    return forest_higher(best, odd_best) - forest_higher(other, forest_lower(best, odd_best));
}

/* Label the positions whose margin exceeds `enough`, and take them from the root: the others move
   up with their sums. Unless a third of them leave all stay, for a chunk with gaps is walked more
   slowly. `labels` has a stride in bytes. */
static inline void forest_leave(forest_walk *walk, const forest_trees *trees, double enough,
                                double n_trees, double *sums, char *labels, ptrdiff_t stride)
{
    ptrdiff_t n_classes = trees->n_classes;
    int32_t *is_certain = walk->nodes, n_certain = 0, n_left = 0;
    for (int32_t p = 0; p < walk->n; p++) {
        is_certain[p] = forest_margin(sums + p * n_classes, n_classes) > enough;
        n_certain += is_certain[p];
    }
    if (3 * n_certain < walk->n) return;
    for (int32_t p = 0; p < walk->n; p++) {
        const double *from = sums + p * n_classes;
        if (is_certain[p]) {
            uint16_t label = forest_label(from, n_classes, n_trees);
            memcpy(labels + walk->rows[p] * stride, &label, sizeof label);
        } else {
            memmove(sums + n_left * n_classes, from, (size_t)n_classes * sizeof *sums);
            walk->places[n_left] = walk->places[p];
            walk->rows[n_left++] = walk->rows[p];
        }
    }
    forest_start(walk, n_left, n_left);
}

#endif
