"""The anatomy of the phantom: one seeded patient described as implicit shapes.

Reference coordinates, mm: x to the patient's right, y to the front, z to the head; the origin lies
in the vertebral canal's front wall at L1. Positions and sizes are those of an average adult as
anatomy texts and open label maps give them; a patient scales, bends and varies them.

Shapes are laid in order of priority: bones, airways and vessels first, soft fillers last, each only
over the tissue it may replace. That is why neighbours never overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["STRUCTURES", "Patient", "Shapes", "body_radii", "build_torso"]

Point = tuple[float, float, float]
Floats = NDArray[np.float64]
Place = Literal["outside", "wall", "inside"]

# Groups of tissue, bits of what a shape may replace.
AIR, SKIN, FAT, WALL, CAVITY, LUNG, LIVER, FIXED = range(8)
_OVER = {
    "air": 1 << AIR,
    "arm": 1 << AIR | 1 << SKIN | 1 << FAT,
    "fat": 1 << FAT,
    "wall": 1 << FAT | 1 << WALL,
    "inside": 1 << CAVITY,
    "body": 1 << FAT | 1 << WALL | 1 << CAVITY,
    "lung": 1 << LUNG,
    "liver": 1 << LIVER,
}

_SIDES: tuple[tuple[int, str], ...] = ((1, "right"), (-1, "left"))

# name, z, y of the body's centre, half width, half depth, half height
_VERTEBRAE: tuple[tuple[str, float, float, float, float, float], ...] = (
    ("L5", -139, 24, 25.5, 17, 13.5),
    ("L4", -105, 31, 25, 17, 13.5),
    ("L3", -70, 30, 24, 17, 13.5),
    ("L2", -35, 23, 23.5, 17, 13.6),
    ("L1", -1, 15, 22.5, 16.5, 13.4),
    ("T12", 32, 9, 21, 16, 12.8),
    ("T11", 62, 4, 19.5, 15.5, 12.0),
    ("T10", 90, 0, 18, 15, 11.2),
    ("T9", 117, -3, 17, 15, 10.8),
    ("T8", 142, -5, 16, 14.5, 10.4),
    ("T7", 166, -6, 15.5, 14, 10),
    ("T6", 190, -5, 15, 13.5, 9.6),
    ("T5", 213, -3, 14.5, 13, 9.3),
    ("T4", 235, 1, 14, 12.5, 9),
    ("T3", 256, 7, 14, 12, 8.8),
    ("T2", 277, 15, 14.5, 11.5, 8.6),
    ("T1", 297, 25, 15.5, 11, 8.4),
    ("C7", 315, 35, 15, 10, 7.4),
    ("C6", 331, 43, 14, 9.5, 6.8),
    ("C5", 346, 49, 13, 9, 6.4),
    ("C4", 360, 53, 13, 9, 6.2),
)

# z, half width, front y, back y
_CAVITY = np.array(
    [
        [300, 4, 50, 40],
        [288, 30, 76, 8],
        [270, 58, 86, -5],
        [250, 80, 92, -18],
        [230, 95, 98, -28],
        [200, 110, 108, -40],
        [170, 119, 119, -47],
        [140, 125, 130, -50],
        [110, 130, 139, -50],
        [80, 133, 147, -48],
        [50, 134, 152, -45],
        [20, 134, 154, -42],
        [-10, 132, 154, -38],
        [-40, 129, 152, -32],
        [-70, 125, 148, -25],
        [-100, 121, 143, -18],
        [-130, 112, 138, -12],
        [-160, 101, 132, -15],
        [-190, 86, 124, -38],
        [-220, 70, 113, -48],
        [-250, 58, 98, -50],
        [-280, 46, 84, -42],
        [-300, 30, 66, -20],
        [-312, 4, 50, 40],
    ],
    np.float64,
)

_MUSCLE = np.array(
    [
        [375, 56, 96, -22],
        [345, 57, 95, -26],
        [330, 61, 97, -33],
        [315, 78, 99, -44],
        [300, 122, 102, -56],
        [285, 160, 105, -64],
        [270, 172, 107, -68],
        [250, 168, 111, -72],
        [230, 160, 117, -74],
        [200, 147, 125, -74],
        [170, 142, 134, -72],
        [140, 141, 143, -70],
        [110, 142, 151, -68],
        [80, 144, 158, -67],
        [50, 145, 163, -67],
        [20, 146, 166, -67],
        [-10, 146, 166, -67],
        [-40, 145, 164, -67],
        [-70, 143, 160, -68],
        [-100, 143, 155, -70],
        [-130, 146, 150, -72],
        [-160, 152, 144, -74],
        [-190, 158, 136, -76],
        [-220, 162, 125, -76],
        [-250, 166, 113, -74],
        [-280, 168, 106, -71],
        [-330, 168, 100, -66],
    ],
    np.float64,
)

# z, subcutaneous fat in front, at the sides, behind
_FAT = np.array(
    [
        [360, 4, 4, 7],
        [300, 6, 7, 9],
        [250, 8, 9, 9],
        [200, 9, 9, 8],
        [130, 10, 9, 8],
        [60, 12, 10, 10],
        [0, 15, 12, 13],
        [-60, 20, 14, 20],
        [-120, 24, 17, 26],
        [-180, 22, 20, 28],
        [-240, 18, 22, 26],
        [-320, 14, 20, 24],
    ],
    np.float64,
)

RELIEF_REACH = 2.5
"""Relief moves a surface by at most this many amplitudes, as in the kernel."""

PROFILE = (-360.0, 5.0)
"""First level (z, mm) of the polar radii and the step between levels."""
N_LEVELS, N_ANGLES = 151, 180


def _places() -> dict[str, tuple[int, Place]]:
    """Name -> (group, place) of every structure, in label order."""
    found: dict[str, tuple[int, Place]] = {
        "skin": (SKIN, "wall"),
        "subcutaneous_fat": (FAT, "wall"),
        "body_wall_muscle": (WALL, "wall"),
        "intermuscular_fat": (FAT, "wall"),
        "trunk_fat": (CAVITY, "inside"),
        "mediastinal_fat": (FIXED, "inside"),
        "lung_right": (LUNG, "inside"),
        "lung_left": (LUNG, "inside"),
        "liver": (LIVER, "inside"),
    }
    wall = ["spinal_cord", "sternum", "costal_cartilages", "intervertebral_discs", "sacrum"]
    wall += [f"vertebrae_{row[0]}" for row in _VERTEBRAE]
    inside = [
        *("lung_vessel_right", "lung_vessel_left", "liver_vessel", "diaphragm"),
        *("heart_myocardium", "heart_ventricle_left", "heart_ventricle_right"),
        *("heart_atrium_left", "heart_atrium_right", "aorta", "pulmonary_artery"),
        *("pulmonary_vein", "superior_vena_cava", "inferior_vena_cava"),
        *("portal_vein_and_splenic_vein", "superior_mesenteric_vein"),
        *("superior_mesenteric_artery", "celiac_artery", "brachiocephalic_trunk", "trachea"),
        *("esophagus", "thyroid_gland", "spleen", "pancreas", "gallbladder", "stomach"),
        *("duodenum", "small_bowel", "colon", "kidney_right", "kidney_left", "renal_sinus_fat"),
        *("perirenal_fat", "adrenal_gland_right", "adrenal_gland_left", "urinary_bladder"),
        *("prostate", "uterus", "psoas_major_right", "psoas_major_left"),
    ]
    for _, side in _SIDES:
        wall += [f"rib_{side}_{n}" for n in range(1, 13)]
        wall += [
            f"{name}_{side}"
            for name in ("scapula", "clavicula", "humerus", "hip", "femur", "autochthon")
        ]
        wall += [f"rectus_abdominis_{side}", f"breast_{side}", f"quadratus_lumborum_muscle_{side}"]
        wall += [f"iliacus_muscle_{side}"]
        inside += [f"bronchus_{side}", f"brachiocephalic_vein_{side}", f"jugular_vein_{side}"]
        inside += [f"common_carotid_artery_{side}", f"subclavian_artery_{side}"]
        inside += [f"renal_vein_{side}", f"renal_artery_{side}"]
        inside += [f"iliac_artery_{side}", f"iliac_vena_{side}"]
    found.update({name: (FIXED, "wall") for name in wall})
    found.update({name: (FIXED, "inside") for name in inside})
    return found


STRUCTURES = _places()
"""Name -> (group, place) of each structure of the phantom; labels count from 1 in this order."""

LABELS = {name: n for n, name in enumerate(STRUCTURES, start=1)}


@dataclass(frozen=True)
class Part:
    """One primitive of a shape: its row for the kernel and the box (mm) that holds it."""

    row: NDArray[np.float32]
    low: Floats
    high: Floats


def _turn(degrees: Point) -> Floats:
    """Rotation about x, then y, then z; rows are the turned axes."""
    a, b, c = np.deg2rad(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    rotation: Floats = (about_z @ about_y @ about_x).T
    return rotation


_EVERYWHERE = (np.full(3, -1e6), np.full(3, 1e6))
_FOLDS = {"union": 0, "minus": 1, "and": 2}
_SOLIDS = {"ellipsoid": 0, "block": 1, "drum": 2}


def solid(
    at: Point,
    radii: Point,
    turn: Point = (0, 0, 0),
    kind: Literal["ellipsoid", "block", "drum"] = "ellipsoid",
    fold: tuple[Literal["union", "minus", "and"], float] = ("union", 4.0),
) -> Part:
    """An ellipsoid, a block (exponent 4) or a drum; ``fold`` = how it joins what is before it."""
    row = np.zeros(18, np.float32)
    rotation = _turn(turn)
    row[:3] = _SOLIDS[kind], _FOLDS[fold[0]], fold[1]
    row[3:6], row[6:15], row[15:18] = at, rotation.ravel(), 1 / np.asarray(radii)
    reach = (
        np.abs(rotation.T) @ np.asarray(radii)
        if kind != "ellipsoid"
        else np.sqrt((rotation.T**2) @ np.asarray(radii, np.float64) ** 2)
    )
    centre = np.asarray(at, np.float64)
    return Part(row, centre - reach, centre + reach)


def half_space(normal: Point, offset: float) -> Part:
    """Keeps where normal . p < offset (mm)."""
    row = np.zeros(18, np.float32)
    row[:3] = 4, 2, 1.0
    length = float(np.linalg.norm(normal))
    row[3:6], row[6] = np.asarray(normal) / length, offset / length
    low, high = _EVERYWHERE[0].copy(), _EVERYWHERE[1].copy()
    for axis in range(3):  # an axis-aligned half-space bounds the box
        if abs(normal[axis]) == length:
            (high if normal[axis] > 0 else low)[axis] = offset / normal[axis]
    return Part(row, low, high)


def in_cavity(beyond: float) -> Part:
    """Keeps where the distance beyond the cavity's wall is less than ``beyond`` mm."""
    return _fence(5, beyond, 1.0)


