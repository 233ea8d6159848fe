"""Finds labelled cases on disk, and brings their labels to the classes of a model.

Six layouts are recognised; listing them reads file names and label tables, never voxels::

    totalsegmentator   s0011/ct.nii.gz   s0011/segmentations/liver.nii.gz ...
                       or one label map: s0011/labels.nii.gz, segmentation(s).nii.gz, *_seg.nii.gz
    visceral           10000100_1_CTce_ThAb.nii.gz   10000100_1_CTce_ThAb_58_4.nii.gz ...
                       (patient, scan, modality, region; RadLex id, annotator), up to two folders
                       deep, images and masks together or apart
    nnunet             dataset.json   imagesTr/NAME_0000.nii.gz   labelsTr/NAME.nii.gz
    msd                dataset.json, which lists its images and labels; see ``decathlon``
    pairs              NAME.nii.gz   NAME_labels.nii.gz or NAME_seg.nii.gz
                       or images/NAME.nii.gz   labels/NAME.nii.gz
    blocks             NAME.csv of blocks that were cut out already; see ``blockfiles``

What the numbers of a label map mean stands in a table, see ``labeltables``. Cases are patients
unless ``patients.csv`` (columns ``case,patient``) in the dataset's folder says which cases are
scans of one person.
"""

from __future__ import annotations

import csv
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure, canonical_name, stand_in_notes
from organfast.blockfiles import find_block_files
from organfast.cases import (
    IGNORED,
    BlockFile,
    Case,
    Dataset,
    LabelMap,
    Masks,
    list_folder,
    masks_by_structure,
    nifti_stem,
    several,
)
from organfast.decathlon import find_msd, find_nnunet
from organfast.dicom import is_dicom, list_series
from organfast.errors import InputError
from organfast.labeltables import NamesOf, label_names
from organfast.nifti import Geometry, corners_apart_mm, read_labels, write_labels, write_volume
from organfast.volume import Volume

__all__ = [
    "LAYOUTS",
    "BlockFile",
    "Case",
    "CaseLabels",
    "Dataset",
    "LabelMap",
    "Masks",
    "case_labels",
    "check_classes",
    "class_of_names",
    "dataset_classes",
    "dataset_notes",
    "dataset_nuisance",
    "find_cases",
    "find_scans",
    "grid_mismatch",
    "inside_of",
    "is_doubtful",
    "is_no_scan",
    "is_region",
    "lies_in",
    "scan_name",
    "write_case",
]

_LABEL_MAP_NAMES = ("labels", "segmentation", "segmentations")
_LABEL_MAP_ENDINGS = ("_labels", "_seg")
_VISCERAL = re.compile(
    r"(?P<scan>(?P<patient>\d+)_\d+_CT[A-Za-z]*_[A-Za-z]+)(?:_(?P<radlex>\d+)_(?P<annotator>\d+))?"
)
_MASK_FOLDER = "segmentations"
# Of a result of ours: a DICOM file, and no scan.
_SEGMENTATION = "segmentation.dcm"
_MAP_FOLDER = "probabilities"
_DEPTH = 2
# Voxels relabelled at a time: the index arrays NumPy makes of them take eight bytes each.
_CHUNK = 1 << 20
# Writers round affines differently; a tenth of a voxel moves no label.
_GRID_TOLERANCE = 0.1

# Labelled apart, but of an organ: a vessel in the lung is lung to whoever segments lungs.
_PART_OF = {
    "lung_vessel_right": "lung_right",
    "lung_vessel_left": "lung_left",
    "liver_vessel": "liver",
}
# Structures of the trunk's wall: bones, muscles, fat and skin around what the organs lie in.
_WALL = (
    *("skin", "subcutaneous_fat", "intermuscular_fat", "breast_*", "body_wall_muscle"),
    *("autochthon_*", "gluteus_*", "iliacus_muscle_*", "quadratus_lumborum_muscle_*"),
    *("rectus_abdominis_*", "rib_*", "costal_cartilages", "sternum", "clavicula_*", "scapula_*"),
    *("humerus_*", "vertebrae_*", "intervertebral_discs", "spinal_cord", "sacrum", "hip_*"),
    *("femur_*", "skull"),
)
# Names of what may hold an organ, and words for what may lie in one.
_REGIONS = frozenset(
    (
        *("body", "body_trunc", "body_extremities", "trunk", "torso", "thorax", "chest", "abdomen"),
        *("pelvis", "mediastinum", "thoracic_cavity", "abdominal_cavity", "thorax_abdomen"),
        *("body_envelope", "soft_tissue", "muscle", "muscles", "skeletal_muscle", "bone", "bones"),
        *("skeleton", "spine", "vessels", "organs", "glands", "rest", "other"),
    )
)
_ANYWHERE = frozenset(
    (
        *("abscess", "calcification", "cancer", "carcinoma", "cyst", "haemorrhage", "hematoma"),
        *("implant", "lesion", "metastasi", "metastase", "nodule", "stent", "stone", "tumor"),
        *("tumour", "unknown", "ignore"),
    )
)
_SIDES = frozenset(("left", "right"))


