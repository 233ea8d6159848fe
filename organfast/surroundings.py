"""What lies beside a trunk in a scanner: arms along it or folded over it, cushions, blankets.

Everything here works on a tissue map, (K, R, C) uint8 in working order [k, i, j] (slice towards the
head, row towards the front, column towards one side), and fills what is empty (0) alone: nobody's
trunk changes. Lengths are mm, positions (k, i, j) in mm from the first voxel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["ARMS", "Arms", "add_arms", "add_bedding"]

Arms = Literal["up", "beside", "folded"]
ARMS: tuple[Arms, ...] = ("up", "beside", "folded")

# Lengths and half-widths of adults' arms, from the anthropometry of Gordon et al. 1989 (5th to 95th
# percentile of both sexes, soft tissue included), mm.
_UPPER_ARM_MM = (280.0, 350.0)
_FOREARM_MM = (220.0, 280.0)
_HAND_MM = (150.0, 190.0)
_RADIUS_MM = (40.0, 56.0)  # at the middle of the upper arm
_TAPER = (1.0, 0.9, 0.58, 0.5)  # of that: at shoulder, elbow, wrist, fingers
_BONE = 0.24  # of the arm's own radius
_CLOTH_MM = 3.0
_BEND_MM = 45.0  # between two folds of a cushion or a blanket
_SHARE_OF_ARMS = 0.9  # that are there: one arm of some patients is raised, or out of view


@dataclass(frozen=True)
class _Trunk:
    """A trunk's outline by slices: first and last row and column that hold something, mm."""

    back: NDArray[np.float64]
    front: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    step_mm: float

    @staticmethod
    def of(tissue: NDArray[np.uint8], steps: NDArray[np.float64]) -> _Trunk | None:
        """None where nothing is there."""
        from scipy.ndimage import gaussian_filter1d

        edges = np.full((4, len(tissue)), np.nan)
        for k, page in enumerate(tissue):
            rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
            if rows.size:
                edges[:, k] = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        known = np.flatnonzero(~np.isnan(edges[0]))
        if not known.size:
            return None
        every = np.arange(len(tissue))
        whole = [np.interp(every, known, edge[known]) for edge in edges]
        smooth = [gaussian_filter1d(edge, 15 / steps[0], mode="nearest") for edge in whole]
        back, front = (edge * steps[1] for edge in smooth[:2])
        low, high = (edge * steps[2] for edge in smooth[2:])
        return _Trunk(back, front, low, high, float(steps[0]))

    def at(self, k_mm: float) -> tuple[float, float, float, float]:
        """Back, front, low and high side at a height; beyond the slices as in the nearest."""
        k = int(np.clip(round(k_mm / self.step_mm), 0, len(self.back) - 1))
        return float(self.back[k]), float(self.front[k]), float(self.low[k]), float(self.high[k])


def add_arms(
    tissue: NDArray[np.uint8],
    steps: NDArray[np.float64],
    numbers: Mapping[str, int],
    arms: Arms,
    random: np.random.Generator,
    *,
    shoulder_mm: float,
) -> None:
    """Add a patient's arms beside the trunk, in place; some have one only.

    Parameters
    ----------
    tissue : (K, R, C) uint8
        Tissue numbers, 0 = empty; only empty voxels change.
    steps : (3,) float64
        Voxel size along k, i, j, mm.
    numbers : mapping of str to int
        The number of ``skin``, ``subcutaneous_fat``, ``muscle`` and ``long_bone``.
    arms : {"up", "beside", "folded"}
        Raised out of view (nothing is added), along the trunk, or over the belly.
    random : numpy.random.Generator
        Where the arms' sizes and postures come from.
    shoulder_mm : float
        Height of the shoulders above the first slice; may lie beyond the last.

    Raises
    ------
    ValueError
        ``arms`` is none of these.
    """
    if arms not in ARMS:
        raise ValueError(f"arms {arms!r} are unknown; use one of {', '.join(ARMS)}")
    trunk = None if arms == "up" else _Trunk.of(tissue, steps)
    if trunk is None:
        return
    radius = random.uniform(*_RADIUS_MM)
    fat = radius * random.uniform(0.12, 0.4)
    lengths = [random.uniform(*span) for span in (_UPPER_ARM_MM, _FOREARM_MM, _HAND_MM)]
    for side in (-1, 1):
        joints = _joints(trunk, side, radius, lengths, arms, shoulder_mm, random)
        if random.random() < _SHARE_OF_ARMS:
            _draw_arm(tissue, steps, numbers, joints, fat)


