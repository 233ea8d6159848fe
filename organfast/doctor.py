"""What is wrong with a dataset: each case by itself, then each beside the others.

::

    case ──> image ──> HU? ──> labels ──> same grid? ──> where is each structure ──> its exam
             one case in memory at a time (so many as there are threads)             │ numbers only
    exams of all cases ──> the same scan twice? odd volumes, odd spacing, lacking organs ──> report

A *fault* would spoil training: the scan cannot be read, or a model would learn something false from
it. A *note* is worth a look and may well be right, such as an organ that was taken out.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure
from organfast.blockfiles import read_blocks
from organfast.errors import InputError
from organfast.layouts import (
    BlockFile,
    Case,
    Dataset,
    LabelMap,
    Masks,
    class_of_names,
    dataset_classes,
    grid_mismatch,
    inside_of,
    is_doubtful,
    is_region,
)
from organfast.nifti import NotHU, read_labels, read_scan
from organfast.organs import Organ, measure_organs
from organfast.progress import Progress, silent
from organfast.volume import AIR_HU, Volume
from organfast.workers import Workers

__all__ = ["KINDS", "CaseExam", "Checkup", "Finding", "check_dataset"]

Level = Literal["fault", "note"]

KINDS = {
    "unreadable": "a file cannot be read",
    "hu": "voxels are not HU",
    "grid": "labels lie on another grid than their image",
    "labels": "numbers without a name, or nothing labelled",
    "overlap": "masks that share voxels",
    "empty": "masks without a voxel",
    "sides": "left and right exchanged",
    "order": "structures that cannot lie like this",
    "header": "the file is doubtful about where it lies",
    "duplicate": "the same scan twice",
    "missing": "an organ that most others have",
    "volume": "a volume unlike that of the others",
    "spacing": "voxels unlike those of the others",
}
"""What a finding is about."""

# The two of a pair lie at least 57 mm apart in five labelled scans (autochthon, psoas, adrenals);
# vessels of the neck 29 mm.
_PAIR_MM = 10.0
# Masks drawn apart share some voxels at their border.
_OVERLAP_SHARE = 0.01
# Iglewicz and Hoaglin 1993, How to detect and handle outliers, section 3: |z| above 3.5 with
# z = 0.6745 (x - median) / MAD. Of logarithms: half and double are as odd.
_ODD_Z, _Z_PER_MAD = 3.5, 0.6745
# A cohort from one machine has no spread at all: less than 5 % counts as 5 %.
_LEAST_MAD = 0.05
_LEAST_COHORT = 5
_MOST_HAVE = 0.75
_LEAST_OTHERS = 2
_NAMED_AT_MOST = 4


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Parameters
    ----------
    level : {"fault", "note"}
        A fault would spoil training.
    kind : str
        One of ``KINDS``.
    case : str
        Name of the case.
    text : str
        What was found, with its numbers.
    structures : tuple of str
        Which structures it is about, if any.
    """

    level: Level
    kind: str
    case: str
    text: str
    structures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "level": self.level,
            "kind": self.kind,
            "case": self.case,
            "text": self.text,
            "structures": list(self.structures),
        }


