"""Lesions: tumours, cysts, nodules, consolidations and calcifications inside organs.

A lesion is part of its organ, and only the organ's own voxels change. A small box around each
lesion is worked on, never the whole scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from organfast.diseasedscan import MOST_HU, DiseasedScan, Point, Range, Region
from organfast.volume import AIR_HU

__all__ = ["calcifications", "consolidations", "nodules", "organ_lesions"]


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


def organ_lesions(
    scan: DiseasedScan,
    n_lesions: tuple[int, int],
    semi_axis_mm: Range,
    tumour_hu: tuple[Range, Range, Range],
    texture: float,
    random: np.random.Generator,
) -> None:
    """Tumours and cysts of the solid organs; an organ's lesions are mostly of one kind.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    n_lesions : (low, high) int
        Lesions of an organ that has any, both ends included.
    semi_axis_mm : (low, high) float
        Semi-axes; an organ's size limits them too.
    tumour_hu : three of (low, high) float
        HU of hypodense tumours relative to the organ, of cysts, and of hypervascular tumours
        relative to the organ.
    texture : float
        Share of the scan's own fine texture that remains.
    random : numpy.random.Generator
        Where they come from.
    """
    for organ in _ORGANS:
        affected = random.random() < organ.often
        low, high = n_lesions
        # Few lesions are commoner than many.
        n = low + int((high - low + 1) * random.random() ** 2)
        kind = int(random.choice(3, p=organ.kinds))
        typical = float(np.exp(random.normal(np.log(8), 0.5)))
        seed = int(random.integers(1 << 31))
        region = Region.of(scan, scan.numbers(organ.patterns)) if affected else None
        if region is None:
            continue
        own = np.random.default_rng(seed)
        largest = max(0.6 * region.radius_mm(scan.steps), semi_axis_mm[0])
        for _ in range(n):
            other = own.random() < 0.2
            this = int(own.choice(3, p=organ.kinds)) if other else kind
            mean = typical * np.exp(own.normal(0, 0.35))
            axes = (mean * own.uniform(0.8, 1.25, 3)).clip(*semi_axis_mm).clip(0, largest)
            centre = region.voxel(own)
            lesion = _tumour(this, axes, _local_hu(scan, region, centre), tumour_hu, own)
            _paint_lesion(scan, region, centre, lesion, texture, own)


def _tumour(
    kind: int,
    axes: Point,
    organ_hu: float,
    tumour_hu: tuple[Range, Range, Range],
    random: np.random.Generator,
) -> _Lesion:
    semi_axes = (float(axes[0]), float(axes[1]), float(axes[2]))
    if kind == 1:
        fluid = float(random.uniform(*tumour_hu[kind]))
        return _Lesion(semi_axes, fluid, fluid, 2.0, waver=0.05)
    # Necrosis is fluid, no fat: in fatty organs a tumour may not be seen.
    inside = max(organ_hu + float(random.uniform(*tumour_hu[kind])), min(organ_hu, 8.0))
    rim = inside
    if kind == 0 and random.random() < 0.3:
        rim = organ_hu + float(random.uniform(5, 35))
    return _Lesion(semi_axes, inside, rim, float(random.uniform(2, 5)))


def nodules(
    scan: DiseasedScan,
    n_lesions: tuple[int, int],
    nodule_mm: Range,
    nodule_hu: Range,
    texture: float,
    random: np.random.Generator,
) -> None:
    """Solid nodules of the lungs.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    n_lesions : (low, high) int
        Nodules of both lungs together, both ends included.
    nodule_mm, nodule_hu : (low, high) float
        Diameter and HU.
    texture : float
        Share of the scan's own fine texture that remains.
    random : numpy.random.Generator
        Where they come from.
    """
    lungs = [r for patterns in _LUNGS if (r := Region.of(scan, scan.numbers(patterns))) is not None]
    low, high = n_lesions
    for _ in range(int(random.integers(low, high + 1)) if lungs else 0):
        region = lungs[int(random.integers(len(lungs)))]
        low_mm, high_mm = nodule_mm
        radius = np.exp(random.normal(np.log(7), 0.5)).clip(low_mm, high_mm) / 2
        a, b, c = (radius * random.uniform(0.85, 1.15, 3)).tolist()
        inside = float(random.uniform(*nodule_hu))
        lesion = _Lesion((a, b, c), inside, inside, 2.0, keeps_denser=True)
        _paint_lesion(scan, region, region.voxel(random), lesion, texture, random)


def consolidations(
    scan: DiseasedScan,
    consolidation_mm: Range,
    consolidation_hu: Range,
    ground_glass_hu: Range,
    texture: float,
    random: np.random.Generator,
) -> None:
    """Ground glass or consolidation of one lung or both, where a patient on the back has it.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    consolidation_mm : (low, high) float
        Semi-axes of either; a lung's size limits them too.
    consolidation_hu, ground_glass_hu : (low, high) float
        HU.
    texture : float
        Share of the scan's own fine texture that remains.
    random : numpy.random.Generator
        Where they come from.
    """
    for patterns in _LUNGS:
        affected, dense = random.random() < 0.65, random.random() < 0.5
        seed = int(random.integers(1 << 31))
        region = Region.of(scan, scan.numbers(patterns)) if affected else None
        if region is None:
            continue
        own = np.random.default_rng(seed)
        largest = 0.7 * region.radius_mm(scan.steps)
        for _ in range(int(own.integers(1, 3))):
            # Of some voxels the one that lies furthest down and back.
            some = np.array([region.voxel(own) for _ in range(6)]) * scan.steps
            centre = some[np.argmin(some[:, 0] + 1.5 * some[:, 1])] / scan.steps
            mean = own.uniform(*consolidation_mm)
            axes = (mean * own.uniform(0.7, 1.3, 3)).clip(*consolidation_mm)
            a, b, c = axes.clip(0, largest).tolist()
            wanted = consolidation_hu if dense else ground_glass_hu
            inside = float(own.uniform(*wanted))
            edge = float(own.uniform(2, 8) if dense else own.uniform(8, 16))
            lesion = _Lesion((a, b, c), inside, inside, edge, waver=0.25, keeps_denser=True)
            _paint_lesion(scan, region, centre, lesion, texture, own)


def calcifications(
    scan: DiseasedScan, calcification_hu: Range, texture: float, random: np.random.Generator
) -> None:
    """Stones and granulomas of organs, plaques in the walls of arteries.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    calcification_hu : (low, high) float
        HU.
    texture : float
        Share of the scan's own fine texture that remains.
    random : numpy.random.Generator
        Where they come from.
    """
    for patterns, often in (*_STONES, (_ARTERIES, 0.7)):
        affected, seed = random.random() < often, int(random.integers(1 << 31))
        region = Region.of(scan, scan.numbers(patterns)) if affected else None
        if region is None:
            continue
        own = np.random.default_rng(seed)
        on_wall = patterns == _ARTERIES
        for _ in range(int(own.integers(4, 30)) if on_wall else int(own.integers(1, 5))):
            centre = region.voxel_at_wall(own) if on_wall else region.voxel(own)
            a, b, c = (own.uniform(1.2, 3.0) * own.uniform(0.7, 1.4, 3)).tolist()
            inside = float(own.uniform(*calcification_hu))
            lesion = _Lesion((a, b, c), inside, inside, 2.0, keeps_denser=True)
            _paint_lesion(scan, region, centre, lesion, texture, own)


def _local_hu(scan: DiseasedScan, region: Region, centre: Point) -> float:
    """Median HU of an organ within 15 mm of a voxel."""
    box = scan.around(centre, 15.0)
    return float(np.median(scan.hu[box][region.belongs[scan.labels[box]]]))


def _paint_lesion(
    scan: DiseasedScan,
    region: Region,
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
