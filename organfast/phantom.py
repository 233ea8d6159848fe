"""The phantom cohort: seeded patients, labelled down to single ribs, painted as CT scans.

Each patient differs in size, build, fat, position on the table, organ shape, contrast phase and
noise. A field of view may cut organs off. Labels are fine (see ``organfast.torso``);
:func:`class_labels` brings them to the classes of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure
from organfast.layouts import class_of_names, lies_in
from organfast.painting import LabelMap, in_slabs, paint, texture_tile
from organfast.torso import (
    LABELS,
    PROFILE,
    STRUCTURES,
    Patient,
    Shapes,
    body_radii,
    build_torso,
)
from organfast.volume import Volume

__all__ = [
    "FieldOfView",
    "PhantomCase",
    "class_labels",
    "cohort",
    "phantom",
    "phantom_names",
    "phantom_table",
]

Region = Literal["trunk", "chest", "abdomen"]

# Middle (mm above L1 in an average adult) and height of the field of view.
_REGIONS: dict[str, tuple[float, float]] = {
    "trunk": (14.0, 640.0),
    "chest": (150.0, 370.0),
    "abdomen": (-90.0, 430.0),
}
_LATTICE_STEP = 16.0
_LATTICE_LOW = (-272.0, -176.0, -400.0)
_LATTICE_SHAPE = (52, 28, 35)  # z, y, x
_BEND_MM, _MOST_BEND_MM = 4.3, 10.0


@dataclass(frozen=True)
class FieldOfView:
    """Where and how finely a phantom is scanned.

    Parameters
    ----------
    shape : (n_x, n_y, n_z)
        Voxels: columns, rows, slices.
    spacing_mm : (x, y, z)
        Voxel size, mm.
    middle_mm : float
        Height of the middle slice above L1, in an average adult.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    middle_mm: float = _REGIONS["trunk"][0]

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} must be three positive numbers of voxels")
        if len(self.spacing_mm) != 3 or not min(self.spacing_mm) > 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be three positive lengths")

    @staticmethod
    def over(
        region: Region, spacing_mm: tuple[float, float, float] = (1.6, 1.6, 4.0), size: int = 256
    ) -> FieldOfView:
        """The field of view of a region: as many slices as it takes, size x size pixels.

        Parameters
        ----------
        region : {"trunk", "chest", "abdomen"}
            The trunk reaches from the neck to the hips.
        spacing_mm : (x, y, z)
            Voxel size, mm.
        size : int
            Columns and rows of a slice.
        """
        if region not in _REGIONS:
            raise ValueError(f"region {region!r} is unknown; use one of {', '.join(_REGIONS)}")
        middle, height = _REGIONS[region]
        return FieldOfView((size, size, round(height / spacing_mm[2])), spacing_mm, middle)


@dataclass(frozen=True, eq=False)
class PhantomCase:
    """One patient of a cohort.

    Parameters
    ----------
    name : str
        Name of the case, safe in a file name.
    scan : Volume
        The painted CT.
    labels : (n_x, n_y, n_z) uint8 or uint16
        Labels of the class table, on the scan's stored grid.
    anatomy : LabelMap
        All structures, down to single ribs, on the same grid; see :func:`phantom_table`.
    """

    name: str
    scan: Volume
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    anatomy: LabelMap


def phantom_names() -> dict[int, str]:
    """Label -> name of the phantom's structures, the same for every patient."""
    return {label: name for name, label in LABELS.items()}


def phantom_table() -> ClassTable:
    """The phantom's structures as a class table: the class of each is its label.

    Written with it (``write_case``), a cohort has all its labels, and a model may be trained on the
    classes that its structures are or lie in.
    """
    structures = [Structure("background", "background")]
    return ClassTable((*structures, *(Structure(name) for name in phantom_names().values())))