@dataclass(frozen=True)
class CaseExam:
    """What is kept of a case once its voxels are gone.

    Parameters
    ----------
    name, patient : str
        Of the case.
    findings : tuple of Finding
        Of the case by itself.
    shape : tuple of int
        Voxels of the image along the stored axes; empty where it could not be read.
    spacing_mm : tuple of float
        (x, y, z) of its closest canonical orientation.
    digest : str
        sha256 of its voxels, however the file stores them.
    volumes_ml : mapping of str to float
        Structure -> ml, 0 for an organ that is annotated but has no voxel.
    cut_off : frozenset of str
        Structures that touch a side of the field of view.
    """

    name: str
    patient: str
    findings: tuple[Finding, ...] = ()
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    digest: str = ""
    volumes_ml: Mapping[str, float] = field(default_factory=dict)
    cut_off: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it, without the findings."""
        return {
            "name": self.name,
            "patient": self.patient,
            "shape": list(self.shape),
            "spacing_mm": [round(mm, 4) for mm in self.spacing_mm],
            "image_sha256": self.digest,
            "volumes_ml": {name: round(ml, 3) for name, ml in self.volumes_ml.items()},
            "cut_off": sorted(self.cut_off),
        }


@dataclass(frozen=True)
class Checkup:
    """A dataset that was looked through.

    Parameters
    ----------
    cases : tuple of CaseExam
        In the order of the dataset.
    findings : tuple of Finding
        Faults first, then by kind and case.
    """

    cases: tuple[CaseExam, ...]
    findings: tuple[Finding, ...]

    @property
    def n_faults(self) -> int:
        """Findings that would spoil training."""
        return sum(finding.level == "fault" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``faults`` and ``notes`` (counts), ``findings``, ``cases``."""
        return {
            "faults": self.n_faults,
            "notes": len(self.findings) - self.n_faults,
            "findings": [finding.to_dict() for finding in self.findings],
            "cases": [exam.to_dict() for exam in self.cases],
        }


