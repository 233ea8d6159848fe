/* The walk of a tile through a group of trees, included by forest_tile.h once for each kind of
   processor: FOREST_WALK is its name, FOREST_ABOVE compares 64 voxels, FOREST_TARGET lets that be
   inlined. */

FOREST_TARGET static void FOREST_WALK(forest_tile *tile, const forest_trees *trees,
                                      const int16_t *staged, ptrdiff_t first, int32_t n)
{
    const forest_node *of_tree[FOREST_GROUP];
    forest_sets *from = &tile->rounds[0], *to = &tile->rounds[1], *leaves = &tile->leaves;
    ptrdiff_t n_stops = n, n_leaves = 0;
    for (int32_t t = 0; t < n; t++) {
        of_tree[t] = trees->nodes + trees->starts[first + t];
        from->sets[t] = tile->live;
        from->stops[t] = (uint64_t)t << 32;
        __builtin_prefetch(of_tree[t]);
    }
    while (n_stops > 0) {
        ptrdiff_t n_next = 0;
        for (ptrdiff_t s = 0; s < n_stops; s++) {
            uint64_t set = from->sets[s], stop = from->stops[s];
            const forest_node *nodes = of_tree[stop >> 32];
            const forest_node node = nodes[(uint32_t)stop];
            uint64_t above = FOREST_ABOVE(staged + (size_t)node.feature * FOREST_TILE,
                                          node.threshold);
            uint64_t right = set & above, left = set & ~above, is_inner = node.left >= 0;
            uint64_t in_tree = stop >> 32 << 32, child = in_tree + (uint32_t)node.left;
            __builtin_prefetch(nodes + node.left);
            leaves->sets[n_leaves] = set;
            leaves->stops[n_leaves] = in_tree + (uint32_t)~node.left;
            n_leaves += !is_inner;
            to->sets[n_next] = left;
            to->stops[n_next] = child;
            n_next += is_inner & (left != 0);
            to->sets[n_next] = right;
            to->stops[n_next] = child + 1;
            n_next += is_inner & (right != 0);
        }
        forest_sets *done = from;
        from = to;
        to = done;
        n_stops = n_next;
    }
    for (ptrdiff_t l = 0; l < n_leaves; l++) {
        int32_t *codes = tile->codes[leaves->stops[l] >> 32], code = (int32_t)leaves->stops[l];
        for (uint64_t set = leaves->sets[l]; set; set &= set - 1)
            codes[__builtin_ctzll(set)] = code;
    }
}

#undef FOREST_WALK
#undef FOREST_ABOVE
#undef FOREST_TARGET
