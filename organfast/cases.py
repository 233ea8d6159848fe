"""Cases on disk: a scan, where its labels are, and whose it is. Nothing here reads a voxel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from organfast.anatomy import ClassTable, canonical_name
from organfast.errors import InputError

__all__ = [
    "IGNORED",
    "BlockFile",
    "Case",
    "Dataset",
    "LabelMap",
    "Masks",
    "list_folder",
    "masks_by_structure",
    "nifti_stem",
    "several",
    "structure_name",
]

IGNORED = "ignore"
"""nnU-Net's name for voxels of which nothing is to be learned."""

_SUFFIXES = (".nii.gz", ".nii")
# The rest of the inside has a label of its own where one of these has.
_REST_OF_INSIDE = ("body_envelope", "thorax_abdomen", "trunk_fat")


@dataclass(frozen=True)
class LabelMap:
    """One file in which every structure has its number.

    Parameters
    ----------
    path : Path
        The label map.
    names : mapping of int to str
        What each number means. A structure that is named but has no voxel is known to be absent.
    within : mapping of int to tuple of str
        The wider structures that a number lies in as well, the narrowest first: a tumour in a
        kidney.
    """

    path: Path
    names: Mapping[int, str]
    within: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def annotated(self) -> frozenset[str]:
        """Names of the structures that the file would show if they were there."""
        names = {name for label, name in self.names.items() if label > 0}
        return frozenset(names.union(*self.within.values()) - {IGNORED})

    @property
    def zero_is_background(self) -> bool:
        """Whether 0 is the outside of the body rather than all that has no label.

        So it is only where the rest of the inside of the body has a label of its own.
        """
        rest = not set(_REST_OF_INSIDE).isdisjoint(self.names.values())
        return rest and self.names.get(0) == "background"


@dataclass(frozen=True)
class Masks:
    """One file per structure, non-zero inside it.

    Parameters
    ----------
    paths : mapping of str to Path
        Structure name (or RadLex id) -> file. A structure without a file is not annotated.
    """

    paths: Mapping[str, Path]

    @property
    def annotated(self) -> frozenset[str]:
        """Names of the structures that have a file."""
        return frozenset(self.paths) - {IGNORED}


@dataclass(frozen=True)
class BlockFile:
    """One file of labelled blocks, cut out of a scan that is not there; see ``blockfiles``.

    Parameters
    ----------
    path : Path
        The file.
    """

    path: Path

    @property
    def annotated(self) -> frozenset[str]:
        """The structures of the default table: which of them occur is known when it is read."""
        return frozenset(ClassTable.default().names)


@dataclass(frozen=True)
class Case:
    """One labelled scan of a dataset; its voxels are read when they are needed.

    Parameters
    ----------
    name : str
        Unique in the dataset.
    patient : str
        The same for all scans of one person: what a split keeps together.
    image : Path
        The CT scan; of blocks their file.
    labels : LabelMap, Masks or BlockFile
        Where its structures are.
    """

    name: str
    patient: str
    image: Path
    labels: LabelMap | Masks | BlockFile


@dataclass(frozen=True)
class Dataset:
    """What a folder of labelled scans holds.

    Parameters
    ----------
    folder : Path
        Where it lies.
    layout : str
        "totalsegmentator", "visceral", "nnunet", "msd", "pairs" or "blocks".
    cases : tuple of Case
        Sorted by name.
    skipped : tuple of str
        Scans without labels, by name.
    """

    folder: Path
    layout: str
    cases: tuple[Case, ...]
    skipped: tuple[str, ...] = ()

    @property
    def patients(self) -> tuple[str, ...]:
        """Each patient once, sorted."""
        return tuple(sorted({case.patient for case in self.cases}))

    @property
    def structures(self) -> tuple[str, ...]:
        """Names that some case annotates, sorted; see ``ClassTable.from_names``."""
        annotated = frozenset[str]().union(*(case.labels.annotated for case in self.cases))
        return tuple(sorted(annotated))


# --- folders --------------------------------------------------------------------------------------


def nifti_stem(name: str) -> str | None:
    """A file's name without ``.nii`` or ``.nii.gz``; None where it has neither.

    Parameters
    ----------
    name : str
        Of a file.
    """
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
    return None if suffix is None else name.removesuffix(suffix)


def several(folder: Path, paths: Iterable[Path]) -> InputError:
    """The error of a folder in which several files could be one thing.

    Parameters
    ----------
    folder : Path
        Where they lie.
    paths : iterable of Path
        The files.
    """
    names = " and ".join(sorted(os.path.relpath(path, folder) for path in paths))
    return InputError(folder, f"holds {names} for one scan", "leave one of them")


def list_folder(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """NIfTI files by their names without ending, and sub-folders by name; hidden ones left out.

    Parameters
    ----------
    folder : Path
        Where to look; sub-folders are not entered.

    Raises
    ------
    InputError
        The folder cannot be listed.
    """
    files: dict[str, Path] = {}
    folders: dict[str, Path] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                stem = nifti_stem(entry.name)
                if entry.name.startswith("."):
                    continue
                if stem is not None:
                    files.setdefault(stem, folder / entry.name)
                elif entry.is_dir():
                    folders[entry.name] = folder / entry.name
    except OSError as error:
        raise InputError(
            folder, f"cannot be listed ({error.strerror})", "give the folder of a dataset"
        ) from None
    return files, folders


def masks_by_structure(folder: Path, files: Mapping[str, Path]) -> Masks:
    """Masks under the canonical names of their structures.

    Parameters
    ----------
    folder : Path
        Named in the error.
    files : mapping of str to Path
        File names without ending, or RadLex ids -> files.

    Raises
    ------
    InputError
        Two files are of one structure.
    """
    paths: dict[str, Path] = {}
    for stem, path in files.items():
        name = structure_name(stem)
        if name in paths:
            raise several(folder, [paths[name], path])
        paths[name] = path
    return Masks(paths)


def structure_name(value: Any) -> str:
    """The canonical name of a structure, without spaces and slashes.

    Parameters
    ----------
    value : object
        What a file is called, or what stands in a table.
    """
    return canonical_name(re.sub(r"[\s/\\]+", "_", str(value or "").strip()))