def phantom(field: FieldOfView, seed: int, *, threads: int = 1) -> LabelMap:
    """Labelled anatomy of a made-up patient.

    Parameters
    ----------
    field : FieldOfView
        Where and how finely to scan.
    seed : int
        The patient. The same patient at another spacing is the same anatomy.
    threads : int
        Threads to work with; the result does not depend on it.

    Returns
    -------
    LabelMap
        uint8 labels (x, y, z), RAS+, with :func:`phantom_names`.
    """
    from organfast.kernels import phantom as kernel

    random = np.random.default_rng([seed, 7])
    patient = Patient.draw(random)
    position = random.normal(0, 9, 2).clip(-18, 18)
    radii = body_radii(patient, random)
    lattice = _bending(random)
    shapes = build_torso(patient, radii, random)

    n_x, n_y, n_z = field.shape
    frame = _frame(field, patient, position)
    packed = _pack(shapes, frame, (n_z, n_y, n_x), lattice)
    space = (
        frame,
        lattice,
        np.array([*_LATTICE_LOW, _LATTICE_STEP]),
        np.array(PROFILE),
        np.array(patient.dome),
        _MOST_BEND_MM,
    )
    layer_names = ("skin", "subcutaneous_fat", "body_wall_muscle", "intermuscular_fat", "trunk_fat")
    layers = np.array([0, *(LABELS[name] for name in layer_names)], np.uint8)
    group = np.zeros(256, np.uint8)
    for name, (number, _) in STRUCTURES.items():
        group[LABELS[name]] = number
    texture = texture_tile(seed)
    working = np.empty((n_z, n_y, n_x), np.uint8)

    def label_slab(low: int, high: int) -> None:
        scratch = np.empty((5, n_y, n_x), np.float32)
        slab = working[low:high]
        kernel.label_slices(slab, low, space, radii, layers, packed, group, texture, scratch)

    in_slabs(label_slab, n_z, threads)
    affine = np.diag([*field.spacing_mm, 1.0])
    affine[:3, 3] = -0.5 * (np.array(field.shape) - 1) * field.spacing_mm
    affine[2, 3] += field.middle_mm
    return LabelMap(working.transpose(2, 1, 0), affine, phantom_names())


