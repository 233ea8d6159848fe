/* Inner loops of forest.pyx: which leaf of a tree each position falls into.

   A tree is walked by a set of positions at once. As long as a set is large it is parted in two at
   its node, which then is read once for the whole set, and its voxels in memory order; what is left
   of it goes on as single positions, up to FOREST_LANES of them interleaved so that the loads of
   one hide behind those of the others. Neither loop branches on a voxel.

   Scalar on purpose: with one load per voxel this is as fast as interleaved lanes of hardware
   gathers, and it needs no other instruction set than the compiler's default. */
#ifndef ORGANFAST_FOREST_H
#define ORGANFAST_FOREST_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    FOREST_CHUNK = 2048, /* positions walked together; their numbers fit FOREST_SLOT_BITS */
    FOREST_LANES = 256,
    FOREST_SMALL_SET = 16, /* smaller ones are not worth parting (8 to 32: within 3 %) */
    FOREST_SLOT_BITS = 16,
    FOREST_ROOT = 2 /* side of the items that stand at the root */
};

/* As in the model file. A position whose voxel is at most the threshold goes to `left`, any other
   to `left + 1`; where `left` is negative the node is the leaf with the code `~left`. */
typedef struct {
    int16_t threshold;
    uint16_t feature;
    int32_t left;
} forest_node;

/* A position on its way: its voxel's distance from the slab's first one in bytes, and its number
   (slot) in the chunk. 48 bits of distance are more than any machine's memory. */
typedef int64_t forest_item;

static inline forest_item forest_pack(ptrdiff_t place, uint16_t slot)
{
    return (forest_item)(((uint64_t)place << FOREST_SLOT_BITS) | slot);
}

static inline ptrdiff_t forest_place(forest_item item)
{
    return (ptrdiff_t)(item >> FOREST_SLOT_BITS); /* arithmetic: places may be negative */
}

/* The voxel at any address; a slab may be a field of packed records. */
static inline int16_t forest_voxel(const char *at)
{
    int16_t hu;
    memcpy(&hu, at, sizeof hu);
    return hu;
}

/* Positions lo..hi of items[side] stand at a node. */
typedef struct {
    int32_t node, side, lo, hi;
} forest_set;

typedef struct {
    forest_item items[3][FOREST_CHUNK]; /* two sides to part to and fro, and the root's */
    /* Sets on the stack are disjoint and not small, so there are never more of them. */
    forest_set stack[FOREST_CHUNK / FOREST_SMALL_SET];
    int32_t n_sets;
    /* Single positions and the nodes where they stand. */
    forest_item singles[FOREST_CHUNK];
    int32_t nodes[FOREST_CHUNK];
    int32_t n_singles;
} forest_walk;

/* Where a set that has come to a node goes next: to its leaf, to the singles, or on the stack. */
static inline void forest_settle(forest_walk *walk, const forest_node *tree, forest_set set,
                                 int32_t *codes)
{
    const forest_item *items = walk->items[set.side];
    int32_t left = tree[set.node].left;
    if (left < 0) {
        for (int32_t i = set.lo; i < set.hi; i++) codes[(uint16_t)items[i]] = ~left;
    } else if (set.hi - set.lo < FOREST_SMALL_SET) {
        for (int32_t i = set.lo; i < set.hi; i++) {
            walk->nodes[walk->n_singles] = set.node;
            walk->singles[walk->n_singles++] = items[i];
        }
    } else {
        walk->stack[walk->n_sets++] = set;
    }
}

/* Part a set at its node into another buffer: the left part from the front, the right part from the
   back. Each item is written at both ends; the end that does not count is written over. */
static inline void forest_part(forest_walk *walk, const forest_node *tree, const char *voxels,
                               const ptrdiff_t *offsets, forest_set set, int32_t *codes)
{
    const forest_node node = tree[set.node];
    const ptrdiff_t offset = offsets[node.feature];
    const forest_item *from = walk->items[set.side];
    forest_item *to = walk->items[!set.side];
    ptrdiff_t front = set.lo;
    for (ptrdiff_t i = set.lo, rest = set.hi - 1 - set.lo; rest >= 0; i++, rest--) {
        forest_item item = from[i];
        to[front] = item;
        to[front + rest] = item; /* every item that went right brought the back one nearer */
        front += forest_voxel(voxels + (forest_place(item) + offset)) <= node.threshold;
    }
    forest_set right = {node.left + 1, !set.side, (int32_t)front, set.hi};
    forest_set left = {node.left, !set.side, set.lo, (int32_t)front};
    forest_settle(walk, tree, right, codes);
    forest_settle(walk, tree, left, codes);
}

/* Walk single positions to their leaves, one level of all of them per round. Those that are not at
   a leaf move up to the front; a code that is no leaf's is written over in a later round. */
static inline void forest_interleave(const forest_node *tree, const char *voxels,
                                     const ptrdiff_t *offsets, forest_item *items, int32_t *nodes,
                                     ptrdiff_t n, int32_t *codes)
{
    while (n > 0) {
        ptrdiff_t n_inside = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            forest_item item = items[i];
            forest_node node = tree[nodes[i]];
            int32_t right = forest_voxel(voxels + (forest_place(item) + offsets[node.feature]))
                            > node.threshold;
            codes[(uint16_t)item] = ~node.left;
            items[n_inside] = item;
            nodes[n_inside] = node.left + right;
            n_inside += node.left >= 0;
        }
        n = n_inside;
    }
}

/* Put n <= FOREST_CHUNK positions at the root, given their places in bytes from the first voxel. */
static inline void forest_start(forest_walk *walk, const ptrdiff_t *places, int32_t n)
{
    forest_item *items = walk->items[FOREST_ROOT];
    for (int32_t i = 0; i < n; i++) items[i] = forest_pack(places[i], (uint16_t)i);
}

/* codes[p] = the leaf of position p, for the n positions that were put at the root. */
static inline void forest_walk_tree(forest_walk *walk, const forest_node *tree, const char *voxels,
                                    const ptrdiff_t *offsets, int32_t n, int32_t *codes)
{
    forest_set all = {0, FOREST_ROOT, 0, n};
    walk->n_sets = walk->n_singles = 0;
    forest_settle(walk, tree, all, codes);
    while (walk->n_sets > 0) {
        forest_set set = walk->stack[--walk->n_sets];
        forest_part(walk, tree, voxels, offsets, set, codes);
    }
    for (int32_t i = 0; i < walk->n_singles; i += FOREST_LANES) {
        int32_t n_lanes = walk->n_singles - i;
        forest_interleave(tree, voxels, offsets, walk->singles + i, walk->nodes + i,
                          n_lanes < FOREST_LANES ? n_lanes : FOREST_LANES, codes);
    }
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

#endif