def check_dataset(
    dataset: Dataset,
    classes: ClassTable | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Checkup:
    """Look through every case of a dataset.

    Parameters
    ----------
    dataset : Dataset
        Of ``find_cases``.
    classes : ClassTable, optional
        Whose organs matter most; by default ``dataset_classes``.
    threads : int
        Cases read at once, and in memory at once.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Checkup
        The same for any number of threads. A case that cannot be read is a finding, never an error.
    """
    classes = classes or dataset_classes(dataset)
    n_cases = len(dataset.cases)
    exams: list[CaseExam] = []
    with Workers(threads) as workers:
        for exam in workers.in_order(lambda case: _examined(case, classes), dataset.cases):
            progress("examining cases", len(exams), n_cases)
            exams.append(exam)
    progress("examining cases", n_cases, n_cases)
    findings = [finding for exam in exams for finding in exam.findings]
    organs = [classes.names[label] for label in classes.organs]
    findings += [*_duplicates(exams), *_missing(exams, organs)]
    findings += [*_odd_volumes(exams, organs), *_odd_spacings(exams)]
    order = list(KINDS)
    findings.sort(key=lambda found: (found.level, order.index(found.kind), found.case))
    return Checkup(tuple(exams), tuple(findings))


# --- one case -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The labels of a case under the names of their structures; 0 is none of them."""

    labels: NDArray[Any]
    names: tuple[str, ...]
    findings: tuple[Finding, ...]


def _examined(case: Case, classes: ClassTable) -> CaseExam:
    exam, labels = CaseExam(case.name, case.patient), case.labels
    try:
        if isinstance(labels, BlockFile):
            return _of_blocks(case, labels, classes)
        scan = read_scan(case.image)
    except NotHU as error:
        return replace(exam, findings=(_fault(case, "hu", _told(error)),))
    except InputError as error:
        return replace(exam, findings=(_fault(case, "unreadable", _told(error)),))
    volume = scan.volume
    findings = [Finding("note", "header", case.name, warning) for warning in scan.warnings]
    if isinstance(labels, LabelMap):
        drawn = _from_label_map(case, labels, volume, classes)
    else:
        drawn = _from_masks(case, labels, volume, classes)
    organs = _measured(drawn, volume)
    findings += [*drawn.findings, *_swapped(case, organs, classes), *_disordered(case, organs)]
    findings += _odd_hu(case, organs, drawn, volume)
    k, i, j = volume.working_spacing_mm
    return replace(
        exam,
        findings=tuple(findings),
        shape=volume.hu.shape,
        spacing_mm=(j, i, k),
        digest=_digest(volume),
        volumes_ml={n: o.volume_ml for n, o in organs.items() if o.n_voxels or n in classes},
        cut_off=frozenset(name for name, organ in organs.items() if organ.cut_off),
    )


def _of_blocks(case: Case, blocks_of: BlockFile, classes: ClassTable) -> CaseExam:
    """Blocks have no place: that they can be read, and differ, is all that can be told."""
    blocks = read_blocks(blocks_of.path, classes)
    content = sha256(blocks.hu.tobytes() + blocks.labels.tobytes())
    return CaseExam(case.name, case.patient, shape=blocks.hu.shape, digest=content.hexdigest())


def _fault(case: Case, kind: str, text: str, structures: Iterable[str] = ()) -> Finding:
    return Finding("fault", kind, case.name, text, tuple(structures))


def _told(error: InputError) -> str:
    """An error without the folders of its path: who reads the finding knows the case."""
    return " ".join(f"{Path(error.path).name} {error.problem}; {error.remedy}".split())


def _digest(volume: Volume) -> str:
    """Of the voxels in working order, padding counted as air, and of their number."""
    content = sha256(repr(volume.working.shape).encode())
    for plane in volume.working:
        content.update(np.maximum(plane, AIR_HU).tobytes())
    return content.hexdigest()


# --- its labels -----------------------------------------------------------------------------------


def _wholes(names: Iterable[str], classes: ClassTable) -> dict[str, str]:
    """Name -> the structure it is, or is a part of. Regions that may hold others are left out."""
    class_of = class_of_names(classes)
    left_out = {label for label in range(len(classes)) if label not in classes.organs}
    return {
        name: classes.names[class_of[name]] if name in class_of else name
        for name in names
        if class_of.get(name) not in left_out and not is_region(name)
    }


def _from_label_map(case: Case, label_map: LabelMap, volume: Volume, classes: ClassTable) -> _Drawn:
    whole_of = _wholes(label_map.annotated, classes)
    names = tuple(sorted(set(whole_of.values())))
    nothing = np.zeros(volume.hu.shape, np.uint8)
    try:
        stored, affine = read_labels(label_map.path)
    except InputError as error:
        return _Drawn(nothing, (), (_fault(case, "unreadable", _told(error)),))
    mismatch = grid_mismatch(stored.shape, affine, volume)
    if mismatch:
        text = f"{label_map.path.name} lies on another grid than its image: {mismatch}"
        return _Drawn(nothing, (), (_fault(case, "grid", text),))
    counts = np.zeros(np.iinfo(stored.dtype).max + 1, np.int64)
    for k in range(stored.shape[2]):
        counts += np.bincount(stored[:, :, k].ravel("K"), minlength=len(counts))
    findings = _number_faults(case, label_map, counts)
    table = np.zeros(len(counts), np.uint8 if len(names) < 256 else np.uint16)
    for number, name in label_map.names.items():
        nested = [whole_of[n] for n in (name, *label_map.within.get(number, ())) if n in whole_of]
        if 0 < number < len(table) and nested:
            narrowest = next((n for n in nested if n in classes), nested[0])
            table[number] = 1 + names.index(narrowest)
    return _Drawn(table[stored], names, tuple(findings))


def _number_faults(case: Case, label_map: LabelMap, counts: NDArray[np.int64]) -> list[Finding]:
    unknown = [int(n) for n in np.flatnonzero(counts) if n and int(n) not in label_map.names]
    findings = []
    if unknown:
        listed = _listed([str(number) for number in unknown])
        text = f"{label_map.path.name} holds labels that its label table does not name: {listed}"
        findings.append(_fault(case, "labels", text))
    if not counts[1:].any():
        findings.append(_fault(case, "labels", f"{label_map.path.name} has no labelled voxel"))
    return findings


def _from_masks(case: Case, masks: Masks, volume: Volume, classes: ClassTable) -> _Drawn:
    whole_of = _wholes(masks.annotated, classes)
    names = tuple(sorted(set(whole_of.values())))
    labels = np.zeros(volume.hu.shape, np.uint8 if len(names) < 256 else np.uint16, order="F")
    findings: list[Finding] = []
    sizes: Counter[str] = Counter()
    shared: Counter[tuple[str, str]] = Counter()
    for name, path in sorted(masks.paths.items()):
        inside, wrong = _mask(case, name, path, volume)
        if wrong is not None:
            findings.append(wrong)
            continue
        sizes[name] = int(np.count_nonzero(inside))
        if name not in whole_of:
            continue
        label = 1 + names.index(whole_of[name])
        under = np.bincount(labels[inside], minlength=len(names) + 1)
        for other in np.flatnonzero(under):
            if other not in (0, label):
                shared[names[other - 1], whole_of[name]] += int(under[other])
        labels[inside] = label
    findings = _together(findings)
    empty = sorted(name for name, n in sizes.items() if not n)
    if empty and len(empty) == len(sizes):
        findings.append(_fault(case, "labels", "none of its masks has a voxel"))
    elif empty:
        text = f"no voxel in the mask of {_listed(empty)}"
        findings.append(Finding("note", "empty", case.name, text, tuple(empty)))
    findings += _overlaps(case, labels, names, shared, classes)
    return _Drawn(labels, names, tuple(findings))


def _mask(
    case: Case, name: str, path: Path, volume: Volume
) -> tuple[NDArray[np.bool_], Finding | None]:
    nothing = np.zeros(0, bool)
    try:
        stored, affine = read_labels(path)
    except InputError as error:
        return nothing, _fault(case, "unreadable", _told(error), [name])
    mismatch = grid_mismatch(stored.shape, affine, volume)
    if mismatch:
        text = f"{path.name} lies on another grid than its image: {mismatch}"
        return nothing, _fault(case, "grid", text, [name])
    try:
        return inside_of(path, stored), None
    except InputError as error:
        return nothing, _fault(case, "labels", _told(error), [name])


def _together(findings: Sequence[Finding]) -> list[Finding]:
    """One finding of each kind: where one mask is on another grid, mostly all are."""
    first: dict[str, Finding] = {}
    for found in findings:
        if found.kind in first:
            names = (*first[found.kind].structures, *found.structures)
            first[found.kind] = replace(first[found.kind], structures=names)
        else:
            first[found.kind] = found
    return [
        replace(f, text=f"{f.text}; so, or like it, {len(f.structures) - 1} more masks")
        if len(f.structures) > 1
        else f
        for f in first.values()
    ]


def _overlaps(
    case: Case,
    labels: NDArray[Any],
    names: Sequence[str],
    shared: Mapping[tuple[str, str], int],
    classes: ClassTable,
) -> list[Finding]:
    counts = np.bincount(labels.ravel("K"), minlength=len(names) + 1)
    # What a later mask took from an earlier one is no more among its voxels.
    size = {name: int(counts[1 + n]) for n, name in enumerate(names)}
    for (under, _), n in shared.items():
        size[under] += n
    told: dict[Level, list[tuple[int, str, tuple[str, str]]]] = {"fault": [], "note": []}
    for pair, n in shared.items():
        if any(name not in classes and is_doubtful(name, classes) for name in pair):
            continue  # a cyst lies in its kidney
        share = n / max(1, min(size[name] for name in pair))
        grave = share >= _OVERLAP_SHARE and all(name in classes for name in pair)
        text = f"{pair[0]} and {pair[1]} share {n} voxels ({share:.1%} of the smaller)"
        told["fault" if grave else "note"].append((n, text, pair))
    findings = []
    for level, overlaps in told.items():
        overlaps.sort(reverse=True)
        if overlaps:
            about = dict.fromkeys(name for _, _, pair in overlaps for name in pair)
            text = _listed([text for _, text, _ in overlaps])
            findings.append(Finding(level, "overlap", case.name, text, tuple(about)))
    return findings


def _measured(drawn: _Drawn, volume: Volume) -> dict[str, Organ]:
    """Where each structure is, and how large."""
    if not drawn.names:
        return {}
    table = ClassTable(
        (Structure("background", "background"), *(Structure(name) for name in drawn.names))
    )
    return measure_organs(volume.orientation.working(drawn.labels), None, volume, table)


# --- its anatomy ----------------------------------------------------------------------------------


def _swapped(case: Case, organs: Mapping[str, Organ], classes: ClassTable) -> list[Finding]:
    """Pairs whose right one lies to the left, by their centroids in RAS+ mm."""
    wrong, close = {}, {}
    for name, right in organs.items():
        left = organs.get(_partner(name, classes))
        if left is None or right.centroid_mm is None or left.centroid_mm is None:
            continue
        apart = right.centroid_mm[0] - left.centroid_mm[0]
        limit = 0.0 if name in classes else -_PAIR_MM
        if apart < limit:
            wrong[name] = f"{name} lies {-apart:.0f} mm to the left of {left.name}"
        elif name in classes and apart < _PAIR_MM:
            close[name] = f"{name} lies only {apart:.0f} mm to the right of {left.name}"
    findings = []
    if wrong:
        findings.append(_fault(case, "sides", _listed(list(wrong.values())), wrong))
    if close:
        text = _listed(list(close.values()))
        findings.append(Finding("note", "sides", case.name, text, tuple(close)))
    return findings


def _partner(name: str, classes: ClassTable) -> str:
    """What is the left one of a right one; "" for anything else."""
    if name in classes and classes[name].mirror:
        return classes[name].mirror if classes[name].side == "R" else ""
    words = name.split("_")
    if words.count("right") != 1:
        return ""
    return "_".join("left" if word == "right" else word for word in words)


_AXES = {"right_of": (0, "left of"), "in_front_of": (1, "behind"), "above": (2, "below")}


@cache
def _relations() -> tuple[tuple[str, str, str, float], ...]:
    """(first, relation, second, mm that the first may lie on the wrong side) of the packaged table.

    They hold for whole structures and for those that a field of view cuts; checked on five labelled
    scans (of chest, abdomen and trunk).
    """
    rows = csv.DictReader(_data("relations.csv"))
    return tuple((r["first"], r["relation"], r["second"], float(r["margin_mm"])) for r in rows)


@cache
def _hu_ranges() -> dict[str, tuple[float, float]]:
    """Structure -> least and greatest median HU in a CT with or without contrast."""
    rows = csv.DictReader(_data("hu_ranges.csv"))
    return {r["structure"]: (float(r["low"]), float(r["high"])) for r in rows}


def _data(name: str) -> list[str]:
    return (resources.files("organfast") / "data" / name).read_text("utf-8").splitlines()


def _disordered(case: Case, organs: Mapping[str, Organ]) -> list[Finding]:
    """Structures that lie on the wrong side of each other."""
    where = {name: organ.centroid_mm for name, organ in organs.items()}
    wrong: list[tuple[float, str]] = []
    about: dict[str, None] = {}
    for first, relation, second, margin in _relations():
        one, other = where.get(first), where.get(second)
        if one is None or other is None:
            continue
        axis, contrary = _AXES[relation]
        apart = one[axis] - other[axis]
        if apart < -margin:
            wrong.append((apart, f"{first} lies {-apart:.0f} mm {contrary} {second}"))
            about |= {first: None, second: None}
    if not wrong:
        return []
    return [_fault(case, "order", _listed([text for _, text in sorted(wrong)]), about)]


def _odd_hu(
    case: Case, organs: Mapping[str, Organ], drawn: _Drawn, volume: Volume
) -> list[Finding]:
    """Organs that no CT shows as bright or as dark: HU that are shifted, or labels elsewhere."""
    odd, n_tested = {}, 0
    for name, (low, high) in _hu_ranges().items():
        organ = organs.get(name)
        if organ is None or organ.box_voxel is None:
            continue
        box = tuple(slice(start, stop) for start, stop in organ.box_voxel)
        median = float(np.median(volume.hu[box][drawn.labels[box] == organ.label]))
        n_tested += 1
        if not low <= median <= high:
            odd[name] = f"the median of {name} is {median:.0f} HU, not {low:.0f} to {high:.0f}"
    if not odd:
        return []
    level: Level = "fault" if 2 * len(odd) > n_tested else "note"
    why = "; HU are shifted or scaled, or the labels are of another scan" * (level == "fault")
    text = f"{_listed(list(odd.values()))}{why}"
    return [Finding(level, "hu", case.name, text, tuple(odd))]


# --- beside the others ----------------------------------------------------------------------------


def _duplicates(exams: Sequence[CaseExam]) -> list[Finding]:
    """Scans with the same voxels: of two patients, one is on both sides of a split."""
    first: dict[str, CaseExam] = {}
    findings = []
    for exam in exams:
        if not exam.digest:
            continue
        earlier = first.setdefault(exam.digest, exam)
        if earlier is exam:
            continue
        same = earlier.patient == exam.patient
        text = f"the same voxels as {earlier.name}"
        if not same:
            text += ", yet another patient: it would be trained and tested on"
        findings.append(Finding("note" if same else "fault", "duplicate", exam.name, text))
    return findings


def _missing(exams: Sequence[CaseExam], organs: Sequence[str]) -> list[Finding]:
    """Organs of the table that a case lacks and most of the others have."""
    measured = [exam for exam in exams if any(exam.volumes_ml.values())]
    having = Counter(n for exam in measured for n, ml in exam.volumes_ml.items() if ml)
    n_others = len(measured) - 1
    if n_others < _LEAST_OTHERS:
        return []
    findings = []
    for exam in measured:
        lacking = [
            name
            for name in organs
            if not exam.volumes_ml.get(name) and having[name] >= _MOST_HAVE * n_others
        ]
        if lacking:
            told = _listed([f"{n} ({having[n]} of {n_others} others have it)" for n in lacking])
            text = f"lacks {told}"
            findings.append(Finding("note", "missing", exam.name, text, tuple(lacking)))
    return findings


def _odd_volumes(exams: Sequence[CaseExam], organs: Sequence[str]) -> list[Finding]:
    """Whole organs of an odd size; what the field of view cuts off is no volume."""
    told: dict[str, dict[str, str]] = {}
    for name in organs:
        of_case = {
            exam.name: exam.volumes_ml[name]
            for exam in exams
            if exam.volumes_ml.get(name) and name not in exam.cut_off
        }
        for case, z, median in _odd(of_case):
            mine, usual = (
                f"{ml:.0f}" if ml >= 10 else f"{ml:.1f}" for ml in (of_case[case], median)
            )
            text = f"{name} of {mine} ml, where the median is {usual} (z {z:+.1f})"
            told.setdefault(case, {})[name] = text
    return [
        Finding("note", "volume", case, _listed(list(texts.values())), tuple(texts))
        for case, texts in told.items()
    ]


def _odd_spacings(exams: Sequence[CaseExam]) -> list[Finding]:
    findings = []
    for axis, along in enumerate("xyz"):
        of_case = {exam.name: exam.spacing_mm[axis] for exam in exams if exam.spacing_mm}
        for case, z, median in _odd(of_case):
            text = (
                f"voxels of {of_case[case]:.3g} mm along {along}, where the median is "
                f"{median:.3g} (z {z:+.1f})"
            )
            findings.append(Finding("note", "spacing", case, text))
    return findings


def _odd(values: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(case, robust z-score of the logarithm, median) of what stands out of at least five."""
    if len(values) < _LEAST_COHORT:
        return []
    logarithms = np.log(list(values.values()))
    middle = float(np.median(logarithms))
    spread = max(float(np.median(np.abs(logarithms - middle))), _LEAST_MAD)
    scores = _Z_PER_MAD * (logarithms - middle) / spread
    return [
        (case, float(z), float(np.exp(middle)))
        for case, z in zip(values, scores, strict=True)
        if abs(z) > _ODD_Z
    ]


def _listed(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(texts) - _NAMED_AT_MOST
    shown = ", ".join(texts[:_NAMED_AT_MOST])
    return f"{shown} and {more} more" if more > 0 else shown
