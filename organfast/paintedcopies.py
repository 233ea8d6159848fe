"""Painted copies: one labelled anatomy becomes any number of CT scans of patients who could be.

::

    label map --(thinned to 2 mm)--> --(altered_copy: sizes, postures, organs)--> another anatomy
              --(paint: tissues, phase, scanner, a body where none is labelled)--> CT at 2 mm
              --(diseased: lesions, metal)--> --(thick slices, field of view)-->
              CT scan and its labels, on one grid
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.augmentation import Augmentation, altered_copy
from organfast.errors import is_whole
from organfast.grid import GridVolume
from organfast.painting import BEDS, LabelMap, Protocol, paint
from organfast.pathology import Pathology, diseased
from organfast.surroundings import ARMS
from organfast.volume import AIR_HU, Volume

__all__ = ["Variety", "painted_copy"]

PAINTED_MM = 2.0
_AFFINE = np.diag([PAINTED_MM, PAINTED_MM, PAINTED_MM, 1.0])
ROOM_MM = 70.0
"""Room around the labels for the fat and the skin of a body that is made up."""
ARMS_MM = 60.0
"""More room on either side, for arms."""


def _people() -> Augmentation:
    return Augmentation(
        elastic_mm=5.0,
        elastic_grain_mm=90.0,
        organ_mm=6.0,
        organ_size=0.10,
        scale=(0.8, 1.25),
        stretch=0.08,
        rotation_deg=6.0,
        recolour_hu=0.0,
        recolour_contrast=0.0,
        shift_hu=0.0,
        gain=0.0,
    )


@dataclass(frozen=True)
class Variety:
    """How painted copies differ.

    Parameters
    ----------
    people : Augmentation
        How the anatomy is altered; what it says of HU, blur and noise is the painter's to choose.
    thickness_mm : (low, high) float
        Slice thickness of the scanner; drawn evenly.
    view_mm : (low, high) float
        Field of view in the slice; what lies outside is not seen. Drawn evenly, and made no
        smaller than needed to see the middle of the body.
    length_mm : (low, high) float
        Each copy shows a random run of slices of a length drawn evenly, or all of a shorter one:
        where a scan ends must be no cue.
    pathology : Pathology or None
        What copies suffer from, and what implants they have; None leaves them healthy.
    arms : (beside, folded) float
        Share of copies with the arms along the trunk, and of those with the arms folded over the
        belly; the others have raised them.
    bedding : float
        Share of copies that may lie on a cushion, under a blanket or both. Beds differ, too.

    Raises
    ------
    ValueError
        A range is not of two positive numbers, the lower first; a share is outside 0..1.
    """

    people: Augmentation = field(default_factory=_people)
    thickness_mm: tuple[float, float] = (2.0, 6.0)
    view_mm: tuple[float, float] = (320.0, 500.0)
    length_mm: tuple[float, float] = (60.0, 700.0)
    pathology: Pathology | None = field(default_factory=Pathology)
    arms: tuple[float, float] = (0.25, 0.1)
    bedding: float = 0.4

    def __post_init__(self) -> None:
        for name in ("thickness_mm", "view_mm", "length_mm"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}; give (low, high) from above 0 mm")
        if not (min(self.arms) >= 0 and sum(self.arms) <= 1 and 0 <= self.bedding <= 1):
            raise ValueError(
                f"arms {self.arms} and bedding {self.bedding} are shares; give 0..1, arms together"
            )


def painted_copy(
    label_map: LabelMap,
    seed: int | Sequence[int],
    variety: Variety | None = None,
    *,
    threads: int = 1,
) -> tuple[Volume, NDArray[np.uint8]]:
    """Paint a CT scan of somebody whose anatomy is an altered copy of a label map's.

    Parameters
    ----------
    label_map : LabelMap
        The anatomy, at most 254 labels.
    seed : int or sequence of int
        Seed of the anatomy, the tissues, the diseases, the scanner and the field of view.
    variety : Variety, optional
        How much copies differ.
    threads : int
        Threads; the result does not depend on it.

    Returns
    -------
    volume : Volume
        HU at 2 mm, axes left to right, back to front, feet to head.
    labels : (n_x, n_y, n_z) uint8
        Label map on the volume's grid, in the label map's numbers; 0 = unlabelled.

    Raises
    ------
    ValueError
        The label map has too many labels, or ``threads`` is below 1.
    """
    variety = variety or Variety()
    key = (seed,) if isinstance(seed, (int, np.integer)) else tuple(seed)
    if not all(is_whole(number, 0) for number in key):
        raise ValueError(f"seed is {seed!r}; give whole numbers from 0")
    rng = np.random.default_rng([*key, 5])
    chosen = int(rng.integers(1 << 31))
    protocol = _protocol(chosen, key, variety)
    room_mm = ROOM_MM + ARMS_MM * (protocol.arms != "up")
    labels, known = _another(label_map, key, variety.people, room_mm, threads)
    anatomy = LabelMap(labels.T, _AFFINE, label_map.names)
    painted = paint(anatomy, chosen, protocol, threads=threads)
    hu = np.ascontiguousarray(painted.working)
    if variety.pathology is not None:
        spacing = (PAINTED_MM,) * 3
        hu = diseased(hu, labels, label_map.names, spacing, (*key, 7), variety.pathology)
    _thicken(hu, rng.uniform(*variety.thickness_mm) / PAINTED_MM)
    seen = _seen(hu, known, rng, variety)
    return Volume(np.ascontiguousarray(hu[seen]).T, _AFFINE), np.ascontiguousarray(labels[seen]).T


def _protocol(seed: int, key: tuple[int, ...], variety: Variety) -> Protocol:
    """How a copy is scanned, arms and bed included."""
    rng = np.random.default_rng([*key, 8])
    arms = ARMS[int(rng.choice(3, p=[1 - sum(variety.arms), *variety.arms]))]
    bed = BEDS[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
    bedding = bool(rng.random() < variety.bedding)
    return replace(Protocol.draw(seed), arms=arms, bed=bed, bedding=bedding)


def _another(
    label_map: LabelMap,
    key: tuple[int, ...],
    people: Augmentation,
    room_mm: float,
    threads: int,
) -> tuple[NDArray[np.uint8], slice]:
    """An altered anatomy at 2 mm in working order, and the slices in which it is known."""
    numbers = sorted(label_map.present())
    if len(numbers) > 254:
        raise ValueError(f"the label map has {len(numbers)} labels; at most 254 can be altered")
    working, spacing = label_map.working, np.array(label_map.working_spacing_mm)
    index = [
        np.minimum(np.arange(max(1, round(n * s / PAINTED_MM))) * PAINTED_MM / s + 0.5, n - 1)
        for n, s in zip(working.shape, spacing, strict=True)
    ]
    # Numbers of the class table and beside it: here there is no table but background.
    lookup = np.zeros(1 << (8 * label_map.labels.itemsize), np.uint8)
    lookup[numbers] = np.arange(1, len(numbers) + 1)
    thin = lookup[working[np.ix_(*(i.astype(np.intp) for i in index))]]
    room, beside = (round(mm / PAINTED_MM) for mm in (ROOM_MM, room_mm))
    thin = np.pad(thin, ((0, 0), (room, room), (beside, beside)))
    nothing = ClassTable.default().keep(["background"])
    volume = GridVolume(np.broadcast_to(np.int16(AIR_HU), thin.shape), spacing_mm=(PAINTED_MM,) * 3)
    names = [label_map.names[n] for n in numbers]
    _, altered = altered_copy(volume, thin, nothing, people, key, beside=names, threads=threads)
    unknown = np.array([(page == 255).mean() for page in altered])
    inside = np.flatnonzero(unknown < 0.02)
    back = np.zeros(256, np.uint8)
    back[1 : len(numbers) + 1] = numbers
    return back[altered], slice(int(inside[0]), int(inside[-1]) + 1)


def _thicken(hu: NDArray[np.int16], thickness: float) -> None:
    """Average along the slices in place, as a scanner with slices of so many voxels does."""
    from scipy.ndimage import gaussian_filter1d

    # The deviation of a box of this width, less that of a slice as it was painted.
    sigma = np.sqrt(max(thickness**2 - 1, 0) / 12)
    if sigma > 0.2:
        gaussian_filter1d(hu, sigma, axis=0, output=hu, mode="nearest", truncate=3)


def _seen(
    hu: NDArray[np.int16], known: slice, rng: np.random.Generator, variety: Variety
) -> tuple[slice, slice, slice]:
    """The field of view: a run of slices, and a square about the middle of the body."""
    n = known.stop - known.start
    length = rng.uniform(*variety.length_mm) / PAINTED_MM
    n_seen = int(np.clip(np.rint(length), 1, n))
    first = known.start + int(rng.integers(0, n - n_seen + 1))
    view = rng.uniform(*variety.view_mm) / PAINTED_MM
    flat = (hu[known] > -200).any(axis=0)
    sides = []
    for axis in (0, 1):
        filled = np.flatnonzero(np.any(flat, axis=1 - axis))
        low, high = (filled[0], filled[-1] + 1) if filled.size else (0, flat.shape[axis])
        middle = (low + high) / 2 + rng.normal(0, 8)
        size = flat.shape[axis]
        start = int(np.clip(middle - view / 2, 0, size))
        stop = int(np.clip(middle + view / 2, start + 1, size))
        sides.append(slice(start, stop))
    return slice(first, first + n_seen), sides[0], sides[1]