def out_of_cavity(beyond: float) -> Part:
    """Keeps where the distance beyond the cavity's wall is more than ``beyond`` mm."""
    return _fence(5, -beyond, -1.0)


def by_diaphragm(side: Literal["above", "below"], gap: float) -> Part:
    """Keeps what lies more than ``gap`` mm above or below the diaphragm."""
    return _fence(6, -gap, -1.0 if side == "above" else 1.0)


def _fence(kind: int, offset: float, side: float) -> Part:
    row = np.zeros(18, np.float32)
    row[:5] = kind, 2, 1.0, offset, side
    return Part(row, *_EVERYWHERE)


@dataclass
class Shapes:
    """The shapes of a patient, in the order in which they claim voxels.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of everything random about them.
    heads : list of (label, groups, first row, fences, solids)
        One per shape: its label, what it may replace (bits), and its parts in ``rows``.
    boxes : list of (2, 3) float, mm
        Low and high corner of where each shape may be.
    relief : list of (amplitude, size, offset)
        Unevenness of each surface, mm, and where in the texture it is read.
    rows : list of (18,) float32
        The parts of all shapes, fences before solids.
    """

    random: np.random.Generator
    heads: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    boxes: list[Floats] = field(default_factory=list)
    relief: list[tuple[float, float, float]] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)

    def add(
        self,
        name: str,
        parts: Iterable[Part],
        over: str = "inside",
        relief: tuple[float, float] = (0.0, 1.0),
        box: tuple[Point, Point] | None = None,
    ) -> None:
        """Lay one shape over what it may replace.

        Parameters
        ----------
        name : str
            Structure it belongs to.
        parts : iterable of Part
            Fences, and solids that are folded from left to right.
        over : str
            What it may replace.
        relief : (float, float)
            Amplitude and feature size of the surface's unevenness, mm.
        box : (low, high), mm, optional
            Where to look, for shapes without a box of their own.
        """
        parts = list(parts)
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for part in parts:
            if part.row[1] == 0:
                low, high = np.minimum(low, part.low), np.maximum(high, part.high)
        if not np.isfinite(low).all():  # it begins with a half-space or the like
            low, high = _EVERYWHERE
        for part in parts:
            if part.row[1] == 2:
                low, high = np.maximum(low, part.low), np.minimum(high, part.high)
        if box is not None:
            low, high = np.maximum(low, box[0]), np.minimum(high, box[1])
        margin = RELIEF_REACH * relief[0]
        fences = [part for part in parts if part.row[0] >= 4]
        solids = [part for part in parts if part.row[0] < 4]
        head = (LABELS[name], _OVER[over], len(self.rows), len(fences), len(solids))
        self.heads.append(head)
        self.boxes.append(np.array([low - margin, high + margin]))
        self.relief.append(_relief(name, relief))
        self.rows += [part.row for part in (*fences, *solids)]

    def cones(
        self,
        name: str,
        ends: tuple[Floats, Floats],
        over: str = "inside",
        squash: Point = (1, 1, 1),
        relief: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Many round cones at once, a shape each.

        Parameters
        ----------
        name : str
            Structure they belong to.
        ends : two (n, 4) arrays, mm
            x, y, z and radius where each cone starts and where it ends.
        over : str
            What they may replace.
        squash : (x, y, z)
            Above 1 they are thinner along that axis.
        relief : (float, float)
            Amplitude and feature size of the surface's unevenness, mm.
        """
        start, end = ends
        weight = np.asarray(squash, np.float64)
        span = (end[:, :3] - start[:, :3]) * weight
        rows = np.zeros((len(start), 18), np.float32)
        rows[:, 0], rows[:, 2] = 3, 1.0
        rows[:, 3:6], rows[:, 6:9], rows[:, 12:15] = start[:, :3], span, weight
        rows[:, 9], rows[:, 10] = start[:, 3], end[:, 3] - start[:, 3]
        rows[:, 11] = 1 / np.maximum((span**2).sum(1), 1e-9)
        reach = np.maximum(start[:, 3], end[:, 3])[:, None] / weight + RELIEF_REACH * relief[0]
        low = np.minimum(start[:, :3], end[:, :3]) - reach
        high = np.maximum(start[:, :3], end[:, :3]) + reach
        first = len(self.rows)
        self.heads += [(LABELS[name], _OVER[over], first + n, 0, 1) for n in range(len(start))]
        self.boxes += list(np.stack([low, high], axis=1))
        self.relief += [_relief(name, relief)] * len(start)
        self.rows += list(rows)

    def tube(
        self,
        name: str,
        path: Sequence[Sequence[float]],
        over: str = "inside",
        squash: Point = (1, 1, 1),
        relief: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """A tube along a smooth curve through (x, y, z, radius) points; else as :meth:`cones`."""
        points = curve(path)
        self.cones(name, (points[:-1], points[1:]), over, squash, relief)

    def vary(self, deviation: float, middle: float = 1.0) -> float:
        """A normal draw, cut at two deviations."""
        return float(middle + deviation * np.clip(self.random.standard_normal(), -2, 2))

    def near(self, at: Sequence[float], deviation: float = 3.0) -> Point:
        """A point moved by a normal draw along each axis."""
        x, y, z = (self.vary(deviation, float(c)) for c in at)
        return x, y, z


def _on_side(
    path: Sequence[tuple[float, float, float, float]], sign: int, swell: float = 1.0
) -> list[tuple[float, float, float, float]]:
    """A path of the right side on the side of the sign, its radii scaled."""
    return [(sign * x, y, z, r * swell) for x, y, z, r in path]


def _relief(name: str, relief: tuple[float, float]) -> tuple[float, float, float]:
    """Amplitude, size, and where in the texture this structure's relief begins."""
    return relief[0], max(relief[1], 1e-3), float(LABELS[name] * 1.37 % 7.0)


def curve(path: Sequence[Sequence[float]], step: float | None = None) -> Floats:
    """(n, 4) samples of the Catmull-Rom curve through (x, y, z, radius) points.

    ``step`` (mm) is 0.7 radii by default: cones overlap, so short ones cost time.
    """
    points = np.asarray(path, np.float64)
    padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    found = []
    for p0, p1, p2, p3 in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True):
        stride = step or min(max(0.7 * float(p1[3]), 4.0), 14.0)
        n = max(1, int(np.ceil(np.linalg.norm(p2[:3] - p1[:3]) / stride)))
        t = (np.arange(n) / n)[:, None]
        found.append(
            0.5
            * (
                2 * p1
                + (p2 - p0) * t
                + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
                + (3 * p1 - p0 - 3 * p2 + p3) * t**3
            )
        )
    smooth = np.vstack([*found, points[-1]])
    smooth[:, 3] = smooth[:, 3].clip(points[:, 3].min(), points[:, 3].max())
    return smooth