@dataclass(frozen=True, eq=False)
class CaseLabels:
    """The labels of a case as classes of a table.

    Parameters
    ----------
    labels : (n_a, n_b, n_c) uint8 or uint16
        Axes as stored by the image. A class of the table; from there on a structure beside the
        table, see ``dataset_nuisance``; or one of two values that are neither. ``unlabelled``:
        nothing is said of the voxel, or a structure that was not asked for. Outside the body such a
        voxel is background, inside it the table's context class, if ``missing`` holds no organ.
        ``doubtful``, only where structures beside the table were asked for: it may or may not be an
        organ of the table (``kidney_cyst_left``).
    missing : frozenset of int
        Classes the case does not annotate: that they have no voxel means nothing. The background
        and the table's context class, which are what the others leave, are never among them.
    warnings : tuple of str
        What is doubtful, such as masks that overlap.
    """

    labels: NDArray[Any]
    missing: frozenset[int]
    warnings: tuple[str, ...] = ()

    @property
    def unlabelled(self) -> int:
        """The value of voxels without a label: the greatest of the dtype, never a class."""
        return int(np.iinfo(self.labels.dtype).max)

    @property
    def doubtful(self) -> int:
        """The value of voxels of which nothing can be learned: the greatest but one."""
        return self.unlabelled - 1


# --- finding --------------------------------------------------------------------------------------


def find_cases(folder: str | PathLike[str], layout: str = "auto") -> Dataset:
    """List the labelled scans of a folder.

    Where its ``patients.csv`` names a case, the patient that stands beside it is whom the case
    shows: all scans of one person stay on one side of every split.

    Parameters
    ----------
    folder : str or PathLike
        Root of the dataset.
    layout : {"auto", "totalsegmentator", "visceral", "nnunet", "msd", "pairs", "blocks"}
        How the files are arranged; "auto" finds out.

    Raises
    ------
    InputError
        The folder cannot be listed, holds no labelled scan or several layouts, or a table is
        broken.
    ValueError
        The layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; use {', '.join(LAYOUTS)}")
    folder = Path(folder)
    names_of = label_names(folder)
    tried = _FINDERS if layout == "auto" else {layout: _FINDERS[layout]}
    if layout == "blocks":  # what else is in the folder is then no reason to doubt
        tried = {layout: lambda folder, _: find_block_files(folder, surely=True)}
    found = {name: find(folder, names_of) for name, find in tried.items()}
    datasets = [Dataset(folder, name, *lists) for name, lists in found.items() if lists[0]]
    if len(datasets) > 1:
        names = " and ".join(dataset.layout for dataset in datasets)
        raise InputError(folder, f"holds cases of the layouts {names}", "name the one to use")
    if not datasets:
        raise InputError(
            folder,
            "holds no labelled scan" + ("" if layout == "auto" else f" of layout {layout}"),
            "give NAME.nii.gz with NAME_labels.nii.gz, sub-folders with ct.nii.gz and labels, "
            "VISCERAL's file names, or dataset.json with imagesTr and labelsTr",
        )
    return _with_patients(datasets[0])


def find_scans(path: str | PathLike[str]) -> dict[str, Path]:
    """The scans to segment: a file itself, or those of a folder and its sub-folders.

    DICOM files that lie in one folder, or in a zip that is given itself, are a scan for each CT
    series among them, named like the folder, with ``series_N`` where there are several.

    Left out are what the layouts use for labels: ``labels``, ``segmentation(s)``, ``*_labels``,
    ``*_seg``, masks with VISCERAL's names and folders called ``segmentations``; and the folders
    ``probabilities`` of results.

    Parameters
    ----------
    path : str or PathLike
        A file or a folder. All its sub-folders are searched but hidden ones, for archives keep a
        folder for each patient, study and series; a link to a folder is followed unless that is
        searched anyway.

    Returns
    -------
    dict of str to Path
        Name -> file, sorted. The name is the path inside the folder without ending; a scan called
        ``ct`` has the name of its sub-folder. Of several DICOM series each is ``PATH#N``.

    Raises
    ------
    InputError
        The folder cannot be listed or holds no scan. That a file exists is found out on reading.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix.lower() == ".zip" and is_dicom(path):
            return dict(_series_of(path, Path(path.stem)))
        return {nifti_stem(path.name) or path.name: path}
    scans: dict[str, Path] = {}
    for name, file in sorted(_scans_in(path, Path(), [Path(os.path.realpath(path))])):
        if name in scans:
            raise several(path, [scans[name], file])
        scans[name] = file
    if not scans and is_dicom(path):  # no CT: reading it says what it is
        return {path.resolve().name: path}
    if not scans:
        raise InputError(
            path, "holds no scan", "give a folder with .nii or .nii.gz files, or of a DICOM series"
        )
    return scans


