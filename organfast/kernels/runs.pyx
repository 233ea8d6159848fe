# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A label map as runs along its rows: pieces, what surrounds and encloses them, rewriting.

Several planes (n_0, n_1, n_2) of a map have ``n_0 * n_1`` rows. Their runs are three arrays:

    stops  : (n_runs,) int32, column after the last one of each run
    labels : (n_runs,) uint16
    rows   : (n_0 * n_1 + 1,) int32, first run of each row; last, the number of runs

``first`` is 1 where the planes before it have been counted already, with another part of the map.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t

ctypedef fused label_t:
    uint8_t
    uint16_t


cdef extern from "runs.h" nogil:
    ptrdiff_t runs_stop(const char *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t)
    ctypedef struct runs_map:
        const int32_t *stops
        const uint16_t *labels
        const int32_t *rows
        ptrdiff_t n_planes
        ptrdiff_t n_rows
    int32_t runs_pieces(const runs_map *, const uint8_t *, int32_t *, int)
    ctypedef struct runs_votes:
        const int32_t *pieces
        const int32_t *column_of_label
        int64_t *votes
        ptrdiff_t n_columns
    void runs_count_votes(const runs_map *, ptrdiff_t, runs_votes *)
    ctypedef struct runs_enclosure:
        const int32_t *pieces
        uint16_t *lowest
        uint16_t *highest
    void runs_find_enclosing(const runs_map *, runs_enclosure *)


cdef inline runs_map map_of(
    const int32_t[::1] stops, const uint16_t[::1] labels, const int32_t[::1] rows, ptrdiff_t n_rows
) noexcept nogil:
    cdef runs_map whole
    whole.stops = &stops[0]
    whole.labels = &labels[0]
    whole.rows = &rows[0]
    whole.n_rows = n_rows
    whole.n_planes = (rows.shape[0] - 1) // n_rows
    return whole


def encode_runs(
    const label_t[:, :, :] planes, const uint16_t[::1] taken_for, int32_t[::1] stops,
    uint16_t[::1] labels, int32_t[::1] rows,
):
    """Write the runs of some planes, none of them empty; returns their number.

    planes    : (n_0, n_1, n_2) uint8 or uint16, any strides
    taken_for : (n_classes,) uint16, label that each label of the map becomes in the runs
    """
    cdef ptrdiff_t n_0 = planes.shape[0], n_1 = planes.shape[1], n = planes.shape[2]
    cdef ptrdiff_t step = planes.strides[2], a, b, c, run = 0
    cdef const char *row
    cdef uint16_t label
    with nogil:
        for a in range(n_0):
            for b in range(n_1):
                rows[a * n_1 + b] = <int32_t>run
                row = <const char *>&planes[a, b, 0]
                c = 0
                while c < n:
                    label = taken_for[planes[a, b, c]]
                    run -= c > 0 and label == labels[run - 1]  # which goes on
                    labels[run] = label
                    c = runs_stop(row, step, sizeof(label_t), c, n)
                    stops[run] = <int32_t>c
                    run += 1
        rows[n_0 * n_1] = <int32_t>run
    return run


def join_runs(
    const int32_t[::1] stops, const uint16_t[::1] labels, const int32_t[::1] rows,
    Py_ssize_t n_rows, const uint8_t[::1] sought, bint corners, int32_t[::1] pieces,
):
    """Number the pieces: connected runs of one label, by their first runs; returns how many.

    n_rows  : rows of a plane
    sought  : (n_classes,) uint8, 1 for labels that make up pieces
    corners : connected through faces, edges and corners (26), or through faces alone (6)
    pieces  : (n_runs,) int32, written; -1 is none
    """
    cdef runs_map whole = map_of(stops, labels, rows, n_rows)
    cdef int32_t n
    with nogil:
        n = runs_pieces(&whole, &sought[0], &pieces[0], corners)
    return n


def piece_sizes(
    const int32_t[::1] stops, const int32_t[::1] rows, Py_ssize_t n_rows, Py_ssize_t first,
    const int32_t[::1] pieces, int64_t[::1] sizes,
):
    """Voxels of each piece from plane ``first`` on.

    sizes : (n_pieces,) int64, added to
    """
    cdef Py_ssize_t row, run, start, stop
    with nogil:
        for row in range(first * n_rows, rows.shape[0] - 1):
            stop = 0
            for run in range(rows[row], rows[row + 1]):
                start = stop
                stop = stops[run]
                if pieces[run] >= 0:
                    sizes[pieces[run]] += stop - start