@dataclass(frozen=True)
class Patient:
    """What makes one patient differ from another.

    Parameters
    ----------
    female : bool
    scale : (x, y, z)
        Size against the reference.
    fat : float
        Subcutaneous fat against the average.
    belly : float
        Forward bulge of the abdomen by visceral fat, mm.
    breath : float
        How much lower the diaphragm stands than in the reference, mm.
    turn : float
        Rotation of the patient on the table, degrees.
    dome : (centre, right rise, left rise, back edge, front edge), mm
        Height of the diaphragm.
    """

    female: bool
    scale: Point
    fat: float
    belly: float
    breath: float
    turn: float
    dome: tuple[float, float, float, float, float]

    @staticmethod
    def draw(random: np.random.Generator) -> Patient:
        """A random adult."""
        female = bool(random.random() < 0.5)
        height = float(np.clip(random.normal(0.955 if female else 1.0, 0.035), 0.88, 1.08))
        girth = height * float(np.clip(random.normal(1.0, 0.055), 0.89, 1.12))
        breath = float(np.clip(random.normal(0, 8), -14, 16))
        return Patient(
            female=female,
            scale=(girth, girth * float(random.uniform(0.95, 1.05)), height),
            fat=float(np.clip(np.exp(random.normal(0.15 if female else -0.15, 0.45)), 0.35, 2.2)),
            belly=float(np.clip(random.normal(10, 12), -8, 36)),
            breath=breath,
            turn=float(np.clip(random.normal(0, 4), -9, 9)),
            dome=(
                76 - breath,
                float(random.uniform(14, 26)),
                float(random.uniform(4, 13)),
                float(random.uniform(0, 18)) - 0.6 * breath,
                float(random.uniform(56, 70)) - 0.6 * breath,
            ),
        )


def body_radii(patient: Patient, random: np.random.Generator) -> NDArray[np.float32]:
    """(N_LEVELS, N_ANGLES, 3) float32 polar radii of cavity, muscles and skin, mm.

    Parameters
    ----------
    patient : Patient
        Whose body.
    random : numpy.random.Generator
        Source of all variation.
    """
    from scipy.ndimage import gaussian_filter

    from organfast.kernels.phantom import AXIS_Y

    z = np.float64(PROFILE[0]) + PROFILE[1] * np.arange(N_LEVELS, dtype=np.float64)
    turn = np.arange(N_ANGLES, dtype=np.float64) * (2 * np.pi / N_ANGLES)
    belly = patient.belly * np.exp(-(((z + 55) / 95) ** 2))
    hips = (8 if patient.female else 0) * np.exp(-(((z + 250) / 60) ** 2))
    radii = np.empty((3, N_LEVELS, N_ANGLES))
    for n, profile in enumerate((_CAVITY, _MUSCLE)):
        width, front, back = (np.interp(z, profile[::-1, 0], profile[::-1, c]) for c in (1, 2, 3))
        width = width + 0.45 * belly + (hips if n else 0)
        front = np.maximum(front + belly - AXIS_Y, 4)
        back = np.maximum(AXIS_Y - back, 4)
        power = 2.5 - 0.9 * n * np.exp(-(((z - 272) / 26) ** 2))
        rounder = 0.55 * n * np.exp(-(((z + 10) / 110) ** 2))
        ellipse = _superellipse(turn, (width, front, back), (power, power - rounder))
        radii[n] = gaussian_filter(ellipse, (1.2, 1.5), mode=("nearest", "wrap"))
        ripple = gaussian_filter(random.standard_normal(radii[n].shape), (9, 8), mode="wrap")
        radii[n] *= 1 + 0.012 * ripple / ripple.std()
    behind = np.abs(np.rad2deg(turn) - 270)
    centre = np.interp(z, [row[1] for row in _VERTEBRAE], [row[2] for row in _VERTEBRAE])
    gutter = 1 - np.exp(-((behind / 27) ** 4))
    radii[0] = np.minimum(radii[0], (AXIS_Y - centre + 4)[:, None] + 110 * gutter[None, :])
    gone = (z > 299) | (z < -311)
    radii[0][gone] = 0.0
    spine = ((z > -170) & (z < 300))[:, None]
    radii[1] -= 7 * np.exp(-((behind / 6) ** 2))[None, :] * gaussian_filter(spine * 1.0, (4, 0))
    radii[1] = np.maximum(radii[1], radii[0] + 9)
    radii[2] = radii[1] + _fat(patient, random, z, turn)
    return np.ascontiguousarray(np.moveaxis(radii, 0, 2), np.float32)


def _superellipse(
    turn: Floats,
    axes: tuple[Floats, Floats, Floats],
    powers: tuple[Floats, Floats],
) -> Floats:
    """(n_levels, n_angles) radii of superellipses of half width, front and back depth.

    The front and the back have an exponent each.
    """
    width, front, back = axes
    across, along = np.abs(np.cos(turn))[None, :], np.sin(turn)[None, :]
    depth = np.where(along > 0, front[:, None], back[:, None])
    n = np.where(along > 0, powers[0][:, None], powers[1][:, None])
    radius: Floats = ((across / width[:, None]) ** n + (np.abs(along) / depth) ** n) ** (-1 / n)
    return radius