def _series_of(path: Path, inside: Path) -> list[tuple[str, Path]]:
    """The DICOM scans that lie directly in a folder or zip."""
    try:
        choices = list(list_series(path))
    except InputError:  # is one scan, which fails by itself when it is read
        choices = [""]
    if len(choices) == 1:
        return [(inside.as_posix(), path)]
    return [((inside / f"series_{n}").as_posix(), Path(f"{path}#{n}")) for n in choices]


def is_no_scan(path: PurePath) -> bool:
    """Whether a file is a label map, a mask or a probability map, by its name and its folder's.

    Parameters
    ----------
    path : PurePath
        Of a NIfTI file.
    """
    stem = nifti_stem(path.name) or path.name
    match = _VISCERAL.fullmatch(stem)
    is_mask = match is not None and match["radlex"] is not None
    return is_mask or _is_label_map(stem) or path.parent.name in (_MASK_FOLDER, _MAP_FOLDER)


def scan_name(inside: PurePath) -> str:
    """What a scan is called: its path without ending; ``ct`` has the name of its folder.

    Parameters
    ----------
    inside : PurePath
        Of the file, inside the folder that was given.
    """
    named = inside.with_name(nifti_stem(inside.name) or inside.name)
    return (named.parent if named.name == "ct" and named.parent.name else named).as_posix()


def _scans_in(folder: Path, inside: Path, roots: list[Path]) -> list[tuple[str, Path]]:
    """``roots``: real folders that are searched whole; a link into them leads nowhere new."""
    files, folders = list_folder(folder)
    scans = [
        (scan_name(inside / path.name), path) for path in files.values() if not is_no_scan(path)
    ]
    if is_dicom(folder) and not (folder / _SEGMENTATION).exists():
        scans += _series_of(folder, inside if inside.name else Path(folder.resolve().name))
    for name, sub_folder in folders.items():
        if name in (_MASK_FOLDER, _MAP_FOLDER):
            continue
        if sub_folder.is_symlink():
            real = Path(os.path.realpath(sub_folder))
            if any(real.is_relative_to(root) for root in roots):
                continue
            roots.append(real)
        scans += _scans_in(sub_folder, inside / name, roots)
    return scans


_Found = tuple[tuple[Case, ...], tuple[str, ...]]


def _find_totalsegmentator(folder: Path, names_of: NamesOf) -> _Found:
    cases, skipped = [], []
    for name, subject in sorted(list_folder(folder)[1].items()):
        files, folders = list_folder(subject)
        if "ct" not in files:
            continue
        labels = _subject_labels(subject, files, folders, names_of)
        if labels is None:
            skipped.append(name)
        else:
            cases.append(Case(name, name, files["ct"], labels))
    return tuple(cases), tuple(skipped)


