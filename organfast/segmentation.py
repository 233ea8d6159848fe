"""From a raw label map to a clean one: what each label covers, its components, dust and holes.

Arrays are in working order (k, i, j) and may be strided views; a clean map is written in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.kernels.label_statistics import (
    component_statistics,
    enclosing_labels,
    join_components,
    label_statistics,
)

__all__ = ["Cleaning", "LabelStatistics", "clean", "measure_labels"]

Labels = NDArray[np.uint8] | NDArray[np.uint16]
Box = tuple[slice, slice, slice]

# Components are found slab by slab: uint8 labels and uint32 components of so many voxels, plus
# what the component search itself takes, stay near 25 MB whatever the size of the scan.
_SLAB_VOXELS = 2_097_152
_CONNECTIVITY = 26
# What bounds a 26-connected component is 6-connected: no void leaks out over a corner.
_VOID_CONNECTIVITY = 6


@dataclass(frozen=True)
class Cleaning:
    """What a raw label map is rid of.

    Parameters
    ----------
    keep : {"largest", "dust", "none"}
        ``"largest"`` keeps the component with most voxels of each organ (of equal ones the first
        in working order), ``"dust"`` those of at least ``dust_ml``, ``"none"`` all: no clean-up of
        components. The largest component is never removed: whether an organ is there at all is
        decided when it is measured.
    dust_ml : float, ml
        Smallest component that is no dust.
    fill_holes : bool
        Holes inside an organ become the organ, unless they touch another organ too.

    Raises
    ------
    ValueError
        ``keep`` is unknown or ``dust_ml`` is negative.
    """

    keep: Literal["largest", "dust", "none"] = "largest"
    dust_ml: float = 0.5
    fill_holes: bool = True

    def __post_init__(self) -> None:
        if self.keep not in ("largest", "dust", "none"):
            raise ValueError(f"keep {self.keep!r} is unknown; use largest, dust or none")
        if not self.dust_ml >= 0:
            raise ValueError(f"dust_ml {self.dust_ml} is negative; use 0 ml or more")


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
    counts = np.zeros(n_classes, np.int64)
    sums = np.zeros((n_classes, 3), np.int64)
    boxes = np.zeros((n_classes, 3, 2), np.int64)
    boxes[:, :, 0] = np.iinfo(np.int64).max
    confidence_sums = np.zeros(n_classes, np.int64)
    # The axis whose voxels lie closest together comes last.
    along_memory = np.argsort([-abs(stride) for stride in labels.strides], kind="stable")
    n_beyond = label_statistics(
        labels.transpose(along_memory),
        None if confidence is None else confidence.transpose(along_memory),
        counts,
        sums,
        boxes,
        confidence_sums,
    )
    if n_beyond:
        raise ValueError(
            f"{n_beyond} voxels have a label of {n_classes} or more; the class table ends at "
            f"{n_classes - 1}"
        )
    boxes[counts == 0] = 0
    back = np.argsort(along_memory)
    return LabelStatistics(
        counts, sums[:, back], boxes[:, back], None if confidence is None else confidence_sums
    )


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

    Beside the map, memory is needed for one slab of components and some 50 bytes for each
    component, whatever islands are spread over the scan.

    Parameters
    ----------
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order, any strides; written.
    classes : ClassTable
        What the labels mean.
    cleaning : Cleaning
        What to remove.
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
    statistics = measure_labels(labels, len(classes))
    organs = [label for label in classes.organs if statistics.counts[label]]
    changes = np.zeros((len(classes), 3), np.int64)
    if cleaning.keep != "none" and organs:
        smallest = cleaning.dust_ml / voxel_ml if cleaning.keep == "dust" else np.inf
        changes[:, :2] = _remove_components(labels, classes, statistics.hull(organs), smallest)
    if cleaning.fill_holes and organs:
        # Removal leaves no organ beyond the hull of the map as it came.
        changes[:, 2] = _fill_holes(labels[statistics.hull(organs)], classes)
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
class _Search:
    """Which components are found: those of organs, label by label, or the voids between organs."""

    others: list[int]  # labels that are no organ
    voids: bool


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Components as found slab by slab; one that crosses a slab's end is several pieces.

    Pieces are numbered by their first voxel in working order, so that the lowest piece of a
    component, its root, is the same however the map is cut into slabs.
    """

    n_of_slab: list[int]
    root: NDArray[np.int32]  # (n_pieces,)
    size: NDArray[np.int64]  # (n_pieces,) voxels of a root's component, 0 for other pieces
    owner: NDArray[np.uint16]  # (n_pieces,) label
    surroundings: NDArray[np.uint16]  # (n_pieces,) what a root's component becomes when removed