def _fat(
    patient: Patient,
    random: np.random.Generator,
    z: Floats,
    turn: Floats,
) -> Floats:
    """(n_levels, n_angles) thickness of skin and subcutaneous fat, mm; a woman's breasts in it."""
    from scipy.ndimage import gaussian_filter

    front, side, back = (np.interp(z, _FAT[::-1, 0], _FAT[::-1, c])[:, None] for c in (1, 2, 3))
    along = np.sin(turn)[None, :]
    fat = np.where(along > 0, front, back) * along**2 + side * np.cos(turn)[None, :] ** 2
    ripple = gaussian_filter(random.standard_normal(fat.shape), (10, 9), mode="wrap")
    fat = patient.fat * fat * (1 + 0.15 * ripple / ripple.std()).clip(0.5, 1.5)
    if patient.female:
        size = random.uniform(16, 34) * (0.6 + 0.5 * patient.fat)
        for sign in (1, -1):
            angle = np.rad2deg(turn)[None, :] - (90 - sign * random.uniform(30, 36))
            height = (z[:, None] - random.uniform(145, 160)) / 40
            fat = fat + size * np.exp(-((angle / 17) ** 2) - height**2 * np.abs(height) ** 0.5)
    return np.asarray(fat + 3.0, np.float64)


def build_torso(
    patient: Patient, radii: NDArray[np.float32], random: np.random.Generator
) -> Shapes:
    """All shapes of one patient.

    Parameters
    ----------
    patient : Patient
        Whom to build.
    radii : (N_LEVELS, N_ANGLES, 3) float32, mm
        The patient's :func:`body_radii`.
    random : numpy.random.Generator
        Source of all variation.
    """
    shapes = Shapes(random)
    surface = Surface(radii)
    _spine(shapes)
    _rib_cage(shapes, surface)
    _shoulders(shapes)
    _pelvis(shapes, patient)
    _neck_and_airways(shapes)
    _great_vessels(shapes)
    _heart(shapes, patient)
    _lungs(shapes, patient)
    _wall(shapes, patient, surface)
    _retroperitoneum(shapes)
    _liver(shapes, patient)
    _bowel(shapes, patient, surface)
    return shapes


@dataclass(frozen=True)
class Surface:
    """Where the wall of the cavity lies."""

    radii: NDArray[np.float32]

    def point(self, degrees: float, z: float, beyond: float, layer: int = 0) -> Point:
        """The point at an angle (0 = right, 90 = front) and height, ``beyond`` mm off a layer."""
        from organfast.kernels.phantom import AXIS_Y, polar_radii

        turn = (degrees / 360) % 1.0
        radius = polar_radii(self.radii, (z - PROFILE[0]) / PROFILE[1], turn)[layer] + beyond
        a = np.deg2rad(degrees)
        return float(radius * np.cos(a)), float(AXIS_Y + radius * np.sin(a)), z

    def front(self, x: float, z: float) -> float:
        """y of the cavity's front wall at (x, z)."""
        y = 100.0
        for _ in range(4):
            angle = float(np.rad2deg(np.arctan2(y - 45.0, x)))
            px, py, _z = self.point(angle, z, 0.0)
            y = 45.0 + (py - 45.0) * (x / px if abs(x) > 30 and abs(px) > 1 else 1.0)
        return y


def _spine(shapes: Shapes) -> None:
    canal = [(0.0, y - depth - 9.0, z, 6.2) for _, z, y, _, depth, _ in _VERTEBRAE]
    shapes.tube("spinal_cord", [(0, -24, -178, 5.0), (0, -6, -158, 6.0), *canal], "body")
    size = shapes.vary(0.04)
    centres = np.array([[row[1], row[2]] for row in _VERTEBRAE])
    slope = np.gradient(centres[:, 1], centres[:, 0])
    for n, (name, z, y, width, depth, height) in enumerate(_VERTEBRAE):
        tilt = (float(np.rad2deg(np.arctan(slope[n]))), 0.0, 0.0)
        lumbar = name[0] == "L"
        label = f"vertebrae_{name}"
        body = solid((0, y, z), (width * size, depth * size, height), tilt, "drum")
        shapes.add(label, [body], "body", (0.5, 9))
        back = y - depth
        for sign, _ in _SIDES:
            starts, ends = np.moveaxis(np.array(_arch(sign, back, z, lumbar)), 1, 0)
            shapes.cones(label, (starts, ends), "body")
            facet = solid(
                (sign * (17.5 if lumbar else 14.5), back - 14, z - 9),
                (8.0, 7, 14 if lumbar else 10),
            )
            shapes.add(label, [facet], "body", (0.6, 8))
        if lumbar:
            spinous = solid((0, back - 33, z - 9), (4.6, 16, 12), (-12, 0, 0), "block")
            shapes.add(label, [spinous], "body", (0.5, 9))
        else:
            tip = (0, back - 38, z - (24 if name[0] == "T" else 12), 3.4)
            shapes.tube(label, [(0, back - 20, z - 6, 4.4), tip], "body")
    for above, below in zip(_VERTEBRAE[1:], _VERTEBRAE[:-1], strict=True):
        z = 0.5 * (above[1] - above[5] + below[1] + below[5])
        gap = 0.5 * (above[1] - below[1]) - 0.5 * (above[5] + below[5])
        y, slant = 0.5 * (above[2] + below[2]), (above[2] - below[2]) / (above[1] - below[1])
        disc = solid(
            (0, y, z),
            (below[3] * 0.98, below[4] * 0.98, gap + 3.5),
            (float(np.rad2deg(np.arctan(slant))), 0, 0),
            "drum",
        )
        shapes.add("intervertebral_discs", [disc], "body")


