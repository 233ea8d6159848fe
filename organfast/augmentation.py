"""Altered copies of a labelled scan, so that few scans teach more.

::

    scan on the model grid --(each organ another HU, border by border)--> recoloured
        --(placed: rotated, scaled, bent by a smooth field; cropped along z)--> one resampling
        --(blur, noise)--> altered copy, its labels beside it

Random numbers depend on the seed and the position alone: any number of threads makes the same
bytes. What each option draws does not depend on the other options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.errors import is_whole
from organfast.grid import GridVolume, hu_lookup
from organfast.painting import PHASES, hu_range, in_slabs, tissue_of
from organfast.volume import AIR_HU

__all__ = ["Augmentation", "altered_copy", "jittered", "mirror_partners"]

UNMOVED_TISSUES = (
    *("skin", "subcutaneous_fat", "intermuscular_fat", "trunk_fat", "muscle", "cord"),
    *("spongy_bone", "flat_bone", "long_bone", "cartilage", "disc", "airway"),
)
"""One psoas or one vertebra of another HU than all the others is an altered scan, not another
patient; a table seldom names all muscles and bones. Air is air."""

NODES_PER_GRAIN = 4
THINNED = 3
"""Every third voxel along each axis tells where an organ lies."""

ORGAN_REACH = 1.3
LEAST_REACH_MM = 25.0
"""An organ moves what lies within 1.3 of its own deviations, or 25 mm, most."""

STEEPEST = 0.6
"""Largest change of the displacement per length: below 1 nothing folds."""

MOST_DEVIATIONS = 2.0
"""Normal draws are cut off here: no copy is a caricature."""

N_BINS = 512
"""Bins of 4 HU: to 1024 HU."""

_LIMITS: dict[str, tuple[float, float, str]] = {
    "elastic_mm": (0, 30, "mm"),
    "elastic_grain_mm": (20, 1000, "mm"),
    "organ_mm": (0, 30, "mm"),
    "organ_size": (0, 0.4, "(0.1 = 10 %)"),
    "stretch": (0, 0.3, "(0.05 = 5 %)"),
    "rotation_deg": (0, 45, "degrees"),
    "mirror": (0, 1, "(a probability)"),
    "recolour_hu": (0, 50, "HU"),
    "recolour_contrast": (0, 0.3, "(0.2 = 20 %)"),
    "shift_hu": (0, 30, "HU"),
    "gain": (0, 0.2, "(0.05 = 5 %)"),
    "blur_mm": (0, 5, "mm"),
    "noise_hu": (0, 100, "HU"),
    "jitter_deg": (0, 90, "degrees"),
    "jitter_scale": (0, 0.5, "(0.1 = 10 %)"),
}


@dataclass(frozen=True)
class Augmentation:
    """How training scans are altered. Each option is off at 0, ``scale`` at (1, 1).

    By default organs are recoloured and nothing else: of all options the only one that lowered
    Dice on none of the unseen patients it was measured on, see the README.

    Parameters
    ----------
    copies : int
        Altered copies of each case, besides the case itself.
    elastic_mm : float
        Deviation of a smooth displacement of the whole volume along each axis, mm. It is made
        weaker where it would fold.
    elastic_grain_mm : float
        Distance over which displacements are alike, mm.
    organ_mm : float
        Deviation along each axis of how far an organ is displaced among its neighbours, mm; what
        lies around it follows, the less the further off.
    organ_size : float
        Deviation of how much longer or shorter an organ is along each axis than the others, as a
        share; its surroundings give way.
    scale : (low, high) float
        Size of the copy; drawn evenly on a logarithmic scale, the same along all axes.
    stretch : float
        Each axis is besides stretched or squeezed by at most this share.
    rotation_deg : float
        Deviation of the rotation about the long axis; about the other two axes a third of it.
    crop_mm : float or None
        The copy is a random run of slices at least this long, so that the field of view is no cue;
        None keeps all slices.
    mirror : float
        Probability that left and right change places, the labels of paired structures too.
        Unpaired organs come to lie as in situs inversus: a liver on the left is not anatomy that a
        model should know, so this is off by default and meant for tables of paired structures.
    recolour_hu : float
        Deviation of the HU that an organ's middle moves, within what its tissue can have in any
        contrast phase. All organs of one tissue, and so both partners of a pair, move alike;
        muscles, bones and gas do not move.
    recolour_contrast : float
        An organ's contrast about its own middle changes by at most this share.
    shift_hu : float
        All tissue (not gas) moves by at most this, HU.
    gain : float
        HU of all tissue change by at most this share, as with another tube voltage.
    blur_mm : float
        Largest deviation of a blur in the slice, mm.
    noise_hu : float
        Largest deviation of added noise, HU.
    jitter_deg : float
        Deviation of the rotation of a pattern's offsets in the slice; see :func:`jittered`.
    jitter_scale : float
        A pattern's offsets are lengthened or shortened by at most this share.

    Raises
    ------
    ValueError
        A value is out of its range.
    """

    copies: int = 2
    elastic_mm: float = 0.0
    elastic_grain_mm: float = 90.0
    organ_mm: float = 0.0
    organ_size: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    stretch: float = 0.0
    rotation_deg: float = 0.0
    crop_mm: float | None = None
    mirror: float = 0.0
    recolour_hu: float = 15.0
    recolour_contrast: float = 0.2
    shift_hu: float = 5.0
    gain: float = 0.05
    blur_mm: float = 0.0
    noise_hu: float = 0.0
    jitter_deg: float = 0.0
    jitter_scale: float = 0.0

    def __post_init__(self) -> None:
        if not is_whole(self.copies, 0):
            raise ValueError(f"copies is {self.copies!r}; give a whole number from 0")
        for name, (low, high, unit) in _LIMITS.items():
            value = getattr(self, name)
            if not _is_between(value, low, high):
                raise ValueError(f"{name} is {value!r}; give {low:g} to {high:g} {unit}")
        scale = tuple(self.scale) if isinstance(self.scale, (tuple, list)) else ()
        if len(scale) != 2 or not all(_is_between(s, 0.5, 2) for s in scale) or scale[0] > scale[1]:
            raise ValueError(f"scale is {self.scale!r}; give (low, high) from 0.5 to 2")
        object.__setattr__(self, "scale", (float(scale[0]), float(scale[1])))
        if self.crop_mm is not None and not _is_between(self.crop_mm, 1, 10_000):
            raise ValueError(f"crop_mm is {self.crop_mm!r}; give 1 to 10000 mm, or None")

    @staticmethod
    def off(copies: int = 1) -> Augmentation:
        """Every option off: copies equal to the case; a start for measuring one option.

        Parameters
        ----------
        copies : int
            Copies of each case.
        """
        off = dict.fromkeys((n for n in _LIMITS if n != "elastic_grain_mm"), 0.0)
        return Augmentation(copies=copies, scale=(1, 1), crop_mm=None, **off)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {**asdict(self), "scale": list(self.scale)}


def _is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(low <= value <= high)


def altered_copy(
    grid_volume: GridVolume,
    labels: NDArray[np.unsignedinteger],
    classes: ClassTable,
    augmentation: Augmentation,
    seed: int | Sequence[int],
    *,
    beside: Sequence[str] = (),
    threads: int = 1,
) -> tuple[GridVolume, NDArray[np.unsignedinteger]]:
    """A copy of a labelled scan that another patient, on another scanner, could have had.

    Changes of HU are made in HU, whatever HU table the scan has passed, and keep their order: the
    copy is the scan with a monotone change per organ. Geometry is one resampling, trilinear for HU
    (in units of the table, as on the way to the model grid) and nearest for labels. ::

        beyond the sides of the scan   air, label 0
        beyond its ends                the end slice repeated, and the greatest label of the dtype:
                                       "nothing is known here", never to be sampled

    Unlabelled voxels of the scan keep their value too: tell background from context before, not
    after, for the body mask of the copy would make context of what is unknown.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    labels : (K, R, C) uint8 or uint16
        Label map on that grid. Labels that neither the table nor ``beside`` names stay what they
        are.
    classes : ClassTable
        Which labels are organs, what they are called and which are partners.
    augmentation : Augmentation
        How much to alter.
    seed : int or sequence of int
        Seed of the copy.
    beside : sequence of str
        Names of the structures beside the table, whose labels follow on those of the table.
    threads : int
        Threads to share the slices; the result does not depend on it.

    Returns
    -------
    grid_volume : GridVolume
        The copy, on a grid of its own: other shape, same spacing and units.
    labels : (K', R', C') uint8 or uint16
        The very arrays of the input where nothing is altered.

    Raises
    ------
    ValueError
        The labels are not of the scan's shape or not uint8 or uint16, there are as many classes as
        the dtype has labels, or ``threads`` is below 1.
    """
    if labels.shape != grid_volume.shape or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"labels is {labels.dtype} of shape {labels.shape}; give uint8 or uint16 of the "
            f"scan's shape {grid_volume.shape}"
        )
    anatomy = _Anatomy.of(classes, beside)
    if len(anatomy.names) > np.iinfo(labels.dtype).max:
        raise ValueError(f"{len(anatomy.names)} classes leave no free label in {labels.dtype}")
    if threads < 1:
        raise ValueError(f"threads is {threads}; use at least 1")
    streams = np.random.SeedSequence(seed).spawn(6)
    mirror, colours, place, bend, scanner, organ_stream = map(np.random.default_rng, streams)
    hu = grid_volume.hu
    if mirror.random() < augmentation.mirror:
        hu, labels = hu[:, :, ::-1], anatomy.exchanged(labels[:, :, ::-1])
    units = _Units.of(grid_volume)
    hu = _recoloured(hu, labels, anatomy, augmentation, (units, colours, threads))
    placing = _Placing.draw(grid_volume, augmentation, place)
    organs = _Organs.draw(labels, anatomy, grid_volume.spacing_mm, augmentation, organ_stream)
    means = units, (organs, bend), scanner, threads
    hu, labels = _placed(hu, labels, placing, augmentation, means)
    if hu is grid_volume.hu:
        return grid_volume, labels
    return (
        GridVolume(
            hu,
            table=grid_volume.table,
            hu_table=grid_volume.hu_table,
            spacing_mm=grid_volume.spacing_mm,
        ),
        labels,
    )


def jittered(
    offsets: NDArray[np.int32],
    rng: np.random.Generator,
    augmentation: Augmentation,
    reach: tuple[int, int, int],
) -> NDArray[np.int32]:
    """A pattern's offsets, turned in the slice and lengthened or shortened at random.

    The same as turning and scaling the patient about the position, but for what lies in a level's
    box. Voxels are taken to be square in the slice.

    Parameters
    ----------
    offsets : (n, 4) int32
        Rows (level, dk, di, dj).
    rng : numpy.random.Generator
        Where the angle and the factor come from; each call draws anew.
    augmentation : Augmentation
        Its ``jitter_deg`` and ``jitter_scale``.
    reach : (k, i, j) int
        Largest |offset| that may be read; longer ones are cut off there, axis by axis.

    Returns
    -------
    (n, 4) int32
    """
    normal, even = rng.standard_normal(), rng.uniform(-1, 1)
    angle = np.deg2rad(augmentation.jitter_deg) * _cut_off(normal)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    moved = np.rint((1 + augmentation.jitter_scale * even) * (offsets[:, 1:] @ turn.T))
    most = np.array(reach)
    return np.column_stack([offsets[:, 0], np.clip(moved, -most, most)]).astype(np.int32)


def mirror_partners(classes: ClassTable, beside: Sequence[str] = ()) -> tuple[int, ...]:
    """Label of the other side of each label.

    Parameters
    ----------
    classes : ClassTable
        The classes.
    beside : sequence of str
        Names of the structures beside the table, whose labels follow on those of the table; sides
        are told by "left" and "right" in the name.

    Returns
    -------
    tuple of int
        The label itself where there is but one side, -1 where the other side is no label.

    >>> table = ClassTable.default()
    >>> partners = mirror_partners(table, ["rib_left_1", "heart_atrium_left"])
    >>> partners[table.index("lung_left")] == table.index("lung_right")
    True
    >>> partners[table.index("liver")] == table.index("liver"), partners[-2], partners[-1]
    (True, -1, 24)
    """
    label_of = {name: label for label, name in enumerate((*classes.names, *beside))}
    others = [s.mirror if s.side or s.mirror else s.name for s in classes.structures]
    return tuple(label_of.get(other, -1) for other in (*others, *map(_other_side, beside)))


def _cut_off(normal: float) -> float:
    return min(max(normal, -MOST_DEVIATIONS), MOST_DEVIATIONS)


@dataclass(frozen=True, eq=False)
class _Anatomy:
    """What the labels are: ``names`` and ``partners`` (labels of the other side, or their own) by
    label; ``organs``, the labels of organs and of structures beside the table."""

    names: tuple[str, ...]
    partners: tuple[int, ...]
    organs: tuple[int, ...]

    @staticmethod
    def of(classes: ClassTable, beside: Sequence[str]) -> _Anatomy:
        names = (*classes.names, *beside)
        mirrors = [*(s.mirror for s in classes.structures), *map(_other_side, beside)]
        label_of = {name: label for label, name in enumerate(names)}
        return _Anatomy(
            names,
            tuple(label_of.get(mirror, label) for label, mirror in enumerate(mirrors)),
            (*classes.organs, *range(len(classes), len(names))),
        )

    def exchanged(self, labels: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        """Labels with both sides exchanged."""
        lookup = np.arange(np.iinfo(labels.dtype).max + 1, dtype=labels.dtype)
        lookup[: len(self.partners)] = self.partners
        exchanged: NDArray[np.unsignedinteger] = lookup[labels]
        return exchanged

    def colour_group(self, label: int) -> str:
        """What moves together: a tissue; a pair, where the painter knows no tissue of that name."""
        tissue = tissue_of(self.names[label])
        return tissue if tissue != "soft" else self.names[min(label, self.partners[label])]

    def range_hu(self, label: int) -> tuple[float, float]:
        """Lowest and highest HU in any contrast phase; the painter's ranges."""
        ranges = [hu_range(tissue_of(self.names[label]), phase) for phase in PHASES]
        return min(low for low, _ in ranges), max(high for _, high in ranges)


def _other_side(name: str) -> str:
    """The name of the partner, were there one; the chambers of the heart are no pairs."""
    if name.startswith(("heart", "atrial")):
        return name
    if "left" in name:
        return name.replace("left", "right")
    return name.replace("right", "left")


@dataclass(frozen=True, eq=False)
class _Units:
    """Between HU and the numbers of a volume: ``hu_of`` and ``unit_of`` of the kernels."""

    hu_of: NDArray[np.float32]
    unit_of: NDArray[np.float32]

    @staticmethod
    def of(grid_volume: GridVolume) -> _Units:
        # A volume whose table is still to be applied holds HU.
        return _units(grid_volume.hu_table if grid_volume.table is None else "identity")

    @property
    def air(self) -> float:
        return float(self.unit_of[AIR_HU + 32768])


@cache
def _units(hu_table: str) -> _Units:
    table = hu_lookup(hu_table)
    hu = np.arange(AIR_HU, 32768)
    distinct, first = np.unique(table[hu + 32768], return_index=True)
    hu_of = np.interp(np.arange(-32768, 32768), distinct, hu[first])
    return _Units(hu_of.astype(np.float32), table.astype(np.float32))


# --- HU of organs ---------------------------------------------------------------------------------


def _recoloured(
    hu: NDArray[np.int16],
    labels: NDArray[np.unsignedinteger],
    anatomy: _Anatomy,
    augmentation: Augmentation,
    means: tuple[_Units, np.random.Generator, int],
) -> NDArray[np.int16]:
    """Each organ with another offset and contrast, the whole with another shift and gain."""
    units, rng, threads = means
    shift, gain = augmentation.shift_hu * rng.uniform(-1, 1), augmentation.gain * rng.uniform(-1, 1)
    organs, look = _looks(anatomy, augmentation, rng)
    if not (shift or gain or look.any()):
        return hu
    from organfast.kernels import augmentation as kernel

    tissue = np.clip((units.hu_of - kernel.GAS_HU) / (kernel.TISSUE_HU - kernel.GAS_HU), 0, 1)
    hu_of = units.hu_of + tissue * (shift + gain * np.maximum(units.hu_of, -150))
    hu_of = np.asarray(hu_of, np.float32)
    whole = np.clip(hu_of, AIR_HU, 32767) + 32768
    plain = np.floor(np.interp(whole, np.arange(65536), units.unit_of) + 0.5).astype(np.int16)
    row_of_label = np.zeros(np.iinfo(labels.dtype).max + 1, np.uint16)
    row_of_label[organs] = np.arange(1, len(organs) + 1)
    rows, hu = row_of_label[labels], np.ascontiguousarray(hu)
    middles = _middles(hu, rows, len(organs), hu_of, threads)
    plausible = np.array([anatomy.range_hu(label) for label in organs]).reshape(-1, 2)
    lowest = np.minimum(plausible[:, 0], middles)
    highest = np.maximum(plausible[:, 1], middles)
    look[1:, kernel.OFFSET_HU] += middles
    look[1:, kernel.OFFSET_HU] = look[1:, kernel.OFFSET_HU].clip(lowest, highest) - middles
    look[1:, kernel.MIDDLE_HU] = middles
    out = np.empty_like(hu)

    def recolour(low: int, high: int) -> None:
        tables = (hu_of, units.unit_of, plain)
        kernel.recolour_slices(hu, rows, low, high, look, tables, out)

    in_slabs(recolour, len(hu), threads)
    return out


def _looks(
    anatomy: _Anatomy, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[list[int], NDArray[np.float32]]:
    """Labels of the organs that move, and their looks in the kernel's rows (0 = no organ).

    Partners and organs of one tissue move together.
    """
    groups = {label: anatomy.colour_group(label) for label in anatomy.organs}
    organs = [label for label, group in groups.items() if group not in UNMOVED_TISSUES]
    moves = {
        group: (_cut_off(rng.standard_normal()), rng.uniform(-1, 1))
        for group in sorted({groups[label] for label in organs})
    }
    look = np.zeros((len(organs) + 1, 3), np.float32)
    for row, label in enumerate(organs, start=1):
        offset, contrast = moves[groups[label]]
        look[row, 0] = augmentation.recolour_hu * offset
        look[row, 1] = augmentation.recolour_contrast * contrast
    return organs, look


def _middles(
    hu: NDArray[np.int16],
    rows: NDArray[np.uint16],
    n_organs: int,
    hu_of: NDArray[np.float32],
    threads: int,
) -> NDArray[np.float64]:
    """Median HU of each organ, to the middle of a histogram's bin; (n_organs,)."""
    from organfast.kernels import augmentation as kernel

    parts: list[NDArray[np.int64]] = []

    def count(low: int, high: int) -> None:
        counts = np.zeros((n_organs + 1, N_BINS), np.int64)
        kernel.organ_histograms(hu, rows, low, high, hu_of, counts)
        parts.append(counts)

    in_slabs(count, len(hu), threads)
    below = np.cumsum(np.sum(parts, axis=0)[1:], axis=1)
    bins = (2 * below < below[:, -1:]).sum(axis=1)
    middles: NDArray[np.float64] = kernel.AIR_HU + kernel.HISTOGRAM_HU * (bins + 0.5)
    return middles


# --- geometry, blur and noise ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Placing:
    """Where the copy lies in the scan.

    ``shape`` (k, i, j) voxels of the whole copy; ``run`` first and one beyond the last of the
    slices that are kept; ``matrix`` (3, 4) voxel (k, i, j, 1) of the whole copy -> voxel of the
    scan; ``size`` largest size of the copy along an axis, relative to the scan.
    """

    shape: tuple[int, int, int]
    run: tuple[int, int]
    matrix: NDArray[np.float64]
    size: float
    spacing_mm: tuple[float, float, float]

    @staticmethod
    def draw(
        grid_volume: GridVolume, augmentation: Augmentation, rng: np.random.Generator
    ) -> _Placing:
        even, angles = rng.random(3), rng.standard_normal(3)
        stretch, shape = rng.uniform(-1, 1, 3), np.array(grid_volume.shape)
        low, high = np.log(augmentation.scale)
        sizes = np.exp(low + (high - low) * even[0]) * (1 + augmentation.stretch * stretch)
        degrees = augmentation.rotation_deg * np.array([1, 1 / 3, 1 / 3])
        turn = _rotation(np.deg2rad(degrees * [_cut_off(a) for a in angles]))
        spacing = np.array(grid_volume.spacing_mm)
        whole = np.maximum(1, np.rint(shape * sizes).astype(int))
        linear = np.diag(1 / spacing) @ turn @ np.diag(spacing / sizes)
        shift = (shape - 1) / 2 - linear @ ((whole - 1) / 2)
        n, least = int(whole[0]), int(whole[0])
        if augmentation.crop_mm is not None:
            least = min(n, int(np.ceil(augmentation.crop_mm / spacing[0])))
        kept = least + int(even[1] * (n - least + 1))
        first = int(even[2] * (n - kept + 1))
        return _Placing(
            (n, int(whole[1]), int(whole[2])),
            (first, first + kept),
            np.column_stack([linear, shift]),
            float(sizes.max()),
            grid_volume.spacing_mm,
        )

    @property
    def is_plain(self) -> bool:
        """Nothing is moved or left out."""
        same = np.array_equal(self.matrix, np.eye(3, 4))
        return same and self.run == (0, self.shape[0])


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) rotation of (k, i, j): about k first, then about i, then about j; radians."""
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [n for n in range(3) if n != axis]
        one = np.eye(3)
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = one @ turn
    return turn


def _placed(
    hu: NDArray[np.int16],
    labels: NDArray[np.unsignedinteger],
    placing: _Placing,
    augmentation: Augmentation,
    means: tuple[_Units, tuple[_Organs, np.random.Generator], np.random.Generator, int],
) -> tuple[NDArray[np.int16], NDArray[np.unsignedinteger]]:
    """The scan where the placing and a smooth field put it, seen by another scanner."""
    units, (organs, bend), scanner, threads = means
    blur_mm, noise_hu = scanner.random(2) * (augmentation.blur_mm, augmentation.noise_hu)
    is_bent = augmentation.elastic_mm or len(organs.centres_mm)
    if placing.is_plain and not (is_bent or blur_mm or noise_hu):
        return hu, labels
    from organfast.kernels import augmentation as kernel

    lattice, pitch = _bending(placing, augmentation, organs, bend)
    unknown = np.iinfo(labels.dtype).max
    hu, labels = np.ascontiguousarray(hu), np.ascontiguousarray(labels)
    scan = (np.maximum(hu, np.int16(units.air)), labels, np.float32(units.air), unknown)
    where = (placing.matrix, lattice, pitch)
    look = (
        *(_taps(blur_mm / s) for s in placing.spacing_mm[1:]),
        float(noise_hu),
        scanner.integers(2**64, dtype=np.uint64),
        units.hu_of,
        units.unit_of,
    )
    first, last = placing.run
    shape = (last - first, *placing.shape[1:])
    out_hu, out_labels = np.empty(shape, np.int16), np.empty(shape, labels.dtype)

    def alter(low: int, high: int) -> None:
        slabs = out_hu[low:high], out_labels[low:high]
        kernel.alter_slices(scan, first + low, where, look, *slabs)

    in_slabs(alter, shape[0], threads)
    return out_hu, out_labels


@dataclass(frozen=True, eq=False)
class _Organs:
    """How organs move and grow: one row each.

    ``centres_mm``, ``reach_mm`` (n, 3) middle and deviation in the scan; ``shift_mm``, ``growth``
    (n, 3) displacement of the middle and share by which it is longer.
    """

    centres_mm: NDArray[np.float64]
    reach_mm: NDArray[np.float64]
    shift_mm: NDArray[np.float64]
    growth: NDArray[np.float64]

    @staticmethod
    def draw(
        labels: NDArray[np.unsignedinteger],
        anatomy: _Anatomy,
        spacing_mm: tuple[float, float, float],
        augmentation: Augmentation,
        rng: np.random.Generator,
    ) -> _Organs:
        """Movable organs only: bones, muscles and vessels that run through all are no islands."""
        if not (augmentation.organ_mm or augmentation.organ_size):
            return _Organs(*(np.zeros((0, 3)) for _ in range(4)))
        movable = [n for n in anatomy.organs if anatomy.colour_group(n) not in UNMOVED_TISSUES]
        thin = labels[::THINNED, ::THINNED, ::THINNED]
        rows = np.zeros(np.iinfo(labels.dtype).max + 1, np.intp)
        rows[movable] = np.arange(1, len(movable) + 1)
        where = np.nonzero(rows[thin])
        row = rows[thin[where]]
        at_mm = np.stack(where, axis=1) * (THINNED * np.array(spacing_mm))
        n = np.bincount(row, minlength=len(movable) + 1)[1:]
        moments = [
            [np.bincount(row, at_mm[:, a] ** power, len(movable) + 1)[1:] for a in range(3)]
            for power in (1, 2)
        ]
        centres, squares = (np.array(m).T / np.maximum(n, 1)[:, None] for m in moments)
        reach = np.sqrt(np.maximum(squares - centres**2, 0))
        shifts = rng.standard_normal((len(movable), 3)).clip(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        growth = rng.standard_normal((len(movable), 3)).clip(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        present = n > 0
        return _Organs(
            centres[present],
            np.maximum(ORGAN_REACH * reach[present], LEAST_REACH_MM),
            augmentation.organ_mm * shifts[present],
            augmentation.organ_size * growth[present],
        )

    def field_mm(self, at_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """From places in the scan (..., 3) to where each is taken from, less the place itself."""
        field = np.zeros(at_mm.shape)
        for centre, reach, shift, growth in zip(
            self.centres_mm, self.reach_mm, self.shift_mm, self.growth, strict=True
        ):
            apart = at_mm - centre
            near = np.exp(-0.5 * ((apart / reach) ** 2).sum(axis=-1))[..., None]
            field -= near * (shift + growth * apart)
        return field


def _bending(
    placing: _Placing, augmentation: Augmentation, organs: _Organs, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Lattice (n_k, n_i, n_j, 3) of displacements in scan voxels, and nodes per voxel.

    White noise under a Gaussian filter, and what the organs add to it. It is made weaker as a whole
    where its steepest place would come near to folding the copy.
    """
    spacing = np.array(placing.spacing_mm)
    between = augmentation.elastic_grain_mm / NODES_PER_GRAIN
    pitch = spacing / between
    nodes = np.ceil((np.array(placing.shape) - 1) * pitch).astype(int) + 2
    field = _smooth_field(nodes, augmentation.elastic_mm, rng)
    if len(organs.centres_mm):
        voxel = np.stack(np.meshgrid(*map(np.arange, nodes), indexing="ij"), axis=-1) / pitch
        field += organs.field_mm((voxel @ placing.matrix[:, :3].T + placing.matrix[:, 3]) * spacing)
    steepest = _steepness(field) / between
    field *= min(1.0, STEEPEST / placing.size / max(steepest, 1e-9))
    return np.asarray(field / spacing, np.float32), pitch


def _smooth_field(
    nodes: NDArray[np.int_], elastic_mm: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(n_k, n_i, n_j, 3) normal numbers of this deviation, alike over a grain."""
    if not elastic_mm:
        return np.zeros((*nodes, 3))
    from scipy.ndimage import gaussian_filter, gaussian_filter1d

    sigma = NODES_PER_GRAIN / 2  # values a grain apart then correlate by 1 / e
    pad = 4 * NODES_PER_GRAIN // 2
    impulse = gaussian_filter1d(np.eye(1, 4 * pad + 1, 2 * pad)[0], sigma)
    deviation = (impulse**2).sum() ** 1.5
    field = np.empty((*nodes, 3))
    inner = (slice(pad, -pad),) * 3
    for axis in range(3):
        noise = rng.standard_normal(nodes + 2 * pad)
        field[..., axis] = gaussian_filter(noise, sigma)[inner] / deviation
    field *= elastic_mm
    return field


def _steepness(field: NDArray[np.float64]) -> float:
    """Bound of the change of a trilinear field (n_k, n_i, n_j, 3) per node, anywhere.

    In each cell: of the four edges along an axis the one along which it changes most, summed as
    squares over the axes (a bound of the Frobenius norm).
    """
    total = np.zeros(np.array(field.shape[:3]) - 1)
    for axis in range(3):
        change = (np.diff(field, axis=axis) ** 2).sum(axis=-1)
        for other in {0, 1, 2} - {axis}:
            n = change.shape[other] - 1
            along = np.arange(n)
            change = np.maximum(change.take(along, other), change.take(along + 1, other))
        total += change
    return float(np.sqrt(total.max()))


def _taps(sigma: float) -> NDArray[np.float32]:
    """Taps of a Gaussian of this deviation in voxels, centre first, as far as 2.5 deviations."""
    n = int(np.ceil(2.5 * sigma)) if sigma > 0.1 else 0
    weights = np.exp(-0.5 * (np.arange(n + 1) / max(sigma, 0.1)) ** 2)
    return np.asarray(weights / (2 * weights.sum() - weights[0]), np.float32)
