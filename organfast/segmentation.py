"""From a raw label map to a clean one: what each label covers, its components, dust and holes.

Arrays are in working order (k, i, j) and may be strided views; a clean map is written in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.kernels.label_statistics import clear_labels, label_statistics
from organfast.kernels.runs import (
    enclosing_labels,
    encode_runs,
    join_pieces,
    join_runs,
    piece_origins,
    piece_sizes,
    rewrite_runs,
    surrounding_labels,
)

__all__ = ["Cleaning", "LabelStatistics", "clean", "keep_labels", "measure_labels"]

Labels = NDArray[np.uint8] | NDArray[np.uint16]
Box = tuple[slice, slice, slice]

# Pieces are found slab by slab: so many runs take 10 bytes each, and their pieces no more than 50,
# whatever the size of the scan.
_SLAB_RUNS = 2_097_152
_CONNECTIVITY = 26
# What bounds a 26-connected component is 6-connected: no void leaks out over a corner.
_VOID_CONNECTIVITY = 6


@dataclass(frozen=True)
class Cleaning:
    """What a raw label map is rid of.

    Parameters
    ----------
    keep : {"largest", "parts", "dust", "none"} or None
        ``"largest"`` keeps the component with most voxels of each organ (of equal ones the first
        in working order), ``"parts"`` also those of at least ``least_part`` of its voxels,
        ``"dust"`` those of at least ``dust_ml``, ``"none"`` all: no clean-up of components. The
        largest component is never removed: whether an organ is there at all is decided when it is
        measured. None keeps parts where an atlas has ruled out what lies astray, and the largest
        alone elsewhere.
    dust_ml : float, ml
        Smallest component that is no dust.
    fill_holes : bool
        Holes inside an organ become the organ, unless they touch another organ too.
    least_part : float
        Smallest component, as a share of the organ's largest, that is part of the organ.

    Raises
    ------
    ValueError
        ``keep`` is unknown, ``dust_ml`` is negative or ``least_part`` is no share.
    """

    keep: Literal["largest", "parts", "dust", "none"] | None = None
    dust_ml: float = 0.5
    fill_holes: bool = True
    least_part: float = 0.5

    def __post_init__(self) -> None:
        if self.keep not in ("largest", "parts", "dust", "none", None):
            raise ValueError(f"keep {self.keep!r} is unknown; use largest, parts, dust or none")
        if not 0 < self.least_part <= 1:
            raise ValueError(f"least_part {self.least_part} is no share; use above 0, at most 1")
        if not self.dust_ml >= 0:
            raise ValueError(f"dust_ml {self.dust_ml} is negative; use 0 ml or more")

    def settled(self, *, in_atlas: bool) -> Cleaning:
        """The same with what to keep said.

        Parameters
        ----------
        in_atlas : bool
            Whether organs were ruled out by an atlas.
        """
        if self.keep is not None:
            return self
        return replace(self, keep="parts" if in_atlas else "largest")


@dataclass(frozen=True, eq=False)
class LabelStatistics:
    """What each label of a map covers.

    Parameters
    ----------
    counts : (n_classes,) int64
        Voxels.
    sums : (n_classes, 3) int64
        Sums of the voxels' (k, i, j).
    boxes : (n_classes, 3, 2) int64
        Half-open bounding boxes; zeros where a label does not occur.
    confidence_sums : (n_classes,) int64 or None
        Sums of the voxels' confidence, 255 = certain.
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.int64]
    boxes: NDArray[np.int64]
    confidence_sums: NDArray[np.int64] | None

    def hull(self, labels: Sequence[int]) -> Box:
        """The smallest box around all of some labels that occur."""
        starts = self.boxes[labels, :, 0].min(axis=0)
        stops = self.boxes[labels, :, 1].max(axis=0)
        k, i, j = (slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True))
        return k, i, j


