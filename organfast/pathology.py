"""Pathology: what disease and implants do to a CT scan whose labels stay as they are.

::

    HU, labels --(lesions, stones, nodules, consolidation: inside an organ)--> diseased organs
               --(screws, prostheses, clips, catheters, stents)--> metal
               --(rays in the slices that hold much of it)--> streaks

A lesion in an organ is part of the organ. A small box around each lesion is worked on, never the
whole scan. What a copy suffers from is drawn from the seed before its labels are looked at, and
what one kind of disease draws does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from organfast.errors import is_whole
from organfast.volume import AIR_HU

__all__ = ["Pathology", "diseased"]

Range = tuple[float, float]
Box = tuple[slice, slice, slice]
Point = NDArray[np.float64]

MOST_HU = 3071
"""The top of the 12-bit scale of scanners (-1024..3071)."""

STREAK_REACH_MM = 110.0
N_RAYS = 720

_PROBABILITIES = (
    *("lesions", "lung_nodules", "consolidations", "calcifications"),
    *("bone_metal", "clips", "vessel_metal"),
)
_LIMITS: dict[str, tuple[float, float, str]] = {
    "n_lesions": (1, 30, "a count"),
    "semi_axis_mm": (0.5, 60, "mm"),
    "nodule_mm": (1, 30, "mm"),  # beyond 3 cm it is a mass (Hansell 2008, Radiology 246:697)
    "consolidation_mm": (5, 100, "mm"),
    "hypodense_hu": (-150, 0, "HU below the organ"),
    "cyst_hu": (-20, 60, "HU"),
    "hypervascular_hu": (0, 150, "HU above the organ"),
    "calcification_hu": (100, 1500, "HU"),
    "nodule_hu": (-100, 150, "HU"),
    "ground_glass_hu": (-850, -100, "HU"),
    "consolidation_hu": (-100, 150, "HU"),
    "metal_hu": (500, MOST_HU, "HU"),
    "streak_hu": (0, 1000, "HU"),
}


@dataclass(frozen=True)
class Pathology:
    """How often copies are diseased, and how much. A kind is off at probability 0.

    Parameters
    ----------
    lesions : float
        Probability that a copy has tumours or cysts in its solid organs (liver, spleen, kidneys,
        pancreas, thyroid).
    lung_nodules : float
        Probability of solid nodules in the lungs.
    consolidations : float
        Probability of ground glass or consolidation, mostly at the posterior base of a lung.
    calcifications : float
        Probability of small calcifications: stones, granulomas, plaques of arteries.
    bone_metal : float
        Probability of a hip prosthesis, a hip screw or pedicle screws.
    clips : float
        Probability of surgical clips at the liver.
    vessel_metal : float
        Probability of a catheter or a stent in a vessel.
    n_lesions : (low, high) int
        Lesions of an organ that has any, both ends included.
    semi_axis_mm : (low, high) float
        Semi-axes of tumours and cysts, lognormal about 8 mm; an organ's size limits them too.
    nodule_mm : (low, high) float
        Diameter of lung nodules.
    consolidation_mm : (low, high) float
        Semi-axes of consolidations.
    hypodense_hu : (low, high) float
        HU of most tumours, relative to the organ around them.
    cyst_hu : (low, high) float
        HU of cysts.
    hypervascular_hu : (low, high) float
        HU of tumours that enhance more than the organ around them, relative to it.
    calcification_hu, nodule_hu, ground_glass_hu, consolidation_hu : (low, high) float
        HU of these lesions.
    metal_hu : (low, high) float
        HU of metal that fills a voxel.
    streak_hu : (low, high) float
        Size of the streaks at the surface of metal.
    texture : float
        Share of the scan's own fine texture that remains in a lesion.

    Raises
    ------
    ValueError
        A probability or ``texture`` is not in 0..1, or a range is not two ascending numbers within
        its limits.
    """

    lesions: float = 0.5
    lung_nodules: float = 0.2
    consolidations: float = 0.2
    calcifications: float = 0.25
    bone_metal: float = 0.12
    clips: float = 0.1
    vessel_metal: float = 0.1
    n_lesions: tuple[int, int] = (1, 6)
    semi_axis_mm: Range = (3.0, 30.0)
    nodule_mm: Range = (3.0, 15.0)
    consolidation_mm: Range = (15.0, 50.0)
    # Chosen: portal venous livers have some 110 HU, hypovascular metastases 50..90.
    hypodense_hu: Range = (-60.0, -15.0)
    # Simple fluid has -9..20 HU (Bosniak 2019; Silverman et al., Radiology 292:475).
    cyst_hu: Range = (0.0, 20.0)
    # Chosen: the enhancement of a hypervascular tumour beyond its organ's.
    hypervascular_hu: Range = (15.0, 60.0)
    # Above 130 HU plaques count as calcified (Agatston 1990, JACC 15:827); the range is chosen.
    calcification_hu: Range = (200.0, 600.0)
    # Chosen: soft tissue, native to enhanced.
    nodule_hu: Range = (0.0, 60.0)
    # Lung without air has -100..100 HU, normally aerated lung -900..-500, poorly aerated lung what
    # lies between (Gattinoni et al. 2001, AJRCCM 164:1701).
    ground_glass_hu: Range = (-700.0, -200.0)
    consolidation_hu: Range = (20.0, 50.0)
    # Steel and titanium exceed the scale, which most scanners cut at 3071; the low end is chosen.
    metal_hu: Range = (2000.0, 3071.0)
    # Chosen; what streaks come of: Barrett and Keat 2004, RadioGraphics 24:1679.
    streak_hu: Range = (60.0, 300.0)
    texture: float = 0.7

    def __post_init__(self) -> None:
        for name in (*_PROBABILITIES, "texture"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        for name, (least, most, unit) in _LIMITS.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name} is {(low, high)}; give (low, high) within {least}..{most}, {unit}"
                )
        if not all(is_whole(n, 1) for n in self.n_lesions):
            raise ValueError(f"n_lesions is {self.n_lesions}; give whole numbers from 1")


@dataclass(frozen=True)
class _Organ:
    """Labels that belong together, how often they have lesions, and of which kinds."""

    patterns: tuple[str, ...]
    often: float
    kinds: tuple[float, float, float]  # hypodense, cyst, hypervascular


# Chosen: what is common is common here, though more so than in patients.
_ORGANS = (
    _Organ(("liver",), 0.7, (0.5, 0.3, 0.2)),
    _Organ(("spleen",), 0.25, (0.8, 0.0, 0.2)),
    _Organ(("kidney_right",), 0.4, (0.25, 0.65, 0.1)),
    _Organ(("kidney_left",), 0.4, (0.25, 0.65, 0.1)),
    _Organ(("pancreas",), 0.25, (0.85, 0.0, 0.15)),
    _Organ(("thyroid*",), 0.3, (0.8, 0.0, 0.2)),
)
_LUNGS = (
    ("lung_right", "lung_*_lobe_right"),
    ("lung_left", "lung_*_lobe_left"),
)
_STONES = (
    (("liver",), 0.2),
    (("spleen",), 0.25),
    (("kidney_right",), 0.25),
    (("kidney_left",), 0.25),
    (("pancreas",), 0.2),
    (("gallbladder",), 0.4),
)
_ARTERIES = ("aorta", "iliac_artery_*")
_VESSELS = ("aorta", "inferior_vena_cava", "superior_vena_cava", "iliac_artery_*", "iliac_vena_*")


@dataclass(frozen=True, eq=False)
class _Scan:
    """The copy that is altered, and where its labels lie."""

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    names: Mapping[int, str]
    steps: Point
    boxes: Sequence[Box | None]

    def numbers(self, patterns: Sequence[str]) -> list[int]:
        """Labels present whose names match."""
        return [
            n
            for n, name in self.names.items()
            if 0 < n <= len(self.boxes)
            and self.boxes[n - 1] is not None
            and any(fnmatchcase(name, p) for p in patterns)
        ]

    def around(self, centre: Point, reach_mm: float | Point) -> Box:
        """The part of the scan within a distance of a voxel along each axis, or each its own."""
        spans = zip(centre, reach_mm / self.steps, self.hu.shape, strict=True)
        a, b, c = (slice(max(0, int(m - r)), max(0, min(n, int(m + r) + 2))) for m, r, n in spans)
        return a, b, c

    def away_mm(self, box: Box, centre: Point) -> list[NDArray[np.float32]]:
        """Distances (mm, signed) of a box's voxels from a voxel, one open grid per axis."""
        axes = zip(box, centre, self.steps, strict=True)
        open_grid = np.ix_(*((np.arange(s.start, s.stop) - c) * step for s, c, step in axes))
        return [g.astype(np.float32) for g in open_grid]


