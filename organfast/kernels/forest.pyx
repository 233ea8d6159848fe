# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The walk of a forest over a slab, checked by ``organfast.models.forest``."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint64_t
from libc.string cimport memset


cdef extern from "forest_tile.h" nogil:
    enum:
        FOREST_CHUNK
        FOREST_TILE

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
    int32_t forest_gather_chunk(forest_walk *, int32_t)
    void forest_add_trees(forest_walk *, const forest_trees *, ptrdiff_t, ptrdiff_t, double *)
    void forest_leave(forest_walk *, const forest_trees *, double, double, double *, char *,
                      ptrdiff_t)

    ctypedef struct forest_band:
        pass

    ctypedef struct forest_positions:
        const char *first
        ptrdiff_t n
        ptrdiff_t step
        ptrdiff_t axis
        ptrdiff_t strides[3]

    ctypedef struct forest_tile:
        ptrdiff_t rows[64]
        uint64_t live
        forest_band band

    ctypedef void forest_tile_walk(forest_tile *, const forest_trees *, const int16_t *,
                                   ptrdiff_t, int32_t)

    forest_tile_walk *forest_tile_path_at(int)
    int forest_next_tile(forest_tile *, const forest_positions *)
    void forest_stage(const forest_tile *, const forest_trees *, ptrdiff_t, int16_t *)
    void forest_tile_add_trees(forest_tile *, const forest_trees *, const int16_t *,
                               forest_tile_walk *, ptrdiff_t, ptrdiff_t, double *)
    void forest_tile_leave(forest_tile *, const forest_trees *, double, double, const double *,
                           char *, ptrdiff_t)
    int popcount "__builtin_popcountll"(uint64_t)
    int lowest "__builtin_ctzll"(uint64_t)


forest_fill_lane_order()
CHUNK = FOREST_CHUNK
TILE = FOREST_TILE
WALK_BYTES = max(sizeof(forest_walk), sizeof(forest_tile))
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
    const int16_t[:, :, :, :] slab,
    const int32_t[:, :] positions,
    ptrdiff_t first,
    ptrdiff_t size,
) noexcept nogil:
    """Put positions from ``first`` on at the root; how many, is returned."""
    cdef ptrdiff_t n = min(size, positions.shape[0] - first), p
    for p in range(n):
        walk.places[p] = (
            positions[first + p, 0] * slab.strides[1]
            + positions[first + p, 1] * slab.strides[2]
            + positions[first + p, 2] * slab.strides[3]
        )
    return forest_gather_chunk(walk, <int32_t>n)


cdef forest_trees as_trees(
    const forest_node[::1] nodes,
    const int64_t[::1] tree_starts,
    const double[:, ::1] leaf_table,
    const int16_t[:, :, :, :] slab,
    const ptrdiff_t[::1] reads,
    ptrdiff_t n_classes,
) noexcept nogil:
    """The arguments as the loops take them."""
    cdef forest_trees trees
    trees.nodes, trees.starts, trees.n_classes = &nodes[0], &tree_starts[0], n_classes
    trees.leaf_table = &leaf_table[0, 0] if leaf_table.shape[0] else NULL
    trees.voxels, trees.offsets = <const char *>&slab[0, 0, 0, 0], &reads[0]
    return trees


cdef forest_positions as_positions(
    const int32_t[:, :] positions, const int16_t[:, :, :, :] slab
) noexcept nogil:
    cdef forest_positions asked
    cdef int axis
    asked.first, asked.n = <const char *>&positions[0, 0], positions.shape[0]
    asked.step, asked.axis = positions.strides[0], positions.strides[1]
    for axis in range(3):
        asked.strides[axis] = slab.strides[axis + 1]
    return asked