def measure_labels(
    labels: Labels, n_classes: int, confidence: NDArray[np.uint8] | None = None
) -> LabelStatistics:
    """Count, sum and bound the voxels of every label in one pass.

    Parameters
    ----------
    labels : (n_k, n_i, n_j) uint8 or uint16
        Any strides; the pass runs along memory.
    n_classes : int
        Labels are below this.
    confidence : (n_k, n_i, n_j) uint8, optional
        255 = certain.

    Raises
    ------
    ValueError
        The map is not 3-D uint8 or uint16, a label is not below ``n_classes``, or the confidence
        is not a uint8 map of the same shape.
    """
    _check_labels(labels)
    if confidence is not None and (
        confidence.shape != labels.shape or confidence.dtype != np.uint8
    ):
        raise ValueError(
            f"confidence of shape {confidence.shape}, {confidence.dtype}, does not fit labels of "
            f"shape {labels.shape}; give a uint8 map of that shape"
        )
    memory = _Memory.of(labels)
    along = memory.along(labels)
    found, _ = _measure(along, n_classes, None if confidence is None else memory.along(confidence))
    boxes, sums = found.boxes, found.sums
    for axis, is_flipped in enumerate(memory.flipped):
        if is_flipped:
            n = along.shape[axis]
            sums[:, axis] = found.counts * (n - 1) - sums[:, axis]
            boxes[:, axis] = n - boxes[:, axis, ::-1]
    boxes[found.counts == 0] = 0
    back = np.argsort(memory.axes)
    return LabelStatistics(found.counts, sums[:, back], boxes[:, back], found.confidence_sums)


def keep_labels(labels: Labels, kept: Iterable[int]) -> None:
    """Turn every label but some into background, in place.

    Parameters
    ----------
    labels : (n_k, n_i, n_j) uint8 or uint16
        Any strides; written.
    kept : iterable of int
        Labels that stay.

    Raises
    ------
    ValueError
        The map is not 3-D uint8 or uint16, or is read-only.
    """
    _check_labels(labels)
    if not labels.flags.writeable:
        raise ValueError("labels are read-only; they are changed in place, so give a writable map")
    is_kept = np.zeros(np.iinfo(labels.dtype).max + 1, np.uint8)
    is_kept[list(kept)] = 1
    clear_labels(_Memory.of(labels).along(labels), is_kept)


def clean(
    labels: Labels, classes: ClassTable, cleaning: Cleaning, voxel_ml: float
) -> dict[str, Any]:
    """Remove false islands of organs from a label map and fill the organs' holes, in place.

    Only organs are cleaned. Components are 26-connected voxels of one label. A removed component
    becomes what surrounds it: of the classes that are no organ the one with which it shares most
    voxel faces on the map as it came, of equal ones the table's context class, then the lowest
    label. A component that touches organs alone becomes the table's context class (background
    where the table has none), and with ``fill_holes`` then the organ around it, if that is one.

    A hole is a 6-connected component of voxels that are no organ, whatever their labels, that
    does not reach the border of the map and shares faces with one organ only; it becomes that
    organ. What two organs enclose together stays, and so does what an organ encloses together
    with an island of another organ. Holes are found once, after all components are judged, for
    all organs at a time.

    Rows of voxels that lie beside each other in memory are read as runs of one label. Beside the
    map, memory is needed for one slab of runs and some 60 bytes for each component, whatever
    islands are spread over the scan.

    Parameters
    ----------
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order, any strides; written.
    classes : ClassTable
        What the labels mean.
    cleaning : Cleaning
        What to remove; where it does not say what to keep, the largest components.
    voxel_ml : float, ml
        Volume of one voxel.

    Returns
    -------
    dict
        The parameters and, for every organ that was there, ``removed_components``,
        ``removed_voxels`` and ``filled_voxels``; fit for JSON.

    Raises
    ------
    ValueError
        The map is not 3-D uint8 or uint16, is read-only, has labels beyond the table, or
        ``voxel_ml`` is not positive.
    """
    _check_labels(labels)
    if not labels.flags.writeable:
        raise ValueError("labels are read-only; cleaning writes in place, so give a writable map")
    if not voxel_ml > 0:
        raise ValueError(f"voxel_ml {voxel_ml} is not positive; give the volume of a voxel in ml")
    cleaning = cleaning.settled(in_atlas=False)
    memory = _Memory.of(labels)
    along = memory.along(labels)
    statistics, n_runs = _measure(along, len(classes), None)
    organs = [label for label in classes.organs if statistics.counts[label]]
    changes = np.zeros((len(classes), 3), np.int64)
    if cleaning.keep != "none" and organs:
        # One voxel more: what surrounds the organs.
        part = _Part.around(along, statistics.hull(organs), n_runs, margin=1)
        changes[:, :2] = _remove_components(part, classes, memory.order, cleaning, voxel_ml)
    if cleaning.fill_holes and organs:
        # Removal leaves no organ beyond the hull of the map as it came.
        part = _Part.around(along, statistics.hull(organs), n_runs, margin=0)
        changes[:, 2] = _fill_holes(part, classes)
    names = ("removed_components", "removed_voxels", "filled_voxels")
    return {
        **asdict(cleaning),
        "connectivity": _CONNECTIVITY,
        "organs": {
            classes.names[label]: dict(zip(names, changes[label].tolist(), strict=True))
            for label in organs
        },
    }


