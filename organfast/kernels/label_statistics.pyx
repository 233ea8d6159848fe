# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Statistics of a label map and of its connected components, in one pass each."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t

ctypedef fused label_t:
    uint8_t
    uint16_t


def label_statistics(
    const label_t[:, :, :] labels,
    const uint8_t[:, :, :] confidence,
    int64_t[::1] counts,
    int64_t[:, ::1] sums,
    int64_t[:, :, ::1] boxes,
    int64_t[::1] confidence_sums,
):
    """Count, sum and bound the voxels of each label, run by run along the last axis.

    labels          : (n_0, n_1, n_2) uint8 or uint16, any strides
    confidence      : same shape, uint8, any strides, or None
    counts          : (n_classes,) int64, added to
    sums            : (n_classes, 3) int64, sums of the three indices, added to
    boxes           : (n_classes, 3, 2) int64, half-open, widened; start at (large, 0)
    confidence_sums : (n_classes,) int64, added to where confidence is given
    returns the number of voxels whose label is beyond n_classes; these are left out
    """
    cdef Py_ssize_t n_0 = labels.shape[0], n_1 = labels.shape[1], n_2 = labels.shape[2]
    cdef Py_ssize_t n_classes = counts.shape[0]
    cdef Py_ssize_t a, b, c, start, label, length, n_beyond = 0
    cdef int64_t total
    cdef bint confident = confidence is not None
    with nogil:
        for a in range(n_0):
            for b in range(n_1):
                c = 0
                while c < n_2:
                    start = c
                    label = labels[a, b, c]
                    c += 1
                    while c < n_2 and labels[a, b, c] == label:
                        c += 1
                    length = c - start
                    if label >= n_classes:
                        n_beyond += length
                        continue
                    counts[label] += length
                    sums[label, 0] += a * length
                    sums[label, 1] += b * length
                    sums[label, 2] += (start + c - 1) * length // 2
                    boxes[label, 0, 0] = min(boxes[label, 0, 0], a)
                    boxes[label, 0, 1] = max(boxes[label, 0, 1], a + 1)
                    boxes[label, 1, 0] = min(boxes[label, 1, 0], b)
                    boxes[label, 1, 1] = max(boxes[label, 1, 1], b + 1)
                    boxes[label, 2, 0] = min(boxes[label, 2, 0], start)
                    boxes[label, 2, 1] = max(boxes[label, 2, 1], c)
                    if confident:
                        total = 0
                        for start in range(start, c):
                            total += confidence[a, b, start]
                        confidence_sums[label] += total
    return n_beyond


def component_statistics(
    const label_t[:, :, :] labels,
    const uint32_t[:, :, ::1] components,
    tuple origin,
    const int32_t[::1] column_of_label,
    int32_t[::1] sizes,
    uint16_t[::1] owners,
    int32_t[:, ::1] votes,
):
    """Size, label and surroundings of each connected component of a part of a label map.

    labels          : (n_k, n_i, n_j) uint8 or uint16, the whole map, any strides
    components      : (m_k, m_i, m_j) uint32, the part that begins at ``origin``; 0 is none
    column_of_label : (n_classes,) int32, column of ``votes`` of a label, or -1 for none
    sizes           : (n_components + 1,) int32, voxels, added to
    owners          : (n_components + 1,) uint16, label of the component
    votes           : (n_components + 1, n_columns) int32, faces shared with the labels that have
                      a column, added to
    """
    cdef Py_ssize_t k_0 = origin[0], i_0 = origin[1], j_0 = origin[2]
    cdef Py_ssize_t n_k = labels.shape[0], n_i = labels.shape[1], n_j = labels.shape[2]
    cdef Py_ssize_t k, i, j
    cdef uint32_t component
    cdef label_t label
    with nogil:
        for k in range(k_0, k_0 + components.shape[0]):
            for i in range(i_0, i_0 + components.shape[1]):
                for j in range(j_0, j_0 + components.shape[2]):
                    component = components[k - k_0, i - i_0, j - j_0]
                    if component == 0:
                        continue
                    label = labels[k, i, j]
                    sizes[component] += 1
                    owners[component] = label
                    if k > 0 and labels[k - 1, i, j] != label:
                        vote(votes, component, column_of_label[labels[k - 1, i, j]])
                    if k + 1 < n_k and labels[k + 1, i, j] != label:
                        vote(votes, component, column_of_label[labels[k + 1, i, j]])
                    if i > 0 and labels[k, i - 1, j] != label:
                        vote(votes, component, column_of_label[labels[k, i - 1, j]])
                    if i + 1 < n_i and labels[k, i + 1, j] != label:
                        vote(votes, component, column_of_label[labels[k, i + 1, j]])
                    if j > 0 and labels[k, i, j - 1] != label:
                        vote(votes, component, column_of_label[labels[k, i, j - 1]])
                    if j + 1 < n_j and labels[k, i, j + 1] != label:
                        vote(votes, component, column_of_label[labels[k, i, j + 1]])