def _subject_labels(
    subject: Path, files: Mapping[str, Path], folders: Mapping[str, Path], names_of: NamesOf
) -> LabelMap | Masks | None:
    """A label map in the subject's folder, else its folder of masks."""
    maps = [path for stem, path in files.items() if _is_label_map(stem)]
    if len(maps) > 1:
        raise several(subject, maps)
    if maps:
        return LabelMap(maps[0], names_of(maps[0]))
    if _MASK_FOLDER not in folders:
        return None
    masks = list_folder(folders[_MASK_FOLDER])[0]
    return masks_by_structure(subject, masks) if masks else None


def _find_visceral(folder: Path, names_of: NamesOf) -> _Found:
    del names_of  # the RadLex id in a mask's name says what it is
    images: dict[str, Path] = {}
    patients: dict[str, str] = {}
    masks: dict[str, dict[str, tuple[int, Path]]] = {}
    for stem, path in _walk(folder, _DEPTH):
        match = _VISCERAL.fullmatch(stem)
        if match is None:
            continue
        scan, radlex = match["scan"], match["radlex"]
        patients[scan] = match["patient"]
        if radlex is None:
            if scan in images:
                raise several(folder, [images[scan], path])
            images[scan] = path
            continue
        annotated = (int(match["annotator"]), path)
        of_scan = masks.setdefault(scan, {})
        # Where several people drew a structure, the first annotator's mask counts.
        of_scan[radlex] = min(annotated, of_scan.get(radlex, annotated))
    cases = tuple(
        Case(
            scan,
            patients[scan],
            image,
            masks_by_structure(
                folder, {id_: path for id_, (_, path) in sorted(masks[scan].items())}
            ),
        )
        for scan, image in sorted(images.items())
        if scan in masks
    )
    return cases, tuple(sorted(set(images) - set(masks)))


def _find_pairs(folder: Path, names_of: NamesOf) -> _Found:
    files, folders = list_folder(folder)
    labelled: dict[str, Path] = {}
    if {"images", "labels"} <= folders.keys():
        apart = list_folder(folders["images"])[0]
        maps = {_unlabelled(s): p for s, p in list_folder(folders["labels"])[0].items()}
        labelled = {name: maps[name] for name in apart if name in maps}
        if labelled:
            files = {**files, **apart}
    for stem, path in files.items():
        image = _unlabelled(stem)
        if stem != image and image in files:
            if image in labelled:
                raise several(folder, [labelled[image], path])
            labelled[image] = path
    cases = tuple(
        Case(name, name, files[name], LabelMap(path, names_of(path)))
        for name, path in sorted(labelled.items())
    )
    label_maps = set(labelled.values())
    alone = [s for s, p in files.items() if s not in labelled and p not in label_maps]
    return cases, tuple(sorted(alone))


def _unlabelled(stem: str) -> str:
    """The name of a label map without what says that it is one."""
    ending = next((e for e in _LABEL_MAP_ENDINGS if stem.endswith(e)), "")
    return stem.removesuffix(ending)


_FINDERS: dict[str, Callable[[Path, NamesOf], _Found]] = {
    "visceral": _find_visceral,
    "totalsegmentator": _find_totalsegmentator,
    "nnunet": lambda folder, _: find_nnunet(folder),
    "msd": lambda folder, _: find_msd(folder),
    "pairs": _find_pairs,
    "blocks": lambda folder, _: find_block_files(folder),
}
LAYOUTS = ("auto", "totalsegmentator", "visceral", "nnunet", "msd", "pairs", "blocks")
"""What ``find_cases`` takes as a layout."""


def _is_label_map(stem: str) -> bool:
    return stem in _LABEL_MAP_NAMES or stem.endswith(_LABEL_MAP_ENDINGS)


def _walk(folder: Path, depth: int) -> list[tuple[str, Path]]:
    files, folders = list_folder(folder)
    found = list(files.items())
    if depth:
        for sub_folder in folders.values():
            found += _walk(sub_folder, depth - 1)
    return found


# --- patients -------------------------------------------------------------------------------------