def _remove_components(
    labels: Labels, classes: ClassTable, box: Box, smallest: float
) -> NDArray[np.int64]:
    """Remove components below ``smallest`` voxels; (n_classes, 2) components and voxels removed."""
    search = _Search(_not_organs(classes), voids=False)
    slabs = _slabs(box)
    pieces = _find_pieces(labels, len(classes), search, slabs)
    most = np.zeros(len(classes), np.int64)
    np.maximum.at(most, pieces.owner, pieces.size)
    candidates = np.flatnonzero(pieces.size == most[pieces.owner])
    _, first_of_organ = np.unique(pieces.owner[candidates], return_index=True)
    is_removed = (pieces.size > 0) & (pieces.size < smallest)
    is_removed[candidates[first_of_organ]] = False
    removed = np.flatnonzero(is_removed)

    becomes = np.full(len(pieces.root), -1, np.int32)
    becomes[removed] = pieces.surroundings[removed]
    _rewrite(labels, search, slabs, pieces.n_of_slab, becomes[pieces.root])

    totals = np.zeros((len(classes), 2), np.int64)
    np.add.at(totals[:, 0], pieces.owner[removed], 1)
    np.add.at(totals[:, 1], pieces.owner[removed], pieces.size[removed])
    return totals


def _fill_holes(hull: Labels, classes: ClassTable) -> NDArray[np.int64]:
    """Give each void that one organ alone encloses to it; (n_classes,) voxels filled.

    ``hull`` holds all organs of the map: a void at its border is open.
    """
    search = _Search(_not_organs(classes), voids=True)
    is_organ = np.ones(len(classes), np.uint8)
    is_organ[search.others] = 0
    k, i, j = (slice(0, n) for n in hull.shape)
    slabs = _slabs((k, i, j))
    n_of_slab, sizes, lows, highs = [], [], [], []
    pairs: list[NDArray[np.int32]] = []
    for slab, components, n in _label_slabs(hull, search, slabs, pairs):
        size = np.zeros(n + 1, np.int32)
        low, high = np.full(n + 1, 65_535, np.uint16), np.zeros(n + 1, np.uint16)
        n_slices = slab[0].stop - slab[0].start
        enclosing_labels(hull, components[:n_slices], slab[0].start, is_organ, size, low, high)
        n_of_slab.append(n)
        sizes.append(size[1:])
        lows.append(low[1:])
        highs.append(high[1:])
    root = _roots(pairs, sum(n_of_slab))
    child = np.flatnonzero(root != np.arange(len(root)))
    lowest, highest = np.concatenate(lows), np.concatenate(highs)
    np.minimum.at(lowest, root[child], lowest[child])
    np.maximum.at(highest, root[child], highest[child])

    becomes = np.full(len(root), -1, np.int32)
    holes = np.flatnonzero((lowest == highest) & (lowest > 0))  # 0: open
    becomes[holes] = lowest[holes]
    becomes = becomes[root]
    _rewrite(hull, search, slabs, n_of_slab, becomes)

    totals = np.zeros(len(classes), np.int64)
    filled = np.flatnonzero(becomes >= 0)
    np.add.at(totals, becomes[filled], np.concatenate(sizes)[filled])
    return totals


def _find_pieces(labels: Labels, n_classes: int, search: _Search, slabs: list[Box]) -> _Pieces:
    others = search.others
    column_of_label = np.full(n_classes, -1, np.int32)
    column_of_label[others] = np.arange(len(others))
    n_of_slab, sizes, owners, columns = [], [], [], []
    # Votes are kept of the pieces that reach a slab's end only: the others are whole components.
    open_pieces, open_votes = [], []
    pairs: list[NDArray[np.int32]] = []
    n_before = 0
    for slab, components, n in _label_slabs(labels, search, slabs, pairs):
        n_slices = slab[0].stop - slab[0].start
        size, owner = np.zeros(n + 1, np.int32), np.zeros(n + 1, np.uint16)
        vote = np.zeros((n + 1, len(others)), np.int32)
        component_statistics(
            labels,
            components[:n_slices],
            (slab[0].start, slab[1].start, slab[2].start),
            column_of_label,
            size,
            owner,
            vote,
        )
        ends = np.unique(components[[0, -1]])
        ends = ends[ends > 0].astype(np.int64)
        open_pieces.append(ends - 1 + n_before)
        open_votes.append(vote[ends])
        n_of_slab.append(n)
        sizes.append(size[1:])
        owners.append(owner[1:])
        # Of equal columns argmax takes the first, and the first of `others` is the context class.
        columns.append(vote[1:].argmax(axis=1).astype(np.uint16))
        n_before += n
    root = _roots(pairs, n_before)
    child = np.flatnonzero(root != np.arange(n_before))
    total_size = np.concatenate(sizes).astype(np.int64)
    np.add.at(total_size, root[child], total_size[child])
    total_size[child] = 0
    owner_of_root = np.concatenate(owners)
    # A root that lies in its slab's shared slice alone gets its owner from the next slab.
    np.maximum.at(owner_of_root, root[child], owner_of_root[child])
    open_roots, which = np.unique(root[np.concatenate(open_pieces)], return_inverse=True)
    total_votes = np.zeros((len(open_roots), len(others)), np.int64)
    np.add.at(total_votes, which, np.concatenate(open_votes))
    column = np.concatenate(columns)
    column[open_roots] = total_votes.argmax(axis=1)
    return _Pieces(n_of_slab, root, total_size, owner_of_root, np.array(others, np.uint16)[column])