def class_labels(
    label_map: LabelMap, table: ClassTable | None = None
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """A phantom's labels as labels of a class table.

    Parameters
    ----------
    label_map : LabelMap
        What :func:`phantom` returned.
    table : ClassTable, optional
        The default table by default. What it does not name becomes ``body_envelope`` where it
        lies in the wall of the trunk (skin, fat, muscle, bones) and the table has that class, and
        the table's context class otherwise.

    Returns
    -------
    (n_x, n_y, n_z) uint8, or uint16 for tables of more than 256 classes
        In the memory order of the label map.
    """
    table = table or ClassTable.default()
    class_of = class_of_names(table)
    lookup = np.zeros(256, np.uint8 if len(table) <= 256 else np.uint16)
    for label, name in label_map.names.items():
        lookup[label] = class_of.get(name, lies_in(name, table))
    out = np.empty_like(label_map.labels, lookup.dtype)
    np.take(lookup, label_map.labels, out=out)
    return out


def cohort(
    n: int,
    seed: int,
    spacing_mm: tuple[float, float, float] = (1.6, 1.6, 4.0),
    size: int = 256,
    *,
    threads: int = 1,
) -> Iterator[PhantomCase]:
    """Phantom patients, painted one by one as they are asked for.

    The first, the third, ... are scanned from neck to hips; of the others some in the chest or the
    abdomen alone, so that the edge of the scan does not tell an organ.

    Parameters
    ----------
    n : int
        Number of patients.
    seed : int
        Seed of the cohort.
    spacing_mm : (x, y, z)
        Voxel size, mm.
    size : int
        Columns and rows of a slice.
    threads : int
        Threads to work with; the result does not depend on it.
    """
    if n < 0:
        raise ValueError(f"n is {n}; a cohort has 0 patients or more")
    for number in range(n):
        random = np.random.default_rng([seed, number, 3])
        draw = int(random.integers(3)) if number % 2 else 0
        region: Region = ("trunk", "chest", "abdomen")[draw]
        view = FieldOfView.over(region, spacing_mm, size)
        view = replace(view, middle_mm=view.middle_mm + float(random.uniform(-15, 15)))
        patient = int(random.integers(2**31))
        anatomy = phantom(view, patient, threads=threads)
        scan = paint(anatomy, patient, threads=threads)
        yield PhantomCase(f"phantom_{number:03d}", scan, class_labels(anatomy), anatomy)


def _frame(
    field: FieldOfView, patient: Patient, position: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(3, 4): voxel (j, i, k) and 1 -> reference mm."""
    angle = np.deg2rad(patient.turn)
    spin = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    linear = np.diag(1 / np.array(patient.scale)) @ spin @ np.diag(field.spacing_mm)
    middle = 0.5 * (np.array(field.shape, np.float64) - 1)
    goal = np.array([position[0], 34.0 + position[1], field.middle_mm])
    return np.column_stack([linear, goal - linear @ middle])


def _bending(random: np.random.Generator) -> NDArray[np.float32]:
    """(n_z, n_y, n_x, 3) float32 smooth displacements, mm."""
    from scipy.ndimage import gaussian_filter

    field = np.empty((*_LATTICE_SHAPE, 3), np.float32)
    for axis in range(3):
        waves = gaussian_filter(random.standard_normal(_LATTICE_SHAPE), 4.0, mode="wrap")
        field[..., axis] = np.clip(_BEND_MM * waves / waves.std(), -_MOST_BEND_MM, _MOST_BEND_MM)
    return field


def _pack(
    shapes: Shapes,
    frame: NDArray[np.float64],
    shape: tuple[int, int, int],
    lattice: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Shapes as the arrays that ``label_slices`` takes, those outside the scan left out.

    A voxel at p lands at p + u(p): a shape is looked for in its box less the range of u around it.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    boxes = np.array(shapes.boxes)  # (n, 2, 3) reference mm
    low, high = boxes[:, 0] - _MOST_BEND_MM, boxes[:, 1] + _MOST_BEND_MM
    middle = 0.5 * (boxes[:, 0] + boxes[:, 1])
    nearest = np.rint((middle - _LATTICE_LOW) / _LATTICE_STEP).astype(np.int64)
    x, y, z = (nearest[:, a].clip(0, lattice.shape[2 - a] - 1) for a in range(3))
    # Within two and a half steps of the middle, the bend's own reach and a half step left over.
    small = (boxes[:, 1] - boxes[:, 0]).max(1) < 2 * (2 * _LATTICE_STEP - _MOST_BEND_MM)
    for axis in range(3):
        most = maximum_filter(lattice[..., axis], 7)[z, y, x]
        least = minimum_filter(lattice[..., axis], 7)[z, y, x]
        low[small, axis] = boxes[small, 0, axis] - most[small]
        high[small, axis] = boxes[small, 1, axis] - least[small]
    corners = np.array([[c >> a & 1 for a in range(3)] for c in range(8)])
    points = np.where(corners[None] == 0, low[:, None], high[:, None])
    voxels = (points - frame[:, 3]) @ np.linalg.inv(frame[:, :3]).T  # (n, 8, 3) j, i, k
    first = np.floor(voxels.min(1)).clip(0, shape[::-1]).astype(np.int64)[:, ::-1]
    last = np.ceil(voxels.max(1) + 1).clip(0, shape[::-1]).astype(np.int64)[:, ::-1]
    seen = (first < last).all(1)
    box = np.stack([first, last], axis=2).reshape(-1, 6)
    return (
        np.array(shapes.heads, np.int32)[seen],
        box[seen].astype(np.int32),
        np.array(shapes.relief, np.float32)[seen],
        np.array(shapes.rows, np.float32),
    )