@dataclass(frozen=True)
class _Memory:
    """How a map lies in memory: its axes, the one whose voxels lie closest last, ascending."""

    axes: tuple[int, ...]  # working axis of each
    flipped: tuple[bool, ...]
    order: tuple[int, ...]  # how much later in working order the next voxel along each comes

    @staticmethod
    def of(labels: Labels) -> _Memory:
        strides = np.array(labels.strides)
        axes = np.argsort(-abs(strides), kind="stable")
        flipped = strides[axes] < 0
        _, n_i, n_j = labels.shape
        order = np.array([n_i * n_j, n_j, 1])[axes] * np.where(flipped, -1, 1)
        return _Memory(tuple(axes.tolist()), tuple(flipped.tolist()), tuple(order.tolist()))

    def along(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of an array of the map's shape with these axes."""
        ways = tuple(slice(None, None, -1 if flipped else 1) for flipped in self.flipped)
        return array.transpose(self.axes)[ways]


@dataclass(frozen=True, eq=False)
class _Part:
    """A box of a map along memory, to be searched slab by slab."""

    labels: Labels
    n_runs: NDArray[np.int64]  # (n_planes,) at most

    @staticmethod
    def around(along: Labels, hull: Box, n_runs: NDArray[np.int64], margin: int) -> _Part:
        planes, rows, columns = (slice(max(0, s.start - margin), s.stop + margin) for s in hull)
        return _Part(along[planes, rows, columns], n_runs[planes])

    @cached_property
    def slabs(self) -> list[slice]:
        """As many planes as have so many runs with the plane before them, but at least one."""
        slabs, start, total = [], 0, 0
        for n, n_runs in enumerate(self.n_runs.tolist()):
            if n > start and total + n_runs > _SLAB_RUNS:
                slabs.append(slice(start, n))
                start, total = n, int(self.n_runs[n - 1])
            total += n_runs
        return [*slabs, slice(start, len(self.n_runs))]

    @cached_property
    def room(self) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.int32], NDArray[Any]]:
        """For stops, labels, rows and pieces of one slab after the other."""
        searched = [slice(max(0, slab.start - 1), slab.stop) for slab in self.slabs]
        n_runs = max(int(self.n_runs[planes].sum()) for planes in searched)
        n_planes = max(planes.stop - planes.start for planes in searched)
        rows = np.empty(n_planes * self.labels.shape[1] + 1, np.int32)
        stops, pieces = np.empty((2, n_runs), np.int32)
        return stops, np.empty(n_runs, np.uint16), rows, pieces