def _arch(
    sign: int, back: float, z: float, lumbar: bool
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """Pedicle, lamina and transverse process of one side, as pairs of (x, y, z, radius)."""
    out, wide = (38, 13.5) if lumbar else (29, 11.0)
    backwards = -13 if lumbar else -21
    return (
        ((sign * wide, back + 4, z + 4, 4.6), (sign * wide, back - 12, z + 3, 4.2)),
        ((sign * wide, back - 13, z, 5.0), (0, back - 20, z - 6, 5.0)),
        ((sign * wide, back - 11, z + 2, 4.5), (sign * out, back + backwards, z + 3, 3.4)),
    )


# Per rib: angle where the bone ends (90 = front), fall of that end below the vertebra, and the
# height at which its cartilage meets the breastbone.
_RIB_ENDS = (54, 62, 66, 66, 64, 59, 52, 44, 33, 18, -8, -42)
_RIB_FALLS = (46, 56, 68, 80, 94, 106, 114, 117, 117, 113, 98, 62)
_STERNAL = (246, 222, 201, 182, 163, 147, 132)


def _rib_cage(shapes: Shapes, surface: Surface) -> None:
    depth = [(z, surface.front(0.0, z) + 6.5) for z in (255, 230, 205, 180, 155, 130, 108)]
    slant = float(np.rad2deg(np.arctan2(depth[5][1] - depth[1][1], 100)))
    handle = solid((0, depth[1][1] - 2, 238), (29, 6.0, 25), (slant, 0, 0), "block")
    blade = solid((0, depth[4][1] - 1.5, 164), (18, 5.6, 50), (slant, 0, 0), "block")
    shapes.add("sternum", [handle, blade], "wall", (0.8, 14))
    shapes.tube("sternum", [(0, *depth[6][::-1], 5.0), (0, depth[6][1], 98, 3.5)], "wall")
    tops = {row[0]: row for row in _VERTEBRAE}
    fall = shapes.vary(0.05)
    for sign, side in _SIDES:
        ends = []
        for n in range(12):
            _, z, y, width, rib_depth, _ = tops[f"T{n + 1}"]
            start = -66.0 if n > 0 else -40.0
            angles = np.arange(start, _RIB_ENDS[n] + 0.1, 7.0)
            share = (angles - start) / (70.0 - start)
            heights = z + 3 - fall * _RIB_FALLS[n] * (share / share[-1]) ** 1.25
            points = [
                (sign * (width + 2), y - rib_depth + 3, z + 5, 4.6),
                (sign * (width + 13), y - rib_depth - 11, z + 5, 4.6),
            ]
            for angle, height in zip(angles, heights, strict=True):
                x, py, pz = surface.point(angle, float(height), 5.2)
                points.append((sign * x, py, pz, 5.0))
            shapes.tube(f"rib_{side}_{n + 1}", points, "wall", (1.15, 1.15, 0.9))
            ends.append((_RIB_ENDS[n], float(heights[-1])))
        _cartilages(shapes, surface, sign, ends)


def _cartilages(
    shapes: Shapes, surface: Surface, sign: int, ends: Sequence[tuple[float, float]]
) -> None:
    """Ribs 1..7 reach the breastbone, 8..10 the cartilage above them."""
    for n in range(10):
        angle, height = ends[n]
        if n < 7:
            goal = (84.0 if n else 72.0, float(_STERNAL[n]))
        else:
            above = ends[n - 1]
            goal = (min(above[0] + 10, 72.0), above[1] + 6)
        points = []
        for t in np.linspace(0, 1, 4):
            z = height + (goal[1] - height) * t**1.6
            x, y, z = surface.point(angle + (goal[0] - angle) * t, float(z), 5.5)
            points.append((sign * x, y, z, 5.0))
        shapes.tube("costal_cartilages", points, "wall", (1.1, 1.1, 0.95))


def _shoulders(shapes: Shapes) -> None:
    """Shoulder girdle with raised arms, as patients are scanned."""
    lift = shapes.vary(6, 0)
    for sign, side in _SIDES:
        blade = solid((sign * 104, -30, 222), (4.0, 38, 58), (0, sign * -6, sign * -48), "block")
        shapes.add(f"scapula_{side}", [blade], "wall", (1.5, 22))
        spine = [(70, -58, 258, 4.5), (105, -52, 276, 5.5), (138, -22, 292, 7)]
        shapes.tube(f"scapula_{side}", _on_side(spine, sign), "wall")
        neck = [(118, -14, 262, 8), (138, 8, 272, 13)]
        shapes.tube(f"scapula_{side}", _on_side(neck, sign), "wall")
        bar = [(17, 100, 264, 9), (50, 96, 272, 6.5), (95, 68, 286, 6.0), (135, 30, 300, 7)]
        shapes.tube(f"clavicula_{side}", _on_side(bar, sign), "wall")
        head = (sign * 150.0, 22.0, 282.0 + lift, 20.0)
        arm = [head, (sign * 172, 30, 312 + lift, 12), (sign * 190, 36, 400 + lift, 11)]
        for name, grow, over in (
            ("skin", 38.0, "air"),
            ("subcutaneous_fat", 36.0, "arm"),
            ("body_wall_muscle", 27.0, "arm"),
        ):
            flesh = [(x, y, z, min(r, 14.0) + grow) for x, y, z, r in arm]
            shapes.tube(name, flesh, over)
        shapes.tube(f"humerus_{side}", arm, "wall")


def _pelvis(shapes: Shapes, patient: Patient) -> None:
    wide = (1.04 if patient.female else 1.0) * shapes.vary(0.02)
    for n, (z, y, width, depth) in enumerate(
        ((-172, 2, 44, 19), (-194, -16, 40, 16), (-214, -32, 33, 12), (-234, -45, 25, 9))
    ):
        part = solid((0, y, z), (width, depth, 14), (38 + 7 * n, 0, 0), "block")
        shapes.add("sacrum", [part], "body", (1.5, 12))
    shapes.tube("sacrum", [(0, -50, -246, 8), (0, -52, -262, 6), (0, -46, -276, 4)], "body")
    for sign, side in _SIDES:
        hip, femur = f"hip_{side}", f"femur_{side}"

        def at(x: float, y: float, z: float, sign: int = sign) -> Point:
            return sign * x * wide, y, z

        head = at(92, 22, -266)
        shapes.add(femur, [solid(head, (23.5, 23.5, 23.5))], "body", (0.5, 12))
        for path in (
            [(*head, 15), (*at(112, 14, -280), 14), (*at(130, 4, -288), 15)],
            [(*at(130, 4, -282), 15), (*at(128, 14, -320), 17), (*at(122, 24, -400), 15)],
        ):
            shapes.tube(femur, path, "body")
        socket = solid(at(87, 22, -260), (33, 32, 31))
        shell = [socket, solid(at(100, 20, -275), (31, 31, 31), fold=("minus", 2.0))]
        shapes.add(hip, shell, "body", (1.0, 14))
        for at_, radii, turn in (
            ((97, 34, -148), (6.0, 58, 46), (0, sign * -8, sign * -40)),
            ((74, 2, -196), (8.5, 45, 40), (0, sign * 14, sign * -46)),
        ):
            wing = solid(at(*at_), radii, turn, "block", ("union", 8.0))
            shapes.add(hip, [wing], "body", (2.2, 30))
            normal = (-0.77 * sign, 0.64, 0.0)
            behind = [half_space(normal, -(0.77 * at_[0] - 0.64 * at_[1] + 3)), in_cavity(3.0)]
            behind += [half_space((-sign, 0, 0), -20.0)]
            hips = ((-190.0, -90.0, -330.0), (190.0, 90.0, -106.0))
            shapes.add("body_wall_muscle", behind, "inside", box=hips)
        ring = (
            [(76, 48, -248, 11), (46, 76, -268, 8), (14, 84, -282, 10)],
            [(14, 78, -288, 8), (34, 50, -308, 7), (54, 14, -318, 10)],
            [(74, -2, -272, 14), (62, -10, -296, 14), (54, 8, -318, 13)],
        )
        for bone in ring:
            shapes.tube(hip, [(x * wide, y, z, r) for x, y, z, r in _on_side(bone, sign)], "body")


def _neck_and_airways(shapes: Shapes) -> None:
    dx = shapes.vary(3, 0)
    trachea = [
        (0, 74, 372, 9),
        (1, 71, 330, 9),
        (2 + dx, 62, 288, 8.6),
        (4 + dx, 51, 240, 8.8),
        (4, 40, 192, 9.4),
    ]
    size = shapes.vary(0.08)
    shapes.tube("trachea", [(x, y, z, r * size) for x, y, z, r in trachea], "body", (1, 1.12, 1))
    right = [(5, 39, 190, 7.5), (24, 36, 174, 7), (40, 34, 160, 6), (50, 30, 138, 5)]
    left = [(3, 39, 190, 7), (-22, 33, 172, 6.5), (-42, 28, 158, 5.6), (-52, 22, 138, 4.6)]
    shapes.tube("bronchus_right", right, "body")
    shapes.tube("bronchus_left", left, "body")
    gullet = [
        (-2, 58, 372, 6),
        (-2, 52, 315, 6.5),
        (-4, 41, 270, 7),
        (-6, 27, 220, 7),
        (-4, 21, 175, 7.5),
        (-6, 26, 130, 8),
        (-12, 36, 98, 8.5),
        (-24, 44, 76, 9),
    ]
    shapes.tube("esophagus", gullet, "body", (0.85, 1.1, 1))
    level, swell = shapes.vary(5, 286), shapes.vary(0.13)
    for sign, _ in _SIDES:
        at = (2 + dx + sign * 17.5, 64, level + shapes.vary(2, 0))
        lobe = solid(at, (8.5 * swell, 11 * swell, 24 * swell), (10, sign * 8, 0))
        shapes.add("thyroid_gland", [lobe], "body", (1.0, 12))
    y = 74 + 0.15 * (level - 286)
    isthmus = [(14 + dx, y, level - 8, 4.2), (2 + dx, y + 3, level - 9, 3.6)]
    shapes.tube("thyroid_gland", [*isthmus, (-10 + dx, y, level - 8, 4.2)], "body", (1, 1, 0.6))


def _great_vessels(shapes: Shapes) -> None:
    wide, sway = shapes.vary(0.1), shapes.vary(4, 0)
    tubes: tuple[tuple[str, tuple[tuple[float, float, float, float], ...]], ...] = (
        (
            "aorta",
            (
                (8, 82, 138, 15),
                (16, 90, 168, 16),
                (14, 84, 200, 15),
                (0, 64, 218, 14),
                (-16, 38, 214, 13.5),
                (-22, 20, 192, 13),
                (-21, 14, 150, 12.5),
                (-17 + sway, 18, 110, 12),
                (-11 + sway, 27, 64, 11.5),
                (-7 + sway, 40, 20, 10.5),
                (-6 + sway, 48, -20, 9.5),
                (-5 + sway, 56, -60, 9),
                (-3, 59, -96, 8.5),
            ),
        ),
        ("pulmonary_artery", ((-16, 104, 146, 14), (-16, 92, 166, 14), (-14, 72, 180, 13))),
        ("pulmonary_artery", ((-14, 72, 180, 12), (12, 58, 174, 11), (42, 46, 168, 8.5))),
        ("pulmonary_artery", ((-14, 72, 180, 12), (-34, 52, 180, 10.5), (-48, 36, 172, 8.5))),
        ("superior_vena_cava", ((26, 76, 216, 8.5), (28, 76, 190, 9.5), (28, 74, 150, 10))),
        (
            "brachiocephalic_vein_left",
            ((26, 78, 218, 8), (2, 88, 228, 7), (-26, 82, 244, 6.5), (-36, 70, 262, 6.5)),
        ),
        ("brachiocephalic_vein_right", ((26, 78, 216, 8), (32, 72, 240, 7.5), (36, 68, 262, 7))),
        ("brachiocephalic_trunk", ((9, 74, 216, 7), (14, 72, 236, 6.5), (20, 68, 256, 6))),
        (
            "common_carotid_artery_right",
            ((20, 68, 256, 4), (27, 64, 290, 4), (29, 66, 330, 4), (29, 68, 375, 4)),
        ),
        (
            "common_carotid_artery_left",
            ((-4, 64, 220, 4.2), (-13, 62, 250, 4), (-25, 63, 290, 4), (-29, 68, 375, 4)),
        ),
        ("subclavian_artery_right", ((20, 68, 256, 5), (40, 58, 276, 4.5), (80, 56, 270, 4.5))),
        (
            "subclavian_artery_left",
            ((-12, 48, 218, 5.2), (-22, 46, 250, 5), (-44, 54, 274, 4.5), (-84, 56, 270, 4.5)),
        ),
        ("jugular_vein_right", ((36, 68, 262, 6.5), (38, 66, 300, 6), (37, 64, 375, 5.5))),
        ("jugular_vein_left", ((-36, 70, 262, 6), (-37, 66, 300, 5.2), (-37, 64, 375, 5))),
        (
            "inferior_vena_cava",
            (
                (14, 50, -112, 10),
                (20, 53, -70, 10.5),
                (23, 50, -20, 11),
                (25, 48, 25, 11.5),
                (26, 56, 60, 12),
                (27, 68, 92, 13),
            ),
        ),
        (
            "portal_vein_and_splenic_vein",
            ((12, 78, -6, 6.5), (22, 78, 8, 7), (38, 76, 20, 7.5), (50, 76, 28, 6)),
        ),
        (
            "portal_vein_and_splenic_vein",
            ((12, 78, -6, 5.5), (-18, 74, 2, 5), (-50, 54, 12, 4.8), (-76, 36, 20, 4.2)),
        ),
        (
            "superior_mesenteric_vein",
            ((12, 78, -6, 6), (11, 82, -32, 5.5), (9, 88, -66, 5), (6, 92, -110, 4)),
        ),
        ("celiac_artery", ((-6, 48, 12, 4), (-4, 62, 12, 3.6), (6, 68, 12, 3.2))),
        (
            "superior_mesenteric_artery",
            ((-6, 54, 0, 4.2), (-4, 70, -10, 3.8), (-3, 82, -40, 3.5), (-4, 88, -100, 3)),
        ),
    )
    for name, path in tubes:
        flat = (0.88, 1.15, 1.0) if name == "inferior_vena_cava" else (1.0, 1.0, 1.0)
        shapes.tube(name, [(x, y, z, r * wide) for x, y, z, r in path], "body", flat)
    for sign, side in _SIDES:
        rise = 8 if sign < 0 else -4
        vein = [(sign * 20, 50, rise - 14, 5.5), (sign * 40, 34, rise - 20, 5)]
        if sign < 0:
            vein = [(14, 62, rise - 12, 5), (-8, 63, rise - 13, 4.4), *vein]
        shapes.tube(f"renal_vein_{side}", [*vein, (sign * 54, 24, rise - 26, 4)], "inside")
        artery = [
            (-5, 44, rise - 6, 3.2),
            (sign * 28, 28, rise - 16, 3),
            (sign * 54, 20, rise - 24, 2.6),
        ]
        shapes.tube(f"renal_artery_{side}", artery, "inside")
        x0 = -3 + sign * 3
        iliac = [
            (x0, 59, -98, 6),
            (sign * 24, 57, -130, 5.5),
            (sign * 44, 50, -172, 5.2),
            (sign * 58, 66, -220, 5),
            (sign * 68, 92, -262, 5),
            (sign * 74, 92, -330, 4.5),
        ]
        shapes.tube(f"iliac_artery_{side}", iliac, "body")
        veins = [
            (x - sign * 1 + (6 if z > -120 else 0), y - 11, z - 6, r + 1.3) for x, y, z, r in iliac
        ]
        shapes.tube(f"iliac_vena_{side}", veins, "body", (0.95, 1.1, 1))


def _heart(shapes: Shapes, patient: Patient) -> None:
    """Chambers first, then the muscle around them, fat around that."""
    size = shapes.vary(0.07)
    low = -0.75 * patient.breath

    def at(x: float, y: float, z: float) -> Point:
        return -14 + (x + 14) * size, 80 + (y - 80) * size, 120 + (z - 120) * size + low

    def radii(a: float, b: float, c: float) -> Point:
        return a * size, b * size, c * size

    chambers = (
        ("heart_ventricle_left", at(-42, 84, 114), radii(20, 20, 34), (40.0, -38.0, 0.0)),
        ("heart_atrium_left", at(-6, 46, 136), radii(32, 18, 21), (0.0, 0.0, 8.0)),
        ("heart_atrium_right", at(26, 78, 118), radii(22, 27, 31), (0.0, 0.0, 10.0)),
        ("heart_ventricle_right", at(-12, 108, 108), radii(36, 17, 26), (10.0, 12.0, 18.0)),
        ("heart_ventricle_right", at(-14, 106, 130), radii(17, 16, 22), (0.0, 0.0, 0.0)),
    )
    for name, centre, size_mm, turn in chambers:
        shapes.add(name, [solid(centre, size_mm, turn)], "inside", (1.6, 16))
    muscle = [
        solid(at(-43, 84, 112), radii(31, 31, 45), (40, -38, 0), fold=("union", 6)),
        solid(at(-12, 106, 110), radii(40, 21, 31), (10, 12, 18), fold=("union", 6)),
        solid(at(26, 78, 118), radii(24.5, 29.5, 34), (0, 0, 10), fold=("union", 6)),
        solid(at(-6, 46, 136), radii(34, 20, 23), (0, 0, 8), fold=("union", 6)),
    ]
    shapes.add("heart_myocardium", [*muscle, by_diaphragm("above", 1.0)], "inside", (0.8, 14))
    for path in (
        ((-30, 44, 146, 6), (-48, 30, 146, 5)),
        ((-28, 42, 128, 6), (-48, 22, 122, 5)),
        ((18, 44, 146, 6.5), (44, 38, 144, 5)),
        ((18, 42, 128, 6), (46, 26, 122, 5)),
    ):
        points = [(*at(*p[:3]), p[3]) for p in path]
        shapes.tube("pulmonary_vein", points, "inside")
    bag = [
        solid(at(-14, 84, 116), radii(66, 46, 52), (20, -20, 20), fold=("union", 8)),
        solid(at(0, 70, 200), (34, 30, 52), fold=("union", 20)),
        solid(at(-8, 30, 170), (26, 24, 130), fold=("union", 20)),
        solid((0, 100, 170), (7, 44, 110), fold=("union", 14)),
        solid((0, 20, 240), (34, 40, 50), fold=("union", 20)),
    ]
    shapes.add("mediastinal_fat", bag, "inside", (2.0, 16))


def _lungs(shapes: Shapes, patient: Patient) -> None:
    low, high = (-200.0, -100.0, -30.0), (200.0, 200.0, 292.0)
    for sign, side in _SIDES:
        parts = [
            half_space((-sign, 0, 0), -3.0),
            in_cavity(-1.5),
            by_diaphragm("above", 1.5),
            half_space((0, 0, 1), 284.0),
        ]
        shapes.add(f"lung_{side}", parts, "inside", box=(low, high))
        roots = (
            ((36, 46, 168), (60, 60, 210)),
            ((38, 34, 162), (80, 70, 160)),
            ((40, 30, 150), (75, 30, 120)),
            ((38, 24, 160), (60, -5, 180)),
            ((42, 26, 140), (70, 5, 90)),
        )
        for root, aim in roots:
            start = np.array([sign * root[0], root[1], root[2] - 0.3 * patient.breath])
            towards = np.array([sign * aim[0], aim[1], aim[2]]) - start
            _tree(shapes, f"lung_vessel_{side}", start, towards, (5.2, 8, 30.0))
    rest = [in_cavity(0.0), by_diaphragm("above", 0.5)]
    shapes.add("mediastinal_fat", rest, "inside", box=(low, high))
    sheet = [in_cavity(0.0), by_diaphragm("below", -1.0), by_diaphragm("above", -2.6)]
    shapes.add("diaphragm", sheet, "inside", box=(low, high))


def _tree(
    shapes: Shapes,
    name: str,
    start: Floats,
    towards: Floats,
    size: tuple[float, int, float],
    over: str = "lung",
) -> None:
    """A vessel that forks again and again; size = radius, generations, first length (mm).

    Radii follow Murray's law: the cube of the parent's is the sum of the children's cubes.
    """
    radius, generations, length = size
    random = shapes.random
    origin, direction = start[None], (towards / np.linalg.norm(towards))[None]
    thick = np.array([radius])
    for generation in range(generations):
        n = len(origin)
        reach = length * 0.82**generation * random.uniform(0.7, 1.3, (n, 1))
        end = origin + reach * direction
        cones = np.column_stack([origin, thick]), np.column_stack([end, 0.86 * thick])
        shapes.cones(name, cones, over)
        side = np.cross(direction, random.standard_normal((n, 3)))
        side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6)
        share = random.uniform(0.3, 0.7, n)
        share = np.concatenate([share, 1 - share])
        lean = np.concatenate([np.ones(n), -np.ones(n)]) * random.uniform(0.55, 1.2, 2 * n)
        direction = np.tile(direction, (2, 1)) + (lean * (1 - share))[:, None] * np.tile(
            side, (2, 1)
        )
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        origin = np.tile(end, (2, 1))
        thick = 0.92 * np.tile(thick, 2) * share ** (1 / 3)