def _with_patients(dataset: Dataset) -> Dataset:
    """The dataset with the patients that its ``patients.csv`` names, if there is one."""
    path = dataset.folder / "patients.csv"
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except FileNotFoundError:
        return dataset
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(path, f"cannot be read ({error})", "give columns case,patient") from None
    patient_of: dict[str, str] = {}
    known = {*(case.name for case in dataset.cases), *dataset.skipped}
    for row in rows:
        case, patient = ((row.get(column) or "").strip() for column in ("case", "patient"))
        if not case or not patient:
            raise InputError(path, "has a row without case or patient", "give columns case,patient")
        if patient_of.setdefault(case, patient) != patient:
            raise InputError(path, f"gives {case} two patients", "leave one of them")
        if case not in known:
            raise InputError(path, f"names {case}, which is no case", "see `organfast info`")
    cases = (
        replace(case, patient=patient_of.get(case.name, case.patient)) for case in dataset.cases
    )
    return replace(dataset, cases=tuple(cases))


# --- classes --------------------------------------------------------------------------------------


def dataset_classes(dataset: Dataset) -> ClassTable:
    """The classes to learn from a dataset.

    Those of the default table that some case annotates, with the context class; or, where the
    dataset has none of the default organs, all structures under its own names.

    Parameters
    ----------
    dataset : Dataset
        Of ``find_cases``.

    Raises
    ------
    InputError
        The dataset names no structure.
    """
    default = ClassTable.default()
    kinds = {case.labels.annotated for case in dataset.cases}
    found = {s for s in default.structures for names in kinds if _is_annotated(s, names)}
    if any(s.role == "organ" for s in found):
        context = default.structures[default.context or 0]
        return default.keep(s.name for s in {*found, context})
    if not dataset.structures:
        raise InputError(dataset.folder, "names no structure", "complete its label table")
    return ClassTable.from_names(dataset.structures)


def check_classes(classes: ClassTable, dataset: Dataset) -> None:
    """Raise ValueError when the table has an organ that no case of the dataset annotates.

    Parameters
    ----------
    classes : ClassTable
        What is to be learned.
    dataset : Dataset
        Of ``find_cases``.
    """
    kinds = {case.labels.annotated for case in dataset.cases}
    for label in classes.organs:
        s = classes.structures[label]
        if not any(_is_annotated(s, names) for names in kinds):
            raise ValueError(
                f"the class table names {s.name}, which no case of {dataset.folder} annotates; "
                "leave it out, or use the names that `organfast info DATASET` lists"
            )


def dataset_notes(dataset: Dataset, classes: ClassTable) -> tuple[str, ...]:
    """What stands for a class without being called so: the lobes of a lung, the iliopsoas.

    Parameters
    ----------
    dataset : Dataset
        Of ``find_cases``.
    classes : ClassTable
        The classes of the model.

    Returns
    -------
    tuple of str
        One line for each such class.
    """
    names = set(dataset.structures)
    caveats = stand_in_notes()
    notes = []
    for s in classes.structures:
        others = sorted(names.intersection(s.totalsegmentator) - {s.name})
        if s.name in names or not others:
            continue
        if len(others) > 1:
            notes.append(f"{' + '.join(others)} make up {s.name}")
        else:
            caveat = f": {caveats[others[0]]}" if others[0] in caveats else ""
            notes.append(f"{others[0]} stands for {s.name}{caveat}")
    return tuple(notes)


def dataset_nuisance(dataset: Dataset, classes: ClassTable) -> dict[str, int]:
    """Structures that a dataset labels beside those of a class table: heart, bowel, bones, ...

    A classifier that learns them one by one tells organs from them better than from one class of
    everything else. They are context because of what they are, and stay so where a case does not
    annotate every organ. Left out is whatever may hold an organ of the table (``abdomen``), be one
    (``kidney``, of a side that is not said) or lie in one (``kidney_cyst_left``, ``tumour``).

    Parameters
    ----------
    dataset : Dataset
        Of ``find_cases``.
    classes : ClassTable
        The classes of the model.

    Returns
    -------
    dict of str to int
        Name -> the class of the table that it lies in, by name: ``body_envelope`` for structures of
        the trunk's wall where the table has that class, else the context class, or the background
        where the table has none. Numbered ones are one: ``rib_left_1`` to ``12`` are ``rib_left``.
        The n-th has the label ``len(classes) + n`` in :func:`case_labels`.
    """
    class_of = class_of_names(classes)
    groups = {
        _group(name): lies_in(_named(name), classes)
        for name in dataset.structures
        if name not in class_of and not is_region(name) and not is_doubtful(name, classes)
    }
    return dict(sorted(groups.items()))