@dataclass(frozen=True, eq=False)
class _Region:
    """The voxels of some labels that belong together."""

    belongs: NDArray[np.bool_]  # (256,) by label
    corner: Point
    mask: NDArray[np.bool_]
    inside: NDArray[np.intp]  # flat indices into the mask

    @staticmethod
    def of(scan: _Scan, numbers: Sequence[int]) -> _Region | None:
        boxes = [box for n in numbers if (box := scan.boxes[n - 1]) is not None]
        if not boxes:
            return None
        k, i, j = (
            slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3)
        )
        belongs = np.zeros(256, bool)
        belongs[list(numbers)] = True
        mask = belongs[scan.labels[k, i, j]]
        corner = np.array([k.start, i.start, j.start], float)
        return _Region(belongs, corner, mask, np.flatnonzero(mask))

    def voxel(self, random: np.random.Generator) -> Point:
        """Any of its voxels."""
        flat = self.inside[int(random.integers(self.inside.size))]
        place: Point = self.corner + np.array(np.unravel_index(flat, self.mask.shape), float)
        return place

    def voxels(self) -> NDArray[np.float64]:
        """(n, 3) all of its voxels."""
        return self.corner + np.stack(np.unravel_index(self.inside, self.mask.shape), 1)

    def radius_mm(self, steps: Point) -> float:
        """Radius of a ball as large."""
        return float((self.inside.size * steps.prod() * 3 / (4 * np.pi)) ** (1 / 3))