cdef inline void vote(
    int32_t[:, ::1] votes, Py_ssize_t component, Py_ssize_t column
) noexcept nogil:
    if column >= 0:
        votes[component, column] += 1


def enclosing_labels(
    const label_t[:, :, :] labels,
    const uint32_t[:, :, ::1] components,
    Py_ssize_t first,
    const uint8_t[::1] is_organ,
    int32_t[::1] sizes,
    uint16_t[::1] lowest,
    uint16_t[::1] highest,
):
    """Lowest and highest organ that share a face with each component of voxels that are no organ.

    labels     : (n_k, n_i, n_j) uint8 or uint16, the whole map, any strides
    components : (m_k, n_i, n_j) uint32, the slices from ``first`` on; 0 is none
    is_organ   : (n_classes,) uint8, 1 for organs
    sizes      : (n_components + 1,) int32, voxels, added to
    lowest     : (n_components + 1,) uint16, lowered; to 0 where a component is at the map's border
    highest    : (n_components + 1,) uint16, raised; voxels at the map's border are left out
    """
    cdef Py_ssize_t n_k = labels.shape[0], n_i = labels.shape[1], n_j = labels.shape[2]
    cdef Py_ssize_t k, i, j, n
    cdef uint32_t component
    cdef label_t[6] near
    with nogil:
        for k in range(first, first + components.shape[0]):
            for i in range(n_i):
                for j in range(n_j):
                    component = components[k - first, i, j]
                    if component == 0:
                        continue
                    sizes[component] += 1
                    if k == 0 or k == n_k - 1 or i == 0 or i == n_i - 1 or j == 0 or j == n_j - 1:
                        lowest[component] = 0
                        continue
                    near[0] = labels[k - 1, i, j]
                    near[1] = labels[k + 1, i, j]
                    near[2] = labels[k, i - 1, j]
                    near[3] = labels[k, i + 1, j]
                    near[4] = labels[k, i, j - 1]
                    near[5] = labels[k, i, j + 1]
                    for n in range(6):
                        if is_organ[near[n]]:
                            lowest[component] = min(lowest[component], near[n])
                            highest[component] = max(highest[component], near[n])


def join_components(const int32_t[:, :] pairs, int32_t[::1] parents):
    """Union-find over components: afterwards ``parents[c]`` is the lowest component joined to c.

    pairs   : (n, 2) int32, components that are one
    parents : (n_components,) int32, ``parents[c] == c`` at first
    """
    cdef Py_ssize_t n
    cdef int32_t one, other
    with nogil:
        for n in range(pairs.shape[0]):
            one = root(parents, pairs[n, 0])
            other = root(parents, pairs[n, 1])
            if one < other:
                parents[other] = one
            else:
                parents[one] = other
        # A parent is never above its child, so that one ascending sweep flattens the trees.
        for n in range(parents.shape[0]):
            parents[n] = parents[parents[n]]


cdef inline int32_t root(int32_t[::1] parents, int32_t component) noexcept nogil:
    while parents[component] != component:
        parents[component] = parents[parents[component]]
        component = parents[component]
    return component