def class_of_names(classes: ClassTable) -> dict[str, int]:
    """Every name that a dataset may use for the structures of a table -> class.

    Parameters
    ----------
    classes : ClassTable
        The table. Parts (the lobes of a lung, its vessels) lead to their whole; where two
        structures claim a name, it is that of the one called so.
    """
    known = {s.name: label for label, s in enumerate(classes.structures)}
    for label, s in enumerate(classes.structures):
        for name in (s.name, *s.aliases, *s.totalsegmentator):
            known.setdefault(name, label)
            known.setdefault(canonical_name(name), label)
    for part, whole in _PART_OF.items():
        if whole in classes:
            known.setdefault(part, classes.index(whole))
    return known


def lies_in(name: str, classes: ClassTable) -> int:
    """The class of a table that a structure lies in which the table does not have.

    Parameters
    ----------
    name : str
        The structure; TotalSegmentator's name where it has one.
    classes : ClassTable
        The table.

    >>> classes = ClassTable.default()
    >>> [classes.names[lies_in(name, classes)] for name in ("heart", "rib_left_3")]
    ['thorax_abdomen', 'body_envelope']
    """
    if "body_envelope" in classes and any(fnmatchcase(name, wall) for wall in _WALL):
        return classes.index("body_envelope")
    return classes.context or 0


def _named(name: str) -> str:
    """The name that the default table gives a RadLex id; any other name as it is."""
    if not name.isdecimal():
        return name
    return next((s.name for s in ClassTable.default().structures if str(s.radlex) == name), name)


def _group(name: str) -> str:
    return re.sub(r"_?\d+$", "", _named(name))


def is_region(name: str) -> bool:
    """Whether the name says no more than that a voxel is somewhere in the body.

    Parameters
    ----------
    name : str
        Of a structure.
    """
    return _named(name).lower() in _REGIONS


def is_doubtful(name: str, classes: ClassTable) -> bool:
    """Whether a structure that is none of the table's may yet be, hold or lie in one of them.

    Parameters
    ----------
    name : str
        Of the structure.
    classes : ClassTable
        The table.
    """
    words = _words(_named(name))
    if _named(name).isdecimal() or not words.isdisjoint(_ANYWHERE):
        return True
    for label in classes.organs:
        s = classes.structures[label]
        for known in (s.name, *s.totalsegmentator):
            whole = _words(known)
            sides = words & _SIDES, whole & _SIDES
            if all(sides) and sides[0] != sides[1]:
                continue
            if words - _SIDES <= whole - _SIDES or whole - _SIDES <= words - _SIDES:
                return True
    return False


def _words(name: str) -> frozenset[str]:
    return frozenset(word.rstrip("s") for word in name.lower().split("_") if word)


def _is_annotated(structure: Structure, names: frozenset[str]) -> bool:
    parts = structure.totalsegmentator
    whole = bool(parts) and names.issuperset(parts)
    aliases = {*structure.aliases, *map(canonical_name, structure.aliases)}
    return whole or not names.isdisjoint(aliases)


# --- labels of a case -----------------------------------------------------------------------------


def case_labels(
    case: Case, classes: ClassTable, volume: Volume, nuisance: Mapping[str, int] | None = None
) -> CaseLabels:
    """Read the labels of a case as classes, on the grid of its image.

    Parameters
    ----------
    case : Case
        Of ``find_cases``.
    classes : ClassTable
        Structures of the dataset find their class by name, RadLex id or TotalSegmentator name;
        parts (the lobes of a lung) become their whole.
    volume : Volume
        The image of the case.
    nuisance : mapping of str to int, optional
        Of ``dataset_nuisance``: structures beside the table, to have labels of their own. By
        default they are unlabelled.

    Returns
    -------
    CaseLabels
        uint8 up to 254 labels, uint16 beyond.

    Raises
    ------
    InputError
        A label file cannot be read, lies on another grid than the image, holds a number without a
        name or several values in a mask, the case has no labelled voxel at all, or it is of blocks.
    """
    if isinstance(case.labels, BlockFile):
        raise InputError(case.image, "holds blocks, not a scan", "train a Block on the dataset")
    annotated = case.labels.annotated
    missing = frozenset(
        label
        for label, s in enumerate(classes.structures)
        if label not in (0, classes.context) and not _is_annotated(s, annotated)
    )
    label_of = _labels_of(annotated, classes, nuisance)
    if isinstance(case.labels, LabelMap):
        return CaseLabels(_from_label_map(case.labels, label_of, volume), missing)
    labels, warnings = _from_masks(case.labels, label_of, classes, volume)
    return CaseLabels(labels, missing, warnings)