@dataclass(frozen=True, eq=False)
class _Search:
    """Which pieces are found: those of organs, label by label, or the voids between organs."""

    taken_for: NDArray[np.uint16]  # (n_classes,) voids are of one label, whatever is in them
    sought: NDArray[np.uint8]  # (n_classes,) 1 for labels that make up pieces
    corners: bool  # 26-connected, or 6-connected


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of a slab and of the plane before it, as in ``kernels/runs.pyx``, and their pieces.

    A slab's pieces are numbered by their first voxels along memory. Searching the next slab
    overwrites these arrays.
    """

    stops: NDArray[np.int32]
    labels: NDArray[np.uint16]
    rows: NDArray[np.int32]
    n_rows: int  # of a plane
    first: int  # 1 with a plane before the slab, else 0
    pieces: NDArray[np.int32]  # (n_runs,) -1 is none
    n_pieces: int

    @property
    def of_first_plane(self) -> NDArray[np.int32]:
        return self.pieces[: self.rows[self.n_rows]]

    @property
    def of_last_plane(self) -> NDArray[np.int32]:
        return self.pieces[self.rows[-1 - self.n_rows] :]


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Components as found slab by slab; one that crosses a slab's end is several pieces.

    The lowest piece of a component is its root.
    """

    n_of_slab: list[int]
    root: NDArray[np.int32]  # (n_pieces,)
    size: NDArray[np.int64]  # (n_pieces,) voxels of a root's component, 0 for other pieces
    owner: NDArray[np.uint16]  # (n_pieces,) label
    earliest: NDArray[np.int64]  # (n_pieces,) place of a root's component in working order
    surroundings: NDArray[np.uint16]  # (n_pieces,) what a root's component becomes when removed


def _measure(
    along: Labels, n_classes: int, confidence: NDArray[np.uint8] | None
) -> tuple[LabelStatistics, NDArray[np.int64]]:
    """Statistics on the axes of a map along memory, and how many runs each of its planes has."""
    counts = np.zeros(n_classes, np.int64)
    sums = np.zeros((n_classes, 3), np.int64)
    boxes = np.zeros((n_classes, 3, 2), np.int64)
    boxes[:, :, 0] = np.iinfo(np.int64).max
    confidence_sums = np.zeros(n_classes, np.int64)
    n_runs = np.zeros(len(along), np.int64)
    n_beyond = label_statistics(along, confidence, counts, sums, boxes, confidence_sums, n_runs)
    if n_beyond:
        raise ValueError(
            f"{n_beyond} voxels have a label of {n_classes} or more; the class table ends at "
            f"{n_classes - 1}"
        )
    boxes[counts == 0] = 0
    known = None if confidence is None else confidence_sums
    return LabelStatistics(counts, sums, boxes, known), n_runs


def _remove_components(
    part: _Part,
    classes: ClassTable,
    order: tuple[int, ...],
    cleaning: Cleaning,
    voxel_ml: float,
) -> NDArray[np.int64]:
    """Remove what is not to be kept; (n_classes, 2) components and voxels removed."""
    others = _not_organs(classes)
    sought = np.ones(len(classes), np.uint8)
    sought[others] = 0
    search = _Search(np.arange(len(classes), dtype=np.uint16), sought, corners=True)
    pieces, last = _find_pieces(part, search, others, order)
    most = np.zeros(len(classes), np.int64)
    np.maximum.at(most, pieces.owner, pieces.size)
    largest = np.flatnonzero(pieces.size == most[pieces.owner])
    largest = largest[np.lexsort((pieces.earliest[largest], pieces.owner[largest]))]
    _, first_of_organ = np.unique(pieces.owner[largest], return_index=True)
    smallest: Any = np.inf
    if cleaning.keep == "parts":
        smallest = cleaning.least_part * most[pieces.owner]
    elif cleaning.keep == "dust":
        smallest = cleaning.dust_ml / voxel_ml
    is_removed = (pieces.size > 0) & (pieces.size < smallest)
    is_removed[largest[first_of_organ]] = False
    removed = np.flatnonzero(is_removed)

    becomes = np.full(len(pieces.root), -1, np.int32)
    becomes[removed] = pieces.surroundings[removed]
    _rewrite(part, search, last, pieces.n_of_slab, becomes[pieces.root])

    totals = np.zeros((len(classes), 2), np.int64)
    np.add.at(totals[:, 0], pieces.owner[removed], 1)
    np.add.at(totals[:, 1], pieces.owner[removed], pieces.size[removed])
    return totals