def _joints(
    trunk: _Trunk,
    side: int,
    radius: float,
    lengths: list[float],
    arms: Arms,
    shoulder_mm: float,
    random: np.random.Generator,
) -> list[tuple[NDArray[np.float64], float]]:
    """Points along an arm's axis and its radius there, from the shoulder to the fingers."""
    gap = random.uniform(-10.0, 28.0)
    height = random.uniform(0.2, 0.55)  # of the trunk, from back to front
    upper, forearm, hand = lengths

    def beside(k_mm: float, r: float, lift: float) -> NDArray[np.float64]:
        back, front, low, high = trunk.at(k_mm)
        row = max(back + (front - back) * (height + lift), back + r)
        column = low - gap - r if side < 0 else high + gap + r
        return np.array([k_mm, row, column])

    radii = [radius * taper for taper in _TAPER]
    elbow_mm = shoulder_mm - upper * random.uniform(0.93, 1.0)
    points = [
        beside(shoulder_mm, radii[0], 0.0),
        beside((shoulder_mm + elbow_mm) / 2, radius, 0.0),
        beside(elbow_mm, radii[1], 0.0),
    ]
    if arms == "beside":
        wrist_mm = elbow_mm - forearm
        points += [
            beside((elbow_mm + wrist_mm) / 2, 0.8 * radius, 0.05),
            beside(wrist_mm, radii[2], 0.08),
            beside(wrist_mm - hand, radii[3], 0.08),
        ]
        along = [radii[0], radius, radii[1], 0.8 * radius, radii[2], radii[3]]
        return list(zip(points, along, strict=True))
    return list(zip(points, [radii[0], radius, radii[1]], strict=True)) + _folded(
        trunk, side, points[-1], forearm + hand, radii, random
    )


def _folded(
    trunk: _Trunk,
    side: int,
    elbow: NDArray[np.float64],
    length: float,
    radii: list[float],
    random: np.random.Generator,
) -> list[tuple[NDArray[np.float64], float]]:
    """Forearm and hand about the front of the trunk, which is an ellipse in each slice."""
    rise = random.uniform(-60.0, 90.0)
    path, gone, last = [], 0.0, elbow
    for n in range(1, 13):
        turn = np.deg2rad(10.0 * n)  # from the side to the front and beyond
        k_mm = elbow[0] + rise * min(gone / length, 1.0)
        back, front, low, high = trunk.at(k_mm)
        r = float(np.interp(gone / length, [0.0, 0.6, 1.0], radii[1:]))
        row = (back + front) / 2 + ((front - back) / 2 + r + 2) * np.sin(turn)
        column = (low + high) / 2 + side * ((high - low) / 2 + r + 2) * np.cos(turn)
        point = np.array([k_mm, row, column])
        gone += float(np.linalg.norm(point - last))
        last = point
        path.append((point, r))
        if gone >= length:
            break
    return path


def _draw_arm(
    tissue: NDArray[np.uint8],
    steps: NDArray[np.float64],
    numbers: Mapping[str, int],
    joints: list[tuple[NDArray[np.float64], float]],
    fat: float,
) -> None:
    """Round segments from joint to joint: skin, fat, muscle, one bone in the middle."""
    layers = (("skin", 0.0), ("subcutaneous_fat", 2.0), ("muscle", 2.0 + fat))
    empty = tissue == 0
    for (start, r_start), (end, r_end) in pairwise(joints):
        reach = max(r_start, r_end) + steps.max()
        box = tuple(
            slice(
                int(np.clip((min(a, b) - reach) / s, 0, n)),
                int(np.clip((max(a, b) + reach) / s + 1, 0, n)),
            )
            for a, b, s, n in zip(start, end, steps, tissue.shape, strict=True)
        )
        if any(run.stop <= run.start for run in box):
            continue
        inside, relative = _depth(box, steps, start, end, r_start, r_end)
        part, free = tissue[box], empty[box]
        # Deeper layers over shallower ones, those of this segment and of the one before alike.
        for name, deeper_than in layers:
            deeper = free & (inside > deeper_than)
            part[deeper & (_rank(part, numbers) <= _RANKS[name])] = numbers[name]
        part[free & (relative < _BONE)] = numbers["long_bone"]