def _wall(shapes: Shapes, patient: Patient, surface: Surface) -> None:
    """Muscles of the back and of the front of the abdomen; breast glands."""
    thick = shapes.vary(0.1)
    for sign, side in _SIDES:
        spine = [
            (22, -52, -190, 12),
            (30, -45, -150, 17),
            (36, -42, -90, 20),
            (38, -43, -20, 20),
            (34, -46, 50, 17),
            (30, -47, 120, 14),
            (26, -44, 200, 13),
            (22, -28, 260, 13),
            (20, -4, 310, 13),
            (20, 14, 370, 13),
        ]
        path = _on_side(spine, sign)
        shapes.tube(f"autochthon_{side}", path, "wall", (0.82, 1.08, 1), (1.2, 18))
        loin = [(60, -16, -4, 9), (66, -14, -50, 12), (72, -10, -100, 12)]
        path = _on_side(loin, sign, thick)
        shapes.tube(f"quadratus_lumborum_muscle_{side}", path, "body", (0.75, 1.1, 1))
        psoas = [
            (26, 18, 14, 6),
            (31, 20, -20, 11),
            (40, 25, -70, 18),
            (50, 36, -120, 21),
            (60, 50, -165, 20),
            (70, 62, -205, 18),
            (80, 66, -245, 16),
            (88, 50, -290, 14),
            (92, 30, -330, 11),
        ]
        path = _on_side(psoas, sign, thick)
        shapes.tube(f"psoas_major_{side}", path, "body", (1, 1, 1), (1.0, 20))
        iliacus = solid((sign * 84, 42, -160), (11, 48, 48), (0, sign * -8, sign * -40))
        shapes.add(f"iliacus_muscle_{side}", [iliacus], "body", (1.5, 20))
        width = 66 + 0.25 * patient.belly + shapes.vary(4, 0)
        strap = [
            half_space((-sign, 0, 0), -3.5),
            half_space((sign, 0, 0), width),
            half_space((0, -1, 0), -60.0),
            out_of_cavity(1.6),
            in_cavity(1.6 + 10.5 * thick),
            half_space((0, 0, 1), 96.0),
            half_space((0, 0, -1), 278.0),
            half_space((sign * 0.8, 0, -0.55), 0.8 * width + 0.55 * 120),
        ]
        shapes.add(f"rectus_abdominis_{side}", strap, "wall", (0.8, 25))
        if patient.female:
            x, y, z = surface.point(90 - 33, 152, 14, layer=1)
            gland = solid((sign * x, y, z), (26, 20, 28))
            shapes.add(f"breast_{side}", [gland], "fat", (9, 12))


