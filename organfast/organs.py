"""Organs found in a label map: present or not, how large, where, cut off, and on which side.

Two kinds of coordinates occur: voxel indices of the scan's array *as the file stores it*, and
RAS+ mm (x to the patient's right, y to the front, z to the head).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.segmentation import Labels, LabelStatistics, measure_labels
from organfast.tables import table
from organfast.volume import Volume

__all__ = [
    "Organ",
    "Presence",
    "drop_small",
    "measure_organs",
    "organs_csv",
    "organs_from_json",
    "organs_json",
]

Point = tuple[float, float, float]

# Low and high side of the working axes k, i, j.
_SIDES = (("inferior", "superior"), ("posterior", "anterior"), ("left", "right"))
_SIDE_ORDER = ("left", "right", "posterior", "anterior", "inferior", "superior")

# Measured on two labelled CTs: the closest pairs, psoas and adrenals, were 66 to 136 mm apart.
_PAIR_MM = 10.0

_COORDINATES = (
    "mm: RAS+, x to the patient's right, y to the front, z to the head; "
    "voxel: indices of the scan's array as stored, boxes half-open"
)


@dataclass(frozen=True)
class Presence:
    """When an organ counts as present: large enough, certain enough, and no crumb of an organ.

    Parameters
    ----------
    min_ml : float, ml
        Smallest volume.
    min_confidence : float
        Smallest mean probability of the organ over its voxels, 0..1.
    sure : float or None
        An organ that is present with a smaller mean probability gets a warning that starts with
        "not sure", as ``Model.sure`` was measured. None warns of nothing.
    whole_ml : mapping of str to float, ml
        Volume of the smallest of each organ that was learned from and lay wholly in view, as
        ``Model.whole_ml`` has it. An organ that ends before the field of view does must be whole:
        with less than ``least_of_whole`` of this volume it is none.
    least_of_whole : float
        Share of that volume, 0..1.
    side_mm : float, mm
        What comes so near to a side of the field of view may go on beyond it.
    """

    min_ml: float = 0.5
    min_confidence: float = 0.2
    sure: float | None = None
    whole_ml: Mapping[str, float] = field(default_factory=dict)
    least_of_whole: float = 0.2
    side_mm: float = 10.0

    def __post_init__(self) -> None:
        if not self.side_mm >= 0:
            raise ValueError(f"side_mm {self.side_mm} is negative; use 0 mm or more")
        if not 0 <= self.least_of_whole <= 1:
            raise ValueError(f"least_of_whole {self.least_of_whole} is outside 0..1")
        if not self.min_ml >= 0:
            raise ValueError(f"min_ml {self.min_ml} is negative; use 0 ml or more")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence {self.min_confidence} is outside 0..1")
        if self.sure is not None and not 0 <= self.sure <= 1:
            raise ValueError(f"sure {self.sure} is outside 0..1")


@dataclass(frozen=True)
class Organ:
    """One organ of one scan. What an organ without voxels cannot have is None.

    Parameters
    ----------
    name : str
        Canonical name.
    label : int
        Its label in the map.
    present : bool
        By the rule of :class:`Presence`.
    confidence : float or None
        Mean probability of the organ over its voxels, 0..1; None without a confidence map.
    n_voxels : int
        Voxels of the label.
    volume_ml : float, ml
        Their volume.
    box_voxel : tuple of (start, stop) or None
        Half-open bounding box on the three axes as stored.
    box_mm : (minimum, maximum) or None, RAS+ mm
        Opposite corners of the axis-aligned hull of the box, voxel edges included.
    centroid_voxel, centroid_mm : tuple of float or None
        Mean position of the voxels.
    probability_centroid_voxel, probability_centroid_mm : tuple of float or None
        Mean position weighted with the squared probability of the organ everywhere in the scan.
    cut_off : tuple of str
        Sides of the field of view that the organ touches: ``left``, ``right``, ``posterior``,
        ``anterior``, ``inferior``, ``superior``.
    warnings : tuple of str
        What a reader should check.
    """

    name: str
    label: int
    present: bool
    confidence: float | None
    n_voxels: int
    volume_ml: float
    box_voxel: tuple[tuple[int, int], ...] | None = None
    box_mm: tuple[Point, Point] | None = None
    centroid_voxel: Point | None = None
    centroid_mm: Point | None = None
    probability_centroid_voxel: Point | None = None
    probability_centroid_mm: Point | None = None
    cut_off: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def measure_organs(
    labels: Labels,
    confidence: NDArray[np.uint8] | None,
    volume: Volume,
    classes: ClassTable,
    probability_centroids: NDArray[np.float64] | None = None,
    presence: Presence | None = None,
) -> dict[str, Organ]:
    """Measure every organ of the class table, found or not.

    Parameters
    ----------
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order, on the grid of ``volume.working``.
    confidence : (n_k, n_i, n_j) uint8 or None
        Probability of each voxel's label in working order, 255 = certain.
    volume : Volume
        The scan.
    classes : ClassTable
        What the labels mean.
    probability_centroids : (n_classes, 3) float64, optional
        Mean working voxel index (k, i, j) weighted with the squared probability of each class;
        NaN where there is none.
    presence : Presence, optional
        When an organ counts as present.

    Returns
    -------
    dict of str to Organ
        By name, in label order.

    Raises
    ------
    ValueError
        An array does not fit the volume or the class table.
    """
    if labels.shape != volume.working.shape:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit the scan's working shape "
            f"{volume.working.shape}; give the label map in working order (k, i, j)"
        )
    if probability_centroids is None:
        probability_centroids = np.full((len(classes), 3), np.nan)
    if probability_centroids.shape != (len(classes), 3):
        raise ValueError(
            f"probability_centroids of shape {probability_centroids.shape} do not fit "
            f"{len(classes)} classes; give ({len(classes)}, 3)"
        )
    statistics = measure_labels(labels, len(classes), confidence)
    organs = {}
    for label in classes.organs:
        name = classes.names[label]
        organ = _measure(name, label, statistics, volume)
        position = probability_centroids[label]
        if np.isfinite(position).all():
            organ = replace(
                organ,
                probability_centroid_voxel=_stored(position, volume),
                probability_centroid_mm=_mm(position, volume),
            )
        organs[name] = _judge(organ, presence or Presence(), volume)
    return _audit_sides(organs, classes)


def drop_small(
    labels: Labels,
    organs: Mapping[str, Organ],
    classes: ClassTable,
    volume: Volume,
    presence: Presence,
) -> dict[str, str]:
    """Take organs that are too small to be present out of a label map, in place.

    Their voxels become the context class, or background where the table has none.

    Parameters
    ----------
    labels : (n_a, n_b, n_c) uint8 or uint16
        Label map as stored, written.
    organs : mapping of str to Organ
        What :func:`measure_organs` found in it.
    classes : ClassTable
        What the labels mean.
    volume : Volume
        The scan.
    presence : Presence
        What is too small.

    Returns
    -------
    dict of str to str
        Organ that was taken out -> how much of it there was.
    """
    rest = 0 if classes.context is None else classes.context
    gone = {}
    for name, organ in organs.items():
        why = _too_small(organ, presence, volume)
        if why is not None and organ.box_voxel is not None:
            part = labels[tuple(slice(*side) for side in organ.box_voxel)]
            part[part == organ.label] = rest
            gone[name] = why
    return gone


def organs_json(organs: Mapping[str, Organ]) -> str:
    """The organs as JSON text: coordinates explained, units in the names, numbers rounded.

    Parameters
    ----------
    organs : mapping of str to Organ
        As :func:`measure_organs` gives them.
    """
    table = {
        name: {of.name: _rounded(getattr(organ, of.name), of.name) for of in _FIELDS}
        for name, organ in organs.items()
    }
    content = {"coordinates": _COORDINATES, "organs": table}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def organs_from_json(text: str) -> dict[str, Organ]:
    """The organs that :func:`organs_json` wrote, as rounded as there.

    Parameters
    ----------
    text : str
        JSON.

    Raises
    ------
    ValueError
        It is no such text.
    """
    try:
        table = json.loads(text)["organs"]
        return {
            str(name): Organ(**{key: _tuples(value) for key, value in row.items()})
            for name, row in table.items()
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"no table of organs ({error})") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def organs_csv(organs: Mapping[str, Organ]) -> str:
    """The organs as CSV text, one row each, units in the column names.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.

    Parameters
    ----------
    organs : mapping of str to Organ
        As :func:`measure_organs` gives them.
    """
    return table([_CSV_COLUMNS, *map(_csv_row, organs.values())])


_FIELDS = fields(Organ)
_DECIMALS = {"confidence": 4, "volume_ml": 3}
_CSV_POINTS = ("centroid", "probability_centroid")
_CSV_COLUMNS = (
    "name",
    "label",
    "present",
    "confidence",
    "n_voxels",
    "volume_ml",
    *(f"box_voxel_{axis}_{end}" for axis in range(3) for end in ("start", "stop")),
    *(f"box_{axis}_{end}_mm" for end in ("min", "max") for axis in "xyz"),
    *(f"{point}_voxel_{axis}" for point in _CSV_POINTS for axis in range(3)),
    *(f"{point}_{axis}_mm" for point in _CSV_POINTS for axis in "xyz"),
    "cut_off",
    "warnings",
)


def _csv_row(organ: Organ) -> list[Any]:
    def cells(name: str, n: int) -> list[Any]:
        value = _rounded(getattr(organ, name), name)
        return [None] * n if value is None else list(np.ravel(value).tolist())

    return [
        organ.name,
        organ.label,
        "true" if organ.present else "false",
        *cells("confidence", 1),
        organ.n_voxels,
        *cells("volume_ml", 1),
        *cells("box_voxel", 6),
        *cells("box_mm", 6),
        *cells("centroid_voxel", 3),
        *cells("probability_centroid_voxel", 3),
        *cells("centroid_mm", 3),
        *cells("probability_centroid_mm", 3),
        " ".join(organ.cut_off),
        "; ".join(organ.warnings),
    ]


def _rounded(value: Any, name: str) -> Any:
    if isinstance(value, tuple):
        return [_rounded(item, name) for item in value]
    if isinstance(value, float):
        return round(value, _DECIMALS.get(name, 2)) + 0.0  # never -0.0
    return value


def _measure(name: str, label: int, statistics: LabelStatistics, volume: Volume) -> Organ:
    n_voxels = int(statistics.counts[label])
    confidence = None
    if statistics.confidence_sums is not None:
        confidence = float(statistics.confidence_sums[label]) / (255 * max(n_voxels, 1))
    organ = Organ(name, label, n_voxels > 0, confidence, n_voxels, n_voxels * volume.voxel_ml)
    if not n_voxels:
        return organ
    box = statistics.boxes[label]
    centroid = statistics.sums[label] / n_voxels
    return replace(
        organ,
        box_voxel=_stored_box(box, volume),
        box_mm=_hull_mm(box, volume),
        centroid_voxel=_stored(centroid, volume),
        centroid_mm=_mm(centroid, volume),
        cut_off=_touched_sides(box, volume.working.shape),
    )


def _judge(organ: Organ, presence: Presence, volume: Volume) -> Organ:
    """Decide on presence; voxels that do not suffice are mentioned."""
    if not organ.n_voxels:
        return organ
    too_small = _too_small(organ, presence, volume)
    warnings = [] if too_small is None else [too_small]
    if organ.confidence is not None and organ.confidence < presence.min_confidence:
        warnings.append(
            f"mean probability {organ.confidence:.2f} is below {presence.min_confidence:.2f}"
        )
    is_present = not warnings
    if is_present and _is_doubtful(organ.confidence, presence.sure):
        warnings.append(
            f"not sure: mean probability {organ.confidence:.2f} is below {presence.sure:.2f}"
        )
    return replace(organ, present=is_present, warnings=tuple(warnings))


def _too_small(organ: Organ, presence: Presence, volume: Volume) -> str | None:
    """Why an organ has too few voxels to be one, or None."""
    if organ.box_voxel is None:
        return None
    if organ.volume_ml < presence.min_ml:
        return f"{organ.volume_ml:.2f} ml found, less than the {presence.min_ml:g} ml that count"
    least_ml = presence.least_of_whole * presence.whole_ml.get(organ.name, 0.0)
    if organ.volume_ml >= least_ml or _is_at_side(organ.box_voxel, volume, presence.side_mm):
        return None
    return (
        f"{organ.volume_ml:.1f} ml found wholly in view, less than the {least_ml:.1f} ml that a "
        "whole one has"
    )


def _is_at_side(box: tuple[tuple[int, int], ...], volume: Volume, side_mm: float) -> bool:
    """Whether a box comes so near to a side of the field of view, or touches it."""
    lengths = np.linalg.norm(np.asarray(volume.affine, np.float64)[:3, :3], axis=0).tolist()
    return any(
        start == 0 or stop == n or min(start, n - stop) * length < side_mm
        for (start, stop), n, length in zip(box, volume.hu.shape, lengths, strict=True)
    )


def _is_doubtful(confidence: float | None, sure: float | None) -> bool:
    return confidence is not None and sure is not None and confidence < sure


def _audit_sides(organs: dict[str, Organ], classes: ClassTable) -> dict[str, Organ]:
    """Warn where the right one of a pair does not lie to the right, in RAS+ mm."""
    audited = dict(organs)
    for organ in organs.values():
        structure = classes[organ.name]
        partner = organs.get(structure.mirror)
        if structure.side != "R" or partner is None or not (organ.present and partner.present):
            continue
        if organ.centroid_mm is None or partner.centroid_mm is None:
            continue
        distance = organ.centroid_mm[0] - partner.centroid_mm[0]
        if distance >= _PAIR_MM:
            continue
        where = f"only {distance:.0f} mm to the right"
        if distance < 0:
            where = f"{-distance:.0f} mm to the left"
        warning = f"{organ.name} lies {where} of {partner.name}: left and right may be swapped"
        for one in (organ, partner):
            audited[one.name] = replace(one, warnings=(*one.warnings, warning))
    return audited


def _stored(position: NDArray[np.float64], volume: Volume) -> Point:
    k, i, j = position.tolist()
    a, b, c = volume.orientation.stored_index((k, i, j), volume.hu.shape)
    return a, b, c


def _mm(position: NDArray[np.float64], volume: Volume) -> Point:
    affine = volume.working_affine
    x, y, z = (affine[:3, :3] @ position + affine[:3, 3]).tolist()
    return x, y, z


def _stored_box(box: NDArray[np.int64], volume: Volume) -> tuple[tuple[int, int], ...]:
    first = volume.orientation.stored_index(tuple(box[:, 0]), volume.hu.shape)
    last = volume.orientation.stored_index(tuple(box[:, 1] - 1), volume.hu.shape)
    return tuple((int(min(ends)), int(max(ends)) + 1) for ends in zip(first, last, strict=True))


def _hull_mm(box: NDArray[np.int64], volume: Volume) -> tuple[Point, Point]:
    edges = box - 0.5
    corners = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1).reshape(8, 3)
    affine = volume.working_affine
    mm = corners @ affine[:3, :3].T + affine[:3, 3]
    (x0, y0, z0), (x1, y1, z1) = mm.min(axis=0).tolist(), mm.max(axis=0).tolist()
    return (x0, y0, z0), (x1, y1, z1)


def _touched_sides(box: NDArray[np.int64], shape: tuple[int, ...]) -> tuple[str, ...]:
    touched = set()
    for (low, high), (start, stop), n in zip(_SIDES, box.tolist(), shape, strict=True):
        touched |= {low} if start == 0 else set()
        touched |= {high} if stop == n else set()
    return tuple(side for side in _SIDE_ORDER if side in touched)