@dataclass(frozen=True)
class _Labels:
    """What each name of a case becomes, in which dtype; a name that is not here is unlabelled."""

    by_name: Mapping[str, int]
    n_classes: int
    dtype: np.dtype[Any]

    unlabelled: int

    def narrowest(self, names: Sequence[str]) -> int:
        """The label of nested structures, the narrowest first: the first that is a class, if any.

        What is to be ignored is no part of anything.
        """
        labels = [self.by_name.get(name, self.unlabelled) for name in names]
        if names[0] == IGNORED:
            return labels[0]
        return next((label for label in labels if label < self.n_classes), labels[0])


def _labels_of(
    annotated: frozenset[str], classes: ClassTable, nuisance: Mapping[str, int] | None
) -> _Labels:
    n_labels = len(classes) + len(nuisance or {})
    dtype = np.uint8 if n_labels < np.iinfo(np.uint8).max else np.uint16
    unlabelled = int(np.iinfo(dtype).max)
    fine = {name: len(classes) + n for n, name in enumerate(nuisance or {})}
    class_of = class_of_names(classes)
    by_name = {}
    for name in annotated:
        if name in class_of:
            by_name[name] = class_of[name]
        elif nuisance is None or is_region(name):
            continue
        elif is_doubtful(name, classes):
            by_name[name] = unlabelled - 1
        elif _group(name) in fine:
            by_name[name] = fine[_group(name)]
    by_name[IGNORED] = unlabelled - 1
    return _Labels(by_name, len(classes), np.dtype(dtype), unlabelled)


