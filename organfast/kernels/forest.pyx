# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The walk of a forest over a slab, checked by ``organfast.models.forest``."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t


cdef extern from "forest.h" nogil:
    enum:
        FOREST_CHUNK

    ctypedef struct forest_node:
        int16_t threshold
        uint16_t feature
        int32_t left

    ctypedef struct forest_walk:
        pass

    void forest_start(forest_walk *, const ptrdiff_t *, int32_t)
    void forest_walk_tree(forest_walk *, const forest_node *, const char *, const ptrdiff_t *,
                          int32_t, int32_t *)
    void forest_add_leaves(const int32_t *, int32_t, const double *, ptrdiff_t, double *)


CHUNK = FOREST_CHUNK

ctypedef fused probability:
    float
    double


def walk_forest(
    const forest_node[::1] nodes,
    const int64_t[::1] tree_starts,
    const double[:, ::1] leaf_table,
    const int16_t[:, :, :, :] slab,
    const ptrdiff_t[::1] reads,
    const int32_t[:, :] positions,
    double[:, ::1] sums,
    probability[:, :] out,
):
    """``out[p, class]`` = mean over the trees of the distribution in the leaf of position p.

    ``tree_starts`` (n_trees + 1,) indexes ``nodes``; ``left`` of a node counts from its tree's
    start. ``reads`` (n_features,): bytes from a position to what each feature reads.
    ``positions`` (n, 3): (k, i, j) in ``slab`` (L, K, R, C). ``sums`` (at most CHUNK, n_classes) is
    scratch: its length is how many positions are walked together.
    """
    cdef ptrdiff_t n = positions.shape[0], n_classes = out.shape[1]
    cdef ptrdiff_t n_trees = tree_starts.shape[0] - 1
    cdef ptrdiff_t size = sums.shape[0], chunk, first, n_here, p, c, t
    cdef const double *table = NULL
    cdef const char *voxels
    cdef forest_walk walk
    cdef ptrdiff_t[FOREST_CHUNK] places
    cdef int32_t[FOREST_CHUNK] codes
    if n == 0:
        return
    if leaf_table.shape[0]:
        table = &leaf_table[0, 0]
    voxels = <const char *>&slab[0, 0, 0, 0]
    with nogil:
        for chunk in range((n + size - 1) // size):
            first = chunk * size
            n_here = min(size, n - first)
            for p in range(n_here):
                places[p] = (
                    positions[first + p, 0] * slab.strides[1]
                    + positions[first + p, 1] * slab.strides[2]
                    + positions[first + p, 2] * slab.strides[3]
                )
            forest_start(&walk, places, <int32_t>n_here)
            sums[:n_here] = 0
            for t in range(n_trees):
                forest_walk_tree(&walk, &nodes[tree_starts[t]], voxels, &reads[0],
                                 <int32_t>n_here, codes)
                forest_add_leaves(codes, <int32_t>n_here, table, n_classes, &sums[0, 0])
            for p in range(n_here):
                for c in range(n_classes):
                    out[first + p, c] = <probability>(sums[p, c] / n_trees)