@dataclass(frozen=True)
class _Lesion:
    """One ellipsoid of an irregular outline.

    ``hu`` is that of its inside, ``rim_hu`` that of its outer quarter; its edge is softened over
    ``edge_mm``, its outline wavers by ``waver`` of the radius. ``keeps_denser``: what is denser
    already stays, as vessels in ground glass do.
    """

    semi_axes_mm: tuple[float, float, float]
    hu: float
    rim_hu: float
    edge_mm: float
    waver: float = 0.12
    keeps_denser: bool = False


def diseased(
    hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    names: Mapping[int, str],
    spacing_mm: tuple[float, float, float],
    seed: int | Sequence[int],
    pathology: Pathology | None = None,
) -> NDArray[np.int16]:
    """A copy of a scan with lesions, calcifications and metal; its labels stay true.

    Parameters
    ----------
    hu : (n_k, n_i, n_j) int16
        HU in working order: slices feet to head, rows back to front, columns left to right.
    labels : (n_k, n_i, n_j) uint8
        Label map on the same grid.
    names : mapping of int to str
        Name of each label, TotalSegmentator's or canonical; others have no lesions.
    spacing_mm : (k, i, j) float
        Voxel size.
    seed : int or sequence of int
        Decides alone whether and of what a copy suffers.
    pathology : Pathology, optional
        How often, and how much.

    Returns
    -------
    (n_k, n_i, n_j) int16
        HU, -1024..3071 where they were changed.

    Raises
    ------
    ValueError
        Shapes or types do not fit, a spacing is not positive, or the seed is negative.
    """
    from scipy.ndimage import find_objects

    pathology = pathology or Pathology()
    if hu.ndim != 3 or hu.dtype != np.int16 or labels.dtype != np.uint8 or hu.shape != labels.shape:
        raise ValueError(
            f"hu is {hu.dtype} {hu.shape}, labels are {labels.dtype} {labels.shape}; give int16 "
            "and uint8 of one 3-D shape"
        )
    steps = np.asarray(spacing_mm, np.float64)
    if steps.shape != (3,) or not (steps > 0).all():
        raise ValueError(f"spacing_mm is {spacing_mm}; give three lengths above 0 mm")
    key = (seed,) if isinstance(seed, (int, np.integer)) else tuple(seed)
    if not all(is_whole(number, 0) for number in key):
        raise ValueError(f"seed is {seed!r}; give whole numbers from 0")
    boxes = find_objects(labels) if labels.size else []
    scan = _Scan(hu.copy(), labels, names, steps, boxes)
    paints: dict[str, Callable[[_Scan, Pathology, np.random.Generator], None]] = {
        "lesions": _organ_lesions,
        "lung_nodules": _nodules,
        "consolidations": _consolidations,
        "calcifications": _calcifications,
        "bone_metal": _bone_metal,
        "clips": _clips,
        "vessel_metal": _vessel_metal,
    }
    for number, (kind, paint_kind) in enumerate(paints.items()):
        random = np.random.default_rng([*key, 90 + number])
        if random.random() < getattr(pathology, kind):
            paint_kind(scan, pathology, random)
    return scan.hu