def _from_label_map(label_map: LabelMap, label_of: _Labels, volume: Volume) -> NDArray[Any]:
    stored = _read_on_grid(label_map.path, volume)
    n_ids = np.iinfo(stored.dtype).max + 1
    table = np.full(n_ids, label_of.unlabelled, label_of.dtype)
    named = np.zeros(n_ids, bool)
    named[0] = True
    for number, name in label_map.names.items():
        if number < n_ids:
            table[number] = label_of.narrowest((name, *label_map.within.get(number, ())))
            named[number] = True
    table[0] = 0 if label_map.zero_is_background else label_of.unlabelled

    labels = np.empty_like(stored, label_of.dtype)
    counts = np.zeros(n_ids, np.int64)
    n_slices = max(1, _CHUNK // stored[:, :, 0].size)
    for k in range(0, stored.shape[2], n_slices):
        part = stored[:, :, k : k + n_slices]
        counts += np.bincount(part.ravel("K"), minlength=n_ids)
        labels[:, :, k : k + n_slices] = table[part]
    unknown = np.flatnonzero((counts > 0) & ~named)
    if unknown.size:
        raise InputError(
            label_map.path,
            f"holds label {unknown[0]}, which its label table does not name",
            "name it in labels.csv (columns id,name) beside the file or in the dataset's folder",
        )
    if not counts[1:].any():
        raise _nothing_labelled(label_map.path)
    return labels


def _from_masks(
    masks: Masks, label_of: _Labels, classes: ClassTable, volume: Volume
) -> tuple[NDArray[Any], tuple[str, ...]]:
    labels = np.full(volume.hu.shape, label_of.unlabelled, label_of.dtype, order="F")
    warnings = []
    wanted = sorted(
        (label_of.by_name[name], path)
        for name, path in masks.paths.items()
        if name in label_of.by_name
    )
    # What is beside the table comes first, so that it never takes a voxel of an organ.
    n_classes = len(classes)
    for label, path in sorted(wanted, key=lambda mask: mask[0] < n_classes):
        inside = _read_mask(path, volume)
        taken = labels[inside]
        n_taken = np.count_nonzero((taken < n_classes) & (taken != label))
        if n_taken:
            name = classes.structures[label].name
            warnings.append(f"{path.name}: {n_taken} voxels had another label; {name} wins")
        labels[inside] = label
    if (labels == label_of.unlabelled).all():
        others = set(masks.paths.values()) - {path for _, path in wanted}
        if not any(_read_mask(path, volume).any() for path in sorted(others)):
            raise _nothing_labelled(next(iter(masks.paths.values())).parent)
    return labels, tuple(warnings)


def _nothing_labelled(path: Path) -> InputError:
    return InputError(path, "has no labelled voxel at all", "leave the case out, or label it")


def _read_mask(path: Path, volume: Volume) -> NDArray[np.bool_]:
    return inside_of(path, _read_on_grid(path, volume))


def inside_of(path: Path, mask: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a mask is not 0.

    Parameters
    ----------
    path : Path
        Its file, which an error names.
    mask : (n_a, n_b, n_c) uint8 or uint16
        What was read from it.

    Raises
    ------
    InputError
        It holds several labels.
    """
    inside: NDArray[np.bool_] = mask != 0
    greatest = mask.max()
    if np.count_nonzero(inside) != np.count_nonzero(mask == greatest) and greatest:
        raise InputError(
            path, "holds several labels, so it is no mask", "write one file per structure"
        )
    return inside


def _read_on_grid(path: Path, volume: Volume) -> NDArray[Any]:
    """Labels of a file that must lie on the grid of the volume."""
    labels, affine = read_labels(path)
    problem = grid_mismatch(labels.shape, affine, volume)
    if problem:
        raise InputError(
            path, f"lies on another grid than its image: {problem}", "resample it onto the image"
        )
    return labels


def grid_mismatch(shape: tuple[int, ...], affine: NDArray[np.float64], volume: Volume) -> str:
    """How the grid of some labels differs from that of their image; nothing where it does not.

    Parameters
    ----------
    shape : tuple of int
        Voxels of the labels along the stored axes.
    affine : (4, 4) float64
        Their stored voxel index -> RAS+ mm.
    volume : Volume
        The image.
    """
    if shape != volume.hu.shape:
        shapes = ["×".join(map(str, of)) for of in (shape, volume.hu.shape)]
        return f"{shapes[0]} voxels, the image {shapes[1]}"
    apart = corners_apart_mm(volume.hu.shape, affine, volume.affine)
    if apart > _GRID_TOLERANCE * min(volume.working_spacing_mm):
        return f"up to {apart:.3g} mm apart"
    return ""


# --- writing --------------------------------------------------------------------------------------


def write_case(
    folder: str | PathLike[str],
    name: str,
    volume: Volume,
    labels: NDArray[Any],
    classes: ClassTable,
) -> None:
    """Add a case to a dataset: ``NAME/ct.nii.gz``, ``NAME/labels.nii.gz`` and ``labels.csv``.

    Parameters
    ----------
    folder : str or PathLike
        Root of the dataset; made where it does not exist.
    name : str
        Of the case.
    volume : Volume
        Its image.
    labels : (n_a, n_b, n_c) uint8 or uint16
        Class of each voxel, axes as stored by the volume.
    classes : ClassTable
        What the labels mean; the same for all cases of the dataset.

    Raises
    ------
    InputError
        Nothing can be written there, or the dataset has another label table.
    ValueError
        A label is not in the table, or the arrays do not fit each other.
    """
    if int(labels.max()) >= len(classes):
        raise ValueError(f"label {labels.max()} is not in a table of {len(classes)} classes")
    if labels.shape != volume.hu.shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit {volume.hu.shape} voxels")
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"case name {name!r} is no name for a folder; use one such as case_01")
    folder = Path(folder)
    table = "id,name\n" + "".join(f"{i},{s}\n" for i, s in enumerate(classes.names))
    try:
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write_table(folder / "labels.csv", table)
    except OSError as error:
        raise InputError(
            folder, f"cannot be written ({error.strerror})", "give a folder with room to write in"
        ) from None
    # The image last: a folder without one is no case.
    write_labels(folder / name / "labels.nii.gz", labels, Geometry.of_volume(volume))
    write_volume(folder / name / "ct.nii.gz", volume)


def _write_table(path: Path, text: str) -> None:
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise InputError(path, "names other labels", "write the case to a folder of its own")
        return
    beside = path.with_name(f".organfast-{secrets.token_hex(8)}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