def _retroperitoneum(shapes: Shapes) -> None:
    """Kidneys, adrenals, pancreas, gallbladder, spleen; bladder and its neighbours."""
    size = shapes.vary(0.06)
    for sign, side in _SIDES:
        x, y, z = shapes.near((sign * 70, 17, -24 if sign < 0 else -40), 3.5)
        own = size * shapes.vary(0.04)
        radii = (28 * own, 25 * own, 55 * own)
        turn = (-10.0, sign * 10.0, sign * 22.0)
        hilum = (x - sign * 17, y + 8, z)
        sinus = solid(hilum, (14 * own, 11, 22 * own), turn)
        shapes.add("renal_sinus_fat", [sinus], "inside", (3.5, 11))
        kidney = [
            solid((x, y, z), radii, turn),
            solid((x - sign * 32, y + 14, z), (16, 12, 20), turn, fold=("minus", 8.0)),
        ]
        shapes.add(f"kidney_{side}", kidney, "inside", (1.2, 18))
        coat = solid((x, y - 2, z - 4), tuple(r + 9 for r in radii), turn)  # type: ignore[arg-type]
        shapes.add("perirenal_fat", [coat], "inside", (2.0, 30))
        upper = z + 52 * own
        gland = (sign * 38.0, 36.0 if sign > 0 else 42.0, max(upper + 1, 10))
        gland = shapes.near(gland, 1.5)
        for bend, offset in ((-28, -4), (24, 4)):
            at = (gland[0] + sign * offset, gland[1] - 3, gland[2] + 0.4 * offset)
            limb = solid(at, (2.9, 11.5, 15.5), (0, sign * 10, sign * bend))
            shapes.add(f"adrenal_gland_{side}", [limb], "inside", (0.5, 9))
    own = shapes.vary(0.1)
    tail = shapes.vary(7, 18)
    gland_path = [
        (30, 72, -52, 9),
        (31, 76, -32, 15),
        (18, 86, -16, 12),
        (-4, 89, -6, 10.5),
        (-30, 80, 2, 11),
        (-58, 60, 0.6 * tail, 11),
        (-82, 42, tail, 9),
    ]
    path = [(x, y, z, r * own) for x, y, z, r in gland_path]
    shapes.tube("pancreas", path, "inside", (1, 1.05, 0.85), (1.9, 9))
    _spleen_and_gallbladder(shapes)
    _pelvic_organs(shapes)


