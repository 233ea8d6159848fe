"""Metal: rods, screws, prostheses, clips, catheters and stents, and the streaks beside them.

A small box around each piece is worked on; streaks lie in the slices that hold metal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from organfast.diseasedscan import MOST_HU, DiseasedScan, Point, Range, Region
from organfast.volume import AIR_HU

__all__ = ["bone_metal", "clips", "vessel_metal"]

STREAK_REACH_MM = 110.0
N_RAYS = 720
_VESSELS = ("aorta", "inferior_vena_cava", "superior_vena_cava", "iliac_artery_*", "iliac_vena_*")


@dataclass(frozen=True, eq=False)
class _Rod:
    """A piece of metal with round ends, in voxels; a ball if its ends meet."""

    start: Point
    stop: Point
    radius_mm: float


def bone_metal(
    scan: DiseasedScan, metal_hu: Range, streak_hu: Range, random: np.random.Generator
) -> None:
    """Pedicle screws, or a hip that was mended: the first that the labels have room for.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    metal_hu : (low, high) float
        HU of metal that fills a voxel.
    streak_hu : (low, high) float
        Size of the streaks at the surface of metal.
    random : numpy.random.Generator
        Where it comes from.
    """
    spine_first, seed = random.random() < 0.5, int(random.integers(1 << 31))
    for build in (_spine_rods, _hip_rods) if spine_first else (_hip_rods, _spine_rods):
        rods = build(scan, np.random.default_rng(seed))
        if rods:
            break
    hu = float(random.uniform(*metal_hu))
    _streaks(scan, rods, float(random.uniform(*streak_hu)), random)
    for rod in rods:
        _paint_rod(scan, rod, hu)


def _spine_rods(scan: DiseasedScan, random: np.random.Generator) -> list[_Rod]:
    """Two screws in each of some neighbouring vertebrae, a rod behind them on either side."""
    region = Region.of(
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


def _vertebrae(scan: DiseasedScan, region: Region) -> list[Point]:
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


def _hip_rods(scan: DiseasedScan, random: np.random.Generator) -> list[_Rod]:
    """A prosthesis or a hip screw in a femur, or a screw in the hip bone if there is none."""
    right, replaced = random.random() < 0.5, random.random() < 0.5
    femur = Region.of(scan, scan.numbers(("femur*",)))
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
    bone = Region.of(scan, scan.numbers(("hip_*", "pelvis")))
    if bone is None:
        return []
    a = bone.voxel(random)
    length = random.uniform(25, 60)
    others = [bone.voxel(random) for _ in range(30)]
    b = min(others, key=lambda o: abs(float(np.linalg.norm((o - a) * scan.steps)) - length))
    return [_Rod(a, b, float(random.uniform(2.2, 3.5)))]


def _middle_column(scan: DiseasedScan) -> float:
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


def clips(
    scan: DiseasedScan, metal_hu: Range, streak_hu: Range, random: np.random.Generator
) -> None:
    """Clips of 4..8 mm beside one another: where the gallbladder is, else at the liver's border.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    metal_hu : (low, high) float
        HU of metal that fills a voxel.
    streak_hu : (low, high) float
        Size of the streaks at the surface of metal.
    random : numpy.random.Generator
        Where they come from.
    """
    near, liver = (Region.of(scan, scan.numbers((name,))) for name in ("gallbladder", "liver"))
    region = near or liver
    if region is None:
        return
    place = region.voxel_at_wall(random)
    # The streaks of one stand for those of all.
    one = _Rod(place, place, 1.5)
    _streaks(scan, [one], 0.4 * float(random.uniform(*streak_hu)), random)
    for _ in range(int(random.integers(2, 7))):
        middle = place + random.normal(0, 7, 3) / scan.steps
        along = random.standard_normal(3)
        along *= random.uniform(2, 4) / np.linalg.norm(along) / scan.steps
        hu = float(random.uniform(*metal_hu))
        _paint_rod(scan, _Rod(middle - along, middle + along, random.uniform(1.0, 1.6)), hu)


def vessel_metal(scan: DiseasedScan, metal_hu: Range, random: np.random.Generator) -> None:
    """A catheter along a vessel, or a stent at its wall.

    Parameters
    ----------
    scan : DiseasedScan
        The copy, altered in place.
    metal_hu : (low, high) float
        HU of metal that fills a voxel.
    random : numpy.random.Generator
        Where it comes from.
    """
    numbers = scan.numbers(_VESSELS)
    which, is_stent = random.random(), random.random() < 0.5
    length, place = random.uniform(40, 160), random.random()
    hu, radius = float(random.uniform(*metal_hu)), float(random.uniform(0.8, 1.3))
    if not numbers:
        return
    region = Region.of(scan, [numbers[int(which * len(numbers))]])
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


def _vessel_path(scan: DiseasedScan, region: Region) -> list[Point]:
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


def _paint_stent(scan: DiseasedScan, region: Region, slices: slice, hu: float) -> None:
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


def _paint_rod(scan: DiseasedScan, rod: _Rod, hu: float) -> None:
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


def _streaks(
    scan: DiseasedScan, rods: Sequence[_Rod], hu: float, random: np.random.Generator
) -> None:
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


def _streak_slice(
    scan: DiseasedScan, k: int, rod: _Rod, fan: NDArray[np.float32], hu: float
) -> None:
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