def piece_origins(
    const int32_t[::1] stops, const uint16_t[::1] labels, const int32_t[::1] rows,
    Py_ssize_t n_rows, const int32_t[::1] pieces, tuple order, uint16_t[::1] owners,
    int64_t[::1] earliest,
):
    """Label of each piece and where it begins, however the axes turn.

    order    : (of the first voxel, and one more for each plane, row, column): place of a voxel
    owners   : (n_pieces,) uint16, label of one of its runs
    earliest : (n_pieces,) int64, lowest place of its voxels, lowered
    """
    cdef Py_ssize_t row, run, start, stop
    cdef int64_t origin = order[0], by_plane = order[1], by_row = order[2], by_column = order[3]
    cdef int64_t place
    cdef int32_t piece
    with nogil:
        for row in range(rows.shape[0] - 1):
            stop = 0
            for run in range(rows[row], rows[row + 1]):
                start = stop
                stop = stops[run]
                piece = pieces[run]
                if piece < 0:
                    continue
                place = origin + row // n_rows * by_plane + row % n_rows * by_row
                place += by_column * (start if by_column > 0 else stop - 1)
                owners[piece] = labels[run]
                earliest[piece] = min(earliest[piece], place)


def surrounding_labels(
    const int32_t[::1] stops, const uint16_t[::1] labels, const int32_t[::1] rows,
    Py_ssize_t n_rows, Py_ssize_t first, const int32_t[::1] pieces,
    const int32_t[::1] column_of_label, int64_t[:, ::1] votes,
):
    """Voxel faces that each piece shares with labels that belong to no piece.

    column_of_label : (n_classes,) int32, column of ``votes`` of a label, or -1 for none
    votes           : (n_pieces, n_columns) int64, added to
    """
    cdef runs_map whole = map_of(stops, labels, rows, n_rows)
    cdef runs_votes state
    state.pieces = &pieces[0]
    state.column_of_label = &column_of_label[0]
    state.votes = &votes[0, 0] if votes.shape[0] * votes.shape[1] else NULL
    state.n_columns = votes.shape[1]
    with nogil:
        runs_count_votes(&whole, first, &state)


def enclosing_labels(
    const int32_t[::1] stops, const uint16_t[::1] labels, const int32_t[::1] rows,
    Py_ssize_t n_rows, const int32_t[::1] pieces, tuple ends, uint16_t[::1] lowest,
    uint16_t[::1] highest,
):
    """Lowest and highest label of no piece that shares a face with each piece.

    ends    : whether the first and the last of the planes are the map's
    lowest  : (n_pieces,) uint16, lowered; to 0 where a piece is at the map's border
    highest : (n_pieces,) uint16, raised
    """
    cdef runs_map whole = map_of(stops, labels, rows, n_rows)
    cdef runs_enclosure state
    cdef Py_ssize_t row, run, plane, i
    cdef bint at_first = ends[0], at_last = ends[1]
    state.pieces = &pieces[0]
    state.lowest = &lowest[0] if lowest.shape[0] else NULL
    state.highest = &highest[0] if highest.shape[0] else NULL
    with nogil:
        runs_find_enclosing(&whole, &state)
        for row in range(whole.n_planes * n_rows):
            plane = row // n_rows
            i = row % n_rows
            if (
                i == 0 or i == n_rows - 1 or (at_first and plane == 0)
                or (at_last and plane == whole.n_planes - 1)
            ):
                for run in range(rows[row], rows[row + 1]):
                    open_piece(pieces[run], lowest)
            else:
                open_piece(pieces[rows[row]], lowest)
                open_piece(pieces[rows[row + 1] - 1], lowest)


cdef inline void open_piece(int32_t piece, uint16_t[::1] lowest) noexcept nogil:
    if piece >= 0:
        lowest[piece] = 0


def rewrite_runs(
    const int32_t[::1] stops, const int32_t[::1] rows, Py_ssize_t first,
    const int32_t[::1] pieces, const int32_t[::1] becomes, label_t[:, :, :] planes,
):
    """Give the voxels of pieces another label, from plane ``first`` on.

    becomes : (n_pieces,) int32, label, or -1 to leave a piece
    planes  : (n_0, n_1, n_2) uint8 or uint16, any strides, written
    """
    cdef Py_ssize_t n_1 = planes.shape[1], a, b, c, run, start, stop
    cdef int32_t label
    with nogil:
        for a in range(first, planes.shape[0]):
            for b in range(n_1):
                stop = 0
                for run in range(rows[a * n_1 + b], rows[a * n_1 + b + 1]):
                    start = stop
                    stop = stops[run]
                    if pieces[run] < 0:
                        continue
                    label = becomes[pieces[run]]
                    if label < 0:
                        continue
                    for c in range(start, stop):
                        planes[a, b, c] = <label_t>label


def join_pieces(const int32_t[:, :] pairs, int32_t[::1] parents):
    """Union-find over pieces: afterwards ``parents[p]`` is the lowest piece joined to p.

    pairs   : (n, 2) int32, pieces that are one
    parents : (n_pieces,) int32, ``parents[p] == p`` at first
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


cdef inline int32_t root(int32_t[::1] parents, int32_t piece) noexcept nogil:
    while parents[piece] != piece:
        parents[piece] = parents[parents[piece]]
        piece = parents[piece]
    return piece