def walk_forest(
    const forest_node[::1] nodes,
    const int64_t[::1] tree_starts,
    const double[:, ::1] leaf_table,
    const int16_t[:, :, :, :] slab,
    const ptrdiff_t[::1] reads,
    const int32_t[:, :] positions,
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

    ``staged`` (n_features, TILE): where features are copied to for a walk in tiles; without rows
    larger sets of positions are walked, and the slab itself is read. ``scratch``: WALK_BYTES.
    ``sums`` (n, n_classes): scratch, too. With ``staged`` n is TILE, else at most CHUNK, and how
    many positions are walked together at most. ``path`` counts in PATHS.
    """
    cdef ptrdiff_t n = positions.shape[0], n_classes = out.shape[1]
    cdef ptrdiff_t n_trees = tree_starts.shape[0] - 1
    cdef ptrdiff_t first = 0, n_here, p, c
    cdef forest_trees trees = as_trees(nodes, tree_starts, leaf_table, slab, reads, n_classes)
    cdef forest_positions asked = as_positions(positions, slab)
    cdef forest_walk *walk = <forest_walk *>&scratch[0]
    cdef forest_tile *tile = <forest_tile *>&scratch[0]
    cdef uint64_t live
    with nogil:
        if staged.shape[0]:
            memset(&tile.band, 0, sizeof(forest_band))
            while forest_next_tile(tile, &asked):
                forest_stage(tile, &trees, reads.shape[0], &staged[0, 0])
                sums[:] = 0
                forest_tile_add_trees(tile, &trees, &staged[0, 0], forest_tile_path_at(path), 0,
                                      n_trees, &sums[0, 0])
                live = tile.live
                while live:
                    p = lowest(live)
                    for c in range(n_classes):
                        out[tile.rows[p], c] = <probability>(sums[p, c] / n_trees)
                    live &= live - 1
            first = n
        walk.path = forest_path_at(path)
        while first < n:
            n_here = next_chunk(walk, slab, positions, first, sums.shape[0])
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
    int16_t[:, ::1] staged,
    unsigned char[::1] scratch,
    double[:, ::1] sums,
    int path,
    uint16_t[:] out,
    ptrdiff_t n_between,
):
    """``out[p]`` = argmax of what ``walk_forest`` gives position p; how many trees were walked.

    From half the trees on, every ``n_between`` trees, positions whose label is certain leave their
    tile, or their chunk if they are a third of it.
    """
    cdef ptrdiff_t n = positions.shape[0], n_trees = tree_starts.shape[0] - 1
    cdef ptrdiff_t first = 0, n_here, done, last, n_walks = 0
    cdef double enough
    cdef forest_trees trees = as_trees(nodes, tree_starts, leaf_table, slab, reads, sums.shape[1])
    cdef forest_positions asked = as_positions(positions, slab)
    cdef forest_walk *walk = <forest_walk *>&scratch[0]
    cdef forest_tile *tile = <forest_tile *>&scratch[0]
    with nogil:
        if staged.shape[0]:
            memset(&tile.band, 0, sizeof(forest_band))
            while forest_next_tile(tile, &asked):
                forest_stage(tile, &trees, reads.shape[0], &staged[0, 0])
                sums[:] = 0
                done = 0
                while tile.live:
                    last = next_exit(done, n_trees, n_between)
                    forest_tile_add_trees(tile, &trees, &staged[0, 0], forest_tile_path_at(path),
                                          done, last, &sums[0, 0])
                    n_walks += popcount(tile.live) * (last - done)
                    done = last
                    forest_tile_leave(tile, &trees, enough_at(done, n_trees), <double>n_trees,
                                      &sums[0, 0], <char *>&out[0], out.strides[0])
            first = n
        walk.path = forest_path_at(path)
        while first < n:
            n_here = next_chunk(walk, slab, positions, first, sums.shape[0])
            sums[:n_here] = 0
            done = 0
            while walk.n > 0:
                last = next_exit(done, n_trees, n_between)
                forest_add_trees(walk, &trees, done, last, &sums[0, 0])
                n_walks += walk.n * (last - done)
                done = last
                forest_leave(walk, &trees, enough_at(done, n_trees), <double>n_trees, &sums[0, 0],
                             <char *>&out[first], out.strides[0])
            first += n_here
    return n_walks


cdef ptrdiff_t next_exit(ptrdiff_t done, ptrdiff_t n_trees, ptrdiff_t n_between) noexcept nogil:
    return min(n_trees, max(n_trees // 2 + 1, done + n_between))


cdef double enough_at(ptrdiff_t done, ptrdiff_t n_trees) noexcept nogil:
    """The margin from which on a label is certain; at the end every margin is enough."""
    return (n_trees - done) + 0.5 + 2e-6 * n_trees if done < n_trees else -1