_RANKS = {"skin": 1, "subcutaneous_fat": 2, "muscle": 3, "long_bone": 4}


def _rank(part: NDArray[np.uint8], numbers: Mapping[str, int]) -> NDArray[np.uint8]:
    """How deep in an arm each voxel's tissue lies, 0 = not in one."""
    ranks = np.zeros(256, np.uint8)
    for name, rank in _RANKS.items():
        ranks[numbers[name]] = rank
    return ranks[part]


def _depth(
    box: tuple[slice, ...],
    steps: NDArray[np.float64],
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    r_start: float,
    r_end: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each voxel of a box: mm below a segment's surface, and distance from its axis / radius."""
    axes = [
        (np.arange(run.start, run.stop) * step).astype(np.float32)
        for run, step in zip(box, steps, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    along = end - start
    length_2 = max(float(along @ along), 1e-6)
    t = sum((g - s) * np.float32(a / length_2) for g, s, a in zip(grid, start, along, strict=True))
    t = np.clip(t, 0, 1)
    apart = sum(
        (g - np.float32(s) - t * np.float32(a)) ** 2
        for g, s, a in zip(grid, start, along, strict=True)
    )
    distance = np.sqrt(apart)
    radius = np.float32(r_start) + t * np.float32(r_end - r_start)
    return radius - distance, distance / radius


def add_bedding(
    tissue: NDArray[np.uint8],
    steps: NDArray[np.float64],
    numbers: Mapping[str, int],
    texture: NDArray[np.float32],
    random: np.random.Generator,
) -> None:
    """Wrap a patient in what beds are made of, in place: a cushion behind, a blanket in front.

    Parameters
    ----------
    tissue : (K, R, C) uint8
        Tissue numbers, 0 = empty; only empty voxels change.
    steps : (3,) float64
        Voxel size along k, i, j, mm.
    numbers : mapping of str to int
        The number of ``foam`` and ``cloth``.
    texture : (N, N, N) float32
        Periodic noise that bends the surfaces.
    random : numpy.random.Generator
        Where thicknesses come from.
    """
    from scipy.ndimage import distance_transform_edt

    has_cushion, has_blanket = random.random() < 0.65, random.random() < 0.5
    trunk = _Trunk.of(tissue, steps) if has_cushion or has_blanket else None
    if trunk is None:
        return
    thick, up_to = random.uniform(12.0, 60.0), random.uniform(0.1, 0.75)
    apart, wrinkle = random.uniform(1.0, 8.0), random.uniform(1.0, 9.0)
    first = random.integers(0, texture.shape[0], 3)
    rows = np.arange(tissue.shape[1])[:, None] * steps[1]
    for k, page in enumerate(tissue):
        empty = page == 0
        if empty.all():
            continue
        away = distance_transform_edt(empty, sampling=steps[1:])
        behind = rows < trunk.back[k] + (trunk.front[k] - trunk.back[k]) * up_to
        bends = _bends(texture, first, k, page.shape, steps)
        if has_cushion:
            page[empty & behind & (away < thick + 5 * bends)] = numbers["foam"]
        if has_blanket:
            above = away - apart - wrinkle * bends.clip(0)
            page[empty & ~behind & (above > 0) & (above < _CLOTH_MM)] = numbers["cloth"]


def _bends(
    texture: NDArray[np.float32],
    first: NDArray[np.int64],
    k: int,
    shape: tuple[int, ...],
    steps: NDArray[np.float64],
) -> NDArray[np.float32]:
    """(R, C) smooth noise of deviation 1 for slice k, from a periodic texture."""
    from scipy.ndimage import map_coordinates

    unit = texture.shape[0] / 8 / _BEND_MM  # one feature of the texture is an eighth of it
    i, j = (np.arange(n) * s * unit for n, s in zip(shape, steps[1:], strict=True))
    at = np.broadcast_arrays(first[0] + k * steps[0] * unit, first[1] + i[:, None], first[2] + j)
    bends: NDArray[np.float32] = map_coordinates(texture, at, order=1, mode="grid-wrap")
    return bends