def _spleen_and_gallbladder(shapes: Shapes) -> None:
    own = shapes.vary(0.09)
    x, y, z = shapes.near((66, 96, -22), 5)
    long = shapes.vary(3, 27) * own
    bulb = solid((x, y, z), (14.5 * own, long, 17 * own), (-38, 0, 14))
    shapes.add("gallbladder", [bulb], "inside", (0.8, 14))
    own = shapes.vary(0.1)
    x, y, z = shapes.near((-98, 8, 34), 3)
    spleen = [
        solid((x, y, z), (40 * own, 52 * own, 50 * own), (20, 0, -12)),
        solid((x + 36, y + 26, z - 6), (34, 42, 60), fold=("minus", 8.0)),
        in_cavity(-2.5),
        by_diaphragm("below", 3.0),
    ]
    shapes.add("spleen", spleen, "inside", (1.6, 20))


def _pelvic_organs(shapes: Shapes) -> None:
    fill = shapes.vary(0.17, 1.03)
    rise = 12 * (fill - 1)
    bladder = solid(
        (shapes.vary(2, 0), 56, -242 + rise), (38 * fill, 31 * fill, 27 * fill), (-18, 0, 0)
    )
    shapes.add("urinary_bladder", [bladder], "inside", (1.8, 26))
    if shapes.random.random() < 0.5:
        own = shapes.vary(0.12)
        shapes.add("prostate", [solid((0, 26, -284), (23 * own, 17 * own, 17))], "inside", (1, 12))
    else:
        own = shapes.vary(0.12)
        womb = solid((shapes.vary(4, 0), 12, -226), (25 * own, 30 * own, 24 * own), (35, 0, 0))
        shapes.add("uterus", [womb], "inside", (1.5, 18))


def _liver(shapes: Shapes, patient: Patient) -> None:
    own, low = shapes.vary(0.05), -0.5 * patient.breath
    reach = shapes.vary(14, 88)  # how far down the right lobe goes
    left = shapes.vary(14, 70)  # how far to the left the left lobe goes
    liver = [
        solid((82, 46, 26 + low), (66 * own, 92 * own, reach), (8, -6, 0)),
        solid((4, 92, 50 + low), (left, 52, 40), (0, 16, 0), fold=("union", 26.0)),
        solid((0, 18, 30), (31, 30, 120), fold=("minus", 8.0)),
        solid((24, 76, 2 + low), (24, 20, 22), fold=("minus", 14.0)),
        solid((62, 4, -38), (46, 50, 58), (-10, 10, 22), fold=("minus", 10.0)),
        half_space((-0.55, -0.22, -0.8), -shapes.vary(6, 18) - 0.6 * low),
        in_cavity(-2.5),
        by_diaphragm("below", 3.0),
    ]
    shapes.add("liver", liver, "inside", (2.2, 30))
    hilum = np.array([46.0, 76.0, 26.0 + low])
    for aim in ((95, 40, 40), (90, 90, 30), (100, 50, -10), (0, 105, 50)):
        towards = np.array(aim, np.float64) - hilum
        _tree(shapes, "liver_vessel", hilum, towards, (4.4, 5, 27.0), "liver")
    cava = np.array([27.0, 60.0, 70.0 + low])
    for aim in ((105, 30, 45), (70, 110, 40), (-25, 100, 55)):
        towards = np.array(aim, np.float64) - cava
        _tree(shapes, "liver_vessel", cava, towards, (4.8, 4, 38.0), "liver")


def _bowel(shapes: Shapes, patient: Patient, surface: Surface) -> None:
    full, low = shapes.vary(0.13, 0.98), -0.6 * patient.breath
    fundus = [
        (-22, 44, 76 + low, 9),
        (-50, 40, 72 + low, 24 * full),
        (-64, 54, 52 + low, 33 * full),
        (-64, 78, 22 + low, 29 * full),
        (-48, 100, -8, 24 * full),
        (-20, 108, -26, 19 * full),
        (10, 104, -24, 15 * full),
        (30, 94, -12, 10),
    ]
    shapes.tube("stomach", fundus, "inside", (1, 0.95, 1), (2.2, 22))
    loop = [
        (34, 92, -10, 11),
        (46, 82, -16, 11.5),
        (52, 70, -40, 11.5),
        (46, 66, -70, 11),
        (18, 68, -82, 10),
        (-14, 68, -78, 10),
        (-30, 74, -56, 10),
    ]
    shapes.tube("duodenum", loop, "inside", (1, 1, 1), (1.4, 11))
    _colon(shapes, surface)
    for _ in range(2):
        _small_bowel(shapes, patient, surface)


def _colon(shapes: Shapes, surface: Surface) -> None:
    sag, wide = shapes.vary(16, -58), shapes.vary(0.12)

    def front(x: float, z: float, back: float) -> float:
        return surface.front(x, z) - back

    frame = [
        (78, 70, -176, 21),
        (92, 62, -150, 25),
        (98, 50, -100, 23),
        (98, 48, -62, 21),
        (86, 74, -46, 20),
        (70, front(70, -50, 32), -50, 19),
        (36, front(36, sag, 28), sag, 18),
        (0, front(0, sag - 12, 26), sag - 12, 18),
        (-40, front(-40, sag, 28), sag, 18),
        (-84, front(-84, -26, 30), -26, 17),
        (-108, 70, 14, 17),
        (-112, 46, 30, 16),
        (-112, 28, -10, 15),
        (-108, 26, -70, 14.5),
        (-104, 40, -120, 14),
        (-88, 66, -160, 14),
        (-58, 70, -196, 14),
        (-26, 74, -186, 15),
        (4, 50, -176, 15),
        (20, 16, -190, 15),
        (6, -18, -206, 16),
        (0, -34, -232, 18),
        (0, -28, -262, 17),
        (0, -14, -296, 10),
    ]
    moved = [(*shapes.near(p[:3], 4.0), p[3] * wide) for p in frame]
    points = curve(moved, 6.0)
    steps = np.linalg.norm(np.diff(points[:, :3], axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    points[:, 3] *= 1 + 0.14 * np.sin(along * (2 * np.pi / 34))
    shapes.cones("colon", (points[:-1], points[1:]), relief=(1.5, 14))


def _small_bowel(shapes: Shapes, patient: Patient, surface: Surface) -> None:
    """A tube that wanders through the middle of the abdomen and keeps off its own loops."""
    random = shapes.random
    here = np.array([-40.0, 84.0, -60.0]) + random.normal(0, 14, 3)
    direction = random.standard_normal(3)
    visited: list[Floats] = [here]
    middle, reach = np.array([-8.0, 92.0, -128.0]), np.array([88.0, 46.0, 84.0])
    middle[1] += 0.4 * patient.belly
    for _ in range(90):
        tries = direction + 0.9 * random.standard_normal((24, 3))
        tries[:, 1] *= 0.8
        tries /= np.linalg.norm(tries, axis=1, keepdims=True)
        ends = here + 17.0 * tries
        outside = np.maximum(np.linalg.norm((ends - middle) / reach, axis=1) - 1.0, 0)
        old = np.array(visited[:-2] or [here + 1e3])
        crowd = np.linalg.norm(ends[:, None] - old[None], axis=2)
        close = np.maximum(27.0 - crowd, 0).sum(axis=1) / 27.0
        best = int(np.argmin(4 * outside + close + 0.2 * random.random(24)))
        direction, here = tries[best], ends[best]
        visited.append(here)
    radius = shapes.vary(1.2, 11.5)
    walk = [(*p, radius * float(random.uniform(0.75, 1.15))) for p in visited]
    shapes.tube("small_bowel", walk, "inside", relief=(1.2, 10))