def _organ_lesions(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    """Tumours and cysts of the solid organs; an organ's lesions are mostly of one kind."""
    for organ in _ORGANS:
        affected = random.random() < organ.often
        low, high = pathology.n_lesions
        # Few lesions are commoner than many.
        n = low + int((high - low + 1) * random.random() ** 2)
        kind = int(random.choice(3, p=organ.kinds))
        typical = float(np.exp(random.normal(np.log(8), 0.5)))
        seed = int(random.integers(1 << 31))
        region = _Region.of(scan, scan.numbers(organ.patterns)) if affected else None
        if region is None:
            continue
        own = np.random.default_rng(seed)
        largest = max(0.6 * region.radius_mm(scan.steps), pathology.semi_axis_mm[0])
        for _ in range(n):
            other = own.random() < 0.2
            this = int(own.choice(3, p=organ.kinds)) if other else kind
            mean = typical * np.exp(own.normal(0, 0.35))
            axes = (mean * own.uniform(0.8, 1.25, 3)).clip(*pathology.semi_axis_mm).clip(0, largest)
            centre = region.voxel(own)
            lesion = _tumour(this, axes, _local_hu(scan, region, centre), pathology, own)
            _paint_lesion(scan, region, centre, lesion, pathology.texture, own)


def _tumour(
    kind: int, axes: Point, organ_hu: float, pathology: Pathology, random: np.random.Generator
) -> _Lesion:
    semi_axes = (float(axes[0]), float(axes[1]), float(axes[2]))
    if kind == 1:
        fluid = float(random.uniform(*pathology.cyst_hu))
        return _Lesion(semi_axes, fluid, fluid, 2.0, waver=0.05)
    offset = pathology.hypervascular_hu if kind == 2 else pathology.hypodense_hu
    # Necrosis is fluid, no fat: in fatty organs a tumour may not be seen.
    inside = max(organ_hu + float(random.uniform(*offset)), min(organ_hu, 8.0))
    rim = inside
    if kind == 0 and random.random() < 0.3:
        rim = organ_hu + float(random.uniform(5, 35))
    return _Lesion(semi_axes, inside, rim, float(random.uniform(2, 5)))


def _nodules(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    lungs = [
        r for patterns in _LUNGS if (r := _Region.of(scan, scan.numbers(patterns))) is not None
    ]
    low, high = pathology.n_lesions
    for _ in range(int(random.integers(low, high + 1)) if lungs else 0):
        region = lungs[int(random.integers(len(lungs)))]
        low_mm, high_mm = pathology.nodule_mm
        radius = np.exp(random.normal(np.log(7), 0.5)).clip(low_mm, high_mm) / 2
        a, b, c = (radius * random.uniform(0.85, 1.15, 3)).tolist()
        inside = float(random.uniform(*pathology.nodule_hu))
        lesion = _Lesion((a, b, c), inside, inside, 2.0, keeps_denser=True)
        _paint_lesion(scan, region, region.voxel(random), lesion, pathology.texture, random)


def _consolidations(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    """Ground glass or consolidation of one lung or both, where a patient on the back has it."""
    for patterns in _LUNGS:
        affected, dense = random.random() < 0.65, random.random() < 0.5
        seed = int(random.integers(1 << 31))
        region = _Region.of(scan, scan.numbers(patterns)) if affected else None
        if region is None:
            continue
        own = np.random.default_rng(seed)
        largest = 0.7 * region.radius_mm(scan.steps)
        for _ in range(int(own.integers(1, 3))):
            # Of some voxels the one that lies furthest down and back.
            some = np.array([region.voxel(own) for _ in range(6)]) * scan.steps
            centre = some[np.argmin(some[:, 0] + 1.5 * some[:, 1])] / scan.steps
            mean = own.uniform(*pathology.consolidation_mm)
            axes = (mean * own.uniform(0.7, 1.3, 3)).clip(*pathology.consolidation_mm)
            a, b, c = axes.clip(0, largest).tolist()
            wanted = pathology.consolidation_hu if dense else pathology.ground_glass_hu
            inside = float(own.uniform(*wanted))
            edge = float(own.uniform(2, 8) if dense else own.uniform(8, 16))
            lesion = _Lesion((a, b, c), inside, inside, edge, waver=0.25, keeps_denser=True)
            _paint_lesion(scan, region, centre, lesion, pathology.texture, own)


def _calcifications(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    """Stones and granulomas of organs, plaques in the walls of arteries."""
    for patterns, often in (*_STONES, (_ARTERIES, 0.7)):
        affected, seed = random.random() < often, int(random.integers(1 << 31))
        region = _Region.of(scan, scan.numbers(patterns)) if affected else None
        if region is None:
            continue
        own = np.random.default_rng(seed)
        on_wall = patterns == _ARTERIES
        for _ in range(int(own.integers(4, 30)) if on_wall else int(own.integers(1, 5))):
            centre = _at_wall(region, own) if on_wall else region.voxel(own)
            a, b, c = (own.uniform(1.2, 3.0) * own.uniform(0.7, 1.4, 3)).tolist()
            inside = float(own.uniform(*pathology.calcification_hu))
            lesion = _Lesion((a, b, c), inside, inside, 2.0, keeps_denser=True)
            _paint_lesion(scan, region, centre, lesion, pathology.texture, own)


def _at_wall(region: _Region, random: np.random.Generator) -> Point:
    """The last voxel of a region in a direction within the slice, from any of its voxels."""
    start = region.voxel(random) - region.corner
    turn = random.uniform(0, 2 * np.pi)
    ray = start + np.arange(60)[:, None] * np.array([0, np.sin(turn), np.cos(turn)])
    index = np.rint(ray).astype(int)
    fits = ((index >= 0) & (index < region.mask.shape)).all(axis=1)
    fits[fits] = region.mask[tuple(index[fits].T)]
    last = fits.size if fits.all() else int(np.argmin(fits))
    wall: Point = region.corner + index[max(last - 1, 0)]
    return wall


def _local_hu(scan: _Scan, region: _Region, centre: Point) -> float:
    """Median HU of an organ within 15 mm of a voxel."""
    box = scan.around(centre, 15.0)
    return float(np.median(scan.hu[box][region.belongs[scan.labels[box]]]))


def _paint_lesion(
    scan: _Scan,
    region: _Region,
    centre: Point,
    lesion: _Lesion,
    texture: float,
    random: np.random.Generator,
) -> None:
    """Blend a lesion into its organ: its HU, and a share of the fine texture that was there."""
    from scipy.ndimage import gaussian_filter

    box = scan.around(centre, 1.4 * max(lesion.semi_axes_mm) + lesion.edge_mm + 4)
    organ = region.belongs[scan.labels[box]].astype(np.float32)
    radius = _relative_radius(scan.away_mm(box, centre), lesion, random)
    size = float(np.prod(lesion.semi_axes_mm)) ** (1 / 3)
    share = ((1 - radius) * (size / lesion.edge_mm) + 0.5).clip(0, 1)
    # Voxels at the border hold a part of the neighbour too.
    share *= organ * gaussian_filter(organ, 0.5, mode="nearest")
    before = scan.hu[box].astype(np.float32)
    sigma = 4.0 / scan.steps
    weight = gaussian_filter(organ, sigma, mode="nearest").clip(1e-3)
    fine = before - gaussian_filter(before * organ, sigma, mode="nearest") / weight
    in_rim = ((radius - 0.7) / 0.1).clip(0, 1)
    wanted = lesion.hu + (lesion.rim_hu - lesion.hu) * in_rim
    wanted += texture * fine.clip(-50, 50)
    if lesion.keeps_denser:
        wanted = np.maximum(wanted, before)
    after = before + share * (wanted - before)
    scan.hu[box] = np.where(share > 0, np.rint(after).clip(AIR_HU, MOST_HU), before)


def _relative_radius(
    away: list[NDArray[np.float32]], lesion: _Lesion, random: np.random.Generator
) -> NDArray[np.float32]:
    """Distance from a lesion's centre, 1 on its outline: a turned ellipsoid with smooth bumps."""
    turn = np.linalg.qr(random.standard_normal((3, 3)))[0] / np.array(lesion.semi_axes_mm)
    turn = turn.astype(np.float32)
    q = [away[0] * turn[0, a] + away[1] * turn[1, a] + away[2] * turn[2, a] for a in range(3)]
    radius = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
    by = 1 / radius.clip(1e-3)
    outline = np.ones_like(radius)
    for _ in range(5):
        wave = (random.standard_normal(3) * 1.8).astype(np.float32)
        phase = np.float32(random.uniform(0, 2 * np.pi))
        along = (q[0] * wave[0] + q[1] * wave[1] + q[2] * wave[2]) * by
        outline += np.float32(lesion.waver * 0.63) * np.cos(along + phase)
    return np.asarray(radius / outline.clip(0.5, 1.4), np.float32)


@dataclass(frozen=True, eq=False)
class _Rod:
    """A piece of metal with round ends, in voxels; a ball if its ends meet."""

    start: Point
    stop: Point
    radius_mm: float


def _bone_metal(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    """Pedicle screws, or a hip that was mended: the first that the labels have room for."""
    spine_first, seed = random.random() < 0.5, int(random.integers(1 << 31))
    for build in (_spine_rods, _hip_rods) if spine_first else (_hip_rods, _spine_rods):
        rods = build(scan, np.random.default_rng(seed))
        if rods:
            break
    hu = float(random.uniform(*pathology.metal_hu))
    _streaks(scan, rods, float(random.uniform(*pathology.streak_hu)), random)
    for rod in rods:
        _paint_rod(scan, rod, hu)


def _spine_rods(scan: _Scan, random: np.random.Generator) -> list[_Rod]:
    """Two screws in each of some neighbouring vertebrae, a rod behind them on either side."""
    region = _Region.of(
        scan, scan.numbers(("vertebrae_[TL]*", "vertebrae_above", "vertebrae_below"))
    )
    n_wanted, place = int(random.integers(2, 5)), random.random()
    if region is None:
        return []
    middles = _vertebrae(scan, region)
    n = min(n_wanted, len(middles))
    first = int(place * (len(middles) - n + 1))
    radius, lean = random.uniform(2.4, 3.3), random.uniform(-3, 3)
    rods: list[_Rod] = []
    heads: dict[int, list[Point]] = {-1: [], 1: []}
    for middle in middles[first : first + n]:
        for side in (-1, 1):
            # Through the pedicle, some 13 mm beside the canal, towards the front and the middle.
            head = middle + np.array([0, -24, side * 18]) / scan.steps
            tip = middle + np.array([lean, 20, side * 8]) / scan.steps
            rods.append(_Rod(head, tip, radius))
            heads[side].append(head)
    for side in (-1, 1):
        rods += [_Rod(a, b, 2.75) for a, b in pairwise(heads[side])]
    return rods


def _vertebrae(scan: _Scan, region: _Region) -> list[Point]:
    """Middles of vertebrae feet to head; of labels that hold several, one every 33 mm."""
    voxels = region.voxels()
    which = scan.labels[tuple(voxels.astype(int).T)]
    middles = []
    for label in np.unique(which):
        own = voxels[which == label]
        low, high = own[:, 0].min(), own[:, 0].max()
        n = max(1, round((high - low) * scan.steps[0] / 33 - 0.6))
        for k in low + (high - low) * (np.arange(n) + 0.5) / n:
            near = own[np.abs(own[:, 0] - k) * scan.steps[0] < 14]
            if len(near) * scan.steps.prod() > 4000:
                middles.append(np.array([k, *near[:, 1:].mean(axis=0)]))
    return sorted(middles, key=lambda middle: float(middle[0]))


def _hip_rods(scan: _Scan, random: np.random.Generator) -> list[_Rod]:
    """A prosthesis or a hip screw in a femur, or a screw in the hip bone if there is none."""
    right, replaced = random.random() < 0.5, random.random() < 0.5
    femur = _Region.of(scan, scan.numbers(("femur*",)))
    if femur is not None:
        middle = _middle_column(scan)
        voxels = femur.voxels()
        lateral = (voxels[:, 2] - middle) * (1 if right else -1)
        if not (lateral > 0).any():
            lateral = -lateral
        outward = float(np.sign(voxels[np.argmax(lateral), 2] - middle))
        side = voxels[lateral > 0] * scan.steps
        if len(side) and np.ptp(side[:, 0]) > 45:
            return _femur_rods(side, outward, replaced, random, scan.steps)
    bone = _Region.of(scan, scan.numbers(("hip_*", "pelvis")))
    if bone is None:
        return []
    a = bone.voxel(random)
    length = random.uniform(25, 60)
    others = [bone.voxel(random) for _ in range(30)]
    b = min(others, key=lambda o: abs(float(np.linalg.norm((o - a) * scan.steps)) - length))
    return [_Rod(a, b, float(random.uniform(2.2, 3.5)))]


def _middle_column(scan: _Scan) -> float:
    """Column of the middle plane: halfway between the outermost named labels."""
    named = [scan.boxes[n - 1] for n in scan.numbers(("*",))]
    columns = [(box[2].start, box[2].stop) for box in named if box is not None]
    return float(min(low for low, _ in columns) + max(high for _, high in columns)) / 2


def _femur_rods(
    side: NDArray[np.float64],
    outward: float,
    replaced: bool,
    random: np.random.Generator,
    steps: Point,
) -> list[_Rod]:
    """Metal in one femur, whose voxels are given in mm."""
    top, bottom = side[:, 0].max(), side[:, 0].min()
    head = side[side[:, 0] > top - 46]
    inner = (head[:, 2] * outward).min()
    ball = head[head[:, 2] * outward < inner + 46].mean(axis=0)

    def shaft(below: float) -> Point:
        k = max(top - below, bottom)
        off = np.abs(side[:, 0] - k)
        near = side[off < off.min() + 5]
        return np.array([k, *near[:, 1:].mean(axis=0)])

    if replaced:
        radius = random.uniform(13, 17)
        neck, end = shaft(62.0), shaft(random.uniform(130, 170))
        pieces = [(ball, ball, radius), (ball, neck, 6.5), (neck, end, random.uniform(5, 7))]
    else:
        cortex = shaft(75.0) + np.array([0, 0, 14 * outward])
        tip = ball + 0.25 * (ball - cortex) * 12 / np.linalg.norm(ball - cortex)
        plate = shaft(150.0) + np.array([0, 0, 15 * outward])
        pieces = [(cortex, tip, random.uniform(3.8, 5)), (cortex, plate, 3.5)]
    return [_Rod(a / steps, b / steps, float(r)) for a, b, r in pieces]


def _clips(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    """Clips of 4..8 mm beside one another: where the gallbladder is, else at the liver's border."""
    near, liver = (_Region.of(scan, scan.numbers((name,))) for name in ("gallbladder", "liver"))
    region = near or liver
    if region is None:
        return
    place = _at_wall(region, random)
    # The streaks of one stand for those of all.
    one = _Rod(place, place, 1.5)
    _streaks(scan, [one], 0.4 * float(random.uniform(*pathology.streak_hu)), random)
    for _ in range(int(random.integers(2, 7))):
        middle = place + random.normal(0, 7, 3) / scan.steps
        along = random.standard_normal(3)
        along *= random.uniform(2, 4) / np.linalg.norm(along) / scan.steps
        hu = float(random.uniform(*pathology.metal_hu))
        _paint_rod(scan, _Rod(middle - along, middle + along, random.uniform(1.0, 1.6)), hu)


def _vessel_metal(scan: _Scan, pathology: Pathology, random: np.random.Generator) -> None:
    """A catheter along a vessel, or a stent at its wall."""
    numbers = scan.numbers(_VESSELS)
    which, is_stent = random.random(), random.random() < 0.5
    length, place = random.uniform(40, 160), random.random()
    hu, radius = float(random.uniform(*pathology.metal_hu)), float(random.uniform(0.8, 1.3))
    if not numbers:
        return
    region = _Region.of(scan, [numbers[int(which * len(numbers))]])
    if region is None:
        return
    path = _vessel_path(scan, region)
    n = min(len(path), round(length / scan.steps[0]))
    path = path[int(place * (len(path) - n)) :][:n]
    if is_stent and n:
        low, high = int(path[0][0] - region.corner[0]), int(path[-1][0] - region.corner[0])
        _paint_stent(scan, region, slice(low, high + 1), hu)
        return
    for a, b in pairwise(path):
        _paint_rod(scan, _Rod(a, b, radius), hu)


def _vessel_path(scan: _Scan, region: _Region) -> list[Point]:
    """Middles of a vessel's sections in the longest run of slices where they are round."""
    best: list[Point] = []
    run: list[Point] = []
    for k, page in enumerate(region.mask):
        i, j = np.nonzero(page)
        wide = max(np.ptp(i) * scan.steps[1], np.ptp(j) * scan.steps[2]) if i.size else 0.0
        round_enough = i.size > 0 and i.size * scan.steps[1] * scan.steps[2] > 0.45 * wide**2
        if round_enough:
            run.append(region.corner + np.array([k, i.mean(), j.mean()]))
        if not round_enough or k == len(region.mask) - 1:
            best, run = max(best, run, key=len), []
    return best


def _paint_stent(scan: _Scan, region: _Region, slices: slice, hu: float) -> None:
    """Wires at the wall of a vessel, rhombs of them; a wire fills a third of a voxel at most."""
    from scipy.ndimage import binary_erosion

    k0, i0, j0 = region.corner.astype(int).tolist()
    mask = region.mask[slices]
    for k, page in enumerate(mask, start=slices.start):
        i, j = np.nonzero(page & ~binary_erosion(page))
        turn = np.arctan2(i - i.mean(), j - j.mean())
        rise = k * scan.steps[0] / 9
        wires = np.abs(np.cos(4 * turn + rise) * np.cos(4 * turn - rise))
        at = scan.hu[k0 + k, i0 + i, j0 + j].astype(np.float64)
        at += (hu - at) * 0.33 * wires
        scan.hu[k0 + k, i0 + i, j0 + j] = np.rint(at).clip(AIR_HU, MOST_HU)


def _paint_rod(scan: _Scan, rod: _Rod, hu: float) -> None:
    """Metal in a box around a rod, its edge softened over a voxel."""
    middle = (rod.start + rod.stop) / 2
    half = np.abs(rod.stop - rod.start) / 2 * scan.steps + rod.radius_mm + scan.steps
    box = scan.around(middle, half)
    if any(s.stop <= s.start for s in box):
        return
    away = scan.away_mm(box, rod.start)
    along = ((rod.stop - rod.start) * scan.steps).astype(np.float32)
    length2 = float(along @ along)
    t = sum(d * x for d, x in zip(away, along, strict=True)) / max(length2, 1e-6)
    t = np.clip(t, 0, 1)
    distance = np.sqrt(sum((d - t * x) ** 2 for d, x in zip(away, along, strict=True)))
    voxel = float(scan.steps.prod()) ** (1 / 3)
    share = ((rod.radius_mm - distance) / voxel + 0.5).clip(0, 1)
    before = scan.hu[box].astype(np.float32)
    scan.hu[box] = np.rint(before + share * (hu - before)).clip(AIR_HU, MOST_HU)


def _streaks(scan: _Scan, rods: Sequence[_Rod], hu: float, random: np.random.Generator) -> None:
    """Bright and dark rays in the slice around metal, weaker with the distance.

    Dark along the section's long side, where most rays are swallowed; beside it rays of either
    sign, which change slowly from slice to slice.
    """
    for rod in rods:
        low = min(rod.start[0], rod.stop[0]) - rod.radius_mm / scan.steps[0]
        high = max(rod.start[0], rod.stop[0]) + rod.radius_mm / scan.steps[0]
        rays, drift = _rays(random), _rays(random)
        for k in range(max(0, int(np.ceil(low))), min(len(scan.hu), int(high) + 1)):
            turn = 0.35 * (k - low)
            fan = np.cos(turn) * rays + np.sin(turn) * drift
            _streak_slice(scan, k, rod, hu * fan, hu)


def _rays(random: np.random.Generator) -> NDArray[np.float32]:
    """(N_RAYS,) smooth noise over a full turn, deviation 1."""
    spectrum = np.fft.rfft(random.standard_normal(N_RAYS))
    frequency = np.arange(spectrum.size)
    spectrum *= np.exp(-(((frequency - 5) / 16.0) ** 2))
    noise = np.fft.irfft(spectrum, N_RAYS)
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def _streak_slice(scan: _Scan, k: int, rod: _Rod, fan: NDArray[np.float32], hu: float) -> None:
    """Streaks of one rod in one slice."""
    start, stop, steps = rod.start, rod.stop, scan.steps
    rise = stop[0] - start[0]
    # The part of the rod that lies within half its thickness of the slice.
    half = max(0.5, rod.radius_mm / steps[0])
    if abs(rise) < 1e-6:
        t = np.array([0.0, 1.0])
    else:
        t = np.sort(((k + np.array([-half, half])) - start[0]) / rise).clip(0, 1)
    ends = start + t[:, None] * (stop - start)
    middle = ends.mean(axis=0)
    i, j = scan.around(middle, STREAK_REACH_MM)[1:]
    away = scan.away_mm((slice(k, k + 1), i, j), middle)
    y, x = away[1][0], away[2][0]
    along = ((ends[1] - ends[0]) * steps)[1:]
    length = float(np.hypot(*along))
    axis = float(np.arctan2(along[0], along[1])) if length > 1 else 0.0
    distance = np.hypot(y, x)
    angle = np.arctan2(y, x)
    ray = fan[((angle + np.pi) * (N_RAYS / (2 * np.pi))).astype(np.int32) % N_RAYS]
    lengthwise = np.abs(np.cos(angle - axis)) ** 24 * min(length / 12, 1.0)
    near = rod.radius_mm + length / 4
    beyond = (distance - near).clip(0)
    # Little metal, thin rays; at the end of their reach they have faded.
    fall = near / (near + beyond) * np.exp(-beyond / 50) * (1 - distance / STREAK_REACH_MM)
    before = scan.hu[k, i, j].astype(np.float32)
    change = (0.7 * ray - 1.1 * hu * lengthwise) * fall.clip(0)
    # Air outside the body stays air.
    change *= before > -950
    scan.hu[k, i, j] = np.rint(before + change).clip(AIR_HU, MOST_HU)