def _fill_holes(hull: _Part, classes: ClassTable) -> NDArray[np.int64]:
    """Give each void that one organ alone encloses to it; (n_classes,) voxels filled.

    ``hull`` holds all organs of the map: a void at its border is open.
    """
    taken_for = np.arange(len(classes), dtype=np.uint16)
    taken_for[_not_organs(classes)] = 0
    search = _Search(taken_for, (taken_for == 0).astype(np.uint8), corners=False)
    n_of_slab, sizes, lows, highs = [], [], [], []
    pairs: list[NDArray[np.int32]] = []
    for slab, runs in _search_slabs(hull, search, pairs):
        n = runs.n_pieces
        size = np.zeros(n, np.int64)
        low, high = np.full(n, 65_535, np.uint16), np.zeros(n, np.uint16)
        piece_sizes(runs.stops, runs.rows, runs.n_rows, runs.first, runs.pieces, size)
        ends = slab.start == 0, slab.stop == len(hull.labels)
        enclosing_labels(
            runs.stops, runs.labels, runs.rows, runs.n_rows, runs.pieces, ends, low, high
        )
        n_of_slab.append(n)
        sizes.append(size)
        lows.append(low)
        highs.append(high)
    root = _roots(pairs, sum(n_of_slab))
    child = np.flatnonzero(root != np.arange(len(root)))
    lowest, highest = np.concatenate(lows), np.concatenate(highs)
    np.minimum.at(lowest, root[child], lowest[child])
    np.maximum.at(highest, root[child], highest[child])

    becomes = np.full(len(root), -1, np.int32)
    holes = np.flatnonzero((lowest == highest) & (lowest > 0))  # 0: open
    becomes[holes] = lowest[holes]
    becomes = becomes[root]
    _rewrite(hull, search, runs, n_of_slab, becomes)

    totals = np.zeros(len(classes), np.int64)
    filled = np.flatnonzero(becomes >= 0)
    np.add.at(totals, becomes[filled], np.concatenate(sizes)[filled])
    return totals


def _find_pieces(
    part: _Part, search: _Search, others: list[int], order: tuple[int, ...]
) -> tuple[_Pieces, _Runs]:
    """Components, which of ``others`` surrounds each most, and the runs of the last slab."""
    column_of_label = np.full(len(search.sought), -1, np.int32)
    column_of_label[others] = np.arange(len(others))
    n_of_slab, sizes, owners, places, columns = [], [], [], [], []
    # Votes are kept of the pieces that reach a slab's end only: the others are whole components.
    open_pieces, open_votes = [], []
    pairs: list[NDArray[np.int32]] = []
    n_before = 0
    for slab, runs in _search_slabs(part, search, pairs):
        n = runs.n_pieces
        size, owner = np.zeros(n, np.int64), np.zeros(n, np.uint16)
        place = np.full(n, np.iinfo(np.int64).max)
        votes = np.zeros((n, len(others)), np.int64)
        found = runs.stops, runs.labels, runs.rows, runs.n_rows
        piece_sizes(runs.stops, runs.rows, runs.n_rows, runs.first, runs.pieces, size)
        piece_origins(
            *found, runs.pieces, ((slab.start - runs.first) * order[0], *order), owner, place
        )
        surrounding_labels(*found, runs.first, runs.pieces, column_of_label, votes)
        is_open = np.zeros(n + 1, bool)  # and one for -1
        is_open[runs.of_first_plane] = is_open[runs.of_last_plane] = True
        ends = np.flatnonzero(is_open[:n])
        open_pieces.append(ends + n_before)
        open_votes.append(votes[ends])
        n_of_slab.append(n)
        sizes.append(size)
        owners.append(owner)
        places.append(place)
        # Of equal columns argmax takes the first, and the first of `others` is the context class.
        columns.append(votes.argmax(axis=1).astype(np.uint16))
        n_before += n
    root = _roots(pairs, n_before)
    child = np.flatnonzero(root != np.arange(n_before))
    total_size, earliest = np.concatenate(sizes), np.concatenate(places)
    np.add.at(total_size, root[child], total_size[child])
    total_size[child] = 0
    np.minimum.at(earliest, root[child], earliest[child])
    open_roots, which = np.unique(root[np.concatenate(open_pieces)], return_inverse=True)
    total_votes = np.zeros((len(open_roots), len(others)), np.int64)
    np.add.at(total_votes, which, np.concatenate(open_votes))
    column = np.concatenate(columns)
    column[open_roots] = total_votes.argmax(axis=1)
    owner_of_piece, surroundings = np.concatenate(owners), np.array(others, np.uint16)[column]
    return _Pieces(n_of_slab, root, total_size, owner_of_piece, earliest, surroundings), runs


