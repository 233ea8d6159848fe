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

    ctypedef struct forest_trees:
        const forest_node *nodes
        const int64_t *starts
        const double *leaf_table
        const char *voxels
        const ptrdiff_t *offsets
        ptrdiff_t n_classes

    ctypedef struct forest_path:
        pass

    ctypedef struct forest_walk:
        ptrdiff_t *places
        forest_path path
        int32_t n

    int forest_has_path(int)
    forest_path forest_path_at(int)
    void forest_fill_lane_order()
    void forest_stage(forest_walk *, const char *, const ptrdiff_t *, ptrdiff_t, int16_t *,
                      ptrdiff_t, int32_t)
    int32_t forest_gather_chunk(forest_walk *, int32_t)
    void forest_add_trees(forest_walk *, const forest_trees *, ptrdiff_t, ptrdiff_t, double *)
    void forest_leave(forest_walk *, const forest_trees *, double, double, double *, char *,
                      ptrdiff_t)


forest_fill_lane_order()
CHUNK = FOREST_CHUNK
WALK_BYTES = sizeof(forest_walk)
PATHS = tuple(
    name
    for path, name in enumerate(("scalar", "x86-64-v3", "x86-64-v4"))
    if forest_has_path(path)
)

ctypedef fused probability:
    float
    double


cdef int32_t next_chunk(
    forest_walk *walk,
    forest_trees *trees,
    const int16_t[:, :, :, :] slab,
    const ptrdiff_t[::1] reads,
    const int32_t[:, :] positions,
    ptrdiff_t first,
    ptrdiff_t size,
    const ptrdiff_t[::1] staged_reads,
    int16_t[:, ::1] staged,
) noexcept nogil:
    """Put positions from ``first`` on at the root; how many, is returned."""
    cdef ptrdiff_t n = min(size, positions.shape[0] - first), p
    trees.voxels = <const char *>&slab[0, 0, 0, 0]
    trees.offsets = &reads[0]
    for p in range(n):
        walk.places[p] = (
            positions[first + p, 0] * slab.strides[1]
            + positions[first + p, 1] * slab.strides[2]
            + positions[first + p, 2] * slab.strides[3]
        )
    if staged.shape[0]:
        n = min(n, staged.shape[1])
        forest_stage(walk, trees.voxels, trees.offsets, staged.shape[0], &staged[0, 0],
                     staged.shape[1], <int32_t>n)
        trees.voxels = <const char *>&staged[0, 0]
        trees.offsets = &staged_reads[0]
    return forest_gather_chunk(walk, <int32_t>n)


def walk_forest(
    const forest_node[::1] nodes,
    const int64_t[::1] tree_starts,
    const double[:, ::1] leaf_table,
    const int16_t[:, :, :, :] slab,
    const ptrdiff_t[::1] reads,
    const int32_t[:, :] positions,
    const ptrdiff_t[::1] staged_reads,
    int16_t[:, ::1] staged,
    unsigned char[::1] scratch,
    double[:, ::1] sums,
    int path,
    probability[:, :] out,
):
    """``out[p, class]`` = mean over the trees of the distribution in the leaf of position p.

    ``tree_starts`` (n_trees + 1,) indexes ``nodes``; ``left`` of a node counts from its tree's
    start. ``reads`` (n_features,): bytes from a position to what each feature reads.
    ``positions`` (n, 3): (k, i, j) in ``slab`` (L, K, R, C).

    ``staged`` (n_features, at most CHUNK): where features are copied to before the walk, and
    ``staged_reads`` the bytes to each of its rows; without rows the slab itself is read.
    ``scratch``: WALK_BYTES. ``sums`` (at most CHUNK, n_classes): scratch, too; its length is how
    many positions are walked together at most. ``path`` counts in PATHS.
    """
    cdef ptrdiff_t n = positions.shape[0], n_classes = out.shape[1]
    cdef ptrdiff_t n_trees = tree_starts.shape[0] - 1
    cdef ptrdiff_t first = 0, n_here, p, c
    cdef forest_trees trees
    cdef forest_walk *walk = <forest_walk *>&scratch[0]
    trees.nodes, trees.starts, trees.n_classes = &nodes[0], &tree_starts[0], n_classes
    trees.leaf_table = &leaf_table[0, 0] if leaf_table.shape[0] else NULL
    walk.path = forest_path_at(path)
    with nogil:
        while first < n:
            n_here = next_chunk(walk, &trees, slab, reads, positions, first, sums.shape[0],
                                staged_reads, staged)
            sums[:n_here] = 0
            forest_add_trees(walk, &trees, 0, n_trees, &sums[0, 0])
            for p in range(n_here):
                for c in range(n_classes):
                    out[first + p, c] = <probability>(sums[p, c] / n_trees)
            first += n_here


def label_forest(
    const forest_node[::1] nodes,
    const int64_t[::1] tree_starts,
    const double[:, ::1] leaf_table,
    const int16_t[:, :, :, :] slab,
    const ptrdiff_t[::1] reads,
    const int32_t[:, :] positions,
    const ptrdiff_t[::1] staged_reads,
    int16_t[:, ::1] staged,
    unsigned char[::1] scratch,
    double[:, ::1] sums,
    int path,
    uint16_t[:] out,
    ptrdiff_t n_between,
):
    """``out[p]`` = argmax of what ``walk_forest`` gives position p; how many trees were walked.

    From half the trees on, every ``n_between`` trees, positions whose label is certain leave their
    chunk if they are a third of it.
    """
    cdef ptrdiff_t n = positions.shape[0], n_trees = tree_starts.shape[0] - 1
    cdef ptrdiff_t first = 0, n_here, done, last, n_walks = 0
    cdef double enough
    cdef forest_trees trees
    cdef forest_walk *walk = <forest_walk *>&scratch[0]
    trees.nodes, trees.starts, trees.n_classes = &nodes[0], &tree_starts[0], sums.shape[1]
    trees.leaf_table = &leaf_table[0, 0] if leaf_table.shape[0] else NULL
    walk.path = forest_path_at(path)
    with nogil:
        while first < n:
            n_here = next_chunk(walk, &trees, slab, reads, positions, first, sums.shape[0],
                                staged_reads, staged)
            sums[:n_here] = 0
            done = 0
            while walk.n > 0:
                last = min(n_trees, max(n_trees // 2 + 1, done + n_between))
                forest_add_trees(walk, &trees, done, last, &sums[0, 0])
                n_walks += walk.n * (last - done)
                done = last
                # Certain, or at the end: every margin is enough.
                enough = (n_trees - done) + 0.5 + 2e-6 * n_trees if done < n_trees else -1
                forest_leave(walk, &trees, enough, <double>n_trees, &sums[0, 0],
                             <char *>&out[first], out.strides[0])
            first += n_here
    return n_walks