def _rewrite(
    labels: Labels,
    search: _Search,
    slabs: list[Box],
    n_of_slab: list[int],
    becomes: NDArray[np.int32],
) -> None:
    """Give pieces, found by the same search, the label that they become; -1 leaves a piece."""
    first = 0
    for slab, n in zip(slabs, n_of_slab, strict=True):
        new = np.insert(becomes[first : first + n], 0, -1)
        first += n
        if (new < 0).all():
            continue
        part = labels[slab]
        components = _label_slab(labels, search, slab)[0][: len(part)]
        for plane, components_of_plane in zip(part, components, strict=True):
            label = new[components_of_plane]
            np.copyto(plane, label, where=label >= 0, casting="unsafe")


def _label_slabs(
    labels: Labels, search: _Search, slabs: list[Box], pairs: list[NDArray[np.int32]]
) -> Iterator[tuple[Box, NDArray[np.uint32], int]]:
    """Slab after slab with its components; appends which pieces of two slabs are one."""
    n_before = 0
    shared = np.zeros(0, np.int64)  # pieces of the slice that two slabs share
    for slab in slabs:
        components, n = _label_slab(labels, search, slab)
        if n_before:
            pairs.append(_joined(shared, _numbered(components[0], n_before)))
        shared = _numbered(components[-1], n_before)
        yield slab, components, n
        n_before += n


def _label_slab(labels: Labels, search: _Search, slab: Box) -> tuple[NDArray[np.uint32], int]:
    """Components of a slab and, where there is one, of the slice after it; and their number."""
    import cc3d

    k, i, j = slab
    part = labels[k.start : k.stop + 1, i, j]
    if search.voids:
        sought = np.zeros(part.shape, bool)
        for label in search.others:
            sought |= part == label
    else:
        sought = np.array(part, order="C")
        for label in search.others:
            np.multiply(sought, sought != label, out=sought)
    components, n = cc3d.connected_components(
        sought,
        connectivity=_VOID_CONNECTIVITY if search.voids else _CONNECTIVITY,
        return_N=True,
        out_dtype=np.uint32,
    )
    return components, int(n)


def _roots(pairs: list[NDArray[np.int32]], n_pieces: int) -> NDArray[np.int32]:
    """(n_pieces,): the lowest piece of the component that each is part of."""
    root = np.arange(n_pieces, dtype=np.int32)
    if pairs:
        join_components(np.concatenate(pairs), root)
    return root


def _numbered(components: NDArray[np.uint32], n_before: int) -> NDArray[np.int64]:
    """One slice of a slab's components as numbers of pieces; -1 is none."""
    pieces = components.astype(np.int64).ravel()
    return np.where(pieces > 0, pieces - 1 + n_before, -1)


def _joined(pieces: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int32]:
    """(n, 2): which pieces of the slice that two slabs share are one; each run of voxels once."""
    pairs = np.stack([pieces, others], axis=1)
    is_new = np.any(np.diff(pairs, axis=0, prepend=-1) != 0, axis=1)
    joined: NDArray[np.int32] = pairs[is_new & (pieces >= 0)].astype(np.int32)
    return joined


def _not_organs(classes: ClassTable) -> list[int]:
    """Background and context labels; the one that stands for the inside of the body first."""
    inside = classes.context or 0
    skipped = {inside, *classes.organs}
    return [inside, *(label for label in range(len(classes)) if label not in skipped)]


def _slabs(box: Box) -> list[Box]:
    k, i, j = box
    thickness = max(1, _SLAB_VOXELS // ((i.stop - i.start) * (j.stop - j.start)))
    starts = range(k.start, k.stop, thickness)
    return [(slice(start, min(start + thickness, k.stop)), i, j) for start in starts]


def _check_labels(labels: Labels) -> None:
    if labels.ndim != 3 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"a label map is a 3-D uint8 or uint16 array, not {labels.ndim}-D {labels.dtype}"
        )
