"""What a shortcut changes: a scan segmented without it and with it, and the label maps compared.

Without it means the model's own stride with every position asked. Both maps are what a user gets,
cleaned, but with the context classes left in: a voxel that moves between two of these counts, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.metrics import accuracy, centroid_error_mm, confusion, dice_from_confusion
from organfast.models.classifier import Model, load_model
from organfast.organs import Organ
from organfast.pipeline import Settings, segment
from organfast.progress import Progress, silent
from organfast.results import Result

__all__ = ["Agreement", "OrganAgreement", "Verification", "agreement", "verify"]

Labels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class OrganAgreement:
    """One organ in two segmentations of a scan.

    Parameters
    ----------
    name : str
        Canonical name.
    dice : float or None
        Between the two; None where neither has the organ.
    shift_mm : float or None
        Between the two centres; None where one of them lacks the organ.
    volumes_ml : (float, float)
        In the reference and in the other.
    """

    name: str
    dice: float | None
    shift_mm: float | None
    volumes_ml: tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """How far two segmentations of a scan agree.

    Parameters
    ----------
    differing : float
        Share of all voxels whose labels differ.
    differing_in_organs : float or None
        The same of the voxels that are an organ in either; None where there are none.
    organs : tuple of OrganAgreement
        Every organ of the class table.
    """

    differing: float
    differing_in_organs: float | None
    organs: tuple[OrganAgreement, ...]


def agreement(
    reference: tuple[Labels, Mapping[str, Organ]],
    other: tuple[Labels, Mapping[str, Organ]],
    classes: ClassTable,
) -> Agreement:
    """Compare two segmentations of a scan, however they were made.

    Parameters
    ----------
    reference : ((n_a, n_b, n_c) uint8 or uint16, mapping of str to Organ)
        Label map and organs of every name, as a ``Result`` holds them.
    other : ((n_a, n_b, n_c) uint8 or uint16, mapping of str to Organ)
        The same voxels.
    classes : ClassTable
        What the labels mean.

    Raises
    ------
    ValueError
        The label maps differ in shape, or hold a label beyond the table.
    """
    counts = confusion(reference[0], other[0], len(classes))
    is_organ = np.isin(np.arange(len(classes)), classes.organs)
    in_organ = counts[is_organ[:, None] | is_organ]  # pairs with an organ on either side
    n_same = int(counts.diagonal()[is_organ].sum())
    dice = dice_from_confusion(counts)
    return Agreement(
        1 - accuracy(counts),
        1 - n_same / int(in_organ.sum()) if in_organ.any() else None,
        tuple(
            _organ_agreement(reference[1][name], other[1][name], float(dice[label]))
            for name, label in ((classes.names[n], n) for n in classes.organs)
        ),
    )


def _organ_agreement(one: Organ, other: Organ, dice: float) -> OrganAgreement:
    shift = None
    if one.centroid_mm is not None and other.centroid_mm is not None:
        shift = centroid_error_mm(one.centroid_mm, other.centroid_mm)
    found = one.n_voxels or other.n_voxels
    volumes = one.volume_ml, other.volume_ml
    return OrganAgreement(one.name, dice if found else None, shift, volumes)


@dataclass(frozen=True)
class Verification:
    """What a shortcut changed in one scan, and what it saved.

    Parameters
    ----------
    agreement : Agreement
        Between the full grid, the reference, and the shortcut.
    asked : (int, int)
        Positions at which the classifier was asked, on the full grid and by the shortcut.
    seconds : (float, float)
        Classification and enlargement, by the clock, in the same order.
    settings : dict
        The shortcut's, as ``run.json`` records them.
    warnings : tuple of str
        About the scan.
    """

    agreement: Agreement
    asked: tuple[int, int]
    seconds: tuple[float, float]
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def share_asked(self) -> float | None:
        """The shortcut's positions, of the full grid's; None where that had none."""
        return self.asked[1] / self.asked[0] if self.asked[0] else None

    @property
    def time_ratio(self) -> float:
        """How many times as fast the shortcut was."""
        return self.seconds[0] / self.seconds[1]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "share_asked": self.share_asked, "time_ratio": self.time_ratio}


def verify(
    scan: Any,
    model: Model | str | PathLike[str],
    settings: Settings,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Verification:
    """Segment a scan on the full grid and by a shortcut, and compare.

    Parameters
    ----------
    scan : path, nibabel image, Volume, Scan or (array, affine)
        The CT scan.
    model : Model or path
        What ``train`` or ``load_model`` returned, or a ``.organfast`` file.
    settings : Settings
        The shortcut: ``stride``, ``refine`` or both. What else is set holds for the full grid, too,
        but that all organs and the context classes stay in the label maps.
    threads : int
        Threads; only the seconds depend on them.
    progress : callable, optional
        Called with (what, done, total) in each of the two runs.

    Returns
    -------
    Verification
        What differs, and what was saved.

    Raises
    ------
    InputError
        The scan or the model cannot be used.
    ValueError
        The settings do not fit the model.
    """
    model = model if isinstance(model, Model) else load_model(model)
    shortcut = replace(settings, organs=None, keep_context=True)
    without = replace(shortcut, stride=None, refine=None, trees=None, confidence=True)
    full = _Side.of(segment(scan, model, without, threads=threads, progress=progress))
    result = segment(scan, model, shortcut, threads=threads, progress=progress)
    short = _Side.of(result)
    return Verification(
        agreement((full.labels, full.organs), (short.labels, short.organs), model.classes),
        (full.asked, short.asked),
        (full.seconds, short.seconds),
        result.record["settings"],
        tuple(result.record["warnings"]),
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """What is compared of a result: neither its scan nor its confidence stays in memory."""

    labels: Labels
    organs: Mapping[str, Organ]
    asked: int
    seconds: float

    @staticmethod
    def of(result: Result) -> _Side:
        return _Side(
            result.labels,
            result.organs,
            result.record["positions"]["n_asked"],
            result.timings["seconds"]["classify and enlarge"],
        )