def _rewrite(
    part: _Part,
    search: _Search,
    last: _Runs,
    n_of_slab: list[int],
    becomes: NDArray[np.int32],
) -> None:
    """Give pieces, found by the same search, the label that they become; -1 leaves a piece.

    The runs of the last slab are still there, the others are searched again: from the last to the
    first, so that each slab and the plane before it are as they were.
    """
    stop = len(becomes)
    for slab, n in zip(reversed(part.slabs), reversed(n_of_slab), strict=True):
        new = becomes[stop - n : stop]
        stop -= n
        if (new < 0).all():
            continue
        runs = last if slab.stop == len(part.labels) else _search_slab(part, search, slab)
        planes = part.labels[slab.start - runs.first : slab.stop]
        rewrite_runs(runs.stops, runs.rows, runs.first, runs.pieces, new, planes)


def _search_slabs(
    part: _Part, search: _Search, pairs: list[NDArray[np.int32]]
) -> Iterator[tuple[slice, _Runs]]:
    """Slab after slab with its runs; appends which pieces of two slabs are one."""
    n_before = 0
    shared = np.zeros(0, np.int32)  # pieces of the last plane so far
    for slab in part.slabs:
        runs = _search_slab(part, search, slab)
        if runs.first:
            is_piece = shared >= 0
            again = runs.of_first_plane + n_before
            pairs.append(np.stack([shared[is_piece], again[is_piece]], axis=1))
        shared = np.where(runs.of_last_plane < 0, -1, runs.of_last_plane + n_before)
        n_before += runs.n_pieces
        yield slab, runs


def _search_slab(part: _Part, search: _Search, slab: slice) -> _Runs:
    """Runs and pieces of a slab and, where there is one, of the plane before it."""
    first = min(slab.start, 1)
    own = slice(slab.start - first, slab.stop)
    planes = part.labels[own]
    n_rows = planes.shape[1]
    stops, labels, rows, pieces = part.room
    rows = rows[: len(planes) * n_rows + 1]
    pieces = pieces[: encode_runs(planes, search.taken_for, stops, labels, rows)]
    n_pieces = join_runs(stops, labels, rows, n_rows, search.sought, search.corners, pieces)
    return _Runs(stops, labels, rows, n_rows, first, pieces, n_pieces)


def _roots(pairs: list[NDArray[np.int32]], n_pieces: int) -> NDArray[np.int32]:
    """(n_pieces,): the lowest piece of the component that each is part of."""
    root = np.arange(n_pieces, dtype=np.int32)
    if pairs:
        join_pieces(np.concatenate(pairs), root)
    return root


def _not_organs(classes: ClassTable) -> list[int]:
    """Background and context labels; the one that stands for the inside of the body first."""
    inside = classes.context or 0
    skipped = {inside, *classes.organs}
    return [inside, *(label for label in range(len(classes)) if label not in skipped)]


def _check_labels(labels: Labels) -> None:
    if labels.ndim != 3 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"a label map is a 3-D uint8 or uint16 array, not {labels.ndim}-D {labels.dtype}"
        )
