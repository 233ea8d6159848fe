"""Pathology: what disease and implants do to a CT scan whose labels stay as they are.

::

    HU, labels --(lesions, stones, nodules, consolidation: inside an organ)--> diseased organs
               --(screws, prostheses, clips, catheters, stents)--> metal
               --(rays in the slices that hold much of it)--> streaks

A lesion in an organ is part of the organ (``organfast.lesions``); metal lies where it would be put
(``organfast.metal``). What a copy suffers from is drawn from the seed before its labels are looked
at, and what one kind of disease draws does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from organfast.diseasedscan import MOST_HU, DiseasedScan, Range
from organfast.errors import is_whole
from organfast.lesions import calcifications, consolidations, nodules, organ_lesions
from organfast.metal import bone_metal, clips, vessel_metal

__all__ = ["Pathology", "diseased"]

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
    scan = DiseasedScan(hu.copy(), labels, names, steps, boxes)
    for number, (kind, paint_kind) in enumerate(_paints(scan, pathology).items()):
        random = np.random.default_rng([*key, 90 + number])
        if random.random() < getattr(pathology, kind):
            paint_kind(random)
    return scan.hu


def _paints(
    scan: DiseasedScan, wanted: Pathology
) -> dict[str, Callable[[np.random.Generator], None]]:
    """What paints each kind of disease, in the order that numbers their seeds."""
    tumour_hu = (wanted.hypodense_hu, wanted.cyst_hu, wanted.hypervascular_hu)
    return {
        "lesions": partial(
            organ_lesions, scan, wanted.n_lesions, wanted.semi_axis_mm, tumour_hu, wanted.texture
        ),
        "lung_nodules": partial(
            nodules, scan, wanted.n_lesions, wanted.nodule_mm, wanted.nodule_hu, wanted.texture
        ),
        "consolidations": partial(
            consolidations,
            scan,
            wanted.consolidation_mm,
            wanted.consolidation_hu,
            wanted.ground_glass_hu,
            wanted.texture,
        ),
        "calcifications": partial(calcifications, scan, wanted.calcification_hu, wanted.texture),
        "bone_metal": partial(bone_metal, scan, wanted.metal_hu, wanted.streak_hu),
        "clips": partial(clips, scan, wanted.metal_hu, wanted.streak_hu),
        "vessel_metal": partial(vessel_metal, scan, wanted.metal_hu),
    }
